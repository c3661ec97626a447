"""Where the units of a traced function are constant, and what that makes of its products.

Along an atom (see `axes`), a number is known for each index where the whole slice of an array has
this one value whatever the inputs are: a zero filter; its constant output. A product
that sums over an atom does not need the indices where one of its factors is zero; where the other
one is constant, what it adds is constant and can go into a bias that is added next.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxreg.compression.axes import Program
from jaxreg.compression.flat import Op, is_readable
from jaxreg.compression.operations import ELEMENTWISE, PRODUCTS, RESHAPES
from jaxreg.compression.products import Contraction, operands

Vector = np.ndarray  # float64, NaN where nothing is known


class Constants:
    """What is known of the arrays of a program with these leaves."""

    def __init__(self, program: Program, products: list[Contraction], leaves: list[np.ndarray]):
        self.program = program
        self.products = products
        self.values = program.values | dict(zip(program.leaves, leaves, strict=True))
        fixed = program.atoms.fixed()
        self._atoms = {a for p in products for a in p.atoms if a not in fixed}
        self._known: dict[int, dict[int, Vector]] = {}  # by array and atom
        # For an atom, where something was known of its indices until an operation.
        self._lost: dict[int, list[tuple[np.ndarray, str]]] = {}
        for op in program.ops:
            if op.outputs[0] in program.origins:
                self._evaluate(op)
            else:
                self._follow(op)

    def along(self, number: int, atom: int, axes: Sequence[int] | None = None) -> Vector | None:
        """For each index of the atom the value of the slice.

        None where nothing is known, or the array has no such atom and is not one number. `axes`
        say where to look for the atom in an array that has it twice, such as a square kernel.
        """
        program = self.program
        if number not in self.values:
            return self._known.get(number, {}).get(atom)
        value, atoms = self.values[number], program.in_atoms(number)
        if not value.size:
            return None
        if atom not in atoms:
            same = (value == value.flat[0]).all()
            return np.full(program.atoms.sizes[atom], value.flat[0], np.float64) if same else None
        owners = program.owners(number)
        wanted = owners if axes is None else axes
        places = [k for k, a in enumerate(atoms) if a == atom and owners[k] in wanted]
        if len(places) != 1:
            return None
        split = value.reshape([program.atoms.sizes[a] for a in atoms])
        rows = np.moveaxis(split, places[0], 0).reshape(split.shape[places[0]], -1)
        same = (rows == rows[:, :1]).all(1)
        return np.where(same, rows[:, 0].astype(np.float64), np.nan)

    def not_needed(self, product: Contraction, atom: int) -> np.ndarray:
        """The indices that a product can do without, with what is constant in its bias."""
        gone = np.isfinite(self.foldable(product, atom))
        for side in (product.data, product.weight):
            vector = self.along(side.number, atom, side.summed)
            if vector is not None:
                gone |= vector == 0
        return gone

    def foldable(self, product: Contraction, atom: int) -> Vector:
        """The constants of the data that can go into the bias; NaN for others.

        Where several products share a bias, they must read the same constants by one weight.
        """
        constants = None
        if product.bias is not None:
            shared = [p for p in self.products if p.bias == product.bias]
            vectors = [
                self.along(p.data.number, atom, p.data.summed)
                for p in shared
                if self._same_weight(product, p)
            ]
            constants = _agreed(vectors, len(shared))
        if constants is None:
            return np.full(self.program.atoms.sizes[atom], np.nan)
        return np.where(np.isfinite(constants), constants, np.nan)

    def _same_weight(self, first: Contraction, second: Contraction) -> bool:
        if first.atoms != second.atoms or first.weight.summed != second.weight.summed:
            return False
        own, other = (self.values[p.weight.number] for p in (first, second))
        return own is other or np.array_equal(own, other)

    def lost(self, atom: int, indices: np.ndarray) -> str | None:
        """Why indices that were known are not known any more, where they were."""
        for where, why in self._lost.get(atom, ()):
            if (where & indices).any():
                return why
        return None

    # Following the operations --------------------------------------------------------------------

    def _evaluate(self, op: Op) -> None:
        """What does not depend on the inputs is computed."""
        values = op.primitive.bind(*(jnp.asarray(self.values[i]) for i in op.inputs), **op.params)
        results = values if op.primitive.multiple_results else [values]
        for number, value in zip(op.outputs, results, strict=True):
            self.values[number] = np.asarray(value)

    def _follow(self, op: Op) -> None:
        for number in op.outputs:
            atoms = self.program.in_atoms(number)
            once = [a for a in self._atoms.intersection(atoms) if atoms.count(a) == 1]
            vectors = {a: self._result(op, number, a) for a in once}
            self._known[number] = {a: v for a, v in vectors.items() if v is not None}
        for number in op.inputs:
            for atom, vector in self._known.get(number, {}).items():
                self._note_lost(op, atom, np.isfinite(vector))

    def _note_lost(self, op: Op, atom: int, before: np.ndarray) -> None:
        after = [self.along(number, atom) for number in op.outputs]
        for vector in after:
            before = before & (True if vector is None else ~np.isfinite(vector))
        if before.any() and op.name not in PRODUCTS:
            why = _LOST.get(op.name, f"the operation {op.name} makes their constant vary")
            self._lost.setdefault(atom, []).append((before, why))

    def _result(self, op: Op, out: int, atom: int) -> Vector | None:
        """What is known of a result along one of its atoms."""
        if op.name in ELEMENTWISE:
            return self._applied(op, atom)
        if op.name in PRODUCTS:
            return self._product(op, atom)
        if op.name in _REDUCTIONS:
            return self._reduced(op, out, atom)
        if op.name in ("concatenate", "pad"):
            return _agreed([self.along(i, atom) for i in op.inputs], len(op.inputs))
        if op.name not in (*RESHAPES, "slice", "rev", "split", *_ZEROS_ONLY, *_MAXIMA):
            return None
        vector = self.along(op.inputs[0], atom)
        if vector is None or op.name not in _ZEROS_ONLY:
            return vector
        return np.where(vector == 0, 0, np.nan)

    def _applied(self, op: Op, atom: int) -> Vector | None:
        """An elementwise operation on slices whose values are known."""
        dtypes = [self.program.dtypes[i] for i in (*op.inputs, *op.outputs)]
        if not all(is_readable(dtype) for dtype in dtypes):
            return None
        unknown = np.full(self.program.atoms.sizes[atom], np.nan)
        vectors = [self.along(i, atom) for i in op.inputs]
        filled = [unknown if v is None else v for v in vectors]
        known = ~np.isnan(filled).any(0)
        arguments = [
            jnp.asarray(np.where(known, v, 0).astype(d))
            for v, d in zip(filled, dtypes, strict=False)
        ]
        result = np.asarray(op.primitive.bind(*arguments, **op.params)).astype(np.float64)
        result = np.where(known, result, np.nan)
        if op.name == "mul":
            result = np.where((filled[0] == 0) | (filled[1] == 0), 0, result)
        elif op.name == "div":
            result = np.where(filled[0] == 0, 0, result)
        elif op.name == "select_n":
            result = np.where((np.stack(filled[1:]) == filled[1]).all(0), filled[1], result)
        return result

    def _product(self, op: Op, atom: int) -> Vector:
        """It is zero where one of its factors is, along what is not summed over."""
        zero = np.zeros(self.program.atoms.sizes[atom], bool)
        for side in operands(self.program, op):
            atoms, owners = self.program.in_atoms(side.number), self.program.owners(side.number)
            pairs = zip(atoms, owners, strict=True)
            axes = [i for a, i in pairs if a == atom and i not in side.summed]
            vector = self.along(side.number, atom, axes) if axes else None
            if vector is not None:
                zero |= vector == 0
        return np.where(zero, 0.0, np.nan)

    def _reduced(self, op: Op, out: int, atom: int) -> Vector | None:
        """A sum or maximum over other axes, unless it is over the batch too.

        What batch normalization in training makes of a constant is another one in evaluation.
        """
        vector = self.along(op.inputs[0], atom)
        if vector is None or len(self.program.axes[out]) < 2:
            return None
        shape = self.program.shapes[op.inputs[0]]
        return vector * np.prod([shape[i] for i in op.params["axes"]] * (op.name == "reduce_sum"))


def _agreed(vectors: list[Vector | None], number: int) -> Vector | None:
    """What all of a number of vectors say."""
    known = [v for v in vectors if v is not None]
    if len(known) < number:
        return None
    return np.where((np.stack(known) == known[0]).all(0), known[0], np.nan)


_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
_LOST = {
    **dict.fromkeys(("add", "sub"), "what a residual sum adds to them is not constant"),
    **dict.fromkeys(_REDUCTIONS, "the statistics of a batch, as in training: call model.eval()"),
}
# Of a window or a row that is looked up, what is constant may be cut at the borders.
_ZEROS_ONLY = ("reduce_window_sum", "gather")
_MAXIMA = ("reduce_window_max", "reduce_window_min")
