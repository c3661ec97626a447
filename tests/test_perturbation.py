"""SAM and ASAM, gradient noise and centralization, against the papers' formulas."""

import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import message
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec
from sharded import check_same_where_sharded

import jaxreg

pytestmark = pytest.mark.core
P = PartitionSpec
RNG = np.random.default_rng(0)

A, B = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 3))
PARAMS = {"a": RNG.normal(size=4), "b": RNG.normal(size=3)}


def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def loss(params, scale=1.0, a=None):
    a = f32(A) if a is None else a
    return scale * jnp.sum(jnp.sin(a @ params["a"] + f32(B) @ params["b"]))


def gradient(params, a=A, b=B):
    """That of the loss, in NumPy."""
    slope = np.cos(a @ params["a"] + b @ params["b"])
    return {"a": slope @ a, "b": slope @ b}


def perturbed(params, grads, rho, sizes=None):
    """p + rho T^2 g / ||T g||."""
    sizes = sizes or {name: np.ones_like(p) for name, p in params.items()}
    norm = np.sqrt(sum(((sizes[k] * grads[k]) ** 2).sum() for k in params))
    return {k: params[k] + rho * sizes[k] ** 2 * grads[k] / norm for k in params}


# SAM ---------------------------------------------------------------------------------------------


def test_sam_is_the_gradient_at_weights_uphill():
    found = jax.jit(jaxreg.sam(loss, 0.3))(f32(PARAMS), scale=1.0)
    expected = gradient(perturbed(PARAMS, gradient(PARAMS), 0.3))
    chex.assert_trees_all_close(found, (loss(f32(PARAMS)), f32(expected)), rtol=1e-5, atol=1e-6)


def test_asam_is_the_gradient_at_weights_uphill_relative_to_their_size():
    found = jax.jit(jaxreg.asam(loss, 0.3, eta=0.05))(f32(PARAMS))
    sizes = {name: np.abs(p) + 0.05 for name, p in PARAMS.items()}
    expected = gradient(perturbed(PARAMS, gradient(PARAMS), 0.3, sizes))
    chex.assert_trees_all_close(found, (loss(f32(PARAMS)), f32(expected)), rtol=1e-5, atol=1e-6)


def test_asam_follows_a_rescaling_of_the_weights():
    scales = {"a": jnp.array([0.1, 1.0, 20.0, -3.0]), "b": jnp.array([5.0, 0.3, 1.0])}
    times = lambda x: jax.tree.map(jnp.multiply, scales, x)  # noqa: E731
    rescaled = jax.tree.map(jnp.divide, f32(PARAMS), scales)

    def same(of, tolerance):
        _, expected = of(loss)(f32(PARAMS))
        _, found = of(lambda p: loss(times(p)))(rescaled)
        chex.assert_trees_all_close(found, times(expected), rtol=tolerance, atol=tolerance)

    same(lambda loss: jaxreg.asam(loss, 0.3, eta=0.0), 1e-5)
    with pytest.raises(AssertionError):
        same(lambda loss: jaxreg.sam(loss, 0.3), 0.1)


@pytest.mark.parametrize("make", [jaxreg.sam, jaxreg.asam])
def test_value_and_aux_are_those_of_the_weights_themselves(make):
    def with_aux(params, x, *, factor):
        return factor * jnp.sum(params**2) * x, {"norm": jnp.sum(jnp.abs(params))}

    w = jnp.array([1.0, -2.0])
    (value, aux), grads = make(with_aux, 0.5, has_aux=True)(w, 3.0, factor=2.0)
    assert (value, aux["norm"]) == (30, 3)
    assert (jnp.abs(grads) > jnp.abs(12 * w)).all()


@pytest.mark.parametrize("make", [jaxreg.sam, jaxreg.asam])
def test_a_zero_gradient_perturbs_nothing(make):
    """optax.contrib.sam: 0 / 0."""
    squares = lambda w: jnp.sum(w**2)  # noqa: E731
    chex.assert_trees_all_equal(make(squares)(jnp.zeros(3)), (jnp.zeros(()), jnp.zeros(3)))
    constant = lambda w: jnp.sum(0 * w)  # noqa: E731
    chex.assert_trees_all_equal(make(constant)(jnp.ones(3))[1], jnp.zeros(3))


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_squares_of_the_gradient_may_be_out_of_range(scale):
    w = jnp.array([3.0, 4.0])
    _, grads = jax.jit(jaxreg.sam(lambda w: scale * jnp.sum(w**2) / 2, 0.5))(w)
    chex.assert_trees_all_close(grads / scale, jnp.array([3.3, 4.4]), rtol=1e-6)


