"""Captions as people write them down: tables, JSON, lists of files, and what their columns are called."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

from mindalle.data.names import is_picture
from mindalle.data.samples import clean_captions

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".txt")
"""Suffixes of files that name pictures, most of them with captions."""

FILE_FIELDS = (
    *("file", "image", "file_name", "filename", "path", "filepath", "file_path", "image_path", "image_file"),
    *("image_name", "img", "img_path", "picture", "photo"),
)
CAPTION_FIELDS = (
    *("captions", "caption", "text", "texts", "prompt", "prompts", "title", "description", "comment"),
    *("sentence", "sentences", "alt_text"),
)
DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class Fields:
    """What the user calls the columns; None = whichever of the known names is there."""

    image: str | None = None  # of picture files
    caption: str | None = None  # of captions

    def file_of(self, row: Mapping[str, object]) -> object:
        """The name of the picture that a row is about."""
        return _field(row, FILE_FIELDS if self.image is None else (self.image,))

    def captions_of(self, row: Mapping[str, object]) -> tuple[str, ...]:
        """The captions of a row of a table."""
        return clean_captions(
            _listed(_field(row, CAPTION_FIELDS if self.caption is None else (self.caption,)))
        )

    def captions_in(self, metadata: object) -> tuple[str, ...]:
        """The captions of a picture's own JSON; () if it is about other things.

        Raises:
            ValueError: if it is no object, or its captions are no text.
        """
        if not isinstance(metadata, dict):
            raise ValueError(f"its JSON must be an object, got {metadata!r:.80}")
        names = CAPTION_FIELDS if self.caption is None else (self.caption,)
        name = _find(metadata, names)
        return () if name is None else clean_captions(metadata[name])


def read_captions(path: Path, fields: Fields) -> dict[str, tuple[str, ...]]:
    """The captions of each picture that a file names; several lines for one add up.

    Args:
        path: of a table (.csv, .tsv, .txt), of JSON lines, or of JSON: a list of objects, an object of
            captions by file, or COCO's annotations; a .txt may have a file, or a file and a caption, a line.
        fields: what the columns are called.

    Raises:
        ValueError: names the file and the line that cannot be understood.
    """
    captions: dict[str, tuple[str, ...]] = {}
    lines = _Lines(path)
    rows = {".jsonl": _json_lines, ".json": _json_rows, ".tsv": _tsv_rows, ".txt": _text_rows}
    try:
        for row in rows.get(path.suffix.lower(), _table_rows)(lines):
            named, texts = fields.file_of(row), fields.captions_of(row)
            # the user's own list may name pictures anywhere; what came with the pictures may not
            is_list = path.suffix.lower() == ".txt" and path.name != "captions.txt" and not texts
            file = _checked(named, may_be_anywhere=is_list)
            captions[file] = captions.get(file, ()) + texts
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{lines.number}: {error}") from error
    return captions


def is_caption_list(path: Path) -> bool:
    """Whether a .txt file names pictures, rather than being the caption of one."""
    try:
        first = next(iter(_Lines(path)), "")
    except (OSError, ValueError):
        return False
    return _is_header(first) or _file_and_caption(first) is not None


class _Lines:
    """The lines of a text file, and the number of the one last read, for messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for self.number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if self.number == 1 else "utf-8")


Row = Mapping[str, object]

_LINE = re.compile(r"(?P<file>[^\t]+?\.\w{2,5})(?:#\d+)?(?:\s*[\t,;|]\s*|\s+)(?P<caption>.*)")


def _json_lines(lines: Iterable[str]) -> Iterator[Row]:
    """The objects of a JSON lines file."""
    return (_object(json.loads(line)) for line in lines if line.strip())


def _json_rows(lines: Iterable[str]) -> Iterator[Row]:
    """The rows of a JSON file: a list, captions by file, or COCO's images and annotations."""
    whole = json.loads("".join(lines))
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):
        files = {one.get("id"): one.get("file_name") for one in map(_object, whole.get("images") or [])}
        for one in map(_object, whole["annotations"]):
            yield {"file": files.get(one.get("image_id")), "caption": one.get("caption")}
    elif isinstance(whole, dict):
        for file, value in whole.items():
            yield {**value, "file": file} if isinstance(value, dict) else {"file": file, "caption": value}
    elif isinstance(whole, list):
        yield from map(_object, whole)
    else:
        raise ValueError(f"expected a JSON list or object, got {whole!r:.60}")


def _object(row: object) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {json.dumps(row):.60}")
    return row


