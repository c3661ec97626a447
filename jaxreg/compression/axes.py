"""The axes of a traced function: which of them are the same.

An *atom* is an axis that cannot be taken apart; an axis of an array is a product of atoms, since
reshapes join and split axes. Tracing a function unifies the atoms of axes that must be of one
length: the outputs of a layer and the inputs of the next, both sides of a sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxreg.compression.flat import Flat, Op
from jaxreg.compression.operations import ELEMENTWISE, POSITIONAL, SUMS, WINDOWS

Axis = tuple[int, ...]


class Atoms:
    """Atoms that are unified with each other, split into products, or held fixed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._parts: dict[int, Axis] = {}  # an atom that is the product of others
        self._fixed: list[tuple[Axis, str, bool]] = []

    def new(self, size: int) -> Axis:
        """An axis of its own; one of length 1 has no atoms."""
        if size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def expand(self, axis: Axis) -> Axis:
        """The axis in atoms that are not taken apart."""
        parts = [self.expand(self._parts[a]) if a in self._parts else (a,) for a in axis]
        return tuple(atom for part in parts for atom in part)

    def unify(self, first: Axis, second: Axis) -> None:
        """Makes two axes of one length the same."""
        a, b = list(self.expand(first)), list(self.expand(second))
        while a and b:
            x, y = a[0], b[0]
            if x == y:
                del a[0], b[0]
            elif self.sizes[x] == self.sizes[y]:
                self._parts[max(x, y)] = (min(x, y),)
                del a[0], b[0]
            else:
                large, small = (a, b) if self.sizes[x] > self.sizes[y] else (b, a)
                rest, remainder = divmod(self.sizes[large[0]], self.sizes[small[0]])
                if remainder:
                    self.fix((*a, *b), "a reshape whose axes have no common divisor")
                    return
                split = (small[0], *self.new(rest))
                self._parts[large[0]] = split
                large[:1] = split

    def fix(self, axis: Axis, why: str, *, followed: bool = True) -> None:
        """No index of it may go. `followed` is whether that is understood, or just not known."""
        self._fixed.append((axis, why, followed))

    def fixed(self) -> dict[int, tuple[str, bool]]:
        """The atoms that are fixed, and why."""
        found: dict[int, tuple[str, bool]] = {}
        for axis, why, followed in self._fixed:
            for atom in self.expand(axis):
                if atom not in found or (found[atom][1] and not followed):
                    found[atom] = why, followed
        return found


