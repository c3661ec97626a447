"""The outcome of ``jaxreg compare`` as a verdict, a table for the terminal and a web page.

Every number comes from the content of ``results.json`` (see ``results.schema.json``). Recipes are
compared seed by seed: seed i has the same split in every recipe, so the difference d_i of two
recipes on it is free of what the split contributes, and

    mean(d) ± t * sd(d) / sqrt(n)

is the interval that says whether the recipes differ. t is Student's quantile for n - 1 degrees of
freedom at level 1 - 0.05 / k, so that the k intervals of one metric hold together with 95 %
(Bonferroni; Dunn, "Multiple comparisons among means", JASA 1961).
"""

import base64
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from io import BytesIO
from math import floor, isfinite, log10, nan, sqrt
from operator import neg
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit  # scipy comes with jax

from jaxreg import plot
from jaxreg._notes import structure_notes
from jaxreg.plot import Spread, spread

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A metric as it is shown: its key in `Row.metrics`, its name, its unit and what is best."""

    key: str
    name: str
    short: str  # heading in the terminal, in two lines
    unit: str
    decimals: int
    loss: Callable[[float], float]  # the best mean is the one of least loss

    def text(self, value: float, sign: str = "") -> str:
        """The value in the unit of the column, with at most four digits.

        >>> zeros = Column("zeros", "exact zeros", "zeros", "%", 1, neg)
        >>> zeros.text(0.9712), zeros.text(1.0), zeros.text(-0.0001)
        ('97.1', '100.0', '0.0')
        """
        value = 100 * value if self.unit in ("%", "points") else value
        if not isfinite(value) or abs(value) >= 1e4:
            return f"{value:{sign}.0e}"
        digits = floor(log10(abs(value))) if abs(value) >= 1 else 0
        return f"{value:{sign}z.{max(0, min(self.decimals, 3 - digits))}f}"

    def cell(self, of: Spread, plus_minus: str = " ±") -> str:
        """Mean and standard deviation, or why there is none."""
        if not of.seeds:
            return "n/a"
        if of.diverged:
            return "diverged"
        return self.text(of.mean) + (plus_minus + self.text(of.sd) if isfinite(of.sd) else "")


@dataclass(frozen=True)
class Row:
    """One recipe: the spread of each metric over seeds, and the metrics in which it is best."""

    name: str
    description: str
    metrics: dict[str, Spread]
    best: frozenset[str]


def columns(results: Results) -> list[Column]:
    """The metrics to show; a regression without calibration error has no such column."""
    regression = results["data"]["task"] == "regression"
    unit, gap_unit, decimals = ("", "", 2) if regression else ("%", "points", 1)
    score, short = ("R²", "R²") if regression else ("accuracy", "acc. %")
    shown = [
        Column("train_score", f"train {score}", f"train\n{short}", unit, decimals, neg),
        Column("test_score", f"test {score}", f"test\n{short}", unit, decimals, neg),
        Column("gap", "gap", f"gap\n{gap_unit}", gap_unit, decimals, abs),
        Column("test_nll", "test NLL", "test\nNLL", "", 3, float),
        Column("calibration_error", "calibration error", "calib.\nerror %", "%", 1, float),
        Column("zeros", "exact zeros", "zeros\n%", "%", 1, neg),
        Column("compile_seconds", "compile time", "compile\ns", "s", 1, float),
        Column("run_seconds", "run time", "run\ns", "s", 2, float),
    ]
    seeds = [seed for recipe in results["recipes"] for seed in recipe["seeds"]]
    without = regression and all(seed["calibration_error"] is None for seed in seeds)
    return [column for column in shown if not (without and column.key == "calibration_error")]


def summary(results: Results) -> list[Row]:
    """Mean and standard deviation over seeds of each metric, a row a recipe, in given order.

    Best are the highest scores and share of zeros, the gap closest to zero, the lowest NLL,
    calibration error and times. All recipes that look like the best at the displayed precision
    are marked. No mark goes to a diverged recipe, to a share of zeros that shows as 0.0, or to
    the only recipe of a comparison.
    """
    recipes = results["recipes"]
    metrics = [_metrics(recipe) for recipe in recipes]
    compared = columns(results) if len(recipes) > 1 else []
    best = {of.key: _best(of, [spreads[of.key].mean for spreads in metrics]) for of in compared}
    return [
        Row(recipe["name"], recipe["description"], of, frozenset(k for k in best if i in best[k]))
        for i, (recipe, of) in enumerate(zip(recipes, metrics, strict=True))
    ]


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over seeds, its standard error, and half of its interval."""

    mean: float
    error: float
    margin: float
    seeds: int

    @property
    def separated(self) -> bool:
        """Whether the interval excludes zero; never with fewer than two seeds."""
        return abs(self.mean) > self.margin


