"""Weight decay, decoupled and coupled, against the papers' formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg
from jaxreg import where

PARAMS = {"dense": {"kernel": jnp.array([[2.0, -4.0]]), "bias": jnp.array([3.0, 3.0])}}
GRADS = jax.tree.map(lambda p: 0.1 * jnp.ones_like(p), PARAMS)
LR = 0.01


def run(tx, steps=5):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def kernels_only(params):
    return where.kernels.mask(params)


def test_inside_regularize_it_is_adamw():
    ours = jaxreg.regularize(optax.scale_by_adam(), LR, decay=0.1)
    chex.assert_trees_all_close(
        run(ours), run(optax.adamw(LR, weight_decay=0.1, mask=kernels_only)), rtol=1e-6
    )


def test_the_rate_follows_a_schedule_of_the_learning_rate():
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    ours = jaxreg.regularize(optax.scale_by_adam(), schedule, decay=0.1)
    chex.assert_trees_all_close(
        run(ours), run(optax.adamw(schedule, weight_decay=0.1, mask=kernels_only)), rtol=1e-6
    )


def test_a_rate_of_its_own_makes_it_independent_of_the_learning_rate():
    for lr in (0.0, 0.1):
        tx = jaxreg.regularize(optax.identity(), lr, decay=jaxreg.weight_decay(0.1, rate=1.0))
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_close(updates["dense"]["kernel"], -0.1 * PARAMS["dense"]["kernel"])
        chex.assert_trees_all_equal(updates["dense"]["bias"], jnp.zeros(2))


def test_strength_and_rate_may_be_schedules():
    tx = jaxreg.weight_decay(lambda count: 0.1 * (count + 1), rate=lambda count: 2.0**-count)
    state, factors = tx.init(PARAMS), []
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
        factors.append(float(updates["dense"]["kernel"][0, 0] / -2.0))
    assert factors == pytest.approx([0.1, 0.2 / 2, 0.3 / 4])


def test_coupled_l2_is_the_gradient_of_the_penalty():
    tx, penalty = jaxreg.l2_decay(0.3), jaxreg.L2(0.3)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    kernel = PARAMS["dense"]["kernel"]
    expected = GRADS["dense"]["kernel"] + jax.grad(penalty.value)(kernel)
    chex.assert_trees_all_close(updates["dense"]["kernel"], expected)
    chex.assert_trees_all_equal(updates["dense"]["bias"], GRADS["dense"]["bias"])


def test_coupled_and_decoupled_differ_under_adam_and_agree_under_sgd():
    coupled = run(jaxreg.regularize(optax.identity(), LR, l2=0.1))
    chex.assert_trees_all_close(coupled, run(jaxreg.regularize(optax.identity(), LR, decay=0.1)))
    coupled = run(jaxreg.regularize(optax.scale_by_adam(), LR, l2=0.1))
    decoupled = run(jaxreg.regularize(optax.scale_by_adam(), LR, decay=0.1))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(coupled, decoupled, rtol=1e-4)


def test_where_chooses_the_leaves():
    tx = jaxreg.weight_decay(0.1, rate=1.0, where="**/bias")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates["dense"]["kernel"], jnp.zeros((1, 2)))
    chex.assert_trees_all_close(updates["dense"]["bias"], jnp.array([-0.3, -0.3]))


def test_works_as_a_link_behind_any_optimizer():
    tx = optax.chain(optax.adam(LR), jaxreg.weight_decay(0.1, rate=LR))
    chex.assert_trees_all_close(
        run(tx), run(optax.adamw(LR, weight_decay=0.1, mask=kernels_only)), rtol=1e-6
    )


def test_without_a_rate_outside_of_regularize_it_says_what_is_missing():
    tx = optax.chain(optax.adam(LR), jaxreg.weight_decay(0.1))
    with pytest.raises(ValueError, match="rate: got None outside of jaxreg.regularize"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "make", [lambda **k: jaxreg.weight_decay(0.1, 1.0, **k), lambda **k: jaxreg.l2_decay(0.1, **k)]
)
def test_bad_use_is_refused_with_the_arguments_name(make):
    with pytest.raises(ValueError, match="where: got .*matches no leaf.*dense/kernel"):
        make(where="**/kernal").init(PARAMS)
    tx = make()
    with pytest.raises(ValueError, match="params: got None"):
        tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize(
    "make", [lambda **k: jaxreg.weight_decay(0.1, 1.0, **k), lambda **k: jaxreg.l2_decay(0.1, **k)]
)
def test_a_selected_leaf_that_is_not_floating_is_refused_at_init(make):
    params = {"kernel": jnp.ones((2, 2)), "count": jnp.arange(3)}
    make().init(params)
    with pytest.raises(ValueError, match="params: got int32 values on the leaf count"):
        make(where=where.everything).init(params)


def test_a_rate_and_a_strength_of_any_dtypes_go_together(strict):
    tx = jaxreg.weight_decay(jnp.float32(0.5), rate=jnp.bfloat16(0.5))
    w = jnp.ones((2, 2), jnp.bfloat16)
    updates, _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
    assert updates.tolist() == [[-0.25, -0.25]] * 2


@pytest.mark.parametrize("bad", [-0.1, float("nan"), "0.1"])
def test_bad_strengths_are_refused(bad):
    with pytest.raises(ValueError, match="^strength: got"):
        jaxreg.weight_decay(bad, 1.0)
    with pytest.raises(ValueError, match="^strength: got"):
        jaxreg.l2_decay(bad)
    with pytest.raises(ValueError, match="^rate: got"):
        jaxreg.weight_decay(0.1, bad)


# The names that papers give it --------------------------------------------------------------------

STEPS = 6
PEAK, STRENGTH = 0.3, 0.2


def schedule(count):
    """Up and down, with numbers for count of JAX, NumPy and Python."""
    return PEAK * (1 - abs(count - 2) / 5)


FROM = np.array([[2.0, -4.0], [0.5, 0.0]])
NOISE = np.random.default_rng(0).normal(size=(STEPS, 2, 2))


def average(p, state, decay=0.9):
    """The anchor of a step: the average of the weights up to it."""
    state["average"] = decay * state.get("average", FROM) + (1 - decay) * p
    return state["average"]


# name: the arguments, and the weights after a step by the paper, p' = paper(t, p, u, state), where
# u is the direction (SGDW: momentum), which goes down as -rate * u.
NAMES = {
    "AdamW": ({}, lambda t, p, u, s: p - schedule(t) * (u + STRENGTH * p)),
    "independent, scheduled": (
        {"rate": lambda t: schedule(t) / PEAK},
        lambda t, p, u, s: p - schedule(t) / PEAK * (PEAK * u + STRENGTH * p),
    ),
    "independent, constant": (
        {"rate": 1.0},
        lambda t, p, u, s: p - schedule(t) * u - STRENGTH * p,
    ),
    "PaLM": (
        {"rate": lambda t: schedule(t) ** 2},
        lambda t, p, u, s: p - schedule(t) * u - STRENGTH * schedule(t) ** 2 * p,
    ),
    "AdamC": (
        {"rate": lambda t: schedule(t) ** 2 / PEAK},
        lambda t, p, u, s: p - schedule(t) * (u + STRENGTH * schedule(t) / PEAK * p),
    ),
    "cautious": (
        {"gate": "cautious"},
        lambda t, p, u, s: p - schedule(t) * (u + STRENGTH * (u * p >= 0) * p),
    ),
    "L2-SP": (
        {"toward": "init"},
        lambda t, p, u, s: p - schedule(t) * (u + STRENGTH * (p - FROM)),
    ),
    "L2-SP, another start": (
        {"toward": {"kernel": jnp.full((2, 2), 0.5)}},
        lambda t, p, u, s: p - schedule(t) * (u + STRENGTH * (p - 0.5)),
    ),
    "EMA": (
        {"toward": jaxreg.ema(0.9)},
        lambda t, p, u, s: p - schedule(t) * (u + STRENGTH * (p - average(p, s))),
    ),
    "AdamHD": (
        {"profile": "huber", "delta": 0.7},
        lambda t, p, u, s: p - schedule(t) * (u + STRENGTH * np.clip(p, -0.7, 0.7)),
    ),
    "L1": (
        {"profile": "l1"},
        lambda t, p, u, s: (
            p - schedule(t) * u - np.sign(p) * np.minimum(np.abs(p), schedule(t) * STRENGTH)
        ),
    ),
}


def path_of(decay, momentum, leaves=("kernel",)):
    """The weights after each step, of leaves that start alike and have the same gradients."""
    tx = jaxreg.regularize(optax.trace(momentum), schedule, decay=decay)

    def step(carry, g):
        updates, state = tx.update(dict.fromkeys(leaves, g), carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        return (params, state), params

    params = dict.fromkeys(leaves, jnp.asarray(FROM, jnp.float32))
    run = lambda grads: jax.lax.scan(step, (params, tx.init(params)), grads)[1]  # noqa: E731
    return jax.jit(run)(jnp.asarray(NOISE, jnp.float32))


def path_by(paper, momentum):
    """The same by a paper's formula."""
    p, u, memory, path = FROM, 0.0, {}, []
    for t in range(STEPS):
        u = NOISE[t] + momentum * u
        p = paper(t, p, u, memory)
        path.append(p)
    return path


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["SGD", "momentum"])
@pytest.mark.parametrize("name", NAMES)
def test_the_names_that_papers_give_it(name, momentum):
    arguments, paper = NAMES[name]
    found = path_of(jaxreg.weight_decay(STRENGTH, **arguments), momentum)
    np.testing.assert_allclose(found["kernel"], path_by(paper, momentum), rtol=1e-5, atol=1e-6)


