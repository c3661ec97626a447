"""The models, and what their dropout draws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxreg import models

pytestmark = pytest.mark.core
KEY = jax.random.key(0)


class Identity(nnx.Module):
    """Stands in for a layer, so that only dropout acts."""

    def __call__(self, x):
        return x


def masks(layers=3, key=KEY):
    """What each dropout site of an MLP of identities keeps, read off one site at a time."""
    model = models.MLP((50,) * (layers + 1), dropout_rate=0.5, rngs=nnx.Rngs(0))
    seen = []

    class Probe(Identity):
        def __call__(self, x):
            seen.append(np.asarray(x != 0))
            return jnp.ones_like(x)

    model.layers = type(model.layers)([Probe() for _ in range(layers)])
    model(jnp.ones((4, 50)), train=True, key=key)
    return seen[1:]


def test_layers_steps_and_examples_have_masks_of_their_own():
    first, second = masks(layers=3)
    assert (first != second).any()
    assert (first[0] != first[1]).any()
    other_step, _ = masks(layers=3, key=jax.random.fold_in(KEY, 1))
    assert (first != other_step).any()
    chex.assert_trees_all_equal(masks(layers=3), [first, second])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_evaluation_draws_nothing_and_training_needs_a_key(name):
    model = models.build(name, (8, 8, 1), 10, 0.5, nnx.Rngs(0))
    x = jax.random.normal(KEY, (3, 8, 8, 1))
    chex.assert_trees_all_equal(model(x), model(x, key=KEY))
    assert (model(x, train=True, key=KEY) != model(x)).any()
    with pytest.raises(ValueError, match="key: got None"):
        model(x, train=True)


def test_sizes_may_be_numpy_numbers():
    model = models.MLP((np.int64(3), 2), rngs=nnx.Rngs(0))
    assert model(jnp.ones((1, 3))).shape == (1, 2)


def test_without_dropout_training_needs_no_key():
    model = models.build("mlp", (8,), 10, 0.0, nnx.Rngs(0))
    chex.assert_trees_all_equal(model(jnp.ones((2, 8)), train=True), model(jnp.ones((2, 8))))


def test_jit_draws_a_new_mask_for_each_key_without_recompiling():
    model = models.build("mlp", (8,), 10, 0.5, nnx.Rngs(0))
    chex.clear_trace_counter()
    apply = nnx.jit(chex.assert_max_traces(lambda m, x, key: m(x, train=True, key=key), n=1))
    outputs = [apply(model, jnp.ones((2, 8)), jax.random.fold_in(KEY, i)) for i in range(3)]
    assert (outputs[0] != outputs[1]).any()
    assert (outputs[1] != outputs[2]).any()


@pytest.mark.parametrize(
    ("name", "shape", "kernels"),
    [
        ("linear", (8, 8, 1), [(64, 10)]),
        ("mlp", (28, 28), [(784, 128), (128, 10)]),
        ("cnn", (8, 8, 1), [(3, 3, 1, 16), (3, 3, 16, 32), (128, 10)]),
        ("cnn", (40, 1), [(3, 1, 16), (3, 16, 32), (320, 10)]),
        ("cnn", (1, 1, 3), [(3, 3, 3, 16), (3, 3, 16, 32), (32, 10)]),
    ],
)
def test_sizes_follow_the_data(name, shape, kernels):
    model = models.build(name, shape, 10, 0.0, nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    found = {leaf.shape for leaf in leaves if leaf.ndim > 1}
    assert found == set(kernels)
    assert model(jnp.ones((2, *shape))).shape == (2, 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: models.MLP((3,), rngs=r), r"sizes: got \(3,\)"),
        (lambda r: models.MLP((3, 0), rngs=r), r"sizes: got \(3, 0\)"),
        (lambda r: models.MLP((3, 2), dropout_rate=1.0, rngs=r), "dropout_rate: got 1.0"),
        (lambda r: models.CNN((3,), 2, rngs=r), r"input_shape: got \(3,\)"),
        (lambda r: models.MLP(3, rngs=r), "sizes: got 3"),
        (lambda r: models.CNN((4, 0, 1), 2, rngs=r), r"input_shape: got \(4, 0, 1\)"),
        (lambda r: models.CNN((4, 4, 1), 0, rngs=r), "outputs: got 0"),
        (lambda r: models.CNN((4, 4, 1), 2, channels=(8, 0), rngs=r), r"channels: got \(8, 0\)"),
        (lambda r: models.CNN((4, 4, 1), 2, channels=(), rngs=r), r"channels: got \(\)"),
        (lambda r: models.build(3, (3,), 2, 0.0, r), "model: got 3; accepted: linear"),
        (lambda r: models.build("mpl", (3,), 2, 0.0, r), "model: got 'mpl' .did you mean 'mlp'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(nnx.Rngs(0))
