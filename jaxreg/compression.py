"""Models that really shrink: units that are zero, or that nothing reads, are removed.

`compress` traces the model once and follows each axis of each array through it (`jaxreg._axes`): a
layer's outputs are the next one's inputs, a residual sum ties two layers together, a reshape to
heads splits an axis. An index of such a common axis can go where each product that sums over it
has a zero there, so that the outputs stay what they were; where a unit is constant (a zero filter
behind its bias and a normalization) it goes into the next bias.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import _check
from jaxreg import where as _where
from jaxreg._axes import Program
from jaxreg._constants import Constants

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
        seconds: of one call, before and after: the medians of alternating jitted calls.
        difference: the largest difference of an output, over the largest output.
    """

    model: Any
    shapes: Mapping[str, tuple[Shape, Shape]]
    parameters: tuple[int, int]
    flops: tuple[float, float]
    seconds: tuple[float, float]
    difference: float

    @property
    def speed_up(self) -> float:
        """How many times as fast the compressed model was."""
        return self.seconds[0] / self.seconds[1]

    def __str__(self) -> str:
        lines = [f"{path}: {old} -> {new}" for path, (old, new) in self.shapes.items()]
        (p0, p1), (f0, f1) = self.parameters, self.flops
        lines.append(f"parameters: {p0:,} -> {p1:,} ({p1 / max(p0, 1):.1%})")
        lines.append(f"FLOPs: {f0:,.0f} -> {f1:,.0f} ({f1 / max(f0, 1):.1%})")
        return "\n".join([*lines, f"speed-up: {self.speed_up:.2f}"])


def compress(model: Any, *inputs: Any, tolerance: float = 1e-6, rounds: int = 20) -> Compressed:
    r"""Removes the units of a model that are zero or that nothing reads.

    For a Flax NNX model, ``compress(model, x)``; for a function of parameters, such as the
    ``apply`` of a Linen model, ``compress(apply, params, x)``. Followed are dense layers,
    convolutions, batch normalization as in evaluation, elementwise functions, pooling, residual
    sums, reshapes, attention heads and embeddings. An axis of the inputs or outputs keeps its
    length, and so does one that is summed over as such (layer normalization, softmax).

    A group penalty on a kernel's outputs makes such units; with a `jaxreg.Joint` on kernel and
    bias they are zero, without it they are constants, which go into the next layer's bias where
    there is one and no padding lies between.

    Args:
        model: an NNX model that is called with the inputs alone (in evaluation), or a function.
        *inputs: an example, with its batch axis; for a function the parameters first, a tree of
            arrays.
        tolerance: the largest difference of the outputs on the inputs given, relative to the
            largest output, beside rounding.
        rounds: calls that are timed of each of the two.

    Returns:
        A `Compressed`. A Linen model must be built anew with the new numbers of features, which
        ``shapes`` holds, to be applied to the smaller parameters; here it is not called with
        them where its own checks refuse them.

    Raises:
        ValueError: where a zero unit passes through an operation that is not followed (the error
            names both), or the smaller model fails or gives other outputs; nothing is changed.

    >>> import jax.numpy as jnp, jaxreg
    >>> params = {"first": jnp.array([[1.0, 0.0], [2.0, 0.0]]), "second": jnp.ones((2, 3))}
    >>> apply = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
    >>> small = jaxreg.compress(apply, params, jnp.ones((4, 2)))
    >>> small.shapes
    {'first': ((2, 2), (2, 1)), 'second': ((2, 3), (1, 3))}
    """
    if _is_nnx(model):
        return _compress_nnx(model, inputs, tolerance, rounds)
    if not callable(model) or not inputs:
        accepted = "an NNX model and its inputs, or a function, its parameters and its inputs"
        raise _check.ArgumentError("model", _check.describe(model), accepted)
    params, *rest = inputs
    small, difference, runs = _smaller(model, params, tuple(rest), tolerance)
    rounds = rounds if runs else 0
    return _measured(model, params, small, small, tuple(rest), rounds, difference)


def _is_nnx(model: Any) -> bool:
    return any(cls.__module__.startswith("flax.nnx") for cls in type(model).__mro__)


def _compress_nnx(model: Any, inputs: tuple[Any, ...], tolerance: float, rounds: int) -> Compressed:
    from flax import nnx

    graphdef, state = nnx.split(model)

    def merged(state: Any) -> Any:
        module = nnx.merge(graphdef, state)
        for _, part in nnx.iter_graph(module):
            _set_features(part)
        return module

    def apply(state: Any, *inputs: Any) -> Any:
        return merged(state)(*inputs)

    small, difference, _ = _smaller(apply, state, inputs, tolerance)
    return _measured(apply, state, small, merged(small), inputs, rounds, difference)