def paired_difference(results: Results, name: str, baseline: str, metric: str) -> Difference:
    """Metric of recipe `name` minus that of `baseline`, over the seeds that both have run.

    All of it is nan when one of these seeds diverged.
    """
    recipes = {recipe["name"]: recipe["seeds"] for recipe in results["recipes"]}
    ours, theirs = ({of["seed"]: of[metric] for of in recipes[key]} for key in (name, baseline))
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    mean, sd, seeds, _ = spread([nan if None in pair else pair[0] - pair[1] for pair in pairs])
    if seeds < 2:
        return Difference(mean, nan, nan, seeds)
    # Recipes that were asked for: a run that was stopped early separates no more than a whole one.
    error, comparisons = sd / sqrt(seeds), max(1, len(results["settings"]["recipes"]) - 1)
    quantile = float(stdtrit(seeds - 1, 1 - 0.025 / comparisons))
    return Difference(mean, error, error * quantile, seeds)


def verdict(results: Results) -> str:
    """One sentence: which recipe has the lowest test NLL, and whether that is more than noise."""
    data, nll = results["data"], _column(results, "test_nll")
    place = f"On {data['name']} with {data['train_rows']} training rows"
    rows = {row.name: row.metrics["test_nll"] for row in summary(results)}
    ranked = sorted((of.mean, name) for name, of in rows.items() if isfinite(of.mean))
    best, second, *_ = *(name for _, name in ranked), None, None
    shown = {name: nll.cell(of, " ± ") for name, of in rows.items()}
    if best is None:
        return f"{place}, no recipe has a finite test NLL on every seed, so none can be preferred."
    if len(rows) == 1:
        return f"{place}, {best} has a test NLL of {shown[best]}; it was compared with nothing."
    if best == "none":
        start = f"{place}, no recipe beats training without regularization (none)"
        if second is None:
            return f"{start}: every other one diverged."
        noise = _noise(results, second, "none", "this does not show that it is worse")
        return f"{start}: test NLL {shown[best]} against {shown[second]} for {second}; {noise}."
    start = f"{place}, {best} has the lowest test NLL: {shown[best]}"
    if shown.get("none", "diverged") == "diverged":
        why = "diverged" if "none" in rows else "was not run for comparison"
        return f"{start}; training without regularization (none) {why}."
    noise = _noise(results, best, "none", "this does not show that it helps")
    return f"{start} against {shown['none']} without regularization (none); {noise}."


def table(results: Results) -> Table:
    """The comparison for a terminal of 100 columns: mean ± sd, the best bold, green and starred."""
    wide = Console(width=1000)
    grid = _table(results, " ±")
    # Long numbers get their room from the blank before each ±.
    fits = Measurement.get(wide, wide.options, grid).maximum <= 100
    return grid if fits else _table(results, "±")


