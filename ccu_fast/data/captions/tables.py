"""Tables that name images and captions: CSV (and TSV), and Hugging Face's metadata.csv, .jsonl and .parquet."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ccu_fast import extras
from ccu_fast.data.captions.listing import Listing, Rows, texts_in
from ccu_fast.data.pictures import encode_png
from ccu_fast.files import json_text

# A field may be as long as a C long allows; the default of 128 KiB is less than some scraped captions.
_FIELD_LIMIT = 2**31 - 1
_ROWS = 4096  # of a Parquet file, in memory at a time
_HASH = 64  # bytes of the longest one, SHA-512


def list_tables(
    tables: Sequence[Path], root: Path, format: str, image_column: str | None, caption_column: str | None
) -> Listing:
    """The listing of one table, or of one in each split; image paths are absolute or relative to their table's folder.

    Raises:
        ValueError: a column is missing or not that of the first table, or a file is no such table.
    """
    rows, columns, first = Rows(), None, 0
    for path in tables:
        number = -1
        for number, record in enumerate(read_records(path)):
            if number == 0:
                found = _columns(path, format, list(record), image_column, caption_column)
                if columns not in (None, found):
                    raise ValueError(f"{path}: expected the columns {columns} of {tables[0]}, got {found}")
                columns = found
            assert columns is not None
            where = f"{os.path.relpath(path, root)}, record {number + 1}"
            image, captions = record.get(columns[0]), texts_in(record.get(columns[1]))
            torn = path.suffix.lower() in (".csv", ".tsv") and (None in record or None in record.values())
            if torn or not isinstance(image, str) or not captions:
                rows.refuse(where, f"expected the header's fields, with strings in {columns[0]} and {columns[1]}")
            elif not image.strip():
                rows.refuse(where, f"no path in {columns[0]}")
            elif path.parent != root and not _is_below(path.parent / image, path.parent):
                rows.refuse(where, f"expected a path below the table's folder in {columns[0]}, got {image}")
            else:
                for caption in captions:
                    rows.add(first + number, where, os.path.normpath(path.parent / image), caption)
        first += number + 1
    return rows.listing(format, root, tables=list(tables), columns=columns)


def _is_below(path: Path, folder: Path) -> bool:
    return os.path.normpath(path).startswith(os.path.normpath(folder) + os.sep)


def read_records(path: Path) -> Iterator[dict[Any, Any]]:
    """The records, one at a time; of a CSV those with too many fields have the key None, with too few the value None.

    Raises:
        ImportError: a Parquet file without pyarrow.
        ValueError: not UTF-8, not CSV, a repeated column, not one JSON object a line, no Parquet.
    """
    try:
        if _is_parquet(path):
            yield from itertools.chain.from_iterable(map(_texts_of, _batches(path)))
            return
        with _open(path) as file:
            yield from _jsonl(path, file) if path.suffix == ".jsonl" else _csv(path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8, got {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}: expected CSV, got {error}") from error


def rewrite(source: Path, target: Path, change: Callable[[int, dict[str, Any]], dict[str, Any] | None]) -> None:
    """Copy a table record by record through ``change`` (None leaves a record out); columns, their order and types,
    delimiter and line ends stay. Of a Parquet file ``change`` sees what has text in it.
    """
    if _is_parquet(source):
        _rewrite_parquet(source, target, change)
        return
    with target.open("w", newline="", encoding="utf-8") as file:
        write: Callable[[dict[str, Any]], None] | None = None
        for number, record in enumerate(read_records(source)):
            changed = change(number, record)
            if changed is None:
                continue
            if write is None:
                write = _writer(source, file, list(record))
            write(changed)


def write_pairs(folder: str | Path, parts: Mapping[str, tuple[Tensor, Sequence[str]]]) -> Path:
    """Write pictures and captions in memory as CSV datasets, ``NAME.csv`` (columns ``images,caption``) with PNGs.

    Args:
        folder: made; must not exist.
        parts: name → uint8 ``[N, 1 or 3, H, W]`` and N captions.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``folder`` is there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    for part, (images, captions) in parts.items():
        (folder / part).mkdir()
        with (folder / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["images", "caption"])
            for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
                name = f"{part}/{i:05d}.png"
                (folder / name).write_bytes(encode_png(image))
                writer.writerow([name, caption])
    return folder


def columns_of_bytes(path: Path) -> list[str]:
    """The columns of a table that hold bytes, also within structs and lists: there clean pictures may be.

    So are lists of uint8, but not bytes of few and fixed length, as those of a hash or a UUID.
    """
    if not _is_parquet(path):
        return []
    extras.require("pyarrow")
    import pyarrow
    from pyarrow import parquet, types

    def is_bytes(kind: Any) -> bool:
        if types.is_fixed_size_binary(kind):
            return bool(kind.byte_width > _HASH)
        if kind.num_fields == 1 and not types.is_struct(kind):  # a list of whatever kind
            return bool(kind.field(0).type == pyarrow.uint8())
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

    return [field.name for field in parquet.read_schema(path) if _holds(field.type, is_bytes)]


