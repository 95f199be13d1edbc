"""A folder goes in; the files of it that may leave this machine come out, without what is private in them.

Only files with known names are taken, because a folder may hold anything: credentials, notes, optimizer states. Paths
of this machine, the command line and the names of folders are removed from texts and from JSON files.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import constants

from ..merging.hashes import HASH_KEY, hashes_of
from ..utils.errors import SensiError
from ..utils.files import read_json_object
from ..utils.formatting import size_of
from ..utils.hub_names import is_repo
from .pretrained import TOKENIZER_CONFIG, TOKENIZER_FILES
from .saved import CONFIG, METRICS


_TEXTS = (".md", ".jinja")
# JSON files in which strings are names and settings. Those with tokens, such as `tokenizer.json`, stay as they are.
_SCRUBBED = (METRICS, TOKENIZER_CONFIG, "special_tokens_map.json", "config.json", "generation_config.json")
# Strings under these keys are the user's own labels and tokens, whatever they look like.
_NAMES = re.compile(r"classes|labels?|id2label|label2id|added_tokens_decoder|special_tokens|\w+_tokens?|chat_template")
# What only concerns the machine that trained.
_PRIVATE_KEYS = {METRICS: ("command", "folder"), "config.json": ("_name_or_path",)}
# Personal folders of other machines, for example in a text that was written elsewhere.
_PERSONAL = r"/(?:home|Users)/[^\s/\"'`)]+|[A-Za-z]:\\+Users\\+[^\s\\\"'`)]+"


@dataclass(frozen=True)
class Upload:
    """What would be uploaded.

    Attributes:
        files: The path of each file on this machine, by its name in the repository.
        left_out: Names of other files and folders that lie beside them.
    """

    files: dict[str, Path]
    left_out: list[str]

    def lines(self) -> list[str]:
        """One line for each file, and one for what stays here."""
        sizes = {name: size_of(path.stat().st_size) for name, path in self.files.items()}
        width = max(map(len, sizes), default=0)
        lines = [f"{name:{width}}  {size}" for name, size in sizes.items()]
        return [*lines, *([f"not uploaded: {', '.join(self.left_out)}"] if self.left_out else [])]


def collect(folder: Path, names: Iterable[str], private_paths: Iterable[str], target: Path) -> Upload:
    """The files with these names, if they exist. Those that had to be changed are copies in `target`.

    `private_paths` are further paths that no text may contain, such as the base model's folder.

    A link to a file outside of the folder is left out: what it leads to was not saved with the model, and nobody sees
    that in the folder. Links of the Hub's cache are followed.

    Raises:
        SensiError: A file that should be JSON or UTF-8 is not, or the header of a weights file contains a local path.
    """
    paths = local_paths(folder, *private_paths)
    files: dict[str, Path] = {}
    for name in names:
        path = folder / name
        is_part_of_tokenizer = name in TOKENIZER_FILES and name != TOKENIZER_CONFIG
        if (
            not path.is_file()
            or leads_outside(path)
            or (is_part_of_tokenizer and not (folder / TOKENIZER_CONFIG).is_file())
        ):
            continue
        files[name] = path
        if name in _SCRUBBED:
            values = scrubbed(read_json_object(path), paths)
            for key in _PRIVATE_KEYS.get(name, ()):
                values.pop(key, None)
            files[name] = _write(target / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        elif path.suffix in _TEXTS:
            files[name] = _write(target / name, without_paths(_read(path), paths))
        elif path.suffix == ".safetensors":
            _check_header(path, paths)
    others = [path for path in folder.iterdir() if path.name not in files]
    notes = {path: " (a link to another place)" if leads_outside(path) else "/" * path.is_dir() for path in others}
    return Upload(files, sorted(path.name + note for path, note in notes.items()))


def leads_outside(path: Path) -> bool:
    """Whether a file is a link to a file that is neither in its folder nor in a cache of the Hub."""
    target, folder = path.resolve(), path.parent.resolve()
    caches = [Path(constants.HF_HUB_CACHE).resolve()]
    if folder.parent.name == "snapshots":  # of a cache in another place
        caches.append(folder.parent.parent / "blobs")
    return path.is_symlink() and not any(target.is_relative_to(place) for place in (folder, *caches))


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raises `SensiError` if a file without which an upload is of no use is a link to another place."""
    for name in names:
        if leads_outside(folder / name):
            raise SensiError(
                f"{folder / name} is a link to {(folder / name).resolve()}, and links to other places are not "
                f"uploaded: copy the file into the folder."
            )


