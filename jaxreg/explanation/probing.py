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

from jaxreg import where
from jaxreg.explanation.running import runner

Mix = dict[str, Any]
"""Factors of patterns: a number, or one for each leaf."""
Step = tuple[Mix, Mix]
Sequences = Mapping[Any, Sequence[Step]]

COUNTERS = ("count", "step", "steps", "gradient_step", "step_count", "iteration", "iterations")
MEMORY = 2**30  # bytes of probes at a time
COPIES = 12  # trees of the weights' size that one probe of an optimizer takes
LANES = 16
SAMPLES = 256  # entries of a leaf that are looked at
MICRO_STEPS = 64


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
        abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in self.shapes)
        self.patterns = {name: self._patterns(name) for name in ("q", "q2", "r", "r2", "h")}
        self.patterns["own"] = self.patterns["q2"] if abstract else self._own()
        self.patterns["sign"] = [np.sign(x) for x in self.patterns["r"]]
        self.scales = [_scale(x) for x in self.patterns["own"]]
        self.own = self.treedef.unflatten(
            [jnp.asarray(self._mixed(i, {"own": 1.0})) for i in range(len(self.shapes))]
        )
        self.chosen = [self._chosen(math.prod(leaf.shape)) for leaf in self.shapes]
        width = sum(math.prod(leaf.shape) * max(4, leaf.dtype.itemsize) for leaf in self.shapes)
        self.lanes = int(np.clip(MEMORY // max(1, COPIES * width), 1, LANES))
        self.loops = False
        self._runners: dict[Any, Callable[..., Any]] = {}
        with passed_on("init"):
            self.initial = self.tx.init(self.own)
        self.micro_steps = 1
        self.set_step(step)

    def set_step(self, step: int) -> None:
        """Sets the step counters of the state that sequences start from."""
        self.start = with_step(self.initial, step)
        self.micro_steps = self._micro_steps(step)

    def run(self, sequences: Sequences) -> dict[Any, Probed]:
        """The updates of each sequence; all of them have the same number of steps."""
        names, out = list(sequences), {}
        for first in range(0, len(names), self.lanes):
            now = names[first : first + self.lanes]
            padded = [sequences[n] for n in now] + [sequences[now[0]]] * (self.lanes - len(now))
            weights, updates = self._run(padded)
            for lane, name in enumerate(now):
                out[name] = Probed(
                    [[x[lane] for x in step] for step in weights],
                    [[x[lane] for x in step] for step in updates],
                )
        return out

    def one(self, step: Step) -> tuple[Any, Any]:
        """The updates and the state after one call of ``update``, as they are."""
        grads, weights = (self._tree(mix) for mix in step)
        with passed_on("update"):
            return self.tx.update(grads, self.start, weights, **self.extra_args)

    def _run(self, sequences: list[Sequence[Step]]) -> tuple[list[Any], list[Any]]:
        lanes = len(sequences)
        state = jax.tree.map(
            lambda x: jnp.broadcast_to(jnp.asarray(x), (lanes, *jnp.shape(x))), self.start
        )
        seen_weights, seen_updates = [], []
        for number in range(len(sequences[0])):
            grads, weights = (
                self._stacked([sequence[number][part] for sequence in sequences]) for part in (0, 1)
            )
            updates = None
            for _ in range(self.micro_steps):
                updates, state = self._update(grads, state, weights)
            seen_weights.append(self._sampled(weights))
            seen_updates.append(self._sampled(updates))
        return seen_weights, seen_updates

    def _update(self, grads: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        args = grads, state, weights

        def update(g: Any, s: Any, p: Any) -> tuple[Any, Any]:
            return self.tx.update(g, s, p, **self.extra_args)

        if not self.loops:
            shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(args)]
            key = (jax.tree.structure(args), tuple(map(str, shapes)))
            try:
                if key not in self._runners:
                    self._runners[key] = runner(jax.vmap(update), *args)
                return self._runners[key](*args)
            except Exception:  # one that can't be batched, for whatever reason
                self.loops = True
        with passed_on("update"):
            each = [update(*jax.tree.map(lambda x: x[i], args)) for i in range(self.lanes)]  # noqa: B023
        return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *each)

    def _micro_steps(self, step: int) -> int:
        """The number of calls until there is an update: of gradients that are accumulated.

        What accumulates counts: where no whole number but the step changes, nothing will come.
        """
        state = self.start
        grads, weights = self._tree({"r": 1.0}), self._tree({"q": 1.0})
        for number in range(1, MICRO_STEPS + 1):
            with passed_on("update"):
                updates, after = self.tx.update(grads, state, weights, **self.extra_args)
            if any(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates)):
                return number
            after = with_step(after, step)
            if _whole_numbers(after) == _whole_numbers(state):
                return 1
            state = after
        return 1

    def _tree(self, mix: Mix) -> Any:
        return self.treedef.unflatten([jnp.asarray(self._mixed(i, mix)) for i in self._indices()])

    def _stacked(self, mixes: list[Mix]) -> Any:
        return self.treedef.unflatten(
            [jnp.asarray(np.stack([self._mixed(i, m) for m in mixes])) for i in self._indices()]
        )

    def _indices(self) -> range:
        return range(len(self.shapes))

    def _mixed(self, i: int, mix: Mix) -> np.ndarray:
        """The sum of patterns for leaf i; whole numbers and keys keep their value."""
        shape, dtype = self.shapes[i].shape, self.shapes[i].dtype
        if not self.floating[i]:
            own = self.shapes[i]
            return np.zeros(shape, dtype) if isinstance(own, jax.ShapeDtypeStruct) else own
        total = np.zeros(shape, np.complex64 if _is_complex(dtype) else np.float32)
        for name, factor in mix.items():
            number = np.float32(np.asarray(factor).flat[i if np.ndim(factor) else 0])
            pattern = self.patterns[name][i]
            # A product of 1 and the weights themselves is the weights themselves.
            total = total + pattern * (number if name != "own" or number != 1 else 1)
        return np.asarray(total).astype(dtype)

    def _patterns(self, name: str) -> list[np.ndarray]:
        made = []
        for i, (leaf, floating) in enumerate(zip(self.shapes, self.floating, strict=True)):
            if not floating:
                made.append(np.zeros(0, np.float32))
                continue
            sizes = self.draw.uniform(-1, 1, leaf.shape).astype(np.float32)
            sizes = 10.0 ** (4.5 * sizes - 3.5) if name == "h" else 2.0**sizes
            signs = self.draw.integers(0, 2, leaf.shape) * 2 - 1
            # Gradients that follow go against the first: signs of averages depend on sizes.
            signs = -np.sign(np.real(self.patterns["r"][i])) if name == "r2" else signs
            pattern = (sizes * signs).astype(np.float32)
            made.append(pattern * np.complex64(1 + 0.5j) if _is_complex(leaf.dtype) else pattern)
        if name == "r":
            self.patterns = {"r": made}
        return made

    def _own(self) -> list[np.ndarray]:
        pairs = zip(self.shapes, self.floating, strict=True)
        return [np.asarray(leaf) if yes else np.zeros(0) for leaf, yes in pairs]

    def _chosen(self, size: int) -> np.ndarray | None:
        if size <= SAMPLES:
            return None
        return np.sort(self.draw.choice(size, SAMPLES, replace=False))

    def _sampled(self, tree: Any) -> list[np.ndarray]:
        out = []
        for i, x in enumerate(self.treedef.flatten_up_to(tree)):
            if not self.floating[i]:
                out.append(np.zeros((self.lanes, 0)))
                continue
            flat, chosen = x.reshape(x.shape[0], -1), self.chosen[i]
            few = np.asarray(flat if chosen is None else jnp.take(flat, chosen, axis=1))
            if np.iscomplexobj(few):
                few = np.concatenate([np.real(few), np.imag(few)], axis=1)
            out.append(few.astype(np.float64))
        return out


def with_step(state: Any, step: int) -> Any:
    """A state whose step counters, by their names, are at `step`; of micro-steps they stay."""
    leaves, treedef = jax.tree.flatten(state)
    names = where.paths(state)

    def at(name: str, leaf: Any) -> Any:
        counts = name.rpartition("/")[2].lower() in COUNTERS and jnp.shape(leaf) == ()
        if not counts or not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            return leaf
        return jnp.asarray(step, jnp.result_type(leaf))

    return treedef.unflatten([at(*pair) for pair in zip(names, leaves, strict=True)])


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


def _whole_numbers(state: Any) -> list[Any]:
    kept = []
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.integer) and jnp.size(leaf) == 1:
            kept.append(int(np.asarray(leaf).item()))
    return kept


def _is_complex(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)


def _scale(x: np.ndarray) -> float:
    """The root mean square, in whose units weights are drawn; 1 where there are only zeros."""
    size = float(np.sqrt(np.mean(np.abs(x.astype(np.complex128)) ** 2))) if x.size else 0.0
    return size if np.isfinite(size) and size > 0 else 1.0
