"""Models that shrink: what is removed, what stays, and that the outputs are the same."""

import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxreg
from jaxreg._check import ArgumentError
from jaxreg.models import CNN, MLP

RNG = np.random.default_rng(0)
ROUNDING = 16 * float(jnp.finfo(jnp.float32).eps)  # of sums in another order


def zero(parameter, *index):
    """Zeros in a place of a parameter of NNX."""
    parameter[...] = parameter[...].at[index].set(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def same_outputs(small, model, *inputs):
    """On the example, and on inputs that `compress` did not see."""
    fresh = tuple(3 * normal(*x.shape) for x in inputs)
    for own in (inputs, fresh):
        expected = model(*own)
        difference = float(jnp.max(jnp.abs(small.model(*own) - expected)))
        assert difference <= ROUNDING * float(jnp.max(jnp.abs(expected)))
    assert small.difference <= ROUNDING


def same_function(small, apply, params, *inputs):
    """As `same_outputs`, for a function of parameters."""
    fresh = tuple(
        3 * normal(*x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in inputs
    )
    for own in (inputs, fresh):
        found, expected = apply(small.model, *own), apply(params, *own)
        chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def shapes_of(small):
    return {name: leaf.shape for name, leaf in small.model.items()}


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
    why = "what a residual sum adds to them is not constant"
    assert small.kept["first/kernel"] == f"5 zero units: {why}"
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


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_models_of_this_library_shrink_after_training_with_a_group_penalty(kind):
    rngs = nnx.Rngs(0)
    model = MLP((64, 32, 16, 10), rngs=rngs) if kind == "mlp" else CNN((8, 8, 1), 10, rngs=rngs)
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
            self.hidden = nnx.Linear(8, 12, rngs=rngs)
            self.second = nnx.Linear(12, 3, rngs=rngs)

        def __call__(self, x):
            hidden = nnx.relu(self.hidden(self.norm(self.first(x))))
            return nnx.softmax(self.second(hidden))

    model, x = Normalized(nnx.Rngs(0)), normal(2, 6)
    zero(model.first.kernel, slice(None), slice(3))
    zero(model.hidden.kernel, slice(None), slice(5))
    zero(model.second.kernel, slice(None), slice(1))
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert set(small.shapes) == {"hidden/kernel", "hidden/bias", "second/kernel"}
    over_them = "a sum or maximum over them, as in layer normalization or softmax"
    assert small.kept == {
        "first/kernel": f"3 zero units: {over_them}",
        "second/kernel": f"1 zero unit: {over_them}",
    }
    assert f"kept first/kernel: 3 zero units: {over_them}" in str(small)


def test_the_columns_of_an_embedding_shrink_and_its_rows_stay():
    params = {"table": normal(9, 6).at[:, :2].set(0), "out": normal(6, 3)}
    tokens = jnp.array([[0, 3, 8]])
    small = jaxreg.compress(lambda p, t: p["table"][t] @ p["out"], params, tokens)
    assert small.shapes == {"out": ((6, 3), (4, 3)), "table": ((9, 6), (9, 4))}


# Where the weights are ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "apply",
    [
        lambda p, x: p["second"] @ jnp.tanh(p["first"] @ x + p["bias"][:, None]),
        lambda p, x: jnp.einsum(
            "oh,hb->ob", p["second"], jnp.tanh(jnp.einsum("hi,ib->hb", p["first"], x))
        ),
        lambda p, x: (jnp.tanh(x.T @ p["first"].T + p["bias"]) @ p["second"].T).T,
    ],
    ids=["matmul", "einsum", "transposed"],
)
def test_a_weight_on_the_left_of_a_product_shrinks_as_one_on_the_right(apply):
    params = {
        "first": normal(8, 5).at[:3].set(0),
        "bias": normal(8).at[:3].set(0),
        "second": normal(2, 8).at[:, 7].set(0),
    }
    x = normal(5, 4)
    small = jaxreg.compress(apply, params, x)
    assert small.shapes["first"] == ((8, 5), (4, 5))
    assert small.shapes["second"] == ((2, 8), (2, 4))
    same_function(small, apply, params, x)


def test_a_constant_goes_into_the_bias_of_a_weight_on_the_left():
    params = {
        "first": normal(8, 5).at[:3].set(0),
        "bias": normal(8),
        "second": normal(2, 8),
        "last": normal(2),
    }

    def apply(p, x):
        hidden = jax.nn.relu(p["first"] @ x + p["bias"][:, None])
        return p["second"] @ hidden + p["last"][:, None]

    x = normal(5, 4)
    small = jaxreg.compress(apply, params, x)
    assert small.shapes["second"] == ((2, 8), (2, 5))
    same_function(small, apply, params, x)


def test_a_factor_of_a_weight_shrinks():
    """The rank of a product of two weights, as of a low-rank update."""
    params = {
        "kernel": normal(6, 5),
        "down": normal(6, 4).at[:, :2].set(0),
        "up": normal(4, 5),
        "out": normal(5, 2),
    }

    def apply(p, x):
        return jnp.tanh(x @ (p["kernel"] + p["down"] @ p["up"])) @ p["out"]

    small = jaxreg.compress(apply, params, normal(3, 6))
    assert small.shapes == {"down": ((6, 4), (6, 2)), "up": ((4, 5), (2, 5))}
    same_function(small, apply, params, normal(3, 6))


def test_an_axis_of_a_constant_that_is_no_parameter_keeps_its_length():
    scale = np.linspace(1, 2, 8, dtype=np.float32)
    params = {
        "first": normal(5, 8).at[:, :3].set(0),
        "second": normal(8, 6).at[:, :2].set(0),
        "third": normal(6, 2),
    }

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["first"]) * scale @ p["second"]) @ p["third"]

    small = jaxreg.compress(apply, params, normal(3, 5))
    assert shapes_of(small) == {"first": (5, 8), "second": (8, 4), "third": (4, 2)}
    assert small.kept == {"first": "3 zero units: a constant array, which is no parameter"}
    same_function(small, apply, params, normal(3, 5))


