"""Exact zeros on real data: under the noise of batches, in bfloat16, donated and sharded.

The data are scikit-learn's 1,797 digits of 8x8 pixels; the model is logistic regression, whose
penalized minimizer is unique.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import jaxreg

BATCH = 64
Params = dict[str, jax.Array]


class Digits(NamedTuple):
    """1,400 digits to train on, the others to test on."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@functools.cache
def digits() -> Digits:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)
    return Digits(x[:1400], y[:1400], x[1400:], y[1400:])


def zero_params(dtype: Any = jnp.float32) -> Params:
    return {"kernel": jnp.zeros((64, 10), dtype), "bias": jnp.zeros(10, dtype)}


def logits(params: Params, x: jax.Array) -> jax.Array:
    return x.astype(params["kernel"].dtype) @ params["kernel"] + params["bias"]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    found = logits(params, x).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()


def accuracy(params: Params) -> float:
    data = digits()
    found = logits(params, jnp.asarray(data.test_images)).argmax(1)
    return float((found == data.test_labels).mean())


def train(
    tx: optax.GradientTransformation,
    steps: int,
    watch: Callable[[Any, Params], Any],
    params: Params | None = None,
    seeds: int = 1,
) -> tuple[Params, Any]:
    """Runs on batches, one for each seed, and what ``watch(before, after)`` saw in each step.

    `before` is the step's gradients, optimizer state and parameters.
    """
    params = zero_params() if params is None else params
    x, y = jnp.asarray(digits().images), jnp.asarray(digits().labels)

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(x))
        grads = jax.grad(loss)(params, x[rows], y[rows])
        updates, after = tx.update(grads, state, params)
        moved = optax.apply_updates(params, updates)
        return (moved, after), watch((grads, state, params), moved)

    def run(seed):
        keys = jax.random.split(jax.random.key(seed), steps)
        (end, _), seen = jax.lax.scan(step, (params, tx.init(params)), keys)
        return end, seen

    return jax.jit(lambda: jax.lax.map(run, jnp.arange(seeds)))()


# Batches -----------------------------------------------------------------------------------------


def test_dual_averaging_keeps_more_zero_groups_than_prox_adam_and_prox_sgd_at_equal_accuracy():
    """As published for MNIST: zero groups of ProxSGD 39%, ProxGen 40%, RMDA 57% and RAMDA 57%.

    The groups are the 10 weights of each pixel. Means of three runs, of the last tenth of each:

    ============= ========= ===========
    optimizer     accuracy  zero groups
    ============= ========= ===========
    prox_sgd      ACC       Z
    ============= ========= ===========
    """
    steps, seeds = 4000, 3
    penalty = jaxreg.GroupLasso(0.003, groups=jaxreg.groups.axes(1))
    decayed = functools.partial(optax.cosine_decay_schedule, decay_steps=steps)
    full_batch = {
        "prox_sgd": jaxreg.prox_sgd(decayed(0.5), penalty),
        "prox_adam": jaxreg.prox_adam(decayed(0.01), penalty),
        "rmda": jaxreg.rmda(0.5, penalty),
        "ramda": jaxreg.ramda(0.03, penalty),
    }
    zeros, right, changes = {}, {}, {}
    for name, tx in full_batch.items():
        watch = lambda before, after: jnp.all(after["kernel"] == 0, axis=1)  # noqa: E731
        params, seen = train(tx, steps, watch, seeds=seeds)
        last = np.asarray(seen)[:, -steps // 10 :]
        zeros[name] = last.mean((1, 2))
        right[name] = [accuracy(jax.tree.map(lambda p, i=i: p[i], params)) for i in range(seeds)]
        changes[name] = (last[:, 1:] != last[:, :-1]).any(2).mean()
        print(name, zeros[name], right[name], changes[name], np.mean(right[name]), zeros[name].mean())
    assert 0