def _holds(kind: Any, sought: Callable[[Any], bool]) -> bool:
    """Whether an Arrow type, or one within it, is one that is sought."""
    from pyarrow import types

    kind = getattr(kind, "storage_type", kind)
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    if types.is_dictionary(kind):
        inner.append(kind.value_type)
    return sought(kind) or any(_holds(each, sought) for each in inner)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _batches(path: Path) -> Iterator[Any]:
    extras.require("pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise ValueError(f"{path}: expected distinct columns, got {names}")
            yield from file.iter_batches(_ROWS)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: expected Parquet, got {' '.join(str(error).split())}") from error


def _texts_of(batch: Any, *, nested: bool = False) -> list[dict[str, Any]]:
    """The records, with the columns of text and of lists of text alone; others stay as Arrow has them, and are None.

    Args:
        batch: of a Parquet file.
        nested: also those with text anywhere within them.

    Raises:
        ValueError: no Python object holds what is in such a column.
    """
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))

    def is_taken(kind: Any) -> bool:
        if nested:
            return _holds(kind, is_text)
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        return is_text(kind.value_type if types.is_dictionary(kind) else kind)

    columns = []
    for field in batch.schema:
        try:
            column = batch.column(field.name).to_pylist() if is_taken(field.type) else [None] * batch.num_rows
        except (ValueError, OverflowError, KeyError) as error:
            raise ValueError(f"column {field.name}: expected text that can be looked at, got {error}") from error
        columns.append(column)
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _rewrite_parquet(
    source: Path, target: Path, change: Callable[[int, dict[str, Any]], dict[str, Any] | None]
) -> None:
    import pyarrow
    from pyarrow import parquet, types

    def written(field: Any) -> Any:
        # A dictionary of few texts, as pandas' categories: with triggers there are more than a narrow index can count.
        kind = field.type
        if not types.is_dictionary(kind) or kind.index_type.bit_width >= 32:
            return field
        return field.with_type(pyarrow.dictionary(pyarrow.int32(), kind.value_type, kind.ordered))

    number, schema = 0, parquet.read_schema(source)
    schema = pyarrow.schema([written(field) for field in schema], schema.metadata)
    with parquet.ParquetWriter(target, schema) as writer:
        for batch in _batches(source):
            old = _texts_of(batch, nested=True)
            new = [change(number + i, record) for i, record in enumerate(old)]
            number += len(old)
            kept = [i for i, record in enumerate(new) if record is not None]
            columns = []
            for field in schema:
                values = [(new[i] or {})[field.name] for i in kept]
                if values == [old[i][field.name] for i in kept]:
                    columns.append(_some(batch.column(field.name), kept, field.type))
                else:
                    columns.append(pyarrow.array(values, field.type))
            writer.write_batch(pyarrow.RecordBatch.from_arrays(columns, schema=schema))


def _some(column: Any, rows: list[int], kind: Any) -> Any:
    """These rows of a column, of a dictionary perhaps with a wider index.

    Arrow takes them out of every type but the newest, of which slices are put together.
    """
    import pyarrow

    if column.type != kind:
        indices = column.indices.cast(kind.index_type)
        column = pyarrow.DictionaryArray.from_arrays(indices, column.dictionary, ordered=kind.ordered)
    if rows == list(range(len(column))):
        return column
    try:
        return column.take(pyarrow.array(rows, pyarrow.int64()))
    except pyarrow.ArrowNotImplementedError:
        return pyarrow.concat_arrays([column.slice(row, 1) for row in rows] or [column.slice(0, 0)])


def _writer(source: Path, file: TextIO, columns: list[str]) -> Callable[[dict[str, Any]], None]:
    if source.suffix == ".jsonl":

        def write_line(record: dict[str, Any]) -> None:
            file.write(json_text(record) + "\n")

        return write_line
    with source.open("rb") as raw:
        end = "\r\n" if raw.readline().endswith(b"\r\n") else "\n"
    options: Any = {"fieldnames": columns, "delimiter": _delimiter(source), "lineterminator": end}
    plain, quoted = csv.DictWriter(file, **options), csv.DictWriter(file, quoting=csv.QUOTE_ALL, **options)
    plain.writeheader()

    def write(record: dict[str, Any]) -> None:
        # Python before 3.13 quotes a lone carriage return only where it ends lines, and would read it as one.
        alone = any("\r" in value for value in record.values())
        (quoted if alone else plain).writerow(record)

    return write


def _open(path: Path) -> TextIO:
    return path.open(newline="", encoding="utf-8-sig")


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _csv(path: Path, file: TextIO) -> Iterator[dict[Any, Any]]:
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.DictReader(file, delimiter=_delimiter(path), strict=True)
    names = list(reader.fieldnames or ())
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: expected distinct columns, got {names}")
    yield from reader


def _jsonl(path: Path, file: TextIO) -> Iterator[dict[Any, Any]]:
    for number, line in enumerate(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number + 1}: expected JSON, got {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number + 1}: expected a JSON object, got {type(record).__name__}")
        yield record


def _columns(path: Path, format: str, found: list[Any], image: str | None, caption: str | None) -> tuple[str, str]:
    usual = ("file_name", "images") if format == "imagefolder" else ("images", "file_name")
    # Of Parquet this is the column where datasets keeps pictures.
    others = ("image_path", "filepath", "filename", *(() if _is_parquet(path) else ("image",)))
    image = image or next((name for name in (*usual, *others) if name in found), usual[0])
    if caption is None:
        caption = next((name for name in ("caption", "text", "title") if name in found), "caption")
    if image == caption:
        raise ValueError(f"caption_column: expected another column than that of the images, got {caption} for both")
    missing = [name for name in (image, caption) if name not in found]
    if missing:
        embedded = "; pictures inside a table are not read" if _is_parquet(path) and "image" in found else ""
        raise ValueError(
            f"{path}: expected the columns {image} and {caption}, got {', '.join(map(str, found)) or 'none'} "
            f"(image_column and caption_column name others{embedded})"
        )
    return image, caption
