"""Decay and penalties, told by how the update depends on the weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxreg.explanation.clips import tolerance
from jaxreg.explanation.probing import Probed, Prober, Sequences
from jaxreg.explanation.zeros import find_zeros

FAR = 1000.0  # weights at which a decay is well seen beside the step


@dataclass
class Decay:
    """What is found for one leaf; see `jaxreg.explanation.LeafExplanation`."""

    amount: float | None = None
    kind: str = "unknown"
    l2: float | None = None
    penalized: bool | None = None
    threshold: float | None = None
    still: bool = False
    remembers: bool = False
    drawn: bool = False


class Decays:
    """The decay of all leaves."""

    def __init__(self, prober: Prober):
        self.prober = prober
        self.leaves = [i for i, yes in enumerate(prober.floating) if yes]
        self.tol = [tolerance(str(leaf.dtype)) for leaf in prober.shapes]
        self.eps = [max(t / 64, 2.0**-23) if t < 1e-4 else t / 4 for t in self.tol]
        self.unit = np.array(prober.scales)

    def weights(self, **factors: float) -> dict[str, Any]:
        """Weights of these multiples of the patterns, in units of the weights' own size."""
        return {name: factor * self.unit for name, factor in factors.items()}

    def find(self) -> list[Decay]:
        """One finding for each leaf."""
        zero: dict[str, Any] = {}
        half = any(leaf.dtype == np.float16 for leaf in self.prober.shapes)
        self.far = far = 30.0 if half else FAR
        tiny = 1e-4 if half else 1e-10
        weights = {
            "q": self.weights(q=1.0),
            "zero": zero,
            "far": self.weights(q=far),
            "own": {"own": 1.0},
            "minus": self.weights(q=-1.0),
            "small": self.weights(q=1e-3),
            "middle": self.weights(q=far**0.5),
            "other": self.weights(q=2.0, q2=1.0),
            "tiny": self.weights(q=tiny),
            "spread": self.weights(h=1.0),
            "minus far": self.weights(q=-far),
            "minus tiny": self.weights(q=-tiny),
            "minus spread": self.weights(h=-1.0),
        }
        runs: Sequences = {("0", name): [(zero, p)] for name, p in weights.items()}
        for sign, g in [("+", {"r": 1.0}), ("-", {"r": -1.0})]:
            runs |= {(sign, name): [(g, weights[name])] for name in ("q", "middle", "far", "zero")}
        for sign, g in [("low", {"r2": 1e-3}), ("high", {"r2": 30.0 if half else FAR})]:
            runs |= {(sign, name): [(g, weights[name])] for name in ("other", "zero")}
        out = self.prober.run(runs)
        low, q = 1e-3, weights["q"]
        # Weights that moved on along with the last step, while the gradient turns.
        ahead = {"own": 1.0, "r": -30 * self.unit}
        turned = {
            (sign, name): [({"r": g}, {"own": 1.0}), ({"r": -0.01 * g}, p)]
            for sign, g in (("+", 1.0), ("-", -1.0), ("0", 0.0))
            for name, p in (("ahead", ahead), ("zero", zero))
        }
        two = self.prober.run(
            turned
            | {
                "near": [({"r": low}, q), ({"r2": low}, q)],
                "far": [({"r": low}, self.weights(q2=far)), ({"r2": low}, q)],
                "still": [(zero, zero), (zero, zero)],
                "again q": [(zero, q), (zero, q)],
                "again own": [(zero, weights["own"]), (zero, weights["own"])],
                "other": [({"r2": low}, q), ({"r2": low}, q)],
            }
        )
        leaves = set(self.leaves)
        found = [
            Leaf(self, out, two, i).find() if i in leaves else Decay()
            for i in range(len(self.prober.shapes))
        ]
        # Beside a pull elsewhere than to zero, weights that become zero are not small ones.
        base = out["0", "zero"].updates[0]
        drawn = [i for i in self.leaves if found[i].penalized is False and np.any(base[i])]
        if drawn:
            zeroed = find_zeros(self.prober, self.unit)
            for i in drawn:
                found[i].penalized = zeroed[i]
                if zeroed[i] is not False:
                    found[i].amount, found[i].kind = None, "unknown"
        return found


