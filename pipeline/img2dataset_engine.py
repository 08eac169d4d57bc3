"""`fetch.engine=img2dataset`: the downloader of img2dataset 1.47.0 in the place of ours, for the same unit and outputs.

Its own `Downloader`, `Resizer` and urllib requests do the work, in the same Ray task; here they are only given the
unit's rows, and what they tell is brought into the columns of the fetch stage:

    columns of the body and of the image    size_bytes, source_format and the measures are taken from what passes by;
                                            measures are those of the encoded image, a border included
    reason, detail, http_status             from its error message, which is kept as `detail`; `http_status` is null
                                            unless it is an error
    attempts                                of a failure all of them: it repeats whatever failed, at once; else 1
    final_url, num_redirects, seconds       null: it does not tell

It has no guard against internal addresses, no limit on a body's size or on an image's pixels before decoding, no
limit per host, and knows neither robots.txt nor Retry-After: pipeline.config refuses requests for those with this
engine. docs/img2dataset.md lists where its images differ from ours.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from pipeline.claims import Claims
from pipeline.config import ColumnsConfig, FetchConfig, ImageConfig
from pipeline.decode import sniff
from pipeline.images import Boxes, ImageError, process
from pipeline.reasons import Reason, http_reason
from pipeline.signals import measure
from pipeline.tar import TarWriter
from pipeline.urls import UrlError, clean_url

Outcome = dict[str, Any]
Wanted = tuple[int, str, Boxes]
"""Number, URL and boxes to blur of a row."""


# What its messages (the exceptions of urllib, http.client and ssl as text) mean, first match wins.
_DOWNLOAD_ERRORS: tuple[tuple[str, Reason], ...] = (
    (r"redirect error that would lead to an infinite loop", Reason.TOO_MANY_REDIRECTS),
    (r"X-Robots-Tag", Reason.OPTED_OUT),
    (r"Errno -3\b|[Tt]emporary failure in name resolution", Reason.DNS_FAILURE),
    (r"Errno -[245]\b|Name or service not known|No address associated", Reason.UNKNOWN_HOST),
    (r"SSL|certificate|EOF occurred in violation of protocol", Reason.TLS_FAILURE),
    (r"timed out", Reason.TIMEOUT),
    (r"IncompleteRead", Reason.TRUNCATED),
    (r"unknown url type|redirection to url .* is not allowed", Reason.UNSUPPORTED_SCHEME),
    (r"URL can't contain control characters|codec can't encode|no host given|nonnumeric port", Reason.INVALID_URL),
    (r"Errno \d+|Remote end closed connection|Connection", Reason.CONNECTION_FAILED),
)


def fetch_rows(
    planned: pa.Table, tar: TarWriter, fetch: FetchConfig, image: ImageConfig, columns: ColumnsConfig | None = None
) -> list[Outcome]:
    """Fetch the planned rows that have no reason yet; kept images go to the tar. One outcome a row, in their order."""
    outcomes: list[Outcome] = [{"status": "dropped", "attempts": 0} for _ in range(planned.num_rows)]
    urls, reasons, uids = (planned[name].to_pylist() for name in ("url", "reason", "uid"))
    claims = Claims.of(planned, columns, fetch.verify_hash) if columns is not None else Claims()
    wanted: list[Wanted] = []
    for row, (url, reason) in enumerate(zip(urls, reasons, strict=True)):
        if reason is not None:
            continue
        try:
            wanted.append((row, clean_url(url), claims.boxes_of(row)))
        except (UrlError, ImageError) as error:
            outcomes[row] = _dropped(error.reason, str(error), attempts=0)
        else:  # stays where img2dataset says nothing, which it does after an exception of its own
            outcomes[row] = _dropped(Reason.UNDECODABLE_IMAGE, "img2dataset failed", attempts=1)
    if wanted:
        keeper = _Keeper(uids=uids, outcomes=outcomes, tar=tar, fetch=fetch, image=image, claims=claims)
        _download(wanted, keeper, has_boxes=bool(claims.boxes))
    return outcomes


@dataclass(kw_only=True)
class _Keeper:
    """Stands on both sides of img2dataset's work: it hands bodies to its resizer, and is its sample writer.

    Bodies come one after the other in a single thread, each followed by its `write`.
    """

    uids: Sequence[str]
    outcomes: list[Outcome]
    tar: TarWriter
    fetch: FetchConfig
    image: ImageConfig
    claims: Claims
    resizer: Callable[[Any, Any], tuple[Any, ...]] | None = None
    body: bytes = b""
    failure: OSError | None = None
    """Why the tar could not be written (a full disk): img2dataset prints it and goes on."""

    def resize(self, body: Any, boxes: Any = None) -> tuple[Any, ...]:
        """What img2dataset calls with each body."""
        self.body = body.getvalue()
        assert self.resizer is not None
        return self.resizer(body, boxes)

    def write(self, data: bytes | None, key: str, caption: str | None, told: dict[str, Any]) -> None:
        """What img2dataset calls once for every row, with the encoded image or None."""
        row, message = told["row"], told["error_message"]
        if told["status"] == "failed_to_download":
            self.outcomes[row] = download_failure(message, self.fetch.retries)
            return
        try:
            self.claims.check_hash(row, self.body)
        except ImageError as refusal:
            outcome = _dropped(refusal.reason, refusal.detail, attempts=1)
        else:
            outcome = _unusable(self.body, message, self.image) if data is None else self._keep(row, data, told)
        self.outcomes[row] = outcome | self._of_body()

    def close(self) -> None:
        """Our caller closes the tar."""

    def _keep(self, row: int, data: bytes, told: dict[str, Any]) -> Outcome:
        names = ("original_width", "original_height", "width", "height")
        measures = _measures(data)  # before the tar: they may fail
        return {name: told[name] for name in names} | {
            "status": "ok",
            "attempts": 1,
            "source_format": _format(self.body),
            "exif": told.get("exif"),
            "image_format": self.image.format,
            "image_offset": self._add(f"{self.uids[row]}.{self.image.format}", data),
            "image_size": len(data),
            **measures,
        }

    def _add(self, name: str, data: bytes) -> int:
        try:
            return self.tar.add(name, data)
        except OSError as error:
            self.failure = error
            raise

    def _of_body(self) -> Outcome:
        if not self.body:
            return {}
        names = dict.fromkeys(("sha256", self.fetch.compute_hash))
        return {"size_bytes": len(self.body)} | {name: hashlib.new(name, self.body).hexdigest() for name in names}


def _format(body: bytes) -> str | None:
    """The format by content; img2dataset also keeps what has none of those that we know."""
    try:
        return sniff(body)
    except ImageError:
        return None


def _unusable(body: bytes, message: str, image: ImageConfig) -> Outcome:
    """Why img2dataset could not use a body: the reason of our own decoder, where that fails too."""
    if not body:
        return _dropped(Reason.EMPTY_BODY, message, attempts=1)
    reason = Reason.TOO_MANY_PIXELS if message == "image area too large" else Reason.UNDECODABLE_IMAGE
    try:
        process(body, image)
    except ImageError as refusal:
        reason = refusal.reason
    return _dropped(reason, message, attempts=1)


def download_failure(message: str, retries: int) -> Outcome:
    """What a failed download's message means in our terms. img2dataset repeats whatever failed."""
    status = re.match(r"HTTP Error (\d{3})", message)
    number = int(status.group(1)) if status else None
    meant = next((reason.value for pattern, reason in _DOWNLOAD_ERRORS if re.search(pattern, message)), None)
    reason = meant or (http_reason(number) if number else Reason.BAD_RESPONSE.value)
    return _dropped(reason, message, retries + 1) | {"http_status": number}


