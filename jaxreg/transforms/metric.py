r"""Metrics: the gain that a direction has on a constant gradient, for each coordinate.

A direction (momentum, Adam) turns gradients into an update. On a constant gradient g its update
settles at gain * g: 1 for plain SGD, 1 / (1 - b) for heavy-ball momentum b, and
$1 / (\sqrt{\hat v} + \epsilon)$ for Adam. A proximal step that follows the direction must use
learning rate times that gain, or it solves another problem (`jaxreg.proximal`).

A metric is a function ``(direction_state, params) -> gain``, where gain is a scalar or a tree of
arrays like params. The functions here make the ready ones; any function of that kind will do.

Source: J. Yun, A. Lozano and E. Yang, *Adaptive proximal gradient methods for structured neural
networks*, NeurIPS 2021.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxreg import _check, _tree

Metric = Callable[[Any, Any], Any]


def sgd() -> Metric:
    """The metric of a direction that passes the gradient on: 1.

    >>> sgd()(optax.EmptyState(), None)
    1.0
    """
    return lambda state, params: 1.0


def momentum(decay: float | jax.Array) -> Metric:
    """The metric of heavy-ball and Nesterov momentum (``optax.trace``): 1 / (1 - decay).

    >>> momentum(0.5)(None, None)
    2.0
    """
    decay = _check.fraction("decay", decay)
    return lambda state, params: 1.0 / (1.0 - decay)


def adam(
    b2: float | jax.Array = 0.999, eps: float | jax.Array = 1e-8, eps_root: float | jax.Array = 0.0
) -> Metric:
    r"""The metric of ``optax.scale_by_adam``: $1 / (\sqrt{\hat v + eps\_root} + eps)$.

    $\hat v$ is the bias-corrected second moment. Where it is 0, no gradient has been seen, and
    the gain is 1.

    >>> direction = optax.scale_by_adam()
    >>> g = jnp.array([2.0, 0.0])
    >>> _, state = direction.update(g, direction.init(g))
    >>> [round(float(x), 5) for x in adam()(state, g)]
    [0.5, 1.0]
    """
    b2 = _check.fraction("b2", b2)
    eps, eps_root = _check.nonnegative("eps", eps), _check.nonnegative("eps_root", eps_root)

    def metric(state: Any, params: Any) -> Any:
        del params
        moments = _adam_state(state)
        count = jnp.asarray(moments.count)

        def gain(v: jax.Array) -> jax.Array:
            v = _tree.widen(v)
            b, e, root = (jnp.asarray(number).astype(v.dtype) for number in (b2, eps, eps_root))
            v_hat = v / (1 - b ** count.astype(v.dtype))
            seen = v > 0
            denominator = jnp.sqrt(jnp.where(seen, v_hat, 1) + root) + e
            return jnp.where(seen, 1 / denominator, 1)

        return jax.tree.map(gain, moments.nu)

    return metric


def _adam_state(state: Any) -> optax.ScaleByAdamState:
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise _check.ArgumentError(
            "metric",
            f"jaxreg.metric.adam for a direction with {len(found)} states of optax.scale_by_adam",
            "a direction with exactly one, or another metric",
        )
    return found[0]


def auto(direction: optax.GradientTransformation) -> Metric:
    """The metric of a direction whose links are all recognised.

    Recognised are ``optax.identity``, ``trace`` and ``scale_by_adam``, jaxreg's
    ``clip_by_global_norm`` and ``l2_decay``, and chains of these. Their hyperparameters are read
    from the functions themselves, since an optimizer's state does not hold them; each reading is
    then checked against what the link does to a toy gradient.

    Raises:
        ValueError: where a link is not recognised, its hyperparameters are traced, or the check
            fails. The remedy is to pass ``metric=``.

    >>> auto(optax.chain(optax.trace(0.5)))(None, None)
    2.0
    """
    metrics = [metric for link in _links(direction) if (metric := _read(link)) is not None]
    if len(metrics) > 1:
        raise _refusal(f"{len(metrics)} links that each change the gain")
    return metrics[0] if metrics else sgd()


def refuse_learning_rate(direction: optax.GradientTransformation) -> None:
    """Raises where a direction is a whole optimizer: its sign would be flipped a second time."""
    for link in _links(direction):
        name, closed = _describe(link.update)
        step_size = closed.get("step_size")
        grows = isinstance(step_size, (int, float)) and step_size > 0
        if name == "optax.scale_by_schedule" or (name == "optax.scale" and not grows):
            raise _check.ArgumentError(
                "direction",
                f"a whole optimizer: one that contains {name}, its learning rate and sign",
                "a direction without them, such as optax.scale_by_adam() in place of "
                "optax.adam(lr), or optax.identity() in place of optax.sgd(lr)",
            )


def _links(direction: optax.GradientTransformation) -> list[optax.GradientTransformation]:
    """The links of a chain, whatever chains and wrappers they stand in."""
    name, closed = _describe(direction.update)
    if name == "optax.chain":
        inits = _describe(direction.init)[1]["init_fns"]
        pairs = zip(inits, closed["update_fns"], strict=True)
        return [link for pair in pairs for link in _links(optax.GradientTransformation(*pair))]
    if name == "optax.with_extra_args_support":
        return _links(closed["tx"])
    return [direction]


def _describe(function: Any) -> tuple[str, dict[str, Any]]:
    """The factory that a nested function came from, and the variables it closes over."""
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    factory = getattr(function, "__qualname__", repr(function)).split(".<locals>")[0]
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return f"{package}.{factory}", {n: c.cell_contents for n, c in zip(names, cells, strict=True)}


def _read(link: optax.GradientTransformation) -> Metric | None:
    """The metric of one link, or None for one whose gain is 1."""
    name, closed = _describe(link.update)
    if name in ("optax.identity", "jaxreg.clip_by_global_norm", "jaxreg.l2_decay"):
        # A clip's coefficient is part of the gain too; `proximal` reads it from the clip's state.
        return None
    readers = {
        "optax.trace": (momentum, ("decay",)),
        "optax.scale_by_adam": (adam, ("b2", "eps", "eps_root")),
    }
    if name not in readers:
        raise _refusal(f"a direction that contains {name}")
    make, settings = readers[name]
    if missing := [s for s in settings if s not in closed]:
        raise _refusal(f"{name} without the settings {missing} that its metric needs")
    if any(isinstance(value, Tracer) for value in closed.values()):
        raise _refusal(f"{name} with traced settings")
    metric = make(*(float(closed[s]) for s in settings))
    _check_on_toy(name, link, metric)
    return metric


def _check_on_toy(name: str, direction: optax.GradientTransformation, metric: Metric) -> None:
    """Compares what `direction` does to a constant gradient with the gain that `metric` claims.

    Three updates suffice: momentum approaches its limit geometrically, so that Aitken's
    extrapolation of three terms gives the limit, and Adam is there from the first step on.
    """
    with jax.ensure_compile_time_eval():
        gradient = jnp.array([1.0, -3.0, 1e-2, -1e-5, 1e-8], jnp.float32)
        state, outputs = direction.init(gradient), []
        for _ in range(3):
            update, state = direction.update(gradient, state, gradient)
            outputs.append(np.asarray(update, np.float64))
        claimed = np.asarray(metric(state, gradient) * gradient, np.float64)
    first, second, third = outputs
    curvature = third - 2 * second + first
    moving = np.abs(curvature) > 1e-5 * np.abs(third)
    correction = (third - second) ** 2 / np.where(moving, curvature, 1)
    limit = np.where(moving, third - correction, third)
    if not np.allclose(limit, claimed, rtol=1e-2):
        raise _refusal(f"{name}, whose update on a constant gradient is not the gain expected")


def _refusal(given: str) -> _check.ArgumentError:
    return _check.ArgumentError(
        "metric",
        f"'auto' for {given}",
        "optax.identity, trace or scale_by_adam, jaxreg's clip and l2_decay, and chains of these; "
        "for another direction metric=, its gain on a constant gradient as a function "
        "(direction_state, params) -> gain",
    )