def test_masks_and_quantized_weights_shrink_and_numbers_of_python_stay():
    quantized = jnp.asarray(RNG.integers(1, 127, (8, 2)), jnp.int8)
    params = {
        "first": normal(5, 8).at[:, :3].set(0),
        "mask": jnp.arange(8) < 6,
        "second": quantized,
        "scale": 0.01,
        "shift": np.float32(0.5),
        "name": "mlp",
    }

    def apply(p, x):
        hidden = jnp.tanh(x @ p["first"]) * p["mask"]
        return hidden @ (p["second"] * jnp.float32(p["scale"])) + p["shift"]

    small = jaxreg.compress(apply, params, normal(3, 5))
    assert small.shapes["first"] == ((5, 8), (5, 3))
    assert small.model["mask"].dtype == bool
    assert small.model["mask"].shape == (3,)
    assert (small.model["second"] == quantized[3:6]).all()
    assert small.model["scale"] == 0.01
    same_function(small, apply, params, normal(3, 5))


def test_layers_know_their_new_numbers_of_features():
    class Upsampling(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 6, rngs=rngs)
            self.up = nnx.ConvTranspose(6, 5, (3,), padding="VALID", rngs=rngs)
            self.flip = nnx.ConvTranspose(
                5, 4, (3,), padding="VALID", transpose_kernel=True, rngs=rngs
            )
            self.mix = nnx.Einsum("btc,cd->btd", (4, 8), (8,), rngs=rngs)
            self.lora = nnx.LoRALinear(8, 8, lora_rank=2, rngs=rngs)
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, tokens):
            x = nnx.relu(self.up(self.embed(tokens)))
            return self.out(nnx.relu(self.lora(self.mix(nnx.relu(self.flip(x))))))

    model, tokens = Upsampling(nnx.Rngs(0)), jnp.array([[0, 3, 6, 2]])
    zero(model.embed.embedding, slice(None), slice(2))
    zero(model.up.kernel, ..., slice(1))
    zero(model.flip.kernel, slice(None), slice(1))
    zero(model.mix.kernel, slice(None), slice(3))
    zero(model.lora.kernel, slice(None), slice(4))
    small = jaxreg.compress(model, tokens)
    chex.assert_trees_all_close(small.model(tokens), model(tokens), rtol=1e-5, atol=1e-6)
    smaller = small.model
    assert smaller.embed.features == smaller.embed.embedding.shape[1] == 4
    assert smaller.embed.num_embeddings == 7
    assert (smaller.up.in_features, smaller.up.out_features) == (4, 4)
    assert smaller.flip.kernel.shape == (3, 3, 4)
    assert (smaller.flip.in_features, smaller.flip.out_features) == (4, 3)
    assert smaller.mix.kernel_shape == smaller.mix.kernel.shape == (3, 5)
    assert (smaller.lora.in_features, smaller.lora.out_features) == (5, 4)
    assert smaller.lora.lora.in_features == 5


# Constants that go into a bias --------------------------------------------------------------------


def test_a_shared_layer_takes_a_constant_once():
    """Siamese: both uses of the second layer add the same constant, and then it is its bias."""
    params = {
        "first": normal(5, 4).at[:, :2].set(0),
        "b1": jnp.ones(4),
        "second": normal(4, 3),
        "b2": normal(3),
    }

    def encode(p, x):
        return jax.nn.relu(x @ p["first"] + p["b1"]) @ p["second"] + p["b2"]

    def siamese(p, x, y):
        return encode(p, x) * encode(p, y)

    x, y = normal(6, 5), normal(6, 5)
    small = jaxreg.compress(siamese, params, x, y)
    assert small.shapes["second"] == ((4, 3), (2, 3))
    same_function(small, siamese, params, x, y)


