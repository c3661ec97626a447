"""Clips that follow the weights, earlier norms or second moments, each against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from errors import message

import jaxreg

RNG = np.random.default_rng(0)
# A calm start, spikes, silence, and a lasting change of scale.
SCALES = [1, 1.2, 0.8, 1.1, 30, 0.9, 0, 1.3, 4, 4, 4, 50, 3, 5, 1e-3, 1]
SHAPES = {"a": {"kernel": (4, 3), "bias": (3,)}, "b": ()}
is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
STEPS = [
    jax.tree.map(lambda shape, s=s: s * RNG.normal(size=shape), SHAPES, is_leaf=is_shape)
    for s in SCALES
]
PARAMS = jax.tree.map(lambda shape: RNG.normal(size=shape), SHAPES, is_leaf=is_shape)


def f32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(tx, steps=STEPS, params=PARAMS):
    """The updates of each step, and the states."""
    params = f32(params)
    state, out, states = tx.init(params), [], []
    update = jax.jit(tx.update)
    for grads in steps:
        updates, state = update(f32(grads), state, params)
        out.append(updates)
        states.append(state)
    return out, states


def global_norm(tree):
    return np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree)))


def scaled(tree, coefficient):
    return jax.tree.map(lambda g: g * coefficient, tree)


def assert_agree(found, expected, rtol=2e-5):
    for ours, theirs in zip(found, expected, strict=True):
        chex.assert_trees_all_close(ours, f32(theirs), rtol=rtol, atol=1e-7)


# By the weights ----------------------------------------------------------------------------------


def agc(g, w, axes, ratio, eps):
    """Adaptive gradient clipping of one leaf, whose units run along `axes`."""
    norm = lambda x: np.sqrt((x**2).sum(axis=axes, keepdims=True))  # noqa: E731
    limit = ratio * np.maximum(norm(w), eps)
    return g * np.minimum(1, limit / np.maximum(norm(g), 1e-6))


@pytest.mark.parametrize(
    ("shape", "units", "axes"),
    [
        ((3, 3, 2, 4), None, (0, 1, 2)),  # a convolution's kernel: height, width, in, out
        ((4, 3), None, (0,)),
        ((5, 1), None, (0,)),  # one unit
        ((1, 5), None, (0,)),  # five units of one weight; optax squeezes, and takes them for one
        ((6,), None, None),
        ((), None, None),
        ((4, 3), 1, (1,)),
        ((2, 4, 3), (0, 1), (0, 1)),
        ((2, 4, 3), -2, (1,)),  # a stack of layers
        ((2, 4, 3), jaxreg.groups.whole, None),
    ],
    ids=str,
)
def test_adaptive_clip(shape, units, axes):
    rng = np.random.default_rng(1)
    w, options = rng.normal(size=shape), {} if units is None else {"units": units}
    grads = [s * rng.normal(size=shape) for s in (0.01, 1.0, 0.0, 30.0)]
    found, states = run(jaxreg.adaptive_clip(0.05, eps=0.1, **options), grads, w)
    expected = [agc(g, w, axes, 0.05, 0.1) for g in grads]
    assert_agree(found, expected)
    assert any((np.abs(e) < np.abs(g)).any() for e, g in zip(expected, grads, strict=True))
    for state, g, e in zip(states, grads, expected, strict=True):
        np.testing.assert_allclose(state.norm, np.linalg.norm(g), rtol=1e-6)
        np.testing.assert_allclose(state.clipped_norm, np.linalg.norm(e), rtol=1e-5, atol=1e-9)


def test_adaptive_clip_agrees_with_optax_where_that_is_right():
    w, grads = jax.random.normal(jax.random.key(0), (2, 3, 3, 2, 4))
    ours, theirs = jaxreg.adaptive_clip(0.01), optax.adaptive_grad_clip(0.01)
    found, expected = (tx.update(10 * grads, tx.init(w), w)[0] for tx in (ours, theirs))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


def test_zero_weights_can_grow_under_adaptive_clip():
    w = jnp.zeros((4, 3))
    tx = jaxreg.adaptive_clip(0.1, eps=0.01)
    clipped, _ = tx.update(jnp.ones((4, 3)), tx.init(w), w)
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=0), 0.001, rtol=1e-5)


def test_adaptive_clip_leaves_the_last_layer_alone_where_it_is_told_to():
    params = {"body": jnp.ones((4, 3)), "head": jnp.ones((3, 2))}
    tx = jaxreg.adaptive_clip(0.01, where=~jaxreg.where.path("head"))
    clipped, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(clipped["head"], params["head"])
    np.testing.assert_allclose(clipped["body"], 0.01, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e30, 1.0])
def test_adaptive_clip_takes_squares_that_overflow(scale):
    w = jnp.array([[3.0, 0.3], [4.0, 0.4]]) * scale
    tx = jaxreg.adaptive_clip(0.1, eps=1e-30)
    clipped, _ = tx.update(jnp.ones((2, 2)) * scale * 1e5, tx.init(w), w)
    norms = np.linalg.norm(np.asarray(clipped, np.float64), axis=0)
    np.testing.assert_allclose(norms, [0.5 * scale, 0.05 * scale], rtol=1e-5)


def test_axes_that_there_are_not_are_named_as_units_at_init():
    for units in (2, (0, -3), (0, 0)):
        with pytest.raises(ValueError, match="^units: got .*axes.*shape \\(4, 3\\)") as error:
            jaxreg.adaptive_clip(units=units).init({"w": jnp.ones((4, 3)), "b": jnp.ones(3)})
        message(error)
    with pytest.raises(ValueError, match=r"^where: got .*matches no leaf"):
        jaxreg.adaptive_clip(where="head").init({"w": jnp.ones((4, 3))})


def test_a_clip_by_units_records_the_smallest_coefficient():
    clip, w = jaxreg.adaptive_clip(0.01), jnp.ones((3, 2))
    _, state = clip.update(10 * w, clip.init(w), w)
    assert float(state.coefficients) == pytest.approx(1e-3)


def test_units_are_those_of_the_leaves_that_are_clipped():
    params = {"conv": jnp.ones((3, 3, 2, 4)), "head": jnp.ones((4, 2))}
    clip = jaxreg.adaptive_clip(0.01, units=jaxreg.groups.axes(0, 1, 2), where="conv")
    clipped, _ = clip.update(params, clip.init(params), params)
    chex.assert_trees_all_equal(clipped["head"], params["head"])
    assert (clipped["conv"] < 1).all()


# By the norms of earlier steps -------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [0, 10, 50.0, 87.5, 100])
@pytest.mark.parametrize("window", [1, 3, 5, 100])
def test_autoclip(percentile, window):
    found, states = run(jaxreg.autoclip(percentile, window=window))
    history, expected = [], []
    for t, grads in enumerate(STEPS):
        norm = global_norm(grads)
        history = [*history, norm][-window:]
        limit = np.percentile(history, percentile)
        expected.append(scaled(grads, min(1, limit / norm) if norm else 1))
        np.testing.assert_allclose(states[t].norm, norm, rtol=1e-6)
    assert_agree(found, expected)


def zclip(norms, z, decay, warm_up, eps):
    """The official algorithm: clipped norms. A spike's score is taken before the update."""
    seen, mean, variance, out = [], None, None, []
    for norm in norms:
        if len(seen) < warm_up:
            seen.append(norm)
            if len(seen) == warm_up:
                mean = sum(seen) / len(seen)
                variance = sum((n - mean) ** 2 for n in seen) / len(seen)
            out.append(norm)
            continue
        std = variance**0.5
        score = (norm - mean) / (std + eps)
        clipped = mean + std * z**2 / score if score > z else norm
        out.append(min(norm, clipped))
        mean = decay * mean + (1 - decay) * clipped
        variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
    return out, mean, variance


