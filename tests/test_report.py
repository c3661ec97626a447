"""Behaviour of the figures, the table and the page, on synthetic outcomes of `jaxreg compare`."""

import copy
import json
import re
import struct
import warnings
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib import resources
from math import isnan, nan
from pathlib import Path
from typing import Any

import jsonschema
import matplotlib.figure
import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from jaxreg import plot, report

# name: description, settings, last train and test score, test NLL, share of zeros
RECIPES: dict[str, tuple[str, dict[str, Any], float, float, float, float]] = {
    "none": ("plain Adam", {}, 1.0, 0.972, 0.112, 0.0),
    "l2": ("coupled L2", {"l2": 1e-4}, 0.999, 0.974, 0.098, 0.0),
    "weight_decay": ("decoupled weight decay", {"decay": 0.01}, 0.999, 0.973, 0.101, 0.0),
    "l1_prox": ("proximal L1", {"penalty": "L1(0.001)"}, 0.991, 0.970, 0.099, 0.63),
    "elastic_net": ("proximal elastic net", {"penalty": "..."}, 0.990, 0.971, 0.097, 0.58),
    "dropout": ("dropout", {"rate": 0.3}, 0.997, 0.979, 0.071, 0.0),
    "label_smoothing": ("label smoothing", {"smoothing": 0.1}, 1.0, 0.976, 0.165, 0.0),
    "clip": ("clipping by global norm", {"clip": 1.0}, 1.0, 0.972, 0.112, 0.0),
    "early_stop": ("early stopping", {"patience": 10}, 0.993, 0.969, 0.108, 0.0),
    "cocktail": ("several at once", {"rate": 0.2, "decay": 0.01}, 0.998, 0.980, 0.085, 0.0),
}
SCORES = ("train_score", "test_score", "gap", "test_nll", "calibration_error")


