"""Figures of a comparison of recipes: learning curves, generalization gap, weights, sparsity.

Each takes the content of ``results.json`` (see ``results.schema.json``) or the saved weights and
returns a `matplotlib.figure.Figure`. Without pyplot, no global state and no display is needed.
"""

from collections.abc import Mapping, Sequence
from math import ceil, inf, isfinite, nan
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

DPI = 150  # of the PNG files; sizes below are in inches

# Paul Tol's "muted" scheme, which stays distinct under colour blindness, with its two palest
# colours darkened so that lines show on white.
COLOURS = {
    "none": "#767676",
    "l2": "#56A9D8",
    "weight_decay": "#332288",
    "l1_prox": "#117733",
    "elastic_net": "#44AA99",
    "dropout": "#CC6677",
    "label_smoothing": "#999933",
    "clip": "#D8A31A",
    "early_stop": "#AA4499",
    "cocktail": "#882255",
}
FALLBACK_COLOUR = "#D55E00"
EXACT_ZERO_COLOUR = "#FFFFFF"
NOT_FINITE_COLOUR = "#E0218A"
_INK = "#333333"


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; nan where they are not defined."""

    mean: float
    sd: float
    seeds: int
    diverged: int


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and standard deviation (ddof=1) of one metric, `values` holding one entry a seed.

    A null, nan or infinite entry is a diverged seed. The mean is then nan: an average over the
    seeds that survived would flatter the recipe.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, sd=1.4142135623730951, seeds=2, diverged=0)
    >>> spread([1.0, None])
    Spread(mean=nan, sd=nan, seeds=2, diverged=1)
    """
    array = _floats(values)
    diverged = int(np.sum(~np.isfinite(array)))
    if not array.size or diverged:
        return Spread(nan, nan, array.size, diverged)
    sd = float(np.std(array, ddof=1)) if array.size > 1 else nan
    return Spread(float(np.mean(array)), sd, array.size, 0)


def colour(name: str) -> str:
    """Colour of a recipe, the same in every figure and in the report."""
    return COLOURS.get(name, FALLBACK_COLOUR)


def score_label(results: Mapping[str, Any]) -> tuple[str, float]:
    """Name of the score and the factor to its displayed unit: accuracy in percent, or R².

    >>> score_label({"data": {"task": "classification"}})
    ('accuracy (%)', 100.0)
    """
    return ("R²", 1.0) if results["data"]["task"] == "regression" else ("accuracy (%)", 100.0)


