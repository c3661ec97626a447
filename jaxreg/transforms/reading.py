"""Reading directions: which links one consists of, and the gain of each.

A direction is a chain of links in containers (chain, named_chain, masked, partition). The gain of
the whole is the product of its links' gains. optax's transformations are closures, so links are
known by the function they come from and their settings are read from what it closes over; each
reading is then checked against what the link does to a toy gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxreg import _check, _tree
from jaxreg.transforms import metric as _metric
from jaxreg.transforms.clip import ClipState
from jaxreg.transforms.links import chained, describe, links
from jaxreg.transforms.metric import Gain, Metric

Transformation = optax.GradientTransformation
Gains = Callable[[Any, Any], list[Gain]]
"""``gains(state, params)``: one for each leaf of params, in their order."""


_ONE = Gain(1.0)


class Reading(NamedTuple):
    """A direction, some of whose links record in the state what they do, and its gains."""

    direction: optax.GradientTransformationExtraArgs
    gains: Gains


def read(direction: Transformation, metric: Literal["auto"] | Metric) -> Reading:
    """The direction's gains: of all its links, or with a metric for those that have one.

    What scales each leaf by one number (clips, trust ratios) is not a part of a metric.

    Raises:
        ValueError: with "auto", where a link is not recognised, its settings are traced, or the
            check fails. The remedy is to pass ``metric=``.
    """
    if metric == "auto":
        _refuse_l2_behind_a_gain(direction)
        return _read(direction, _gains_of_link)
    reading = _read(direction, _no_clip_inside)
    return Reading(reading.direction, _times(reading.gains, lambda s, p: given(metric, s, p)))


def given(metric: Metric, state: Any, params: Any) -> list[Gain]:
    """What a metric says of each leaf: one gain serves all below it, a MaskedNode is none."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    factor = metric.factor if isinstance(metric, _metric.Adaptive) else None
    tree = metric.scale(state) if isinstance(metric, _metric.Adaptive) else metric(state, params)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_masked)
    wrap = Gain if factor is None else lambda d: Gain(factor, d)
    return [
        gain
        for leaf, below in zip(leaves, treedef.flatten_up_to(params), strict=True)
        for gain in [Gain(None) if is_masked(leaf) else wrap(leaf)] * _count(below)
    ]


# Containers --------------------------------------------------------------------------------------


def _read(direction: Transformation, gains_of: Callable[[Transformation], Gains]) -> Reading:
    """A container is made again from its parts, so that its state is as before but for records."""
    name, closed = describe(direction.update)
    extra = optax.with_extra_args_support
    if name == "optax.with_extra_args_support":
        return _read(closed["tx"], gains_of)
    if name == "optax.chain":
        parts = [_read(link, gains_of) for link in chained(direction)]
        gains = _product([(lambda s, i=i: s[i], part.gains) for i, part in enumerate(parts)])
        return Reading(optax.chain(*(part.direction for part in parts)), gains)
    if name == "optax.named_chain":
        named = [(key, _read(link, gains_of)) for key, link in closed["transforms"]]
        gains = _product([(lambda s, key=key: s[key], part.gains) for key, part in named])
        rebuilt = optax.named_chain(*((key, part.direction) for key, part in named))
        return Reading(extra(rebuilt), gains)
    if name == "optax.masked":
        part, mask = _read(closed["inner"], gains_of), closed["mask"]
        extra_masked = describe(closed["maybe_mask_values"])[1]["mask_compatible_extra_args"]
        rebuilt = optax.masked(part.direction, mask, mask_compatible_extra_args=extra_masked)
        return Reading(extra(rebuilt), lambda s, p: _within(part.gains, s, p, _of_tree(mask, p)))
    if name == "optax.partition":
        return _read_partition(closed, gains_of)
    if name in _ONE_NUMBER_A_LEAF:
        return Reading(extra(_recorded(direction)), _recorded_gains)
    if name == "jaxreg.clip" and closed["records"]:
        return Reading(extra(direction), _gains_of_clip)
    if name in WRAPPERS:
        # A metric that was given is that of the direction inside, too.
        own = closed["read"].gains if gains_of is _gains_of_link else _one_each
        inner = lambda s, p: own(s.direction, p)  # noqa: E731
        if name == "jaxreg.spike_aware_clip":
            return Reading(extra(direction), inner)
        return Reading(extra(direction), _times(inner, lambda s, p: _gains_of_clip(s.clip, p)))
    if name in ("jaxreg.clip", "jaxreg.clip_by_value"):
        if gains_of is _gains_of_link:
            raise refusal(f"{name} of entries or units, whose coefficients are no gain")
        return Reading(extra(direction), _one_each)
    return Reading(extra(direction), gains_of(direction))


