"""What an optimizer's state tells of its last step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg

pytestmark = pytest.mark.core

PARAMS = {"a": jnp.ones(2), "b": jnp.ones(1)}
GRADS = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}  # norms 5, 12, and 13 of all
CLIP = ["norm", "clipped_norm", "coefficient", "clip_rate", "nonfinite"]
SKIP = ["norm", "limit", "skipped", "nonfinite"]


def state_of(tx, *steps):
    state = tx.init(PARAMS)
    for grads in steps or (GRADS,):
        _, state = tx.update(grads, state, PARAMS)
    return state


def told(tx, *steps):
    return {name: float(x) for name, x in jaxreg.metrics(state_of(tx, *steps)).items()}


def of(prefix, *values, names=CLIP):
    values = [pytest.approx(v, rel=1e-5) for v in values]
    return {f"{prefix}.{n}": v for n, v in zip(names, values, strict=True)}


ONE = of("clip", 13, 1, 1 / 13, 1, 0)
TRANSFORMATIONS = {
    "clip": (jaxreg.clip_by_global_norm(1.0), ONE),
    "regularize": (
        jaxreg.regularize(optax.scale_by_adam(), 0.1, clip=1.0, penalty=jaxreg.L1(0.1).on("**")),
        ONE,
    ),
    "with decay": (
        jaxreg.regularize(
            optax.scale_by_adam(), 0.1, clip=1.0, decay=jaxreg.weight_decay(0.1, where="a")
        ),
        ONE | {"decay.amount": pytest.approx(0.01)},
    ),
    "with l2": (
        jaxreg.regularize(
            optax.scale_by_adam(),
            0.1,
            l2=jaxreg.l2_decay(lambda count: 0.3 / (count + 1), where="a"),
            decay=jaxreg.weight_decay(0.1, where="b"),
        ),
        {"l2.amount": pytest.approx(0.3), "decay.amount": pytest.approx(0.01)},
    ),
    "a gate and a profile": (  # no part of the amount
        jaxreg.weight_decay(0.1, 0.5, gate="cautious", profile="huber", where="**"),
        {"decay.amount": pytest.approx(0.05)},
    ),
    "constrained_decay": (
        jaxreg.constrained_decay(0.5, "uniform", mu=0.002, where="**"),
        {  # of 41 and 169 above 0.5, with 2 weights and 1
            "constrained_decay.multiplier": pytest.approx((0.0405 + 0.337) / 2),
            "constrained_decay.largest": pytest.approx(0.337),
        },
    ),
    "of no leaf": (
        optax.masked(jaxreg.constrained_decay(), {"a": False, "b": False}),
        {"constrained_decay.multiplier": 0, "constrained_decay.largest": 0},
    ),
    "two in a chain": (
        optax.chain(jaxreg.clip_by_global_norm(6.5), jaxreg.clip_by_leaf_norm(3.0)),
        of("clip0", 13, 6.5, 0.5, 1, 0) | of("clip1", 6.5, np.hypot(2.5, 3), 0.5, 1, 0),
    ),
    "masked": (
        optax.masked(jaxreg.clip_by_global_norm(1.0), {"a": True, "b": False}),
        of("clip", 5, 1, 0.2, 1, 0),
    ),
    "multi_transform": (
        optax.multi_transform(
            {"x": jaxreg.clip_by_global_norm(1.0), "y": jaxreg.clip_by_global_norm(24.0)},
            {"a": "x", "b": "y"},
        ),
        of("clip0", 5, 1, 0.2, 1, 0) | of("clip1", 12, 12, 1, 0, 0),
    ),
    "MultiSteps": (optax.MultiSteps(jaxreg.clip_by_global_norm(1.0), 1), ONE),
    "inject_hyperparams": (
        optax.inject_hyperparams(jaxreg.clip_by_global_norm)(max_norm=lambda count: 1.0),
        ONE,
    ),
    "apply_if_finite": (optax.apply_if_finite(jaxreg.clip_by_global_norm(1.0), 3), ONE),
    "skip_step": (
        jaxreg.skip_step(jaxreg.regularize(optax.scale_by_adam(), 0.1, clip=1.0)),
        of("skip", 13, np.inf, 0, 0, names=SKIP) | ONE,
    ),
    "adaptive_clip": (  # the smallest of its units
        jaxreg.adaptive_clip(0.1),
        of("clip", 13, 0.1 * 3**0.5, 0.1 / 12, 1, 0),
    ),
    "clip_by_value": (jaxreg.clip_by_value(1.0), {}),
    "clip_update_rms": (jaxreg.clip_update_rms(6.0), of("clip", 13, np.hypot(5, 6), 0.5, 1, 0)),
    "clip_update_rms around adam": (
        jaxreg.clip_update_rms(0.5, direction=optax.scale_by_adam()),
        of("clip", 3**0.5, 3**0.5 / 2, 0.5, 1, 0),
    ),
    "spike_aware_clip": (jaxreg.spike_aware_clip(optax.scale_by_adam()), {}),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_names_and_values(name):
    tx, expected = TRANSFORMATIONS[name]
    assert told(tx) == expected
    state = state_of(tx)
    under_jit = jax.jit(jaxreg.metrics)(state)
    assert {n: float(x) for n, x in under_jit.items()} == pytest.approx(expected)
    assert all(jnp.shape(x) == () for x in under_jit.values())


def test_the_amount_of_a_spectral_decay():
    w = jnp.ones((2, 2), jnp.bfloat16)
    tx = jaxreg.regularize(optax.identity(), 0.5, decay=jaxreg.spectral_decay(jnp.bfloat16(0.25)))
    _, state = tx.update(w, tx.init(w), w)
    assert jaxreg.metrics(state) == {"spectral_decay.amount": 0.125}
    assert jaxreg.metrics(state)["spectral_decay.amount"].dtype == jnp.float32


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf], ids=str)
@pytest.mark.parametrize("make", [jaxreg.clip_by_global_norm, jaxreg.clip_by_leaf_norm])
def test_a_step_that_is_skipped_is_not_clipped(make, bad):
    """Nor where a large leaf lies beside the bad one."""
    small, spoilt = jax.tree.map(lambda g: g / 100, GRADS), GRADS | {"b": jnp.array([bad])}
    found = told(make(1.0, on_nonfinite="skip"), GRADS, small, GRADS, spoilt, small)
    assert found["clip.clip_rate"] == pytest.approx(0.4)
    assert found["clip.nonfinite"] == 1


def test_rates_and_counts_are_over_all_steps():
    small, bad = jax.tree.map(lambda g: g / 100, GRADS), jax.tree.map(lambda g: g * jnp.nan, GRADS)
    tx = jaxreg.clip_by_global_norm(1.0, on_nonfinite="skip")
    found = told(tx, GRADS, small, GRADS, bad, small)
    assert found["clip.clip_rate"] == pytest.approx(0.4)
    assert found["clip.nonfinite"] == 1
    tx = jaxreg.skip_step(optax.sgd(0.1), window=2)
    found = told(tx, small, small, bad, GRADS, GRADS)
    assert (found["skip.skipped"], found["skip.nonfinite"]) == (2, 1)
    assert found["skip.norm"] == 13
    tx = jaxreg.clip_by_value(1.0, on_nonfinite="skip")
    assert told(tx, bad, GRADS) == {"clip.nonfinite": 1}


def test_before_the_first_step_there_are_numbers_already():
    state = jaxreg.clip_by_global_norm(1.0).init(PARAMS)
    found = {name: float(x) for name, x in jaxreg.metrics(state).items()}
    assert found == of("clip", 0, 0, 1, 0, 0)


@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.identity(), optax.clip_by_global_norm(1.0)])
def test_plain_optax_tells_nothing(tx):
    assert jaxreg.metrics(tx.init(PARAMS)) == {}
    assert jax.jit(jaxreg.metrics)(tx.init(PARAMS)) == {}


def test_what_a_step_does_to_the_weights_against_numpy():
    rng = np.random.default_rng(0)
    w = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    u = jax.tree.map(lambda x: rng.normal(size=x.shape), w)
    w["kernel"][0] = u["kernel"][0] = 0
    for where in (jaxreg.where.kernels, jaxreg.where.everything):
        tx = optax.chain(optax.identity(), jaxreg.watch(where=where))
        params, moves = (jax.tree.map(jnp.float32, tree) for tree in (w, u))
        updates, state = jax.jit(tx.update)(moves, tx.init(params), params)
        chex.assert_trees_all_equal(updates, moves)
        chosen = [*w] if where is jaxreg.where.everything else ["kernel"]
        p = np.concatenate([w[k].ravel() for k in chosen])
        step = np.concatenate([u[k].ravel() for k in chosen])
        after = p + step
        expected = {
            "weights.norm": np.linalg.norm(after),
            "weights.update_norm": np.linalg.norm(step),
            "weights.update_ratio": np.linalg.norm(step) / np.linalg.norm(after),
            "weights.angle": np.arccos(p @ after / np.linalg.norm(p) / np.linalg.norm(after)),
            "weights.zeros": (after == 0).mean(),
        }
        assert jaxreg.metrics(state) == pytest.approx(expected, rel=1e-5)


def test_small_angles_are_not_lost_to_rounding():
    tx, w = jaxreg.watch(), jnp.ones((100, 100))
    _, state = tx.update(1e-6 * w.at[::2].set(-1), tx.init(w), w)
    assert float(state.angle) == pytest.approx(1e-6, rel=0.05)  # arccos would give 0 or 3e-4
    _, state = tx.update(-w, tx.init(w), w)
    assert [float(x) for x in state] == pytest.approx([0, 100, 100, np.pi / 2, 1])


def test_the_weights_watched_are_those_of_apply_updates_and_sharded_as_whole():
    w = jnp.ones((8, 2), jnp.bfloat16)
    tx = jaxreg.watch(axis_name="x")
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")

    def watched(u, w):
        return tx.update(u, tx.init(w), w)[1]

    found = jax.shard_map(
        watched, mesh=mesh, in_specs=(spec, spec), out_specs=jax.sharding.PartitionSpec()
    )(jnp.full_like(w, 1e-3), w)
    assert float(found.weight_norm) == 4  # 1.001 is no bf16 number
    assert float(found.update_norm) == pytest.approx(4e-3, rel=1e-2)
    assert float(found.zeros) == 0


def test_watch_counts_beyond_32_bits():
    w = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)
    tx = jaxreg.watch()
    state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p)[1], w)
    assert state.zeros.dtype == jnp.float32
