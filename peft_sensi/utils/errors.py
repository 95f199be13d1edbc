"""The errors of this package, and how to install it. It needs the standard library only.

The errors are also `ValueError`s, which PEFT raises for bad input.
"""

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, metadata


# The packages without which only `peft-sensi measure FOLDER` works (see `cli.device`).
TRAINING_STACK = ("torch", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub", "scipy", "tqdm")


class SensiError(ValueError):
    """A request cannot be carried out. The message says why, and what to do instead.

    If `advice` is given, it is the part of the message about what to do, so that the commands can replace it by advice
    about their options. `problem` is then the part before it.
    """

    def __init__(self, problem: str = "", advice: str = "") -> None:
        super().__init__(f"{problem} {advice}".rstrip())
        self.problem, self.advice = problem, advice


class BudgetError(SensiError):
    """The budget is malformed, or no plan satisfies it.

    `limits` names the limits that are too small, if the advice is to raise them. `settings` names the settings of
    `SensiConfig` that would have to be others.
    """

    def __init__(
        self, problem: str = "", advice: str = "", limits: Iterable[str] = (), settings: Iterable[str] = ()
    ) -> None:
        super().__init__(problem, advice)
        self.limits, self.settings = tuple(limits), tuple(settings)


class AnatomyError(SensiError):
    """The model has no units of the requested kind."""


class CalibrationError(SensiError):
    """The calibration data cannot be used: it is empty, has no labels, or its loss is not finite."""


def not_finite(what: str) -> CalibrationError:
    """The error for a loss, a gradient or a score that is NaN or infinite. `what` says which one, and where."""
    return CalibrationError(
        f"{what}: the calibration data or the model is broken. Look for NaN in this batch and in the weights, and "
        f"load a float16 model as bfloat16 or float32, because float16 overflows."
    )


class SensiLoadError(SensiError):
    """A file is damaged, has unexpected content, or does not belong to this base model."""


class OtherBaseError(SensiLoadError):
    """An adapter does not belong to this base model."""


class DataError(SensiError):
    """A file of labeled rows cannot be read, or does not contain what the options say."""


# What to do about a file whose content cannot be right.
DAMAGED = "The file is damaged or was edited: take it from its source again."
NOT_FINITE = "the training has failed, or the file is damaged. Train again, or take the file from its source again."


class NoTokenIndicesError(SensiError, AttributeError):
    """TRL sets a field of LoRA that this method does not have. `getattr` with a default works."""

    def __init__(self) -> None:
        super().__init__(
            "SensiConfig has no 'trainable_token_indices', with which LoRA trains new tokens. Here, the tokens of the "
            "calibration data are trained, with `also_train=['tokens']` if there are other limits. So leave out TRL's "
            "`chat_template_path`: add the tokens and resize the model before the wrap (`trl.clone_chat_template` "
            "does both), and let `calibration` contain the new tokens."
        )


def how_to_install(extra: str = "", options: str = "") -> str:
    """The shell command that installs this package, with an extra such as `onnx` and options such as `--no-deps`.

    All messages and cards about this package's extras get it here, because it depends on where the package can be
    found. It is not on the package index, so pip needs its repository: the URL `Repository` of the package's metadata,
    or else a clone.
    """
    words = f"pip install {options} ".rstrip() + " "
    extra = f"[{extra}]" if extra else ""
    try:
        links = metadata("peft-sensi").get_all("Project-URL") or []
    except PackageNotFoundError:  # the sources are used without an installation
        links = []
    urls = [link.partition(",")[2].strip() for link in links if link.lower().startswith("repository,")]
    if urls:
        return f"{words}'peft-sensi{extra} @ git+{urls[0]}'"
    return f"{words}'.{extra}'  # in a clone of peft_sensi's repository"


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its class if it has no text."""
    return str(error).strip().partition("\n")[0].rstrip() or type(error).__name__


def number_of_system_error(error: BaseException) -> int | None:
    """The number of the operating system's error that stopped something, such as `errno.ENOSPC`; `None` if none did.

    The package `tokenizers`, which is written in Rust, raises a bare `Exception` with the number in its text.
    """
    in_text = re.search(r"\(os error (\d+)\)", str(error))
    return getattr(error, "errno", None) or (int(in_text[1]) if in_text else None)
