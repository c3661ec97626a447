"""Models that shrink: what is removed, what stays, and that the outputs are the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxreg
from jaxreg.models import CNN, MLP

RNG = np.random.default_rng(0)


def zero(parameter, *index):
    """Zeros in a place of a parameter of NNX."""
    parameter[...] = parameter[...].at[index].set(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def same_outputs(small, model, *inputs):
    expected = model(*inputs)
    difference = float(jnp.max(jnp.abs(small.model(*inputs) - expected)))
    assert difference <= 1e-6 * float(jnp.max(jnp.abs(expected)))
    assert small.difference <= 1e-6


# Chains of layers --------------------------------------------------------------------------------


class ConvNet(nnx.Module):
    """Convolutions with and without padding, batch normalization, pooling, dense layers."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), padding="VALID", rngs=rngs)
        self.dense1 = nnx.Linear(288, 64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)
        for layer in (self.conv1, self.conv2, self.dense1, self.norm):
            layer.bias[...] = jnp.asarray(RNG.normal(size=layer.bias.shape), jnp.float32)
        self.norm.mean[...] = normal(16)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        return self.dense2(nnx.gelu(self.dense1(x.reshape(x.shape[0], -1))))


def test_filters_and_units_go_from_convolutions_normalizations_and_dense_layers():
    """What zero filters leave behind bias and normalization is constant, and goes into a bias."""
    model, x = ConvNet(nnx.Rngs(0)), normal(4, 8, 8, 1)
    zero(model.conv1.kernel, ..., slice(8))
    zero(model.conv2.kernel, ..., slice(20))
    zero(model.dense1.kernel, slice(None), slice(50))
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["conv1/kernel"] == ((3, 3, 1, 16), (3, 3, 1, 8))
    assert small.shapes["norm/mean"] == ((16,), (8,))
    assert small.shapes["conv2/kernel"] == ((3, 3, 16, 32), (3, 3, 8, 12))
    assert small.shapes["dense1/kernel"] == ((288, 64), (108, 14))
    assert small.shapes["dense2/kernel"] == ((64, 10), (14, 10))
    assert small.model.conv2.in_features == 8
    assert small.model.norm.num_features == 8
    assert small.parameters[1] < 0.12 * small.parameters[0]
    assert small.flops[1] < 0.25 * small.flops[0]
    assert "parameters: " in str(small)


def test_a_constant_stays_where_padding_would_make_it_vary():
    """At the borders of a padded convolution a constant channel is read fewer times."""

    class Padded(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(4, 3, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv2(nnx.relu(self.conv1(x)))

    model, x = Padded(nnx.Rngs(0)), normal(2, 6, 6, 1)
    zero(model.conv1.kernel, ..., slice(2))
    model.conv1.bias[...] = jnp.array([1.0, 0.0, 1.0, 1.0])  # the second one is zero
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["conv1/kernel"] == ((3, 3, 1, 4), (3, 3, 1, 3))


def test_a_bias_that_is_read_elsewhere_holds_no_constant():
    """In the second branch, which the example leaves in the dark, it would change the outputs."""
    params = {
        "w1": normal(5, 4).at[:, 0].set(0),
        "b1": jnp.ones(4),
        "w2": normal(4, 3),
        "w3": normal(5, 3),
        "b2": normal(3),
    }

    def apply(p, x, on):
        first = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return first + on * (x @ p["w3"] + p["b2"])

    x = normal(8, 5)
    small = jaxreg.compress(apply, params, x, 0.0).model
    chex.assert_trees_all_close(apply(small, 3 * x, 1.0), apply(params, 3 * x, 1.0), rtol=1e-4)


def test_a_square_layer_on_a_residual_sum_is_followed():
    class Residual(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 16, rngs=rngs)
            self.inner = nnx.Linear(16, 16, rngs=rngs)
            self.out = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            x = self.first(x)
            return self.out(x + nnx.relu(self.inner(x)))

    model, x = Residual(nnx.Rngs(0)), normal(4, 6)
    zero(model.first.kernel, slice(None), slice(5))
    small = jaxreg.compress(model, x)
    assert small.shapes == {}  # what `inner` adds to the sum is not zero
    zero(model.inner.kernel, slice(None), slice(5))
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["inner/kernel"] == ((16, 16), (11, 11))
    assert small.shapes["out/kernel"] == ((16, 3), (11, 3))


def test_units_that_nothing_reads_go_whatever_they_are():
    params = {"first": normal(5, 4), "second": normal(4, 3).at[1:3].set(0)}
    small = jaxreg.compress(
        lambda p, x: jnp.exp(x @ p["first"]) @ p["second"], params, normal(2, 5)
    )
    assert small.shapes == {"first": ((5, 4), (5, 2)), "second": ((4, 3), (2, 3))}


def test_what_is_left_over_by_a_removal_goes_too():
    """Layer by layer: the units of `first` that only removed units of `second` read."""
    params = {"first": normal(5, 4), "second": normal(4, 4), "third": normal(4, 2)}
    params["third"] = params["third"].at[:3].set(0)
    params["second"] = params["second"].at[:2, 3].set(0)

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["first"]) @ p["second"]) @ p["third"]

    small = jaxreg.compress(apply, params, normal(2, 5))
    assert {name: leaf.shape for name, leaf in small.model.items()} == {
        "first": (5, 2),
        "second": (2, 1),
        "third": (1, 2),
    }