def _gains_of_clip(state: ClipState, params: Any) -> list[Gain]:
    each = state.coefficients
    return [*map(Gain, each)] if each.ndim else [Gain(each)] * _count(params)


def _read_partition(closed: dict[str, Any], gains_of: Callable[[Transformation], Gains]) -> Reading:
    parts = {label: _read(link, gains_of) for label, link in closed["transforms"].items()}
    labels = closed["param_labels"]

    def gains(state: Any, params: Any) -> list[Gain]:
        tree = _of_tree(labels, params)
        total = [_ONE] * len(tree)
        for label, part in parts.items():
            inner, mask = state.inner_states[label], [other == label for other in tree]
            total = _multiplied(total, _within(part.gains, inner, params, mask))
        return total

    rebuilt = optax.partition(
        {label: part.direction for label, part in parts.items()},
        labels,
        mask_compatible_extra_args=closed["mask_compatible_extra_args"],
    )
    return Reading(optax.with_extra_args_support(rebuilt), gains)


def _within(gains: Gains, state: Any, params: Any, mask: Sequence[bool]) -> list[Gain]:
    """The gains of what is masked: 1 for the leaves that it passes over."""
    leaves, treedef = jax.tree.flatten(params)
    kept = [p if yes else optax.MaskedNode() for p, yes in zip(leaves, mask, strict=True)]
    inner = iter(gains(state.inner_state, jax.tree.unflatten(treedef, kept)))
    return [next(inner) if yes else _ONE for yes in mask]


def _of_tree(tree: Any, params: Any) -> list[Any]:
    """A tree that may be a prefix of params, or a function of them, leaf by leaf."""
    tree = tree(params) if callable(tree) else tree
    whole = jax.tree.map(lambda value, below: jax.tree.map(lambda _: value, below), tree, params)
    return jax.tree.leaves(whole)


def _product(parts: Sequence[tuple[Callable[[Any], Any], Gains]]) -> Gains:
    """The gains of links one after the other: `parts` hold where each finds its state."""

    def gains(state: Any, params: Any) -> list[Gain]:
        total = [_ONE] * _count(params)
        for own_state, own in parts:
            total = _multiplied(total, own(own_state(state), params))
        return total

    return gains


def _times(first: Gains, second: Gains) -> Gains:
    return lambda state, params: _multiplied(first(state, params), second(state, params))


def _multiplied(first: list[Gain], second: list[Gain]) -> list[Gain]:
    """Leaf by leaf. Leaves that share both factors share the product."""
    made: dict[tuple[int, int], Gain] = {}
    for a, b in zip(first, second, strict=True):
        if (id(a), id(b)) not in made:
            made[id(a), id(b)] = a if b is _ONE else b if a is _ONE else a * b
    return [made[id(a), id(b)] for a, b in zip(first, second, strict=True)]


def _no_clip_inside(link: Transformation) -> Gains:
    def gains(state: Any, params: Any) -> list[Gain]:
        if _tree.nodes(state, ClipState):
            given = f"a clip inside {describe(link.update)[0]}"
            accepted = "a clip in a chain, where the proximal step can read its coefficient"
            raise _check.ArgumentError("direction", given, accepted)
        return _one_each(state, params)

    return gains


