"""Groups: which coordinates belong together, in one leaf and across several."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg import groups


def labels_of(rule: groups.Groups, shape: tuple[int, ...]) -> np.ndarray:
    """The number of each coordinate's group, read off through the public methods."""
    bound = rule.of(shape)
    count = bound.sizes.size
    figures = jnp.arange(count, dtype=jnp.float32).reshape(bound.sizes.shape)
    return np.broadcast_to(np.asarray(bound.spread(figures), int), shape)


@pytest.mark.parametrize(
    ("rule", "shape", "expected"),
    [
        (groups.units, (2, 3), [[0, 1, 2], [0, 1, 2]]),
        (groups.whole, (2, 3), [[0, 0, 0], [0, 0, 0]]),
        (groups.axes(1), (2, 3), [[0, 0, 0], [1, 1, 1]]),
        (groups.axes(-1), (2, 3), [[0, 0, 0], [1, 1, 1]]),
        (groups.axes(0, 1), (2, 3), [[0, 0, 0], [0, 0, 0]]),
        (groups.axes(), (2, 3), [[0, 1, 2], [3, 4, 5]]),
        (groups.blocks(-1, 2), (2, 4), [[0, 0, 1, 1], [0, 0, 1, 1]]),
        (groups.blocks(1, 2), (2, 4), [[0, 0, 1, 1], [2, 2, 3, 3]]),
        (groups.ids([[0, 1, 0], [2, 1, 0]]), (2, 3), [[0, 1, 0], [2, 1, 0]]),
        (groups.ids([0, 0, 1, 1]), (4,), [0, 0, 1, 1]),
    ],
)
def test_each_rule_makes_the_groups_it_says(rule, shape, expected):
    np.testing.assert_array_equal(labels_of(rule, shape), expected)
    bound, x = rule.of(shape), np.random.default_rng(0).normal(size=shape).astype(np.float32)
    flat = np.asarray(expected)
    count = flat.max() + 1
    sums = [x[flat == g].sum() for g in range(count)]
    np.testing.assert_allclose(np.ravel(bound.sum(jnp.asarray(x))), sums, rtol=1e-5)
    peaks = [np.abs(x[flat == g]).max() for g in range(count)]
    np.testing.assert_allclose(np.ravel(bound.max(jnp.abs(x))), peaks, rtol=1e-6)
    np.testing.assert_array_equal(bound.sizes.ravel(), np.bincount(flat.ravel()))


def test_axes_and_integer_arrays_stand_for_groups():
    assert jaxreg.GroupLasso(0.1, groups=0).groups == groups.axes(0)
    assert jaxreg.GroupLasso(0.1, groups=(0, 2)).groups == groups.axes(0, 2)
    assert jaxreg.GroupLasso(0.1, groups=np.array([0, 1])).groups == groups.ids([0, 1])
    assert hash(groups.ids([0, 1])) == hash(groups.ids(np.array([0, 1], np.int64)))
    assert groups.ids([0, 1]) != groups.ids([1, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: groups.ids([0, 2, 0]), "ids: got numbers up to 2 without 1, an empty group"),
        (lambda: groups.ids([0, 2**32]), "ids: got an array that holds 4294967296; accepted"),
        (lambda: groups.ids([0, -1]), "ids: got an array that holds -1; accepted: integers >= 0"),
        (lambda: groups.ids([0.5, 1.0]), "ids: got an array .*float64; accepted: .*integers"),
        (lambda: groups.axes(0.5), "axes: got 0.5; accepted: an integer"),
        (lambda: groups.blocks(0, 2), "sizes: got 0; accepted: integers >= 1, or -1"),
        (lambda: jaxreg.GroupLasso(0.1, groups="rows"), "groups: got 'rows'; accepted: groups"),
        (lambda: jaxreg.GroupLasso(0.1, weights=[1.0, -1.0]), "weights: got .* holds -1.0"),
    ],
)
def test_bad_groups_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (jaxreg.GroupLasso(0.1, groups=2), r"groups: got groups.axes\(2\); accepted: axes from -2"),
        (jaxreg.GroupLasso(0.1, groups=(0, -2)), r"groups: .*accepted: axes that differ"),
        (jaxreg.GroupLasso(0.1, groups=groups.ids([0, 1])), r"groups: got ids of shape \(2,\)"),
        (jaxreg.GroupLasso(0.1, groups=groups.blocks(-1, 4)), "groups: .*each a divisor"),
        (jaxreg.GroupLasso(0.1, groups=groups.blocks(2)), "groups: .*one block size for each"),
        (jaxreg.GroupLasso(0.1, weights=[1.0, 2.0]), r"weights: .*accepted: .*shape \(6,\)"),
    ],
)
def test_groups_that_do_not_fit_are_refused(penalty, message):
    for method in (penalty.prox, penalty.value):
        with pytest.raises(ValueError, match=f"^{message}"):
            method(jnp.ones((4, 6)))