def synthetic_results(
    names: Sequence[str] = tuple(RECIPES),
    seeds: int = 5,
    epochs: int = 100,
    task: str = "classification",
    noise: float = 1.0,
) -> dict[str, Any]:
    """An outcome in which seeds differ as splits do, and recipes by `noise` times a third of it."""
    rng = np.random.default_rng(0)
    luck = rng.normal(size=seeds)
    return {
        "schema": "jaxreg.compare/1",
        "status": "complete",
        "created": "2026-01-31T12:00:00+00:00",
        "settings": {
            "data": "digits",
            "model": "mlp",
            "seeds": seeds,
            "epochs": epochs,
            "batch_size": 64,
            "learning_rate": 0.001,
            "train_size": None,
            "label_noise": 0.0,
            "recipes": list(names),
            "strength": {},
        },
        "data": {
            "name": "digits",
            "task": task,
            "rows": 1797,
            "features": [8, 8, 1],
            "classes": [] if task == "regression" else [str(i) for i in range(10)],
            "train_rows": 1078,
            "validation_rows": 270,
            "test_rows": 449,
        },
        "model": {"name": "mlp", "description": "64-128-10", "parameters": 9610},
        "versions": {"jaxreg": "0.1.0", "jax": "0.10.2", "python": "3.11.9"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "recipes": [_recipe(name, epochs, task, noise, luck, rng) for name in names],
    }


def _recipe(
    name: str, epochs: int, task: str, noise: float, luck: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    description, settings, train, test, nll, zeros = RECIPES.get(name, RECIPES["none"])
    calibration = 0.02 + nll / 10
    if task == "regression":
        train, test, nll = train - 0.1, test - 0.4, 10 * nll - 1.2
    epoch = np.arange(1, epochs + 1)
    rise, fall = 1 - 0.8 * np.exp(-epoch / 6), 1 + 18 * np.exp(-epoch / 6)

    def lanes(last: float, sd: float, shape: np.ndarray) -> list[list[float]]:
        lucky = last + sd * luck + noise * sd / 3 * rng.normal(size=luck.size)
        return [(shape * of + sd / 6 * rng.normal(size=epochs)).tolist() for of in lucky]

    curves: dict[str, Any] = {"epoch": epoch.tolist()}
    for part, score, loss in (
        ("train", train, 0.02),
        ("validation", test, nll),
        ("test", test, nll),
    ):
        curves[f"{part}_score"] = lanes(score, 0.0005 if part == "train" else 0.004, rise)
        curves[f"{part}_nll"] = lanes(loss, 0.008, fall)
    seeds = []
    for seed in range(luck.size):
        kept = 1 + (epochs // 2 if name == "early_stop" else epochs - 1)
        figures = {k: curves[k][seed][kept - 1] for k in ("train_score", "test_score", "test_nll")}
        figures["gap"] = figures["train_score"] - figures["test_score"]
        figures["calibration_error"] = calibration + 0.001 * luck[seed]
        figures["zeros"] = zeros + (0.01 * luck[seed] if zeros else 0.0)
        figures["rank"] = 1.0
        seeds.append({"seed": seed, **figures, "best_epoch": kept})
    return {
        "name": name,
        "description": description,
        "settings": settings,
        "target_zeros": None,
        "seeds": seeds,
        "curves": curves,
        "compile_seconds": 3.1 + len(name) / 10,
        "run_seconds": 2.2 + len(name) / 20,
    }


def synthetic_weights(names: Sequence[str] = tuple(RECIPES)) -> dict[str, dict[str, np.ndarray]]:
    """Weights of a 64-128-10 network; 31 units of the sparse recipes are dead."""
    rng = np.random.default_rng(1)
    weights = {}
    for name in names:
        first = 0.1 * rng.normal(size=(64, 128)) * (1 + rng.exponential(size=128))
        if RECIPES.get(name, RECIPES["none"])[-1]:
            first = np.sign(first) * np.maximum(np.abs(first) - 0.09, 0)
            first[:, rng.choice(128, 31, replace=False)] = 0
        kernels = np.concatenate([first.ravel(), 0.2 * rng.normal(size=1280)])
        weights[name] = {
            "kernels": kernels.astype(np.float32),
            "first_layer": first.astype(np.float32),
            "input_shape": np.array([8, 8, 1]),
        }
    return weights


def diverge(results: dict[str, Any], name: str, seed: int, value: float | None = None) -> None:
    """Make one seed of a recipe diverge halfway, in place."""
    recipe = next(recipe for recipe in results["recipes"] if recipe["name"] == name)
    recipe["seeds"][seed] |= dict.fromkeys(SCORES, value)
    for key, lanes in recipe["curves"].items():
        if key != "epoch":
            half = len(lanes[seed]) // 2
            lanes[seed][half:] = [value] * (len(lanes[seed]) - half)


def set_metric(results: dict[str, Any], metric: str, values: Sequence[float]) -> None:
    """Give every seed of the i-th recipe the i-th value, in place."""
    for recipe, value in zip(results["recipes"], values, strict=True):
        for seed in recipe["seeds"]:
            seed[metric] = value


def best(results: dict[str, Any], metric: str) -> list[str]:
    return [row.name for row in report.summary(results) if metric in row.best]


def printed(results: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(report.table(results))
    return capture.get()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    report.write_report(path, synthetic_results(), synthetic_weights())
    return path


# ---------------------------------------------------------------- summary


def test_mean_and_sample_deviation_over_seeds():
    results = synthetic_results(["none"], seeds=3)
    for seed, value in zip(results["recipes"][0]["seeds"], (0.1, 0.2, 0.6), strict=True):
        seed["test_nll"] = value
    of = report.summary(results)[0].metrics["test_nll"]
    np.testing.assert_allclose((of.mean, of.sd), (0.3, np.sqrt(0.07)))
    assert (of.seeds, of.diverged) == (3, 0)


@pytest.mark.parametrize(
    ("metric", "values", "winner"),
    [
        ("train_score", (0.8, 0.9), "l2"),
        ("test_score", (0.8, 0.9), "l2"),
        ("gap", (-0.02, 0.01), "l2"),
        ("test_nll", (0.2, 0.1), "l2"),
        ("calibration_error", (0.2, 0.1), "l2"),
        ("zeros", (0.0, 0.1), "l2"),
    ],
)
def test_best_of_each_metric(metric: str, values: tuple[float, float], winner: str):
    results = synthetic_results(["none", "l2"])
    set_metric(results, metric, values)
    assert best(results, metric) == [winner]


def test_least_time_is_best():
    results = synthetic_results(["none", "weight_decay"])
    assert best(results, "compile_seconds") == best(results, "run_seconds") == ["none"]


def test_no_zeros_are_not_best():
    results = synthetic_results(["none", "l2"])
    set_metric(results, "zeros", (0.0, 1e-6))  # shown as 0.0 %
    assert best(results, "zeros") == []


def test_ties_as_displayed_are_all_best():
    results = synthetic_results(["none", "l2", "dropout"])
    set_metric(results, "test_score", (0.97101, 0.97099, 0.9704))
    assert best(results, "test_score") == ["none", "l2"]


@pytest.mark.parametrize("value", [None, nan])
def test_one_diverged_seed_leaves_no_mean_and_no_mark(value: float | None):
    results = synthetic_results(["none", "dropout"])
    assert best(results, "test_nll") == ["dropout"]
    diverge(results, "dropout", 2, value)
    of = report.summary(results)[1].metrics["test_nll"]
    assert isnan(of.mean)
    assert of.diverged == 1
    assert best(results, "test_nll") == ["none"]


def test_nothing_is_best_when_every_recipe_diverged():
    results = synthetic_results(["none", "l2"])
    for name in ("none", "l2"):
        diverge(results, name, 0)
    assert best(results, "test_nll") == []


def test_the_only_recipe_is_not_best():
    assert report.summary(synthetic_results(["l2"]))[0].best == frozenset()


# ---------------------------------------------------------------- paired differences


def test_paired_difference_removes_what_seeds_share():
    results = synthetic_results(["none", "l2"], seeds=4)
    for i, (a, b) in enumerate(zip(*(r["seeds"] for r in results["recipes"]), strict=True)):
        a["test_nll"], b["test_nll"] = 10.0 * i + 1.0, 10.0 * i + 0.5 + 0.1 * (i % 2)
    of = report.paired_difference(results, "l2", "none", "test_nll")
    differences = [-0.5, -0.4, -0.5, -0.4]
    error = float(np.std(differences, ddof=1)) / 2
    np.testing.assert_allclose((of.mean, of.error), (-0.45, error), rtol=1e-6)
    np.testing.assert_allclose(of.margin, 3.1824 * error, rtol=1e-4)  # Student, 3 degrees, 95 %
    assert of.separated


def test_more_comparisons_widen_the_interval():
    two, three = (synthetic_results(["none", "l2", "clip"][:n]) for n in (2, 3))
    three["recipes"][:2] = two["recipes"]
    margins = [report.paired_difference(of, "l2", "none", "test_nll").margin for of in (two, three)]
    assert margins[1] > 1.1 * margins[0]


def test_a_run_that_was_stopped_separates_no_more_than_the_whole_one():
    whole, stopped = synthetic_results(["none", "l2", "clip"]), synthetic_results(["none", "l2"])
    stopped["recipes"] = whole["recipes"][:2]
    stopped["settings"]["recipes"] = whole["settings"]["recipes"] = ["none", "l2", "clip"]
    found, expected = (
        report.paired_difference(of, "l2", "none", "test_nll") for of in (stopped, whole)
    )
    assert found == expected


def test_seeds_are_paired_by_number_not_by_place():
    results = synthetic_results(["none", "l2"])
    expected = report.paired_difference(results, "l2", "none", "test_nll")
    results["recipes"][1]["seeds"].reverse()
    found = report.paired_difference(results, "l2", "none", "test_nll")
    np.testing.assert_allclose((found.mean, found.error), (expected.mean, expected.error))


# ---------------------------------------------------------------- verdict


def test_verdict_names_the_best_and_the_numbers():
    text = report.verdict(synthetic_results())
    rows = {row.name: row.metrics["test_nll"] for row in report.summary(synthetic_results())}
    assert text.startswith("On digits with 1078 training rows, dropout has the lowest test NLL: ")
    assert f"{rows['dropout'].mean:.3f} ± {rows['dropout'].sd:.3f}" in text
    assert f"{rows['none'].mean:.3f} ± {rows['none'].sd:.3f}" in text


def test_verdict_changes_when_noise_dominates():
    quiet, loud = (report.verdict(synthetic_results(noise=noise)) for noise in (0.5, 30.0))
    assert "more than the noise explains" in quiet
    assert "within the noise" in loud
    assert "does not show" in loud


def test_overlapping_spreads_do_not_hide_a_paired_difference():
    results = synthetic_results(["none", "l2"])
    for i, (a, b) in enumerate(zip(*(r["seeds"] for r in results["recipes"]), strict=True)):
        a["test_nll"], b["test_nll"] = 1.0 + i, 0.9 + i + 0.001 * (i % 2)
    assert "more than the noise explains" in report.verdict(results)


def test_verdict_gives_the_interval_that_it_judges_by():
    results = synthetic_results(["none", "l2"])
    of = report.paired_difference(results, "l2", "none", "test_nll")
    text = report.verdict(results)
    assert f"; 95 % {of.mean - of.margin:+.2g} to {of.mean + of.margin:+.2g})" in text


def test_verdict_calls_identical_figures_identical():
    results = synthetic_results(["none", "l2"])
    results["recipes"][1]["seeds"] = results["recipes"][0]["seeds"]
    assert "they are identical" in report.verdict(results)


def test_notes_name_the_recipes_with_a_better_score():
    results = synthetic_results(["none", "l2"])
    for i, (a, b) in enumerate(zip(*(r["seeds"] for r in results["recipes"]), strict=True)):
        a["test_score"], b["test_score"] = 0.9, 0.92 + 0.001 * (i % 2)
    assert any("Better than none in test accuracy: l2, by +2.0" in n for n in report.notes(results))
    assert not any("Better" in n for n in report.notes(synthetic_results(["none", "l2"], noise=30)))


def test_missed_targets_and_low_ranks_are_said():
    results = synthetic_results(["none", "l1_prox", "l2"])
    assert not any("missed" in n or "rank" in n for n in report.notes(results))
    by_name = {recipe["name"]: recipe for recipe in results["recipes"]}
    set_metric(results, "zeros", (0.0, 0.7, 0.0))
    set_metric(results, "rank", (1.0, 1.0, 0.25))
    by_name["l1_prox"]["target_zeros"] = 0.8
    by_name["none"]["target_zeros"] = 0.005  # within a percentage point
    said = " ".join(report.notes(results))
    assert "l1_prox missed its target of 80% zeros: it has 70.0%. More epochs" in said
    assert "Kernels of l2 have 25% of the rank they could have." in said
    assert "none missed" not in said


def test_verdict_of_one_seed_admits_that_noise_is_unknown():
    assert "one seed gives no measure of the noise" in report.verdict(synthetic_results(seeds=1))


def test_verdict_when_nothing_beats_none():
    results = synthetic_results(["none", "label_smoothing"])
    assert "no recipe beats training without regularization" in report.verdict(results)


def test_verdict_without_a_usable_baseline():
    missing = synthetic_results(["l2", "dropout"])
    assert "was not run for comparison" in report.verdict(missing)
    diverged = synthetic_results(["none", "dropout"])
    diverge(diverged, "none", 0)
    assert "(none) diverged" in report.verdict(diverged)
    diverge(diverged, "dropout", 0)
    assert "no recipe has a finite test NLL" in report.verdict(diverged)


# ---------------------------------------------------------------- table


def long_numbers() -> dict[str, Any]:
    results = synthetic_results()
    for recipe in results["recipes"]:
        recipe["compile_seconds"] = 1234.5
        for i, seed in enumerate(recipe["seeds"]):
            seed |= {"train_score": 1.0, "gap": -0.2 * i, "test_nll": -12.34 * i, "zeros": 1.0}
    return results


@pytest.mark.parametrize(
    "results",
    [
        synthetic_results(),
        synthetic_results(task="regression"),
        synthetic_results(seeds=1),
        synthetic_results(["none", "a_name_of_my_own_that_is_much_too_long_for_any_table"]),
        long_numbers(),
    ],
    ids=["classification", "regression", "one seed", "long name", "long numbers"],
)
def test_table_fits_100_columns_whole(results: dict[str, Any]):
    text = printed(results)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    rows = report.summary(results)
    lines = text.splitlines()
    for row in (row for row in rows if len(row.name) < 20):
        (line,) = (line for line in lines if line.startswith(f"{row.name} "))
        assert len(re.findall(r"\d+(?:\.\d+)?(?: ?±\d+(?:\.\d+)?)?\*?", line[len(row.name) :])) == 8


def test_best_is_marked_without_colour_and_with_it():
    results = synthetic_results(["none", "dropout"])
    (line,) = (line for line in printed(results).splitlines() if line.startswith("dropout"))
    cell = report.columns(results)[3].cell(report.summary(results)[1].metrics["test_nll"])
    assert f"{cell}*" in line
    marked = list(report.table(results).columns[4].cells)[1]
    assert isinstance(marked, Text)
    assert marked.style == "bold green"


def test_caption_explains_the_marks():
    caption = str(report.table(synthetic_results()).caption)
    assert "± one standard deviation over 5 seeds" in caption
    assert "* best of its column" in caption
    assert "diverged" not in caption


def test_single_seed_has_no_deviation():
    results = synthetic_results(seeds=1)
    table = report.table(results)
    assert "±" not in printed(results).replace(str(table.caption), "")
    assert "no ± (n/a)" in str(table.caption)


def test_diverged_is_said_in_its_cells_and_explained():
    results = synthetic_results(["none", "dropout"])
    diverge(results, "dropout", 1)
    (line,) = (line for line in printed(results).splitlines() if line.startswith("dropout"))
    assert line.count("diverged") == len(SCORES)
    assert "nan" not in line
    assert "diverged: not finite" in str(report.table(results).caption)


def test_square_brackets_in_a_name_are_not_markup():
    assert "[bold]mine" in printed(synthetic_results(["[bold]mine"]))


def test_calibration_column_is_dropped_where_there_is_none():
    results = synthetic_results(["none", "l2"], task="regression")
    assert "calib." in printed(results)
    for recipe in results["recipes"]:
        for seed in recipe["seeds"]:
            seed["calibration_error"] = None
    assert "calib." not in printed(results)
    assert "diverged" not in printed(results)


def test_units_follow_the_task():
    classes, numbers = (
        printed(synthetic_results(task=t)) for t in ("classification", "regression")
    )
    assert "acc. %" in classes
    assert "R²" in numbers
    assert "acc." not in numbers


# ---------------------------------------------------------------- figures


def odd_outcomes() -> dict[str, tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]]:
    names = ["none", "l2", "l1_prox", "dropout"]
    one, many = ["l1_prox"], [*RECIPES, "mine", "a_name_of_my_own_that_is_long"]
    diverged, broken = synthetic_results(names), synthetic_weights(names)
    diverge(diverged, "l2", 0)
    for seed in range(5):
        diverge(diverged, "dropout", seed, nan)
    broken["dropout"]["kernels"][:] = nan
    broken["dropout"]["first_layer"][:] = nan
    broken["l2"]["first_layer"][:] = 0
    runaway = synthetic_results(names, task="regression")
    for seed in runaway["recipes"][1]["seeds"]:
        seed |= {"test_score": -1e9, "gap": 1e9, "test_nll": 1e12}
    return {
        "one recipe, one seed": (synthetic_results(one, 1), synthetic_weights(one)),
        "one epoch": (synthetic_results(names, epochs=1), synthetic_weights(names)),
        "twelve": (synthetic_results(many, 2), synthetic_weights(many)),
        "diverged": (diverged, broken),
        "runaway": (runaway, synthetic_weights(names)),
        "nothing": (synthetic_results([]), {}),
    }


@pytest.mark.parametrize("case", odd_outcomes())
def test_figures_and_page_of_odd_outcomes_give_no_warning(case: str, tmp_path: Path):
    results, weights = odd_outcomes()[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report.write_report(tmp_path, results, weights)
        report.table(results)
    assert (tmp_path / "index.html").stat().st_size > 10_000


def texts(figure: matplotlib.figure.Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda of: hasattr(of, "get_text"))]  # pyright: ignore


def test_curves_have_a_panel_a_recipe_on_shared_axes():
    figure = plot.learning_curves(synthetic_results())
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(RECIPES)
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in figure.axes}) == 1
    low, high = figure.axes[0].get_ylim()
    assert 90 < low < 97
    assert 100 < high < 101


def test_curves_mark_the_epoch_kept_by_early_stopping():
    figure = plot.learning_curves(synthetic_results(["none", "early_stop"]))
    kept = [next(line for line in ax.lines if line.get_marker() == "v") for ax in figure.axes]
    np.testing.assert_array_equal(kept[0].get_xdata(), [])
    np.testing.assert_array_equal(kept[1].get_xdata(), [51] * 5)


def test_curves_average_the_finite_seeds_and_say_so():
    results = synthetic_results(["l2"])
    diverge(results, "l2", 3)
    figure = plot.learning_curves(results)
    assert "1 of 5 seeds diverged" in texts(figure)
    lanes = [lane for i, lane in enumerate(results["recipes"][0]["curves"]["test_score"]) if i != 3]
    solid = next(line for line in figure.axes[0].lines if line.get_linestyle() == "-")
    np.testing.assert_allclose(solid.get_ydata()[-1], 100 * np.mean(lanes, axis=0)[-1])  # pyright: ignore


def test_gap_is_sorted_and_its_axis_holds_zero():
    figure = plot.gap_bars(synthetic_results())
    bars = figure.axes[0].patches
    widths = [bar.get_width() for bar in bars]  # pyright: ignore
    assert widths == sorted(widths, reverse=True)  # row 0 is at the bottom
    low, high = figure.axes[0].get_xlim()
    assert low < 0 < high


def test_gap_whiskers_are_inside_the_axes():
    figure = plot.gap_bars(synthetic_results(["none"], seeds=2))
    for ax in figure.axes:
        low, high = ax.get_xlim()
        ends = np.concatenate([of.get_segments()[0][:, 0] for of in ax.collections])  # pyright: ignore
        assert low < ends.min()
        assert ends.max() < high


def test_histogram_counts_exact_zeros_apart():
    weights = synthetic_weights(["l1_prox"])
    kernels = weights["l1_prox"]["kernels"]
    figure = plot.weight_histogram(weights)
    assert f"{100 * np.mean(kernels == 0):.1f} % exactly 0" in texts(figure)
    (stairs,) = figure.axes[0].patches
    assert stairs.get_data().values.sum() == np.count_nonzero(kernels)  # pyright: ignore


@pytest.mark.parametrize(
    ("zeros", "said"), [(0, "no exact zeros"), (1, "0.1 % exactly 0"), (4000, "all exactly 0")]
)
def test_few_zeros_are_not_rounded_to_none(zeros: int, said: str):
    weights = synthetic_weights(["none"])
    weights["none"]["kernels"] = np.r_[np.zeros(zeros), np.ones(4000 - zeros)].astype(np.float32)
    assert said in texts(plot.weight_histogram(weights))


def test_pattern_gathers_dead_units_and_sets_zeros_apart():
    weights = synthetic_weights(["none", "l1_prox"])
    weights["none"]["first_layer"][0, 0] = 1e-30  # tiny is not zero
    figure = plot.sparsity_pattern(weights)
    images = [ax.images[0].get_array() for ax in figure.axes[:2]]
    white = [np.all(np.asarray(image)[..., :3] == 1, axis=-1) for image in images]
    assert not white[0].any()
    assert white[1].sum() == np.sum(weights["l1_prox"]["first_layer"] == 0)
    assert white[1][:, -31:].all()
    assert not white[1][:, :-31].all(axis=0).any()
    assert any("31 of 128 units dead" in text for text in texts(figure))


def test_colours_are_fixed_by_name_and_distinct():
    assert set(plot.COLOURS) == set(RECIPES)
    assert len({*plot.COLOURS.values(), plot.colour("mine")}) == len(RECIPES) + 1


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("learning_curves", (1500, 870)),
        ("gap", (1500, 795)),
        ("weights", (1500, 870)),
        ("sparsity", (1500, 870)),
    ],
)
def test_png_has_its_size_and_something_on_it(folder: Path, name: str, size: tuple[int, int]):
    content = (folder / f"{name}.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == size
    assert len(content) > 20_000


def test_only_whole_files_are_left(folder: Path):
    names = {"index.html", "learning_curves.png", "gap.png", "weights.png", "sparsity.png"}
    assert {path.name for path in folder.iterdir()} == names


def test_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gap.png").write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        report.write_report(tmp_path, synthetic_results(["none"], 1), synthetic_weights(["none"]))
    assert [path.name for path in tmp_path.iterdir()] == ["gap.png"]
    assert (tmp_path / "gap.png").read_text() == "old"


class Page(HTMLParser):
    """Tags of a page with their attributes, and a check that every one of them is closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\xa0", " ").replace("−", "-")


def test_page_needs_no_other_file_and_no_script(folder: Path):
    page = Page(folder / "index.html")
    links = [of[key] for _, of in page.tags for key in ("src", "href", "srcset") if key in of]
    assert len(links) == 4
    assert all(link and link.startswith("data:image/png;base64,") for link in links)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import", (folder / "index.html").read_text("utf-8"))


def test_page_is_accessible(folder: Path):
    page = Page(folder / "index.html")
    assert all(of.get("alt") for tag, of in page.tags if tag == "img")
    assert all(of.get("scope") for tag, of in page.tags if tag == "th")
    count = [tag for tag, _ in page.tags]
    assert count.count("caption") == count.count("table") == 3
    assert ("html", {"lang": "en"}) in page.tags


def test_page_shows_verdict_numbers_and_versions(folder: Path):
    page, results = Page(folder / "index.html"), synthetic_results()
    assert report.verdict(results) in page.text
    for row in report.summary(results):
        assert report.columns(results)[3].cell(row.metrics["test_nll"], " ± ") in page.text
    for version in results["versions"].values():
        assert version in page.text
    assert "Interrupted" not in page.text


def test_page_escapes_names_and_settings(tmp_path: Path):
    results = synthetic_results(["none", "<b>mine</b>"], 2)
    results["recipes"][1]["settings"] = {"penalty": "<script>alert(1)</script>"}
    results["data"]["name"] = '"><img src=x>'
    report.write_report(tmp_path, results, synthetic_weights(["none", "<b>mine</b>"]))
    source = (tmp_path / "index.html").read_text("utf-8")
    assert "&lt;b&gt;mine&lt;/b&gt;" in source
    assert "&lt;script&gt;" in source
    assert "<script" not in source
    assert "<b>mine" not in source
    assert "<img src=x" not in source


def test_page_says_that_the_run_was_interrupted(tmp_path: Path):
    results = synthetic_results(["none"], 2) | {"status": "interrupted"}
    report.write_report(tmp_path, results, synthetic_weights(["none"]))
    assert "Interrupted." in Page(tmp_path / "index.html").text


def test_page_lists_what_is_not_separated(tmp_path: Path):
    results = synthetic_results(["none", "l2", "dropout"], noise=30.0)
    report.write_report(tmp_path, results, synthetic_weights(["none", "l2", "dropout"]))
    text = Page(tmp_path / "index.html").text
    assert "Not separated from" in text
    assert text.count("not separated") == 4  # two recipes, test NLL and accuracy


# ---------------------------------------------------------------- schema


def check(results: dict[str, Any]) -> None:
    source = resources.files("jaxreg").joinpath("results.schema.json").read_text("utf-8")
    schema = json.loads(source)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(results, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_results_fit_their_schema(task: str):
    results = synthetic_results(task=task)
    diverge(results, "l2", 1)
    check(json.loads(json.dumps(results)))


@pytest.mark.parametrize(
    "path",
    [(), ("data",), ("model",), ("device",), ("recipes", 0), ("recipes", 0, "curves"),
     ("recipes", 0, "seeds", 0)],
)  # fmt: skip
def test_schema_refuses_unknown_and_missing_fields(path: tuple[str | int, ...]):
    for change in ("add", "remove"):
        results = copy.deepcopy(synthetic_results(["none"], 1, 3))
        part: Any = results
        for key in path:
            part = part[key]
        part.update(surprise=1) if change == "add" else part.pop(next(iter(part)))
        with pytest.raises(jsonschema.ValidationError):
            check(results)


def test_schema_describes_every_field():
    source = resources.files("jaxreg").joinpath("results.schema.json").read_text("utf-8")

    def fields(schema: Any) -> list[Any]:
        inner = [of for value in schema.values() if isinstance(value, dict) for of in fields(value)]
        return [*schema.get("properties", {}).values(), *inner]

    named = [of for of in fields(json.loads(source)) if "$ref" not in of]
    assert len(named) > 40
    assert all(of.get("description") for of in named)
