"""Small, readable Flax NNX models.

Each is called as ``model(x)`` for evaluation and ``model(x, train=True, key=key)`` in training,
with a key for each step. Layer number i draws its dropout mask with ``fold_in(key, i)``: no layer
shares a mask with another, and nothing is kept between steps.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx

from jaxreg import _check
from jaxreg.noise import dropout

# Before flax 0.12 modules in a plain list are tracked; since then in an nnx.List.
_ModuleList = getattr(nnx, "List", list)


class MLP(nnx.Module):
    """Dense layers with ReLU and dropout between them; with two sizes, a linear model.

    Args:
        sizes: units of each layer, the inputs first: (784, 128, 10).
        dropout_rate: the rate behind each hidden layer, in [0, 1).
        rngs: where the initial weights come from.

    Raises:
        ValueError: where there are fewer than two sizes, one is not a positive whole number, or
            the rate is out of its range; in training with dropout, where the key is missing.

    >>> import jax.numpy as jnp
    >>> model = MLP((784, 128, 10), dropout_rate=0.5, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 28, 28))
    >>> model(x, train=True, key=jax.random.key(0)).shape
    (2, 10)
    """

    def __init__(self, sizes: Sequence[int], *, dropout_rate: float = 0.0, rngs: nnx.Rngs):
        accepted = "two or more positive whole numbers"
        sizes = _positive("sizes", sizes, accepted, at_least=2)
        self.dropout_rate = _check.fraction("dropout_rate", dropout_rate)
        dense = [nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(sizes)]
        self.layers = _ModuleList(dense)

    def __call__(
        self, x: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Outputs (batch, last size) for inputs (batch, ...), flattened to the first size."""
        x = x.reshape(x.shape[0], -1)
        *hidden, last = self.layers
        for i, layer in enumerate(hidden):
            x = _site_dropout(nnx.relu(layer(x)), self.dropout_rate, train, key, i)
        return last(x)


class CNN(nnx.Module):
    """Convolution blocks with max-pooling, then dropout and a dense head.

    Each block is a 3-wide convolution, ReLU, and a max-pool that halves every spatial axis that
    is longer than 1.

    Args:
        input_shape: (height, width, channels) of images, or (length, channels) of sequences.
        outputs: number of outputs.
        channels: output channels of each block.
        dropout_rate: the rate before the head, in [0, 1).
        rngs: where the initial weights come from.

    Raises:
        ValueError: where the input shape has neither one nor two spatial axes, a size is not a
            positive whole number, or the rate is out of its range; in training with dropout,
            where the key is missing.

    >>> import jax.numpy as jnp
    >>> model = CNN((8, 8, 1), 10, rngs=nnx.Rngs(0))
    >>> model(jnp.ones((2, 8, 8, 1))).shape
    (2, 10)
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        channels: Sequence[int] = (16, 32),
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        accepted = "(height, width, channels) or (length, channels)"
        input_shape = _positive("input_shape", input_shape, accepted, at_least=2, at_most=3)
        channels = _positive("channels", channels, "one or more positive whole numbers")
        outputs = _check.whole_number("outputs", outputs, at_least=1)
        self.dropout_rate = _check.fraction("dropout_rate", dropout_rate)
        *spatial, n = input_shape
        blocks = []
        for m in channels:
            blocks.append(nnx.Conv(n, m, kernel_size=(3,) * len(spatial), rngs=rngs))
            spatial, n = [max(1, size // 2) for size in spatial], m
        self.blocks = _ModuleList(blocks)
        self.head = nnx.Linear(n * math.prod(spatial), outputs, rngs=rngs)

    def __call__(
        self, x: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Outputs (batch, outputs) for inputs (batch, *input_shape)."""
        for block in self.blocks:
            x = nnx.relu(block(x))
            window = tuple(min(2, size) for size in x.shape[1:-1])
            x = nnx.max_pool(x, window, strides=window)
        x = x.reshape(x.shape[0], -1)
        return self.head(_site_dropout(x, self.dropout_rate, train, key, 0))


ModelName = Literal["linear", "mlp", "cnn"]
MODEL_NAMES: tuple[ModelName, ...] = ("linear", "mlp", "cnn")
HIDDEN_UNITS = 128


def build(
    name: ModelName, input_shape: Sequence[int], outputs: int, dropout_rate: float, rngs: nnx.Rngs
) -> MLP | CNN:
    """A model by its name, with sizes that follow the data.

    Raises:
        ValueError: where the name is unknown, or a cnn is asked for inputs without spatial axes.

    >>> build("linear", (8, 8, 1), 10, 0.0, nnx.Rngs(0)).layers[0].kernel.shape
    (64, 10)
    """
    _check.choice("model", name, MODEL_NAMES)
    if name == "cnn":
        return CNN(input_shape, outputs, dropout_rate=dropout_rate, rngs=rngs)
    hidden = (HIDDEN_UNITS,) if name == "mlp" else ()
    sizes = (math.prod(input_shape), *hidden, outputs)
    return MLP(sizes, dropout_rate=dropout_rate, rngs=rngs)


def _positive(
    name: str, values: Sequence[int], accepted: str, at_least: int = 1, at_most: float = math.inf
) -> tuple[int, ...]:
    """Positive whole numbers, so many of them."""
    if not isinstance(values, Sequence) or not at_least <= len(values) <= at_most:
        raise _check.ArgumentError(name, _check.describe(values), accepted)
    if not all(_check.is_whole(value) and value >= 1 for value in values):
        raise _check.ArgumentError(name, _check.describe(values), accepted)
    return tuple(map(int, values))


def _site_dropout(
    x: jax.Array, rate: float, train: bool, key: jax.Array | None, site: int
) -> jax.Array:
    if not train or rate == 0:
        return x
    if key is None:
        raise _check.ArgumentError("key", "None", "a JAX random key of this step, for dropout")
    return dropout(jax.random.fold_in(key, site), x, rate)