def test_adamc_on_normalized_layers_and_adamw_on_the_others():
    decay = optax.chain(
        jaxreg.weight_decay(STRENGTH, **NAMES["AdamC"][0], where="normalized"),
        jaxreg.weight_decay(STRENGTH, where="output"),
    )
    found = path_of(decay, 0.9, leaves=("normalized", "output", "bias"))
    papers = {
        "normalized": NAMES["AdamC"][1],
        "output": NAMES["AdamW"][1],
        "bias": lambda t, p, u, s: p - schedule(t) * u,
    }
    for leaf, paper in papers.items():
        np.testing.assert_allclose(found[leaf], path_by(paper, 0.9), rtol=1e-5, atol=1e-6)


def test_the_state_tells_the_decay_of_the_last_step():
    tx = jaxreg.weight_decay(0.5, rate=lambda count: 0.1 * (count + 1))
    state = tx.init(PARAMS)
    for expected in (0.05, 0.1):
        _, state = tx.update(GRADS, state, PARAMS)
        assert float(state.amount) == pytest.approx(expected)


# Anchors -----------------------------------------------------------------------------------------


def anchored(toward, params=PARAMS, **rest):
    tx = jaxreg.weight_decay(0.5, rate=1.0, toward=toward, **rest)
    return tx, tx.init(params)


