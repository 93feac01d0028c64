"""The errors a user can cause, each with a hint that says what to do."""

from __future__ import annotations


class EETrainError(ValueError):
    """Base of all errors whose cause is the user's input.

    Args:
        message: what was set and what was found.
        hint: what to do about it; the command line prints it after ``HINT:``.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} HINT: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[EETrainError], message: str, hint: str) -> EETrainError:
    return kind(message, hint=hint)


class ConfigError(EETrainError):
    """A setting has a wrong key, type, value or contradicts another one."""


class UnsupportedModelError(EETrainError):
    """A backbone lacks a part that `eetrain` needs, or works in a way it cannot follow."""


class CheckpointError(EETrainError):
    """A checkpoint is missing, cut short, or belongs to another model."""


class TopologyError(EETrainError):
    """Processes, stages, replicas and micro-batches do not fit each other or the model."""


class TrainingError(EETrainError):
    """A run cannot go on with the numbers it has come to."""


class DataError(EETrainError):
    """A data file is missing, empty or holds a row that cannot be read."""
