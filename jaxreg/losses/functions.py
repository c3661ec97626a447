"""Penalties of what a model does: of its activations, its derivatives, its kernels' products."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg import _address, _check, _tree
from jaxreg import where as _where
from jaxreg.losses.targets import Number, Reduction, floating, mean_or_sum
from jaxreg.penalties.base import Penalty


def activity_penalty(
    activations: jax.Array, penalty: Penalty, *, reduction: Reduction = "none"
) -> jax.Array:
    r"""$R(a_i)$ of each example's activations, to be added to its loss.

    With `L1` it is the sparse coding of hidden units; Keras' ``ActivityRegularization(l1, l2)`` is
    the mean over the batch with ``ElasticNet(l1, 2 * l2)``, whose L2 part is half of the square.

    Args:
        activations: a real floating array of shape (B, ...).
        penalty: a penalty of arrays of the shape of one example's.
        reduction: "none" for each example, "mean" or "sum".

    Returns:
        Shape (B,), or a scalar; float32 (float64 for 64-bit activations).

    Raises:
        ValueError: where the activations have no batch axis, or do not fit the penalty.

    >>> import jax.numpy as jnp, jaxreg
    >>> activations = jnp.array([[1.0, -2.0], [0.0, 3.0]])
    >>> jaxreg.activity_penalty(activations, jaxreg.L1(0.5)).tolist()
    [1.5, 1.5]
    """
    if not isinstance(penalty, Penalty):
        raise _check.ArgumentError("penalty", _check.describe(penalty), "a jaxreg penalty")
    activations = _batch("activations", activations)
    with _check.of_argument("activations"):
        values = jax.vmap(penalty.value)(activations)
    return mean_or_sum(values, reduction)


def jacobian_penalty(
    function: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    key: jax.Array,
    *,
    samples: int = 1,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""An unbiased estimate of $\|J_i\|_F^2$, the Jacobian of each example's outputs by its inputs.

    By Hutchinson's estimator, the mean over random signs v of $\|J_i^T v\|^2$: each costs one
    backward pass, whatever the number of outputs.

    Args:
        function: from inputs of shape (B, ...) to outputs of shape (B, ...); an example's outputs
            depend on its own inputs alone (no batch normalization).
        inputs: a real floating array.
        key: a JAX random key; another one for each step.
        samples: how many v, a whole number >= 1. The variance falls as its inverse.
        reduction: "none" for the estimate of each example, "mean" or "sum".

    Returns:
        Shape (B,), or a scalar; float32 (float64 for 64-bit inputs).

    Raises:
        ValueError: where an argument is out of its range, or the outputs have not B rows.

    Source: J. Hoffman, D. Roberts and S. Yaida, *Robust learning with Jacobian regularization*,
    2019, arXiv:1908.02729 (whose penalty is half of it); signs: M. F. Hutchinson, 1990.

    >>> import jax, jax.numpy as jnp, jaxreg
    >>> kernel = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> found = jaxreg.jacobian_penalty(lambda x: x @ kernel, jnp.ones((1, 2)), jax.random.key(0))
    >>> found.tolist()  # exact where the rows of J are orthogonal
    [5.0]
    """
    inputs = _batch("inputs", inputs)
    samples = _check.whole_number("samples", samples, at_least=1)
    if not _address.is_key(key):
        raise _check.ArgumentError("key", _check.describe(key), "one JAX random key")
    accepted = f"a function whose outputs are a floating array of {inputs.shape[0]} rows"
    outputs, pull = _pullback(function, inputs, accepted)

    def estimate(key: jax.Array) -> jax.Array:
        (found,) = pull(jax.random.rademacher(key, outputs.shape, outputs.dtype))
        return _squares(found)

    each = jax.vmap(estimate)(jax.random.split(key, samples))
    return mean_or_sum(jnp.mean(each, axis=0), reduction)


