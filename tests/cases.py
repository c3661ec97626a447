"""One row a regularizer. Every law of test_laws.py runs on every row it applies to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import norm

import jaxreg

# Exported names that are no regularizers: what they are made of, or work with.
OTHER_NAMES = {
    "ArgumentError",
    "Explanation",
    "Compressed",
    "Penalty",
    "__version__",
    "averaged_params",
    "certificate",
    "compress",
    "ema",
    "explain",
    "decay_from_timescale",
    "global_norm",
    "groups",
    "leaf_norms",
    "metric",
    "metrics",
    "rms",
    "where",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A regularizer as a pure function of its strength and one array of shape (4, 3).

    ``call(strength, x)`` returns an array, or a tree of them.
    """

    name: str
    call: Callable[[Any, jax.Array], Any]
    strengths: tuple[float, float, float] = (0.25, 0.5, 0.75)
    has_strength: bool = dataclasses.field(kw_only=True, default=True)
    whole_strength: int = dataclasses.field(kw_only=True, default=1)
    """A strength that is a whole number."""
    holds_optax: bool = dataclasses.field(kw_only=True, default=False)
    """Whether it calls functions of optax, which break under strict promotion."""
    float32_accuracy: float = dataclasses.field(kw_only=True, default=1e-6)
    """Of float32 against float64, to the larger of 1 and the result."""

    @property
    def module(self) -> str:
        """The file that it is made in."""
        return getattr(jaxreg, self.name).__module__

    @property
    def kind(self) -> tuple[bool, ...]:
        """What laws ask before they look closer."""
        return (self.has_strength, self.holds_optax)


@dataclasses.dataclass(frozen=True)
class PenaltyCase(Case):
    """A penalty, with its value written again in NumPy float64 as the oracle.

    ``make(strength)`` builds it, for arrays of shape (4, 3) and of `shapes`.
    """

    make: Callable[[Any], jaxreg.Penalty] = dataclasses.field(kw_only=True)
    value: Callable[[np.ndarray, float], float] = dataclasses.field(kw_only=True)
    """``value(x, strength)`` is R(x); a constraint allows for the rounding of float32."""
    program: Callable[..., tuple[Any, list[Any]]] | None = dataclasses.field(
        kw_only=True, default=None
    )
    """``program(cvxpy, w, strength)``: R(w) and constraints, where R is convex, not separable."""
    feasible: Callable[[np.ndarray, float], np.ndarray] = dataclasses.field(
        kw_only=True, default=lambda x, s: x
    )
    """``feasible(x, strength)``: a point of the domain of R for any x."""
    constraint: bool = dataclasses.field(kw_only=True, default=False)
    """Whether R is 0 or infinite."""
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(
        kw_only=True, default=((), (0,), (2, 0, 3), (5,))
    )
    accuracy: float = dataclasses.field(kw_only=True, default=1e-12)
    """Of the prox in float64, where it is iterative."""
    collectives: frozenset[str] = dataclasses.field(kw_only=True, default=frozenset())
    """What the prox of a sharded array may use."""

    @property
    def kind(self) -> tuple[bool, ...]:
        penalty = self.make(0.5)
        flags = (penalty.separable, penalty.convex, penalty.elementwise_step, self.constraint)
        return (*super().kind, *flags)


@dataclasses.dataclass(frozen=True)
class TransformCase(Case):
    """An optax transformation; ``make(strength)`` builds it."""

    make: Callable[[Any], optax.GradientTransformation] = dataclasses.field(kw_only=True)
    # Whether what it does to one leaf depends on the others.
    joins_leaves: bool = dataclasses.field(kw_only=True, default=False)
    takes_complex: bool = dataclasses.field(kw_only=True, default=False)
    # Whether a leaf's gradient may be None.
    passes_frozen: bool = dataclasses.field(kw_only=True, default=False)
    # For two sharded kernels in one step, a branch for norms out of range included.
    collectives: int = dataclasses.field(kw_only=True, default=0)
    # Whether it depends on the paths of leaves: what is random has an address.
    has_address: bool = dataclasses.field(kw_only=True, default=False)
    # In the laws where sums are taken in another order.
    accuracy: float = dataclasses.field(kw_only=True, default=1e-6)


