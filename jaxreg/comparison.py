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
from jaxreg.data import Dataset
from jaxreg.recipes import RECIPES, Recipe
from jaxreg.splits import Split

SCHEMA = "jaxreg.compare/1"
CALIBRATION_BINS = 15
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
FIGURES = (
    "train_score",
    "test_score",
    "gap",
    "test_nll",
    "calibration_error",
    "zeros",
    "rank",
    "best_epoch",
)


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
    recipes: Sequence[str] | None, strength: dict[str, float], task: str
) -> list[tuple[Recipe, float | None]]:
    """The recipes of the given names, each with its strength (None for its default).

    Without names, every recipe that the task allows.

    Raises:
        ValueError: where a name is unknown, repeated or not for this task, or a strength is out
            of range or for a recipe that is not run or has none.

    >>> [(recipe.name, strength) for recipe, strength in
    ...  choose(["none", "dropout"], {"dropout": 0.2}, "classification")]
    [('none', None), ('dropout', 0.2)]
    """
    fits = [
        r.name for r in RECIPES.values() if task == "classification" or not r.classification_only
    ]
    chosen = fits if recipes is None else list(recipes)
    for i, name in enumerate(chosen):
        _check.choice("recipes", name, RECIPES)
        if name not in fits:
            given = f"{name!r}, which is for classification"
            raise _check.ArgumentError("recipes", given, ", ".join(fits))
        if name in chosen[:i]:
            raise _check.ArgumentError("recipes", f"{name!r} twice", "each name once")
    if not chosen:
        raise _check.ArgumentError("recipes", "no name", ", ".join(fits))
    tunable = [name for name in chosen if RECIPES[name].strength is not None]
    for name, value in strength.items():
        _check.choice("strength", name, tunable or ["nothing, as no recipe here has a strength"])
        RECIPES[name].check(f"strength {name}", value)
    return [(RECIPES[name], strength.get(name)) for name in chosen]


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What all recipes of a comparison share: the data, the model and how it is trained."""

    dataset: Dataset
    split: Split
    model: models.ModelName
    settings: training.Settings

    def run(
        self,
        recipe: Recipe,
        strength: float | None,
        on_epochs: Callable[[int], None] = lambda done: None,
    ) -> Outcome:
        """Trains one recipe on every lane of the split and measures it.

        ``on_epochs`` is called with the number of epochs that have ended, now and then.
        """
        regularizers = recipe.regularizers(strength)
        lanes = training.Lanes(*(getattr(self.split, name) for name in training.Lanes._fields))
        fit = training.fit_lanes(
            lambda rngs: self._build(regularizers.dropout, rngs),
            lanes,
            regularizers,
            self.settings,
            on_epochs=on_epochs,
        )
        figures = [_figures(lane, fit, self.split) for lane in range(len(fit.best_epoch))]
        record = {
            "name": recipe.name,
            "description": recipe.description,
            "settings": regularizers.describe(),
            "target_zeros": regularizers.target_zeros,
            "seeds": [{"seed": seed, **of} for seed, of in enumerate(figures)],
            "curves": {
                "epoch": list(range(1, self.settings.epochs + 1)),
                **{name: _plain(values) for name, values in fit.curves.items()},
            },
            "compile_seconds": round(fit.compile_seconds, 3),
            "run_seconds": round(fit.run_seconds, 3),
        }
        return Outcome(record, _weights(fit.params, self.dataset.x.shape[1:]))

    def results(self, asked: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The content of ``results.json``; its schema is ``jaxreg/results.schema.json``.

        Args:
            asked: the settings that the user gave; ``recipes`` names those to run.
            outcomes: of the recipes that have run.
        """
        dataset, split = self.dataset, self.split
        model = nnx.eval_shape(lambda: self._build(0.0, nnx.Rngs(0)))
        weights = jax.tree.leaves(nnx.state(model, nnx.Param))
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        device = jax.devices()[0]
        return {
            "schema": SCHEMA,
            "status": "complete" if len(outcomes) == len(asked["recipes"]) else "interrupted",
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": asked,
            "data": {
                "name": dataset.name,
                "task": dataset.task,
                "rows": len(dataset.x),
                "features": list(dataset.x.shape[1:]),
                "classes": list(dataset.classes),
                "train_rows": split.train_x.shape[1],
                "validation_rows": split.validation_x.shape[1],
                "test_rows": split.test_x.shape[1],
            },
            "model": {
                "name": self.model,
                "description": _layers(model),
                "parameters": sum(leaf.size for leaf in weights),
            },
            "versions": {
                "jaxreg": jaxreg.__version__,
                **versions,
                "python": platform.python_version(),
            },
            "device": {
                "platform": device.platform,
                "kind": device.device_kind,
                "count": jax.device_count(),
            },
            "recipes": [outcome.record for outcome in outcomes],
        }

    def _build(self, dropout_rate: float, rngs: nnx.Rngs) -> models.MLP | models.CNN:
        outputs = len(self.dataset.classes) or 1
        return models.build(self.model, self.dataset.x.shape[1:], outputs, dropout_rate, rngs)


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


def _rank(kernel: np.ndarray) -> float:
    """The rank of a kernel, as a matrix whose columns are units, over the largest it could be."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    if not np.isfinite(matrix).all():
        return float("nan")
    return float(np.linalg.matrix_rank(matrix) / min(matrix.shape))


def _layers(model: models.MLP | models.CNN) -> str:
    """The sizes of a model's layers: ``64-128-10``, or ``conv 16, 32; dense 128-10``."""
    if isinstance(model, models.CNN):
        channels = ", ".join(str(block.out_features) for block in model.blocks)
        return f"conv {channels}; dense {model.head.in_features}-{model.head.out_features}"
    sizes = [model.layers[0].in_features, *(layer.out_features for layer in model.layers)]
    return "-".join(map(str, sizes))


def _figures(lane: int, fit: training.LaneFit, split: Split) -> dict[str, Any]:
    """The figures of one seed; all of them None where training diverged."""
    outputs = [of[lane] for of in (fit.train_outputs, fit.validation_outputs, fit.test_outputs)]
    # No epoch was kept where early stopping never saw a finite loss.
    if fit.best_epoch[lane] == 0 or not all(np.isfinite(of).all() for of in outputs):
        return dict.fromkeys(FIGURES)
    targets = [of[lane] for of in (split.train_y, split.validation_y, split.test_y)]
    train, validation, test = (
        (jnp.asarray(output), jnp.asarray(target))
        for output, target in zip(outputs, targets, strict=True)
    )
    variance = training.residual_variance(*validation)
    train_score, test_score = training.score(*train), training.score(*test)
    kernels = training.kernel_leaves(jax.tree.map(lambda p: p[lane], fit.params))
    weights = np.concatenate([kernel.ravel() for kernel in kernels])
    return {
        "train_score": _plain(train_score),
        "test_score": _plain(test_score),
        "gap": _plain(train_score - test_score),
        "test_nll": _plain(training.negative_log_likelihood(*test, variance)),
        "calibration_error": _plain(calibration_error(outputs[2], targets[2], float(variance))),
        "zeros": _plain(np.mean(weights == 0)),
        "rank": _plain(np.mean([_rank(kernel) for kernel in kernels])),
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
