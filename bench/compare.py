"""What do seeds as lanes of one program save, and what do the regularizers cost a step?

1. Seeds: `jaxreg.training.fit_lanes` trains L seeds in one compiled program. Against it stand two
   loops over seeds in Python: one that compiles once, and the usual one that compiles for each.
2. Steps: one optimizer step with the regularizers, against optax's own Adam, AdamW and clip;
   and a whole training step, in which dropout and label smoothing take part.

    python -m bench.compare [--quick] [--out bench/results]
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxreg
from bench import timing
from jaxreg import models, recipes, training
from jaxreg.mnist1d import make_mnist1d

PyTree = Any
LEARNING_RATE = 1e-3
ROWS = {"train": 3000, "validation": 1000, "test": 1000}


class Sizes(NamedTuple):
    """How much a run measures."""

    lanes: tuple[int, ...]
    fits: int  # repetitions of every fit
    epochs: int
    rounds: int  # turns of every step
    widths: tuple[int, ...]  # of the parameter trees; each has about 64 * width^2 entries


FULL = Sizes(lanes=(1, 2, 5, 10), fits=5, epochs=100, rounds=41, widths=(128, 400))
QUICK = Sizes(lanes=(1, 2), fits=1, epochs=4, rounds=5, widths=(32,))


def main() -> None:
    """Runs both benchmarks, prints their tables and writes them down."""
    arguments = timing.parser("What do lanes save, and what do regularizers cost?").parse_args()
    sizes = QUICK if arguments.quick else FULL
    tables = [seeds_table(sizes)]
    mlp = nnx.state(build_mlp(nnx.Rngs(0)), nnx.Param)
    for name, params in {"mlp": mlp, **{f"w{w}": blocks(w) for w in sizes.widths}}.items():
        tables.append(optimizer_table(name, params, sizes.rounds))
    tables.append(training_table(sizes.rounds))
    title = "What seeds as lanes save, and what regularizers cost"
    timing.report(f"compare-{jax.devices()[0].platform}", title, tables, arguments)


def build_mlp(rngs: nnx.Rngs, dropout_rate: float = 0.0) -> nnx.Module:
    """The mlp of `jaxreg compare` for MNIST-1D."""
    return models.build("mlp", (40, 1), 10, dropout_rate, rngs)


# --- Seeds as lanes ------------------------------------------------------------------------------


def seeds_table(sizes: Sizes) -> timing.Table:
    """Seconds to train L seeds: as lanes, and one after another."""
    fit_seeds(1, epochs=1)  # what JAX loads and caches at a first use is nobody's cost
    costs: dict[int, list[tuple[float, ...]]] = {lanes: [] for lanes in sizes.lanes}
    for _ in range(sizes.fits):
        singles = [fit_seeds(1, sizes.epochs) for _ in range(max(sizes.lanes))]
        for lanes in sizes.lanes:
            costs[lanes].append(seed_costs(fit_seeds(lanes, sizes.epochs), singles[:lanes]))
    return timing.Table(
        "seeds",
        "Seconds to train L seeds of an MLP on MNIST-1D",
        f"{sizes.epochs} epochs of {ROWS['train']} rows with clip, weight decay, L1, dropout and "
        f"label smoothing; medians of {sizes.fits}. Lanes: one program for all seeds. Loop: one "
        "seed after the other, compiled once, or anew for each seed. The ratios are of totals, to "
        "lanes.",
        (
            "L",
            "lanes: compile",
            "run",
            "total",
            "loop: run",
            "compiled once",
            "compiled anew",
            "once / lanes",
            "anew / lanes",
        ),
        [(lanes, *np.median(fits, axis=0).tolist()) for lanes, fits in costs.items()],
    )


def seed_costs(fit: training.LaneFit, singles: Sequence[training.LaneFit]) -> tuple[float, ...]:
    """What a row of the table shows, from a fit with lanes and as many fits of one seed.

    A loop that compiles once costs the first fit's compilation and every fit's run; one that
    compiles for each seed costs all of both.
    """
    total = fit.compile_seconds + fit.run_seconds
    running = sum(single.run_seconds for single in singles)
    once = singles[0].compile_seconds + running
    anew = sum(single.compile_seconds for single in singles) + running
    ratios = once / total, anew / total
    return fit.compile_seconds, fit.run_seconds, total, running, once, anew, *ratios


def fit_seeds(lanes: int, epochs: int) -> training.LaneFit:
    """Trains that many seeds of the MLP with all the regularizers, every seed on the same data."""
    x, y = make_mnist1d(sum(ROWS.values()))
    ends = np.cumsum(list(ROWS.values()))[:-1]
    pairs = zip(np.split(x, ends), np.split(y, ends), strict=True)
    parts = [np.broadcast_to(part, (lanes, *part.shape)) for pair in pairs for part in pair]
    settings = training.Settings(epochs, batch_size=100, learning_rate=LEARNING_RATE)
    regularizers = recipes.RECIPES["cocktail"].regularizers()
    return training.fit_lanes(
        lambda rngs: build_mlp(rngs, regularizers.dropout),
        training.Lanes(*parts),
        regularizers,
        settings,
    )


# --- One optimizer step --------------------------------------------------------------------------


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The contenders, by what they do; decay and penalties are for the same leaves in each."""
    kernels = jaxreg.where.kernels.mask
    adam, rate, decay, l1 = optax.scale_by_adam(), LEARNING_RATE, 0.01, 1e-4
    adamw = optax.adamw(rate, weight_decay=decay, mask=kernels)
    return {
        "optax.adam": optax.adam(rate),
        "optax.adamw": adamw,
        "optax clip + adamw": optax.chain(optax.clip_by_global_norm(1.0), adamw),
        "jaxreg clip": jaxreg.regularize(adam, rate, clip=1.0),
        "jaxreg clip + decay": jaxreg.regularize(adam, rate, clip=1.0, decay=decay),
        "jaxreg.prox_adam, L1": jaxreg.prox_adam(rate, jaxreg.L1(l1)),
        "jaxreg clip + l2 + decay + ElasticNet": jaxreg.regularize(
            adam, rate, clip=1.0, l2=1e-4, decay=decay, penalty=jaxreg.ElasticNet(l1, l1)
        ),
    }


