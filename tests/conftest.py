"""Shared fixtures."""

from collections.abc import Iterator

import jax
import pytest

# Before JAX is first used: some tests shard arrays.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit floats, for oracles."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def strict() -> Iterator[None]:
    """No implicit promotion of dtypes or ranks: for calls of this library alone, as optax's own
    functions break under it."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
