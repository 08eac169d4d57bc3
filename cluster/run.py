"""The run registry: one folder holds one run, described by `run.json`.

Running the same command on the same folder resumes it. Another kind of run, or a configuration that would change the
results, is refused with the keys that differ, so that two runs never mix in one folder.
"""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from cluster.config import Config, flatten
from cluster.errors import RequestError, RunError
from cluster.journal import Journal
from cluster.redact import redact
from cluster.store import Store

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """An opened run. `resumed` says whether the folder already held it."""

    kind: str
    store: Store
    journal: Journal
    resumed: bool


def open_run(output: str, kind: str, config: Config, work_format: int | None = None) -> Run:
    """Register a run in its output folder, or resume the one that is there.

    kind: "build", "train" or "eval". config: stored whole in run.json, but for what signs URLs; only keys with
    affects_result are compared. work_format: of what stages leave for one another; None: it does not matter.
    Raises RequestError when the folder holds another run or files that belong to no run, or cannot be used.
    """
    store = open_store(output)
    try:
        return _register(store, kind, config, work_format)
    except RequestError:
        raise
    except RunError as error:
        raise RequestError(f"output={error}") from error
    except Exception as error:  # the first time that we touch this place: each file system has errors of its own
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"output={store.url}: cannot be read or written ({said}); choose a folder that this user may write"
        ) from error


def _register(store: Store, kind: str, config: Config, work_format: int | None) -> Run:
    record = {
        "kind": kind,
        "pairmill": version("pairmill"),
        "work_format": work_format,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "result_config": redact(flatten(config, only_result=True)),
        "config": redact(config.model_dump(mode="json")),
    }
    found = read_run(store)
    if found is None:
        _refuse_strangers(store)
        if store.create(RUN_FILE, json.dumps(record, indent=1).encode()):
            return Run(kind=kind, store=store, journal=Journal(store), resumed=False)
        found = read_run(store) or {}
    _refuse_other_run(store, found, record)
    return Run(kind=kind, store=store, journal=Journal(store), resumed=True)


def read_run(store: Store) -> dict[str, Any] | None:
    """The content of a folder's run.json, or None if there is none. RequestError if it is not readable."""
    try:
        loaded = json.loads(store.read_bytes(RUN_FILE))
    except FileNotFoundError:
        return None
    except RunError as error:
        raise RequestError(str(error)) from error
    except OSError as error:
        raise RequestError(
            f"{store.url}: cannot be read as the folder of a run ({error.strerror or error}); choose another folder"
        ) from None
    except ValueError as error:
        raise RequestError(
            f"{store.url_of(RUN_FILE)}: not readable as JSON ({error}); choose another output or remove this folder"
        ) from None
    if not isinstance(loaded, dict):
        raise RequestError(f"{store.url_of(RUN_FILE)}: does not describe a pairmill run")
    return loaded


def require_run(output: str, *kinds: str) -> tuple[Store, dict[str, Any]]:
    """Open the folder of an existing run of one of `kinds`. RequestError if it holds none."""
    store = open_store(output)
    found = read_run(store)
    if found is None:
        raise RequestError(f"{output}: holds no pairmill run (no {RUN_FILE}); give the output folder of a run")
    if kinds and found.get("kind") not in kinds:
        raise RequestError(f"{output}: holds a {found.get('kind')} run; this command needs a {' or '.join(kinds)} run")
    return store, found


def open_store(output: str) -> Store:
    """The place that the key `output` names. Raises RequestError when nobody here can open its kind."""
    try:
        return Store(output)
    except (ValueError, ImportError) as error:
        raise RequestError(f"output={output}: cannot open this location: {error}") from None


def _refuse_strangers(store: Store) -> None:
    if store.is_local:
        strangers = [entry.path for entry in store.find() if not entry.path.startswith(".")][:3]
        if strangers and read_run(store) is None:  # else they belong to the same command, started beside us
            raise RequestError(
                f"output={store.url}: holds files that belong to no pairmill run ({', '.join(strangers)}, ...); "
                "choose an empty or new folder"
            )


def _refuse_other_run(store: Store, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found.get("kind") != wanted["kind"]:
        raise RequestError(
            f"output={store.url}: holds a {found.get('kind')} run, this is a {wanted['kind']} run; "
            "choose another output"
        )
    if wanted["work_format"] is not None and found.get("work_format") != wanted["work_format"]:
        raise RequestError(
            f"output={store.url}: was begun by another version of pairmill ({found.get('pairmill')}), which leaves "
            "other files between stages; finish it with that version, or choose another output"
        )
    old, new = found.get("result_config", {}), wanted["result_config"]
    differing = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if differing:
        lines = "\n".join(
            f"  {name}: the run has {old.get(name)}, this request has {new.get(name)}" for name in differing
        )
        raise RequestError(
            f"output={store.url}: holds a {found.get('kind')} run with other settings; "
            f"choose another output or make these keys equal:\n{lines}"
        )