def blocks(width: int, depth: int = 8) -> PyTree:
    """Parameters of a deep residual MLP: 6 leaves a block, about 8 * width^2 entries each."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * depth))

    def dense(n: int, m: int) -> dict[str, jax.Array]:
        return {"kernel": jax.random.normal(next(keys), (n, m)) / n**0.5, "bias": jnp.zeros(m)}

    def block() -> PyTree:
        norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        return {"norm": norm, "up": dense(width, 4 * width), "down": dense(4 * width, width)}

    return {f"block_{i}": block() for i in range(depth)}


def optimizer_table(name: str, params: PyTree, rounds: int) -> timing.Table:
    """Time and memory traffic of update and apply_updates, gradients given, buffers donated."""
    grads = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(1), p.shape), params)
    steps = {
        label: Step(optimizer_step(tx), (copy(params), tx.init(params)), (grads,))
        for label, tx in optimizers().items()
    }
    leaves = jax.tree.leaves(params)
    entries = sum(leaf.size for leaf in leaves)
    return timing.Table(
        f"optimizer-{name}",
        f"One optimizer step: {entries:,} float32 parameters in {len(leaves)} leaves",
        "`update` and `apply_updates`, jitted with donated buffers, gradients given. Bytes are "
        "XLA's own count of what is read and written; temp is what it allocates besides.",
        ("optimizer", *STEP_COLUMNS),
        step_rows(steps, timing.interleaved(steps, rounds), entries),
    )


def optimizer_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """The step (params, opt_state), grads -> (params, opt_state)."""

    def step(state: tuple[PyTree, PyTree], grads: PyTree) -> tuple[PyTree, PyTree]:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


# --- One whole training step ---------------------------------------------------------------------


def training_table(rounds: int, batch_size: int = 128) -> timing.Table:
    """Time of loss, gradient and update of the MLP, on one batch of MNIST-1D."""
    x, y = map(jnp.asarray, make_mnist1d(batch_size))
    none = recipes.Regularizers()
    noise = recipes.Regularizers(dropout=0.3, smoothing=0.05)
    weights = recipes.Regularizers(clip=1.0, l2=1e-4, decay=0.01, penalty=jaxreg.L1(1e-4))
    both = dataclasses.replace(weights, dropout=0.3, smoothing=0.05)
    contenders = {
        "optax.adam, no regularizer": (optax.adam(LEARNING_RATE), none),
        "optax.adam, dropout + label smoothing": (optax.adam(LEARNING_RATE), noise),
        "jaxreg clip + l2 + decay + L1": (regularized_adam(weights), weights),
        "all of them": (regularized_adam(both), both),
    }
    steps = {label: training_step(tx, on, x, y) for label, (tx, on) in contenders.items()}
    entries = sum(p.size for p in jax.tree.leaves(nnx.state(build_mlp(nnx.Rngs(0)), nnx.Param)))
    return timing.Table(
        "training",
        f"One training step of the MLP, batch of {batch_size}",
        "Loss, gradient, `update` and `apply_updates`, jitted with donated buffers.",
        ("step", *STEP_COLUMNS),
        step_rows(steps, timing.interleaved(steps, rounds), entries),
    )


def regularized_adam(chosen: recipes.Regularizers) -> optax.GradientTransformation:
    """Adam with the regularizers that are an optimizer's affair."""
    return chosen.optimizer(optax.scale_by_adam(), LEARNING_RATE, steps=1)


