"""Decay beyond weight decay: bounds, anchors, spheres, singular values and projections."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg import where

pytestmark = pytest.mark.core

RNG = np.random.default_rng(0)


def trained(tx, params, gradients, learning_rate=None):
    """The weights after each step, by one compiled scan over an array of gradients a leaf."""
    extra = {} if learning_rate is None else {"learning_rate": learning_rate}
    tx = optax.with_extra_args_support(tx)

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), path = jax.jit(lambda g: jax.lax.scan(step, (params, tx.init(params)), g))(
        gradients
    )
    return path, state


# Constrained decay -------------------------------------------------------------------------------


def cpr(p, updates, init, kappa, mu, warm_up):
    """The paper's algorithm, in float64."""
    p, path, nu = p.astype(float), [], 0.0
    bound = {"uniform": kappa, "dependent": kappa * (p**2).sum()}.get(init, np.inf)
    average, growth = (p**2).sum(), -np.inf
    for t, u in enumerate(updates.astype(float), start=1):
        p = p + u
        square = (p**2).sum()
        if np.isfinite(bound):
            nu = max(0.0, nu + mu * (square - bound))
            p = p - 2 * nu * p
        elif init == "warm_start" and t == warm_up:
            bound = kappa * square
        elif init == "inflection":
            before, average = average, 0.99 * average + 0.01 * square
            if average - before < growth:
                bound = kappa * square
            growth = average - before
        path.append(p)
    return np.array(path), bound, nu


@pytest.mark.parametrize("init", ["uniform", "dependent", "warm_start", "inflection"])
def test_constrained_decay_is_the_papers_algorithm(init):
    p = 0.3 * RNG.normal(size=(6, 5)).astype(np.float32)
    # Fast growth at first, then slow: the growth of the average has a peak.
    speed = np.where(np.arange(60) < 30, 0.05, 0.002)[:, None, None]
    updates = (speed * p + 0.001 * RNG.normal(size=(60, 6, 5))).astype(np.float32)
    warm_up = 12 if init == "warm_start" else None
    tx = jaxreg.constrained_decay(0.9, init, mu=0.5, warm_up=warm_up)
    path, state = trained(
        tx, {"kernel": p, "bias": p[0]}, {"kernel": updates, "bias": updates[:, 0]}
    )
    expected, bound, nu = cpr(p, updates, init, 0.9, 0.5 / p.size, warm_up)  # the paper's mu
    assert np.isfinite(bound)
    assert np.abs(expected[-1] - p - updates.sum(0)).max() > 0.05  # it acts
    np.testing.assert_allclose(path["kernel"], expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(state.bound, [bound], rtol=1e-6)
    np.testing.assert_allclose(state.multiplier, [nu], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(path["bias"][-1], p[0] + updates[:, 0].sum(0), rtol=1e-5)


def test_constrained_decay_holds_each_leaf_at_its_bound():
    params = {"a": {"kernel": 0.1 * RNG.normal(size=(8, 8))}, "b": {"kernel": np.full((4, 4), 0.3)}}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    outward = jax.tree.map(lambda p: jnp.broadcast_to(1e-3 * p, (6000, *p.shape)), params)
    path, _ = trained(jaxreg.constrained_decay(1.0, "dependent"), params, outward)
    for name in ("a", "b"):
        bound = (np.asarray(params[name]["kernel"], float) ** 2).sum()
        found = (np.asarray(path[name]["kernel"][-1], float) ** 2).sum()
        assert abs(found / bound - 1) < 0.01


def test_constrained_decay_neither_turns_weights_around_nor_lets_them_grow():
    """Far above the bound, where the paper's own factor is below 0."""
    p = jnp.full((3, 3), 4.0)
    for move in (0.01, -0.001):  # outward and inward, once the bound is reached
        path, _ = trained(jaxreg.constrained_decay(1.0, "uniform"), p, jnp.full((50, 3, 3), move))
        np.testing.assert_allclose(path[0], np.full((3, 3), 1 / 3), rtol=1e-5)
        assert (path > 0.25).all()
        assert (path < 0.36).all()
    turned, _, _ = cpr(np.full((3, 3), 4.0), np.full((1, 3, 3), 0.01), "uniform", 1.0, 1 / 9, None)
    assert (turned < 0).all()


def test_constrained_decay_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="init: got 'inflexion' .did you mean 'inflection'"):
        jaxreg.constrained_decay(init="inflexion")
    with pytest.raises(ValueError, match="warm_up: got 10 with init='uniform'"):
        jaxreg.constrained_decay(init="uniform", warm_up=10)
    with pytest.raises(ValueError, match="warm_up: got None with init='warm_start'"):
        jaxreg.constrained_decay(init="warm_start")
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="^kappa: got"):
            jaxreg.constrained_decay(bad)
        with pytest.raises(ValueError, match="^mu: got"):
            jaxreg.constrained_decay(mu=bad)


