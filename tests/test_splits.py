"""The laws of a split: who sees which rows, and standardized with what."""

import dataclasses

import numpy as np
import pytest
from errors import message
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg._check import ArgumentError
from jaxreg.data import Dataset
from jaxreg.splits import split


def table(rows: int, classes: int = 3, columns: int = 4, seed: int = 0) -> Dataset:
    """Random features, classes in turn (0, 1, 2, 0, ...), or regression for 0 classes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(5, 3, (rows, columns)).astype(np.float32)
    if classes == 0:
        return Dataset("made", "regression", x, rng.normal(7, 2, rows).astype(np.float32))
    y = np.arange(rows, dtype=np.int32) % classes
    return Dataset("made", "classification", x, y, tuple(map(str, range(classes))))


@st.composite
def datasets(draw, tasks=("classification", "regression")) -> Dataset:
    if draw(st.sampled_from(tasks)) == "regression":
        return table(draw(st.integers(8, 60)), classes=0)
    counts = draw(st.lists(st.integers(3, 25), min_size=2, max_size=5).filter(lambda c: sum(c) > 7))
    y = np.random.default_rng(len(counts)).permutation(np.repeat(np.arange(len(counts)), counts))
    made = table(len(y), classes=0)
    names = tuple(map(str, range(len(counts))))
    return Dataset("made", "classification", made.x, y.astype(np.int32), names)


shares = st.floats(0.05, 0.5)
law = settings(max_examples=40, deadline=None)


@law
@given(datasets(), shares, shares, st.integers(0, 99), st.integers(1, 4))
def test_parts_are_disjoint_and_cover_all_rows(dataset, test_share, validation_share, seed, lanes):
    parts = split(
        dataset,
        seeds=lanes,
        test_share=test_share,
        validation_share=validation_share,
        split_seed=seed,
    )
    for train, validation in zip(parts.train_rows, parts.validation_rows, strict=True):
        rows = np.concatenate([train, validation, parts.test_rows])
        np.testing.assert_array_equal(np.sort(rows), np.arange(len(dataset.y)))


@law
@given(datasets(), shares, st.integers(0, 99), st.data())
def test_train_size_is_met_with_disjoint_validation_rows(dataset, share, seed, data):
    least = len(dataset.classes) or 2
    size = data.draw(st.integers(least, max(least, len(dataset.y) // 4)))
    parts = split(dataset, train_size=size, seeds=2, validation_share=share, split_seed=seed)
    assert parts.train_rows.shape == (2, size)
    expected = max(least, round(size * share / (1 - share)))
    assert parts.validation_rows.shape == (2, expected)
    for train, validation in zip(parts.train_rows, parts.validation_rows, strict=True):
        assert (
            len({*train, *validation, *parts.test_rows}) == size + expected + parts.test_y.shape[1]
        )


@law
@given(datasets(["classification"]), shares, shares, st.booleans())
def test_every_class_is_in_every_part_and_equally_often_in_all_lanes(dataset, test, valid, some):
    classes = len(dataset.classes)
    parts = split(
        dataset,
        train_size=classes if some else None,
        seeds=3,
        test_share=test,
        validation_share=valid,
    )
    for rows in (parts.train_rows, parts.validation_rows, parts.test_rows[None]):
        counts = [np.bincount(dataset.y[lane], minlength=classes) for lane in rows]
        assert min(counts[0]) >= 1
        for count in counts:
            np.testing.assert_array_equal(count, counts[0])


@pytest.mark.parametrize("train_size", [None, 40, 97])
def test_parts_have_the_shares_of_the_classes_to_one_row(train_size):
    y = np.repeat(np.arange(3, dtype=np.int32), [200, 70, 30])
    made = table(300, classes=0)
    dataset = Dataset("made", "classification", made.x, y, ("a", "b", "c"))
    parts = split(dataset, train_size=train_size, seeds=1)
    for rows in (parts.train_rows[0], parts.validation_rows[0], parts.test_rows):
        expected = len(rows) * np.array([200, 70, 30]) / 300
        assert np.abs(np.bincount(y[rows]) - expected).max() <= 1


def test_rare_classes_keep_one_row_in_the_smallest_training_set():
    y = np.repeat(np.arange(5, dtype=np.int32), [3, 3, 3, 3, 100])
    dataset = Dataset("made", "classification", table(112, 0).x, y, tuple("abcde"))
    parts = split(dataset, train_size=5, seeds=2)
    np.testing.assert_array_equal(np.sort(parts.train_y), [range(5)] * 2)
    with pytest.raises(ArgumentError, match=r"train_size: got 4; .*from 5 to "):
        split(dataset, train_size=4, seeds=2)


def test_largest_train_size_leaves_a_validation_row_for_every_class():
    dataset = table(15, classes=5)
    assert split(dataset, train_size=5, seeds=1).validation_y.shape == (1, 5)
    with pytest.raises(ArgumentError, match=r"train_size: got 6; .*from 5 to 5"):
        split(dataset, train_size=6, seeds=1)


@pytest.mark.parametrize(("train_size", "sizes"), [(None, (60, 15, 25)), (40, (40, 10, 25))])
@pytest.mark.parametrize("classes", [0, 5])
def test_default_shares(classes, train_size, sizes):
    parts = split(table(100, classes), train_size=train_size, seeds=2)
    assert (parts.train_y.shape[1], parts.validation_y.shape[1], parts.test_y.shape[1]) == sizes


@law
@given(datasets(), st.integers(0, 99), st.floats(0, 0.9), shares, st.integers(1, 4))
def test_test_rows_depend_on_the_split_seed_only(dataset, seed, noise, validation_share, lanes):
    expected = split(dataset, seeds=1, split_seed=seed).test_rows
    parts = split(
        dataset,
        train_size=len(dataset.classes) or 2,
        label_noise=noise,
        seeds=lanes,
        validation_share=validation_share,
        split_seed=seed,
    )
    np.testing.assert_array_equal(parts.test_rows, expected)


def test_another_split_seed_draws_other_rows():
    first, other = (split(table(90), seeds=1, split_seed=seed) for seed in (0, 1))
    assert set(first.test_rows) != set(other.test_rows)
    assert set(first.train_rows[0]) != set(other.train_rows[0])


@pytest.mark.parametrize("classes", [0, 3])
def test_a_lane_does_not_depend_on_the_number_of_lanes(classes):
    dataset = table(90, classes)
    few, many = (split(dataset, label_noise=0.3, seeds=lanes) for lanes in (2, 5))
    for field in dataclasses.fields(few):
        part, whole = getattr(few, field.name), getattr(many, field.name)
        np.testing.assert_array_equal(part, whole[: len(part)])


def test_lanes_differ_in_training_rows_validation_rows_and_corrupted_labels():
    dataset = table(200)
    parts = split(dataset, label_noise=0.2, seeds=4)
    corrupted = [
        frozenset(rows[y != dataset.y[rows]])
        for rows, y in zip(parts.train_rows, parts.train_y, strict=True)
    ]
    for sets in (
        map(frozenset, parts.train_rows),
        map(frozenset, parts.validation_rows),
        corrupted,
    ):
        assert len(set(sets)) == 4


@law
@given(datasets(["classification"]), st.floats(0, 0.99))
def test_label_noise_replaces_its_share_of_training_labels_only(dataset, noise):
    noisy = split(dataset, label_noise=noise, seeds=2)
    clean = split(dataset, seeds=2)
    np.testing.assert_array_equal(noisy.train_rows, clean.train_rows)
    np.testing.assert_array_equal(noisy.train_x, clean.train_x)
    np.testing.assert_array_equal(clean.train_y, dataset.y[clean.train_rows])
    changed = (noisy.train_y != clean.train_y).sum(axis=1)
    np.testing.assert_array_equal(changed, round(noise * clean.train_y.shape[1]))
    assert noisy.train_y.min() >= 0
    assert noisy.train_y.max() < len(dataset.classes)
    np.testing.assert_array_equal(noisy.validation_y, dataset.y[noisy.validation_rows])
    np.testing.assert_array_equal(noisy.test_y, dataset.y[[noisy.test_rows] * 2])


def test_wrong_labels_are_uniform_over_the_other_classes():
    dataset = table(6000, classes=4, columns=1)
    parts = split(dataset, label_noise=0.9, seeds=1)
    step = (parts.train_y[0] - dataset.y[parts.train_rows[0]]) % 4
    counts = np.bincount(step)[1:]
    # Five standard deviations of a binomial count.
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(counts.sum() * 2 / 9)


def test_label_noise_shuffles_a_share_of_regression_targets():
    dataset = table(400, classes=0)
    clean, noisy = (split(dataset, label_noise=noise, seeds=2) for noise in (0.0, 0.25))
    np.testing.assert_array_equal(clean.train_rows, noisy.train_rows)
    np.testing.assert_allclose(np.sort(clean.train_y), np.sort(noisy.train_y), atol=1e-6)
    changed = (np.abs(clean.train_y - noisy.train_y) > 1e-5).sum(axis=1)
    assert (changed <= 60).all()  # a quarter of 240 rows; some may stay where they are
    assert (changed >= 50).all()
    np.testing.assert_allclose(clean.validation_y, noisy.validation_y, atol=1e-6)
    np.testing.assert_allclose(clean.test_y, noisy.test_y, atol=1e-6)


def test_columns_are_standardized_with_the_training_rows_of_the_lane():
    dataset = table(120)
    parts = split(dataset, seeds=3)
    np.testing.assert_allclose(parts.train_x.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(parts.train_x.std(axis=1), 1, atol=1e-5)
    for lane in range(3):
        train = dataset.x[parts.train_rows[lane]]
        for rows, x in (
            (parts.validation_rows[lane], parts.validation_x[lane]),
            (parts.test_rows, parts.test_x[lane]),
        ):
            expected = (dataset.x[rows] - train.mean(axis=0)) / train.std(axis=0)
            np.testing.assert_allclose(x, expected, atol=1e-4)
    assert {getattr(parts, f"{part}_x").dtype for part in ("train", "validation", "test")} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("part", ["test", "validation"])
def test_an_outlier_outside_the_training_rows_does_not_change_them(classes, part):
    dataset = table(90, classes)
    before = split(dataset, seeds=1)
    planted = getattr(before, f"{part}_rows").reshape(-1)[0]
    x, y = dataset.x.copy(), dataset.y.copy()
    x[planted] = 1e6
    if classes == 0:
        y[planted] = 1e6
    after = split(dataclasses.replace(dataset, x=x, y=y), seeds=1)
    np.testing.assert_array_equal(after.train_x, before.train_x)
    np.testing.assert_array_equal(after.train_y, before.train_y)
    assert getattr(after, f"{part}_x").max() > 1e5


@pytest.mark.parametrize("shape", [(6, 2), (5, 5, 3)])
def test_images_and_sequences_are_standardized_with_one_scalar(shape):
    made = table(60)
    x = np.random.default_rng(1).gamma(2, 3, (60, *shape)).astype(np.float32)
    dataset = dataclasses.replace(made, x=x)
    parts = split(dataset, seeds=2)
    assert parts.train_x.shape == (2, 36, *shape)
    for lane in range(2):
        train = x[parts.train_rows[lane]]
        expected = (x[parts.test_rows] - train.mean()) / train.std()
        np.testing.assert_allclose(parts.test_x[lane], expected, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678, -3e7])
def test_a_constant_feature_becomes_zero(value):
    dataset = table(50)
    dataset.x[:, 1] = value
    parts = split(dataset, seeds=2)
    assert not parts.train_x[..., 1].any()
    assert not parts.test_x[..., 1].any()
    np.testing.assert_allclose(parts.train_x[..., 0].std(axis=1), 1, atol=1e-5)


def test_regression_targets_are_standardized_with_the_training_rows_of_the_lane():
    dataset = table(100, classes=0)
    parts = split(dataset, seeds=2)
    for lane in range(2):
        train = dataset.y[parts.train_rows[lane]]
        expected = (dataset.y[parts.test_rows] - train.mean()) / train.std()
        np.testing.assert_allclose(parts.test_y[lane], expected, atol=1e-5)
    np.testing.assert_allclose(parts.train_y.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(parts.train_y.std(axis=1), 1, atol=1e-5)
    assert parts.train_y.dtype == np.float32


def test_training_rows_are_not_in_the_order_of_their_classes():
    y = np.repeat(np.arange(2, dtype=np.int32), 50)
    dataset = dataclasses.replace(table(100), y=y, classes=("a", "b"))
    train_y = split(dataset, seeds=1).train_y[0]
    assert (np.diff(train_y) != 0).sum() > 10


@pytest.mark.parametrize("classes", [0, 3])
def test_the_largest_train_size_is_accepted_and_one_more_is_not(classes):
    dataset = table(100, classes)
    largest = 60  # of 100, a quarter is for test, and a fifth of the other 75 for validation
    assert split(dataset, train_size=largest, seeds=1).train_y.shape == (1, largest)
    least = classes or 2
    with pytest.raises(ArgumentError) as error:
        split(dataset, train_size=largest + 1, seeds=1)
    assert f"train_size: got 61; accepted: a whole number from {least} to 60" in message(error)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_smallest_data_set_can_be_split(task):
    dataset = table(9, 3) if task == "classification" else table(8, 0)
    parts = split(dataset, seeds=2, test_share=0.99, validation_share=0.5)
    assert min(len(parts.test_rows), parts.train_y.shape[1], parts.validation_y.shape[1]) >= 2


SPLIT_ERRORS = [
    ({"train_size": 0}, "train_size: got 0; accepted: a whole number from 3 to 18"),
    ({"train_size": -4}, "train_size: got -4;"),
    ({"train_size": 2}, "train_size: got 2;"),
    ({"train_size": 7.5}, "train_size: got 7.5;"),
    ({"train_size": True}, "train_size: got True;"),
    ({"label_noise": 1.0}, r"label_noise: got 1.0; accepted: a number in \[0, 1\)"),
    ({"label_noise": -0.1}, "label_noise: got -0.1;"),
    ({"label_noise": float("nan")}, "label_noise: got nan;"),
    ({"seeds": 0}, "seeds: got 0; accepted: a whole number >= 1"),
    ({"seeds": 2.0}, "seeds: got 2.0;"),
    ({"split_seed": -1}, "split_seed: got -1;"),
    ({"test_share": 0.0}, "test_share: got 0.0;"),
    ({"test_share": 1.0}, "test_share: got 1.0;"),
    ({"validation_share": 0.0}, "validation_share: got 0.0;"),
    ({"validation_share": 0.6}, "validation_share: got 0.6;"),
]


@pytest.mark.parametrize(("options", "pattern"), SPLIT_ERRORS)
def test_split_rejects_numbers_out_of_range(options, pattern):
    with pytest.raises(ArgumentError, match=pattern) as error:
        split(table(30), **{"seeds": 1, **options})
    message(error)
