"""Models that really shrink: units that are zero, or that nothing reads, are removed.

`compress` traces the model once and follows each axis of each array through it (see `axes`): a
layer's outputs are the next one's inputs, a residual sum ties two layers together, a reshape to
heads splits an axis. An index of such a common axis can go where each product that sums over it
has a zero there, so that the outputs stay what they were; where a unit is constant (a zero filter
behind its bias and a normalization) it goes into the next bias.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxreg import _check
from jaxreg import where as _where
from jaxreg.compression.agreement import Reference
from jaxreg.compression.axes import Program
from jaxreg.compression.features import (
    at_widths_of_weights,
    is_of,
    refuse_methods,
    set_features,
    values_of_attention,
)
from jaxreg.compression.flat import is_readable, wide
from jaxreg.compression.removal import Leaves, Removal, Units

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A compressed model, and what it saves.

    Attributes:
        model: the smaller model or parameters, of the kind that was given.
        shapes: the old and the new shape of each leaf that shrank, by its path.
        parameters: their number before and after.
        flops: the floating-point operations of one call on the inputs given, before and after,
            by XLA's count; NaN where it has none.
        seconds: of one call, before and after: the medians of alternating jitted calls. NaN where
            the smaller model can not be called.
        difference: the largest difference of an element of an output, over the largest element of
            that output. NaN where it is unverified.
        unverified: why the outputs of the smaller model are not known to be the same; empty where
            they are.
        kept: for the path of each weight with zero units that stayed, their number and why.

    >>> import jax, jax.numpy as jnp, jaxreg
    >>> params = {"first": jnp.array([[1.0, 0.0], [2.0, 0.0]]), "second": jnp.ones((2, 3))}
    >>> normalized = lambda p, x: jax.nn.softmax(x @ p["first"]) @ p["second"]
    >>> jaxreg.compress(normalized, params, jnp.ones((4, 2))).kept
    {'first': '1 zero unit: a sum or maximum over them, as in layer normalization or softmax'}
    """

    model: Any
    shapes: Mapping[str, tuple[Shape, Shape]]
    parameters: tuple[int, int]
    flops: tuple[float, float]
    seconds: tuple[float, float]
    difference: float
    kept: Mapping[str, str]
    unverified: str

    @property
    def speed_up(self) -> float:
        """How many times as fast the compressed model was."""
        return self.seconds[0] / self.seconds[1]

    def __str__(self) -> str:
        lines = [f"{path}: {old} -> {new}" for path, (old, new) in self.shapes.items()]
        lines += [f"kept {path}: {why}" for path, why in self.kept.items()]
        if not lines:
            lines.append("nothing to remove: no zero units")
        (p0, p1), (f0, f1) = self.parameters, self.flops
        lines.append(f"parameters: {p0:,} -> {p1:,} ({p1 / max(p0, 1):.1%})")
        if self.shapes and not np.isnan(self.flops).any():
            lines.append(f"FLOPs: {f0:,.0f} -> {f1:,.0f} ({f1 / max(f0, 1):.1%})")
        if self.shapes and not np.isnan(self.seconds).any():
            lines.append(f"speed-up: {self.speed_up:.2f}")
        if self.unverified:
            lines.append(f"not verified: {self.unverified}")
        return "\n".join(lines)


