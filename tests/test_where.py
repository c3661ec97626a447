"""Selectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxreg import where

pytestmark = pytest.mark.core

PARAMS = {
    "embedding": {"kernel": jnp.ones((9, 4))},
    "layers": [
        {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
        {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    ],
    "norm": {"scale": jnp.ones(4)},
}


def chosen(selector, tree=PARAMS):
    mask = selector.mask(tree)
    return {p for p, yes in zip(where.paths(mask), jax.tree.leaves(mask), strict=True) if yes}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layers/0/kernel", {"layers/0/kernel"}),
        ("layers/*/kernel", {"layers/0/kernel", "layers/1/kernel"}),
        ("layers/**", {"layers/0/kernel", "layers/0/bias", "layers/1/kernel", "layers/1/bias"}),
        ("**/bias", {"layers/0/bias", "layers/1/bias"}),
        ("**/norm/**", {"norm/scale"}),
        ("layers/?/bi*", {"layers/0/bias", "layers/1/bias"}),
        ("n*/scale", {"norm/scale"}),
    ],
)
def test_path_patterns(pattern, expected):
    assert chosen(where.path(pattern)) == expected


def test_a_star_stays_within_one_component():
    assert chosen(where.path("*/scale")) == {"norm/scale"}
    with pytest.raises(ValueError, match="matches no leaf"):
        where.path("*/kernel").mask({"a": {"b": {"kernel": 1.0}}})


def test_characters_of_regular_expressions_stand_for_themselves():
    assert chosen(where.path("a.b"), {"a.b": 1.0, "axb": 1.0}) == {"a.b"}


def test_rank_and_predicate():
    assert chosen(where.rank(at_least=1, at_most=1)) == {
        "layers/0/bias",
        "layers/1/bias",
        "norm/scale",
    }
    assert chosen(where.predicate(lambda path, leaf: leaf.size == 36)) == {"embedding/kernel"}


def test_algebra():
    kernel, first = where.path("**/kernel"), where.path("layers/0/**")
    assert chosen(kernel & first) == {"layers/0/kernel"}
    assert chosen(kernel | "norm/scale") == chosen(kernel) | {"norm/scale"}
    assert chosen(~kernel) == chosen(where.everything) - chosen(kernel)
    assert repr(kernel & ~first) == "(where.path('**/kernel') & ~where.path('layers/0/**'))"


def test_kernels_are_found_in_flax_models_and_nothing_else():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, tokens):
            x = linen.Embed(9, 4)(tokens)
            x = linen.LayerNorm()(linen.Dense(4)(x))
            x = linen.Conv(4, (3,))(x)
            return linen.MultiHeadDotProductAttention(num_heads=2)(x, x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(9, 4, rngs=rngs)
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)

    params = Linen().init(jax.random.key(0), jnp.zeros((1, 4), int))
    found = chosen(where.kernels, params)
    assert found == {
        "params/Dense_0/kernel",
        "params/Conv_0/kernel",
        *(
            f"params/MultiHeadDotProductAttention_0/{part}/kernel"
            for part in ("query", "key", "value", "out")
        ),
    }
    # The biases of attention have rank 2 and are still no kernels.
    assert params["params"]["MultiHeadDotProductAttention_0"]["query"]["bias"].ndim == 2
    assert chosen(where.kernels, nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)) == {"dense/kernel"}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("w", (3,), True),
        ("weights", (3,), False),
        ("weights", (3, 2), True),
        ("layers/1/weight", (3,), False),  # the scale of a normalization in a list of layers
        ("layers/w", (3,), True),
        ("norm/inner/w", (3, 3), False),
        ("stacked/linear/b", (6, 4), False),
        ("normal_head/weight", (3, 3), True),
        ("LayerNormalization_0/w", (3, 3), False),
        ("posembed/table", (9, 3), False),
        ("coef", (3,), True),
        ("b", (3,), False),
        ("intercept", (), False),
        ("out/kernel", (), False),
        ("patch_embed/kernel", (4, 4, 3, 8), True),
        ("projection_norm/kernel", (3, 3), True),
        ("lora_a", (8, 2), True),
        ("lora_b", (2, 8), True),
        ("w/0", (3,), True),
        ("0/1", (3,), False),
        ("0/1", (3, 3), True),
        ("attention_bias", (4, 4), False),
        ("LayerNorm_0/gamma", (12, 4), False),
        ("bn1/weight", (3,), False),
        ("pos_embed", (1, 9, 4), False),
        ("theta", (3,), False),
        ("anything", (3, 3), True),
        ("anything", (3,), False),
        ("layers/bias", (12, 4), False),
        ("ln_1/weight", (3,), False),
        ("wte/weight", (9, 3), False),
        ("token_embedding/weight", (9, 3), False),
        ("emb/weight", (9, 3), False),
        ("tok_emb/weight", (9, 3), False),
        ("pos_emb", (1, 9, 3), False),
        ("tokEmb/weight", (9, 3), False),
        ("embd/weight", (9, 3), False),
        ("posembs", (9, 3), False),
        ("rms/weight", (12, 4), False),
        ("rms_1/weight", (12, 4), False),
        ("blocks/rmsFfn/weight", (12, 4), False),
        ("pos", (1, 50, 4), False),
        ("encoder/pos", (1, 50, 4), False),
        ("cls", (1, 1, 4), False),
        ("cls_token", (1, 1, 4), False),
        ("register_tokens", (1, 4, 4), False),
        ("embark/weight", (3, 3), True),
        ("embody", (3, 3), True),
        ("members", (3, 3), True),
        ("forms/weight", (3, 3), True),
        ("terms", (3, 3), True),
        ("position_mlp/kernel", (3, 3), True),
        ("position_mlp/weight", (3, 3), True),
        ("linear_pos/weight", (3, 3), True),
        ("cls/weight", (3, 3), True),
        ("cls_head/weight", (3, 3), True),
        ("tokenizer/weight", (3, 3), True),
        ("token_mixer/weight", (3, 3), True),
    ],
)
def test_kernels_by_name_and_rank(path, shape, expected):
    assert where.kernels.selects(path, np.ones(shape)) is expected


def test_axes_that_count_stacked_layers_are_not_counted():
    params = {
        "blocks": {"up": jnp.ones((12, 4, 8)), "shift": jnp.ones((12, 8))},
        "head": {"up": jnp.ones((4, 8)), "shift": jnp.ones(8)},
    }
    chosen = {
        "blocks": {"up": True, "shift": False},
        "head": {"up": True, "shift": False},
    }
    assert where.kernels.mask(params)["blocks"]["shift"]
    assert where.kernels_with(stacked="blocks/**").mask(params) == chosen
    assert where.rank(at_least=2, stacked="blocks/**").mask(params) == chosen
    pairs = {"blocks": {"up": jnp.ones((2, 6, 4, 8)), "shift": jnp.ones((2, 6, 8))}}
    rule = where.kernels_with(stacked=where.path("blocks/**"), axes=2)
    assert rule.mask(pairs) == {"blocks": {"up": True, "shift": False}}
    assert repr(rule) == "where.kernels_with(stacked=where.path('blocks/**'), axes=2)"


def test_kernels_of_scanned_flax_layers_are_found_by_name():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.LayerNorm()(linen.Dense(4)(x)), None

    scanned = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    params = scanned().init(jax.random.key(0), jnp.ones((2, 4)), None)["params"]
    for rule in (where.kernels, where.kernels_with(stacked="**")):
        mask = rule.mask(params)
        assert mask["Dense_0"] == {"kernel": True, "bias": False}
        assert mask["LayerNorm_0"] == {"scale": False, "bias": False}

    @nnx.vmap(in_axes=0)
    def stack(key):
        return nnx.Linear(4, 4, rngs=nnx.Rngs(key))

    state = nnx.state(stack(jax.random.split(jax.random.key(0), 3)), nnx.Param)
    assert jax.tree.leaves(where.kernels_with(stacked="**").mask(state)) == [False, True]


def test_a_bare_array_is_a_kernel():
    assert where.kernels.mask(jnp.ones(3)) is True


def test_a_named_tuple_has_its_fields_for_paths():
    class Params(NamedTuple):
        kernel: jax.Array
        value: jax.Array

    tree = Params(jnp.ones((2, 2)), jnp.ones(2))
    assert chosen(where.everything, tree) == {"kernel", "value"}


def test_a_field_called_value_is_a_name_where_it_is_not_alone():
    class KV(NamedTuple):
        key: Any
        value: Any

    tree = {"attention": KV(jnp.ones((2, 2)), jnp.ones((2, 2)))}
    assert where.paths(tree) == ["attention/key", "attention/value"]
    assert chosen(where.path("**/value"), tree) == {"attention/value"}
    nested = KV({"kernel": 1.0}, 2.0)
    assert where.paths({"a": nested}) == ["a/key/kernel", "a/value"]
    assert where.paths(jnp.ones(2)) == [""]
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    assert where.paths(nnx.state(model, nnx.Param)) == ["bias", "kernel"]


def test_no_match_is_an_error_that_lists_the_paths():
    with pytest.raises(ValueError, match="matches no leaf.*embedding/kernel, layers/0/bias"):
        where.path("**/kernal").mask(PARAMS)


def test_no_match_of_the_default_says_how_to_choose():
    with pytest.raises(ValueError, match=r"kernels are the default: choose with \.on"):
        where.kernels.mask({"theta": np.ones(3)})


def test_no_match_lists_no_more_than_twenty_paths():
    with pytest.raises(ValueError, match="and 80 more"):
        where.path("x").mask({f"p{i}": 1.0 for i in range(100)})


def test_a_tree_without_leaves_has_nothing_to_match():
    assert where.path("x").mask({"a": None, "b": optax.MaskedNode()}) == {
        "a": None,
        "b": optax.MaskedNode(),
    }


def test_selectors_written_alike_are_equal_and_hash_alike():
    first, second = (where.path("a") & ~where.rank(at_least=2) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != where.path("b") & ~where.rank(at_least=2)
    assert not callable(first)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: where.path(""), "pattern: got ''"),
        (lambda: where.path(3), "pattern: got 3"),
        (lambda: where.rank(at_least=1.5), "at_least: got 1.5"),
        (lambda: where.rank(at_least=None), "at_least: got None"),
        (lambda: where.rank(at_least=3, at_most=1), "at_most: got 1; accepted: .* >= 3"),
        (lambda: where.predicate("kernel"), "function: got 'kernel'"),
        (lambda: where.path("a") & 3, "where: got 3; accepted: a selector"),
        (lambda: where.kernels_with(stacked=3), "stacked: got 3; accepted: a selector"),
        (lambda: where.kernels_with(stacked="a", axes=0), "axes: got 0; accepted: a whole"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
