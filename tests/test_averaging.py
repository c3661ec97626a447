"""Averages of weights and lookahead, against their formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import message
from flax import nnx

import jaxreg

pytestmark = pytest.mark.core
RNG = np.random.default_rng(0)
GRADS = RNG.normal(size=(7, 5))
START = RNG.normal(size=5)


def run(tx, grads=GRADS, start=START, dtype=jnp.float32):
    """The weights after each step, and the last state, in one program."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"w": g}, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params["w"]

    def all_steps(w, grads):
        return jax.lax.scan(step, ({"w": w}, tx.init({"w": w})), grads)

    (params, state), seen = jax.jit(all_steps)(jnp.asarray(start, dtype), jnp.asarray(grads, dtype))
    return params, state, np.asarray(seen.astype(jnp.float32), np.float64)


def test_ema_is_the_weighted_mean_of_the_weights():
    for decay in (0.9, lambda t: 1 - 1 / (2.0 + t), 0.0):
        tx = optax.chain(optax.sgd(0.1), jaxreg.ema_of_params(decay))
        params, state, seen = run(tx)
        total, mean = 0.0, np.zeros(5)
        for t, w in enumerate(seen):
            d = decay(t) if callable(decay) else decay
            total, mean = d * total + 1 - d, d * mean + (1 - d) * w
        found = jaxreg.averaged_params(state, params)["w"]
        np.testing.assert_allclose(found, mean / total, rtol=1e-5)


def test_without_debiasing_it_starts_at_the_initial_weights():
    tx = optax.chain(optax.sgd(0.1), jaxreg.ema_of_params(0.9, debias=False))
    params, state, seen = run(tx)
    mean = START
    for w in seen:
        mean = 0.9 * mean + 0.1 * w
    np.testing.assert_allclose(jaxreg.averaged_params(state, params)["w"], mean, rtol=1e-5)


def test_a_long_memory_is_debiased_without_loss():
    params, state, seen = run(optax.chain(optax.sgd(0.1), jaxreg.ema_of_params(0.99999)))
    found = jaxreg.averaged_params(state, params)["w"]
    np.testing.assert_allclose(found, seen.mean(0), rtol=1e-4, atol=1e-5)


def test_swa_is_the_mean_of_the_weights_chosen():
    for start, every, chosen in ((0, 1, range(7)), (1, 2, [2, 4, 6]), (2, 4, [5])):
        params, state, seen = run(optax.chain(optax.sgd(0.1), jaxreg.swa(start, every)))
        found = jaxreg.averaged_params(state, params)["w"]
        np.testing.assert_allclose(found, seen[[*chosen]].mean(0), rtol=1e-5)
    params, state, seen = run(optax.chain(optax.sgd(0.1), jaxreg.swa(start=7)))
    chex.assert_trees_all_equal(jaxreg.averaged_params(state, params), params)


@pytest.mark.parametrize("link", [jaxreg.swa(), jaxreg.ema_of_params(1 - 1e-9)])
def test_the_average_of_64_bit_weights_has_64_bits(link, x64):
    start, grads = jnp.asarray(START, jnp.float64), jnp.asarray(GRADS, jnp.float64)
    state, seen = link.init(start), []
    for g in grads:
        _, state = link.update(g, state, start)
        seen.append(start + g)
    mean = np.mean(seen, axis=0)
    np.testing.assert_allclose(jaxreg.averaged_params(state, start), mean, rtol=0, atol=1e-8)


def test_the_rounding_of_16_bit_weights_is_averaged_too():
    """Under jit XLA leaves out a rounding that is undone at once."""
    grads = RNG.normal(size=(7, 500))
    start = RNG.normal(size=500)
    for dtype in (jnp.bfloat16, jnp.float16):
        params, state, seen = run(
            optax.chain(optax.sgd(0.01), jaxreg.swa()), grads, start, dtype=dtype
        )
        average = state[-1].average["w"]
        assert average.dtype == jnp.float32
        np.testing.assert_allclose(average, seen.mean(0), rtol=1e-6, atol=1e-7)
        found = jaxreg.averaged_params(state, params)["w"]
        chex.assert_trees_all_equal(found, average.astype(dtype))


def test_averages_are_found_in_any_state():
    params = {"a": jnp.ones((2, 2)), "b": {"c": jnp.ones(3), "d": jnp.ones(3)}}
    link = jaxreg.swa()
    chains = {
        "chain": optax.chain(optax.adam(0.1), link),
        "multi": optax.MultiSteps(optax.chain(optax.adam(0.1), link), 2),
        "skip": jaxreg.skip_step(optax.chain(optax.adam(0.1), link)),
        "masked": optax.chain(optax.adam(0.1), optax.masked(link, {"a": True, "b": False})),
        "regularize": optax.chain(jaxreg.regularize(optax.scale_by_adam(), 0.1, clip=1.0), link),
        "lookahead": optax.chain(optax.adam(0.1), jaxreg.lookahead(2), link),
        "rounding": jaxreg.stochastic_rounding(optax.chain(optax.adam(0.1), link), seed=0),
    }
    for name, tx in chains.items():
        state, now, seen = tx.init(params), params, []
        chex.assert_trees_all_equal(jaxreg.averaged_params(state, now), params)
        for _ in range(4):
            updates, state = tx.update(params, state, now)
            now = optax.apply_updates(now, updates)
            seen.append(now)
        seen = seen[1::2] if name == "multi" else seen
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *seen)
        if name == "masked":
            mean["b"] = now["b"]
        chex.assert_trees_all_close(jaxreg.averaged_params(state, now), mean, rtol=1e-6)


