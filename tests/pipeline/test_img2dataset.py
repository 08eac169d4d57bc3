"""The users of img2dataset: its engine inside ours, its columns, and where each of its options has gone."""

import errno
import hashlib
import inspect
import io
import json
import os
import re
import sys
import tarfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from cluster.config import help_text, parse, walk_keys
from cluster.errors import RequestError, RunError
from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal
from cluster.progress import Progress
from cluster.store import Store
from pipeline.__main__ import main
from pipeline.config import BuildConfig
from pipeline.fetch import FETCHED, FetchStage
from pipeline.img2dataset_engine import download_failure
from pipeline.plan import OrderStage, ReadStage
from pipeline.tar import TarWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "corpus"))

from lists import make_rows
from server import start_server

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore:.*imghdr.*", "ignore:always_apply.*")
PAGE = Path(__file__).parents[2] / "docs/img2dataset.md"
ENGINE = ("fetch.engine=img2dataset", "fetch.allow_private_addresses=true", "fetch.tdm_reservation=ignore")
NUM_URLS = 1_000
Row = dict[str, Any]

# What the two engines make of the corpus's odd pictures is different by design; docs/img2dataset.md says how.
OTHER_PIXELS = {"exif": "it leaves images lying on their side", "gray16": "it writes 16-bit values cut off at 255"}
TOLERANCE = 2.0
"""Mean difference of decoded pixels, of 255. Only CMYK differs at all (1.1): Pillow's conversion is not OpenCV's."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with start_server() as port:
        yield port


def fetch(folder: Path, urls: Path, *words: str) -> dict[str, Row]:
    """Rows by uid, with the encoded image in `data`."""
    settings = [f"input={urls}", f"output={folder}", "fetch.allow_private_addresses=true", "image.size=64", *words]
    config = parse(BuildConfig, [*settings, "fetch.retries=0", "fetch.timeout_s=4", "fetch.connect_timeout_s=4"])
    store = Store(config.output)
    journal, progress = Journal(store), Progress()
    sources = run_stage(ReadStage.of(config), journal, InlineExecutor(), progress)
    ordered = run_stage(OrderStage.of(config, store, sources), journal, InlineExecutor(), progress)
    rows = {}
    for marker in run_stage(FetchStage.of(config, store, ordered), journal, InlineExecutor(), progress).values():
        images = store.read_bytes(marker.path_of("images.tar"))
        table = pq.read_table(io.BytesIO(store.read_bytes(marker.path_of("rows.parquet"))))
        assert table.schema.names[: len(FETCHED)] == FETCHED.names
        for row in table.to_pylist():
            if row["image_size"]:
                row["data"] = images[row["image_offset"] :][: row["image_size"]]
            rows[row["uid"]] = row
    return rows


def pixels(row: Row) -> Any:
    return cv2.imdecode(np.frombuffer(row["data"], np.uint8), cv2.IMREAD_COLOR).astype(np.int16)


def kind_of(url: str | None) -> str:
    parts = (url or "").split("/")
    return parts[3] if len(parts) > 4 else ""


def test_both_engines_agree_on_a_thousand_urls(tmp_path: Path, port: int) -> None:
    """The same pairs are kept, with the same sizes, hashes and pixels; the others are dropped for the same reason."""
    made = [row for row in make_rows(port, 900) if kind_of(row.url) != "flaky"][:NUM_URLS]  # fails only once
    urls = tmp_path / "urls.parquet"
    pq.write_table(pa.table({"url": [row.url for row in made], "caption": [row.caption for row in made]}), urls)
    ours, theirs = fetch(tmp_path / "ours", urls), fetch(tmp_path / "theirs", urls, *ENGINE)
    assert sum(row["num_rows"] for row in ours.values()) == NUM_URLS == len(made)
    told = ("status", "reason", "width", "height", "original_width", "original_height", "sha256", "size_bytes")
    different, compared = [], Counter[str]()
    for uid, row in ours.items():
        kind, other = kind_of(row["url"]), theirs[uid]
        names = ("status", "reason", "sha256") if kind in OTHER_PIXELS else (*told, "source_format", "image_format")
        different += [(row["url"], name, row[name], other[name]) for name in names if row[name] != other[name]]
        if row["status"] == "ok" and kind not in OTHER_PIXELS and not different:
            assert np.abs(pixels(row) - pixels(other)).mean() < TOLERANCE, row["url"]
            compared[row["source_format"]] += 1
    assert different == []
    assert compared["webp"] > 800
    assert set(compared) == {"webp", "jpeg", "png", "gif"}
    assert len({row["reason"] for row in ours.values()}) >= 10


def test_measures_of_both_engines_are_alike(tmp_path: Path, port: int) -> None:
    made = [row for row in make_rows(port, 30) if kind_of(row.url) == "img"][:20]
    urls = tmp_path / "urls.parquet"
    pq.write_table(pa.table({"url": [row.url for row in made], "caption": [row.caption for row in made]}), urls)
    ours, theirs = fetch(tmp_path / "ours", urls), fetch(tmp_path / "theirs", urls, *ENGINE)
    for uid, row in ours.items():
        for name in ("grey_std", "mean_red", "mean_green", "mean_blue"):
            assert theirs[uid][name] == pytest.approx(row[name], abs=4), name  # theirs are of the encoded image


def test_the_engine_keeps_the_plans_verdicts_and_refuses_urls_of_no_use(tmp_path: Path, port: int) -> None:
    urls = tmp_path / "urls.csv"
    urls.write_text("url,caption\nnot a url,a\nhttp://a/\x07,b\n,c\nftp://a/b,d\nhttp://127.0.1.99:1/x,e\n")
    rows = {row["caption"]: row for row in fetch(tmp_path / "out", urls, *ENGINE).values()}
    assert {caption: (row["reason"], row["attempts"]) for caption, row in rows.items()} == {
        "a": ("invalid_url", 0),
        "b": ("invalid_url", 0),
        "c": ("missing_url", 0),
        "d": ("unsupported_scheme", 0),
        "e": ("connection_failed", 1),
    }


def test_the_engine_checks_hashes_and_blurs_boxes(tmp_path: Path, port: int) -> None:
    made = [row for row in make_rows(port, 30) if kind_of(row.url) == "img"][:4]
    plain = tmp_path / "plain.parquet"
    columns = {"url": [row.url for row in made], "caption": list("abcd")}
    pq.write_table(pa.table(columns), plain)
    known = {row["caption"]: row for row in fetch(tmp_path / "plain", plain).values()}
    columns["boxes"] = [[], [[0.2, 0.2, 0.8, 0.8]], [[0.0, 300.0, 20.0, 20.0]], []]
    columns["md5"] = [hashlib.md5(b"").hexdigest(), None, None, ""]
    urls = tmp_path / "urls.parquet"
    pq.write_table(pa.table(columns), urls)
    words = ("columns.boxes=boxes", "columns.hash=md5", "fetch.verify_hash=md5", "fetch.compute_hash=md5")
    rows = {row["caption"]: row for row in fetch(tmp_path / "out", urls, *words, *ENGINE).values()}
    assert [rows[caption]["reason"] for caption in "abcd"] == ["hash_mismatch", None, "bad_boxes", "hash_mismatch"]
    assert rows["b"]["sha256"] == known["b"]["sha256"]
    assert len(rows["b"]["md5"]) == 32
    inside, corner = (slice(24, 40), slice(24, 40)), (slice(0, 4), slice(0, 4))
    changed = np.abs(pixels(rows["b"]) - pixels(known["b"]))
    assert changed[inside].mean() > 1
    assert changed[corner].mean() < 1
    as_they_came = ("image.size=4096", "image.encode=keep")  # none is resized
    rows = {row["caption"]: row for row in fetch(tmp_path / "kept", urls, *words, *ENGINE, *as_they_came).values()}
    assert hashlib.sha256(rows["b"]["data"]).hexdigest() != rows["b"]["sha256"]


def test_a_full_disk_ends_the_unit_with_its_engine_too(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(writer: TarWriter, name: str, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TarWriter, "add", add)
    (row,) = [row for row in make_rows(port, 30) if kind_of(row.url) == "img"][:1]
    urls = tmp_path / "urls.parquet"
    pq.write_table(pa.table({"url": [row.url], "caption": ["a"]}), urls)
    with pytest.raises(RunError, match=r"no space left on the disk of .*make room there"):
        fetch(tmp_path / "out", urls, *ENGINE)


@pytest.mark.parametrize(
    ("message", "reason", "status"),
    [
        ("HTTP Error 404: Not Found", "http_404", 404),
        ("HTTP Error 503: Service Unavailable", "http_503", 503),
        ("HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\nThe last 30x "
         "error message was:\nFound", "too_many_redirects", 302),
        ("Use of image disallowed by X-Robots-Tag directive", "opted_out", None),
        ("<urlopen error [Errno -2] Name or service not known>", "unknown_host", None),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns_failure", None),
        ("<urlopen error [Errno 111] Connection refused>", "connection_failed", None),
        ("Remote end closed connection without response", "connection_failed", None),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: Hostname mismatch (_ssl.c:1006)>",
         "tls_failure", None),
        ("<urlopen error timed out>", "timeout", None),
        ("The read operation timed out", "timeout", None),
        ("IncompleteRead(716 bytes read, 717 more expected)", "truncated", None),
        ("<urlopen error unknown url type: gopher>", "unsupported_scheme", None),
        ("garbage instead of a status line", "bad_response", None),
    ],
)  # fmt: skip
def test_its_messages_become_reasons(message: str, reason: str, status: int | None) -> None:
    outcome = download_failure(message, retries=2)
    assert (outcome["reason"], outcome["http_status"], outcome["attempts"]) == (reason, status, 3)
    assert "\n" not in outcome["detail"]


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (("fetch.tdm_reservation=ignore",), "fetch.allow_private_addresses=true,"),
        (("fetch.allow_private_addresses=true",), "fetch.tdm_reservation=ignore,"),
        ((*ENGINE, "fetch.robots=obey"), "fetch.robots=ignore,"),
        ((*ENGINE, "fetch.requests_per_s_per_host=2"), "fetch.requests_per_s_per_host=null,"),
        ((*ENGINE, "image.mode=fast"), "image.mode=exact,"),
    ],
)
def test_what_it_cannot_hold_is_refused_before_any_work(words: tuple[str, ...], needed: str) -> None:
    with pytest.raises(RequestError, match=re.escape(f"to go without, set {needed}")):
        parse(BuildConfig, ["input=x", "output=y", "fetch.engine=img2dataset", *words])


def test_the_help_warns_of_the_engine() -> None:
    assert "NO guard against internal addresses" in help_text(BuildConfig)


def read_as_img2dataset_writes(tar: Path) -> list[tuple[Any, str, Row]]:
    """Somebody's loader for img2dataset's shards."""
    dataset = webdataset.WebDataset(str(tar), shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt", "json")
    return list(dataset)


def img2datasets_shard(folder: Path, urls: list[str], captions: list[str]) -> Path:
    """A shard written by img2dataset itself."""
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

    folder.mkdir()
    table = pa.table({"url": urls, "caption": captions})
    with pa.ipc.new_file(str(folder / "list.feather"), table.schema) as file:
        file.write_table(table)
    downloader = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=Resizer(256, "keep_ratio", resize_only_if_bigger=True),
        thread_count=4,
        save_caption=True,
        extract_exif=True,
        output_folder=str(folder),
        column_list=["url", "caption"],
        timeout=5,
        number_sample_per_shard=10,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    downloader.download_shard((0, str(folder / "list.feather")))
    return folder / "00000.tar"


def test_a_reader_of_its_shards_reads_ours(tmp_path: Path, site: Any, words: Callable[..., list[str]]) -> None:
    pairs = {f"{site.url}/image/n{number}": f"picture {number}" for number in range(5)}
    theirs = img2datasets_shard(tmp_path / "theirs", list(pairs), list(pairs.values()))
    urls = tmp_path / "urls.csv"
    urls.write_text("url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in pairs.items()))
    settings = words(tmp_path / "ours", f"input={urls}", "pack.columns=img2dataset", "image.exif=true")
    settings.append("fetch.compute_hash=md5")
    assert main(["build", *settings]) == 0
    ours = tmp_path / "ours/shards/00000.tar"
    by_url = {told["url"]: (image, caption, told) for image, caption, told in read_as_img2dataset_writes(theirs)}
    for image, caption, told in read_as_img2dataset_writes(ours):
        their_image, their_caption, their_told = by_url.pop(told["url"])
        assert np.array_equal(image, their_image)
        assert caption == their_caption
        assert {name: told[name] for name in their_told} == their_told | {"key": told["key"]}
        with urllib.request.urlopen(told["url"], timeout=5) as answer:
            assert told["md5"] == hashlib.md5(answer.read()).hexdigest()
    assert by_url == {}
    their_schema = pq.read_schema(theirs.with_suffix(".parquet"))
    our_schema = pq.read_schema(ours.with_suffix(".parquet"))
    assert {field.name: field.type for field in their_schema} == {
        name: our_schema.field(name).type for name in their_schema.names
    }
    assert pq.read_table(ours.with_suffix(".parquet"))["status"].to_pylist() == ["success"] * 5
    assert our_schema.field("md5").type == "string"
    with tarfile.open(theirs) as one, tarfile.open(ours) as other:
        assert {Path(name).suffix for name in one.getnames()} == {Path(name).suffix for name in other.getnames()}


def test_without_being_asked_the_shards_have_no_columns_that_say_nothing(dataset: Path) -> None:
    names = pq.read_schema(dataset / "shards/00000.parquet").names
    assert not {"status", "error_message", "exif"} & set(names)
    with tarfile.open(dataset / "shards/00000.tar") as tar:
        member = next(name for name in tar.getnames() if name.endswith(".json"))
        file = tar.extractfile(member)
        assert file is not None
        assert not {"status", "error_message", "exif"} & set(json.load(file))


def page_rows() -> dict[str, str]:
    """option -> the rest of its line, of the page's tables."""
    return dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(), re.M))


def test_the_page_maps_every_option_with_its_default() -> None:
    from img2dataset import download

    parameters = inspect.signature(download).parameters
    rows = page_rows()
    assert set(rows) == set(parameters)
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            written = json.dumps(parameter.default).replace('"', "") if parameter.default != float("inf") else "inf"
            assert f"`{written}`" in rows[name].split("|")[0], name


def test_the_keys_that_the_page_names_exist() -> None:
    known = {name for name, _ in walk_keys(BuildConfig)}
    named = set(re.findall(r"`((?:columns|read|plan|fetch|image|curate|dedup|pack|ray)\.\w+)", PAGE.read_text()))
    assert len(named) > 20
    assert named <= known


def test_the_moving_example_is_a_request_that_parses() -> None:
    text = PAGE.read_text()
    command = re.search(r"^pairmill build (.*?)\n```", text, re.M | re.S)
    assert command
    config = parse(BuildConfig, command.group(1).replace("\\\n", " ").split())
    assert (config.image.resize, config.pack.columns) == ("border", "img2dataset")
