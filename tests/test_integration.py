"""With optax's wrappers, flax's optimizers and states, other trees, and checkpoints."""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import TRANSFORMS, TransformCase
from errors import message
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxreg

pytestmark = pytest.mark.core
every_transform = pytest.mark.parametrize("case", TRANSFORMS, ids=lambda case: case.name)
RNG = np.random.default_rng(0)
PARAMS = {
    "dense": {"kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)}
}
GRADS = jax.tree.map(lambda p: 0.3 * p + 0.1, PARAMS)


def run(tx, params=PARAMS, steps=4, grads=None):
    grads = GRADS if grads is None else grads
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


# optax -------------------------------------------------------------------------------------------


@every_transform
def test_masked_leaves_the_others_alone(case: TransformCase):
    tx = optax.masked(case.make(0.5), {"dense": {"kernel": True, "bias": False}})
    masked = run(tx)
    if not case.joins_leaves:  # a norm is of what it sees
        chex.assert_trees_all_close(
            masked["dense"]["kernel"], run(case.make(0.5))["dense"]["kernel"]
        )
    plain = run(optax.identity())
    chex.assert_trees_all_close(masked["dense"]["bias"], plain["dense"]["bias"])


@every_transform
def test_multi_transform_gives_each_part_its_own(case: TransformCase):
    labels = {"dense": {"kernel": "ours", "bias": "frozen"}}
    tx = optax.multi_transform({"ours": case.make(0.5), "frozen": optax.set_to_zero()}, labels)
    params = run(tx)
    chex.assert_trees_all_equal(params["dense"]["bias"], PARAMS["dense"]["bias"])
    assert (params["dense"]["kernel"] != PARAMS["dense"]["kernel"]).any()


@every_transform
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_multi_steps_emits_one_step_for_k_gradients_and_nothing_between(case, dtype):
    params, grads = (jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (PARAMS, GRADS))
    tx = optax.MultiSteps(case.make(0.5), every_k_schedule=2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), params

    _, seen = jax.lax.scan(step, (params, tx.init(params)), None, length=4)
    first, second, third, _ = (jax.tree.map(lambda x, i=i: x[i], seen) for i in range(4))
    chex.assert_trees_all_equal(first, params)
    chex.assert_trees_all_equal(second, params)  # nothing shrinks in a step that does not emit
    single = case.make(0.5)
    updates, _ = single.update(grads, single.init(params), params)
    tolerance = 1e-6 if dtype == jnp.float32 else 0.02
    chex.assert_trees_all_close(
        third, optax.apply_updates(params, updates), rtol=tolerance, atol=tolerance
    )


@every_transform
def test_apply_if_finite_skips_a_bad_step(case: TransformCase):
    tx = optax.apply_if_finite(case.make(0.5), max_consecutive_errors=5)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    chex.assert_trees_all_equal(run(tx, grads=bad, steps=2), PARAMS)
    chex.assert_trees_all_close(run(tx), run(case.make(0.5)), rtol=1e-6, atol=1e-6)


def strength_of(make):
    """A factory with the signature that optax.inject_hyperparams needs."""
    return lambda strength: make(strength)


@every_transform
def test_inject_hyperparams_moves_the_strength_into_the_state(case: TransformCase):
    tx = optax.inject_hyperparams(strength_of(case.make))(strength=0.5)
    chex.assert_trees_all_close(run(tx), run(case.make(0.5)), rtol=1e-6, atol=1e-6)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state, outputs = tx.init(PARAMS), []
    for strength in (0.25, 0.5, 0.75):
        state.hyperparams["strength"] = jnp.asarray(strength)
        outputs.append(update(GRADS, state, PARAMS)[0])
    if case.has_strength:
        with pytest.raises(AssertionError):
            chex.assert_trees_all_close(outputs[0], outputs[2])


def test_inject_hyperparams_takes_a_schedule_and_leaves_a_penalty_alone():
    schedule = optax.linear_schedule(0.1, 0.0, 4)
    tx = optax.inject_hyperparams(jaxreg.prox_adam)(learning_rate=schedule, penalty=jaxreg.L1(0.5))
    chex.assert_trees_all_close(run(tx), run(jaxreg.prox_adam(schedule, jaxreg.L1(0.5))), rtol=1e-5)


BF16 = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
L1 = jaxreg.L1(0.1)
WITH_DECAYS = {  # a factory, its arguments, and which of them are decays
    "prox_sgd": (jaxreg.prox_sgd, {"penalty": L1, "momentum": 0.9}, {"momentum"}),
    "prox_adam": (jaxreg.prox_adam, {"penalty": L1}, {"b1", "b2"}),
    "prox_adamw": (jaxreg.prox_adamw, {"penalty": L1}, {"b1", "b2"}),
    "prox_rmsprop": (jaxreg.prox_rmsprop, {"penalty": L1, "momentum": 0.9}, {"decay", "momentum"}),
    "zclip": (jaxreg.zclip, {}, {"decay"}),
    "adagc": (jaxreg.adagc, {}, {"decay"}),
    "rmda": (jaxreg.rmda, {"penalty": L1, "momentum": 0.9}, {"momentum"}),
}
FLAGS = ("nesterov", "eps_in_sqrt", "centered", "bias_correction", "warm_up")


def injected(name, **options):
    make, arguments, _ = WITH_DECAYS[name]
    rate = {} if name in ("zclip", "adagc") else {"learning_rate": 0.1}
    static = [flag for flag in FLAGS if flag in inspect.signature(make).parameters]
    return optax.inject_hyperparams(make, static, **options)(**rate, **arguments)


@pytest.mark.parametrize("name", WITH_DECAYS)
def test_a_decay_in_16_bits_is_named_with_the_remedy(name):
    """optax: inject_hyperparams makes it 1 beside weights of bfloat16, and then NaN."""
    with pytest.raises(ValueError, match="dtype bfloat16; .*hyperparam_dtype=jnp.float32") as error:
        jax.jit(injected(name).init)(BF16)
    assert error.value.name in WITH_DECAYS[name][2]
    message(error)


@pytest.mark.parametrize("name", WITH_DECAYS)
def test_hyperparameters_of_float32_leave_a_bf16_state_the_carry_of_a_scan(name):
    tx = injected(name, hyperparam_dtype=jnp.float32)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda p: 0.3 * p, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (BF16, tx.init(BF16)), None, length=3)
    chex.assert_tree_all_finite(params)


