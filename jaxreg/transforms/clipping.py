"""Gradient clipping as a coefficient: the clipped gradient is the gradient times a scalar."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree


class ClipState(NamedTuple):
    """What the last step saw.

    Attributes:
        norm: the norm before clipping, a float32 scalar (float64 for 64-bit gradients).
        coefficient: what the gradient was multiplied by, in (0, 1]; 1 where nothing was clipped,
            0 where the norm is infinite, NaN where it is NaN.
    """

    norm: jax.Array
    coefficient: jax.Array


def clip_by_global_norm(max_norm: float | jax.Array) -> optax.GradientTransformation:
    r"""Scales the gradient down so that its global norm is at most `max_norm`.

    $g \leftarrow g \cdot \min(1, max\_norm / \|g\|)$ with the norm over every leaf. The norm and
    the product are computed in float32 at least, so bf16 gradients are clipped to the norm that
    was asked for; squares that over- or underflow are handled. A zero gradient stays zero. A
    gradient with a NaN becomes NaN everywhere; with an infinity, NaN there and 0 elsewhere, as
    in optax.

    Under jit with sharded arrays the norm is global. Inside ``shard_map`` it is the shard's own.

    Args:
        max_norm: a number > 0, or a traced scalar (a new value does not recompile).

    Returns:
        An optax transformation whose state is a `ClipState`; updates keep their dtype.

    Raises:
        ValueError: where max_norm is 0, negative, NaN or no scalar; at ``init`` where a leaf is not
            a floating array.

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

    def init(params: optax.Params) -> ClipState:
        _tree.check_floating("params", params)
        # Dtypes as `update` gives them, so that the state can be carried by lax.scan.
        norm = jnp.zeros_like(jax.eval_shape(_tree.global_norm, params))
        return ClipState(norm, jnp.ones_like(norm))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipState]:
        del params
        norm = _tree.global_norm(updates)
        limit = jnp.asarray(max_norm).astype(norm.dtype)
        coefficient = jnp.where(norm <= limit, 1, limit / jnp.where(norm == 0, 1, norm))
        clipped = jax.tree.map(lambda g: _times(g, coefficient), updates)
        return clipped, ClipState(norm, coefficient)

    return optax.GradientTransformation(init, update)


def _times(x: jax.Array, scalar: jax.Array) -> jax.Array:
    """X * scalar in x's dtype, rounded once."""
    dtype = _tree.wide_dtype(x.dtype)
    return (x.astype(dtype) * scalar.astype(dtype)).astype(x.dtype)
