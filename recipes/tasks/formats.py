"""Rows out of files in the public formats, each with its place, so that what is wrong with one can be shown."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_UNDECODABLE = "holds bytes that are not UTF-8"


@dataclass(frozen=True)
class Row:
    """One row of a data set.

    Args:
        place: Where it stands, such as ``line 3``.
        values: Its columns by name.
        problem: What kept it from being read; empty if nothing did.
    """

    place: str
    values: Mapping[str, Any]
    problem: str = ""


def read(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    """All rows of a file, by its ending; a row that cannot be read says so instead of having values.

    Args:
        path: ``.tsv`` or ``.txt`` (fields between tabs, quotes as they are), ``.csv``, ``.jsonl``, ``.json`` (an array,
            one object per line, an object of named rows, or rows or SQuAD's nested form under ``data``), or
            ``.parquet``.
        columns: Names of the columns of a table that has no header; None to read them from its first line.

    Raises:
        ValueError: If the ending is not known, a table names a column twice, or the file as a whole cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.tsv"
        ...     _ = path.write_text("text\\tlabel\\nfine\\t1\\nlonely\\n")
        ...     for row in read(path):
        ...         print(row)
        Row(place='line 2', values={'text': 'fine', 'label': '1'}, problem='')
        Row(place='line 3', values={}, problem='has 1 field where there are 2 columns')
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: the file must end in {', '.join(READERS)}, not {path.suffix!r}.")
    if columns is not None and path.suffix not in (".tsv", ".txt", ".csv"):
        raise ValueError(
            f"{path}: `data.columns={list(columns)}` is for tables; a {path.suffix} file names its own columns."
        )
    return reader(path, columns)


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; bytes that are not become lone surrogates."""
    return path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def undecodable(value: Any) -> bool:
    """Whether a value holds lone surrogates, which `text_of` leaves for bytes that are not UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, Mapping):
        return any(undecodable(item) for item in value.values())
    return isinstance(value, list) and any(undecodable(item) for item in value)


def _row(place: str, values: Any, damaged: bool) -> Row:
    if not isinstance(values, Mapping):
        return Row(place, {}, f"holds a {type(values).__name__}, not an object with named columns")
    if damaged and undecodable(values):
        return Row(place, {}, _UNDECODABLE)
    return Row(place, values)


def _distinct(header: Sequence[str], where: str, way_out: str) -> None:
    """Refuses a name that two columns have: one of them would be lost. Columns without a name are nobody's."""
    for name, count in Counter(header).items():
        if name and count > 1:
            raise ValueError(f"{where}: {count} columns are named {name!r}: {way_out}.")


def _table(
    path: Path, records: Iterator[tuple[int, list[str]]], columns: Sequence[str] | None, damaged: bool
) -> list[Row]:
    if columns is not None:
        header = list(columns)
        _distinct(header, f"{path}, `data.columns={header}`", "give each a name of its own")
    else:
        first, header = next(records, (0, []))
        _distinct(header, f"{path}, line {first}", "rename all but one there")
    rows = []
    for line, fields in records:
        place = f"line {line}"
        if len(fields) != len(header):
            counted = f"{len(fields)} field{'' if len(fields) == 1 else 's'}"
            rows.append(Row(place, {}, f"has {counted} where there are {len(header)} columns"))
        else:
            rows.append(_row(place, dict(zip(header, fields, strict=True)), damaged))
    return rows


def _tsv(path: Path, columns: Sequence[str] | None) -> list[Row]:
    text = text_of(path)
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), 1)
    return _table(path, ((i, line.split("\t")) for i, line in lines if line), columns, undecodable(text))


def _csv(path: Path, columns: Sequence[str] | None) -> list[Row]:
    text = text_of(path)

    def records() -> Iterator[tuple[int, list[str]]]:
        reader, before = csv.reader(io.StringIO(text, newline="")), 0
        for fields in reader:
            if fields:
                yield before + 1, fields
            before = reader.line_num  # a quoted field may run over several lines

    # The limit on a field's length is the whole process's, so it is given back. No field is longer than the file.
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))
    try:
        return _table(path, records(), columns, undecodable(text))
    finally:
        csv.field_size_limit(limit)


