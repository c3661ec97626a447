"""Cross-entropy fused with the matrix product that its logits come from."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check, _tree, norms
from jaxreg.losses.products import product, with_product
from jaxreg.losses.rows import (
    IndexTargets,
    Layout,
    index_gradient,
    index_loss,
    index_loss_of,
    index_sums,
)
from jaxreg.losses.shardings import decided_by_xla
from jaxreg.losses.targets import (
    Number,
    Options,
    Reduction,
    Spread,
    class_labels,
    classes_of,
    floating,
    index_targets,
    inverse,
    soft_capped,
)


def linear_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    bias: jax.Array | None = None,
    smoothing: Number = 0.1,
    *,
    z_loss: Number = 0.0,
    soft_cap: float | None = None,
    ignore_index: int | None = None,
    class_weights: Any = None,
    where: Any = None,
    spread: Spread = "uniform",
    reduction: Reduction = "none",
    block_size: int | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    r"""`jaxreg.smoothed_cross_entropy` of hidden @ kernel + bias, a block of tokens at a time.

    So only a block's logits are in memory, which are few of all where there are many tokens. For
    the reductions "mean" and "sum" the gradient is made in the forward pass, with three matrix
    products as without blocks; for "none" the backward pass makes the logits again, a fourth.
    Products of 16-bit arrays are accumulated in float32, and the gradient of the logits is rounded
    to the arrays' dtype before its products.

    Args:
        hidden: shape (..., D), real floating.
        kernel: shape (D, V), of any vocabulary size V; an embedding's is its transpose.
        labels: class indices, integers of shape (...).
        bias: shape (V,), or None.
        smoothing: e, as in `smoothed_cross_entropy`, and so are the next ones.
        z_loss: likewise.
        soft_cap: likewise, but not traced.
        ignore_index: likewise.
        class_weights: V numbers >= 0, in which the loss is not to be differentiated.
        where: V bools.
        spread: as in `smoothed_cross_entropy`.
        reduction: likewise.
        block_size: how many tokens a block has; None for a 16th of them, but from 128 to 256 on a
            CPU and to 2048 elsewhere. Tokens are filled up to blocks of equal sizes.
        axis_name: inside ``shard_map``, the mesh axis along which the vocabulary is sharded:
            kernel, bias, class weights and mask are a device's own part of it, while labels count
            all classes. Four numbers a token are reduced. Tokens may be sharded along other axes;
            "mean" is then over a device's own, and "sum" too. With ``check_vma=False`` the
            gradient is to be taken outside of ``shard_map``, as of any sum over devices.

    Returns:
        The loss of each token, shape (...), or a scalar; float32 (float64 for 64-bit arrays).
        Differentiable in hidden, kernel, bias, smoothing and z_loss: by reverse mode, and by
        forward mode over it; for forward mode alone there is `smoothed_cross_entropy`.

    Raises:
        ValueError: where an argument is out of its range, shapes do not fit, a concrete label is no
            class, or a derivative in the class weights is asked for.

    Source: E. Wijmans et al., *Cut your losses in large-vocabulary language models*, ICLR 2025,
    arXiv:2411.09009; for the gradient in the forward pass P.-L. Hsu et al., *Liger kernel*,
    arXiv:2410.10989.

    >>> import jax.numpy as jnp, jaxreg
    >>> hidden, kernel = jnp.eye(2), jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> labels = jnp.array([0, 1])
    >>> fused = jaxreg.linear_cross_entropy(hidden, kernel, labels)
    >>> dense = jaxreg.smoothed_cross_entropy(hidden @ kernel, labels)
    >>> [round(float(loss), 4) for loss in fused], [round(float(loss), 4) for loss in dense]
    ([0.3729, 0.6181], [0.3729, 0.6181])
    """
    options = Options(smoothing, z_loss, soft_cap, ignore_index, spread, reduction).checked()
    if not (soft_cap is None or _check.is_concrete(soft_cap)):
        raise _check.ArgumentError("soft_cap", "a traced number", "a number that is not traced")
    hidden, kernel, bias = _arrays(hidden, kernel, bias)
    names = norms.bound_axes(axis_name)
    if len(names) > 1:
        raise _check.ArgumentError("axis_name", repr(axis_name), "one mesh axis, or None")
    layout = Layout(1, *names)
    _check_pieces(layout, hidden, kernel)
    tokens, own_classes = hidden.shape[:-1], kernel.shape[1]
    shape = (*tokens, own_classes * layout.devices())
    ignored = options.ignore_index
    labels = class_labels(labels, shape, len(tokens), ignored, soft=False, named=("ignore_index",))
    if where is not None:
        exist = jnp.asarray(where)
        if exist.shape != (own_classes,) or exist.dtype != bool:
            raise _check.ArgumentError("where", _check.describe(where), f"{own_classes} bools")
    given = {"hidden": hidden, "kernel": kernel, "bias": bias, "labels": labels}
    given |= {"class_weights": class_weights, "where": where} | options._asdict()
    blocks = _blocks(labels.size, block_size)
    kept = hidden.ndim - 1 if reduction == "none" else None
    return decided_by_xla(functools.partial(_loss, layout, blocks), given, hidden, kept)


def _loss(
    layout: Layout,
    blocks: int,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    class_weights: Any,
    where: Any,
    **options: Any,
) -> jax.Array:
    chosen = Options(**options)
    dtype = _tree.wide_dtype(jnp.promote_types(hidden.dtype, kernel.dtype))
    if _check.is_number(class_weights) and not _check.is_concrete(class_weights):
        class_weights = _constant(class_weights)
    classes = classes_of((labels.size, kernel.shape[1]), layout, dtype, class_weights, where)
    targets, weight = index_targets(labels.reshape(-1, 1), classes, chosen)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if chosen.ignore_index is not None:
        # What an ignored token holds may be NaN, which times 0 is NaN in the kernel's gradient.
        flat = jnp.where(labels.reshape(-1, 1) == chosen.ignore_index, 0, flat)
    if classes.exist is not None:
        # Likewise what a kernel has for classes that do not exist.
        kernel = jnp.where(classes.exist, kernel, 0)
        bias = None if bias is None else jnp.where(classes.exist[0], bias, 0)
    plan = _Plan(layout, chosen.soft_cap, blocks)
    inputs = _varying(layout, _Inputs(flat, kernel, bias, targets, classes.exist))
    if chosen.reduction == "none":
        return _shared(layout, _each_loss(plan, inputs)).reshape(labels.shape)
    total = _shared(layout, _sum_of_losses(plan, inputs))
    return total if chosen.reduction == "sum" else total * inverse(jnp.sum(weight))


@jax.custom_jvp
def _constant(class_weights: jax.Array) -> jax.Array:
    """The same weights, with no derivative: `_cotangents` has none, which would be taken for 0."""
    return class_weights


@_constant.defjvp
def _(primals: Any, tangents: Any) -> Any:
    accepted = "jax.lax.stop_gradient of them, or jaxreg.smoothed_cross_entropy in their place"
    raise _check.ArgumentError("class_weights", "weights that are differentiated", accepted)


def _arrays(hidden: Any, kernel: Any, bias: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    accepted = "a real floating array of shape "
    hidden = floating("hidden", hidden, f"{accepted}(..., D)", rank=1)
    kernel = floating("kernel", kernel, f"{accepted}(D, V)", rank=2)
    if kernel.ndim != 2 or not kernel.shape[1]:
        raise _check.ArgumentError("kernel", _check.describe(kernel), f"{accepted}(D, V)")
    if hidden.shape[-1] != kernel.shape[0]:
        accepted = f"as many rows as hidden has features, {hidden.shape[-1]}"
        raise _check.ArgumentError("kernel", _check.describe(kernel), accepted)
    if bias is not None:
        accepted += f"{kernel.shape[1:]}, or None; smoothing=... gives the smoothing"
        if jnp.shape(bias) != kernel.shape[1:]:
            raise _check.ArgumentError("bias", _check.describe(bias), accepted)
        bias = floating("bias", bias, accepted)
    return hidden, kernel, bias


def _check_pieces(layout: Layout, hidden: jax.Array, kernel: jax.Array) -> None:
    """Raises where ``shard_map`` knows that arrays are not cut along the vocabulary's axis."""
    name = layout.axis_name
    if name is None or not norms.is_known(name):
        return
    accepted = f"the part of the vocabulary that a device along {name!r} has"
    if name not in norms.varying_axes(kernel):
        raise _check.ArgumentError("kernel", f"an array that is the same along {name!r}", accepted)
    if name in norms.varying_axes(hidden):
        given = f"{name!r}, along which the tokens are sharded"
        raise _check.ArgumentError("axis_name", given, "the mesh axis of the vocabulary alone")


