"""What all clips share: coefficients, policies for what is not finite, and a state to be logged.

A clipped gradient is the gradient times a coefficient. XLA fuses the product into what follows, so
that the clipped gradient is never written to memory. The norms that a clip needs tell as well
whether the gradient is finite.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg import _check, _tree
from jaxreg.norms import AxisNames, bound_axes, norms_of_groups

OnNonfinite = Literal["propagate", "skip", "zero"]
POLICIES = get_args(OnNonfinite)


class ClipState(NamedTuple):
    """What a clip saw in the last step, and how often it acted; see `jaxreg.metrics`.

    Attributes:
        norm: the global norm before clipping, float32 (float64 for 64-bit parameters).
        clipped_norm: the global norm after it.
        coefficients: what the leaves were multiplied by: one scalar for all, or a vector of one
            for each leaf; of a clip by units the smallest. In [0, 1], 0 for a gradient that was
            skipped, and NaN where the norm is.
        count: the number of steps, int32.
        clipped: of steps that were clipped, int32; one that was skipped is none of them.
        nonfinite: of steps with an infinite norm or a NaN, int32.
        memory: what the clip keeps of earlier steps; () for most.
    """

    norm: jax.Array
    clipped_norm: jax.Array
    coefficients: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    clipped: jax.Array
    nonfinite: jax.Array
    memory: Any = ()

    @property
    def coefficient(self) -> jax.Array:
        """The smallest of the coefficients."""
        return jnp.min(self.coefficients, initial=1.0)


class NonfiniteState(NamedTuple):
    """What a clip that cuts entries keeps under "skip".

    Attributes:
        nonfinite: the number of steps with an infinity or a NaN, an int32 scalar.
    """

    nonfinite: jax.Array


class Seen(NamedTuple):
    """What a rule is given: the gradients, the parameters (None if not given), and its memory."""

    updates: optax.Updates
    params: optax.Params | None
    memory: Any
    norms: Callable[[Sequence[Sequence[jax.Array]]], jax.Array]
    """Norms of groups of leaves, as `jaxreg.norms.norms_of_groups` makes them."""

    @property
    def leaves(self) -> list[jax.Array]:
        """Of the gradients."""
        return jax.tree.leaves(self.updates)


class Clipped(NamedTuple):
    """What a rule gives: the coefficients, one scalar or one a leaf (or an array that broadcasts
    with it), the global norms before and after, and its memory.
    """

    coefficients: jax.Array | Sequence[jax.Array]
    norm: jax.Array
    clipped_norm: jax.Array
    memory: Any = ()


Rule = Callable[[Seen], Clipped]


def clip(
    rule: Rule,
    on_nonfinite: OnNonfinite,
    axis_name: AxisNames | None = None,
    *,
    memory: Callable[[Any], Any] = lambda params: (),
    per_leaf: bool = False,
    records: bool = True,
    needs_params: bool = False,
) -> optax.GradientTransformation:
    """A clip made of a rule.

    Args:
        rule: finds the coefficients.
        on_nonfinite: what is done where a norm is infinite or NaN.
        axis_name: mesh axes that leaves are sharded along, inside ``shard_map``.
        memory: the rule's memory before the first step, from the parameters.
        per_leaf: whether each leaf has a coefficient of its own.
        records: whether the coefficients are scalars, to be kept in the state.
        needs_params: whether the rule can't do without the parameters.
    """
    _check.choice("on_nonfinite", on_nonfinite, POLICIES)

    def init(params: optax.Params) -> ClipState:
        _tree.check_floating("params", params)
        leaves = jax.tree.leaves(params)
        dtype = _tree.widest_dtype(leaves)

        # An array for each number: one that is there twice could not be donated.
        def zero() -> jax.Array:
            return jnp.zeros((), jnp.int32)

        each = jnp.ones(len(leaves) if per_leaf and records else (), dtype)
        norms = jnp.zeros((), dtype), jnp.zeros((), dtype)
        return ClipState(*norms, each, zero(), zero(), zero(), memory(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipState]:
        if needs_params:
            _check.params_given(params)
        whole = with_frozen(updates, params)
        leaves, treedef = jax.tree.flatten(whole)
        if per_leaf and records and len(leaves) != state.coefficients.size:
            given, accepted = f"{len(leaves)} leaves", f"{state.coefficients.size}, as at init"
            accepted += " (for a leaf without a gradient, None, and update(grads, state, params))"
            raise _check.ArgumentError("updates", given, accepted)
        all_finite: list[jax.Array] = []

        def norms(groups: Sequence[Sequence[jax.Array]]) -> jax.Array:
            if on_nonfinite != "zero":
                return norms_of_groups(groups, axis_name)
            found, are_finite = norms_of_finite(groups, axis_name)
            all_finite.append(are_finite)
            return found

        found = rule(Seen(whole, params, state.memory, norms))
        # One norm serves the clip, the check for infinities and NaNs, and the log.
        is_finite = jnp.isfinite(found.norm)
        if on_nonfinite == "zero":
            is_finite = (all_finite or [jnp.isfinite(norms_of_groups([leaves], axis_name)[0])])[0]
        if on_nonfinite == "skip":
            found = found._replace(clipped_norm=jnp.where(is_finite, found.clipped_norm, 0))
        each = found.coefficients
        if isinstance(each, jax.Array) and each.ndim == 0:
            each = [each] * len(leaves)
        clipped = [times(x, c) for x, c in zip(leaves, each, strict=True)]
        if on_nonfinite == "skip":
            clipped = [jnp.where(is_finite, x, 0) for x in clipped]
        elif on_nonfinite == "zero":
            pairs = zip(clipped, leaves, strict=True)
            clipped = [jnp.where(jnp.isfinite(x), y, 0) for y, x in pairs]
        after = _state(state, found, is_finite, records)
        if on_nonfinite == "skip":  # A proximal step takes the coefficients for its gain.
            after = after._replace(
                coefficients=jnp.where(is_finite, after.coefficients, 0),
                clipped=jnp.where(is_finite, after.clipped, state.clipped),
            )
        return without_frozen(treedef.unflatten(clipped), updates), after

    return optax.GradientTransformation(init, update)


def with_frozen(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
    """Gradients, with 0 for those of frozen leaves, which are None, where params are given.

    Raises:
        ValueError: where a leaf is not a floating array.
    """
    _tree.check_floating("updates", updates)
    if params is None or not any(map(_is_none, jax.tree.leaves(updates, is_leaf=_is_none))):
        return updates
    zeros = lambda p: jax.tree.map(jnp.zeros_like, p)  # noqa: E731
    filled = lambda g, p: zeros(p) if g is None else g  # noqa: E731
    return jax.tree.map(filled, updates, params, is_leaf=_is_none)


def without_frozen(moved: optax.Updates, updates: optax.Updates) -> optax.Updates:
    """What became of gradients `with_frozen`: None again where they are."""
    emptied = lambda g, u: None if g is None else u  # noqa: E731
    return jax.tree.map(emptied, updates, moved, is_leaf=_is_none)


def _is_none(node: Any) -> bool:
    return node is None


def _state(before: ClipState, found: Clipped, is_finite: jax.Array, records: bool) -> ClipState:
    dtype = before.norm.dtype
    if records:
        coefficients = jnp.asarray(found.coefficients).astype(dtype)
    else:
        least = [jnp.min(c, initial=1.0).astype(dtype) for c in found.coefficients]
        coefficients = jnp.min(jnp.stack([jnp.ones((), dtype), *least]))
    was_clipped = jnp.any(coefficients < 1)
    norm, after = found.norm.astype(dtype), found.clipped_norm.astype(dtype)
    # What was not finite is not remembered: it would be for ever.
    memory = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), found.memory, before.memory)
    return ClipState(
        norm,
        after,
        coefficients,
        jnp.asarray(optax.safe_increment(before.count)),
        before.clipped + was_clipped.astype(jnp.int32),
        before.nonfinite + (~is_finite).astype(jnp.int32),
        memory,
    )


def times(x: jax.Array, factor: jax.Array) -> jax.Array:
    """X * factor in x's dtype, rounded once."""
    if jnp.iscomplexobj(x):
        # Not as complex numbers: their product of an infinity and a real number has a NaN.
        return jax.lax.complex(times(x.real, factor), times(x.imag, factor))
    dtype = _tree.wide_dtype(x.dtype)
    return (_widened(x) * factor.astype(dtype)).astype(x.dtype)