def _penalty(
    name: str, make: Callable[[Any], jaxreg.Penalty], value: Callable[..., Any], **rest: Any
) -> PenaltyCase:
    return PenaltyCase(name, lambda s, x: make(s).prox(x, 0.5), make=make, value=value, **rest)


def _transform(
    name: str, make: Callable[[Any], optax.GradientTransformation], **rest: Any
) -> TransformCase:
    def call(strength: Any, x: jax.Array) -> Any:
        tx = make(strength)
        return tx.update(x + jnp.ones((), x.dtype), tx.init(x), x)

    return TransformCase(name, call, make=make, **rest)


# Pieces of the oracles, in NumPy ---------------------------------------------------------------

ONE_GROUP = {"shapes": ((), (0,), (2, 0, 3), (5,)), "collectives": frozenset({"all-reduce"})}
UNITS = {"shapes": ((0, 3), (3, 0), (2, 0, 3), (5, 2)), "collectives": frozenset({"all-reduce"})}
GATHERED = frozenset({"all-reduce", "all-gather", "all-to-all", "collective-permute"})
LINES = {"shapes": ((0, 3), (3, 0), (1, 3), (2, 3, 2), (5,)), "collectives": GATHERED}
MATRICES = {"shapes": ((0, 3), (2, 0, 3), (1, 1), (2, 4, 3)), "collectives": GATHERED}
FIXED_SHAPE = {"shapes": (), "collectives": frozenset({"all-reduce", "all-gather"})}


def infinite_unless(inside: Any) -> float:
    return 0.0 if np.all(inside) else np.inf


def at_most(amount: Any, bound: float) -> float:
    return infinite_unless(amount <= bound * (1 + 1e-5))


def columns(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).sum(0))


def mcp(u: np.ndarray, s: Any, gamma: float) -> np.ndarray:
    return np.where(u <= gamma * s, s * u - u**2 / (2 * gamma), gamma * s**2 / 2)


def scad(u: np.ndarray, s: Any, a: float) -> np.ndarray:
    middle = (2 * a * s * u - u**2 - s**2) / (2 * (a - 1))
    return np.where(u <= s, s * u, np.where(u <= a * s, middle, s**2 * (a + 1) / 2))


def huber(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) <= 1, x**2 / 2, np.abs(x) - 0.5)


def scaled_into(norm: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray, float], np.ndarray]:
    """Into the ball of a norm, with the strength as its radius."""
    return lambda x, s: x * np.minimum(1, s / np.maximum(norm(x), 1e-9)) * (1 - 1e-7)


def on_simplex(x: np.ndarray, s: float) -> np.ndarray:
    return (np.abs(x) + 0.1) / (np.abs(x) + 0.1).sum() * s


def largest_of(x: np.ndarray, k: int) -> np.ndarray:
    """x with zeros but for its k largest numbers along axis 0."""
    return np.where(np.argsort(np.argsort(-np.abs(x), axis=0), axis=0) < k, x, 0)


NORMAL = np.linspace(1, -2, 12).reshape(4, 3)
EQUATIONS = np.stack([np.ones(12), np.linspace(-1, 1, 12), np.ones(12)])  # two of them are the same


def solving(x: np.ndarray, s: float) -> np.ndarray:
    offset = np.array([s, 1.0, s])
    return x - (np.linalg.pinv(EQUATIONS) @ (EQUATIONS @ x.ravel() - offset)).reshape(x.shape)


BH_WEIGHTS = norm.isf(0.1 * np.arange(1, 13) / 24) / norm.isf(0.1 / 24)
COVER = [list(range(7)), list(range(5, 12))]  # two groups that share two coordinates


