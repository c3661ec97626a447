r"""optax's own names and signatures, right in every precision.

::

    from jaxreg.compat.optax import clip_by_global_norm  # was: from optax import ...

On ordinary float32 values all of these give what optax gives. Elsewhere they differ, and each
docstring says how. For all of them: sums are accumulated in float32 at least and rounded once;
squares may over- or underflow; updates keep their dtype, whatever that of the limit or strength;
integers count as float32; 0 is a limit like any other, and negative ones and NaN are refused.

States are empty, as optax's are, but for the step count of a schedule. The clips of ``jaxreg``
itself count in theirs what they saw (`jaxreg.metrics`), have a policy for what is not finite, and
an ``axis_name`` for ``shard_map``, without which a norm is that of the device's own pieces, here as
in optax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg import _check, _tree, norms, where
from jaxreg import groups as _groups
from jaxreg.compat import _numbers
from jaxreg.compat._labels import smooth_labels
from jaxreg.compat._numbers import Axes, Number
from jaxreg.compat._per_example import per_example_global_norm_clip, per_example_layer_norm_clip
from jaxreg.transforms.clip import shrinking, times

__all__ = [
    "adaptive_grad_clip",
    "add_decayed_weights",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "global_norm",
    "keep_params_nonnegative",
    "per_example_global_norm_clip",
    "per_example_layer_norm_clip",
    "smooth_labels",
    "unitwise_clip",
    "unitwise_norm",
]

PyTree = Any


def __dir__() -> list[str]:
    return __all__


def global_norm(updates: PyTree) -> jax.Array:
    """The Euclidean norm of every entry of a tree: `jaxreg.global_norm`.

    Differs from optax's: 1,000 bf16 leaves sum up right; [300, 300] in f16 is no infinity, and
    1e-30 in f32 not 0; the gradient at 0 is 0.

    Args:
        updates: a tree of numbers or arrays.

    Returns:
        A scalar, float32, or float64 where a leaf holds 64-bit floats.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> float(compat.global_norm(jnp.array([300.0, 400.0], jnp.float16)))
    500.0
    """
    return norms.global_norm(jax.tree.map(_numbers.floating, updates))


def unitwise_norm(x: jax.Array, axis: Axes = None) -> jax.Array:
    """The Euclidean norm of each unit, at each of its entries.

    Differs from optax's: as `global_norm` does.

    Args:
        x: an array.
        axis: the axes that a unit runs along. By default an array with at most one axis longer
            than 1 is one unit; else all axes but the last, of three axes the first alone.

    Returns:
        An array of x's shape, float32 at least.

    Raises:
        ValueError: where there is no default (six axes and more), or no such axis.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> compat.unitwise_norm(jnp.array([[3.0, 3e20], [4.0, 4e20]]))
    Array([[5.e+00, 5.e+20],
           [5.e+00, 5.e+20]], dtype=float32)
    """
    x = _numbers.floating(x)
    units = _units(axis, x.shape)
    found = units.direction(jnp.abs(_tree.widen(x)))[0]
    return jnp.broadcast_to(units.spread(found), x.shape)


def _units(axis: Axes, shape: tuple[int, ...]) -> _groups.Grouping:
    rank = len(shape)
    if axis is not None:
        return _groups.axes(*_numbers.axes_of(axis, shape)).of(shape)
    if sum(length != 1 for length in shape) <= 1:
        return _groups.whole.of(shape)
    if rank > 5:
        given, accepted = f"None, for shape {shape}", "the axes of a unit, beyond five axes"
        raise _check.ArgumentError("axis", given, accepted)
    return (_groups.axes(0) if rank == 3 else _groups.units).of(shape)


def clip(max_delta: Number) -> optax.GradientTransformation:
    """Cuts each entry of the update to the size `max_delta`: `jaxreg.clip_by_value`.

    Differs from optax's: complex entries are cut in size, and keep their direction.

    Args:
        max_delta: a number >= 0, or a traced scalar.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> u = jnp.array([0.5, -3.0], jnp.bfloat16)
    >>> compat.clip(jnp.float32(1.0)).update(u, None)[0].tolist()
    [0.5, -1.0]
    """
    max_delta = _numbers.limit("max_delta", max_delta)

    def cut(x: Any) -> jax.Array:
        x = _numbers.floating(x)
        if jnp.iscomplexobj(x):
            return times(x, shrinking(jnp.abs(x), max_delta))
        most = jnp.asarray(max_delta).astype(x.dtype)
        return jnp.clip(x, -most, most)

    return optax.stateless(lambda updates, params: jax.tree.map(cut, updates))


def clip_by_global_norm(max_norm: Number) -> optax.GradientTransformation:
    """Scales the updates down to the global norm `max_norm`: `jaxreg.clip_by_global_norm`.

    Differs from optax's: squares that overflow do not zero the update; ``max_norm=0`` gives 0 for
    a zero gradient; a float32 limit goes with bf16 updates, and integers go, too.

    Args:
        max_norm: a number >= 0, or a traced scalar.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> huge = jnp.array([3e30, 4e30])
    >>> [round(float(u), 6) for u in compat.clip_by_global_norm(1.0).update(huge, None)[0]]
    [0.6, 0.8]
    """
    max_norm = _numbers.limit("max_norm", max_norm)

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        del params
        coefficient = shrinking(global_norm(updates), max_norm)
        return jax.tree.map(lambda u: times(_numbers.floating(u), coefficient), updates), state

    return optax.GradientTransformation(_no_state, update)


def clip_by_block_rms(threshold: Number) -> optax.GradientTransformation:
    """Scales each leaf down to the root mean square `threshold`: `jaxreg.clip_update_rms`.

    Differs from optax's: as `clip_by_global_norm` does.

    Args:
        threshold: a number >= 0, or a traced scalar.

    >>> import jax, jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> u = {"a": jnp.array([1.0, 7.0]), "b": jnp.zeros(2)}
    >>> [[round(float(x), 6) for x in leaf] for leaf in
    ...  jax.tree.leaves(compat.clip_by_block_rms(2.5).update(u, None)[0])]
    [[0.5, 3.5], [0.0, 0.0]]
    """
    threshold = _numbers.limit("threshold", threshold)

    def scaled(u: Any) -> jax.Array:
        u = _numbers.floating(u)
        return times(u, shrinking(norms.rms(u), threshold))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        del params
        return jax.tree.map(scaled, updates), state

    return optax.GradientTransformation(_no_state, update)


def adaptive_grad_clip(
    clipping: Number, eps: Number = 1e-3, axis: Axes = None
) -> optax.GradientTransformation:
    """Each unit's update at most `clipping` times its weights' norm: `jaxreg.adaptive_clip`.

    Differs from optax's: as `clip_by_global_norm` does.

    Args:
        clipping: the largest ratio of the norms, a number >= 0, or a traced scalar.
        eps: the least norm of weights that counts, likewise.
        axis: the axes that a unit runs along, as in `unitwise_norm`.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> w, u = jnp.array([[3.0], [4.0]]), jnp.array([[0.0], [2.0]])
    >>> [round(float(x), 6) for x in compat.adaptive_grad_clip(0.1).update(u, None, w)[0].ravel()]
    [0.0, 0.5]
    """
    clipping, eps = _numbers.limit("clipping", clipping), _numbers.limit("eps", eps)
    _numbers.checked_axes(axis)

    def scaled(u: jax.Array, p: Any) -> jax.Array:
        units = _units(axis, u.shape)
        norm, weight = (units.norm(jnp.abs(_tree.widen(x))) for x in (u, _numbers.floating(p)))
        ratio, least = (jnp.asarray(number).astype(norm.dtype) for number in (clipping, eps))
        limit = ratio * jnp.maximum(weight.astype(norm.dtype), least)
        return unitwise_clip(units.spread(norm), units.spread(limit), u)

    return optax.stateless(lambda updates, params: _map(scaled, updates, params))


def unitwise_clip(
    g_norm: jax.Array, max_norm: jax.Array, grad: jax.Array, div_eps: Number = 1e-6
) -> jax.Array:
    """The gradient times ``max_norm / max(g_norm, div_eps)`` where its norm is not below the limit.

    Differs from optax's: norms need not have the gradient's shape or dtype, but fit them.

    Args:
        g_norm: the norm of each unit, in a shape that broadcasts with the gradient's.
        max_norm: its limit, likewise.
        grad: an array.
        div_eps: a number >= 0, or a traced scalar.

    Returns:
        An array of the gradient's shape and dtype.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> grad = jnp.array([3.0, 4.0], jnp.bfloat16)
    >>> compat.unitwise_clip(jnp.array([5.0]), jnp.array([2.5]), grad).tolist()
    [1.5, 2.0]
    """
    norm, limit = (_tree.widen(_numbers.floating(x)) for x in (g_norm, max_norm))
    limit = limit.astype(norm.dtype)
    least = jnp.asarray(_numbers.limit("div_eps", div_eps)).astype(norm.dtype)
    divisor = jnp.maximum(norm, least)
    inside = (norm < limit) | (divisor == 0)
    return times(
        _numbers.floating(grad), jnp.where(inside, 1, limit / jnp.where(inside, 1, divisor))
    )


def add_decayed_weights(
    weight_decay: Number | optax.Schedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Adds ``weight_decay`` times the parameters: `jaxreg.l2_decay` before the direction.

    After the learning rate, `jaxreg.weight_decay` has the sign and the rate right.

    Differs from optax's: bf16 updates stay so under a traced strength or a schedule; a mask
    function is always called with the parameters; a mask that ``inject_hyperparams`` took for a
    schedule is refused, where it would disable all decay; schedules go with any version of optax.

    Args:
        weight_decay: a finite number, a traced scalar, or a schedule.
        mask: a tree of bools, True for leaves to decay, which may be a prefix of the parameters'
            tree; a function of the parameters that gives one; or a selector. None for all leaves.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    Raises:
        ValueError: where weight_decay is not finite, or the mask is one bool or array.

    >>> import jax, jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> tx = compat.add_decayed_weights(0.1, mask={"kernel": True, "bias": False})
    >>> params = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0])}
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> {name: round(float(u.sum()), 6) for name, u in updates.items()}
    {'bias': 0.0, 'kernel': 0.2}
    """
    scheduled = _check.is_schedule(weight_decay)
    strength = weight_decay if scheduled else _check.finite("weight_decay", weight_decay)
    mask = where.as_selector(mask).mask if isinstance(mask, (where.Selector, str)) else mask
    if isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)):
        accepted = "a tree of bools, a function of params that gives one, or None for all leaves"
        accepted += ' (in optax.inject_hyperparams: static_args="mask")'
        raise _check.ArgumentError("mask", _check.describe(mask), accepted)

    def init(params: optax.Params) -> optax.OptState:
        count = jnp.zeros((), jnp.int32)
        return optax.ScaleByScheduleState(count) if scheduled else optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        params = _check.params_given(params)
        amount = strength
        if scheduled:
            amount = strength(state.count)
            state = state._replace(count=jnp.asarray(optax.safe_increment(state.count)))
        if isinstance(amount, float) and amount == 0:
            return updates, state  # without reading the parameters

        def add(u: jax.Array, p: Any) -> jax.Array:
            dtype = _tree.wide_dtype(u.dtype)
            decay = jnp.asarray(amount).astype(dtype) * jnp.asarray(p).astype(dtype)
            return (u.astype(dtype) + decay).astype(u.dtype)

        return _map(add, updates, params, _chosen(mask, params)), state

    return optax.GradientTransformation(init, update)