def public_config(folder: Path, base: str | None, target: Path) -> Path:
    """A copy of `adapter_config.json` that names the base by its name on the Hub, or not at all.

    `base` replaces the name in the config, if it is a name on the Hub. A folder of this machine is left out: nobody
    else has it, and its last part could be the name of somebody else's model.
    """
    values = read_json_object(folder / CONFIG)
    names = (name for name in (base, values.get("base_model_name_or_path")) if name and is_repo(str(name)))
    values["base_model_name_or_path"] = next(names, None)
    return _write(target / CONFIG, json.dumps(values, indent=2, sort_keys=True))


def renew_hash(config: Path, weights: Path) -> None:
    """Gives the `config.json` of a merged model the hash of what is left in it, if it had one."""
    values = read_json_object(config)
    if HASH_KEY in values:
        values[HASH_KEY] = hashes_of(values, weights)
        _write(config, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def local_paths(*more: str | Path) -> list[str]:
    """The paths that no uploaded text may contain: of this user, this process and of the given folders."""
    places = [Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *map(Path, more)]
    found = {str(form) for place in places for form in (place.absolute(), place.resolve())}
    # Longest first, so that the shortest name is left. The root of the file system says nothing.
    return sorted((path for path in found if len(Path(path).parts) > 1), key=len, reverse=True)


def scrubbed(value: Any, paths: list[str]) -> Any:
    """A JSON value whose strings and keys have no local paths: of a path, only the last part is left."""
    if isinstance(value, dict):
        return {
            scrubbed(key, paths): v if _NAMES.fullmatch(str(key)) else scrubbed(v, paths) for key, v in value.items()
        }
    if isinstance(value, list):
        return [scrubbed(item, paths) for item in value]
    if not isinstance(value, str):
        return value
    if _is_path(value):
        return last_part(value)
    return without_paths(value, paths)


def without_paths(text: str, paths: list[str]) -> str:
    """The text with `path/to/NAME` in the place of local paths."""
    known = "|".join([*map(re.escape, paths), _PERSONAL])
    pattern = re.compile(rf"(?<![\w.])(?:file://)?(?:{known})(?![\w-])(?P<rest>[^\s\"'`)\]<>]*)")

    def shorten(match: re.Match) -> str:
        name = last_part(match["rest"])
        return f"path/to/{name}" if name else "path/to"

    return pattern.sub(shorten, text)


def last_part(path: str) -> str:
    """The name of a file or folder, also if the path is of another operating system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _is_path(text: str) -> bool:
    """Whether the whole text is the path of a file or folder, here or on another machine."""
    if "\n" in text or len(text) > 4096 or not re.search(r"[/\\]", text):
        return False
    absolute = PurePosixPath(text).is_absolute() and len(PurePosixPath(text).parts) > 2
    relative = text.startswith(("~", "./", "../", ".\\", "..\\", "file:"))
    exists = Path(text).name != "" and Path(text).exists()
    return absolute or relative or exists or PureWindowsPath(text).drive != ""


def _check_header(path: Path, paths: list[str]) -> None:
    """Raises `SensiError` if the free text in the header of a safetensors file contains a local path."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    texts = header.get("__metadata__", {})
    if scrubbed(texts, paths) != texts:
        raise SensiError(f"The header of {path} contains a path of this machine in `__metadata__`: save it again.")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SensiError(f"{path} is not UTF-8 ({error}): save it as UTF-8.") from None


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
