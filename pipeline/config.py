"""Every setting of `pairmill build`. Defaults are a complete configuration but for `input` and `output`."""

import re
from importlib.util import find_spec
from typing import Literal

from pydantic import model_validator

from cluster.config import REQUIRED, Config, StringList, key
from cluster.session import RayConfig
from pipeline.about import AboutConfig
from pipeline.addresses import is_network
from pipeline.balance.config import BalanceConfig
from pipeline.duplicates.config import DedupConfig, Preference
from pipeline.models.config import ModelsConfig
from pipeline.rules.config import CurateConfig

Resize = Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"]
ImageFormat = Literal["jpg", "png", "webp"]
Interpolation = Literal["nearest", "linear", "bilinear", "cubic", "bicubic", "area", "lanczos", "lanczos4"]
HashName = Literal["md5", "sha256", "sha512"]
ColumnNames = Literal["pairmill", "img2dataset"]
Engine = Literal["pairmill", "img2dataset"]
RobotsPolicy = Literal["ignore", "obey"]
TdmPolicy = Literal["ignore", "header", "file"]
SourceFormat = Literal["auto", "parquet", "csv", "tsv", "json", "jsonl", "txt"]

_CONTACT = r"https?://[!-'*-~]+|[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+"
"""No parentheses: it goes into a comment of the User-Agent."""


PLAIN_SOURCE = "input"
"""What the column `source` says of pairs that come from the key `input`."""


class ColumnsConfig(Config):
    """Which columns of the lists are what."""

    url: str = key("url", "column that holds the image URL")
    caption: str = key("caption", "column that holds the caption; a plain-text list needs none")
    keep: StringList | None = key(None, "further columns that travel into the dataset; null: all, []: none")
    boxes: str | None = key(
        None,
        "column with the boxes that are blurred in each image: a list of [x_min, y_min, x_max, y_max], or its JSON, "
        "as parts of the upright image's width and height (0 to 1)",
    )
    hash: str | None = key(None, "column with the hash that the downloaded bytes must have, see fetch.verify_hash")


class SourceConfig(Config):
    """One named source of pairs, beside others."""

    input: StringList = key(
        REQUIRED, "URL lists, datasets of pairmill or outputs of img2dataset, as for the key input", min_length=1
    )
    columns: ColumnsConfig = key(ColumnsConfig(), "columns")
    label: str | None = key(
        None,
        "column with the category of each image, which becomes the column label; captions may be empty or absent",
    )
    weight: float = key(1.0, "share of the pairs that is taken, chosen by uid before any download; at most 1", ge=0)
    priority: int = key(0, "of duplicates the one of the source with the largest is kept", ge=-(10**9), le=10**9)


class ReadConfig(Config):
    """How lists are read."""

    format: SourceFormat = key("auto", "format of the lists; auto: by file name")
    infer_rows: int = key(1_000, "rows of a JSON list from which the types of its columns are taken", ge=1)


class PlanConfig(Config):
    """How rows are cut into work."""

    rows_per_unit: int = key(2_000, "URLs in one fetch unit: what a killed worker has to do again", unit="rows", ge=1)
    rows_per_range: int = key(1_000_000, "rows that one planning task sorts in memory", unit="rows", ge=1)