class Program(Flat):
    """A traced function (see `jaxreg.compression.flat.Flat`) with the axes of all its arrays.

    Attributes:
        atoms: the atoms of all axes.
        axes: of each array.
    """

    def __init__(self, function: Callable[..., Any], leaves: Sequence[Any], inputs: Any):
        super().__init__(function, leaves, inputs)
        self.atoms = Atoms()
        self.axes: dict[int, list[Axis]] = {}
        for number in self.leaves:
            self._fresh(number)
        for number in self.inputs:
            self._fresh(number)
            self._fix(number, "units of the model's inputs, which keep their length")
        for number in self.constants:
            self._fresh(number)
            is_complex = jnp.issubdtype(self.dtypes[number], jnp.complexfloating)
            why = "a constant array, which is no parameter"
            self._fix(number, "an array of complex numbers, which stays" if is_complex else why)
        for op in self.ops:
            self._follow_axes(op)
        for number in self.outputs:
            self._fix(number, "units of the model's outputs, which keep their length")

    def hold(self, leaf: int, axis: int, why: str) -> None:
        """Fixes an axis of a leaf."""
        self.atoms.fix(self.axes[self.leaves[leaf]][axis], why)

    def in_atoms(self, number: int) -> list[int]:
        """The atoms of an array, over all its axes."""
        return [a for axis in self.axes[number] for a in self.atoms.expand(axis)]

    def owners(self, number: int) -> list[int]:
        """For each of its atoms, the axis of the array that it is part of."""
        axes = self.axes[number]
        return [i for i, axis in enumerate(axes) for _ in self.atoms.expand(axis)]

    def _fresh(self, number: int) -> None:
        if number not in self.axes:
            self.axes[number] = [self.atoms.new(n) for n in self.shapes[number]]

    def _fix(self, number: int, why: str, *, followed: bool = True) -> None:
        for axis in self.axes[number]:
            self.atoms.fix(axis, why, followed=followed)

    def _follow_axes(self, op: Op) -> None:
        ins = [self.axes[i] for i in op.inputs]
        out, p = op.outputs[0], op.params
        if op.name in ELEMENTWISE or self._is_bitcast(op):
            self.axes[out] = self._aligned(ins, self.shapes[out])
        elif op.name == "dot_general":
            (left, right), (left_batch, right_batch) = p["dimension_numbers"]
            for a, b in [
                *zip(left, right, strict=True),
                *zip(left_batch, right_batch, strict=True),
            ]:
                self.atoms.unify(ins[0][a], ins[1][b])
            free = [ax for i, ax in enumerate(ins[0]) if i not in (*left, *left_batch)]
            others = [ax for i, ax in enumerate(ins[1]) if i not in (*right, *right_batch)]
            self.axes[out] = [ins[0][i] for i in left_batch] + free + others
        elif op.name == "conv_general_dilated":
            self._follow_convolution(op)
        elif op.name == "transpose":
            self.axes[out] = [ins[0][i] for i in p["permutation"]]
        elif op.name == "reshape" and p.get("dimensions") is None:
            self._fresh(out)
            self.atoms.unify(joined(ins[0]), joined(self.axes[out]))
        elif op.name in ("squeeze", "expand_dims"):
            self._fresh(out)
            self.axes[out] = _with_ones(ins[0], self.shapes[op.inputs[0]], self.shapes[out])
        elif op.name == "broadcast_in_dim":
            self._fresh(out)
            for i, target in enumerate(p["broadcast_dimensions"]):
                if self.shapes[op.inputs[0]][i] == p["shape"][target]:
                    self.axes[out][target] = ins[0][i]
        elif op.name in SUMS:
            gone = p["axes"]
            for i in gone:
                self.atoms.fix(
                    ins[0][i], "a sum or maximum over them, as in layer normalization or softmax"
                )
            self.axes[out] = [axis for i, axis in enumerate(ins[0]) if i not in gone]
        elif op.name in WINDOWS and len(op.outputs) == 1:
            self._fresh(out)
            for i, width in enumerate(p["window_dimensions"]):
                if width == 1 and self.shapes[out][i] == self.shapes[op.inputs[0]][i]:
                    self.axes[out][i] = ins[0][i]
                else:
                    for axis in (ins[0][i], self.axes[out][i]):
                        self.atoms.fix(axis, "a window that slides over them")
        elif op.name in POSITIONAL:
            self._follow_positions(op)
        elif op.name == "split":
            self.atoms.fix(ins[0][p["axis"]], "a split, which cuts them")
            for number in op.outputs:
                self._fresh(number)
                self.atoms.fix(self.axes[number][p["axis"]], "a split, which cuts them")
                self.axes[number] = [
                    own if i == p["axis"] else axis
                    for i, (own, axis) in enumerate(zip(self.axes[number], ins[0], strict=True))
                ]
        elif op.name == "gather" and self._takes_rows(op):
            offsets = p["dimension_numbers"].offset_dims
            self._fresh(out)
            self.atoms.fix(ins[0][0], "the rows that a lookup takes")
            for target, axis in zip(offsets, ins[0][1:], strict=True):
                self.axes[out][target] = axis
        elif op.name == "iota":
            self._fresh(out)
            self.atoms.fix(self.axes[out][p["dimension"]], "the operation iota, which numbers them")
        else:
            for number in (*op.inputs, *op.outputs):
                self._fresh(number)
                self._fix(number, f"the operation {op.name}", followed=False)

    def _aligned(self, ins: Sequence[list[Axis]], shape: Sequence[int]) -> list[Axis]:
        """The axes of an elementwise result; scalars and axes of length 1 fit any."""
        axes: list[Axis] = []
        for i, size in enumerate(shape):
            given = [own[i] for own in ins if own and own[i]]
            axis = given[0] if given else self.atoms.new(size)
            for other in given[1:]:
                self.atoms.unify(axis, other)
            axes.append(axis)
        return axes

    def _follow_convolution(self, op: Op) -> None:
        left, right = (self.axes[i] for i in op.inputs)
        out, p = op.outputs[0], op.params
        numbers, groups = p["dimension_numbers"], p["feature_group_count"]
        self._fresh(out)
        axes = self.axes[out]
        axes[numbers.out_spec[0]] = left[numbers.lhs_spec[0]]
        axes[numbers.out_spec[1]] = right[numbers.rhs_spec[0]]
        features, kernels = left[numbers.lhs_spec[1]], right[numbers.rhs_spec[0]]
        if groups == p["batch_group_count"] == 1:
            self.atoms.unify(features, right[numbers.rhs_spec[1]])
        else:
            for axis in (features, kernels):
                self.atoms.fix(axis, "a convolution in groups", followed=False)
        for axis in (
            *(left[i] for i in numbers.lhs_spec[2:]),
            *(right[i] for i in numbers.rhs_spec[2:]),
        ):
            self.atoms.fix(axis, "a convolution that slides over them")

    def _follow_positions(self, op: Op) -> None:
        """Operations that depend on the positions along some axes."""
        first = op.inputs[:1] if op.name == "pad" else op.inputs
        out = op.outputs[0]
        self._fresh(out)
        axes = [self.axes[i] for i in first]
        moved = [
            {self.shapes[i][k] for i in (*first, out)} != {self.shapes[out][k]}
            or k in (op.params.get("dimension"), op.params.get("axis"))
            or k in op.params.get("dimensions", ())
            for k in range(len(self.shapes[out]))
        ]
        for k, positional in enumerate(moved):
            given = [own[k] for own in axes]
            if positional:
                for axis in (*given, self.axes[out][k]):
                    self.atoms.fix(axis, f"the operation {op.name}, which joins or cuts them")
            else:
                self.axes[out][k] = given[0]
                for other in given[1:]:
                    self.atoms.unify(given[0], other)

    def _is_bitcast(self, op: Op) -> bool:
        """Whether it reads the bits of each number as another number."""
        same = self.shapes[op.outputs[0]] == self.shapes[op.inputs[0]] if op.inputs else False
        return op.name == "bitcast_convert_type" and same

    def _takes_rows(self, op: Op) -> bool:
        numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
        rows = numbers.start_index_map == (0,) and numbers.collapsed_slice_dims == (0,)
        return rows and tuple(sizes[1:]) == self.shapes[op.inputs[0]][1:] and sizes[0] == 1


def joined(axes: Any) -> Axis:
    """Several axes as one."""
    return tuple(atom for axis in axes for atom in axis)


def _with_ones(axes: Sequence[Axis], old: Sequence[int], new: Sequence[int]) -> list[Axis]:
    """Axes of an array whose axes of length 1 came or went."""
    rest = iter([axis for axis, n in zip(axes, old, strict=True) if n != 1])
    return [() if n == 1 else next(rest) for n in new]
