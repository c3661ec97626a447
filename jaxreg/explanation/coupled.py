"""Coupled L2: weights that act as l times as much gradient, u(g, p) = F(g + l p) - a p.

So that changing the weights of the first step by d and its gradient by -l d changes nothing of
the second update, where a decoupled decay of the first step is not seen.
"""

from typing import Any

import numpy as np

from jaxreg.explanation.clips import Clip
from jaxreg.explanation.decays import Decay, Decays


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
    _verify(decays, found, np.nan_to_num(l2), left, g, two, moved)


def _verify(decays, found, l2, left, g, two, moved) -> None:
    """What is found is kept where it predicts other probes."""
    prober, unit = decays.prober, decays.unit
    checks = {
        "base": two({}, np.zeros(len(unit))),
        "moved": two({"q2": -l2 * moved}, moved),
        "back": two({"q2": l2 * moved}, -moved),
    }
    out = prober.run(checks)
    runs = {"zero": [({"r": g}, {})]}
    # So far that a clip before does not see what is added to the gradient.
    room = 100 * g / np.maximum(np.abs(l2) * unit, 1e-30)
    for name, (pattern, far) in {
        "q": ("q", 1.0),
        "minus": ("q", -1.0),
        "other": ("q2", 30.0),
    }.items():
        p = np.clip(far, -room, room) * unit
        runs[name] = [({"r": g, pattern: -l2 * p}, {pattern: p})]
    first = prober.run(runs)
    for i in left:
        tol = max(100 * decays.tol[i], 1e-3)
        base = out["base"].updates[1][i]
        size = np.abs(base).max()
        if any(np.abs(out[k].updates[1][i] - base).max() > tol * size for k in ("moved", "back")):
            continue
        zero = first["zero"].updates[0][i]
        p, u = first["other"].weights[0][i], first["other"].updates[0][i]
        amount = float(-np.dot(u - zero, p) / np.dot(p, p))
        noise = tol * np.abs(zero).max()
        if abs(amount) * np.abs(p).max() <= noise:
            amount = 0.0
        fits = all(
            np.all(
                np.abs(r.updates[0][i] - zero + amount * r.weights[0][i])
                <= noise + tol * np.abs(amount * r.weights[0][i])
            )
            for r in first.values()
        )
        if fits:
            found[i].l2, found[i].amount = float(l2[i]), amount
            found[i].kind = "decoupled" if amount else "coupled"
