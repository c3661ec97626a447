"""Perturbed gradients: at weights that are worse, with noise, and without their mean."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _address, _check, _tree
from jaxreg import where as _where
from jaxreg.norms import AxisNames, bound_axes, global_norm, varying, varying_axes
from jaxreg.transforms.selected import floating_leaves, numbers, stepped

Number = float | jax.Array
PyTree = Any


class GradientNoiseState(NamedTuple):
    """Steps taken: an int32 scalar, which with the seed is all that the noise depends on."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


# Gradients at perturbed weights ------------------------------------------------------------------


def sam(
    loss: Callable[..., Any],
    rho: Number = 0.05,
    *,
    has_aux: bool = False,
    axis_name: AxisNames | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""Sharpness-aware minimization: the gradient at the worst weights nearby.

    $\nabla L(p + \rho \, g / \|g\|)$ with $g = \nabla L(p)$ and the norm over every leaf, which
    costs two gradients a step. Use it in the place of ``jax.value_and_grad(loss)``; any optimizer
    comes behind it. Where g is 0 nothing is perturbed; where it is not finite, the result is not
    finite either.

    Both gradients are of the same arguments: the same batch, the same dropout key. In bf16 the
    perturbed weights are rounded once, so that a weight whose perturbation is below half of its
    spacing ($2^{-9}$ of its size) is not perturbed: keep the weights in float32, and cast inside
    the loss.

    Args:
        loss: ``loss(params, *args, **kwargs)``, a scalar, or with `has_aux` a pair of a scalar
            and anything. The params are any tree of floating arrays: Linen's, complex ones, or of
            NNX ``graphdef, params, rest = nnx.split(model, nnx.Param, ...)``, from which the loss
            makes the model again by ``nnx.merge(graphdef, params, rest, copy=True)``.
        rho: the length of the perturbation, a number >= 0, or a traced scalar.
        has_aux: as in ``jax.value_and_grad``.
        axis_name: inside ``shard_map`` or ``pmap``, mesh axes that the batch is sharded along and
            params are not. With None each device perturbs by the gradient of its own batch
            (m-SAM), and the gradient returned is its own as well, to be averaged by you. With
            names, both gradients are averaged over these axes. Value and aux are the device's own
            in any case. Under ``jit`` with sharded arrays the gradient is that of the whole batch,
            and parameters may be sharded too; inside ``shard_map`` each device has them whole.

    Returns:
        A function of the loss's arguments that returns ``(value, gradient)``, with `has_aux`
        ``((value, aux), gradient)``. Value and aux are those at p, not at the perturbed weights;
        the gradient has the dtypes of params.

    Raises:
        ValueError: where the loss is no function, or rho negative or NaN; when called, where an
            axis is not bound, or a leaf is not floating.

    Source: P. Foret, A. Kleiner, H. Mobahi and B. Neyshabur, *Sharpness-aware minimization for
    efficiently improving generalization*, ICLR 2021, arXiv:2010.01412.

    >>> import jax.numpy as jnp, jaxreg
    >>> loss = lambda w: jnp.sum(w**2) / 2
    >>> value, grads = jaxreg.sam(loss, rho=0.5)(jnp.array([3.0, 4.0]))
    >>> float(value), [round(float(g), 4) for g in grads]  # the gradient of [3.3, 4.4]
    (12.5, [3.3, 4.4])
    """

    def direction(params: PyTree, grads: PyTree) -> PyTree:
        return _normalized(grads)

    return _ascending(loss, rho, direction, has_aux, axis_name)


def asam(
    loss: Callable[..., Any],
    rho: Number = 0.5,
    eta: Number = 0.01,
    *,
    has_aux: bool = False,
    axis_name: AxisNames | None = None,
) -> Callable[..., tuple[Any, PyTree]]:
    r"""Adaptive sharpness-aware minimization: each weight is perturbed relative to its size.

    $\nabla L(p + \rho \, T^2 g / \|T g\|)$ with $g = \nabla L(p)$ and $T = |p| + \eta$ for each
    entry. With eta = 0 the perturbation follows any rescaling of the weights.

    Args:
        loss: as in `jaxreg.sam`.
        rho: likewise; ten times that of `sam` is usual.
        eta: a number >= 0, or a traced scalar, so that a weight of 0 is perturbed too.
        has_aux: as in `jaxreg.sam`.
        axis_name: likewise.

    Returns:
        A function, as `jaxreg.sam` does.

    Raises:
        ValueError: as `jaxreg.sam` does; and where eta is negative or NaN.

    Source: J. Kwon, J. Kim, H. Park and I. K. Choi, *ASAM: adaptive sharpness-aware minimization
    for scale-invariant learning of deep neural networks*, ICML 2021, arXiv:2102.11600. (Their code
    has T = 1 for biases; here it is the same for all leaves.)

    >>> import jax.numpy as jnp, jaxreg
    >>> loss = lambda w: jnp.sum(w**2) / 2
    >>> value, grads = jaxreg.asam(loss, rho=0.5, eta=0.0)(jnp.array([1.0, 0.0]))
    >>> float(value), grads.tolist()
    (0.5, [1.5, 0.0])
    """
    eta = _check.nonnegative("eta", eta)

    def direction(params: PyTree, grads: PyTree) -> PyTree:
        def size(p: jax.Array) -> jax.Array:
            modulus = jnp.abs(_tree.widen(p))
            return modulus + jnp.asarray(eta).astype(modulus.dtype)

        sizes = jax.tree.map(size, params)
        stretched = jax.tree.map(lambda t, g: t * _tree.widen(g), sizes, grads)
        return jax.tree.map(lambda t, e: t * e, sizes, _normalized(stretched))

    return _ascending(loss, rho, direction, has_aux, axis_name)


def _ascending(
    loss: Callable[..., Any],
    rho: Number,
    direction: Callable[[PyTree, PyTree], PyTree],
    has_aux: bool,
    axis_name: AxisNames | None,
) -> Callable[..., tuple[Any, PyTree]]:
    """The gradient at p + rho * direction(p, g)."""
    if not callable(loss):
        accepted = "a function (params, *args, **kwargs) -> scalar"
        raise _check.ArgumentError("loss", _check.describe(loss), accepted)
    rho = _check.nonnegative("rho", rho)

    def perturbed(p: jax.Array, d: jax.Array) -> jax.Array:
        # Of a complex number JAX's gradient is the conjugate of the direction of ascent.
        step = jnp.asarray(rho).astype(_tree.real_dtype(d.dtype)) * jnp.conj(d)
        return (_tree.widen(p) + step).astype(p.dtype)

    def value_and_grad(params: PyTree, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        _tree.check_floating("params", params)
        names = bound_axes(axis_name)

        def value(at: PyTree) -> jax.Array:
            found = loss(at, *args, **kwargs)
            return found[0] if has_aux else found

        # Outside of shard_map the loss need not be traced once more.
        inside = jax.sharding.get_abstract_mesh().manual_axes
        shards = varying_axes(jax.eval_shape(value, params)) if inside else ()

        def gradient(at: PyTree) -> tuple[Any, PyTree]:
            # The gradient of what all devices share would be the sum over them.
            own = jax.tree.map(lambda p: varying(p, shards), at)
            found, grads = jax.value_and_grad(loss, has_aux=has_aux)(own, *args, **kwargs)
            return found, jax.lax.pmean(grads, names) if names else grads

        found, grads = gradient(params)
        _, grads = gradient(jax.tree.map(perturbed, params, direction(params, grads)))
        return found, grads

    return value_and_grad


def _normalized(tree: PyTree) -> PyTree:
    """A tree over its norm, in float32 at least; 0 where it is 0."""
    norm = global_norm(tree)
    divisor = jnp.where(norm == 0, 1, norm)

    def divided(x: jax.Array) -> jax.Array:
        wide = _tree.widen(x)
        return wide / divisor.astype(_tree.real_dtype(wide.dtype))

    return jax.tree.map(divided, tree)


# Gradients changed -------------------------------------------------------------------------------


def gradient_noise(
    eta: Number,
    gamma: Number = 0.55,
    *,
    seed: int | jax.Array,
    where: _where.Selector | str = _where.everything,
) -> optax.GradientTransformation:
    r"""Adds Gaussian noise that fades, $g_t + \mathcal{N}(0, \eta / (1 + t)^\gamma)$.

    The noise has an address: it is a function of the seed, the step t and the leaf's path. So it
    is the same after a restart from a checkpoint, when other leaves come or go, and on any number
    of devices under ``jit``. Inside ``shard_map`` it is the same for each device's piece of a
    sharded leaf, unless the seed is a key that the axis index is folded into.

    Args:
        eta: the variance in the first step, a number >= 0, or a traced scalar.
        gamma: how fast it fades, a number >= 0, or a traced scalar.
        seed: a whole number in [0, 2**32), or a JAX random key, traced or not. Two links with one
            seed add the same noise.
        where: the leaves that it is added to: a selector or a path pattern; by default all.

    Returns:
        An optax transformation with state `GradientNoiseState`; gradients keep their dtype. The
        noise is drawn in float32; of a complex gradient the stated variance is that of both parts
        together, half in each. Its place is before the direction; clips come before it.

    Raises:
        ValueError: where an argument is out of its range; at ``init`` where the selector matches
            no leaf, or one that is not a floating array.

    Source: A. Neelakantan et al., *Adding gradient noise improves learning for very deep
    networks*, 2015, arXiv:1511.06807.

    >>> import jax.numpy as jnp, jaxreg
    >>> tx = jaxreg.gradient_noise(0.01, seed=0)
    >>> grads = jnp.zeros(10_000)
    >>> noise, state = tx.update(grads, tx.init(grads))
    >>> round(float(noise.std()), 3)
    0.1
    """
    eta = _check.nonnegative("eta", eta)
    gamma = _check.nonnegative("gamma", gamma)
    seed = _address.checked_seed(seed)
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> GradientNoiseState:
        floating_leaves(selector, params)
        return GradientNoiseState(jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, GradientNoiseState]:
        del params
        steps = 1 + state.count.astype(jnp.float32)
        fading = steps ** (jnp.asarray(gamma).astype(jnp.float32) / -2)
        deviation = jnp.sqrt(jnp.asarray(eta).astype(jnp.float32)) * fading
        leaves, treedef = jax.tree.flatten(updates)
        keys = _address.leaf_keys(seed, "gradient_noise", state.count, updates)
        for i in numbers(selector, updates):
            leaves[i] = _noisy(leaves[i], keys[i], deviation)
        return treedef.unflatten(leaves), GradientNoiseState(stepped(state.count))

    return optax.GradientTransformation(init, update)


def _noisy(g: jax.Array, key: jax.Array, deviation: jax.Array) -> jax.Array:
    # Of complex numbers JAX draws both parts with half of the variance.
    dtype = jnp.complex64 if jnp.iscomplexobj(g) else jnp.float32
    drawn = jax.random.normal(key, g.shape, dtype, out_sharding=_address.sharding_like(g))
    wide = _tree.widen(g)
    return (wide + (deviation.astype(dtype) * drawn).astype(wide.dtype)).astype(g.dtype)


def centralize(
    *, where: _where.Selector | str = _where.kernels
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient centralization: takes from each unit's gradient its mean.

    $g_{:,j} \leftarrow g_{:,j} - \mathrm{mean}_i \, g_{ij}$, the mean over the unit's incoming
    weights: over all axes but the last, as kernels lie in JAX (inputs x units, and height x width
    x inputs x units). ``optax.centralize`` takes it over all axes but the first, where torch has
    its units.

    Args:
        where: the leaves that it is for: a selector or a path pattern; by default kernels. Those
            with fewer than two axes have no incoming weights to average over, and stay as they
            are.

    Returns:
        A stateless optax transformation; gradients keep their dtype. Its place is before the
        direction. The layers of a kernel that is stacked along its first axis share one mean.

    Raises:
        ValueError: at ``init`` where the selector matches no leaf, or one that is not a floating
            array.

    Source: H. Yong, J. Huang, X. Hua and L. Zhang, *Gradient centralization: a new optimization
    technique for deep neural networks*, ECCV 2020, arXiv:2004.01461.

    >>> import jax.numpy as jnp, jaxreg
    >>> tx = jaxreg.centralize()
    >>> grads = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> tx.update(grads, tx.init(grads))[0].tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    selector = _where.as_selector(where)

    def init(params: optax.Params) -> optax.EmptyState:
        floating_leaves(selector, params)
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args

        def centered(g: jax.Array, selected: bool) -> jax.Array:
            if not selected or g.ndim < 2:
                return g
            wide = _tree.widen(g)
            mean = jnp.mean(wide, axis=range(g.ndim - 1), keepdims=True)
            return (wide - mean).astype(g.dtype)

        return jax.tree.map(centered, updates, selector.mask(updates)), state

    return optax.GradientTransformationExtraArgs(init, update)