def learning_curves(results: Mapping[str, Any]) -> Figure:
    """Train and test score against epoch, one panel a recipe, all on the same axes.

    Lines are means over the finite seeds, bands one standard deviation on either side. The axis
    fits the curves after a fifth of the epochs: without the steep start the differences show.
    """
    recipes = results["recipes"]
    label, scale = score_label(results)
    figure, panels = _grid(len(recipes), _title(results, "learning curves"), ("epoch", label))
    lanes = [_lanes(recipe, key) * scale for recipe in recipes for key in _CURVES]
    late = [_mean_sd(lane[:, lane.shape[1] // 5 :]) for lane in lanes]
    ends = [mean + side * sd for mean, sd in late for side in (-1, 1)]
    low, high = _visible_range(np.concatenate([*ends, []]), reach=5)
    baseline = next((recipe for recipe in recipes if recipe["name"] == "none"), None)
    for ax, recipe in zip(panels, recipes, strict=True):
        if baseline is not None and recipe is not baseline:
            mean, _ = _mean_sd(_lanes(baseline, "test_score") * scale)
            ax.plot(baseline["curves"]["epoch"], mean, color=COLOURS["none"], lw=1, ls=":")
        _draw_curves(ax, recipe, scale)
        _note_unseen(ax, recipe, scale, low)
        ax.set_ylim(low, high)
    figure.legend(handles=_curve_legend(recipes), **_LEGEND)
    return figure


def gap_bars(results: Mapping[str, Any]) -> Figure:
    """Generalization gap, test score and test NLL of each recipe, sorted by the gap.

    Bars and diamonds are means over seeds, whiskers one standard deviation on either side, dots
    single seeds. Only the gap is drawn as a bar, since only its axis must contain zero.
    """
    label, scale = score_label(results)
    recipes = sorted(results["recipes"], key=_by_gap)
    figure = Figure(figsize=(10, 1.7 + 0.36 * len(recipes)), dpi=DPI, layout="constrained")
    figure.suptitle(_title(results, "generalization"), x=0.01, ha="left", fontsize=11)
    axes = figure.subplots(1, 3, sharey=True)
    gap = f"gap: train − test {label.replace('%', 'percentage points')}"
    labels = (gap, f"test {label}", "test NLL (nats per example)")
    for ax, key, text in zip(axes, ("gap", "test_score", "test_nll"), labels, strict=True):
        _draw_metric(ax, recipes, key, 1.0 if key == "test_nll" else scale)
        ax.set_xlabel(text, fontsize=9)
    axes[0].set_yticks(range(len(recipes)), [recipe["name"] for recipe in recipes], fontsize=9)
    axes[0].set_ylim(-0.6, max(len(recipes), 1) - 0.4)
    figure.legend(handles=_gap_legend(recipes), **_LEGEND)
    return figure


def weight_histogram(weights: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Histogram of every kernel entry, one panel a recipe, on a logarithmic count.

    Exact zeros would vanish in the bin around zero, so they are counted apart: a stem at 0 and
    their share as text. Entries beyond the axis fall in the outermost bins.
    """
    labels = ("weight", "number of weights")
    figure, panels = _grid(len(weights), "kernel weights after training (first seed)", labels)
    kernels = {name: np.ravel(of["kernels"]).astype(float) for name, of in weights.items()}
    shown = {name: w[np.isfinite(w) & (w != 0)] for name, w in kernels.items()}
    sizes = np.abs(np.concatenate([*shown.values(), []]))
    # As far as the largest weight, unless that one is a runaway.
    reach = min(sizes.max(), 3 * np.quantile(sizes, 0.999)) if sizes.size else 1.0
    edges, ends = np.linspace(-reach, reach, 82), (-reach, reach)
    counts = {name: np.histogram(np.clip(w, *ends), edges)[0] for name, w in shown.items()}
    for ax, name in zip(panels, weights, strict=True):
        if "none" in counts and name != "none":
            ax.stairs(counts["none"], edges, baseline=0.6, color=COLOURS["none"], lw=0.9, zorder=3)
        ax.stairs(counts[name], edges, baseline=0.6, fill=True, color=colour(name), alpha=0.75)
        if zeros := int(np.sum(kernels[name] == 0)):
            ax.plot([0, 0], [0.6, zeros], color=_INK, lw=1.4, marker="o", ms=4, markevery=[1])
        _panel_title(ax, name, _zero_share(kernels[name]))
        ax.set_yscale("log")
    handles = [Line2D([], [], color=_INK, lw=1.4, marker="o", ms=4, label="exact zeros")]
    if "none" in counts and len(counts) > 1:
        handles.append(Line2D([], [], color=COLOURS["none"], lw=0.9, label="none, for comparison"))
    figure.legend(handles=handles, **_LEGEND)
    return figure


def sparsity_pattern(weights: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """First-layer kernel of each recipe as an image of |w|, on one colour scale.

    Rows are inputs, columns are units by falling norm, so dead units stand together on the
    right. Entries that are exactly zero have their own colour, off the scale.
    """
    labels = ("unit, by falling norm", _input_label(weights))
    figure, panels = _grid(len(weights), "first-layer kernel (first seed)", labels, share=False)
    layers = {name: np.abs(of["first_layer"].astype(float)) for name, of in weights.items()}
    sizes = [layer[np.isfinite(layer) & (layer > 0)] for layer in layers.values()]
    seen = np.concatenate([*sizes, []])
    # One runaway weight must not turn every other one dark.
    palette = ScalarMappable(Normalize(0, np.quantile(seen, 0.995) if seen.size else 1), "cividis")
    for ax, (name, layer) in zip(panels, layers.items(), strict=True):
        ax.imshow(_pattern(palette, layer), aspect="auto", interpolation="nearest")
        dead = f"{np.sum(np.all(layer == 0, axis=0))} of {layer.shape[1]} units dead"
        _panel_title(ax, name, f"{_zero_share(layer)}\n{dead}")
        ax.grid(False)
        ax.spines[:].set(visible=True, color="#999999")
    if panels:
        bar = figure.colorbar(palette, ax=panels, extend="max", aspect=30, pad=0.02, label="|w|")
        bar.ax.tick_params(labelsize=8)
    handles = [Patch(fc=EXACT_ZERO_COLOUR, ec="#999999", label="exactly 0")]
    if not all(np.all(np.isfinite(layer)) for layer in layers.values()):
        handles.append(Patch(fc=NOT_FINITE_COLOUR, label="not finite"))
    figure.legend(handles=handles, **_LEGEND)
    return figure


# ---------------------------------------------------------------- learning curves

_CURVES = ("train_score", "test_score")
_DASHES: Any = (0, (4, 1.5))
_KEPT: dict[str, Any] = {"ls": "", "marker": "v", "ms": 5.5, "mec": "white", "mew": 0.6}


def _draw_curves(ax: Axes, recipe: Mapping[str, Any], scale: float) -> None:
    epoch, tint = _floats(recipe["curves"]["epoch"]), colour(recipe["name"])
    lone: dict[str, Any] = {"marker": "o", "ms": 5} if epoch.size == 1 else {}
    for key, line in zip(_CURVES, ({"ls": _DASHES, "mfc": "white"}, {"lw": 1.8}), strict=True):
        mean, sd = _mean_sd(_lanes(recipe, key) * scale)
        ax.plot(epoch, mean, **{"color": tint, "lw": 1.2, **line, **lone})
        ax.fill_between(epoch, mean - sd, mean + sd, color=tint, alpha=0.22, lw=0)
    lanes = _lanes(recipe, "test_score") * scale
    kept = [(epoch[at], lanes[seed, at]) for seed, at in _kept_epochs(recipe)]
    ax.plot(*np.reshape(kept, (-1, 2)).T, **_KEPT, color=tint, zorder=5)
    _panel_title(ax, recipe["name"])
    ax.set_xlim(0, 1.02 * epoch.max(initial=1))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))


def _kept_epochs(recipe: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(seed index, index into `epoch`) of every seed whose kept epoch is not the last one."""
    epoch, best = recipe["curves"]["epoch"], [seed["best_epoch"] for seed in recipe["seeds"]]
    return [(i, epoch.index(at)) for i, at in enumerate(best) if at in epoch[:-1]]


def _note_unseen(ax: Axes, recipe: Mapping[str, Any], scale: float, low: float) -> None:
    """Say in the panel what its curves cannot show: diverged seeds, curves below the axis."""
    test = spread([seed["test_score"] for seed in recipe["seeds"]])
    mean, _ = _mean_sd(_lanes(recipe, "test_score") * scale)
    notes = [f"{test.diverged} of {test.seeds} seeds diverged"] if test.diverged else []
    if mean.size and mean[-1] < low:
        notes.append(f"test ends below the axis: {mean[-1]:.3g}")
    ax.annotate("\n".join(notes), (0.98, 0.05), xycoords="axes fraction", ha="right", **_NOTE)


def _curve_legend(recipes: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    band = " (mean; band: ± 1 sd over seeds)" if any(len(r["seeds"]) > 1 for r in recipes) else ""
    test = Line2D([], [], color=_INK, lw=1.8, label=f"test{band}")
    train = Line2D([], [], color=_INK, lw=1.2, ls=_DASHES, label="train")
    handles = [test, train, *_baseline_handle(recipes, "test of none")]
    if any(_kept_epochs(recipe) for recipe in recipes):
        handles.append(Line2D([], [], **_KEPT, color=_INK, label="epoch kept, one a seed"))
    return handles


def _baseline_handle(recipes: Sequence[Mapping[str, Any]], label: str) -> list[Line2D]:
    shown = len(recipes) > 1 and any(recipe["name"] == "none" for recipe in recipes)
    return [Line2D([], [], color=COLOURS["none"], ls=":", lw=1.2, label=label)] if shown else []


def _lanes(recipe: Mapping[str, Any], key: str) -> np.ndarray:
    """(seeds, epochs) array of one curve; null becomes nan."""
    lanes = [_floats(lane) for lane in recipe["curves"][key]]
    return np.reshape(lanes, (len(lanes), len(recipe["curves"]["epoch"])))


def _mean_sd(lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation (0 for one seed) over the finite seeds, by epoch."""
    finite = np.ma.masked_invalid(lanes)
    mean, sd = np.ma.mean(finite, axis=0), np.ma.std(finite, axis=0, ddof=1)
    return np.ma.filled(mean, nan), np.ma.filled(sd, 0.0)


# ---------------------------------------------------------------- generalization

_ROW = ("axes fraction", "data")
_MEAN: dict[str, Any] = {"fmt": "D", "ms": 4, "elinewidth": 1.2, "capsize": 2.5, "zorder": 4}


def _by_gap(recipe: Mapping[str, Any]) -> float:
    return -np.nan_to_num(spread([seed["gap"] for seed in recipe["seeds"]]).mean, nan=inf)


def _draw_metric(ax: Axes, recipes: Sequence[Mapping[str, Any]], key: str, scale: float) -> None:
    """One row a recipe: mean, whisker of one standard deviation, and below it a dot a seed."""
    _style(ax, grid="x")
    points = [scale * _floats([seed[key] for seed in recipe["seeds"]]) for recipe in recipes]
    spreads = [spread(values.tolist()) for values in points]
    whiskers = [[of.mean - of.sd, of.mean + of.sd] for of in spreads]
    low, high = _visible_range(np.concatenate([*points, *whiskers, []]), reach=20)
    for row, (recipe, values) in enumerate(zip(recipes, points, strict=True)):
        tint, (mean, sd, seeds, diverged) = colour(recipe["name"]), spreads[row]
        if key == "gap":
            ax.barh(row, np.nan_to_num(mean), height=0.78, color=tint, alpha=0.3, lw=0)
        # A seed keeps its height within the row, so that it can be followed across recipes.
        height = row - 0.2 + np.linspace(0.1, -0.1, seeds)
        ax.plot(values, height, "o", ms=3.4, color=tint, mec="white", mew=0.3, zorder=3)
        ax.errorbar(mean, row + 0.14, xerr=np.nan_to_num(sd) or None, color=_INK, **_MEAN)
        if recipe["name"] == "none" and isfinite(mean):
            ax.axvline(mean, color=COLOURS["none"], ls=":", lw=1.2, zorder=0)
        if diverged or mean > high:
            note = f"{diverged} of {seeds} seeds diverged" if diverged else f"{mean:.3g} →"
            ax.annotate(note, (0.98, row + 0.02), xycoords=_ROW, ha="right", **_NOTE)
        elif mean < low:
            ax.annotate(f"← {mean:.3g}", (0.02, row + 0.02), xycoords=_ROW, **_NOTE)
    if key == "gap":
        ax.axvline(0, color=_INK, lw=0.8)  # where bars start, so the axis has to hold it
        low, high = min(low, -0.04 * high), max(high, -0.04 * low)
    ax.set_xlim(low, high)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _gap_legend(recipes: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    whisker = "; whisker: ± 1 sd over seeds" if any(len(r["seeds"]) > 1 for r in recipes) else ""
    return [
        Line2D([], [], color=_INK, ls="", marker="D", ms=4, label=f"mean{whisker}"),
        Line2D([], [], color=_INK, ls="", marker="o", ms=3.4, label="single seed"),
        *_baseline_handle(recipes, "mean of none"),
    ]


# ---------------------------------------------------------------- weights


def _zero_share(values: np.ndarray) -> str:
    """Share of exact zeros in words, never rounded to none or all when it is neither."""
    zeros, lost = np.mean(values == 0), np.mean(~np.isfinite(values))
    if lost:
        return f"{100 * lost:.0f} % not finite"
    if zeros in (0, 1):
        return "all exactly 0" if zeros else "no exact zeros"
    return f"{min(max(100 * zeros, 0.1), 99.9):.1f} % exactly 0"


def _pattern(palette: ScalarMappable, layer: np.ndarray) -> np.ndarray:
    """(inputs, units, 4) image of |w|, units by falling norm."""
    order = np.argsort(-np.nan_to_num(np.linalg.norm(layer, axis=0), nan=inf), kind="stable")
    layer = layer[:, order]
    image = np.array(palette.to_rgba(np.nan_to_num(layer)))
    image[layer == 0] = to_rgba(EXACT_ZERO_COLOUR)
    image[~np.isfinite(layer)] = to_rgba(NOT_FINITE_COLOUR)
    return image


def _input_label(weights: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    for of in weights.values():
        # A convolution has a row for each entry of its window, not for each input.
        if len(of["input_shape"]) > 1 and np.prod(of["input_shape"]) == len(of["first_layer"]):
            return f"input ({' × '.join(map(str, of['input_shape']))}, flattened)"
    return "input of a unit"


# ---------------------------------------------------------------- layout

_LEGEND: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
_LEGEND["fontsize"] = 8.5
_NOTE: dict[str, Any] = {"fontsize": 8, "color": _INK, "zorder": 6}
_NOTE["bbox"] = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1.5}


def _grid(
    count: int, title: str, labels: tuple[str, str], *, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in at most five columns, 10 inches wide from three on."""
    rows = 1 if count <= 4 else 2 if count <= 10 else ceil(count / 4)
    columns = max(1, ceil(count / rows))
    size = ({1: 6, 2: 8}.get(columns, 10), 1.0 + rows * (3.0 if columns <= 2 else 2.4))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).flat
    for ax in axes[count:]:
        ax.remove()
    for at, ax in enumerate(axes[:count]):
        _style(ax)
        lowest, leftmost = at + columns >= count, at % columns == 0
        ax.tick_params(labelbottom=lowest, labelleft=leftmost)
        ax.set_xlabel(labels[0] if lowest else "", fontsize=9)
        ax.set_ylabel(labels[1] if leftmost else "", fontsize=9)
    return figure, list(axes[:count])


def _style(ax: Axes, grid: Literal["both", "x"] = "both") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#999999")
    ax.tick_params(labelsize=8, color="#999999", length=3)
    ax.grid(axis=grid, color="#E4E4E4", lw=0.7)
    ax.set_axisbelow(True)


def _panel_title(ax: Axes, name: str, detail: str = "") -> None:
    lines = len(detail.splitlines())
    short = name if len(name) <= 19 else f"{name[:18]}…"
    ax.set_title(short, loc="left", fontsize=9, fontweight="bold", pad=5 + 11 * lines)
    at: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(detail, (0, 1), (0, 4), **at, fontsize=8, color=_INK)


def _title(results: Mapping[str, Any], what: str) -> str:
    data, model = results["data"], results["model"]
    return f"{data['name']}, {model['name']}, {data['train_rows']} training rows: {what}"


def _visible_range(values: np.ndarray, reach: float) -> tuple[float, float]:
    """Range of the values with a margin, cut `reach` times their middle half away from it."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = finite.min(), finite.max()
    lower, upper = np.quantile(finite, [0.25, 0.75])
    if far := reach * (upper - lower):
        low, high = max(low, lower - far), min(high, upper + far)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return float(low - margin), float(high + margin)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([nan if value is None else value for value in values], float)