def test_extra_arguments_reach_the_direction():
    def init(params):
        return ()

    def update(updates, state, params, *, scale, **extra):
        return jax.tree.map(lambda u: scale * u, updates), state

    direction = optax.GradientTransformationExtraArgs(init, update)
    tx = jaxreg.regularize(direction, 0.1, decay=0.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, scale=2.0)
    chex.assert_trees_all_close(
        updates, jax.tree.map(lambda g: -0.2 * g, GRADS), rtol=1e-6, atol=1e-6
    )


# Trees -------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass
class Module:
    """A module in Equinox's manner: a dataclass that is a pytree, None where nothing is trained."""

    weight: Any
    bias: Any
    activation: Any = None


@pytest.mark.parametrize(
    "case", [case for case in TRANSFORMS if not case.has_address], ids=lambda case: case.name
)
@pytest.mark.parametrize("make_tree", [Layer, Module, lambda kernel, bias: (kernel, (None, bias))])
def test_any_tree_gives_what_a_dict_gives(case: TransformCase, make_tree):
    def as_tree(params):
        return make_tree(params["dense"]["kernel"], params["dense"]["bias"])

    stepped = run(case.make(0.5), as_tree(PARAMS), grads=as_tree(GRADS))
    chex.assert_trees_all_close(stepped, as_tree(run(case.make(0.5))), rtol=1e-6, atol=1e-6)


# Flax --------------------------------------------------------------------------------------------


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


def nnx_params(model):
    return {"dense": {"kernel": model.dense.kernel[...], "bias": model.dense.bias[...]}}


@every_transform
def test_nnx_optimizer(case: TransformCase):
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, case.make(0.5), wrt=nnx.Param)
    x, before = jnp.ones((2, 4)), jax.tree.map(jnp.copy, nnx_params(model))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(2):
        step(model, optimizer)

    def loss(params):
        return jnp.sum((x @ params["dense"]["kernel"] + params["dense"]["bias"]) ** 2)

    params, tx = before, case.make(0.5)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(nnx_params(model), params, rtol=1e-5, atol=1e-7)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3, name="dense")(x)


@every_transform
def test_linen_train_state(case: TransformCase):
    model, x = LinenModel(), jnp.linspace(0, 1, 8).reshape(2, 4)
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=case.make(0.5))

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.sum(state.apply_fn({"params": p}, x) ** 2))(state.params)
        return state.apply_gradients(grads=grads)

    stepped = step(step(state))
    assert stepped.step == 2
    assert (stepped.params["dense"]["kernel"] != params["dense"]["kernel"]).any()
    chex.assert_trees_all_equal_shapes_and_dtypes(stepped.opt_state, state.opt_state)


# Checkpoints -------------------------------------------------------------------------------------


@every_transform
def test_the_state_survives_orbax_and_training_goes_on_bit_for_bit(case: TransformCase, tmp_path):
    tx = case.make(0.5)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(*step(PARAMS, tx.init(PARAMS)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        target = {"params": PARAMS, "state": tx.init(PARAMS)}
        restored = checkpointer.restore(tmp_path / "step", target)
    chex.assert_trees_all_equal(restored, {"params": params, "state": state})
    chex.assert_trees_all_equal(step(restored["params"], restored["state"]), step(params, state))


# Sharding ----------------------------------------------------------------------------------------


@every_transform
def test_sharded_parameters_give_what_unsharded_ones_give_and_stay_sharded(case: TransformCase):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    tx, w = case.make(0.5), jnp.linspace(-2, 2, 64).reshape(16, 4)

    @jax.jit
    def step(w):
        updates, _ = tx.update(w + 0.1, tx.init(w), w)
        return optax.apply_updates(w, updates)

    sharded = step(jax.device_put(w, sharding))
    chex.assert_trees_all_close(sharded, step(w), rtol=case.accuracy, atol=case.accuracy)
    assert sharded.sharding.is_equivalent_to(sharding, 2)


@every_transform
def test_donated_buffers_are_reused(case: TransformCase):
    tx, params = case.make(0.5), jax.tree.map(jnp.copy, PARAMS)

    def step(params, state):
        updates, state = tx.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    donated, _ = jax.jit(step, donate_argnums=(0, 1))(params, tx.init(params))
    assert params["dense"]["kernel"].is_deleted()
    chex.assert_trees_all_close(donated, step(PARAMS, tx.init(PARAMS))[0], rtol=1e-6, atol=1e-6)
