"""Random numbers with an address: a key for each leaf, from a seed, a step and the leaf's path.

So that the numbers are the same after a restart, in another order of the leaves, beside other
leaves, and on any number of devices.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from jaxreg import _check, where

PyTree = Any


def checked_seed(seed: Any) -> Any:
    """A whole number as one that a key is made of, or one random key as it is."""
    accepted = "a whole number in [0, 2**32), or one JAX random key"
    if _check.is_whole(seed):
        if not 0 <= seed < 2**32:  # Beyond, JAX drops bits: other seeds would be the same.
            raise _check.ArgumentError("seed", repr(seed), accepted)
        return int(seed)
    if not is_key(seed):
        if hasattr(seed, "dtype"):
            accepted += ' (under optax.inject_hyperparams with static_args="seed")'
        raise _check.ArgumentError("seed", _check.describe(seed), accepted)
    return seed


def is_key(value: Any) -> bool:
    """Whether `value` is one random key, of the new kind or a raw one (``jax.random.PRNGKey``)."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return shape == ()
    return dtype == jnp.uint32 and shape is not None and len(shape) == 1


def leaf_keys(seed: Any, stream: str, step: jax.Array, tree: PyTree) -> list[jax.Array]:
    """A key for each leaf of a tree.

    Args:
        seed: as `checked_seed` gives it.
        stream: what the numbers are for; two uses of one seed have nothing in common.
        step: a whole number.
        tree: whose paths, not whose numbers, matter.
    """
    names = where.paths(tree)
    if not names:
        return []
    if isinstance(seed, int):
        # This generator by name: others give other numbers to arrays that are sharded.
        key = jax.random.key(np.uint32(seed), impl="threefry2x32")
    else:
        key = seed if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else _typed(seed)
    key = jax.random.fold_in(jax.random.fold_in(key, _hash(stream)), step)
    # In one call, as each is a program of its own to compile.
    hashes = jnp.asarray(np.stack([_hash(name) for name in names]))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    return [keys[i] for i in range(len(names))]


def sharding_like(x: jax.Array) -> Any:
    """The ``out_sharding`` of random numbers for `x`: where axes are explicit, they need one."""
    sharding = jax.typeof(x).sharding
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


def _typed(raw: Any) -> jax.Array:
    return jax.random.wrap_key_data(jnp.asarray(raw))


def _hash(text: str) -> np.uint32:
    return np.uint32(zlib.crc32(text.encode()))
