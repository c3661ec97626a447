"""Exact zeros of weights that are drawn elsewhere: a search for the old ones."""

import numpy as np

from jaxreg.explanation.probing import Prober

ROUNDS, POINTS = 6, 16
WIDTH = 64 * 2.0**-23  # an interval that is no accident of rounding, relative


def find_zeros(prober: Prober, unit: np.ndarray) -> list[bool | None]:
    """Whether an interval of old weights becomes exactly 0; None where no crossing was found.

    Between two weights, one that becomes negative and one that becomes positive, new weights go
    through zero: at once, or through a stretch of zeros.
    """
    chosen = prober.chosen
    sizes = np.repeat(unit, prober.sizes)
    kind = prober.patterns["q"].dtype
    low, high = (-4 * sizes).astype(kind), (4 * sizes).astype(kind)
    found: list[bool | None] = [None] * len(chosen)
    steps = np.linspace(0, 1, POINTS)
    for _ in range(ROUNDS):
        prober.patterns |= {"low": low, "high": high}
        runs = {i: [({}, {"low": 1 - t, "high": t})] for i, t in enumerate(steps)}
        out = prober.run(runs)
        ends = np.cumsum(prober.sizes)
        low, high = low.copy(), high.copy()
        for leaf, at in enumerate(chosen):
            old = np.stack([out[i].weights[0][leaf] for i in range(POINTS)])
            if not prober.floating[leaf] or old.shape[1:] != at.shape or not at.size:
                continue  # complex numbers have no sign
            new = old + np.stack([out[i].updates[0][leaf] for i in range(POINTS)])
            apart = np.abs(np.diff(old, axis=0)) > WIDTH * np.abs(old).max(axis=0)
            if np.any((new[1:] == 0) & (new[:-1] == 0) & apart):
                found[leaf] = True
            crosses = (new[0] < 0) & (new[-1] > 0)
            if found[leaf] is None and crosses.any():
                found[leaf] = False
            first = np.argmax(new >= 0, axis=0)
            entries = ends[leaf] - prober.sizes[leaf] + at
            below = np.where(crosses, np.maximum(first - 1, 0), 0)
            # Zeros stay between the two ends.
            last = np.argmax(new > 0, axis=0)
            above = np.where(crosses, last, POINTS - 1)
            columns = np.arange(at.size)
            low[entries], high[entries] = old[below, columns], old[above, columns]
    del prober.patterns["low"], prober.patterns["high"]
    return found
