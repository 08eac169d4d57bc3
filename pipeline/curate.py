"""`pairmill curate OLD output=NEW`: the decisions of a dataset taken again, with other settings, without a download."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config import flatten, read_words, validate
from cluster.errors import RequestError
from cluster.run import open_store, require_run
from cluster.store import Store
from pipeline.build import build_command
from pipeline.config import BuildConfig
from pipeline.manifest import MANIFEST_FILE, read_manifest
from pipeline.reasons import Reason

REVISITED = ("curate.", "dedup.", "balance.", "models.", "pack.", "base", "fetch_missing", "against")
"""Settings, of those that affect results, that may be other than they were."""
_OF_SOURCE = ("weight", "priority")
_OWN = ("output", "base", "fetch_missing")


def settings_over_base(words: Sequence[str]) -> BuildConfig:
    """The settings of the dataset that the words name as `base`, with the words' own over them.

    Raises RequestError when there is none, and for a setting that cannot be revisited.
    """
    dataset = read_words(BuildConfig, words).get("base")
    if not dataset:
        raise RequestError("the dataset to decide about is missing: pairmill curate OLD output=NEW [key=value ...]")
    _, record = require_run(str(dataset), "build")
    read_manifest(str(dataset))
    stored = {name: value for name, value in record["config"].items() if name not in _OWN}
    values = read_words(BuildConfig, words, stored)
    values["base"] = open_store(str(dataset)).url
    config = validate(BuildConfig, values)
    _refuse_fixed(validate(BuildConfig, stored | {"output": "-"}), config)
    _refuse_same_place(config)
    return config


def curate_command(config: BuildConfig) -> int:
    """Decide, and say which pairs would have to be fetched."""
    status = build_command(config)
    store = Store(config.output)
    if not store.exists(MANIFEST_FILE):  # a dry run
        return status
    if number := read_manifest(config.output)[1].counts.get(Reason.NOT_DOWNLOADED.value, 0):
        print(
            f"not downloaded: {number:,} rows, which {config.base} had left out before the download and these settings "
            "do not; they are recorded as not_downloaded. To fetch them: the same command with fetch_missing=true and "
            "another output"
        )
    return status


def _refuse_fixed(old: BuildConfig, new: BuildConfig) -> None:
    """RequestError naming every setting that was decided with the download."""
    before, after = _results(old), _results(new)
    lines = [
        f"  {name}: it has {before.get(name)}, this request has {after.get(name)}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name) and not name.startswith(REVISITED)
    ]
    if lines:
        raise RequestError(
            f"{new.base}: these settings cannot be revisited, as its lists were read and its images downloaded and "
            "stored by them; leave them out, or build into a new output with `pairmill build`:\n" + "\n".join(lines)
        )


def _results(config: BuildConfig) -> Mapping[str, Any]:
    settings = flatten(config, only_result=True)
    settings["sources"] = {
        name: {key: value for key, value in source.items() if key not in _OF_SOURCE}
        for name, source in settings["sources"].items()
    }
    return settings


def _refuse_same_place(config: BuildConfig) -> None:
    store = open_store(config.output)
    store.full(config.base or "")  # RequestError when it is on another file system
    output = store.url
    if output == config.base or output.startswith(f"{config.base}/"):
        raise RequestError(f"output={config.output}: lies in the dataset that is decided about; choose another folder")
