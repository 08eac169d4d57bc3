"""Typed configuration: a YAML file, then dotted overrides, checked before any work starts.

Each command owns one `Config` class; its fields are declared with `key`, which carries the help line, the unit and
whether the value can change the run's results. `parse` turns command-line words into an instance or raises
`RequestError` with one message that names the wrong key and the nearest valid one.
"""

import copy
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cluster.errors import RequestError

C = TypeVar("C", bound="Config")
REQUIRED: Any = PydanticUndefined


class Config(BaseModel):
    """Base of every configuration: immutable, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, validate_default=True, allow_inf_nan=False
    )

    shorthand: ClassVar[str] = ""
    """The key that a plain word goes to when it is given for the whole group: model=NAME for model.preset=NAME."""

    @classmethod
    def expand(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Replace what stands for several keys by these keys; raises RequestError. Called before values are checked."""
        return values


def key(default: Any, help: str, *, unit: str = "", affects_result: bool = True, **constraints: Any) -> Any:
    """Declare a configuration key.

    default: the value when nothing is given; `REQUIRED` when the user must say it.
    help: one line for `--help`. unit: of the value, such as "s" or "px".
    affects_result: False for keys that change where or how fast a run works but never what it produces; only the
        others are compared when a run is resumed.
    constraints: pydantic's own, such as ge, le, gt, min_length.
    """
    extra: dict[str, Any] = {"unit": unit, "affects_result": affects_result}
    if isinstance(default, (list, dict, Config)):
        return Field(default_factory=lambda: default, description=help, json_schema_extra=extra, **constraints)
    return Field(default, description=help, json_schema_extra=extra, **constraints)


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, float)) else value


StringList = Annotated[list[str], BeforeValidator(_one_or_many)]
"""A list of strings that may be written as one string."""


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The configuration class that a field's annotation holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for option in typing.get_args(annotation):
            if found := nested_model(option):
                return found
    return None


def walk_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf key of a configuration class as (dotted name, field), in declaration order."""
    for name, field in model.model_fields.items():
        inner = nested_model(field.annotation)
        if inner is None:
            yield prefix + name, field
        else:
            yield from walk_keys(inner, f"{prefix}{name}.")


def parse(model: type[C], argv: Sequence[str]) -> C:
    """Build a configuration from `[CONFIG.yaml ...] [dotted.key=value ...]`, later words winning.

    Raises RequestError for a missing or unreadable file, an unknown key (with the nearest valid one), a value of the
    wrong type or out of range, or a required key that nobody gave.
    """
    return validate(model, read_words(model, argv))


def read_words(model: type[BaseModel], argv: Sequence[str], under: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The values that `parse` checks, as nested plain values; laid over those of `under`. Raises RequestError."""
    values: dict[str, Any] = copy.deepcopy(dict(under or {}))
    texts = {name for name, field in walk_keys(model) if _holds_text(field.annotation)}
    for word in argv:
        name, equals, text = word.partition("=")
        if equals and not name.endswith((".yaml", ".yml")):
            value = _parse_value(text, word, is_text=name in texts)
            shorthand = "" if isinstance(value, dict) else _shorthand_at(model, name)
            _assign(values, f"{name}.{shorthand}" if shorthand else name, value)
        elif word.startswith("-"):
            raise RequestError(f"{word}: unknown option; settings are written key=value (see --help)")
        else:
            _merge(values, _spelled_out(model, load_yaml(word)))
    return values


def load_yaml(path: str) -> dict[str, Any]:
    """Read a YAML mapping; RequestError says what is wrong with the file."""
    file = Path(path)
    if file.suffix not in (".yaml", ".yml"):
        raise RequestError(f"{path}: not understood; give a CONFIG.yaml or key=value settings (see --help)")
    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such configuration file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{path}: not a readable YAML file: {_one_line(error)}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise RequestError(f"{path}: must hold a mapping of keys to values, holds a {type(loaded).__name__}")
    expanded: dict[str, Any] = {}
    for name, value in loaded.items():
        _assign(expanded, str(name), value)
    return expanded


def validate(model: type[C], values: Mapping[str, Any]) -> C:
    """Check nested plain values against a configuration class; RequestError carries every problem, a line each."""
    problems = list(_unknown_keys(model, values))
    if not problems:
        try:
            return model.model_validate(_over_defaults(model, _expanded(model, values)))
        except ValidationError as error:
            problems = [_problem(item) for item in error.errors()]
    raise RequestError("\n".join(problems))


def flatten(config: Config, *, only_result: bool = False) -> dict[str, Any]:
    """A configuration as {dotted key: plain value}; with only_result, just the keys that can change results."""
    plain = config.model_dump(mode="json")
    flat: dict[str, Any] = {}
    for name, field in walk_keys(type(config)):
        if only_result and not _extra(field).get("affects_result", True):
            continue
        value: Any = plain
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        flat[name] = value
    return flat


def help_text(model: type[Config]) -> str:
    """Every key with its default, unit and one line, for `--help`."""
    lines = []
    for name, field in walk_keys(model):
        default = _show_default(model, name, field)
        unit = str(_extra(field).get("unit", ""))
        choices = "|".join(_choices(field.annotation))
        note = f" [{choices}]" if choices else ""
        lines.append(f"  {name}={default}{' ' + unit if unit else ''}\n        {field.description}{note}")
    return "\n".join(lines)


class _Loader(yaml.SafeLoader):
    """YAML as people mean it (1.2): no, on, 010, 1:30 and 2024-01-01 are text, not false, true, 8, 90 and a date."""


