"""The errors of this package, and how to install it. It needs the standard library only.

The errors are also `ValueError`s, which PEFT raises for bad input.
"""

from importlib.metadata import PackageNotFoundError, metadata


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


def how_to_install(extra: str = "", options: str = "") -> str:
    """The shell command that installs this package, with an extra such as `onnx` and options such as `--no-deps`.

    All messages and cards get it here, because it depends on where the package can be found. It is not on the package
    index, so pip needs its repository: the URL `Repository` of the package's metadata, or else a clone.
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