def gradient_penalty(
    function: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    target: Number = 0.0,
    *,
    reduction: Reduction = "none",
) -> jax.Array:
    r"""$(\|\nabla_x f(x_i)\| - target)^2$ for a function with one output an example.

    Target 0 is the R1 penalty of GANs and double backpropagation; 1, at inputs between real and
    generated ones, WGAN-GP's. The derivative is 0 where the gradient is.

    Args:
        function: from inputs of shape (B, ...) to outputs of shape (B,) or (B, 1); an output
            depends on its own inputs alone.
        inputs: a real floating array.
        target: a number >= 0, or a traced scalar.
        reduction: "none" for each example, "mean" or "sum".

    Returns:
        Shape (B,), or a scalar; float32 (float64 for 64-bit inputs).

    Raises:
        ValueError: where an argument is out of its range, or the outputs are not one an example.

    Source: I. Gulrajani et al., *Improved training of Wasserstein GANs*, NeurIPS 2017,
    arXiv:1704.00028; L. Mescheder et al., ICML 2018, arXiv:1801.04406 (R1).

    >>> import jax.numpy as jnp, jaxreg
    >>> jaxreg.gradient_penalty(lambda x: x @ jnp.array([3.0, 4.0]), jnp.ones((2, 2)), 1.0).tolist()
    [16.0, 16.0]
    """
    target = _check.nonnegative("target", target)
    inputs = _batch("inputs", inputs)
    accepted = f"a function with one floating output for each of the {inputs.shape[0]} inputs"
    outputs, pull = _pullback(function, inputs, accepted)
    if outputs.size != inputs.shape[0]:
        raise _check.ArgumentError("function", f"outputs {_check.describe(outputs)}", accepted)
    squares = _squares(*pull(jnp.ones_like(outputs)))
    positive = squares > 0
    # The root has no derivative at 0.
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return mean_or_sum(jnp.square(norm - jnp.asarray(target).astype(norm.dtype)), reduction)


def orthogonality_penalty(params: Any, where: _where.Selector | str = _where.kernels) -> jax.Array:
    r"""$\sum_W \|W^T W - I\|_F^2$, or $\|W W^T - I\|_F^2$ where W is wide.

    W is a kernel as a matrix of its inputs (all axes but the last) by its outputs. 0 where columns
    (of a wide one, rows) are orthonormal. As a constraint: `jaxreg.Orthogonal`.

    Args:
        params: a tree of arrays, or one array.
        where: the leaves it is of: a selector or a path pattern; by default kernels.

    Returns:
        A scalar; float32 (float64 for 64-bit leaves).

    Raises:
        ValueError: where the selector matches no leaf, or one that is not real floating or has
            fewer than two axes.

    Source: N. Bansal, X. Chen and Z. Wang, *Can we gain more from orthogonality regularizations in
    training deep networks?*, NeurIPS 2018, arXiv:1810.09102 ("SO").

    >>> import jax.numpy as jnp, jaxreg
    >>> float(jaxreg.orthogonality_penalty({"kernel": jnp.diag(jnp.array([1.0, 2.0]))}))
    9.0
    """
    selector = _where.as_selector(where)
    chosen = jax.tree.map(lambda p, yes: p if yes else None, params, selector.mask(params))
    _tree.check_real("params", chosen)
    total = jnp.zeros((), _tree.widest_dtype(chosen))
    for path, leaf in zip(_where.paths(chosen), jax.tree.leaves(chosen), strict=True):
        if leaf.ndim < 2:
            given = f"an array of shape {leaf.shape} on the leaf {path or '(the array)'}"
            accepted = "leaves of two axes or more: choose them with where=..."
            raise _check.ArgumentError("params", given, accepted)
        rows = math.prod(leaf.shape[:-1])
        w = _tree.widen(leaf).reshape(rows, leaf.shape[-1])
        w = w if rows >= w.shape[1] else w.T
        gram = jnp.matmul(w.T, w, precision="highest")
        total += jnp.sum(jnp.square(gram - jnp.eye(w.shape[1], dtype=w.dtype))).astype(total.dtype)
    return total


def _batch(name: str, x: Any) -> jax.Array:
    return floating(name, x, "a real floating array with a batch axis", rank=1)


def _pullback(function: Any, inputs: jax.Array, accepted: str) -> tuple[jax.Array, Any]:
    """The outputs, and the function from their cotangents to those of the inputs."""
    if not callable(function):
        raise _check.ArgumentError("function", _check.describe(function), accepted)
    outputs, pull = jax.vjp(function, inputs)
    if not isinstance(outputs, jax.Array):
        raise _check.ArgumentError("function", f"outputs {type(outputs).__name__}", accepted)
    if outputs.shape[:1] != inputs.shape[:1] or not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise _check.ArgumentError("function", f"outputs {_check.describe(outputs)}", accepted)
    return outputs, pull


def _squares(x: jax.Array) -> jax.Array:
    """The sum of squares of each example."""
    return jnp.sum(jnp.square(_tree.widen(x)), axis=tuple(range(1, x.ndim)))
