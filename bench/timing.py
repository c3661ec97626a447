"""Timing contenders side by side, and tables of what came out.

Contenders take turns: a round runs each of them once, in another order each time, so that a
machine that slows down for a while slows down all of them, and none always follows one that leaves
the memory to be tidied up. A ratio is the median of the
rounds' own ratios to the first contender.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxreg

RESULTS = Path(__file__).parent / "results"
_BLOCK_SECONDS = 0.02  # a round repeats a contender for this long: far above the clock's resolution
_MAX_CALLS = 200

Cell = str | int | float | None


class Timing(NamedTuple):
    """Seconds a call over rounds: median, quartiles, and what is more than the first contender's.

    `ratio` and `difference` are medians of the rounds' own ratios and differences.
    """

    median: float
    lower: float
    upper: float
    ratio: float
    difference: float


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Times functions that take turns.

    Args:
        contenders: name -> a function without arguments; the arrays it returns are waited for.
            The first one is what the others are compared to.
        rounds: how often each has its turn.
    """
    functions = list(contenders.values())
    for run in functions:
        jax.block_until_ready(run())  # compiles
    calls = [_calls_in_a_block(run) for run in functions]
    seconds = np.empty((len(functions), rounds))
    order = np.random.default_rng(0)
    for turn in range(rounds):
        for i in order.permutation(len(functions)):
            seconds[i, turn] = _seconds(functions[i], calls[i])
    quartiles = np.percentile(seconds, [50, 25, 75], axis=1).T
    ratios = np.median(seconds / seconds[0], axis=1)
    differences = np.median(seconds - seconds[0], axis=1)
    figures = np.column_stack([quartiles, ratios, differences]).tolist()
    return {name: Timing(*row) for name, row in zip(contenders, figures, strict=True)}


def _calls_in_a_block(run: Callable[[], Any]) -> int:
    return max(1, min(_MAX_CALLS, round(_BLOCK_SECONDS / _seconds(run, 1))))


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Seconds a call, waiting for the device once, at the end."""
    started = time.perf_counter()
    result = None
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls


def environment() -> dict[str, Any]:
    """The device and the versions that a result belongs to; nothing that names the machine."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages if _installed(name)},
        "jaxreg": jaxreg.__version__,
    }


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table. `note` says how to read it; a cell that could not be had is None."""

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]

    def text(self) -> str:
        """In aligned columns, for a terminal.

        >>> print(Table("t", "Times", "", ("step", "ms"), [("adam", 1.25), ("all", None)]).text())
        Times
        step    ms
        ----  ----
        adam  1.25
        all      -
        """
        cells = [self.columns, *([_shown(c) for c in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        cells.insert(1, ["-" * width for width in widths])
        lines = [
            "  ".join(
                c.rjust(w) if self._is_number(i) else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.title, *([self.note] if self.note else []), *lines])

    def markdown(self) -> str:
        """As a section with a pipe table."""
        alignment = ["--:" if self._is_number(i) else ":--" for i in range(len(self.columns))]
        cells = [self.columns, alignment, *([_shown(c) for c in row] for row in self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n\n".join(
            [f"## {self.title}", *([self.note] if self.note else []), "\n".join(lines)]
        )

    def records(self) -> dict[str, Any]:
        """As one object a row, for JSON."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"name": self.name, "title": self.title, "note": self.note, "rows": rows}

    def _is_number(self, column: int) -> bool:
        return not any(isinstance(row[column], str) for row in self.rows)


def _shown(cell: Cell) -> str:
    """Three significant digits but at most four decimals, never in exponents; ``-`` for None."""
    if cell is None:
        return "-"
    if not isinstance(cell, float):
        return str(cell)
    if cell == 0:
        return "0"
    digits = min(4, max(0, 2 - int(np.floor(np.log10(abs(cell))))))
    return f"{cell:,.{digits}f}"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    options.add_argument(
        "--out",
        type=Path,
        help="folder for a .json and a .md file (bench/results by default, none with --quick)",
    )
    options.add_argument("--json", type=Path, metavar="PATH", help="one more copy of the .json")
    return options


def report(name: str, heading: str, tables: Sequence[Table], arguments: argparse.Namespace) -> None:
    """Prints the tables and writes them where the arguments say.

    Args:
        name: what the files are called.
        heading: the question that they answer.
        tables: the answer.
        arguments: as the `parser` gave them.
    """
    where = environment()
    setting = ", ".join(f"{key} {value}" for key, value in where.items())
    print("\n\n".join([setting, *(table.text() for table in tables)]))
    document = {
        "quick": arguments.quick,
        "environment": where,
        "tables": [table.records() for table in tables],
    }
    encoded = json.dumps(document, indent=1) + "\n"
    folder = arguments.out or (None if arguments.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        sections = [f"# {heading}", setting, *(table.markdown() for table in tables)]
        (folder / f"{name}.md").write_text("\n\n".join(sections) + "\n")
        (folder / f"{name}.json").write_text(encoded)
    if arguments.json is not None:
        arguments.json.write_text(encoded)
