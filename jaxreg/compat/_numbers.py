"""What the functions of `jaxreg.compat` take for numbers."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _check

Number = float | jax.Array
Axes = int | tuple[int, ...] | None


def floating(x: Any) -> jax.Array:
    """A number or array, of integers as float32."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def limit(name: str, value: Any) -> Any:
    """A number >= 0 (infinity allowed), or a traced scalar."""
    return _check.scalar(name, value, "a number >= 0", lambda v: v >= 0)


def checked_axes(value: Axes) -> tuple[int, ...] | None:
    """An argument ``axis``: an axis or a tuple of them as a tuple, or None."""
    given = value if isinstance(value, tuple) or value is None else (value,)
    if given is not None and not all(map(_check.is_whole, given)):
        raise _check.ArgumentError("axis", _check.describe(value), "an axis, several, or None")
    return given


def axes_of(value: Axes, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of an array that an argument ``axis`` names, counted from 0; all for None."""
    rank, given = len(shape), checked_axes(value)
    if given is None:
        return tuple(range(rank))
    own = tuple(axis % rank for axis in given if -rank <= axis < rank)
    if len({*own}) < len(given):
        accepted = f"axes of an array of shape {shape}, each once"
        raise _check.ArgumentError("axis", _check.describe(value), accepted)
    return own