def test_a_shared_layer_whose_uses_need_different_biases_takes_no_constant():
    params = {
        "first": normal(5, 4).at[:, :2].set(0),
        "b1": jnp.ones(4),
        "second": normal(4, 3),
        "b2": normal(3),
    }
    x, y = normal(6, 5), normal(6, 5)

    def summed(p, x, y):  # the bias is added to the sum of both uses, not to a product
        first, second = (jax.nn.relu(z @ p["first"] + p["b1"]) for z in (x, y))
        return first @ p["second"] + second @ p["second"] + p["b2"]

    def stacked(p, x, y):  # the bias is added to one use only
        first, second = (jax.nn.relu(z @ p["first"] + p["b1"]) for z in (x, y))
        return jnp.tanh(first @ p["second"] + p["b2"]) + second @ p["second"]

    for apply in (summed, stacked):
        small = jaxreg.compress(apply, params, x, y)
        assert small.shapes == {}
        assert small.kept == {"first": "2 zero units: no bias that could take their constant"}

    def other(p, x, y):  # the uses read different constants
        first = jax.nn.relu(x @ p["first"] + p["b1"])
        second = jax.nn.relu(y @ p["first"] + 2 * p["b1"])
        return (first @ p["second"] + p["b2"]) * (second @ p["second"] + p["b2"])

    assert jaxreg.compress(other, params, x, y).shapes == {}


def test_two_constant_axes_of_one_product_share_their_corner():
    """Units in a grid of heads and positions: row 0 and column 0 are constant."""
    kernel = normal(5, 3, 4).at[:, 0].set(0).at[:, :, 0].set(0)
    params = {
        "first": kernel,
        "bias": jnp.ones((3, 4)),
        "second": normal(3, 4, 2),
        "last": normal(2),
    }

    def apply(p, x):
        hidden = jax.nn.relu(jnp.einsum("bi,ihk->bhk", x, p["first"]) + p["bias"])
        return jnp.einsum("bhk,hko->bo", hidden, p["second"]) + p["last"]

    x = normal(6, 5)
    small = jaxreg.compress(apply, params, x)
    assert small.shapes["second"] == ((3, 4, 2), (2, 3, 2))
    same_function(small, apply, params, x)


def test_the_trunk_of_a_residual_network_shrinks_behind_a_global_mean():
    class Trunk(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm0 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.conv = nnx.Conv(8, 8, (3, 3), use_bias=False, rngs=rngs)
            self.norm1 = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
            self.head = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm0(self.stem(x)))
            x = nnx.relu(x + self.norm1(self.conv(x)))
            return self.head(x.mean((1, 2)))

    model, x = Trunk(nnx.Rngs(0)), normal(2, 6, 6, 3)
    for layer in (model.stem, model.conv):
        zero(layer.kernel, ..., slice(3))
    zero(model.stem.bias, slice(3))
    model.norm1.bias[...] = jnp.ones(8)  # what is left of them is constant behind the sum
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["conv/kernel"] == ((3, 3, 8, 8), (3, 3, 5, 5))
    assert small.shapes["head/kernel"] == ((8, 4), (5, 4))
    model.norm0.bias[...] = jnp.ones(8)  # now padding makes what `conv` reads of them vary
    small = jaxreg.compress(model, x)
    assert small.shapes == {}
    assert "padding" in small.kept["stem/kernel"]


def test_windows_that_compute_anything_are_not_followed():
    """A maximum keeps a constant; of another computation nothing is known."""
    params = {
        "first": normal(5, 6).at[:, :2].set(0),
        "bias": jnp.ones(6),
        "second": normal(6, 2),
        "last": normal(2),
    }

    def apply(p, x):
        hidden = jax.nn.relu(x @ p["first"] + p["bias"])
        shape = (1, 2, 1)
        pooled = jax.lax.reduce_window(
            hidden, jnp.float32(0), lambda a, b: 2 * a + 3 * b, shape, shape, "VALID"
        )
        return pooled @ p["second"] + p["last"]

    small = jaxreg.compress(apply, params, normal(3, 4, 5))
    assert small.shapes == {}
    assert "reduce_window" in small.kept["first"]


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
    assert small.flops[1] < small.flops[0]
    assert small.speed_up > 0


def test_a_linen_model_shrinks_until_nothing_more_goes():
    class Deep(linen.Module):
        widths: tuple[int, ...]

        @linen.compact
        def __call__(self, x):
            for i, width in enumerate(self.widths):
                x = jnp.tanh(linen.Dense(width, use_bias=False, name=f"layer{i}")(x))
            return x

    model, x = Deep((8, 4, 2)), normal(4, 6)
    params = model.init(jax.random.key(0), x)
    layers = params["params"]
    layers["layer2"]["kernel"] = layers["layer2"]["kernel"].at[:3].set(0)
    layers["layer1"]["kernel"] = layers["layer1"]["kernel"].at[:5, 3].set(0)
    small = jaxreg.compress(model.apply, params, x)
    assert small.shapes["params/layer0/kernel"] == ((6, 8), (6, 3))
    chex.assert_trees_all_close(
        Deep((3, 1, 2)).apply(small.model, x), model.apply(params, x), rtol=1e-5, atol=1e-6
    )
    assert small.unverified == ""
    assert "speed-up" in str(small)


