"""Whether two programs give the same outputs, up to rounding."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.compression.flat import Flat, wide


class Reference:
    """The outputs of a model on examples: its inputs, and these with noise of their scale.

    Rounding explains 16 times the epsilon of the coarsest dtype that a model computes in. In fewer
    bits than 32 that could be anything, so there it must be the same in float32 too.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        program: Flat,
        leaves: Sequence[Any],
        inputs: Any,
        tolerance: float,
    ):
        self._program, self._leaves = program, leaves
        self._examples = inputs, noisy(inputs)
        self._expected = _outputs(function, leaves, self._examples)
        few, many = (
            max((16 * float(jnp.finfo(kind(d)).eps) for d in program.rounds_in), default=0.0)
            for kind in (np.dtype, wide)
        )
        self._explained, self._exact = max(tolerance, min(few, 1 / 8)), max(tolerance, many)

    @property
    def holds_nan(self) -> bool:
        """Whether the outputs for the given inputs do."""
        return any(np.isnan(_numbers(leaf)).any() for leaf in jax.tree.leaves(self._expected[0]))

    def compared(
        self, function: Callable[..., Any], leaves: Sequence[Any], exact: Sequence[Any]
    ) -> tuple[float, str]:
        """The `difference` of a function's outputs, and what is wrong with it; empty if nothing.

        Args:
            function: of leaves and inputs.
            leaves: in their own dtypes.
            exact: the same, in float32 at least.
        """
        found = _outputs(function, leaves, self._examples)
        error = max(map(difference, self._expected, found))
        if error <= self._exact:
            return error, ""
        wrong = f"gives outputs that differ by {error:.1e}"
        if error > self._explained:
            return error, wrong
        # In few bits: is it the same in more?
        smaller = Flat(function, leaves, self._examples[0])
        expected = _outputs(self._program, self._leaves, self._examples)
        found = _outputs(smaller, exact, self._examples)
        return error, "" if max(map(difference, expected, found)) <= self._exact else wrong


def _outputs(function: Callable[..., Any], leaves: Sequence[Any], examples: Any) -> list[Any]:
    """For each of the examples; products in full precision, where a device has a lower one."""
    with jax.default_matmul_precision("highest"):
        call = jax.jit(function)
        return [call(leaves, *inputs) for inputs in examples]


def noisy(inputs: Any) -> Any:
    """The inputs with noise of the scale of each floating array."""
    rng = np.random.default_rng(0)

    def with_noise(x: Any) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        values = np.asarray(x).astype(np.float64)
        finite = values[np.isfinite(values)]
        scale = np.sqrt(np.mean(finite**2)) if finite.any() else 1.0
        return np.asarray(values + scale * rng.normal(size=x.shape)).astype(x.dtype)

    return jax.tree.map(with_noise, inputs)


def difference(expected: Any, found: Any) -> float:
    """The largest difference of an element of an output, over the largest element of that output.

    What is NaN, or the same infinity, in both is equal.
    """
    (old, tree), (new, other) = jax.tree.flatten(expected), jax.tree.flatten(found)
    if tree != other or any(np.shape(a) != np.shape(b) for a, b in zip(old, new, strict=True)):
        return float("inf")
    return max(map(_difference, old, new), default=0.0)


def _difference(expected: Any, found: Any) -> float:
    a, b = _numbers(expected), _numbers(found)
    equal = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gap = np.where(equal, 0.0, np.abs(a - b))
    largest = float(np.max(np.nan_to_num(gap, nan=np.inf), initial=0.0))
    scale = float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0))
    return largest / (scale or 1.0)


def _numbers(output: Any) -> np.ndarray:
    if jnp.issubdtype(jnp.result_type(output), jax.dtypes.prng_key):
        output = jax.random.key_data(output)
    array = np.asarray(output)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