# Anchors -----------------------------------------------------------------------------------------


def spd(p, p0, gradients, strength, lr, momentum):
    p, p0, trace, path = p.astype(float), p0.astype(float), 0.0, []
    for g in gradients.astype(float):
        trace = g + momentum * trace
        after = p - lr * trace
        if (g * (p - p0)).sum() > 0:
            d, further = np.linalg.norm(p - p0), np.linalg.norm(after - p0)
            share = np.clip((further - d) / further, 0, 1) if further > 0 else 0.0
            after = after - strength * share * (after - p0)
        p = after
        path.append(p)
    return np.array(path)


@pytest.mark.parametrize("toward", ["init", "tree"])
def test_selective_projection_decay_is_the_papers_algorithm(toward):
    p = RNG.normal(size=(5, 4)).astype(np.float32)
    p0 = p if toward == "init" else (p + 0.1 * RNG.normal(size=p.shape)).astype(np.float32)
    # The gradient turns, while the momentum still leads away.
    base = RNG.normal(size=p.shape)
    signs = np.where(np.arange(40) % 10 < 7, -1, 1)[:, None, None]
    gradients = (signs * base + 0.3 * RNG.normal(size=(40, 5, 4))).astype(np.float32)
    given = "init" if toward == "init" else {"kernel": p0, "bias": p[0]}
    tx = jaxreg.selective_projection_decay(optax.sgd(0.1, momentum=0.9), 1.5, toward=given)
    path, state = trained(
        tx, {"kernel": p, "bias": p[0]}, {"kernel": gradients, "bias": gradients[:, 0]}
    )
    expected = spd(p, p0, gradients, 1.5, 0.1, 0.9)
    np.testing.assert_allclose(path["kernel"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - spd(p, p0, gradients, 0.0, 0.1, 0.9)).max() > 0.1  # it acts
    plain = spd(p[0], p[0], gradients[:, 0], 0.0, 0.1, 0.9)
    np.testing.assert_allclose(path["bias"], plain, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(state.anchor, (p0,))


def test_an_anchor_is_a_copy_that_may_be_kept_while_the_weights_are_donated():
    p = {"kernel": jnp.ones((3, 3))}
    spd_state = jaxreg.selective_projection_decay(optax.sgd(0.1), toward=p).init(p)
    ewc_tx = jaxreg.ewc(1.0, p, p)
    ewc_state = ewc_tx.init(p)
    step = jax.jit(lambda p, s: ewc_tx.update(p, s, p), donate_argnums=(0, 1))
    step(p, ewc_state)
    assert p["kernel"].is_deleted()
    assert float(spd_state.anchor[0].sum()) == 9.0


def test_ewc_is_the_gradient_of_its_penalty():
    names = ("kernel", "bias")
    shapes = {"kernel": (4, 3), "bias": (3,)}
    p, anchor, grads = (
        {n: RNG.normal(size=shapes[n]).astype(np.float32) for n in names} for _ in range(3)
    )
    fisher = {n: RNG.uniform(size=shapes[n]).astype(np.float32) for n in names}
    tx = jaxreg.ewc(0.7, anchor, fisher)
    found, state = tx.update(grads, tx.init(p), p)
    expected = {n: grads[n] + 0.7 * fisher[n].astype(float) * (p[n] - anchor[n]) for n in names}
    chex.assert_trees_all_close(found, jax.tree.map(np.float32, expected), rtol=1e-5)
    only = jaxreg.ewc(0.7, anchor, fisher, where="bias")
    found, state = only.update(grads, only.init(p), p)
    np.testing.assert_array_equal(found["kernel"], grads["kernel"])
    np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-5)
    chex.assert_trees_all_equal(state.fisher, (fisher["bias"],))
    masked = optax.masked(tx, {"kernel": True, "bias": False})
    found, _ = masked.update(grads, masked.init(p), p)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-5)


