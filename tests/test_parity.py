"""Clips, decays and losses beside those of libraries that they are to equal, by public calls.

torch and Keras are in the extra ``parity``; ``.ci/run`` installs it and runs this file once more.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxreg

INF, NAN = np.inf, np.nan


def torch_gradients(clip, grads, dtype):
    torch = importlib.import_module("torch")
    params = [torch.nn.Parameter(torch.zeros(len(g), dtype=getattr(torch, dtype))) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.tensor(g, dtype=p.dtype)
    clip(torch.nn.utils, params)
    return [p.grad.to(torch.float64).numpy() for p in params]


def keras_gradients(argument, limit, grads, dtype):
    """The gradient that a step of SGD with the learning rate 1 takes from weights of 0."""
    keras = importlib.import_module("keras")
    weights = [keras.Variable(np.zeros(len(g)), dtype=dtype) for g in grads]
    optimizer = keras.optimizers.SGD(1.0, **{argument: limit})
    optimizer.apply([jnp.array(g, dtype) for g in grads], weights)
    return [-np.asarray(w.value, np.float64) for w in weights]


def optax_gradients(tx, grads, dtype):
    grads = [jnp.array(g, dtype) for g in grads]
    found, _ = tx.update(grads, tx.init(grads), None)
    return [np.asarray(g, np.float64) for g in found]


THEIRS = {
    ("global", "torch"): lambda c, g, t: torch_gradients(
        lambda utils, params: utils.clip_grad_norm_(params, c), g, t
    ),
    ("global", "optax"): lambda c, g, t: optax_gradients(optax.clip_by_global_norm(c), g, t),
    ("global", "keras"): lambda c, g, t: keras_gradients("global_clipnorm", c, g, t),
    ("value", "torch"): lambda c, g, t: torch_gradients(
        lambda utils, params: utils.clip_grad_value_(params, c), g, t
    ),
    ("value", "optax"): lambda c, g, t: optax_gradients(optax.clip(c), g, t),
    ("value", "keras"): lambda c, g, t: keras_gradients("clipvalue", c, g, t),
    ("leaf", "keras"): lambda c, g, t: keras_gradients("clipnorm", c, g, t),
}
OURS = {
    "global": lambda library, c: jaxreg.clip_by_global_norm(c, semantics=library),
    "value": lambda library, c: jaxreg.clip_by_value(c),
    "leaf": lambda library, c: jaxreg.clip_by_leaf_norm(c),
}

RNG = np.random.default_rng(0)
ORDINARY = [RNG.normal(size=n).tolist() for n in (5, 1, 40)]
# Gradients, limit, and dtype.
CASES = {
    "above": ([[3.0], [4.0]], 1.0, "float32"),
    "at": ([[3.0, 4.0]], 5.0, "float32"),
    "below": ([[3.0, 4.0]], 6.0, "float32"),
    "small": ([[3e-6], [4e-6]], 5e-6, "float32"),
    "ordinary": (ORDINARY, 0.7, "float32"),
    "bfloat16": (ORDINARY, 0.7, "bfloat16"),
    "infinity": ([[INF, 1.0], [2.0]], 1.0, "float32"),
    "nan": ([[NAN, 1.0], [2.0]], 1.0, "float32"),
    "overflow": ([[3e30, 4e30], [1e30]], 1.0, "float32"),
    "zero": ([[0.0, 0.0], [0.0]], 1.0, "float32"),
}
# The clips of single entries and leaves have one meaning, whose norms do not overflow.
SAME = {
    "value": list(CASES),
    "leaf": ["above", "at", "below", "small", "ordinary", "bfloat16", "nan", "zero"],
}
ROWS = [
    (clip, library, case)
    for clip, library in THEIRS
    for case in (CASES if clip == "global" else SAME[clip])
]


@pytest.fixture
def libraries(monkeypatch):
    """Skips where a library is not installed."""

    def need(name):
        monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when Keras is first imported
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra [parity]")
        if name == "keras":
            assert importlib.import_module("keras").backend.backend() == "jax"

    return need


@pytest.mark.parametrize(("clip", "library", "case"), ROWS)
def test_clips_as_the_library_itself_does(clip, library, case, libraries):
    libraries(library)
    grads, limit, dtype = CASES[case]
    theirs = THEIRS[clip, library](limit, grads, dtype)
    ours = optax_gradients(OURS[clip](library, limit), grads, dtype)
    # bf16: torch and optax round the norm, the coefficient and their product; jaxreg the last.
    rounding = 2.0**-6 if dtype == "bfloat16" else 2e-7
    for own, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, expected, rtol=rounding)


# What the rows above find the libraries to do, so that a change of theirs is seen as one.
TABLE = {
    ("torch", "at"): [2.9999993, 3.999999],
    ("optax", "at"): [3.0, 4.0],
    ("keras", "at"): [3.0, 4.0],
    ("torch", "small"): [2.5e-6, 3.3333333e-6],
    ("optax", "small"): [3e-6, 4e-6],
    ("keras", "small"): [3e-6, 4e-6],
    ("torch", "infinity"): [NAN, 0.0, 0.0],
    ("optax", "infinity"): [NAN, 0.0, 0.0],
    ("keras", "infinity"): [NAN, NAN, NAN],
    ("torch", "overflow"): [0.0, 0.0, 0.0],
    ("optax", "overflow"): [0.0, 0.0, 0.0],
    ("keras", "overflow"): [NAN, NAN, NAN],
    **{(library, "zero"): [0.0, 0.0, 0.0] for library in ("torch", "optax", "keras")},
    **{(library, "nan"): [NAN, NAN, NAN] for library in ("torch", "optax", "keras")},
}


@pytest.mark.parametrize(("library", "case"), TABLE)
def test_each_semantics_gives_what_the_table_of_the_libraries_says(library, case):
    grads, limit, dtype = CASES[case]
    found = optax_gradients(OURS["global"](library, limit), grads, dtype)
    np.testing.assert_allclose(np.concatenate(found), TABLE[library, case], rtol=2e-7)


# Decays: the weights after each of some steps, in float64 -----------------------------------------

STRENGTH, LR, EPS = 0.3, 0.05, 1e-10  # Keras has its eps at another place
START = np.array([2.0, -1.0, 0.5, -3.0])
GRADIENTS = RNG.normal(size=(20, 4)) * [5.0, 1.0, 0.2, 0.05]


def torch_path(optimizer):
    torch = importlib.import_module("torch")
    p = torch.nn.Parameter(torch.tensor(START))
    optimizer, path = optimizer(torch.optim, [p]), []
    for g in GRADIENTS:
        p.grad = torch.tensor(g)
        optimizer.step()
        path.append(p.detach().numpy().copy())
    return path


def keras_path(optimizer, regularizer=None):
    """With a regularizer: what Keras adds to the loss, in the gradient."""
    keras = importlib.import_module("keras")
    p = keras.Variable(START, dtype="float64")
    optimizer, path = optimizer(keras.optimizers), []
    added = jax.grad(regularizer(keras.regularizers) if regularizer else lambda w: 0.0 * w.sum())
    for g in GRADIENTS:
        optimizer.apply([jnp.array(g) + added(p.value)], [p])
        path.append(np.array(p.value))
    return path


def jaxreg_path(tx):
    def step(run, g):
        w, state = run
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    start = jnp.array(START)
    run = jax.jit(lambda gradients: jax.lax.scan(step, (start, tx.init(start)), gradients)[1])
    return run(jnp.array(GRADIENTS))


def in_the_loss(penalty):
    """A penalty's gradient, added as the loss's own: where Keras has its regularizers."""
    return optax.stateless(lambda g, w: jax.tree.map(jnp.add, g, jax.grad(penalty.value)(w)))


ADAM, MOMENTUM = optax.scale_by_adam(eps=EPS), optax.trace(0.9)
DECAYS = {
    ("torch", "AdamW"): (
        lambda: torch_path(lambda optim, p: optim.AdamW(p, LR, eps=EPS, weight_decay=STRENGTH)),
        lambda: jaxreg.regularize(ADAM, LR, decay=STRENGTH),
    ),
    ("torch", "Adam(weight_decay)"): (
        lambda: torch_path(lambda optim, p: optim.Adam(p, LR, eps=EPS, weight_decay=STRENGTH)),
        lambda: jaxreg.regularize(ADAM, LR, l2=STRENGTH),
    ),
    ("torch", "SGD(weight_decay)"): (
        lambda: torch_path(lambda optim, p: optim.SGD(p, LR, momentum=0.9, weight_decay=STRENGTH)),
        lambda: jaxreg.regularize(MOMENTUM, LR, l2=STRENGTH),
    ),
    ("keras", "AdamW"): (
        lambda: keras_path(lambda optim: optim.AdamW(LR, epsilon=EPS, weight_decay=STRENGTH)),
        lambda: jaxreg.regularize(ADAM, LR, decay=STRENGTH),
    ),
    ("keras", "SGD with L2"): (
        lambda: keras_path(
            lambda optim: optim.SGD(LR, momentum=0.9), lambda added: added.L2(STRENGTH)
        ),
        lambda: jaxreg.regularize(MOMENTUM, LR, l2=jaxreg.l2_decay(2 * STRENGTH)),
    ),
    ("keras", "SGD with L1"): (
        lambda: keras_path(
            lambda optim: optim.SGD(LR, momentum=0.9), lambda added: added.L1(STRENGTH)
        ),
        lambda: optax.chain(in_the_loss(jaxreg.L1(STRENGTH)), optax.sgd(LR, momentum=0.9)),
    ),
    ("keras", "SGD with L1L2"): (
        lambda: keras_path(
            lambda optim: optim.SGD(LR, momentum=0.9), lambda added: added.L1L2(STRENGTH, 0.1)
        ),
        lambda: optax.chain(
            in_the_loss(jaxreg.L1(STRENGTH)),
            jaxreg.regularize(MOMENTUM, LR, l2=jaxreg.l2_decay(0.2)),
        ),
    ),
}


# Keras: jaxreg's penalty of the same value.
VALUES = {
    "L1": (lambda keras: keras.L1(STRENGTH), jaxreg.L1(STRENGTH)),
    "L2": (lambda keras: keras.L2(STRENGTH), jaxreg.L2(2 * STRENGTH)),
    "L1L2": (lambda keras: keras.L1L2(STRENGTH, 0.1), jaxreg.L1(STRENGTH) + jaxreg.L2(0.2)),
}


@pytest.mark.parametrize("name", VALUES)
def test_penalties_have_the_value_and_the_gradient_of_keras_regularizers(name, libraries, x64):
    libraries("keras")
    theirs, ours = VALUES[name]
    theirs = theirs(importlib.import_module("keras").regularizers)
    for w in (jnp.array(START), jnp.array(GRADIENTS)):
        found, expected = (jax.value_and_grad(value)(w) for value in (ours.value, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize(("library", "optimizer"), DECAYS)
def test_decays_as_the_library_itself_does(library, optimizer, libraries, x64):
    libraries(library)
    theirs, ours = DECAYS[library, optimizer]
    np.testing.assert_allclose(jaxreg_path(ours()), theirs(), rtol=1e-6)


# Losses -----------------------------------------------------------------------------------------

ROWS, CLASSES = 6, 5
_draws = np.random.default_rng(0)
LOGITS = 3 * _draws.normal(size=(ROWS, CLASSES))
INDICES = np.array([0, 4, 2, 2, 1, 3])
PROBABILITIES = _draws.dirichlet(np.ones(CLASSES), ROWS)
WEIGHTS = _draws.uniform(0.2, 3, CLASSES)
precisions = pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float64", 1e-12)])


def torch_cross_entropy(dtype, labels, weights=None, **options):
    """torch's value, and its gradient in the logits."""
    torch = importlib.import_module("torch")
    dtype = getattr(torch, dtype)
    logits = torch.tensor(LOGITS, dtype=dtype).requires_grad_()
    labels = torch.tensor(labels, dtype=None if labels.dtype.kind == "i" else dtype)
    weights = None if weights is None else torch.tensor(weights, dtype=dtype)
    loss = torch.nn.functional.cross_entropy(logits, labels, weights, **options)
    loss.sum().backward()
    return loss.detach().numpy(), logits.grad.numpy()


