"""Users' own rules, named by import path: `curate.rules: [{use: "my.module:NoWatermark", threshold: 0.3}]`."""

import dataclasses
import difflib
import importlib
import inspect
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from cluster.errors import RequestError, RunError
from cluster.executor import Executor
from pipeline.reasons import USER_REASON, Reason
from pipeline.rules.base import Keeps, Rule, ScoreRule, Verdicts, limit_of
from pipeline.rules.config import CurateConfig, RuleUse

KEY = "curate.rules"
MEASURED = {
    "nsfw_score": "curate.max_nsfw_score",
    "image_text_score": "curate.min_image_text_score",
    "evaluation_distance": "curate.evaluation_sets",
    "evaluation_similarity": "curate.evaluation_similarity",
}
"""Columns that there are only where a key asks for them."""


@dataclass(frozen=True, kw_only=True)
class UserRule(Rule):
    """A rule of the user's: looked up by its import path wherever it is applied, and held to what a rule promises.

    use: `package.module:Class`. parameters: JSON. keeps, threshold: None for a rule without a number.
    """

    use: str
    parameters: str
    name: str
    reason: str
    columns: tuple[str, ...]
    needs_image: bool
    keeps: Keeps | None
    threshold: float | None

    def judge(self, rows: pa.Table) -> Verdicts:
        """RunError naming the rule when it raises, or gives something else than a verdict on every row."""
        if missing := [name for name in self.columns if name not in rows.column_names]:
            raise RunError(f"{KEY}: {self.use} reads the column {missing[0]}, which the rows do not have")
        try:
            return _checked(_instance(self.use, self.parameters), rows.select(list(self.columns)))
        except Exception as error:  # a user's code may raise anything
            raise RunError(f"{KEY}: {self.use}: {type(error).__name__}: {error}") from error


def user_rules(config: CurateConfig) -> tuple[UserRule, ...]:
    """The rules of `curate.rules`, in their order. RequestError says which of them cannot be used, and why."""
    rules: list[UserRule] = []
    for place, use in enumerate(config.rules or []):
        rule = _user_rule(f"{KEY}[{place}]", use)
        alike = sum(other.name.partition("#")[0] == rule.name for other in rules)
        rules.append(dataclasses.replace(rule, name=f"{rule.name}#{alike + 1}") if alike else rule)
    return tuple(rules)


