"""Which penalty is for which leaves of a parameter tree."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreg import _check
from jaxreg import where as _where
from jaxreg.penalties.base import Penalty
from jaxreg.penalties.joint import Joint


class Place(NamedTuple):
    """A penalty, and the numbers of the leaves it acts on: one, or a dict by the members' names."""

    penalty: Penalty
    leaves: int | dict[str, int]

    def of(self, leaves: Sequence[Any]) -> Any:
        """What the penalty's methods take, out of all leaves of a tree."""
        return jax.tree.map(lambda i: leaves[i], self.leaves)


def as_tuple(given: Any) -> tuple[Any, ...]:
    """One thing or a sequence of them as a tuple."""
    # A string is a sequence too, and would be taken apart.
    if isinstance(given, str) or not isinstance(given, Sequence):
        return (given,)
    return tuple(given)


def as_penalties(penalty: Penalty | Sequence[Penalty]) -> tuple[Penalty, ...]:
    """One penalty or a sequence of them as a tuple."""
    parts = as_tuple(penalty)
    for part in parts:
        if not isinstance(part, Penalty):
            raise _check.ArgumentError(
                "penalty", _check.describe(part), "a jaxreg penalty or a sequence of them"
            )
    return parts


def places(penalties: Sequence[Penalty], params: Any) -> list[Place]:
    """Where each penalty acts. Two on one leaf are added where their sum has a closed form.

    Raises:
        ValueError: where a penalty matches no leaf, does not fit a leaf's shape, two on one leaf
            have no closed-form sum, or a leaf is not real floating.
    """
    leaves, paths = jax.tree.leaves(params), _where.paths(params)
    placed: list[Place] = []
    at: dict[int, int] = {}  # where in the list the place on a leaf is
    for penalty in penalties:
        chosen = [i for i, yes in enumerate(jax.tree.leaves(penalty.where.mask(params))) if yes]
        if isinstance(penalty, Joint):
            new = [Place(penalty, family) for family in _families(penalty, chosen, paths)]
        else:
            new = [Place(penalty, i) for i in chosen]
        for place in new:
            own = jax.tree.leaves(place.leaves)
            shared = [i for i in own if i in at]
            if shared:
                k = at[min(shared)]
                placed[k] = _sum(placed[k], place, _named(paths[min(shared)]))
            else:
                at |= dict.fromkeys(own, len(placed))
                placed.append(place)
    fits: set[tuple[int, str]] = set()  # penalties and the shapes that they were tried on
    for place in placed:
        own = place.of(leaves)
        alike = (id(place.penalty), str(jax.tree.map(jnp.shape, own)))
        for i in jax.tree.leaves(place.leaves):
            if not jnp.issubdtype(leaves[i].dtype, jnp.floating):
                given = f"{leaves[i].dtype} values on {_named(paths[i])}"
                raise _check.ArgumentError("penalty", given, "real floating leaves")
        # A shape that does not fit is an error of the penalty's own.
        if alike not in fits:
            with _check.on_leaf(", ".join(_named(paths[i]) for i in jax.tree.leaves(place.leaves))):
                jax.eval_shape(place.penalty.value, own)
            fits.add(alike)
    return placed


def _sum(one: Place, other: Place, shared: str) -> Place:
    """Two places on the same leaves as one."""
    if one.leaves == other.leaves:
        first = one.penalty.on(other.penalty.where)
        with contextlib.suppress(_check.ArgumentError):
            return Place(first + other.penalty, other.leaves)
    raise _check.ArgumentError(
        "penalty",
        f"{one.penalty!r} and {other.penalty!r}, both on {shared}",
        "one penalty a leaf, or several whose sum has a closed-form prox: put them .on "
        "different leaves",
    )


def _named(path: str) -> str:
    return f"the leaf {path}" if path else "the array"


def _families(penalty: Joint, chosen: list[int], paths: list[str]) -> list[dict[str, int]]:
    """The leaves that each group of a joint penalty spans, found from its first member."""
    number = {path: i for i, path in enumerate(paths)}
    first, *others = [name for name, _ in penalty.members]
    families = []
    for i in chosen:
        parent = paths[i].removesuffix(first)
        if parent == paths[i] or (parent and not parent.endswith("/")):
            continue
        missing = [name for name in others if parent + name not in number]
        if missing:
            accepted = f"a tree with the leaf {parent + missing[0]} beside it"
            raise _check.ArgumentError("members", f"the leaf {paths[i]}", accepted)
        families.append({first: i, **{name: number[parent + name] for name in others}})
    covered = {i for family in families for i in family.values()}
    rest = [paths[i] for i in chosen if i not in covered]
    if rest or not families:
        listed = ", ".join(rest[:5]) or "no leaf"
        accepted = f"leaves called {first} and their partners: choose with .on(...)"
        raise _check.ArgumentError("where", f"{penalty.where!r}, which selects {listed}", accepted)
    return families
