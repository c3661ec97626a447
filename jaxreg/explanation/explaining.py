"""What an optimizer does to each leaf, measured by trying it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxreg import _check, where
from jaxreg.explanation.clips import Clip, Clips
from jaxreg.explanation.coupled import find_coupled
from jaxreg.explanation.decays import Decay, Decays
from jaxreg.explanation.probing import Prober, Sequences
from jaxreg.explanation.records import Explanation, LeafExplanation, describe_change


# What overflows is told as what is not finite.
@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def explain(
    tx: optax.GradientTransformation,
    params: optax.Params,
    *,
    step: int = 0,
    seed: int = 0,
    **extra_args: Any,
) -> Explanation:
    """What an optimizer does to each leaf: decay, clips, exact zeros, dtypes; measured.

    It calls ``tx.init`` once and ``tx.update`` on random gradients and weights of many sizes, and
    tells what they do by how the updates change: u = F(g + l2 p) - a (p - anchor). What does not
    predict further probes is "unknown". Names of transformations play no part. Gradients are of
    the weights' dtype. What is done to one leaf is compiled once for all leaves that are alike.

    Gradients are tried up to entries of 10^6, weights up to 1,000 times their own size (where there
    is float16 up to 1 and 30 times): a clip, a bound or another decay beyond does not show.

    A clip is "none" only where updates of each entry are seen to depend on its own gradient alone,
    and nowhere to stop following it. So optimizers that divide by norms (LAMB, Muon) are
    "unknown": a clip of what comes out of them would not show. So is a clip by the norm of all
    leaves, on each of them, beside a penalty in Adam's metric.

    The state is a fresh one, that of ``init``, with its step counters set to `step` (numbers that
    grow by 1 with each step): schedules are at that step, averages are at the start. Other numbers
    that change with each step are listed in ``unset`` where `step` is not 0. What begins only
    later, by what was seen until then, does not show, or is "unknown" where the state has an
    infinite bound for it; but clips by the norms of gradients before
    are looked for after 32 gradients too. A leaf is "frozen" where its update is zero by how it is
    computed. One that gets no update at `step` is looked at at other steps (0, powers of 2, some
    around `step`) and is "unknown" where there is none either, as for gradients that are
    accumulated over more than 64 calls. Where something acts 1,000 steps later that does not at
    `step`, as after a warm-up from 0, the notes say so. A decay of weights that are rounded anew,
    as beside penalties, shows where it is above four units of their last place; else it is
    "unknown", as it is for a decay that makes weights zero, one that differs from entry to entry,
    or one beside an L2 that is below what the rounding of gradients hides.

    In the table a leaf "bias +1" stands for itself and one more leaf, next to it, with the same
    findings. A decay that is "not linear" has no one amount: what is shown is the amount for
    weights of the present ones' size.

    Args:
        tx: any optax transformation, usually the whole optimizer.
        params: the weights; or their shapes and dtypes (of ``jax.eval_shape``), for which random
            ones are drawn.
        step: the step at which schedules are looked at, >= 0.
        seed: of the random gradients and weights.
        **extra_args: further arguments of ``tx.update``, such as ``value=``.

    Returns:
        An `Explanation`, whose ``leaves`` have one record for each leaf of `params`.

    Raises:
        ValueError: where tx is no transformation, step is negative, or params have no floating
            leaf. Errors of `tx` are passed on.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> params = {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}
    >>> decay = jaxreg.weight_decay(1e-3, rate=1.0)
    >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1), decay)
    >>> print(jaxreg.explain(tx, params))
    leaf    shape         decay            clip              exact zeros  notes
    bias    float32[3]    none             by global norm 1  none
    kernel  float32[4,3]  0.001 decoupled  by global norm 1  none
    """
    _check.transformation("tx", tx)
    step = _check.whole_number("step", step, at_least=0)
    seed = _check.whole_number("seed", seed, at_least=0)
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        accepted = "arrays, or their shapes: call explain outside of jit"
        raise _check.ArgumentError("params", "traced arrays", accepted)
    floating = [jnp.issubdtype(getattr(x, "dtype", np.int32), jnp.inexact) for x in leaves]
    if not any(floating):
        given = f"{len(leaves)} leaves, none of them floating" if leaves else "no leaves"
        raise _check.ArgumentError("params", given, "a tree with floating arrays")
    prober = Prober(tx, params, step, seed, extra_args)
    before, after, updates = _dtypes(prober)
    clips = Clips(prober).find()
    decays = Decays(prober)
    found = decays.find()
    find_coupled(decays, found, clips)
    frozen, idle, acts_at = _later(prober, decays, step)
    waits = _waits(prober, decays) if step else frozen
    raw = _raw(prober, decays)
    changed = [
        describe_change(n, before[n], after.get(n)) for n in before if before[n] != after.get(n)
    ]
    records, own_weights = [], prober.each("own")
    for i, (path, leaf) in enumerate(zip(where.paths(params), leaves, strict=True)):
        decay, clip = found[i], clips[i]
        if decay.still:
            clip = Clip("none" if frozen[i] else "unknown")
            if not frozen[i] and (step or acts_at[i] is None):
                decay = Decay()
        elif idle[i] and clip.kind == "none":
            clip = Clip("unknown")
        elif waits[i]:
            decay = Decay()
        own = [f"updates are {updates[i]}"] if updates[i] != str(leaf.dtype) else []
        own += [text for text in changed if path and f"/{path} is " in f"/{text}"]
        records.append(
            LeafExplanation(
                path=path,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                decay=decay.amount,
                decay_kind=decay.kind,
                l2=decay.l2,
                clip=clip.kind if floating[i] else "unknown",
                clip_threshold=clip.threshold,
                penalized=decay.penalized,
                penalty_threshold=decay.threshold,
                frozen=frozen[i],
                still=idle[i],
                acts_at=acts_at[i],
                raw=raw[i],
                lost=_lost(leaf.dtype, own_weights[i], decay.amount) if floating[i] else None,
                dtypes=tuple(own),
            )
        )
    return Explanation(tuple(records), step, tuple(changed), prober.unset() if step else ())


def _dtypes(prober: Prober) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The dtypes of the state at init and after an update, by path, and those of the updates."""
    updates, state = prober.dtypes
    before = [str(jnp.result_type(x)) for x in jax.tree.leaves(prober.initial)]
    return (
        dict(zip(where.paths(prober.initial), before, strict=True)),
        dict(zip(where.paths(state), jax.tree.leaves(state), strict=True)),
        prober.treedef.flatten_up_to(updates),
    )