def write_report(folder: Path, results: Results, weights: Mapping[str, Any]) -> None:
    """Write ``index.html``, which needs no other file, and its four figures as PNG files.

    Each file appears whole or not at all: it is written beside its place and then moved there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {
        "learning_curves": _png(plot.learning_curves(results)),
        "gap": _png(plot.gap_bars(results)),
        "weights": _png(plot.weight_histogram(weights)),
        "sparsity": _png(plot.sparsity_pattern(weights)),
    }
    for name, image in images.items():
        _write(folder / f"{name}.png", image)
    source = resources.files("jaxreg").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"setting": _setting, "typeset": _typeset}
    page = environment.from_string(source).render(
        results=results,
        verdict=verdict(results),
        notes=notes(results),
        columns=columns(results),
        rows=summary(results),
        differences=_differences(results),
        seeds=_seeds(results),
        colour=plot.colour,
        images={name: base64.b64encode(image).decode() for name, image in images.items()},
    )
    _write(folder / "index.html", page.encode())


# ---------------------------------------------------------------- statistics


def _metrics(recipe: Mapping[str, Any]) -> dict[str, Spread]:
    seeds = recipe["seeds"]
    times = {key: recipe[key] for key in ("compile_seconds", "run_seconds")}
    of_seeds = {key: spread([seed[key] for seed in seeds]) for key in _SEED_METRICS}
    # A time that is missing was not measured; it does not mean that a seed diverged.
    return of_seeds | {key: spread([] if t is None else [t]) for key, t in times.items()}


_SEED_METRICS = ("train_score", "test_score", "gap", "test_nll", "calibration_error", "zeros")


def _best(column: Column, means: Sequence[float]) -> list[int]:
    """Indices of the means that look like the best one at the displayed precision."""
    fit = [i for i, mean in enumerate(means) if isfinite(mean)]
    if column.key == "zeros":
        fit = [i for i in fit if float(column.text(means[i])) > 0]
    least = column.text(min((column.loss(means[i]) for i in fit), default=nan))
    return [i for i in fit if column.text(column.loss(means[i])) == least]


# ---------------------------------------------------------------- wording


def _column(results: Results, key: str) -> Column:
    return next(column for column in columns(results) if column.key == key)


def _noise(results: Results, name: str, baseline: str, otherwise: str) -> str:
    """Clause of the verdict that weighs a difference of test NLL against the noise."""
    of = paired_difference(results, name, baseline, "test_nll")
    if of.seeds < 2:
        return f"one seed gives no measure of the noise, so {otherwise}"
    if of.mean == of.error == 0:
        return f"seed by seed they are identical, so {otherwise}"
    # Significant digits, not decimals: a small difference keeps its sign.
    interval = f"{of.mean - of.margin:+.2g} to {of.mean + of.margin:+.2g}"
    size = f"{of.mean:+.2g} ± {of.error:.1g} (standard error, {of.seeds} seeds; 95 % {interval})"
    weight = "more than the noise explains" if of.separated else f"within the noise, so {otherwise}"
    return f"seed by seed the difference is {size}, {weight}"


def _seeds(results: Results) -> str:
    counts = sorted({len(recipe["seeds"]) for recipe in results["recipes"]}) or [0]
    if counts == [1]:
        return "one seed"
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seeds"


def notes(results: Results) -> list[str]:
    """What the verdict leaves out: rivals, better scores, missed targets, diverged recipes."""
    rows = summary(results)
    finite = {row.name: of.mean for row in rows if isfinite((of := row.metrics["test_nll"]).mean)}
    said = []
    if len(finite) > 1:
        best = min(finite, key=finite.__getitem__)
        to_best = {name: paired_difference(results, name, best, "test_nll") for name in finite}
        rivals = [name for name, of in to_best.items() if name != best and not of.separated]
        if all(of.seeds < 2 for of in to_best.values()):
            said.append("One seed separates no recipes: run at least five to see the noise.")
        elif rivals:
            said.append(f"Not separated from {best} in test NLL: {', '.join(rivals)}.")
        else:
            said.append(f"Every other recipe is separated from {best} in test NLL.")
        score = _column(results, "test_score")
        finest = [row for row in rows if score.key in row.best]
        if best not in [row.name for row in finest]:
            shares = [f"{row.name} ({score.cell(row.metrics[score.key], ' ± ')})" for row in finest]
            unit = f" ({score.unit})" if score.unit else ""
            said.append(f"Highest {score.name}{unit}: {', '.join(shares)}.")
    for name, (_, (difference, interval, reading)) in _differences(results):
        if reading == "better":
            column = _column(results, "test_score")
            change = f"{difference} {column.unit and 'points '}(95 % interval {interval})"
            said.append(f"Better than none in {column.name}: {name}, by {change}.")
    lost = {row.name: of for row in rows if (of := row.metrics["test_nll"]).diverged}
    shares = [f"{name} ({of.diverged} of {of.seeds} seeds)" for name, of in lost.items()]
    said += structure_notes(results)
    return [*said, f"Diverged: {', '.join(shares)}."] if shares else said


def _differences(results: Results) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Per recipe, for test NLL and score: difference to none, its interval, its reading."""
    seeds = {recipe["name"]: len(recipe["seeds"]) for recipe in results["recipes"]}
    shown = [_column(results, key) for key in ("test_nll", "test_score")]
    # Differences are smaller than the values: percentages get one more decimal.
    shown = [replace(column, decimals=2 if column.unit else 3) for column in shown]
    if seeds.pop("none", 0) < 2:
        return []
    keys = [column.key for column in shown]
    to_none = {name: [paired_difference(results, name, "none", k) for k in keys] for name in seeds}
    return [(name, list(map(_reading, shown, of))) for name, of in to_none.items()]


