"""The training loop of one rank."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.errors import RunError
from cluster.store import Store
from training.checkpoint import CLASSES_FILE, CONFIG_FILE, TOKENIZER_FILE, Checkpoints, newest_valid
from training.config import TrainPlan
from training.data.loader import HostBatch, ImageReader, Loader
from training.data.sources import open_sources
from training.data.tokenizer import Tokenizer
from training.engine import Engine
from training.exhibits import NUM_EXAMPLES, Exhibits
from training.initial import initialise
from training.methods import Batch, Output, build_method
from training.metrics import Beacon, Line, RunLog
from training.notes import bad_images_note, passed_over_notes
from training.schedule import cosine_with_warmup

logger = logging.getLogger(__name__)

Outcome = Literal["done", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of the group and what it computes on."""

    index: int
    num_ranks: int
    device: torch.device
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class RankRequest:
    """What every rank is told; equal on all of them."""

    plan: TrainPlan
    output: str
    """URL of the run's folder."""
    tokenizer: str
    """As `Tokenizer.to_json` wrote it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the ranks agreed on about a step, before the update."""

    loss: float
    finite: bool
    stop: bool


def train(
    request: RankRequest,
    rank: Rank,
    *,
    stop: Callable[[], bool] = lambda: False,
    watch: Callable[[dict[str, Any]], None] = lambda progress: None,
) -> Outcome:
    """Train from the newest valid checkpoint to the end, or until some rank's `stop` says so.

    Needs an initialised process group. Every step: loss and gradient, agreement that they are finite, update. A loss
    or gradient that is not finite raises RunError on every rank and leaves weights and checkpoints as they were.
    """
    plan, config = request.plan, request.plan.config
    store = Store(request.output)
    torch.set_num_threads(rank.num_threads)
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.from_json(request.tokenizer)
    method = build_method(config.method, config.method_config, config.model, tokenizer, plan.classes)
    initialise(method, store, config.init)
    engine = Engine(method, config, num_ranks=rank.num_ranks, device=rank.device)
    checkpoints = Checkpoints(store, rank=rank.index, num_ranks=rank.num_ranks, keep=config.checkpoint.keep)
    start_step = checkpoints.load_newest(engine)
    beside = {
        CONFIG_FILE: config.model_dump_json(indent=1).encode(),
        TOKENIZER_FILE: request.tokenizer.encode(),
        CLASSES_FILE: json.dumps(plan.classes).encode(),
    }
    exhibits = Exhibits(store, method, active=rank.index == 0)

    def examples() -> Batch:
        return to_device(loader.examples(NUM_EXAMPLES), config.seed, rank.device)

    def save() -> None:
        checkpoints.save(engine, samples_seen=engine.steps * config.train.batch_size, files=beside)
        exhibits.make(engine.steps, engine.show, examples)

    with (
        make_loader(plan, rank, start_step) as loader,
        RunLog(store, rank=rank.index, start_step=start_step) as log,
        Beacon(store, active=rank.index == 0) as beacon,
        checkpoints,
    ):
        meter = Meter(plan, rank, loader, start_step, passed_over_notes(checkpoints.damaged, start_step))
        report(meter.progress(start_step), rank, beacon, watch)
        for host_batch in loader:
            step = host_batch.step
            meter.num_replaced += host_batch.num_replaced
            batch = to_device(host_batch, config.seed, rank.device)
            output = engine.gradients(batch, plan.num_steps)
            verdict = agree(output.loss, stop() or beacon.stop_requested)
            if not verdict.finite:
                checkpoints.wait()
                raise not_finite("loss", host_batch, output, store)
            try:
                norm = engine.update(learning_rate(plan, step))
            except RunError:
                checkpoints.wait()
                raise not_finite("gradient", host_batch, output, store) from None
            if (step + 1) % config.log.every_steps == 0 or step + 1 == plan.num_steps:
                log.record(meter.line(step, verdict.loss, norm, output))
                report(meter.progress(step + 1), rank, beacon, watch)
            last = step + 1 == plan.num_steps or verdict.stop
            if last or (step + 1) % config.checkpoint.every_steps == 0:
                save()
                log.sync()
            if last:
                checkpoints.wait()
                meter.notes += bad_images_note(store, loader.reader.bad)
                report(meter.progress(step + 1), rank, beacon, watch)
                return "done" if step + 1 == plan.num_steps else "stopped"
    return "done"  # it had been killed after its last checkpoint


