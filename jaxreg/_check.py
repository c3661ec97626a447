"""Argument checks: the one place that words an error.

Every message names the argument, says what was given and what is accepted. Values are checked
where they are concrete; a traced value passes, because looking at it would stop the trace.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np


class ArgumentError(ValueError):
    """An argument that is not accepted: every error that jaxreg raises over its input.

    The message reads ``name: got GIVEN; accepted: ACCEPTED.`` It is a `ValueError`, and its
    attributes ``name``, ``given`` and ``accepted`` are the message's parts.

    >>> import jaxreg
    >>> jaxreg.L1(-1)
    Traceback (most recent call last):
    jaxreg.ArgumentError: strength: got -1.0; accepted: a finite number >= 0.
    """

    __module__ = "jaxreg"  # where it is exported

    def __init__(self, name: str, given: str, accepted: str):
        super().__init__(name, given, accepted)
        self.name, self.given, self.accepted = name, given, accepted

    def __str__(self) -> str:
        return f"{self.name}: got {self.given}; accepted: {self.accepted}."


@contextmanager
def on_leaf(path: str) -> Iterator[None]:
    """Adds a leaf's path to what an error says was given."""
    try:
        yield
    except ArgumentError as error:
        given = f"{error.given} on {path}" if path else error.given
        raise ArgumentError(error.name, given, error.accepted) from None


@contextmanager
def of_argument(name: str) -> Iterator[None]:
    """Gives an error the name of the argument that its cause was a part of."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(name, error.given, error.accepted) from None


def is_host(value: Any) -> bool:
    """Whether `value` is a Python or NumPy number or array: reading it waits for no device."""
    return isinstance(value, (bool, int, float, np.ndarray, np.generic))


def is_concrete(value: Any) -> bool:
    """Whether `value` is a number or array that can be read without stopping a trace."""
    if is_host(value):
        return True
    # Imported here: the command line checks its arguments before it pays for importing JAX.
    from jax import Array
    from jax.core import Tracer

    return isinstance(value, Array) and not isinstance(value, Tracer)


def is_number(value: Any) -> bool:
    """Whether `value` is a number or an array, concrete or traced."""
    return isinstance(value, (bool, int, float)) or hasattr(value, "dtype")


def is_real(value: Any) -> bool:
    """Whether an array, concrete or traced, holds real numbers (of bfloat16, too)."""
    dtype = getattr(value, "dtype", None)
    # By name, as NumPy knows nothing of the kind of bfloat16.
    return dtype is not None and dtype.name.startswith(("int", "uint", "float", "bfloat"))


def is_schedule(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether `value` is an optax schedule: a function of the step count."""
    return callable(value)


def scalar(name: str, value: Any, accepted: str, holds: Callable[[float], bool]) -> Any:
    """A concrete scalar as a Python float for which `holds`; anything traced as it is.

    A Python float (weakly typed) lets 0, 0.0 and float32(0) share one trace, and loses no
    precision when 64-bit floats are enabled.
    """
    if is_schedule(value):
        accepted += "; a schedule goes into optax.inject_hyperparams, or for a penalty into "
        accepted += "lambda count: L1(schedule(count))"
        raise ArgumentError(name, "a function", accepted)
    array = np.asarray(value) if is_host(value) else value
    if not is_real(array) or array.shape != ():
        raise ArgumentError(name, describe(value), accepted)
    if not is_concrete(value):
        return value
    number = float(value)
    if not holds(number):
        raise ArgumentError(name, repr(number), accepted)
    return number


def nonnegative(name: str, value: Any) -> Any:
    """A finite scalar >= 0."""
    return scalar(name, value, "a finite number >= 0", lambda v: math.isfinite(v) and v >= 0)


def finite(name: str, value: Any) -> Any:
    """A finite scalar."""
    return scalar(name, value, "a finite number", math.isfinite)


def not_nan(name: str, value: Any) -> Any:
    """A scalar, which may be infinite."""
    return scalar(name, value, "a number, not NaN", lambda v: not math.isnan(v))


def strengths(name: str, value: Any) -> Any:
    """A finite scalar >= 0, or an array of them."""
    if np.ndim(value) == 0:
        return nonnegative(name, value)
    return nonnegative_array(name, value)


def finite_array(name: str, value: Any) -> Any:
    """An array of finite numbers."""
    return array(name, value, "an array of finite numbers", np.isfinite)


