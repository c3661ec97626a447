"""Clips, told by what they do exactly: beyond a threshold the gradient's scale changes nothing.

Two steps are looked at, as Adam's first update does not depend on the gradient's scale. The second
gradient is of the first one's scale, so that the second update shows what the first one left.
"""

import math
from typing import NamedTuple

import numpy as np

from jaxreg.explanation.probing import Probed, Prober
from jaxreg.explanation.unclipped import depends_on_others, saturates

TOP = 8  # scales that are tried
POINTS, ROUNDS = 7, 4  # of the search for a threshold
WARM_UP = 32  # steps until those who compare with gradients before have seen some
MEASURED = 1e-3  # how exact thresholds are, relative
FAR = 300.0  # times the gradient before: a spike


class Clip(NamedTuple):
    """What is found for one leaf; `scale` is below any threshold for the pattern "r"."""

    kind: str = "none"
    threshold: float | None = None


def tolerance(dtype: str) -> float:
    """The rounding errors that a few operations in a dtype make, relative."""
    return {"bfloat16": 4 * 2.0**-7, "float16": 4 * 2.0**-10}.get(dtype, 64 * 2.0**-23)


def _rounded(threshold: float, tol: float) -> float | None:
    """The number of two digits that a threshold agrees with, as exactly as it was measured.

    None where that is not as exactly as two digits.
    """
    near, tol = float(f"{threshold:.1e}"), max(MEASURED, tol)
    if tol > 0.005:
        return None
    return near if abs(threshold - near) <= tol * near else threshold