def sorted_l1(cp: Any, w: Any, s: float) -> tuple[Any, list[Any]]:
    falls = BH_WEIGHTS - np.append(BH_WEIGHTS[1:], 0)
    terms = [fall * cp.sum_largest(cp.abs(w), i + 1) for i, fall in enumerate(falls)]
    return s * sum(terms), []


def latent_value(x: np.ndarray, s: float) -> float:
    """The two latent vectors part the shared coordinates like a path with a reflection."""
    a, shared, b = (np.linalg.norm(part) for part in np.split(x.ravel(), [5, 7]))
    return s * np.hypot(a + b, shared)


def latent(cp: Any, w: Any, s: float) -> tuple[Any, list[Any]]:
    first, second = cp.Variable(12), cp.Variable(12)
    split = [first + second == cp.vec(w, order="C"), first[7:] == 0, second[:5] == 0]
    return s * (cp.norm(first) + cp.norm(second)), split


def image_variation(x: np.ndarray) -> float:
    down = np.pad(np.diff(x, axis=0), ((0, 1), (0, 0)))
    right = np.pad(np.diff(x, axis=1), ((0, 0), (0, 1)))
    return np.sqrt(down**2 + right**2).sum()


def image_program(cp: Any, w: Any, s: float) -> tuple[Any, list[Any]]:
    down = cp.vstack([cp.diff(w, axis=0), np.zeros((1, 3))])
    right = cp.hstack([cp.diff(w, axis=1), np.zeros((4, 1))])
    both = cp.vstack([cp.vec(down, order="C"), cp.vec(right, order="C")])
    return s * cp.sum(cp.norm(both, 2, axis=0)), []


def singular(x: np.ndarray) -> np.ndarray:
    return np.linalg.svd(x, compute_uv=False)


