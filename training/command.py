"""`pairmill train`: check, register the run, start the ranks, say where the results are."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

from cluster.errors import PairmillError, RequestError
from cluster.run import open_run, require_run
from cluster.session import connected
from cluster.store import Store
from training import launch
from training.checkpoint import TOKENIZER_FILE, published
from training.config import TrainConfig, TrainPlan, check_parts, plan_training
from training.data.sources import Samples
from training.data.tokenizer import Tokenizer
from training.display import TrainDisplay
from training.initial import INITIAL_FILE, read_initial, write_initial
from training.lease import hold
from training.metrics import PROGRESS_FILE, STOP_FILE, read_lines
from training.trainer import Outcome, RankRequest
from training.weights.convert import Weights

RESULT_FILE, DATASET_FILE = "result.json", "dataset.json"


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
    plan, samples = plan_training(config)
    if (store := _finished(plan, samples)) is not None:
        return TrainResult(outcome="done", store=store, plan=plan, already_done=True)
    if launch.started_by_torchrun():
        return _run_under_torchrun(plan, samples)
    if plan.config.ray.address == "inline":
        return _run_inline(plan, samples)
    return _run_on_ray(plan, samples)


def _finished(plan: TrainPlan, samples: Samples) -> Store | None:
    """The folder of the run if it is complete. Raises RequestError when it belongs to another request."""
    try:
        _, record = require_run(plan.config.output, "train")
    except RequestError:  # there is none yet, or `open_run` will say what is wrong
        return None
    if (began_with := record.get("config", {}).get("method")) != plan.config.method:
        raise RequestError(
            f"method={plan.config.method}: {plan.config.output} is a run of method {began_with}, which cannot go on as "
            f"another; choose another output, and init.checkpoint={plan.config.output} to start from its weights"
        )
    store = open_run(plan.config.output, "train", plan.config).store
    _refuse_other_samples(store, samples)
    return store if store.exists(RESULT_FILE) else None


def _run_on_ray(plan: TrainPlan, samples: Samples) -> TrainResult:
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints what it tells about dead workers
        launch.start_for_training(plan.config.ray)
        with connected():
            num_ranks = launch.ranks_on_ray(plan)
            with prepared(plan, samples, num_ranks) as request, _display(plan) as display:
                return finish(request, launch.run_on_ray(request, num_ranks, display))


def _run_inline(plan: TrainPlan, samples: Samples) -> TrainResult:
    if (plan.config.train.num_ranks or 1) != 1:
        raise RequestError(f"train.num_ranks={plan.config.train.num_ranks}: ray.address=inline runs one rank")
    with prepared(plan, samples, num_ranks=1) as request, _display(plan) as display:
        return finish(request, launch.run_here(request, display))


def _run_under_torchrun(plan: TrainPlan, samples: Samples) -> TrainResult:
    launch.init_torchrun_group()
    try:
        num_ranks, first = dist.get_world_size(), dist.get_rank() == 0
        if plan.config.train.num_ranks not in (None, num_ranks):
            raise RequestError(f"train.num_ranks={plan.config.train.num_ranks}: torchrun started {num_ranks} processes")
        check_parts(plan.config, num_ranks, plan.classes)
        with contextlib.ExitStack() as stack:
            request = _told_by_first(lambda: stack.enter_context(prepared(plan, samples, num_ranks)))
            display = stack.enter_context(_display(plan, quiet=not first))
            outcome = launch.run_torchrun_rank(request, display)
            return finish(request, outcome, write=first)
    finally:
        dist.destroy_process_group()


def _told_by_first(prepare: Callable[[], RankRequest]) -> RankRequest:
    """Collective: what rank 0 prepared, on every rank; or raise everywhere why it refused."""
    told: list[RankRequest | PairmillError | None] = [None]
    if dist.get_rank() == 0:
        try:
            told[0] = prepare()
        except PairmillError as error:
            told[0] = error
    dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], PairmillError):
        raise told[0]
    assert told[0] is not None
    return told[0]


@contextlib.contextmanager
def prepared(plan: TrainPlan, samples: Samples, num_ranks: int) -> Iterator[RankRequest]:
    """Register the run or open it again, and hold it for this command: tokenizer there, checkpoints fit, no leftovers.

    Raises RequestError when the folder holds another run, or another command works in it.
    """
    tokenizer, initial = _begin(plan, samples)
    store = open_run(plan.config.output, "train", plan.config).store
    with hold(store):
        _refuse_other_samples(store, samples)
        for leftover in (STOP_FILE, launch.FAILURE_FILE, PROGRESS_FILE):
            store.remove(leftover)
        if initial and not store.exists(INITIAL_FILE):
            write_initial(store, initial)
        if not store.exists(TOKENIZER_FILE):
            store.create(TOKENIZER_FILE, (tokenizer or make_tokenizer(plan, samples)).to_json().encode())
        if not store.exists(DATASET_FILE):
            store.create(DATASET_FILE, json.dumps({"url": samples.url, "sha256": samples.fingerprint}).encode())
        told = store.read_bytes(TOKENIZER_FILE).decode()
        yield RankRequest(plan=plan, output=store.url, tokenizer=told)


def _begin(plan: TrainPlan, samples: Samples) -> tuple[Tokenizer | None, Weights]:
    """For a new run: its tokenizer, and what it starts from. Raises before anything is written."""
    store = Store(plan.config.output)
    if store.exists(TOKENIZER_FILE):
        return None, {}
    tokenizer = make_tokenizer(plan, samples)
    return tokenizer, read_initial(plan, tokenizer)


def _refuse_other_samples(store: Store, samples: Samples) -> None:
    """Raise RequestError when the dataset is no longer the one that the run began with."""
    if store.exists(DATASET_FILE):
        began_with: str = json.loads(store.read_bytes(DATASET_FILE))["sha256"]
        if began_with != samples.fingerprint:
            raise RequestError(
                f"data.dataset={samples.url}: changed since this run began (its manifest was {began_with[:12]}..., is "
                f"{samples.fingerprint[:12]}...), so the run cannot go on exactly; choose another output, or bring "
                "back the dataset that it began with"
            )


def make_tokenizer(plan: TrainPlan, samples: Samples) -> Tokenizer:
    """The tokenizer of a run; a compact vocabulary needs one pass over the captions."""
    text = plan.config.model.text
    captions = samples.captions() if text.vocabulary == "compact" else []
    return Tokenizer.build(captions, context_length=text.context_length, vocabulary=text.vocabulary)


def finish(request: RankRequest, outcome: Outcome, *, write: bool = True) -> TrainResult:
    """Record that a run is complete."""
    store, plan = Store(request.output), request.plan
    if outcome == "done" and write:
        lines, newest = read_lines(store), next(published(store), None)
        result = {
            "num_steps": plan.num_steps,
            "epochs": plan.epochs,
            "checkpoint": newest.folder if newest else None,
            "last": lines[-1] if lines else {},
        }
        store.write_bytes(RESULT_FILE, json.dumps(result, indent=1).encode())
    return TrainResult(outcome=outcome, store=store, plan=plan)


def _display(plan: TrainPlan, *, quiet: bool = False) -> TrainDisplay:
    from rich.console import Console

    return TrainDisplay(f"train {plan.config.method}", Console(quiet=True) if quiet else None)