@pytest.mark.parametrize(("z", "decay", "warm_up"), [(2.5, 0.97, 4), (1.5, 0.5, 2), (0.5, 0.0, 6)])
def test_zclip(z, decay, warm_up):
    norms = [*map(global_norm, STEPS)]
    clipped, mean, variance = zclip(norms, z, decay, warm_up, 1e-6)
    assert min(c / n for c, n in zip(clipped, norms, strict=True) if n) < 0.5
    found, states = run(jaxreg.zclip(z, decay=decay, warm_up=warm_up))
    pairs = zip(STEPS, clipped, norms, strict=True)
    assert_agree(found, [scaled(g, c / n if n else 1) for g, c, n in pairs], rtol=1e-4)
    np.testing.assert_allclose(states[-1].memory.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(states[-1].memory.variance, variance, rtol=1e-3)
    np.testing.assert_allclose([s.clipped_norm for s in states], clipped, rtol=1e-4, atol=1e-9)


def test_zclip_cuts_nothing_in_a_warm_up_and_little_after_equal_norms():
    steps = [np.ones(4)] * 3 + [np.full(4, 1e3)]
    found, _ = run(jaxreg.zclip(warm_up=4), steps, np.ones(4))
    assert_agree(found, steps)
    found, states = run(jaxreg.zclip(warm_up=3), steps, np.ones(4))
    assert float(states[-1].clipped_norm) == pytest.approx(2.0)  # the mean: the deviation is 0


def test_a_norm_whose_square_overflows_does_not_switch_zclip_off():
    clip = jaxreg.zclip(warm_up=3)
    state = clip.init(jnp.zeros(1))
    for g in (1.0, 1e20, 1.0, 2.0, 1.0, 1e6):
        clipped, state = clip.update(jnp.array([g]), state)
    assert float(clipped[0]) < 10


def adagc(steps, ratio, decay, max_norm, warm_up):
    """Gradients as lists of leaves; a leaf of norm 0 keeps what it knows."""
    gammas, out = [None] * len(steps[0]), []
    for t, leaves in enumerate(steps):
        norm, clipped = global_norm(leaves), []
        for i, g in enumerate(leaves):
            own = np.linalg.norm(g)
            if t < warm_up:
                h = min(1, max_norm / norm) if norm else 1
            else:
                h = 1 if gammas[i] is None or own == 0 else min(1, ratio * gammas[i] / own)
            clipped.append(h * g)
            if own == 0:
                continue
            if gammas[i] is None:
                gammas[i] = h * own
            elif t < warm_up:
                gammas[i] = min(gammas[i], h * own)
            else:
                gammas[i] = decay * gammas[i] + (1 - decay) * h * own
        out.append(clipped)
    return out, gammas


@pytest.mark.parametrize(
    ("ratio", "decay", "max_norm", "warm_up"),
    [(1.05, 0.98, 1.0, 3), (1.5, 0.5, 5.0, 1), (3.0, 0.0, 1e9, 8)],
)
def test_adagc(ratio, decay, max_norm, warm_up):
    leaves = [jax.tree.leaves(grads) for grads in STEPS]
    expected, gammas = adagc(leaves, ratio, decay, max_norm, warm_up)
    tx = jaxreg.adagc(ratio, decay=decay, max_norm=max_norm, warm_up=warm_up)
    found, states = run(tx)
    assert_agree([jax.tree.leaves(f) for f in found], expected)
    np.testing.assert_allclose(states[-1].memory.norms, gammas, rtol=1e-4)
    assert int(states[-1].clipped) > 3


def test_adagc_lets_a_leaf_that_had_no_gradient_move_again():
    """In the source its mean would fall to 0, and hold it there."""
    steps = [np.zeros(2)] * 5 + [np.array([3.0, 4.0])] * 2
    found, _ = run(jaxreg.adagc(warm_up=2), steps, np.ones(2))
    np.testing.assert_allclose(found[-1], [3, 4], rtol=1e-6)


@pytest.mark.parametrize("window", [1, 3])
def test_the_memory_of_autoclip_is_of_the_size_it_says(window):
    state = jaxreg.autoclip(window=window).init(jnp.ones(3, jnp.bfloat16))
    assert state.memory.norms.shape == (window,)
    assert state.memory.norms.dtype == jnp.float32


# By second moments -------------------------------------------------------------------------------


def test_clip_update_rms_is_adafactors():
    found, states = run(jaxreg.clip_update_rms(0.8))
    expected = [
        jax.tree.map(lambda u: u / max(1, np.sqrt((u**2).mean()) / 0.8), grads) for grads in STEPS
    ]
    assert_agree(found, expected)
    theirs, _ = run(optax.clip_by_block_rms(0.8))
    chex.assert_trees_all_close(found, theirs, rtol=1e-5, atol=1e-7)
    each = [float(c) for c in states[4].coefficients]
    rms = [np.sqrt((np.asarray(u) ** 2).mean()) for u in jax.tree.leaves(STEPS[4])]
    np.testing.assert_allclose(each, [min(1, 0.8 / r) for r in rms], rtol=1e-5)


def stable_adam(steps, b1, b2, eps, max_rms):
    """StableAdamW's direction, leaf by leaf: over max(1, rms(g / divisor) / max_rms)."""
    m, v = np.zeros_like(steps[0]), np.zeros_like(steps[0])
    out = []
    for t, g in enumerate(steps, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        divisor = np.sqrt(v / (1 - b2**t)) + eps
        rms = np.sqrt(np.mean((g / divisor) ** 2))
        out.append(m / (1 - b1**t) / divisor / max(1, rms / max_rms))
    return out


@pytest.mark.parametrize("max_rms", [1.0, 0.5])
def test_clip_update_rms_around_adam_is_stable_adamw(max_rms):
    direction = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-6)
    found, states = run(jaxreg.clip_update_rms(max_rms, direction=direction))
    leaves = zip(*(jax.tree.leaves(grads) for grads in STEPS), strict=True)
    expected = zip(*(stable_adam(g, 0.8, 0.95, 1e-6, max_rms) for g in leaves), strict=True)
    assert_agree([jax.tree.leaves(f) for f in found], [*map(list, expected)], rtol=2e-4)
    assert float(states[4].clip.coefficient) < 0.5  # at the spike


def test_clip_update_rms_sees_no_spike_in_an_entry_without_a_gradient():
    tx = jaxreg.clip_update_rms(direction=optax.scale_by_adam())
    found, states = run(tx, [np.zeros(3), np.array([0.0, 1.0, 0.0])], np.ones(3))
    chex.assert_tree_all_finite(found)
    assert states[0].clip.coefficient == 1


def spike_aware_adam(steps, b1, b2, eps, threshold):
    """SPAM without its resets, one leaf."""
    m, v = np.zeros_like(steps[0]), np.zeros_like(steps[0])
    out = []
    for t, g in enumerate(steps, start=1):
        if t > 1:
            divisor = np.sqrt(v / (1 - b2 ** (t - 1))) + eps
            limit = np.where(v > 0, np.sqrt(threshold) * divisor, np.inf)
            g = np.sign(g) * np.minimum(np.abs(g), limit)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        out.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return out


@pytest.mark.parametrize("threshold", [2.0, 50.0, 5000.0])
def test_spike_aware_clip(threshold):
    direction = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-6)
    found, _ = run(jaxreg.spike_aware_clip(direction, threshold))
    leaves = zip(*(jax.tree.leaves(grads) for grads in STEPS), strict=True)
    expected = zip(*(spike_aware_adam(g, 0.8, 0.95, 1e-6, threshold) for g in leaves), strict=True)
    assert_agree([jax.tree.leaves(f) for f in found], [*map(list, expected)], rtol=2e-4)