def value_and_gradient(dtype, loss):
    logits = jnp.asarray(LOGITS, dtype)
    return loss(logits), jax.grad(lambda x: jnp.sum(loss(x)))(logits)


def assert_equal(found, expected, bound):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=bound, atol=bound)


@precisions
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["no weights", "weights"])
@pytest.mark.parametrize("ignored", [None, 2])
def test_cross_entropy_of_indices_is_torchs(
    libraries, dtype, bound, reduction, smoothing, weights, ignored, x64
):
    libraries("torch")
    labels, identity = jnp.asarray(INDICES), jnp.eye(CLASSES, dtype=dtype)
    some = {"class_weights": weights, "ignore_index": ignored, "reduction": reduction}
    theirs = {} if ignored is None else {"ignore_index": ignored}
    expected = torch_cross_entropy(
        dtype, INDICES, weights, reduction=reduction, label_smoothing=smoothing, **theirs
    )
    for loss in (
        lambda x: jaxreg.smoothed_cross_entropy(x, labels, smoothing, **some),
        lambda x: jaxreg.linear_cross_entropy(x, identity, labels, None, smoothing, **some),
    ):
        assert_equal(value_and_gradient(dtype, loss), expected, bound)


@precisions
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["no weights", "weights"])
def test_cross_entropy_of_probabilities_is_torchs(libraries, dtype, bound, smoothing, weights, x64):
    """torch's mean is over the rows here, whatever the weights."""
    libraries("torch")
    q = jnp.asarray(PROBABILITIES, dtype)

    def loss(x, reduction):
        return jaxreg.smoothed_cross_entropy(
            x, q, smoothing, class_weights=weights, reduction=reduction
        )

    for theirs, ours in {
        "none": lambda x: loss(x, "none"),
        "sum": lambda x: loss(x, "sum"),
        "mean": lambda x: loss(x, "none").mean(),
    }.items():
        expected = torch_cross_entropy(
            dtype, PROBABILITIES, weights, reduction=theirs, label_smoothing=smoothing
        )
        assert_equal(value_and_gradient(dtype, ours), expected, bound)


