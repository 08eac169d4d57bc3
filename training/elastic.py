"""Checkpoints for another number of ranks: DeepSpeed's universal form (Lian et al. 2024), one file a parameter."""

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

from cluster.errors import RunError


def convert(folder: Path, target: Path) -> None:
    """Write to `target` what any number of ranks can load, from the checkpoint of ZeRO 1, 2 or 3 in `folder`.

    Takes as much disk as the checkpoint. Raises RunError when DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint import ds_to_universal

    request = SimpleNamespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):  # progress bars
            ds_to_universal.main(request)
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{folder}: DeepSpeed cannot convert this checkpoint for another number of ranks ({error}); "
            "go on with as many as wrote it"
        ) from error