class LinenNet(linen.Module):
    """Convolutions, batch normalization, dense layers and attention."""

    filters: int
    width: int

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(self.filters, (3, 3), padding="VALID", name="conv")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        x = linen.relu(x).mean((1, 2))
        x = linen.relu(linen.Dense(self.width, name="hidden")(x))
        return linen.Dense(3, name="out")(x)


def test_variables_of_linen_with_statistics_serve_a_module_of_the_new_widths():
    model, x = LinenNet(8, 16), normal(4, 6, 6, 2)
    variables = model.init(jax.random.key(0), x)
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    variables = {**variables, **updates}
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), variables["params"])
    params["conv"]["kernel"] = params["conv"]["kernel"].at[..., :3].set(0)
    params["hidden"]["kernel"] = params["hidden"]["kernel"].at[:, :10].set(0)
    variables["params"] = params
    small = jaxreg.compress(model.apply, variables, x)
    assert small.shapes["batch_stats/norm/mean"] == ((8,), (5,))
    assert small.shapes["params/hidden/kernel"] == ((8, 16), (5, 6))
    assert small.unverified == ""
    fresh = 3 * normal(4, 6, 6, 2)
    chex.assert_trees_all_close(
        LinenNet(5, 6).apply(small.model, fresh),
        model.apply(variables, fresh),
        rtol=1e-4,
        atol=1e-4,
    )


def test_layers_of_linen_are_called_with_the_widths_of_their_weights():
    """Embeddings define their weights in `setup`; heads are one axis of several features."""

    class Tokens(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(7, 6, name="embed")(tokens)
            x = linen.ConvTranspose(5, (3,), padding="VALID", transpose_kernel=True, name="up")(x)
            x = linen.Dense(8, use_bias=False, name="inner")(linen.relu(x))
            x = linen.MultiHeadDotProductAttention(4, qkv_features=8, name="attention")(x)
            return linen.Dense(2, name="out")(x)

    model, tokens = Tokens(), jnp.array([[0, 3, 6, 2]])
    variables = model.init(jax.random.key(0), tokens)
    layers = variables["params"]
    layers["embed"]["embedding"] = layers["embed"]["embedding"].at[:, :2].set(0)
    layers["up"]["kernel"] = layers["up"]["kernel"].at[:, :1].set(0)
    out = layers["attention"]["out"]
    out["kernel"] = out["kernel"].at[1].set(0)
    small = jaxreg.compress(model.apply, variables, tokens)
    assert small.unverified == ""
    assert small.difference <= ROUNDING
    assert small.shapes["params/embed/embedding"] == ((7, 6), (7, 4))
    assert small.shapes["params/up/kernel"] == ((3, 5, 6), (3, 4, 4))
    assert small.shapes["params/attention/query/kernel"] == ((8, 4, 2), (8, 3, 2))


def test_a_linen_model_that_knows_its_own_width_is_refused():
    class Divides(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = jnp.tanh(linen.Dense(8, use_bias=False, name="first")(x))
            return linen.Dense(2, use_bias=False, name="second")(h / h.shape[-1])

    model, x = Divides(), normal(4, 5)
    params = model.init(jax.random.key(0), x)
    layers = params["params"]
    layers["first"]["kernel"] = layers["first"]["kernel"].at[:, :3].set(0)
    with pytest.raises(ArgumentError, match="gives outputs that differ by 6.0e-01"):
        jaxreg.compress(model.apply, params, x)


def test_a_linen_model_with_own_weights_is_not_verified_and_that_is_said():
    class Own(linen.Module):
        width: int

        @linen.compact
        def __call__(self, x):
            init = linen.initializers.lecun_normal()
            first = self.param("first", init, (x.shape[-1], self.width))
            return linen.Dense(2, name="out")(jnp.tanh(x @ first))

    model, x = Own(8), normal(4, 5)
    params = model.init(jax.random.key(0), x)
    params["params"]["first"] = params["params"]["first"].at[:, :3].set(0)
    small = jaxreg.compress(model.apply, params, x)
    assert small.shapes["params/first"] == ((5, 8), (5, 5))
    chex.assert_trees_all_close(
        Own(5).apply(small.model, x), model.apply(params, x), rtol=1e-5, atol=1e-6
    )
    assert np.isnan(small.difference)
    assert np.isnan(small.speed_up)
    assert small.unverified == "Flax refuses the new widths until the module is built with them"
    assert f"not verified: {small.unverified}" in str(small)
    assert "speed-up" not in str(small)
    assert "nan" not in str(small).lower()


# What is refused ---------------------------------------------------------------------------------


def test_a_model_that_can_not_be_followed_is_refused_by_the_layer_and_the_operation():
    def recurrent(p, x):
        def step(h, xt):
            return jnp.tanh(xt @ p["inner"] + h @ p["state"]), None

        return jax.lax.scan(step, jnp.zeros((2, 8)), x)[0] @ p["out"]

    params = {"inner": normal(6, 8).at[:, :3].set(0), "state": normal(8, 8), "out": normal(8, 2)}
    with pytest.raises(ValueError, match="model: got 3 zero units in inner, .* operation scan"):
        jaxreg.compress(recurrent, params, normal(5, 2, 6))
    with pytest.raises(ValueError, match="strict=False"):
        jaxreg.compress(recurrent, params, normal(5, 2, 6))


def test_where_it_is_not_strict_what_is_not_followed_stays_and_the_rest_goes():
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 8, rngs=rngs)
            self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(8, 6, rngs=rngs))
            self.conv = nnx.Conv(6, 8, (3,), feature_group_count=2, rngs=rngs)
            self.hidden = nnx.Linear(8, 12, rngs=rngs)
            self.out = nnx.Linear(12, 2, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.conv(self.rnn(nnx.relu(self.first(x)))))
            return self.out(nnx.relu(self.hidden(x)))

    model, x = Recurrent(nnx.Rngs(0)), normal(2, 4, 5)
    zero(model.first.kernel, slice(None), slice(3))
    zero(model.conv.kernel, ..., slice(2))
    zero(model.hidden.kernel, slice(None), slice(5))
    with pytest.raises(ArgumentError, match=r"strict=False keeps"):
        jaxreg.compress(model, x)
    small = jaxreg.compress(model, x, strict=False)
    same_outputs(small, model, x)
    assert set(small.shapes) == {"hidden/kernel", "hidden/bias", "out/kernel"}
    assert small.kept == {
        "first/kernel": "3 zero units: the operation scan is not followed",
        "conv/kernel": "2 zero units: a convolution in groups is not followed",
    }


