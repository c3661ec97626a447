"""Whole optimizers: the ordered builder `regularize`, and ready-made proximal ones."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from jaxreg import _check
from jaxreg.transforms import metric as _metric
from jaxreg.transforms.clipping import clip_by_global_norm
from jaxreg.transforms.decay import l2_decay
from jaxreg.transforms.decay import weight_decay as _weight_decay
from jaxreg.transforms.links import describe, learning_rate_in, links
from jaxreg.transforms.parts import Parts
from jaxreg.transforms.proximal import proximal
from jaxreg.transforms.reading import WRAPPERS

Number = float | jax.Array
Transformation = optax.GradientTransformation


def regularize(
    direction: Transformation,
    learning_rate: Number | optax.Schedule,
    *,
    clip: Number | Transformation | None = None,
    l2: Number | optax.Schedule | Transformation | None = None,
    decay: Number | optax.Schedule | Transformation | None = None,
    penalty: Parts | None = None,
    metric: Literal["auto", "block"] | _metric.Metric | _metric.Block = "auto",
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with its regularizers in the one order that is right.

    Clip, then coupled L2, then the direction (momentum, Adam), then the learning rate, then
    decoupled weight decay, and the penalties' proximal step last. Each part is optional; a number
    stands for the plain transformation, and a transformation (with its own ``where``, say) takes
    its place.

    The clip is of the loss's gradient alone. While it is active, with coefficient c, it scales
    that gradient and not `l2`, whose effective strength is l2 / c (as with ``clip_grad_norm_`` and
    the ``weight_decay`` of an optimizer in torch). The step of ``penalty=L2(s)`` follows the clip.

    Args:
        direction: an optax transformation without learning rate and sign:
            ``optax.scale_by_adam()``, ``optax.trace(0.9)``, ``optax.identity()``.
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        clip: the largest global gradient norm, or a clipping transformation.
        l2: strength of coupled L2, a number or a schedule; or a `jaxreg.l2_decay`.
        decay: strength, a number or a schedule, of decoupled weight decay at the rate of the
            learning rate, as in AdamW; or a `jaxreg.weight_decay` with another rate.
        penalty: one penalty or several, each for its own leaves (`jaxreg.proximal`).
        metric: the gain of the direction, where "auto" does not recognise it.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    Raises:
        ValueError: where an argument is out of its range (its name is in the message), and as
            `jaxreg.proximal` does.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.regularize(
    ...     optax.scale_by_adam(), 0.1, clip=1.0, decay=0.01, penalty=jaxreg.L1(0.5)
    ... )
    >>> w = jnp.array([1.0, 0.01])
    >>> updates, state = tx.update(jnp.array([0.5, 0.5]), tx.init(w), w)
    >>> optax.apply_updates(w, updates)[1].item()
    0.0
    """
    _check.transformation("direction", direction)
    clip = _link("clip", clip, _check.positive, clip_by_global_norm)
    l2 = _link("l2", l2, _check.number_or_schedule, l2_decay)
    decay = _link("decay", decay, _check.number_or_schedule, _weight_decay)
    before = [link for link in (clip, l2) if link is not None]
    return proximal(
        optax.chain(*before, direction) if before else direction,
        learning_rate,
        () if penalty is None else penalty,
        metric=metric,
        decay=decay,
    )


def _link(
    name: str, value: Any, check: Callable[[str, Any], Any], make: Callable[[Any], Transformation]
) -> Transformation | None:
    """A transformation as it is; a number, checked under the argument's name, made into one."""
    if value is None:
        return None
    taken, accepted = _TAKES[name]
    if not _check.is_transformation(value):
        try:
            return make(check(name, value))
        except _check.ArgumentError as error:
            raise _check.ArgumentError(name, error.given, accepted) from None
    for link in links(value):
        own = _factory(link)
        if own in _PLACES and _PLACES[own] not in taken:
            raise _check.ArgumentError(name, own, f"{accepted}; this {_PLACES[own]}")
    if rate := learning_rate_in(value):
        raise _check.ArgumentError(name, f"a whole optimizer, with {rate}", accepted)
    return value


def _factory(link: Transformation) -> str:
    """What made a link; a clip by what made its rule, where that has a place of its own."""
    own, closed = describe(link.update)
    rule = describe(closed["rule"])[0] if own == "jaxreg.clip" else own
    return rule if rule in _PLACES else own


