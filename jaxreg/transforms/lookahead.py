"""Lookahead: slow weights behind the optimizer's own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg import _check, _tree
from jaxreg.transforms.selected import stepped

Number = float | jax.Array


class LookaheadState(NamedTuple):
    """State of `lookahead`.

    Attributes:
        count: steps taken, an int32 scalar.
        slow: the slow weights, a tree like params in float32 at least.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    slow: Any


def lookahead(every: int = 5, alpha: Number = 0.5) -> optax.GradientTransformationExtraArgs:
    r"""Lookahead: slow weights that go a part of the way to where the optimizer has gone.

    After each `every` steps $s \leftarrow s + \alpha (p + u - s)$ and $p \leftarrow s$, with u the
    update of the step; in between s stays, and u passes unchanged. The slow weights live in the
    state, so that params stay one tree (those of ``optax.lookahead`` are pairs).

    Args:
        every: a whole number >= 1.
        alpha: a number in [0, 1], or a traced scalar.

    Returns:
        An optax transformation with state `LookaheadState`, the last of a chain, though an average
        may follow. ``update`` needs ``params``. The slow weights are kept in float32 at least, and
        ``optax.apply_updates`` gives them to the rounding of one sum in the weights' dtype.

    Raises:
        ValueError: where an argument is out of its range; at ``init`` where a leaf is not a
            floating array; at ``update`` without params.

    Source: M. Zhang, J. Lucas, J. Ba and G. Hinton, *Lookahead optimizer: k steps forward, 1 step
    back*, NeurIPS 2019, arXiv:1907.08610.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> tx = optax.chain(optax.sgd(1.0), jaxreg.lookahead(every=2, alpha=0.5))
    >>> w, seen = jnp.array([0.0]), []
    >>> state = tx.init(w)
    >>> for _ in range(4):
    ...     updates, state = tx.update(jnp.array([-1.0]), state, w)
    ...     w = optax.apply_updates(w, updates)
    ...     seen.append(float(w[0]))
    >>> seen
    [1.0, 1.0, 2.0, 2.0]
    """
    every = _check.whole_number("every", every, at_least=1)
    alpha = _check.scalar("alpha", alpha, "a number in [0, 1]", lambda v: 0 <= v <= 1)

    def init(params: optax.Params) -> LookaheadState:
        _tree.check_floating("params", params)
        return LookaheadState(jnp.zeros((), jnp.int32), _tree.wide_copy(params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, LookaheadState]:
        del extra_args
        params = _check.params_given(params)
        count = stepped(state.count)
        now = count % every == 0

        def next_slow(p: jax.Array, u: jax.Array, slow: jax.Array) -> jax.Array:
            distance = _tree.widen(p) + u.astype(slow.dtype) - slow
            part = jnp.asarray(alpha).astype(_tree.real_dtype(slow.dtype))
            return jnp.where(now, slow + part * distance, slow)

        def next_update(p: jax.Array, u: jax.Array, slow: jax.Array) -> jax.Array:
            # Rounded to p's dtype before the difference, which is exact for a p nearby.
            target = slow.astype(p.dtype)
            dtype = jnp.promote_types(p.dtype, u.dtype)
            return jnp.where(now, (target - p).astype(dtype), u.astype(dtype))

        slow = jax.tree.map(next_slow, params, updates, state.slow)
        return jax.tree.map(next_update, params, updates, slow), LookaheadState(count, slow)

    return optax.GradientTransformationExtraArgs(init, update)
