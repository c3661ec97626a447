"""What compiled programs do with sharded arrays."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def check_same_where_sharded(function, x, kind, whole):
    """Bit for bit, with no device drawing the whole: an array such as ``"f32[16,8]"``."""
    expected = jax.jit(function)(x)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    with jax.set_mesh(mesh):
        pieces = jax.device_put(x, sharding)
        compiled = jax.jit(function, out_shardings=sharding).lower(pieces).compile()
        found = compiled(pieces)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert whole not in compiled.as_text()


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def collectives(compiled):
    """How many of each kind a program has, those of branches and loops' bodies once each."""
    text = compiled.as_text()
    counts = {n: text.count(f" {n}(") + text.count(f" {n}-start(") for n in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}
