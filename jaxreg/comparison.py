"""The comparison of recipes: trains each, measures each, and writes down what came out."""

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxreg
from jaxreg import _check, models, training
from jaxreg.data import Dataset, Split
from jaxreg.recipes import RECIPES, Recipe

SCHEMA = "jaxreg.compare/1"
CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one recipe gave.

    Attributes:
        record: its entry in ``results.json``.
        weights: arrays of the first seed's model, for plots: every kernel entry (``kernels``),
            the first layer's kernel as (inputs, units), and the ``input_shape``.
    """

    record: dict[str, Any]
    weights: dict[str, np.ndarray]


def choose(
    names: Sequence[str] | None, strengths: dict[str, float], task: str
) -> list[tuple[Recipe, float | None]]:
    """The recipes asked for, each with its strength (None for its default).

    Without names, every recipe that the task allows.

    Raises:
        ValueError: where a name is unknown, repeated or not for this task, or a strength is out
            of range or for a recipe that is not run.

    >>> [(recipe.name, strength) for recipe, strength in
    ...  choose(["none", "dropout"], {"dropout": 0.2}, "classification")]
    [('none', None), ('dropout', 0.2)]
    """
    fits = [
        r.name for r in RECIPES.values() if task == "classification" or not r.classification_only
    ]
    chosen = list(names) if names is not None else fits
    for name in chosen:
        _check.choice("--recipes", name, RECIPES)
        if name not in fits:
            raise _check.ArgumentError(
                "--recipes", f"{name!r}, which is for classification", ", ".join(fits)
            )
    if len(set(chosen)) < len(chosen) or not chosen:
        raise _check.ArgumentError("--recipes", " ".join(chosen) or "none at all", "each name once")
    for name, strength in strengths.items():
        _check.choice("--strength", name, chosen)
        RECIPES[name].regularizers(strength)
    return [(RECIPES[name], strengths.get(name)) for name in chosen]


def run_recipe(
    recipe: Recipe,
    strength: float | None,
    dataset: Dataset,
    split: Split,
    model: models.ModelName,
    settings: training.Settings,
    on_epochs: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Trains one recipe on every lane of a split and measures it."""
    regularizers = recipe.regularizers(strength)
    outputs = len(dataset.classes) or 1

    def make_model(rngs: nnx.Rngs) -> nnx.Module:
        return models.build(model, dataset.x.shape[1:], outputs, regularizers.dropout, rngs)

    lanes = training.Lanes(*(getattr(split, name) for name in training.Lanes._fields))
    fit = training.fit_lanes(make_model, lanes, regularizers, settings, on_epochs=on_epochs)
    measured = [_measure(lane, fit, split) for lane in range(len(fit.best_epoch))]
    record = {
        "name": recipe.name,
        "description": recipe.description,
        "settings": regularizers.describe(),
        "seeds": [{"seed": seed, **figures} for seed, figures in enumerate(measured)],
        "curves": {
            "epoch": list(range(1, settings.epochs + 1)),
            **{name: _plain(values) for name, values in fit.curves.items()},
        },
        "compile_seconds": round(fit.compile_seconds, 3),
        "run_seconds": round(fit.run_seconds, 3),
    }
    return Outcome(record, _weights(fit.params, dataset.x.shape[1:]))


def document(
    dataset: Dataset,
    split: Split,
    model: models.ModelName,
    settings: dict[str, Any],
    records: Sequence[dict[str, Any]],
    status: str,
) -> dict[str, Any]:
    """The content of ``results.json``; its schema is ``jaxreg/results.schema.json``."""
    outputs = len(dataset.classes) or 1
    shape = dataset.x.shape[1:]
    built = nnx.eval_shape(lambda: models.build(model, shape, outputs, 0.0, nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(built, nnx.Param))
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "schema": SCHEMA,
        "status": status,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "data": {
            "name": dataset.name,
            "task": dataset.task,
            "rows": len(dataset.x),
            "features": list(shape),
            "classes": list(dataset.classes),
            "train_rows": split.train_x.shape[1],
            "validation_rows": split.validation_x.shape[1],
            "test_rows": split.test_x.shape[1],
        },
        "model": {
            "name": model,
            "description": str(built.describe()) if hasattr(built, "describe") else model,
            "parameters": int(sum(leaf.size for leaf in leaves)),
        },
        "versions": {
            "jaxreg": jaxreg.__version__,
            **{name: importlib.metadata.version(name) for name in packages},
            "python": platform.python_version(),
        },
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
        },
        "recipes": list(records),
    }


