"""What the ranks saw that the person who started them should know; `progress.json` carries it to the display."""

import json
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from cluster.store import Store
from training.metrics import METRICS_FOLDER

BAD_IMAGES_FILE = f"{METRICS_FOLDER}/bad-images.json"
NUM_NAMED = 3


def passed_over_notes(damaged: Sequence[tuple[int, str]], start_step: int) -> list[str]:
    """A line about each checkpoint that was not believed, as (step, file), and one about what follows from it."""
    notes = [f"the checkpoint of step {step} is passed over: {file} is missing or damaged" for step, file in damaged]
    if damaged and not start_step:
        notes.append("no valid checkpoint is left: training starts again from step 0")
    return notes


def bad_images_note(store: Store, bad: Mapping[str, str]) -> list[str]:
    """Collective: write down which images no rank could decode, those of earlier starts included; a line about them.

    bad: this rank's, the reason by "shard key". Nothing is written and said when there is none.
    """
    everywhere: list[Mapping[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, dict(bad))
    if dist.get_rank() > 0:
        return []
    known = json.loads(store.read_bytes(BAD_IMAGES_FILE)) if store.exists(BAD_IMAGES_FILE) else {}
    found = dict(sorted({name: why for part in (known, *everywhere) for name, why in part.items()}.items()))
    if not found:
        return []
    store.write_bytes(BAD_IMAGES_FILE, json.dumps(found, indent=1).encode())
    named = ", ".join(list(found)[:NUM_NAMED]) + (", ..." if len(found) > NUM_NAMED else "")
    return [
        f"images that cannot be decoded, replaced by the next ones: {len(found):,} ({named}; reasons in "
        f"{store.url_of(BAD_IMAGES_FILE)})"
    ]