def make_loader(plan: TrainPlan, rank: Rank, start_step: int) -> Loader:
    """The rank's batches from `start_step` on."""
    config = plan.config
    data = config.data
    samples = open_sources(data.sources, plan.classes)
    on_gpu = rank.device.type == "cuda"
    return Loader(
        ImageReader(samples, config.image_size, int(data.cache_gib * 2**30)),
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_step=start_step,
        num_steps=plan.num_steps,
        rank=rank.index,
        num_ranks=rank.num_ranks,
        workers=data.workers or max(1, rank.num_threads - 1 if on_gpu else rank.num_threads // 2),
        prefetch=data.prefetch,
        pin_memory=on_gpu,
    )


def to_device(batch: HostBatch, seed: int, device: torch.device) -> Batch:
    """Send a batch to the device, pictures as uint8."""
    return Batch(
        images=batch.images.to(device, non_blocking=True),
        captions=batch.captions,
        sample_ids=batch.sample_ids.to(device, non_blocking=True),
        labels=batch.labels.to(device, non_blocking=True),
        epoch=batch.epoch.to(device, non_blocking=True),
        step=batch.step,
        seed=seed,
    )


def learning_rate(plan: TrainPlan, step: int) -> float:
    """The learning rate of a step; steps are counted as applied updates."""
    optim = plan.config.optim
    return cosine_with_warmup(
        step, peak=optim.lr, minimum=optim.min_lr, warmup_steps=plan.warmup_steps, total_steps=plan.num_steps
    )


def agree(loss: Tensor, stop: bool) -> Verdict:
    """Collective: the objective (mean of the ranks' losses), whether all are finite, whether any rank wants to stop."""
    local = loss.detach().double()
    told = torch.stack([local, (~local.isfinite()).double(), torch.full_like(local, float(stop))])
    dist.all_reduce(told)
    total, num_bad, num_stop = told.tolist()
    return Verdict(loss=total / dist.get_world_size(), finite=num_bad == 0, stop=num_stop > 0)


def not_finite(what: str, batch: HostBatch, output: Output, store: Store) -> RunError:
    """Collective: the error that names step, loss terms and samples; the whole list goes into the run's metrics."""
    everywhere: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, batch.uids)
    uids = [uid for uids in everywhere for uid in uids]
    terms = {name: float(value) for name, value in output.losses.items()}
    path = f"metrics/not-finite-step-{batch.step:08}.json"
    if dist.get_rank() == 0:
        store.write_bytes(path, json.dumps({"step": batch.step, "what": what, "losses": terms, "uids": uids}).encode())
    shown = ", ".join(f"{name} {value:.6g}" for name, value in terms.items())
    newest = newest_valid(store)
    kept = f"the checkpoint of step {newest.step} is valid" if newest else "there is no checkpoint yet"
    return RunError(
        f"step {batch.step}: the {what} is not finite ({shown}); the update was not applied and {kept}. "
        f"Samples of the batch: {', '.join(uids[:4])}, ... (all {len(uids)} in {store.url_of(path)}). "
        "Try a lower optim.lr or more optim.warmup_steps in a new output folder"
    )


def report(progress: dict[str, Any], rank: Rank, beacon: Beacon, watch: Callable[[dict[str, Any]], None]) -> None:
    """Rank 0 tells whoever started the run."""
    if rank.index == 0:
        beacon.post(progress)
        watch(progress)


class Meter:
    """Turns steps into the numbers that are recorded."""

    def __init__(self, plan: TrainPlan, rank: Rank, loader: Loader, start_step: int, notes: list[str]) -> None:
        self._plan, self._rank, self._loader = plan, rank, loader
        self._start_step, self._started = start_step, time.perf_counter()
        self._last_step, self._last_time, self._last_waited = start_step, self._started, 0.0
        self._newest: Line = {}
        self.notes = notes
        """Lines for the person who started the run."""
        self.num_replaced = 0
        """Samples of this rank, since the start or resume, whose image had to be replaced."""

    def line(self, step: int, loss: float, norm: float, output: Output) -> Line:
        """The line of a step; rates are means since the last line. Losses and metrics are values over all ranks."""
        now = time.perf_counter()
        elapsed_s = max(now - self._last_time, 1e-9)
        config = self._plan.config
        line: Line = {
            "step": step,
            "epoch": (step + 1) * config.train.batch_size / self._plan.num_samples,
            "loss": loss,
            **{f"loss/{name}": float(value) for name, value in output.losses.items()},
            **{f"metric/{name}": float(value) for name, value in output.metrics.items()},
            "lr": learning_rate(self._plan, step),
            "grad_norm": norm,
            "samples_per_s": (step + 1 - self._last_step) * config.train.batch_size / elapsed_s,
            "data_wait_share": min(1.0, (self._loader.waited_s - self._last_waited) / elapsed_s),
            "num_replaced": self.num_replaced,
        }
        if self._rank.device.type == "cuda":
            line["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._last_step, self._last_time, self._last_waited = step + 1, now, self._loader.waited_s
        self._newest = line
        return line

    def progress(self, done_steps: int) -> dict[str, Any]:
        """What a display needs: the newest line, the totals, and the time left at the mean rate so far."""
        elapsed_s = time.perf_counter() - self._started
        here = done_steps - self._start_step
        left_s = elapsed_s / here * (self._plan.num_steps - done_steps) if here else math.nan
        return {
            "state": "running" if done_steps < self._plan.num_steps else "done",
            "done_steps": done_steps,
            "num_steps": self._plan.num_steps,
            "resumed_at": self._start_step,
            "eta_s": None if math.isnan(left_s) else left_s,
            "notes": self.notes,
            **self._newest,
        }