# Where a link belongs that has one place only: at another it would do something else in silence.
_CLIP, _LAST = "is a clip, for clip=", "comes last in a chain, behind the optimizer"
_COUPLED = "changes the gradient, for l2="
_DECOUPLED = "comes after the learning rate, for decay="
_AROUND = "goes around a direction or a whole optimizer"
_AFTER = "clips updates, in optax.chain(direction, link), or around one with direction="
_PLACES = {
    **dict.fromkeys(("jaxreg.clip", "jaxreg.clip_by_value"), _CLIP),
    **dict.fromkeys(("optax.clip", "optax.clip_by_global_norm", "optax.adaptive_grad_clip"), _CLIP),
    **dict.fromkeys(("jaxreg.l2_decay", "jaxreg.ewc"), _COUPLED),
    **dict.fromkeys(("optax.add_decayed_weights", "jaxreg.add_decayed_weights"), _COUPLED),
    **dict.fromkeys(("jaxreg.weight_decay", "jaxreg.constrained_decay"), _DECOUPLED),
    **dict.fromkeys(("jaxreg.hyperball", "jaxreg.spectral_decay"), _DECOUPLED),
    **dict.fromkeys(("jaxreg.spectral_cap", "jaxreg.constrain", "jaxreg.watch"), _LAST),
    **dict.fromkeys(("jaxreg.average_of_params", "jaxreg.lookahead"), _LAST),
    **dict.fromkeys((*WRAPPERS, "jaxreg.skip_step", "jaxreg.stochastic_rounding"), _AROUND),
    **dict.fromkeys(("jaxreg.selective_projection_decay", "jaxreg.proximal"), _AROUND),
    "jaxreg.clip_update_rms": _AFTER,
}
# Of each argument the links that it takes, and what it says that it takes.
_STRENGTH = "a finite number >= 0, a schedule, or a link such as jaxreg."
_DECAYS = (_DECOUPLED, _LAST), _STRENGTH + "weight_decay(0.01)"
_TAKES = {
    "clip": (
        (_CLIP,),
        "a number > 0, or a link such as jaxreg.clip_by_global_norm(1.0), which "
        "takes a schedule under optax.inject_hyperparams",
    ),
    "l2": ((_COUPLED,), _STRENGTH + "l2_decay(1e-4)"),
    "decay": _DECAYS,
    "weight_decay": _DECAYS,
}


