"""Selectors: which leaves of a parameter tree a regularizer is for.

A selector looks at each leaf's path and rank. Selectors combine with ``&``, ``|`` and ``~``::

    where.path("encoder/**") & where.rank(at_least=2) & ~where.path("**/embedding")

A path is the leaf's keys joined with ``/``: ``layers/0/kernel``. Selectors are values: two that
are written alike are equal, so that building one inside a jitted function does not recompile it.
They are resolved while tracing and never stored in an optimizer's state.

`kernels`, the default of decay and penalties, is what multiplies inputs (`kernels_with` where
layers are stacked); `everything` is every leaf. To see what a selector chooses, call
``selector.mask(params)``.
"""

import abc
import collections
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxreg import _check

PyTree = Any


class Selector(abc.ABC):
    """Which leaves of a tree: `selects` answers for one leaf, `mask` for a whole tree."""

    @abc.abstractmethod
    def selects(self, path: str, leaf: Any) -> bool:
        """Whether the leaf at `path` is selected."""

    def mask(self, tree: PyTree) -> PyTree:
        """A tree of bools, True at each selected leaf.

        Raises:
            ValueError: where no leaf is selected; the message lists the paths there are. A tree
                without leaves has nothing to select, and passes.

        >>> rank(at_least=2).mask({"kernel": np.ones((2, 3)), "bias": np.ones(3)})
        {'bias': False, 'kernel': True}
        """
        leaves, treedef = jax.tree.flatten(tree)
        names = paths(tree)
        chosen = [self.selects(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        if names and not any(chosen):
            listed = ", ".join(name or "(the array itself)" for name in names[:20])
            more = f", and {len(names) - 20} more" if len(names) > 20 else ""
            default = "; kernels are the default: choose with .on(...) or where=..."
            raise _check.ArgumentError(
                "where",
                f"{self!r}, which matches no leaf",
                f"a selector that matches at least one of: {listed}{more}"
                + (default if self == kernels else ""),
            )
        return jax.tree.unflatten(treedef, chosen)

    def __and__(self, other: "Selector") -> "Selector":
        return _And(self, as_selector(other))

    def __or__(self, other: "Selector") -> "Selector":
        return _Or(self, as_selector(other))

    def __invert__(self) -> "Selector":
        return _Not(self)


def paths(tree: PyTree) -> list[str]:
    """The path of each leaf of a tree, its keys joined with ``/``.

    Flax NNX keeps each array in a variable's attribute ``value``, which is no part of the name:
    it is left out where nothing else lies beside it.

    >>> paths({"layers": [1.0, {"kernel": 2.0}]})
    ['layers/0', 'layers/1/kernel']
    """
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves_under = collections.Counter(keys[:n] for keys, _ in keyed for n in range(len(keys)))

    def name(keys: tuple[Any, ...]) -> str:
        *parent, last = keys or [None]
        alone = parent and leaves_under[tuple(parent)] == 1
        if alone and last == jax.tree_util.GetAttrKey("value"):
            keys = tuple(parent)
        return jax.tree_util.keystr(keys, simple=True, separator="/")

    return [name(keys) for keys, _ in keyed]


def as_selector(selector: "Selector | str") -> Selector:
    """A selector as it is; a string as the path pattern it spells."""
    if isinstance(selector, Selector):
        return selector
    if isinstance(selector, str):
        return path(selector)
    raise _check.ArgumentError(
        "where", _check.describe(selector), "a selector from jaxreg.where, or a path pattern"
    )


@dataclass(frozen=True)
class _Path(Selector):
    pattern: str

    def selects(self, path: str, leaf: Any) -> bool:
        return _glob_to_regex(self.pattern).fullmatch(path) is not None

    def __repr__(self) -> str:
        return f"where.path({self.pattern!r})"


@dataclass(frozen=True)
class _Stacked:
    """Layers that a scan holds as one, along leading axes that are not counted."""

    layers: Selector
    axes: int

    def rank(self, path: str, leaf: Any) -> int:
        return np.ndim(leaf) - (self.axes if self.layers.selects(path, leaf) else 0)

    def __repr__(self) -> str:
        return f"stacked={self.layers!r}" + (f", axes={self.axes}" if self.axes != 1 else "")


@dataclass(frozen=True)
class _Rank(Selector):
    at_least: int
    at_most: int | None
    stacked: _Stacked | None = None

    def selects(self, path: str, leaf: Any) -> bool:
        rank = self.stacked.rank(path, leaf) if self.stacked else np.ndim(leaf)
        return self.at_least <= rank <= (np.inf if self.at_most is None else self.at_most)

    def __repr__(self) -> str:
        upper = "" if self.at_most is None else f", at_most={self.at_most}"
        stacked = f", {self.stacked!r}" if self.stacked else ""
        return f"where.rank(at_least={self.at_least}{upper}{stacked})"


@dataclass(frozen=True)
class _Predicate(Selector):
    function: Callable[[str, Any], bool]

    def selects(self, path: str, leaf: Any) -> bool:
        return bool(self.function(path, leaf))

    def __repr__(self) -> str:
        return f"where.predicate({getattr(self.function, '__name__', self.function)})"


@dataclass(frozen=True)
class _And(Selector):
    left: Selector
    right: Selector

    def selects(self, path: str, leaf: Any) -> bool:
        return self.left.selects(path, leaf) and self.right.selects(path, leaf)

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


@dataclass(frozen=True)
class _Or(Selector):
    left: Selector
    right: Selector

    def selects(self, path: str, leaf: Any) -> bool:
        return self.left.selects(path, leaf) or self.right.selects(path, leaf)

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


@dataclass(frozen=True)
class _Not(Selector):
    inner: Selector

    def selects(self, path: str, leaf: Any) -> bool:
        return not self.inner.selects(path, leaf)

    def __repr__(self) -> str:
        return f"~{self.inner!r}"


@dataclass(frozen=True)
class _Everything(Selector):
    """Every leaf."""

    def selects(self, path: str, leaf: Any) -> bool:
        return True

    def __repr__(self) -> str:
        return "where.everything"


@dataclass(frozen=True)
class _Kernels(Selector):
    """The default of decay and penalties: what multiplies inputs, and nothing else.

    By the names on its path (numbers aside) and its rank, a leaf is

    - no kernel if it is a ``bias`` or ``b``, at any rank;
    - a kernel if it is called ``kernel``, and has an axis;
    - no kernel if it is, or lies at any depth in, a normalization or an embedding
      (``LayerNorm_0``, ``rms``, ``bn1``, ``wte``, ``tok_emb``, ``pos_embed``), or is itself called
      ``scale``, ``gamma``, ``beta``, ``offset`` or ``intercept``, ``pos`` or ``cls``, or by a name
      that ends in ``token``;
    - a kernel if it is called ``w``, ``coef`` or ``coefs``, and has an axis;
    - else a kernel if it has two axes or more. (A ``weight`` with one axis may be the scale of a
      normalization.)

    A tree that is one array is a kernel. To see what is chosen, call `mask` on the parameters.
    Where layers are stacked for a scan, the vectors that no name tells apart have two axes, too:
    see `kernels_with`.

    >>> params = {"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)},
    ...           "norm": {"scale": np.ones(3)}}
    >>> kernels.mask(params)
    {'dense': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """

    stacked: _Stacked | None = None

    def selects(self, path: str, leaf: Any) -> bool:
        if not path:
            return True
        rank = self.stacked.rank(path, leaf) if self.stacked else np.ndim(leaf)
        # Positions in lists and tuples say nothing about what a leaf is for.
        components = [_words(part) for part in path.split("/") if not part.isdecimal()]
        name = components[-1] if components else []
        last = name[-1] if name else ""
        if name == ["b"] or {"bias", "biases"} & {*name}:
            return False
        if last == "kernel":
            return rank >= 1
        words = [word for component in components for word in component]
        if any(map(_NORM_OR_EMBEDDING.fullmatch, words)):
            return False
        if last in _NO_KERNELS or name in _LEARNED_INPUTS:
            return False
        return rank >= (1 if last in _VECTOR_KERNELS else 2)

    def __repr__(self) -> str:
        return f"where.kernels_with({self.stacked!r})" if self.stacked else "where.kernels"


_VECTOR_KERNELS = {"w", "coef", "coefs"}
_NO_KERNELS = {"scale", "scales", "gamma", "beta", "offset", "intercept", "token", "tokens"}
# Whole names: a layer that is called cls/weight or linear_pos/weight has a kernel.
_LEARNED_INPUTS = (["pos"], ["cls"])
_NORM_OR_EMBEDDING = re.compile(
    "ln|bn|gn|rms|wte|wpe|.*(norms?|normali[sz]ation|embs?|embd|embed|embedder|embeddings?)"
)


def _words(name: str) -> list[str]:
    """The words of a name in snake or camel case, digits left out: LayerNorm_0 -> layer, norm."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


everything: Selector = _Everything()
kernels: Selector = _Kernels()


def path(pattern: str) -> Selector:
    """Leaves whose whole path matches a glob pattern.

    ``*`` stands for any characters within one component, ``?`` for one of them, and ``**`` for
    any number of components, none included.

    Args:
        pattern: such as ``encoder/*/kernel`` or ``**/kernel``; numbers of a list or tuple are
            components.

    Returns:
        A selector, which may be combined with others.

    Raises:
        ValueError: where the pattern is empty or no string.

    >>> path("**/kernel").mask({"out": {"kernel": 1.0, "bias": 0.0}})
    {'out': {'bias': False, 'kernel': True}}
    """
    if not isinstance(pattern, str) or not pattern:
        raise _check.ArgumentError("pattern", _check.describe(pattern), "a non-empty string")
    return _Path(pattern)


def kernels_with(*, stacked: Selector | str, axes: int = 1) -> Selector:
    """`kernels`, for models whose layers are stacked along leading axes, as scans hold them.

    Args:
        stacked: the leaves that are stacked, such as ``"blocks/**"``.
        axes: how many of their leading axes count layers, not features.

    Returns:
        A selector, which may be combined with others.

    Raises:
        ValueError: where an argument is none of these.

    >>> params = {"blocks": {"up": np.ones((12, 4, 8)), "shift": np.ones((12, 8))}}
    >>> kernels.mask(params), kernels_with(stacked="blocks/**").mask(params)
    ({'blocks': {'shift': True, 'up': True}}, {'blocks': {'shift': False, 'up': True}})
    """
    return _Kernels(_as_stacked(stacked, axes))


def _as_stacked(stacked: Selector | str, axes: int) -> _Stacked:
    with _check.of_argument("stacked"):
        layers = as_selector(stacked)
    return _Stacked(layers, _check.whole_number("axes", axes, at_least=1))


def rank(
    *,
    at_least: int = 0,
    at_most: int | None = None,
    stacked: Selector | str | None = None,
    axes: int = 1,
) -> Selector:
    """Leaves whose number of axes lies between two bounds, both included.

    Args:
        at_least: a whole number.
        at_most: a whole number >= `at_least`; None for no bound.
        stacked: leaves whose first axes count the layers of a scan, and are not counted.
        axes: how many these are.

    Returns:
        A selector, which may be combined with others.

    Raises:
        ValueError: where a bound is no such number.

    >>> rank(at_most=1).mask({"kernel": np.ones((2, 3)), "bias": np.ones(3)})
    {'bias': True, 'kernel': False}
    """
    at_least = _check.whole_number("at_least", at_least, at_least=0)
    if at_most is not None:
        at_most = _check.whole_number("at_most", at_most, at_least=at_least)
    return _Rank(at_least, at_most, None if stacked is None else _as_stacked(stacked, axes))


def predicate(function: Callable[[str, Any], bool]) -> Selector:
    """Leaves for which ``function(path, leaf)`` is true, called while tracing.

    Two predicates are equal if they have the same function. A lambda is another one each time it
    is written or run over: where a selector is part of what is compiled, as in a penalty, define
    the function once, outside.

    Args:
        function: takes the path, a string such as ``layers/0/kernel``, and the leaf, of which
            shape and dtype are known but not, within a trace, the values.

    Returns:
        A selector, which may be combined with others.

    Raises:
        ValueError: where `function` is not callable.

    >>> wide = predicate(lambda path, leaf: leaf.shape[-1] > 2)
    >>> wide.mask({"a": np.ones((4, 2)), "b": np.ones((2, 4))})
    {'a': False, 'b': True}
    """
    if not callable(function):
        raise _check.ArgumentError(
            "function", _check.describe(function), "a function (path, leaf) -> bool"
        )
    return _Predicate(function)


@functools.cache
def _glob_to_regex(pattern: str) -> re.Pattern[str]:
    """`pattern` as a regular expression; ``**/`` and ``/**`` may stand for no component at all."""
    tokens = {"**/": "(?:[^/]+/)*", "/**": "(?:/[^/]+)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    split = re.split(r"(\*\*/|/\*\*|\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(part, re.escape(part)) for part in split))