def _count(params: Any) -> int:
    return len(jax.tree.leaves(params))


def _one_each(state: Any, params: Any) -> list[Gain]:
    del state
    return [_ONE] * _count(params)


# Links that scale each leaf by one number --------------------------------------------------------


class RecordedState(NamedTuple):
    """The state of a link, and what it multiplied each leaf by in the last step."""

    ratios: Any
    inner: Any


_ONE_NUMBER_A_LEAF = (
    "optax.clip_by_global_norm",
    "optax.clip_by_block_rms",
    "jaxreg.clip_by_global_norm",  # of jaxreg.compat.optax
    "jaxreg.clip_by_block_rms",
    "optax.normalize_by_update_norm",
    "optax.scale_by_param_block_norm",
    "optax.scale_by_param_block_rms",
    "optax.scale_by_trust_ratio",
)


def _recorded(link: Transformation) -> optax.GradientTransformationExtraArgs:
    """The link, which keeps in its state the number that it multiplied each leaf by."""
    link = optax.with_extra_args_support(link)

    def init(params: Any) -> RecordedState:
        ones = jax.tree.map(lambda p: jnp.ones((), _tree.wide_dtype(p.dtype)), params)
        return RecordedState(ones, link.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        scaled, inner = link.update(updates, state.inner, params, **extra_args)
        return scaled, RecordedState(jax.tree.map(_ratio, scaled, updates), inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _ratio(scaled: jax.Array, update: jax.Array) -> jax.Array:
    """By the largest entries, which can't overflow; 1 where there is nothing to scale."""
    top, bottom = (jnp.max(jnp.abs(_tree.widen(u)), initial=0) for u in (scaled, update))
    return jnp.where(bottom == 0, 1, top / jnp.where(bottom == 0, 1, bottom))


def _recorded_gains(state: RecordedState, params: Any) -> list[Gain]:
    del params
    return [Gain(ratio) for ratio in jax.tree.leaves(state.ratios)]


# Links with a gain of their own ------------------------------------------------------------------


def _gains_of_link(link: Transformation) -> Gains:
    name, closed = describe(link.update)
    if name in _GAIN_ONE:
        return _one_each
    if name == "optax.set_to_zero":
        return lambda state, params: [Gain(0.0)] * _count(params)
    if name not in _READERS:
        raise refusal(f"a direction that contains {name}")
    reader = _READERS[name]
    if missing := [s for s in reader.settings if s not in closed]:
        raise refusal(f"{name} without the settings {missing} that its metric needs")
    if any(isinstance(value, Tracer) for value in closed.values()):
        raise refusal(f"{name} with traced settings")
    metric = reader.metric(closed)
    _check_on_toy(name, link, metric, [reader.approach(closed, steps) for steps in (1, 2, 3)])
    return lambda state, params: given(metric, state, params)


class _Reader(NamedTuple):
    """How the gain of a link is found from the settings that it closes over."""

    settings: tuple[str, ...]
    metric: Callable[[dict[str, Any]], Metric]
    approach: Callable[[dict[str, Any], int], float] = lambda closed, steps: 1.0
    """The share of its gain that it has after so many constant gradients."""


def _approach_of_trace(closed: dict[str, Any], steps: int) -> float:
    return 1 - float(closed["decay"]) ** (steps + bool(closed["nesterov"]))


def _approach_of_adam(closed: dict[str, Any], steps: int) -> float:
    """1, as the moments are bias-corrected; Nesterov's mixes two that are corrected unlike."""
    b1 = float(closed["b1"])
    if not closed["nesterov"]:
        return 1.0
    return b1 * (1 - b1**steps) / (1 - b1 ** (steps + 1)) + (1 - b1) / (1 - b1**steps)


def _approach_of_amsgrad(closed: dict[str, Any], steps: int) -> float:
    return 1.0 if closed.get("bias_correction_mu", True) else 1 - float(closed["b1"]) ** steps


def _numbers(closed: dict[str, Any], *names: str) -> dict[str, float]:
    return {name: float(closed[name]) for name in names}


def _rms(centered: bool) -> _Reader:
    flags = ("eps_in_sqrt", "bias_correction")
    return _Reader(
        ("decay", "eps", *flags),
        lambda closed: _metric.rmsprop(
            **_numbers(closed, "decay", "eps"),
            centered=centered,
            **{flag: bool(closed[flag]) for flag in flags},
        ),
    )


_GAIN_ONE = (
    "optax.identity",
    "optax.add_decayed_weights",
    "jaxreg.add_decayed_weights",
    "jaxreg.l2_decay",
)

_READERS: dict[str, _Reader] = {
    "optax.scale": _Reader(
        ("step_size",), lambda closed: lambda state, params: float(closed["step_size"])
    ),
    "optax.trace": _Reader(
        ("decay", "nesterov"),
        lambda closed: _metric.momentum(float(closed["decay"])),
        _approach_of_trace,
    ),
    "optax.scale_by_adam": _Reader(
        ("b1", "b2", "eps", "eps_root", "nesterov"),
        lambda closed: _metric.adam(**_numbers(closed, "b2", "eps", "eps_root")),
        _approach_of_adam,
    ),
    "optax.scale_by_amsgrad": _Reader(
        ("b1", "eps", "eps_root"),
        lambda closed: _metric.amsgrad(**_numbers(closed, "eps", "eps_root")),
        _approach_of_amsgrad,
    ),
    "optax.scale_by_adamax": _Reader(
        ("eps",), lambda closed: _metric.adamax(**_numbers(closed, "eps"))
    ),
    "optax.scale_by_rms": _rms(centered=False),
    "optax.scale_by_stddev": _rms(centered=True),
    "optax.scale_by_rss": _Reader(
        ("eps",), lambda closed: _metric.adagrad(**_numbers(closed, "eps"))
    ),
}


WRAPPERS = ("jaxreg.clip_update_rms", "jaxreg.spike_aware_clip")
KNOWN = {*_GAIN_ONE, *_READERS, *_ONE_NUMBER_A_LEAF, "jaxreg.clip", *WRAPPERS}
"""The names of links that do not go down the gradient."""


def _check_on_toy(name: str, link: Transformation, metric: Metric, approach: list[float]) -> None:
    """Compares the first updates on a constant gradient with shares of the gain `metric` claims."""
    with jax.ensure_compile_time_eval():
        gradient = jnp.array([1.0, -3.0, 1e-2, -1e-5, 1e-8], jnp.float32)
        state = link.init(gradient)
        for share in approach:
            update, state = link.update(gradient, state, gradient)
            claimed = share * np.asarray(metric(state, gradient) * gradient, np.float64)
            # Loose enough for accumulators in bfloat16.
            if not np.allclose(np.asarray(update, np.float64), claimed, rtol=2e-2, atol=0):
                raise refusal(f"{name}, whose update is not the gain expected times the gradient")


def _refuse_l2_behind_a_gain(direction: Transformation) -> None:
    gained = False
    for link in links(direction):
        name = describe(link.update)[0]
        if name == "jaxreg.l2_decay" and gained:
            raise refusal("l2_decay behind a link with a gain, which L2 would not have")
        gained |= name in _READERS and name != "optax.scale"


def refusal(what: str) -> _check.ArgumentError:
    """The error of a direction that "auto" can't read, with the remedy."""
    return _check.ArgumentError(
        "metric",
        f"'auto' for {what}",
        f"{', '.join(n.removeprefix('optax.') for n in ('optax.identity', *_READERS))} of optax, "
        "clips by norm, trust ratios and l2_decay before or after them, in chain, named_chain, "
        "masked and partition; for another "
        "direction metric=, its gain on a constant gradient as a function (direction_state, "
        "params) -> gain, or jaxreg.metric.sgd() where that is 1",
    )
