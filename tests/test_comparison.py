"""The figures of a comparison, against NumPy, SciPy and scikit-learn; and what they depend on."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from flax import nnx
from scipy import stats
from sklearn import metrics

import jaxreg
from jaxreg import comparison, data, splits, training
from jaxreg.recipes import RECIPES, Regularizers

FIGURES = ("train_score", "test_score", "gap", "test_nll", "calibration_error", "zeros", "rank")
SEEDS = 3


def make_dataset(task: str) -> data.Dataset:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 5)).astype(np.float32)
    y = x[:, 0] + 0.5 * rng.normal(size=80).astype(np.float32)
    if task == "regression":
        return data.Dataset("lines", "regression", x, y)
    return data.Dataset("halves", "classification", x, np.digitize(y, [-0.5, 0.5]), tuple("abc"))


def make_comparison(task="classification", model="mlp", seeds=SEEDS, epochs=4, rate=0.01):
    dataset = make_dataset(task)
    pace = training.Settings(epochs, 16, rate)
    return comparison.Comparison(dataset, splits.split(dataset, seeds=seeds), model, pace)


# ---------------------------------------------------------------- figures


@pytest.fixture(params=["classification", "regression"])
def fitted(request, monkeypatch):
    """A comparison whose training gives random outputs; seed 1 diverged in the test rows."""
    of = make_comparison(request.param)
    rng = np.random.default_rng(2)

    def outputs(targets: np.ndarray) -> np.ndarray:
        if request.param == "regression":
            return (targets + rng.normal(size=targets.shape))[..., None].astype(np.float32)
        return rng.normal(size=(*targets.shape, 3), scale=2).astype(np.float32)

    split = of.split
    train, validation, test = map(outputs, (split.train_y, split.validation_y, split.test_y))
    test[1, 4] = np.nan
    kernel = rng.integers(-1, 2, (SEEDS, 5, 3)).astype(np.float32)
    curves = {"train_score": np.array([[0.5], [np.nan], [-np.inf]])}
    fit = training.LaneFit(
        {"kernel": kernel, "bias": np.zeros((SEEDS, 3), np.float32)},
        np.array([4, 4, 0]),
        *(train, validation, test, curves, 0.0, 0.0),
    )
    monkeypatch.setattr(training, "fit_lanes", lambda *_, **__: fit)
    return of, fit, of.run(RECIPES["none"], None).record


def expected_calibration_error(outputs: np.ndarray, targets: np.ndarray) -> float:
    exponentials = np.exp(outputs.astype(np.float64))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    confidence, guess = probabilities.max(axis=1), probabilities.argmax(axis=1)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            accuracy = metrics.accuracy_score(targets[inside], guess[inside])
            error += inside.mean() * abs(accuracy - confidence[inside].mean())
    return error


def interval_coverage_error(outputs: np.ndarray, targets: np.ndarray, variance: float) -> float:
    errors = []
    for level in np.arange(0.05, 0.96, 0.05):
        low, high = stats.norm.interval(level, outputs[:, 0].astype(np.float64), np.sqrt(variance))
        errors.append(abs(np.mean((low <= targets) & (targets <= high)) - level))
    return float(np.mean(errors))


def test_figures_are_those_of_scikit_learn_and_scipy(fitted):
    of, fit, record = fitted
    split, seed = of.split, record["seeds"][0]
    train, validation, test = fit.train_outputs[0], fit.validation_outputs[0], fit.test_outputs[0]
    train_y, validation_y, test_y = split.train_y[0], split.validation_y[0], split.test_y[0]
    if of.dataset.task == "regression":
        variance = metrics.mean_squared_error(validation_y, validation[:, 0])
        scores = [metrics.r2_score(y, z[:, 0]) for y, z in ((train_y, train), (test_y, test))]
        nll = -stats.norm.logpdf(test_y, test[:, 0], np.sqrt(variance)).mean()
        calibration = interval_coverage_error(test, test_y, variance)
    else:
        pairs = ((train_y, train), (test_y, test))
        scores = [metrics.accuracy_score(y, z.argmax(axis=1)) for y, z in pairs]
        exponentials = np.exp(test.astype(np.float64))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        nll = metrics.log_loss(test_y, probabilities, labels=[0, 1, 2])
        calibration = expected_calibration_error(test, test_y)
    # Biases do not count as zeros.
    zeros = (fit.params["kernel"][0] == 0).sum() / 15
    rank = np.linalg.matrix_rank(fit.params["kernel"][0]) / 3
    expected = (*scores, scores[0] - scores[1], nll, calibration, zeros, rank)
    for name, value in zip(FIGURES, expected, strict=True):
        assert seed[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert seed["best_epoch"] == 4


def test_a_diverged_seed_has_no_figures_and_leaves_the_others_theirs(fitted):
    record = fitted[2]
    without = dict.fromkeys((*FIGURES, "best_epoch"))
    assert record["seeds"][1] == {"seed": 1, **without}
    # Seed 2: early stopping kept the initial weights, as no epoch had a finite loss.
    assert record["seeds"][2] == {"seed": 2, **without}
    assert None not in record["seeds"][0].values()
    assert record["curves"]["train_score"] == [[0.5], [None], [None]]


@pytest.mark.parametrize("outputs", [np.zeros((4, 3)), np.full((4, 3), 1e4)])
def test_calibration_error_of_certain_and_of_clueless_outputs(outputs):
    targets = np.array([0, 0, 0, 0])
    assert comparison.calibration_error(outputs, targets) == pytest.approx(1 - 1 / 3)


def test_calibration_error_of_a_regression_that_is_always_far_off():
    far = comparison.calibration_error(np.full((4, 1), 100.0), np.zeros(4, np.float32), 1.0)
    assert far == pytest.approx(0.5)


# ---------------------------------------------------------------- training runs


class Stopped(Exception):
    """Training was about to begin."""


def test_a_recipe_reaches_the_model_and_the_optimizer_at_its_strength(monkeypatch):
    def fit_lanes(make_model, lanes, regularizers, settings, on_epochs):
        raise Stopped(make_model(nnx.Rngs(0)).dropout_rate, regularizers, settings.epochs)

    monkeypatch.setattr(training, "fit_lanes", fit_lanes)
    with pytest.raises(Stopped) as stopped:
        make_comparison(epochs=7).run(RECIPES["dropout"], 0.25)
    assert stopped.value.args == (0.25, Regularizers(dropout=0.25), 7)
    with pytest.raises(Stopped) as stopped:
        make_comparison(epochs=7).run(RECIPES["l2"], None)
    assert stopped.value.args == (0.0, Regularizers(l2=RECIPES["l2"].strength), 7)


def run_cocktail(of: comparison.Comparison) -> comparison.Outcome:
    """A run that makes use of everything: dropout, early stopping, a penalty."""
    return of.run(RECIPES["cocktail"], None)


def test_a_run_repeats_itself_whatever_the_test_rows_are():
    of = make_comparison()
    noise = np.random.default_rng(3).normal(size=of.split.test_x.shape).astype(np.float32)
    other = dataclasses.replace(of.split, test_x=noise)
    one, two = run_cocktail(of), run_cocktail(dataclasses.replace(of, split=other))
    np.testing.assert_array_equal(one.weights["kernels"], two.weights["kernels"])
    for seed, again in zip(one.record["seeds"], two.record["seeds"], strict=True):
        changed = {name for name in seed if seed[name] != again[name]}
        assert {"test_nll"} <= changed <= {"test_score", "gap", "test_nll", "calibration_error"}
    curves, others = one.record["curves"], two.record["curves"]
    changed = {name for name in curves if curves[name] != others[name]}
    assert {"test_nll"} <= changed <= {"test_score", "test_nll"}


def test_the_figures_of_a_seed_do_not_depend_on_the_number_of_seeds():
    (alone,) = run_cocktail(make_comparison(seeds=1)).record["seeds"]
    first, *_ = run_cocktail(make_comparison(seeds=3)).record["seeds"]
    assert alone == pytest.approx(first, rel=1e-4)


def test_training_that_diverges_gives_null_in_results_that_fit_the_schema():
    of = make_comparison("regression", "linear", seeds=1, epochs=1, rate=1e30)
    outcome = of.run(RECIPES["early_stop"], None)
    assert set(outcome.record["seeds"][0].values()) == {0, None}
    assert outcome.record["curves"]["train_nll"] == [[None]]
    asked = {"data": "own.csv", "model": "linear", "seeds": 1, "epochs": 1}
    for status, recipes in {"complete": ["none"], "interrupted": ["none", "l2"]}.items():
        content = of.results({**asked, "recipes": recipes}, [outcome])
        schema = json.loads(Path(jaxreg.__file__).with_name("results.schema.json").read_text())
        jsonschema.validate(content, schema, cls=jsonschema.Draft202012Validator)
        assert content["status"] == status
        assert json.loads(json.dumps(content, allow_nan=False)) == content


@pytest.mark.parametrize(
    ("task", "model", "description", "parameters"),
    [
        ("classification", "linear", "5-3", 18),
        ("classification", "mlp", "5-128-3", 6 * 128 + 129 * 3),
        ("regression", "mlp", "5-128-1", 6 * 128 + 129),
    ],
)
def test_the_model_is_described_by_its_layers(task, model, description, parameters):
    described = make_comparison(task, model).results({"recipes": []}, [])["model"]
    assert described == {"name": model, "description": description, "parameters": parameters}


def test_a_cnn_is_described_by_its_channels_and_its_head():
    x = np.random.default_rng(0).normal(size=(40, 8, 8, 2)).astype(np.float32)
    dataset = data.Dataset("images", "classification", x, np.arange(40) % 4, tuple("abcd"))
    pace = training.Settings(1, 16, 0.01)
    of = comparison.Comparison(dataset, splits.split(dataset, seeds=1), "cnn", pace)
    described = of.results({"recipes": []}, [])["model"]
    weights = (9 * 2 + 1) * 16 + (9 * 16 + 1) * 32 + (2 * 2 * 32 + 1) * 4
    assert described["description"] == "conv 16, 32; dense 128-4"
    assert described["parameters"] == weights


# ---------------------------------------------------------------- the choice of recipes


def test_without_names_all_recipes_that_suit_the_task_run():
    for task, left_out in (("classification", set()), ("regression", {"label_smoothing"})):
        names = [recipe.name for recipe, _ in comparison.choose(None, {}, task)]
        assert names == [name for name in RECIPES if name not in left_out]


def test_recipes_run_in_the_order_in_which_they_are_named():
    chosen = comparison.choose(["dropout", "none", "l2"], {"l2": 0.5}, "classification")
    named = [(recipe.name, strength) for recipe, strength in chosen]
    assert named == [("dropout", None), ("none", None), ("l2", 0.5)]


def test_a_strength_of_zero_is_a_strength():
    ((recipe, strength),) = comparison.choose(["l2"], {"l2": 0.0}, "regression")
    assert recipe.regularizers(strength).l2 == 0.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["l3"], {}), "recipes: got 'l3'"),
        (([], {}), "recipes: got no name"),
        ((["l2"], {"clip": 1.0}), "strength: got 'clip'"),
        ((["l2"], {"l2": -1.0}), "strength l2: got -1.0"),
    ],
)
def test_bad_choices_name_the_argument(arguments, said):
    with pytest.raises(jaxreg.ArgumentError) as error:
        comparison.choose(*arguments, "classification")
    assert str(error.value).startswith(said)
    assert error.value.name == said.partition(":")[0]