def test_averages_of_an_nnx_model():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), jaxreg.ema_of_params(0.5))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.ones((4, 3))
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))
    graph, params = nnx.split(model, nnx.Param)
    average = jaxreg.averaged_params(optimizer.opt_state, params)
    assert (nnx.merge(graph, average)(x) != model(x)).any()


def test_complex_weights_are_averaged():
    w = jnp.asarray([1 + 2j, -1j], jnp.complex64)
    tx = jaxreg.ema_of_params(0.5)
    state, now, seen = tx.init(w), w, []
    for _ in range(3):
        updates, state = tx.update(0.3j * now, state, now)
        now = optax.apply_updates(now, updates)
        seen.append(np.asarray(now))
    expected = (0.125 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]) / 0.875
    np.testing.assert_allclose(jaxreg.averaged_params(state, now), expected, rtol=1e-6)


def test_a_state_may_be_donated():
    for link in (jaxreg.swa(), jaxreg.lookahead()):
        params = {"w": jnp.ones(5)}
        tx = optax.chain(optax.sgd(0.1), link)

        def step(params, state, tx=tx):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        params, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
        chex.assert_trees_all_close(params, {"w": jnp.full(5, 0.9)}, rtol=1e-6)


def test_averages_that_are_not_one_are_refused():
    w = jnp.ones(3)
    two = optax.chain(jaxreg.swa(), jaxreg.ema_of_params(0.9))
    cases = {
        "a state with no averages": (optax.adam(0.1).init(w), w),
        "a state with 2 averages": (two.init(w), w),
        "a transformation": (jaxreg.swa(), w),
        "another tree": (jaxreg.swa().init({"a": w, "b": w}), {"a": w}),
    }
    for given, (state, params) in cases.items():
        with pytest.raises(ValueError, match=f"(opt_state|params): got {given}") as error:
            jaxreg.averaged_params(state, params)
        message(error)


# Lookahead ---------------------------------------------------------------------------------------


def test_lookahead_goes_a_part_of_the_way():
    _, state, seen = run(optax.chain(optax.sgd(0.1, momentum=0.9), jaxreg.lookahead(3, 0.4)))
    fast = slow = START
    trace = np.zeros(5)
    for t, g in enumerate(GRADS):
        trace = 0.9 * trace + g
        fast = fast - 0.1 * trace
        if t % 3 == 2:
            fast = slow = slow + 0.4 * (fast - slow)
        np.testing.assert_allclose(seen[t], fast, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state[-1].slow["w"], slow, rtol=1e-5, atol=1e-6)


def test_apply_updates_gives_the_slow_weights():
    """Exactly in 16 bits, where they are nearby."""
    grads, start = RNG.normal(size=(4, 500)), RNG.uniform(1, 3, 500)
    tx = optax.chain(optax.sgd(0.02), jaxreg.lookahead(2))
    params, state, _ = run(tx, grads, start, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(params["w"], state[-1].slow["w"].astype(jnp.bfloat16))
    params, state, _ = run(tx, grads, start)
    chex.assert_trees_all_close(params["w"], state[-1].slow["w"], rtol=1.2e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_network_trains_with_each_of_them(dtype):
    x = jnp.asarray(RNG.normal(size=(32, 4)), dtype)
    params = {
        "first": jnp.asarray(0.5 * RNG.normal(size=(4, 16)), dtype),
        "last": jnp.asarray(0.3 * RNG.normal(size=16), dtype),
    }

    def error(params):
        out = jnp.tanh(x @ params["first"]) @ params["last"]
        return jnp.mean((out - jnp.sin(x.sum(1))).astype(jnp.float32) ** 2)

    tx = optax.chain(optax.adam(0.01), jaxreg.lookahead(3), jaxreg.ema_of_params(0.9))
    tx = optax.MultiSteps(tx, 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(error)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=200)[0])
    after, state = run(params)
    average = jaxreg.averaged_params(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(average, params)
    assert error(average) < 0.3 * error(params)


def test_bad_use_is_refused_with_the_arguments_name():
    for bad in (1.0, -0.1, float("nan"), "0.9"):
        with pytest.raises(ValueError, match="^decay: got"):
            jaxreg.ema_of_params(bad)
    for make in (jaxreg.swa, jaxreg.lookahead):
        with pytest.raises(ValueError, match="^every: got 0; accepted: a whole number >= 1"):
            make(every=0)
    with pytest.raises(ValueError, match="^start: got -1"):
        jaxreg.swa(-1)
    with pytest.raises(ValueError, match=r"^alpha: got 1.5; accepted: a number in \[0, 1\]"):
        jaxreg.lookahead(5, 1.5)
    for tx in (jaxreg.ema_of_params(0.9), jaxreg.swa(), jaxreg.lookahead()):
        with pytest.raises(ValueError, match="params: got int32 values on the leaf n"):
            tx.init({"n": jnp.arange(3)})
        with pytest.raises(ValueError, match="params: got None"):
            tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