def _reading(column: Column, of: Difference) -> tuple[str, str, str]:
    if not isfinite(of.margin):
        return "n/a", "n/a", "diverged"
    low, high = (column.text(of.mean + side * of.margin, "+") for side in (-1, 1))
    better = "better" if column.loss(of.mean) < 0 else "worse"
    same = "identical" if of.mean == of.error == 0 else "not separated"
    word = better if of.separated else same
    return f"{column.text(of.mean, '+')} ± {column.text(of.error)}", f"{low} to {high}", word


# ---------------------------------------------------------------- terminal


def _table(results: Results, plus_minus: str) -> Table:
    shown, rows, data = columns(results), summary(results), results["data"]
    title = f"{data['name']}, {results['model']['name']}, {data['train_rows']} training rows"
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0, "show_edge": False}
    grid = Table(title=Text(title, "bold"), caption=Text(_caption(results)), **look)
    grid.add_column("recipe", overflow="fold")
    for column in shown:
        grid.add_column(Text(column.short, justify="right"), no_wrap=True)
    cells = [_cells(column, rows, plus_minus) for column in shown]
    for row, *texts in zip(rows, *cells, strict=True):
        grid.add_row(Text(row.name), *texts)
    return grid


def _cells(column: Column, rows: Sequence[Row], plus_minus: str) -> list[Text]:
    """Cells of one width, so that numbers align although a mark follows some of them."""
    best = [column.key in row.best for row in rows]
    texts = [column.cell(row.metrics[column.key], plus_minus) for row in rows]
    texts = [text + " *"[mark] for text, mark in zip(texts, best, strict=True)]
    width = max(map(len, [*texts, *column.short.splitlines()]))
    styles = ["bold green" if mark else "" for mark in best]
    return [Text(text.rjust(width), style) for text, style in zip(texts, styles, strict=True)]


def _caption(results: Results) -> str:
    seeds, shown = _seeds(results), [column.key for column in columns(results)]
    known = f"± one standard deviation over {seeds}"
    mean = "one seed, so no ± (n/a)" if seeds == "one seed" else known
    parts = [mean, "* best of its column, or equal to it as shown"]
    if any(row.metrics[key].diverged for row in summary(results) for key in shown):
        parts.append("diverged: not finite on at least one seed, so no mean is given")
    return "; ".join(parts)


# ---------------------------------------------------------------- page


def _setting(value: Any) -> str:
    """A setting in words: null is "not set", lists and mappings are written out."""
    if value is None or value in ([], {}):
        return "not set"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_setting(of)}" for key, of in value.items())
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return value if isinstance(value, str) else json.dumps(value)


def _typeset(text: str) -> str:
    """The text with typographic minus signs, and no line break around ±."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text).replace(" ± ", "\xa0±\xa0")


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=plot.DPI)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
