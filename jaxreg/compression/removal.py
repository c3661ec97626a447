"""Which units of a traced function can go, why others stay, and the leaves without them.

What goes is a mask for each atom (see `axes`). A removed unit has zeros in all leaves, and what
was constant of it is in the biases that follow: so further units become zero or are read by
nothing. The leaves keep their shapes until nothing more goes, and then are cut.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxreg import _check
from jaxreg.compression.axes import Axis, Program
from jaxreg.compression.constants import Constants
from jaxreg.compression.operations import ELEMENTWISE, RESHAPES
from jaxreg.compression.products import Bias, Contraction, contractions

Leaves = list[np.ndarray]
Masks = dict[int, np.ndarray]  # for each atom that shrinks, which of its indices go


@dataclass(frozen=True)
class Removal:
    """What goes where some atoms may shrink."""

    masks: Masks
    zeroed: Leaves  # with zeros for what goes
    cut: Leaves  # without it
    known: Constants


class Units:
    """The units of a program with named leaves."""

    def __init__(self, program: Program, names: list[str], leaves: Leaves):
        self.program, self.names, self.leaves = program, names, leaves
        self.products = contractions(program)
        self._fixed = program.atoms.fixed()
        # Not what is only added to or multiplied with activations, such as a bias.
        reading = [op for op in program.ops if op.name not in (*ELEMENTWISE, *RESHAPES)]
        read = [i for op in reading for i in op.inputs if i in program.origins]
        self._weights = {leaf for i in read for leaf in program.origins[i]}
        self._given = Constants(program, self.products, leaves)

    @property
    def free(self) -> list[int]:
        """The atoms of the leaves that may shrink."""
        atoms = {a for number in self.program.leaves for a in self.program.in_atoms(number)}
        return sorted(atoms - self._fixed.keys())

    def removed(self, atoms: Collection[int]) -> Removal:
        """What goes where these atoms may shrink."""
        masks: Masks = {}
        leaves, known = self.leaves, self._given
        while True:
            more = self._grown(known, masks, atoms)
            if all(a in masks and (more[a] == masks[a]).all() for a in more):
                return Removal(masks, leaves, self._without(leaves, masks, cut=True), known)
            masks = more
            leaves = self._without(self._folded(known, leaves, masks), masks, cut=False)
            known = Constants(self.program, self.products, leaves)

    def _grown(self, known: Constants, masks: Masks, atoms: Collection[int]) -> Masks:
        """The masks, with the indices that no product needs any more."""
        more: Masks = {}
        for atom in atoms:
            readers = [p for p in self.products if atom in p.atoms]
            if not readers:
                continue
            gone = np.all([known.not_needed(p, atom) for p in readers], 0)
            before = masks[atom] if atom in masks else np.zeros_like(gone)
            gone |= before
            if gone.all():
                gone[before.argmin()] = False  # an axis keeps one index at least
            if gone.any():
                more[atom] = gone
        return more

    # The leaves ----------------------------------------------------------------------------------

    def _folded(self, known: Constants, leaves: Leaves, masks: Masks) -> Leaves:
        """The leaves with the constants that go in the biases."""
        changed = list(leaves)
        # One of the products that share a bias, as all of them add the same.
        for bias, product in {p.bias: p for p in self.products}.items():
            if bias is not None and not masks.keys().isdisjoint(product.atoms):
                leaf = changed[bias.leaf]
                added = self._added(known, product, bias, masks).reshape(leaf.shape)
                changed[bias.leaf] = (leaf + bias.sign * added).astype(leaf.dtype)
        return changed

    def _added(
        self, known: Constants, product: Contraction, bias: Bias, masks: Masks
    ) -> np.ndarray:
        """What the constants that go add to a product, along the atoms of its bias."""
        program, weight = self.program, product.weight
        atoms, owners = program.in_atoms(weight.number), program.owners(weight.number)
        sizes = [program.atoms.sizes[a] for a in atoms]
        summed = [k for k, axis in enumerate(owners) if axis in weight.summed]
        constants = np.zeros([sizes[k] for k in summed])
        for place, atom in enumerate(atoms[k] for k in summed):
            if atom in masks:
                vector = known.foldable(product, atom)
                goes = _along(masks[atom] & np.isfinite(vector), place, len(summed))
                constants = np.where(goes, _along(vector, place, len(summed)), constants)
        values = known.values[weight.number].astype(np.float64).reshape(sizes)
        added = np.tensordot(constants, values, (range(len(summed)), summed))
        rest = [k for k in range(len(atoms)) if k not in summed]
        window = tuple(i for i, k in enumerate(rest) if owners[k] not in weight.free)
        free = [atoms[k] for k in rest if owners[k] in weight.free]
        target = program.in_atoms(program.leaves[bias.leaf])
        return np.transpose(added.sum(window), [free.index(a) for a in target])

    def _without(self, leaves: Leaves, masks: Masks, *, cut: bool) -> Leaves:
        """The leaves without what goes, or with zeros for it."""
        sizes, new = self.program.atoms.sizes, []
        for array, number in zip(leaves, self.program.leaves, strict=True):
            atoms, shape = self.program.in_atoms(number), [1] * array.ndim
            split = array.reshape([sizes[a] for a in atoms])
            for place, (atom, axis) in enumerate(
                zip(atoms, self.program.owners(number), strict=True)
            ):
                stays = ~masks[atom] if atom in masks else np.ones(sizes[atom], bool)
                shape[axis] *= int(stays.sum())
                if cut:
                    split = np.compress(stays, split, axis=place)
                elif atom in masks:
                    zero = np.zeros((), array.dtype)
                    split = np.where(_along(stays, place, len(atoms)), split, zero)
            new.append(split.reshape(shape if cut else array.shape))
        return new

    # What stays ----------------------------------------------------------------------------------

    def _axes_of_weights(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each axis of a weight: the leaf, the axis, and which of its indices are zero."""
        for leaf, array in enumerate(self.leaves):
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            if not floating or array.ndim < 2 or self.program.leaves[leaf] not in self._weights:
                continue
            for axis in range(array.ndim):
                others = tuple(i for i in range(array.ndim) if i != axis)
                yield leaf, axis, (array == 0).all(others)

    def _atoms(self, leaf: int, axis: int) -> Axis:
        return self.program.atoms.expand(self.program.axes[self.program.leaves[leaf]][axis])

    def refuse_what_is_not_followed(self) -> None:
        """An error for zero units that pass through an operation that is not followed."""
        for leaf, axis, zeros in self._axes_of_weights():
            atoms = self._atoms(leaf, axis)
            not_followed = [
                w for w, ok in (self._fixed.get(a, ("", True)) for a in atoms) if not ok
            ]
            is_unit = self._is_unit(self.program.leaves[leaf], axis)
            if not (not_followed and is_unit and zeros.any()):
                continue
            accepted = (
                "a model of dense layers, convolutions, normalizations and elementwise functions "
                "between the units and their readers; strict=False keeps these units, and removes "
                "others"
            )
            if "random_" in not_followed[0]:
                accepted = "one without dropout: call model.eval(), or pass deterministic=True; "
                accepted += "strict=False keeps these units"
            units = f"{_counted(zeros)} in {self.names[leaf]}"
            given = f"{units}, which pass through {not_followed[0]}"
            raise _check.ArgumentError("model", given, accepted)

    def _is_unit(self, number: int, axis: int) -> bool:
        """Whether a leaf makes units along an axis.

        It only reads them where a product sums over them. Of a leaf that is in no product, as
        inside of an operation that is not followed, they are the last axis.
        """
        origins, axes = self.program.origins, self.program.axes[number]
        reading = [p for p in self.products if number in origins.get(p.weight.number, ())]
        if not reading:
            return axis == len(axes) - 1
        atoms = self.program.atoms.expand(axes[axis])
        return not any(
            axis in p.weight.summed if p.weight.number == number else {*atoms} & {*p.atoms}
            for p in reading
        )

    def kept(
        self, removal: Removal, failed: Mapping[int, tuple[np.ndarray, str]]
    ) -> dict[str, str]:
        """Why zero units stay, by the leaf; failed are atoms with what could have gone, and why."""
        masks = removal.masks | {atom: mask for atom, (mask, _) in failed.items()}
        found: dict[str, list[str]] = {}
        for leaf, axis, zeros in self._axes_of_weights():
            reasons = found.setdefault(self.names[leaf], [])
            atoms = self._atoms(leaf, axis)
            told = np.zeros(1, bool)
            for atom in atoms:
                mask = masks.get(atom, np.zeros(self.program.atoms.sizes[atom], bool))
                told = (told[:, None] | mask).ravel()
                if atom in failed:
                    reasons.append(f"{_counted(mask, 'unit')}: {failed[atom][1]}")
            stay = zeros & ~told
            if stay.any():
                reasons.append(f"{_counted(stay)}: {self._why(removal, atoms, stay)}")
        return {name: "; ".join(reasons) for name, reasons in found.items() if reasons}

    def _why(self, removal: Removal, atoms: Axis, stay: np.ndarray) -> str:
        """Why indices of an axis did not go."""
        for why, followed in (self._fixed[a] for a in atoms if a in self._fixed):
            return why if followed else f"{why} is not followed"
        if len(atoms) > 1:
            return "a reshape takes them apart, as into heads"
        if not atoms:
            return "an axis keeps one index"
        known, atom = removal.known, atoms[-1]
        readers = [p for p in self.products if atom in p.atoms]
        for product in readers:
            needed = stay & ~known.not_needed(product, atom)
            vector = known.along(product.data.number, atom, product.data.summed)
            if vector is not None and np.isfinite(vector[needed]).any():
                return product.keeps or "no bias that could take their constant"
            if needed.any():
                return known.lost(atom, needed) or "another layer reads them"
        return "an axis keeps one index" if readers else "no product sums over them"


def _along(vector: np.ndarray, place: int, rank: int) -> np.ndarray:
    """A vector as one axis of an array."""
    return vector.reshape([-1 if k == place else 1 for k in range(rank)])


def _counted(indices: np.ndarray, what: str = "zero unit") -> str:
    number = int(indices.sum())
    return f"{number} {what}{'s' * (number != 1)}"