def test_trees_that_are_not_like_the_parameters_are_refused_by_name():
    p = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    wrong, short = {**p, "bias": jnp.ones(3)}, {"kernel": p["kernel"]}
    with pytest.raises(ValueError, match=r"anchor: got shape \(3,\) for \(2,\) on bias"):
        jaxreg.ewc(1.0, wrong, p).init(p)
    with pytest.raises(ValueError, match="fisher: got a tree without the leaf bias"):
        jaxreg.ewc(1.0, p, short).init(p)
    with pytest.raises(ValueError, match="toward: got a tree without the leaf bias"):
        jaxreg.selective_projection_decay(optax.sgd(0.1), toward=short).init(p)
    with pytest.raises(ValueError, match="toward: got 'initial'; accepted: 'init', or a tree"):
        jaxreg.selective_projection_decay(optax.sgd(0.1), toward="initial")
    with pytest.raises(ValueError, match="fisher: got an array that holds -1.0 on bias"):
        jaxreg.ewc(1.0, p, {**p, "bias": -jnp.ones(2)})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: jaxreg.weight_decay(0.1, 1.0, toward="init"), "toward: got 'init'"),
        (lambda p: jaxreg.weight_decay(0.1, 1.0, toward=jaxreg.ema(0.9)), "toward: got"),
        (lambda p: jaxreg.selective_projection_decay(optax.sgd(0.1)), "toward: got 'init'"),
        (lambda p: jaxreg.selective_projection_decay(optax.sgd(0.1), toward=p), "toward: got"),
        (lambda p: jaxreg.ewc(1.0, p, p), "params: got None"),
        (lambda p: jaxreg.constrained_decay(), "params: got None"),
        (lambda p: jaxreg.hyperball(0.1), "params: got None"),
        (lambda p: jaxreg.spectral_decay(0.1, 0.1), "params: got None"),
    ],
)
def test_states_that_depend_on_the_parameters_need_them_at_init(make, name):
    with pytest.raises(ValueError, match=rf"(?s)^{name}.*init\(params\)"):
        make({"kernel": jnp.ones((2, 2))}).init(None)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_diagonal_fisher_information_of_a_logistic_model(micro_batch):
    x, y = RNG.normal(size=(10, 4)).astype(np.float32), RNG.integers(0, 2, 10)
    w = RNG.normal(size=4).astype(np.float32)

    def log_likelihood(params, x, y):
        return -jax.nn.softplus(jnp.where(y == 1, -1.0, 1.0) * (x @ params["w"] + params["b"]))

    params = {"w": w, "b": jnp.zeros(())}
    found = jaxreg.diagonal_fisher(log_likelihood, params, (x, y), micro_batch=micro_batch)
    error = y - 1 / (1 + np.exp(-(x.astype(float) @ w)))
    np.testing.assert_allclose(found["w"], (error[:, None] ** 2 * x**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["b"], (error**2).mean(), rtol=1e-5)


def test_micro_batches_bound_the_memory_of_the_fisher_information():
    x, w = jnp.ones((64, 4096)), jnp.ones(4096)
    log_likelihood = lambda w, x: jnp.sum(jnp.sin(w * x))  # noqa: E731

    def temporaries(micro_batch):
        run = lambda w, x: jaxreg.diagonal_fisher(  # noqa: E731
            log_likelihood, w, (x,), micro_batch=micro_batch
        )
        return jax.jit(run).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2) <= 8 * 4 * 4096
    with pytest.raises(ValueError, match="examples: got an array.*tuple"):
        jaxreg.diagonal_fisher(log_likelihood, w, x)  # pyright: ignore[reportArgumentType]