def _widened(x: jax.Array) -> jax.Array:
    """In its wide dtype."""
    return _widened_bfloat16(x) if x.dtype == jnp.bfloat16 else _tree.widen(x)


@jax.custom_jvp
def _widened_bfloat16(x: jax.Array) -> jax.Array:
    """On a CPU not by the conversion that norms begin with.

    XLA would do that once for both, and write a float32 gradient to memory.
    """

    def by_bits(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
        return jax.lax.bitcast_convert_type(bits << np.uint32(16), jnp.float32)

    return jax.lax.platform_dependent(x, cpu=by_bits, default=_tree.widen)


# To JAX bits have the derivative 0.
_widened_bfloat16.defjvps(lambda tangent, _, x: _tree.widen(tangent))


def finite(x: jax.Array) -> jax.Array:
    """The entries of x, 0 for what is infinite or NaN."""
    return jnp.where(jnp.isfinite(x), x, 0)


def norms_of_finite(
    groups: Sequence[Sequence[jax.Array]], axis_name: AxisNames | None
) -> tuple[jax.Array, jax.Array]:
    """The norm of each group's finite entries, and whether the groups' whole norms are finite.

    Both at once, with one collective; on a CPU a second time where they are not (`jaxreg.norms`).
    """

    def cleaned() -> list[list[jax.Array]]:
        return [[finite(x) for x in group] for group in groups]

    def by_branch() -> tuple[jax.Array, jax.Array]:
        found = norms_of_groups(groups, axis_name)
        are_finite = jnp.all(jnp.isfinite(found))
        again = lambda: norms_of_groups(cleaned(), axis_name)  # noqa: E731
        return jax.lax.cond(are_finite, lambda: found, again), are_finite

    def by_select() -> tuple[jax.Array, jax.Array]:
        found = norms_of_groups([*groups, *cleaned()], axis_name)
        return found[len(groups) :], jnp.all(jnp.isfinite(found[: len(groups)]))

    return jax.lax.platform_dependent(cpu=by_branch, default=by_select)


def shrinking(norm: jax.Array, limit: Any) -> jax.Array:
    """The coefficient that takes a norm to its limit: min(1, limit / norm)."""
    limit = jnp.asarray(limit).astype(norm.dtype)
    return jnp.where(norm <= limit, 1, limit / jnp.where(norm == 0, 1, norm))


def whole_norm(norms: jax.Array) -> jax.Array:
    """The norm of the whole from the norms of its parts."""
    return norms_of_groups([[norms]])[0].astype(norms.dtype)


def nonfinite_state(on_nonfinite: OnNonfinite) -> Any:
    """The state before the first step of a clip that cuts entries."""
    if on_nonfinite == "skip":
        return NonfiniteState(jnp.zeros((), jnp.int32))
    return optax.EmptyState()


def policed(
    cut: list[jax.Array],
    leaves: list[jax.Array],
    state: Any,
    on_nonfinite: OnNonfinite,
    axis_name: AxisNames | None,
) -> tuple[list[jax.Array], Any]:
    """Leaves whose entries were cut, by the policy; only "skip" has to look at all of them."""
    bound_axes(axis_name)  # an error under each policy
    if on_nonfinite == "zero":
        pairs = zip(cut, leaves, strict=True)
        return [jnp.where(jnp.isfinite(x), y, 0) for y, x in pairs], state
    if on_nonfinite == "propagate":
        return cut, state
    is_finite = jnp.isfinite(norms_of_groups([leaves], axis_name)[0])
    after = NonfiniteState(state.nonfinite + (~is_finite).astype(jnp.int32))
    return [jnp.where(is_finite, x, 0) for x in cut], after
