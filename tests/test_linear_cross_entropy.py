"""The fused loss is that of its logits, and has them in blocks only."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sharded import collectives

import jaxreg

pytestmark = pytest.mark.core
linear, dense = jaxreg.linear_cross_entropy, jaxreg.smoothed_cross_entropy
JAX = tuple(int(n) for n in jax.__version__.split(".")[:2])


def problem(tokens, width, classes, seed=0, dtype=None):
    """Hidden states, a kernel, a bias and labels; in float64 where that is enabled."""
    rng = np.random.default_rng(seed)
    shapes = ((tokens, width), (width, classes), (classes,))
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.integers(0, classes, tokens))


def with_logits(hidden, kernel, labels, bias=None, *rest, **options):
    logits = hidden @ kernel if bias is None else hidden @ kernel + bias[None]
    return dense(logits, labels, *rest, **options)


OPTIONS = {
    "smoothed": {},
    "exact": {"smoothing": 0.0},
    "z_loss, cap, ignored": {"z_loss": 0.01, "soft_cap": 2.0, "ignore_index": 0},
    "weights, others": {"class_weights": True, "spread": "others"},
    "masked, weights": {"where": True, "smoothing": 0.3, "class_weights": True},
}


def chosen(name, labels, classes):
    rng = np.random.default_rng(1)
    found = dict(OPTIONS[name])
    if "class_weights" in found:
        found["class_weights"] = rng.uniform(0.5, 2, classes)
    if "where" in found:
        found["where"] = np.isin(np.arange(classes), labels) | (rng.random(classes) < 0.5)
    return found


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_value_and_gradient_are_those_of_the_logits(options, reduction, biased, x64):
    hidden, kernel, bias, labels = problem(13, 4, 257)
    bias = bias if biased else None
    some = chosen(options, labels, 257) | {"reduction": reduction}
    factors = jnp.linspace(-1, 2, 13) if reduction == "none" else 1.7

    def total(function, hidden, kernel, bias, **blocks):
        return jnp.sum(factors * function(hidden, kernel, labels, bias, **some, **blocks))

    numbers = (1, 2, 3) if biased else (1, 2)
    both = jax.value_and_grad(total, numbers)
    expected = both(with_logits, hidden, kernel, bias)
    for size in (None, 1, 5):
        found = both(linear, hidden, kernel, bias, block_size=size)
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-13)


@given(
    tokens=st.sampled_from([1, 2, 7, 12]),
    classes=st.sampled_from([1, 2, 31, 257]),
    size=st.integers(1, 13),
    seed=st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_any_number_of_tokens_classes_and_blocks(tokens, classes, size, seed):
    hidden, kernel, bias, labels = problem(tokens, 3, classes, seed, jnp.float32)

    def both(function, **blocks):
        def total(h, k, b):
            losses = function(h, k, labels, b, **blocks)
            return jnp.sum(jnp.sin(losses)), losses  # each token's loss by a factor of its own

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(hidden, kernel, bias)

    found, expected = both(linear, block_size=size), both(with_logits)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [128_256, 151_936])
def test_large_vocabularies(classes):
    hidden, kernel, _, labels = problem(3, 2, classes, dtype=jnp.float32)
    found = jax.grad(lambda k: linear(hidden, k, labels, reduction="mean", block_size=2))(kernel)
    expected = jax.grad(lambda k: with_logits(hidden, k, labels, reduction="mean"))(kernel)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-9)


def test_derivatives_by_the_smoothing_and_the_z_loss(x64):
    hidden, kernel, _, labels = problem(7, 3, 5)

    def total(function, reduction, e, z):
        return function(hidden, kernel, labels, None, e, z_loss=z, reduction=reduction).sum()

    for reduction in ("none", "mean"):
        found, expected = (
            jax.jit(jax.grad(functools.partial(total, f, reduction), (0, 1)))(0.1, 0.01)
            for f in (linear, with_logits)
        )
        chex.assert_trees_all_close(found, expected, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_second_derivatives(reduction, x64):
    """By reverse over reverse and by forward over reverse."""
    hidden, kernel, _, labels = problem(5, 3, 4)

    def total(function, kernel):
        losses = function(hidden, kernel, labels, z_loss=0.1, reduction=reduction)
        return jnp.sum(jnp.sin(losses))

    ours, plain = (functools.partial(total, f) for f in (linear, with_logits))
    expected = jax.jit(jax.hessian(plain))(kernel)
    for jacobian in (jax.jacfwd, jax.jacrev):
        found = jax.jit(jacobian(jax.grad(ours)))(kernel)
        chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-12)


def test_under_jit_scan_vmap_and_remat():
    hidden, kernel, bias, labels = problem(12, 3, 5, dtype=jnp.float32)

    def loss(hidden, labels):
        return linear(hidden, kernel, labels, bias, reduction="sum", block_size=2)

    expected = jax.grad(loss)(hidden, labels)  # not compiled as a whole
    chex.assert_trees_all_close(jax.jit(jax.grad(loss))(hidden, labels), expected, rtol=1e-6)
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))
    chex.assert_trees_all_close(remat(hidden, labels), expected, rtol=1e-6)
    parts = hidden.reshape(3, 4, 3), labels.reshape(3, 4)
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(*parts)
    chex.assert_trees_all_close(mapped.reshape(12, 3), expected, rtol=1e-5, atol=1e-6)
    scanned = jax.lax.map(lambda part: jax.grad(loss)(*part), parts)
    chex.assert_trees_all_close(scanned.reshape(12, 3), expected, rtol=1e-5, atol=1e-6)
    several = linear(parts[0], kernel, parts[1], bias)
    assert several.shape == (3, 4)
    assert linear(hidden[:0], kernel, labels[:0], reduction="mean") == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_products_are_accumulated_in_float32(dtype):
    """Of a thousand tokens, whose gradient in 16 bits would stand still."""
    hidden, kernel, bias, labels = problem(1000, 8, 33, dtype=dtype)
    numbers = (0, 1, 2)
    fused = jax.grad(
        lambda h, k, b: linear(h, k, labels, b, reduction="mean", block_size=100), numbers
    )
    found = jax.jit(fused)(hidden, kernel, bias)
    wide = [x.astype(jnp.float32) for x in (hidden, kernel, bias)]
    loss = lambda h, k, b: with_logits(h, k, labels, b, reduction="mean")  # noqa: E731
    for ours, exact in zip(found, jax.grad(loss, numbers)(*wide), strict=True):
        assert ours.dtype == dtype
        error = jnp.linalg.norm(ours.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
        assert error < 2.0**-8


def cost(loss, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_the_logits_are_never_whole_in_memory():
    tokens, width, classes = 2048, 16, 8192
    labels = jnp.arange(tokens)
    shapes = (tokens, width), (width, classes)
    whole = cost(lambda h, k: with_logits(h, k, labels, reduction="mean"), *shapes)
    for reduction in ("none", "mean"):
        fused = functools.partial(linear, labels=labels, reduction=reduction, block_size=64)
        assert cost(lambda h, k, f=fused: f(h, k).sum(), *shapes) < whole / 10


@pytest.mark.parametrize(("reduction", "products"), [("mean", 3), ("sum", 3), ("none", 4)])
def test_matrix_products(reduction, products):
    """Three with the gradient in the forward pass, as without blocks; else one more."""
    hidden, kernel, _, labels = problem(8, 3, 5, dtype=jnp.float32)
    loss = functools.partial(linear, labels=labels, reduction=reduction, block_size=4)
    both = jax.value_and_grad(lambda h, k: loss(h, k).sum(), (0, 1))
    program = str(jax.make_jaxpr(both)(hidden, kernel))
    assert program.count("dot_general[") == products


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_tokens_and_vocabulary_may_be_sharded_in_shard_map(reduction, check_vma):
    """The vocabulary's figures take two collectives a block: a maximum, and three sums at once."""
    hidden, kernel, bias, labels = problem(16, 3, 20, dtype=jnp.float32)
    some = {"z_loss": 0.01, "ignore_index": 2, "soft_cap": 3.0}
    mesh = jax.make_mesh((2, 4), ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec
    weights, exists = chosen("masked, weights", labels, 20)["class_weights"], jnp.arange(20) != 7
    exists = exists.at[labels].set(True)

    def local(hidden, kernel, bias, labels, weights, exists):
        losses = linear(
            hidden,
            kernel,
            labels,
            bias,
            **some,
            class_weights=weights,
            where=exists,
            reduction=reduction,
            block_size=2,
            axis_name="classes",
        )
        return jax.lax.psum(losses.sum(), "tokens")

    def loss(hidden, kernel, bias):
        specs = (spec("tokens"), spec(None, "classes"), spec("classes"), spec("tokens"))
        specs += (spec("classes"), spec("classes"))
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=spec(), check_vma=check_vma
        )
        return mapped(hidden, kernel, bias, labels, jnp.asarray(weights, jnp.float32), exists)

    def whole(hidden, kernel, bias):
        every = {**some, "class_weights": weights, "where": exists, "reduction": "sum"}
        return with_logits(hidden, kernel, labels, bias, **every)

    at = (hidden, kernel, bias)
    found = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*at)
    expected = jax.value_and_grad(whole, (0, 1, 2))(*at)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
    forward = jax.jit(loss).lower(*at).compile()
    # Beside the two of a block: one each for weights and classes, the weights at the labels, the
    # loss that all devices share, and the sum over tokens.
    assert collectives(forward)["all-reduce"] <= 2 + 5


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("of_hidden", "of_kernel"),
    [(("x", None), (None, None)), ((None, None), (None, "y")), (("x", None), (None, "y"))],
    ids=["tokens", "vocabulary", "both"],
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_sharded_arrays_under_jit_are_never_gathered(kind, of_hidden, of_kernel, reduction):
    hidden, kernel, _, labels = problem(16, 3, 20, dtype=jnp.float32)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    loss = lambda h, k: linear(h, k, labels, reduction=reduction, block_size=8).sum()  # noqa: E731
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            for x, spec in ((hidden, of_hidden), (kernel, of_kernel))
        ]
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*placed).compile()
        found = compiled(*placed)
    expected = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    assert collectives(compiled).keys() == {"all-reduce"}


