"""`make bench-rules`: captions a second and core through every rule that needs no image, 200,000 captions at a time.

Prints a line a figure: rules.<rule>.rows_per_s for each alone, rules.all.rows_per_s for all together with their
decisions written as parquet, and rules.decision_bytes, what one verdict takes on disk.
"""

import io
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.executor import InlineExecutor, run_stage
from cluster.journal import Journal
from cluster.progress import Progress
from cluster.store import Store
from pipeline.rules.base import Rule
from pipeline.rules.captions import CAPTION_PAIRS
from pipeline.rules.chosen import text_rules
from pipeline.rules.config import CurateConfig
from pipeline.rules.decisions import judge
from pipeline.rules.lists import copy_lists

NUM_CAPTIONS = 200_000
ROWS_PER_UNIT = 2_000
NUM_WORDS = 2_000
"""On the list of blocked words; as many hosts are on the list of hosts."""


def main() -> int:
    """Measure, with a fixed seed."""
    rows, vocabulary = captions(NUM_CAPTIONS)
    config = CurateConfig.model_validate(
        {
            "min_caption_chars": 5,
            "max_caption_chars": 500,
            "min_caption_words": 2,
            "max_caption_words": 100,
            "min_alphanumeric_ratio": 0.5,
            "max_char_repetition": 0.5,
            "max_word_repetition": 0.5,
            "drop_person_tag": True,
            "max_caption_pairs": 10,
            "blocked_words": [
                *vocabulary[-NUM_WORDS // 2 :],
                *(f"nosuchword{number}" for number in range(NUM_WORDS // 2)),
            ],
            "blocked_hosts": [f"host{number}.test" for number in range(NUM_WORDS)],
            "blocked_urls": [f"http://host{number}.test/no.jpg" for number in range(NUM_WORDS)],
            "languages": ["en"],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        journal = Journal(store)
        lists = copy_lists(config, store, lambda stage: run_stage(stage, journal, InlineExecutor(), Progress()))
        rules = text_rules(config, lists)
        apply(rows.slice(0, ROWS_PER_UNIT), rules)  # tables of characters, the automaton, the language model
        for rule in rules:
            print(
                f"rules.{rule.name.removeprefix('curate.')}.rows_per_s: {rate(rows, [rule])[0]:,.0f} rows/s", flush=True
            )
        together, num_bytes = rate(rows, rules)
        print(f"rules.all.rows_per_s: {together:,.0f} rows/s")
        print(f"rules.decision_bytes: {num_bytes / (NUM_CAPTIONS * len(rules)):.2f} B")
    return 0


def captions(count: int) -> tuple[pa.Table, list[str]]:
    """Sentences of 3 to 20 words drawn by Zipf's law from made-up words, and the words, the most frequent first."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    vocabulary = ["".join(draw.choice(letters, size)) for size in draw.integers(2, 11, 20_000)]
    lengths = draw.integers(3, 21, count)
    ranks = np.minimum(draw.zipf(1.3, int(lengths.sum())), len(vocabulary)) - 1
    words = np.array(vocabulary, object)[ranks]
    texts = [" ".join(part) for part in np.split(words, np.cumsum(lengths)[:-1])]
    hosts = draw.integers(0, 5_000, count)
    table = {
        "uid": [f"{number:032x}" for number in range(count)],
        "url": [f"https://www.host{host}.test/images/{number}.jpg" for number, host in enumerate(hosts)],
        "caption": texts,
        CAPTION_PAIRS: draw.integers(1, 20, count).astype(np.float64),
    }
    return pa.table(table), vocabulary


def rate(rows: pa.Table, rules: Sequence[Rule]) -> tuple[float, int]:
    """(rows a second, bytes of the decisions), a fetch unit at a time as in plan-order."""
    started = time.process_time()
    num_bytes = sum(apply(rows.slice(at, ROWS_PER_UNIT), rules) for at in range(0, rows.num_rows, ROWS_PER_UNIT))
    return rows.num_rows / (time.process_time() - started), num_bytes


def apply(rows: pa.Table, rules: Sequence[Rule]) -> int:
    """Judge one unit's rows and write the decisions; returns their bytes."""
    judged = judge(rows, np.arange(rows.num_rows), rules)
    file = io.BytesIO()
    pq.write_table(judged.decisions, file, compression="zstd")
    return len(file.getvalue())


if __name__ == "__main__":
    sys.exit(main())
