"""Gradient clipping by norms and by value."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.norms import AxisNames, replicas, sharding_axes
from jaxreg.transforms.clip import (
    POLICIES,
    Clipped,
    OnNonfinite,
    Seen,
    clip,
    finite,
    nonfinite_state,
    policed,
    shrinking,
    times,
    whole_norm,
    with_frozen,
    without_frozen,
)

Number = float | jax.Array
Semantics = Literal["jaxreg", "torch", "optax", "keras"]


def clip_by_global_norm(
    max_norm: Number,
    *,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
    semantics: Semantics = "jaxreg",
) -> optax.GradientTransformation:
    r"""Scales the gradient down so that its global norm is at most `max_norm`.

    $g \leftarrow g \cdot \min(1, max\_norm / \|g\|)$ with the norm over every leaf. The norm and
    the product are computed in float32 at least, so bf16 gradients are clipped to the norm that
    was asked for; squares that over- or underflow are handled. A zero gradient stays zero. Here and
    in all clips a leaf may be frozen, with None for its gradient: it counts as 0, and None stays.

    Args:
        max_norm: a number > 0, or a traced scalar (a new value does not recompile).
        axis_name: inside ``shard_map`` or ``pmap``, the mesh axes that leaves are sharded along
            (see `jaxreg.global_norm`). Under ``jit`` with sharded arrays the norm is global.
        on_nonfinite: for gradients with an infinity or a NaN. "propagate": a NaN makes all NaN; an
            infinity is NaN, and the rest 0, as in optax. "skip": the whole gradient is 0. "zero":
            these entries are 0, and the rest is clipped. What follows acts in any case, such as
            momentum and weight decay; `jaxreg.skip_step` leaves the whole step out.
        semantics: "torch", "optax" or "keras" for the coefficient that they use, bit for bit up to
            the order of sums: min(1, c / (n + 1e-6)), c / n unless n < c, and c min(1/n, 1/c) +
            (n - n), whose norms n have squares that overflow to infinity.

    Returns:
        An optax transformation whose state is a `ClipState`; updates keep their dtype.

    Raises:
        ValueError: where max_norm is 0, negative, NaN or no scalar, or another argument is not one
            of those above; at ``init`` and ``update`` where a leaf is not a floating array.

    Source: R. Pascanu, T. Mikolov and Y. Bengio, *On the difficulty of training recurrent neural
    networks*, ICML 2013.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.clip_by_global_norm(1.0)
    >>> grads = {"w": jnp.array([3.0, 4.0])}
    >>> clipped, state = clip.update(grads, clip.init(grads))
    >>> [round(float(x), 6) for x in clipped["w"]], float(state.norm)
    ([0.6, 0.8], 5.0)
    """
    max_norm = _check.positive("max_norm", max_norm)
    _check.choice("semantics", semantics, _COEFFICIENTS)
    if semantics == "keras":
        max_norm = _check.positive_finite("max_norm", max_norm)

    def rule(seen: Seen) -> Clipped:
        if semantics == "jaxreg":
            norm = seen.norms([seen.leaves])[0]
        else:
            leaves = [*map(finite, seen.leaves)] if on_nonfinite == "zero" else seen.leaves
            norm = _plain_norm(leaves, axis_name)
        limit = jnp.asarray(max_norm).astype(norm.dtype)
        coefficient = _COEFFICIENTS[semantics](norm, limit)
        return Clipped(coefficient, norm, jnp.where(norm == 0, 0, coefficient * norm))

    return clip(rule, on_nonfinite, axis_name)


_COEFFICIENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "jaxreg": shrinking,
    "torch": lambda n, c: jnp.minimum(1, c * (1 / (n + 1e-6))),
    "optax": lambda n, c: jnp.where(n < c, 1, c / n),
    "keras": lambda n, c: c * jnp.minimum(1 / n, 1 / c) + (n - n),
}


def _plain_norm(leaves: list[jax.Array], axis_name: AxisNames | None) -> jax.Array:
    """The root of the sum of squares, which overflow and underflow."""
    dtype = _tree.widest_dtype(leaves)
    names = sharding_axes(leaves, axis_name)
    squares = (jnp.sum(jnp.square(jnp.abs(x).astype(dtype))) / replicas(x, names) for x in leaves)
    total = sum(squares, jnp.zeros((), dtype))
    return jnp.sqrt(jax.lax.psum(total, names) if names else total)


def clip_by_leaf_norm(
    max_norm: Number,
    *,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformation:
    r"""Scales each leaf down so that its norm is at most `max_norm`.

    $g_l \leftarrow g_l \cdot \min(1, max\_norm / \|g_l\|)$ for each leaf l: TensorFlow's
    ``clip_by_norm``, Keras' ``clipnorm``.

    Args:
        max_norm: as in `jaxreg.clip_by_global_norm`.
        axis_name: likewise.
        on_nonfinite: likewise; "propagate" acts on each leaf, "skip" on all of them together.

    Returns:
        An optax transformation whose state is a `ClipState` with one coefficient a leaf.

    Raises:
        ValueError: as `jaxreg.clip_by_global_norm` does.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.clip_by_leaf_norm(1.0)
    >>> grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
    >>> clipped, state = clip.update(grads, clip.init(grads))
    >>> [round(float(x), 6) for x in clipped["a"]], clipped["b"].tolist()
    ([0.6, 0.8], [0.5])
    """
    max_norm = _check.positive("max_norm", max_norm)

    def rule(seen: Seen) -> Clipped:
        norms = seen.norms([[leaf] for leaf in seen.leaves])
        coefficients = shrinking(norms, max_norm)
        return Clipped(coefficients, whole_norm(norms), whole_norm(coefficients * norms))

    return clip(rule, on_nonfinite, axis_name, per_leaf=True)


def clip_by_group_norm(
    max_norms: Mapping[_where.Selector | str, Number],
    *,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformation:
    r"""Scales groups of leaves down so that the norm of each is at most its own limit.

    $g_l \leftarrow g_l \cdot \min(1, c_k / \|g_k\|)$ for the leaves l of group k, whose norm
    $\|g_k\|$ is over all of them. Leaves in no group pass as they are.

    Args:
        max_norms: for each group its selector (from `jaxreg.where`, or a path pattern) and its
            limit, a number > 0 or a traced scalar. Give ``update`` the parameters where a selector
            asks for more than paths: the gradients' dtypes may be others.
        axis_name: as in `jaxreg.clip_by_global_norm`; one collective serves all groups.
        on_nonfinite: likewise; "propagate" acts on each group, "skip" on all of them together.

    Returns:
        An optax transformation whose state is a `ClipState` with one coefficient a leaf.

    Raises:
        ValueError: as `jaxreg.clip_by_global_norm` does; at ``init`` where a selector matches no
            leaf, or two of them the same.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.clip_by_group_norm({"encoder/*": 1.0, "decoder/*": 10.0})
    >>> grads = {"encoder": {"w": jnp.array([3.0, 4.0])}, "decoder": {"w": jnp.array([6.0, 8.0])}}
    >>> clipped, _ = clip.update(grads, clip.init(grads))
    >>> [round(float(x), 6) for x in clipped["encoder"]["w"]], clipped["decoder"]["w"].tolist()
    ([0.6, 0.8], [6.0, 8.0])
    """
    if not isinstance(max_norms, Mapping) or not max_norms:
        accepted = "a mapping from selectors or path patterns to numbers > 0"
        raise _check.ArgumentError("max_norms", _check.describe(max_norms), accepted)
    with _check.of_argument("max_norms"):
        selectors = [_where.as_selector(selector) for selector in max_norms]
    limits = [_check.positive("max_norms", limit) for limit in max_norms.values()]

    def groups_of(tree: Any) -> list[int]:
        """The number of each leaf's group, -1 for none."""
        owners = [-1] * len(jax.tree.leaves(tree))
        for number, selector in enumerate(selectors):
            with _check.of_argument("max_norms"):
                mask = selector.mask(tree)
            for i, yes in enumerate(jax.tree.leaves(mask)):
                if yes and owners[i] >= 0:
                    both = f"{selectors[owners[i]]!r} and {selector!r}"
                    given = f"{both}, which both match {_where.paths(tree)[i]}"
                    raise _check.ArgumentError("max_norms", given, "groups without common leaves")
                owners[i] = number if yes else owners[i]
        return owners

    def rule(seen: Seen) -> Clipped:
        # Of the parameters, as at init: gradients may have other dtypes.
        owners = groups_of(seen.updates if seen.params is None else seen.params)
        # The last group is that of the leaves in none, whose norm is in the whole one.
        numbers = [*range(len(limits)), -1]
        norms = seen.norms(
            [[x for x, k in zip(seen.leaves, owners, strict=True) if k == n] for n in numbers]
        )
        each = [shrinking(n, c) for n, c in zip(norms[:-1], limits, strict=True)]
        each.append(jnp.ones_like(norms[-1]))
        after = jnp.stack(each) * norms
        coefficients = jnp.stack(each)[np.array(owners, int)]
        return Clipped(coefficients, whole_norm(norms), whole_norm(after))

    def memory(params: Any) -> Any:
        groups_of(params)  # what does not fit is an error before the first step
        return ()

    return clip(rule, on_nonfinite, axis_name, memory=memory, per_leaf=True)


