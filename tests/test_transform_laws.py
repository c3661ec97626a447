"""Laws of every transformation: dtypes, scans, extreme and complex values, shardings."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import TRANSFORMS, TransformCase
from jax.sharding import AxisType, NamedSharding, PartitionSpec

pytestmark = pytest.mark.core
every_transform = pytest.mark.parametrize("case", TRANSFORMS, ids=lambda case: case.name)
RNG = np.random.default_rng(0)
VALUES = {"kernel": RNG.normal(size=(4, 4)), "other": {"kernel": RNG.normal(size=(8, 2))}}


def tree(dtype, scale=1.0):
    return jax.tree.map(lambda x: jnp.asarray(scale * x, dtype), VALUES)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@every_transform
@pytest.mark.parametrize("gradients", ["bfloat16", "float32"])
@pytest.mark.parametrize("params", ["bfloat16", "float16", "float32"])
def test_state_and_updates_keep_their_dtypes(case: TransformCase, params, gradients):
    """So that the state can be the carry of a scan, whatever the dtype of the gradients."""
    tx, p, g = case.make(0.5), tree(params), tree(gradients)
    state = tx.init(p)
    updates, after = jax.eval_shape(tx.update, g, state, p)
    chex.assert_trees_all_equal(shapes(after), shapes(state))
    if params == gradients:
        chex.assert_trees_all_equal(shapes(updates), shapes(p))


@every_transform
def test_float64_stays_float64(case: TransformCase, x64):
    tx, p = case.make(0.5), tree("float64")
    state = tx.init(p)
    updates, after = jax.eval_shape(tx.update, p, state, p)
    chex.assert_trees_all_equal(shapes((updates, after)), shapes((p, state)))


@every_transform
def test_a_scan_equals_a_loop(case: TransformCase):
    tx, p = case.make(0.5), tree("float32")

    def step(carry, scale):
        params, state = carry
        grads = jax.tree.map(lambda x: scale * x, tree("float32", 0.3))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    scales = jnp.array([1.0, 0.5, 3.0, 1.0])
    scanned, _ = jax.lax.scan(step, (p, tx.init(p)), scales)
    looped = (p, tx.init(p))
    for scale in scales:
        looped, _ = step(looped, scale)
    chex.assert_trees_all_close(scanned, looped, rtol=1e-5, atol=case.accuracy)


SCALES = {"zero": 0.0, "denormal": 1e-42, "tiny": 1e-30, "big": 1e15}


@every_transform
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_finite_gradients_give_finite_updates(case: TransformCase, scale):
    tx, p = case.make(0.5), tree("float32")
    state = tx.init(p)
    for _ in range(2):
        updates, state = tx.update(tree("float32", scale), state, p)
        chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("case", [c for c in TRANSFORMS if c.passes_frozen], ids=lambda c: c.name)
def test_a_frozen_leaf_has_no_gradient_and_no_update(case: TransformCase):
    """Its None is passed on, and the others move as if its gradient were 0."""
    tx, p = case.make(0.5), tree("float32")
    state = whole_state = tx.init(p)
    for scale in (1.0, 5.0, 0.3):
        grads = tree("float32", scale)
        whole = {**grads, "kernel": jnp.zeros((4, 4))}
        expected, whole_state = tx.update(whole, whole_state, p)
        updates, state = tx.update({**grads, "kernel": None}, state, p)
        assert updates["kernel"] is None
        chex.assert_trees_all_close(updates["other"], expected["other"])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, whole_state)
    chex.assert_trees_all_close(state, whole_state)


@pytest.mark.parametrize("case", [c for c in TRANSFORMS if c.takes_complex], ids=lambda c: c.name)
def test_complex_gradients_are_treated_by_their_modulus(case: TransformCase):
    """A phase that all entries share changes nothing else."""
    tx, p = case.make(0.5), tree("float32")
    phase = jnp.complex64(np.exp(0.7j))
    turned = jax.tree.map(lambda x: phase * x, p)
    updates, _ = tx.update(p, tx.init(p), p)
    found, state = tx.update(turned, tx.init(turned), turned)
    expected = jax.tree.map(lambda x: phase * x, updates)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    for leaf in jax.tree.leaves(state):
        assert not jnp.iscomplexobj(leaf)


@every_transform
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_parameters_need_the_collectives_stated(case: TransformCase, kind):
    """Each leaf along another axis; those that only a norm out of range needs are counted too."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {"kernel": PartitionSpec("x", "y"), "other": {"kernel": PartitionSpec("y")}}
    tx, p = case.make(0.5), tree("float32")

    def step(params):
        grads = jax.tree.map(lambda x: 0.3 * x, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(p, shardings)
        compiled = jax.jit(step, out_shardings=shardings).lower(sharded).compile()
        found = compiled(sharded)
    chex.assert_trees_all_close(found, jax.jit(step)(p), rtol=case.accuracy, atol=case.accuracy)
    text = compiled.as_text()
    names = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    counts = {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names}
    assert sum(counts.values()) == case.collectives, counts
