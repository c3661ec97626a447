"""Where proximal optimizers end: the penalized minimizer, found by an independent solver."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import ElasticNet, Lasso

import jaxreg

ROWS, COLUMNS, OUTPUTS = 100, 20, 6
STEPS = 10_000
CLIP = 0.07  # less than half the norm of the loss's gradient at each solution: it stays active
pytestmark = [pytest.mark.core, pytest.mark.usefixtures("x64")]


# Problems ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Least squares with a penalty; all but `penalty` and `loss` is in plain numpy."""

    x: np.ndarray
    y: np.ndarray
    penalty: Callable[[], jaxreg.Penalty]
    prox: Callable[[np.ndarray, float], np.ndarray]
    """``prox(x, step)`` for a scalar step."""
    violation: Callable[[np.ndarray, np.ndarray], float]
    """``violation(w, grad)``: how far w is from stationary, where the loss has that gradient."""
    solver: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """A solver of another kind, where the problem is convex."""
    solver_atol: float = 1e-12
    zeros: Callable[[np.ndarray], Any] = lambda w: w == 0
    metric: Any = "auto"

    def loss(self, w: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(jnp.asarray(self.x) @ w - self.y)) / ROWS

    def grad(self, w: np.ndarray) -> np.ndarray:
        return self.x.T @ (self.x @ w - self.y) / ROWS

    @functools.cached_property
    def solution(self) -> np.ndarray:
        """Of proximal gradient descent from 0."""
        w, step = np.zeros((COLUMNS, *self.y.shape[1:])), 0.2
        for _ in range(2000):
            w = self.prox(w - step * self.grad(w), step)
        return w


def least_squares(truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, COLUMNS))
    y = x @ truth
    return x, y + 0.1 * rng.normal(size=y.shape)


SPARSE = least_squares(np.array([2.0, -1.0, 0.5] + 17 * [0.0]))


def soft(x: np.ndarray, threshold: float) -> np.ndarray:
    return np.sign(x) * np.maximum(np.abs(x) - threshold, 0)


def lasso(s: float = 0.2) -> Problem:
    def violation(w, g):
        return np.where(w == 0, np.maximum(np.abs(g) - s, 0), np.abs(g + s * np.sign(w))).max()

    def solver(x, y):
        return Lasso(alpha=s, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y).coef_

    return Problem(*SPARSE, lambda: jaxreg.L1(s), lambda x, t: soft(x, t * s), violation, solver)


MCP_STRENGTH, MCP_GAMMA = 0.3, 2.0


def mcp(s: float = MCP_STRENGTH, gamma: float = MCP_GAMMA) -> Problem:
    def firm(x, step):
        return np.where(np.abs(x) <= gamma * s, soft(x, step * s) / (1 - step / gamma), x)

    def violation(w, g):
        slope = np.maximum(s - np.abs(w) / gamma, 0) * np.sign(w)
        return np.where(w == 0, np.maximum(np.abs(g) - s, 0), np.abs(g + slope)).max()

    return Problem(*SPARSE, lambda: jaxreg.MCP(s, gamma), firm, violation)


def group_lasso(s: float = 0.05) -> Problem:
    """Each input's weights are a group."""
    truth = np.zeros((COLUMNS, OUTPUTS))
    truth[:3] = np.random.default_rng(1).normal(size=(3, OUTPUTS)) * [[1.0], [0.5], [0.2]]
    a = s * np.sqrt(OUTPUTS)

    def norm(w):
        return np.linalg.norm(w, axis=1, keepdims=True)

    def direction(w):
        return w / np.where(norm(w) > 0, norm(w), 1)

    def prox(x, step):
        return direction(x) * np.maximum(norm(x) - step * a, 0)

    def violation(w, g):
        outside = norm(g + a * direction(w))
        return np.where(norm(w) == 0, np.maximum(norm(g) - a, 0), outside).max()

    def solver(x, y):
        return by_cvxpy(x, y, lambda w: a * cvxpy.sum(cvxpy.norm(w, 2, axis=1)))

    penalty = lambda: jaxreg.GroupLasso(s, groups=jaxreg.groups.axes(1))  # noqa: E731
    return Problem(*least_squares(truth), penalty, prox, violation, solver, 1e-5)