def _blocks(tokens: int, block_size: int | None) -> int:
    """Into how many blocks tokens are cut."""
    if block_size is None:
        # Each block adds to the kernel's gradient, whose traffic long blocks hide; how long, is
        # said by how much faster a device computes than it reads.
        longest = 256 if jax.default_backend() == "cpu" else 2048
        block_size = min(longest, max(128, math.ceil(tokens / 16)))
    block_size = _check.whole_number("block_size", block_size, at_least=1)
    return max(1, math.ceil(tokens / block_size))


class _Plan(NamedTuple):
    layout: Layout
    soft_cap: Any
    blocks: int


class _Inputs(NamedTuple):
    """Of shapes (N, D), (D, V) and (V,); figures of tokens are (N, 1), those of classes (1, V)."""

    hidden: jax.Array
    kernel: jax.Array
    bias: jax.Array | None
    targets: IndexTargets
    exist: jax.Array | None


def _varying(layout: Layout, inputs: _Inputs) -> _Inputs:
    """Under ``shard_map`` all arrays differ along the same axes: JAX adds up their derivatives."""
    names = [layout.axis_name] if layout.axis_name else []
    names = frozenset(names).union(*map(norms.varying_axes, jax.tree.leaves(inputs)))
    return jax.tree.map(lambda x: norms.varying(x, names), inputs)