@pytest.mark.parametrize("toward", ["init", PARAMS, jaxreg.ema(0.9)], ids=["init", "tree", "ema"])
def test_anchors_are_copies_of_what_decays(toward):
    params = jax.tree.map(jnp.copy, PARAMS)
    tx, state = anchored(toward, params)
    chex.assert_trees_all_equal(state.anchor, (PARAMS["dense"]["kernel"],))
    # Parameters and state are donated: an array that is in both could not be.
    step = jax.jit(lambda p, s: tx.update(p, s, p), donate_argnums=(0, 1))
    updates, state = step(params, state)
    chex.assert_trees_all_close(updates["dense"]["kernel"], PARAMS["dense"]["kernel"])
    assert PARAMS["dense"]["kernel"].tolist() == [[2.0, -4.0]]


def test_an_average_of_bf16_weights_is_kept_in_float32():
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    tx, state = anchored(jaxreg.ema(0.999), params)
    moved = {"kernel": jnp.full((2, 2), 2, jnp.bfloat16)}
    updates, state = tx.update(moved, state, moved)
    assert state.anchor[0].dtype == jnp.float32
    np.testing.assert_allclose(state.anchor[0], 1.001, rtol=1e-6)
    assert updates["kernel"].dtype == jnp.bfloat16


def test_anchors_under_masked_are_those_of_the_leaves_that_are_seen():
    params = {"a": jnp.full((2, 2), 3.0), "b": jnp.full((2, 2), 5.0)}
    tx = jaxreg.weight_decay(1.0, rate=1.0, toward=jax.tree.map(jnp.ones_like, params))
    masked = optax.masked(tx, {"a": True, "b": False})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = masked.update(zeros, masked.init(params), params)
    chex.assert_trees_all_close(updates, {"a": jnp.full((2, 2), -2.0), "b": jnp.zeros((2, 2))})


