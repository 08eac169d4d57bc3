"""Whether the rules that are asked for can be applied: known before any work."""

from collections.abc import Collection

from cluster.errors import RequestError, RunError
from cluster.journal import Journal
from cluster.store import Store
from pipeline.fetch import FETCHED
from pipeline.models.rules import model_rules
from pipeline.rules.chosen import columns_of
from pipeline.rules.config import LIST_KEYS, CurateConfig
from pipeline.rules.lists import STAGE, read_lists
from pipeline.rules.user import require_columns, user_rules


def require_rules(config: CurateConfig, output: str, planned: Collection[str]) -> None:
    """RequestError when a rule of the user's, or a list of words, URLs or hosts, cannot be used.

    planned: the columns known before the download.
    """
    require_columns(user_rules(config), planned, {*FETCHED.names, *columns_of(model_rules(config))})
    try:
        read_lists(config)
    except RequestError:
        if not _has_lists(config, output):
            raise


def _has_lists(config: CurateConfig, output: str) -> bool:
    """Whether a build has copies of its lists, from an earlier command."""
    try:
        there = Journal(Store(output)).markers(STAGE)
    except (ValueError, ImportError, RunError, OSError):  # no such place: `open_run` says so
        return False
    return all(name in there for name in LIST_KEYS if getattr(config, name))