# Spheres -----------------------------------------------------------------------------------------


def normalized(x):
    return x / np.linalg.norm(x) if np.linalg.norm(x) > 0 else x


@pytest.mark.parametrize("own_rate", [True, False])
def test_hyperball_is_the_papers_step(own_rate):
    p = RNG.normal(size=(5, 4)).astype(np.float32)
    moves = RNG.normal(size=(6, 5, 4)).astype(np.float32)
    moves[2] = 0
    tx = jaxreg.hyperball(0.1) if own_rate else jaxreg.hyperball()
    path, _ = trained(tx, p, moves, None if own_rate else 0.1)
    w, radius = p.astype(float), np.linalg.norm(p.astype(float))
    for u, found in zip(moves.astype(float), path, strict=True):
        w = radius * normalized(w + 0.1 * radius * normalized(u))
        np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_norm_on_the_hyperball_does_not_drift(dtype):
    p = {"kernel": jnp.asarray(RNG.normal(size=(32, 16)), dtype), "bias": jnp.ones(3, dtype)}
    moves = {
        "kernel": jnp.asarray(RNG.normal(size=(1000, 32, 16)), dtype),
        "bias": jnp.zeros((1000, 3), dtype),
    }
    path, state = trained(jaxreg.hyperball(0.02), p, moves)
    norms = np.linalg.norm(np.asarray(path["kernel"], np.float64), axis=(1, 2))
    radius = np.linalg.norm(np.asarray(p["kernel"], np.float64))
    tolerance = 1e-6 if dtype == jnp.float32 else 2.0**-9  # half a unit of bf16
    np.testing.assert_allclose(norms, radius, rtol=tolerance)
    np.testing.assert_allclose(state.radii, [radius], rtol=1e-6)
    moved = np.linalg.norm(np.asarray(path["kernel"][-1] - p["kernel"], np.float64))
    assert moved > 0.3 * radius
    np.testing.assert_array_equal(path["bias"][-1], p["bias"])


def test_the_learning_rate_is_the_rate_inside_regularize():
    w = jnp.array([[3.0, 4.0]])
    tx = jaxreg.regularize(optax.scale_by_adam(), 0.5, decay=jaxreg.hyperball())
    updates, _ = tx.update(jnp.array([[0.1, -0.1]]), tx.init(w), w)
    turned = np.array([3.0, 4.0]) + 0.5 * 5 * np.array([-1, 1]) / 2**0.5
    np.testing.assert_allclose((w + updates)[0], 5 * normalized(turned), rtol=1e-5)
    tx = jaxreg.regularize(optax.identity(), 0.5, decay=jaxreg.spectral_decay(0.1))
    updates, _ = tx.update(jnp.zeros((1, 2)), tx.init(w), w)
    np.testing.assert_allclose(updates, -0.05 * w, rtol=1e-5)
    for tx in (jaxreg.hyperball(), jaxreg.spectral_decay(0.1)):
        with pytest.raises(ValueError, match="rate: got None outside of jaxreg.regularize"):
            tx.update(w, tx.init(w), w)


# Singular values ---------------------------------------------------------------------------------


def with_singular_values(values, shape):
    u, _, vt = np.linalg.svd(RNG.normal(size=shape), full_matrices=False)
    return ((u * values) @ vt).astype(np.float32)


