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


class MissingFieldError(SensiError, AttributeError):
    """Other libraries ask for a field of LoRA, which this method does not have. `getattr` with a default works."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"SensiConfig has no {name!r}, with which LoRA trains new tokens. Here, the tokens of the calibration "
            f"data are trained, with `also_train=['tokens']` if there are other limits. So leave out TRL's "
            f"`chat_template_path`: add the tokens and resize the model before the wrap (`trl.clone_chat_template` "
            f"does both), and let `calibration` contain the new tokens."
        )
