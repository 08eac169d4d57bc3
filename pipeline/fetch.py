"""The fetch stage: one unit's rows -> the kept images and one record row per planned row.

Stage `fetch`, unit ids `<range>-<row group>` (`00000-00000`), which sort in dataset order:
    images.tar     the encoded images, plain ustar, `<uid>.<jpg|png|webp>`, in the order they came in
    rows.parquet   FETCHED rows, in plan order (order, uid)
    counts         rows (input rows), reason:ok and reason:<reason> (input rows: num_rows summed),
                   images, requests (attempts), retries (those after a first one), bytes (of bodies)

FETCHED columns: uid, order, url, caption, num_rows as in the plan (pipeline.plan), then
    status           string   "ok" or "dropped"
    reason           string   null when ok, else a name in pipeline.reasons
    rule, score, threshold, detail    as in the plan; detail is also the network's or the decoder's message
    http_status      int32    of the last response, null if there was none
    final_url        string   after redirects, null if there was no response
    num_redirects    int32
    size_bytes       int64    downloaded body
    sha256           string   hex, of the downloaded body
    md5, sha512      string   the same, the one that `fetch.compute_hash` names
    source_format    string   of the body by content: jpeg, png, gif, webp, bmp, tiff, avif
    original_width, original_height   int32   of the body, EXIF orientation applied
    width, height    int32    of the encoded image
    image_format     string   jpg, png or webp: the member's extension
    is_animated      bool     had more than one frame; the first was taken
    exif             string   JSON of the EXIF tags of kept images, with `image.exif`
    grey_std         float    standard deviation of the encoded image's grey values, 0 (one colour) to 127.5
    mean_red, mean_green, mean_blue   float   0 to 255
    phash, phash_mirror   uint64   perceptual hashes of the encoded image and of its mirror image (pipeline.signals)
    sharpness        float    variance of the encoded image's Laplacian (pipeline.signals)
    image_offset     int64    where the image's bytes begin in images.tar
    image_size       int64    their number
    imported_from    string   the file that the image came from; null for those that were downloaded
    attempts         int32    times that the URL was asked for, 0 for rows that were not downloaded
    received_bytes   int64    of all attempts' bodies, as they came over the network
    dns_seconds, connect_seconds, tls_seconds   float   of the last request; 0 on a connection that was open
    first_byte_seconds   float   of the last request, from its sending to its answer; null if there was none
    http_version     string   1.0, 1.1 or 2; null if there was no answer
    server_address   string   IP address of the last request's connection; null if there was none
    seconds          float    of all attempts, without the waits between them; the last of our columns
then the list's extra columns. Columns of the body are null if there was
none, columns of the image are null unless status is "ok".

`attempts`, `received_bytes` and what follows them, `detail`, `final_url` and the order of images.tar depend on the
moment: keep them out of published shards. Everything else is a function of the responses.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.executor import Unit
from cluster.journal import Marker, UnitOutput
from cluster.store import Store
from pipeline import split
from pipeline.admission import admission_of
from pipeline.claims import Claims
from pipeline.config import BuildConfig, ColumnsConfig, FetchConfig, HashName, ImageConfig
from pipeline.http import Downloader
from pipeline.imports import import_images, to_download
from pipeline.isolate import lease_decoders
from pipeline.job import Response
from pipeline.ledgers import Ledgers
from pipeline.picture import Boxes, ImageError, Processed
from pipeline.plan import PLANNED
from pipeline.readers import IMPORT
from pipeline.tar import TarWriter

POLL_S = 1.0
BACKLOG = 64
"""Bodies that wait for a decoder: with so many, no download begins until half of them are done."""

FETCHED = pa.schema(
    [
        *(PLANNED.field(name) for name in ("uid", "order", "url", "caption", "num_rows")),
        pa.field("status", pa.string()),
        *(PLANNED.field(name) for name in ("reason", "rule", "score", "threshold", "detail")),
        pa.field("http_status", pa.int32()),
        pa.field("final_url", pa.string()),
        pa.field("num_redirects", pa.int32()),
        pa.field("size_bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("md5", pa.string()),
        pa.field("sha512", pa.string()),
        pa.field("source_format", pa.string()),
        pa.field("original_width", pa.int32()),
        pa.field("original_height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("image_format", pa.string()),
        pa.field("is_animated", pa.bool_()),
        pa.field("exif", pa.string()),
        pa.field("grey_std", pa.float32()),
        pa.field("mean_red", pa.float32()),
        pa.field("mean_green", pa.float32()),
        pa.field("mean_blue", pa.float32()),
        pa.field("phash", pa.uint64()),
        pa.field("phash_mirror", pa.uint64()),
        pa.field("sharpness", pa.float32()),
        pa.field("image_offset", pa.int64()),
        pa.field("image_size", pa.int64()),
        pa.field("imported_from", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("received_bytes", pa.int64()),
        pa.field("dns_seconds", pa.float32()),
        pa.field("connect_seconds", pa.float32()),
        pa.field("tls_seconds", pa.float32()),
        pa.field("first_byte_seconds", pa.float32()),
        pa.field("http_version", pa.string()),
        pa.field("server_address", pa.string()),
        pa.field("seconds", pa.float32()),
    ]
)
"""Columns of rows.parquet; the list's extra columns follow `seconds`."""