def nuclear(s: float = 0.3) -> Problem:
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(COLUMNS, 2)) @ rng.normal(size=(2, OUTPUTS))

    def prox(x, step):
        u, sigma, vt = np.linalg.svd(x, full_matrices=False)
        return u * np.maximum(sigma - step * s, 0) @ vt

    def violation(w, g):
        """In the bases of w: -s on the diagonal of its range, at most s outside it, 0 between."""
        u, _, vt = np.linalg.svd(w)
        rank = np.linalg.matrix_rank(w)
        g = u.T @ g @ vt.T
        norm = np.linalg.norm
        within = norm(g[:rank, :rank] + s * np.eye(rank))
        between = norm(g[:rank, rank:]) + norm(g[rank:, :rank])
        return max(within, between, norm(g[rank:, rank:], 2) - s)

    def solver(x, y):
        return by_cvxpy(x, y, lambda w: s * cvxpy.normNuc(w))

    penalty, data = (lambda: jaxreg.Nuclear(s)), least_squares(truth)
    options = {"zeros": np.linalg.matrix_rank, "metric": "block"}
    return Problem(*data, penalty, prox, violation, solver, 1e-5, **options)


def by_cvxpy(x: np.ndarray, y: np.ndarray, penalty: Callable[[Any], Any]) -> np.ndarray:
    """To some 1e-6, which is as near as it comes: hence `solver_atol`."""
    w = cvxpy.Variable((COLUMNS, OUTPUTS))
    loss = cvxpy.sum_squares(x @ w - y) / (2 * ROWS)
    tight = {f"tol_{name}": 1e-9 for name in ("gap_abs", "gap_rel", "feas")}
    cvxpy.Problem(cvxpy.Minimize(loss + penalty(w))).solve(cvxpy.CLARABEL, **tight)
    return w.value


CONVEX = {"lasso": lasso(), "group_lasso": group_lasso(), "nuclear": nuclear()}
PROBLEMS = {**CONVEX, "mcp": mcp()}
ELEMENTWISE = {name: problem for name, problem in PROBLEMS.items() if name != "nuclear"}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_solution_is_stationary_and_another_solver_finds_it(problem):
    w, grad = problem.solution, problem.grad(problem.solution)
    assert problem.violation(w, grad) <= 1e-12
    assert 0 < np.sum(problem.zeros(w)) < COLUMNS * OUTPUTS
    assert np.linalg.norm(grad) > 2 * CLIP
    if problem.solver:
        other = problem.solver(problem.x, problem.y)
        chex.assert_trees_all_close(w, other, atol=problem.solver_atol)
    residual = problem.penalty().residual(w, grad)
    chex.assert_trees_all_close(residual, jnp.zeros_like(residual), atol=1e-9)