class FetchConfig(Config):
    """How images are downloaded. A task is one core's event loop."""

    connections: int = key(128, "transfers at once in a task", affects_result=False, ge=1, le=4_096)
    connections_per_host: int = key(
        8, "transfers at once to one host, of all tasks of the build together", affects_result=False, ge=1
    )
    requests_per_s_per_host: float | None = key(
        None,
        "requests to one host, of all tasks together; null: as fast as it answers",
        unit="1/s",
        affects_result=False,
        gt=0,
    )
    host_wait_s: float = key(
        300.0,
        "a host to which no request could begin for so long, because others have its slots, or whose Crawl-delay held "
        "up a unit for so long in all, is given up for now",
        unit="s",
        affects_result=False,
        gt=0,
    )
    timeout_s: float = key(20.0, "longest time for one attempt", unit="s", affects_result=False, gt=0)
    connect_timeout_s: float = key(
        8.0, "longest time to look up a name, and to connect", unit="s", affects_result=False, gt=0
    )
    min_speed: int = key(1_000, "slower than this for min_speed_s is a timeout", unit="B/s", affects_result=False, ge=0)
    min_speed_s: int = key(8, "how long a transfer may be slower than min_speed", unit="s", affects_result=False, ge=1)
    max_redirects: int = key(5, "redirects followed", ge=0)
    max_bytes: int = key(32 * 2**20, "largest body taken", unit="B", ge=1)
    retries: int = key(2, "further attempts after a transient failure", affects_result=False, ge=0, le=20)
    backoff_s: float = key(
        1.0, "wait before the first retry, doubled for each next", unit="s", affects_result=False, ge=0
    )
    host_failures: int = key(
        5, "transient failures in a row after which a host is left alone for a while", affects_result=False, ge=1
    )
    max_wait_s: float = key(
        60.0,
        "longest that a unit waits for one host in all, as it asks for by Retry-After or because it fails; what is "
        "left of the host is parked for `pairmill repair`",
        unit="s",
        affects_result=False,
        ge=0,
    )
    max_busy_s: float = key(
        900.0,
        "longest that a unit has requests under way at one host in all, however slowly it answers; what is left of the "
        "host is parked for `pairmill repair`",
        unit="s",
        affects_result=False,
        gt=0,
    )
    user_agent: str = key(
        "pairmill/0.1 (image-text dataset builder)",
        "who we say we are; sites address us by its first word",
        affects_result=False,
        min_length=1,
    )
    contact: str | None = key(
        None,
        "a URL or mail address that goes into the User-Agent, for sites that want to reach you",
        affects_result=False,
    )
    robots: RobotsPolicy = key("ignore", "obey: ask every site's robots.txt first, and do what it says (RFC 9309)")
    disallowed_header_directives: StringList = key(
        ["noai", "noimageai", "noindex", "noimageindex"],
        "images whose X-Robots-Tag says one of these are not used; []: any is",
    )
    tdm_reservation: TdmPolicy = key(
        "header",
        "header: images whose answer reserves text and data mining (tdm-reservation: 1) are not used; file: those that "
        "the site's /.well-known/tdmrep.json reserves neither; ignore: use them",
    )
    allow_private_addresses: bool = key(False, "also connect to loopback, private and other special addresses")
    allow_addresses: StringList = key(
        [], "networks that may be connected to although they are not public, such as [10.1.0.0/16]"
    )
    verify_tls: bool = key(
        True, "check servers' certificates, against SSL_CERT_FILE, CURL_CA_BUNDLE or the system's bundle"
    )
    decode_threads: int = key(
        1,
        "threads that decode and encode beside the event loop",
        unit="threads",
        affects_result=False,
        ge=1,
        le=64,
    )
    memory_mib: int = key(
        1_024,
        "memory declared for a task; at most a quarter is bodies being held",
        unit="MiB",
        affects_result=False,
        ge=256,
    )
    num_cpus: float = key(1.0, "cores declared for a task", unit="cores", affects_result=False, gt=0)
    compute_hash: HashName = key(
        "sha256", "hash of the downloaded bytes that gets a column of its name; sha256 is there in any case"
    )
    verify_hash: HashName | None = key(
        None, "what columns.hash holds; another hash of the downloaded bytes drops the image"
    )
    engine: Engine = key(
        "pairmill",
        "img2dataset: its downloader in the place of ours, to compare; it has NO guard against internal addresses, "
        "bodies without end or decompression bombs and no limit per host: it is refused unless "
        "you set what it cannot hold, such as fetch.allow_private_addresses=true (docs/img2dataset.md)",
    )


class ImageConfig(Config):
    """What an image becomes."""

    mode: Literal["exact", "fast"] = key(
        "exact",
        "exact: decode the whole image, then shrink it; fast: decode JPEGs at a half, a quarter or an eighth of their "
        "size where that is enough (docs/images.md: speed and loss)",
    )
    size: int = key(256, "target side", unit="px", ge=1, le=16_384)
    resize: Resize = key(
        "keep_ratio",
        "keep_ratio: shorter side = size; keep_ratio_largest: longer side = size; center_crop: shorter side = size, "
        "then the middle square; border: longer side = size, white up to the square; no: as it is",
    )
    only_if_bigger: bool = key(True, "never enlarge")
    downscale_interpolation: Interpolation = key("area", "how images are shrunk")
    upscale_interpolation: Interpolation = key("lanczos", "how images are enlarged")
    format: ImageFormat = key("jpg", "format written")
    quality: int = key(95, "of jpg and webp", ge=1, le=100)
    png_compression: int = key(6, "of png: 0 is the fastest, 9 the smallest", ge=0, le=9)
    encode: Literal["always", "keep"] = key(
        "always",
        "keep: an image of this format that needs no change (size, orientation, transparency) is stored as it came",
    )
    exif: bool = key(False, "keep the EXIF tags of kept images, as JSON in the column exif")
    max_pixels: int = key(64_000_000, "larger images are refused before they are decoded", unit="px", ge=1, le=2**29)
    decode_timeout_s: int = key(
        20,
        "processor time for one image, after which its decoder is ended",
        unit="s",
        affects_result=False,
        ge=1,
        le=86_400,
    )


