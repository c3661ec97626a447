"""Weight decay, in its two meanings: decoupled (after the learning rate) and coupled (before)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where

Number = float | jax.Array


class DecayState(NamedTuple):
    """Steps taken: an int32 scalar, what schedules are called with."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def weight_decay(
    strength: Number | optax.Schedule,
    rate: Number | optax.Schedule | None = None,
    *,
    where: _where.Selector | str = _where.kernels,
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled weight decay, $p \leftarrow p - rate \cdot strength \cdot p$ at each step.

    Its place is after the learning rate, in `jaxreg.regularize` or as a link of ``optax.chain``
    behind an optimizer. What papers call weight decay differs in `rate` alone: the learning rate
    (AdamW in torch, optax and Keras), the learning rate over its peak (Loshchilov and Hutter's
    own, "independent"), 1 (independent, constant), the learning rate squared (PaLM).

    Args:
        strength: a number >= 0, a traced scalar, or a schedule.
        rate: likewise. None means the learning rate, which `regularize` and `proximal` supply
            (as the extra argument ``learning_rate`` of ``update``).
        where: the leaves to decay: a selector or a path pattern. By default kernels: no bias, no
            normalization, no embedding.

    Returns:
        An optax transformation; updates keep their dtype. ``update`` needs ``params``.

    Raises:
        ValueError: where strength or rate is negative or NaN; at ``init`` where the selector
            matches no leaf, or one that is not a floating array; at ``update`` where params are
            missing, or where `rate` is None and nobody supplies the learning rate.

    Source: I. Loshchilov and F. Hutter, *Decoupled weight decay regularization*, ICLR 2019.

    >>> import jax, jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(0.5), jaxreg.weight_decay(0.1, rate=0.5))
    >>> params = {"kernel": jnp.array([[2.0]]), "bias": jnp.array([2.0])}
    >>> grads = jax.tree.map(jnp.zeros_like, params)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> {name: round(float(u.sum()), 6) + 0.0 for name, u in updates.items()}
    {'bias': 0.0, 'kernel': -0.1}
    """
    strength = _check.number_or_schedule("strength", strength)
    rate = None if rate is None else _check.number_or_schedule("rate", rate)
    selector = _where.as_selector(where)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        learning_rate: Number | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecayState]:
        del extra_args
        own_rate = learning_rate if rate is None else rate
        if own_rate is None:
            raise _check.ArgumentError(
                "rate",
                "None outside of jaxreg.regularize, where no learning rate is known",
                "a number >= 0 or a schedule, such as the one the optimizer is given",
            )
        factors = _at(own_rate, state.count), _at(strength, state.count)

        def amount(dtype: Any) -> jax.Array:
            first, second = (jnp.asarray(factor).astype(dtype) for factor in factors)
            return -first * second

        return _add(updates, params, amount, selector), _next(state)

    return optax.GradientTransformationExtraArgs(_init(selector), update)


def l2_decay(
    strength: Number | optax.Schedule, *, where: _where.Selector | str = _where.kernels
) -> optax.GradientTransformation:
    r"""Coupled L2: adds the gradient of $\frac{strength}{2} \|p\|^2$, $g + strength \cdot p$.

    Its place is before the direction (momentum, Adam), where it is the same as adding the penalty
    to the loss. Under an adaptive direction that is another thing than weight decay: coordinates
    with large gradients are shrunk less.

    Behind a clip that is active, with coefficient c, the loss's gradient is c times as large and
    this one is not: the minimizer is that of strength / c, as with ``clip_grad_norm_`` and the
    ``weight_decay`` of an optimizer in torch. The penalty ``jaxreg.L2(strength)`` follows the clip.

    Args:
        strength: a number >= 0, a traced scalar, or a schedule.
        where: the leaves it is for: a selector or a path pattern; by default kernels.

    Returns:
        An optax transformation; gradients keep their dtype. ``update`` needs ``params``.

    Raises:
        ValueError: where the strength is negative or NaN; at ``init`` where the selector matches
            no leaf, or one that is not a floating array; at ``update`` where params are missing.

    >>> import jax, jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(jaxreg.l2_decay(0.1), optax.sgd(0.5))
    >>> w = jnp.array([2.0])
    >>> updates, _ = tx.update(jnp.array([1.0]), tx.init(w), w)
    >>> round(float(updates[0]), 6)
    -0.6
    """
    strength = _check.number_or_schedule("strength", strength)
    selector = _where.as_selector(where)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, DecayState]:
        amount = jnp.asarray(_at(strength, state.count))
        return _add(updates, params, amount.astype, selector), _next(state)

    return optax.GradientTransformation(_init(selector), update)


def _init(selector: _where.Selector) -> optax.TransformInitFn:
    def init(params: optax.Params) -> DecayState:
        # A selector without a match is an error before the first step.
        chosen = jax.tree.map(lambda p, yes: p if yes else None, params, selector.mask(params))
        _tree.check_floating("params", chosen)
        return DecayState(jnp.zeros((), jnp.int32))

    return init


def _add(
    updates: optax.Updates,
    params: optax.Params | None,
    amount: Callable[[Any], jax.Array],
    selector: _where.Selector,
) -> optax.Updates:
    """Updates + amount * params on the selected leaves, in the updates' dtype, rounded once."""
    params = _check.params_given(params)

    def add(u: jax.Array, p: jax.Array, selected: bool) -> jax.Array:
        if not selected:
            return u
        dtype = _tree.wide_dtype(u.dtype)
        return (u.astype(dtype) + amount(dtype) * p.astype(dtype)).astype(u.dtype)

    return jax.tree.map(add, updates, params, selector.mask(params))


def _at(value: Number | optax.Schedule, count: jax.Array) -> Any:
    return value(count) if _check.is_schedule(value) else value


def _next(state: DecayState) -> DecayState:
    return DecayState(jnp.asarray(optax.safe_increment(state.count)))