def test_what_is_refused_is_named_by_three_weights_at_most():
    params = {f"w{i}": normal(5, 5) for i in range(6)}
    params["w0"] = params["w0"].at[:, 0].set(0)
    params |= {f"b{i}": jnp.zeros(5) for i in range(6)}

    def ties(p, x):
        h = x @ p["w0"] + p["b0"]
        for i in range(1, 5):
            h = h + jnp.sin(x) @ (p["w0"] * p[f"w{i}"].mean() * 0) + p[f"b{i}"]
        return jnp.tanh(h) @ p["w5"] / h.shape[-1]

    wanted = r"with smaller b0, b1, b2 and 4 more, gives .*; accepted: a model without widths"
    with pytest.raises(ArgumentError, match=wanted):
        jaxreg.compress(ties, params, normal(3, 5))


def test_nothing_to_remove_is_said():
    params = {"first": normal(5, 6), "second": normal(6, 3)}
    small = jaxreg.compress(
        lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], params, normal(2, 5)
    )
    assert str(small) == "nothing to remove: no zero units\nparameters: 48 -> 48 (100.0%)"


def test_the_ends_of_a_model_keep_their_length():
    params = {"first": normal(5, 6).at[:2].set(0), "second": normal(6, 3).at[:, :1].set(0)}
    small = jaxreg.compress(
        lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"], params, normal(2, 5)
    )
    assert small.kept == {
        "first": "2 zero units: units of the model's inputs, which keep their length",
        "second": "1 zero unit: units of the model's outputs, which keep their length",
    }


def test_complex_weights_keep_their_shape_and_say_why():
    params = {"first": normal(5, 6).at[:, :2].set(0), "turn": jnp.ones(6, jnp.complex64)}
    small = jaxreg.compress(
        lambda p, x: jnp.abs((x @ p["first"]) * p["turn"]), params, normal(2, 5)
    )
    assert small.shapes == {}
    assert small.kept == {"first": "2 zero units: an array of complex numbers, which stays"}


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


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: MLP((4, 3), rngs=nnx.Rngs(0)), r"an NNX model.*compress\(model, x\)"),
        (lambda: linen.Dense(3), r"a Linen module.*compress\(module.apply, variables, x\)"),
    ],
    ids=["nnx", "linen"],
)
def test_a_method_of_a_model_is_no_function_of_its_parameters(make, wanted):
    with pytest.raises(ArgumentError, match=f"model: got the method .* of {wanted}"):
        jaxreg.compress(make().__call__, normal(2, 4))