def test_spectral_decay_shrinks_the_largest_singular_value_alone():
    wide = with_singular_values([4.0, 1.0, 0.5], (3, 6))
    tall = with_singular_values([3.0, 1.2, 0.1], (5, 3))
    stack = np.stack([tall, 2 * tall[::-1]])
    p = {"wide": wide, "tall": tall, "stack": stack}
    still = jax.tree.map(jnp.zeros_like, p)
    tx = jaxreg.spectral_decay(lambda count: 0.2 / (count + 1), 0.1, iterations=3)
    # Power iteration finds the vectors first, at strength 0.
    ready = jaxreg.spectral_decay(0.0, 0.1, iterations=40)
    _, right = ready.update(jax.tree.map(jnp.zeros_like, p), ready.init(p), p)
    state = tx.init(p)._replace(right=right.right)
    factor = 1.0
    update = jax.jit(tx.update)
    for t in range(20):
        updates, state = update(still, state, p)
        p = jax.tree.map(jnp.add, p, updates)
        factor *= 1 - 0.1 * 0.2 / (t + 1)
    values = jax.tree.map(lambda x: np.linalg.svd(np.asarray(x, float), compute_uv=False), p)
    np.testing.assert_allclose(values["wide"], [4.0 * factor, 1.0, 0.5], rtol=1e-4)
    np.testing.assert_allclose(values["tall"], [3.0 * factor, 1.2, 0.1], rtol=1e-4)
    np.testing.assert_allclose(values["stack"][1], [6.0 * factor, 2.4, 0.2], rtol=1e-4)


def test_the_power_iteration_goes_on_from_step_to_step():
    w = with_singular_values([1.0, 0.8, 0.3], (3, 4))
    path, state = trained(jaxreg.spectral_decay(1.0, 0.0), w, jnp.zeros((60, 3, 4)))
    _, _, vt = np.linalg.svd(w)
    np.testing.assert_allclose(abs(vt[0] @ np.asarray(state.right[0])), 1, rtol=1e-5)
    assert state.count == 60
    np.testing.assert_array_equal(path[-1], w)
    zero = jnp.zeros((3, 4))
    _, state = trained(jaxreg.spectral_decay(1.0, 0.1), zero, jnp.zeros((2, 3, 4)))
    assert jnp.abs(state.right[0]).max() > 0  # a matrix of zeros may grow a direction later


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
@pytest.mark.parametrize("largest", [0.9, 3.0, 20.0])
def test_spectral_cap_is_the_svds(shape, largest):
    values = np.geomspace(largest, 1e-3, min(shape))
    w = with_singular_values(values, shape)
    before = (w + RNG.normal(size=shape)).astype(np.float32)
    tx = jaxreg.spectral_cap(1.0)
    updates, _ = jax.jit(tx.update)(w - before, tx.init(before), before)
    u, s, vt = np.linalg.svd(before.astype(float) + (w - before), full_matrices=False)
    expected = (u * np.minimum(s, 1)) @ vt
    found = np.asarray(before + updates, float)
    assert np.linalg.norm(found - expected, 2) <= 5e-4
    kept = np.linalg.svd(found, compute_uv=False)
    assert kept.max() <= 1.0005
    far = s < 0.1
    np.testing.assert_allclose(np.diag(u.T @ found @ vt.T)[far], s[far], rtol=0.01)


def test_spectral_cap_of_stacks_of_16_bits_and_of_matrices_inside():
    big = jnp.asarray(with_singular_values([5.0, 0.5], (2, 3)))
    small = 0.02 * big
    tx = jaxreg.spectral_cap(1.0)
    p = {"stack": jnp.stack([big, small]), "half": big.astype(jnp.bfloat16), "inside": small}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    after = optax.apply_updates(p, updates)
    np.testing.assert_array_equal(updates["inside"], 0 * small)
    np.testing.assert_array_equal(updates["stack"][1], 0 * small)
    values = lambda x: np.linalg.svd(np.asarray(x, float), compute_uv=False)  # noqa: E731
    np.testing.assert_allclose(values(after["stack"][0]), [1.0, 0.5], rtol=1e-3)
    np.testing.assert_allclose(values(after["half"]), [1.0, 0.5], rtol=2**-6)
    assert after["half"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "make", [lambda: jaxreg.spectral_decay(0.1, 1.0), lambda: jaxreg.spectral_cap(1.0)]
)
def test_what_is_no_matrix_has_no_singular_values(make):
    with pytest.raises(ValueError, match=r"params: got .*shape \(3,\) on the leaf w; .*two axes"):
        make().init({"w": jnp.ones(3)})


# Projections -------------------------------------------------------------------------------------


