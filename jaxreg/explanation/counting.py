"""What counts steps in a state, told by what it does: a number that grows by 1 with each of them.

Where gradients are accumulated, several calls make a step: as many as it takes until a whole
number that changed is back at what it was, as those who count calls up to the next update are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import where

CALLS = 64  # until there is a step
STEPS = 8  # that are watched

Update = Callable[[Any], tuple[Any, Any]]
"""Updates and the next state, of a state."""


class Counters(NamedTuple):
    """What is found.

    Attributes:
        calls: of ``tx.update``, that make a step.
        steps: the leaves of the state that grow by 1 with each step.
        others: paths, by leaf, of numbers that change from step to step in another way.
    """

    calls: int
    steps: frozenset[int]
    others: dict[int, str]


def find_counters(update: Update, state: Any) -> Counters:
    """The counters of a state of many lanes, of which the first one is looked at."""
    calls = calls_of_a_step(update, state)
    names, seen = where.paths(state), [_numbers(state)]
    for _ in range(STEPS if calls == 1 else 2):
        for _ in range(calls):
            _, state = update(state)
        seen.append(_numbers(state))
    series = {i: [now[i] - x for now in seen] for i, x in seen[0].items()}
    steps = frozenset(i for i, far in series.items() if far == list(range(len(seen))))
    others = {i: names[i] for i, far in series.items() if i not in steps and any(far)}
    return Counters(calls, steps, others)


def calls_of_a_step(update: Update, state: Any) -> int:
    """The number of calls that make a step."""
    before, changed = _numbers(state, whole=True), set()
    for call in range(1, CALLS + 1):
        updates, state = update(state)
        now = _numbers(state, whole=True)
        changed |= {i for i in before if now[i] != before[i]}
        if any(now[i] == before[i] for i in changed):
            return call
        if not changed or any(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates)):
            return 1
    return 1


def _numbers(state: Any, whole: bool = False) -> dict[int, float]:
    """The numbers of a state by their place: those that are one number in each lane."""
    kinds = (jnp.integer,) if whole else (jnp.integer, jnp.floating)
    return {
        i: float(leaf[0])
        for i, leaf in enumerate(jax.tree.leaves(state))
        if leaf.ndim == 1 and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)
    }