def test_spike_aware_clip_with_an_infinity_and_the_policies():
    steps = [np.ones(2), np.array([np.inf, 1.0]), np.ones(2)]
    for policy, finite in (("propagate", True), ("skip", True), ("zero", True)):
        tx = jaxreg.spike_aware_clip(optax.scale_by_adam(), on_nonfinite=policy)
        found, states = run(tx, steps, np.ones(2))
        assert np.isfinite(np.asarray(found[-1])).all() == finite
        if policy == "skip":
            assert int(states[-1].clip.nonfinite) == 1
    skipped, _ = run(
        jaxreg.spike_aware_clip(optax.scale_by_adam(), on_nonfinite="skip"), steps, np.ones(2)
    )
    plain, _ = run(optax.scale_by_adam(), [steps[0], np.zeros(2), steps[2]], np.ones(2))
    chex.assert_trees_all_close(skipped, plain, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda direction: jaxreg.clip_update_rms(direction=direction),
        jaxreg.spike_aware_clip,
    ],
    ids=["clip_update_rms", "spike_aware_clip"],
)
@pytest.mark.parametrize(
    ("direction", "text"),
    [
        (optax.trace(0.9), "direction: got one without; accepted: .*second moment"),
        (optax.chain(optax.identity(), optax.trace(0.9)), "direction: got one without"),
        (optax.scale_by_lion(), "got 'auto' for a direction that contains optax.scale_by_lion"),
    ],
)
def test_a_direction_without_second_moments_is_refused(make, direction, text):
    with pytest.raises(ValueError, match=text):
        make(direction).init(jnp.ones(3))


