"""Where proximal optimizers end: the penalized minimizer, found by an independent solver."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import ElasticNet as SklearnElasticNet
from sklearn.linear_model import Lasso

import jaxreg

STEPS = 30_000
pytestmark = [pytest.mark.core, pytest.mark.usefixtures("x64")]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Least squares on 100 rows and 20 columns, 3 of which matter."""

    x: np.ndarray
    y: np.ndarray
    strength: float

    @classmethod
    def make(cls) -> "Problem":
        rng = np.random.default_rng(0)
        x = rng.normal(size=(100, 20))
        truth = np.zeros(20)
        truth[:3] = 2.0, -1.0, 0.5
        y = x @ truth + 0.1 * rng.normal(size=100)
        critical = np.abs(x.T @ y).max() / len(y)
        return cls(x, y, 0.1 * critical)

    def loss(self, w: jax.Array) -> jax.Array:
        return 0.5 * jnp.mean(jnp.square(jnp.asarray(self.x) @ w - self.y))

    def lasso(self) -> np.ndarray:
        model = Lasso(alpha=self.strength, fit_intercept=False, tol=1e-14, max_iter=100_000)
        return model.fit(self.x, self.y).coef_


@pytest.fixture
def problem(x64: None) -> Problem:
    return Problem.make()


def minimize(tx: optax.GradientTransformation, problem: Problem) -> jax.Array:
    """Full-batch descent from 0, all steps in one compiled program."""
    w = jnp.zeros(problem.x.shape[1])

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(problem.loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), None, STEPS))()
    return w


def reaches(w: jax.Array, solution: np.ndarray) -> bool:
    """The check of this file: within 1e-6, with exactly the same zeros."""
    return bool(np.abs(w - solution).max() <= 1e-6 and ((w == 0) == (solution == 0)).all())


def decayed(peak: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, STEPS)


def clip_at_half(problem: Problem) -> float:
    """Half the norm of the loss's gradient at the solution: a clip that stays active."""
    return float(jnp.linalg.norm(jax.grad(problem.loss)(jnp.asarray(problem.lasso())))) / 2


def prox_adam(problem: Problem) -> optax.GradientTransformation:
    return jaxreg.prox_adam(decayed(1e-2), jaxreg.L1(problem.strength))


def prox_sgd(problem: Problem) -> optax.GradientTransformation:
    return jaxreg.prox_sgd(decayed(0.1), jaxreg.L1(problem.strength))


def heavy_ball(problem: Problem) -> optax.GradientTransformation:
    return jaxreg.prox_sgd(decayed(0.02), jaxreg.L1(problem.strength), momentum=0.9)


def nesterov(problem: Problem) -> optax.GradientTransformation:
    return jaxreg.prox_sgd(decayed(0.02), jaxreg.L1(problem.strength), 0.9, nesterov=True)


def nesterov_adam(problem: Problem) -> optax.GradientTransformation:
    return jaxreg.prox_adam(decayed(1e-2), jaxreg.L1(problem.strength), nesterov=True)


def large_eps(problem: Problem) -> optax.GradientTransformation:
    return jaxreg.prox_adam(decayed(1e-2), jaxreg.L1(problem.strength), eps=1e-2, eps_root=1e-4)


def auto_adam(problem: Problem) -> optax.GradientTransformation:
    direction = optax.chain(optax.scale_by_adam(b1=0.8, b2=0.99, eps=1e-2))
    return jaxreg.proximal(direction, decayed(1e-2), jaxreg.L1(problem.strength))


def clipped(direction: optax.GradientTransformation, peak: float, problem: Problem):
    return jaxreg.regularize(
        direction,
        decayed(peak),
        clip=clip_at_half(problem),
        penalty=jaxreg.L1(problem.strength),
    )


def clipped_sgd(problem: Problem) -> optax.GradientTransformation:
    return clipped(optax.identity(), 0.1, problem)


def clipped_heavy_ball(problem: Problem) -> optax.GradientTransformation:
    return clipped(optax.trace(0.9), 0.02, problem)