class Clips:
    """The clips of all leaves."""

    def __init__(self, prober: Prober):
        self.prober = prober
        half = any(leaf.dtype == np.float16 for leaf in prober.shapes)
        self.low, self.ratio = (2.0**-8, 6.0) if half else (1e-6, 100.0)
        self.scales = [self.low * self.ratio**i for i in range(4 if half else TOP - 1)]
        self.leaves = [i for i, yes in enumerate(prober.floating) if yes]
        self.blind: set[int] = set()  # leaves of which the gradient's scale is never seen
        # Leaves where the effect of the scale falls as 1 / scale: the epsilon of a normalization.
        self.smooth: set[int] = set()
        # Norms are sums over leaves, one after the other, and over their entries.
        sums = 2.0**-24 * (len(prober.shapes) + max(prober.sizes) ** 0.5)
        self.tol = [max(sums, tolerance(str(leaf.dtype))) for leaf in prober.shapes]

    def find(self) -> list[Clip]:
        """One finding for each leaf."""
        n, own = len(self.prober.shapes), {"own": 1.0}
        draw = self.prober.draw
        far = [np.exp2(draw.uniform(0, 3, n)) for _ in range(2)]
        top, runs = self.scales[-1], {}
        for i, s in enumerate(self.scales):
            second = ({"r2": s}, own)
            runs["at", i] = [({"r": s}, own), second]
            runs["above", i] = [({"r": s * self.ratio}, own), second]
        second = ({"r2": top}, own)
        runs["entries"] = [({"sign": top}, own), second]  # the same signs, another direction
        # Twice, as one leaf's share of the norm may stay what it is.
        for i, factors in enumerate(far):
            runs["leaves", i] = [({"r": factors * top}, own), second]
        runs["minus"] = [({"r": -top}, own), second]
        out = self.prober.run(runs)
        found = [Clip()] * n
        brackets = np.ones(n)
        for leaf in self.leaves:
            found[leaf], at = self._kind(out, leaf)
            if at:
                brackets[leaf] = self.scales[at - 1]
        clipped = [i for i in self.leaves if found[i].kind.startswith("by")]
        if clipped:
            # What is not clipped goes along with the others, for norms over all leaves.
            common = np.median(brackets[clipped])
            brackets = np.where([f.kind.startswith("by") for f in found], brackets, common)
            scales = self._threshold(brackets, clipped)
            found = self._verified(found, scales, clipped)
        return self._relative(self._without(found))

    def _without(self, found: list[Clip]) -> list[Clip]:
        """No clip only where nothing acts like one: each entry is by itself and never stops."""
        left = [i for i in self.leaves if found[i].kind == "none"]
        if not left:
            return found
        scales = [self.scales[i] for i in (0, len(self.scales) // 2, -1)]
        acting = depends_on_others(self.prober, scales, self.tol, left)
        acting |= saturates(self.prober, self.low, self.tol, [i for i in left if i not in acting])
        return [Clip("unknown") if i in acting else clip for i, clip in enumerate(found)]

    def _kind(self, out: dict, leaf: int) -> tuple[Clip, int]:
        """The kind of clip, and the first scale of those from which on all is the same."""
        last = len(self.scales) - 1
        base = out["at", last]
        if not all(self._finite(out[name], leaf) for name in out):
            return Clip("unknown"), 0
        if self._same(base, out["minus"], leaf):
            return Clip("unknown"), 0  # nothing of the gradient is seen
        far = [self._distance(out["at", i], out["above", i], leaf) for i in range(last + 1)]
        same = [x <= self.tol[leaf] for x in far]
        if not same[last]:
            return Clip("none"), 0
        if all(same):
            self.blind.add(leaf)
            # The norm of one entry is its size: a clip behind a division by it would not show.
            alike = self.prober.sizes[leaf] > 1 and self._same(out["at", 0], base, leaf)
            return Clip("none" if alike else "unknown"), 0
        first = max(i for i in range(last + 1) if not same[i]) + 1
        if first >= 2 and 0.3 < far[first - 2] / (far[first - 1] * self.ratio) < 3:
            self.smooth.add(leaf)
        if not all(self._same(base, out["leaves", i], leaf) for i in range(2)):
            return Clip("by global norm"), first
        if base.updates[0][leaf].size > 1 and self._same(base, out["entries"], leaf):
            return Clip("by value"), first
        return Clip("by leaf norm"), first

    def _threshold(self, low: np.ndarray, clipped: list[int]) -> np.ndarray:
        """The scale of the pattern "sign" at which each leaf's clip starts to act."""
        own, last = {"own": 1.0}, ROUNDS - 1
        # The pattern "r" is of sizes 1/2 to 2.
        low, high = low / 4, low * self.ratio * 4
        second = ({"r2": np.sqrt(low * high)}, own)
        top = {"top": [({"sign": high * self.ratio}, own), second]}
        exact = np.full(len(low), np.nan)
        for number in range(ROUNDS):
            # The first of them lies below `low`, so that there are two below any threshold.
            steps = (np.arange(POINTS)[:, None] - 1) / (POINTS - 2)
            grid = low * (high / low) ** steps
            # With the top one, as many as are tried at a time.
            runs = {i: [({"sign": s}, own), second] for i, s in enumerate(grid)}
            out = self.prober.run(runs | top)
            for leaf in clipped:
                far = [self._distance(out[i], out["top"], leaf) for i in range(POINTS)]
                acts = [x <= max(self.tol[leaf], 1e-4) for x in far]
                i = int(np.clip([*acts, True].index(True) - 1, 1, POINTS - 2))
                if number == last:
                    # From the last two scales below the threshold, a straight line to it.
                    a, b, x, y = grid[i - 1, leaf], grid[i, leaf], far[i - 1], far[i]
                    exact[leaf] = b + (b - a) * y / (x - y) if x > y else np.nan
                low[leaf], high[leaf] = grid[i, leaf], grid[i + 1, leaf]
        middle = np.sqrt(low * high)
        return np.where((exact >= low * 0.99) & (exact <= high * 1.01), exact, middle)

    def _verified(self, found: list[Clip], at: np.ndarray, clipped: list[int]) -> list[Clip]:
        """Clips whose thresholds hold for gradients of another direction too; else unknown."""
        prober = self.prober
        sizes = [max(1, int(np.prod(leaf.shape))) for leaf in prober.shapes]
        other = prober.each("q2")
        factors = np.exp2(prober.draw.uniform(-1, 1, len(sizes)))
        norms = [float(np.linalg.norm(np.abs(x).ravel())) for x in other]
        over_all = float(np.linalg.norm([f * x for f, x in zip(factors, norms, strict=True)]))
        total = np.sqrt(sum(sizes[i] for i in self.leaves))
        if whole := [i for i in clipped if found[i].kind == "by global norm"]:
            near = np.median(at[whole])
            at = np.where(np.abs(at / near - 1) < 0.01, near, at)
        limits, below, above = np.full(len(sizes), np.nan), np.ones(len(sizes)), np.ones(len(sizes))
        common = float(np.median(at[whole])) * total / over_all if whole else np.nan
        for i in range(len(sizes)):
            kind = found[i].kind
            if kind == "by value":
                limits[i] = at[i]
                below[i] = at[i] / np.abs(other[i]).max() * 0.95
                above[i] = at[i] / np.abs(other[i]).min() * 1.05
            elif kind == "by leaf norm":
                limits[i] = at[i] * np.sqrt(sizes[i])
                below[i], above[i] = np.array([0.95, 1.05]) * limits[i] / norms[i]
            else:
                limits[i] = at[i] * total
                base = common if whole else self.low
                below[i], above[i] = np.array([0.95, 1.05]) * base * factors[i]
        # Other weights too: a constraint on the weights bounds the update by them.
        others = [{"own": 1.0, "q": 8.0 * np.array(prober.scales)}, {"own": 2.0}]
        # And the other signs, as entries may be clipped from one side alone.
        out = prober.run(
            {
                (name, (k, sign)): [({"q2": sign * s}, moved), ({"r2": np.array(at)}, moved)]
                for name, s in [("below", below), ("above", above), ("far", above * self.ratio)]
                for k, moved in enumerate(others)
                for sign in (1, -1)
            }
        )
        checked = list(found)
        for i in clipped:
            good = all(
                self._distance(out["above", k], out["far", k], i) <= 4 * self.tol[i]
                and self._share_moved(out["below", k], out["far", k], i) >= 0.9
                for k in [(k, sign) for k in range(len(others)) for sign in (1, -1)]
            )
            if good:
                checked[i] = Clip(found[i].kind, _rounded(float(limits[i]), self.tol[i]))
            else:
                checked[i] = Clip("none" if i in self.smooth else "unknown")
        return checked

    def _relative(self, found: list[Clip]) -> list[Clip]:
        """Clips relative to the gradients before, which have no one threshold: unknown."""
        checked, open_leaves = list(found), [i for i in self.leaves if found[i].kind == "none"]
        warm_up = [1, *([WARM_UP] if self.prober.remembers_numbers() else [])]
        for number in warm_up if open_leaves else []:
            out = self._spikes(number)
            near = [max(tol, 1e-3 if number > 1 else 0) for tol in self.tol]
            for i in open_leaves:
                same = self._distance(out["spike"], out["higher"], i, first=number) <= near[i]
                seen = self._distance(out["spike"], out["other"], i, first=number) > near[i]
                if same and seen and i not in self.blind | self.smooth:
                    checked[i] = Clip("unknown")
        return checked

    def _spikes(self, number: int) -> dict[str, Probed]:
        """Spikes after `number` gradients of about one size, and a gradient after them."""
        own, s = {"own": 1.0}, self.scales[len(self.scales) // 2]
        before = [({"r": s * (1 + 0.05 * math.cos(2 * i))}, own) for i in range(number)]
        last = ({"r": FAR * s}, own)
        spikes = {"spike": FAR, "higher": FAR * self.ratio, "other": -FAR}
        return self.prober.run(
            {name: [*before, ({"r2": far * s}, own), last] for name, far in spikes.items()}
        )

    def _same(self, a: Probed, b: Probed, leaf: int, first: int = 0) -> bool:
        return self._distance(a, b, leaf, first) <= self.tol[leaf]

    def _distance(self, a: Probed, b: Probed, leaf: int, first: int = 0) -> float:
        """How far apart the updates are, relative to the larger ones of both."""
        far = 0.0
        for x, y in zip(a.updates[first:], b.updates[first:], strict=True):
            size = max(np.abs(x[leaf]).max(initial=0), np.abs(y[leaf]).max(initial=0))
            if size:
                far = max(far, float(np.abs(x[leaf] - y[leaf]).max(initial=0) / size))
        return far

    def _share_moved(self, a: Probed, b: Probed, leaf: int) -> float:
        """The share of entries whose updates differ."""
        moved = np.zeros(a.updates[0][leaf].shape, bool)
        for x, y in zip(a.updates, b.updates, strict=True):
            size = max(np.abs(x[leaf]).max(), np.abs(y[leaf]).max())
            moved |= np.abs(x[leaf] - y[leaf]) > self.tol[leaf] * size
        return float(np.mean(moved))

    def _finite(self, a: Probed, leaf: int) -> bool:
        return all(np.isfinite(u[leaf]).all() for u in a.updates)