def test_constrain_projects_what_the_optimizer_leaves():
    p = {"a": {"kernel": RNG.normal(size=(6, 4))}, "b": {"kernel": RNG.normal(size=(5, 3))}}
    p = jax.tree.map(lambda x: x.astype(np.float32), {**p, "bias": RNG.normal(size=4)})
    grads = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=(5, *x.shape)), jnp.float32), p)
    tx = optax.chain(
        optax.sgd(0.5),
        jaxreg.constrain(
            jaxreg.MaxNorm(1.0).on("a/kernel"),
            jaxreg.NonNegative().on("bias"),
            jaxreg.UnitNorm().on("b/kernel"),
        ),
    )
    path, _ = trained(tx, p, grads)
    a, b, bias = (np.asarray(x, float) for x in (p["a"]["kernel"], p["b"]["kernel"], p["bias"]))
    for t in range(5):
        a = a - 0.5 * np.asarray(grads["a"]["kernel"][t], float)
        a = a * np.minimum(1, 1 / np.linalg.norm(a, axis=0))
        b = b - 0.5 * np.asarray(grads["b"]["kernel"][t], float)
        b = b / np.linalg.norm(b, axis=0)
        bias = np.maximum(bias - 0.5 * np.asarray(grads["bias"][t], float), 0)
    np.testing.assert_allclose(path["a"]["kernel"][-1], a, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(path["b"]["kernel"][-1], b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(path["bias"][-1], bias, rtol=1e-4, atol=1e-5)
    assert (path["bias"] == 0).any()


def test_leaves_without_a_constraint_pass_whatever_they_hold():
    p = {"kernel": jnp.array([[-1.0, 2.0]]), "count": jnp.arange(3)}
    tx = jaxreg.constrain(jaxreg.NonNegative())
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    assert updates["kernel"].tolist() == [[1.0, 0.0]]
    assert updates["count"].tolist() == [0, 0, 0]


def test_zeros_are_exact_in_every_dtype():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        w = jnp.asarray(RNG.normal(size=(20, 20)), dtype)
        tx = jaxreg.constrain(jaxreg.TopK(7))
        updates, _ = tx.update(jnp.asarray(RNG.normal(size=w.shape), dtype), tx.init(w), w)
        assert (optax.apply_updates(w, updates) != 0).sum() == 7


def test_what_is_no_constraint_is_sent_to_proximal():
    for wrong in (jaxreg.L1(0.1), jaxreg.NonNegative() + jaxreg.L2(1.0), 3.0):
        with pytest.raises(ValueError, match="constraints: got .*jaxreg.proximal"):
            jaxreg.constrain(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="constraints: got none"):
        jaxreg.constrain()
    joint = jaxreg.Joint(jaxreg.MaxNorm(1.0), {"kernel": 0, "bias": ()})
    p = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
    tx = jaxreg.constrain(joint)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    after = optax.apply_updates(p, updates)
    norms = jnp.sqrt((after["kernel"] ** 2).sum(0) + after["bias"] ** 2)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)
    both = jaxreg.constrain(jaxreg.MaxNorm(1.0), jaxreg.UnitNorm())
    with pytest.raises(ValueError, match="constraints: got .*both on the leaf kernel"):
        both.init(p)


# All ---------------------------------------------------------------------------------------------

LINKS = {
    "constrained_decay": lambda **k: jaxreg.constrained_decay(**k),
    "selective_projection_decay": lambda **k: jaxreg.selective_projection_decay(
        optax.sgd(0.1), **k
    ),
    "hyperball": lambda **k: jaxreg.hyperball(0.1, **k),
    "spectral_decay": lambda **k: jaxreg.spectral_decay(0.1, 0.1, **k),
    "spectral_cap": lambda **k: jaxreg.spectral_cap(1.0, **k),
}


@pytest.mark.parametrize("make", LINKS.values(), ids=LINKS)
def test_bad_use_is_refused_with_the_arguments_name(make):
    params = {"kernel": jnp.ones((2, 2)), "count": jnp.ones((2, 2), int)}
    with pytest.raises(ValueError, match="where: got .*matches no leaf.*kernel"):
        make(where="**/kernal").init(params)
    with pytest.raises(ValueError, match="params: got int32 values on the leaf count"):
        make(where=where.everything).init(params)
    tx = make(where="kernel")
    with pytest.raises(ValueError, match="params: got None"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    "make",
    [*LINKS.values(), lambda: jaxreg.constrain(jaxreg.MaxNorm(1.0))],
    ids=[*LINKS, "constrain"],
)
def test_goes_with_multi_steps(make):
    p, g = {"kernel": jnp.ones((2, 3))}, {"kernel": jnp.full((2, 3), 0.1)}
    tx = optax.chain(optax.sgd(0.1), make())
    steps = optax.MultiSteps(tx, 2)
    updates, state = steps.update(g, steps.init(p), p)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, p))
    updates, _ = steps.update(g, state, p)
    expected, _ = tx.update(g, tx.init(p), p)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


