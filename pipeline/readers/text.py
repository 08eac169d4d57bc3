"""Text lists as pieces of rows: csv, tsv, json, jsonl and plain lines. A row that cannot be read spoils no other.

Each reader promises bounded memory: a line longer than `MAX_LINE_BYTES`, or a JSON value longer than that, is one
unreadable row.
"""

import codecs
import csv
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice
from typing import Any

MAX_LINE_BYTES = 8 * 2**20
MAX_CSV_LINES = 100
"""Lines that one quoted record may span: bounds what a stray quote makes us read twice."""
EXCERPT_CHARS = 200
JSON_CHUNK_BYTES = 2**18
BYTE_ORDER_MARK = codecs.BOM_UTF8


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some rows in column form, in file order, and beside them what could not be read (the beginning of each).

    numbers: of the rows in the file, from 1, where the reader knows them.
    """

    columns: dict[str, list[Any]]
    num_rows: int
    unreadable: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)


class UnforeseenError(Exception):
    """A value or a key that does not go with the columns found in the lists' heads. row: from 1, 0 if not known."""

    def __init__(self, row: int, name: str, what: str) -> None:
        super().__init__(what)
        self.row = row
        self.name = name


def read_lines(file: BufferedReader, name: str, size: int) -> Iterator[Piece]:
    """A plain list: a URL a line, as the column `name`; blank lines are nothing."""
    lines = (line.strip() for line in _bounded_lines(file))
    return _pieces(({name: line} if line else None for line in lines), [name], size)


def csv_header(file: BufferedReader, delimiter: str) -> tuple[list[str], bool]:
    """Names of the columns ([] for an empty file), and whether a row follows.

    Raises ValueError if the names are no UTF-8 text or a quote stays open.
    """
    records = _csv_records(file, delimiter)
    header: Any = next(records, [])
    if not (isinstance(header, list) and _is_text(header)):
        raise ValueError("the line with the names of the columns is no UTF-8 text, or has a quote that stays open")
    return header, next(records, None) is not None


def read_csv(file: BufferedReader, delimiter: str, names: list[str], size: int) -> Iterator[Piece]:
    """The named columns as text; empty fields are null. A row of another number of fields is unreadable."""
    records = _csv_records(file, delimiter)
    header: list[str] = next(records, [])
    positions = [(name, header.index(name)) for name in names if name in header]
    while batch := list(islice(records, size)):
        rows = [row for row in batch if isinstance(row, list) and _is_text(row)]
        columns = {name: [row[position] or None for row in rows] for name, position in positions}
        bad = [_excerpt(row) for row in batch if not (isinstance(row, list) and _is_text(row))]
        yield Piece(columns=columns, num_rows=len(rows), unreadable=bad)


def read_json(file: BufferedReader, names: list[str], size: int, *, takes_all: bool) -> Iterator[Piece]:
    """Objects of a JSON array, or one object a line, whichever the first character says.

    takes_all: every key is wanted; UnforeseenError for one that is not in `names`.
    """
    rows = json_rows(file)
    return _pieces(_without_further_keys(rows, frozenset(names)) if takes_all else rows, names, size)


def json_rows(file: BufferedReader) -> Iterator[Mapping[str, Any] | str]:
    """Each row's object, or the text of what is none. ValueError when an array breaks off or goes on after its end."""
    head = file.peek(JSON_CHUNK_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        return _array_rows(_chunks(file))
    return (_json_line(line) for line in _bounded_lines(file) if line.strip())


def _pieces(rows: Iterator[Mapping[str, Any] | str | None], names: list[str], size: int) -> Iterator[Piece]:
    """Mappings to columns; strings are unreadable rows, None is nothing."""
    present = enumerate((row for row in rows if row is not None), 1)
    while batch := list(islice(present, size)):
        good = [(number, row) for number, row in batch if not isinstance(row, str) and _is_text(row.values())]
        bad = [_excerpt(row) for _, row in batch if isinstance(row, str) or not _is_text(row.values())]
        yield Piece(
            columns={name: [row.get(name) for _, row in good] for name in names},
            num_rows=len(good),
            unreadable=bad,
            numbers=[number for number, _ in good],
        )


def _without_further_keys(
    rows: Iterator[Mapping[str, Any] | str], names: frozenset[str]
) -> Iterator[Mapping[str, Any] | str]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, str) and not row.keys() <= names:
            name = next(name for name in row if name not in names)
            raise UnforeseenError(number, name, "not seen before")
        yield row