def nonnegative_array(name: str, value: Any) -> Any:
    """An array of finite numbers >= 0."""
    return array(name, value, "finite numbers >= 0", is_weight)


def is_weight(values: np.ndarray) -> np.ndarray:
    """Which numbers are finite and not negative."""
    return np.isfinite(values) & (values >= 0)


def weights(name: str, value: Any) -> Any:
    """None, a finite scalar >= 0, or an array of them."""
    return None if value is None else strengths(name, value)


def array(name: str, value: Any, accepted: str, holds: Callable[[np.ndarray], Any]) -> Any:
    """An array of real numbers for which `holds`, where it is concrete."""
    array = np.asarray(value) if isinstance(value, (list, tuple, float, int)) else value
    if not is_real(array):
        raise ArgumentError(name, describe(value), accepted)
    if is_concrete(array):
        numbers = np.asarray(array).astype(np.float64)
        wrong = numbers[~holds(numbers)]
        if wrong.size:
            raise ArgumentError(name, f"an array that holds {wrong[0]}", accepted)
    return array


def positive(name: str, value: Any) -> Any:
    """A scalar > 0 (infinity allowed: a threshold that is never reached)."""
    return scalar(name, value, "a number > 0", lambda v: v > 0)


def positive_finite(name: str, value: Any) -> Any:
    """A finite scalar > 0."""
    return scalar(name, value, "a finite number > 0", lambda v: math.isfinite(v) and v > 0)


def above_one(name: str, value: Any) -> Any:
    """A finite scalar > 1."""
    return scalar(name, value, "a finite number > 1", lambda v: math.isfinite(v) and v > 1)


def fraction(name: str, value: Any) -> Any:
    """A scalar in [0, 1), such as a dropout rate."""
    return scalar(name, value, "a number in [0, 1)", lambda v: 0 <= v < 1)


def decay(name: str, value: Any) -> Any:
    """A scalar in [0, 1) that has 32 bits at least if it is an array: in bfloat16 .999 is 1."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and "float" in dtype.name and dtype.itemsize < 4:
        accepted = "a number in [0, 1), of 32 bits at least (under optax.inject_hyperparams with "
        accepted += f'hyperparam_dtype=jnp.float32, or static_args="{name}")'
        raise ArgumentError(name, f"a number of dtype {dtype.name}", accepted)
    return fraction(name, value)


def number_or_schedule(name: str, value: Any) -> Any:
    """A finite scalar >= 0, or an optax schedule (checked by nobody until it is called)."""
    return value if is_schedule(value) else nonnegative(name, value)


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number of Python or NumPy."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def whole_number(name: str, value: Any, at_least: int) -> int:
    """A whole number >= `at_least`."""
    if not is_whole(value) or value < at_least:
        accepted = f"a whole number >= {at_least}"
        if hasattr(value, "dtype"):
            accepted += f' (under optax.inject_hyperparams with static_args="{name}")'
        raise ArgumentError(name, describe(value), accepted)
    return int(value)


def integer(name: str, value: Any) -> int:
    """An integer."""
    if not is_whole(value):
        raise ArgumentError(name, describe(value), "an integer")
    return int(value)


def axis(name: str, value: int, x: Any) -> int:
    """An axis that x has, counted from 0."""
    if not is_whole(value) or not -x.ndim <= value < x.ndim:
        accepted = f"an axis of an array of the shape {tuple(x.shape)}"
        raise ArgumentError(name, repr(value), accepted)
    return value % x.ndim


def is_transformation(value: Any) -> bool:
    """Whether `value` is an optax transformation, by its two functions."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def transformation(name: str, value: Any) -> Any:
    """An optax transformation."""
    if not is_transformation(value):
        raise ArgumentError(name, describe(value), "an optax gradient transformation")
    return value


def params_given(params: Any, call: str = "update(grads, state, params)") -> Any:
    """The params of an optax ``update`` or ``init``, for who can't do without."""
    if params is None:
        raise ArgumentError("params", "None", f"the parameters: call {call}")
    return params


def choice(name: str, value: str, options: Iterable[str]) -> str:
    """One of `options`; the error names the nearest one."""
    options = list(options)
    if value not in options:
        near = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ArgumentError(name, repr(value) + hint, ", ".join(options))
    return value


def describe(value: Any) -> str:
    """A short description for an error message: arrays by shape and dtype, the rest by repr."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    if is_array and (value.shape != () or not is_concrete(value)):
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
