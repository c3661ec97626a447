r"""Weight decay, in its two meanings: decoupled (after the learning rate) and coupled (before).

Decoupled decay is one rule at one place, $p \leftarrow p - rate \cdot strength \cdot (p - anchor)$.
What papers call weight decay differs in its arguments:

=============================  =====================================================
AdamW (torch, optax), SGDW     ``weight_decay(s)``: the rate is the learning rate
independent, scheduled         ``rate=lambda t: schedule(t) / peak``
independent, constant          ``rate=1.0``
PaLM                           ``rate=lambda t: schedule(t) ** 2``
AdamC                          ``rate=lambda t: schedule(t) ** 2 / peak``, on normalized layers
cautious                       ``gate="cautious"``
L2-SP                          ``toward="init"``, or the pretrained weights
decay to the EMA               ``toward=jaxreg.ema(0.999)``
AdamHD                         ``profile="huber"``
=============================  =====================================================
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.transforms.selected import (
    at,
    copies,
    floating_leaves,
    numbers,
    product,
    rate_of,
    stepped,
)

Number = float | jax.Array
Gate = Literal["all", "cautious"]
Profile = Literal["quadratic", "huber", "l1"]


@dataclass(frozen=True)
class ema:
    r"""An anchor of `jaxreg.weight_decay` that follows: the moving average of the weights.

    $a_t = decay \cdot a_{t-1} + (1 - decay) \, p_t$ with $a_{-1} = p_0$, in float32 at least; the
    step at t takes $p_t$ toward $a_t$.

    Args:
        decay: a number in [0, 1), or a traced scalar.

    Raises:
        ValueError: where decay is out of its range.

    Example:
        >>> import jax.numpy as jnp, jaxreg
        >>> tx = jaxreg.weight_decay(0.5, rate=1.0, toward=jaxreg.ema(0.9))
        >>> state = tx.init(jnp.zeros((1, 1)))
        >>> updates, state = tx.update(jnp.zeros((1, 1)), state, jnp.ones((1, 1)))
        >>> round(float(updates[0, 0]), 6), round(state.anchor[0].item(), 6)
        (-0.45, 0.1)
    """

    decay: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", _check.decay("decay", self.decay))


class DecayState(NamedTuple):
    """What `weight_decay` keeps.

    Attributes:
        count: steps taken, int32: what schedules are called with.
        amount: rate * strength of the last step, float32 (float64 for 64-bit parameters): the share
            that a plain decay takes. Gate, profile and anchor are not in it.
        anchor: what each decayed leaf is drawn to, in their order; () for 0.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    amount: jax.Array
    anchor: tuple[jax.Array, ...] = ()


