"""Stochastic rounding of 16-bit weights, around a whole optimizer that works in float32."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg import _address, _check, _tree
from jaxreg import where as _where
from jaxreg.transforms.selected import stepped


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        count: steps taken, an int32 scalar, which with the seed tells the random bits.
        inner: the state of the optimizer inside, in float32.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    inner: Any


def stochastic_rounding(
    inner: optax.GradientTransformation, *, seed: int | jax.Array
) -> optax.GradientTransformationExtraArgs:
    r"""Rounds 16-bit weights up or down at random after each step, so that small steps count.

    $p + u$ becomes one of the two numbers of the weights' dtype next to it, the upper one with
    probability (p + u - lower) / (upper - lower): $E[\mathrm{round}(x)] = x$. Rounded to nearest, a
    bf16 weight of 1 does not move for any step below 0.002, such as those of weight decay.

    It goes around the whole optimizer, which sees gradients and weights in float32 and has its
    moments in float32, so that nothing is rounded in between. Numbers that the dtype has stay as
    they are, such as the exact zeros of a proximal step; so do infinities and NaNs. Leaves of 32
    bits or more pass through.

    The random bits have an address: they are a function of the seed, the step and the leaf's path,
    as in `jaxreg.gradient_noise`.

    Args:
        inner: any optax transformation, with its learning rate.
        seed: a whole number in [0, 2**32), or a JAX random key, traced or not.

    Returns:
        An optax transformation with state `StochasticRoundingState`, the outermost or the last of
        a chain. ``update`` needs ``params``, and gives updates in the weights' dtype:
        ``optax.apply_updates`` makes the rounded weight of them exactly where their difference is
        a number of that dtype. It is where the weight stays within a factor of 2, or goes to 0;
        a larger move is rounded to nearest once more, by half of the spacing at the larger number
        at most. 16 random bits a weight are used: exact for normal numbers, and for bf16 in all.
        Beyond the largest finite number, rounding up gives infinity. An average of the weights
        (`jaxreg.ema_of_params`) goes outside of it, behind it in a chain: inside it would see the
        steps before they are rounded.

    Raises:
        ValueError: where an argument is none of these; at ``init`` where a leaf is not floating,
            or has less than 16 bits; at ``update`` without params.

    Source: S. Gupta, A. Agrawal, K. Gopalakrishnan and P. Narayanan, *Deep learning with limited
    numerical precision*, ICML 2015; for bf16 P. Zamirai, J. Zhang, C. R. Aberger and C. De Sa,
    *Revisiting bfloat16 training*, 2020, arXiv:2010.06192.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = jaxreg.stochastic_rounding(optax.sgd(1e-3), seed=0)
    >>> w = jnp.ones(10_000, jnp.bfloat16)
    >>> updates, _ = tx.update(jnp.ones_like(w), tx.init(w), w)
    >>> moved = optax.apply_updates(w, updates)  # w - 0.001 is no bf16 number
    >>> sorted(set(moved.tolist())), round(float(moved.astype(jnp.float32).mean()), 4)
    ([0.99609375, 1.0], 0.999)
    """
    inner = optax.with_extra_args_support(_check.transformation("inner", inner))
    seed = _address.checked_seed(seed)

    def init(params: optax.Params) -> StochasticRoundingState:
        _tree.check_floating("params", params)
        for path, p in zip(_where.paths(params), jax.tree.leaves(params), strict=True):
            if jnp.finfo(p.dtype).bits < 16:
                accepted = "leaves of 16 bits or more"
                raise _check.ArgumentError("params", f"{p.dtype} values on {path}", accepted)
        state = inner.init(jax.tree.map(_tree.widen, params))
        return StochasticRoundingState(jnp.zeros((), jnp.int32), state)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        params = _check.params_given(params)
        wide = jax.tree.map(_tree.widen, params)
        moves = jax.tree.map(_tree.widen, updates)
        moves, inner_state = inner.update(moves, state.inner, wide, **extra_args)
        leaves, treedef = jax.tree.flatten(params)
        keys = _address.leaf_keys(seed, "stochastic_rounding", state.count, params)
        pairs = zip(leaves, treedef.flatten_up_to(moves), keys, strict=True)
        moves = treedef.unflatten([_rounding_update(p, u, key) for p, u, key in pairs])
        count = stepped(state.count)
        return moves, StochasticRoundingState(count, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _rounding_update(p: jax.Array, u: jax.Array, key: jax.Array) -> jax.Array:
    """An update that takes p to p + u, rounded."""
    if p.dtype == _tree.wide_dtype(p.dtype):
        return u
    wide = p.astype(jnp.float32)
    after = wide + u.astype(jnp.float32)
    drawn = jax.random.bits(key, p.shape, jnp.uint16, out_sharding=_address.sharding_like(p))
    return (_rounded(after, drawn, p.dtype) - wide).astype(p.dtype)


def _rounded(x: jax.Array, drawn: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Float32 numbers rounded to those of a 16-bit dtype, by 16 random bits each.

    The magnitude of a float grows with its bits, read as a whole number. Random bits in the place
    of those that are to be dropped carry into the rest with the probability that rounds up.
    """
    info = jnp.finfo(dtype)
    dropped = jnp.finfo(jnp.float32).nmant - info.nmant
    shift = None
    if dtype == jnp.float16:
        # Below its smallest normal number there is one spacing: the one it has just above it.
        tiny = jnp.float32(info.tiny)
        shift = jnp.where(jnp.abs(x) < tiny, jnp.copysign(tiny, x), 0)
    bits = jax.lax.bitcast_convert_type(x if shift is None else x + shift, jnp.uint32)
    low = drawn.astype(jnp.uint32) >> np.uint32(16 - dropped)
    kept = (bits + low) & np.uint32(2**32 - 2**dropped)
    rounded = jax.lax.bitcast_convert_type(kept, jnp.float32)
    if shift is not None:
        rounded = rounded - shift
    # The bits of a NaN could carry into its sign.
    return jnp.where(jnp.isfinite(x), rounded, x)
