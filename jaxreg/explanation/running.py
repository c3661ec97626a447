"""Runs a traced update operation by operation, so that a tree of 1,000 leaves is never compiled."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

# Operations that only hold a program: run as part of the one around them.
_HOLDERS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def runner(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """`function`, traced once for arguments of the shapes and dtypes of `examples`."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
    treedef = jax.tree.structure(shapes)

    def run(*args: Any) -> Any:
        return treedef.unflatten(_run(traced, jax.tree.leaves(args)))

    return run


def _run(closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """The outputs of a program; a value is dropped after its last use, to save memory."""
    program = closed.jaxpr
    uses: dict[Any, int] = {}
    for atom in [a for eqn in program.eqns for a in eqn.invars] + list(program.outvars):
        if not isinstance(atom, core.Literal):
            uses[atom] = uses.get(atom, 0) + 1
    values: dict[Any, Any] = dict(zip(program.constvars, closed.consts, strict=True))
    values.update(zip(program.invars, args, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, core.Literal):
            return atom.val
        uses[atom] -= 1
        return values[atom] if uses[atom] else values.pop(atom)

    for eqn in program.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        name, params = eqn.primitive.name, eqn.params
        held = params.get("jaxpr", params.get("call_jaxpr")) if name in _HOLDERS else None
        if isinstance(held, core.ClosedJaxpr):
            outputs = _run(held, inputs)
        elif name == "cond":
            outputs = _run(params["branches"][int(inputs[0])], inputs[1:])
        else:
            bound = eqn.primitive.get_bind_params(params)
            functions, named = bound if isinstance(bound, tuple) else ([], bound)
            outputs = eqn.primitive.bind(*functions, *inputs, **named)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        for var, value in zip(eqn.outvars, outputs, strict=True):
            if var in uses:
                values[var] = value
    return [read(atom) for atom in program.outvars]
