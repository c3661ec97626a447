"""MNIST-1D: ten classes of short noisy signals, generated in a few milliseconds without a download.

A row is one of ten templates, dilated, scaled, shifted and sheared at random in a field of
correlated noise, so that linear models do badly, and models that share weights over positions
do well.

    row = resample(where(template, scale * template, correlated noise) + white noise - shear * ramp)
"""

import numpy as np

from jaxreg._check import ArgumentError

# Twelve hand-drawn points a digit, constants of the published recipe. Each starts and ends at 5.
_TEMPLATES = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
_CLASSES, _POINTS = _TEMPLATES.shape
_FIELD = 72  # length in which the template is placed
_LENGTH = 40  # length of a row
_PADDINGS = np.arange(36, 61)  # zeros put after the template: more of them, a shorter signal
_SHIFTS = 48
_SCALE_RANGE = 0.4
_SHEAR_RANGE = 0.75
_CORRELATED_NOISE = 0.25  # standard deviation before smoothing
_WHITE_NOISE = 0.02
_SMOOTHING = 2.0  # standard deviation of the Gaussian filter, in points


def make_mnist1d(n: int = 5000, seed: int = 42) -> tuple[np.ndarray, np.ndarray]:
    """The MNIST-1D data set: `n` signals of ten classes.

    Args:
        n: number of rows, at least 10. Classes have equal sizes (to one row); rows are shuffled.
        seed: a whole number >= 0; equal seeds give equal data.

    Returns:
        `x`, float32 of shape (n, 40, 1): sequences of 40 positions with one channel, shifted and
        scaled to mean 0 and standard deviation 1 over the whole data set; and `y`, int32 of shape
        (n,): the digit.

    Raises:
        ArgumentError: `n` is below 10, or `seed` is negative.

    Source: Greydanus and Kobak, "Scaling down deep learning with MNIST-1D" (ICML 2024), with the
    templates and constants of the authors' implementation. The random numbers are NumPy's
    `Generator`, so rows are not those of the published file, only alike in distribution.

    >>> x, y = make_mnist1d(100)
    >>> x.shape, y.shape, int(y.max())
    ((100, 40, 1), (100,), 9)
    """
    for name, value, least in (("n", n, _CLASSES), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ArgumentError(name, repr(value), f"a whole number >= {least}")
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % _CLASSES)

    padding = rng.integers(len(_PADDINGS), size=n)
    signals, is_template = _dilated_templates()
    # Shifts are circular: column j of a row comes from column j - shift of its template.
    column = (np.arange(_FIELD) - rng.integers(_SHIFTS, size=(n, 1))) % _FIELD
    signal = signals[padding[:, None], y[:, None], column]
    signal *= 1 + _SCALE_RANGE * (rng.random((n, 1)) - 0.5)

    noise = _CORRELATED_NOISE * _smooth(rng.standard_normal((n, _FIELD)))
    x = np.where(is_template[padding[:, None], column], signal, noise)
    x += _WHITE_NOISE * rng.standard_normal((n, _FIELD))
    x -= _SHEAR_RANGE * (rng.random((n, 1)) - 0.5) * np.linspace(-0.5, 0.5, _FIELD)
    x = x @ _interpolation(np.linspace(0, _FIELD - 1, _LENGTH), _FIELD)
    x = (x - x.mean()) / x.std()
    return x[..., None].astype(np.float32), y.astype(np.int32)


def _dilated_templates() -> tuple[np.ndarray, np.ndarray]:
    """Signals (paddings, classes, field), and which columns a template covers (paddings, field)."""
    spread = _TEMPLATES.std(axis=1, keepdims=True)
    templates = (_TEMPLATES - _TEMPLATES[:, :1]) / (6 * spread)
    position = np.linspace(0, _POINTS + _PADDINGS - 1, _FIELD, axis=1)
    # A template ends at 0, so the padding after it needs no columns of its own.
    weights = _interpolation(position.ravel(), _POINTS).reshape(_POINTS, *position.shape)
    return np.einsum("ck,kpf->pcf", templates, weights), position < _POINTS


def _interpolation(position: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation as a matrix: (..., size) @ this = values at `position`; 0 outside."""
    return np.maximum(0, 1 - np.abs(np.arange(size)[:, None] - position))


def _smooth(noise: np.ndarray) -> np.ndarray:
    """A Gaussian filter along rows, cut off at 4 standard deviations, mirrored at both ends."""
    radius = round(4 * _SMOOTHING)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / _SMOOTHING) ** 2)
    mirrored = np.pad(noise, ((0, 0), (radius, radius)), mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, kernel.size, axis=1)
    return windows @ (kernel / kernel.sum())