def _jsonl(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    text = text_of(path)
    damaged = undecodable(text)
    return [_object(f"line {i}", line, damaged) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _object(place: str, line: str, damaged: bool) -> Row:
    try:
        return _row(place, json.loads(line), damaged)
    except json.JSONDecodeError as error:
        return Row(place, {}, f"is no JSON: {error.msg} at character {error.colno}")


def _json(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    text = text_of(path)
    damaged = undecodable(text)
    try:
        if text.lstrip()[:1] == "[":
            return [_row(f"line {line}", item, damaged) for line, item in _items(text)]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _jsonl(path)
        raise ValueError(f"{path}, line {error.lineno}: is no JSON: {error.msg}.") from error
    if isinstance(content, Mapping):
        if isinstance(data := content.get("data"), list):
            if any(isinstance(item, Mapping) and "paragraphs" in item for item in data):
                return list(_squad(data, damaged))
            return [_row(f"row {i}", item, damaged) for i, item in enumerate(data, 1)]
        if content and all(isinstance(value, Mapping) for value in content.values()):
            return [_row(f"entry {key!r}", {"id": key, **value}, damaged) for key, value in content.items()]
    raise ValueError(f"{path}: must hold an array of objects, one object per line, or an object of named objects.")


def _items(text: str) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, with the line in which each begins."""
    decoder = json.JSONDecoder()
    at, line = _skip(text, text.index("[") + 1), 1
    counted = 0
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        item, end = decoder.raw_decode(text, at)
        yield line, item
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    at = _skip(text, at + 1)
    if at < len(text):
        told = "More follows after the end of the array; make it one array, or one object per line"
        raise json.JSONDecodeError(told, text, at)


def _skip(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _squad(articles: Sequence[Any], damaged: bool) -> Iterator[Row]:
    """SQuAD's nested articles as the flat rows of the hub; version 2's impossible questions have no answers."""
    count = 0
    for i, article in enumerate(articles, 1):
        paragraphs = _listed(article, "paragraphs")
        if paragraphs is None:
            yield Row(f"article {i}", {}, "has no list of 'paragraphs'")
        for j, paragraph in enumerate(paragraphs or [], 1):
            questions = _listed(paragraph, "qas")
            if questions is None:
                yield Row(f"article {i}, paragraph {j}", {}, "has no list of 'qas'")
            for asked in questions or []:
                count += 1
                yield _question(count, paragraph, asked, damaged)


def _listed(holder: Any, key: str) -> list[Any] | None:
    found = holder.get(key) if isinstance(holder, Mapping) else None
    return found if isinstance(found, list) else None


def _question(number: int, paragraph: Mapping[str, Any], asked: Any, damaged: bool) -> Row:
    """A question as a row; one without an id is named by its number in the file."""
    if not isinstance(asked, Mapping):
        return _row(f"question {number}", asked, damaged)
    place = f"question {asked['id']!r}" if "id" in asked else f"question {number}"
    if missing := [repr(key) for key, holder in (("context", paragraph), ("question", asked)) if key not in holder]:
        return Row(place, {}, f"has no {' and no '.join(missing)}")
    answers, keys = asked.get("answers"), ("text", "answer_start")
    answers = [] if answers is None else answers
    if not isinstance(answers, list) or not all(isinstance(item, Mapping) and {*keys} <= {*item} for item in answers):
        return Row(place, {}, "has 'answers' that are no list of objects with 'text' and 'answer_start'")
    values = {
        "id": asked.get("id", str(number)),
        "context": paragraph["context"],
        "question": asked["question"],
        "answers": {key: [answer[key] for answer in answers] for key in keys},
    }
    return _row(place, values, damaged)


def _parquet(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    _distinct(pyarrow.parquet.read_schema(path).names, str(path), "rename all but one")
    return [Row(f"row {i}", values) for i, values in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)]


READERS: dict[str, Callable[[Path, Sequence[str] | None], list[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".tsv": _tsv,
    ".csv": _csv,
    ".txt": _tsv,
    ".parquet": _parquet,
}
