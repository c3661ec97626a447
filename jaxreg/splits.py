"""What each lane (repetition of a fit) sees of a data set: training, validation and test rows."""

from dataclasses import dataclass

import numpy as np

from jaxreg._check import ArgumentError, describe, fraction, is_whole, scalar, whole_number
from jaxreg.data import Dataset


@dataclass(frozen=True, eq=False)
class Split:
    """The data of L lanes: n rows for training, v for validation and m for test.

    `x` is float32 and standardized with the lane's training rows, `y` is int32 classes or float32
    standardized targets; `rows` are indices in the data set.
    """

    train_x: np.ndarray  # (L, n, *features)
    validation_x: np.ndarray  # (L, v, *features)
    test_x: np.ndarray  # (L, m, *features)
    train_y: np.ndarray  # (L, n)
    validation_y: np.ndarray  # (L, v)
    test_y: np.ndarray  # (L, m)
    train_rows: np.ndarray  # (L, n)
    validation_rows: np.ndarray  # (L, v)
    test_rows: np.ndarray  # (m,), the same for all lanes


def split(
    dataset: Dataset,
    *,
    train_size: int | None = None,
    label_noise: float = 0.0,
    seeds: int,
    test_share: float = 0.25,
    validation_share: float = 0.2,
    split_seed: int = 0,
) -> Split:
    """Training, validation and test data for `seeds` lanes of equal sizes.

    Test rows depend on `split_seed` and `test_share` alone. The training and validation rows of a
    lane, and which of its labels are corrupted, depend on `split_seed` and the lane's number, not
    on how many lanes there are. Each class has its share of every part, and at least one row.
    (Shares give way to that, and for regression to 2 rows in every part.)

    Args:
        dataset: the rows to split.
        train_size: number of training rows. Validation rows come on top, as many as make up
            `validation_share` of both. None uses all rows that are not for test.
        label_noise: share, in [0, 1), of the training labels that are replaced by a uniformly
            random other class; for regression, of the training targets that are shuffled among
            themselves. Validation and test labels are left clean.
        seeds: number of lanes.
        test_share: share of all rows, in (0, 1).
        validation_share: share of the rows that are not for test, in (0, 0.5].
        split_seed: a whole number >= 0.

    Returns:
        A `Split`. The columns of a table (all values together of images or sequences), and
        regression targets, have mean 0 and standard deviation 1 over the lane's training rows.

    Raises:
        ArgumentError: a number out of its range, or more training rows than there are.

    >>> from jaxreg.data import load
    >>> parts = split(load("mnist1d"), train_size=200, seeds=3)
    >>> parts.train_x.shape, parts.validation_y.shape, parts.test_x.shape
    ((3, 200, 40, 1), (3, 50), (3, 1250, 40, 1))
    """
    whole_number("seeds", seeds, at_least=1)
    whole_number("split_seed", split_seed, at_least=0)
    fraction("label_noise", label_noise)
    scalar("test_share", test_share, "a number in (0, 1)", lambda v: 0 < v < 1)
    scalar("validation_share", validation_share, "a number in (0, 0.5]", lambda v: 0 < v <= 0.5)

    regression = dataset.task == "regression"
    # Regression has one stratum, of which a part needs 2 rows to have a variance.
    strata = np.zeros(len(dataset.y), np.int32) if regression else dataset.y
    least = 2 if regression else 1
    count = np.bincount(strata)

    test_count = _apportion(count, round(test_share * len(strata)), least, spare=2 * least)
    train_count, validation_count = _train_and_validation(
        count - test_count, train_size, validation_share, least
    )
    rng = np.random.default_rng([split_seed, 0])
    orders = [rng.permutation(np.flatnonzero(strata == s)) for s in range(len(count))]
    test = np.sort(_first(orders, test_count))
    rest = [order[used:] for order, used in zip(orders, test_count, strict=True)]

    def lane(number: int) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng([split_seed, 1, number])
        orders = [rng.permutation(rows) for rows in rest]
        train = rng.permutation(_first(orders, train_count))
        # From the other end of the same order, so that the two never meet.
        validation = _first([order[::-1] for order in orders], validation_count)
        parts = (train, validation, test)
        x = _standardize([dataset.x[rows] for rows in parts], 0 if dataset.x.ndim == 2 else None)
        y = [dataset.y[rows] for rows in parts]
        y[0] = _corrupt(y[0], label_noise, len(dataset.classes), rng)
        return (*x, *(_standardize(y, None) if regression else y), train, validation)

    lanes = [lane(number) for number in range(seeds)]
    return Split(*map(np.stack, zip(*lanes, strict=True)), test_rows=test)


def _train_and_validation(
    count: np.ndarray, train_size: int | None, share: float, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many rows each stratum gives to training and to validation, of the `count` it has."""
    available, smallest = int(count.sum()), least * len(count)
    if train_size is None:
        validation_size = round(share * available)
    else:
        sizes = np.arange(available)
        validation_sizes = np.maximum(smallest, np.rint(sizes * share / (1 - share)).astype(int))
        most = int(sizes[sizes + validation_sizes <= available].max())
        if not (is_whole(train_size) and smallest <= train_size <= most):
            accepted = f"a whole number from {smallest} to {most}, as other rows test and validate"
            raise ArgumentError("train_size", describe(train_size), accepted)
        validation_size = int(validation_sizes[train_size])
    validation = _apportion(count, validation_size, least, spare=least)
    # `available` is more than are left: all of them.
    return _apportion(count - validation, train_size or available, least, spare=0), validation


def _apportion(count: np.ndarray, total: int, least: int, spare: int) -> np.ndarray:
    """How many of `total` rows each stratum gives: its share, between least and count - spare."""
    most = count - spare
    total = int(np.clip(total, least * len(count), most.sum()))
    quota = total * count / count.sum()
    size = np.clip(np.floor(quota).astype(int), least, most)
    while size.sum() < total:
        size[np.where(size < most, quota - size, -np.inf).argmax()] += 1
    while size.sum() > total:
        size[np.where(size > least, quota - size, np.inf).argmin()] -= 1
    return size


def _first(orders: list[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([order[:size] for order, size in zip(orders, sizes, strict=True)])


def _standardize(parts: list[np.ndarray], axis: int | None) -> list[np.ndarray]:
    """All parts, less the mean of the first and divided by its standard deviation (0: by 1)."""
    # Equal float32 values have an exact sum in float64, so a constant's deviation is exactly 0.
    mean, scale = (moment(parts[0], axis, dtype=np.float64) for moment in (np.mean, np.std))
    scale = np.where(scale > 0, scale, 1)
    return [((part - mean) / scale).astype(np.float32) for part in parts]


def _corrupt(y: np.ndarray, share: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """`y` with a share of its classes replaced, or of its targets shuffled (no classes)."""
    chosen = rng.permutation(len(y))[: round(share * len(y))]
    y = y.copy()
    if classes:
        y[chosen] = (y[chosen] + rng.integers(1, classes, len(chosen))) % classes
    else:
        y[chosen] = y[rng.permutation(chosen)]
    return y
