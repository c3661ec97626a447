"""Gradients that are clipped example by example, against a loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from errors import message
from flax import linen, nnx
from jax.sharding import AxisType, PartitionSpec

import jaxreg

pytestmark = pytest.mark.core

P = PartitionSpec
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 3)), jnp.float32)
Y = jnp.asarray(3 * RNG.normal(size=16), jnp.float32)
PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(0.3)}


def loss(params, x, y):
    return jnp.square(x @ params["w"] + params["b"] - y) / 2


def looped(loss, params, batch, max_norm):
    """The mean of gradients that are clipped one after the other, and their norms."""
    size = len(jax.tree.leaves(batch)[0])
    total, norms = jax.tree.map(np.zeros_like, params), []
    for i in range(size):
        grads = jax.grad(loss)(params, *jax.tree.map(lambda x, i=i: x[i], batch))
        norms.append(
            np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
        )
        c = min(1, max_norm / norms[-1]) if norms[-1] else 1
        total = jax.tree.map(lambda t, g, c=c: t + c * np.asarray(g) / size, total, grads)
    return total, norms


@pytest.mark.parametrize("micro_batch", [None, 1, 4, 5, 7, 15, 16, 100])
def test_equals_a_loop_over_examples_in_micro_batches_too(micro_batch):
    expected, norms = looped(loss, PARAMS, (X, Y), 2.0)
    assert min(norms) < 2 < max(norms)
    gradient = jax.jit(jaxreg.per_example_clip(loss, 2.0, micro_batch=micro_batch))
    found, seen = gradient(PARAMS, X, Y)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen.norms, norms, rtol=1e-5)
    losses = [loss(PARAMS, x, y) for x, y in zip(X, Y, strict=True)]
    np.testing.assert_allclose(seen.losses, losses, rtol=1e-5)
    assert float(seen.clipped) == pytest.approx(np.mean(np.array(norms) > 2))
    assert int(seen.nonfinite) == 0


def test_without_a_limit_it_is_the_gradient_of_the_mean_loss():
    mean = lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, X, Y))  # noqa: E731
    found, seen = jaxreg.per_example_clip(loss, np.inf)(PARAMS, X, Y)
    chex.assert_trees_all_close(found, jax.grad(mean)(PARAMS), rtol=1e-5)
    assert float(seen.clipped) == 0


def test_linen_models_and_trees_of_batches():
    model = linen.Dense(2)
    params = model.init(jax.random.key(0), X[0])

    def of_model(params, example):
        return jnp.sum(jnp.square(model.apply(params, example["x"]) - example["y"]))

    batch = {"x": X, "y": Y}
    found, _ = jaxreg.per_example_clip(of_model, 2.0, micro_batch=5)(params, batch)
    expected, _ = looped(of_model, params, (batch,), 2.0)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nnx_models():
    graph, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))

    def of_model(params, x, y):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(x) - y))

    found, _ = jaxreg.per_example_clip(of_model, 2.0)(params, X, Y)
    expected, _ = looped(of_model, params, (X, Y), 2.0)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(params)


def test_bf16_parameters_are_summed_in_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    of_dot = lambda params, x: jnp.sum(params["w"] * x) * params["b"] * 0 + jnp.sum(params["w"])  # noqa: E731
    found, _ = jaxreg.per_example_clip(of_dot, 1e9, micro_batch=1)(params, jnp.ones((1000, 3)))
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found["w"]), 1)  # in bf16 the sum would end at 256


# Noise -------------------------------------------------------------------------------------------


def test_noise_has_deviation_sigma_c_over_b_and_is_independent_in_each_leaf():
    params = {"a": jnp.zeros(40_000), "b": jnp.zeros((200, 200))}
    zero = lambda params, x: 0 * jnp.sum(params["a"]) + 0 * jnp.sum(params["b"]) * x  # noqa: E731
    gradient = jaxreg.per_example_clip(zero, 3.0, noise_multiplier=2.0, micro_batch=2)
    noise, _ = gradient(params, jnp.ones(8), key=jax.random.key(0))
    for leaf in noise.values():
        assert float(jnp.std(leaf)) == pytest.approx(2 * 3 / 8, rel=0.02)
        assert abs(float(jnp.mean(leaf))) < 5 * 0.75 / 200
    assert abs(np.corrcoef(noise["a"], noise["b"].ravel())[0, 1]) < 0.03
    same, _ = gradient(params, jnp.ones(8), key=jax.random.key(0))
    chex.assert_trees_all_equal(noise, same)
    other, _ = gradient(params, jnp.ones(8), key=jax.random.key(1))
    assert (noise["a"] != other["a"]).mean() > 0.99


def test_noise_is_added_to_the_clipped_gradient_with_a_traced_multiplier_too():
    key = jax.random.key(0)

    def noisy(sigma):
        clip = jaxreg.per_example_clip(loss, 2.0, noise_multiplier=sigma)
        return clip(PARAMS, X, Y, key=key)[0]

    plain, _ = jaxreg.per_example_clip(loss, 2.0)(PARAMS, X, Y)
    chex.assert_trees_all_close(noisy(0.0), plain)
    chex.assert_trees_all_close(jax.jit(noisy)(0.0), plain, rtol=1e-6)
    chex.assert_trees_all_close(jax.jit(noisy)(1.5), noisy(1.5), rtol=1e-5)
    one, two = (jax.tree.map(jnp.subtract, noisy(s), plain) for s in (1.0, 2.0))
    chex.assert_trees_all_close(jax.tree.map(lambda x: 2 * x, one), two, rtol=1e-4)


def test_noise_needs_a_limit():
    with pytest.raises(
        ValueError, match=r"^max_norm: got inf; accepted: a finite .*noise"
    ) as error:
        jaxreg.per_example_clip(loss, np.inf, noise_multiplier=1.0)
    message(error)
    plain, _ = jaxreg.per_example_clip(loss, np.inf)(PARAMS, X, Y)

    @jax.jit
    def clipped(sigma):
        clip = jaxreg.per_example_clip(loss, np.inf, noise_multiplier=sigma)
        return clip(PARAMS, X, Y, key=jax.random.key(0))[0]

    chex.assert_trees_all_close(clipped(0.0), plain, rtol=1e-6)


def test_noise_needs_a_key():
    with pytest.raises(ValueError, match="^key: got None; accepted: a random key"):
        jaxreg.per_example_clip(loss, 1.0, noise_multiplier=1.0)(PARAMS, X, Y)


# What is not finite, and bad input ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_examples_that_are_not_finite(bad):
    spoilt = X.at[3, 1].set(bad)
    kept = [i for i in range(16) if i != 3]

    def found(policy):
        return jaxreg.per_example_clip(loss, 2.0, on_nonfinite=policy)(PARAMS, spoilt, Y)

    rest, _ = looped(loss, PARAMS, (X[jnp.array(kept)], Y[jnp.array(kept)]), 2.0)
    skipped, seen = found("skip")
    chex.assert_trees_all_close(skipped, jax.tree.map(lambda g: g * 15 / 16, rest), rtol=1e-5)
    assert int(seen.nonfinite) == 1
    assert not np.isfinite(seen.norms[3])
    chex.assert_tree_all_finite(found("zero")[0])
    assert not np.isfinite(jax.tree.leaves(found("propagate")[0])[1]).all()


def test_zero_clips_the_finite_entries_of_an_example():
    dot = lambda w, x: jnp.sum(w * x)  # noqa: E731
    x = jnp.array([[np.nan, 3.0, 4.0], [1.0, 0.0, 0.0]])
    found, seen = jaxreg.per_example_clip(dot, 1.0, on_nonfinite="zero")(jnp.ones(3), x)
    np.testing.assert_allclose(found, [0.5, 0.3, 0.4], rtol=1e-6)
    assert int(seen.nonfinite) == 1


@pytest.mark.parametrize(
    "batch",
    [(X, Y[:5]), (X[:0], Y[:0]), (X, jnp.ones(())), ()],
    ids=["lengths", "empty", "scalar", "none"],
)
def test_batches_without_one_batch_axis_are_refused(batch):
    with pytest.raises(ValueError, match="^batch: got arrays of shapes .*one leading batch axis"):
        jaxreg.per_example_clip(loss, 1.0)(PARAMS, *batch)


# On several devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_in_shard_map_it_equals_the_whole_batch(check_vma, micro_batch):
    """With check_vma JAX sums gradients of shared parameters over devices, before the clip."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    axes = ("x", "y") if check_vma else "x"  # the batch is the same along y
    clip = jaxreg.per_example_clip(
        loss, 2.0, micro_batch=micro_batch, noise_multiplier=0.1, axis_name=axes
    )

    def both(params, x, y, key):
        grads, seen = clip(params, x, y, key=key)
        return grads, seen.norms

    sharded = jax.shard_map(
        both,
        mesh=mesh,
        in_specs=(P(), P("x"), P("x"), P()),
        out_specs=(P(), P("x")),
        check_vma=check_vma,
    )
    key = jax.random.key(0)
    whole = jaxreg.per_example_clip(loss, 2.0, noise_multiplier=0.1)
    expected, seen = whole(PARAMS, X, Y, key=key)
    found, norms = jax.jit(sharded)(PARAMS, X, Y, key)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(norms, seen.norms, rtol=1e-5)


