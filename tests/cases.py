"""One row a regularizer. Every law of test_laws.py runs on every row it applies to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg

# Exported names that are no regularizers: what they are made of or work with.
OTHER_NAMES = {"ArgumentError", "Penalty", "__version__", "global_norm", "metric", "where"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A regularizer as a pure function of its strength and one array of shape (4, 3).

    ``call(strength, x)`` returns an array, or a tree of them.
    """

    name: str
    call: Callable[[Any, jax.Array], Any]
    strengths: tuple[float, float, float] = (0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True)
class PenaltyCase(Case):
    """A penalty, with its value written again in NumPy float64 as the oracle.

    ``make(strength)`` builds it; ``value(x, strength)`` is R(x); ``feasible`` moves any array into
    the domain of R at strengths of 0.25 and more; ``constraint`` says that R is 0 or infinite.
    """

    make: Callable[[Any], jaxreg.Penalty] = dataclasses.field(kw_only=True)
    value: Callable[[np.ndarray, float], float] = dataclasses.field(kw_only=True)
    feasible: Callable[[np.ndarray], np.ndarray] = dataclasses.field(
        kw_only=True, default=lambda x: x
    )
    constraint: bool = dataclasses.field(kw_only=True, default=False)


@dataclasses.dataclass(frozen=True)
class TransformCase(Case):
    """An optax transformation; ``make(strength)`` builds it."""

    make: Callable[[Any], optax.GradientTransformation] = dataclasses.field(kw_only=True)


def _penalty(
    name: str, make: Callable[[Any], jaxreg.Penalty], value: Callable[..., Any], **rest: Any
) -> PenaltyCase:
    return PenaltyCase(name, lambda s, x: make(s).prox(x, 0.5), make=make, value=value, **rest)


def _transform(name: str, make: Callable[[Any], optax.GradientTransformation]) -> TransformCase:
    def call(strength: Any, x: jax.Array) -> Any:
        tx = make(strength)
        return tx.update(x + jnp.ones((), x.dtype), tx.init(x), x)

    return TransformCase(name, call, make=make)


def _infinite_unless(inside: np.ndarray) -> float:
    return 0.0 if inside.all() else np.inf


CASES: list[Case] = [
    _penalty("L1", jaxreg.L1, lambda x, s: s * np.abs(x).sum()),
    _penalty("L2", jaxreg.L2, lambda x, s: s / 2 * (x**2).sum()),
    _penalty(
        "ElasticNet",
        lambda s: jaxreg.ElasticNet(s, 2 * s),
        lambda x, s: s * np.abs(x).sum() + s * (x**2).sum(),
    ),
    _penalty(
        "NonNegative",
        lambda s: jaxreg.NonNegative(),
        lambda x, s: _infinite_unless(x >= 0),
        feasible=np.abs,
        constraint=True,
    ),
    _penalty(
        "Box",
        lambda s: jaxreg.Box(-s, s),
        lambda x, s: _infinite_unless((x >= -s) & (x <= s)),
        feasible=lambda x: np.clip(x, -0.25, 0.25),
        constraint=True,
    ),
    _transform("clip_by_global_norm", jaxreg.clip_by_global_norm),
    _transform("l2_decay", jaxreg.l2_decay),
    _transform("weight_decay", lambda s: jaxreg.weight_decay(s, rate=0.1)),
    _transform("proximal", lambda s: jaxreg.proximal(optax.trace(0.5), 0.1, jaxreg.L1(s))),
    _transform("prox_sgd", lambda s: jaxreg.prox_sgd(0.1, jaxreg.L1(s), momentum=0.9)),
    _transform("prox_adam", lambda s: jaxreg.prox_adam(0.1, jaxreg.L1(s))),
    _transform(
        "regularize",
        lambda s: jaxreg.regularize(
            optax.scale_by_adam(), 0.1, clip=1.0, l2=s, decay=s, penalty=jaxreg.L1(s)
        ),
    ),
    Case(
        "smoothed_cross_entropy",
        lambda s, x: jaxreg.smoothed_cross_entropy(x, jnp.arange(4) % 3, s),
    ),
    Case("dropout", lambda s, x: jaxreg.dropout(jax.random.key(0), x, s)),
]
PENALTIES = [case for case in CASES if isinstance(case, PenaltyCase)]
TRANSFORMS = [case for case in CASES if isinstance(case, TransformCase)]