_AMBIGUOUS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _AMBIGUOUS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))


def _parse_value(text: str, word: str, *, is_text: bool) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader) if text else ""
    except yaml.YAMLError as error:
        raise RequestError(f"{word}: the value is not readable: {_one_line(error)}") from None
    return text if is_text and isinstance(value, (bool, int, float)) else value


def _holds_text(annotation: Any) -> bool:
    """Whether a key's values are words, one or several: `output=1.10` is a folder of that name, not the number 1.1."""
    if typing.get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(annotation))
    options = [option for option in typing.get_args(annotation) if option is not types.NoneType]
    return annotation is str or (bool(options) and all(_holds_text(option) for option in options))


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    here = values
    for part in parents:
        inner = here.setdefault(part, {})
        if inner is None:  # a group that was switched off, or left empty in the file
            inner = here[part] = {}
        if not isinstance(inner, dict):
            raise RequestError(
                f"{part}={_show(inner)}: given beside {dotted}, which makes it a group of keys; leave it out"
            )
        here = inner
    if isinstance(value, dict) and isinstance(here.get(last), dict):
        _merge(here[last], value)
    else:
        here[last] = value


def _shorthand_at(model: type[BaseModel], dotted: str) -> str:
    """The shorthand of the group of keys that a dotted name is, if it is one."""
    here: type[BaseModel] | None = model
    for part in dotted.split("."):
        field = here.model_fields.get(part) if here else None
        here = nested_model(field.annotation) if field else None
    return str(getattr(here, "shorthand", ""))


def _spelled_out(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with every plain word that was given for a group of keys under the key that it stands for."""
    result = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        inner = nested_model(field.annotation) if field else None
        if inner is not None and isinstance(value, Mapping):
            value = _spelled_out(inner, value)
        elif inner is not None and isinstance(value, str) and (shorthand := getattr(inner, "shorthand", "")):
            value = {shorthand: value}
        result[name] = value
    return result


def _expanded(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the shorthands of this group and those below it replaced (see `Config.expand`)."""
    result = dict(model.expand(values) if issubclass(model, Config) else values)
    for name, value in result.items():
        inner = nested_model(model.model_fields[name].annotation)
        if inner is not None and isinstance(value, Mapping):
            result[name] = _expanded(inner, value)
    return result


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _over_defaults(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with each group of keys laid over the group's default.

    A group's default may differ from its class's (a weight of 0.5 in a class whose own default is 1): setting one key
    of the group must not reset the others.
    """
    complete = dict(values)
    for name, value in values.items():
        field = model.model_fields[name]
        inner = nested_model(field.annotation)
        if inner is not None and isinstance(value, Mapping):
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            merged: dict[str, Any] = default.model_dump() if isinstance(default, BaseModel) else {}
            _merge(merged, _over_defaults(inner, value) if default is None else value)
            complete[name] = merged
    return complete


def _show_default(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """The default that a key has in this configuration, not the one of its class alone."""
    first, *rest = name.split(".")
    outer = model.model_fields[first]
    value = None if outer.is_required() else outer.get_default(call_default_factory=True)
    if rest and not isinstance(value, BaseModel):  # the group has no default of its own, as one of its keys is required
        inner = nested_model(outer.annotation)
        return _show_default(inner, ".".join(rest), field) if inner else "(required)"
    for part in rest:
        value = getattr(value, part, None)
    return "(required)" if field.is_required() else _show(value)


def _unknown_keys(root: type[BaseModel], values: Mapping[str, Any]) -> Iterator[str]:
    every_key = [dotted for dotted, _ in walk_keys(root)]
    yield from _unknown_below(root, values, "", every_key)


def _unknown_below(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str, every_key: list[str]
) -> Iterator[str]:
    for name, value in values.items():
        field = model.model_fields.get(name)
        inner = nested_model(field.annotation) if field else None
        if field is None:
            siblings = [prefix + sibling for sibling in model.model_fields]
            yield f"unknown key {prefix}{name}{_nearest(prefix + name, siblings, every_key)}"
        elif inner is not None and isinstance(value, dict):
            yield from _unknown_below(inner, value, f"{prefix}{name}.", every_key)
        elif inner is not None and value is not None:
            keys = ", ".join(f"{prefix}{name}.{child}" for child in list(inner.model_fields)[:4])
            yield f"{prefix}{name}={_show(value)}: this is a group of keys ({keys}, ...), set one of them"


def _nearest(wrong: str, siblings: list[str], every_key: list[str]) -> str:
    """The most likely meant key: one with the same last part, else one spelled alike, else what is valid there."""
    last = wrong.rpartition(".")[2]
    by_last = {dotted.rpartition(".")[2]: dotted for dotted in reversed(every_key)}
    close = [by_last[last]] if last in by_last else difflib.get_close_matches(wrong, [*siblings, *every_key], n=1)
    close = close or [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1)]
    return f"; did you mean {close[0]}?" if close else f"; valid here: {', '.join(siblings[:12])}"


def _problem(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "request"
    if item["type"] == "missing":
        return f"{where}: required, and not given; add {where}=..."
    if item["type"] == "value_error" and not item["loc"]:
        return str(item["msg"]).removeprefix("Value error, ")
    said = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if isinstance(item["input"], Mapping) else f"{where}={_show(item['input'])}: {said}"


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return []


def _extra(field: FieldInfo) -> dict[str, Any]:
    return cast("dict[str, Any]", field.json_schema_extra or {})


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return str(value.model_dump(mode="json"))
    return str(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
