"""What do proximal operators cost, against the memory's speed, a sort and other libraries?

Each operator is timed beside its peers on the same data, once the results are compared. jaxopt and
optax are jitted as ours are; skglm and pyproximal work on a CPU in float64, so that is the main
table there. A library that is not installed leaves its column empty.

    python -m bench.penalties [--quick] [--out bench/results]
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxreg
from bench import peers, timing
from jaxreg import groups

Shape = tuple[int, ...]
Arrays = tuple[np.ndarray, ...]

STEP = 0.5
CLEARLY_FASTER = 0.9
VECTORS = tuple((n,) for n in (10**3, 10**4, 10**5, 10**6, 10**7))


# --- Data ----------------------------------------------------------------------------------------


def normal(shape: Shape) -> Arrays:
    """Standard normal noise."""
    return (np.random.default_rng(0).normal(size=shape),)


def weighted(shape: Shape) -> Arrays:
    """Noise, and uniform weights or steps."""
    return *normal(shape), np.random.default_rng(1).uniform(0.1, 1.0, size=shape)


def slope(shape: Shape) -> Arrays:
    """Noise, and weights of the sorted L1 norm that fall linearly."""
    return *normal(shape), np.linspace(2, 0, shape[0])


def slope_sorted(shape: Shape) -> Arrays:
    """The same noise in the order of its magnitude."""
    x, weights = slope(shape)
    return x[np.argsort(-np.abs(x))], weights


def slope_concave(shape: Shape) -> Arrays:
    """|x| - step * weights is concave with its peak in the middle: one block grows and grows."""
    u = np.linspace(0, 1, shape[0])
    return 4 * (1 - u), 4 * (1 - u) ** 2 / STEP


def image(shape: Shape) -> Arrays:
    """A bright square in noise."""
    x = 0.3 * normal(shape)[0]
    x[tuple(slice(n // 4, n // 2) for n in shape)] += 1
    return (x,)


def positions(x: Any) -> np.ndarray:
    """Where each entry of x is in the flattened x, in x's shape."""
    return np.arange(x.size).reshape(x.shape)


# --- Operators -----------------------------------------------------------------------------------


class Operator(NamedTuple):
    """A proximal operator, and how each library is asked for it: by functions of the data.

    `jaxreg` makes the penalty, `jaxopt` and `optax` the result at STEP, `skglm` and `pyproximal`
    a function of the flattened data and a step.
    """

    name: str
    jaxreg: Callable[..., Any]
    jaxopt: Callable[..., Any] | None = None
    optax: Callable[..., Any] | None = None
    skglm: Callable[..., Any] | None = None
    pyproximal: Callable[..., Any] | None = None
    shapes: Sequence[Shape] = VECTORS
    data: Callable[[Shape], Arrays] = normal
    passes: int = 2  # arrays of x's size that are read or written at the least
    step_each: bool = False  # the data's second array is a step for each coordinate
    against_sort: bool = False
    why_slower: str = "not known"  # than a peer at 1e5 and above, where it is


LIKE_SORT: dict[str, Any] = {"shapes": VECTORS[:-1], "passes": 3, "against_sort": True}
COLUMNS = groups.axes(0)
KERNELS = ((100, 10), (100, 100), (1000, 100), (1000, 1000), (10000, 1000))
SIMPLE = peers.skglm_separable
SAME = "the same operations: noise"
GUARDED = "norms are guarded against overflow, in a pass of their own"
COARSE = "the peer stops far from the solution"
PROX, PROJECTION, PYPROXIMAL = peers.jaxopt_prox, peers.jaxopt_projection, peers.pyproximal

