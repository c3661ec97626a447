"""The strength of weight decay from the time over which weights are averaged."""

from jaxreg import _check


def decay_from_timescale(
    learning_rate: float,
    *,
    steps: float | None = None,
    epochs: float | None = None,
    steps_per_epoch: float | None = None,
) -> float:
    r"""The strength of weight decay with a timescale, $strength = 1 / (learning\_rate \cdot \tau)$.

    Decoupled weight decay at the rate of the learning rate (AdamW) makes the weights an
    exponential average of the updates over the last $\tau$ steps. A timescale in epochs can be kept
    where the model, the data or the batch changes; a strength can't.

    Args:
        learning_rate: a number > 0; of a schedule its peak.
        steps: the timescale $\tau$ in steps, a number > 0. Either `steps` or `epochs` is given.
        epochs: the timescale in passes over the data, a number > 0.
        steps_per_epoch: a number > 0, with `epochs`.

    Returns:
        The strength for `jaxreg.weight_decay`.

    Raises:
        ValueError: where a number is not > 0 and finite, both or none of `steps` and `epochs` are
            given, or `steps_per_epoch` is missing or not needed.

    Source: X. Wang and L. Aitchison, *How to set AdamW's weight decay as you scale model and
    dataset size*, 2024, arXiv:2405.13698.

    >>> import jaxreg
    >>> round(jaxreg.decay_from_timescale(1e-3, epochs=10, steps_per_epoch=500), 6)
    0.2
    """
    if (steps is None) == (epochs is None):
        given = "neither steps nor epochs" if steps is None else "both steps and epochs"
        raise _check.ArgumentError("steps", given, "one of them: the timescale in its unit")
    if (epochs is None) != (steps_per_epoch is None):
        accepted = "a number > 0 where the timescale is in epochs, and None where it is in steps"
        raise _check.ArgumentError("steps_per_epoch", repr(steps_per_epoch), accepted)
    if _check.is_schedule(learning_rate):
        accepted = "a finite number > 0: of a schedule its peak"
        raise _check.ArgumentError("learning_rate", "a function", accepted)
    rate = _check.positive_finite("learning_rate", learning_rate)
    if steps is not None:
        return 1 / (rate * _check.positive_finite("steps", steps))
    per_epoch = _check.positive_finite("steps_per_epoch", steps_per_epoch)
    return 1 / (rate * _check.positive_finite("epochs", epochs) * per_epoch)
