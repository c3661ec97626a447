"""That there is no clip: updates of entries that know only their own gradient, and never stop.

A clip by a norm shows in entries whose own gradient stays, while that of others grows; a clip by
value in updates that follow the gradient up to some point and then stay exactly what they are.
"""

import numpy as np

from jaxreg.explanation.probing import Prober, Sequences

OTHERS = 32.0  # times the gradient of the other entries
SHARP = 0.05  # a relative change that stops from one scale to the next


def depends_on_others(
    prober: Prober, scales: list[float], tol: list[float], leaves: list[int]
) -> set[int]:
    """Leaves where updates of some entries change with the gradients of others."""
    # Not at weights of zero, whose norms may count for nothing.
    weights = {"own": 1.0, "q": np.array(prober.scales)}
    runs: dict = {"zero": [({}, weights)] * 2}
    for s in scales:
        for name, a, b in [("both", 1.0, 1.0), ("ra", 1.0, OTHERS), ("rb", OTHERS, 1.0)]:
            # The second gradient is the same: averages of both depend on their ratio.
            grads = [{"ra": a * s, "rb": b * s}, {"ra": -s / 2, "rb": -s / 2}]
            runs[name, s] = [(g, weights) for g in grads]
    out = prober.run(runs)
    still = out.pop("zero").updates
    kept = {name: prober.each(name) for name in ("ra", "rb")}
    found = set()
    for i in leaves:
        for (name, s), run in out.items():
            if name == "both":
                continue
            mine = kept[name][i][prober.chosen[i]] != 0
            for x, y, zero in zip(out["both", s].updates, run.updates, still, strict=True):
                mask = np.resize(mine, x[i].shape)
                a, b, c = x[i][mask], y[i][mask], zero[i][mask]
                # Equal entries are computed alike, so that rounding makes no difference.
                size = max(np.abs(a - c).max(initial=0), np.abs(b - c).max(initial=0))
                if not np.all(np.abs(a - b) <= tol[i] * size):
                    found.add(i)
    return found


def saturates(prober: Prober, low: float, tol: list[float], leaves: list[int]) -> set[int]:
    """Leaves where updates follow the gradient and then, from some size on, all at once do not.

    What saturates by itself, as an epsilon does, comes to its end little by little; signs jump.
    """
    if not leaves:
        return set()
    own = {"own": 1.0}
    coarse = any(t > 1e-3 for t in tol)  # so few digits need smaller steps
    # Down to where Adam's epsilon is larger than any gradient, for the clips after it.
    first_power, last_power = (0, 5) if low > 1e-5 else (-10, 12)
    scales = low * 10.0 ** np.arange(first_power, last_power + 1, 0.5 if coarse else 1.0)
    rising: Sequences = {i: [({"r": s}, own)] for i, s in enumerate(scales)}
    first = prober.run(rising)
    far = 4.0 if coarse else 64.0
    turns = np.concatenate([np.linspace(-2, 0, 11), np.geomspace(1 / 4, far, 8)])
    turns = np.sort(np.concatenate([turns, -np.geomspace(3, far, 5)]))
    # A first gradient, and one along it or against it, of another size.
    second = prober.run({i: [({"r": 1.0}, own), ({"r": x}, own)] for i, x in enumerate(turns)})
    return {
        i
        for i in leaves
        if _stops(np.stack([first[k].updates[0][i] for k in range(len(scales))]), tol[i])
        or _is_flat_and_slanted(
            np.stack([second[k].updates[1][i] for k in range(len(turns))]), 5 if coarse else 3
        )
    }


def _stops(u: np.ndarray, tol: float) -> bool:
    """Whether an entry's update rises, much in the end, and from the next scale on not at all.

    One that only jumps, as the sign of a sum does, does not rise before.
    """
    size = np.maximum(np.abs(u).max(axis=0), 1e-300)
    change = np.abs(np.diff(u, axis=0)) / size
    after = np.maximum.accumulate(change[::-1], axis=0)[::-1]
    rises = (change[:-2] > SHARP / 10) & (change[1:-1] > SHARP)
    return bool(np.any(rises & (after[2:] <= (tol if tol < 1e-3 else 0.0))))


def _is_flat_and_slanted(u: np.ndarray, length: int) -> bool:
    """Whether an entry's update has `length` equal values in a row, and three others or more."""
    rows = np.lib.stride_tricks.sliding_window_view(u, length, axis=0)
    flat = np.ptp(rows, axis=-1) == 0
    for entry, some in zip(u.T, flat.T, strict=True):
        if some.any() and len(np.unique(entry)) > 3:
            return True
    return False
