"""A Hub cache for tests: models and data sets that `from_pretrained` and `load_dataset` find by name, offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


COMMIT = "0" * 40


def add_model(cache: Path, name: str, folder: Path) -> None:
    """Puts the model in `folder` into the cache of huggingface_hub (its folder `hub`), as a download of `name`."""
    place = cache / "hub" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT)


def add_dataset(cache: Path, name: str, splits: dict[str, list[dict]]) -> None:
    """Puts rows into the cache of datasets (its folder `datasets`), as a download of `name` by `load_dataset`."""
    from datasets import load_dataset

    files = {}
    owner, _, short = name.partition("/")
    for split, rows in splits.items():
        files[split] = str(cache / f"{short}-{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_dataset("json", data_files=files, cache_dir=str(cache / "made" / short))
    (made,) = (path.parent for path in (cache / "made" / short).rglob("dataset_info.json"))
    place = cache / "datasets" / f"{owner}___{short}" / "default" / "0.0.0" / COMMIT
    shutil.copytree(made, place)
    for file in place.glob("json-*.arrow"):
        file.rename(place / file.name.replace("json-", f"{short}-", 1))
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"builder_name": "parquet", "dataset_name": short, "config_name": "default"}
    (place / "dataset_info.json").write_text(json.dumps(info))


def use(cache: Path, monkeypatch) -> None:
    """Lets the libraries look into this cache, and nowhere else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache / "datasets")
