"""The errors of this package. They are also `ValueError`s, which PEFT raises for bad input."""

# The packages without which only `peft-sensi measure FOLDER` works (see `cli.device`).
TRAINING_STACK = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "scipy", "tqdm")


class SensiError(ValueError):
    """A request cannot be carried out. The message says why, and what to do instead."""


class BudgetError(SensiError):
    """The budget is malformed, or no plan satisfies it."""


class AnatomyError(SensiError):
    """The model has no units of the requested kind."""


class CalibrationError(SensiError):
    """The calibration data cannot be used: it is empty, has no labels, or its loss is not finite."""


class SensiLoadError(SensiError):
    """A file is damaged, has unexpected content, or does not belong to this base model."""