OPERATORS = [
    Operator(
        "L1",
        lambda x: jaxreg.L1(0.5),
        jaxopt=lambda x: PROX.prox_lasso(x, 0.5, STEP),
        skglm=lambda x: SIMPLE("L1", 0.5),
        pyproximal=lambda x: PYPROXIMAL.L1(0.5).prox,
        why_slower=SAME,
    ),
    Operator(
        "L1, weighted",
        lambda x, w: jaxreg.L1(w),
        jaxopt=lambda x, w: PROX.prox_lasso(x, w, STEP),
        skglm=lambda x, w: SIMPLE("WeightedL1", 1.0, w),
        pyproximal=lambda x, w: PYPROXIMAL.L1(w).prox,
        data=weighted,
        passes=3,
        why_slower=SAME,
    ),
    Operator(
        "ElasticNet",
        lambda x: jaxreg.ElasticNet(0.5, 0.25),
        jaxopt=lambda x: PROX.prox_elastic_net(x, (0.5, 0.5), STEP),
        skglm=lambda x: SIMPLE("L1_plus_L2", 0.75, 2 / 3),
        why_slower=SAME,
    ),
    Operator(
        "NonNegativeL1",
        lambda x: jaxreg.NonNegativeL1(0.5),
        jaxopt=lambda x: PROX.prox_non_negative_lasso(x, 0.5, STEP),
        skglm=lambda x: SIMPLE("L1", 0.5, True),
        why_slower=SAME,
    ),
    Operator("L0", lambda x: jaxreg.L0(0.5), pyproximal=lambda x: PYPROXIMAL.L0(STEP**-0.5).prox),
    Operator("LHalf", lambda x: jaxreg.LHalf(0.5), skglm=lambda x: SIMPLE("L0_5", 0.5)),
    Operator("LTwoThirds", lambda x: jaxreg.LTwoThirds(0.5), skglm=lambda x: SIMPLE("L2_3", 0.5)),
    Operator("MCP", lambda x: jaxreg.MCP(0.5, 3.0), skglm=lambda x: SIMPLE("MCPenalty", 0.5, 3.0)),
    Operator(
        "SCAD",
        lambda x: jaxreg.SCAD(0.5, 3.7),
        skglm=lambda x: SIMPLE("SCAD", 0.5, 3.7),
        pyproximal=lambda x: PYPROXIMAL.SCAD(0.5, 3.7).prox,
    ),
    Operator(
        "LogSum",
        lambda x: jaxreg.LogSum(0.5, 0.25),
        skglm=lambda x: SIMPLE("LogSumPenalty", 0.5, 0.25),
        pyproximal=lambda x: PYPROXIMAL.Log(0.5 * np.log(5), 4.0).prox,
    ),
    Operator(
        "Huber", lambda x: jaxreg.Huber(1.0, 1.0), pyproximal=lambda x: PYPROXIMAL.Huber(1.0).prox
    ),
    Operator(
        "Box",
        lambda x: jaxreg.Box(0.0, 1.0),
        jaxopt=lambda x: PROJECTION.projection_box(x, (0.0, 1.0)),
        optax=lambda x: optax.projections.projection_box(x, 0.0, 1.0),
        skglm=lambda x: SIMPLE("IndicatorBox", 1.0),
        pyproximal=lambda x: PYPROXIMAL.Box(0.0, 1.0).prox,
        why_slower="the same operations: noise; skglm writes into what it is given",
    ),
    Operator(
        "LInfBall",
        lambda x: jaxreg.LInfBall(1.0),
        jaxopt=lambda x: PROJECTION.projection_linf_ball(x, 1.0),
        optax=lambda x: optax.projections.projection_linf_ball(x, 1.0),
        pyproximal=lambda x: PYPROXIMAL.Box(-1.0, 1.0).prox,
        why_slower=SAME,
    ),
    Operator("NM(2, 4)", lambda x: jaxreg.NM(2, 4), shapes=KERNELS),
    Operator(
        "GroupLasso, columns",
        lambda x: jaxreg.GroupLasso(0.5, groups=COLUMNS, weights=1.0),
        jaxopt=jax.vmap(lambda x: PROX.prox_group_lasso(x, 0.5, STEP), 1, 1),
        skglm=lambda x: peers.skglm_groups("WeightedGroupL2", positions(x).T, 0.5),
        pyproximal=lambda x: PYPROXIMAL.L21(x.shape[0], 0.5).prox,
        shapes=KERNELS,
        passes=3,
        why_slower=GUARDED,
    ),
    Operator(
        "GroupLasso, columns, a step each",
        lambda x, step: jaxreg.GroupLasso(0.5, groups=COLUMNS, weights=1.0),
        shapes=KERNELS,
        data=weighted,
        passes=5,
        step_each=True,
    ),
    Operator(
        "GroupLasso, ids",
        lambda x: jaxreg.GroupLasso(0.5, groups=groups.ids(positions(x) // 10), weights=1.0),
        jaxopt=lambda x: jax.vmap(lambda g: PROX.prox_group_lasso(g, 0.5, STEP))(
            x.reshape(-1, 10)
        ).ravel(),
        skglm=lambda x: peers.skglm_groups("WeightedGroupL2", positions(x).reshape(-1, 10), 0.5),
        passes=3,
        why_slower=GUARDED,
    ),
    Operator(
        "SparseGroupLasso, ids",
        lambda x: jaxreg.SparseGroupLasso(
            0.5, 0.5, groups=groups.ids(positions(x) // 10), weights=1.0
        ),
        skglm=lambda x: peers.skglm_groups(
            "WeightedL1GroupL2", positions(x).reshape(-1, 10), 0.5, 0.5
        ),
        pyproximal=lambda x: peers.pyproximal_rows("L21_plus_L1", 10, 1.0, 0.5),
        passes=3,
    ),
    Operator(
        "L1Ball",
        lambda x: jaxreg.L1Ball(x.size / 10),
        jaxopt=lambda x: PROJECTION.projection_l1_ball(x, x.size / 10),
        optax=lambda x: optax.projections.projection_l1_ball(x, x.size / 10),
        pyproximal=lambda x: PYPROXIMAL.L1Ball(x.size, x.size / 10, xtol=1e-10).prox,
        **LIKE_SORT,
    ),
    Operator(
        "Simplex",
        lambda x: jaxreg.Simplex(1.0),
        jaxopt=lambda x: PROJECTION.projection_simplex(x, 1.0),
        optax=lambda x: optax.projections.projection_simplex(x, 1.0),
        pyproximal=lambda x: PYPROXIMAL.Simplex(x.size, 1.0, engine="numba").prox,
        **LIKE_SORT,
    ),
    Operator(
        "LInf",
        lambda x: jaxreg.LInf(x.size / 10),
        jaxopt=lambda x: x - PROJECTION.projection_l1_ball(x, STEP * x.size / 10),
        optax=lambda x: x - optax.projections.projection_l1_ball(x, STEP * x.size / 10),
        **LIKE_SORT,
    ),
    Operator(
        "L2Ball",
        lambda x: jaxreg.L2Ball(x.size**0.5 / 2),
        jaxopt=lambda x: PROJECTION.projection_l2_ball(x, x.size**0.5 / 2),
        optax=lambda x: optax.projections.projection_l2_ball(x, x.size**0.5 / 2),
        pyproximal=lambda x: PYPROXIMAL.EuclideanBall(0.0, x.size**0.5 / 2).prox,
        passes=3,
        why_slower=GUARDED,
    ),
    Operator(
        "TopK, a tenth",
        lambda x: jaxreg.TopK(x.size // 10),
        pyproximal=lambda x: PYPROXIMAL.L0Ball(x.size // 10).prox,
        **LIKE_SORT,
    ),
    *[
        Operator(
            f"SortedL1, {kind}",
            lambda x, w: jaxreg.SortedL1(1.0, weights=w),
            skglm=lambda x, w: peers.skglm_slope(w),
            data=data,
            why_slower="XLA's sort alone takes longer on a CPU than all of skglm's",
            **LIKE_SORT,
        )
        for kind, data in {"noise": slope, "sorted": slope_sorted, "concave": slope_concave}.items()
    ],
    *[
        Operator(
            f"TotalVariation, {kind}",
            lambda x: jaxreg.TotalVariation(1.0),
            pyproximal=lambda x: PYPROXIMAL.TV(x.shape, niter=100).prox,
            data=data,
            why_slower=COARSE,
            **LIKE_SORT,
        )
        for kind, data in {
            "walk": lambda shape: (np.cumsum(normal(shape)[0]),),
            "noise": normal,
            "sorted": lambda shape: (np.sort(normal(shape)[0]),),
        }.items()
    ],
    Operator(
        "Nuclear",
        lambda x: jaxreg.Nuclear(x.shape[0] ** 0.5),
        pyproximal=lambda x: PYPROXIMAL.Nuclear(x.shape, x.shape[0] ** 0.5).prox,
        shapes=tuple((n, n) for n in (32, 64, 128, 256, 512)),
    ),
    Operator(
        "TotalVariation2D",
        lambda x: jaxreg.TotalVariation2D(0.3),
        pyproximal=lambda x: PYPROXIMAL.TV(x.shape, 0.3, niter=100).prox,
        shapes=((128, 128), (256, 256)),
        data=image,
        why_slower=COARSE,
    ),
]


# --- Measuring -----------------------------------------------------------------------------------


def main() -> None:
    """Runs the benchmark in each dtype, prints the tables and writes them down."""
    arguments = timing.parser("What do proximal operators cost?").parse_args()
    peers.keep_freed_memory()
    platform = jax.devices()[0].platform
    largest, rounds = (10**4, 3) if arguments.quick else (10**7, 7)
    dtypes = ["float64", "float32"] if platform == "cpu" else ["float32"]
    tables = [table(dtype, OPERATORS, largest, rounds) for dtype in dtypes]
    timing.report(f"penalties-{platform}", "What proximal operators cost", tables, arguments)


def table(dtype: str, operators: Sequence[Operator], largest: int, rounds: int) -> timing.Table:
    """The operators in one dtype, on data of at most so many entries."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    rows = []
    for operator in operators:
        for shape in operator.shapes:
            if np.prod(shape) <= largest:
                rows.append(row(operator, shape, dtype, rounds))
    return timing.Table(
        dtype,
        f"Proximal operators in {dtype}",
        "Memory: the speed at which the arrays that must be read and written would have been (2 "
        "of x's size; 3 with weights, or where a norm comes before the result; 5 with a step for "
        "each coordinate too), in percent of that of a jitted x * c over as many bytes. Sort and "
        f"the libraries ({peers.versions()}): their time in times of jaxreg's. Difference: the "
        "largest from jaxreg's result, and whose it is. Why slower: where the fastest peer takes "
        f"less than {CLEARLY_FASTER} of jaxreg's time on 1e5 entries or more. skglm writes into "
        "an array that it is given. pyproximal's L0 has another threshold, so its sigma is chosen "
        "to fit; its Huber changes branch at delta, not at (1 + step * strength) * delta; its TV "
        "is iterative.",
        (
            "operator",
            "shape",
            "us",
            "memory %",
            "sort",
            *peers.NAMES,
            "fastest peer",
            "difference",
            "why slower",
        ),
        rows,
    )


def row(operator: Operator, shape: Shape, dtype: str, rounds: int) -> tuple[timing.Cell, ...]:
    """One operator on data of one shape, in the order of the table's columns."""
    host = tuple(array.astype(dtype) for array in operator.data(shape))
    device = tuple(jnp.asarray(array) for array in host)

    def prox(x: jax.Array, *more: jax.Array) -> jax.Array:
        step = more[0] if operator.step_each else STEP
        return operator.jaxreg(x, *more).prox(x, step)

    ours = jitted(prox, *device)
    rivals = libraries(operator, host, device)
    difference = largest_difference(ours(), rivals)
    same_bytes = jnp.ones(operator.passes * host[0].size // 2, dtype)
    contenders = {"jaxreg": ours, "x * c": jitted(lambda x: x * 1.5, same_bytes)}
    if operator.against_sort:
        contenders["sort"] = jitted(jnp.sort, device[0])
    on_host = {name: call for name, call in rivals.items() if name in peers.ON_HOST}
    contenders |= {name: call for name, call in rivals.items() if name not in on_host}
    times = timing.interleaved(contenders, affordable(rounds, contenders))
    # Whatever JAX runs next after a host's library is slow, so that is neither ours nor x * c.
    contenders = {"jaxreg": ours, **on_host, "next": ours}
    if on_host:
        times = timing.interleaved(contenders, affordable(rounds, contenders)) | times
    fastest = min(rivals, key=lambda name: times[name].ratio, default=None)
    behind = fastest and host[0].size >= 10**5 and times[fastest].ratio < CLEARLY_FASTER
    return (
        operator.name,
        "x".join(map(str, shape)),
        1e6 * times["jaxreg"].median,
        100 * times["x * c"].ratio,
        *(times[name].ratio if name in times else None for name in ("sort", *peers.NAMES)),
        fastest,
        difference,
        operator.why_slower if behind else None,
    )


def jitted(function: Callable[..., Any], *arrays: jax.Array) -> Callable[[], Any]:
    """A call of the jitted function."""
    compiled = jax.jit(function)
    return lambda: compiled(*arrays)


def libraries(
    operator: Operator, host: Arrays, device: tuple[jax.Array, ...]
) -> dict[str, Callable[[], Any]]:
    """Calls of the libraries that are installed, have the operator and work in the dtype."""
    calls = {}
    for name in filter(peers.installed, peers.NAMES):
        of_data = getattr(operator, name)
        if of_data is not None and name not in peers.ON_HOST:
            calls[name] = jitted(of_data, *device)
        elif of_data is not None and host[0].dtype == np.float64:
            calls[name] = partial(of_data(*host), host[0].ravel(), STEP)
    return calls


def largest_difference(ours: jax.Array, rivals: Mapping[str, Callable[[], Any]]) -> str | None:
    """The largest difference of a result from ours, and whose it is."""
    off = {name: np.max(np.abs(np.ravel(run()) - np.ravel(ours))) for name, run in rivals.items()}
    name = max(off, key=lambda name: off[name], default=None)
    return name and f"{off[name]:.0e} {name}"


def affordable(rounds: int, contenders: Mapping[str, Callable[[], Any]]) -> int:
    """So many rounds, or fewer where they take over ten seconds, but 3 at least."""
    started = time.perf_counter()
    for run in contenders.values():
        jax.block_until_ready(run())
    return min(rounds, max(3, round(10 / (time.perf_counter() - started))))


if __name__ == "__main__":
    main()
