"""What `jaxreg.explain` returns."""

import itertools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LeafExplanation:
    """What an optimizer does to one leaf.

    None, or "unknown", is what could not be told.

    Attributes:
        path: the leaf's keys joined with ``/``, as in `jaxreg.where`.
        shape: its shape.
        dtype: its dtype's name.
        decay: a in update = ... - a (p - anchor), at this step; 0.0 for no decay.
        decay_kind: "none"; "decoupled"; "coupled" (in the gradient: then see `l2`); "toward an
            anchor"; "gated" (only where the update makes the weight smaller); "not linear" (then
            `decay` is the amount at these weights' scale); or "unknown". Coupled and decoupled
            are the same thing where the direction has no memory, and are "decoupled" then.
        l2: the strength of a coupled L2, as in gradient + l2 * p; None where none was found. Beside
            it a small decay may be "unknown".
        clip: "none"; "by value"; "by leaf norm"; "by global norm", of all leaves (in a tree of
            one leaf it is the leaf's); or "unknown", as clips by units and by running norms.
        clip_threshold: the norm, or size of an entry, above which the gradient is clipped; None
            where it could not be told to two digits, as in bfloat16.
        penalized: whether small weights become exactly zero.
        penalty_threshold: the weights up to which they do, where it is a soft threshold that does
            not depend on the gradient.
        frozen: whether the update is zero by how it is computed.
        still: whether there is no update at this step, though the leaf is not frozen.
        acts_at: a step at which there is an update, or one of weights alone, that is not there
            at this step; None where none was found.
        raw: whether the update is the gradient itself, uphill: ``optax.masked`` gives it on for
            what its mask leaves out.
        lost: whether the decay of most of the weights is below half a unit in their last place.
        dtypes: what does not keep its dtype: the updates, parts of the state.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    decay: float | None
    decay_kind: str
    l2: float | None
    clip: str
    clip_threshold: float | None
    penalized: bool | None
    penalty_threshold: float | None
    frozen: bool
    still: bool
    acts_at: int | None
    raw: bool
    lost: bool | None
    dtypes: tuple[str, ...]

    def findings(self) -> tuple[str, str, str, str]:
        """Its row of the table without path and shape."""
        if self.frozen:
            return "-", "-", "-", "frozen"
        decay = "unknown" if self.decay is None else f"{self.decay:.3g} {self.decay_kind}"
        decay = {"none": "none", "coupled": f"l2 {self.l2 or 0:.3g}"}.get(self.decay_kind, decay)
        if self.l2 and self.decay_kind != "coupled":
            decay = f"{decay.removesuffix(' decoupled')} and l2 {self.l2:.3g}"
        at = "" if self.clip_threshold is None else f" {self.clip_threshold:.3g}"
        penalty = {None: "unknown", False: "none", True: "exact zeros"}[self.penalized]
        if self.penalty_threshold is not None:
            penalty = f"zero up to {self.penalty_threshold:.3g}"
        notes = ["adds the raw gradient"] if self.raw else []
        notes += ["decay is lost"] if self.lost else []
        if self.still and self.acts_at is None:
            notes.append("no update at the steps tried")
        elif self.acts_at is not None:
            no = "no step is taken at this step: try step=" if self.still else "more acts at step "
            notes.append(f"{no}{self.acts_at}")
        if self.dtypes:
            many = len(self.dtypes)
            notes.append("a dtype changes" if many == 1 else f"{many} dtypes change")
        return decay, self.clip + at, penalty, ", ".join(notes)


@dataclass(frozen=True)
class Explanation:
    """What an optimizer does to the weights; ``str`` of it is a table.

    Attributes:
        leaves: one `LeafExplanation` a leaf, in the order of the tree.
        step: the step that was asked for.
        state_dtypes: the leaves of the state whose dtype is another one after an update, which
            ``jax.lax.scan`` refuses.
        unset: the numbers of the state that change with each step and are as at the start, where
            `step` is not 0: what depends on them, such as a running norm, is not that of `step`.

    >>> import jax.numpy as jnp, jaxreg, optax
    >>> isinstance(jaxreg.explain(optax.sgd(0.1), jnp.ones(3)), jaxreg.Explanation)
    True
    """

    leaves: tuple[LeafExplanation, ...]
    step: int
    state_dtypes: tuple[str, ...]
    unset: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("leaf", "shape", "decay", "clip", "exact zeros", "notes")]
        keyed = lambda leaf: (leaf.findings(), leaf.dtype)  # noqa: E731
        for _, group in itertools.groupby(self.leaves, keyed):
            same = list(group)
            path = same[0].path or "(the array itself)"
            shape = f"{same[0].dtype}{list(same[0].shape)}".replace(" ", "")
            if len(same) > 1:
                path, shape = f"{path} +{len(same) - 1}", same[0].dtype
            rows.append((_short(path, 24), _short(shape, 18), *same[0].findings()))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        # What is over goes from the last columns.
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append(_short("  ".join(cells).rstrip(), 100))
        unset = [f"{name} is as at the start, not as at step {self.step}" for name in self.unset]
        lines += [_short(f"state: {text}", 100) for text in [*self.state_dtypes, *unset]]
        return "\n".join(lines)


def _short(text: str, length: int) -> str:
    """A text with its middle left out where it is longer."""
    if len(text) <= length:
        return text
    left = (length - 1) // 2
    return text[:left] + "…" + text[len(text) - (length - 1 - left) :]


def describe_change(name: str, before: Any, after: Any) -> str:
    """How the dtype of a leaf of a state changes."""
    return f"{name} is {before} and becomes {after}"