def _text_rows(lines: Iterable[str]) -> Iterator[Row]:
    """The rows of a text file: a table with a header, files with captions, or files alone."""
    lines = iter(lines)
    first = next(lines, "")
    if _is_header(first):
        yield from _table_rows(chain([first], lines))
        return
    for line in filter(None, map(str.strip, chain([first], lines))):
        if row := _file_and_caption(line):
            yield row
        elif is_picture(line):
            yield {"file": line, "caption": None}
        else:
            raise ValueError(f"expected a picture file, or one and its caption, got {line:.60}")


def _file_and_caption(line: str) -> Row | None:
    """The columns of a line without a header, as Flickr8k's `1.jpg#0<tab>caption`."""
    found = _LINE.fullmatch(line.strip())
    is_pair = found and is_picture(found["file"]) and not is_picture(line.strip())
    return found.groupdict() if found and is_pair else None


def _is_header(line: str) -> bool:
    """Whether a line has columns for files and for captions."""
    row = dict.fromkeys(_split(line.strip("\ufeff\r\n"), _delimiter(line)))
    return _find(row, FILE_FIELDS) is not None and _find(row, CAPTION_FIELDS) is not None


def _delimiter(header: str) -> str:
    """What separates the columns: that which makes the most of them."""
    return max(DELIMITERS, key=lambda delimiter: len(_split(header, delimiter)))


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])


def _tsv_rows(lines: Iterable[str]) -> Iterator[Row]:
    return _table_rows(lines, is_tsv=True)


def _table_rows(lines: Iterable[str], *, is_tsv: bool = False) -> Iterator[Row]:
    """The rows of a table, by the names in its header; in TSV a quote is a character like any other."""
    lines = iter(lines)
    header = next(lines, "")
    offset = 0
    if declared := re.fullmatch(r'"?sep=(.)"?\s*', header):  # as Excel writes and reads
        header, offset = next(lines, ""), 1
    delimiter = declared[1] if declared else _delimiter(header)
    is_tsv = is_tsv and delimiter == "\t"
    reader = csv.reader(
        chain([header], lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
        strict=not is_tsv,
    )
    names: list[str] | None = None
    first = 1 + offset  # line of the header, then of each row
    try:
        for cells in reader:
            if names is None:
                names = cells
            elif any(cell.strip() for cell in cells):  # spreadsheets write empty rows, and empty cells behind
                yield _row(names, cells, is_tsv=is_tsv)
            first = reader.line_num + 1 + offset
    except csv.Error as error:
        raise ValueError(
            f"{error}, in the row that begins at line {first}: is a quote not closed or not doubled?"
        ) from error


def _row(names: Sequence[str], cells: Sequence[str], *, is_tsv: bool) -> Row:
    num_more = len(cells) - len(names)
    if num_more < 0 or any(cell.strip() for cell in cells[len(names) :]):
        hint = "a tab or line break in a caption" if is_tsv else "a comma or line break not quoted"
        raise ValueError(
            f"expected {len(names)} columns as in the header, got {'more' if num_more > 0 else 'fewer'}: "
            f"is there {hint}?"
        )
    return dict(zip(names, cells, strict=False))


def _field(row: Row, names: Sequence[str]) -> object:
    """The value of the field that goes by one of these names."""
    name = _find(row, names)
    if name is None:
        raise ValueError(
            f"expected a field {' or '.join(names)}, got {', '.join(map(str, row)) or 'none'}: say which is "
            "meant by image_field or caption_field"
        )
    return row[name]


def _find(row: Mapping[str, object], names: Sequence[str]) -> str | None:
    """The field of a row that goes by the first of these names: exactly, or in other letters or spaces."""
    plain = {_plain(name): name for name in reversed(list(row))}
    for name in names:
        if name in row:
            return name
        if _plain(name) in plain:
            return plain[_plain(name)]
    return None


def _plain(name: object) -> str:
    return re.sub(r"[\s_-]+", "_", str(name).strip("\ufeff \t\"'")).casefold()


def _listed(value: object) -> object:
    """A cell that holds a JSON list of texts is that list."""
    if isinstance(value, str) and value.strip()[:1] == "[":
        try:
            texts = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
    return value


def _checked(file: object, *, may_be_anywhere: bool) -> str:
    """A file name that stays below its directory; that of a plain list of files may be anywhere."""
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise ValueError(f"expected the name of a picture file, got {file!r:.80}")
    path, windows = PurePosixPath(file), PureWindowsPath(file)
    is_outside = path.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    if is_outside and not may_be_anywhere:
        raise ValueError(f"{file} leads out of the directory of the captions: expected a path below it")
    return str(path)