HIDDEN, KERNEL, LABELS = jnp.zeros((4, 3)), jnp.zeros((3, 5)), jnp.zeros(4, int)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": jnp.zeros((4, 3), int)}, "hidden: .*int.*real floating"),
        ({"kernel": jnp.zeros(3)}, r"kernel: .*shape \(D, V\)"),
        ({"kernel": jnp.zeros((2, 5))}, "kernel: .*as many rows as hidden has features, 3"),
        ({"bias": jnp.zeros(4)}, r"bias: .*shape \(5,\), or None"),
        ({"bias": 0.1}, "bias: got 0.1; .*smoothing=... gives the smoothing"),
        ({"bias": "mean"}, "bias: got 'mean'"),
        ({"hidden": None}, "hidden: got None"),
        ({"where": [1, 1, 0, 1, 1]}, "where: .*5 bools"),
        ({"labels": jnp.zeros(3, int)}, r"labels: .*integers of shape \(4,\) in \[0, 5\)"),
        ({"labels": jnp.zeros((4, 5))}, r"labels: .*integers of shape \(4,\) in \[0, 5\)\."),
        ({"labels": jnp.full(4, 5)}, "labels: got the value 5"),
        ({"smoothing": 1.0}, "smoothing: got 1.0"),
        ({"where": jnp.ones((4, 5), bool)}, "where: .*5 bools"),
        ({"class_weights": jnp.ones(3)}, "class_weights: .*5 finite numbers"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"axis_name": "nowhere"}, "axis_name: got 'nowhere', which is not bound"),
        ({"reduction": "avg"}, "reduction: got 'avg'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    given = {"hidden": HIDDEN, "kernel": KERNEL, "labels": LABELS} | changes
    with pytest.raises(jaxreg.ArgumentError, match=message):
        linear(**given)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_derivative_in_the_class_weights_is_refused_and_not_zero(reduction):
    hidden, kernel, _, labels = problem(4, 3, 5, dtype=jnp.float32)

    def loss(weights, hidden):
        found = linear(hidden, kernel, labels, class_weights=weights, reduction=reduction)
        return jnp.sum(found)

    weights = jnp.array([1.0, 9.0, 2.0, 5.0, 0.1])
    for differentiate in (jax.grad(loss), jax.jit(jax.grad(loss, (0, 1)))):
        with pytest.raises(jaxreg.ArgumentError, match="class_weights: .*stop_gradient"):
            differentiate(weights, hidden)
    kept = jax.grad(lambda w, h: loss(jax.lax.stop_gradient(w**2), h), (0, 1))
    by_weights, by_hidden = kept(weights, hidden)
    assert not np.any(by_weights)
    assert np.any(by_hidden)
    chex.assert_trees_all_close(by_hidden, jax.grad(loss, 1)(weights**2, hidden))


def test_concrete_weights_of_a_jitted_function_are_checked():
    wrong = np.array([-1.0, 1, 1, 1, 1])
    with pytest.raises(jaxreg.ArgumentError, match="class_weights: .*-1.0"):
        jax.jit(lambda h: linear(h, KERNEL, LABELS, class_weights=wrong))(HIDDEN)


def test_a_traced_cap_is_refused_and_a_traced_label_out_of_range_is_nan():
    with pytest.raises(jaxreg.ArgumentError, match="soft_cap: got a traced number"):
        jax.jit(lambda c: linear(HIDDEN, KERNEL, LABELS, soft_cap=c))(2.0)
    found = jax.jit(lambda y: linear(HIDDEN, KERNEL, y))(jnp.array([0, -1, 5, 4]))
    assert np.isnan(found).tolist() == [False, True, True, False]


def test_what_a_kernel_has_for_masked_classes_reaches_no_gradient():
    hidden, kernel, bias, labels = problem(4, 3, 5, dtype=jnp.float32)
    labels, exists = labels % 4, jnp.arange(5) < 4

    def gradients(kernel, bias):
        loss = lambda h, k, b: linear(h, k, labels, b, where=exists, soft_cap=2.0).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(hidden, kernel, bias)

    spoilt = kernel.at[:, 4].set(jnp.nan), bias.at[4].set(jnp.inf)
    chex.assert_trees_all_close(gradients(*spoilt), gradients(kernel, bias))


def test_a_cap_leaves_impossible_classes_impossible():
    hidden, kernel, bias, labels = problem(4, 3, 5, dtype=jnp.float32)
    labels, bias = labels % 4, bias.at[4].set(-jnp.inf)
    some = {"smoothing": 0.0, "soft_cap": 2.0, "reduction": "sum"}
    both = [
        jax.value_and_grad(lambda h, k, f=f: f(h, k, labels, bias, **some), (0, 1))(hidden, kernel)
        for f in (linear, with_logits)
    ]
    without = with_logits(hidden, kernel[:, :4], labels, bias[:4], **some)
    np.testing.assert_allclose(both[0][0], without, rtol=1e-6)
    chex.assert_trees_all_close(*both, rtol=1e-5, atol=1e-6)
    chex.assert_tree_all_finite(both)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_what_ignored_tokens_hold_reaches_no_gradient(reduction):
    hidden, kernel, _, labels = problem(4, 3, 5, dtype=jnp.float32)
    labels = labels.at[1].set(-100)

    def gradients(hidden):
        def loss(hidden, kernel):
            found = linear(hidden, kernel, labels, ignore_index=-100, reduction=reduction)
            return found.sum()

        return jax.jit(jax.grad(loss, (0, 1)))(hidden, kernel)

    chex.assert_trees_all_close(gradients(hidden.at[1].set(jnp.nan)), gradients(hidden))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((None, None), "kernel: got an array that is the same along 'x'"),
        (("x", "x"), "axis_name: got 'x', along which the tokens are sharded"),
    ],
)
def test_arrays_that_are_not_cut_along_the_vocabulary_are_refused(specs, message):
    of_tokens, of_classes = specs
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec(of_tokens), PartitionSpec(None, of_classes), PartitionSpec(of_tokens))
    local = functools.partial(linear, reduction="sum", axis_name="x")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    with pytest.raises(jaxreg.ArgumentError, match=message):
        mapped(jnp.zeros((8, 3)), jnp.zeros((3, 16)), jnp.zeros(8, int))