def test_the_mean_of_ignored_rows_is_nan_in_torch_and_zero_here(libraries):
    libraries("torch")
    ignored = np.full(ROWS, -100)
    assert np.isnan(torch_cross_entropy("float32", ignored)[0])
    logits = jnp.asarray(LOGITS, "float32")
    found = jaxreg.smoothed_cross_entropy(
        logits, jnp.asarray(ignored), ignore_index=-100, reduction="mean"
    )
    assert found == 0


@precisions
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropies_are_keras(libraries, dtype, bound, smoothing, x64):
    libraries("keras")
    losses = importlib.import_module("keras").losses
    logits, labels = jnp.asarray(LOGITS, dtype), jnp.asarray(INDICES)
    one_hot = jax.nn.one_hot(labels, CLASSES, dtype=dtype)
    options = {"label_smoothing": smoothing, "reduction": "sum", "dtype": dtype}
    theirs = losses.CategoricalCrossentropy(from_logits=True, **options)
    found = value_and_gradient(
        dtype, lambda x: jaxreg.smoothed_cross_entropy(x, labels, smoothing, reduction="sum")
    )
    expected = value_and_gradient(dtype, lambda x: theirs(one_hot, x))
    assert_equal(found, expected, bound)
    binary = losses.BinaryCrossentropy(from_logits=True, **options)
    ours = jaxreg.sigmoid_smoothed_cross_entropy(logits, one_hot, smoothing, reduction="sum")
    # In any dtype: Keras keeps probabilities 1e-7 away from 0 and 1.
    np.testing.assert_allclose(ours / CLASSES, binary(one_hot, logits), rtol=1e-6)


