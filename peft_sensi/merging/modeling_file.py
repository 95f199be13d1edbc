"""The small modeling file in a merged folder, with which `trust_remote_code=True` loads it without this package."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel


_TEXT = '''"""A {architecture} of which attention heads and FFN neurons were removed; written by peft_sensi.

For `AutoModel...from_pretrained(folder, trust_remote_code=True)`. With peft_sensi installed,
`peft_sensi.load_merged(folder)` gives a plain {architecture} and checks everything it reads.
"""

import os

from torch import nn
from transformers import {architecture}, {config}


class Sensi{config}({config}):
    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Stock loaders look for another file, so none of them fills in random weights where widths differ.
        self.transformers_weights = self.peft_sensi["weights"]


class Sensi{architecture}({architecture}):
    config_class = Sensi{config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name, shape in config.peft_sensi["shapes"].items():
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            module._parameters[leaf] = nn.Parameter(module._parameters[leaf].new_empty(shape))
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = module.weight.shape
        for name, value in config.peft_sensi["attributes"].items():
            path, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(path), attribute, value)

    def save_pretrained(self, folder, *args, **kwargs):
        super().save_pretrained(folder, *args, **{{"max_shard_size": 2**62, **kwargs}})
        os.replace(os.path.join(folder, "model.safetensors"), os.path.join(folder, self.config.peft_sensi["weights"]))
'''


def modeling_file(cls: type[PreTrainedModel]) -> tuple[str, str]:
    """Name and text of the file for a class of Transformers. It has no widths in it, those are in the config."""
    assert cls.config_class is not None  # Transformers' abstract classes have none
    name = f"modeling_sensi_{cls.__name__.lower()}.py"
    return name, _TEXT.format(architecture=cls.__name__, config=cls.config_class.__name__)


def auto_map(cls: type[PreTrainedModel], file_name: str) -> dict[str, str]:
    """Which class of the file each of Transformers' auto classes takes."""
    assert cls.config_class is not None
    module = file_name.removesuffix(".py")
    entries = {"AutoConfig": f"{module}.Sensi{cls.config_class.__name__}"}
    for name in dir(transformers):
        if name.startswith("AutoModel"):
            mapping: Any = getattr(getattr(transformers, name), "_model_mapping", None)
            found = mapping.get(cls.config_class, ()) if mapping is not None else ()
            if cls in (found if isinstance(found, (tuple, list)) else (found,)):
                entries[name] = f"{module}.Sensi{cls.__name__}"
    return entries
