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
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree
from jaxreg.norms import rms

Metric = Callable[[Any, Any], Any]
Number = float | jax.Array


def sgd() -> Metric:
    """The metric of a direction that passes the gradient on: 1.

    Returns:
        A metric whose gain is a scalar.

    >>> sgd()(None, None)
    1.0
    """
    return lambda state, params: 1.0


def momentum(decay: Number) -> Metric:
    """The metric of heavy-ball momentum (``optax.trace``): 1 / (1 - decay).

    Args:
        decay: the momentum, in [0, 1), or a traced scalar.

    Returns:
        A metric whose gain is a scalar.

    Raises:
        ValueError: where decay is outside [0, 1).

    >>> momentum(0.5)(None, None)
    2.0
    """
    decay = _check.decay("decay", decay)
    return lambda state, params: 1.0 / (1.0 - decay)


def nesterov(decay: Number) -> Metric:
    """The metric of ``optax.trace(decay, nesterov=True)``: 1 / (1 - decay), as of `momentum`.

    Args:
        decay: the momentum, in [0, 1), or a traced scalar.

    Returns:
        A metric whose gain is a scalar.

    Raises:
        ValueError: where decay is outside [0, 1).

    >>> nesterov(0.5)(None, None)
    2.0
    """
    return momentum(decay)


@dataclass(frozen=True)
class Adaptive:
    """A metric that is 1 over a scale of the gradients of each coordinate, found in a state.

    Where the scale is 0, no gradient has been seen, and the gain is 1.
    """

    link: str
    state: str
    """The name of the class of the link's state: optax exports only some of them."""
    scale_of: Callable[[Any], Any]
    factor: Number = 1.0
    """What the gain is multiplied by where gradients have been seen."""

    def scale(self, direction_state: Any) -> Any:
        """A tree of scales like params, without the leaves that the direction is masked from."""
        is_one = lambda node: type(node).__name__ == self.state  # noqa: E731
        found = list(filter(is_one, jax.tree.leaves(direction_state, is_leaf=is_one)))
        if len(found) != 1:
            raise _check.ArgumentError(
                "metric",
                f"the metric of {self.link} for a direction with {len(found)} such states",
                f"a direction with exactly one {self.link}, or another metric",
            )
        return self.scale_of(found[0])

    def __call__(self, direction_state: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda d: Gain(self.factor, d).values(), self.scale(direction_state))


