"""Meshes whose shardings are explicit."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def decided_by_xla(
    function: Callable[..., jax.Array], arrays: dict[str, Any], rows: jax.Array, axis: int | None
) -> jax.Array:
    """A function's result, sharded as `rows` is without an axis; as nothing where that is None.

    Where shardings are explicit, JAX refuses to take the label's entry along a sharded axis, or
    sums over one: XLA decides there what is reduced.
    """
    sharding = getattr(jax.typeof(rows), "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return function(**arrays)
    spec = [*sharding.spec, *[None] * (rows.ndim - len(sharding.spec))]
    kept = [] if axis is None else spec[:axis] + spec[axis + 1 :]
    wanted = NamedSharding(sharding.mesh, PartitionSpec(*kept))
    given = {name: x for name, x in arrays.items() if isinstance(x, jax.Array)}
    rest = {name: x for name, x in arrays.items() if name not in given}
    call: Any = jax.sharding.auto_axes(lambda x: function(**x, **rest), out_sharding=wanted)
    return call(given)
