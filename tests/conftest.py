"""Shared fixtures."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

# Before JAX is first used. A third of a run's time is optimizing code that runs once; with
# XLA_FLAGS= (nothing) the tests run what users run, as CI does for the core ones.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Some tests shard arrays.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    """Most of a run's time is compiling: programs are kept for the next run, and the workers and
    the programs that tests start share them (`pytest --cache-clear` drops them)."""
    options = {
        "jax_compilation_cache_dir": str(config.cache.mkdir("jax")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in options.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where versions are tested, one row of a law stands for those of its kind of one file."""
    from cases import Case  # not before JAX has its flags

    first: dict[Any, str] = {}
    for item in items:
        arguments = item.callspec.params if hasattr(item, "callspec") else {}
        case = arguments.get("case")
        if isinstance(case, Case):
            law = (item.function, case.module, *case.kind)
            if first.setdefault(law, case.name) != case.name:
                item.add_marker("repeated")


_tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Each compiled program maps memory: 10,000 maps are some 3 GB, and beyond the 65,530 that a
    process has on Linux XLA aborts."""
    yield
    if next(_tests_run) % 20 == 0 and _maps() > 10_000:
        jax.clear_caches()


def _maps() -> int:
    """How many maps of memory this process has; 0 where that is not to be known."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


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