def _later(
    prober: Prober, decays: Decays, step: int
) -> tuple[list[bool], list[bool], list[int | None]]:
    """Leaves without an update at any step, at this one only, and steps where more acts."""
    q = decays.weights(q=1.0)
    # Beside weights of zero no step is lost to rounding.
    kinds: Sequences = {"step": [({"r": 1.0}, q)], "first": [({"r": 1.0}, {})], "decay": [({}, q)]}
    here = {name: run.updates[0] for name, run in prober.run(kinds).items()}
    frozen = [yes and at for yes, at in zip(prober.are_zero(), prober.floating, strict=True)]
    idle = [
        floats and not frozen[i] and not any(np.any(here[name][i]) for name in kinds)
        for i, floats in enumerate(prober.floating)
    ]
    acts_at: list[int | None] = [None] * len(idle)
    further = [step + 100, step + 1, step - 1, step // 2, step - 100, 0, *(2**i for i in range(21))]
    further = [at for at in dict.fromkeys(further) if at >= 0 and at != step]
    for steps in ([step + 1000], further):
        waits = any(yes and at is None for yes, at in zip(idle, acts_at, strict=True))
        if steps is further and not waits:
            break
        runs = {(name, at): kinds[name] for at in steps for name in kinds}
        there = prober.run(runs, {run: run[1] for run in runs})
        for name, at in runs:
            run = there[name, at]
            for i, now in enumerate(run.updates[0]):
                if acts_at[i] is not None or np.any(here[name][i]):
                    continue
                if _acts(now, run.weights[0][i], prober.shapes[i].dtype):
                    acts_at[i] = at
    return frozen, idle, acts_at


def _acts(update: np.ndarray, weights: np.ndarray, dtype: Any) -> bool:
    """Whether there is an update that is not rounding to one of two neighbours, as by chance."""
    moved = update != 0
    far = np.abs(update[moved]) / _spacing(weights[moved], dtype)
    return bool(np.any((far != 1) & (far != 0.5)))  # below a power of 2 the grid is finer


def _spacing(weights: np.ndarray, dtype: Any) -> np.ndarray:
    """The unit in the last place of each weight; 0 of 0."""
    size = np.abs(weights)
    exponents = np.floor(np.log2(np.where(size > 0, size, 1)))
    return np.where(size > 0, np.exp2(exponents) * float(jnp.finfo(dtype).eps), 0)


def _raw(prober: Prober, decays: Decays) -> list[bool]:
    """Leaves whose updates are the gradients themselves."""
    factors = {"plus": 1.0, "minus": -2.0}
    runs: Sequences = {n: [({"r": f}, decays.weights(q=f))] for n, f in factors.items()}
    out = prober.run(runs)
    grads = prober.sampled("r")
    return [
        grads[i].size > 0
        and all(np.array_equal(out[n].updates[0][i], f * grads[i]) for n, f in factors.items())
        for i in range(len(grads))
    ]


def _waits(prober: Prober, decays: Decays) -> list[bool]:
    """Leaves whose update changes with what is infinite in the state: a bound yet to be found."""
    runs: Sequences = {"decay": [({}, decays.weights(q=1.0))]}
    start = prober.start
    now = prober.run(runs)["decay"].updates[0]
    prober.start = jax.tree.map(
        lambda x: jnp.where(jnp.isinf(x), 0, x) if jnp.issubdtype(x.dtype, jnp.inexact) else x,
        start,
    )
    then = prober.run(runs)["decay"].updates[0]
    prober.start = start
    return [not np.array_equal(a, b, equal_nan=True) for a, b in zip(now, then, strict=True)]


def _lost(dtype: Any, own: np.ndarray, amount: float | None) -> bool | None:
    """Whether amount * p is below half an ulp of p, for most of the weights that are not 0."""
    if amount is None:
        return None
    weights = np.abs(own).astype(np.float64)
    weights = weights[weights > 0] if np.any(weights) else np.ones(1)
    if not amount or not weights.size:
        return False
    return bool(np.mean(abs(amount) * weights < _spacing(weights, dtype) / 2) > 0.5)