def compress(
    model: Any, *inputs: Any, tolerance: float = 1e-6, rounds: int = 20, strict: bool = True
) -> Compressed:
    r"""Removes the units of a model that are zero or that nothing reads.

    For a Flax NNX model, ``compress(model, x)``; for a function of parameters, such as the
    ``apply`` of a Linen model, ``compress(apply, params, x)``. Followed are dense layers,
    convolutions, batch normalization as in evaluation, elementwise functions, pooling, residual
    sums, reshapes, attention heads and embeddings. An axis of the inputs or outputs keeps its
    length, and so does one that is summed over as such (layer normalization, softmax).

    A group penalty on a kernel's outputs makes such units; with a `jaxreg.Joint` on kernel and
    bias they are zero, without it they are constants, which go into the next layer's bias where
    there is one and no padding lies between. Zero units that stay are listed in ``kept``.

    The outputs are compared on the inputs given, and on these with noise of their scale: each
    array relative to its largest element, and where the model computes in fewer bits than 32, in
    float32 too. Where they differ or the model's own code fails, the axes to blame keep their
    length and are listed in ``kept`` too; it is an error where nothing else can go.

    A Linen model must be built anew with the new numbers of features, which ``shapes`` holds, to
    be applied to the smaller parameters. Here each of its layers is called with the features of
    its weights; what a module makes of a width that is its own attribute is not seen. A layer of
    your own, whose shapes Flax refuses, is called with zeros for what is gone: that can not show
    what its code makes of a width, so ``unverified`` says so and ``difference`` is NaN.

    Args:
        model: an NNX model that is called with the inputs alone (in evaluation), or a function.
        *inputs: an example, with its batch axis; for a function the parameters first, a tree.
            Arrays of real numbers or truth values in it shrink; complex ones and Python's
            numbers stay what they are.
        tolerance: the largest difference of an output, relative to its largest element; 16
            roundings of the model's dtype, of float32 at least, are accepted too.
        rounds: calls that are timed of each of the two.
        strict: where a zero unit passes through an operation that is not followed, such as a
            recurrent layer: an error, or with False it stays and is listed in ``kept``.

    Returns:
        A `Compressed`.

    Raises:
        ArgumentError: a `ValueError`, where a zero unit passes through an operation that is not
            followed (the error names both); where all that could go makes the model fail or
            gives other outputs, or the model gives other outputs at each call; for a module of
            Linen or a method of a model, where another function is meant; for parameters without
            arrays; inside of ``jit`` or ``grad``. Nothing is changed.

    >>> import jax.numpy as jnp, jaxreg
    >>> params = {"first": jnp.array([[1.0, 0.0], [2.0, 0.0]]), "second": jnp.ones((2, 3))}
    >>> apply = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
    >>> small = jaxreg.compress(apply, params, jnp.ones((4, 2)))
    >>> small.shapes
    {'first': ((2, 2), (2, 1)), 'second': ((2, 3), (1, 3))}
    """
    tolerance = _check.nonnegative("tolerance", tolerance)
    rounds = _check.whole_number("rounds", rounds, 1)
    refuse_methods(model)
    settings = _Settings(tolerance, rounds, strict)
    if is_of(model, "flax.nnx"):
        return _compress_nnx(model, inputs, settings)
    if not callable(model) or not inputs:
        accepted = "an NNX model and its inputs, or a function, its parameters and its inputs"
        raise _check.ArgumentError("model", _check.describe(model), accepted)
    params, *rest = inputs
    return _smaller(_Model(model, params), tuple(rest), settings, {})


@dataclasses.dataclass(frozen=True)
class _Settings:
    tolerance: float
    rounds: int
    strict: bool


def _compress_nnx(model: Any, inputs: tuple[Any, ...], settings: _Settings) -> Compressed:
    from flax import nnx

    graphdef, state = nnx.split(model)

    def merged(state: Any) -> Any:
        module = nnx.merge(graphdef, state)
        for _, part in nnx.iter_graph(module):
            set_features(part)
        return module

    def apply(state: Any, *inputs: Any) -> Any:
        return merged(state)(*inputs)

    function = _Model(apply, state)
    # Its code asks for it, though the axes of the traced function do not tell.
    why = "attention, whose values are as long as its keys"
    held = dict.fromkeys(values_of_attention(model, function.names), why)
    small = _smaller(function, inputs, settings, held)
    return dataclasses.replace(small, model=merged(small.model))


# Finding what can go -----------------------------------------------------------------------------


class _Model:
    """A function of the arrays of its parameters; what else these hold is kept as it is."""

    def __init__(self, apply: Callable[..., Any], params: Any):
        _refuse_tracers(params)
        self.apply, self.params = apply, params
        own, self._treedef = jax.tree.flatten(params)
        self._own = own
        self._numbers = [i for i, leaf in enumerate(own) if _can_shrink(leaf)]
        self.names = [_where.paths(params)[i] for i in self._numbers]
        self.leaves = [np.asarray(own[i]) for i in self._numbers]
        if not self.leaves:
            accepted = "an NNX model and its inputs, or a function, its parameters and its inputs"
            raise _check.ArgumentError("model", "parameters without arrays", accepted)

    def with_leaves(self, leaves: Any) -> Any:
        """The parameters with other arrays."""
        new = dict(zip(self._numbers, leaves, strict=True))
        return self._treedef.unflatten([new.get(i, leaf) for i, leaf in enumerate(self._own)])

    def rounded(self, leaves: Leaves) -> Leaves:
        """Arrays in the dtypes of the leaves."""
        return [new.astype(own.dtype) for new, own in zip(leaves, self.leaves, strict=True)]

    def smaller(self, leaves: Leaves) -> Any:
        """The parameters with smaller arrays; what did not change is the same array."""
        pairs = zip(self.leaves, leaves, (self._own[i] for i in self._numbers), strict=True)
        return self.with_leaves(
            [given if np.array_equal(a, b) else jnp.asarray(b) for a, b, given in pairs]
        )

    def __call__(self, leaves: Any, *inputs: Any) -> Any:
        return self.apply(self.with_leaves(leaves), *inputs)


def _refuse_tracers(tree: Any) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        accepted = "arrays that can be read: call compress outside of jit, grad and vmap"
        raise _check.ArgumentError("model", "a traced array", accepted)


