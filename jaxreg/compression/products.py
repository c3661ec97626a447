"""The products of a traced function that sum over atoms, and the biases that are added to them.

A product with a weight, which does not depend on the inputs, on either side is one that can
shrink: a unit goes where all products that sum over it can do without.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxreg.compression.axes import Axis, Program
from jaxreg.compression.flat import Op
from jaxreg.compression.operations import PRODUCTS, RESHAPES


@dataclass(frozen=True)
class Operand:
    """One side of a product."""

    number: int
    summed: Sequence[int]  # its axes that are summed over
    free: Sequence[int]  # its axes that are in the output, and not in the other side


@dataclass(frozen=True)
class Bias:
    """A leaf that is added to a product next."""

    leaf: int
    sign: int


@dataclass
class Contraction:
    """A product that sums over atoms."""

    data: Operand
    weight: Operand
    output: int
    atoms: Axis
    keeps: str  # why no bias can take what constants of the data add; empty where one may
    bias: Bias | None = None


def contractions(program: Program) -> list[Contraction]:
    """All products; the atoms of those that have no weight are fixed."""
    found = [_contraction(program, op) for op in program.ops if op.name in PRODUCTS]
    for product in found:
        if product.weight.number not in program.origins:
            why = "a product of activations, such as attention's, whose scale may count them"
            program.atoms.fix(product.atoms, why)
    _find_biases(program, found)
    return found


def _contraction(program: Program, op: Op) -> Contraction:
    left, right = operands(program, op)
    if right.number not in program.origins and op.name == "dot_general":
        left, right = right, left
    axes = program.axes[left.number]
    atoms = tuple(a for i in left.summed for a in program.atoms.expand(axes[i]))
    keeps = ""
    if op.name == "dot_general" and op.params["dimension_numbers"][1][0]:
        keeps = "a product in batches, which reads their constant"
    elif op.name == "conv_general_dilated" and _is_padded(op):
        keeps = "a convolution with padding, which makes their constant vary"
    return Contraction(left, right, op.outputs[0], atoms, keeps)


def operands(program: Program, op: Op) -> tuple[Operand, Operand]:
    """The two sides of a product."""
    if op.name == "dot_general":
        summed, batch = op.params["dimension_numbers"]
    else:
        numbers = op.params["dimension_numbers"]
        summed = numbers.lhs_spec[1:2], numbers.rhs_spec[1:2]
        batch = numbers.lhs_spec[2:], numbers.rhs_spec[2:]
    left, right = (
        Operand(i, own, [k for k in range(len(program.axes[i])) if k not in (*own, *shared)])
        for i, own, shared in zip(op.inputs, summed, batch, strict=True)
    )
    return left, right


def _is_padded(op: Op) -> bool:
    dilated = any(d != 1 for d in op.params["lhs_dilation"])
    return dilated or any(any(pair) for pair in op.params["padding"])


# Biases ------------------------------------------------------------------------------------------


def _find_biases(program: Program, products: list[Contraction]) -> None:
    """Where a constant that is added to a product can go: a leaf that is added to it next.

    A leaf that is added to several products is the bias of all of them, or of none: what reads
    it elsewhere would change.
    """
    uses: dict[int, list[Op]] = {}
    made: dict[int, Op] = {}
    for op in program.ops:
        for number in op.inputs:
            uses.setdefault(number, []).append(op)
        made |= dict.fromkeys(op.outputs, op)

    def readers(number: int) -> list[Op | None]:
        """What reads an array, or another shape of it; None where it is returned."""
        found: list[Op | None] = [None] if number in program.outputs else []
        for op in uses.get(number, ()):
            found += readers(op.outputs[0]) if op.name in RESHAPES else [op]
        return found

    def source(number: int) -> int:
        while number in made and made[number].name in RESHAPES:
            number = made[number].inputs[0]
        return number

    added: dict[int, list[tuple[Op, Contraction, int]]] = {}
    for product in products:
        if product.weight.number not in program.origins or product.data.number in program.origins:
            continue
        read = readers(product.output)
        if len(read) != 1 or read[0] is None or read[0].name not in ("add", "sub"):
            continue
        op = read[0]
        sides = [source(number) for number in op.inputs]
        place = sides.index(product.output)
        if sides[1 - place] in program.leaves and (op.name == "add" or place == 0):
            sign = 1 if op.name == "add" else -1
            added.setdefault(sides[1 - place], []).append((op, product, sign))
    for number, own in added.items():
        all_read = sorted(map(id, readers(number))) == sorted(id(op) for op, _, _ in own)
        one_sign = len({sign for _, _, sign in own}) == 1
        if all_read and one_sign and all(_fits(program, number, p) for _, p, _ in own):
            for _, product, sign in own:
                product.bias = Bias(program.leaves.index(number), sign)


def _fits(program: Program, bias: int, product: Contraction) -> bool:
    """Whether a bias can take constants, and has the outputs of the weight as its axes."""
    axes = program.axes[product.weight.number]
    free = [a for i in product.weight.free for a in program.atoms.expand(axes[i])]
    own = program.in_atoms(bias)
    return not product.keeps and len(set(free)) == len(free) and sorted(own) == sorted(free)
