"""Norms of trees, in every precision and at both ends of the range."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

import jaxreg
from jaxreg import norms as norms_module

pytestmark = pytest.mark.core

WAYS = ("norms_by_branch", "norms_by_select")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each of the two ways that a norm is taken: the first on CPUs, the second elsewhere."""

    def only_one(*, cpu, default):
        return cpu() if request.param == "norms_by_branch" else default()

    monkeypatch.setattr(jax.lax, "platform_dependent", only_one)
    return request.param


def exact(leaves):
    """In NumPy's float64, or wider."""
    total = np.longdouble(0)
    for leaf in leaves:
        x = np.asarray(leaf)
        parts = [x.real, x.imag] if np.iscomplexobj(x) else [x]
        total += sum((part.astype(np.longdouble) ** 2).sum() for part in parts)
    return np.float64(np.sqrt(total))


def sizes(leaves):
    return sum(np.size(leaf) for leaf in leaves)


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16", "complex64"])
def test_agrees_with_float64_in_every_dtype(name, way, x64):
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=shape) for shape in ((7, 5), (), (31,))]
    leaves = [
        jnp.asarray(x + 1j * x[..., ::-1] if name == "complex64" and x.ndim else x, name)
        for x in leaves
    ]
    tree = {"a": leaves[0], "b": leaves[1:]}
    tolerance = 1e-14 if name == "float64" else 2e-7
    norm, rms = jaxreg.global_norm(tree), jaxreg.rms(tree)
    assert norm.dtype == rms.dtype == (jnp.float64 if name == "float64" else jnp.float32)
    np.testing.assert_allclose(norm, exact(leaves), rtol=tolerance)
    np.testing.assert_allclose(rms, exact(leaves) / sizes(leaves) ** 0.5, rtol=tolerance)
    each = jaxreg.leaf_norms(tree)
    assert jax.tree.structure(each) == jax.tree.structure(tree)
    for found, leaf in zip(jax.tree.leaves(each), leaves, strict=True):
        assert found.dtype == norm.dtype
        np.testing.assert_allclose(found, exact([leaf]), rtol=tolerance)


def test_a_tree_of_mixed_dtypes_has_the_widest_of_them(x64):
    tree = {"a": jnp.ones(2, jnp.float64), "b": jnp.ones(2, jnp.bfloat16)}
    assert jaxreg.global_norm(tree).dtype == jnp.float64
    assert jaxreg.leaf_norms(tree)["b"].dtype == jnp.float64
    assert float(jaxreg.rms(tree)) == 1.0
    assert jaxreg.global_norm({"z": jnp.ones(2, complex)}).dtype == jnp.float64


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        # optax: 8.0, as it adds up the squares of leaves in bf16
        ([np.full(1, 0.400390625)] * 1000, 12.66),
        # optax: 5.66
        ([np.full(1000, 0.01)] * 2000, 14.16),
    ],
    ids=["1000 leaves", "2000 leaves"],
)
@pytest.mark.parametrize("way", ["norms_by_select"], indirect=True)
def test_many_bf16_leaves_are_summed_in_float32(leaves, expected, way):
    """By one way: XLA's time for the other's branch grows as the square of the leaves."""
    leaves = [jnp.asarray(x, jnp.bfloat16) for x in leaves]
    found = float(jaxreg.global_norm(leaves))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found == pytest.approx(exact(leaves), rel=1e-5)


