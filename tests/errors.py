"""The form that every error over bad input has."""

import pytest

from jaxreg._check import ArgumentError


def message(error: pytest.ExceptionInfo[ArgumentError]) -> str:
    """The message: one line that says what was given and what is accepted."""
    text = str(error.value)
    assert "\n" not in text
    assert ": got " in text
    assert "; accepted: " in text
    return text