def prox_sgd(
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    momentum: Number | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Proximal gradient descent, with heavy-ball or Nesterov momentum if wanted.

    $m \leftarrow momentum \cdot m + g$, then $p \leftarrow \mathrm{prox}_{lr / (1 - momentum)}(p
    - lr \cdot m)$. The updates are those of ``optax.sgd`` with a proximal step after them. On
    small full-batch problems it needs fewer steps than `prox_adam`.

    Args:
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: one penalty or several, each for its own leaves (kernels by default).
        momentum: a number in [0, 1), or None.
        nesterov: whether to look ahead along the momentum.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    Raises:
        ValueError: as `jaxreg.proximal` does, or where momentum is out of its range or in 16 bits.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.prox_sgd(0.5, jaxreg.L1(1.0))
    >>> w = jnp.array([2.0, 0.25])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
    >>> optax.apply_updates(w, updates).tolist()
    [1.5, 0.0]
    """
    if momentum is None:
        return proximal(optax.identity(), learning_rate, penalty, metric=_metric.sgd())
    decay = _check.decay("momentum", momentum)
    trace = optax.trace(decay, nesterov)
    return proximal(trace, learning_rate, penalty, metric=_metric.momentum(decay))


def prox_adam(
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with a proximal step in Adam's own metric: it ends at the penalized minimizer.

    $p \leftarrow \mathrm{prox}_{lr / d}(p - lr \, \hat m / d)$, $d = \sqrt{\hat v + eps\_root} +
    eps$. The first part of each update is ``optax.adam``'s. The penalty's ``residual`` says how
    far the end is from a minimizer; on full-batch problems a smaller b2 gets there sooner.

    Where gradients vanish, d falls to eps and the step rises to lr / eps. A penalty that is not
    convex (`jaxreg.MCP`, `jaxreg.SCAD`, `jaxreg.L0`) then jumps, and takes converged weights to 0:
    with such a penalty choose eps >= lr / gamma. Weights in bfloat16 lose small steps to rounding,
    and with them zeros: a larger learning rate or a smaller b2 (0.99) helps. Weights that never get
    a gradient, such as those of pixels that are always dark, have the gain 1, and shrink by lr
    times the strength a step, far more slowly than the others.

    Args:
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: one penalty or several, each for its own leaves (kernels by default).
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        eps_root: added to the second moment under the root, >= 0.
        nesterov: whether to use Nesterov's first moment, as ``optax.nadam``.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    Raises:
        ValueError: as `jaxreg.proximal` does, or where a number is out of its range, or a decay in
            16 bits, where .999 is 1.

    Source: J. Yun, A. Lozano and E. Yang, *Adaptive proximal gradient methods for structured
    neural networks*, NeurIPS 2021.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.prox_adam(0.1, jaxreg.L1(1.0))
    >>> w = jnp.array([2.0, 0.25])
    >>> updates, _ = tx.update(jnp.array([0.1, 0.1]), tx.init(w), w)
    >>> optax.apply_updates(w, updates)[1].item()
    0.0
    """
    b1 = _check.decay("b1", b1)
    gain = _metric.adam(b2, eps, eps_root)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
    return proximal(adam, learning_rate, penalty, metric=gain)


def prox_adamw(
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    weight_decay: Number | optax.Schedule | Transformation = 1e-4,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW with a proximal step in Adam's own metric, after its decoupled weight decay.

    $p \leftarrow \mathrm{prox}_{lr / d}(p - lr \, \hat m / d - lr \cdot weight\_decay \cdot p)$
    with d as in `prox_adam`.

    Args:
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: as in `jaxreg.proximal`.
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root of the second moment, >= 0.
        eps_root: added to the second moment under the root, >= 0.
        weight_decay: the strength of `jaxreg.weight_decay` on kernels (``optax.adamw`` decays all
            leaves by default), or one of those with another rate or place.
        nesterov: whether to use Nesterov's first moment.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    Raises:
        ValueError: as `prox_adam` does, or where weight_decay is negative.

    Source: I. Loshchilov and F. Hutter, *Decoupled weight decay regularization*, ICLR 2019.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.prox_adamw(0.1, jaxreg.L1(1.0), weight_decay=0.5)
    >>> w = jnp.array([2.0, 0.25])
    >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
    >>> [round(float(x), 4) for x in optax.apply_updates(w, updates)]
    [1.8, 0.1375]
    """
    decay = _link("weight_decay", weight_decay, _check.number_or_schedule, _weight_decay)
    b1 = _check.decay("b1", b1)
    gain = _metric.adam(b2, eps, eps_root)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
    return proximal(adam, learning_rate, penalty, metric=gain, decay=decay)


def prox_rmsprop(
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    decay: Number = 0.9,
    eps: Number = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Number | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp with a proximal step in its own metric.

    $p \leftarrow \mathrm{prox}_{lr / d}(p - lr \, g / d)$, $d = \sqrt{v + eps}$ with the decaying
    mean v of squared gradients. With momentum the gain is 1 / (1 - momentum) times as large.

    Args:
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: as in `jaxreg.proximal`.
        decay: decay of the second moment, in [0, 1).
        eps: as in `jaxreg.metric.rmsprop`, >= 0.
        initial_scale: the second moment at the start.
        eps_in_sqrt: whether eps is added under the root, or to it.
        centered: whether the squared mean gradient is taken off the second moment.
        momentum: a number in [0, 1), or None. It acts before the learning rate; in
            ``optax.rmsprop`` behind it, which differs where a schedule changes the rate.
        nesterov: whether to look ahead along the momentum.
        bias_correction: whether the moments are corrected for their start.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    Raises:
        ValueError: as `jaxreg.proximal` does, or where a number is out of its range, or a decay in
            16 bits, where .999 is 1.

    Source: T. Tieleman and G. Hinton, *Lecture 6.5: RMSProp*, 2012.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.prox_rmsprop(0.1, jaxreg.L1(1.0))
    >>> w = jnp.array([2.0, 0.25])
    >>> updates, _ = tx.update(jnp.array([0.5, 0.5]), tx.init(w), w)
    >>> [round(float(x), 4) for x in optax.apply_updates(w, updates)]
    [1.0513, 0.0]
    """
    gain = _metric.rmsprop(
        decay, eps, centered=centered, eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction
    )
    scale_by = optax.scale_by_stddev if centered else optax.scale_by_rms
    options = {"eps_in_sqrt": eps_in_sqrt, "bias_correction": bias_correction}
    direction = scale_by(decay, eps, initial_scale, **options)
    if momentum is None:
        return proximal(direction, learning_rate, penalty, metric=gain)
    share = _check.decay("momentum", momentum)
    direction = optax.chain(direction, optax.trace(share, nesterov))
    with_momentum = dataclasses.replace(gain, factor=1 / (1 - share))
    return proximal(direction, learning_rate, penalty, metric=with_momentum)


def prox_adagrad(
    learning_rate: Number | optax.Schedule,
    penalty: Parts,
    initial_accumulator_value: float = 0.1,
    eps: Number = 1e-7,
) -> optax.GradientTransformationExtraArgs:
    r"""Adagrad with a proximal step in its own metric.

    $p \leftarrow \mathrm{prox}_{lr / d}(p - lr \, g / d)$, $d = \sqrt{\sum g^2 + eps}$.

    Args:
        learning_rate: a number >= 0, a traced scalar, or a schedule.
        penalty: as in `jaxreg.proximal`.
        initial_accumulator_value: what the sum of squares begins with, >= 0.
        eps: added under the root, >= 0.

    Returns:
        An optax transformation. ``update`` needs ``params``.

    Raises:
        ValueError: as `jaxreg.proximal` does, or where a number is out of its range.

    Source: J. Duchi, E. Hazan and Y. Singer, *Adaptive subgradient methods for online learning and
    stochastic optimization*, JMLR 12, 2011.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.prox_adagrad(0.1, jaxreg.L1(1.0))
    >>> w = jnp.array([2.0, 0.25])
    >>> updates, _ = tx.update(jnp.array([0.5, 0.5]), tx.init(w), w)
    >>> [round(float(x), 4) for x in optax.apply_updates(w, updates)]
    [1.7465, 0.0]
    """
    initial = _check.nonnegative("initial_accumulator_value", initial_accumulator_value)
    direction = optax.scale_by_rss(initial, eps)
    return proximal(direction, learning_rate, penalty, metric=_metric.adagrad(eps))
