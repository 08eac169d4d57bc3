"""The settings of balance."""

from typing import Literal

from cluster.config import Config, StringList, key


class BalanceConfig(Config):
    """How frequent a concept of the captions may be. The last of all: it sees what everything before has kept."""

    concepts: StringList | None = key(
        None, "a file or URL with one concept a line (such as words.txt), or a list of concepts; null: off"
    )
    per_concept: int | None = key(
        None,
        "about how many pairs a concept keeps of those it is found in (MetaCLIP's t; 20,000 in the paper); null: off",
        unit="pairs",
        ge=1,
    )
    unmatched: Literal["drop", "keep"] = key("drop", "pairs in whose caption no concept is found; the paper drops them")
    ignore_case: bool = key(True, "find Dog by the concept dog; the paper tells them apart")

    def problems(self) -> list[str]:
        """What is wrong with these settings together, for a message each."""
        if self.per_concept is not None and not self.concepts:
            return [
                f"balance.per_concept={self.per_concept}: of which concepts? Set balance.concepts to a file with one "
                "concept a line or to a list, or balance.per_concept=null"
            ]
        return []
