"""Recipes: what a training run regularizes, as plain values."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxreg import _check
from jaxreg import where as _where
from jaxreg.optimizers import regularize
from jaxreg.penalties import L1, ElasticNet, GroupLasso, Nuclear
from jaxreg.transforms import magnitude_pruning, n_m_pruning, sparsity_target
from jaxreg.transforms.parts import Parts
from jaxreg.transforms.sparsity import SparsityTarget


@dataclasses.dataclass(frozen=True)
class Regularizers:
    """Everything that one training run regularizes.

    The first four are arguments of `jaxreg.regularize`; with ``block`` the penalty works in one
    metric a leaf (`jaxreg.metric.block`). ``sparsity`` is the share of weights that are pruned by
    magnitude, and ``n_m`` the pattern that they are pruned to; both are reached after the first
    half of the training. ``dropout`` is the rate of the model's dropout layers, ``smoothing`` the
    loss's label smoothing, and ``early_stop`` says whether the weights of the epoch with the least
    validation loss are kept in place of the last ones.
    """

    clip: float | None = None
    l2: float | None = None
    decay: float | None = None
    penalty: Parts | None = None
    block: bool = False
    sparsity: float = 0.0
    n_m: tuple[int, int] | None = None
    dropout: float = 0.0
    smoothing: float = 0.0
    early_stop: bool = False

    def optimizer(
        self,
        direction: optax.GradientTransformation,
        learning_rate: float | optax.Schedule,
        steps: int,
    ) -> optax.GradientTransformation:
        """The direction and the learning rate with the optimizer's part of the regularizers.

        Args:
            direction: as in `jaxreg.regularize`.
            learning_rate: likewise.
            steps: the length of the training.
        """
        links: list[optax.GradientTransformation] = [
            regularize(
                direction,
                learning_rate,
                clip=self.clip,
                l2=self.l2,
                decay=self.decay,
                penalty=self.penalty,
                metric="block" if self.block else "auto",
            )
        ]
        ramp = max(1, steps // 2)
        if self.sparsity:
            rising = optax.polynomial_schedule(0.0, self.sparsity, 3, ramp)
            links.append(magnitude_pruning(rising))
        if self.n_m is not None:
            n, m = self.n_m
            links.append(n_m_pruning(optax.linear_schedule(m, n, ramp), m, where=_InBlocks(m)))
        return optax.chain(*links) if len(links) > 1 else links[0]

    @property
    def target_zeros(self) -> float | None:
        """The share of zeros in the kernels that training is to end with; None for none.

        >>> RECIPES["pruning"].regularizers(0.7).target_zeros
        0.7
        """
        if isinstance(self.penalty, SparsityTarget):
            return float(self.penalty.target)  # pyright: ignore[reportArgumentType]
        return self.sparsity or None

    def describe(self) -> dict[str, Any]:
        """What is switched on, by name, in values that JSON can hold.

        >>> Regularizers(penalty=L1(0.1), dropout=0.5).describe()
        {'penalty': 'L1(0.1)', 'dropout': 0.5}
        """
        fields = dataclasses.fields(self)
        chosen = {
            f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default
        }
        return {k: repr(v) if k == "penalty" else v for k, v in chosen.items()}


@dataclasses.dataclass(frozen=True)
class _InBlocks(_where.Selector):
    """Kernels whose inputs come in blocks of m: perhaps none, as m is not the user's choice."""

    m: int

    def selects(self, path: str, leaf: Any) -> bool:
        in_blocks = len(leaf.shape) > 1 and leaf.shape[-2] % self.m == 0
        return in_blocks and _where.kernels.selects(path, leaf)

    def mask(self, tree: Any) -> Any:
        chosen = map(self.selects, _where.paths(tree), jax.tree.leaves(tree))
        return jax.tree.unflatten(jax.tree.structure(tree), list(chosen))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to regularize, with one number to turn.

    ``make(strength)`` gives the regularizers. ``strength`` is the default of that number (None
    where there is nothing to turn), and ``check`` says which values it may take.
    """

    name: str
    description: str
    make: Callable[[Any], Regularizers]
    strength: float | None = None
    check: Callable[[str, Any], float] = _check.nonnegative
    classification_only: bool = False

    def regularizers(self, strength: float | None = None) -> Regularizers:
        """The regularizers at a strength, by default the recipe's own.

        Raises:
            ValueError: where the strength is out of range, or the recipe has none.

        >>> RECIPES["dropout"].regularizers(0.2)
        Regularizers(clip=None, l2=None, decay=None, penalty=None, block=False, sparsity=0.0,
                     n_m=None, dropout=0.2, smoothing=0.0, early_stop=False)
        """
        if strength is None:
            return self.make(self.strength)
        if self.strength is None:
            raise _check.ArgumentError(
                f"strength of {self.name}", repr(strength), "nothing: it has no strength"
            )
        return self.make(self.check(f"strength of {self.name}", strength))


_ALL = (
    Recipe("none", "no regularization", lambda s: Regularizers()),
    Recipe(
        "l2",
        "coupled L2: strength * weight joins the gradient before Adam",
        lambda s: Regularizers(l2=s),
        1e-3,
    ),
    Recipe(
        "weight_decay",
        "decoupled weight decay after the learning rate (AdamW)",
        lambda s: Regularizers(decay=s),
        0.3,
    ),
    Recipe(
        "l1_prox",
        "L1 by a proximal step in Adam's metric: exact zeros",
        lambda s: Regularizers(penalty=L1(s)),
        3e-4,
    ),
    Recipe(
        "elastic_net",
        "L1 and squared L2, equally strong, by a proximal step",
        lambda s: Regularizers(penalty=ElasticNet(s, s)),
        3e-4,
    ),
    Recipe(
        "group_lasso",
        "group lasso on the incoming weights of each unit by a proximal step: whole units vanish",
        lambda s: Regularizers(penalty=GroupLasso(s)),
        1e-3,
    ),
    Recipe(
        "nuclear",
        "nuclear norm by a proximal step, under Adam with one scale a leaf: kernels of low rank",
        lambda s: Regularizers(penalty=Nuclear(s), block=True),
        3e-3,
    ),
    Recipe(
        "sparsity_target",
        "L1 by a proximal step, its strength steered to a share of zeros, which is the strength",
        lambda s: Regularizers(penalty=sparsity_target(L1(1e-5), s)),
        0.8,
        _check.fraction,
    ),
    Recipe(
        "pruning",
        "the smallest weights of all kernels are zero; the strength is their share in the end",
        lambda s: Regularizers(sparsity=s),
        0.8,
        _check.fraction,
    ),
    Recipe(
        "n_m",
        "2:4 sparsity: of 4 inputs in a row, at most 2 weights of a unit are not zero; kernels "
        "whose inputs are no multiple of 4 stay dense",
        lambda s: Regularizers(n_m=(2, 4)),
    ),
    Recipe(
        "dropout",
        "dropout in front of the output layer",
        lambda s: Regularizers(dropout=s),
        0.5,
        _check.fraction,
    ),
    Recipe(
        "label_smoothing",
        "cross-entropy against labels mixed with the uniform distribution",
        lambda s: Regularizers(smoothing=s),
        0.1,
        _check.fraction,
        classification_only=True,
    ),
    Recipe(
        "clip",
        "gradient clipped to a global norm",
        lambda s: Regularizers(clip=s),
        1.0,
        _check.positive,
    ),
    Recipe(
        "early_stop",
        "the weights of the epoch with the least validation loss",
        lambda s: Regularizers(early_stop=True),
    ),
    Recipe(
        "cocktail",
        "clip, weight decay, proximal L1, dropout, label smoothing and early stopping together; "
        "the strength multiplies the decay and the L1 part",
        lambda s: Regularizers(
            clip=1.0,
            decay=0.3 * s,
            penalty=L1(1e-4 * s),
            dropout=0.3,
            smoothing=0.05,
            early_stop=True,
        ),
        1.0,
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}
"""Every recipe of ``jaxreg compare`` by its name, in the order in which they are shown."""
