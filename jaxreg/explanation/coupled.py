"""Coupled L2: weights that act as l times as much gradient, u(g, p) = F(g + l p) - a p.

So that changing the weights of the first step by d and its gradient by -l d changes nothing of
the second update, where a decoupled decay of the first step is not seen.
"""

from typing import Any

import numpy as np

from jaxreg.explanation.clips import Clip
from jaxreg.explanation.decays import Decay, Decays

CANCELLED = 10.0  # times the gradient: what an L2 adds and the gradient takes away
SEEN = 20.0  # a decay, times the one that could not be told from none
LOST = 2.0**-25  # a decay that weights of float32 are rounded back from


def find_coupled(decays: Decays, found: list[Decay], clips: list[Clip]) -> None:
    """Completes the findings of leaves whose weights went into the state."""
    # Weights drawn elsewhere than to zero are no L2.
    weights_alone = [f.remembers and not f.penalized and not f.drawn for f in found]
    open_leaves = [i for i in decays.leaves if weights_alone[i]]
    if not open_leaves:
        return
    prober = decays.prober
    n = len(prober.shapes)
    size = np.sqrt(sum(max(1, int(np.prod(leaf.shape))) for leaf in prober.shapes))
    # Gradients small enough for a clip that comes before.
    limits = [c.threshold for c in clips if c.threshold is not None]
    clipped = any(c.kind.startswith("by") for c in clips)
    g = min([1e-3, *(1e-3 * t / size for t in limits)]) if limits or not clipped else 1e-6
    q = decays.weights(q=1.0)

    def two(first_g: dict, moved: np.ndarray) -> list:
        first_p = {"q": decays.unit, "q2": moved}
        return [({"r": g, **first_g}, first_p), ({"r2": g}, q)]

    def second(probed, leaf: int) -> np.ndarray:
        return probed.updates[1][leaf]

    # How far the weights must go to be seen as much as one hundredth of the gradient.
    moves = [10.0**j for j in range(-6, 7)]
    runs: dict[Any, Any] = {j: two({}, m * decays.unit) for j, m in enumerate(moves)}
    runs |= {"base": two({}, np.zeros(n)), "gradient": two({"q2": 0.01 * g}, np.zeros(n))}
    out = prober.run(runs)
    chosen, l2 = np.full(n, np.nan), np.full(n, np.nan)
    for i in open_leaves:
        base, slope = second(out["base"], i), second(out["gradient"], i)
        target = np.linalg.norm(slope - base)
        if not np.isfinite(target) or target == 0:
            continue
        far = [np.linalg.norm(second(out[j], i) - base) / target for j in range(len(moves))]
        j = int(np.argmin([abs(np.log(max(x, 1e-30))) for x in far]))
        ratio = np.dot(second(out[j], i) - base, slope - base) / target**2
        l2[i], chosen[i] = ratio * 0.01 * g / (moves[j] * decays.unit[i]), moves[j]
    left = [i for i in open_leaves if np.isfinite(l2[i]) and l2[i] != 0]
    # Nearer each time: further weights tell more.
    for width, further in ((0.3, 1.0), (0.02, 10.0), (0.001, 100.0)):
        factors = 1 + width * np.linspace(-1, 1, 7)
        moved = np.where(np.isfinite(chosen), chosen * further, 0) * decays.unit
        trial = np.nan_to_num(l2)
        runs = {k: two({"q2": -trial * f * moved}, moved) for k, f in enumerate(factors)}
        runs["base"] = two({}, np.zeros(n))
        out = prober.run(runs)
        for i in list(left):
            base = second(out["base"], i)
            values = np.stack([second(out[k], i) - base for k in range(len(factors))])
            way = values[-1] - values[0]
            along = values @ way
            if not np.all(np.diff(along) > 0) or not along[0] <= 0 <= along[-1]:
                left.remove(i)
                continue
            l2[i] *= float(np.interp(0, along, factors))
    free = all(c.kind == "none" for c in clips)
    _verify(decays, found, np.nan_to_num(l2), left, g, free, two, moved)


def _verify(decays, found, l2, left, g, free, two, moved) -> None:
    """What is found is kept where it predicts other probes."""
    prober, unit = decays.prober, decays.unit
    half = any(leaf.dtype == np.float16 for leaf in prober.shapes)
    checks = {
        "base": two({}, np.zeros(len(unit))),
        "moved": two({"q2": -l2 * moved}, moved),
        "back": two({"q2": l2 * moved}, -moved),
    }
    out = prober.run(checks)
    runs = {"zero": [({"r": g}, {})]}
    # The further the weights are, the smaller decays show; what is taken from the gradient then is
    # ten times as much as what is left, and a clip before should see neither.
    far = 30.0 * np.array([1.0] if half else [1.0, 1e3, 1e6])
    strength = np.maximum(np.abs(l2) * unit, 1e-30)
    runs = {}
    for k, reach in enumerate(far):
        grads = np.maximum(10 * g, strength * reach / CANCELLED) if free else 10 * g
        reaches = np.minimum(reach, CANCELLED * grads / strength)
        runs["zero", k] = [({"r": grads}, {})]
        for name, (pattern, share) in {
            "q": ("q", 0.03),
            "-": ("q", -0.03),
            "q2": ("q2", 1),
        }.items():
            p = share * reaches * unit
            runs[name, k] = [({"r": grads, pattern: -l2 * p}, {pattern: p})]
    first = prober.run(runs)
    for i in left:
        tol = max(100 * decays.tol[i], 1e-3)
        base = out["base"].updates[1][i]
        size = np.abs(base).max()
        if any(np.abs(out[k].updates[1][i] - base).max() > tol * size for k in ("moved", "back")):
            continue
        bounds, tol = {}, 16 * decays.tol[i]
        for k in range(len(far)):
            zero, p = first["zero", k].updates[0][i], first["q2", k].weights[0][i]
            noise = tol * np.abs(zero).max()
            change = first["q2", k].updates[0][i] - zero
            amount = float(-np.dot(change, p) / np.dot(p, p))
            if all(
                np.all(
                    np.abs(first[n, k].updates[0][i] - zero + amount * first[n, k].weights[0][i])
                    <= noise + tol * np.abs(amount * first[n, k].weights[0][i])
                )
                for n in ("q", "-", "q2")
            ):
                bounds[noise / np.abs(p).max()] = amount
        if not bounds:
            continue
        found[i].l2, bound = float(l2[i]), min(bounds)
        if abs(bounds[bound]) >= SEEN * bound:
            found[i].amount, found[i].kind = bounds[bound], "decoupled"
        elif abs(bounds[bound]) <= bound <= LOST:
            found[i].amount, found[i].kind = 0.0, "coupled"
