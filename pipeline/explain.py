"""`pairmill explain OUT UID|URL`: what became of a pair, stage by stage, read from what the build left."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import REQUIRED, Config, key
from cluster.errors import EXIT_DONE, RequestError
from cluster.journal import Journal
from cluster.run import require_run
from cluster.store import Store
from pipeline.generations import record_markers
from pipeline.readers.schema import RESERVED
from pipeline.reasons import Reason, sentence
from pipeline.verdicts import Said, after_download, before_download, undone_steps

UID = re.compile(r"[0-9a-f]{32}")
MAX_HINTS = 3
MAX_CANDIDATES = 2_000


class ExplainConfig(Config):
    """`pairmill explain OUT UID|URL`."""

    dataset: str = key(REQUIRED, "output folder or URL of a build, finished or not", min_length=1)
    pair: str = key(REQUIRED, "uid (32 hex digits) or URL of a pair", min_length=1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One pair: its row of the furthest stage that knows it, and that stage's name and unit."""

    stage: str
    unit: str
    row: dict[str, Any]


def explain_command(config: ExplainConfig) -> int:
    """Print the story of every pair with that uid or URL."""
    store, _ = require_run(config.dataset, "build")
    found = find_pairs(store, config.pair)
    if not found:
        raise RequestError(_unknown(store, config.pair))
    for number, pair in enumerate(found):
        if number:
            print()
        print("\n".join(tell(store, pair)))
    return EXIT_DONE


def find_pairs(store: Store, wanted: str) -> list[Found]:
    """Every pair with this uid or this URL, in the plan's order."""
    column = "uid" if UID.fullmatch(wanted.lower()) else "url"
    value = wanted.lower() if column == "uid" else wanted.strip()
    return [
        Found(stage=table.stage, unit=table.unit, row=row)
        for table in _tables(store)
        for row in table.rows(store, column, value)
    ]


def tell(store: Store, found: Found) -> list[str]:
    """The story of one pair, a line a fact."""
    row = found.row
    lines = [f"{row['url'] or '(no URL)'}", f"  caption     {row['caption']!r}", f"  uid         {row['uid']}"]
    repeated = f", {row['num_rows']} times the same" if row["num_rows"] > 1 else ""
    lines.append(f"  plan        in the lists{repeated}; fetch unit {found.unit}, order {row['order']:016x}")
    before, after = before_download(store, row), after_download(store, row, found.unit)
    lines += [f"  rule        {said}" for said in before]
    if found.stage == "plan-order":
        verdict = f"dropped: {_because(row)}" if row["reason"] else "waits for its download; the build is not finished"
        return [*lines, f"  result      {verdict}"]
    if number := row.get("generation"):
        lines.append(f"  repair      tried again by repair {number}; what follows is of then")
    lines += _download(row)
    lines += [f"  rule        {said}" for said in after]
    return lines + (_so_far(store, found) if found.stage == "fetch" else _result(store, row, (*before, *after)))


def _result(store: Store, row: dict[str, Any], said: Sequence[Said]) -> list[str]:
    """The end of the story of a pair in the record."""
    if row["status"] == "kept":
        place = f"shards/{row['shard']:05}.tar, key {row['key']}"
        return [*(f"  duplicates  {line}" for line in _represented(store, row["uid"])), f"  result      kept: {place}"]
    lines = []
    if row["rule"] and row["rule"] not in [verdict.rule for verdict in said]:
        kind = "rule" if row["rule"].startswith("curate.") else "step"
        lines.append(f"  {kind}        {Said.of(row)}")
    if row["duplicate_of"]:
        lines.append(f"  duplicate   {_twin(store, row['duplicate_of'], row['reason'])}")
    return [*lines, f"  result      dropped: {_because(row)}"]


def _so_far(store: Store, found: Found) -> list[str]:
    """The end of the story of a pair that is not in the record yet."""
    row = found.row
    if row["reason"]:
        return [f"  result      dropped: {_because(row)}"]
    decided = undone_steps(store, row["uid"], found.unit)
    if decided is None:
        return ["  result      downloaded; the build is not finished"]
    said, twin = decided
    if said is None:
        return ["  result      will be kept; the dataset is not packed yet"]
    lines = [f"  step        {said}"]
    if twin:
        lines.append(f"  duplicate   {_twin(store, twin, str(said.reason))}")
    return [*lines, "  result      will be dropped; the dataset is not packed yet"]


def _download(row: dict[str, Any]) -> Iterator[str]:
    if row.get("imported_from"):
        yield f"  import      from {row['imported_from']}"
        if row["detail"]:
            yield f"              {row['detail']}"
        yield from _image(row)
        return
    if not row["attempts"]:
        yield "  download    none: decided before"
        return
    got_body = row["size_bytes"] is not None  # fetch.engine=img2dataset does not tell the status of a success
    status = f"HTTP {row['http_status']}" if row["http_status"] else "answered" if got_body else "no response"
    tries = f"{row['attempts']} attempt{'s' if row['attempts'] > 1 else ''}"
    took = f", {row['seconds']:.2f} s" if row["seconds"] is not None else ""
    size = f", {row['size_bytes']:,} bytes" if got_body else ""
    yield f"  download    {status}, {tries}{took}{size}"
    if row["num_redirects"]:
        yield f"              {row['num_redirects']} redirects, to {row['final_url']}"
    if row["sha256"]:
        yield f"              sha256 {row['sha256']}"
    if row["detail"]:
        yield f"              {row['detail']}"
    yield from _image(row)