class PackConfig(Config):
    """How the dataset is cut."""

    samples_per_shard: int = key(10_000, "samples in each shard but the last", ge=1)
    columns: ColumnNames = key(
        "pairmill",
        "img2dataset: also its columns status, error_message and exif, in parquet and json; the others have the same "
        "names anyway",
    )


class BuildConfig(Config):
    """`pairmill build`: from URL lists to a dataset."""

    input: StringList = key(
        [],
        "URL lists: files, globs, folders, any fsspec URL; also datasets of pairmill and outputs of img2dataset, whose "
        "images are taken as they are (docs/several-runs.md)",
    )
    output: str = key(REQUIRED, "folder or URL where the dataset is built", affects_result=False, min_length=1)
    sources: dict[str, SourceConfig] = key(
        {}, "named sources beside input: {NAME: {input, columns, label, weight, priority}} (docs/several-runs.md)"
    )
    against: StringList = key(
        [], "earlier datasets: pairs that they have are not fetched again, duplicates of their samples are dropped"
    )
    base: str | None = key(
        None, "the dataset whose downloads are decided about anew; set by `pairmill curate`, not by people"
    )
    fetch_missing: bool = key(
        False, "of `pairmill curate`: also fetch pairs that the base had left out before the download"
    )
    seed: int = key(0, "of the order of the samples", ge=0, lt=2**63)
    columns: ColumnsConfig = key(ColumnsConfig(), "columns")
    read: ReadConfig = key(ReadConfig(), "reading")
    plan: PlanConfig = key(PlanConfig(), "planning")
    fetch: FetchConfig = key(FetchConfig(), "downloading")
    image: ImageConfig = key(ImageConfig(), "images")
    curate: CurateConfig = key(CurateConfig(), "curation")
    dedup: DedupConfig = key(DedupConfig(), "deduplication")
    models: ModelsConfig = key(ModelsConfig(), "models that look at images")
    balance: BalanceConfig = key(BalanceConfig(), "balance of concepts")
    pack: PackConfig = key(PackConfig(), "packing")
    report: AboutConfig = key(AboutConfig(), "what people know of the dataset, for its card")
    ray: RayConfig = key(RayConfig(), "Ray")

    @model_validator(mode="after")
    def _relations(self) -> "BuildConfig":
        own = (*self._place_relations(), *self._fetch_relations(), *self._agent_relations(), *self._engine_relations())
        for problem in (*own, *self.curate.problems(), *self.balance.problems(), *self._model_relations()):
            raise ValueError(problem)
        return self

    def _model_relations(self) -> list[str]:
        curate, dedup, problems = self.curate, self.dedup, []
        for key_name, value in (
            ("dedup.semantic_similarity", dedup.semantic_similarity),
            ("curate.evaluation_similarity", curate.evaluation_similarity),
        ):
            if value is not None and dedup.semantic_model is None:
                problems.append(f"{key_name}={value}: set dedup.semantic_model, whose embeddings are compared")
        if dedup.semantic_model is not None and find_spec("faiss") is None:
            problems.append("dedup.semantic_model: faiss is not installed; pip install 'pairmill[semantic]'")
        return problems

    def _place_relations(self) -> list[str]:
        problems = self._source_relations()
        patterns = [*self.input, *(pattern for source in self.sources.values() for pattern in source.input)]
        if not patterns:
            problems.append("input: required, and not given; add input=..., or sources.NAME.input=...")
        if not all(pattern.strip() for pattern in patterns):
            problems.append("input: an empty name; give URL lists: files, globs, folders, any fsspec URL")
        if self.output.startswith("memory:") and self.ray.address != "inline":
            problems.append(
                f"output={self.output}: Ray's workers do not share their memory; choose a folder or an object store"
            )
        return problems

    def _source_relations(self) -> list[str]:
        problems = [
            f"sources.{name}: not a name for a source; use letters, digits, - and _, and not {PLAIN_SOURCE}, which is "
            "what the lists of the key input are called"
            for name in self.sources
            if not re.fullmatch("[A-Za-z0-9_-]+", name) or name == PLAIN_SOURCE
        ]
        problems += [
            f"sources.{name}.weight={source.weight:g}: a dataset holds a pair once; to see a source more often, give "
            "weights to training (data.weight, data.extra[].weight), or take less of the others here"
            for name, source in self.sources.items()
            if source.weight > 1
        ]
        problems += [
            f"sources.{name}.columns.{role}={column}: one column has to have them in all sources; call it alike "
            f"everywhere and set columns.{role}={column} too"
            for name, source in self.sources.items()
            for role, column in (("boxes", source.columns.boxes), ("hash", source.columns.hash))
            if column is not None and column != getattr(self.columns, role)
        ]
        if self.fetch_missing and self.base is None:
            problems.append("fetch_missing: only `pairmill curate` knows what is missing; leave it out")
        return problems

    def _fetch_relations(self) -> list[str]:
        fetch, columns, problems = self.fetch, self.columns, []
        if fetch.connect_timeout_s > fetch.timeout_s:
            problems.append(
                f"fetch.connect_timeout_s={fetch.connect_timeout_s:g}: longer than the whole attempt may take; "
                f"set it to at most fetch.timeout_s={fetch.timeout_s:g}"
            )
        if fetch.max_bytes > fetch.memory_mib * 2**20 // 4:
            problems.append(
                f"fetch.max_bytes={fetch.max_bytes}: more than a quarter of fetch.memory_mib={fetch.memory_mib}; "
                f"set fetch.memory_mib to at least {-(-fetch.max_bytes * 4 // 2**20)}"
            )
        problems += [
            f"fetch.allow_addresses: {network}: not a network such as 10.1.0.0/16"
            for network in fetch.allow_addresses
            if not is_network(network)
        ]
        if (columns.hash is None) != (fetch.verify_hash is None):
            problems.append(
                f"columns.hash={columns.hash}, fetch.verify_hash={fetch.verify_hash}: the one is the column with the "
                "hashes, the other says which hash they are; set both or neither"
            )
        for role, name in (("boxes", columns.boxes), ("hash", columns.hash)):
            if name is not None and columns.keep is not None and name not in columns.keep:
                problems.append(f"columns.{role}={name}: is not among columns.keep; add it there")
        if columns.url == columns.caption:
            problems.append(f"columns.caption={columns.caption}: is the URL column too; set another columns.caption")
        return problems

    def _agent_relations(self) -> list[str]:
        fetch, problems = self.fetch, []
        if not re.fullmatch(r"[A-Za-z_-]+(/[!-~]+)?( [ -~]*)?", fetch.user_agent):
            problems.append(
                f"fetch.user_agent={fetch.user_agent!r}: not a User-Agent; write a name, a version and a comment in "
                "plain ASCII, such as mybot/1.0 (what it is for)"
            )
        if fetch.contact is not None and not re.fullmatch(_CONTACT, fetch.contact):
            problems.append(
                f"fetch.contact={fetch.contact!r}: neither a URL nor a mail address; give one such as "
                "https://example.org/bot or bot@example.org, or null"
            )
        problems += [
            f"fetch.disallowed_header_directives: {directive!r}: not a directive such as noai; [] turns them off"
            for directive in fetch.disallowed_header_directives
            if not re.fullmatch(r"[A-Za-z][A-Za-z_-]*", directive.strip())
        ]
        return problems

    def _engine_relations(self) -> list[str]:
        """What would be asked of img2dataset and it cannot do."""
        if self.fetch.engine != "img2dataset":
            return []
        asked = {
            "fetch.allow_private_addresses=true": not self.fetch.allow_private_addresses,
            "fetch.tdm_reservation=ignore": self.fetch.tdm_reservation != "ignore",
            "fetch.robots=ignore": self.fetch.robots != "ignore",
            "fetch.requests_per_s_per_host=null": self.fetch.requests_per_s_per_host is not None,
            "fetch.contact=null": self.fetch.contact is not None,
            "image.mode=exact": self.image.mode != "exact",
        }
        needed = " ".join(setting for setting, is_needed in asked.items() if is_needed)
        if not needed:
            return []
        return [
            "fetch.engine=img2dataset: has no guard against internal addresses, no limit per host, no fast mode and "
            f"reads neither robots.txt nor tdm-reservation; to go without, set {needed}, or leave fetch.engine=pairmill"
        ]


def preferences(config: BuildConfig) -> tuple[Preference, ...]:
    """What of `dedup.prefer` makes a difference: sources do if their priorities differ; uids decide last anyway."""
    has_effect = {"source": len({*source_priorities(config).values()}) > 1, "caption": True, "uid": False}
    return tuple(name for name in config.dedup.prefer if has_effect[name])


def source_priorities(config: BuildConfig) -> dict[str, int]:
    """Source name -> its priority; larger ones are preferred. Pairs of the key `input` have 0."""
    return {PLAIN_SOURCE: 0} | {name: source.priority for name, source in config.sources.items()}
