"""The procedural data set."""

import numpy as np
import pytest

from jaxreg._check import ArgumentError
from jaxreg.mnist1d import make_mnist1d


def test_mnist1d_is_determined_by_its_seed():
    x, y = make_mnist1d(60, seed=3)
    again_x, again_y = make_mnist1d(60, seed=3)
    other_x, _ = make_mnist1d(60, seed=4)
    np.testing.assert_array_equal(x, again_x)
    np.testing.assert_array_equal(y, again_y)
    assert np.abs(x - other_x).max() > 0.1


@pytest.mark.parametrize("n", [10, 57, 400])
def test_mnist1d_has_equal_classes_and_standardized_signals(n):
    x, y = make_mnist1d(n)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((n, 40, 1), np.float32, (n,), np.int32)
    assert np.ptp(np.bincount(y, minlength=10)) <= 1
    assert abs(x.mean()) < 1e-5
    assert abs(x.std() - 1) < 1e-5


def test_mnist1d_is_hard_for_a_linear_model_and_easier_for_neighbours():
    signals, y = make_mnist1d()
    x = np.concatenate([signals[..., 0], np.ones((len(y), 1))], axis=1)
    train, test = slice(0, 4000), slice(4000, None)
    weights = np.linalg.lstsq(x[train], np.eye(10)[y[train]], rcond=None)[0]
    linear = ((x[test] @ weights).argmax(axis=1) == y[test]).mean()
    distance = (x[test] ** 2).sum(1)[:, None] - 2 * x[test] @ x[train].T + (x[train] ** 2).sum(1)
    nearest = (y[train][distance.argmin(axis=1)] == y[test]).mean()
    # On the authors' own data: about 0.24 and 0.57.
    assert 0.18 < linear < 0.32
    assert 0.50 < nearest < 0.64


@pytest.mark.parametrize(("n", "seed", "name"), [(9, 0, "n"), (12.0, 0, "n"), (20, -1, "seed")])
def test_mnist1d_rejects_bad_numbers(n, seed, name):
    with pytest.raises(ArgumentError, match=f"^{name}: got .*a whole number >= "):
        make_mnist1d(n, seed)