def _can_shrink(leaf: Any) -> bool:
    return np.ndim(leaf) > 0 and hasattr(leaf, "dtype") and is_readable(leaf.dtype)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A removal and what is wrong with it."""

    removal: Removal
    function: Callable[..., Any] | None  # that takes the smaller arrays
    difference: float
    wrong: str


def _smaller(
    model: _Model, inputs: tuple[Any, ...], settings: _Settings, held: Mapping[str, str]
) -> Compressed:
    """The model without what can go; of some leaves the last axis is held, and why."""
    _refuse_tracers(inputs)
    program = Program(model, model.leaves, inputs)
    for name, why in held.items():
        program.hold(model.names.index(name), -1, why)
    units = Units(program, model.names, [leaf.astype(wide(leaf.dtype)) for leaf in model.leaves])
    if settings.strict:
        units.refuse_what_is_not_followed()
    reference = Reference(model, program, model.leaves, inputs, settings.tolerance)

    def tried(atoms: Collection[int]) -> _Trial:
        removal = units.removed(atoms)
        # Linen refuses other shapes than a module was built with. Its layers take them; for those
        # that do not, the old shapes with zeros for what goes must give the same outputs.
        wrong = ""
        for function, leaves in (
            (model, removal.cut),
            (at_widths_of_weights(model), removal.cut),
            (None, removal.zeroed),
        ):
            try:
                found = reference.compared(function or model, model.rounded(leaves), leaves)
                return _Trial(removal, function, *found)
            except Exception as error:  # whatever a model's own checks raise
                wrong = "fails: " + str(error).partition("\n")[0]
                if type(error).__name__ != "ScopeParamShapeError":
                    break
        return _Trial(removal, None, float("inf"), wrong)

    if tried(()).wrong:
        given = "one that gives other outputs for the same inputs"
        raise _check.ArgumentError("model", given, "a function of its parameters and inputs alone")
    trial = tried(units.free)
    failed: dict[int, tuple[np.ndarray, str]] = {}
    if trial.wrong:
        first, (trial, failed) = trial, _largest_that_works(tried, units.free)
        if not trial.removal.masks:
            raise _refused(model, first)
    small = _measured(model, trial, inputs, settings.rounds, units.kept(trial.removal, failed))
    if reference.holds_nan:
        why = "outputs hold NaN, which is not compared"
        return dataclasses.replace(small, difference=float("nan"), unverified=why)
    return small


def _largest_that_works(
    tried: Callable[[Collection[int]], _Trial], atoms: list[int]
) -> tuple[_Trial, dict[int, tuple[np.ndarray, str]]]:
    """What can go of as many atoms as work together; for each other one what would go, and why not.

    Bisection: atoms that do not work with those that do are halved, until one is to blame.
    """
    good: list[int] = []
    best, failed = tried(good), {}
    pending = [atoms] if atoms else []
    while pending:
        some = pending.pop()
        trial = tried([*good, *some])
        if not trial.wrong:
            good, best = [*good, *some], trial
        elif len(some) == 1:
            failed[some[0]] = trial.removal.masks[some[0]], f"with fewer, the model {trial.wrong}"
        else:
            half = len(some) // 2
            pending += [some[half:], some[:half]]
    return best, failed


def _refused(model: _Model, trial: _Trial) -> _check.ArgumentError:
    triples = zip(model.names, model.leaves, trial.removal.cut, strict=True)
    shrunk = [name for name, old, new in triples if old.shape != new.shape]
    more = f" and {len(shrunk) - 3} more" if len(shrunk) > 3 else ""
    given = f"one that, with smaller {', '.join(shrunk[:3])}{more}, {trial.wrong}"
    accepted = (
        "a model without widths written into its code (a reshape or a division by a number of "
        "units); GroupNorm keeps its groups' size"
    )
    return _check.ArgumentError("model", given, accepted)


_REFUSED_BY_FLAX = "Flax refuses the new widths until the module is built with them"


# Measuring ---------------------------------------------------------------------------------------


def _measured(
    model: _Model, trial: _Trial, inputs: tuple[Any, ...], rounds: int, kept: Mapping[str, str]
) -> Compressed:
    old, new = model.leaves, model.rounded(trial.removal.cut)
    triples = zip(model.names, old, new, strict=True)
    shapes = {name: (a.shape, b.shape) for name, a, b in triples if a.shape != b.shape}
    small = model.smaller(new)
    error, unverified = trial.difference, ""
    flops = seconds = float("nan"), float("nan")
    if trial.function is None:
        error, unverified = float("nan"), _REFUSED_BY_FLAX
    else:
        before, after = (
            jax.jit(function).lower(own, *inputs).compile()
            for function, own in ((model, old), (trial.function, new))
        )
        flops = _flops(before), _flops(after)
        times: tuple[list[float], list[float]] = [], []
        for _ in range(rounds + 1):
            for call, leaves, own in ((before, old, times[0]), (after, new, times[1])):
                started = time.perf_counter()
                jax.block_until_ready(call(leaves, *inputs))
                own.append(time.perf_counter() - started)
        first, second = (float(np.median(own[1:])) for own in times)
        seconds = first, second
    counts = _count(model.params), _count(small)
    return Compressed(small, shapes, counts, flops, seconds, error, kept, unverified)


def _count(params: Any) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    return sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))


def _flops(compiled: Any) -> float:
    found = compiled.cost_analysis() or {}
    found = found[0] if isinstance(found, list) else found
    return float(found.get("flops", float("nan")))