def test_a_gradient_that_is_not_finite_is_seen():
    _, grads = jaxreg.sam(lambda w: jnp.sum(jnp.sqrt(w)))(jnp.array([0.0, 1.0]))
    assert not jnp.isfinite(grads).all()


def test_complex_weights_go_uphill():
    """JAX's gradient is the conjugate of the direction of ascent."""
    z, a = RNG.normal(size=(2, 3)) + 1j * RNG.normal(size=(2, 3))
    loss = lambda z: jnp.abs(jnp.sum(jnp.complex64(a) * z)) ** 2  # noqa: E731
    seen = {}

    def recorded(z):
        jax.debug.callback(lambda z: seen.setdefault(len(seen), np.asarray(z)), z)
        return loss(z)

    jaxreg.sam(recorded, rho=0.1)(jnp.complex64(z))
    jax.effects_barrier()
    before, after = seen[0], seen[1]
    np.testing.assert_allclose(np.linalg.norm(after - before), 0.1, rtol=1e-5)
    # No direction of this length leads higher, up to the second order.
    best = (abs((a * z).sum()) + 0.1 * np.linalg.norm(a)) ** 2
    np.testing.assert_allclose(loss(after), best, rtol=1e-5)


def test_weights_in_bf16_are_perturbed_in_float32_and_rounded_once():
    w = jnp.asarray(RNG.normal(size=64), jnp.bfloat16)
    value, grads = jaxreg.sam(lambda w: jnp.sum(w.astype(jnp.float32) ** 2) / 2, 0.5)(w)
    exact = np.asarray(w, np.float64) * (1 + 0.5 / np.linalg.norm(np.asarray(w, np.float64)))
    assert (value.dtype, grads.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(grads, jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize("check_vma", [True, False])
def test_each_device_perturbs_by_its_own_batch_or_all_by_the_average(check_vma):
    a = RNG.normal(size=(8, 5, 4))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def mapped(axis_name, captured):
        def step(params, a):
            if captured:  # the batch in a closure
                value, grads = jaxreg.sam(lambda p: loss(p, a=a[0]), 0.3, axis_name=axis_name)(
                    params
                )
            else:
                value, grads = jaxreg.sam(loss, 0.3, axis_name=axis_name)(params, a=a[0])
            return value[None], jax.tree.map(lambda g: g[None], grads)

        specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P("data")}
        return jax.jit(jax.shard_map(step, check_vma=check_vma, **specs))(f32(PARAMS), f32(a))

    own = [gradient(PARAMS, part) for part in a]
    alone = [gradient(perturbed(PARAMS, own[i], 0.3), a[i]) for i in range(8)]
    alone = {k: np.stack([g[k] for g in alone]) for k in PARAMS}
    average = {k: np.mean([g[k] for g in own], 0) for k in PARAMS}
    moved = perturbed(PARAMS, average, 0.3)
    together = [gradient(moved, part) for part in a]
    together = {k: np.tile(np.mean([g[k] for g in together], 0), (8, 1)) for k in PARAMS}
    values = [loss(f32(PARAMS), a=f32(part)) for part in a]
    for axis_name, expected in ((None, alone), ("data", together)):
        value, grads = mapped(axis_name, captured=axis_name is None)
        chex.assert_trees_all_close(grads, f32(expected), rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(value, jnp.stack(values), rtol=1e-5, atol=1e-5)


def test_a_loss_that_is_averaged_itself_is_not_averaged_again():
    a = f32(RNG.normal(size=(8, 5, 4)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = lambda p: jnp.mean(jax.vmap(lambda a: loss(p, a=a))(a))  # noqa: E731

    def step(params, a):
        mean = lambda p: jax.lax.pmean(loss(p, a=a[0]), "data")  # noqa: E731
        return jaxreg.sam(mean, 0.3)(params), jaxreg.sam(mean, 0.3, axis_name="data")(params)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    expected = jaxreg.sam(whole, 0.3)(f32(PARAMS))
    for found in jax.jit(mapped)(f32(PARAMS), a):
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_trains_linen_and_nnx_with_multi_steps_behind():
    x = f32(RNG.normal(size=(32, 4)))
    y = jnp.sin(x.sum(1, keepdims=True))

    def trained(params, loss, make):
        tx = optax.MultiSteps(optax.adam(0.01), 2)

        @jax.jit
        def train(params):
            def step(carry, _):
                params, state = carry
                value, grads = make(loss)(params)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), value

            return jax.lax.scan(step, (params, tx.init(params)), None, length=100)[1]

        return train(params)

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1)(linen.tanh(linen.Dense(16)(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 16, rngs=rngs)
            self.last = nnx.Linear(16, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    module = Linen()
    params = module.init(jax.random.key(0), x)
    values = trained(params, lambda p: jnp.mean((module.apply(p, x) - y) ** 2), jaxreg.asam)
    assert values[-1] < 0.3 * values[0]
    graph, params = nnx.split(Nnx(nnx.Rngs(0)), nnx.Param)
    values = trained(params, lambda p: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2), jaxreg.sam)
    assert values[-1] < 0.3 * values[0]


def test_bad_use_of_sam_is_refused_with_the_arguments_name():
    with pytest.raises(ValueError, match="^loss: got 1.0; accepted: a function") as error:
        jaxreg.sam(1.0)
    message(error)
    for make in (jaxreg.sam, jaxreg.asam):
        for bad in (-0.1, float("nan"), "1", optax.constant_schedule(0.1)):
            with pytest.raises(ValueError, match="^rho: got"):
                make(loss, bad)
        with pytest.raises(ValueError, match="params: got int32 values on the leaf n"):
            make(loss)({"n": jnp.arange(3)})
        with pytest.raises(ValueError, match="axis_name: got 'data', which is not bound"):
            make(loss, axis_name="data")(f32(PARAMS))
    with pytest.raises(ValueError, match="^eta: got -1.0"):
        jaxreg.asam(loss, eta=-1.0)


# Noise -------------------------------------------------------------------------------------------


def noise(tree, steps=1, eta=0.5, gamma=0.55, seed=3):
    """The noise of the last of some steps."""
    tx = jaxreg.gradient_noise(eta, gamma, seed=seed)
    zeros = jax.tree.map(jnp.zeros_like, tree)
    state = tx.init(tree)
    for _ in range(steps):
        found, state = tx.update(zeros, state)
    return found


def test_the_variance_of_the_noise_fades_as_stated():
    for steps in (1, 4):
        found = np.asarray(noise(jnp.zeros(40_000), steps), np.float64)
        variance = 0.5 / steps**0.55
        assert abs(found.mean()) < 3 * np.sqrt(variance / found.size)
        assert abs(found.var() / variance - 1) < 3 * np.sqrt(2 / found.size)
        # As many beyond two deviations as a normal distribution has.
        share = (np.abs(found) > 2 * np.sqrt(variance)).mean()
        assert abs(share - 0.0455) < 3 * np.sqrt(0.0455 / found.size)


def test_complex_noise_has_the_stated_variance_in_both_parts_together():
    found = np.asarray(noise(jnp.zeros(40_000, jnp.complex64)))
    for part in (found.real, found.imag):
        assert abs(part.var() / 0.25 - 1) < 3 * np.sqrt(2 / found.size)
    assert abs((found.real * found.imag).mean()) < 3 * 0.25 / np.sqrt(found.size)


def test_the_noise_is_a_function_of_the_seed_the_step_and_the_path():
    """Of these numbers exactly: a restart with a later version finds the same."""
    key = jax.random.key(3, impl="threefry2x32")
    for word in (zlib.crc32(b"gradient_noise"), 1, zlib.crc32(b"layer/kernel")):
        key = jax.random.fold_in(key, np.uint32(word))
    tree = {"layer": {"kernel": jnp.zeros((4, 3))}}
    expected = jnp.sqrt(0.5) * 2 ** (-0.55 / 2) * jax.random.normal(key, (4, 3))
    found = noise(tree, steps=2)["layer"]["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_noise_is_the_same_after_a_restart_and_beside_other_leaves():
    a, b = jnp.zeros(64), jnp.zeros((8, 8))
    tree = {"a": a, "b": b}
    tx = jaxreg.gradient_noise(0.5, seed=3)
    _, state = tx.update(tree, tx.init(tree))
    saved = jax.tree.map(np.asarray, state)  # a checkpoint
    restarted, _ = jaxreg.gradient_noise(0.5, seed=3).update(tree, jax.tree.map(jnp.asarray, saved))
    chex.assert_trees_all_equal(restarted, noise(tree, steps=2))
    more = {"0": jnp.zeros(5), "b": b, "a": a, "c": {"a": a}}
    found = noise(more)
    chex.assert_trees_all_equal({k: found[k] for k in tree}, noise(tree))
    others = (found["c"]["a"], noise(tree, steps=2)["a"], noise(tree, seed=4)["a"])
    for other in (*others, found["b"].ravel()):
        assert abs(np.corrcoef(found["a"], other)[0, 1]) < 0.4
    # Whatever the seed is given as.
    for seed in (np.int64(3), jax.random.key(3), jax.random.PRNGKey(3)):
        chex.assert_trees_all_equal(noise(tree, seed=seed), noise(tree))
    chex.assert_trees_all_equal(
        jax.jit(lambda key: noise(tree, seed=key))(jax.random.key(3)), jax.jit(noise)(tree)
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_noise_of_sharded_gradients_is_the_same(kind):
    check_same_where_sharded(noise, jnp.zeros((16, 8)), kind, "f32[16,8]")


def test_noise_keeps_the_dtype_and_the_leaves_that_are_left_out():
    grads = {"kernel": jnp.ones((4, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    tx = optax.chain(
        jaxreg.gradient_noise(jnp.float32(0.5), seed=0, where="kernel"), optax.sgd(1.0)
    )
    updates, _ = tx.update(grads, tx.init(grads), grads)
    chex.assert_trees_all_equal(updates["bias"], -grads["bias"])
    assert updates["kernel"].dtype == jnp.bfloat16
    assert (updates["kernel"] != -grads["kernel"]).any()
    none = jaxreg.gradient_noise(0.0, seed=0)
    chex.assert_trees_all_equal(none.update(grads, none.init(grads))[0], grads)


def test_bad_use_of_noise_is_refused_with_the_arguments_name():
    for bad in (-0.1, float("nan"), optax.constant_schedule(0.1)):
        with pytest.raises(ValueError, match="^eta: got"):
            jaxreg.gradient_noise(bad, seed=0)
        with pytest.raises(ValueError, match="^gamma: got"):
            jaxreg.gradient_noise(0.1, bad, seed=0)
    with pytest.raises(ValueError, match="^seed: got -1; accepted: a whole number") as error:
        jaxreg.gradient_noise(0.1, seed=-1)
    message(error)
    with pytest.raises(ValueError, match="where: got .*matches no leaf"):
        jaxreg.gradient_noise(0.1, seed=0, where="**/kernal").init({"kernel": jnp.ones(3)})


# Centralization ----------------------------------------------------------------------------------


def test_each_units_gradient_loses_its_mean_over_the_incoming_weights():
    dense, conv = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 3, 2, 4))
    grads = f32({"dense": {"kernel": dense, "bias": np.ones(3)}, "conv": {"kernel": conv}})
    tx = jaxreg.centralize()
    found, _ = tx.update(grads, tx.init(grads))
    expected = {
        "dense": {"kernel": dense - dense.sum(0) / 5, "bias": np.ones(3)},
        "conv": {"kernel": conv - conv.reshape(18, 4).sum(0) / 18},
    }
    chex.assert_trees_all_close(found, f32(expected), atol=1e-6)


def test_optax_centralizes_along_the_axes_of_torch():
    kernel = f32(RNG.normal(size=(5, 3)))
    ours, theirs = jaxreg.centralize(), optax.centralize()
    found, _ = ours.update(kernel, ours.init(kernel))
    transposed, _ = theirs.update(kernel.T, theirs.init(kernel.T))
    chex.assert_trees_all_close(found, transposed.T, atol=1e-6)
    same, _ = theirs.update(kernel, theirs.init(kernel))
    assert np.abs(found - same).max() > 0.1


def test_vectors_and_what_is_not_selected_stay():
    grads = f32({"kernel": np.ones(3), "embedding": np.ones((2, 3)), "w": np.ones((2, 3))})
    tx = jaxreg.centralize()
    found, _ = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_equal(found, {**grads, "w": jnp.zeros((2, 3))})
    bf16 = jnp.asarray([[256.0], [257.0], [300.0]], jnp.bfloat16)
    exact = np.asarray(bf16, np.float64) - np.asarray(bf16, np.float64).mean()
    np.testing.assert_array_equal(
        jaxreg.centralize().update(bf16, optax.EmptyState())[0], jnp.asarray(exact, jnp.bfloat16)
    )


def test_trains_with_noise_and_centralized_gradients():
    x = f32(RNG.normal(size=(32, 4)))
    params = f32({"first": {"w": 0.5 * RNG.normal(size=(4, 16))}, "w": np.ones(16) / 4})
    error = lambda p: jnp.mean((jnp.tanh(x @ p["first"]["w"]) @ p["w"] - x[:, 0]) ** 2)  # noqa: E731
    link = optax.chain(jaxreg.centralize(), jaxreg.gradient_noise(1e-3, seed=0))
    tx = optax.MultiSteps(optax.chain(link, optax.adam(0.02)), 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(error)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=200)[1])
    values = run(params)
    assert values[-1] < 0.3 * values[0]
