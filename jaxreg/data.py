"""Data sets for ``jaxreg compare``: built in, or from a user's file."""

import csv
import difflib
import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn
from zipfile import BadZipFile

import numpy as np

from jaxreg._check import ArgumentError, choice, describe
from jaxreg.mnist1d import make_mnist1d

__all__ = ["NAMES", "Dataset", "load"]

NAMES = ("digits", "breast_cancer", "wine", "diabetes", "mnist1d")
Task = Literal["classification", "regression"]

# What NumPy raises for a file that is damaged, or no archive, or that holds Python objects.
_UNREADABLE = (EOFError, OSError, RuntimeError, TypeError, ValueError, BadZipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows of features `x` and what to predict from them, `y`.

    `x` is float32 (rows, *features): (d,) for tables, (length, channels) for sequences, (height,
    width, channels) for images. `y` (rows,) is an int32 index into `classes`, or a float32 target;
    then `classes` is empty, as `feature_names` is where the features have none. ArgumentError is
    raised if there are fewer than 8 rows, no features, one class only, a class with fewer than 3
    rows, or a constant target.
    """

    name: str
    task: Task
    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()

    def __post_init__(self):
        rows = len(self.y)
        if len(self.x) != rows:
            _reject(f"{len(self.x)} rows in x and {rows} in y", "x and y of one length")
        if rows < 8:
            _reject(f"{rows} rows", "at least 8 rows")
        if self.x.ndim < 2 or self.x.size == 0:
            _reject(f"x of shape {self.x.shape}", "at least one feature besides the target")
        if self.task == "regression":
            if np.ptp(self.y) == 0:
                _reject(f"the target {self.y[0]:g} in every row", "a target that varies")
            return
        count = np.bincount(self.y, minlength=len(self.classes))
        rarest = int(count.argmin())
        if len(count) < 2:
            _reject(f"one class only, {describe(self.classes[0])}", "at least 2 classes")
        if count[rarest] < 3:
            given = f"the class {describe(self.classes[rarest])} in {count[rarest]} of {rows} rows"
            _reject(given, "3 rows or more of every class (for train, validation and test)")


def load(
    data: str | Path, *, target: str | None = None, task: Task | Literal["auto"] = "auto"
) -> Dataset:
    """A data set by its name, or from a .csv or .npz file.

    Args:
        data: one of `NAMES`, or a path. A .csv file is UTF-8 text with a header row, cells
            separated by commas, semicolons or tabs, and a number in every feature cell. An .npz
            file holds `x`, numbers of shape (rows, features), (rows, length, channels) for
            sequences or (rows, height, width, channels) for images, and `y`, numbers or text of
            shape (rows,) or (rows, 1).
        target: the .csv column to predict; required there, not accepted elsewhere.
        task: what the target is. "auto" reads text as classes, and whole numbers too where at
            most 20 of them, and fewer than half as many as rows, are different; other numbers
            are for regression. Some text among mostly numbers is rejected: a missing value?

    Returns:
        A `Dataset`. Classes are sorted, by value where all are numbers, and keep the spelling of
        their first row. The named data sets have scikit-learn's order; digits are in [0, 1].

    Raises:
        ArgumentError: an unknown name, an unreadable file, a bad cell (with its place), a wrong
            `target` or `task`, or too little data (see `Dataset`).

    Source: digits, breast_cancer and wine are from the UCI repository, diabetes from Efron et al.,
    "Least angle regression" (2004); all come with scikit-learn. mnist1d: see `make_mnist1d`.

    >>> dataset = load("mnist1d")
    >>> dataset.task, dataset.x.shape, dataset.classes[:3]
    ('classification', (5000, 40, 1), ('0', '1', '2'))
    """
    choice("task", task, ("auto", "classification", "regression"))
    name, path = str(data), Path(data)
    suffix = path.suffix.lower()
    if target is not None and (name in NAMES or suffix != ".csv"):
        raise ArgumentError("target", describe(target), "a column name, with a .csv file only")
    if name in NAMES:
        return _load_named(name, task)
    if not path.is_file():
        choice("data", name, (*NAMES, "a .csv or .npz file that exists"))
    if suffix not in (".csv", ".npz"):
        raise ArgumentError("data", repr(name), "a file that ends in .csv or .npz")
    return _load_csv(path, target, task) if suffix == ".csv" else _load_npz(path, task)


def _load_named(name: str, task: str) -> Dataset:
    if name == "mnist1d":
        dataset = Dataset(name, "classification", *make_mnist1d(), tuple("0123456789"))
    else:
        try:
            from sklearn import datasets
        except ImportError:
            _reject(f"{name!r} without scikit-learn", "mnist1d, a file, or install scikit-learn")
        bunch: Any = getattr(datasets, f"load_{name}")()
        # The pixels of the digits are counts from 0 to 16.
        x = bunch.images[..., None] / 16 if name == "digits" else bunch.data
        features = () if name == "digits" else tuple(map(str, bunch.feature_names))
        classes = tuple(map(str, bunch.get("target_names", ())))
        found: Task = "classification" if classes else "regression"
        y = bunch.target.astype(np.int32 if classes else np.float32)
        dataset = Dataset(name, found, x.astype(np.float32), y, classes, features)
    if task not in ("auto", dataset.task):
        raise ArgumentError("task", repr(task), f"{dataset.task}, the task of {name}")
    return dataset


def _load_csv(path: Path, target: str | None, task: str) -> Dataset:
    names, lines, rows = _read_csv(path)
    if target is None or target not in names:
        near = difflib.get_close_matches(target or "", names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        given = "nothing" if target is None else describe(target) + hint
        raise ArgumentError("target", given, f"the column to predict: {_listing(names)}")
    column = names.index(target)
    labels = [row.pop(column) for row in rows]
    names.remove(target)

    x = np.array([[_number(cell) for cell in row] for row in rows], dtype=np.float32)
    for i, j in np.argwhere(np.isnan(x)):
        _reject_cell(rows[i][j], f"line {lines[i]}, column {names[j]!r}", "a finite number")
    found, y, classes = _target(labels, task, lambda i: f"line {lines[i]}, column {target!r}")
    return Dataset(path.stem, found, x, y, classes, tuple(names))


def _read_csv(path: Path) -> tuple[list[str], list[int], list[list[str]]]:
    """The header, and for every row below it the line on which it ends, and its cells."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        # The separator is what splits the header into most columns. (csv.Sniffer is misled by
        # decimal commas.)
        top = [text.lstrip("\n").split("\n", 1)[0]]
        separator = max(",;\t", key=lambda mark: len(next(csv.reader(top, delimiter=mark), "")))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        records = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        _reject(f"{path.name!r}, not readable: {describe(str(error))}", "a .csv file in UTF-8")
    if not records:
        _reject(f"the empty file {path.name!r}", "a header row with names, and rows of data")

    (_, header), *body = records
    for i, name in enumerate(header):
        if not name or name in header[:i]:
            given = f"{describe(name)} as the name of column {i + 1}"
            _reject(given, "a header row that has a name of its own for every column")
    for line, row in body:
        if len(row) != len(header):
            _reject(f"{len(row)} cells in line {line}", f"{len(header)} cells, as in the header")
    return header, [line for line, _ in body], [row for _, row in body]


def _load_npz(path: Path, task: str) -> Dataset:
    accepted = "an .npz file with arrays x (numbers) and y (numbers or text), no Python objects"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = archive.files
            arrays = {name: archive[name] for name in ("x", "y") if name in names}
    except _UNREADABLE as error:
        _reject(f"{path.name!r}, not readable: {describe(str(error))}", accepted)
    for name in ("x", "y"):
        if name not in arrays:
            _reject(f"no array {name!r}, only {_listing(names) or 'an empty archive'}", accepted)
    x, y = arrays["x"], arrays["y"]
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        _reject(f"as x {describe(x)}", "numbers of shape (rows, features) or higher rank")
    if y.shape not in ((y.size,), (y.size, 1)) or y.dtype.kind not in "biufU":
        _reject(f"as y {describe(y)}", "numbers or text of shape (rows,)")

    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
        x = x.astype(np.float32)
    for index in np.argwhere(~np.isfinite(x)).tolist():
        place = f"row {index[0]} of x (at {index}, counted from 0)"
        _reject_cell(str(x[tuple(index)]), place, "a finite number")
    labels = y.reshape(-1).astype(str).tolist()
    found, y, classes = _target(labels, task, lambda i: f"row {i} of y (counted from 0)")
    return Dataset(path.stem, found, x, y, classes)


def _target(
    cells: list[str], task: str, place: Callable[[int], str]
) -> tuple[Task, np.ndarray, tuple[str, ...]]:
    """The task, `y` and the classes that the cells of a target stand for."""
    numbers = [_number(cell) for cell in cells]
    for i, (cell, number) in enumerate(zip(cells, numbers, strict=True)):
        if not cell or (number is not None and math.isnan(number)):
            _reject_cell(cell, place(i), "a class label or a finite number")
    text = [i for i, number in enumerate(numbers) if number is None]
    if text and (task == "regression" or (task == "auto" and len(text) < len(cells) / 2)):
        given = f"{task!r} with {describe(cells[text[0]])} in {place(text[0])}"
        raise ArgumentError("task", given, "a number there, or the task classification")

    values = np.array(cells if text else numbers)
    distinct, first, y = np.unique(values, return_index=True, return_inverse=True)
    if task == "auto":
        few = len(distinct) <= 20 and len(distinct) < len(cells) / 2
        is_classes = text or (few and np.all(distinct == np.round(distinct)))
        task = "classification" if is_classes else "regression"
    if task == "regression":
        return "regression", values.astype(np.float32), ()
    return "classification", y.astype(np.int32), tuple(cells[i] for i in first)


def _number(cell: str) -> float | None:
    """The number in a cell: NaN where float32 can't hold it, None for text."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if abs(number) <= float(np.finfo(np.float32).max) else math.nan


def _reject(given: str, accepted: str) -> NoReturn:
    raise ArgumentError("data", given, accepted)


def _reject_cell(cell: str, place: str, accepted: str) -> NoReturn:
    _reject(f"{describe(cell) if cell else 'an empty cell'} in {place}", accepted)


def _listing(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