@pytest.mark.parametrize(
    "direction",
    [
        optax.scale_by_adam(),
        optax.scale_by_rms(),
        optax.scale_by_rss(),
        optax.scale_by_amsgrad(),
        optax.chain(optax.trace(0.5), optax.scale_by_adam()),
        optax.chain(jaxreg.clip_by_global_norm(1.0), optax.scale_by_adam()),
    ],
    ids=["adam", "rms", "rss", "amsgrad", "after momentum", "after a clip"],
)
def test_directions_with_second_moments_are_taken(direction):
    for tx in (
        jaxreg.clip_update_rms(1e9, direction=direction),
        jaxreg.spike_aware_clip(direction, threshold=1e30),
    ):
        found, _ = run(tx, STEPS[:4])
        expected, _ = run(direction, STEPS[:4])
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


# In 16 bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: jaxreg.adaptive_clip(0.1),
        lambda: jaxreg.autoclip(30),
        lambda: jaxreg.zclip(warm_up=3),
        lambda: jaxreg.adagc(warm_up=3),
        lambda: jaxreg.clip_update_rms(0.5),
    ],
    ids=["adaptive_clip", "autoclip", "zclip", "adagc", "clip_update_rms"],
)
def test_bf16_gradients_are_clipped_as_in_float32(make):
    tx = make()
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), [PARAMS, *STEPS])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    states = tx.init(low[0]), tx.init(wide[0])
    for small, exact in zip(low[1:], wide[1:], strict=True):
        found, first = tx.update(small, states[0], low[0])
        expected, second = tx.update(exact, states[1], wide[0])
        states = first, second
        chex.assert_trees_all_close(
            jax.tree.map(lambda x: x.astype(jnp.float32), found), expected, rtol=2.0**-8, atol=1e-6
        )
        np.testing.assert_allclose(first.norm, second.norm, rtol=1e-5)
