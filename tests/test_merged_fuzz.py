"""Hundreds of changed merged folders: each is refused with a clear error, or gives the model that was saved."""

from __future__ import annotations

import collections
import json
import random
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from test_merged import trained_llama, weights_file, wrapped_decoder
from tiny import logits, trained

from peft_sensi import SensiLoadError, load_merged, save_merged
from peft_sensi.merging.hashes import HASH_KEY, hashes_of


pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGVTALRM"), reason="needs POSIX timers")
SECONDS = 5.0  # of processor time for one folder
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 1000, 10**6, 10**9, 10**18, 10**400, 0.5, 1e-3, 1e30, "", "x", "gelu", "relu",
    "bert", "gpt2", "float16", "sdpa", "a" * 3000, [], [1], [[]], {}, {"a": 1}, "os.system", "../model.safetensors",
]  # fmt: skip
NAMES = (
    "is_decoder", "num_labels", "tie_word_embeddings", "num_groups", "n_layers", "chunk_size_feed_forward",
    "torchscript", "pruned_heads", "num_experts", "num_local_experts", "attn_implementation",
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8)
HASHES = ("kept", "removed", "made again")


class Hang(BaseException):
    pass


def change_config(draw: random.Random, config: dict[str, Any]) -> None:
    """Changes, removes or adds one field, at any depth."""
    place: Any = config
    while True:
        inner = [
            v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, (dict, list)) and v
        ]
        if not inner or draw.random() < 0.6:
            break
        place = draw.choice(inner)
    key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
    if isinstance(place, dict) and draw.random() < 0.2:
        del place[key]
    elif draw.random() < 0.3 and type(place[key]) in (int, float):
        place[key] = place[key] * draw.choice((2, 10, 1000, 10**6, -1, 0.5))
    elif isinstance(place, dict) and draw.random() < 0.15:
        place[draw.choice(NAMES)] = draw.choice(ODD)
    else:
        place[key] = draw.choice(ODD)


def change_tensors(draw: random.Random, path: Path) -> None:
    """Drops, renames, doubles, reshapes, converts or spoils one tensor, or damages the file itself."""
    tensors = load(path.read_bytes())
    name = draw.choice(sorted(tensors))
    tensor, kind = tensors[name], draw.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name + draw.choice(("x", ".weight", ""))[:7] or "x"] = tensors.pop(name)
    elif kind == 2:
        tensors["extra"] = tensor.clone()
    elif kind == 3:
        tensors[name] = tensor.flatten()[: draw.randrange(tensor.numel())].clone()
    elif kind == 4:
        tensors[name] = tensor.to(
            draw.choice((torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8))
        )
    elif kind == 5:
        tensors[name] = tensor.clone().fill_(draw.choice((float("nan"), float("inf"))))
    elif kind == 6:
        tensors[name] = tensor[None].clone()
    if kind < 7:
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        data = bytearray(path.read_bytes())
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(min(len(data), 4000))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), len(data) // 2, 100))])


def mutate(seed: int, folder: Path) -> str:
    """One or two changes. Returns what becomes of the hash."""
    draw = random.Random(seed)
    config = json.loads((folder / "config.json").read_text())
    kept = draw.choice(HASHES)
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.6:
            change_config(draw, config)
        else:
            try:
                change_tensors(draw, weights_file(folder))
            except Exception:  # an earlier change left no tensors
                pass
    if kept != "kept":
        config.pop(HASH_KEY, None)
    if kept == "made again":  # by somebody who means harm
        try:
            config[HASH_KEY] = hashes_of(json.loads(json.dumps(config)), weights_file(folder))
        except ValueError:
            pass
    (folder / "config.json").write_text(json.dumps(config))
    return kept


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    place = tmp_path_factory.mktemp("originals")
    models = {
        "record": trained("bert", budget=0.5, score="random"),
        "plain": trained("bert", budget={"trainable": 0.1}),
        "decoder": trained_llama(budget=0.5, score="random"),
        "published names": wrapped_decoder("mixtral", widths="uniform"),
    }
    for form, model in models.items():
        save_merged(model, place / form)
    return {form: (place / form, logits(load_merged(place / form))) for form in models}


def outcome(load: Any, errors: Any, folder: Path, expected: torch.Tensor) -> str:
    def stop(*_: Any) -> None:
        raise Hang

    old = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = load(folder)
            except errors:
                return "refused"
            except Exception as error:
                return f"raw error {type(error).__name__}: {error}"
            try:
                found = logits(model)
            except Exception as error:
                return f"does not run: {type(error).__name__}: {error}"
        if not torch.isfinite(found).all():
            return "not finite"
        return "equal" if found.shape == expected.shape and torch.equal(found, expected) else "different"
    except Hang:
        return "hang"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)


def run_seeds(seeds: range, originals: dict, remote: Any, place: Path) -> collections.Counter:
    """The outcomes, by form and by what became of the hash. Fails at the end if some are bad."""
    counts: collections.Counter = collections.Counter()
    bad = []
    for seed in seeds:
        form = sorted(originals)[seed % len(originals)]
        original, expected = originals[form]
        folder = shutil.copytree(original, place / f"f{seed}")
        kept = mutate(seed, folder)
        loaders = [("ours", load_merged, SensiLoadError)]
        if form == "record" and kept == "kept":
            loaders.append(("remote", remote, Exception))
        for name, loader, errors in loaders:
            found = outcome(loader, errors, folder, expected)
            counts[name, kept, found.split(":")[0]] += 1
            # Who removes the hash, or makes it again, may describe another model, even one that does not run.
            if found not in ("refused", "equal") and (kept == "kept" or found.startswith(("raw error", "hang"))):
                bad.append(f"{seed} {form} {name}, hash {kept}: {found:.300}")
        shutil.rmtree(folder)
    print(dict(counts))
    assert not bad, "\n".join(bad)
    return counts


def test_changed_folders(originals, remote, tmp_path):
    counts = run_seeds(range(120), originals, remote, tmp_path)
    assert counts["ours", "kept", "refused"] > 20 and counts["remote", "kept", "refused"] > 3


@pytest.mark.slow
def test_many_changed_folders(originals, remote, tmp_path):
    run_seeds(range(1000, 2200), originals, remote, tmp_path)
