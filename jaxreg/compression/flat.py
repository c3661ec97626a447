"""A traced function as one list of operations on numbered arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "checkpoint",
)


@dataclass
class Op:
    """One operation of the flattened program; arrays are numbered."""

    primitive: Any
    params: dict[str, Any]
    inputs: list[int]
    outputs: list[int]  # one at least

    @property
    def name(self) -> str:
        return self.primitive.name


class Flat:
    """A traced function of a list of leaves and of inputs; calls are inlined.

    Attributes:
        ops: its operations.
        shapes, dtypes: of each array.
        leaves, inputs, outputs: the arrays that are given and returned.
        constants: the arrays that are neither given nor computed.
        values: of those constants that are numbers.
        origins: for each array that does not depend on the inputs, the leaves that it is made of.
    """

    def __init__(self, function: Callable[..., Any], leaves: Sequence[Any], inputs: Any):
        closed = jax.make_jaxpr(lambda leaves, inputs: function(leaves, *inputs))(
            list(leaves), inputs
        )
        self.ops: list[Op] = []
        self.shapes: list[tuple[int, ...]] = []
        self.dtypes: list[Any] = []
        self.constants: list[int] = []
        self.values: dict[int, np.ndarray] = {}
        numbers = [self._number(v.aval) for v in closed.jaxpr.invars]
        self.leaves, self.inputs = numbers[: len(leaves)], numbers[len(leaves) :]
        self.origins: dict[int, set[int]] = {number: {number} for number in self.leaves}
        self.outputs = self._flatten(closed.jaxpr, closed.consts, numbers)

    def _number(self, array: Any) -> int:
        self.shapes.append(tuple(array.shape))
        self.dtypes.append(array.dtype)
        return len(self.shapes) - 1

    def _flatten(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        env: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

        def constant(value: Any) -> int:
            array = value if hasattr(value, "shape") else np.asarray(value)
            number = self._number(array)
            self.constants.append(number)
            if is_readable(array.dtype):
                self.values[number] = np.asarray(array)
                self.origins[number] = set()
            return number

        env |= {v: constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> int:
            return constant(atom.val) if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in _CALLS and inner is not None:
                body, own = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
                results = self._flatten(body, own, operands)
            else:
                results = [self._number(v.aval) for v in eqn.outvars]
                if results:  # not one that only prints
                    self.ops.append(Op(eqn.primitive, eqn.params, operands, results))
                readable = all(is_readable(self.dtypes[number]) for number in results)
                if self.origins.keys() >= set(operands) and readable and not eqn.effects:
                    origins = set().union(*(self.origins[i] for i in operands))
                    self.origins |= dict.fromkeys(results, origins)
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def is_readable(dtype: Any) -> bool:
    """Whether its values are real numbers or truth values; random keys are none."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)
