"""The errors users can catch. All of them are `ValueError`s, because that is what PEFT raises for bad input."""


class SensiError(ValueError):
    """Something about the request cannot be done; the message says what and what to do instead."""


class BudgetError(SensiError):
    """The budget is malformed, or nothing that satisfies it exists."""


class AnatomyError(SensiError):
    """The model has no units of the kind that was asked for."""


class CalibrationError(SensiError):
    """The calibration data cannot be used: empty, without labels, or with a loss that is not finite."""


class SensiLoadError(SensiError):
    """A file does not hold what it must hold, or does not belong to this base model."""
