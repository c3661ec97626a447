"""Data sets: what a file means, what is rejected and how, and the laws of a split."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from errors import message

from jaxreg._check import ArgumentError
from jaxreg.data import NAMES, load

ROWS = [f"{i},{i * i % 7},{'yes' if i % 3 else 'no'}" for i in range(12)]
TABLE = "\n".join(["a,b,label", *ROWS, ""])


def write(folder: Path, content: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def column(values: list, name: str = "label") -> str:
    """A table with one feature column and the target `values`."""
    return "\n".join([f"a,{name}", *(f"{i % 5},{value}" for i, value in enumerate(values)), ""])


def save(folder: Path, **arrays) -> Path:
    np.savez(folder / "arrays.npz", **arrays)
    return folder / "arrays.npz"


# Loading


@pytest.mark.parametrize(
    ("name", "task", "shape", "classes", "last_class"),
    [
        ("digits", "classification", (1797, 8, 8, 1), 10, "9"),
        ("breast_cancer", "classification", (569, 30), 2, "benign"),
        ("wine", "classification", (178, 13), 3, "class_2"),
        ("diabetes", "regression", (442, 10), 0, None),
        ("mnist1d", "classification", (5000, 40, 1), 10, "9"),
    ],
)
def test_named_data_sets(name, task, shape, classes, last_class):
    dataset = load(name)
    assert (dataset.name, dataset.task, dataset.x.shape) == (name, task, shape)
    assert dataset.x.dtype == np.float32
    assert dataset.y.shape == shape[:1]
    assert dataset.y.dtype == (np.float32 if task == "regression" else np.int32)
    assert len(dataset.classes) == classes
    assert dataset.classes[-1:] == (() if last_class is None else (last_class,))
    assert len(dataset.feature_names) == (shape[1] if len(shape) == 2 else 0)


def test_digits_are_scaled_to_the_unit_interval():
    x = load("digits").x
    assert (x.min(), x.max()) == (0, 1)


def test_csv_table_of_numbers_with_text_classes(tmp_path):
    dataset = load(write(tmp_path, TABLE), target="label")
    assert (dataset.name, dataset.task) == ("table", "classification")
    assert dataset.feature_names == ("a", "b")
    assert dataset.classes == ("no", "yes")
    np.testing.assert_array_equal(dataset.x[:, 0], np.arange(12))
    np.testing.assert_array_equal(dataset.y, np.arange(12) % 3 > 0)
    assert (dataset.x.dtype, dataset.y.dtype) == (np.float32, np.int32)


def test_target_may_be_any_column(tmp_path):
    path = write(tmp_path, "t,a\n" + "".join(f"{i}.5,{-i}\n" for i in range(9)))
    dataset = load(str(path), target="t")
    assert (dataset.task, dataset.feature_names) == ("regression", ("a",))
    np.testing.assert_array_equal(dataset.y, np.arange(9) + np.float32(0.5))


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", " , "),
        TABLE.replace("\n", "\n\n"),
        '"a","b","label"\n'
        + "".join(f'"{row.replace(",", chr(34) + "," + chr(34))}"\n' for row in ROWS),
        TABLE.rstrip(),
    ],
    ids=["bom", "crlf", "semicolon", "tab", "spaces", "blank lines", "quotes", "no last newline"],
)
def test_csv_dialects_are_read_alike(tmp_path, content):
    dataset = load(write(tmp_path, content), target="label")
    expected = load(write(tmp_path, TABLE), target="label")
    np.testing.assert_array_equal(dataset.x, expected.x)
    np.testing.assert_array_equal(dataset.y, expected.y)
    assert dataset.classes == expected.classes
    assert dataset.feature_names == expected.feature_names


def test_quoted_names_may_hold_the_other_separators(tmp_path):
    content = TABLE.replace("a,b,", '"width; mm; outer",b,')
    dataset = load(write(tmp_path, content), target="label")
    assert dataset.feature_names == ("width; mm; outer", "b")


TARGETS = [
    # values of the target, task asked for, task found, classes
    (["x", "y"] * 6, "auto", "classification", ("x", "y")),
    (["10", "9", "2"] * 4, "auto", "classification", ("2", "9", "10")),
    (["1.0", "2.0"] * 6, "auto", "classification", ("1.0", "2.0")),
    (["1", "1.0", "2"] * 4, "auto", "classification", ("1", "2")),
    (["1", "2", "3"] * 4, "regression", "regression", ()),
    (["0.5", "1.5"] * 6, "auto", "regression", ()),
    (["0.5", "1.5"] * 6, "classification", "classification", ("0.5", "1.5")),
    ([str(i // 2) for i in range(12)], "auto", "regression", ()),
    ([str(i // 3) for i in range(60)], "auto", "classification", tuple(map(str, range(20)))),
    ([str(i // 3) for i in range(63)], "auto", "regression", ()),
    (["1", "2", "many"] * 4, "classification", "classification", ("1", "2", "many")),
    (["1", "few"] * 6, "auto", "classification", ("1", "few")),
    (["1", "few", "many"] * 4, "auto", "classification", ("1", "few", "many")),
]


@pytest.mark.parametrize(("values", "asked", "task", "classes"), TARGETS)
def test_task_follows_from_the_target_unless_it_is_given(tmp_path, values, asked, task, classes):
    dataset = load(write(tmp_path, column(values)), target="label", task=asked)
    assert (dataset.task, dataset.classes) == (task, classes)
    if task == "classification":
        assert dataset.y.dtype == np.int32
        spelled = [dataset.classes[index] for index in dataset.y]
        assert spelled == [{"1.0": "1"}.get(v, v) if "1" in values else v for v in values]
    else:
        np.testing.assert_array_equal(dataset.y, np.array(values, np.float32))


@pytest.mark.parametrize("shape", [(12, 3), (12, 5, 2), (12, 4, 4, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64])
def test_npz_keeps_the_shape_of_tables_sequences_and_images(tmp_path, shape, dtype):
    x = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    dataset = load(save(tmp_path, x=x, y=np.arange(12) % 2))
    np.testing.assert_array_equal(dataset.x, x)
    assert (dataset.name, dataset.x.dtype) == ("arrays", np.float32)
    assert (dataset.classes, dataset.feature_names) == (("0", "1"), ())


@pytest.mark.parametrize(
    ("y", "task", "classes"),
    [
        (np.array(["b", "a", "c"] * 4), "classification", ("a", "b", "c")),
        (np.array([True, False, True] * 4), "classification", ("False", "True")),
        (np.array([[2], [1], [7]] * 4, np.uint8), "classification", ("1", "2", "7")),
        (np.linspace(0, 1, 12, dtype=np.float32)[:, None], "regression", ()),
        (np.linspace(-1e9, 1e9, 12), "regression", ()),
    ],
)
def test_npz_targets(tmp_path, y, task, classes):
    dataset = load(save(tmp_path, x=np.ones((12, 2)), y=y))
    assert (dataset.task, dataset.classes, dataset.y.shape) == (task, classes, (12,))
    flat = y.reshape(-1)
    if task == "regression":
        np.testing.assert_array_equal(dataset.y, flat.astype(np.float32))
    else:
        assert [dataset.classes[index] for index in dataset.y] == [str(label) for label in flat]


# What is rejected. Every message is one line that names the option, what it got, and what it takes.

GOOD = [f"{i},{'ab'[i % 2]}" for i in range(10)]


def lines(*rows: str, header: str = "v,w") -> str:
    return "\n".join([header, *rows, ""])


CSV_ERRORS = {
    "empty file": ("", ["data", "empty file 'table.csv'"]),
    "blank file": ("\n\n", ["data", "empty file"]),
    "header only": (lines(), ["data", "0 rows", "at least 8 rows"]),
    "too few rows": (lines(*GOOD[:7]), ["data", "7 rows", "at least 8 rows"]),
    "no feature column": (lines(*"abababab", header="w"), ["data", "at least one feature"]),
    "duplicate column": (
        lines("1,2,a", header="v,v,w"),
        ["data", "'v' as the name of column 2", "a name of its own"],
    ),
    "column without a name": (
        lines("0,1,a", header=",v,w"),
        ["data", "'' as the name of column 1", "a name of its own"],
    ),
    "short row": (lines(*GOOD, "7"), ["data", "1 cells in line 12", "2 cells"]),
    "long row": (lines(GOOD[0], "1,2,a", *GOOD), ["data", "3 cells in line 3", "2 cells"]),
    "text": (lines(*GOOD, "x 7,a"), ["data", "'x 7' in line 12, column 'v'", "finite number"]),
    "nan": (lines(*GOOD, "NaN,a"), ["data", "'NaN' in line 12, column 'v'"]),
    "inf": (lines(*GOOD, "-inf,a"), ["data", "'-inf' in line 12, column 'v'"]),
    "too large": (lines(*GOOD, "1e39,a"), ["data", "'1e39' in line 12, column 'v'"]),
    "empty cell": (lines(*GOOD, " ,a"), ["data", "an empty cell in line 12, column 'v'"]),
    "empty target": (lines(*GOOD, "1,"), ["data", "an empty cell in line 12, column 'w'"]),
    "nan target": (lines(*GOOD, "1,nan"), ["data", "'nan' in line 12, column 'w'"]),
    "after blank lines": (lines("", "", *GOOD, "?,a"), ["'?' in line 14, column 'v'"]),
    "after a cell of two lines": (
        lines('1,"a\nb"', *GOOD, "?,a"),
        ["'?' in line 14, column 'v'"],
    ),
    "very long cell": (lines(*GOOD, "x" * 500 + ",a"), ["xxx... in line 12"]),
    "decimal comma": (
        lines(*(f"{i},5;a" for i in range(9)), header="v;w"),
        ["'0,5' in line 2, column 'v'"],
    ),
    "one class": (lines(*(f"{i},a" for i in range(9))), ["data", "one class only, 'a'", "2"]),
    "rare class": (
        lines(*GOOD, "1,c", "2,c"),
        ["data", "the class 'c' in 2 of 12 rows", "3 rows or more"],
    ),
    "constant target": (
        lines(*(f"{i},2.5" for i in range(9))),
        ["data", "the target 2.5 in every row", "varies"],
    ),
    "some text in a target of numbers": (
        lines(*(f"{i},{i}.5" for i in range(9)), "9,NA"),
        ["task", "'NA' in line 11, column 'w'", "a number there, or the task classification"],
    ),
    "nearly half text in a target of numbers": (
        lines(*["1,2"] * 6, *["1,low"] * 5),
        ["task", "'auto' with 'low' in line 8, column 'w'"],
    ),
}


@pytest.mark.parametrize("case", CSV_ERRORS)
def test_csv_is_rejected_with_the_place_of_the_error(tmp_path, case):
    content, parts = CSV_ERRORS[case]
    with pytest.raises(ArgumentError) as error:
        load(write(tmp_path, content), target="w")
    text = message(error)
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize("content", ["é,w\n1,2\n".encode("latin-1"), TABLE.encode("utf-16")])
def test_csv_that_is_not_utf8_is_rejected(tmp_path, content):
    with pytest.raises(ArgumentError, match=r"data: got 'table.csv', not readable.*UTF-8"):
        load(write(tmp_path, content), target="w")


def test_csv_with_a_cell_beyond_the_limit_of_the_csv_module_is_rejected(tmp_path):
    with pytest.raises(ArgumentError, match=r"not readable.*field larger than"):
        load(write(tmp_path, f'v,w\n"{"1" * 200_000}",a\n'), target="w")


def test_csv_without_a_target_lists_the_columns(tmp_path):
    with pytest.raises(ArgumentError, match=r"target: got nothing.*'a', 'b', 'label'") as error:
        load(write(tmp_path, TABLE))
    message(error)


def test_missing_column_names_the_nearest_and_what_there_is(tmp_path):
    with pytest.raises(ArgumentError) as error:
        load(write(tmp_path, TABLE), target="lable")
    assert "target: got 'lable' (did you mean 'label'?)" in message(error)
    assert "'a', 'b', 'label'" in message(error)


def test_a_long_list_of_columns_is_cut(tmp_path):
    header = ",".join(f"column_{i}" for i in range(30))
    with pytest.raises(ArgumentError) as error:
        load(write(tmp_path, header), target="nothing like it")
    assert message(error).endswith("'column_7' and 22 more.")


NPZ_ERRORS = {
    "no x": ({"y": np.arange(12), "images": 1}, ["no array 'x'", "'y', 'images'"]),
    "no y": ({"x": np.ones((12, 2))}, ["no array 'y'", "'x'"]),
    "no arrays": ({}, ["no array 'x'", "an empty archive"]),
    "objects in x": ({"x": np.array([[{}]] * 12), "y": np.arange(12)}, ["Object arrays"]),
    "objects in y": ({"x": np.ones((12, 2)), "y": np.array([None] * 12)}, ["Object arrays"]),
    "text in x": ({"x": np.array([["a"]] * 12), "y": np.arange(12)}, ["as x", "(12, 1)"]),
    "complex x": ({"x": np.ones((12, 1), complex), "y": np.arange(12)}, ["as x", "complex128"]),
    "flat x": ({"x": np.ones(12), "y": np.arange(12)}, ["as x", "(12,)", "(rows, features)"]),
    "square y": ({"x": np.ones((12, 2)), "y": np.ones((12, 2))}, ["as y", "(12, 2)", "(rows,)"]),
    "scalar y": ({"x": np.ones((12, 2)), "y": np.array(3)}, ["as y", "(rows,)"]),
    "bytes in y": ({"x": np.ones((12, 2)), "y": np.array([b"a"] * 12)}, ["as y", "text"]),
    "lengths": ({"x": np.ones((12, 2)), "y": np.arange(9) % 2}, ["12 rows in x and 9 in y"]),
    "no rows": ({"x": np.ones((0, 2)), "y": np.ones((0, 1))}, ["0 rows", "at least 8 rows"]),
    "no features": ({"x": np.ones((12, 0)), "y": np.arange(12) % 2}, ["(12, 0)", "one feature"]),
    "nan in x": (
        {"x": np.where(np.eye(12) * np.arange(12) == 7, np.nan, 1), "y": np.arange(12) % 2},
        ["'nan' in row 7 of x (at [7, 7], counted from 0)"],
    ),
    "too large x": (
        {"x": np.where(np.arange(24).reshape(12, 2) == 5, 1e300, 1), "y": np.arange(12) % 2},
        ["'inf' in row 2 of x"],
    ),
    "nan in y": (
        {"x": np.ones((12, 2)), "y": np.where(np.arange(12) == 5, np.nan, 1)},
        ["'nan' in row 5 of y"],
    ),
    "only nan in y": ({"x": np.ones((12, 2)), "y": np.full(12, np.nan)}, ["'nan' in row 0 of y"]),
    "empty text in y": (
        {"x": np.ones((12, 2)), "y": np.array(["a", "b", ""] * 4)},
        ["an empty cell in row 2 of y"],
    ),
}


@pytest.mark.parametrize("case", NPZ_ERRORS)
def test_npz_is_rejected_with_the_place_of_the_error(tmp_path, case):
    arrays, parts = NPZ_ERRORS[case]
    with pytest.raises(ArgumentError, match="data: got ") as error:
        load(save(tmp_path, **arrays))
    text = message(error)
    assert [part for part in parts if part not in text] == [], text


def npy_bytes(folder: Path) -> bytes:
    np.save(folder / "one.npy", np.ones(3))
    return (folder / "one.npy").read_bytes()


def cut_archive(folder: Path) -> bytes:
    return save(folder, x=np.ones((99, 9)), y=np.arange(99)).read_bytes()[:2000]


def damaged_archive(folder: Path) -> bytes:
    np.savez_compressed(folder / "whole.npz", x=np.ones((99, 9)), y=np.arange(99))
    content = bytearray((folder / "whole.npz").read_bytes())
    content[60:90] = bytes(30)
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [lambda folder: b"", lambda folder: b"x,y\n1,2\n", npy_bytes, cut_archive, damaged_archive],
    ids=["empty", "text", "npy", "cut", "damaged"],
)
def test_a_file_that_is_no_npz_archive_is_rejected(tmp_path, content):
    path = write(tmp_path, content(tmp_path), "bad.npz")
    with pytest.raises(ArgumentError, match=r"data: got 'bad.npz', not readable") as error:
        load(path)
    assert "an .npz file with arrays x" in message(error)


def test_unknown_name_hints_at_the_nearest():
    with pytest.raises(ArgumentError) as error:
        load("digtis")
    assert message(error).startswith("data: got 'digtis' (did you mean 'digits'?); accepted: ")
    assert [name for name in NAMES if name not in message(error)] == []


def test_missing_file_and_folder_are_rejected(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for path in (tmp_path / "missing.csv", tmp_path / "folder.csv"):
        with pytest.raises(ArgumentError, match="file that exists") as error:
            load(path, target="w")
        assert path.name in message(error)


def test_wrong_extension_is_rejected(tmp_path):
    with pytest.raises(ArgumentError, match=r"data.*table\.parquet.*\.csv or \.npz") as error:
        load(write(tmp_path, TABLE, "table.parquet"))
    message(error)


@pytest.mark.parametrize("source", ["digits", "arrays.npz"])
def test_target_is_accepted_with_csv_only(source):
    with pytest.raises(ArgumentError, match=r"target: got 'y'.*\.csv file only"):
        load(source, target="y")


def test_unknown_task_is_rejected():
    with pytest.raises(ArgumentError, match=r"task: got 'regresion' \(did you mean 'regression'"):
        load("wine", task="regresion")  # pyright: ignore[reportArgumentType]


def test_task_of_a_named_data_set_is_fixed():
    assert load("wine", task="classification").task == "classification"
    with pytest.raises(ArgumentError, match=r"task: got 'regression'.*classification, the task"):
        load("wine", task="regression")


def test_regression_on_text_is_rejected(tmp_path):
    with pytest.raises(ArgumentError) as error:
        load(write(tmp_path, TABLE), target="label", task="regression")
    assert "task: got 'regression' with 'no' in line 2, column 'label'" in message(error)


def test_named_data_without_scikit_learn_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ArgumentError, match="data: got 'wine' without scikit-learn"):
        load("wine")
    assert load("mnist1d").name == "mnist1d"


def test_import_loads_neither_scikit_learn_nor_jax():
    code = "import sys, jaxreg.data; print({'sklearn', 'scipy', 'jax'} & set(sys.modules))"
    # From the root of the project, where it need not be installed.
    root = Path(__file__).parents[1]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=dict(os.environ), capture_output=True, text=True
    )
    assert printed.stdout.strip() == "set()", printed.stderr