def _bounded_lines(file: BufferedReader) -> Iterator[str]:
    """Lines as text, bad bytes as lone surrogates, without the byte-order mark; a line too long is cut short.

    What is cut ends in a lone surrogate, so that it counts as unreadable wherever it goes.
    """
    is_first = True
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (more := file.readline(MAX_LINE_BYTES)) and not more.endswith(b"\n"):
                pass
            line = line[:EXCERPT_CHARS] + b"\xff\n"
        if is_first:
            line, is_first = line.removeprefix(BYTE_ORDER_MARK), False
        yield line.decode("utf-8", "surrogateescape")


class _CsvLines:
    """Lines for `csv.reader` that can be given again: when a quote swallows rows, only its own line is lost."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self.taken: list[str] = []
        self.ended = False

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        if len(self.taken) >= MAX_CSV_LINES:
            raise csv.Error(f"a quoted field spans over {MAX_CSV_LINES} lines")
        line = self._again.popleft() if self._again else next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.taken.append(line)
        return line

    def drop_first(self) -> str:
        """Forget the record's first line, give its others again; returns the lost line."""
        self.ended = False
        self._again.extendleft(reversed(self.taken[1:]))
        return self.taken[0]


def _csv_records(file: BufferedReader, delimiter: str) -> Iterator[Any]:
    """The header's names, then each record's fields, or its text (str) if it is not a record of that width."""
    lines = _CsvLines(_bounded_lines(file))
    reader = csv.reader(lines, delimiter=delimiter)
    width = 0
    while True:
        lines.taken.clear()
        try:
            row = next(reader, None)
        except csv.Error:
            yield lines.drop_first()
            continue
        if row is None:
            return
        if not row:
            continue
        width = width or len(row)
        # The reader asks for a line beyond the last only inside a quoted field that never closes.
        if len(row) == width and not lines.ended:
            yield row
        else:
            yield lines.drop_first()


def _json_line(line: str) -> Mapping[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return row if isinstance(row, dict) else line


def _chunks(file: BufferedReader) -> Iterator[str]:
    """The file as text, cut where no character is split."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    while block := file.read(JSON_CHUNK_BYTES):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _array_rows(chunks: Iterator[str]) -> Iterator[Mapping[str, Any] | str]:
    """Elements of a JSON array, parsed one by one. ValueError at a syntax error: what follows cannot be counted."""
    decoder = json.JSONDecoder()
    text = next(chunks).removeprefix("\ufeff").lstrip()[1:]
    at = 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if text.startswith("]", at):
            if text[at + 1 :].strip() or any(chunk.strip() for chunk in chunks):
                raise ValueError("more text after the end of the array")
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            more = next(chunks, None)
            if more is None or len(text) - at > MAX_LINE_BYTES:
                raise ValueError(f"no JSON value and no end of the array at: {_excerpt(text[at:])!r}") from None
            text, at = text[at:] + more, 0
        else:
            yield row if isinstance(row, dict) else str(row)


def _is_text(values: Any) -> bool:
    """Whether every string can be written as UTF-8, which lone surrogates (bad bytes) cannot."""
    return all(value.isascii() or _encodes(value) for value in values if isinstance(value, str))


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(row: Any) -> str:
    text = row if isinstance(row, str) else json.dumps(row, default=str, ensure_ascii=False)
    return text[:EXCERPT_CHARS].encode("utf-8", "replace").decode()