@pytest.mark.parametrize("params", [{}, {"scale": 2.0}, jnp.float32(2.0)])
def test_parameters_without_an_array_are_refused(params):
    with pytest.raises(ArgumentError, match="model: got parameters without arrays"):
        jaxreg.compress(lambda p, x: x, params, normal(2, 4))


@pytest.mark.parametrize("model", [None, {"kernel": 1}])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="model: got .*; accepted: an NNX model and its inputs"):
        jaxreg.compress(model, jnp.ones(3))


# What stays, and why -----------------------------------------------------------------------------


def test_a_layer_that_can_not_shrink_stays_and_the_rest_goes_on():
    """The model's own code has the width of `first`; the others go all the same."""
    params = {
        "first": normal(5, 8).at[:, :3].set(0),
        "second": normal(8, 6).at[:, :2].set(0),
        "third": normal(6, 7).at[:, 6].set(0),
        "fourth": normal(7, 2),
    }

    def divides(p, x):
        hidden = jnp.tanh(x @ p["first"])
        hidden = jnp.tanh(hidden @ p["second"] / hidden.shape[-1])
        return jnp.tanh(hidden @ p["third"]) @ p["fourth"]

    def adds(p, x):
        hidden = (jnp.tanh(x @ p["first"]) + jnp.zeros((1, 8))).reshape(-1, 8)
        return jnp.tanh(jnp.tanh(hidden @ p["second"]) @ p["third"]) @ p["fourth"]

    x = normal(3, 5)
    for apply, why in (
        (divides, "3 units: with fewer, the model gives outputs that"),
        (adds, "3 units: with fewer, the model fails: "),
    ):
        small = jaxreg.compress(apply, params, x)
        assert shapes_of(small) == {
            "first": (5, 8),
            "second": (8, 4),
            "third": (4, 6),
            "fourth": (6, 2),
        }
        assert set(small.kept) == {"first", "second"}
        assert small.kept["first"].startswith(why)
        same_function(small, apply, params, x)


def test_outputs_are_compared_on_other_inputs_than_the_example_too():
    """Zeros would hide that the units count."""
    params = {"first": normal(5, 4).at[:, 0].set(0), "second": normal(4, 3)}

    def counts(p, x):
        hidden = x @ p["first"]
        return hidden @ p["second"] / hidden.shape[-1] + 1

    with pytest.raises(ValueError, match="gives outputs that differ"):
        jaxreg.compress(counts, params, jnp.zeros((2, 5)))


def in_bfloat16(apply):
    """Computed in bfloat16, returned in float32."""

    def computed(p, x):
        p, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (p, x))
        return apply(p, x).astype(jnp.float32)

    return computed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("wrap", [in_bfloat16, lambda apply: apply], ids=["cast", "as stored"])
def test_a_model_in_few_bits_shrinks_up_to_its_rounding(dtype, wrap):
    params = {
        "first": normal(64, 64).at[:, :20].set(0),
        "bias": normal(64),
        "second": normal(64, 64) / 8,
        "middle": normal(64),
        "third": normal(64, 8) / 8,
        "last": normal(8),
    }
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, normal(16, 64)))

    @wrap
    def apply(p, x):
        hidden = jax.nn.gelu(x @ p["first"] + p["bias"])
        hidden = jax.nn.softplus(hidden @ p["second"] + p["middle"])
        return hidden @ p["third"] + p["last"]

    small = jaxreg.compress(apply, params, x)
    assert small.shapes["first"] == ((64, 64), (64, 44))
    assert small.model["first"].dtype == small.model["middle"].dtype == dtype
    assert small.difference < 0.05


def test_bfloat16_excuses_no_more_than_its_rounding():
    """A model that divides by its width differs by 5 %: 16 steps of bfloat16 are 12 %."""
    params = {"first": normal(16, 64).at[:, :3].set(0), "second": normal(64, 8)}

    def divides(p, x):
        hidden = jnp.tanh(x @ p["first"])
        return hidden @ p["second"] / hidden.shape[-1]

    def rounds_its_inputs(p, x):
        return divides(p, x.astype(jnp.bfloat16).astype(jnp.float32))

    x = normal(5, 16)
    for apply in (in_bfloat16(divides), rounds_its_inputs):
        with pytest.raises(ArgumentError, match="gives outputs that differ by 4.9e-02"):
            jaxreg.compress(apply, params, x)
    few = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    with pytest.raises(ArgumentError, match="gives outputs that differ"):
        jaxreg.compress(divides, few, x.astype(jnp.bfloat16))