def _chosen(mask: Any, params: PyTree) -> PyTree:
    """A tree of bools like params, from a mask that may be a function or a prefix of it."""
    if mask is None:
        return jax.tree.map(lambda p: True, params)
    # A tree whose node is a callable module is no function.
    if callable(mask) and all(map(callable, jax.tree.leaves(mask))):
        mask = mask(params)
    return jax.tree.map(lambda yes, part: jax.tree.map(lambda p: bool(yes), part), mask, params)


def keep_params_nonnegative() -> optax.GradientTransformation:
    """Cuts updates so that parameters end at 0 where they would end below: a chain's last link.

    `jaxreg.NonNegative`, as a penalty of `jaxreg.regularize`, does so in any direction's metric.

    Differs from optax's: dtypes of updates and parameters may differ where JAX is told not to
    promote them; the update then has the wider of both, in which the parameter ends at 0 exactly.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    >>> import jax.numpy as jnp, jaxreg.compat.optax as compat
    >>> w, u = jnp.array([1.0, 1.0]), jnp.array([-3.0, -0.5])
    >>> compat.keep_params_nonnegative().update(u, None, w)[0].tolist()
    [-1.0, -0.5]
    """

    def kept(u: jax.Array, p: Any) -> jax.Array:
        p = _numbers.floating(p)
        dtype = u.dtype if u.dtype == p.dtype else _tree.widest_dtype([u, p])
        u, p = u.astype(dtype), p.astype(dtype)
        return jnp.where(p + u < 0, -p, u)

    return optax.stateless(lambda updates, params: _map(kept, updates, params))


def _no_state(params: optax.Params) -> optax.EmptyState:
    return optax.EmptyState()


def _map(
    function: Callable[..., jax.Array], updates: PyTree, params: PyTree, chosen: PyTree = None
) -> PyTree:
    """``function(u, p)`` for each leaf that is chosen; None stays None, whatever its parameter."""
    params = _check.params_given(params)
    chosen = jax.tree.map(lambda p: True, params) if chosen is None else chosen

    def at(u: Any, p: Any, yes: bool) -> Any:
        return function(_numbers.floating(u), p) if u is not None and yes else u

    return jax.tree.map(at, updates, params, chosen, is_leaf=lambda u: u is None)
