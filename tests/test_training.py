"""Lanes: seeds of one compiled program, equal to what each seed would give alone."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.metrics import log_loss, r2_score

from jaxreg import models, training
from jaxreg.penalties import L1
from jaxreg.recipes import RECIPES, Regularizers

SETTINGS = training.Settings(epochs=6, batch_size=16, learning_rate=0.01)


def make_lanes(lanes=3, rows=40, seed=0, regression=False):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(6, 3))

    def part(n):
        x = rng.normal(size=(lanes, n, 6)).astype(np.float32)
        y = x @ truth + 0.5 * rng.normal(size=(lanes, n, 3))
        return x, y[..., 0].astype(np.float32) if regression else y.argmax(-1).astype(np.int32)

    train, validation, test = part(rows), part(20), part(30)
    return training.Lanes(*train, *validation, *test)


PLAIN = Regularizers()


def fit(data, regularizers=PLAIN, outputs=3, settings=SETTINGS, **rest):
    def make_model(rngs):
        return models.MLP((6, 16, outputs), dropout_rate=regularizers.dropout, rngs=rngs)

    return training.fit_lanes(make_model, data, regularizers, settings, **rest)


@pytest.mark.core
@pytest.mark.parametrize("name", ["none", "cocktail"])
def test_a_lane_does_not_depend_on_the_lanes_beside_it(name):
    data, regularizers = make_lanes(), RECIPES[name].regularizers()
    together = fit(data, regularizers)
    alone = fit(training.Lanes(*(a[:1] for a in data)), regularizers)
    chex.assert_trees_all_close(together.test_outputs[:1], alone.test_outputs, atol=1e-4)
    chex.assert_trees_all_close(
        together.curves["test_nll"][:1], alone.curves["test_nll"], atol=1e-4
    )


def test_lanes_of_equal_data_differ_by_their_seeds():
    data = training.Lanes(*(np.repeat(a[:1], 2, axis=0) for a in make_lanes()))
    outputs = fit(data).test_outputs
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_the_same_call_twice_gives_the_same_numbers():
    data, regularizers = make_lanes(), Regularizers(dropout=0.5)
    first, second = fit(data, regularizers), fit(data, regularizers)
    chex.assert_trees_all_equal(first.test_outputs, second.test_outputs)


def test_the_test_rows_influence_nothing():
    data = make_lanes()
    other = data._replace(test_x=data.test_x * 100, test_y=(data.test_y + 1) % 3)
    cocktail = RECIPES["cocktail"].regularizers()
    first, second = fit(data, cocktail), fit(other, cocktail)
    chex.assert_trees_all_equal(first.params, second.params)
    chex.assert_trees_all_equal(first.best_epoch, second.best_epoch)


def test_validation_rows_influence_early_stopping_alone():
    data = make_lanes()
    other = data._replace(validation_y=(data.validation_y + 1) % 3)
    chex.assert_trees_all_equal(fit(data).params, fit(other).params)
    early = Regularizers(early_stop=True)
    first, second = fit(data, early), fit(other, early)
    assert (first.best_epoch != second.best_epoch).any()


def test_early_stopping_keeps_the_weights_of_the_best_epoch():
    settings = training.Settings(epochs=30, batch_size=8, learning_rate=0.05)
    fitted = fit(make_lanes(), Regularizers(early_stop=True), settings=settings)
    nll = fitted.curves["validation_nll"]
    chex.assert_trees_all_equal(fitted.best_epoch, nll.argmin(axis=1).astype(np.int32) + 1)
    assert (fitted.best_epoch < 30).any()
    for lane, data in enumerate(make_lanes().validation_y):
        outputs = jnp.asarray(fitted.validation_outputs[lane])
        kept = training.negative_log_likelihood(outputs, jnp.asarray(data))
        assert float(kept) == pytest.approx(float(nll[lane].min()), rel=1e-5)
    assert (fit(make_lanes()).best_epoch == SETTINGS.epochs).all()


def test_a_penalty_leaves_exact_zeros():
    fitted = fit(make_lanes(), Regularizers(penalty=L1(0.1)))
    zeros = np.mean([np.mean(k == 0) for k in training.kernel_leaves(fitted.params)])
    assert 0.1 < zeros < 1
    assert all((k != 0).all() for k in training.kernel_leaves(fit(make_lanes()).params))


def test_every_recipe_changes_the_fit():
    data = make_lanes(regression=False)
    plain = fit(data).train_outputs
    for recipe in RECIPES.values():
        if recipe.name not in ("none", "early_stop"):  # which may end at the last epoch
            assert np.abs(fit(data, recipe.regularizers()).train_outputs - plain).max() > 1e-4


def test_a_diverged_fit_reports_nan_and_no_score():
    settings = training.Settings(epochs=2, batch_size=16, learning_rate=1e30)
    fitted = fit(make_lanes(), settings=settings)
    assert np.isnan(fitted.curves["test_score"][:, -1]).all()


def test_regression_explains_the_variance():
    settings = training.Settings(epochs=60, batch_size=16, learning_rate=0.02)
    fitted = fit(make_lanes(regression=True, rows=200), outputs=1, settings=settings)
    assert (fitted.curves["test_score"][:, -1] > 0.7).all()


@pytest.mark.parametrize("epochs", [1, 7, 20, 60])
def test_progress_counts_every_epoch(epochs):
    seen = []
    settings = training.Settings(epochs=epochs, batch_size=64, learning_rate=0.01)
    fitted = fit(make_lanes(lanes=1), settings=settings, on_epochs=seen.append)
    assert seen[-1] == epochs
    assert seen == sorted(set(seen))
    assert fitted.curves["train_nll"].shape == (1, epochs)


def test_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 4, 50)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    accuracy = (logits.argmax(-1) == labels).mean()
    assert float(training.score(jnp.array(logits), jnp.array(labels))) == pytest.approx(accuracy)
    nll = training.negative_log_likelihood(jnp.array(logits), jnp.array(labels))
    assert float(nll) == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    y, f = rng.normal(size=(2, 50)).astype(np.float32)
    r2 = training.score(jnp.array(f)[:, None], jnp.array(y))
    assert float(r2) == pytest.approx(r2_score(y, f), rel=1e-5)
    gaussian = training.negative_log_likelihood(jnp.array(f)[:, None], jnp.array(y), 2.0)
    expected = np.mean(0.5 * (y - f) ** 2 / 2.0 + 0.5 * np.log(2 * np.pi * 2.0))
    assert float(gaussian) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 0.1), "epochs: got 0"),
        ((1, 0, 0.1), "batch_size: got 0"),
        ((1, 1.5, 0.1), "batch_size: got 1.5"),
        ((1, 1, 0.0), "learning_rate: got 0.0"),
        ((1, 1, float("inf")), "learning_rate: got inf"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        training.Settings(*arguments)


@pytest.mark.parametrize(
    ("name", "strength", "message"),
    [
        ("dropout", 1.0, r"strength of dropout: got 1.0; accepted: a number in \[0, 1\)"),
        ("l1_prox", -1.0, "strength of l1_prox: got -1.0"),
        ("clip", 0.0, "strength of clip: got 0.0"),
        ("early_stop", 0.5, "strength of early_stop: got 0.5; accepted: nothing"),
    ],
)
def test_bad_strengths_of_recipes_are_named(name, strength, message):
    with pytest.raises(ValueError, match=message):
        RECIPES[name].regularizers(strength)


def test_a_model_of_the_users_own_can_be_trained():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.out = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x, *, train=False, key=None):
            return self.out(x)

    fitted = training.fit_lanes(Own, make_lanes(), Regularizers(clip=1.0), SETTINGS)
    assert fitted.test_outputs.shape == (3, 30, 3)


def test_a_model_with_variables_that_are_no_parameters_is_refused():
    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.bn = nnx.BatchNorm(6, rngs=rngs)
            self.out = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x, *, train=False, key=None):
            return self.out(self.bn(x))

    with pytest.raises(ValueError, match="make_model: got a model with the variable bn/mean"):
        training.fit_lanes(Normalized, make_lanes(), PLAIN, SETTINGS)
