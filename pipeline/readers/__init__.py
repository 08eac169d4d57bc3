"""Reading URL lists: parquet, csv, tsv, json, jsonl and plain text, compressed or not, from any fsspec URL.

    sources = list_sources(patterns, "auto")            # which files, in order
    schema = list_schema(sources, columns, read)        # their columns, checked before any work
    for batch in read_rows(path, source, schema): ...   # bounded memory

A list may also be a dataset, whose rows come with their images (`readers.imported`).

What cannot be read as a row is a row too, with reason `unreadable_row`; a file that cannot be opened, lacks a column
or has another type in it is a `RequestError` from `list_schema`, before any work.
"""

from pipeline.readers.imported import IMPORT, read_imported
from pipeline.readers.rows import read_rows
from pipeline.readers.schema import Group, ListSchema, list_schema, list_schemas
from pipeline.readers.sources import Source, list_sources, local_copy

__all__ = [
    "IMPORT",
    "Group",
    "ListSchema",
    "Source",
    "list_schema",
    "list_schemas",
    "list_sources",
    "local_copy",
    "read_imported",
    "read_rows",
]