def calibration_error(outputs: np.ndarray, targets: np.ndarray, variance: float = 1.0) -> float:
    r"""How far stated confidence is from what happens, in [0, 1].

    For classes (integer targets): the expected calibration error $\sum_b \frac{n_b}{n} |acc_b -
    conf_b|$ over 15 equal bins of the largest probability. For a regression with Gaussian errors
    of the given variance: the mean over 19 central intervals (5% to 95%) of |share of targets
    inside - the interval's probability|.

    Sources: C. Guo et al., *On calibration of modern neural networks*, ICML 2017; V. Kuleshov et
    al., *Accurate uncertainties for deep learning using calibrated regression*, ICML 2018.

    >>> certain = np.array([[9.0, -9.0], [9.0, -9.0]])
    >>> round(calibration_error(certain, np.array([0, 1])), 3)
    0.5
    """
    if not np.isfinite(outputs).all():
        return float("nan")
    if np.issubdtype(targets.dtype, np.integer):
        probabilities = np.asarray(jax.nn.softmax(jnp.asarray(outputs), axis=-1), np.float64)
        confidence = probabilities.max(axis=-1)
        right = probabilities.argmax(axis=-1) == targets
        bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
        surplus = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
        return float(np.abs(surplus).sum() / len(targets))
    levels = np.arange(1, 20) / 20
    half_widths = np.asarray(jax.scipy.stats.norm.ppf(jnp.asarray((1 + levels) / 2)), np.float64)
    deviations = np.abs(targets - outputs[:, 0]) / np.sqrt(variance)
    inside = (deviations[:, None] <= half_widths).mean(axis=0)
    return float(np.abs(inside - levels).mean())


def _measure(lane: int, fit: training.LaneFit, split: Split) -> dict[str, Any]:
    """The figures of one seed; None where training diverged."""
    train, validation, test = (
        (jnp.asarray(outputs[lane]), jnp.asarray(targets[lane]))
        for outputs, targets in (
            (fit.train_outputs, split.train_y),
            (fit.validation_outputs, split.validation_y),
            (fit.test_outputs, split.test_y),
        )
    )
    variance = training.residual_variance(*validation)
    train_score, test_score = training.score(*train), training.score(*test)
    kernels = training.kernel_leaves(jax.tree.map(lambda p: p[lane], fit.params))
    zeros = sum(np.count_nonzero(k == 0) for k in kernels) / sum(k.size for k in kernels)
    return {
        "train_score": _plain(train_score),
        "test_score": _plain(test_score),
        "gap": _plain(train_score - test_score),
        "test_nll": _plain(training.negative_log_likelihood(*test, variance)),
        "calibration_error": _plain(
            np.asarray(
                calibration_error(fit.test_outputs[lane], split.test_y[lane], float(variance))
            )
        ),
        "zeros": zeros,
        "best_epoch": int(fit.best_epoch[lane]),
    }


def _weights(params: Any, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    kernels = training.kernel_leaves(jax.tree.map(lambda p: p[0], params))
    first = kernels[0]
    return {
        "kernels": np.concatenate([k.ravel() for k in kernels]),
        "first_layer": first.reshape(-1, first.shape[-1]),
        "input_shape": np.asarray(input_shape),
    }


def _plain(values: Any) -> Any:
    """Numbers and nested lists for JSON, six significant digits, None for what is not finite."""
    if np.ndim(values) > 0:
        return [_plain(v) for v in values]
    value = float(values)
    return float(f"{value:.6g}") if np.isfinite(value) else None
