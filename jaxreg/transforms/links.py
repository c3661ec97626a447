"""The links of a direction: what optax's closures are, and which ones it may not have."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg import _check, _tree

Transformation = optax.GradientTransformation


def links(direction: Transformation) -> list[Transformation]:
    """The links of a chain, whatever chains and wrappers they stand in."""
    name, closed = describe(direction.update)
    inner = {
        "optax.chain": lambda: chained(direction),
        "optax.named_chain": lambda: [link for _, link in closed["transforms"]],
        "optax.with_extra_args_support": lambda: [closed["tx"]],
    }
    if name not in inner:
        return [direction]
    return [link for part in inner[name]() for link in links(part)]


def chained(chain: Transformation) -> list[Transformation]:
    inits, updates = describe(chain.init)[1]["init_fns"], describe(chain.update)[1]["update_fns"]
    pairs = zip(inits, updates, strict=True)
    return [optax.GradientTransformationExtraArgs(*pair) for pair in pairs]


def describe(function: Any) -> tuple[str, dict[str, Any]]:
    """The factory that a nested function came from, and the variables it closes over."""
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    factory = getattr(function, "__qualname__", repr(function)).split(".<locals>")[0]
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return f"{package}.{factory}", {n: c.cell_contents for n, c in zip(names, cells, strict=True)}


def refuse_learning_rate(direction: Transformation) -> None:
    """Raises where a direction holds a learning rate: its sign would be flipped a second time."""
    if rate := learning_rate_in(direction):
        raise _whole_optimizer(f"contains {rate}, its learning rate and sign")


def learning_rate_in(transformation: Transformation) -> str | None:
    """The name of a link that goes down the gradient; None where there is none that is known."""
    for link in links(transformation):
        name, closed = describe(link.update)
        factor = closed.get("step_size")
        grows = _check.is_concrete(factor) and np.all(np.asarray(factor) > 0)
        whole = name in ("optax.scale_by_schedule", "jaxreg.proximal")
        if whole or (name == "optax.scale" and not grows):
            return name
    return None


def refuse_descent(direction: Transformation, params: Any, known: Collection[str]) -> None:
    """Raises where a link that is not `known` goes down the gradient, as it does on a toy."""
    for link in links(direction):
        if describe(link.update)[0] not in known and _descends(link, params):
            raise _whole_optimizer("goes down the gradient")


def _descends(link: Transformation, params: Any) -> bool:
    """Whether a leaf's updates for gradients g and -g differ by less than 0.

    So that noise and decay cancel. The toy has the structure of params and the ranks of its
    leaves, for masks and labels to find what they look for, and one entry a leaf. Two steps, as a
    learning rate may start at 0. A link that can't be run on it (its settings are traced, it
    needs further arguments) passes.
    """

    def toy(value: float) -> Any:
        shaped = lambda p: jnp.full((1,) * p.ndim, value, _tree.wide_dtype(p.dtype))  # noqa: E731
        return jax.tree.map(shaped, params)

    def outputs(gradient: Any) -> list[np.ndarray]:
        state, seen = link.init(toy(1)), []
        for _ in range(2):
            update, state = link.update(gradient, state, toy(1))
            seen += map(np.real, jax.device_get(jax.tree.leaves(update)))
        return seen

    try:
        with jax.ensure_compile_time_eval():
            pairs = zip(outputs(toy(1)), outputs(toy(-1)), strict=True)
            return any((up < down).any() for up, down in pairs)
    except Exception:  # whatever a function of the user's own may raise
        return False


def _whole_optimizer(why: str) -> _check.ArgumentError:
    return _check.ArgumentError(
        "direction",
        f"a whole optimizer: one that {why}",
        "a direction without learning rate and sign, such as optax.scale_by_adam() in place of "
        "optax.adam(lr) or jaxreg.prox_adam(lr, penalty), or optax.identity() in place of "
        "optax.sgd(lr)",
    )