@pytest.mark.parametrize("problem", ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_the_subdifferential_holds_0_at_the_solution(problem):
    distance = problem.penalty().subdiff_distance(problem.solution, problem.grad(problem.solution))
    chex.assert_trees_all_close(distance, jnp.zeros_like(distance), atol=1e-9)


def test_mcp_is_not_convex_here_and_a_weight_is_where_it_is_concave():
    curvature = np.linalg.eigvalsh(SPARSE[0].T @ SPARSE[0] / ROWS).min()
    assert curvature < 1 / MCP_GAMMA
    assert 0 < PROBLEMS["mcp"].solution[2] < MCP_GAMMA * MCP_STRENGTH


# Descent -----------------------------------------------------------------------------------------


def minimize(
    tx: optax.GradientTransformation, problem: Problem, start: Any = None, rounds: int = 1
) -> np.ndarray:
    """Full-batch descent from 0, all steps in one compiled program.

    The leaves of `start`, one after the other, are the problem's weights. Each round begins with
    the optimizer's first state.
    """
    start = jnp.zeros_like(problem.solution) if start is None else start

    def joined(params):
        return jnp.concatenate(jax.tree.leaves(params))

    def step(carry, _):
        w, state = carry
        grads = jax.grad(lambda w: problem.loss(joined(w)))(w)
        updates, state = tx.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    def descend(w, _):
        return jax.lax.scan(step, (w, tx.init(w)), None, STEPS // rounds)[0][0], None

    return np.asarray(jax.jit(lambda: joined(jax.lax.scan(descend, start, None, rounds)[0]))())


def reaches(w: np.ndarray, problem: Problem) -> bool:
    """The check of this file: within 1e-6, with exactly the same zeros."""
    near = np.abs(w - problem.solution).max() <= 1e-6
    return bool(near and np.all(problem.zeros(w) == problem.zeros(problem.solution)))


def decayed(peak: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, STEPS)


def naive_chain(
    direction: optax.GradientTransformation, peak: float, penalty: jaxreg.Penalty
) -> optax.GradientTransformation:
    """The direction, then a prox at learning rate * strength: what users write."""
    schedule = decayed(peak)
    inner = optax.chain(direction, optax.scale_by_learning_rate(schedule))

    def init(params):
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates, state, params):
        count, inner_state = state
        updates, inner_state = inner.update(updates, inner_state, params)

        def change(p, u):
            return penalty.prox(p + u, schedule(count)) - p

        return jax.tree.map(change, params, updates), (count + 1, inner_state)

    return optax.GradientTransformation(init, update)


# Optimizers x problems ---------------------------------------------------------------------------

CLIPS = {"clip": jaxreg.clip_by_global_norm(CLIP), "optax's clip": optax.clip_by_global_norm(CLIP)}
HEAVY_BALL = optax.trace(0.9)
ADAM = optax.scale_by_adam()
STABLE_ADAM = optax.scale_by_adam(eps=1e-2)

# At an MCP minimizer the loss has no slope along the large weights. There Adam's second moment dies
# away, its step grows to learning rate / eps, and a prox with such a step takes the weight to 0.
# So for MCP eps is large enough that the step stays below gamma, or the scale does not fall.
DIRECTIONS: dict[str, tuple[optax.GradientTransformation, float, dict[str, Problem]]] = {
    "momentum": (HEAVY_BALL, 0.02, PROBLEMS),
    "nesterov": (optax.trace(0.9, nesterov=True), 0.02, PROBLEMS),
    "adam": (ADAM, 0.01, CONVEX),
    "adam with eps": (STABLE_ADAM, 0.01, PROBLEMS),
    "adam with all its settings": (optax.scale_by_adam(0.8, 0.99, 1e-2, 1e-4), 0.01, PROBLEMS),
    "nadam": (optax.scale_by_adam(nesterov=True), 0.01, CONVEX),
    "amsgrad": (optax.scale_by_amsgrad(), 0.03, PROBLEMS),
    "adamax": (optax.scale_by_adamax(), 0.01, CONVEX),
    "rmsprop": (optax.scale_by_rms(), 0.01, CONVEX),
    "rmsprop, momentum": (optax.chain(optax.scale_by_rms(), HEAVY_BALL), 0.001, CONVEX),
    "adagrad": (optax.scale_by_rss(), 0.3, PROBLEMS),
    "adam, trust ratio": (optax.chain(ADAM, optax.scale_by_trust_ratio()), 0.01, CONVEX),
    **{f"{name}, sgd": (clip, 0.3, PROBLEMS) for name, clip in CLIPS.items()},
    **{f"{n}, momentum": (optax.chain(c, HEAVY_BALL), 0.03, PROBLEMS) for n, c in CLIPS.items()},
    **{f"{n}, adam": (optax.chain(c, STABLE_ADAM), 0.01, PROBLEMS) for n, c in CLIPS.items()},
}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("direction", "peak", "problem"),
    [
        pytest.param(direction, peak, problem, id=f"{name}, {of}")
        for name, (direction, peak, problems) in DIRECTIONS.items()
        for of, problem in problems.items()
    ],
)
def test_proximal_ends_at_the_solution_and_the_naive_chain_does_not(direction, peak, problem):
    penalty = problem.penalty()
    tx = jaxreg.proximal(direction, decayed(peak), penalty, metric=problem.metric)
    found = minimize(tx, problem)
    assert reaches(found, problem), np.abs(found - problem.solution).max()
    assert not reaches(minimize(naive_chain(direction, peak, penalty), problem), problem)


Optimizer = Callable[[jaxreg.Penalty], optax.GradientTransformation]
OPTIMIZERS: dict[str, tuple[Optimizer, dict[str, Problem]]] = {
    "prox_sgd": (lambda p: jaxreg.prox_sgd(decayed(0.1), p), PROBLEMS),
    "momentum": (lambda p: jaxreg.prox_sgd(decayed(0.02), p, 0.9), PROBLEMS),
    "nesterov": (lambda p: jaxreg.prox_sgd(decayed(0.02), p, 0.9, nesterov=True), PROBLEMS),
    "prox_adam": (lambda p: jaxreg.prox_adam(decayed(0.01), p, eps=1e-2), ELEMENTWISE),
    "prox_rmsprop": (lambda p: jaxreg.prox_rmsprop(decayed(0.01), p, eps=1e-2), ELEMENTWISE),
    "prox_rmsprop, momentum": (
        lambda p: jaxreg.prox_rmsprop(decayed(0.01), p, eps=1e-2, momentum=0.9),
        ELEMENTWISE,
    ),
    "prox_rmsprop, centered": (
        lambda p: jaxreg.prox_rmsprop(decayed(0.01), p, eps=1e-2, centered=True),
        ELEMENTWISE,
    ),
    "prox_adagrad": (lambda p: jaxreg.prox_adagrad(decayed(0.3), p), ELEMENTWISE),
    "regularize": (
        lambda p: jaxreg.regularize(STABLE_ADAM, decayed(0.01), clip=CLIP, penalty=p),
        ELEMENTWISE,
    ),
}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        pytest.param(make, problem, id=f"{name}, {of}")
        for name, (make, problems) in OPTIMIZERS.items()
        for of, problem in problems.items()
    ],
)
def test_ready_made_optimizers_end_at_the_solution(make, problem):
    found = minimize(make(problem.penalty()), problem)
    assert reaches(found, problem), np.abs(found - problem.solution).max()
    assert problem.violation(found, problem.grad(found)) <= 1e-6


