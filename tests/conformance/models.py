"""Tiny random models in local folders, in place of the ones that PEFT's tests load from the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, DistilBertConfig, ElectraConfig, GPT2Config, LlamaConfig, OPTConfig, RobertaConfig


_SIZES = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
_WIDE = {**_SIZES, "intermediate_size": 64, "max_position_embeddings": 64}
_DISTIL = {"vocab_size": 99, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 64, "max_position_embeddings": 64}
ENCODERS = {
    "bert": BertConfig(**_WIDE),
    "roberta": RobertaConfig(**_WIDE),
    "electra": ElectraConfig(**_WIDE, embedding_size=16),
    "distilbert": DistilBertConfig(**_DISTIL),
}
DECODERS = {
    # Not called "llama": PEFT's tests skip merging for every method, by mistake, when they read that.
    "grouped": LlamaConfig(**_WIDE, num_key_value_heads=2, pad_token_id=0, eos_token_id=2),
    # GPT-2, whose real name makes PEFT's tests skip what its own methods can't do with `Conv1D`.
    "transposed": GPT2Config(
        vocab_size=99, n_embd=32, n_head=4, n_layer=2, n_positions=64, pad_token_id=0, eos_token_id=2
    ),
    "opt": OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=0),
}
_FOLDER = tempfile.TemporaryDirectory(prefix="peft-sensi-models-")  # gone when Python exits


def saved(auto_class: Any, name: str) -> str:
    """The path of a random model for `auto_class.from_pretrained`, which gives the same weights every time."""
    path = Path(_FOLDER.name) / auto_class.__name__ / name
    if not path.exists():
        torch.manual_seed(0)
        auto_class.from_config({**ENCODERS, **DECODERS}[name]).save_pretrained(path)
    return str(path)


class Blocks(nn.Module):
    """A model of no known family, of whose blocks neurons can be trimmed when it is told where. For custom tests."""

    layout = {"layer": "layers.*", "up": "up", "down": "down", "ffn_norm": "norm"}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(10, 32), "down": nn.Linear(32, 10), "norm": nn.LayerNorm(10)})
            for _ in range(2)
        )
        self.lin0 = nn.Linear(10, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        hidden = X.to(self.dtype) / 10
        for layer in self.layers:
            hidden = layer["norm"](hidden + layer["down"](layer["up"](hidden).relu()))
        return self.lin0(hidden).log_softmax(-1)
