"""The two downloaders as programs of their own: `python clients.py pairmill|img2dataset JOB.json`.

Each downloads the same list with two worker processes into a new folder, and prints one JSON line: `start` and `end`
(seconds since the epoch), the number of images kept and what is not measured. Outside of the measured time are the
start of the processes and the imports of both: pairmill's from the call that runs the fetch stage, after a stage of a
few rows has warmed its workers up, to the commit of its last unit; img2dataset's from the first start to the last end
in the statistics of its shards, which is how it reports its own speed.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP_ROWS = 16
Result = dict[str, Any]


def pairmill(job: dict[str, Any]) -> Result:
    """The fetch stage with the real executor: planned units, images.tar and rows.parquet, committed to the journal."""
    from cluster.config import parse
    from cluster.executor import Executor, run_stage
    from cluster.journal import Journal
    from cluster.progress import Progress
    from cluster.session import ray_session
    from cluster.store import Store
    from pipeline.config import BuildConfig
    from pipeline.fetch import FetchStage
    from pipeline.plan import OrderStage, ReadStage

    def stage_of(urls: str, output: Path, rows_per_unit: int, executor: Executor) -> tuple[FetchStage, Journal]:
        words = [f"input={urls}", f"output={output}", f"plan.rows_per_unit={rows_per_unit}", *job["settings"]]
        config = parse(BuildConfig, words)
        store = Store(config.output)
        journal = Journal(store)
        with Progress() as quiet:
            sources = run_stage(ReadStage.of(config), journal, executor, quiet)  # type: ignore[arg-type]
            ordered = run_stage(OrderStage.of(config, store, sources), journal, executor, quiet)  # type: ignore[arg-type]
        return FetchStage.of(config, store, ordered), journal

    output = Path(job["output"])
    words = [f"input={job['urls']}", f"output={output}", *job["settings"]]
    with ray_session(parse(BuildConfig, words).ray) as executor, Progress() as progress:
        for name in ("warm-up", "measured"):
            is_warm_up = name == "warm-up"
            rows_per_unit = WARM_UP_ROWS // 8 if is_warm_up else job["rows_per_unit"]
            urls = job["warm_up_urls"] if is_warm_up else job["urls"]
            stage, journal = stage_of(urls, output / name, rows_per_unit, executor)
            start = time.time()
            markers = run_stage(stage, journal, executor, progress)  # type: ignore[arg-type]
            end = time.time()
    num_kept = sum(marker.counts.get("reason:ok", 0) for marker in markers.values())
    return {"start": start, "end": end, "num_kept": num_kept}


def img2dataset(job: dict[str, Any]) -> Result:
    """`img2dataset.download` with tar output, two processes, sha256 and the same resize."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import img2dataset as peer

    peer.download(
        url_list=job["urls"],
        output_folder=job["output"],
        input_format="parquet",
        caption_col="caption",
        output_format="webdataset",
        processes_count=2,
        thread_count=job["threads"],
        number_sample_per_shard=job["rows_per_unit"],
        image_size=256,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=95,
        compute_hash="sha256",
        extract_exif=False,
    )
    stats = [json.loads(path.read_text()) for path in Path(job["output"]).glob("*_stats.json")]
    return {
        "start": min(stat["start_time"] for stat in stats),
        "end": max(stat["end_time"] for stat in stats),
        "num_kept": sum(stat["successes"] for stat in stats),
    }


def main() -> None:
    """Do a job and write its result where the job says."""
    job = json.loads(Path(sys.argv[2]).read_text())
    tempfile.tempdir = job["temporary"]
    result = {"pairmill": pairmill, "img2dataset": img2dataset}[sys.argv[1]](job)
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":  # img2dataset's processes are spawned and import this file
    main()