def test_units_of_a_vector_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"groups: got groups.units.*accepted: groups.whole"):
        jaxreg.GroupLasso(0.1).prox(jnp.ones(3))


def test_weights_are_the_root_of_the_size_by_default():
    x = jnp.array([3.0, 4.0, 2.0])
    uneven = jaxreg.GroupLasso(1.0, groups=groups.ids([0, 0, 1]))
    np.testing.assert_allclose(uneven.value(x), np.sqrt(2) * 5 + 2)
    weighted = jaxreg.GroupLasso(1.0, groups=groups.ids([0, 0, 1]), weights=[2.0, 0.0])
    assert weighted.value(x) == 10.0
    np.testing.assert_allclose(weighted.prox(x), [1.8, 2.4, 2.0], rtol=1e-6)
    assert jaxreg.GroupLasso(1.0, groups=1, weights=3.0).value(jnp.ones((2, 1))) == 6.0


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make",
    [
        lambda g: jaxreg.GroupLasso(0.4, groups=g),
        lambda g: jaxreg.SparseGroupLasso(0.2, 0.3, groups=g),
        lambda g: jaxreg.GroupMCP(0.4, groups=g),
        lambda g: jaxreg.GroupSCAD(0.4, groups=g),
        lambda g: jaxreg.ExclusiveLasso(0.4, groups=g),
        lambda g: jaxreg.LInf(0.4, groups=g),
        lambda g: jaxreg.L1Ball(0.4, groups=g),
        lambda g: jaxreg.Simplex(0.4, groups=g),
        lambda g: jaxreg.MaxNorm(0.4, groups=g),
        lambda g: jaxreg.UnitNorm(groups=g),
    ],
)
def test_ids_in_any_order_and_size_are_each_group_by_itself(make, x64):
    """An uneven, shuffled grouping against one call a group on that group's own array."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(5), [1, 2, 3, 5, 9]))
    x, grad = rng.normal(size=20), rng.normal(size=20)
    whole, split = make(groups.ids(labels)), make(groups.whole)
    steps = [0.7] + ([rng.uniform(0.2, 2, 20)] if whole.elementwise_step else [])
    for step in steps:
        found = np.asarray(whole.prox(x, step))
        for g in range(5):
            own = labels == g
            own_step = step if np.ndim(step) == 0 else step[own]
            np.testing.assert_allclose(found[own], split.prox(x[own], own_step), atol=1e-13)
        if whole.has_subdiff_distance:
            distance = np.asarray(whole.subdiff_distance(found, grad))
            for g in range(5):
                own = labels == g
                expected = split.subdiff_distance(found[own], grad[own])
                np.testing.assert_allclose(distance[own], expected, atol=1e-12)
    total = sum(float(split.value(found[labels == g])) for g in range(5))
    np.testing.assert_allclose(whole.value(found), total, rtol=1e-12)


def test_the_metric_prox_of_random_groups_is_optimal_to_rounding(x64):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(300), rng.integers(1, 9, 300))
    x, step = rng.normal(size=labels.size), 10 ** rng.uniform(-4, 4, labels.size)
    step[rng.random(labels.size) < 0.1] = 0.0
    penalty = jaxreg.GroupLasso(0.5, groups=groups.ids(labels))
    w = np.asarray(penalty.prox(x, step))
    assert (w[step == 0] == x[step == 0]).all()
    moved = step > 0
    grad = np.where(moved, (w - x) / np.where(moved, step, 1), 0)
    distance = np.asarray(penalty.subdiff_distance(w, grad))
    # In the units of the gradient, whose rounding error is that of w over the step.
    assert (distance[moved] <= 1e-13 + 1e-14 / step[moved]).all()
    norm_w = np.sqrt(np.bincount(labels, w**2))
    assert 0 < (norm_w == 0).sum() < 300


def test_attention_heads_and_conv_filters_vanish_as_a_whole():
    heads = jax.random.normal(jax.random.key(0), (8, 4, 3)).at[:, 1].mul(1e-3)
    pruned = jaxreg.GroupLasso(0.1, groups=groups.axes(0, 2)).prox(heads)
    assert (pruned == 0).all((0, 2)).tolist() == [False, True, False, False]
    merged = jaxreg.GroupLasso(0.1, groups=groups.blocks(-1, 3)).prox(heads.reshape(8, 12))
    chex.assert_trees_all_close(merged.reshape(8, 4, 3), pruned, rtol=1e-6)
    filters = jax.random.normal(jax.random.key(0), (3, 3, 2, 5)).at[..., 4].mul(1e-3)
    assert (jaxreg.GroupLasso(0.1).prox(filters) == 0).all((0, 1, 2)).tolist() == [False] * 4 + [
        True
    ]


# Groups that span several leaves ---------------------------------------------------------------

NEURON = {"kernel": 0, "bias": ()}


def layer(scale=1.0):
    return {"kernel": jnp.array([[3.0, 0.1], [0.0, 0.1]]), "bias": scale * jnp.array([4.0, 0.1])}


def test_value_and_prox_of_a_joint_group_use_the_joint_norm():
    joint = jaxreg.Joint(jaxreg.GroupLasso(2.5, weights=1.0), NEURON)
    np.testing.assert_allclose(joint.value(layer()), 2.5 * (5 + np.sqrt(0.03)), rtol=1e-6)
    pruned = joint.prox(layer())
    np.testing.assert_allclose(pruned["kernel"], [[1.5, 0.0], [0.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(pruned["bias"], [2.0, 0.0], rtol=1e-6)
    steps = jax.tree.map(jnp.ones_like, layer())
    chex.assert_trees_all_close(joint.prox(layer(), steps), pruned, rtol=1e-5)


def test_a_joint_penalty_has_optimality_checks_of_its_own():
    joint = jaxreg.Joint(jaxreg.SparseGroupLasso(0.1, 0.4), NEURON)
    w = joint.prox(layer(), 0.5)
    grad = jax.tree.map(lambda w, x: (w - x) / 0.5, w, layer())
    for found in (joint.subdiff_distance(w, grad), joint.residual(w, grad, 0.2)):
        chex.assert_trees_all_close(found, jax.tree.map(jnp.zeros_like, w), atol=1e-5)
    critical = joint.critical_multiplier(grad)
    above = (1.001 * critical * joint).prox(jax.tree.map(jnp.negative, grad))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(above))


def test_joint_groups_of_conv_filters_and_of_mixed_dtypes():
    filters = {
        "kernel": jax.random.normal(jax.random.key(0), (3, 3, 2, 4)).astype(jnp.bfloat16),
        "bias": jnp.arange(4.0),
    }
    joint = jaxreg.Joint(jaxreg.GroupLasso(0.3), {"kernel": (0, 1, 2), "bias": ()})
    pruned = joint.prox(filters)
    chex.assert_trees_all_equal_shapes_and_dtypes(pruned, filters)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), filters)
    norm = jnp.sqrt((wide["kernel"] ** 2).sum((0, 1, 2)) + wide["bias"] ** 2)
    scale = jnp.maximum(1 - 0.3 * np.sqrt(19) / norm, 0)
    np.testing.assert_allclose(pruned["bias"], wide["bias"] * scale, rtol=1e-5)


def test_a_joint_penalty_prunes_whole_neurons_in_an_optimizer():
    params = {"encoder": layer(), "head": layer(0.1), "scale": jnp.ones(2)}
    grads = jax.tree.map(jnp.zeros_like, params)
    joint = jaxreg.Joint(jaxreg.GroupLasso(1.0, weights=1.0), NEURON)
    for tx in (jaxreg.prox_sgd(0.5, joint), jaxreg.prox_adam(0.5, joint)):
        updates, _ = tx.update(grads, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        for name in ("encoder", "head"):
            chex.assert_trees_all_close(after[name], joint.prox(params[name], 0.5), rtol=1e-6)
        assert after["encoder"]["bias"][1] == 0  # not a kernel, but a member
        chex.assert_trees_all_equal(after["scale"], params["scale"])


def test_a_joint_penalty_spans_paths_below_a_common_parent():
    params = {"a": {"in": {"w": jnp.ones((2, 3))}, "out": {"w": jnp.ones((3, 5))}}}
    joint = jaxreg.Joint(jaxreg.GroupLasso(0.1), {"in/w": 0, "out/w": 1}).on("**/in/w")
    tx = jaxreg.prox_sgd(1.0, joint)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    expected = -0.1 * np.sqrt(7) / np.sqrt(7)
    np.testing.assert_allclose(updates["a"]["out"]["w"], np.full((3, 5), expected), rtol=1e-5)


def test_a_joint_penalty_needs_one_gain_or_an_elementwise_step():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    joint = jaxreg.Joint(jaxreg.GroupMCP(0.1), NEURON)

    def two_gains(state, params):
        return {"kernel": jnp.float32(1), "bias": jnp.float32(100)}

    jaxreg.proximal(optax.identity(), 0.1, joint).init(params)
    with pytest.raises(ValueError, match="penalty: got Joint.*one gain"):
        jaxreg.proximal(optax.identity(), 0.1, joint, metric=two_gains).init(params)


@pytest.mark.usefixtures("strict")
def test_joint_leaves_may_differ_in_dtype_under_strict_promotion():
    mixed = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.ones(3)}
    joint = jaxreg.Joint(jaxreg.GroupLasso(jnp.float32(0.1)), NEURON)
    chex.assert_trees_all_equal_shapes_and_dtypes(joint.prox(mixed), mixed)


def test_the_selector_of_the_part_is_that_of_the_joint_penalty():
    joint = jaxreg.Joint(jaxreg.GroupLasso(0.1).on("a/kernel"), NEURON)
    assert joint.where == jaxreg.where.path("a/kernel")
    shown = "Joint(GroupLasso(0.1), {'kernel': (0,), 'bias': ()}).on(where.path('a/kernel'))"
    assert repr(joint) == f"({shown.partition('.on')[0]}).on{shown.partition('.on')[2]}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxreg.Joint(jaxreg.GroupLasso(0.1), {"kernel": 0}), "members: got .* a dict of"),
        (lambda: jaxreg.Joint(0.1, NEURON), "penalty: got 0.1; accepted: a jaxreg penalty"),
        (lambda: jaxreg.Joint(jaxreg.GroupLasso(0.1), {"a": "x", "b": 0}), "members: got 'a': 'x'"),
        (lambda: jaxreg.Joint(jaxreg.L1(0.1), NEURON), "penalty: got L1.*groups=groups.units"),
        (
            lambda: jaxreg.Joint(jaxreg.GroupLasso(0.1), NEURON).prox({"kernel": jnp.ones((2, 2))}),
            "x: got .*accepted: a dict of arrays called kernel, bias",
        ),
        (
            lambda: jaxreg.Joint(jaxreg.GroupLasso(0.1), NEURON).value(
                {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(2)}
            ),
            "members: got .*'kernel': 3.*accepted: leaves with the same number of groups",
        ),
        (
            lambda: jaxreg.prox_sgd(0.1, jaxreg.Joint(jaxreg.GroupLasso(0.1), NEURON)).init(
                {"a": {"kernel": jnp.ones((2, 2))}}
            ),
            "members: got the leaf a/kernel; accepted: a tree with the leaf a/bias",
        ),
        (
            lambda: jaxreg.prox_sgd(
                0.1, jaxreg.Joint(jaxreg.GroupLasso(0.1), NEURON).on(jaxreg.where.everything)
            ).init({**layer(), "scale": jnp.ones(2)}),
            "where: .*which selects scale; accepted: leaves called kernel and their partners",
        ),
    ],
)
def test_members_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