def require_columns(rules: Sequence[UserRule], before: Collection[str], after: Collection[str]) -> None:
    """RequestError when a rule reads a column that is not there.

    before, after: the columns known before the download, and those known after it.
    """
    for rule in rules:
        for name in rule.columns:
            if name in before or (rule.needs_image and name in after):
                continue
            if name in after:
                raise RequestError(
                    f"{KEY}: {rule.use} reads the column {name}, which is known after the download only; "
                    "set needs_image = True in its class"
                )
            if name in MEASURED:
                raise RequestError(f"{KEY}: {rule.use} reads the column {name}; set {MEASURED[name]}, which makes it")
            near = difflib.get_close_matches(name, [*before, *after], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RequestError(f"{KEY}: {rule.use} reads the column {name}, which the rows do not have{hint}")


def require_on_workers(config: CurateConfig, executor: Executor) -> None:
    """RequestError when a worker cannot import a rule that this process could."""
    uses = [use.model_dump(mode="json") for use in config.rules or []]
    for problem in executor.map_unordered(_problem_there, [uses] if uses else [], num_cpus=1, memory_bytes=0):
        if problem:
            raise RequestError(
                f"{problem} This is said by a worker; the command itself can import it. Install it on every node, or "
                "set PYTHONPATH to an absolute path"
            )


def _problem_there(uses: Sequence[Mapping[str, Any]]) -> str | None:
    for use in uses:
        try:
            _class_of(f"{KEY}: {use['use']}", str(use["use"]))
        except RequestError as error:
            return str(error)
    return None


def _user_rule(said: str, use: RuleUse) -> UserRule:
    said = f"{said}: {use.use}"
    parameters = dict(use.model_extra or {})
    rule = _made(said, _class_of(said, use.use), parameters)
    reason, columns = getattr(rule, "reason", None), getattr(rule, "columns", None)
    if not isinstance(reason, str) or not re.fullmatch("[a-z][a-z0-9_]*", reason):
        raise RequestError(f"{said}: its reason is {reason!r}; give it one in lower case, such as reason = 'watermark'")
    if not isinstance(columns, tuple) or not columns or not all(isinstance(name, str) for name in columns):
        raise RequestError(f"{said}: its columns are {columns!r}; name what it reads, such as columns = ('caption',)")
    keeps, threshold = limit_of(rule)
    if isinstance(rule, ScoreRule) and keeps not in typing.get_args(Keeps):
        raise RequestError(f"{said}: keeps is {keeps!r}; set it to one of {', '.join(typing.get_args(Keeps))}")
    return UserRule(
        use=use.use,
        parameters=json.dumps(parameters, sort_keys=True),
        name=f"{KEY}.{getattr(rule, 'name', type(rule).__name__)}",
        reason=reason if reason in set(Reason) else USER_REASON + reason,
        columns=columns,
        needs_image=bool(rule.needs_image),
        keeps=keeps,
        threshold=threshold,
    )


def _class_of(said: str, use: str) -> type[Rule]:
    module, colon, name = use.partition(":")
    if not colon or not module or not name:
        raise RequestError(f"{said}: not an import path; write package.module:Class")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module raises when it is imported
        raise RequestError(
            f"{said}: cannot be imported ({type(error).__name__}: {error}); is its package installed, or its folder on "
            "PYTHONPATH?"
        ) from None
    if not isinstance(found, type) or not issubclass(found, Rule):
        raise RequestError(f"{said}: is no rule; derive it from pipeline.rules.ScoreRule or pipeline.rules.Rule")
    if inspect.isabstract(found):
        raise RequestError(f"{said}: lacks the method {', '.join(sorted(found.__abstractmethods__))}")
    return found


def _made(said: str, rule_class: type[Rule], parameters: Mapping[str, Any]) -> Rule:
    """The rule with these parameters, which are converted to what their annotations say."""
    declared: Any = rule_class
    if not dataclasses.is_dataclass(declared):
        raise RequestError(f"{said}: is no dataclass; put @dataclass(frozen=True, kw_only=True) above it")
    fields = [field for field in dataclasses.fields(declared) if field.init]
    known = {field.name for field in fields}
    if unknown := [name for name in parameters if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known)) or 'none'}"
        raise RequestError(f"{said}: has no parameter {unknown[0]}; {hint}")
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in parameters]:
        raise RequestError(f"{said}: its parameter {missing[0]} is required; add {missing[0]}: ...")
    values = {}
    for name, value in parameters.items():
        try:
            values[name] = TypeAdapter(typing.get_type_hints(rule_class)[name]).validate_python(value)
        except ValidationError as error:
            raise RequestError(f"{said}: {name}={value}: {error.errors()[0]['msg']}") from None
    try:
        return rule_class(**values)
    except Exception as error:  # of its __post_init__
        raise RequestError(f"{said}: {type(error).__name__}: {error}") from None


@lru_cache(maxsize=64)
def _instance(use: str, parameters: str) -> Rule:
    return _made(KEY, _class_of(KEY, use), json.loads(parameters))


def _checked(rule: Rule, rows: pa.Table) -> Verdicts:
    """What the rule says, as what it has to be. ValueError when it is something else."""
    if isinstance(rule, ScoreRule) and type(rule).judge is ScoreRule.judge:
        scores = _one_each(rule.scores(rows), "scores", rows.num_rows).astype(np.float64)
        return Verdicts(keep=rule.passes(scores), scores=scores, details=_details(rule.details(rows), rows.num_rows))
    verdicts = rule.judge(rows)
    if not isinstance(verdicts, Verdicts):
        raise TypeError(f"judge gave a {type(verdicts).__name__}, not pipeline.rules.Verdicts")
    keep = _one_each(verdicts.keep, "keep", rows.num_rows)
    if keep.dtype != bool:
        raise TypeError(f"keep has values of type {keep.dtype}, not bool")
    given = verdicts.scores
    return Verdicts(
        keep=keep,
        scores=None if given is None else _one_each(given, "scores", rows.num_rows).astype(np.float64),
        details=_details(verdicts.details, rows.num_rows),
    )


def _one_each(values: Any, name: str, count: int) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (count,):
        raise ValueError(f"{name} has the shape {array.shape}, not ({count},): one for each row")
    return array


def _details(details: Sequence[str | None] | None, count: int) -> Sequence[str | None] | None:
    if details is not None and len(details) != count:
        raise ValueError(f"details has {len(details)} entries for {count} rows")
    return None if details is None else [None if detail is None else str(detail) for detail in details]
