"""The names of files, folders and data sets go in; their rows come out, as parts for training and for validation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..utils.errors import DataError
from ..utils.hub_names import not_found, reading
from . import answers, word_files
from .columns import usual_label_columns
from .encodings import TEXT_SUFFIXES, read_text, suffix_of
from .labels import is_hidden, is_missing
from .options import Options
from .reading import SUFFIXES, Format, flat_rows, parse_json, read_rows, with_texts


SPLITS = {
    name: re.compile(rf"(^|[^a-z])({words})([^a-z]|$)", re.IGNORECASE)
    for name, words in {
        "train": "train|training",
        "validation": "validation|valid|val|dev|eval|evaluation",
        "test": "test",
    }.items()
}


# What the data are for. An evaluation and a prediction get all of their rows as `Source.train`.
Purpose = Literal["training", "evaluation", "prediction"]


@dataclass
class Part:
    """The rows of one file or split.

    `form` says what the rows are: `"table"` (columns and values), `"words"` (sentences with tags) or `"answers"`
    (questions about texts). `name` is for messages.
    """

    name: str
    form: str
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    sha256: str = ""


@dataclass
class Source:
    """All parts of the data. `validation` is empty if the source has no split for it, and `given` names the source."""

    train: list[Part]
    validation: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    given: list[str | Path] = field(default_factory=list)


def read_source(
    data: str | Path | Iterable[str | Path],
    kind: str | None,
    options: Options,
    purpose: Purpose = "training",
    beside: str | Path | Iterable[str | Path] | None = None,
) -> Source:
    """Reads a file, several files, a folder of files, a saved `datasets` folder, or a data set of the Hub.

    Of a folder or a data set with several splits, an evaluation takes the rows for validation, or else those for a
    test if they have labels, or else the training rows, with a note. A prediction takes all files of a folder, in the
    order of their names; for a prediction, files of words need no tags, and those that they have are not read.
    `beside` are other data that the options are about, too.

    Raises:
        DataError: Says which of them cannot be read, and why, or which option about the format is about none of them.
    """
    names, others = ([given] if isinstance(given, str | Path) else list(given or ()) for given in (data, beside))
    _check_format([*names, *others], kind, options)
    found = Source([], given=names)
    for name in names:
        source = _read_one(name, kind, options, purpose)
        found.train += source.train
        found.validation += source.validation
        found.notes += source.notes
    return found


def _read_one(name: str | Path, kind: str | None, options: Options, purpose: Purpose) -> Source:
    path = Path(name)
    match _place_of(path):
        case "saved":
            return _of_datasets(str(name), _load_from_disk(path), options, purpose)
        case "folder":
            return _read_folder(path, kind, options, purpose)
        case "hub":
            return _of_datasets(str(name), _load_from_hub(str(name), options), options, purpose)
    return Source([read_part(path, kind, options, labeled=purpose != "prediction")])


def _place_of(path: Path) -> str:
    """What the path of data names: a folder that `datasets` has saved, a folder of files, a data set, or a file."""
    if path.is_dir():
        is_saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
        return "saved" if is_saved else "folder"
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) and suffix_of(path) not in SUFFIXES
    return "hub" if is_name and not path.exists() else "file"


def _check_format(names: Sequence[str | Path], kind: str | None, options: Options) -> None:
    """Raises `DataError` for an option about the format that is about none of the data."""
    place_of = {path: _place_of(path) for path in map(Path, names)}
    places = {*place_of.values()}
    files = [path for path, place in place_of.items() if place == "file"]
    files += [file for path, place in place_of.items() if place == "folder" for file in path.iterdir()]
    suffixes = {suffix_of(file) for file in files}
    tables = set() if kind == "words" else suffixes & {*TEXT_SUFFIXES}
    about = {
        "--subset": (options.subset is not None, "hub" in places, "data sets of the Hub"),
        "--split": (options.split is not None, bool(places & {"hub", "saved"}), "data sets"),
        "--encoding": (options.encoding is not None, bool(suffixes - {".parquet", ".arrow"}), "text files"),
        "--delimiter": (options.delimiter is not None, bool(tables), f"tables ({', '.join(TEXT_SUFFIXES)})"),
        "--quotes": (options.quotes is not None, bool(tables), f"tables ({', '.join(TEXT_SUFFIXES)})"),
    }
    for option, (is_given, is_used, what) in about.items():
        if is_given and not is_used:
            raise DataError(f"{option} is about {what}, and there are none here: leave it out.")


def read_part(path: Path, kind: str | None, options: Options, labeled: bool = True) -> Part:
    """The rows of one file. Without `labeled`, words need no tags, and cells are kept as they are."""
    form = Format(options.encoding, options.delimiter, options.quotes)
    suffix = suffix_of(path)
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    recognized: list[str] = []
    is_conll = suffix in (".conll", ".iob", ".bio")
    if kind == "words" and suffix in word_files.CONLL_SUFFIXES and not is_conll:
        header = read_text(path, encoding=options.encoding).partition("\n")[0]
        is_conll = not word_files.is_word_header(re.split(r"[\t,;|]", header))
    if is_conll:
        label = options.label_columns()
        token, tag = word_files.column_numbers(options.text_column, label[0] if label else None)
        rows = word_files.read_conll(path, token, tag if labeled else None, options.encoding, recognized)
        return Part(str(path), "words", rows, recognized, content)
    if suffix in (".json", ".jsonl", ".ndjson"):
        try:
            value = parse_json(read_text(path, recognized, options.encoding))
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read as {suffix}: {str(error).rstrip('.')}.") from None
        if answers.is_squad(value) or (kind == "answers" and suffix == ".json" and isinstance(value, dict)):
            rows, notes = answers.from_squad(path, value, labeled)
            return Part(str(path), "answers", rows, [*recognized, *notes], content)
    # The cells of texts to predict are written again, as they are.
    table = read_rows(path, form, as_is=not labeled and kind == "text")
    return Part(str(path), "table", table.rows, table.notes, content)


def _read_folder(folder: Path, kind: str | None, options: Options, purpose: Purpose) -> Source:
    files = sorted(path for path in folder.iterdir() if path.is_file() and suffix_of(path) in SUFFIXES)
    if not files:
        raise DataError(f"{folder} has no data files ({', '.join(SUFFIXES[:8])}) in it.")

    def read(paths: list[Path]) -> list[Part]:
        return [read_part(path, kind, options, labeled=purpose != "prediction") for path in paths]

    if purpose == "prediction":
        return Source(read(files), [], [f"{folder}: rows are in {', '.join(path.name for path in files)}"])
    split: dict[str, list[Path]] = {
        name: [path for path in files if pattern.search(path.name)] for name, pattern in SPLITS.items()
    }
    if both := {*split["train"]} & {*split["validation"]}:  # such as train_dev.csv
        name = "train" if {*split["train"]} - both else "validation"
        split[name] = [path for path in split[name] if path not in both]
    chosen = split["train"] or [path for path in files if path not in split["validation"] + split["test"]]
    if purpose == "evaluation":
        places = {**split, "train": chosen}
        return _to_measure(str(folder), {place: partial(read, paths) for place, paths in places.items()}, options)
    if not chosen:
        raise DataError(f"{folder} has no file for training: name the file itself with --data.")
    names = ", ".join(path.name for path in chosen)
    notes = [f"{folder}: training rows are in {names}"]
    if split["validation"]:
        notes.append(f"{folder}: validation rows are in {', '.join(path.name for path in split['validation'])}")
    used = {*chosen, *split["validation"]}
    if left := [path.name for path in files if path not in used]:
        notes.append(f"{folder}: not read: {', '.join(left)} (--data or --validation with the path of a file)")
    return Source(read(chosen), read(split["validation"]), notes)


def _to_measure(name: str, places: Mapping[str, Callable[[], list[Part]]], options: Options) -> Source:
    """The rows for an evaluation: those for validation, or else those for a test if they have labels, or else all
    others, such as the training rows. The functions read them."""
    for place in ("validation", "test", "train"):
        try:
            parts = places[place]()
        except DataError:  # words without tags, for example
            if place != "test":
                raise
            continue
        if parts and (place == "train" or all(_has_labels(part, options) for part in parts)):
            names = [Path(part.name).name for part in parts]
            note = f"{name}: measured are the rows of {', '.join(names)}"
            if place == "train" and any(map(SPLITS["train"].search, names)):
                note += "; a model that was trained on them does better on them than on others"
            return Source(parts, [], [note])
    raise DataError(f"{name} has no rows with labels: name the file itself.")


def _has_labels(part: Part, options: Options) -> bool:
    """Whether the rows of a table have a label; those of words and answers have been read with theirs."""
    if part.form != "table" or not part.rows:
        return part.form != "table"
    # The options may name the columns of the training, and these rows have others.
    named = [column for column in options.label_columns() if column in part.rows[0]]
    columns = named or usual_label_columns(part.rows)
    values = [row.get(column) for row in part.rows for column in columns]
    return not all(is_missing(value, numbers=False) or is_hidden(value) for value in values)


def _load_from_disk(folder: Path) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} cannot be read as a folder of `datasets`: {error}.") from None


def _load_from_hub(name: str, options: Options) -> Any:
    import datasets

    try:
        with reading(name):
            return datasets.load_dataset(name, options.subset, split=None)
    except Exception as error:  # the classes of network errors depend on the Hub library's HTTP client
        raise DataError(not_found(name, error, "file or folder")) from None


def _of_datasets(name: str, found: Any, options: Options, purpose: Purpose) -> Source:
    """The rows of a `Dataset` or `DatasetDict`."""
    splits: dict[str, Any] = dict(found) if isinstance(found, dict) else {"train": found}
    wanted = options.split or ("train" if "train" in splits else next(iter(splits)))
    if wanted not in splits:
        raise DataError(f"{name} has no split {wanted!r}; it has {', '.join(splits)}. See --split.")

    def read(split: str | None) -> list[Part]:
        if split is None:
            return []
        return [Part(f"{name} ({split})", "table", rows := rows_of(splits[split]), [], digest(rows))]

    others = {kind: next((s for s in splits if SPLITS[kind].search(s) and s != wanted), None)
              for kind in ("validation", "test")}  # fmt: skip
    if purpose == "evaluation" and options.split is None and len(splits) > 1:
        places = {**others, "train": wanted}
        return _to_measure(name, {place: partial(read, split) for place, split in places.items()}, options)
    if purpose != "training":
        return Source(read(wanted), [], [f"{name}: split {wanted} (--split)"])
    held = others["validation"]
    notes = [f"{name}: split {wanted} for training" + (f", {held} for validation" if held else "") + " (--split)"]
    return Source(read(wanted), read(held), notes)


def rows_of(dataset: Any) -> list[dict[str, Any]]:
    """The rows of a `Dataset`, with the names of classes instead of their numbers. A hidden label (-1) is `None`."""
    names: dict[str, Sequence[str]] = {}
    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if (found := getattr(inner, "names", None)) is not None:
            names[column] = found
    rows = [with_texts(row) for row in dataset.to_list()]
    for row in rows:
        for column, classes in names.items():
            value = row[column]
            several = isinstance(value, list)
            found = [classes[i] if i is not None and i >= 0 else None for i in (value if several else [value])]
            row[column] = found if several else found[0]
    return flat_rows(rows)


def digest(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of rows that are not from one file."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
