"""Noise: pure functions (key, x, rate) -> x."""

import jax
import jax.numpy as jnp

from jaxreg import _address, _check, _tree


def dropout(key: jax.Array, x: jax.Array, rate: float | jax.Array) -> jax.Array:
    r"""Sets each entry to 0 with probability `rate` and divides the others by $1 - rate$.

    The mask is a function of the key and the shape alone: the same key gives the same mask. Give
    each layer and each step a key of its own, as ``jax.random.fold_in`` makes them.

    Args:
        key: one JAX random key.
        x: a real floating array of any shape.
        rate: the probability of 0, a number in [0, 1), or a traced scalar.

    Returns:
        An array of x's shape and dtype; the product is computed in float32 at least.

    Raises:
        ValueError: where the key is none, the rate is outside [0, 1) or NaN, or x is not real
            floating.

    Source: N. Srivastava et al., *Dropout: a simple way to prevent neural networks from
    overfitting*, JMLR 15, 2014.

    >>> import jax, jax.numpy as jnp, jaxreg
    >>> y = jaxreg.dropout(jax.random.key(0), jnp.ones(1000), 0.5)
    >>> sorted(set(y.tolist())), 450 < int((y == 0).sum()) < 550
    ([0.0, 2.0], True)
    """
    if not _address.is_key(key):
        raise _check.ArgumentError("key", _check.describe(key), "one JAX random key")
    rate = _check.fraction("rate", rate)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise _check.ArgumentError("x", _check.describe(x), "a real floating array")
    keep = jnp.asarray(1 - rate).astype(jnp.float32)
    wide = _tree.widen(x)
    kept = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(kept, wide / keep.astype(wide.dtype), 0).astype(x.dtype)
