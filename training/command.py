"""`pairmill train`: check, register the run, start the ranks, say where the results are."""

import json
from dataclasses import dataclass

import torch.distributed as dist

from cluster.errors import RequestError
from cluster.run import Run, open_run
from cluster.store import Store
from training import launch
from training.checkpoint import TOKENIZER_FILE, newest_valid, published
from training.config import TrainConfig, TrainPlan, plan_training
from training.data.dataset import Dataset
from training.data.tokenizer import Tokenizer
from training.display import TrainDisplay
from training.metrics import PROGRESS_FILE, STOP_FILE, read_lines
from training.trainer import Outcome, RankRequest

RESULT_FILE = "result.json"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished command knows. `already_done`: nothing had to be trained."""

    outcome: Outcome
    store: Store
    plan: TrainPlan
    already_done: bool = False


def run_train(config: TrainConfig) -> TrainResult:
    """Carry out a training request from wherever the run is; the same request again resumes it.

    Raises RequestError before any work is done, RunError when the run failed, KeyboardInterrupt when it was
    interrupted (the ranks have then checkpointed if there was time).
    """
    plan, dataset = plan_training(config)
    if launch.started_by_torchrun():
        return _run_under_torchrun(plan, dataset)
    if plan.config.ray.address == "inline":
        return _run_inline(plan, dataset)
    return _run_on_ray(plan, dataset)


def _run_on_ray(plan: TrainPlan, dataset: Dataset) -> TrainResult:
    import ray

    launch.start_for_training(plan.config.ray)
    try:
        num_ranks = launch.ranks_on_ray(plan)
        run = open_run(plan.config.output, "train", plan.config)
        if run.store.exists(RESULT_FILE):
            return TrainResult(outcome="done", store=run.store, plan=plan, already_done=True)
        request = prepare(run, plan, dataset, num_ranks)
        with _display(plan) as display:
            outcome = launch.run_on_ray(request, num_ranks, display)
    finally:
        ray.shutdown()
    return finish(run, plan, outcome)


def _run_inline(plan: TrainPlan, dataset: Dataset) -> TrainResult:
    if (plan.config.train.num_ranks or 1) != 1:
        raise RequestError(f"train.num_ranks={plan.config.train.num_ranks}: ray.address=inline runs one rank")
    run = open_run(plan.config.output, "train", plan.config)
    if run.store.exists(RESULT_FILE):
        return TrainResult(outcome="done", store=run.store, plan=plan, already_done=True)
    request = prepare(run, plan, dataset, num_ranks=1)
    with _display(plan) as display:
        outcome = launch.run_here(request, display)
    return finish(run, plan, outcome)


def _run_under_torchrun(plan: TrainPlan, dataset: Dataset) -> TrainResult:
    launch.init_torchrun_group()
    try:
        num_ranks = dist.get_world_size()
        if plan.config.train.num_ranks not in (None, num_ranks):
            raise RequestError(f"train.num_ranks={plan.config.train.num_ranks}: torchrun started {num_ranks} processes")
        launch.check_ranks(plan, num_ranks)
        if dist.get_rank() > 0:
            dist.barrier()  # rank 0 registers the run, or refuses it
        run = open_run(plan.config.output, "train", plan.config)
        already_done = run.store.exists(RESULT_FILE)
        request = None if already_done else prepare(run, plan, dataset, num_ranks)
        if dist.get_rank() == 0:
            dist.barrier()
        dist.barrier()  # nobody clears leftovers once somebody trains
        if request is None:
            return TrainResult(outcome="done", store=run.store, plan=plan, already_done=True)
        with _display(plan, quiet=dist.get_rank() > 0) as display:
            outcome = launch.run_torchrun_rank(request, display)
        return finish(run, plan, outcome, write=dist.get_rank() == 0)
    finally:
        dist.destroy_process_group()


def prepare(run: Run, plan: TrainPlan, dataset: Dataset, num_ranks: int) -> RankRequest:
    """Make the run's tokenizer if it has none yet, check that its checkpoints fit, clear what a killed run left."""
    for info in published(run.store):
        if info.num_ranks != num_ranks:
            raise RequestError(
                f"train.num_ranks: the run's checkpoint of step {info.step} was written by {info.num_ranks} ranks and "
                f"cannot be taken over by {num_ranks}; use train.num_ranks={info.num_ranks}, or another output"
            )
        break
    for leftover in (STOP_FILE, launch.FAILURE_FILE, PROGRESS_FILE, "work"):
        run.store.remove(leftover)
    if not run.store.exists(TOKENIZER_FILE):
        run.store.create(TOKENIZER_FILE, make_tokenizer(plan, dataset).to_json().encode())
    tokenizer = run.store.read_bytes(TOKENIZER_FILE).decode()
    return RankRequest(plan=plan, output=run.store.url, tokenizer=tokenizer)


def make_tokenizer(plan: TrainPlan, dataset: Dataset) -> Tokenizer:
    """The tokenizer of a run; a compact vocabulary needs one pass over the captions."""
    text = plan.config.model.text
    captions = dataset.column(plan.config.data.caption_column) if text.vocabulary == "compact" else []
    return Tokenizer.build(
        (str(caption or "") for caption in captions), context_length=text.context_length, vocabulary=text.vocabulary
    )


def finish(run: Run, plan: TrainPlan, outcome: Outcome, *, write: bool = True) -> TrainResult:
    """Record that a run is complete."""
    if outcome == "done" and write:
        lines, newest = read_lines(run.store), newest_valid(run.store)
        result = {
            "num_steps": plan.num_steps,
            "epochs": plan.epochs,
            "checkpoint": newest.folder if newest else None,
            "last": lines[-1] if lines else {},
        }
        run.store.write_bytes(RESULT_FILE, json.dumps(result, indent=1).encode())
    return TrainResult(outcome=outcome, store=run.store, plan=plan)


def _display(plan: TrainPlan, *, quiet: bool = False) -> TrainDisplay:
    from rich.console import Console

    return TrainDisplay(f"train {plan.config.method}", Console(quiet=True) if quiet else None)