def test_an_axis_keeps_one_index():
    params = {"first": jnp.zeros((3, 4)), "second": normal(4, 2)}
    small = jaxreg.compress(lambda p, x: (x @ p["first"]) @ p["second"], params, normal(2, 3))
    assert small.model["first"].shape == (3, 1)


@pytest.mark.parametrize(
    "model",
    [MLP((64, 32, 16, 10), rngs=nnx.Rngs(0)), CNN((8, 8, 1), 10, rngs=nnx.Rngs(0))],
    ids=["mlp", "cnn"],
)
def test_the_models_of_this_library_shrink_after_training_with_a_group_penalty(model):
    x = normal(64, 64) if isinstance(model, MLP) else normal(64, 8, 8, 1)
    labels = jnp.arange(64) % 10
    graphdef, params = nnx.split(model)
    tx = jaxreg.prox_adam(1e-2, jaxreg.GroupLasso(5e-3))

    def loss(params):
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, length=300))(
        params
    )
    trained = nnx.merge(graphdef, params)
    small = jaxreg.compress(trained, x)
    same_outputs(small, trained, x)
    assert small.parameters[1] < small.parameters[0]


# Layers that are tied to each other --------------------------------------------------------------


class Transformer(nnx.Module):
    """Attention and a multilayer perceptron on a residual stream, without normalization."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(6, 32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            4, 32, 32, decode=False, deterministic=True, rngs=rngs
        )
        self.up = nnx.Linear(32, 64, rngs=rngs)
        self.down = nnx.Linear(64, 32, rngs=rngs)
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        x = x + self.attention(x)
        x = x + self.down(nnx.gelu(self.up(x)))
        return self.head(x)


def test_a_head_of_attention_goes_as_a_whole():
    model, x = Transformer(nnx.Rngs(0)), normal(2, 5, 6)
    zero(model.attention.out.kernel, 1)
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["attention/query/kernel"] == ((32, 4, 8), (32, 3, 8))
    assert small.model.attention.num_heads == 3


def test_a_unit_of_a_residual_stream_goes_where_every_branch_is_zero():
    model, x = Transformer(nnx.Rngs(0)), normal(2, 5, 6)
    for layer in (model.embed, model.down, model.attention.out):
        zero(layer.kernel, ..., slice(7))
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["up/kernel"] == ((32, 64), (25, 64))
    model.down.kernel[...] = model.down.kernel[...].at[0, 0].set(1.0)  # one branch is not
    assert jaxreg.compress(model, x).shapes["up/kernel"] == ((32, 64), (26, 64))


def test_what_is_cut_keeps_its_length_and_random_keys_are_no_numbers():
    """One kernel for queries and keys; dropout, which holds a key, is off in evaluation."""

    class Gated(nnx.Module):
        def __init__(self, rngs):
            self.both = nnx.Linear(6, 16, rngs=rngs)
            self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
            self.hidden = nnx.Linear(8, 12, rngs=rngs)
            self.out = nnx.Linear(12, 3, rngs=rngs)

        def __call__(self, x):
            gate, value = jnp.split(self.both(x), 2, axis=-1)
            return self.out(nnx.relu(self.hidden(self.drop(nnx.sigmoid(gate) * value))))

    model, x = Gated(nnx.Rngs(0)), normal(4, 6)
    zero(model.both.kernel, slice(None), slice(3))
    zero(model.hidden.kernel, slice(None), slice(5))
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert set(small.shapes) == {"hidden/kernel", "hidden/bias", "out/kernel"}


def test_layer_normalization_and_softmax_keep_their_length():
    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.second = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return nnx.softmax(self.second(self.norm(self.first(x))))

    model, x = Normalized(nnx.Rngs(0)), normal(2, 6)
    zero(model.first.kernel, slice(None), slice(3))
    assert jaxreg.compress(model, x).shapes == {}


def test_the_columns_of_an_embedding_shrink_and_its_rows_stay():
    params = {"table": normal(9, 6).at[:, :2].set(0), "out": normal(6, 3)}
    tokens = jnp.array([[0, 3, 8]])
    small = jaxreg.compress(lambda p, t: p["table"][t] @ p["out"], params, tokens)
    assert small.shapes == {"out": ((6, 3), (4, 3)), "table": ((9, 6), (9, 4))}


# Linen -------------------------------------------------------------------------------------------


def test_a_linen_tree_shrinks_and_serves_a_model_of_the_new_widths():
    class Network(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            x = linen.Dense(self.width, name="first")(x)
            return linen.Dense(3, name="second")(linen.relu(x))

    model, x = Network(16), normal(4, 6)
    params = model.init(jax.random.key(0), x)
    params["params"]["first"]["kernel"] = params["params"]["first"]["kernel"].at[:, :5].set(0)
    params["params"]["first"]["bias"] = jnp.linspace(-1, 1, 16)
    small = jaxreg.compress(model.apply, params, x)
    assert small.shapes["params/first/kernel"] == ((6, 16), (6, 11))
    chex.assert_trees_all_close(
        Network(11).apply(small.model, x), model.apply(params, x), rtol=1e-5, atol=1e-6
    )
    assert small.difference <= 1e-6


# What is refused ---------------------------------------------------------------------------------


def test_a_model_that_can_not_be_followed_is_refused_by_the_layer_and_the_operation():
    def recurrent(p, x):
        def step(h, xt):
            return jnp.tanh(xt @ p["inner"] + h @ p["state"]), None

        return jax.lax.scan(step, jnp.zeros((2, 8)), x)[0] @ p["out"]

    params = {"inner": normal(6, 8).at[:, :3].set(0), "state": normal(8, 8), "out": normal(8, 2)}
    with pytest.raises(ValueError, match="model: got 3 zero units in inner, .* operation scan"):
        jaxreg.compress(recurrent, params, normal(5, 2, 6))


def test_a_model_that_knows_its_own_width_is_refused_and_nothing_is_changed():
    params = {"first": normal(5, 4).at[:, 0].set(0), "second": normal(4, 3)}
    before = jax.tree.map(jnp.copy, params)

    def counts(p, x):
        hidden = x @ p["first"]
        return hidden @ p["second"] / hidden.shape[-1]

    with pytest.raises(ValueError, match="model: got one that, with smaller first, second, gives"):
        jaxreg.compress(counts, params, normal(2, 5))

    def reshapes(p, x):
        return (x @ p["first"]).reshape(-1, 2, 2).reshape(-1, 4) @ p["second"]

    with pytest.raises(ValueError, match="model: got one that, with smaller .*, fails"):
        jaxreg.compress(reshapes, {**params, "first": normal(5, 4).at[:, 1:].set(0)}, normal(2, 5))
    chex.assert_trees_all_equal(params, before)


@pytest.mark.parametrize("model", [None, {"kernel": 1}])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="model: got .*; accepted: an NNX model and its inputs"):
        jaxreg.compress(model, jnp.ones(3))
