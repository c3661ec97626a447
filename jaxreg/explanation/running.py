"""Runs a traced update for many probes at a time, in pieces that are compiled once for all leaves
that are alike.

A tree of 1,000 leaves would take minutes to compile whole, and one operation at a time takes
seconds to run. A piece is all that is done to one leaf between two numbers that come from other
leaves, such as a global norm. The program is that of one probe, as tracing one of many takes three
times as long: each piece is batched where it is compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Operations that only hold a program: its operations take their place.
_HOLDERS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")
# Operations that make zeros of zeros; a product does of one.
_ZEROS = (
    "select_n",
    "broadcast_in_dim",
    "convert_element_type",
    "neg",
    "reshape",
    "copy",
    "add",
    "sub",
)
WHOLE = 800  # operations that are compiled at once
PART = 50  # of these, where a group has many
MANY = 16  # arrays that one operation joins, which are no one leaf's
# Numbers are rounded to the dtypes that the program says.
OPTIONS = {"xla_allow_excess_precision": False}


class Operation(NamedTuple):
    """One operation; values have numbers, and an input that has none is a literal."""

    primitive: Any
    params: dict[str, Any]
    inputs: list[Any]
    outputs: list[int]
    effects: bool

    @property
    def reads(self) -> list[int]:
        """The inputs that have numbers."""
        return [i for i in self.inputs if not isinstance(i, Literal)]


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
    """`function` for many probes, the first axis of all that it takes and returns.

    Attributes:
        are_zero: what it returns, with whether it is zero whatever comes in.
        reads: the numbers of values that are read; those of arguments come first.
    """

    def __init__(self, function: Callable[..., Any], lanes: int, *examples: Any):
        one = jax.tree.map(_of_one_probe, examples)
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*one)
        self.treedef = jax.tree.structure(shapes)
        self.lanes = lanes
        program = Program(lanes, traced.in_avals)
        self.inputs = list(range(len(traced.in_avals)))
        self.results = program.add(traced, list(self.inputs))
        self.constants = program.constants
        self.pieces = program.pieces(self.results)
        self.are_zero = self.treedef.unflatten([program.is_zero(r) for r in self.results])
        self.reads = {i for op in program.operations for i in op.reads}

    def __call__(self, *args: Any) -> Any:
        """What `function` returns."""
        values = dict(zip(self.inputs, jax.tree.leaves(args), strict=True)) | self.constants
        for piece in self.pieces:
            out = piece.function(*(values[i] for i in piece.inputs))
            values.update(zip(piece.outputs, out, strict=True))
            for i in piece.dead:
                values.pop(i, None)
        return self.treedef.unflatten([self._result(r, values) for r in self.results])

    def _result(self, result: Any, values: dict[int, Any]) -> Any:
        if not isinstance(result, Literal) and result not in self.constants:
            return values[result]
        same = jnp.asarray(result.value if isinstance(result, Literal) else values[result])
        return jnp.broadcast_to(same, (self.lanes, *same.shape))


class Program:
    """A traced function as a flat list of operations; none that makes numbers is there twice."""

    def __init__(self, lanes: int, avals: Sequence[Any]):
        self.lanes, self.count = lanes, len(avals)
        self.avals: dict[int, Any] = dict(enumerate(avals))
        self.constants: dict[int, Any] = {}
        self.operations: list[Operation] = []
        self.made: dict[Any, list[int]] = {}
        self.zeros: set[int] = set()

    def add(self, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """Appends the operations of a program with these inputs; returns its outputs."""
        numbers: dict[Any, Any] = dict(zip(closed.jaxpr.invars, args, strict=True))
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            numbers[var] = self._constant(value)

        def read(atom: Any) -> Any:
            if isinstance(atom, core.Literal):
                return Literal(np.asarray(atom.val, atom.aval.dtype))  # pyright: ignore[reportAttributeAccessIssue]
            return numbers[atom]

        for eqn in closed.jaxpr.eqns:
            outputs = self._outputs(eqn, [read(atom) for atom in eqn.invars])
            numbers.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def _outputs(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        """Appends what one equation does."""
        params, name = eqn.params, eqn.primitive.name
        held = params.get("jaxpr", params.get("call_jaxpr"))
        if name in _HOLDERS and isinstance(held, core.ClosedJaxpr):
            return self.add(held, inputs)
        if name == "platform_index":
            return [Literal(np.asarray(jax.jit(lambda: eqn.primitive.bind(**params))()))]
        avals = [var.aval for var in eqn.outvars]
        if name == "slice" and set(params["strides"] or [1]) == {1}:
            # Its place is a number, so that those of many leaves are alike.
            starts, ends = params["start_indices"], params["limit_indices"]
            sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
            inputs = inputs + [self._constant(jnp.asarray(start, jnp.int32)) for start in starts]
            return self._operation(jax.lax.dynamic_slice_p, {"slice_sizes": sizes}, inputs, avals)
        if name != "cond" or eqn.effects:
            return self._operation(eqn.primitive, params, inputs, avals, bool(eqn.effects))
        # Probes take different branches, so that all branches are computed.
        index, *inputs = inputs
        if isinstance(index, Literal):
            return self.add(params["branches"][int(index.value)], inputs)
        each = zip(*(self.add(branch, inputs) for branch in params["branches"]), strict=True)
        return [
            self._operation(jax.lax.select_n_p, {}, [index, *cases], [aval])[0]
            for cases, aval in zip(each, avals, strict=True)
        ]

    def _operation(
        self,
        primitive: Any,
        params: Any,
        inputs: list[Any],
        avals: list[Any],
        effects: bool = False,
    ) -> list[int]:
        """The outputs of an operation, which is appended unless it is there.

        One that makes arrays is never shared: it would join the leaves that read it.
        """
        shared = not effects and not any(aval.shape for aval in avals)
        key = (primitive, _hashable(params), tuple(map(_named, inputs))) if shared else object()
        if key not in self.made:
            self.made[key] = outputs = [self._new(aval) for aval in avals]
            self.operations.append(Operation(primitive, params, inputs, outputs, effects))
            name = primitive.name
            zero = [self.is_zero(i) for i in (inputs[1:] if name == "select_n" else inputs)]
            if (name in _ZEROS and all(zero)) or (name == "mul" and any(zero)):
                self.zeros.update(outputs)
        return self.made[key]

    def is_zero(self, value: Any) -> bool:
        """Whether a value is zero whatever the arguments are."""
        if isinstance(value, Literal):
            return not np.any(value.value)
        return value in self.zeros

    def pieces(self, results: list[Any]) -> list[Piece]:
        """The operations in an order in which they can run; what nothing needs is left out."""
        groups = [self.operations] if len(self.operations) <= WHOLE else self._groups()
        needed = {r for r in results if not isinstance(r, Literal)}
        compiled: dict[Any, Callable[..., list[Any]]] = {}
        made = []
        for operations in reversed(groups):
            own = [i for op in operations for i in op.outputs]
            outputs = [i for i in own if i in needed]
            if not outputs and not any(op.effects for op in operations):
                continue
            known = set(own)
            inputs = list(dict.fromkeys(i for op in operations for i in op.reads if i not in known))
            dead = [i for i in inputs if i not in needed]
            needed.update(inputs)
            key, function = self._key(operations, inputs, outputs)
            if key not in compiled:
                axes = tuple(None if i in self.constants else 0 for i in inputs)
                batched = jax.vmap(function, axes, axis_size=self.lanes)
                compiled[key] = jax.jit(batched, compiler_options=OPTIONS)
            made.append(Piece(compiled[key], inputs, outputs, dead))
        return made[::-1]

    def _new(self, aval: Any) -> int:
        self.count += 1
        self.avals[self.count] = aval
        return self.count

    def _constant(self, value: Any) -> int:
        number = self._new(jax.typeof(value))
        self.constants[number] = value
        return number

    def _groups(self) -> list[list[Operation]]:
        """Operations by the leaf whose arrays they work on, and how often others came between."""
        parent: dict[int, int] = {}

        def root(x: int) -> int:
            while x in parent:
                parent[x] = parent.get(parent[x], parent[x])
                x = parent[x]
            return x

        joined = [self._arrays(op) for op in self.operations]
        for arrays in joined:
            for other in arrays[1:]:
                a, b = root(arrays[0]), root(other)
                if a != b:
                    parent[a] = b
        # Numbers are their leaf's until they meet those of another one. What comes of no leaf is
        # computed first, for all of them.
        numbers = -1
        owners: dict[int, int] = {}
        made_in: dict[int, tuple[int, int]] = {}
        groups: dict[tuple[int, int], list[Operation]] = {}
        for op, arrays in zip(self.operations, joined, strict=True):
            of = {root(arrays[0])} if arrays else {owners[i] for i in op.reads if i in owners}
            of |= set() if arrays else {root(i) for i in op.reads if self._is_large(i)}
            group = next(iter(of)) if len(of) == 1 else numbers
            level = 0 if group == numbers else 1
            for i in op.reads:
                if i in made_in:
                    before, at = made_in[i]
                    level = max(level, at if before == group else at + 1)
            made_in.update(dict.fromkeys(op.outputs, (group, level)))
            if of:
                owners.update(dict.fromkeys(op.outputs, group))
            groups.setdefault((level, group), []).append(op)
        return [few for key in sorted(groups, key=lambda k: k[0]) for few in _cut(groups[key])]

    def _arrays(self, op: Operation) -> list[int]:
        """The arrays that an operation works on, where they are one leaf's."""
        arrays = [i for i in [*op.reads, *op.outputs] if self._is_large(i)]
        return arrays if len(arrays) <= MANY else []

    def _is_large(self, value: int) -> bool:
        aval = self.avals[value]
        return len(aval.shape) > 0 and jnp.issubdtype(aval.dtype, jnp.inexact)

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
            key.append((op.primitive.name, _hashable(op.params), tuple(map(_named, read))))
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

        shapes = tuple((str(self.avals[i]), i in self.constants) for i in inputs)
        return (tuple(key), shapes, tuple(last)), function


def _cut(operations: list[Operation]) -> list[list[Operation]]:
    """The operations of a group, in parts where they are many.

    What is done to many leaves alike comes side by side, so that the parts are alike, too.
    """
    if len(operations) <= WHOLE // 4:
        return [operations]
    depth: dict[int, int] = {}
    keys = []
    for n, op in enumerate(operations):
        at = max((depth[i] + 1 for i in op.reads if i in depth), default=0)
        depth |= dict.fromkeys(op.outputs, at)
        keys.append((at, op.primitive.name, n))
    ordered = [operations[n] for _, _, n in sorted(keys)]
    return [ordered[i : i + PART] for i in range(0, len(ordered), PART)]


def _of_one_probe(x: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype, weak_type=aval.weak_type)


def _named(read: Any) -> Any:
    """An input as a part of a key."""
    return (str(read.value), str(read.value.dtype)) if isinstance(read, Literal) else read


def _hashable(params: dict[str, Any]) -> Any:
    """Parameters as a key; where they can't be one, one that equals no other."""
    items = tuple(sorted(params.items(), key=lambda item: item[0]))
    try:
        hash(items)
    except TypeError:
        return object()
    return items
