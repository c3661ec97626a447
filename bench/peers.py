"""Other libraries' proximal operators, in the forms in which `bench.penalties` calls them.

The libraries are imported where they are used: a benchmark runs with those that are installed.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

NAMES = ("jaxopt", "optax", "skglm", "pyproximal")
ON_HOST = ("skglm", "pyproximal")  # of NumPy arrays, in float64
Prox = Callable[[np.ndarray, float], np.ndarray]


def installed(name: str) -> bool:
    """Whether a library can be imported."""
    return importlib.util.find_spec(name) is not None


def versions() -> str:
    """The libraries that are installed."""
    return ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in NAMES if installed(name)
    )


def keep_freed_memory() -> None:
    """Makes glibc reuse the memory of large arrays instead of giving it back to the system.

    Otherwise fresh pages cost ten times what an elementwise kernel does, and how often they are
    needed depends on what ran before.
    """
    _mallopt({-8: 1, -4: 0, -1: -1})  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h


def give_back_freed_memory() -> None:
    """Makes glibc give large arrays back at once, as it does by itself."""
    _mallopt({-4: 2**16, -1: 2**17, -3: 2**17})  # -3: M_MMAP_THRESHOLD


def _mallopt(options: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in options.items():
            mallopt(option, value)


class _Library:
    """A library that is imported when one of its names is looked up."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


jaxopt_prox = _Library("jaxopt.prox")
jaxopt_projection = _Library("jaxopt.projection")
pyproximal = _Library("pyproximal")
_skglm = _Library("skglm.penalties")


def skglm_separable(name: str, *fields: Any) -> Prox:
    """A separable penalty of skglm, applied as its FISTA solver applies it.

    That is skglm's own compiled loop over the coordinates, which writes into an array that it is
    given.
    """
    penalty = _compiled(getattr(_skglm, name)(*fields))
    loop = importlib.import_module("skglm.utils.prox_funcs")._prox_vec
    result = np.empty(0)

    def prox(x: np.ndarray, step: float) -> np.ndarray:
        nonlocal result
        result = result if result.shape == x.shape else np.empty_like(x)
        return loop(result, x, penalty, step)

    return prox


def skglm_groups(name: str, members: np.ndarray, *weights: float) -> Prox:
    """A group penalty of skglm, in a compiled loop over the groups.

    Args:
        name: the class.
        members: shape (groups, size): where each group's coordinates are in the flattened array.
        *weights: one of each kind that the class takes, the same for every group.
    """
    groups, size = members.shape
    ends = np.arange(groups + 1, dtype=np.int32) * np.int32(size)
    each = [np.full(groups, weight) for weight in weights]
    penalty = getattr(_skglm, name)(1.0, *each, ends, members.ravel().astype(np.int32))
    compiled, loop = _compiled(penalty), _group_loop()
    return lambda x, step: loop(np.empty_like(x), x, compiled, step)


@cache
def _group_loop() -> Callable[..., np.ndarray]:
    def loop(result: Any, x: Any, penalty: Any, step: Any) -> Any:
        for group in range(len(penalty.grp_ptr) - 1):
            members = penalty.grp_indices[penalty.grp_ptr[group] : penalty.grp_ptr[group + 1]]
            result[members] = penalty.prox_1group(x[members], step, group)
        return result

    return importlib.import_module("numba").njit(loop)


def skglm_slope(weights: np.ndarray) -> Prox:
    """The sorted L1 norm of skglm, compiled."""
    return _compiled(_skglm.SLOPE(weights)).prox_vec


def pyproximal_rows(name: str, size: int, *fields: float) -> Prox:
    """A group operator of pyproximal, on a matrix: its rows are contiguous groups of one size."""
    operator = getattr(pyproximal, name)(*fields)
    return lambda x, step: operator.prox(x.reshape(-1, size).T, step).T


def _compiled(penalty: Any) -> Any:
    return importlib.import_module("skglm.utils.jit_compilation").compiled_clone(penalty)
