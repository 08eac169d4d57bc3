"""`pairmill explain OUT UID|URL`: what became of a pair, stage by stage, read from what the build left."""

import contextlib
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.config import REQUIRED, Config, key
from cluster.errors import EXIT_DONE, RequestError
from cluster.journal import Journal, Marker
from cluster.run import require_run
from cluster.store import Store
from pipeline.generations import record_markers, stage_name
from pipeline.readers.schema import RESERVED
from pipeline.reasons import sentence

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
    if found.stage == "plan-order":
        verdict = f"dropped: {_because(row)}" if row["reason"] else "waits for its download; the build is not finished"
        return [*lines, f"  result      {verdict}"]
    if number := row.get("generation"):
        lines.append(f"  repair      tried again by repair {number}; what follows is of then")
    lines += _download(row)
    lines += _rules(store, found)
    if row.get("duplicate_of"):
        lines.append(f"  duplicate   {_twin(store, row['duplicate_of'])}")
    if found.stage == "fetch":
        done = f"dropped: {_because(row)}" if row["reason"] else "downloaded; the build is not finished"
        return [*lines, f"  result      {done}"]
    if row["status"] == "kept":
        lines += [f"  duplicates  {line}" for line in _represented(store, row["uid"])]
        place = f"shards/{row['shard']:05}.tar, key {row['key']}"
        return [*lines, f"  result      kept: {place}"]
    return [*lines, f"  result      dropped: {_because(row)}"]


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


def _rules(store: Store, found: Found) -> Iterator[str]:
    """Each rule's score beside its threshold: the plan's from the row, the image rules' from their decisions."""
    row = found.row
    verdicts = []
    for decided in _decided(Journal(store), found):
        table = _Table(stage="decide", unit=found.unit, path=decided.path_of("decisions.parquet"))
        with contextlib.suppress(FileNotFoundError):  # work/ of a finished build may be removed
            verdicts += table.rows(store, "uid", row["uid"])
    if row["rule"] and row["score"] is not None and row["rule"] not in [verdict["rule"] for verdict in verdicts]:
        verdicts.insert(0, {**row, "keep": False})
    for verdict in verdicts:
        outcome = "kept" if verdict["keep"] else f"dropped: {verdict['reason']}"
        limit = ""
        if verdict["threshold"] is not None:
            limit = f" (keeps {_limit(verdict['rule'])} {verdict['threshold']:.6g})"
        yield f"  rule        {verdict['rule']}: {verdict['score']:.6g}{limit}, {outcome}"


def _decided(journal: Journal, found: Found) -> list[Marker]:
    """The decide units that may have the pair's decisions: its own, or those of the repair that tried it last."""
    if number := found.row.get("generation"):
        return list(journal.markers(stage_name(number, "decide")).values())
    marker = journal.marker("decide", found.unit)
    return [marker] if marker else []


def _limit(rule: str) -> str:
    """Which scores a rule keeps, by its name: `curate.min_side_px`, `curate.max_aspect_ratio`."""
    name = rule.rpartition(".")[2]
    return "at least" if name.startswith("min_") else "at most" if name.startswith("max_") else "above"


def _twin(store: Store, uid: str) -> str:
    for twin in find_pairs(store, uid):
        row = twin.row
        return f"same bytes as uid {uid}, key {row['key']}: {row['url']} {row['caption']!r}"
    return f"same bytes as uid {uid}"


def _represented(store: Store, uid: str) -> Iterator[str]:
    """The pairs that were dropped because this one has the same bytes."""
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
            own = [name for name in parquet.schema_arrow.names if name in RESERVED or self.stage == "decide"]
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
