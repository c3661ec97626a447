"""Runs a traced update in pieces, each compiled once for all leaves that are alike.

A tree of 1,000 leaves would take minutes to compile whole, and one operation at a time takes
seconds to run. A piece is all that is done to one leaf between two numbers that come from other
leaves, such as a global norm.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Operations that only hold a program: its operations take their place.
_HOLDERS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
WHOLE = 800  # operations that are compiled at once
# Numbers are rounded to the dtypes that the program says.
OPTIONS = {"xla_allow_excess_precision": False}


class Operation(NamedTuple):
    """One operation; values have numbers, and an input that has none is a literal."""

    primitive: Any
    params: dict[str, Any]
    inputs: list[Any]
    outputs: list[int]


class Literal(NamedTuple):
    """A number written in the program."""

    value: Any


class Piece(NamedTuple):
    """A compiled function of the values `inputs`; `dead` ones are not needed afterwards."""

    function: Callable[..., list[Any]]
    inputs: list[int]
    outputs: list[int]
    dead: list[int]


class Runner:
    """`function`, traced once for arguments of the shapes and dtypes of `examples`.

    Attributes:
        shapes: the shapes and dtypes of what it returns.
    """

    def __init__(self, function: Callable[..., Any], *examples: Any):
        traced, self.shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
        self.treedef = jax.tree.structure(self.shapes)
        program = Program(len(traced.in_avals))
        self.inputs = list(range(len(traced.in_avals)))
        for value, aval in enumerate(traced.in_avals):
            program.avals[value] = aval
        self.results = program.add(traced, list(self.inputs))
        self.constants = program.constants
        self.pieces = program.pieces(self.results)

    def __call__(self, *args: Any) -> Any:
        """What `function` returns."""
        values = dict(zip(self.inputs, jax.tree.leaves(args), strict=True)) | self.constants
        for piece in self.pieces:
            out = piece.function(*(values[i] for i in piece.inputs))
            values.update(zip(piece.outputs, out, strict=True))
            for i in piece.dead:
                values.pop(i, None)
        return self.treedef.unflatten(
            [r.value if isinstance(r, Literal) else values[r] for r in self.results]
        )


class Program:
    """A traced function as a flat list of operations."""

    def __init__(self, values: int):
        self.count = values
        self.avals: dict[int, Any] = {}
        self.constants: dict[int, Any] = {}
        self.operations: list[Operation] = []

    def add(self, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """Appends the operations of a program with these inputs; returns its outputs."""
        numbers: dict[Any, Any] = dict(zip(closed.jaxpr.invars, args, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            numbers[var] = self._new(var)
            self.constants[numbers[var]] = value

        def read(atom: Any) -> Any:
            return Literal(atom.val) if isinstance(atom, core.Literal) else numbers[atom]

        for eqn in closed.jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            params = eqn.params
            held = params.get("jaxpr", params.get("call_jaxpr"))
            if eqn.primitive.name in _HOLDERS and isinstance(held, core.ClosedJaxpr):
                numbers.update(zip(eqn.outvars, self.add(held, inputs), strict=True))
                continue
            outputs = [self._new(var) for var in eqn.outvars]
            numbers.update(zip(eqn.outvars, outputs, strict=True))
            self.operations.append(Operation(eqn.primitive, params, inputs, outputs))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def pieces(self, results: list[Any]) -> list[Piece]:
        """The operations in an order in which they can run; what nothing needs is left out."""
        groups = [self.operations] if len(self.operations) <= WHOLE else self._groups()
        needed = {r for r in results if not isinstance(r, Literal)}
        compiled: dict[Any, Callable[..., list[Any]]] = {}
        made = []
        for operations in reversed(groups):
            own = [i for op in operations for i in op.outputs]
            outputs = [i for i in own if i in needed]
            if not outputs and not any(_has_effects(op) for op in operations):
                continue
            known = set(own)
            read = [i for op in operations for i in op.inputs if not isinstance(i, Literal)]
            inputs = list(dict.fromkeys(i for i in read if i not in known))
            dead = [i for i in inputs if i not in needed]
            needed.update(inputs)
            key, function = self._key(operations, inputs, outputs)
            if key not in compiled:
                compiled[key] = jax.jit(function, compiler_options=OPTIONS)
            made.append(Piece(compiled[key], inputs, outputs, dead))
        return made[::-1]

    def _new(self, var: Any) -> int:
        self.count += 1
        self.avals[self.count] = var.aval
        return self.count

    def _groups(self) -> list[list[Operation]]:
        """Operations by the leaf whose arrays they work on, and how often others came between."""
        parent: dict[Any, Any] = {}

        def root(x: Any) -> Any:
            while x in parent:
                parent[x] = parent.get(parent[x], parent[x])
                x = parent[x]
            return x

        for n, op in enumerate(self.operations):
            values = [i for i in [*op.inputs, *op.outputs] if not isinstance(i, Literal)]
            large = [i for i in values if self._is_large(i)]
            # What works on numbers alone, such as sums of norms, is one group.
            for value in large or ["numbers"]:
                a, b = root(("operation", n)), root(value)
                if a != b:
                    parent[a] = b
        made_in: dict[int, tuple[Any, int]] = {}
        groups: dict[Any, list[Operation]] = {}
        for n, op in enumerate(self.operations):
            group, level = root(("operation", n)), 0
            for i in op.inputs:
                if not isinstance(i, Literal) and i in made_in:
                    before, at = made_in[i]
                    level = max(level, at if before == group else at + 1)
            made_in.update(dict.fromkeys(op.outputs, (group, level)))
            groups.setdefault((level, group), []).append(op)
        cut = []
        for key in sorted(groups, key=lambda k: k[0]):
            operations = groups[key]
            cut += [operations] if len(operations) <= WHOLE // 4 else [[op] for op in operations]
        return cut

    def _is_large(self, value: int) -> bool:
        aval = self.avals[value]
        return len(aval.shape) > 1 and jax.numpy.issubdtype(aval.dtype, jax.numpy.inexact)

    def _key(
        self, operations: list[Operation], inputs: list[int], outputs: list[int]
    ) -> tuple[Any, Callable[..., list[Any]]]:
        """What pieces that are alike have in common, and the piece as a function."""
        local = {value: n for n, value in enumerate(inputs)}
        program, key = [], []
        for op in operations:
            read = [i if isinstance(i, Literal) else local[i] for i in op.inputs]
            local |= {value: len(local) + n for n, value in enumerate(op.outputs)}
            program.append((op, read))
            literals = [
                (str(i.value), str(jax.typeof(i.value))) if isinstance(i, Literal) else i
                for i in read
            ]
            key.append((op.primitive.name, _hashable(op.params), tuple(literals)))
        last = [local[i] for i in outputs]

        def function(*values: Any) -> list[Any]:
            made = list(values)
            for op, read in program:
                args = [i.value if isinstance(i, Literal) else made[i] for i in read]
                bound = op.primitive.get_bind_params(op.params)
                functions, named = bound if isinstance(bound, tuple) else ([], bound)
                out = op.primitive.bind(*functions, *args, **named)
                made += out if op.primitive.multiple_results else [out]
            return [made[i] for i in last]

        shapes = tuple(str(self.avals[i]) for i in inputs)
        return (tuple(key), shapes, tuple(last)), function


def _hashable(params: dict[str, Any]) -> Any:
    """Parameters as a key; where they can't be one, one that equals no other."""
    items = tuple(sorted(params.items(), key=lambda item: item[0]))
    try:
        hash(items)
    except TypeError:
        return object()
    return items


def _has_effects(op: Operation) -> bool:
    return "callback" in op.primitive.name