def _dropped(reason: str, detail: str, attempts: int) -> Outcome:
    return {
        "status": "dropped",
        "reason": str(reason),
        "detail": " ".join(str(detail).split())[:200],
        "attempts": attempts,
    }


def _download(wanted: Sequence[Wanted], keeper: _Keeper, *, has_boxes: bool) -> None:
    """Run img2dataset's downloader on one shard made of these rows."""
    downloader_class, resizer_class, blurrer_class = _img2dataset()
    options = resizer_options(keeper.image)
    if has_boxes:  # else it stores images that need no resizing as they came, unblurred
        options["skip_reencode"] = False
    keeper.resizer = resizer_class(**options, blurrer=blurrer_class() if has_boxes else None)
    rows, urls, boxes = zip(*wanted, strict=True)
    columns: dict[str, pa.Array] = {"url": pa.array(urls), "row": pa.array(rows)}
    if has_boxes:
        columns["boxes"] = pa.array(boxes, pa.list_(pa.list_(pa.float64())))
    with tempfile.TemporaryDirectory(prefix="pairmill-") as folder:  # for its shard's list and its statistics
        shard = Path(folder) / "00000.feather"
        table = pa.table(columns)
        with pa.ipc.new_file(str(shard), table.schema) as file:
            file.write_table(table)
        downloader = downloader_class(
            sample_writer_class=lambda *_: keeper,
            resizer=keeper.resize,
            output_folder=folder,
            column_list=list(columns),
            number_sample_per_shard=max(2, len(wanted)),  # it takes the logarithm
            blurring_bbox_col="boxes" if has_boxes else None,
            **downloader_options(keeper.fetch, keeper.image),
        )
        downloader.download_shard((0, str(shard)))
    if keeper.failure is not None:
        raise keeper.failure


def downloader_options(fetch: FetchConfig, image: ImageConfig) -> dict[str, Any]:
    """Our settings as those of img2dataset's Downloader."""
    return {
        "thread_count": fetch.connections,
        "save_caption": False,
        "extract_exif": image.exif,
        "timeout": fetch.timeout_s,
        "oom_shard_count": 5,
        "compute_hash": None,  # the body passes by, we hash it
        "verify_hash_type": None,
        "encode_format": image.format,
        "retries": fetch.retries,
        "user_agent_token": fetch.user_agent.partition("/")[0].strip() or None,
        "disallowed_header_directives": list(fetch.disallowed_header_directives) or None,
    }


def resizer_options(image: ImageConfig) -> dict[str, Any]:
    """Our settings as those of img2dataset's Resizer."""
    return {
        "image_size": image.size,
        "resize_mode": image.resize,
        "resize_only_if_bigger": image.only_if_bigger,
        "upscale_interpolation": image.upscale_interpolation,
        "downscale_interpolation": image.downscale_interpolation,
        "encode_quality": image.png_compression if image.format == "png" else image.quality,
        "encode_format": image.format,
        "skip_reencode": image.encode == "keep",
        "max_image_area": image.max_pixels,
    }


def _measures(data: bytes) -> Outcome:
    """The columns that our engine measures before it encodes."""
    pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return asdict(measure(pixels))


@cache
def _img2dataset() -> tuple[Any, Any, Any]:
    """Its Downloader, Resizer and blurrer. Imported late: they bring albumentations, wandb and torch."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else albumentations asks the network for a newer version
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer

    return Downloader, Resizer, BoundingBoxBlurrer