@precisions
def test_binary_cross_entropy_is_torchs(libraries, dtype, bound, x64):
    libraries("torch")
    torch = importlib.import_module("torch")
    kind, labels = getattr(torch, dtype), np.eye(CLASSES)[INDICES]
    logits, targets, weights = (torch.tensor(x, dtype=kind) for x in (LOGITS, labels, WEIGHTS))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, pos_weight=weights, reduction="none"
    )
    found = jaxreg.sigmoid_smoothed_cross_entropy(
        jnp.asarray(LOGITS, dtype), labels, 0.0, positive_weight=WEIGHTS
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=bound, atol=bound)


@precisions
def test_a_spread_over_the_others_is_fairseqs(dtype, bound, x64):
    """(1 - e - e/(K-1)) nll + e/(K-1) times the sum of all -log p; uniform with e K/(K-1) too."""
    e = 0.2
    log_p = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    share, nll = e / (CLASSES - 1), -log_p[np.arange(ROWS), INDICES]
    expected = (1 - e - share) * nll - share * log_p.sum(1)
    logits, labels = jnp.asarray(LOGITS, dtype), jnp.asarray(INDICES)
    for smoothing, spread in ((e, "others"), (e * CLASSES / (CLASSES - 1), "uniform")):
        found = jaxreg.smoothed_cross_entropy(logits, labels, smoothing, spread=spread)
        np.testing.assert_allclose(found, expected, rtol=bound)