def _set_features(layer: Any) -> None:
    """Makes the numbers of features that a layer of NNX was built with those of its weights."""
    if hasattr(layer, "num_heads") and hasattr(layer, "query"):
        inputs, layer.num_heads, layer.head_dim = layer.query.kernel.shape
        layer.in_features, layer.qkv_features = inputs, layer.num_heads * layer.head_dim
        layer.out_features = layer.out.kernel.shape[-1]
        return
    kernel, own = getattr(layer, "kernel", None), getattr(layer, "in_features", None)
    if kernel is not None and isinstance(own, tuple):  # of several axes
        layer.in_features, layer.out_features = kernel.shape[: len(own)], kernel.shape[len(own) :]
    elif kernel is not None and own is not None:
        layer.in_features = kernel.shape[-2] * getattr(layer, "feature_group_count", 1)
        layer.out_features = kernel.shape[-1]
    if kernel is not None and hasattr(layer, "kernel_shape"):
        layer.kernel_shape = tuple(kernel.shape)
    scale = getattr(layer, "scale", None)
    if hasattr(layer, "num_features") and scale is not None:
        layer.num_features = scale.shape[-1]


# Finding what can go -----------------------------------------------------------------------------


def _smaller(
    apply: Callable[..., Any], params: Any, inputs: tuple[Any, ...], tolerance: float
) -> tuple[Any, float, bool]:
    """Smaller parameters with the same outputs, how far those differ, and whether they run."""
    floating, rebuild = _floating(params)
    names = [_where.paths(params)[i] for i in floating]
    leaves = [np.asarray(jax.tree.leaves(params)[i]) for i in floating]

    def run(leaves: Any, *inputs: Any) -> Any:
        return apply(rebuild(leaves), *inputs)

    expected = jax.jit(run)(leaves, *inputs)
    smaller = leaves
    while True:
        program = Program(run, smaller, inputs)
        constants = Constants(program)
        masks = _removable(constants, names)
        if not masks:
            break
        kept, smaller = _shrunk(constants, smaller, masks)
        try:
            found = jax.jit(run)(smaller, *inputs)
        except Exception as error:  # whatever a model's own checks raise
            if type(error).__name__ == "ScopeParamShapeError":
                # Linen refuses other shapes than the model was built with: the old ones, with
                # zeros for what goes, must give the same outputs.
                found = jax.jit(run)(kept, *inputs)
                small = rebuild([jnp.asarray(leaf) for leaf in smaller])
                return small, _checked(expected, found, tolerance, names, leaves, smaller), False
            raise _unfollowed(names, leaves, smaller, f"fails: {error}") from error
        _checked(expected, found, tolerance, names, leaves, smaller)
    difference = _difference(expected, jax.jit(run)(smaller, *inputs))
    return rebuild([jnp.asarray(leaf) for leaf in smaller]), difference, True


def _checked(
    expected: Any,
    found: Any,
    tolerance: float,
    names: list[str],
    leaves: list[np.ndarray],
    smaller: list[np.ndarray],
) -> float:
    """The difference of the outputs, where it is small."""
    difference = _difference(expected, found)
    if not difference <= max(tolerance, 16 * _eps(expected)):
        what = f"gives outputs that differ by {difference:.1e}"
        raise _unfollowed(names, leaves, smaller, what)
    return difference


def _floating(params: Any) -> tuple[list[int], Callable[[Any], Any]]:
    """The numbers of the floating leaves, and how the tree is made again with others for them."""
    leaves, treedef = jax.tree.flatten(params)
    numbers = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.floating)]

    def rebuild(floating: Any) -> Any:
        own = dict(zip(numbers, floating, strict=True))
        return treedef.unflatten([own.get(i, leaf) for i, leaf in enumerate(leaves)])

    return numbers, rebuild


def _removable(known: Constants, names: list[str]) -> dict[int, np.ndarray]:
    """For each atom that can shrink, which of its indices can go."""
    program = known.program
    atoms, fixed = program.atoms, program.atoms.fixed()
    in_leaves = {a for number in program.leaves for a in program.in_atoms(number)}
    masks: dict[int, np.ndarray] = {}
    for contraction in known.contractions:
        for atom in contraction.atoms:
            left = known.along(contraction.left, atom, contraction.left_axes)
            right = known.along(contraction.right, atom, contraction.right_axes)
            gone = np.zeros(atoms.sizes[atom], bool)
            for vector in (left, right):
                if vector is not None:
                    gone |= vector == 0
            if left is not None and contraction.bias and contraction.folds:
                gone |= np.isfinite(left)
            masks[atom] = masks.get(atom, True) & gone
    for atom, (why, followed) in fixed.items():
        if not followed:
            _refuse_zero_units(known, names, atom, why)
    masks = {a: m for a, m in masks.items() if a in in_leaves and a not in fixed and m.any()}
    for mask in masks.values():
        if mask.all():
            mask[0] = False  # an axis keeps one index at least
    return {atom: mask for atom, mask in masks.items() if mask.any()}


