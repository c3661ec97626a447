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

    Returns:
        A metric whose gain is a scalar.

    >>> sgd()(optax.EmptyState(), None)
    1.0
    """
    return lambda state, params: 1.0


def momentum(decay: float | jax.Array) -> Metric:
    """The metric of heavy-ball and Nesterov momentum (``optax.trace``): 1 / (1 - decay).

    Args:
        decay: the momentum, in [0, 1), or a traced scalar.

    Returns:
        A metric whose gain is a scalar.

    Raises:
        ValueError: where decay is outside [0, 1).

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

    Args:
        b2: decay of the second moment, in [0, 1), or a traced scalar.
        eps: added to the root, >= 0, or a traced scalar.
        eps_root: added under the root, >= 0, or a traced scalar.

    Returns:
        A metric whose gain is a tree of arrays like params, without the leaves that the direction
        is masked from. It needs a direction with one ``optax.scale_by_adam``.

    Raises:
        ValueError: where a number is out of its range; when the metric is called, where the
            direction has no such state, or several.

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
        found = _tree.nodes(state, optax.ScaleByAdamState)
        if len(found) != 1:
            raise _check.ArgumentError(
                "metric",
                f"jaxreg.metric.adam for a direction with {len(found)} states of "
                "optax.scale_by_adam",
                "a direction with exactly one, or another metric",
            )
        [moments] = found
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


def auto(direction: optax.GradientTransformation) -> Metric:
    """The metric of a direction whose links are all recognised.

    Recognised are ``optax.identity``, ``trace`` and ``scale_by_adam``, jaxreg's
    ``clip_by_global_norm`` and ``l2_decay`` before them, and chains of these. Their
    hyperparameters are read from the functions themselves, since an optimizer's state does not
    hold them; each reading is then checked against what the link does to a toy gradient.

    Args:
        direction: the transformation, without learning rate and sign.

    Returns:
        A metric.

    Raises:
        ValueError: where a link is not recognised, its hyperparameters are traced, or the check
            fails. The remedy is to pass ``metric=``.

    >>> auto(optax.chain(optax.trace(0.5)))(None, None)
    2.0
    """
    metrics: list[Metric] = []
    for link in _links(direction):
        if metrics and _describe(link.update)[0] == "jaxreg.l2_decay":
            raise _refusal("l2_decay behind a link with a gain, which L2 would not have")
        if (metric := _read(link)) is not None:
            metrics.append(metric)
    if len(metrics) > 1:
        raise _refusal(f"{len(metrics)} links that each change the gain")
    return metrics[0] if metrics else sgd()


def refuse_learning_rate(direction: optax.GradientTransformation) -> None:
    """Raises where a direction holds a learning rate: its sign would be flipped a second time."""
    for link in _links(direction):
        name, closed = _describe(link.update)
        factor = closed.get("step_size")
        grows = _check.is_concrete(factor) and np.all(np.asarray(factor) > 0)
        whole = name in ("optax.scale_by_schedule", "jaxreg.proximal")
        if whole or (name == "optax.scale" and not grows):
            raise _whole_optimizer(f"contains {name}, its learning rate and sign")


def refuse_descent(direction: optax.GradientTransformation, params: Any) -> None:
    """Raises where an unknown link of a direction goes down the gradient, as it does on a toy."""
    for link in _links(direction):
        if _describe(link.update)[0] not in {*_GAIN_ONE, *_READERS} and _descends(link, params):
            raise _whole_optimizer("goes down the gradient")


def _descends(link: optax.GradientTransformation, params: Any) -> bool:
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
    if name in _GAIN_ONE:
        return None
    if name not in _READERS:
        raise _refusal(f"a direction that contains {name}")
    make, settings, approach = _READERS[name]
    if missing := [s for s in settings if s not in closed]:
        raise _refusal(f"{name} without the settings {missing} that its metric needs")
    if any(isinstance(value, Tracer) for value in closed.values()):
        raise _refusal(f"{name} with traced settings")
    metric = make(closed)
    _check_on_toy(name, link, metric, [approach(closed, steps) for steps in (1, 2, 3)])
    return metric


def _approach_of_trace(closed: dict[str, Any], steps: int) -> float:
    """The share of its settled gain that momentum has after that many constant gradients."""
    return 1 - float(closed["decay"]) ** (steps + bool(closed["nesterov"]))


def _approach_of_adam(closed: dict[str, Any], steps: int) -> float:
    """1, as the moments are bias-corrected; Nesterov's mixes two that are corrected unlike."""
    b1 = float(closed["b1"])
    if not closed["nesterov"]:
        return 1.0
    return b1 * (1 - b1**steps) / (1 - b1 ** (steps + 1)) + (1 - b1) / (1 - b1**steps)


# A clip's coefficient is part of the gain too; `proximal` reads it from the clip's state.
_GAIN_ONE = ("optax.identity", "jaxreg.clip_by_global_norm", "jaxreg.l2_decay")

# For each link with a gain: its metric, the settings that are read, and how the gain is approached.
_READERS: dict[str, tuple[Callable[..., Metric], tuple[str, ...], Callable[..., float]]] = {
    "optax.trace": (
        lambda closed: momentum(float(closed["decay"])),
        ("decay", "nesterov"),
        _approach_of_trace,
    ),
    "optax.scale_by_adam": (
        lambda closed: adam(*(float(closed[setting]) for setting in ("b2", "eps", "eps_root"))),
        ("b1", "b2", "eps", "eps_root", "nesterov"),
        _approach_of_adam,
    ),
}


def _check_on_toy(
    name: str, direction: optax.GradientTransformation, metric: Metric, approach: list[float]
) -> None:
    """Compares the first updates on a constant gradient with shares of the gain `metric` claims."""
    with jax.ensure_compile_time_eval():
        gradient = jnp.array([1.0, -3.0, 1e-2, -1e-5, 1e-8], jnp.float32)
        state = direction.init(gradient)
        for share in approach:
            update, state = direction.update(gradient, state, gradient)
            claimed = share * np.asarray(metric(state, gradient) * gradient, np.float64)
            # Loose enough for accumulators in bfloat16.
            if not np.allclose(np.asarray(update, np.float64), claimed, rtol=2e-2):
                raise _refusal(f"{name}, whose update is not the gain expected times the gradient")


def _refusal(given: str) -> _check.ArgumentError:
    return _check.ArgumentError(
        "metric",
        f"'auto' for {given}",
        "optax.identity, trace or scale_by_adam, jaxreg's clip and l2_decay, and chains of these; "
        "for another direction metric=, its gain on a constant gradient as a function "
        "(direction_state, params) -> gain",
    )