def training_step(
    tx: optax.GradientTransformation, chosen: recipes.Regularizers, x: jax.Array, y: jax.Array
) -> "Step":
    """The step (params, opt_state, index), x, y -> the same, the index being dropout's."""
    graphdef, params = nnx.split(build_mlp(nnx.Rngs(0), chosen.dropout))

    def loss(params: PyTree, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(x, train=True, key=key)
        if chosen.smoothing:
            return jaxreg.smoothed_cross_entropy(logits, y, chosen.smoothing).mean()
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state: tuple[PyTree, PyTree, jax.Array], x: jax.Array, y: jax.Array) -> Any:
        params, opt_state, index = state
        grads = jax.grad(loss)(params, x, y, jax.random.fold_in(jax.random.key(0), index))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, index + 1

    return Step(step, (params, tx.init(params), jnp.zeros((), jnp.int32)), (x, y))


# --- Steps of both kinds -------------------------------------------------------------------------


class Step:
    """A jitted step that is fed with its own output, as in training; its state is donated."""

    def __init__(self, function: Callable[..., Any], state: Any, constants: tuple[Any, ...]):
        self.function = jax.jit(function, donate_argnums=0)
        self.state, self.constants = state, constants

    def __call__(self) -> Any:
        self.state = self.function(self.state, *self.constants)
        return self.state

    def bytes_accessed(self) -> float | None:
        """Bytes that XLA counts as read and written; None where it doesn't say."""
        analysis = self._compiled.cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list) else analysis
        return (analysis or {}).get("bytes accessed")

    def temporary_bytes(self) -> int | None:
        """Bytes that XLA allocates besides arguments and results; None where it doesn't say."""
        return getattr(self._compiled.memory_analysis(), "temp_size_in_bytes", None)

    @cached_property
    def _compiled(self) -> jax.stages.Compiled:
        return self.function.lower(self.state, *self.constants).compile()


STEP_COLUMNS = ("ms", "IQR ms", "ratio", "bytes a parameter", "temp bytes a parameter")


def step_rows(
    steps: Mapping[str, Step], timings: Mapping[str, timing.Timing], entries: int
) -> list[tuple[timing.Cell, ...]]:
    """One row a step, in the order of STEP_COLUMNS."""
    rows = []
    for label, step in steps.items():
        t = timings[label]
        counted = step.bytes_accessed(), step.temporary_bytes()
        each = [None if total is None else total / entries for total in counted]
        rows.append((label, 1e3 * t.median, 1e3 * (t.upper - t.lower), t.ratio, *each))
    return rows


def copy(tree: PyTree) -> PyTree:
    """Arrays of one's own: donating them leaves the original alone."""
    return jax.tree.map(jnp.copy, tree)


if __name__ == "__main__":
    main()