class L2State(NamedTuple):
    """What `l2_decay` keeps.

    Attributes:
        count: steps taken, an int32 scalar: what schedules are called with.
        amount: the strength of the last step, float32 (float64 for 64-bit parameters).
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    amount: jax.Array


def weight_decay(
    strength: Number | optax.Schedule,
    rate: Number | optax.Schedule | None = None,
    *,
    toward: Any = None,
    gate: Gate = "all",
    profile: Profile = "quadratic",
    delta: Number | None = None,
    where: _where.Selector | str = _where.kernels,
) -> optax.GradientTransformationExtraArgs:
    r"""Decoupled weight decay, $p \leftarrow p - rate \cdot strength \cdot (p - anchor)$.

    Its place is after the learning rate, in `jaxreg.regularize` or as a link of ``optax.chain``
    behind an optimizer. What papers call weight decay differs in `rate` above all: the learning
    rate (AdamW in torch, optax and Keras), the learning rate over its peak (Loshchilov and
    Hutter's own, "independent"), 1 (independent, constant), the learning rate squared (PaLM), that
    over the peak (AdamC).

    Args:
        strength: a number >= 0, a traced scalar, or a schedule.
        rate: likewise. None means the learning rate, which `regularize` and `proximal` supply
            (as the extra argument ``learning_rate`` of ``update``).
        toward: the anchor. None for 0; "init" for the weights at ``init``, which are copied; a tree
            like params (pretrained weights: L2-SP), copied too; or a `jaxreg.ema`.
        gate: "all"; or "cautious": only entries which the step, as it comes, does not move away
            from the anchor. Where the gradient vanishes, so that there is no step, all decay; yet
            Adam ends at the minimizer of the loss alone, as far as gradients have no noise.
        profile: of the pull at distance d = p - anchor. "quadratic": d; "huber": d cut at ±delta,
            so that large weights are not decayed more; "l1": the sign of d, never past the anchor.
        delta: where "huber" cuts, a number > 0 or a traced scalar; 1 by default.
        where: the leaves to decay: a selector or a path pattern. By default kernels: no bias, no
            normalization, no embedding.

    Returns:
        An optax transformation with state `DecayState`; updates keep their dtype. ``update`` needs
        ``params``.

    Raises:
        ValueError: where an argument is out of its range or unknown; at ``init`` where the
            selector matches no leaf, or one that is not a floating array, or where an anchor does
            not fit the parameters; at ``update`` where params are missing, or where `rate` is None
            and nobody supplies the learning rate.

    Source: I. Loshchilov and F. Hutter, *Decoupled weight decay regularization*, ICLR 2019
    (arXiv:1711.05101). Independent: M. Wortsman et al., arXiv:2309.14322. AdamC: A. Defazio,
    arXiv:2506.02285. Cautious: arXiv:2510.12402. Huber: arXiv:2511.14721. L2-SP: X. Li et al., ICML
    2018.

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
    _check.choice("gate", gate, get_args(Gate))
    _check.choice("profile", profile, get_args(Profile))
    if delta is not None and profile != "huber":
        accepted = 'None, as only profile="huber" has one'
        raise _check.ArgumentError("delta", f"{_check.describe(delta)} with {profile!r}", accepted)
    delta = _check.positive("delta", 1.0 if delta is None else delta)
    if (isinstance(toward, str) and toward != "init") or callable(toward):
        accepted = "'init', None, a tree like params, or a jaxreg.ema(decay)"
        raise _check.ArgumentError("toward", _check.describe(toward), accepted)
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> DecayState:
        amount = jnp.zeros((), _tree.widest_dtype(floating_leaves(selector, params)))
        return DecayState(jnp.zeros((), jnp.int32), amount, _anchor(toward, params, selector))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        learning_rate: Number | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecayState]:
        del extra_args
        params = _check.params_given(params)
        own_rate = rate_of(rate, learning_rate, state.count)
        own_strength = at("strength", strength, state.count)

        def decayed(u: jax.Array, p: jax.Array, anchor: jax.Array | None) -> jax.Array:
            dtype = _tree.wide_dtype(u.dtype)
            real = _tree.real_dtype(dtype)
            move, away = u.astype(dtype), p.astype(dtype)
            if anchor is not None:
                away -= anchor.astype(dtype)
            amount = product(own_rate, own_strength, real)
            pull = _PULLS[profile](away, amount, jnp.asarray(delta).astype(real))
            if gate == "cautious":
                pull = jnp.where(_moves_away(move, away), 0, pull)
            return (move - pull).astype(u.dtype)

        moves, treedef = jax.tree.flatten(updates)
        leaves = treedef.flatten_up_to(params)
        chosen = numbers(selector, params)
        anchors = state.anchor
        if isinstance(toward, ema):
            # Before the step: one that needs the last average would have XLA keep a copy of it.
            pairs = zip(anchors, (leaves[i] for i in chosen), strict=True)
            anchors = tuple(_followed(a, p, toward.decay) for a, p in pairs)
        for i, anchor in zip(chosen, anchors or [None] * len(chosen), strict=True):
            moves[i] = decayed(moves[i], leaves[i], anchor)
        amount = product(own_rate, own_strength, state.amount.dtype)
        after = DecayState(stepped(state.count), amount, anchors)
        return treedef.unflatten(moves), after

    return optax.GradientTransformationExtraArgs(init, update)


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

    In torch ``SGD(weight_decay=s)`` and ``Adam(weight_decay=s)`` are ``l2_decay(s)``. Keras'
    ``regularizers.L2(l)`` adds l * sum p^2 to the loss: that is ``l2_decay(2 * l)``.

    Args:
        strength: a number >= 0, a traced scalar, or a schedule.
        where: the leaves it is for: a selector or a path pattern; by default kernels.

    Returns:
        An optax transformation with state `L2State`; gradients keep their dtype. ``update`` needs
        ``params``.

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

    def init(params: optax.Params) -> L2State:
        amount = jnp.zeros((), _tree.widest_dtype(floating_leaves(selector, params)))
        return L2State(jnp.zeros((), jnp.int32), amount)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, L2State]:
        params = _check.params_given(params)
        amount = jnp.asarray(at("strength", strength, state.count))

        def add(g: jax.Array, p: jax.Array, selected: bool) -> jax.Array:
            if not selected:
                return g
            dtype = _tree.wide_dtype(g.dtype)
            return (g.astype(dtype) + amount.astype(dtype) * p.astype(dtype)).astype(g.dtype)

        after = L2State(stepped(state.count), amount.astype(state.amount.dtype))
        return jax.tree.map(add, updates, params, selector.mask(params)), after

    return optax.GradientTransformation(init, update)


# The pull, by the distance from the anchor -------------------------------------------------------


def _toward_size(away: jax.Array, size: jax.Array) -> jax.Array:
    """Of `size` in the direction of `away`, of a complex number too."""
    return jnp.sign(away) * size.astype(away.dtype)


_PULLS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "quadratic": lambda away, amount, delta: amount.astype(away.dtype) * away,
    "huber": lambda away, amount, delta: _toward_size(
        away, amount * jnp.minimum(jnp.abs(away), delta)
    ),
    "l1": lambda away, amount, delta: _toward_size(away, jnp.minimum(jnp.abs(away), amount)),
}


def _moves_away(move: jax.Array, away: jax.Array) -> jax.Array:
    """Whether a step increases the distance, to first order."""
    # By the sign, as the product of two small numbers may underflow.
    return jnp.real(jnp.conj(jnp.sign(move)) * away) > 0


def _anchor(toward: Any, params: Any, selector: _where.Selector) -> tuple[jax.Array, ...]:
    """What the state holds before the first step: copies, as parameters and states are donated."""
    if toward is None:
        return ()
    if not isinstance(toward, ema):
        return copies("toward", toward, selector, params)
    # An average in 16 bits would soon stand still.
    return tuple(map(_tree.widen, copies("toward", "init", selector, params)))


def _followed(average: jax.Array, p: jax.Array, decay: Number) -> jax.Array:
    share = jnp.asarray(decay).astype(average.dtype)
    return share * average + (1 - share) * p.astype(average.dtype)
