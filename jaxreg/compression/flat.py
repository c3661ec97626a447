"""A traced function as one list of operations on numbered arrays, in float32 at least.

Where the function computes in fewer bits, such as bfloat16, this program does not: so its outputs
tell apart rounding and a width that the function counts. Only operations that are neither in
`ANY_PRECISION` nor loops or branches keep their dtypes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxreg.compression.operations import ANY_PRECISION

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
        rounds_in: the floating dtypes of the function that it was traced from.
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
        self.rounds_in: set[Any] = set()
        self.constants: list[int] = []
        self.values: dict[int, np.ndarray] = {}
        self._others: dict[int, Any] = {}  # constants that are no numbers
        numbers = [self._number(v.aval, wide(v.aval.dtype)) for v in closed.jaxpr.invars]
        self.leaves, self.inputs = numbers[: len(leaves)], numbers[len(leaves) :]
        self.origins: dict[int, set[int]] = {number: {number} for number in self.leaves}
        self.outputs = self._flatten(closed.jaxpr, closed.consts, numbers)

    def __call__(self, leaves: Sequence[Any], *inputs: Any) -> list[Any]:
        """Its outputs."""
        given = zip((*self.leaves, *self.inputs), (*leaves, *jax.tree.leaves(inputs)), strict=True)
        arrays: dict[int, Any] = self.values | self._others
        for number, x in given:
            dtype = self.dtypes[number]
            arrays[number] = x if getattr(x, "dtype", None) == dtype else jnp.asarray(x, dtype)
        for op in self.ops:
            results = op.primitive.bind(*(arrays[i] for i in op.inputs), **op.params)
            results = results if op.primitive.multiple_results else [results]
            arrays |= zip(op.outputs, results, strict=True)
        return [arrays[i] for i in self.outputs]

    def _number(self, array: Any, dtype: Any) -> int:
        self.shapes.append(tuple(array.shape))
        self.dtypes.append(dtype)
        if jnp.issubdtype(array.dtype, jnp.floating):
            self.rounds_in.add(array.dtype)
        return len(self.shapes) - 1

    def _converted(self, number: int, dtype: Any) -> int:
        if self.dtypes[number] == dtype:
            return number
        self.shapes.append(self.shapes[number])
        self.dtypes.append(dtype)
        result = len(self.shapes) - 1
        params = {"new_dtype": dtype, "weak_type": False, "sharding": None}
        self.ops.append(Op(jax.lax.convert_element_type_p, params, [number], [result]))
        if number in self.origins:
            self.origins[result] = self.origins[number]
        return result

    def _flatten(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        env: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

        def constant(value: Any) -> int:
            array = value if hasattr(value, "shape") else np.asarray(value)
            number = self._number(array, wide(array.dtype))
            self.constants.append(number)
            if is_readable(array.dtype):
                self.values[number] = np.asarray(array).astype(self.dtypes[number])
                self.origins[number] = set()
            else:
                self._others[number] = array
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
                params, exact = eqn.params, True
                if eqn.primitive.name in ANY_PRECISION:
                    params = _exact(params, eqn.outvars[0].aval.dtype)
                elif eqn.primitive.name in ("scan", "while", "cond"):
                    params = {name: self._exact_body(value) for name, value in params.items()}
                else:
                    given, exact = [atom.aval.dtype for atom in eqn.invars], False
                    operands = [self._converted(*p) for p in zip(operands, given, strict=True)]
                dtypes = [wide(v.aval.dtype) if exact else v.aval.dtype for v in eqn.outvars]
                pairs = zip(eqn.outvars, dtypes, strict=True)
                results = [self._number(v.aval, dtype) for v, dtype in pairs]
                if results:  # not one that only prints
                    self.ops.append(Op(eqn.primitive, params, operands, results))
                readable = all(is_readable(self.dtypes[number]) for number in results)
                if self.origins.keys() >= set(operands) and readable and not eqn.effects:
                    origins = set().union(*(self.origins[i] for i in operands))
                    self.origins |= dict.fromkeys(results, origins)
                results = [self._converted(i, wide(self.dtypes[i])) for i in results]
            env |= dict(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _exact_body(self, value: Any) -> Any:
        """A parameter of a loop or branch: where it is a body or several, in float32 at least."""
        if isinstance(value, tuple):
            return tuple(self._exact_body(body) for body in value)
        if not (hasattr(value, "jaxpr") and hasattr(value, "in_avals")):
            return value
        given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in value.in_avals]
        body = Flat(lambda leaves, *arrays: jaxpr_as_fun(value)(*arrays), (), given)
        self.rounds_in |= body.rounds_in
        exact = [jax.ShapeDtypeStruct(a.shape, wide(a.dtype)) for a in given]
        return jax.make_jaxpr(lambda *arrays: body((), *arrays))(*exact)


def _exact(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The parameters of an operation that returned this dtype, for float32 at least."""
    exact = dict(params)
    for name in exact.keys() & {"new_dtype", "preferred_element_type", "dtype"}:
        exact[name] = None if exact[name] is None else wide(exact[name])
    if "precision" in exact and jnp.issubdtype(dtype, jnp.floating):
        exact["precision"] = (jax.lax.Precision.HIGHEST,) * 2
    if "mantissa_bits" in exact:
        exact |= {"exponent_bits": 8, "mantissa_bits": 23}
    return exact


def wide(dtype: Any) -> Any:
    """The dtype, or float32 for a floating one of fewer bits."""
    few = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return np.dtype(np.float32) if few else dtype


def is_readable(dtype: Any) -> bool:
    """Whether its values are real numbers or truth values; random keys are none."""
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)