def test_operations_with_a_body_are_compared_in_their_own_dtype():
    """The units before and after a scan in bfloat16 go."""
    params = {
        "first": normal(5, 16).at[:, :6].set(0),
        "second": normal(16, 8) / 4,
        "state": normal(8, 8) / 3,
        "out": normal(8, 16).at[:, :3].set(0),
        "last": normal(16, 2),
    }
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)

    def recurrent(p, x):
        def step(h, xt):
            return jnp.tanh(xt + h @ p["state"]), None

        inner = jnp.tanh(x @ p["first"]) @ p["second"]
        hidden = jax.lax.scan(step, jnp.zeros((2, 8), x.dtype), inner)[0]
        return jnp.tanh(hidden @ p["out"]) @ p["last"]

    small = jaxreg.compress(recurrent, params, normal(4, 2, 5).astype(jnp.bfloat16))
    assert small.shapes["first"] == ((5, 16), (5, 10))
    assert small.shapes["last"] == ((16, 2), (13, 2))


def test_each_output_is_compared_by_its_own_scale():
    params = {"first": normal(5, 8).at[:, :3].set(0), "second": normal(8, 3)}

    def two(p, x):
        hidden = jnp.tanh(x @ p["first"])
        return hidden @ p["second"] / hidden.shape[-1], 1e8 * x.sum()

    with pytest.raises(ArgumentError, match="gives outputs that differ by 6.0e-01"):
        jaxreg.compress(two, params, normal(4, 5))


def test_outputs_that_hold_nan_are_not_compared_and_that_is_said():
    params = {"first": normal(5, 6).at[:, :2].set(0), "second": normal(6, 3)}

    def apply(p, x):
        return jnp.log(-jnp.abs(jnp.tanh(x @ p["first"]) @ p["second"]))

    small = jaxreg.compress(apply, params, normal(3, 5))
    assert small.shapes["first"] == ((5, 6), (5, 4))
    assert np.isnan(small.difference)
    assert small.unverified == "outputs hold NaN, which is not compared"
    assert f"not verified: {small.unverified}" in str(small)


def test_a_model_that_gives_other_outputs_each_time_is_refused():
    """Whatever can go: nothing, a unit that nothing reads, a zero unit."""
    calls = itertools.count()
    shapes = jax.ShapeDtypeStruct((), jnp.float32)

    def noisy(p, x):
        noise = jax.pure_callback(lambda _: np.float32(next(calls)), shapes, x.sum())
        return jnp.tanh(x @ p["first"]) @ p["second"] + noise

    for units in (0, 2):
        params = {"first": normal(5, 6).at[:, :units].set(0), "second": normal(6, 3)}
        with pytest.raises(ArgumentError, match="gives other outputs for the same inputs"):
            jaxreg.compress(noisy, params, normal(3, 5))
    with pytest.raises(ArgumentError, match="gives other outputs for the same inputs"):
        jaxreg.compress(lambda p, x: noisy(p, x) + x.sum() * p["second"][0], params, normal(3, 5))


def test_float64_inputs_of_numpy_give_no_warning():
    params = {"first": normal(5, 6).at[:, :2].set(0), "second": normal(6, 3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = jaxreg.compress(
            lambda p, x: jnp.tanh(jnp.asarray(x, jnp.float32) @ p["first"]) @ p["second"],
            params,
            RNG.normal(size=(3, 5)),
        )
    assert small.shapes["first"] == ((5, 6), (5, 4))


def test_the_model_given_is_untouched():
    model, x = ConvNet(nnx.Rngs(0)), normal(4, 8, 8, 1)
    zero(model.conv1.kernel, ..., slice(8))
    zero(model.dense1.kernel, slice(None), slice(50))
    graphdef, before = nnx.split(model)
    before = jax.tree.map(jnp.copy, before)
    jaxreg.compress(model, x)
    after_graphdef, after = nnx.split(model)
    chex.assert_trees_all_equal(after, before)
    assert after_graphdef == graphdef


def test_outputs_of_any_dtype_and_infinities_are_compared():
    params = {"first": normal(5, 6).at[:, :2].set(0), "second": normal(6, 3)}

    def apply(p, x):
        jax.debug.callback(lambda _: None, x)
        logits = jnp.tanh(x @ p["first"]) @ p["second"]
        masked = jnp.where(jnp.arange(3) == 1, -jnp.inf, logits)
        return logits.argmax(-1), masked, jnp.full(2, jnp.nan), logits > 0

    small = jaxreg.compress(apply, params, normal(3, 5))
    assert small.shapes["first"] == ((5, 6), (5, 4))
    assert "NaN" in small.unverified
    small = jaxreg.compress(lambda p, x: apply(p, x)[:2], params, normal(3, 5))
    assert small.difference <= ROUNDING
    assert small.unverified == ""


def test_dropout_in_training_is_named():
    class Dropped(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 6, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.second(self.drop(self.first(x)))

    model, x = Dropped(nnx.Rngs(0)), normal(3, 5)
    assert jaxreg.compress(model, x).shapes == {}
    zero(model.first.kernel, slice(None), slice(2))
    with pytest.raises(ValueError, match=r"2 zero units in first/kernel.* call model.eval\(\)"):
        jaxreg.compress(model, x)
    model.eval()
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["second/kernel"] == ((6, 2), (4, 2))


def test_the_statistics_of_a_batch_keep_their_units():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, rngs=rngs)
            self.second = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x))))

    model, x = Net(nnx.Rngs(0)), normal(8, 5)
    zero(model.first.kernel, slice(None), slice(2))
    small = jaxreg.compress(model, x)
    assert small.shapes == {}
    assert small.kept["first/kernel"].endswith("as in training: call model.eval()")
    model.eval()
    assert jaxreg.compress(model, x).shapes["first/kernel"] == ((5, 6), (5, 4))