@pytest.mark.parametrize(
    "direction",
    [
        optax.masked(ADAM, {"head": True, "tail": False}),
        optax.partition({"a": ADAM, "b": HEAVY_BALL}, {"head": "a", "tail": "b"}),
        optax.chain(CLIPS["clip"], optax.masked(HEAVY_BALL, {"head": True, "tail": False})),
    ],
    ids=["masked", "partition", "clip, masked"],
)
def test_a_direction_of_some_leaves_ends_at_the_lasso_solution(direction):
    problem = PROBLEMS["lasso"]
    start = {"head": jnp.zeros(2), "tail": jnp.zeros(COLUMNS - 2)}
    penalty = problem.penalty().on(jaxreg.where.everything)
    found = minimize(jaxreg.proximal(direction, decayed(0.02), penalty), problem, start)
    assert reaches(found, problem), np.abs(found - problem.solution).max()
    naive = naive_chain(direction, 0.02, problem.penalty())
    assert not reaches(minimize(naive, problem, start), problem)


# Its start w0 holds dual averaging back: after t steps, where the loss has the curvature h, a share
# of 1 / (2 lr h sqrt(t)) of solution - w0 is left for rda, and of 1 / (2 lr h t) for rmda. Begun
# again where it ended, it comes nearer by that factor: five rounds of 2,000 steps are enough.
DUAL_AVERAGING = {
    "rda": (lambda p: jaxreg.rda(1.0, p), 3e-2, CONVEX.keys()),
    "rmda": (lambda p: jaxreg.rmda(0.3, p), 1e-3, CONVEX.keys()),
    "ramda": (lambda p: jaxreg.ramda(0.1, p), 1e-3, CONVEX.keys() & ELEMENTWISE),
}


@pytest.mark.parametrize(
    ("make", "atol", "problem"),
    [
        pytest.param(make, atol, PROBLEMS[of], id=f"{name}, {of}")
        for name, (make, atol, problems) in DUAL_AVERAGING.items()
        for of in sorted(problems)
    ],
)
def test_dual_averaging_has_the_zeros_and_begun_again_the_solution(make, atol, problem):
    tx = make(problem.penalty())
    once = minimize(tx, problem)
    assert np.all(problem.zeros(once) == problem.zeros(problem.solution))
    chex.assert_trees_all_close(once, problem.solution, atol=atol)
    again = minimize(tx, problem, rounds=5)
    assert reaches(again, problem), np.abs(again - problem.solution).max()


# Other penalties ---------------------------------------------------------------------------------


def test_elastic_net_agrees_with_scikit_learn():
    (x, y), l1, l2 = SPARSE, 0.2, 0.05
    options = {"fit_intercept": False, "tol": 1e-14, "max_iter": 100_000}
    solution = ElasticNet(alpha=l1 + l2, l1_ratio=l1 / (l1 + l2), **options).fit(x, y).coef_
    tx = jaxreg.prox_adam(decayed(1e-2), jaxreg.ElasticNet(l1, l2))
    found = minimize(tx, PROBLEMS["lasso"])
    chex.assert_trees_all_close(found, solution, atol=1e-6)
    chex.assert_trees_all_equal(found == 0, solution == 0)


def test_nonnegative_least_squares_agrees_with_scikit_learn():
    options = {"fit_intercept": False, "tol": 1e-14, "max_iter": 100_000}
    solution = Lasso(alpha=1e-12, positive=True, **options).fit(*SPARSE).coef_
    tx = jaxreg.prox_adam(decayed(1e-2), jaxreg.NonNegative())
    found = minimize(tx, PROBLEMS["lasso"])
    chex.assert_trees_all_close(found, solution, atol=1e-6)
    assert (found >= 0).all()
