"""Probes: gradients and weights that a transformation is tried on, many at a time.

A sequence is a list of steps, each a gradient and weights; each of these is a sum of patterns
(random draws of a fixed seed, of sizes between 1/2 and 2) times factors. All sequences start from
the state that ``init`` gives for the weights themselves, with its step counters set.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.explanation.counting import Counters, calls_of_a_step, find_counters
from jaxreg.explanation.running import Runner

Mix = dict[str, Any]
"""Factors of patterns: a number, or one for each leaf."""
OWN: Mix = {"own": 1.0}
Step = tuple[Mix, Mix]
Sequences = Mapping[Any, Sequence[Step]]

MEMORY = 2**30  # bytes of probes at a time
COPIES = 8  # trees of the weights' size that one probe of an optimizer takes
LANES = 16
SAMPLES = 2**16  # entries that are looked at, of all leaves: 32 to 256 of each
# What tracing says of Python code that needs the numbers themselves, or can't be batched.
UNTRACEABLE = (jax.errors.JAXTypeError, jax.errors.JAXIndexError, NotImplementedError)


class Probed:
    """What came out for one sequence: per step and leaf, some entries in float64.

    Attributes:
        weights, updates: ``weights[step][leaf]``, an array; complex numbers as pairs.
    """

    def __init__(self, weights: list[list[np.ndarray]], updates: list[list[np.ndarray]]):
        self.weights, self.updates = weights, updates


class Prober:
    """Tries a transformation on batches of sequences."""

    def __init__(
        self, tx: Any, params: Any, step: int, seed: int, extra_args: dict[str, Any]
    ) -> None:
        self.tx = optax.with_extra_args_support(tx)
        self.extra_args = extra_args
        self.shapes, self.treedef = jax.tree.flatten(params)
        self.draw = np.random.default_rng(seed)
        self.floating = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in self.shapes]
        pairs = zip(self.shapes, self.floating, strict=True)
        self.sizes = [math.prod(leaf.shape) if yes else 0 for leaf, yes in pairs]
        self.ends = np.cumsum(self.sizes)
        self.patterns = self._patterns()
        self.own: tuple[Any, list[np.ndarray]] | None = None
        self.scales = [_scale(x) for x in self.each("own")]
        own = self._tree([{"own": 1.0}])
        self.chosen = [self._chosen(size) for size in self.sizes]
        width = sum(math.prod(leaf.shape) * max(4, leaf.dtype.itemsize) for leaf in self.shapes)
        self.lanes = int(np.clip(MEMORY // max(1, COPIES * width), 1, LANES))
        with passed_on("init"):
            self.initial = self.tx.init(jax.tree.map(lambda x: jnp.asarray(x[0]), own))
        self.runners: dict[Any, Callable[..., Any]] = {}
        self.lanes_at_init = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x), (self.lanes, *jnp.shape(x))), self.initial
        )
        grads, weights = (self._tree([mix] * self.lanes) for mix in ({"r": 1.0}, {"q": 1.0}))
        self.dtypes = jax.tree.map(
            lambda x: str(x.dtype), self._update(grads, self.lanes_at_init, weights)
        )
        again = lambda state: self._update(grads, state, weights)  # noqa: E731
        self.counters: Counters = find_counters(again, self.lanes_at_init)
        self.start = self.at_step(step)
        self.calls = calls_of_a_step(again, self.start) if step else self.counters.calls

    def each(self, name: str) -> list[np.ndarray]:
        """A pattern leaf by leaf, as vectors; of other leaves than floating ones it is empty."""
        return np.split(self.patterns[name], self.ends[:-1])

    def at_step(self, step: Any) -> Any:
        """The states that sequences start from, whose counters are at a step, or one a lane."""
        leaves, treedef = jax.tree.flatten(self.lanes_at_init)
        steps = jnp.broadcast_to(jnp.asarray(step, jnp.int32), (self.lanes,))
        return treedef.unflatten(
            [
                leaf + steps.astype(leaf.dtype) if i in self.counters.steps else leaf
                for i, leaf in enumerate(leaves)
            ]
        )

    def run(
        self, sequences: Sequences, steps: Mapping[Any, int] | None = None
    ) -> dict[Any, Probed]:
        """The updates of each sequence; all of them have the same number of steps.

        They start at the step that was asked for, or each at its own of `steps`.
        """
        names, out = list(sequences), {}
        for first in range(0, len(names), self.lanes):
            now = names[first : first + self.lanes]
            padded = now + now[:1] * (self.lanes - len(now))
            start = self.at_step([steps[n] for n in padded]) if steps else self.start
            weights, updates = self._run([sequences[n] for n in padded], start)
            for lane, name in enumerate(now):
                out[name] = Probed(
                    [[x[lane] for x in step] for step in weights],
                    [[x[lane] for x in step] for step in updates],
                )
        return out

    def remembers_numbers(self) -> bool:
        """Whether the state has floating numbers beside arrays of the leaves' shapes."""
        shapes = {tuple(leaf.shape) for leaf in self.shapes}
        return any(
            jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.shape(x) not in shapes
            for x in jax.tree.leaves(self.initial)
        )

    def unset(self) -> tuple[str, ...]:
        """Paths of numbers of the state that are read, change, and are not set to a step."""
        (runner, *_) = self.runners.values()
        others, first = self.counters.others, len(self.shapes)
        read = [i for i in others if not isinstance(runner, Runner) or first + i in runner.reads]
        return tuple(others[i] for i in read)

    def _run(self, sequences: list[Sequence[Step]], state: Any) -> tuple[list[Any], list[Any]]:
        seen_weights, seen_updates = [], []
        for steps in zip(*sequences, strict=True):
            grads = self._tree([step[0] for step in steps])
            weights, entries = self._weights([step[1] for step in steps])
            updates = None
            for _ in range(self.calls):
                updates, state = self._update(grads, state, weights)
            seen_weights.append(entries)
            seen_updates.append(self._sampled(updates))
            del grads, weights, updates  # before the next ones are made
        return seen_weights, seen_updates

    def _weights(self, mixes: list[Mix]) -> tuple[Any, list[np.ndarray]]:
        """Weights, and their entries that are looked at; the own ones, of most probes, are kept."""
        if mixes != [OWN] * self.lanes:
            weights = self._tree(mixes)
            return weights, self._sampled(weights)
        if self.own is None:
            own = jax.tree.map(jnp.asarray, self._tree(mixes))
            self.own = own, self._sampled(own)
        return self.own

    def _update(self, *args: Any) -> tuple[Any, Any]:
        """Updates and states, of gradients, states and weights with one lane for each probe."""

        def update(g: Any, s: Any, p: Any) -> tuple[Any, Any]:
            return self.tx.update(g, s, p, **self.extra_args)

        def looped(*args: Any) -> tuple[Any, Any]:
            lanes = [jax.tree.map(lambda x: jnp.asarray(x)[i], args) for i in range(self.lanes)]  # noqa: B023
            each = [update(*lane) for lane in lanes]
            return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *each)

        key = (jax.tree.structure(args), tuple(x.dtype for x in jax.tree.leaves(args)))
        with passed_on("update"):
            if key not in self.runners:
                try:
                    self.runners[key] = Runner(update, self.lanes, *args)
                    return self.runners[key](*args)
                except UNTRACEABLE:
                    self.runners[key] = looped
            return self.runners[key](*args)

    def are_zero(self) -> list[bool]:
        """Leaves whose update is zero by how it is computed, whatever comes in."""
        (runner, *_) = self.runners.values()
        if not isinstance(runner, Runner):
            return [False] * len(self.shapes)
        return self.treedef.flatten_up_to(runner.are_zero[0])

    def _tree(self, mixes: Sequence[Mix]) -> Any:
        """Sums of patterns as a tree, a lane for each; whole numbers and keys keep their value."""
        mixed = np.empty((len(mixes), sum(self.sizes)), self.patterns["r"].dtype)
        for lane, mix in zip(mixed, mixes, strict=True):
            if not mix:
                lane[:] = 0
            for i, (name, factor) in enumerate(mix.items()):
                each = np.asarray(factor, np.float32)
                each = np.repeat(each, self.sizes) if each.ndim else each
                if i == 0:
                    np.multiply(self.patterns[name], each, out=lane)
                else:
                    lane += self.patterns[name] * each
        leaves = []
        for i, (leaf, size) in enumerate(zip(self.shapes, self.sizes, strict=True)):
            shape = (len(mixes), *leaf.shape)
            if self.floating[i]:
                flat = mixed[:, self.ends[i] - size : self.ends[i]]
                flat = flat if _is_complex(leaf.dtype) else np.real(flat)
                leaves.append(np.ascontiguousarray(flat, leaf.dtype).reshape(shape))
            elif isinstance(leaf, jax.ShapeDtypeStruct):
                leaves.append(np.zeros(shape, leaf.dtype))
            else:
                leaves.append(jnp.broadcast_to(leaf, shape))
        return self.treedef.unflatten(leaves)

    def _patterns(self) -> dict[str, np.ndarray]:
        """All leaves' entries as one vector; complex ones have both parts."""
        size, draw = sum(self.sizes), self.draw
        kinds = [x.dtype for x, yes in zip(self.shapes, self.floating, strict=True) if yes]
        wide = [k for k in kinds if k in (np.float64, np.complex64, np.complex128)]
        turned = np.repeat(
            [1 + 0.5j if _is_complex(x.dtype) else 1 for x in self.shapes], self.sizes
        )
        turned = turned if np.any(turned != 1) else 1

        def drawn(sizes: np.ndarray, signs: np.ndarray) -> np.ndarray:
            return (sizes * signs).astype(np.float32) * turned

        def uniform() -> np.ndarray:
            return draw.random(size, np.float32) * 2 - 1

        def signs() -> np.ndarray:
            return draw.integers(0, 2, size, np.int8) * np.int8(2) - np.int8(1)

        first = signs()
        patterns = {name: drawn(np.exp2(uniform()), signs()) for name in ("q", "q2")}
        patterns["r"] = drawn(np.exp2(uniform()), first)
        # Gradients that follow go against the first: signs of averages depend on sizes.
        patterns["r2"] = drawn(np.exp2(uniform()), -first)
        patterns["h"] = drawn(
            np.float32(10) ** (np.float32(4.5) * uniform() - np.float32(3.5)), signs()
        )
        patterns["sign"] = np.sign(patterns["r"])
        # The halves of "r": entries of both are in each leaf, and in a leaf of one in either.
        half = draw.integers(0, 2, size, np.int8)
        for end, count in zip(self.ends, self.sizes, strict=True):
            if count > 1 and np.ptp(half[end - count : end]) == 0:
                half[end - 1] ^= 1
        patterns["ra"], patterns["rb"] = patterns["r"] * half, patterns["r"] * (1 - half)
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in self.shapes)
        own = [] if abstract else zip(self.shapes, self.floating, strict=True)
        own = [np.asarray(leaf).ravel() for leaf, yes in own if yes]
        patterns["own"] = np.concatenate(own) if own else patterns["q2"]
        kind = np.result_type(np.float32, *wide)
        return {name: pattern.astype(kind) for name, pattern in patterns.items()}

    def _chosen(self, size: int) -> np.ndarray:
        some = int(np.clip(SAMPLES // len(self.shapes), 32, 256))
        if size <= some:
            return np.arange(size)
        # With replacement, as a permutation of a large leaf takes long.
        return np.unique(self.draw.integers(0, size, some))

    def sampled(self, name: str) -> list[np.ndarray]:
        """A pattern as a gradient of which the entries are taken that a run returns."""
        return [x[0] for x in self._sampled(self._tree([{name: 1.0}] * self.lanes))]

    def _sampled(self, tree: Any) -> list[np.ndarray]:
        out = []
        for i, x in enumerate(self.treedef.flatten_up_to(tree)):
            if not self.floating[i]:
                out.append(np.zeros((self.lanes, 0)))
                continue
            few = np.asarray(x).reshape(self.lanes, -1)[:, self.chosen[i]]
            if np.iscomplexobj(few):
                few = np.concatenate([np.real(few), np.imag(few)], axis=1)
            out.append(few.astype(np.float64))
        return out


@contextmanager
def passed_on(function: str) -> Iterator[None]:
    """Says of an error in the transformation where it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"jaxreg.explain called tx.{function}: extra arguments that tx.update needs, such as "
            "value=..., are given to explain by name."
        )
        raise


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _scale(x: np.ndarray) -> float:
    """The root mean square, in whose units weights are drawn; 1 where there are only zeros."""
    size = float(np.sqrt(np.mean(np.abs(x.astype(np.complex128)) ** 2))) if x.size else 0.0
    return size if np.isfinite(size) and size > 0 else 1.0
