"""A model class goes in; a modeling file for `trust_remote_code=True` comes out. With it in the folder, Transformers
loads a merged model without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel


_TEXT = '''"""A {architecture} without some of its attention heads and FFN neurons; written by peft_sensi.

Load it with `AutoModel...from_pretrained(folder, trust_remote_code=True)`. If peft_sensi is installed,
`peft_sensi.load_merged(folder)` returns a plain {architecture} and checks everything that it reads.
"""

import os

from torch import nn
from transformers import {architecture}, {config}


class Sensi{config}({config}):
    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # The weights file has a name of its own. Loaders that ignore this class do not find it and raise, instead of
        # filling in random weights where widths differ.
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


def write_modeling_file(cls: type[PreTrainedModel], folder: Path) -> dict[str, str]:
    """Writes the file for a class of Transformers. It contains no widths: the config does.

    Returns the config's `auto_map`: for each of Transformers' auto classes that knows `cls`, the class in the file.
    """
    assert cls.config_class is not None  # Transformers' abstract classes have none
    module, config = f"modeling_sensi_{cls.__name__.lower()}", cls.config_class.__name__
    text = _TEXT.format(architecture=cls.__name__, config=config)
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    entries = {"AutoConfig": f"{module}.Sensi{config}"}
    for name in dir(transformers):
        if name.startswith("AutoModel"):
            mapping: Any = getattr(getattr(transformers, name), "_model_mapping", None)
            found = mapping.get(cls.config_class, ()) if mapping is not None else ()
            if cls in (found if isinstance(found, (tuple, list)) else (found,)):
                entries[name] = f"{module}.Sensi{cls.__name__}"
    return entries