def _image(row: dict[str, Any]) -> Iterator[str]:
    if row["width"]:
        moving = ", animated (first frame taken)" if row["is_animated"] else ""
        yield (
            f"  image       {row['source_format']} {row['original_width']}x{row['original_height']}{moving}, "
            f"stored as {row['image_format']} {row['width']}x{row['height']}"
        )


_LIKENESS = {
    Reason.DUPLICATE_BYTES: "same bytes as",
    Reason.DUPLICATE_URL: "same URL as",
    Reason.DUPLICATE_PAIR: "same bytes and caption as",
    Reason.NEAR_DUPLICATE: "looks like",
    Reason.SEMANTIC_DUPLICATE: "shows the same as",
}


def _twin(store: Store, uid: str, reason: str) -> str:
    like = next((likeness for name, likeness in _LIKENESS.items() if name == reason), "represented by")
    for twin in find_pairs(store, uid):
        row = twin.row
        key = f", key {row['key']}" if row.get("key") else ""
        return f"{like} uid {uid}{key}: {row['url']} {row['caption']!r}"
    return f"{like} uid {uid}"


def _represented(store: Store, uid: str) -> Iterator[str]:
    """The pairs that were dropped because this one is there."""
    for table in _tables(store):
        for row in table.rows(store, "duplicate_of", uid):
            yield f"represents uid {row['uid']}: {row['url']}"


def _because(row: dict[str, Any]) -> str:
    rule = f" (set by {row['rule']})" if row["rule"] else ""
    return f"{row['reason']}: {sentence(row['reason'])}{rule}"


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The rows of one fetch unit, as the furthest stage that has finished the unit left them."""

    stage: str
    unit: str
    path: str
    row_group: int | None = None

    def rows(self, store: Store, column: str, value: str) -> list[dict[str, Any]]:
        """The rows whose `column` is `value`; of the list's own columns nothing is told."""
        with store.open(self.path) as file:
            parquet = pq.ParquetFile(file)
            groups = range(parquet.num_row_groups) if self.row_group is None else [self.row_group]
            own = [name for name in parquet.schema_arrow.names if name in RESERVED]
            if column not in own:
                return []
            keys = parquet.read_row_groups(list(groups), columns=[column])
            if not pc.any(pc.equal(keys.column(column), value)).as_py():
                return []
            table = parquet.read_row_groups(list(groups), columns=own)
            rows: list[dict[str, Any]] = table.filter(pc.field(column) == value).to_pylist()
            return rows


def _tables(store: Store) -> Iterator[_Table]:
    """The rows of every fetch unit, in the dataset's order."""
    journal = Journal(store)
    fetched, recorded = journal.markers("fetch"), record_markers(journal)
    planned = journal.markers("plan-order")
    if not planned:  # a copy of a dataset without its journal, or a build that has only begun
        for entry in store.find("record"):
            yield _Table(stage="record", unit=PurePosixPath(entry.path).stem, path=entry.path)
    for unit, marker in fetched.items():
        if unit in recorded:
            yield _Table(stage="record", unit=unit, path=recorded[unit].path_of("record.parquet"))
        else:
            yield _Table(stage="fetch", unit=unit, path=marker.path_of("rows.parquet"))
    if fetched and journal.markers("revisit"):
        return  # its units are those of the dataset that it is made of, and all of them have begun
    for name, marker in planned.items():
        for group in range(marker.counts["units"]):
            unit = f"{name}-{group:05}"
            if unit not in fetched:
                path = marker.path_of("rows.parquet")
                yield _Table(stage="plan-order", unit=unit, path=path, row_group=group)


def _unknown(store: Store, wanted: str) -> str:
    """The message for a pair that is not there, with the nearest ones that are."""
    near = list(dict.fromkeys(_nearest(store, wanted)))[:MAX_HINTS]
    hints = "; nearest: " + ", ".join(near) if near else ""
    kind = "uid" if UID.fullmatch(wanted.lower()) else "URL"
    return f"{wanted}: no pair with this {kind} in {store.url}{hints}"


def _nearest(store: Store, wanted: str) -> Iterator[str]:
    """Uids that begin alike if it looks like one, else URLs of the same host or file name spelled alike."""
    column = "uid" if re.fullmatch(r"[0-9a-fA-F]{6,}", wanted) else "url"
    host = urlsplit(wanted).netloc or wanted
    last = wanted.rstrip("/").rpartition("/")[2]
    pattern = f"^{wanted[:6].lower()}" if column == "uid" else f"{re.escape(host)}|{re.escape(last)}"
    candidates: list[str] = []
    for table in _tables(store):
        if len(candidates) >= MAX_CANDIDATES:
            break
        with store.open(table.path) as file:
            values = pq.read_table(file, columns=[column]).column(column)
        found = values.filter(pc.fill_null(pc.match_substring_regex(values, pattern), False))
        candidates += found.slice(0, MAX_CANDIDATES).to_pylist()
    yield from difflib.get_close_matches(wanted, candidates, n=MAX_HINTS, cutoff=0.5)
    yield from candidates[:MAX_HINTS]