def test_the_values_of_attention_stay_as_long_as_its_keys():
    model, x = Transformer(nnx.Rngs(0)), normal(2, 5, 6)
    zero(model.attention.value.kernel, slice(None), slice(None), slice(3))
    small = jaxreg.compress(model, x)
    assert small.shapes == {}
    why = "3 zero units: attention, whose values are as long as its keys"
    assert small.kept == {"attention/value/kernel": why}


def test_attention_layers_that_share_a_kernel_or_have_other_values_are_followed():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (
                nnx.MultiHeadAttention(
                    2, 8, 8, decode=False, deterministic=True, use_bias=False, rngs=rngs
                )
                for _ in range(2)
            )
            self.b.value.kernel = self.a.value.kernel
            self.hidden = nnx.Linear(8, 6, rngs=rngs)
            self.out = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(self.a(x) + self.b(x))))

    model, x = Twice(nnx.Rngs(0)), normal(2, 5, 8)
    zero(model.hidden.kernel, slice(None), slice(2))
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["out/kernel"] == ((6, 2), (4, 2))
    model.b.value = lambda x, **_: jnp.stack([x[..., :4], x[..., 4:]], -2)
    small = jaxreg.compress(model, x)
    same_outputs(small, model, x)
    assert small.shapes["out/kernel"] == ((6, 2), (4, 2))


def test_zero_units_that_are_no_whole_head_stay():
    params = {"first": normal(5, 8).at[:, 1:3].set(0), "second": normal(8, 2)}

    def apply(p, x):
        heads = (x @ p["first"]).reshape(-1, 4, 2)
        return jnp.tanh(heads).reshape(-1, 8) @ p["second"]

    small = jaxreg.compress(apply, params, normal(3, 5))
    assert small.shapes == {}
    assert small.kept == {"first": "2 zero units: a reshape takes them apart, as into heads"}


def test_groups_of_a_normalization_stay():
    class Grouped(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
            self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.conv(x))))

    model, x = Grouped(nnx.Rngs(0)), normal(2, 5, 5, 1)
    zero(model.conv.kernel, ..., slice(3))
    small = jaxreg.compress(model, x)
    assert small.shapes == {}
    assert "a sum or maximum over them" in small.kept["conv/kernel"]


def test_zero_units_that_only_a_scan_reads_are_kept_and_the_rest_shrinks():
    """No zero unit passes through it: those of `out` come after, the rows of `inner` before."""

    def recurrent(p, x):
        def step(h, xt):
            return jnp.tanh(xt @ p["inner"] + h @ p["state"]), None

        hidden = jax.lax.scan(step, jnp.zeros((2, 8)), x)[0] @ p["out"]
        return jnp.tanh(hidden) @ p["last"]

    params = {
        "inner": normal(6, 8).at[:2].set(0),
        "state": normal(8, 8),
        "out": normal(8, 4).at[:3].set(0).at[:, 0].set(0),
        "last": normal(4, 2),
    }
    x = normal(5, 2, 6)
    small = jaxreg.compress(recurrent, params, x)
    assert small.shapes == {"last": ((4, 2), (3, 2)), "out": ((8, 4), (8, 3))}
    assert small.kept["out"] == "3 zero units: the operation scan is not followed"


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), "small"])
def test_a_tolerance_is_a_number_that_is_not_negative(tolerance):
    with pytest.raises(ArgumentError, match="tolerance: got "):
        jaxreg.compress(lambda p, x: x @ p, normal(3, 2), normal(4, 3), tolerance=tolerance)


@pytest.mark.parametrize("rounds", [0, -1, 1.5])
def test_rounds_are_a_positive_whole_number(rounds):
    with pytest.raises(ArgumentError, match="rounds: got "):
        jaxreg.compress(lambda p, x: x @ p, normal(3, 2), normal(4, 3), rounds=rounds)


def test_a_module_of_linen_is_named():
    with pytest.raises(
        ArgumentError, match=r"model: got a Linen module; .*module.apply, variables"
    ):
        jaxreg.compress(linen.Dense(3), normal(4, 2))


def test_inside_of_a_trace_nothing_can_be_read():
    def call(p, x):
        jaxreg.compress(lambda p, x: x @ p, p, x)

    with pytest.raises(ArgumentError, match="model: got a traced array"):
        jax.jit(call)(normal(3, 2), normal(4, 3))
