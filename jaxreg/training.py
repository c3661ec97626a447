"""Training a model under several seeds at once: each seed is a lane of one compiled program."""

import dataclasses
import enum
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxreg import _check
from jaxreg import where as _where
from jaxreg.losses import smoothed_cross_entropy
from jaxreg.recipes import Regularizers

PyTree = Any


class Lanes(NamedTuple):
    """Data of every lane, the lane axis first; NumPy or JAX arrays.

    Targets are int32 class indices, or float32 values for regression.
    """

    train_x: Any
    train_y: Any
    validation_x: Any
    validation_y: Any
    test_x: Any
    test_y: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how fast to train.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows a step; the rows left over at an epoch's end wait for the next shuffle.
        learning_rate: Adam's peak rate; it falls to 0 on a cosine.
    """

    epochs: int
    batch_size: int
    learning_rate: float

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check.whole_number(name, getattr(self, name), at_least=1)
        _check.positive_finite("learning_rate", self.learning_rate)


@dataclasses.dataclass(frozen=True)
class LaneFit:
    """Outcome of `fit_lanes`; arrays with the lane axis first.

    Attributes:
        params: the trained parameters; with early stopping, those of the best epoch.
        best_epoch: 1-based epoch that the parameters are from, shape (lanes,); 0 where early
            stopping found none of finite loss, and the parameters are the initial ones.
        train_outputs, validation_outputs, test_outputs: the model's outputs, (lanes, rows, k).
        curves: for each of train, validation and test, the score and the negative
            log-likelihood after each epoch: name -> (lanes, epochs).
        compile_seconds, run_seconds: for all lanes together.
    """

    params: PyTree
    best_epoch: np.ndarray
    train_outputs: np.ndarray
    validation_outputs: np.ndarray
    test_outputs: np.ndarray
    curves: dict[str, np.ndarray]
    compile_seconds: float
    run_seconds: float


def score(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    r"""Accuracy for integer targets; $R^2 = 1 - \sum (y - f)^2 / \sum (y - \bar y)^2$ for others.

    Args:
        outputs: logits (rows, classes), or predictions (rows, 1).
        targets: (rows,).

    >>> float(score(jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([1, 1])))
    0.5
    >>> float(score(jnp.array([[1.0], [3.0]]), jnp.array([1.0, 3.0])))
    1.0
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        right = jnp.argmax(outputs, axis=-1).astype(targets.dtype) == targets
        # A model that diverged predicts nothing; argmax would call its NaNs class 0.
        finite = jnp.all(jnp.isfinite(outputs))
        return jnp.where(finite, jnp.mean(right.astype(jnp.float32)), jnp.nan)
    error = jnp.sum(jnp.square(targets - outputs[:, 0]))
    return 1 - error / jnp.sum(jnp.square(targets - jnp.mean(targets)))


