"""Where the units of a traced function are constant, and what that makes of its products.

Along an atom (see `jaxreg._axes`), a number is known for each index where the whole slice of an
array has this one value whatever the inputs are: a zero filter; its constant output. A product
that sums over an atom does not need the indices where one of its factors is zero; where the other
one is constant, what it adds is constant and can go into a bias that is added next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxreg._axes import ELEMENTWISE, WINDOWS, Axis, Op, Program, joined

Vector = np.ndarray


@dataclass
class Contraction:
    """A product that sums over an atom."""

    left: int
    right: int
    output: int
    atoms: Axis
    left_axes: Sequence[int]  # the axes that are summed over
    right_axes: Sequence[int]
    free: Axis  # of the right side, in the output
    folds: bool  # whether a constant of the left side adds a constant to the output
    bias: tuple[int, int] | None = None  # the leaf it can go into, and its sign


class Constants:
    """What is known of the arrays of a program."""

    def __init__(self, program: Program):
        self.program = program
        self.known: dict[int, dict[int, Vector]] = {}
        self.contractions: list[Contraction] = []
        for op in program.ops:
            self._evaluate(op)
        for op in program.ops:
            self._follow_values(op)
        for contraction in self.contractions:
            if contraction.right not in program.concrete:
                why = "a product of activations, such as attention's, whose scale may count them"
                program.atoms.fix(contraction.atoms, why)
        self._find_biases()

    def _evaluate(self, op: Op) -> None:
        """What does not depend on the inputs is computed."""
        if all(i in self.program.concrete for i in op.inputs):
            values = op.primitive.bind(
                *(jnp.asarray(self.program.concrete[i]) for i in op.inputs), **op.params
            )
            results = values if op.primitive.multiple_results else [values]
            for number, value in zip(op.outputs, results, strict=True):
                self.program.concrete[number] = np.asarray(value)

    def along(self, number: int, atom: int, axes: Sequence[int] | None = None) -> Vector | None:
        """For each index of the atom the value of the slice, NaN where it is not known.

        None where nothing is known, or the array has no such atom and is not one number. `axes`
        say where to look for the atom in an array that has it twice, such as a square kernel.
        """
        program = self.program
        if number not in program.concrete:
            return self.known.get(number, {}).get(atom)
        value, atoms = program.concrete[number], program.in_atoms(number)
        if (not jnp.issubdtype(value.dtype, jnp.number) and value.dtype != bool) or not value.size:
            return None
        if atom not in atoms:
            same = (value == value.flat[0]).all()
            return np.full(program.atoms.sizes[atom], value.flat[0], np.float64) if same else None
        owners = [i for i, axis in enumerate(program.axes[number]) for _ in self._parts(axis)]
        wanted = range(len(program.axes[number])) if axes is None else axes
        places = [k for k, a in enumerate(atoms) if a == atom and owners[k] in wanted]
        if len(places) != 1:
            return None
        split = value.reshape([program.atoms.sizes[a] for a in atoms])
        rows = np.moveaxis(split, places[0], 0).reshape(split.shape[places[0]], -1)
        same = (rows == rows[:, :1]).all(1)
        return np.where(same, rows[:, 0].astype(np.float64), np.nan)

    def _parts(self, axis: Axis) -> Axis:
        return self.program.atoms.expand(axis)

    def _follow_values(self, op: Op) -> None:
        out = op.outputs[0]
        if out in self.program.concrete:
            return
        if op.name in ELEMENTWISE:
            atoms = self.program.in_atoms(out)
            once = [a for a in atoms if atoms.count(a) == 1]
            self.known[out] = {a: self._applied(op, a) for a in once}
        elif op.name == "dot_general":
            self._follow_product(op)
        elif op.name == "conv_general_dilated":
            numbers = op.params["dimension_numbers"]
            dilated = any(d != 1 for d in op.params["lhs_dilation"])
            padded = dilated or any(any(pair) for pair in op.params["padding"])
            inner, other = numbers.lhs_spec[1:2], numbers.rhs_spec[1:2]
            outer = self.program.axes[op.inputs[1]][numbers.rhs_spec[0]]
            self._add_contraction(op, inner, other, outer, folds=not padded)
            self._zeros_of_product(op, inner, other)
        elif op.name in ("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"):
            self._pass(op, self.program.in_atoms(out))
        elif op.name in WINDOWS or op.name == "gather":
            # A window of one number repeated holds that number, but for sums.
            zeros_only = "sum" in op.name or op.name == "gather"
            self._pass(op, self.program.in_atoms(out), zeros_only=zeros_only)

    def _pass(self, op: Op, atoms: Sequence[int], *, zeros_only: bool = False) -> None:
        self.known[op.outputs[0]] = {}
        for atom in atoms:
            vector = self.along(op.inputs[0], atom)
            if vector is not None:
                kept = np.where(vector == 0, 0, np.nan) if zeros_only else vector
                self.known[op.outputs[0]][atom] = kept

    def _applied(self, op: Op, atom: int) -> Vector:
        """An elementwise operation on slices whose values are known."""
        size = self.program.atoms.sizes[atom]
        vectors = [self.along(i, atom) for i in op.inputs]
        filled = [np.full(size, np.nan) if v is None else v for v in vectors]
        known = ~np.isnan(filled).any(0)
        dtypes = [self.program.dtypes[i] for i in op.inputs]
        arguments = [
            jnp.asarray(np.where(known, v, 0).astype(d))
            for v, d in zip(filled, dtypes, strict=True)
        ]
        result = np.asarray(op.primitive.bind(*arguments, **op.params)).astype(np.float64)
        result = np.where(known, result, np.nan)
        if op.name == "mul":
            result = np.where((filled[0] == 0) | (filled[1] == 0), 0, result)
        elif op.name == "div":
            result = np.where(filled[0] == 0, 0, result)
        elif op.name == "select_n":
            cases = np.stack(filled[1:])
            result = np.where((cases == cases[0]).all(0), cases[0], result)
        return result

    def _follow_product(self, op: Op) -> None:
        (inner, other), (_, batch) = op.params["dimension_numbers"]
        second = self.program.axes[op.inputs[1]]
        free = [axis for i, axis in enumerate(second) if i not in (*other, *batch)]
        self._add_contraction(op, inner, other, joined(free), folds=not batch)
        self._zeros_of_product(op, inner, other)

    def _zeros_of_product(self, op: Op, inner: Sequence[int], other: Sequence[int]) -> None:
        """A product is zero where one of its factors is, along what is not summed over."""
        out = op.outputs[0]
        self.known[out] = {}
        atoms = self.program.in_atoms(out)
        for atom in (a for a in atoms if atoms.count(a) == 1):
            zero = np.zeros(self.program.atoms.sizes[atom], bool)
            for number, summed in zip(op.inputs, (inner, other), strict=True):
                own = self.program.axes[number]
                axes = [i for i, a in enumerate(own) if i not in summed and atom in self._parts(a)]
                vector = self.along(number, atom, axes) if axes else None
                if vector is not None:
                    zero |= vector == 0
            self.known[out][atom] = np.where(zero, 0.0, np.nan)

    def _add_contraction(
        self, op: Op, inner: Sequence[int], other: Sequence[int], free: Axis, *, folds: bool
    ) -> None:
        left, right = op.inputs
        atoms = self._parts(joined(self.program.axes[left][i] for i in inner))
        self.contractions.append(
            Contraction(left, right, op.outputs[0], atoms, inner, other, self._parts(free), folds)
        )

    def _find_biases(self) -> None:
        """Where a constant that is added to a product can go: a leaf that is added to it next."""
        uses: dict[int, list[Op]] = {}
        made: dict[int, Op] = {}
        for op in self.program.ops:
            for number in op.inputs:
                uses.setdefault(number, []).append(op)
            made |= dict.fromkeys(op.outputs, op)

        def leaf(number: int) -> int | None:
            """The leaf that an array is, reshaped; None for one that is read elsewhere too."""
            while len(uses[number]) == 1 and number in made and made[number].name in _RESHAPES:
                number = made[number].inputs[0]
            alone = len(uses[number]) == 1 and number not in self.program.outputs
            return self.program.leaf_of.get(number) if alone else None

        for contraction in self.contractions:
            number = contraction.output
            while number not in self.program.outputs and len(uses.get(number, ())) == 1:
                op = uses[number][0]
                if op.name in _RESHAPES:
                    number = op.outputs[0]
                    continue
                if op.name in ("add", "sub") and (op.name == "add" or op.inputs[0] == number):
                    other = op.inputs[1 - op.inputs.index(number)]
                    found = leaf(other)
                    if found is not None and contraction.right in self.program.concrete:
                        own = self.program.in_atoms(self.program.leaves[found])
                        weights = self.program.in_atoms(contraction.right)
                        once = len(set(weights)) == len(weights)
                        if once and sorted(own) == sorted(contraction.free):
                            contraction.bias = found, 1 if op.name == "add" else -1
                break


_RESHAPES = (
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"),
    *("convert_element_type", "copy", "stop_gradient"),
)