def _shared(layout: Layout, loss: jax.Array) -> jax.Array:
    """The loss that all devices along the vocabulary's axis have, as one that they share."""
    return layout.added(loss / layout.devices())[0]


# Reductions: the gradient in the forward pass, or in the backward pass ----------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_losses(plan: _Plan, inputs: _Inputs) -> jax.Array:
    return jnp.sum(_losses(plan, inputs))


def _sum_of_losses_forward(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, Any]:
    losses, found = _swept(plan, inputs, jnp.ones_like(inputs.targets.on))
    return jnp.sum(losses), (inputs, found)


def _sum_of_losses_backward(plan: _Plan, known: Any, d: jax.Array) -> tuple[_Inputs]:
    inputs, found = known
    return (_cotangents(inputs, found, d, plan.layout.added(d)[0]),)


_sum_of_losses.defvjp(_sum_of_losses_forward, _sum_of_losses_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each_loss(plan: _Plan, inputs: _Inputs) -> jax.Array:
    return _losses(plan, inputs)


def _each_loss_forward(plan: _Plan, inputs: _Inputs) -> tuple[jax.Array, _Inputs]:
    return _losses(plan, inputs), inputs


def _each_loss_backward(plan: _Plan, inputs: _Inputs, d: jax.Array) -> tuple[_Inputs]:
    _, found = _swept(plan, inputs, plan.layout.added(d)[0])
    return (_cotangents(inputs, found, d, jnp.ones((), d.dtype)),)


_each_loss.defvjp(_each_loss_forward, _each_loss_backward)


class _Derivatives(NamedTuple):
    """Of the losses: by the arrays, in float32 at least, and what the targets' factors multiply."""

    hidden: jax.Array
    kernel: jax.Array
    bias: Any
    parts: tuple[jax.Array, jax.Array | None, jax.Array]


def _cotangents(inputs: _Inputs, found: _Derivatives, d: jax.Array, scale: jax.Array) -> _Inputs:
    """With d the cotangents of the losses, and `scale` what the arrays' derivatives still lack."""

    def by(x: jax.Array, derivative: jax.Array) -> jax.Array:
        return (derivative * scale).astype(x.dtype)

    targets = inputs.targets
    on, off, z = found.parts
    # None is 0: of what is no number, and of what the loss is not differentiated in.
    factors: Any = targets._replace(
        labels=None,
        on=d * on,
        off=None if off is None else d * off,
        weights=None,
        total=None,
        z=None if targets.z is None else d * z,
    )
    bias = None if inputs.bias is None else by(inputs.bias, found.bias)
    hidden, kernel = by(inputs.hidden, found.hidden), by(inputs.kernel, found.kernel)
    return _Inputs(hidden, kernel, bias, factors, None)


# Blocks -------------------------------------------------------------------------------------------


def _losses(plan: _Plan, inputs: _Inputs) -> jax.Array:
    """The losses of all tokens, (N, 1)."""

    def block(carry: None, rows: Any) -> tuple[None, jax.Array]:
        hidden, targets = rows
        x = _existing(inputs, _logits(plan, inputs, hidden))
        return carry, index_loss(plan.layout, x, targets)

    return _scanned(plan, inputs, block, None)[1]


def _swept(plan: _Plan, inputs: _Inputs, d: jax.Array) -> tuple[jax.Array, _Derivatives]:
    """The losses and their derivatives, with the cotangents d of shape (N, 1)."""
    layout, dtype = plan.layout, d.dtype
    narrow = jnp.promote_types(inputs.hidden.dtype, inputs.kernel.dtype)

    def block(sums: Any, rows: Any) -> tuple[Any, Any]:
        hidden, targets, d = rows
        capped = _logits(plan, inputs, hidden)
        x = _existing(inputs, capped)
        others, row = index_sums(layout, x, targets)
        gradient = d * index_gradient(layout, x, targets, others, row)
        if inputs.exist is not None:
            gradient = jnp.where(inputs.exist, gradient, 0)
        if plan.soft_cap is not None:
            steep = 1 - jnp.square(capped / plan.soft_cap)
            gradient *= jnp.where(capped == -jnp.inf, 1, steep)
        kernel_sum, bias_sum = sums
        bias_sum = None if bias_sum is None else bias_sum + jnp.sum(gradient, 0)
        gradient = gradient.astype(narrow)
        kernel_sum = with_product(kernel_sum, hidden, gradient)
        found = product(gradient, inputs.kernel, (1, 1), dtype)
        return (kernel_sum, bias_sum), (index_loss_of(row, targets), found, row.parts(targets))

    sums = (jnp.zeros(inputs.kernel.shape, dtype), None)
    if inputs.bias is not None:
        sums = (sums[0], jnp.zeros(inputs.bias.shape, dtype))
    names = norms.varying_axes(inputs.kernel)
    sums = jax.tree.map(lambda x: norms.varying(x, names), sums)
    (kernel, bias), (losses, hidden, parts) = _scanned(plan, inputs, block, sums, d)
    return losses, _Derivatives(hidden, kernel, bias, parts)


def _scanned(
    plan: _Plan, inputs: _Inputs, block: Callable[..., Any], carry: Any, *rows: jax.Array
) -> tuple[Any, Any]:
    """A scan of blocks of tokens; what it gives of each token is put together again.

    A block holds every n-th token, so that tokens which are sharded stay where they are.
    """
    count = inputs.hidden.shape[0]
    size = -(-count // plan.blocks)
    targets = inputs.targets
    figures = targets._replace(weights=None, total=None)  # pyright: ignore[reportArgumentType]

    def cut(x: jax.Array) -> jax.Array:
        # Filled with tokens that count for nothing.
        x = jnp.pad(x, [(0, size * plan.blocks - count)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(size, plan.blocks, *x.shape[1:]), 0, 1)

    def body(carry: Any, rows: Any) -> tuple[Any, Any]:
        hidden, figures, *rest = rows
        own = figures._replace(weights=targets.weights, total=targets.total)
        return block(carry, (hidden, own, *rest))

    # For derivatives of derivatives: blocks are made again, not kept.
    body = jax.checkpoint(body, prevent_cse=False)
    cuts = jax.tree.map(cut, (inputs.hidden, figures, *rows))
    carry, found = jax.lax.scan(body, carry, cuts)
    whole = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:count]  # noqa: E731
    return carry, jax.tree.map(whole, found)


def _logits(plan: _Plan, inputs: _Inputs, hidden: jax.Array) -> jax.Array:
    """The logits of a block of tokens, in float32 at least."""
    dtype = inputs.targets.on.dtype
    x = product(hidden, inputs.kernel, (1, 0), dtype)
    if inputs.bias is not None:
        x += inputs.bias.astype(dtype)[None]
    return x if plan.soft_cap is None else soft_capped(x, plan.soft_cap)


def _existing(inputs: _Inputs, x: jax.Array) -> jax.Array:
    return x if inputs.exist is None else jnp.where(inputs.exist, x, -jnp.inf)