class Leaf:
    """The probes of one leaf: ``u(g, p)`` are updates, ``w(p)`` weights."""

    def __init__(self, all_of_them: Decays, out: dict, two: dict[str, Probed], i: int):
        self.out, self.two, self.i = out, two, i
        self.second: dict[Any, np.ndarray] = {name: run.updates[1][i] for name, run in two.items()}
        self.tol, self.eps = all_of_them.tol[i], all_of_them.eps[i]
        self.far = all_of_them.far

    def u(self, g: str, p: str) -> np.ndarray:
        return self.out[g, p].updates[0][self.i]

    def w(self, p: str) -> np.ndarray:
        name = ("0", p) if ("0", p) in self.out else ("+", p)
        return self.out[name].weights[0][self.i]

    def find(self) -> Decay:
        found = Decay(penalized=False)
        finite = all(np.isfinite(run.updates[0][self.i]).all() for run in self.out.values())
        if not finite or not self.w("q").size:
            return Decay()
        every = [*self.out.values(), *self.two.values()]
        found.still = all(np.all(u[self.i] == 0) for run in every for u in run.updates)
        if found.still:
            found.amount, found.kind = 0.0, "none"
            return found
        a, b = self.two["near"].updates[1][self.i], self.two["far"].updates[1][self.i]
        found.remembers = not self._close(a, b, np.abs(a).max() + np.abs(b).max())
        if self._zeroes(found):
            if not found.remembers:
                self._penalized(found)
            return found
        if found.remembers:
            found.drawn = bool(np.any(self.u("0", "zero")))
            return found  # unknown so far: the weights went into the state
        amount = self._linear()
        if amount == 0:
            self._none(found)
        elif amount is not None:
            self._decoupled(found, amount)
        else:
            self._profile(found)
        if found.kind != "gated" and not self._holds_later():
            found.amount, found.kind = None, "unknown"
        return found

    def _close(self, x: Any, y: Any, size: Any) -> bool:
        return bool(np.all(np.abs(x - y) <= self.tol * size))

    def _linear(self) -> float | None:
        """A with u(0, p) = u(0, 0) - a p; None where there is none."""
        base = self.u("0", "zero")
        q = self.w("far")
        amount = float(-np.dot(self.u("0", "far") - base, q) / np.dot(q, q))
        for name in ("q", "far", "own", "minus", "small", "middle", "other", "spread"):
            p = self.w(name)
            if not self._close(
                self.u("0", name), base - amount * p, np.abs(amount * p) + np.abs(base)
            ):
                return None
        return amount

    def _moves(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, str]]:
        """Per gradient and weights: update, update for weights 0, sizes for rounding, weights."""
        pairs = [(g, p) for g in ("+", "-") for p in ("q", "far")]
        pairs += [("low", "other"), ("high", "other")]
        moves = []
        for g, p in pairs:
            u, at_zero = self.u(g, p), self.u(g, "zero")
            moves.append((u, at_zero, np.abs(u) + np.abs(at_zero) + np.abs(self.u("0", p)), p))
        return moves

    def _is_odd(self, amount: float) -> bool:
        """Whether what is even in the gradient is the decay alone, whatever scales the step."""
        base = self.u("0", "zero")
        # What vanishes at large weights is rounded away there, and tells nothing.
        if np.any(self.u("+", "zero")) and not np.any(self.u("+", "far")):
            return False
        for p in ("q", "far"):
            plus, minus, w = self.u("+", p), self.u("-", p), self.w(p)
            even, decay = (plus + minus) / 2, base - amount * w
            if not self._close(even, decay, np.abs(plus) + np.abs(minus) + np.abs(decay)):
                return False
        return True

    def _holds_later(self) -> bool:
        """Whether a second step's decay does not depend on the gradients either."""
        u = self.second
        decay = u["0", "ahead"] - u["0", "zero"]
        sizes = {g: np.abs(u[g, "ahead"]) + np.abs(u[g, "zero"]) + np.abs(decay) for g in "+-"}
        if all(self._close(u[g, "ahead"] - u[g, "zero"], decay, sizes[g]) for g in "+-"):
            return True
        even = (u["+", "ahead"] + u["-", "ahead"]) / 2
        return self._close(even, u["0", "ahead"], sizes["+"] + sizes["-"])

    def _none(self, found: Decay) -> None:
        moves = self._moves()
        if all(self._close(u, zero, size) for u, zero, size, _ in moves) or self._is_odd(0.0):
            found.amount, found.kind = 0.0, "none"
            return
        # A gate that is open only where the update is not 0.
        u, zero, _, p = moves[1]
        moved = np.abs(u - zero) > self.tol * (np.abs(u) + np.abs(zero))
        if moved.any():
            amount = float(-np.mean((u - zero)[moved] / self.w(p)[moved]))
            if self._is_gated(amount):
                found.amount, found.kind = amount, "gated"

    def _decoupled(self, found: Decay, amount: float) -> None:
        base = self.u("0", "zero")
        if abs(amount - 1) <= self.tol:
            return  # the new weights do not depend on the old ones
        same = all(
            self._close(u - zero, -amount * self.w(p), size) for u, zero, size, p in self._moves()
        )
        if same or self._is_odd(amount):
            if not np.any(base):
                found.amount, found.kind = amount, "decoupled"
            elif self._stays("still"):
                found.amount, found.kind = amount, "toward an anchor"
        elif self._is_gated(amount):
            found.amount, found.kind = amount, "gated"

    def _stays(self, again: str) -> bool:
        """Whether an update stays what it is, but for a schedule; noise changes."""
        first, second = (u[self.i] for u in self.two[again].updates)
        factor = np.dot(first, second) / max(np.dot(first, first), 1e-300)
        return self._close(second, factor * first, np.abs(second) + np.abs(factor * first))

    def _is_gated(self, amount: float) -> bool:
        """Whether weights decay exactly where the update without decay makes them smaller."""
        if np.any(self.u("0", "zero")):
            return False
        both = set()
        for u, zero, size, p in self._moves():
            w = self.w(p)
            shrinks = zero * w <= 0
            both |= set(shrinks.tolist())
            if not self._close(u - zero, np.where(shrinks, -amount * w, 0), size):
                return False
        return both == {True, False}

    def _profile(self, found: Decay) -> None:
        """A decay that is not linear in the weights, and the same for each gradient."""
        base = self.u("0", "zero")
        same = all(
            self._close(u - zero, self.u("0", p) - base, size) for u, zero, size, p in self._moves()
        )
        name = "own" if np.any(self.w("own")) else "q"
        p = self.w(name)
        if (
            same
            and not np.any(base)
            and not self._is_linear_by_entry()
            and self._close(self.u("0", "q"), -self.u("0", "minus"), np.abs(self.u("0", "q")))
            and all(self._stays(again) for again in ("again q", "again own"))
        ):
            found.amount = float(-np.dot(self.u("0", name), p) / np.dot(p, p)) + 0.0
            found.kind = "not linear"

    def _is_linear_by_entry(self) -> bool:
        """Whether each entry decays in proportion to itself, though not all by one amount."""
        far = self.u("0", "far") / self.w("far")
        names = ("q", "minus", "small", "middle", "other")
        return all(
            self._close(self.u("0", n), far * self.w(n), np.abs(far * self.w(n))) for n in names
        )

    def _zeroes(self, found: Decay) -> bool:
        """Whether small weights become exactly 0, and large ones do not."""
        # With both signs of each entry: a constraint may zero those of one sign.
        zeroed = {}
        for name in ("tiny", "spread", "far"):
            u, w = (
                np.concatenate([of(name), of(f"minus {name}")])
                for of in (lambda p: self.u("0", p), self.w)
            )
            zeroed[name] = (u == -w) & (w != 0)
        small = zeroed["tiny"].any() or zeroed["spread"].any()
        if small and not (zeroed["tiny"].all() or zeroed["spread"].any()):
            small = False
        found.penalized = bool(small and not zeroed["far"].all())
        return bool(small)

    def _penalized(self, found: Decay) -> None:
        """The decay beside a penalty, and the threshold where it is a soft one."""
        at = {name: self.w(name) + self.u("0", name) for name in ("q", "middle", "far")}
        alive = np.all([x != 0 for x in at.values()], axis=0)
        if not alive.any():
            return

        def slope(a: str, b: str, g: str = "0") -> np.ndarray:
            return (self.u(g, b) - self.u(g, a))[alive] / (self.w(b) - self.w(a))[alive]

        rounding = 4 * self.eps
        decay = float(-np.mean(slope("q", "far")))
        if abs(decay - 1) <= self.tol:
            return  # the new weights do not depend on the old ones
        checks = [slope("middle", "far"), slope("q", "middle"), slope("q", "far")]
        checks += [slope("middle", "far", "+"), slope("middle", "far", "-")]
        if any(np.any(np.abs(s + decay) > rounding + self.tol * abs(decay)) for s in checks):
            return
        if abs(decay) > rounding:
            found.amount, found.kind = decay, "decoupled"
        elif abs(decay) <= self.eps / 4:
            # A smaller decay, or a part of the penalty that is one, is rounded away with it.
            decay = 0.0
        else:
            return
        p = np.concatenate([self.w(n) for n in ("q", "minus", "spread", "own")])
        u = np.concatenate([self.u("0", n) for n in ("q", "minus", "spread", "own")])
        left = (np.abs(p) > 0) & (p + u != 0)
        # Where weights are small the difference is exact.
        offsets = ((1 - decay) * np.abs(p) - np.abs(p + u))[left]
        exact = 1 / np.maximum(np.abs(p[left]), 1e-30)
        threshold = float(np.sum(offsets * exact) / np.sum(exact))
        soft = np.sign(p) * np.maximum((1 - decay) * np.abs(p) - threshold, 0)
        noise = 4 * self.eps * np.abs(p) + self.tol * threshold
        if threshold <= 0 or np.any(np.abs(p + u - soft) > noise):
            return
        for g, name in (("+", "q"), ("-", "q"), ("low", "other"), ("high", "other")):
            moved = self.u(g, "zero")
            step = moved + np.sign(moved) * threshold
            w = self.w(name)
            target = (1 - decay) * w + step
            new = np.sign(target) * np.maximum(np.abs(target) - threshold, 0)
            size = self.eps * 4 * (np.abs(w) + np.abs(step)) + self.tol * (threshold)
            seen = moved != 0
            if np.any((np.abs(w + self.u(g, name) - new) > size)[seen]):
                return
            if size.min() > threshold / 2:
                return  # another threshold would fit as well
        found.threshold = threshold