def test_complex_weights_decay_by_their_modulus():
    w = jnp.array([[3 + 4j, 0.3j, 0]])
    found = {}
    for profile in ("quadratic", "huber", "l1"):
        tx = jaxreg.weight_decay(0.5, rate=1.0, profile=profile)
        found[profile], _ = tx.update(jnp.zeros_like(w), tx.init(w), w)
    np.testing.assert_allclose(found["quadratic"], -0.5 * w)
    np.testing.assert_allclose(found["huber"], [[-0.3 - 0.4j, -0.15j, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["l1"], [[-0.3 - 0.4j, -0.3j, 0]], rtol=1e-6)
    gated = jaxreg.weight_decay(0.5, rate=1.0, gate="cautious")
    step = jnp.array([[1j, -1 - 1j, 1 + 0j]])  # outwards, inwards, from 0
    updates, _ = gated.update(step, gated.init(w), w)
    np.testing.assert_allclose(updates - step, [[0, -0.15j, 0]], rtol=1e-6)


def test_the_gate_looks_at_signs_where_products_underflow():
    tx = jaxreg.weight_decay(0.5, rate=1.0, gate="cautious")
    w = jnp.array([[1e-30, 1e-30]])
    step = jnp.array([[1e-30, -1e-30]])
    updates, _ = tx.update(step, tx.init(w), w)
    np.testing.assert_allclose(updates - step, [[0, -0.5e-30]], rtol=1e-6)


def test_an_l1_decay_ends_at_the_anchor_exactly():
    tx = jaxreg.weight_decay(0.5, rate=1.0, profile="l1", toward={"kernel": jnp.full((1, 3), 2.0)})
    params = {"kernel": jnp.array([[2.25, 1.5, 9.0]])}
    updates, _ = tx.update({"kernel": jnp.zeros((1, 3))}, tx.init(params), params)
    assert optax.apply_updates(params, updates)["kernel"].tolist() == [[2.0, 2.0, 8.5]]


OTHER = {"dense": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(2)}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"profile": "hubert"}, r"^profile: got 'hubert' \(did you mean 'huber'\?\)"),
        ({"gate": "cautius"}, r"^gate: got 'cautius' \(did you mean 'cautious'\?\)"),
        ({"toward": "start"}, "^toward: got 'start'; accepted: 'init', None, a tree"),
        ({"toward": jaxreg.ema}, "^toward: got <class .*; accepted: .*jaxreg.ema"),
        ({"delta": 1.0}, "^delta: got 1.0 with 'quadratic'; accepted: None"),
        ({"profile": "huber", "delta": 0}, "^delta: got 0.0"),
        ({"toward": jnp.ones(3)}, "^toward: got a tree without the leaf dense/bias"),
        (
            {"toward": {"dense": {**OTHER["dense"], "more": 1.0}}},
            "^toward: got 1.0 on the leaf dense/more",
        ),
        ({"toward": OTHER}, r"^toward: got shape \(2, 1\) for \(1, 2\) on dense/kernel"),
        ({"toward": {**PARAMS, "more": jnp.ones(2)}}, "^toward: got a leaf more, which params"),
    ],
)
def test_bad_anchors_and_names_are_refused_at_init_at_the_latest(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxreg.weight_decay(0.1, 1.0, **arguments).init(PARAMS)


def test_the_weights_at_init_need_parameters_at_init():
    with pytest.raises(ValueError, match="^toward: got 'init' without parameters at init"):
        jaxreg.weight_decay(0.1, 1.0, toward="init").init(None)
    with pytest.raises(ValueError, match="^decay: got 1.0"):
        jaxreg.ema(1.0)


def test_new_strengths_and_deltas_compile_nothing_new():
    @jax.jit
    def step(strength, delta, toward):
        tx = jaxreg.weight_decay(strength, 1.0, profile="huber", delta=delta, toward=toward)
        return tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]

    for number in (0.1, 0.2):
        step(number, number, PARAMS)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": jaxreg.l2_decay(0.1)}, "decay: got jaxreg.l2_decay; .* for l2="),
        ({"decay": optax.add_decayed_weights(0.1)}, "decay: got optax.add_decayed_weights"),
        (
            {"decay": jaxreg.ewc(0.1, PARAMS, jax.tree.map(jnp.abs, PARAMS))},
            "decay: got jaxreg.ewc; .* for l2=",
        ),
        ({"decay": optax.adam(1.0)}, "decay: got a whole optimizer, with optax.scale"),
        (
            {"decay": jaxreg.selective_projection_decay(optax.identity())},
            "decay: got jaxreg.selective_projection_decay; .* goes around",
        ),
        ({"l2": jaxreg.weight_decay(0.1, 1.0)}, "l2: got jaxreg.weight_decay; .* for decay="),
        ({"clip": jaxreg.weight_decay(0.1, 1.0)}, "clip: got jaxreg.weight_decay; .* for decay="),
        (
            {"clip": optax.chain(jaxreg.clip_by_leaf_norm(1.0), jaxreg.l2_decay(0.1))},
            "clip: got jaxreg.l2_decay",
        ),
        ({"l2": jaxreg.clip_by_leaf_norm(1.0)}, "l2: got jaxreg.clip; .* for clip="),
        ({"clip": jaxreg.ema_of_params(0.9)}, "clip: got .*; .* comes last"),
        ({"clip": jaxreg.clip_update_rms()}, "clip: got jaxreg.clip_update_rms; .* clips updates"),
        (
            {"clip": -1.0},
            "clip: got -1.0; accepted: a number > 0, or a link such as jaxreg.clip_by",
        ),
        ({"clip": optax.linear_schedule(1, 0, 9)}, "clip: got a function; .* a link such as"),
        ({"l2": -1.0}, "l2: got -1.0; .*a schedule, or a link such as jaxreg.l2_decay"),
        ({"decay": "0.1"}, "decay: got '0.1'; .*a schedule, or a link such as jaxreg.weight_decay"),
    ],
)
def test_a_link_in_the_wrong_place_of_regularize_is_refused(arguments, message):
    """Weights would grow: what belongs before the learning rate has the other sign behind it."""
    with pytest.raises(ValueError, match=f"^{message}"):
        jaxreg.regularize(optax.identity(), LR, **arguments)


def test_links_that_come_last_may_follow_a_decay_in_its_place():
    decay = optax.chain(jaxreg.weight_decay(0.1), jaxreg.watch())
    tx = jaxreg.regularize(optax.identity(), LR, decay=decay)
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    assert {"decay.amount", "weights.angle"} <= jaxreg.metrics(state).keys()