RANGE = [
    ([300.0, 300.0], "float16", 300 * np.sqrt(2)),  # optax: inf
    ([6e-8, 6e-8], "float16", 2**-24 * np.sqrt(2)),  # the smallest float16
    ([1e20], "float32", 1e20),  # optax: inf
    ([1e-30], "float32", 1e-30),  # optax: 0
    ([3e20, 4e20], "float32", 5e20),
    ([3e-30, 4e-30], "float32", 5e-30),
    ([3e38], "float32", 3e38),
    ([3e38, 3e38], "float32", np.inf),  # as the norm is
    ([3e38, 1e-30], "float32", 3e38),
    ([2e-38], "float32", 2e-38),
    ([0.0, 0.0], "float32", 0.0),
    ([-0.0], "float32", 0.0),
    ([1.0, 1e-30], "float32", 1.0),
    ([3e38], "bfloat16", float(jnp.bfloat16(3e38))),
    ([1e-30], "bfloat16", float(jnp.bfloat16(1e-30))),
    ([3e20 + 4e20j], "complex64", 5e20),
    ([3e-30 + 4e-30j], "complex64", 5e-30),
    ([np.inf, 1.0], "float32", np.inf),
    ([-np.inf, 1.0], "float32", np.inf),
    ([np.inf, 3e38], "float32", np.inf),
    ([np.inf, 1e-30], "float32", np.inf),
    ([np.nan, 1.0], "float32", np.nan),
    ([np.nan, np.inf], "float32", np.nan),
    ([np.nan, 3e20], "float32", np.nan),
    ([np.nan, 1e-30], "float32", np.nan),
    ([complex(0, np.nan)], "complex64", np.nan),
    ([complex(np.inf, 1)], "complex64", np.inf),
]


@pytest.mark.parametrize(("values", "dtype", "expected"), RANGE, ids=str)
def test_is_right_at_both_ends_of_the_range(values, dtype, expected, way):
    all_norms = lambda x: (jaxreg.global_norm(x), jaxreg.leaf_norms([x])[0], jaxreg.rms(x))  # noqa: E731
    norm, of_leaf, rms = jax.jit(all_norms)(jnp.array(values, dtype))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
    np.testing.assert_allclose(of_leaf, expected, rtol=1e-6)
    np.testing.assert_allclose(rms, expected / len(values) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_hundreds_of_leaves_of_any_size_in_groups(scale, way):
    """Sums of many leaves are taken a few at a time; large leaves are scaled each by itself."""
    rng = np.random.default_rng(0)
    shapes = [(5000,) if i % 100 == 0 else (1 + i % 3,) for i in range(300)]
    leaves = [(scale * rng.normal(size=shape)).astype(np.float32) for shape in shapes]
    groups = [leaves[:290], leaves[290:], []]
    found = norms_module.norms_of_groups([[jnp.asarray(x) for x in group] for group in groups])
    np.testing.assert_allclose(found, [exact(group) for group in groups], rtol=1e-6)


def test_denormal_entries_count_in_full_or_as_zero(way):
    """XLA's CPU code takes them for 0: then the norm is 0, not a wrong number."""
    found = float(jaxreg.global_norm(jnp.array([3e-45, 4e-45], jnp.float32)))
    assert found == 0 or found == pytest.approx(float(np.hypot(*np.float32([3e-45, 4e-45]))))
    many = [jnp.array([1e-41], jnp.float32), jnp.array([2e-30], jnp.float32)]
    np.testing.assert_allclose(jaxreg.global_norm(many), 2e-30, rtol=1e-6)


def test_each_group_is_scaled_for_itself(way):
    """One that overflows, one that underflows, one of zeros and one with a NaN, side by side."""
    tree = {"big": [3e30, 4e30], "small": [3e-30, 4e-30], "zero": [0.0], "nan": [np.nan], "one": 1}
    tree = {name: jnp.asarray(x, jnp.float32) for name, x in tree.items()}
    found = jaxreg.leaf_norms(tree)
    expected = {"big": 5e30, "small": 5e-30, "zero": 0.0, "nan": np.nan, "one": 1.0}
    for name, norm in expected.items():
        np.testing.assert_allclose(found[name], norm, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-200, -150, 0, 150, 200])
def test_float64_squares_out_of_range(exponent, way, x64):
    x = jnp.array([3.0, 4.0]) * 10.0**exponent
    np.testing.assert_allclose(jaxreg.global_norm(x), 5 * 10.0**exponent, rtol=1e-14)


