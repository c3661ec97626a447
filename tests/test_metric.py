"""The gain of a direction: read from optax's own links, or given as a metric."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg import metric
from jaxreg.transforms.reading import read

PARAMS = {
    "a": {"kernel": jnp.array([[2.0, -0.5], [1.0, 0.25]]), "bias": jnp.array([3.0, 0.01])},
    "b": jnp.array([0.5, -4.0, 1.0]),
}
GRADS = {
    "a": {"kernel": jnp.array([[0.3, -2.0], [1.5, 1e-3]]), "bias": jnp.array([1.0, -0.2])},
    "b": jnp.array([0.01, -4.0, 0.5]),
}
LABELS = {"a": "adam", "b": "momentum"}  # a prefix of params


def gains(direction, state, params=PARAMS, how="auto"):
    """The gains of a direction in a state, as a tree like params."""
    found = [gain.values() for gain in read(direction, how).gains(state, params)]
    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(found, leaves, strict=True)
    return treedef.unflatten([jnp.broadcast_to(g, p.shape) for g, p in pairs])


def settled(direction, steps=400):
    """What a direction gives for a constant gradient in the end, and its state then."""
    direction = read(direction, "auto").direction
    state = direction.init(PARAMS)
    update = jax.jit(lambda state: direction.update(GRADS, state, PARAMS))
    for _ in range(steps):
        updates, state = update(state)
    return updates, state


MASK = {"a": True, "b": False}
DIRECTIONS = {
    "identity": optax.identity(),
    "trace": optax.trace(0.9),
    "nesterov": optax.trace(0.75, nesterov=True),
    "adam": optax.scale_by_adam(),
    "adam, eps": optax.scale_by_adam(b1=0.0, b2=0.5, eps=1.0),
    "adam, eps_root": optax.scale_by_adam(eps=0.0, eps_root=9.0),
    "nadam": optax.scale_by_adam(nesterov=True),
    "nadam without momentum": optax.scale_by_adam(b1=0.0, nesterov=True),
    "amsgrad": optax.scale_by_amsgrad(b2=0.9, eps=0.1, eps_root=0.2),
    "adamax": optax.scale_by_adamax(eps=0.1),
    "rms": optax.scale_by_rms(),
    "rms, eps outside": optax.scale_by_rms(eps=0.1, eps_in_sqrt=False),
    "rms, corrected": optax.scale_by_rms(decay=0.999, bias_correction=True),
    "rms, started": optax.scale_by_rms(initial_scale=1.0),
    "stddev": optax.scale_by_stddev(eps=0.1),
    "rss": optax.scale_by_rss(),
    "rss from 0": optax.scale_by_rss(initial_accumulator_value=0.0),
    "scale": optax.chain(optax.scale(3.0), optax.trace(0.5)),
    "chain of chains": optax.chain(optax.chain(optax.trace(0.5)), optax.identity()),
    "two gains": optax.chain(optax.scale_by_rms(), optax.trace(0.5)),
    "momentum before adam": optax.chain(optax.trace(0.5), optax.scale_by_adam(b2=0.9)),
    "named": optax.named_chain(
        ("clip", optax.clip_by_global_norm(0.5)), ("adam", optax.scale_by_adam())
    ),
    "extra": optax.with_extra_args_support(optax.trace(0.5)),
    "masked": optax.masked(optax.scale_by_adam(eps=1.0), MASK),
    "masked by a function": optax.masked(
        optax.trace(0.5), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "two masks": optax.chain(
        optax.masked(optax.scale_by_adam(eps=1.0), MASK),
        optax.masked(optax.scale_by_adam(eps=3.0), {"a": False, "b": True}),
    ),
    "partition": optax.partition(
        {"adam": optax.scale_by_adam(), "momentum": optax.trace(0.9)}, LABELS
    ),
    "partition by a function": optax.partition(
        {2: optax.scale_by_adam(), 1: optax.trace(0.9)},
        lambda params: jax.tree.map(lambda p: p.ndim, params),
    ),
    "frozen": optax.chain(optax.trace(0.9), optax.masked(optax.set_to_zero(), MASK)),
    "clip": optax.chain(jaxreg.clip_by_global_norm(1.0), optax.trace(0.5)),
    "clip of some": optax.chain(
        optax.masked(jaxreg.clip_by_global_norm(1.0), MASK), optax.trace(0.5)
    ),
    "optax clip": optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.5)),
    "block clip": optax.chain(optax.clip_by_block_rms(0.5), optax.trace(0.5)),
    "normalized": optax.chain(optax.normalize_by_update_norm(), optax.trace(0.5)),
    "trust ratio": optax.chain(optax.scale_by_adam(), optax.scale_by_trust_ratio(0.1)),
    "masked trust ratio": optax.chain(
        optax.scale_by_adam(), optax.masked(optax.scale_by_trust_ratio(), MASK)
    ),
    "param norms": optax.chain(optax.scale_by_rms(), optax.scale_by_param_block_rms()),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_auto_reads_the_gain_on_a_constant_gradient(name):
    direction = DIRECTIONS[name]
    updates, state = settled(direction)
    expected = jax.tree.map(lambda gain, g: gain * g, gains(direction, state), GRADS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_that_records_its_gains_gives_the_same_updates(name):
    direction, (updates, _) = DIRECTIONS[name], settled(DIRECTIONS[name], steps=3)
    state = direction.init(PARAMS)
    for _ in range(3):
        expected, state = direction.update(GRADS, state, PARAMS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("direction", "gain"),
    [
        (optax.trace(0.9, accumulator_dtype=jnp.bfloat16), 10.0),
        (optax.trace(0.99999), 1e5),
        (optax.scale_by_adam(mu_dtype=jnp.bfloat16), 0.5),
    ],
)
def test_auto_reads_directions_that_never_settle_in_their_precision(direction, gain):
    g = jnp.full(3, 2.0)
    _, state = direction.update(g, direction.init(g))
    chex.assert_trees_all_close(gains(direction, state, g), jnp.full(3, gain), rtol=1e-5)


@pytest.mark.parametrize(
    ("direction", "explicit"),
    [
        (optax.trace(0.9), metric.momentum(0.9)),
        (optax.trace(0.9, nesterov=True), metric.nesterov(0.9)),
        (optax.scale_by_adam(b2=0.9, eps=0.1), metric.adam(b2=0.9, eps=0.1)),
        (optax.scale_by_amsgrad(eps=0.1), metric.amsgrad(eps=0.1)),
        (optax.scale_by_adamax(eps=0.1), metric.adamax(eps=0.1)),
        (optax.scale_by_rms(eps=0.1), metric.rmsprop(eps=0.1)),
        (optax.scale_by_stddev(eps=0.1), metric.rmsprop(eps=0.1, centered=True)),
        (optax.scale_by_rss(eps=0.1), metric.adagrad(eps=0.1)),
    ],
    ids=lambda x: x.update.__qualname__.split(".")[0] if hasattr(x, "update") else "",
)
def test_an_explicit_metric_says_what_auto_reads(direction, explicit):
    _, state = settled(direction, steps=3)
    found = jax.tree.map(lambda g: g, explicit(state, PARAMS))
    expected = gains(direction, state)
    if jax.tree.structure(found) != jax.tree.structure(expected):  # one number for all
        found = jax.tree.map(lambda p: jnp.full_like(p, found), PARAMS)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    chex.assert_trees_all_close(gains(direction, state, how=explicit), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "direction",
    [
        optax.scale_by_adam(),
        optax.scale_by_amsgrad(),
        optax.scale_by_adamax(),
        optax.scale_by_rms(),
        optax.scale_by_stddev(),
        optax.scale_by_rss(initial_accumulator_value=0.0),
    ],
    ids=lambda tx: tx.update.__qualname__.split(".")[0],
)
def test_a_coordinate_that_has_seen_no_gradient_has_gain_one(direction):
    g = jnp.array([0.0, 3.0])
    state = direction.init(g)
    for _ in range(3):
        _, state = direction.update(g, state)
    found = gains(direction, state, g)
    assert found[0] == 1
    assert found[1] != 1


@pytest.mark.parametrize(
    "direction",
    [
        optax.scale_by_lion(),
        optax.scale_by_sign(),
        optax.scale_by_radam(),
        optax.scale_by_yogi(),
        optax.contrib.scale_by_muon(),
        optax.scale_by_factored_rms(),
        optax.adaptive_grad_clip(0.1),
        optax.clip(1.0),
        optax.chain(optax.scale_by_adam(), optax.scale_by_lion()),
        optax.masked(optax.scale_by_lion(), True),
        optax.inject_hyperparams(optax.scale_by_adam)(b2=0.9),
        optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u, s)),
    ],
    ids=lambda tx: tx.update.__qualname__.split(".")[0],
)
def test_auto_refuses_what_it_does_not_know_and_names_the_remedy(direction):
    with pytest.raises(ValueError, match=r"^metric: got 'auto' for .*metric=, its gain"):
        jaxreg.proximal(direction, 0.1, jaxreg.L1(0.1))


def test_auto_refuses_traced_hyperparameters_but_takes_concrete_ones_under_jit():
    def step(b2, w):
        tx = jaxreg.proximal(optax.scale_by_adam(b2=b2), 0.1, jaxreg.L1(0.1))
        return tx.update(w, tx.init(w), w)[0]

    with pytest.raises(ValueError, match="traced settings"):
        jax.jit(step)(0.9, jnp.ones(2))
    chex.assert_trees_all_close(
        jax.jit(lambda w: step(0.9, w))(jnp.ones(2)), step(0.9, jnp.ones(2)), rtol=1e-6
    )


def test_auto_notices_a_link_that_does_not_do_what_its_name_says():
    def lying_trace(decay):
        honest = optax.trace(decay)

        def trace(decay, nesterov, accumulator_dtype):
            def update_fn(updates, state, params=None):
                _ = decay, nesterov, accumulator_dtype
                updates, state = honest.update(updates, state, params)
                return jax.tree.map(lambda u: 3 * u, updates), state

            return update_fn

        update = trace(decay, False, None)
        update.__module__, update.__qualname__ = "optax.lies", "trace.<locals>.update_fn"
        return optax.GradientTransformation(honest.init, update)

    with pytest.raises(ValueError, match="not the gain expected"):
        read(lying_trace(0.9), "auto")


def test_an_explicit_metric_serves_any_direction():
    tx = jaxreg.proximal(optax.scale_by_lion(), 0.1, jaxreg.L1(1.0), metric=lambda s, p: 2.0)
    w = jnp.array([0.15])
    updates, _ = tx.update(jnp.array([0.0]), tx.init(w), w)
    assert (w + updates).tolist() == [0.0]


def test_an_explicit_metric_is_multiplied_by_clips_and_trust_ratios():
    """Which are no part of a metric: neither in a chain nor for some of the leaves."""
    links = (
        jaxreg.clip_by_global_norm(1.0),
        optax.masked(optax.clip_by_block_rms(0.1), MASK),
        optax.trace(0.5),
        optax.scale_by_trust_ratio(0.1),
    )
    _, state = settled(optax.chain(*links), steps=5)
    found = gains(optax.chain(*links), state, how=metric.momentum(0.5))
    chex.assert_trees_all_close(found, gains(optax.chain(*links), state), rtol=1e-6)


def test_a_clip_where_its_coefficient_can_not_be_read_is_refused():
    inside = optax.apply_if_finite(jaxreg.clip_by_global_norm(1.0), 3)
    tx = jaxreg.proximal(inside, 0.1, jaxreg.L1(0.1), metric=metric.sgd())
    with pytest.raises(ValueError, match="direction: got a clip inside optax.apply_if_finite"):
        tx.init(PARAMS)
    jaxreg.regularize(inside, 0.1).init(PARAMS)  # without a penalty there is nothing to scale


@pytest.mark.parametrize("mask", [MASK, {"a": True, "b": {"kernel": False, "bias": False}}])
def test_a_penalty_on_a_leaf_that_the_metric_has_no_gain_for_is_refused(mask):
    params = {"a": jnp.ones((2, 2)), "b": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    direction = optax.masked(optax.scale_by_adam(), mask)
    tx = jaxreg.proximal(direction, 0.1, jaxreg.L1(0.5), metric=metric.adam())
    with pytest.raises(ValueError, match="metric: got no gain for the leaf b/kernel"):
        tx.init(params)
    tx = jaxreg.proximal(direction, 0.1, jaxreg.L1(0.5).on("a"), metric=metric.adam())
    alone = jaxreg.prox_adam(0.1, jaxreg.L1(0.5))
    grads = jax.tree.map(lambda p: 0.3 * p, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = alone.update(grads["a"], alone.init(params["a"]), params["a"])
    chex.assert_trees_all_close(updates["a"], expected)
    chex.assert_trees_all_close(updates["b"], jax.tree.map(lambda p: -0.03 * p, params["b"]))


def test_the_adam_metric_needs_exactly_one_adam_state():
    tx = jaxreg.proximal(optax.trace(0.9), 0.1, jaxreg.L1(0.1), metric=metric.adam())
    with pytest.raises(ValueError, match="scale_by_adam for a direction with 0 such states"):
        tx.init(PARAMS)


# One gain a leaf ---------------------------------------------------------------------------------


def test_block_gives_adam_with_one_second_moment_a_leaf():
    """Written again in NumPy, for three steps."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(3, 4, 3))
    gradients[:, 0, 0] = 0  # never seen: its second moment of 0 counts
    w, m, v = rng.normal(size=(4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    penalty, tx = jaxreg.Nuclear(0.3), None
    tx = jaxreg.proximal(
        optax.scale_by_adam(b1=0.8, b2=0.9, eps=1e-3), 0.1, penalty, metric="block"
    )
    ours = jnp.asarray(w, jnp.float32)
    state = tx.init(ours)
    for t, g in enumerate(gradients, start=1):
        updates, state = tx.update(jnp.asarray(g, jnp.float32), state, ours)
        ours = optax.apply_updates(ours, updates)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        scale = np.sqrt(v / (1 - 0.9**t)) + 1e-3 * (v > 0)
        step = 0.1 / np.sqrt((scale**2).mean())
        w = np.asarray(penalty.prox(jnp.asarray(w - step * m / (1 - 0.8**t)), step))
    chex.assert_trees_all_close(ours, w.astype(np.float32), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("params", [jnp.zeros((0, 3)), jnp.zeros((2, 3))], ids=["empty", "unseen"])
def test_block_leaves_a_leaf_without_gradients_as_it_is(params):
    tx = jaxreg.proximal(optax.scale_by_adam(), 0.1, jaxreg.Nuclear(0.3), metric="block")
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, params)


def test_block_serves_a_metric_that_is_given():
    direction, w = optax.scale_by_adam(), jnp.array([[1.0, 2.0], [3.0, 4.0]])

    def updates(how):
        tx = jaxreg.proximal(direction, 0.1, jaxreg.Nuclear(0.3), metric=how)
        return tx.update(w, tx.init(w), w)[0]

    auto = updates("block")
    chex.assert_trees_all_close(updates(metric.block(metric.adam())), auto, rtol=1e-6)
    function = lambda state, params: jax.tree.map(lambda v: 1 / v, metric.adam().scale(state))  # noqa: E731
    chex.assert_trees_all_close(updates(metric.block(function)), auto, rtol=1e-5)


def test_a_penalty_that_needs_one_step_is_refused_with_the_remedy_unless_in_blocks():
    tx = jaxreg.prox_adam(0.1, jaxreg.Nuclear(0.3))
    with pytest.raises(ValueError, match="penalty: got Nuclear.*prox_sgd.*metric='block'"):
        tx.init(PARAMS["a"])


def test_a_joint_group_takes_one_step_only_where_its_leaves_share_it():
    joint = jaxreg.Joint(jaxreg.GroupMCP(0.3), {"kernel": 0, "bias": ()}).on("a/*")
    clip = optax.chain(jaxreg.clip_by_global_norm(1.0), optax.trace(0.9))
    jaxreg.proximal(clip, 0.1, joint).init(PARAMS)
    by_leaf = optax.chain(optax.clip_by_block_rms(1.0), optax.trace(0.9))
    for direction, how in ((by_leaf, "auto"), (optax.scale_by_adam(), "block")):
        with pytest.raises(ValueError, match="penalty: got .*one gain for all its numbers"):
            jaxreg.proximal(direction, 0.1, joint, metric=how).init(PARAMS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metric.momentum(1.0), "decay: got 1.0"),
        (lambda: metric.adam(b2=-0.1), "b2: got -0.1"),
        (lambda: metric.adam(eps=float("nan")), "eps: got nan"),
        (lambda: metric.rmsprop(decay=1.0), "decay: got 1.0"),
        (lambda: metric.adagrad(eps=-1.0), "eps: got -1.0"),
        (lambda: metric.block("adam"), "metric: got 'adam'"),
        (
            lambda: jaxreg.proximal(optax.identity(), 0.1, jaxreg.L1(0.1), metric="adam"),
            "metric: got 'adam'; accepted: 'auto', 'block'",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