def clip_by_value(
    max_value: Number,
    *,
    axis_name: AxisNames | None = None,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformation:
    r"""Cuts each entry of the gradient to the size `max_value`.

    $g_i \leftarrow g_i \cdot \min(1, max\_value / |g_i|)$, for complex entries too. It changes the
    direction of the gradient, and its coefficients are no gain that a proximal step could follow.

    Args:
        max_value: a number > 0, or a traced scalar.
        axis_name: as in `jaxreg.clip_by_global_norm`; needed for "skip" alone.
        on_nonfinite: "propagate": a NaN stays, an infinity is cut; "skip" and "zero" as in
            `jaxreg.clip_by_global_norm`.

    Returns:
        An optax transformation without state, but for "skip", which has to look at the whole
        gradient first and counts in a `NonfiniteState`.

    Raises:
        ValueError: as `jaxreg.clip_by_global_norm` does.

    >>> import jax.numpy as jnp, jaxreg
    >>> clip = jaxreg.clip_by_value(1.0)
    >>> grads = jnp.array([0.5, -3.0])
    >>> clip.update(grads, clip.init(grads))[0].tolist()
    [0.5, -1.0]
    """
    max_value = _check.positive("max_value", max_value)
    _check.choice("on_nonfinite", on_nonfinite, POLICIES)

    def init(params: optax.Params) -> Any:
        _tree.check_floating("params", params)
        return nonfinite_state(on_nonfinite)

    def cut(x: jax.Array) -> jax.Array:
        dtype = _tree.wide_dtype(x.dtype)
        limit = jnp.asarray(max_value).astype(_tree.real_dtype(dtype))
        if jnp.iscomplexobj(x):
            return times(x, shrinking(jnp.abs(x), limit))
        return jnp.clip(x.astype(dtype), -limit, limit).astype(x.dtype)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        leaves, treedef = jax.tree.flatten(with_frozen(updates, params))
        clipped, after = policed([*map(cut, leaves)], leaves, state, on_nonfinite, axis_name)
        return without_frozen(treedef.unflatten(clipped), updates), after

    return optax.GradientTransformation(init, update)
