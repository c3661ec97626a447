"""What `jaxreg.explain` finds, for transformations of which it is known what they do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg.explanation import running

DRAW = np.random.default_rng(0)
PARAMS = {
    "dense": {
        "bias": jnp.zeros(5),
        "kernel": jnp.asarray(DRAW.normal(size=(6, 5)).astype(np.float32)),
    },
    "out": jnp.asarray(0.1 * DRAW.normal(size=(4, 3)).astype(np.float32)),
}
SMALL = {"bias": jnp.ones(4), "kernel": jnp.asarray(DRAW.normal(size=(5, 4)).astype(np.float32))}
LR, WD = 1e-3, 0.1
WARM = optax.warmup_cosine_decay_schedule(0.0, LR, 100, 1000)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def found(tx, params=PARAMS, **options):
    """Decay kind, decay and L2 by leaf, which are looked at most."""
    leaves = jaxreg.explain(tx, params, **options).leaves
    return {leaf.path: leaf for leaf in leaves}


def decays(tx, params=PARAMS, **options):
    leaves = found(tx, params, **options)
    return [(leaf.decay_kind, leaf.decay, leaf.l2) for leaf in leaves.values()]


def near(number):
    return pytest.approx(number, rel=1e-3)


NONE = ("none", 0.0, None)
L2 = optax.add_decayed_weights(0.01)


def step_of(rule, direction=None):
    """A small optimizer, u = direction(g) + rule(p - anchor, direction(g)), by hand."""
    inner = optax.adam(LR) if direction is None else direction

    def init(params):
        return inner.init(params), jax.tree.map(jnp.copy, params)

    def update(grads, state, params=None):
        updates, after = inner.update(grads, state[0], params)
        return jax.tree.map(rule, updates, params, state[1]), (after, state[1])

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.sgd(0.1), NONE),
        (optax.sgd(0.1, 0.9, nesterov=True), NONE),
        (optax.adam(LR), NONE),
        (optax.adamw(LR, weight_decay=WD), ("decoupled", LR * WD, None)),
        (optax.chain(L2, optax.sgd(0.1)), ("decoupled", 1e-3, None)),  # the same without memory
        (optax.chain(L2, optax.sgd(0.1, 0.9)), ("coupled", 0.0, 0.01)),
        (optax.chain(L2, optax.adam(LR)), ("coupled", 0.0, 0.01)),
        (optax.chain(L2, optax.adamw(LR, weight_decay=WD)), ("decoupled", LR * WD, 0.01)),
        (
            optax.chain(optax.scale_by_adam(), L2, optax.scale(-LR)),
            ("decoupled", LR * 0.01, None),
        ),
        (optax.lion(LR, weight_decay=WD), ("decoupled", LR * WD, None)),
        (optax.lamb(LR), NONE),
        (optax.lamb(LR, weight_decay=WD), ("unknown", None, None)),
        (optax.lars(LR, weight_decay=WD), ("unknown", None, None)),
        (optax.adafactor(LR), NONE),
        (optax.adafactor(LR, weight_decay_rate=WD), ("decoupled", WD, None)),
        (optax.MultiSteps(optax.adamw(LR, weight_decay=WD), 4), ("decoupled", LR * WD, None)),
        (
            optax.apply_if_finite(optax.adamw(LR, weight_decay=WD), 3),
            ("decoupled", LR * WD, None),
        ),
        (jaxreg.skip_step(optax.adamw(LR, weight_decay=WD)), ("decoupled", LR * WD, None)),
        (optax.chain(optax.scale_by_adam(), L2, optax.trace(0.9)), ("unknown", None, None)),
    ],
)
def test_decay_is_measured(tx, expected):
    kind, amount, l2 = expected
    for leaf in decays(tx):
        assert leaf == (kind, amount and near(amount), l2 and near(l2))


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (optax.chain(optax.add_decayed_weights(1e-3), optax.adamw(1e-3)), ("decoupled", 1e-7)),
        (
            optax.chain(optax.add_decayed_weights(1e-3), optax.adamw(3e-4, weight_decay=1e-4)),
            ("decoupled", 3e-8),
        ),
        (jaxreg.regularize(optax.scale_by_adam(), LR, clip=1.0, l2=1e-3), ("coupled", 0.0)),
        # Here weights can't go far without a gradient that is clipped.
        (
            jaxreg.regularize(optax.scale_by_adam(), LR, clip=1.0, l2=1e-3, decay=1e-4),
            ("unknown", None),
        ),
    ],
)
def test_a_small_decay_beside_an_l2_is_measured_or_unknown(tx, expected):
    kernel = 0.02 * np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    kind, amount = expected
    (leaf,) = jaxreg.explain(tx, {"kernel": jnp.asarray(kernel)}).leaves
    assert (leaf.decay_kind, leaf.decay, leaf.l2) == (kind, amount and near(amount), near(1e-3))
    if amount is None:
        assert leaf.findings()[0] == "unknown and l2 0.001"


@pytest.mark.parametrize("mask", [matrices, matrices(PARAMS)])
def test_a_mask_shows(mask):
    yes = ("decoupled", near(LR * WD), None)
    assert decays(optax.adamw(LR, weight_decay=WD, mask=mask)) == [NONE, yes, yes]
    tx = optax.masked(optax.add_decayed_weights(WD), mask)
    yes = ("decoupled", near(WD), None)
    assert decays(optax.chain(optax.sgd(0.1), optax.scale(-1), tx, optax.scale(-1))) == [
        NONE,
        yes,
        yes,
    ]


def test_a_mask_that_is_taken_for_a_schedule_shows():
    tx = optax.inject_hyperparams(optax.adamw)(LR, weight_decay=WD, mask=matrices)
    assert decays(tx) == [NONE] * 3


def test_this_librarys_order_shows():
    tx = jaxreg.regularize(optax.scale_by_adam(), LR, clip=1.0, l2=0.01, decay=WD)
    both = ("decoupled", near(LR * WD), near(0.01))
    assert decays(tx) == [NONE, both, both]
    assert all(leaf.clip == "by global norm" for leaf in found(tx).values())
    tx = optax.chain(optax.sgd(0.1, 0.9), jaxreg.weight_decay(WD, rate=0.5))
    own = ("decoupled", near(WD / 2), None)
    assert decays(tx) == [NONE, own, own]


def test_schedules_are_looked_at_at_the_step():
    warm = optax.linear_schedule(0.0, LR, 1000)
    tx = optax.adamw(warm, weight_decay=WD)
    assert decays(tx, step=0) == [NONE] * 3
    assert not any(leaf.frozen for leaf in found(tx, step=0).values())
    assert decays(tx, step=1000) == [("decoupled", near(LR * WD), None)] * 3
    assert decays(tx, step=500) == [("decoupled", near(LR * WD / 2), None)] * 3


@pytest.mark.parametrize(
    ("tx", "kind", "threshold"),
    [
        (optax.chain(optax.clip_by_global_norm(2.0), optax.adam(LR)), "by global norm", 2.0),
        (optax.chain(optax.clip(0.3), optax.adam(LR)), "by value", 0.3),
        (optax.chain(optax.clip(0.3), optax.sgd(LR)), "by value", 0.3),
        (optax.chain(optax.clip_by_global_norm(30.0), optax.lion(LR)), "unknown", None),
        (optax.adam(LR), "none", None),
        (optax.sign_sgd(LR), "none", None),
        # A clip of what is normalized already would not show.
        (optax.lamb(LR), "unknown", None),
        (optax.chain(optax.normalize_by_update_norm(), optax.sgd(LR)), "unknown", None),
        (
            optax.MultiSteps(optax.chain(optax.clip_by_global_norm(2.0), optax.adam(LR)), 3),
            "by global norm",
            2.0,
        ),
        (jaxreg.regularize(optax.trace(0.9), LR, clip=2.0, l2=0.01), "by global norm", 2.0),
        (
            jaxreg.regularize(optax.scale_by_adam(), LR, clip=jaxreg.clip_by_leaf_norm(0.02)),
            "by leaf norm",
            0.02,
        ),
        (
            optax.chain(jaxreg.spike_aware_clip(optax.scale_by_adam()), optax.scale(-LR)),
            "unknown",
            None,
        ),
        (jaxreg.skip_step(optax.adam(LR)), "none", None),
    ],
)
def test_clips_are_measured(tx, kind, threshold):
    for leaf in found(tx).values():
        assert leaf.clip == kind
        assert leaf.clip_threshold == (threshold and pytest.approx(threshold, rel=2e-3))


@pytest.mark.parametrize(
    ("shape", "leaves", "kind"),
    [((8, 8), 100, "by global norm"), ((500, 500), 1, "by leaf norm")],
)
def test_clips_of_many_and_of_large_leaves_are_measured(shape, leaves, kind):
    params = {f"l{i}": jnp.full(shape, 0.1) for i in range(leaves)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR, weight_decay=WD))
    for leaf in found(tx, params).values():
        assert leaf.clip == kind
        assert leaf.clip_threshold == near(1.0)
        assert (leaf.decay_kind, leaf.decay) == ("decoupled", near(LR * WD))


@pytest.mark.parametrize("clip", [jaxreg.zclip(), jaxreg.autoclip(50)])
def test_clips_by_the_norms_before_have_no_threshold(clip):
    for leaf in found(optax.chain(clip, optax.adam(LR))).values():
        assert (leaf.clip, leaf.clip_threshold) == ("unknown", None)


def test_a_constraint_of_the_weights_is_no_clip():
    tx = optax.chain(optax.sgd(LR), jaxreg.constrain(jaxreg.Box(-1.0, 1.0)))
    leaves = found(tx)
    for name in ("dense/kernel", "out"):
        assert (leaves[name].clip, leaves[name].decay) == ("unknown", None)


def test_a_clip_by_units_is_none_of_these():
    leaves = found(optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)))
    assert leaves["dense/kernel"].clip == leaves["out"].clip == "unknown"


def test_penalties_show():
    threshold = 0.1 * 0.01
    leaves = found(jaxreg.prox_sgd(0.1, jaxreg.L1(0.01)))
    assert not leaves["dense/bias"].penalized
    for name in ("dense/kernel", "out"):
        assert leaves[name].penalized
        assert leaves[name].penalty_threshold == near(threshold)
        assert leaves[name].decay is None  # one below the rounding would not show
    for penalty in (jaxreg.L1(0.01), jaxreg.GroupLasso(0.01)):
        tx = jaxreg.regularize(optax.scale_by_adam(), LR, decay=WD, penalty=penalty)
        leaf = found(tx)["dense/kernel"]
        assert leaf.penalized
        assert leaf.penalty_threshold is None
        assert (leaf.decay_kind, leaf.decay) == ("decoupled", pytest.approx(LR * WD, rel=1e-2))


def test_a_decay_that_rounding_hides_beside_a_penalty_is_unknown():
    tx = jaxreg.regularize(optax.scale_by_adam(), LR, decay=1e-4, penalty=jaxreg.L1(0.01))
    leaf = found(tx)["dense/kernel"]
    assert leaf.penalized
    assert (leaf.decay_kind, leaf.decay) == ("unknown", None)


ADAM = optax.adam(LR)
ADAMW = optax.adamw(LR, weight_decay=WD)
HALVES = jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS)
UNKNOWN, DECAYS = ("unknown", None), ("decoupled", LR * WD)
DRAWN = ("toward an anchor", LR * WD)


def after_adam(**options):
    return optax.chain(ADAM, jaxreg.weight_decay(WD, LR, **options))


MIXING = [  # a unit's entries depend on each other
    (optax.chain(ADAM, jaxreg.hyperball(LR)), UNKNOWN, "none"),
    (optax.chain(ADAM, jaxreg.constrain(jaxreg.UnitNorm())), UNKNOWN, "none"),
    (optax.chain(jaxreg.centralize(), ADAMW), DECAYS, "decoupled"),
]


AVERAGING = [  # the new weights do not depend on the old ones
    (jaxreg.rda(0.1, jaxreg.L1(0.01)), UNKNOWN, "unknown"),
    (jaxreg.rmda(0.1, jaxreg.L1(0.01)), UNKNOWN, "unknown"),
]


@pytest.mark.parametrize(
    ("tx", "kernel", "bias"),
    [
        *MIXING,
        (after_adam(toward="init"), DRAWN, "none"),
        (after_adam(toward=HALVES), DRAWN, "none"),
        (after_adam(toward=jaxreg.ema(0.9)), UNKNOWN, "none"),
        (after_adam(gate="cautious"), ("gated", LR * WD), "none"),
        (after_adam(gate="cautious", toward="init"), UNKNOWN, "none"),
        (after_adam(profile="huber", delta=100.0), ("not linear", LR * WD), "none"),
        (optax.chain(ADAM, jaxreg.spectral_decay(WD, LR)), UNKNOWN, "none"),
        (jaxreg.selective_projection_decay(ADAM), UNKNOWN, "none"),
        (optax.chain(jaxreg.ewc(WD, HALVES, HALVES), ADAM), UNKNOWN, "unknown"),
        # Without memory it is the same as a decay of the update.
        (
            optax.chain(jaxreg.ewc(2 * WD, HALVES, HALVES), optax.sgd(LR)),
            DRAWN,
            "toward an anchor",
        ),
        (optax.chain(ADAM, jaxreg.constrained_decay()), ("none", 0.0), "none"),
        *AVERAGING,
        (jaxreg.stochastic_rounding(ADAMW, seed=0), DECAYS, "decoupled"),
        (optax.chain(ADAMW, jaxreg.ema_of_params(0.99)), DECAYS, "decoupled"),
        (optax.chain(ADAMW, jaxreg.lookahead(5)), DECAYS, "decoupled"),
        (optax.chain(jaxreg.watch(), ADAMW), DECAYS, "decoupled"),
        (optax.chain(jaxreg.gradient_noise(0.1, seed=0), ADAMW), UNKNOWN, "unknown"),
        (optax.chain(jaxreg.gradient_noise(0.1, seed=0), optax.sgd(LR)), ("none", 0.0), "none"),
    ],
)
def test_this_librarys_transformations_are_told_or_unknown(tx, kernel, bias):
    leaves = found(tx)
    kind, amount = kernel
    for name in ("dense/kernel", "out"):
        leaf = leaves[name]
        assert (leaf.decay_kind, leaf.decay) == (kind, amount and near(amount))
        mixes = any(tx is row[0] for row in MIXING)
        averages = any(tx is row[0] for row in AVERAGING)
        assert leaf.clip == ("unknown" if mixes else "none")
        assert leaf.penalized == (None if averages else False)
    assert leaves["dense/bias"].decay_kind == bias


@pytest.mark.parametrize("method", [jaxreg.rda, jaxreg.rmda])
def test_weights_that_are_made_anew_have_no_decay(method):
    for leaf in found(method(0.1, jaxreg.L1(1.0))).values():
        assert (leaf.decay_kind, leaf.decay) == UNKNOWN


@pytest.mark.parametrize(("init", "warm_up"), [("inflection", None), ("warm_start", 100)])
def test_a_bound_that_is_yet_to_be_found_is_unknown_at_a_later_step(init, warm_up):
    tx = optax.chain(ADAM, jaxreg.constrained_decay(init=init, warm_up=warm_up))
    leaves = found(tx, step=1000)
    assert leaves["dense/bias"].decay_kind == "none"
    assert leaves["dense/kernel"].decay_kind == "unknown"


def test_decays_that_differ_between_entries_or_at_random_are_unknown():
    def halved(u, p, c):
        return u - 0.05 * jnp.where(jnp.arange(p.size).reshape(p.shape) % 2, p, 0)

    weights = jax.tree.map(jnp.zeros_like, SMALL)
    fisher = jax.tree.map(lambda p: jnp.linspace(0.1, 1, p.size).reshape(p.shape), SMALL)
    ewc = optax.chain(jaxreg.ewc(0.1, weights, fisher), optax.sgd(0.1))
    for tx in (step_of(halved), ewc):
        for leaf in found(tx, SMALL).values():
            assert (leaf.decay_kind, leaf.decay) == UNKNOWN
    rounded = jaxreg.stochastic_rounding(optax.adamw(0.1, weight_decay=0.5), seed=0)
    params = {"bias": jnp.ones(5, jnp.bfloat16)}
    for seed in range(3):
        (leaf,) = jaxreg.explain(rounded, params, seed=seed).leaves
        assert (leaf.decay_kind, leaf.decay) == UNKNOWN


def test_a_decay_that_stops_at_the_present_weights_has_no_sign():
    tx = step_of(lambda u, p, c: u - 0.01 * jnp.where(jnp.abs(p) > 1, p, 0))
    (leaf,) = jaxreg.explain(tx, jnp.ones((3, 4))).leaves
    assert leaf.findings()[0] == "0 not linear"


def test_a_threshold_below_the_rounding_of_the_weights_is_unknown():
    params = {"kernel": SMALL["kernel"].astype(jnp.bfloat16)}
    for seed in range(3):
        (leaf,) = jaxreg.explain(jaxreg.prox_adam(1e-3, jaxreg.L1(0.1)), params, seed=seed).leaves
        assert (leaf.penalized, leaf.penalty_threshold) == (True, None)


def test_a_clip_from_one_side_is_unknown():
    clip = optax.stateless(lambda g, p: jax.tree.map(lambda x: jnp.clip(x, -0.1, 0.5), g))
    params = {"two": jnp.ones(2), "one": jnp.ones(1)}
    for seed in range(4):
        for leaf in jaxreg.explain(optax.chain(clip, optax.sgd(0.1)), params, seed=seed).leaves:
            assert (leaf.clip, leaf.clip_threshold) == ("unknown", None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.filterwarnings("error")
def test_thresholds_are_given_in_as_many_digits_as_there_are(dtype):
    params = {"bias": jnp.ones(4, dtype), "kernel": jnp.ones((4, 3), dtype)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9))
    for seed in range(4):
        for leaf in found(tx, params, seed=seed).values():
            assert leaf.clip_threshold in ((None,) if dtype == jnp.bfloat16 else (None, 1.0))
    found(optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, 0.9)), params)


def test_an_l1_decay_makes_exact_zeros():
    leaf = found(after_adam(profile="l1"))["dense/kernel"]
    assert leaf.penalized
    assert (leaf.decay_kind, leaf.decay) == UNKNOWN


def test_a_decay_below_the_rounding_of_the_weights_is_unknown_where_weights_are_rounded():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    for leaf in found(jaxreg.stochastic_rounding(ADAMW, seed=0), params).values():
        assert (leaf.decay_kind, leaf.decay) == UNKNOWN


@pytest.mark.parametrize("seed", range(6))
def test_findings_do_not_hang_on_the_draw_where_leaves_are_small(seed):
    params = {"one": jnp.ones(1), "two": jnp.ones(2), "three": jnp.ones(3)}
    nonnegative = optax.chain(optax.sgd(LR), optax.keep_params_nonnegative())
    for leaf in found(nonnegative, params, seed=seed).values():
        assert leaf.penalized
    ratio = optax.chain(optax.scale_by_trust_ratio(), optax.scale(-LR), optax.clip(5e-4))
    clipped = optax.chain(optax.lars(0.1), optax.clip(1e-5))
    for by_norms in (optax.lars(LR), ratio, clipped):
        assert {leaf.clip for leaf in found(by_norms, params, seed=seed).values()} == {"unknown"}
    clips = {path: leaf.clip for path, leaf in found(optax.novograd(LR), params, seed=seed).items()}
    # Of one entry it is Adam.
    assert clips == {"one": "none", "two": "unknown", "three": "unknown"}
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for leaf in found(jaxreg.stochastic_rounding(ADAMW, seed=seed), params, seed=seed).values():
        assert not leaf.still
        assert leaf.acts_at is None


def test_a_raw_gradient_shows():
    masked = optax.masked(optax.adam(LR), {"bias": False, "kernel": True})
    explained = jaxreg.explain(masked, SMALL)
    assert [leaf.raw for leaf in explained.leaves] == [True, False]
    assert "bias    float32[4]    none   none  none         adds the raw gradient" in str(explained)
    whole = optax.masked(optax.set_to_zero(), {"bias": True, "kernel": False})
    left = found(optax.chain(masked, whole), SMALL)
    assert [(leaf.raw, leaf.frozen) for leaf in left.values()] == [(False, True), (False, False)]


def test_frozen_leaves_show():
    labels = {"dense": {"bias": "no", "kernel": "yes"}, "out": "no"}
    tx = optax.partition({"yes": optax.adamw(LR), "no": optax.set_to_zero()}, labels)
    for wrapped in (tx, optax.MultiSteps(tx, 3), jaxreg.skip_step(tx)):
        assert [leaf.frozen for leaf in found(wrapped).values()] == [True, False, True]


@pytest.mark.parametrize(
    ("tx", "step", "acts_at"),
    [
        (optax.MultiSteps(optax.sgd(LR), 100), 0, None),
        (optax.adamw(lambda count: jnp.where(count >= 3 * 2**20, LR, 0.0)), 0, None),
        (optax.adamw(lambda count: jnp.where(count >= 20_000, LR, 0.0)), 0, 32_768),
        (
            optax.adamw(lambda count: jnp.where((count > 300) & (count < 900), LR, 0.0)),
            0,
            512,
        ),
        (optax.adamw(optax.cosine_decay_schedule(LR, 1000)), 1000, 999),
        (optax.adamw(optax.cosine_decay_schedule(LR, 1000)), 2000, 0),
    ],
)
def test_a_leaf_that_trains_at_another_step_is_not_frozen(tx, step, acts_at):
    explained = jaxreg.explain(tx, SMALL, step=step)
    for leaf in explained.leaves:
        assert (leaf.frozen, leaf.still, leaf.acts_at) == (False, True, acts_at)
        if step or acts_at is None:
            assert leaf.decay_kind == leaf.clip == "unknown"
    assert ("no update at the steps tried" in str(explained)) == (acts_at is None)


def test_updates_that_are_applied_every_few_calls_are_seen():
    every = optax.apply_every(4)
    for leaf in found(optax.chain(every, optax.sgd(0.1))).values():
        assert not leaf.frozen
        assert not leaf.still
        assert (leaf.decay_kind, leaf.clip) == ("none", "none")
    tx = optax.chain(every, optax.add_decayed_weights(0.01), optax.sgd(0.1))
    assert decays(tx) == [("decoupled", near(1e-3), None)] * 3
    # Counters of calls are not set to a step.
    tx = optax.MultiSteps(optax.adamw(WARM, weight_decay=WD), 4)
    assert decays(tx, step=100) == [("decoupled", near(LR * WD), None)] * 3


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_counters_are_found_by_what_they_do(dtype):
    def update(grads, state, params=None):
        amount = jnp.where(state["t"] >= 100, 0.01, 0.0)
        return jax.tree.map(lambda g, p: -g - amount * p, grads, params), {"t": state["t"] + 1}

    tx = optax.GradientTransformation(lambda params: {"t": jnp.zeros((), dtype)}, update)
    assert decays(tx) == [NONE] * 3
    assert decays(tx, step=500) == [("decoupled", near(0.01), None)] * 3


def test_a_warm_up_that_counts_what_it_has_seen_is_over_at_a_later_step():
    tx = optax.chain(jaxreg.adagc(), optax.adamw(LR))
    assert {leaf.clip for leaf in found(tx).values()} == {"by global norm"}
    assert {leaf.clip for leaf in found(tx, step=1000).values()} == {"unknown"}


def test_numbers_that_are_not_those_of_the_step_are_listed():
    tx = optax.chain(jaxreg.zclip(), optax.adamw(LR))
    explained = jaxreg.explain(tx, SMALL, step=1000)
    assert explained.unset == ("0/memory/mean",)
    assert "0/memory/mean is as at the start, not as at step 1000" in str(explained)
    assert jaxreg.explain(tx, SMALL).unset == jaxreg.explain(ADAMW, SMALL, step=1000).unset == ()


@pytest.mark.parametrize(
    ("rule", "kind", "amount"),
    [
        (lambda u, p, c: u - 0.01 * (p - c), "toward an anchor", 0.01),
        (lambda u, p, c: u - 0.01 * jnp.where(u * p <= 0, p, 0), "gated", 0.01),
        (lambda u, p, c: u - 0.01 * jnp.where(u * p < 0, p, 0), "gated", 0.01),
        (lambda u, p, c: u - 0.01 * jnp.clip(p, -100, 100), "not linear", 0.01),
        (lambda u, p, c: u - 0.01 * p**3, "not linear", None),
        (lambda u, p, c: u - 0.01 * jnp.linalg.norm(p) * p, "not linear", None),
        (lambda u, p, c: u * (1 + jnp.abs(p)) - 0.01 * p, "decoupled", 0.01),
        (lambda u, p, c: u + 0.1 * jnp.cos(p), "unknown", None),
        (lambda u, p, c: c + u - p, "unknown", None),
    ],
)
def test_other_decays_by_hand(rule, kind, amount):
    leaf = found(step_of(rule))["dense/kernel"]
    assert leaf.decay_kind == kind
    if amount is not None:
        assert leaf.decay == near(amount)


def test_an_l1_profile_has_the_amount_at_the_weights_own_size():
    leaf = found(step_of(lambda u, p, c: u - 1e-3 * jnp.sign(p)))["dense/kernel"]
    own = PARAMS["dense"]["kernel"]
    assert leaf.decay_kind == "not linear"
    assert leaf.decay == near(float(1e-3 * jnp.abs(own).sum() / (own**2).sum()))


def test_dtypes_and_lost_decay_show_for_bfloat16():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    leaf = found(optax.adamw(LR, weight_decay=WD), params)["dense/kernel"]
    assert leaf.lost
    assert leaf.decay == pytest.approx(LR * WD, rel=0.02)
    assert leaf.dtypes == ()
    leaf = found(optax.adamw(LR, weight_decay=100.0), params)["dense/kernel"]
    assert not leaf.lost
    wide = step_of(lambda u, p, c: u - jnp.float32(0.01) * p)
    assert found(wide, params)["dense/kernel"].dtypes == ("updates are float32",)

    def update(grads, state, params=None):
        return grads, jax.tree.map(lambda s, g: s + jnp.float32(0.1) * g, state, grads)

    grows = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), update)
    assert found(grows, params)["out"].dtypes == ("out is bfloat16 and becomes float32",)
    assert len(jaxreg.explain(grows, params).state_dtypes) == 3


def test_trees_of_all_kinds():
    tx = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(LR, weight_decay=WD))
    one = ("decoupled", near(LR * WD), None)
    assert decays(tx, PARAMS["dense"]["kernel"]) == [one]
    assert decays(tx, {"a": None, "b": PARAMS["out"]}) == [one]
    shapes = jax.eval_shape(lambda: PARAMS)
    assert decays(tx, shapes) == [one] * 3
    mixed = {"count": jnp.arange(3), "w": PARAMS["out"]}
    leaves = found(step_of(lambda u, p, c: u - 0.01 * p, optax.sgd(0.1)), {"w": mixed["w"]})
    assert leaves["w"].decay == near(0.01)
    leaf = found(tx, {"w": PARAMS["out"] * (1 + 1j)})["w"]
    assert leaf.decay in (None, near(LR * WD))


def test_nnx_states_have_their_paths():
    from flax import nnx

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    leaves = found(optax.adamw(LR, weight_decay=WD), nnx.state(model, nnx.Param))
    assert list(leaves) == ["bias", "kernel"]
    assert leaves["kernel"].decay == near(LR * WD)


def test_one_that_can_not_be_traced_is_tried_in_a_loop():
    def update(grads, state, params=None):
        scale = 0.1 if float(jnp.sum(grads["w"])) > -jnp.inf else 0.0
        return jax.tree.map(lambda g, p: -scale * g - 0.01 * p, grads, params), state

    tx = optax.GradientTransformation(lambda params: (), update)
    assert decays(tx, {"w": PARAMS["out"]}) == [("decoupled", near(0.01), None)]


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError, FloatingPointError])
def test_errors_of_the_transformation_are_its_own(kind):
    calls = []

    def update(grads, state, params=None):
        calls.append(1)
        raise kind("no such thing")

    tx = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(kind, match="no such thing"):
        jaxreg.explain(tx, PARAMS)
    assert len(calls) <= 2


def test_what_is_found_in_pieces_is_the_same(monkeypatch):
    tx = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(2.0), ADAMW), 2)
    whole = jaxreg.explain(tx, PARAMS)
    monkeypatch.setattr(running, "WHOLE", 40)
    pieces = jaxreg.explain(tx, PARAMS)
    assert str(pieces) == str(whole)
    assert "by global norm 2" in str(pieces)


def test_leaves_that_are_alike_are_compiled_once(monkeypatch):
    made, pieces = [], running.Program.pieces
    monkeypatch.setattr(running.Program, "pieces", lambda *args: made.append(pieces(*args)))
    params = {f"l{i}": jnp.full((4, 4), 0.1) for i in range(300)}
    tx = jaxreg.regularize(
        optax.scale_by_adam(), LR, clip=1.0, l2=0.01, decay=WD, penalty=jaxreg.L1(1e-3)
    )
    with pytest.raises(TypeError):  # nothing is run
        jaxreg.explain(tx, params)
    ((*made,),) = made
    assert len(made) <= 4 * len(params)
    assert len({piece.function for piece in made}) <= 20


def test_extra_arguments_are_passed_on():
    def update(grads, state, params=None, *, value, **extra):
        return jax.tree.map(lambda g: -value * g, grads), state

    tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
    assert decays(tx, value=0.1) == [NONE] * 3
    with pytest.raises(TypeError, match="value") as error:
        jaxreg.explain(tx, PARAMS)
    assert "explain by name" in "".join(error.value.__notes__)


def test_the_table_is_narrow_and_groups_equal_leaves():
    params = {f"a_rather_long_name_of_a_module_{i}/with/parts": PARAMS["out"] for i in range(3)}
    tx = optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(LR, weight_decay=WD))
    table = str(jaxreg.explain(tx, params))
    assert len(table.splitlines()) == 2
    assert "0.0001 decoupled" in table
    assert "by global norm 2" in table
    assert max(map(len, table.splitlines())) <= 100


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: jaxreg.explain(None, PARAMS), "tx"),
        (lambda: jaxreg.explain(optax.sgd(0.1), PARAMS, step=-1), "step"),
        (lambda: jaxreg.explain(optax.sgd(0.1), {"n": jnp.arange(3)}), "params"),
        (lambda: jaxreg.explain(optax.sgd(0.1), {}), "params"),
    ],
)
def test_bad_input_is_refused(call, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        call()


PENALTY = jaxreg.L1(1e-2)
LATE = jaxreg.weight_decay(lambda count: jnp.where(count < 500, 0.0, WD), LR)
NO_CLIP = {"clip": "none", "clip_threshold": None}
SOME_CLIP = {"clip": "unknown", "clip_threshold": None}
HIDDEN = {"decay": None, "decay_kind": "unknown", "penalized": True}


@pytest.mark.parametrize(
    ("tx", "kernel"),
    [
        # Clips whose thresholds are behind a penalty, an L2 or a normalization.
        (jaxreg.regularize(optax.scale_by_adam(), LR, clip=1.0, penalty=PENALTY), SOME_CLIP),
        (jaxreg.regularize(optax.identity(), LR, clip=1.0, penalty=PENALTY), SOME_CLIP),
        (
            optax.chain(
                optax.add_decayed_weights(WD), optax.clip_by_global_norm(1.0), optax.sgd(0.1)
            ),
            SOME_CLIP,
        ),
        (optax.chain(optax.adam(0.1), jaxreg.clip_update_rms(1e-3)), SOME_CLIP),
        (optax.chain(optax.adam(0.1), optax.clip(0.01)), SOME_CLIP),
        (optax.chain(optax.adam(0.1), optax.clip_by_global_norm(0.01)), SOME_CLIP),
        (optax.adafactor(LR), SOME_CLIP),  # it clips what it makes
        # Relative to the weights.
        (optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)), SOME_CLIP),
        (jaxreg.regularize(optax.scale_by_adam(), LR, clip=jaxreg.adaptive_clip(0.01)), SOME_CLIP),
        # None.
        (optax.adam(0.1), NO_CLIP),
        (optax.adamw(LR, weight_decay=WD), NO_CLIP),
        (optax.sgd(0.1), NO_CLIP),
        (optax.sgd(0.1, 0.9), NO_CLIP),
        (optax.lion(LR), NO_CLIP),
        (optax.sign_sgd(LR), NO_CLIP),
        (optax.rmsprop(LR), NO_CLIP),
        (jaxreg.prox_adam(LR, PENALTY), NO_CLIP | HIDDEN),
        # Zeros of weights that are drawn elsewhere, and decay behind a penalty.
        (
            jaxreg.regularize(
                optax.scale_by_adam(),
                1e-2,
                decay=jaxreg.weight_decay(0.1, toward="init"),
                penalty=jaxreg.L1(1e-3),
            ),
            HIDDEN,
        ),
        (optax.chain(optax.sgd(0.1), jaxreg.weight_decay(0.01, 1.0, profile="l1")), HIDDEN),
        (jaxreg.regularize(optax.identity(), LR, decay=1e-6, penalty=PENALTY), HIDDEN),
        # What begins later.
        (
            optax.adamw(WARM, weight_decay=WD),
            {"decay": 0.0, "still": True, "acts_at": 100, "frozen": False},
        ),
        (optax.chain(ADAM, LATE), {"decay": 0.0, "still": False, "acts_at": 1000}),
        (ADAMW, {"still": False, "acts_at": None}),
        (optax.set_to_zero(), {"frozen": True, "still": False, "acts_at": None}),
    ],
)
def test_it_never_guesses(tx, kernel):
    explained = jaxreg.explain(tx, SMALL)
    bias, leaf = explained.leaves
    assert {name: getattr(leaf, name) for name in kernel} == kernel
    assert kernel.get("clip") in (None, bias.clip)
    later = f"step{'=' if leaf.still else ' '}{leaf.acts_at}"
    assert (later in str(explained)) == (leaf.acts_at is not None)


def test_thresholds_are_rounded_to_numbers_that_they_agree_with():
    for given in (0.02, 0.01234):
        tx = optax.chain(optax.clip_by_global_norm(given), optax.sgd(0.1))
        (leaf,) = found(tx, SMALL["kernel"]).values()
        assert (leaf.clip_threshold == given) == (given == 0.02)
        assert leaf.clip_threshold == near(given)


def test_traced_parameters_are_refused():
    with pytest.raises(jaxreg.ArgumentError, match="params: got traced arrays; .*outside of jit"):
        jax.jit(lambda p: jaxreg.explain(optax.sgd(0.1), p).step)(jnp.ones(3))
