"""Errors that a user can act on; each carries the exit code of the command line."""

from __future__ import annotations


class OnnxFoldError(Exception):
    """Base of all errors raised on purpose: the message is meant for the user."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, whatever names of a model or of a file are quoted in it."""
        text = super().__str__()
        if text.isprintable():
            return text
        escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
        return "".join(escaped)


class WeightError(OnnxFoldError):
    """A folded weight cannot be stored as it should be."""


class NotFiniteError(WeightError):
    """A folded weight is NaN or overflows its storage type."""


class WrongWeightError(WeightError):
    """What is stored of a folded weight is not what was proved, rounded to nearest."""


class UsageError(OnnxFoldError):
    """The request itself makes no sense, such as an unknown input name or pass."""

    exit_code = 2


class MissingExtraError(UsageError, ImportError):
    """An optional dependency is not installed; the message names the extra."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed: pip install 'onnx-fold[{extra}]'")


class InvalidModelError(OnnxFoldError):
    """The model cannot be read, or what was read is not a valid model."""

    exit_code = 3


class CannotWriteError(OnnxFoldError):
    """The output cannot be written; nothing was changed."""

    exit_code = 4


MAX_SENTENCE = 400
"""Characters of another library's message that are passed on."""


def sentence(error: BaseException) -> str:
    """The message of what caused ``error`` in the first place, in one line, for an own message."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_SENTENCE else f"{text[: MAX_SENTENCE - 3]}..."