def adam(b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0) -> Metric:
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

    >>> import jax.numpy as jnp, optax
    >>> direction = optax.scale_by_adam()
    >>> g = jnp.array([2.0, 0.0])
    >>> _, state = direction.update(g, direction.init(g))
    >>> [round(float(x), 5) for x in adam()(state, g)]
    [0.5, 1.0]
    """
    b2 = _check.decay("b2", b2)
    eps, eps_root = _check.nonnegative("eps", eps), _check.nonnegative("eps_root", eps_root)

    def scale(state: Any) -> Any:
        moments = _unbiased(state.nu, b2, state.count)
        return jax.tree.map(lambda v: _root(v, eps, eps_root), moments)

    return Adaptive("optax.scale_by_adam", "ScaleByAdamState", scale)


def amsgrad(eps: Number = 1e-8, eps_root: Number = 0.0) -> Metric:
    r"""The metric of ``optax.scale_by_amsgrad``: $1 / (\sqrt{\hat v_{max} + eps\_root} + eps)$.

    Args:
        eps: added to the root, >= 0, or a traced scalar.
        eps_root: added under the root, >= 0, or a traced scalar.

    Returns:
        A metric as that of `adam`; it needs a direction with one ``optax.scale_by_amsgrad``.

    Raises:
        ValueError: as `adam` does.

    >>> import jax.numpy as jnp, optax
    >>> direction = optax.scale_by_amsgrad()
    >>> g = jnp.array([2.0, 0.0])
    >>> _, state = direction.update(g, direction.init(g))
    >>> [round(float(x), 5) for x in amsgrad()(state, g)]
    [0.5, 1.0]
    """
    eps, eps_root = _check.nonnegative("eps", eps), _check.nonnegative("eps_root", eps_root)

    def scale(state: Any) -> Any:
        return jax.tree.map(lambda v: _root(v, eps, eps_root), state.nu_max)

    return Adaptive("optax.scale_by_amsgrad", "ScaleByAmsgradState", scale)


def adamax(eps: Number = 1e-8) -> Metric:
    """The metric of ``optax.scale_by_adamax``: 1 over the decayed largest gradient.

    Args:
        eps: what that link adds to the size of each gradient, >= 0, or a traced scalar.

    Returns:
        A metric as that of `adam`; it needs a direction with one ``optax.scale_by_adamax``.

    Raises:
        ValueError: as `adam` does.

    >>> import jax.numpy as jnp, optax
    >>> direction = optax.scale_by_adamax()
    >>> g = jnp.array([2.0, 0.0])
    >>> _, state = direction.update(g, direction.init(g))
    >>> [round(float(x), 5) for x in adamax()(state, g)]
    [0.5, 1.0]
    """
    eps = _check.nonnegative("eps", eps)

    def scale(state: Any) -> Any:
        return jax.tree.map(
            lambda u: jnp.where(u > jnp.asarray(eps).astype(u.dtype), _tree.widen(u), 0), state.nu
        )

    return Adaptive("optax.scale_by_adamax", "ScaleByAdamState", scale)


def rmsprop(
    decay: Number = 0.9,
    eps: Number = 1e-8,
    *,
    centered: bool = False,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> Adaptive:
    r"""The metric of ``optax.scale_by_rms``: $1 / \sqrt{v + eps}$.

    Args:
        decay: decay of the second moment, in [0, 1), or a traced scalar.
        eps: >= 0, or a traced scalar.
        centered: whether the squared mean gradient is taken off v, as ``optax.scale_by_stddev``
            does.
        eps_in_sqrt: whether eps is added under the root, or to it.
        bias_correction: whether the moments are corrected for their start at 0.

    Returns:
        A metric as that of `adam`; it needs a direction with one such link.

    Raises:
        ValueError: as `adam` does.

    >>> import jax.numpy as jnp, optax
    >>> direction = optax.scale_by_rms(decay=0.75)
    >>> g = jnp.array([4.0, 0.0])
    >>> _, state = direction.update(g, direction.init(g))
    >>> rmsprop(decay=0.75)(state, g).tolist()
    [0.5, 1.0]
    """
    decay, eps = _check.decay("decay", decay), _check.nonnegative("eps", eps)
    outside, inside = (0.0, eps) if eps_in_sqrt else (eps, 0.0)

    def scale(state: Any) -> Any:
        def unbiased(moments: Any) -> Any:
            return _unbiased(moments, decay, state.count) if bias_correction else moments

        power = unbiased(state.nu)
        if not centered:
            return jax.tree.map(lambda v: _root(v, outside, inside), power)

        def spread(v: jax.Array, m: jax.Array) -> jax.Array:
            # Where a gradient is constant its spread is 0, though it has been seen.
            scale = jnp.sqrt(_tree.widen(v) - jnp.square(_tree.widen(m)) + inside) + outside
            return jnp.where(v > 0, scale, 0)

        return jax.tree.map(spread, power, unbiased(state.mu))

    link, kind = ("stddev", "RStdDev") if centered else ("rms", "Rms")
    state = f"ScaleBy{kind}{'WithCount' if bias_correction else ''}State"
    return Adaptive(f"optax.scale_by_{link}", state, scale)


def adagrad(eps: Number = 1e-7) -> Metric:
    r"""The metric of ``optax.scale_by_rss``: $1 / \sqrt{\sum g^2 + eps}$.

    Args:
        eps: added under the root, >= 0, or a traced scalar.

    Returns:
        A metric as that of `adam`; it needs a direction with one ``optax.scale_by_rss``. The sum
        begins with that link's ``initial_accumulator_value``.

    Raises:
        ValueError: as `adam` does.

    >>> import jax.numpy as jnp, optax
    >>> direction = optax.scale_by_rss(initial_accumulator_value=0.0)
    >>> g = jnp.array([2.0, 0.0])
    >>> _, state = direction.update(g, direction.init(g))
    >>> [round(float(x), 5) for x in adagrad()(state, g)]
    [0.5, 1.0]
    """
    eps = _check.nonnegative("eps", eps)

    def scale(state: Any) -> Any:
        return jax.tree.map(lambda v: _root(v, 0.0, eps), state.sum_of_squares)

    return Adaptive("optax.scale_by_rss", "ScaleByRssState", scale)


@dataclass(frozen=True)
class Block:
    """One scalar a leaf, in direction and prox alike (see `block`)."""

    inner: Literal["auto"] | Metric


def block(metric: Literal["auto"] | Metric = "auto") -> Block:
    r"""One gain a leaf, for penalties that have no prox for an elementwise step.

    The direction's own scale of each coordinate, such as Adam's $d = \sqrt{\hat v} + eps$, is
    replaced by its root mean square over the leaf, in the direction and in the prox alike. What
    is left is Adam with one second moment a leaf, which a `jaxreg.Nuclear` or a
    `jaxreg.SortedL1` can follow.

    Args:
        metric: "auto", or the metric of the direction.

    Returns:
        What `jaxreg.proximal` takes for a ``metric``; ``"block"`` stands for ``block("auto")``.

    Raises:
        ValueError: where metric is neither "auto" nor a function.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.proximal(
    ...     optax.scale_by_adam(), 0.1, jaxreg.Nuclear(0.5), metric=jaxreg.metric.block()
    ... )
    >>> w = jnp.eye(2)
    >>> updates, _ = tx.update(w, tx.init(w), w)
    >>> [round(float(x), 3) for x in jnp.diag(w + updates)]
    [0.788, 0.788]
    """
    if metric != "auto" and not callable(metric):
        given = _check.describe(metric)
        raise _check.ArgumentError("metric", given, "'auto' or a function (state, params) -> gain")
    return Block(metric)


class Gain(NamedTuple):
    """The gain of one leaf: `factor`, over `scale` where that is not 0."""

    factor: Any
    """A scalar, or an array of the leaf's shape; None where there is no gain."""
    scale: jax.Array | None = None
    """None for 1; 0 where no gradient has been seen."""

    def __mul__(self, other: "Gain") -> "Gain":  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.factor is None or other.factor is None:
            return Gain(None)
        scales = [gain.scale for gain in (self, other) if gain.scale is not None]
        both = scales[0] * scales[1] if len(scales) == 2 else scales[0] if scales else None
        return Gain(self.factor * other.factor, both)

    def is_elementwise(self) -> bool:
        """Whether there is one number for each coordinate."""
        return self.scale is not None or jnp.ndim(self.factor) > 0

    def values(self) -> Any:
        """One number, or one for each coordinate."""
        if self.scale is None:
            return self.factor
        factor = jnp.asarray(self.factor).astype(self.scale.dtype)
        return jnp.where(self.scale > 0, factor / jnp.where(self.scale > 0, self.scale, 1), 1)

    def blocked(self, update: jax.Array) -> tuple["Gain", jax.Array]:
        """One number for the leaf, and the update that a direction with that gain would give."""
        if self.factor is None or not self.is_elementwise():
            return self, update
        scale = 1 / self.factor if self.scale is None else self.scale
        mean = rms(scale).astype(scale.dtype)
        mean = jnp.where(mean > 0, mean, 1)
        factor = 1 if self.scale is None else self.factor
        return Gain(factor / mean), update * (scale / mean).astype(update.dtype)


def _unbiased(moments: Any, decay: Number, count: Any) -> Any:
    """Moments of zero-started averages, corrected as optax does."""

    def corrected(v: jax.Array) -> jax.Array:
        v = _tree.widen(v)
        b = jnp.asarray(decay).astype(v.dtype)
        return v / (1 - b ** jnp.asarray(count).astype(v.dtype))

    return jax.tree.map(corrected, moments)


def _root(v: jax.Array, outside: Number, inside: Number) -> jax.Array:
    """sqrt(v + inside) + outside; 0 where v is, whose derivative is finite."""
    v = _tree.widen(v)
    outside, inside = (jnp.asarray(number).astype(v.dtype) for number in (outside, inside))
    seen = v > 0
    return jnp.where(seen, jnp.sqrt(jnp.where(seen, v, 1) + inside) + outside, 0)
