"""A file goes in; its text comes out, unpacked and decoded, with a note about what was recognized."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..utils.errors import DataError


_UNPACK: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ": lzma.decompress,
}
TEXT_SUFFIXES = (".tsv", ".csv", ".txt", ".tab")
OFFICE = "a spreadsheet or document of an office program: save its table as .csv"
OFFICE_SUFFIXES = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers")
_OFFICE_FILES = {"xl/workbook.xml", "xl/workbook.bin", "content.xml", "word/document.xml", "Index/Document.iwa"}
# What is often saved or downloaded under the name of a text file. The beginning is in lower case.
_OTHER_FORMATS = {
    rb"\xd0\xcf\x11\xe0": OFFICE,
    rb"par1": "a Parquet file: let its name end in .parquet",
    rb"arrow1": "an Arrow file: let its name end in .arrow",
    rb"%pdf-": "a PDF file: save its table as .csv",
}
_NO_DATA = {
    rb"<!doctype html|<html[\s>]": "a web page, perhaps a login or an error instead of the file: download it again",
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`",
}
LATIN = ("cp1252", "latin-1")  # what is not Unicode is taken for one of these
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # hardly any text has these
_ACCENTS = re.compile(r"[^\x00-\x7f\xa0«»–—‘’“”…]+")  # letters with accents, and others, without punctuation
_NO_LETTER = re.compile(r"[\x80-\x84\x86-\x9f]")  # hardly any text in a Latin encoding has these
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\x00\x00": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


def suffix_of(path: Path) -> str:
    """The suffix of a file name in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in (".gz", ".bz2", ".xz", ".zip"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def read_text(path: Path, notes: list[str] | None = None, encoding: str | None = None) -> str:
    """The text of a file, unpacked and decoded. What is not UTF-8 is noted."""
    content = unpacked(path)
    _refuse(path, content, _NO_DATA | _OTHER_FORMATS)
    used = encoding or encoding_of(content)
    if encoding is None and used in LATIN and (line := _other_line(content)):
        raise DataError(
            f"{path} is in UTF-8, but not in line {line}: save the whole file in one encoding, or see --encoding."
        )
    try:
        text = content.decode(used)
    except LookupError:
        raise DataError(f"--encoding {encoding}: Python knows no encoding of this name.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {used} text ({error.reason} at byte {error.start}): see --encoding.") from None
    if len(_CONTROL.findall(text)) > max(2, len(text) // 100):  # a stray one or two are no reason to refuse a file
        raise DataError(f"{path} is not a text file, or not in {used}: save it as text, or see --encoding.")
    sample = ""
    if encoding is None and used in LATIN:
        words = [word for word in re.findall(r"(?:\w|[^\s\x00-\x7f])+", text) if not word.isascii()]
        sample = f", such as {max(words, key=len)[:30]!r}" if words else ""
        if not _is_latin(text):
            raise DataError(
                f"{path} is not in UTF-8, and looks wrong as {used}{sample}. Name its encoding with --encoding, such "
                f"as cp1251, shift_jis or gb18030; if {used} is right, name that."
            )
    if notes is not None and used not in ("utf-8", "utf-8-sig"):
        notes.append(f"{path.name} was read as {used} (--encoding){sample}")
    return text.removeprefix("\ufeff")


def _is_latin(text: str) -> bool:
    """Whether a text that was decoded as a Latin encoding can be one.

    In Cyrillic, Greek, Chinese and other encodings, most bytes above 127 are beside each other. In some of these, and
    in those of Central Europe, many of them stand for no letter in `LATIN`.
    """
    runs = _ACCENTS.findall(text)
    others, close = sum(map(len, runs)), sum(len(run) for run in runs if len(run) > 2)
    return 2 * close <= others and len(_NO_LETTER.findall(text)) <= max(2, others // 100)


def _refuse(path: Path, content: bytes, formats: dict[bytes, str]) -> None:
    """Raises `DataError` if a file begins as one of these formats does."""
    start = content[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for pattern, what in formats.items():
        if re.match(pattern, start):
            raise DataError(f"{path} is {what}.")


def unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    _refuse(path, content, _NO_DATA)
    try:
        for magic, unpack in _UNPACK.items():
            if content.startswith(magic):
                return unpack(content)
        if content.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                files = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
                if _OFFICE_FILES & {*files}:
                    raise DataError(f"{path} is {OFFICE}.")
                if len(files) != 1:
                    raise DataError(f"{path} holds {len(files)} files: unpack it and name the right one.")
                return archive.read(files[0])
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.") from None
    return content


def encoding_of(content: bytes) -> str:
    """UTF-8 if the bytes are that, UTF-16 if every second byte is zero, else the Latin encoding of Windows."""
    for mark, encoding in _MARKS.items():
        if content.startswith(mark):
            return encoding
    start = content[:4096]
    for offset, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(start) >= 4 and start[offset::2].count(0) > len(start) // 4:
            return encoding
    with suppress(UnicodeDecodeError):
        content.decode("utf-8")
        return "utf-8"
    for encoding in LATIN[:-1]:
        with suppress(UnicodeDecodeError):
            content.decode(encoding)
            return encoding
    return LATIN[-1]


def _other_line(content: bytes) -> int | None:
    """The first line that is not UTF-8, if more of the lines with other letters than ASCII are UTF-8 than are not.

    Such a file has parts of several sources. In one encoding, all of its lines cannot be read right.
    """
    wrong: list[int] = []
    right = 0
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.isascii():
            continue
        try:
            line.decode("utf-8")
            right += 1
        except UnicodeDecodeError:
            wrong.append(number)
    return wrong[0] if right > len(wrong) else None