SCHEDULED = {
    "weight_decay": lambda s: jaxreg.weight_decay(s, 0.5),
    "l2_decay": lambda s: jaxreg.l2_decay(s),
    "spectral_decay": lambda s: jaxreg.spectral_decay(s, 0.5),
    "selective_projection_decay": lambda s: jaxreg.selective_projection_decay(
        optax.sgd(-1.0, momentum=0.9), s, toward={"kernel": jnp.zeros((2, 3))}
    ),
    "ewc": lambda s: jaxreg.ewc(s, *[{"kernel": jnp.full((2, 3), 0.5)}] * 2),
}


@pytest.mark.parametrize("make", SCHEDULED.values(), ids=SCHEDULED)
def test_a_strength_may_be_a_schedule(make, strict):
    """In each step it is what the schedule's value at that step is, by itself."""
    p = {"kernel": jnp.asarray(RNG.normal(size=(2, 3)), jnp.bfloat16)}
    grads = {"kernel": jnp.asarray(np.sign(p["kernel"]), jnp.bfloat16)}
    scheduled = make(lambda count: 0.25 * (count.astype(jnp.float32) + 1))
    state = scheduled.init(p)
    for t in range(3):
        expected, _ = make(0.25 * (t + 1)).update(grads, state, p)
        without, _ = make(0.0).update(grads, state, p)
        updates, after = jax.jit(scheduled.update)(grads, state, p)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
        chex.assert_trees_all_close(updates, expected, rtol=2**-7)
        assert jnp.abs(expected["kernel"] - without["kernel"]).max() > 0.05  # it acts
        state = after


def test_the_strength_of_a_timescale():
    assert jaxreg.decay_from_timescale(1e-3, steps=1e4) == pytest.approx(0.1)
    found = jaxreg.decay_from_timescale(1e-3, epochs=20, steps_per_epoch=500)
    assert found == pytest.approx(0.1)
    # tau steps of it shrink a weight by 1/e.
    assert (1 - 1e-3 * found) ** 1e4 == pytest.approx(np.exp(-1), rel=1e-3)
    for bad in ({}, {"steps": 1.0, "epochs": 1.0}):
        with pytest.raises(ValueError, match="steps: got (neither|both)"):
            jaxreg.decay_from_timescale(1e-3, **bad)
    for bad in ({"epochs": 1.0}, {"steps": 1.0, "steps_per_epoch": 2.0}):
        with pytest.raises(ValueError, match="steps_per_epoch: got"):
            jaxreg.decay_from_timescale(1e-3, **bad)
    with pytest.raises(ValueError, match="^learning_rate: got 0.0"):
        jaxreg.decay_from_timescale(0.0, steps=1.0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda s: jaxreg.weight_decay(s, 1.0), "strength"),
        (lambda s: jaxreg.weight_decay(1.0, s), "rate"),
        (jaxreg.l2_decay, "strength"),
        (lambda s: jaxreg.spectral_decay(s, 1.0), "strength"),
    ],
)
def test_a_schedule_gives_one_number(make, name):
    p = jnp.ones((4, 3))
    tx = make(lambda count: jnp.ones(2))
    with pytest.raises(jaxreg.ArgumentError, match=rf"{name}: got a schedule that gives .*\(2,\)"):
        tx.update(p, tx.init(p), p)
