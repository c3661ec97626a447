"""What do the kinds of weight decay cost, and averages, and a look at the weights?

Each is added to the same Adam. One that needs no bytes but the weights, which the step reads and
writes anyway, should cost next to nothing; others what their bytes explain.

    python -m bench.decays [--quick] [--out bench/results]
"""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxreg
from bench import step, timing

Transformation = optax.GradientTransformation
EVERYTHING = jaxreg.where.everything
PLAIN = "AdamW"
FLOAT = 4  # bytes of an entry


def main() -> None:
    """Runs the benchmark, prints the tables and writes them down."""
    options = timing.parser("What do the kinds of weight decay cost?")
    arguments = options.parse_args()
    sizes = step.QUICK if arguments.quick else step.FULL
    leaves = 10 if arguments.quick else 1000
    tables = [decays_table(sizes), explain_table(leaves)]
    title = "What the kinds of weight decay cost"
    timing.report(f"decays-{jax.devices()[0].platform}", title, tables, arguments)


def adam(decay: Transformation | None, *after: Transformation) -> Transformation:
    """Adam with a decay at its place, and links behind."""
    tx = jaxreg.regularize(optax.scale_by_adam(), step.RATE, decay=decay)
    return optax.chain(tx, *after) if after else tx


def decay(**options: Any) -> Transformation:
    """Of all leaves, as in optax and torch."""
    return jaxreg.weight_decay(step.DECAY, where=EVERYTHING, **options)


# What is measured: the optimizer, and the passes over arrays as large as the parameters that it
# takes at the least. AdamW takes 7, with the decay or without.
CONTENDERS: Mapping[str, tuple[Callable[[], Transformation], int]] = {
    PLAIN: (lambda: adam(decay()), 7),
    "Adam": (lambda: adam(None), 7),
    "optax AdamW": (step.optax_adamw, 7),
    "independent": (lambda: adam(decay(rate=1.0)), 7),
    'gate="cautious"': (lambda: adam(decay(gate="cautious")), 7),
    'profile="huber"': (lambda: adam(decay(profile="huber")), 7),
    'profile="l1"': (lambda: adam(decay(profile="l1")), 7),
    'toward="init"': (lambda: adam(decay(toward="init")), 8),
    "toward=ema(0.999)": (lambda: adam(decay(toward=jaxreg.ema(0.999))), 9),
    "l2_decay": (
        lambda: jaxreg.regularize(
            optax.scale_by_adam(), step.RATE, l2=jaxreg.l2_decay(step.DECAY, where=EVERYTHING)
        ),
        7,
    ),
    "constrained_decay": (
        lambda: adam(jaxreg.constrained_decay(1.0, "dependent", where=EVERYTHING)),
        9,
    ),
    "hyperball": (lambda: adam(jaxreg.hyperball(where=jaxreg.where.rank(at_least=2))), 11),
    "AdamW, watch": (lambda: adam(decay(), jaxreg.watch(where=EVERYTHING)), 7),
    "AdamW, ema_of_params": (lambda: adam(decay(), jaxreg.ema_of_params(0.999)), 9),
    "AdamW, lookahead": (lambda: adam(decay(), jaxreg.lookahead()), 9),
}


def decays_table(sizes: step.Sizes) -> timing.Table:
    """All of them on the transformer of `bench.step`."""
    params = step.transformer(sizes, jnp.float32)
    grads, total = step.gradients(params), step.entries(params)
    steps = {
        name: step.optimizer_step(make(), params, grads) for name, (make, _) in CONTENDERS.items()
    }
    times = timing.interleaved(steps, sizes.rounds)
    rows: list[tuple[timing.Cell, ...]] = []
    for name, (_, passes) in CONTENDERS.items():
        found = times[name]
        spread = 1e3 * (found.upper - found.lower)
        least = FLOAT * passes
        counted = step.counted(steps[name], total)
        rows.append((name, 1e3 * found.median, spread, found.ratio, least, *counted))
    leaves = len(jax.tree.leaves(params))
    return timing.Table(
        "decays",
        f"One step: {total:,} float32 parameters in {leaves} leaves",
        "Gradients given, buffers donated; the ratio is to the first row. Least: the bytes a "
        "parameter without which it can't be done, 28 for AdamW. constrained_decay has the norm of "
        "the weights after the step before it decays them, which are read and written once more "
        "(8); hyperball that of the direction before, too (16). Bytes are XLA's count; on a CPU "
        "there is a loop for each array that is written: l2_decay reads the weights for both "
        "moments there, and watch reads them and the step for each of its sums. temp is what it "
        "allocates besides.",
        (
            *("optimizer", "ms", "IQR ms", "ratio", "least bytes a parameter"),
            *("bytes a parameter", "temp bytes a parameter", "fusions"),
        ),
        rows,
    )


def explain_table(leaves: int) -> timing.Table:
    """How long `jaxreg.explain` takes, for small leaves and for larger ones."""
    contenders = {
        "AdamW": step.optax_adamw(),
        "clip + AdamW": step.optax_clipped(),
        "jaxreg clip + AdamW": step.jaxreg_adamw(step.MAX_NORM),
    }
    rows: list[tuple[timing.Cell, ...]] = []
    for (name, tx), width in itertools.product(contenders.items(), (16, 64)):
        params = {f"layer{i}": {"kernel": jnp.full((width, width), 0.1)} for i in range(leaves)}
        started = time.perf_counter()
        found = jaxreg.explain(tx, params)
        seconds = time.perf_counter() - started
        kinds = sorted({f"{leaf.decay_kind}, clip {leaf.clip}" for leaf in found.leaves})
        rows.append((name, f"{width} x {width}", seconds, "; ".join(kinds)))
    return timing.Table(
        "explain",
        f"jaxreg.explain on {leaves:,} leaves",
        "Seconds, one after the other. Small leaves take what tracing takes; of larger ones "
        "each weight is tried in 150 probes or so.",
        ("optimizer", "leaves", "s", "found"),
        rows,
    )


if __name__ == "__main__":
    main()