def with_singular(x: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    return u * change(values) @ vt


def _affine(s: Any) -> jaxreg.Penalty:
    s = jnp.asarray(s, float)
    return jaxreg.Affine(EQUATIONS, jnp.stack([s, jnp.ones_like(s), s]))


def _joint(s: Any, x: jax.Array) -> Any:
    joint = jaxreg.Joint(jaxreg.GroupLasso(s), {"kernel": 0, "bias": ()})
    layer = joint.prox({"kernel": x[1:], "bias": x[0]}, 0.5)
    return jnp.concatenate([layer["bias"][None], layer["kernel"]])


def _ewc(s: Any, x: jax.Array) -> Any:
    tx = jaxreg.ewc(s, jnp.zeros((4, 3), x.dtype), jnp.full((4, 3), 2, x.dtype))
    return tx.update(x, tx.init(x), x)


LABELS = np.arange(4) % 3
VOCABULARY = (np.arange(15).reshape(3, 5) - 7) / 8  # exact in every dtype


def _online_labels(s: Any, x: jax.Array) -> Any:
    online = jaxreg.online_label_smoothing(3, s)
    losses, state = online.loss(online.init(), x, LABELS)
    return losses, online.next_epoch(state)


CASES: list[Case] = [
    # Separable
    _penalty("L1", jaxreg.L1, lambda x, s: s * np.abs(x).sum()),
    _penalty("L2", jaxreg.L2, lambda x, s: s / 2 * (x**2).sum()),
    _penalty(
        "ElasticNet",
        lambda s: jaxreg.ElasticNet(s, 2 * s),
        lambda x, s: s * np.abs(x).sum() + s * (x**2).sum(),
    ),
    _penalty(
        "NonNegativeL1",
        jaxreg.NonNegativeL1,
        lambda x, s: s * x.sum() + infinite_unless(x >= 0),
        feasible=lambda x, s: np.abs(x),
    ),
    _penalty("Huber", jaxreg.Huber, lambda x, s: s * huber(x).sum()),
    _penalty("L0", jaxreg.L0, lambda x, s: s * (x != 0).sum()),
    _penalty("LHalf", jaxreg.LHalf, lambda x, s: s * np.sqrt(np.abs(x)).sum()),
    _penalty("LTwoThirds", jaxreg.LTwoThirds, lambda x, s: s * (np.abs(x) ** (2 / 3)).sum()),
    _penalty("MCP", jaxreg.MCP, lambda x, s: mcp(np.abs(x), s, 3.0).sum()),
    _penalty("SCAD", jaxreg.SCAD, lambda x, s: scad(np.abs(x), s, 3.7).sum()),
    _penalty("LogSum", jaxreg.LogSum, lambda x, s: s * np.log1p(np.abs(x)).sum()),
    # Groups
    _penalty(
        "GroupLasso",
        jaxreg.GroupLasso,
        lambda x, s: s * 2 * columns(x).sum(),
        program=lambda cp, w, s: (s * 2 * cp.sum(cp.norm(w, 2, axis=0)), []),
        **UNITS,
    ),
    _penalty(
        "SparseGroupLasso",
        lambda s: jaxreg.SparseGroupLasso(s, s / 2),
        lambda x, s: s * np.abs(x).sum() + s * columns(x).sum(),
        program=lambda cp, w, s: (
            s * cp.sum(cp.abs(w)) + s * cp.sum(cp.norm(w, 2, axis=0)),
            [],
        ),
        **UNITS,
    ),
    _penalty("GroupMCP", jaxreg.GroupMCP, lambda x, s: mcp(columns(x), 2 * s, 3.0).sum(), **UNITS),
    _penalty(
        "GroupSCAD", jaxreg.GroupSCAD, lambda x, s: scad(columns(x), 2 * s, 3.7).sum(), **UNITS
    ),
    _penalty(
        "ExclusiveLasso",
        jaxreg.ExclusiveLasso,
        lambda x, s: s / 2 * (np.abs(x).sum(0) ** 2).sum(),
        program=lambda cp, w, s: (s / 2 * cp.sum_squares(cp.sum(cp.abs(w), axis=0)), []),
        **UNITS,
    ),
    _penalty(
        "L2Norm",
        jaxreg.L2Norm,
        lambda x, s: s * np.linalg.norm(x),
        program=lambda cp, w, s: (s * cp.norm(cp.vec(w, order="C"), 2), []),
        **ONE_GROUP,
    ),
    _penalty(
        "LInf",
        jaxreg.LInf,
        lambda x, s: s * np.abs(x).max(),
        program=lambda cp, w, s: (s * cp.max(cp.abs(w)), []),
        **ONE_GROUP,
    ),
    Case("Joint", _joint),
    _penalty(
        "OverlappingGroupLasso",
        lambda s: jaxreg.OverlappingGroupLasso(s, COVER, weights=[1.0, 1.0]),
        latent_value,
        program=latent,
        **FIXED_SHAPE,
    ),
    # Order, matrices, variation
    _penalty(
        "SortedL1",
        jaxreg.SortedL1,
        lambda x, s: s * (BH_WEIGHTS * np.sort(np.abs(x).ravel())[::-1]).sum(),
        program=sorted_l1,
        shapes=((), (0,), (2, 0, 3), (5,)),
        collectives=GATHERED,
    ),
    _penalty(
        "Nuclear",
        jaxreg.Nuclear,
        lambda x, s: s * singular(x).sum(),
        program=lambda cp, w, s: (s * cp.normNuc(w), []),
        **MATRICES,
    ),
    _penalty(
        "TotalVariation",
        lambda s: jaxreg.TotalVariation(s, axis=0),
        lambda x, s: s * np.abs(np.diff(x, axis=0)).sum(),
        program=lambda cp, w, s: (s * cp.sum(cp.abs(cp.diff(w, axis=0))), []),
        **LINES,
    ),
    _penalty(
        "FusedLasso",
        lambda s: jaxreg.FusedLasso(s / 2, s, axis=0),
        lambda x, s: s / 2 * np.abs(x).sum() + s * np.abs(np.diff(x, axis=0)).sum(),
        program=lambda cp, w, s: (
            s / 2 * cp.sum(cp.abs(w)) + s * cp.sum(cp.abs(cp.diff(w, axis=0))),
            [],
        ),
        **LINES,
    ),
    _penalty(
        "TotalVariation2D",
        lambda s: jaxreg.TotalVariation2D(s, tolerance=1e-15),
        lambda x, s: s * image_variation(x),
        program=image_program,
        accuracy=1e-6,
        **MATRICES,
    ),
    # Constraints
    _penalty(
        "Rank",
        lambda s: jaxreg.Rank(2),
        lambda x, s: infinite_unless(singular(x)[2:] <= 1e-5 * singular(x)[0]),
        feasible=lambda x, s: with_singular(x, lambda v: v * (np.arange(v.size) < 2)),
        constraint=True,
        has_strength=False,
        **MATRICES,
    ),
    _penalty(
        "SpectralBall",
        jaxreg.SpectralBall,
        lambda x, s: at_most(singular(x), s),
        program=lambda cp, w, s: (0, [cp.sigma_max(w) <= s]),
        feasible=lambda x, s: with_singular(x, lambda v: np.minimum(v, s * (1 - 1e-7))),
        constraint=True,
        **MATRICES,
    ),
    _penalty(
        "Orthogonal",
        lambda s: jaxreg.Orthogonal(),
        lambda x, s: infinite_unless(np.abs(x.T @ x - np.eye(3)) <= 1e-5),
        feasible=lambda x, s: with_singular(x, np.ones_like),
        constraint=True,
        has_strength=False,
        **MATRICES,
    ),
    _penalty(
        "NonNegative",
        lambda s: jaxreg.NonNegative(),
        lambda x, s: infinite_unless(x >= 0),
        feasible=lambda x, s: np.abs(x),
        constraint=True,
        has_strength=False,
    ),
    _penalty(
        "Box",
        lambda s: jaxreg.Box(-s, s),
        lambda x, s: infinite_unless((x >= -s) & (x <= s)),
        feasible=lambda x, s: np.clip(x, -s, s),
        constraint=True,
    ),
    _penalty(
        "LInfBall",
        jaxreg.LInfBall,
        lambda x, s: infinite_unless(np.abs(x) <= s),
        feasible=lambda x, s: np.clip(x, -s, s),
        constraint=True,
    ),
    _penalty(
        "L1Ball",
        jaxreg.L1Ball,
        lambda x, s: at_most(np.abs(x).sum(), s),
        program=lambda cp, w, s: (0, [cp.sum(cp.abs(w)) <= s]),
        feasible=scaled_into(lambda x: np.abs(x).sum()),
        constraint=True,
        **ONE_GROUP,
    ),
    _penalty(
        "L2Ball",
        jaxreg.L2Ball,
        lambda x, s: at_most(np.linalg.norm(x), s),
        program=lambda cp, w, s: (0, [cp.norm(cp.vec(w, order="C"), 2) <= s]),
        feasible=scaled_into(np.linalg.norm),
        constraint=True,
        **ONE_GROUP,
    ),
    _penalty(
        "MaxNorm",
        jaxreg.MaxNorm,
        lambda x, s: at_most(columns(x), s),
        program=lambda cp, w, s: (0, [cp.norm(w, 2, axis=0) <= s]),
        feasible=scaled_into(columns),
        constraint=True,
        **UNITS,
    ),
    _penalty(
        "Simplex",
        jaxreg.Simplex,
        lambda x, s: infinite_unless([x.min(initial=0) >= 0, abs(x.sum() - s) <= 1e-5 * s]),
        program=lambda cp, w, s: (0, [cp.sum(w) == s, w >= 0]),
        feasible=on_simplex,
        constraint=True,
        shapes=((), (2, 3), (5,)),
        collectives=frozenset({"all-reduce"}),
    ),
    _penalty(
        "UnitNorm",
        lambda s: jaxreg.UnitNorm(),
        lambda x, s: infinite_unless(np.abs(columns(x) - 1) <= 1e-5),
        feasible=lambda x, s: (x + 1e-3) / columns(x + 1e-3),
        constraint=True,
        has_strength=False,
        **UNITS,
    ),
    _penalty(
        "TopK",
        lambda s: jaxreg.TopK(5),
        lambda x, s: infinite_unless((x != 0).sum() <= 5),
        feasible=lambda x, s: largest_of(x.reshape(-1, 1), 5).reshape(x.shape),
        constraint=True,
        has_strength=False,
        shapes=((), (0,), (2, 0, 3), (5,), (7,)),
        collectives=frozenset({"all-reduce", "all-gather", "collective-permute"}),
    ),
    _penalty(
        "NM",
        lambda s: jaxreg.NM(2, 4),
        lambda x, s: infinite_unless((x != 0).sum(0) <= 2),
        feasible=lambda x, s: largest_of(x, 2),
        constraint=True,
        has_strength=False,
        shapes=((0, 3), (8, 0), (2, 4, 3)),
        collectives=frozenset({"all-reduce", "all-gather", "collective-permute", "all-to-all"}),
    ),
    _penalty(
        "HalfSpace",
        lambda s: jaxreg.HalfSpace(NORMAL, s),
        lambda x, s: infinite_unless((NORMAL * x).sum() - s <= 1e-5),
        program=lambda cp, w, s: (0, [cp.sum(cp.multiply(NORMAL, w)) <= s]),
        feasible=lambda x, s: x - max((NORMAL * x).sum() - s, 0) / (NORMAL**2).sum() * NORMAL,
        constraint=True,
        **FIXED_SHAPE,
    ),
    _penalty(
        "Affine",
        _affine,
        lambda x, s: infinite_unless(
            np.abs(EQUATIONS @ x.ravel() - np.array([s, 1.0, s])) <= 1e-4 * (1 + np.abs(x).max())
        ),
        program=lambda cp, w, s: (
            0,
            [EQUATIONS[:2] @ cp.vec(w, order="C") == np.array([s, 1.0])],
        ),
        feasible=solving,
        constraint=True,
        **FIXED_SHAPE,
    ),
    # Transformations
    _transform(
        "clip_by_global_norm",
        jaxreg.clip_by_global_norm,
        joins_leaves=True,
        takes_complex=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform(
        "clip_by_leaf_norm",
        jaxreg.clip_by_leaf_norm,
        takes_complex=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform(
        "clip_by_group_norm",
        lambda s: jaxreg.clip_by_group_norm({"**": s}),
        joins_leaves=True,
        takes_complex=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform("clip_by_value", jaxreg.clip_by_value, takes_complex=True, passes_frozen=True),
    _transform(
        "adaptive_clip", jaxreg.adaptive_clip, takes_complex=True, passes_frozen=True, collectives=7
    ),
    # Their limits are those of earlier steps: in the first one no strength shows.
    _transform(
        "autoclip",
        jaxreg.autoclip,
        whole_strength=50,
        has_strength=False,
        joins_leaves=True,
        takes_complex=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform(
        "zclip",
        lambda s: jaxreg.zclip(s, warm_up=2),
        has_strength=False,
        joins_leaves=True,
        takes_complex=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform(
        "adagc",
        lambda s: jaxreg.adagc(1 + s, warm_up=1, max_norm=10.0),
        has_strength=False,
        joins_leaves=True,
        takes_complex=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform(
        "clip_update_rms",
        jaxreg.clip_update_rms,
        takes_complex=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform(
        "spike_aware_clip",
        lambda s: jaxreg.spike_aware_clip(optax.scale_by_rss(0.01), s),
        passes_frozen=True,
        holds_optax=True,
    ),
    _transform(
        "skip_step",
        lambda s: jaxreg.skip_step(optax.trace(0.9), s, window=4),
        has_strength=False,
        joins_leaves=True,
        holds_optax=True,
        passes_frozen=True,
        collectives=4,
    ),
    _transform("l2_decay", jaxreg.l2_decay, takes_complex=True),
    _transform("weight_decay", lambda s: jaxreg.weight_decay(s, rate=0.1), takes_complex=True),
    _transform(
        "constrained_decay",
        lambda s: jaxreg.constrained_decay(s, "dependent"),
        has_strength=False,  # after init, which finds the bound
        collectives=2,
    ),
    _transform(
        "selective_projection_decay",
        lambda s: jaxreg.selective_projection_decay(optax.sgd(0.1), s, toward="init"),
        holds_optax=True,
        has_strength=False,
        collectives=2,
    ),
    _transform("hyperball", jaxreg.hyperball, collectives=8),
    Case("ewc", _ewc),
    _transform(
        "spectral_decay",
        lambda s: jaxreg.spectral_decay(s, rate=0.1),
        has_address=True,
        collectives=5,
    ),
    _transform(
        "spectral_cap",
        jaxreg.spectral_cap,
        collectives=19,
        accuracy=1e-5,
        # 48 products of matrices whose entries are up to 1.3 round one after the other; the order
        # of the sums, and so the error (0.7e-6 to 1.6e-6 seen), is XLA's.
        float32_accuracy=4e-6,
    ),
    _transform("constrain", lambda s: jaxreg.constrain(jaxreg.LInfBall(s))),
    _transform(
        "weight_decay",
        lambda s: jaxreg.weight_decay(
            s, rate=0.1, toward=jaxreg.ema(0.5), gate="cautious", profile="huber"
        ),
        has_strength=False,  # in the first step: the weights are their average
    ),
    _transform(
        "watch",
        lambda s: jaxreg.watch(),
        has_strength=False,
        joins_leaves=True,
        takes_complex=True,
        accuracy=1e-3,  # the angle of a step along the weights is a root of rounding
    ),
    _transform(
        "proximal", lambda s: jaxreg.proximal(optax.trace(0.5), 0.1, jaxreg.L1(s)), holds_optax=True
    ),
    _transform(
        "sparsity_target",
        lambda s: jaxreg.prox_sgd(0.1, jaxreg.sparsity_target(jaxreg.L1(1.0), s, rate=1.0)),
        whole_strength=0,
        holds_optax=True,
        collectives=4,
    ),
    _transform(
        "prox_sgd",
        lambda s: jaxreg.prox_sgd(0.1, jaxreg.L1(s), momentum=0.9),
        holds_optax=True,
    ),
    _transform("prox_adam", lambda s: jaxreg.prox_adam(0.1, jaxreg.L1(s)), holds_optax=True),
    _transform("prox_adamw", lambda s: jaxreg.prox_adamw(0.1, jaxreg.L1(s)), holds_optax=True),
    _transform(
        "prox_rmsprop",
        lambda s: jaxreg.prox_rmsprop(0.1, jaxreg.L1(s), momentum=0.5),
        holds_optax=True,
    ),
    _transform("prox_adagrad", lambda s: jaxreg.prox_adagrad(0.1, jaxreg.L1(s)), holds_optax=True),
    _transform(
        "regularize",
        lambda s: jaxreg.regularize(
            optax.scale_by_adam(), 0.1, clip=1.0, l2=s, decay=s, penalty=jaxreg.L1(s)
        ),
        joins_leaves=True,
        holds_optax=True,
        collectives=4,
    ),
    _transform("rda", lambda s: jaxreg.rda(0.1, jaxreg.L1(s))),
    _transform("rmda", lambda s: jaxreg.rmda(0.1, jaxreg.L1(s), momentum=0.5)),
    _transform("ramda", lambda s: jaxreg.ramda(0.1, jaxreg.L1(s), momentum=0.5)),
    _transform("magnitude_pruning", jaxreg.magnitude_pruning, whole_strength=0, collectives=7),
    _transform("n_m_pruning", lambda s: jaxreg.n_m_pruning(1, 2, axis=0), has_strength=False),
    Case(
        "per_example_clip",
        lambda s, x: jaxreg.per_example_clip(lambda w, y: jnp.sum((w - y) ** 2), s)(x[0], x[1:])[0],
    ),
    # Perturbation and rounding
    Case("sam", lambda s, x: jaxreg.sam(lambda w: jnp.sum(w**2), s)(x)[1]),
    Case("asam", lambda s, x: jaxreg.asam(lambda w: jnp.sum(w**2), s)(x)[1]),
    _transform("gradient_noise", lambda s: jaxreg.gradient_noise(s, seed=0), has_address=True),
    _transform(
        "centralize",
        lambda s: jaxreg.centralize(),
        has_strength=False,
        takes_complex=True,
        collectives=2,
    ),
    _transform(
        "stochastic_rounding",
        lambda s: jaxreg.stochastic_rounding(optax.trace(s), seed=0),
        whole_strength=0,
        has_strength=False,
        holds_optax=True,
    ),
    Case(
        "diagonal_fisher",
        lambda s, x: jaxreg.diagonal_fisher(
            lambda w, y: -jnp.sum(jnp.asarray(s).astype(w.dtype) * (w - y) ** 2),
            x[0],
            (x[1:],),
            micro_batch=2,
        ),
    ),
    # Averages
    _transform("ema_of_params", jaxreg.ema_of_params, whole_strength=0, has_strength=False),
    _transform("swa", lambda s: jaxreg.swa(), has_strength=False),
    _transform("lookahead", lambda s: jaxreg.lookahead(2, s), has_strength=False),
    Case("reapply", lambda s, x: jaxreg.reapply(jaxreg.L1(s), x)),
    # Losses and noise
    Case(
        "smoothed_cross_entropy",
        lambda s, x: jaxreg.smoothed_cross_entropy(x, LABELS, s),
    ),
    Case(
        "linear_cross_entropy",
        lambda s, x: jaxreg.linear_cross_entropy(
            x, jnp.asarray(VOCABULARY, x.dtype), LABELS, smoothing=s
        ),
    ),
    Case(
        "sigmoid_smoothed_cross_entropy",
        lambda s, x: jaxreg.sigmoid_smoothed_cross_entropy(x, np.eye(4, 3, dtype=bool), s),
    ),
    Case("focal_loss", lambda s, x: jaxreg.focal_loss(x, LABELS, s)),
    Case("poly_loss", lambda s, x: jaxreg.poly_loss(x, LABELS, s, 0.25)),
    Case("entropy", lambda s, x: jaxreg.entropy(x), has_strength=False),
    Case("confidence_penalty", lambda s, x: jaxreg.confidence_penalty(x, s)),
    Case("symmetric_kl", lambda s, x: jaxreg.symmetric_kl(x, x[::-1]), has_strength=False),
    Case("smooth_labels", lambda s, x: jaxreg.smooth_labels(x, s)),
    Case("mixup_loss", lambda s, x: jaxreg.mixup_loss(x, LABELS, LABELS[::-1], s)),
    Case("online_label_smoothing", _online_labels),
    Case("activity_penalty", lambda s, x: jaxreg.activity_penalty(x, jaxreg.L1(s))),
    Case(
        "gradient_penalty",
        # Its gradient is 0 where x is.
        lambda s, x: jaxreg.gradient_penalty(lambda y: jnp.sum(jnp.square(y), -1), x, s),
    ),
    Case(
        "jacobian_penalty",
        lambda s, x: jaxreg.jacobian_penalty(jax.nn.softmax, x, jax.random.key(0)),
        has_strength=False,
    ),
    Case("orthogonality_penalty", lambda s, x: jaxreg.orthogonality_penalty(x), has_strength=False),
    Case("penalty_value", lambda s, x: jaxreg.penalty_value(jaxreg.L1(s), x)),
    Case("dropout", lambda s, x: jaxreg.dropout(jax.random.key(0), x, s)),
]

PENALTIES = [case for case in CASES if isinstance(case, PenaltyCase)]
TRANSFORMS = [case for case in CASES if isinstance(case, TransformCase)]