def clipped_adam(problem: Problem) -> optax.GradientTransformation:
    return clipped(optax.scale_by_adam(), 1e-2, problem)


def naive_chain(
    direction: optax.GradientTransformation, peak: float, problem: Problem
) -> optax.GradientTransformation:
    """The direction, then a soft threshold at learning rate * strength: what users write."""
    schedule = decayed(peak)
    inner = optax.chain(direction, optax.scale_by_learning_rate(schedule))

    def init(params):
        return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates, state, params):
        count, inner_state = state
        updates, inner_state = inner.update(updates, inner_state, params)
        stepped = params + updates
        threshold = schedule(count) * problem.strength
        shrunk = jnp.sign(stepped) * jnp.maximum(jnp.abs(stepped) - threshold, 0)
        return shrunk - params, (count + 1, inner_state)

    return optax.GradientTransformation(init, update)


def test_prox_adam_ends_at_the_lasso_solution_and_the_naive_chain_does_not(problem):
    solution = problem.lasso()
    assert 0 < (solution == 0).sum() < 20
    naive = naive_chain(optax.scale_by_adam(), 1e-2, problem)
    assert reaches(minimize(prox_adam(problem), problem), solution)
    assert not reaches(minimize(naive, problem), solution)


def test_heavy_ball_ends_at_the_lasso_solution_and_the_naive_chain_does_not(problem):
    solution = problem.lasso()
    naive = naive_chain(optax.trace(0.9), 0.02, problem)
    assert reaches(minimize(heavy_ball(problem), problem), solution)
    assert not reaches(minimize(naive, problem), solution)


def test_an_active_clip_leaves_the_solution_where_it_is_and_the_naive_chain_does_not(problem):
    solution = problem.lasso()
    clip = jaxreg.clip_by_global_norm(clip_at_half(problem))
    naive = naive_chain(clip, 0.1, problem)
    assert reaches(minimize(clipped_sgd(problem), problem), solution)
    assert not reaches(minimize(naive, problem), solution)


@pytest.mark.parametrize(
    "make",
    [prox_sgd, nesterov, nesterov_adam, large_eps, auto_adam, clipped_heavy_ball, clipped_adam],
    ids=lambda make: make.__name__,
)
def test_other_proximal_optimizers_end_at_the_lasso_solution(make, problem):
    found, solution = minimize(make(problem), problem), problem.lasso()
    assert reaches(found, solution), np.abs(found - solution).max()


def test_elastic_net_agrees_with_scikit_learn(problem):
    l1, l2 = problem.strength, 0.05
    alpha = l1 + l2
    model = SklearnElasticNet(
        alpha=alpha, l1_ratio=l1 / alpha, fit_intercept=False, tol=1e-14, max_iter=100_000
    )
    solution = model.fit(problem.x, problem.y).coef_
    tx = jaxreg.prox_adam(decayed(1e-2), jaxreg.ElasticNet(l1, l2))
    assert reaches(minimize(tx, problem), solution)


def test_nonnegative_least_squares_agrees_with_scikit_learn(problem):
    model = Lasso(alpha=1e-12, positive=True, fit_intercept=False, tol=1e-14, max_iter=100_000)
    solution = model.fit(problem.x, problem.y).coef_
    found = minimize(jaxreg.prox_adam(decayed(1e-2), jaxreg.NonNegative()), problem)
    chex.assert_trees_all_close(found, solution, atol=1e-6)
    assert (found >= 0).all()


def test_the_solution_satisfies_its_own_optimality_conditions(problem):
    penalty = jaxreg.L1(problem.strength)
    w = minimize(prox_adam(problem), problem)
    grad = jax.grad(problem.loss)(w)
    chex.assert_trees_all_close(penalty.residual(w, grad), jnp.zeros(20), atol=1e-9)
    chex.assert_trees_all_close(penalty.subdiff_distance(w, grad), jnp.zeros(20), atol=1e-9)