# From 1e-37 on, entries are among denormal numbers, which some machines take for 0.
@given(exponent=st.integers(-33, 36), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_scales_with_its_argument(exponent, seed):
    x = np.random.default_rng(seed).normal(size=17).astype(np.float32)
    scaled = (x.astype(np.float64) * 10.0**exponent).astype(np.float32)
    np.testing.assert_allclose(jaxreg.global_norm(scaled), exact([scaled]), rtol=1e-6)


@given(low=st.integers(-33, 36), high=st.integers(-33, 36), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_both_ways_agree_for_entries_of_any_two_sizes(low, high, seed):
    rng = np.random.default_rng(seed)
    leaves = [(rng.normal(size=9) * 10.0**exponent).astype(np.float32) for exponent in (low, high)]

    def total(numbers):
        return jnp.stack([numbers[0], numbers[1], numbers[0] + numbers[1]])

    sums = norms_module._Sums([*map(jnp.asarray, leaves)], [0, 1], total, jnp.dtype("float32"))
    expected = [exact([leaves[0]]), exact([leaves[1]]), exact(leaves)]
    np.testing.assert_allclose(sums.norms_by_select(), expected, rtol=1e-6)
    # The scales of a branch are those of a group: here of the first two alone.
    np.testing.assert_allclose(jaxreg.leaf_norms(leaves), expected[:2], rtol=1e-6)


# Trees -------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: Any
    bias: Any


class Model(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, rngs=rngs)
        self.scale = nnx.Param(jnp.full((2,), 3.0))


def linen_params():
    return linen.Dense(3).init(jax.random.key(0), jnp.ones((2, 4)))["params"]


TREES = {
    "nnx": lambda: nnx.state(Model(nnx.Rngs(0)), nnx.Param),
    "linen": linen_params,
    "namedtuple": lambda: Layer(jnp.ones((3, 2)), (jnp.arange(3.0), None)),
    "masked": lambda: {"a": jnp.array([3.0, 4.0]), "b": optax.MaskedNode(), "c": None},
    "zero-size": lambda: [jnp.zeros((0, 3)), jnp.array([2.0]), jnp.zeros((3, 0))],
    "array": lambda: jnp.array(3.0),
    "numpy": lambda: {"a": np.array([3.0, 4.0], np.float32)},
}


@pytest.mark.parametrize("name", TREES)
def test_any_tree(name, way):
    tree = TREES[name]()
    leaves = jax.tree.leaves(tree)
    np.testing.assert_allclose(jaxreg.global_norm(tree), exact(leaves), rtol=1e-6)
    np.testing.assert_allclose(jaxreg.rms(tree), exact(leaves) / sizes(leaves) ** 0.5, rtol=1e-6)
    each = jaxreg.leaf_norms(tree)
    assert jax.tree.structure(each) == jax.tree.structure(tree)
    for found, leaf in zip(jax.tree.leaves(each), leaves, strict=True):
        np.testing.assert_allclose(found, exact([leaf]), rtol=1e-6)


def test_trees_without_entries_have_norm_zero():
    for tree in ({}, None, [jnp.zeros((0, 3))], optax.MaskedNode()):
        assert float(jaxreg.global_norm(tree)) == 0.0
        assert float(jaxreg.rms(tree)) == 0.0
        chex.assert_trees_all_equal(
            jaxreg.leaf_norms(tree), jax.tree.map(lambda x: jnp.zeros(()), tree)
        )


@pytest.mark.parametrize("bad", [np.arange(3), np.array([True])])
@pytest.mark.parametrize("norm", [jaxreg.global_norm, jaxreg.leaf_norms, jaxreg.rms])
def test_a_leaf_that_is_not_floating_is_named(bad, norm):
    with pytest.raises(
        ValueError, match=f"tree: got {jnp.asarray(bad).dtype} values on the leaf a/0"
    ):
        norm({"a": [bad]})


# Transformations ---------------------------------------------------------------------------------


def test_gradient_is_the_unit_vector_and_zero_at_zero(way):
    grad = jax.grad(jaxreg.global_norm)
    chex.assert_trees_all_close(grad(jnp.array([3.0, 4.0])), jnp.array([0.6, 0.8]))
    chex.assert_trees_all_equal(grad(jnp.zeros(2)), jnp.zeros(2))  # optax: NaN
    for scale in (1e-30, 1e20, 1e37):
        chex.assert_trees_all_close(grad(jnp.array([3.0, 4.0]) * scale), jnp.array([0.6, 0.8]))
    z = jax.grad(jaxreg.global_norm)(jnp.array([3 + 4j]))
    chex.assert_trees_all_close(z, jax.grad(lambda z: jnp.abs(z).sum())(jnp.array([3 + 4j])))


def test_a_nan_makes_the_gradient_nan():
    assert np.isnan(jax.grad(jaxreg.global_norm)(jnp.array([1.0, np.nan]))).all()


def test_gradients_of_leaf_norms_and_rms(x64):
    tree = {"a": jnp.array([3.0, 4.0]), "b": jnp.zeros(2)}
    weighted = lambda tree: jaxreg.leaf_norms(tree)["a"] * 2 + jaxreg.leaf_norms(tree)["b"]  # noqa: E731
    chex.assert_trees_all_close(
        jax.grad(weighted)(tree), {"a": jnp.array([1.2, 1.6]), "b": jnp.zeros(2)}
    )
    chex.assert_trees_all_close(jax.grad(jaxreg.rms)(tree)["a"], jnp.array([0.3, 0.4]))


def test_the_second_derivative_is_right_and_zero_at_zero(way, x64):
    x = jnp.array([3.0, 4.0, 12.0])
    hessian = (np.eye(3) - np.outer(x, x) / 169) / 13
    chex.assert_trees_all_close(jax.hessian(jaxreg.global_norm)(x), hessian, atol=1e-14)
    chex.assert_trees_all_equal(jax.hessian(jaxreg.global_norm)(jnp.zeros(2)), jnp.zeros((2, 2)))


def test_jit_and_vmap_equal_a_loop(way):
    stack = jnp.array([[3.0, 4.0], [3e-30, 4e-30], [3e30, 4e30], [0.0, 0.0], [1.0, np.nan]])
    for norm in (jaxreg.global_norm, jaxreg.rms, lambda x: jaxreg.leaf_norms([x])[0]):
        looped = jnp.stack([norm(x) for x in stack])
        np.testing.assert_allclose(jax.vmap(norm)(stack), looped, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(jax.vmap(norm))(stack), looped, rtol=1e-6)
    grads = jax.vmap(jax.grad(jaxreg.global_norm))(stack)
    chex.assert_trees_all_close(grads[:4], jnp.array([[0.6, 0.8]] * 3 + [[0.0, 0.0]]), rtol=1e-6)


@pytest.mark.usefixtures("strict")
def test_works_under_strict_promotion(way):
    tree = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(5), "z": jnp.ones(3, jnp.complex64)}
    np.testing.assert_allclose(jaxreg.global_norm(tree), 12**0.5, rtol=1e-6)
    np.testing.assert_allclose(jaxreg.rms(tree), 1, rtol=1e-6)
    assert float(jaxreg.leaf_norms(tree)["a"]) == 2


@pytest.mark.parametrize("norm", [jaxreg.global_norm, jaxreg.leaf_norms, jaxreg.rms])
def test_lowers_for_tpu_and_cuda_without_a_branch(norm):
    """A branch on what was computed would stop the queue of kernels there."""
    tree = {"a": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3)}
    for platform, branches in (("tpu", False), ("cuda", False), ("cpu", True)):
        exported = export.export(jax.jit(norm), platforms=(platform,))(tree)
        predicate = "(tensor<i1>) -> tensor<i32>"
        assert (predicate in exported.mlir_module()) == branches
    both = export.export(jax.jit(norm), platforms=("tpu", "cuda"))(tree)
    assert set(both.platforms) == {"tpu", "cuda"}