def test_without_axis_name_each_device_has_the_mean_of_its_own_examples():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    clip = jaxreg.per_example_clip(loss, 2.0)
    own = lambda params, x, y: jax.tree.map(lambda g: g[None], clip(params, x, y)[0])  # noqa: E731
    found = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("x"), P("x")), out_specs=P("x"))(
        PARAMS, X, Y
    )
    for i, half in enumerate((slice(0, 8), slice(8, 16))):
        expected, _ = clip(PARAMS, X[half], Y[half])
        chex.assert_trees_all_close(jax.tree.map(lambda g, i=i: g[i], found), expected, rtol=1e-5)


def test_an_axis_that_is_not_bound_is_named():
    with pytest.raises(ValueError, match="axis_name: got 'data', which is not bound"):
        jaxreg.per_example_clip(loss, 1.0, axis_name="data")(PARAMS, X, Y)


# Memory ------------------------------------------------------------------------------------------


def test_micro_batches_bound_the_memory():
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}
    x = jnp.ones((64, 64))

    def deep(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["v"]))

    def temporary(micro_batch):
        clip = jax.jit(jaxreg.per_example_clip(deep, 1.0, micro_batch=micro_batch))
        return clip.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    whole, parts = temporary(None), temporary(4)
    assert whole > 64 * 64 * 64 * 4  # one gradient an example, at least of one leaf
    assert parts < whole / 6


def test_noise_of_complex_parameters_has_its_deviation_in_both_parts():
    gradient = jaxreg.per_example_clip(
        lambda w, x: jnp.sum(jnp.abs(w)) * 0 * x, 1.0, noise_multiplier=1.0
    )
    w = jnp.ones(20_000, jnp.complex64)
    noise, _ = gradient(w, jnp.zeros(1), key=jax.random.key(0))
    for part in (noise.real, noise.imag):
        assert float(jnp.std(part)) == pytest.approx(1.0, rel=0.03)