@dataclass(frozen=True, kw_only=True)
class FetchStage:
    """Stage `fetch`: download, decode, resize and encode one unit's rows."""

    store: Store
    groups: tuple[tuple[str, str, int], ...]
    """(unit id, path of the planned rows, row group) of each unit."""
    fetch: FetchConfig
    image: ImageConfig
    num_cpus: float
    memory_bytes: int
    columns: ColumnsConfig | None = None
    """Which of the list's columns tell of the image; None: none does."""
    ledgers: Ledgers | None = None
    """The cluster's, of what each host is asked; None: every task keeps the limits for itself."""
    name: str = "fetch"

    @staticmethod
    def of(config: BuildConfig, store: Store, ordered: Mapping[str, Marker]) -> "FetchStage":
        """Cut into units what the markers of `plan-order` name."""
        return FetchStage(
            store=store,
            groups=tuple(
                (f"{name}-{group:05d}", marker.path_of("rows.parquet"), group)
                for name, marker in ordered.items()
                for group in range(marker.counts["units"])
            ),
            fetch=config.fetch,
            image=config.image,
            columns=config.columns,
            num_cpus=config.fetch.num_cpus,
            memory_bytes=config.fetch.memory_mib * 2**20,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Workers are told their unit in its parameters: the list of all units does not travel."""
        return {**self.__dict__, "groups": ()}

    def units(self) -> list[Unit]:
        return [Unit(id=name, params={"path": path, "group": group}) for name, path, group in self.groups]

    def run(self, unit: Unit, output: UnitOutput) -> None:
        planned = split.planned_rows(self.store, unit)
        with TarWriter(output.path("images.tar")) as tar:
            outcomes = self.fetch_rows(planned, tar)
        table = with_outcomes(planned, outcomes)
        pq.write_table(table, output.path("rows.parquet"), compression="zstd")
        for name, number in count_fetched(table).items():
            output.count(name, number)

    def halves(self, unit: Unit) -> Sequence[Unit]:
        return split.halves(self.store, unit)

    def join(self, parts: Sequence[Marker], output: UnitOutput) -> None:
        split.join(self, parts, output)

    def give_up(self, unit: Unit, output: UnitOutput) -> None:
        split.give_up(self, unit, output)

    def fetch_rows(self, planned: pa.Table, tar: TarWriter) -> "list[Outcome]":
        """Fetch planned rows, or read their images where they are imported; kept ones go to the tar.

        One outcome a row, in their order.
        """
        outcomes = self._download(to_download(planned), tar)
        claims = Claims.of(planned, self.columns, None) if self.columns is not None else Claims()
        uids = planned["uid"].to_pylist()
        for index, outcome, processed in import_images(planned, self.store, self.fetch, self.image, claims):
            if processed is not None:
                outcome["image_offset"] = tar.add(f"{uids[index]}.{self.image.format}", processed.data)
            outcomes[index] = outcome
        return outcomes

    def _download(self, planned: pa.Table, tar: TarWriter) -> "list[Outcome]":
        if self.fetch.engine == "img2dataset":
            from pipeline import img2dataset_engine  # here, as few need it

            return img2dataset_engine.fetch_rows(planned, tar, self.fetch, self.image, self.columns)
        return fetch_rows(planned, tar, self.fetch, self.image, self.ledgers, self.columns)


def count_fetched(table: pa.Table) -> dict[str, int]:
    """The counts of a FETCHED table; see the module's."""
    counts: Counter[str] = Counter()
    for reason, num_rows in zip(table["reason"].to_pylist(), table["num_rows"].to_pylist(), strict=True):
        counts["rows"] += num_rows
        counts[f"reason:{reason or 'ok'}"] += num_rows
    attempts = table["attempts"]
    counts["requests"] = pc.sum(attempts).as_py() or 0
    counts["retries"] = counts["requests"] - (pc.sum(pc.greater(attempts, 0)).as_py() or 0)
    counts["images"] = pc.sum(pc.equal(table["status"], "ok")).as_py() or 0
    counts["bytes"] = pc.sum(table["size_bytes"]).as_py() or 0
    return dict(counts)


Outcome = dict[str, Any]
"""FETCHED values of one row that the plan does not know."""


def fetch_rows(
    planned: pa.Table,
    tar: TarWriter,
    fetch: FetchConfig,
    image: ImageConfig,
    ledgers: Ledgers | None = None,
    columns: ColumnsConfig | None = None,
) -> list[Outcome]:
    """Fetch the planned rows that have no reason yet; kept images go to the tar. One outcome a row, in their order."""
    outcomes: list[Outcome] = [{"status": "dropped", "attempts": 0} for _ in range(planned.num_rows)]
    num_fetched = 0
    urls, reasons, uids = (planned[name].to_pylist() for name in ("url", "reason", "uid"))
    wanted = [(index, urls[index]) for index, reason in enumerate(reasons) if reason is None]
    claims = Claims.of(planned, columns, fetch.verify_hash) if columns is not None else Claims()
    for index, outcome, processed in _fetch(wanted, fetch, image, ledgers, claims) if wanted else ():
        if processed is not None:
            outcome["image_offset"] = tar.add(f"{uids[index]}.{image.format}", processed.data)
        outcomes[index] = outcome
        num_fetched += 1
    assert num_fetched == len(wanted), f"{num_fetched} outcomes of {len(wanted)} downloads"
    return outcomes


def _fetch(
    wanted: Sequence[tuple[int, str]], fetch: FetchConfig, image: ImageConfig, ledgers: Ledgers | None, claims: Claims
) -> Iterator[tuple[int, Outcome, Processed | None]]:
    """Outcomes as they come. The network and the decoders work side by side and share one limit of memory."""
    limit_bytes = fetch.memory_mib * 2**20 // 4
    waiting_bytes = 0
    may_start = True
    with (
        contextlib.closing(admission_of(fetch, ledgers)) as admission,
        Downloader(fetch, admission) as downloader,
        lease_decoders(fetch.decode_threads, image) as decoders,
    ):
        downloader.watch(decoders.descriptor)
        for index, url in wanted:
            downloader.submit(index, url)
        while downloader.num_open or decoders.num_open:
            may_start = decoders.num_open < (BACKLOG if may_start else BACKLOG // 2)
            for response in downloader.poll(POLL_S, limit_bytes - waiting_bytes, may_start=may_start):
                outcome, boxes = _outcome(response, fetch.compute_hash, claims)
                if outcome["reason"] is None:
                    waiting_bytes += outcome["size_bytes"]
                    decoders.give(outcome, response.body, boxes)
                else:
                    yield outcome.pop("index"), outcome, None
            for outcome, result in decoders.take():
                waiting_bytes -= outcome["size_bytes"]
                yield outcome.pop("index"), outcome, _decoded(outcome, result, image.format)


def _outcome(response: Response, compute_hash: HashName, claims: Claims) -> tuple[Outcome, Boxes]:
    """What is known before the body is decoded, and what is to be blurred in it. A reason ends it here."""
    outcome: Outcome = vars(response) | {"status": "dropped"}
    body: bytes = outcome.pop("body")
    if response.reason is not None:
        return outcome, []
    outcome["size_bytes"], outcome["sha256"] = len(body), hashlib.sha256(body).hexdigest()
    if compute_hash != "sha256":
        outcome[compute_hash] = hashlib.new(compute_hash, body).hexdigest()
    try:
        claims.check_hash(response.index, body)
        return outcome, claims.boxes_of(response.index)
    except ImageError as refusal:
        outcome["reason"], outcome["detail"] = refusal.reason.value, refusal.detail
        return outcome, []


def _decoded(outcome: Outcome, result: Processed | ImageError, image_format: str) -> Processed | None:
    """Add to an outcome what the decoder made of the body; returns the image, if it is one."""
    if isinstance(result, ImageError):
        outcome["reason"], outcome["detail"] = result.reason.value, result.detail
        return None
    outcome |= vars(result) | {"status": "ok", "image_format": image_format, "image_size": len(result.data)}
    del outcome["data"]
    return result


def with_outcomes(planned: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
    """The FETCHED table: the plan's columns, the outcomes', the list's own."""
    columns: dict[str, Any] = {}
    for field in FETCHED:
        values = [outcome.get(field.name) for outcome in outcomes]
        if field.name not in PLANNED.names:
            columns[field.name] = pa.array(values, field.type)
        elif field.name in ("reason", "rule", "detail"):  # the plan's stays, where it has one
            columns[field.name] = pc.coalesce(planned[field.name], pa.array(values, field.type))
        else:
            columns[field.name] = planned[field.name]
    extras = [field for field in planned.schema if field.name not in (*PLANNED.names, *IMPORT.names)]
    columns |= {field.name: planned[field.name] for field in extras}
    return pa.table(columns, schema=pa.schema([*FETCHED, *extras]))
