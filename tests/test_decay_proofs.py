"""Known answers about weight decay: where training ends, how large weights get, what libraries do.

A scale-invariant layer is one in front of a normalization: its gradients are orthogonal to its
weights w, and their size goes as 1 / ||w||. Decay then sets the norm at which the layer rests, and
by it how far a step turns the layer, and nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg


def train(optimizers, gradient, start, inputs, watch=lambda w: w):
    """What `watch(w)` gives after each step, by the optimizer's name, in one loop.

    Each optimizer has its own weights, which start at `start`, and sees gradient(w, input).
    """

    def step(runs, x):
        after = {}
        for name, (w, state) in runs.items():
            updates, state = optimizers[name].update(gradient(w, x), state, w)
            after[name] = optax.apply_updates(w, updates), state
        return after, {name: watch(w) for name, (w, _) in after.items()}

    runs = {name: (start, tx.init(start)) for name, tx in optimizers.items()}
    return jax.lax.scan(step, runs, inputs)[1]


# Where training ends ----------------------------------------------------------------------------


def test_cautious_decay_reaches_the_minimizer_and_adamw_another_known_point(x64):
    """Without noise, Adam's step is the sign of the gradient until that is gone. So AdamW ends at
    the minimizer within the box |w| <= 1 / strength (Xie and Li, ICML 2024, arXiv:2404.04454), and
    behind an eps that counts where g / (|g| + eps) = -strength * w."""
    strength, eps, steps = 0.5, 1.0, 4000
    curvature = np.array([1.0, 0.4, 3.0, 0.5])
    minimizer = np.array([3.0, -4.0, 0.7, -0.2])
    schedule = optax.cosine_decay_schedule(0.02, steps)
    cautious = jaxreg.weight_decay(strength, gate="cautious")
    optimizers = {
        (name, kind): jaxreg.regularize(optax.scale_by_adam(b2=0.99, eps=e), schedule, decay=decay)
        for kind, e in {"sign": 1e-8, "smooth": eps}.items()
        for name, decay in {"AdamW": strength, "cautious": cautious}.items()
    }

    @jax.jit
    def run():
        gradient = lambda w, _: curvature * (w - minimizer)  # noqa: E731
        paths = train(optimizers, gradient, jnp.zeros(4), jnp.arange(steps))
        return {name: path[-1] for name, path in paths.items()}

    ends = run()
    # The root of s h w^2 - (s h |w*| + s eps + h) w + h |w*| = 0 that is below |w*|.
    h, a = curvature, abs(minimizer)
    b = strength * h * a + strength * eps + h
    root = (b - np.sqrt(b**2 - 4 * strength * h**2 * a)) / (2 * strength * h)
    expected = {
        ("AdamW", "sign"): np.clip(minimizer, -1 / strength, 1 / strength),
        ("AdamW", "smooth"): np.sign(minimizer) * root,
        ("cautious", "sign"): minimizer,
        ("cautious", "smooth"): minimizer,
    }
    for name, end in ends.items():
        np.testing.assert_allclose(end, expected[name], atol=1e-3)


# How large a scale-invariant layer gets ---------------------------------------------------------

SIZE = 256


def orthogonal_noise(w, key):
    """The gradient of a scale-invariant layer that has nothing to learn."""
    z = jax.random.normal(key, w.shape)
    square = jnp.sum(w * w)
    return (z - jnp.sum(w * z) / square * w) / jnp.sqrt(square)


def test_a_scale_invariant_layer_settles_at_the_predicted_norm():
    """A step adds lr^2 ||u||^2 to ||w||^2 and decay takes 2 lr strength ||w||^2. SGD: ||u||^2 =
    (n - 1) / ||w||^2. Adam: n, as a gradient's parts in all later steps have a sum of size 1 in
    each entry (Kosson et al., arXiv:2305.17212)."""
    strength, steps = 0.2, 4000
    rates = np.array([0.005, 0.02])

    @jax.jit
    @jax.vmap
    def mean_squares(lr):
        optimizers = {
            "AdamW": jaxreg.regularize(optax.scale_by_adam(b2=0.99), lr, decay=strength),
            "SGD": jaxreg.regularize(optax.identity(), lr, decay=strength),
            "momentum": jaxreg.regularize(optax.trace(0.9), lr, decay=strength),
        }
        keys = jax.random.split(jax.random.key(0), steps)
        start = jnp.full(SIZE, 2 / SIZE**0.5)
        squares = train(optimizers, orthogonal_noise, start, keys, lambda w: jnp.sum(w * w))
        return {name: s[steps // 2 :].mean() for name, s in squares.items()}

    norms = {name: np.sqrt(s) for name, s in mean_squares(jnp.array(rates)).items()}
    expected = {
        "AdamW": (SIZE * rates / (2 * strength)) ** (1 / 2),
        "SGD": ((SIZE - 1) * rates / (2 * strength)) ** (1 / 4),
        # A gradient moves w by lr / (1 - 0.9) in all, and lr / (1 - 0.9) is not what decay has.
        "momentum": ((SIZE - 1) * rates / 0.1**2 / (2 * strength)) ** (1 / 4),
    }
    for name, norm in norms.items():
        np.testing.assert_allclose(norm, expected[name], rtol=0.05)
    # Four times the learning rate: twice the norm under AdamW, a root of two under SGD.
    assert norms["AdamW"][1] / norms["AdamW"][0] == pytest.approx(2, rel=0.05)
    assert norms["SGD"][1] / norms["SGD"][0] == pytest.approx(2**0.5, rel=0.05)


def test_at_the_end_of_a_schedule_gradients_grow_under_adamw_and_not_under_adamc():
    """||w||^2 follows n lr / (2 strength) down with lr, so the gradient grows. AdamC's strength
    falls with lr (Defazio, arXiv:2506.02285)."""
    strength, steps, peak = 0.5, 10_000, 0.01
    schedule = optax.cosine_decay_schedule(peak, steps)
    adam = optax.scale_by_adam(b2=0.99)
    adamc = jaxreg.weight_decay(strength, rate=lambda t: schedule(t) ** 2 / peak)
    optimizers = {
        "AdamW": jaxreg.regularize(adam, schedule, decay=strength),
        "AdamC": jaxreg.regularize(adam, schedule, decay=adamc),
    }

    @jax.jit
    def run():
        keys = jax.random.split(jax.random.key(0), steps)
        start = jnp.full(SIZE, (peak / (2 * strength)) ** 0.5)  # at rest
        squares = train(optimizers, orthogonal_noise, start, keys, lambda w: jnp.sum(w * w))
        gradients = {name: jnp.sqrt((SIZE - 1) / square) for name, square in squares.items()}
        return {name: g.reshape(50, -1).mean(axis=1) for name, g in gradients.items()}

    def predicted(decays):
        square, gradients = SIZE * peak / (2 * strength), []
        for lr, amount in zip(rates, decays, strict=True):
            square = (1 - amount) ** 2 * square + lr**2 * SIZE
            gradients.append(((SIZE - 1) / square) ** 0.5)
        return np.reshape(gradients, (50, -1)).mean(axis=1)

    gradients = run()
    rates = peak * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2
    for name, decays in {"AdamW": rates * strength, "AdamC": rates**2 / peak * strength}.items():
        np.testing.assert_allclose(gradients[name], predicted(decays), rtol=0.05)
    assert gradients["AdamW"][-1] > 2.5 * gradients["AdamW"][0]
    np.testing.assert_allclose(gradients["AdamC"], gradients["AdamC"].mean(), rtol=0.05)


def test_the_best_independent_decay_stays_when_the_learning_rate_changes():
    """A scale-invariant model that has forgotten its start turns by sqrt(2 R) a step, where R is
    what decay takes in a step. What is best depends on the task alone, so the best R is the same
    for all learning rates.

    The task is a linear regression y = x . a + noise whose a drifts, fit by x . w / ||w||: a model
    that turns slowly lags behind a, and one that turns fast follows the noise. Without drift slower
    is better up to the end, the start is never forgotten, and the best decay depends on it. The
    validation loss is exact: (||w / ||w|| - a||^2 + noise^2) / 2."""
    size, batch, steps, noise, drift, peak = 32, 8, 5000, 1.0, 0.1, 0.01
    amounts = 0.008 * 2.0 ** np.arange(-3, 4)
    adam = optax.scale_by_adam(b2=0.99)

    def unit(w):
        return w / jnp.linalg.norm(w)

    def gradient(w, example):
        x, y, _ = example
        return jax.grad(lambda w: jnp.mean((x @ unit(w) - y) ** 2) / 2)(w)

    def stream(key):
        """Batches of x and y, and the a that they come from."""
        keys = jax.random.split(key, 4)
        moves = drift / size**0.5 * jax.random.normal(keys[0], (steps, size))
        start = unit(jax.random.normal(keys[1], (size,)))
        teachers = jax.lax.scan(lambda a, move: (unit(a + move),) * 2, start, moves)[1]
        x = jax.random.normal(keys[2], (steps, batch, size))
        y = jnp.einsum("sbd,sd->sb", x, teachers)
        return x, y + noise * jax.random.normal(keys[3], y.shape), teachers

    def losses(lr, amount, examples):
        schedule = optax.warmup_constant_schedule(0.0, lr, steps // 10)
        independent = jaxreg.weight_decay(amount, rate=lambda t: schedule(t) / lr)
        optimizers = {
            "independent": jaxreg.regularize(adam, schedule, decay=independent),
            # The same at the first of the learning rates.
            "AdamW": jaxreg.regularize(adam, schedule, decay=amount / peak),
        }
        paths = train(optimizers, gradient, jnp.ones(size), examples, unit)
        late = slice(steps // 2, None)
        return {
            name: ((w[late] - examples[2][late]) ** 2).sum(axis=1).mean() / 2 + noise**2 / 2
            for name, w in paths.items()
        }

    @jax.jit
    def over_grid(lrs, amounts):
        examples = jax.vmap(stream)(jax.random.split(jax.random.key(0), 2))
        each = jax.vmap(losses, (None, None, 0))
        each = jax.vmap(jax.vmap(each, (None, 0, None)), (0, None, None))
        return jax.tree.map(lambda loss: loss.mean(axis=-1), each(lrs, amounts, examples))

    found = over_grid(jnp.array([peak, 4 * peak]), jnp.array(amounts))
    best = {name: amounts[np.argmin(loss, axis=1)] for name, loss in found.items()}
    assert best["independent"][1] == best["independent"][0]
    assert best["AdamW"][1] == best["AdamW"][0] / 4
    assert amounts[2] <= best["independent"][0] <= amounts[-3]  # not because the grid ends there
    # And not by chance: where the start is forgotten, all of the loss is the same.
    forgotten = amounts * steps >= 10
    np.testing.assert_allclose(*found["independent"][:, forgotten], rtol=0.01)


# What is written down -----------------------------------------------------------------------------

START = np.array([2.0, -1.0, 0.5, -3.0])
STRENGTH, PEAK, STEPS = 0.3, 0.05, 25
RATES = np.linspace(PEAK, 0.01, STEPS)
GRADIENTS = np.random.default_rng(0).normal(size=(STEPS, 4)) * [5.0, 1.0, 0.2, 0.05]


def schedule(t):
    return jnp.asarray(RATES)[t]


def adam_path(coupled=0.0, decoupled=None, huber=np.inf):
    """Adam as Kingma and Ba write it. What decay takes of p in step t is decoupled[t] * p."""
    p, m, v, path = START, 0.0, 0.0, []
    decoupled = np.zeros(STEPS) if decoupled is None else decoupled
    for t, (g, lr, amount) in enumerate(zip(GRADIENTS, RATES, decoupled, strict=True), start=1):
        g = g + coupled * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        p = p - lr * step - amount * np.clip(p, -huber, huber)
        path.append(p)
    return np.array(path)


def momentum_path(coupled):
    """torch.optim.SGD: the velocity is of the gradient and the weights."""
    p, velocity, path = START, 0.0, []
    for g, lr in zip(GRADIENTS, RATES, strict=True):
        velocity = 0.9 * velocity + g + coupled * p
        p = p - lr * velocity
        path.append(p)
    return np.array(path)


def keras_path(strength):
    """keras.regularizers.L2 adds strength * sum p^2 to the loss."""
    p, path = START, []
    for g, lr in zip(GRADIENTS, RATES, strict=True):
        p = p - lr * (g + 2 * strength * p)
        path.append(p)
    return np.array(path)


def adam_with(**decay):
    return jaxreg.regularize(optax.scale_by_adam(), schedule, **decay)


def decay_at(rate, **options):
    return jaxreg.weight_decay(STRENGTH, rate=rate, **options)


# What jaxreg writes, and the formula that it is for.
WRITTEN = {
    "Adam": (adam_with(), lambda: adam_path()),
    "AdamW": (adam_with(decay=STRENGTH), lambda: adam_path(decoupled=RATES * STRENGTH)),
    "independent, scheduled": (
        adam_with(decay=decay_at(lambda t: schedule(t) / PEAK)),
        lambda: adam_path(decoupled=RATES / PEAK * STRENGTH),
    ),
    "independent, constant": (
        adam_with(decay=decay_at(1.0)),
        lambda: adam_path(decoupled=np.full(STEPS, STRENGTH)),
    ),
    "PaLM": (
        adam_with(decay=decay_at(lambda t: schedule(t) ** 2)),
        lambda: adam_path(decoupled=RATES**2 * STRENGTH),
    ),
    "AdamC": (
        adam_with(decay=decay_at(lambda t: schedule(t) ** 2 / PEAK)),
        lambda: adam_path(decoupled=RATES * (STRENGTH * RATES / PEAK)),
    ),
    "AdamHD": (
        adam_with(decay=decay_at(None, profile="huber", delta=0.8)),
        lambda: adam_path(decoupled=RATES * STRENGTH, huber=0.8),
    ),
    "Adam, L2": (adam_with(l2=STRENGTH), lambda: adam_path(coupled=STRENGTH)),
    "SGD(momentum, weight_decay) in torch": (
        jaxreg.regularize(optax.trace(0.9), schedule, l2=STRENGTH),
        lambda: momentum_path(STRENGTH),
    ),
    "regularizers.L2 in Keras": (
        jaxreg.regularize(optax.identity(), schedule, l2=jaxreg.l2_decay(2 * STRENGTH)),
        lambda: keras_path(STRENGTH),
    ),
}


def test_every_decay_is_the_formula_that_is_published(x64):
    optimizers = {name: tx for name, (tx, _) in WRITTEN.items()}
    run = jax.jit(lambda g: train(optimizers, lambda w, g: g, jnp.array(START), g))
    paths = run(jnp.array(GRADIENTS))
    for name, (_, formula) in WRITTEN.items():
        np.testing.assert_allclose(paths[name], formula(), rtol=1e-10, err_msg=name)


def test_l2_under_adam_shrinks_by_the_size_of_the_gradients_and_adamw_does_not():
    """Gradients of +size and -size in turn go nowhere by themselves, and Adam divides what L2 adds
    to them by size: weights fall as exp(-lr strength t / size), and under AdamW as
    exp(-lr strength t)."""
    size, lr, strength, steps = np.array([0.5, 1.0, 4.0]), 0.02, 0.002, 20_000
    optimizers = {
        "AdamW": jaxreg.regularize(optax.scale_by_adam(), lr, decay=strength),
        "L2": jaxreg.regularize(optax.scale_by_adam(), lr, l2=strength),
    }
    start = jnp.full(3, 5.0)
    run = jax.jit(lambda signs: train(optimizers, lambda w, sign: sign * size, start, signs))
    paths = run(jnp.array([1.0, -1.0] * (steps // 2)))
    for name, rate in {"AdamW": np.ones(3), "L2": 1 / size}.items():
        expected = start * np.exp(-lr * strength * steps * rate)
        np.testing.assert_allclose(paths[name][-1], expected, rtol=0.01)


def test_huber_decay_is_adamw_inside_of_delta_and_constant_beyond():
    """Without gradients, in float32. A weight of 5 loses lr * strength * delta in each step."""
    lr, strength, delta = 0.1, 0.2, 1.5
    huber = jaxreg.weight_decay(strength, profile="huber", delta=delta)
    optimizers = {
        "AdamW": jaxreg.regularize(optax.scale_by_adam(), lr, decay=strength),
        "AdamHD": jaxreg.regularize(optax.scale_by_adam(), lr, decay=huber),
    }
    start = jnp.array([1.5, -1.2, 1e-3, 5.0, -50.0])
    run = jax.jit(lambda: train(optimizers, lambda w, _: 0 * w, start, jnp.arange(20)))
    paths = {name: np.asarray(path) for name, path in run().items()}
    np.testing.assert_array_equal(paths["AdamHD"][:, :3], paths["AdamW"][:, :3])
    lost = lr * strength * delta * np.arange(1, 21)[:, None]
    np.testing.assert_allclose(
        paths["AdamHD"][:, 3:], np.sign(start[3:]) * (abs(start[3:]) - lost), rtol=1e-6
    )