def mean_squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of (target - prediction)^2 for predictions (rows, 1) and targets (rows,)."""
    return jnp.mean(jnp.square(targets - outputs[:, 0]))


def negative_log_likelihood(
    outputs: jax.Array, targets: jax.Array, variance: jax.Array | float = 1.0
) -> jax.Array:
    """Mean negative log-likelihood in nats: categorical for integer targets, Gaussian for others.

    >>> round(float(negative_log_likelihood(jnp.zeros((1, 2)), jnp.array([0]))), 4)
    0.6931
    """
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return jnp.mean(smoothed_cross_entropy(outputs, targets, 0.0))
    error = mean_squared_error(outputs, targets)
    return 0.5 * (error / variance + jnp.log(2 * jnp.pi * variance))


def fit_lanes(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    data: Lanes,
    regularizers: Regularizers,
    settings: Settings,
    *,
    on_epochs: Callable[[int], None] = lambda done: None,
) -> LaneFit:
    """Trains one model a lane with Adam; lane i has seed i.

    Lanes share one compiled program (`jax.vmap`) and differ in their data, initial weights, batch
    order and dropout masks, each of which is a function of the lane's seed, the epoch and the
    step. The test rows are only looked at, after each epoch, to report on.

    Args:
        make_model: builds the model, with the weights of a ``nnx.Rngs``. It is called as
            ``model(x, train=True, key=key)`` on batches in training, with a key of the step, and
            as ``model(x)`` on all rows of a part elsewhere; its dropout rate is its own affair.
            Only its ``nnx.Param`` variables are kept from one step to the next, so it may have no
            others, such as batch statistics or random streams.
        data: rows of every lane, standardized.
        regularizers: what to regularize.
        settings: epochs, batch size, learning rate.
        on_epochs: called with the number of epochs that have ended, now and then.

    Returns:
        The fit of every lane.

    Raises:
        ValueError: where the model has variables that are no ``nnx.Param``, and as
            `jaxreg.regularize` does.
    """
    lanes, rows = data.train_x.shape[:2]
    program = _LaneProgram.of(make_model, regularizers, settings, rows)
    # A call runs a block of epochs, so that progress shows and Ctrl-C is heard in between.
    block = next(n for n in range(max(1, settings.epochs // 20), 0, -1) if settings.epochs % n == 0)

    started = time.perf_counter()
    seeds = jnp.arange(lanes)
    data = Lanes(*map(jnp.asarray, data))
    carry = jax.block_until_ready(jax.jit(jax.vmap(program.init))(seeds))
    epochs = jnp.arange(block)
    run = jax.jit(jax.vmap(program.run_epochs, in_axes=(0, None, 0, 0)), donate_argnums=0)
    run = run.lower(carry, epochs, seeds, data).compile()
    predict = jax.jit(jax.vmap(program.predict)).lower(carry.params, data).compile()
    compile_seconds = time.perf_counter() - started

    started = time.perf_counter()
    reports = []
    for first in range(0, settings.epochs, block):
        carry, report = run(carry, first + epochs, seeds, data)
        reports.append(jax.device_get(report))
        on_epochs(first + block)
    outputs = jax.device_get(predict(carry.best_params, data))
    run_seconds = time.perf_counter() - started

    best_epoch, params = jax.device_get((carry.best_epoch, carry.best_params))
    train, validation, test = outputs
    return LaneFit(
        params=params,
        best_epoch=best_epoch,
        train_outputs=train,
        validation_outputs=validation,
        test_outputs=test,
        curves={name: np.concatenate([r[name] for r in reports], axis=1) for name in reports[0]},
        compile_seconds=compile_seconds,
        run_seconds=run_seconds,
    )


class _Carry(NamedTuple):
    """What a lane takes from one epoch to the next."""

    params: PyTree
    opt_state: PyTree
    best_params: PyTree
    best_nll: jax.Array
    best_epoch: jax.Array


@dataclasses.dataclass(frozen=True)
class _LaneProgram:
    """The pure functions of one lane, for `jax.vmap` to map over lanes."""

    make_model: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    optimizer: optax.GradientTransformation
    regularizers: Regularizers
    rows: int
    batch_size: int

    @classmethod
    def of(
        cls,
        make_model: Callable[[nnx.Rngs], nnx.Module],
        regularizers: Regularizers,
        settings: Settings,
        rows: int,
    ) -> "_LaneProgram":
        batch_size = min(settings.batch_size, rows)
        steps = settings.epochs * (rows // batch_size)
        schedule = optax.cosine_decay_schedule(settings.learning_rate, steps)
        optimizer = regularizers.optimizer(optax.scale_by_adam(), schedule, steps)
        model = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
        graphdef, _, others = nnx.split(model, nnx.Param, ...)
        if paths := _where.paths(others):
            given = f"a model with the variable {paths[0]}, which is no nnx.Param"
            accepted = "a model with no others: dropout draws from the key it is called with"
            raise _check.ArgumentError("make_model", given, accepted)
        return cls(make_model, graphdef, optimizer, regularizers, rows, batch_size)

    def apply(self, params: PyTree, x: jax.Array, **options: Any) -> jax.Array:
        return nnx.merge(self.graphdef, params)(x, **options)

    def init(self, seed: jax.Array) -> _Carry:
        key = _key(seed, _Stream.WEIGHTS)
        params = nnx.state(self.make_model(nnx.Rngs(params=key)), nnx.Param)
        nothing = jnp.array(jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
        return _Carry(params, self.optimizer.init(params), params, *nothing)

    def loss(self, params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        outputs = self.apply(params, x, train=True, key=key)
        if jnp.issubdtype(y.dtype, jnp.integer):
            return jnp.mean(smoothed_cross_entropy(outputs, y, self.regularizers.smoothing))
        return mean_squared_error(outputs, y) / 2

    def run_epochs(self, carry: _Carry, epochs: jax.Array, seed: jax.Array, lane: Lanes) -> Any:
        return jax.lax.scan(lambda c, epoch: self.run_epoch(c, epoch, seed, lane), carry, epochs)

    def run_epoch(self, carry: _Carry, epoch: jax.Array, seed: jax.Array, lane: Lanes) -> Any:
        steps = self.rows // self.batch_size
        order = jax.random.permutation(_key(seed, _Stream.ORDER, epoch), self.rows)
        batches = order[: steps * self.batch_size].reshape(steps, self.batch_size)

        def step(state: tuple[PyTree, PyTree], inputs: Any) -> Any:
            (params, opt_state), (index, batch) = state, inputs
            key = _key(seed, _Stream.NOISE, index)
            grads = jax.grad(self.loss)(params, lane.train_x[batch], lane.train_y[batch], key)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = jax.lax.scan(
            step, (carry.params, carry.opt_state), (epoch * steps + jnp.arange(steps), batches)
        )
        report = self.report(params, lane)
        nll = report["validation_nll"]
        better = (nll < carry.best_nll) | (not self.regularizers.early_stop)
        best = (params, nll, epoch + 1)
        kept = (carry.best_params, carry.best_nll, carry.best_epoch)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), best, kept)
        return _Carry(params, opt_state, *best), report

    def report(self, params: PyTree, lane: Lanes) -> dict[str, jax.Array]:
        train, validation, test = self.predict(params, lane)
        variance = residual_variance(validation, lane.validation_y)
        parts = {
            "train": (train, lane.train_y),
            "validation": (validation, lane.validation_y),
            "test": (test, lane.test_y),
        }
        scores = {f"{name}_score": score(*part) for name, part in parts.items()}
        return scores | {
            f"{name}_nll": negative_log_likelihood(*part, variance) for name, part in parts.items()
        }

    def predict(self, params: PyTree, lane: Lanes) -> tuple[jax.Array, jax.Array, jax.Array]:
        train, validation, test = lane.train_x, lane.validation_x, lane.test_x
        return self.apply(params, train), self.apply(params, validation), self.apply(params, test)


class _Stream(enum.IntEnum):
    """What a key is for; each use of randomness has its own."""

    WEIGHTS = 0
    ORDER = 1
    NOISE = 2


def _key(seed: jax.Array, stream: _Stream, index: jax.Array | int = 0) -> jax.Array:
    """The key at an address: a seed, a stream, and the epoch or step within it."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), index)


def kernel_leaves(params: PyTree) -> list[np.ndarray]:
    """The leaves that penalties and decay are for by default, in the order of the tree."""
    mask = jax.tree.leaves(_where.kernels.mask(params))
    return [
        np.asarray(p)
        for p, is_kernel in zip(jax.tree.leaves(params), mask, strict=True)
        if is_kernel
    ]


def residual_variance(outputs: jax.Array, targets: jax.Array) -> jax.Array | float:
    """The residual variance of a regression on the rows given; 1 for classes, which need none."""
    if jnp.issubdtype(targets.dtype, jnp.integer):
        return 1.0
    return jnp.maximum(mean_squared_error(outputs, targets), jnp.finfo(outputs.dtype).tiny)
