"""What does sparse training cost in a step, and what does a compressed model save?

The step of proximal optimizers, dual averaging and pruning beside optax.adam on the same
parameters; and the time of a network's forward pass once its zero units are removed.

    python -m bench.sparse_training [--quick] [--out bench/results]
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxreg
from bench import timing
from bench.compare import STEP_COLUMNS, Step, blocks, copy, optimizer_step, step_rows

RATE = 1e-3
SPARSITIES = (0.0, 0.5, 0.8, 0.9)


def main() -> None:
    """Runs the benchmark, prints the tables and writes them down."""
    arguments = timing.parser("What does sparse training cost?").parse_args()
    platform = jax.devices()[0].platform
    width, rounds = (64, 3) if arguments.quick else (896, 7)
    tables = [optimizer_table(width, rounds), compression_table(arguments.quick)]
    title = "What sparse training costs, and what compression saves"
    timing.report(f"sparse_training-{platform}", title, tables, arguments)


# --- One optimizer step --------------------------------------------------------------------------


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The contenders; penalties and pruning are for the kernels."""
    l1, group = jaxreg.L1(1e-4), jaxreg.GroupLasso(1e-4)
    return {
        "optax.adam": optax.adam(RATE),
        "prox_adam, L1": jaxreg.prox_adam(RATE, l1),
        "prox_adam, MCP": jaxreg.prox_adam(RATE, jaxreg.MCP(1e-4)),
        "prox_adam, GroupLasso": jaxreg.prox_adam(RATE, group),
        "Adam in blocks, GroupLasso": jaxreg.proximal(
            optax.scale_by_adam(), RATE, group, metric="block"
        ),
        "prox_adam, sparsity_target of L1": jaxreg.prox_adam(RATE, jaxreg.sparsity_target(l1, 0.9)),
        "prox_sgd with momentum, L1": jaxreg.prox_sgd(RATE, l1, 0.9),
        "prox_sgd with momentum, GroupLasso": jaxreg.prox_sgd(RATE, group, 0.9),
        "rmda, L1": jaxreg.rmda(RATE, l1),
        "ramda, L1": jaxreg.ramda(RATE, l1),
        "adam, magnitude_pruning every 100": optax.chain(
            optax.adam(RATE), jaxreg.magnitude_pruning(0.9, every=100)
        ),
        "adam, n_m_pruning(2, 4) every 100": optax.chain(
            optax.adam(RATE), jaxreg.n_m_pruning(2, 4, every=100)
        ),
    }


def optimizer_table(width: int, rounds: int) -> timing.Table:
    """Time and memory traffic of update and apply_updates, gradients given, buffers donated."""
    params = blocks(width)
    grads = jax.tree.map(lambda p: 1e-3 * jax.random.normal(jax.random.key(1), p.shape), params)
    entries = sum(leaf.size for leaf in jax.tree.leaves(params))
    rows: list[tuple[timing.Cell, ...]] = []
    contenders = optimizers()
    # Two at a time, since all states together would not fit: each beside optax.adam.
    for label, tx in contenders.items():
        pair = {"optax.adam": contenders["optax.adam"], label: tx}
        steps = {
            name: Step(optimizer_step(one), (copy(params), one.init(params)), (grads,))
            for name, one in pair.items()
        }
        times = timing.interleaved(steps, rounds)
        rows.append(step_rows({label: steps[label]}, times, entries)[0])
    return timing.Table(
        "optimizer",
        f"One optimizer step: {entries:,} float32 parameters",
        "`update` and `apply_updates`, jitted with donated buffers, gradients given; each is "
        "timed beside optax.adam, in turns, and ratio is to it. Bytes are XLA's own count of what "
        "is read and written, in which a loop counts once; temp is what it allocates besides. The "
        "prox of a group under Adam's own metric is a root: two sums, and two more for each of one "
        "to three Newton steps, each a pass on a CPU.",
        ("optimizer", *STEP_COLUMNS),
        rows,
    )


# --- Compression ---------------------------------------------------------------------------------


class CNN(nnx.Module):
    """Three convolutions with batch normalization, and a dense head."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        sizes = (3, width, 2 * width, 4 * width)
        pairs = list(itertools.pairwise(sizes))
        self.convs = _module_list(nnx.Conv(n, m, (3, 3), rngs=rngs) for n, m in pairs)
        self.norms = _module_list(
            nnx.BatchNorm(m, use_running_average=True, rngs=rngs) for _, m in pairs
        )
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


class MLP(nnx.Module):
    """Dense layers with ReLU between them."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        sizes = (784, width, width, 10)
        pairs = itertools.pairwise(sizes)
        self.layers = _module_list(nnx.Linear(n, m, rngs=rngs) for n, m in pairs)

    def __call__(self, x: jax.Array) -> jax.Array:
        *hidden, last = self.layers
        for layer in hidden:
            x = nnx.relu(layer(x))
        return last(x)


def _module_list(layers: Any) -> Any:
    # Before flax 0.12 modules in a plain list are tracked; since then in an nnx.List.
    return getattr(nnx, "List", list)(list(layers))


def compression_table(quick: bool) -> timing.Table:
    """The forward pass of networks whose units are zero at random, before and after."""
    width, batch = (8, 4) if quick else (64, 64)
    networks: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...]]] = {
        f"CNN, {width} to {4 * width} channels": (
            lambda rngs: CNN(width, rngs),
            (batch, 32, 32, 3),
        ),
        f"MLP, {16 * width} units": (lambda rngs: MLP(16 * width, rngs), (batch, 784)),
    }
    rows = []
    for name, (make, shape) in networks.items():
        x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
        for sparsity in SPARSITIES:
            model = make(nnx.Rngs(0))
            zero_units(model, sparsity)
            found = jaxreg.compress(model, x, rounds=3 if quick else 20)
            (p0, p1), (f0, f1), (s0, s1) = found.parameters, found.flops, found.seconds
            shares = 100 * p1 / p0, 100 * f1 / f0
            rows.append(
                (name, 100 * sparsity, *shares, 1e3 * s0, 1e3 * s1, s0 / s1, found.difference)
            )
    return timing.Table(
        "compression",
        "The forward pass of a compressed network",
        f"Zero units: in each hidden layer, at random. Batch of {batch}; parameters and FLOPs (by "
        "XLA's count) of the compressed network in percent of the original's. Difference: the "
        "largest of an output, over the largest output.",
        (
            *("network", "zero units %", "parameters %", "FLOPs %"),
            *("ms before", "ms after", "speed-up", "difference"),
        ),
        rows,
    )


def zero_units(model: Any, share: float) -> None:
    """Zeros the kernels' columns of that share of the hidden units."""
    rng = np.random.default_rng(0)
    for layer in list(getattr(model, "convs", None) or list(model.layers)[:-1]):
        units = layer.kernel[...].shape[-1]
        gone = rng.permutation(units)[: round(share * units)]
        layer.kernel[...] = layer.kernel[...].at[..., gone].set(0)


if __name__ == "__main__":
    main()
