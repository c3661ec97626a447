r"""Decay and a cap of singular values, of matrices in the last two axes of a leaf.

Leading axes are a batch, as for `jaxreg.SpectralBall`: each matrix has its own.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from jaxreg import _check, _tree
from jaxreg import where as _where
from jaxreg.penalties import spectral
from jaxreg.transforms.selected import (
    at,
    move_to,
    moved,
    numbers,
    product,
    rate_of,
    real_leaves,
    stepped,
)

Number = float | jax.Array


class SpectralDecayState(NamedTuple):
    """State of `spectral_decay`.

    Attributes:
        count: steps taken, an int32 scalar.
        amount: rate * strength of the last step, float32 (float64 for 64-bit parameters): the share
            of the largest singular values that decays.
        right: for each leaf chosen the right singular vectors of its matrices' largest singular
            values, as far as the iteration has come.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    amount: jax.Array
    right: tuple[jax.Array, ...]


def spectral_decay(
    strength: Number | optax.Schedule,
    rate: Number | optax.Schedule | None = None,
    *,
    where: _where.Selector | str = _where.kernels,
    iterations: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Weight decay of the largest singular value, $W \leftarrow W - rate \cdot strength \cdot
    \sigma_1 u_1 v_1^T$.

    The gradient of $\frac{strength}{2} \sigma_1^2$, decoupled as in `jaxreg.weight_decay`: it
    bounds how much a layer magnifies its input, and leaves the other directions alone. The vectors
    come from power iteration that goes on from step to step, from a start that the leaf's path
    gives. Where $\sigma_1$ is not single, one of its pairs decays.

    Args:
        strength: a number >= 0, a traced scalar, or a schedule.
        rate: likewise. None means the learning rate, which `jaxreg.regularize` and
            `jaxreg.proximal` supply (as the extra argument ``learning_rate`` of ``update``).
        where: the leaves it is for: a selector or a path pattern; by default kernels. Matrices are
            their last two axes; leading ones are a batch.
        iterations: of the power iteration in one step, each two products of W and a vector.

    Returns:
        An optax transformation with state `SpectralDecayState`; updates keep their dtype.
        ``update`` needs ``params``.

    Raises:
        ValueError: where strength or rate is negative or NaN, or `iterations` below 1; at ``init``
            where the selector matches no leaf, or one that is not real floating or has fewer than
            two axes; at ``update`` where params are missing, or where `rate` is None and nobody
            supplies the learning rate.

    Source: Y. Yoshida and T. Miyato, *Spectral norm regularization for improving the
    generalizability of deep learning*, 2017, arXiv:1705.10941.

    >>> import jax.numpy as jnp, jaxreg
    >>> tx = jaxreg.spectral_decay(0.1, rate=1.0, iterations=20)
    >>> w = jnp.diag(jnp.array([2.0, 1.0]))
    >>> updates, _ = tx.update(jnp.zeros((2, 2)), tx.init(w), w)
    >>> print(updates.round(3) + 0.0)
    [[-0.2  0. ]
     [ 0.   0. ]]
    """
    strength = _check.number_or_schedule("strength", strength)
    rate = None if rate is None else _check.number_or_schedule("rate", rate)
    iterations = _check.whole_number("iterations", iterations, at_least=1)
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> SpectralDecayState:
        leaves, paths = _matrices(selector, params), _where.paths(params)
        named = zip(leaves, numbers(selector, params), strict=True)
        starts = tuple(_start(paths[i], p) for p, i in named)
        amount = jnp.zeros((), _tree.widest_dtype(leaves))
        return SpectralDecayState(jnp.zeros((), jnp.int32), amount, starts)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        learning_rate: Number | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SpectralDecayState]:
        del extra_args
        params = _check.params_given(params)
        factors = rate_of(rate, learning_rate, state.count), at("strength", strength, state.count)
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        rights = list(state.right)
        for k, i in enumerate(numbers(selector, params)):
            w = _tree.widen(leaves[i])
            leading = functools.partial(_leading, iterations)
            component, rights[k] = _unsharded_rules(leading, w, rights[k])
            dtype = _tree.wide_dtype(moves[i].dtype)
            pull = product(*factors, w.dtype) * component
            step = moves[i].astype(dtype) - pull.astype(dtype)
            moves[i] = step.astype(moves[i].dtype)
        amount = product(*factors, state.amount.dtype)
        after = SpectralDecayState(stepped(state.count), amount, tuple(rights))
        return treedef.unflatten(moves), after

    return optax.GradientTransformationExtraArgs(init, update)


def spectral_cap(
    beta: Number,
    *,
    steps: int = 12,
    where: _where.Selector | str = _where.kernels,
) -> optax.GradientTransformation:
    r"""No singular value above $\beta$ after the step, by matrix products alone.

    With $W = p + u = U \, \mathrm{diag}(\sigma) \, V^T$ the weights after the optimizer's step, the
    update becomes $U \, \mathrm{diag}(\min(\sigma, \beta)) \, V^T - p$, by $\min(\sigma, \beta) =
    (\sigma + \beta - |\beta - \sigma|) / 2$: the polar factor of W gives $\sigma$, and the matrix
    sign of what is left of $\beta$ gives the modulus. Both are scaled Newton-Schulz iterations,
    computed in float32 at least. It comes last. The exact projection, by an SVD, is ``constrain(
    SpectralBall(beta))``.

    A leaf whose norms show that it is inside (the square root of the largest row sum times the
    largest column sum of the moduli is at most $\beta$) is not changed at all.

    Args:
        beta: a number > 0, or a traced scalar.
        steps: of each iteration. Each costs two matrix products.
        where: the leaves it is for: a selector or a path pattern; by default kernels. Matrices are
            their last two axes; leading ones are a batch.

    Returns:
        An optax transformation without a state; the updates of the leaves it is for have their
        dtypes. ``update`` needs ``params``. Measured on matrices of up to 1024 rows in float32,
        with 12 steps: singular values above $\beta$ end within 0.05% of it where the largest was
        up to 30 $\beta$, and within 0.5% up to 100 $\beta$; those below are kept to 0.1%. From
        further away the next steps go on.

    Raises:
        ValueError: where beta is not > 0 and finite, or `steps` below 1; at ``init`` where the
            selector matches no leaf, or one that is not real floating or has fewer than two axes;
            at ``update`` where params are missing.

    Source: L. Newhouse et al., *Training transformers with enforced Lipschitz constants*, 2025,
    arXiv:2507.13338; for the iteration see `jaxreg.Nuclear`.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(1.0), jaxreg.spectral_cap(1.0))
    >>> w = jnp.diag(jnp.array([1.0, 0.5]))
    >>> updates, _ = tx.update(jnp.diag(jnp.array([-2.0, 0.0])), tx.init(w), w)
    >>> print(optax.apply_updates(w, updates).round(3))
    [[1.  0. ]
     [0.  0.5]]
    """
    beta = _check.positive_finite("beta", beta)
    steps = _check.whole_number("steps", steps, at_least=1)
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> optax.EmptyState:
        _matrices(selector, params)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        params = _check.params_given(params)
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)
        for i in numbers(selector, params):
            if leaves[i].size:
                w = moved(leaves[i], moves[i])
                limit = jnp.asarray(beta).astype(w.dtype)
                cap = functools.partial(_capped, steps, limit)
                moves[i] = move_to(_unsharded_rules(cap, w), leaves[i])
        return treedef.unflatten(moves), state

    return optax.GradientTransformation(init, update)


def _unsharded_rules(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """A function's result, sharded as its arrays are: one, or as many as they are.

    Where shardings are explicit, a product along a sharded axis is refused: XLA decides there.
    """
    shardings = tuple(jax.typeof(x).sharding for x in arrays)
    if AxisType.Explicit not in shardings[0].mesh.axis_types:
        return function(*arrays)
    wanted = shardings[0] if len(arrays) == 1 else shardings
    return jax.sharding.auto_axes(function, out_sharding=wanted)(*arrays)


def _matrices(selector: _where.Selector, params: Any) -> list[jax.Array]:
    """The leaves chosen, each of two axes or more."""
    leaves, paths = real_leaves(selector, params), _where.paths(params)
    for p, i in zip(leaves, numbers(selector, params), strict=True):
        if p.ndim < 2:
            given = f"an array of shape {tuple(p.shape)} on the leaf {paths[i] or '(the array)'}"
            accepted = "leaves of two axes or more, whose last two are the rows and columns: "
            raise _check.ArgumentError("params", given, accepted + "choose them with where=...")
    return leaves


def _start(path: str, p: jax.Array) -> jax.Array:
    """Vectors that depend on the leaf's path and shape alone."""
    shape = (*p.shape[:-2], p.shape[-1])
    key = jax.random.key(zlib.crc32(path.encode()))
    # Drawn in float32 for every dtype, so that it is the same one.
    draws = jax.random.normal(key, shape, jnp.float32)
    return draws.astype(_tree.wide_dtype(p.dtype))


def _capped(steps: int, limit: jax.Array, w: jax.Array) -> jax.Array:
    return spectral.apply(spectral.Clip(steps), False, w, limit)


def _leading(iterations: int, w: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The leading component, u s v^T, and v."""
    fixed = jax.lax.stop_gradient(w)
    left, size = right, jnp.zeros((), w.dtype)
    for _ in range(iterations):
        left, _ = _unit(jnp.sum(fixed * right[..., None, :], axis=-1))
        found, size = _unit(jnp.sum(w * left[..., :, None], axis=-2))
        # A matrix of zeros has no direction, and may have one later on.
        right = jnp.where(size > 0, jax.lax.stop_gradient(found), right)
    return (size * left)[..., :, None] * right[..., None, :], right


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors of length 1, and 0 where x is 0; and their length."""
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    size = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    return x / size, jnp.where(squares > 0, size, 0)