def _refuse_zero_units(known: Constants, names: list[str], atom: int, why: str) -> None:
    program = known.program
    for name, number in zip(names, program.leaves, strict=True):
        own = program.in_atoms(number)
        if atom in own and len(own) > 1:
            vector = known.along(number, atom)
            zeros = 0 if vector is None else int((vector == 0).sum())
            if zeros:
                raise _check.ArgumentError(
                    "model",
                    f"{zeros} zero units in {name}, which pass through {why}",
                    "a model of dense layers, convolutions, normalizations and elementwise "
                    "functions between the units and their readers",
                )


def _shrunk(
    known: Constants, leaves: list[np.ndarray], masks: dict[int, np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The leaves with zeros for the indices that go, and without them.

    The constants that those gave are in the biases.
    """
    program = known.program
    changed = [np.array(leaf) for leaf in leaves]
    for contraction in known.contractions:
        if contraction.bias is None:
            continue
        own = [a for a in contraction.atoms if a in masks]
        weights = program.concrete[contraction.right]
        order = program.in_atoms(contraction.right)
        for atom in own:
            constants = known.along(contraction.left, atom)
            if constants is None:
                continue
            added = np.where(masks[atom] & np.isfinite(constants), constants, 0)
            split = weights.astype(np.float64).reshape([program.atoms.sizes[a] for a in order])
            moved = np.moveaxis(split, order.index(atom), 0)
            rest = [a for a in order if a != atom]
            total = np.tensordot(added, moved, 1)
            total = total.sum(tuple(i for i, a in enumerate(rest) if a not in contraction.free))
            free = [a for a in rest if a in contraction.free]
            leaf, sign = contraction.bias
            target = program.in_atoms(program.leaves[leaf])
            total = np.transpose(total, [free.index(a) for a in target])
            bias = changed[leaf]
            changed[leaf] = (bias + sign * total.reshape(bias.shape)).astype(bias.dtype)
    zeroed, shrunk = [], []
    for leaf, number in zip(changed, program.leaves, strict=True):
        axes = [program.atoms.expand(axis) for axis in program.axes[number]]
        atoms = [a for axis in axes for a in axis]
        whole = array = leaf.reshape([program.atoms.sizes[a] for a in atoms])
        for place, atom in enumerate(atoms):
            if atom in masks:
                gone = masks[atom].reshape([-1 if k == place else 1 for k in range(len(atoms))])
                whole = np.where(gone, np.zeros((), leaf.dtype), whole)
                array = np.compress(~masks[atom], array, axis=place)
        sizes = [
            int(
                np.prod([(~masks[a]).sum() if a in masks else program.atoms.sizes[a] for a in axis])
            )
            for axis in axes
        ]
        zeroed.append(whole.reshape(leaf.shape))
        shrunk.append(array.reshape(sizes))
    return zeroed, shrunk


# Checking and measuring --------------------------------------------------------------------------


def _difference(expected: Any, found: Any) -> float:
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True))
    scale = max((float(jnp.max(jnp.abs(a), initial=0)) for a, _ in pairs), default=0.0) or 1.0
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max((float(jnp.max(jnp.abs(a - b), initial=0)) for a, b in pairs), default=0.0) / scale


def _eps(outputs: Any) -> float:
    return max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(outputs)), default=0.0)


def _unfollowed(
    names: list[str], old: list[np.ndarray], new: list[np.ndarray], what: str
) -> _check.ArgumentError:
    shrunk = [n for n, a, b in zip(names, old, new, strict=True) if a.shape != b.shape]
    accepted = "a model whose outputs do not depend on its numbers of units but through its weights"
    return _check.ArgumentError(
        "model", f"one that, with smaller {', '.join(shrunk)}, {what}", accepted
    )


def _measured(
    apply: Callable[..., Any],
    params: Any,
    small: Any,
    model: Any,
    inputs: tuple[Any, ...],
    rounds: int,
    difference: float,
) -> Compressed:
    pairs = zip(_where.paths(params), jax.tree.leaves(params), jax.tree.leaves(small), strict=True)
    shapes = {n: (a.shape, b.shape) for n, a, b in pairs if a.shape != b.shape}
    counts = _count(params), _count(small)
    if not rounds:
        nan = float("nan")
        return Compressed(model, shapes, counts, (nan, nan), (nan, nan), difference)
    before, after = _compiled(apply, params, inputs), _compiled(apply, small, inputs)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds + 1):
        for call, tree, own in ((before, params, times[0]), (after, small, times[1])):
            started = time.perf_counter()
            jax.block_until_ready(call(tree, *inputs))
            own.append(time.perf_counter() - started)
    first, second = (float(np.median(own[1:])) for own in times)
    flops = _flops(before), _flops(after)
    return Compressed(model, shapes, counts, flops, (first, second), difference)


def _count(params: Any) -> int:
    leaves = jax.tree.leaves(params)
    return sum(x.size for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))


def _compiled(apply: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    return jax.jit(apply).lower(params, *inputs).compile()


def _flops(compiled: Any) -> float:
    found = compiled.cost_analysis() or {}
    found = found[0] if isinstance(found, list) else found
    return float(found.get("flops", float("nan")))
