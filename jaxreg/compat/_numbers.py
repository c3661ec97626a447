"""What the functions of `jaxreg.compat` take for numbers."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check

Number = float | jax.Array


def floating(x: Any) -> jax.Array:
    """A number or array, of integers as float32."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def limit(name: str, value: Any) -> Any:
    """A number >= 0 (infinity allowed), or a traced scalar."""
    return _check.scalar(name, value, "a number >= 0", lambda v: v >= 0)
