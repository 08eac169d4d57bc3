"""Starting the ranks of a run: through Ray Train, or as they are when torchrun has started them, or just this process.

Ray Train starts the group again when a rank dies, and the new group goes on from the newest valid checkpoint. An error
that would come back (RunError, RequestError) is not tried again: the rank leaves it in the run's folder, the command
reads it there and ends.
"""

import contextlib
import json
import logging
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from cluster.config import validate
from cluster.errors import PairmillError, RequestError, RunError
from cluster.lifeline import raise_if_lost
from cluster.session import RayConfig, start_ray
from cluster.store import Store
from training.config import TrainConfig, TrainPlan, check_parts
from training.display import TrainDisplay
from training.metrics import STOP_FILE, read_progress
from training.trainer import Outcome, Rank, RankRequest, train

logger = logging.getLogger(__name__)

FAILURE_FILE = "failure.json"
STOP_GRACE_S = 9.0
MAX_ERROR_LENGTH = 300
_POLL_INTERVAL_S = 0.5
_PEER_LOST = re.compile(r"(closed|reset) by peer|Broken pipe|remote process exited")  # gloo; gloo; NCCL


def started_by_torchrun() -> bool:
    """Whether this process is one rank of a group that torchrun (or the deepspeed launcher) made."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_here(request: RankRequest, display: TrainDisplay) -> Outcome:
    """Train with a single rank in this process, without Ray."""
    with single_group(), _stop_on_signals() as stop:
        rank = _this_rank(request.plan, os.cpu_count() or 1)
        return train(request, rank, stop=stop, watch=display.show)


def run_torchrun_rank(request: RankRequest, display: TrainDisplay) -> Outcome:
    """Train as one rank of an initialised torchrun group."""
    with _stop_on_signals() as stop:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        rank = _this_rank(request.plan, max(1, (os.cpu_count() or 1) // ranks_here))
        try:
            return train(request, rank, stop=stop, watch=display.show)
        except RuntimeError as error:
            if _PEER_LOST.search(str(error)):
                raise RunError(
                    f"rank {rank.index}: another rank has ended, and says why; run the same command again"
                ) from error
            raise


def init_torchrun_group() -> None:
    """Join the group that torchrun described in the environment."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")


def run_on_ray(request: RankRequest, num_ranks: int, display: TrainDisplay) -> Outcome:
    """Train with `num_ranks` ranks as Ray actors, and follow them. Ray has to be started (`start_for_training`).

    A KeyboardInterrupt asks the ranks to checkpoint and stop, waits a few seconds for that, and is raised again.
    """
    store = Store(request.output)
    fit = _Background(lambda: _fit(request, num_ranks))
    try:
        while not fit.wait(_POLL_INTERVAL_S):
            raise_if_lost()
            _show_newest(store, display)
            _raise_failure(store)
    except KeyboardInterrupt:
        display.say("stopping: the ranks write a checkpoint (Ctrl-C again to leave without)")
        store.write_bytes(STOP_FILE, b"")
        fit.wait(STOP_GRACE_S)
        raise
    _raise_failure(store)
    _show_newest(store, display)
    if fit.error is not None:
        raise RunError(f"{_first_failure(fit.error)}; checkpoints are kept, run the same command to go on")
    outcome: Outcome = fit.value.return_value
    return outcome


def start_for_training(config: RayConfig) -> None:
    """Start or join Ray with the settings that Ray Train reads from the environment."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # also how soon a finished run is noticed
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0" if config.address in ("", "local") else "1")
    start_ray(config)


def ranks_on_ray(plan: TrainPlan) -> int:
    """The number of ranks on the connected cluster. Raises RequestError when it cannot hold them."""
    num_gpus, wanted = _num_gpus(), plan.config.train.num_ranks
    num_ranks = wanted or max(1, num_gpus)
    check_parts(plan.config, num_ranks, plan.classes)
    if num_gpus and num_ranks > num_gpus:
        raise RequestError(f"train.num_ranks={num_ranks}: the cluster has {num_gpus} GPUs")
    _cpus_per_rank(num_ranks)
    return num_ranks


def rank_main(settings: dict[str, Any]) -> Outcome:
    """What Ray Train runs on every rank."""
    plain: dict[str, Any] = settings["plan"]
    plan = TrainPlan(**(plain | {"config": validate(TrainConfig, plain["config"])}))
    request = RankRequest(plan=plan, output=settings["output"], tokenizer=settings["tokenizer"])
    try:
        return train(request, _this_rank(plan, settings["num_cpus"]))
    except PairmillError as error:
        failure = {"status": error.exit_status, "message": str(error)}
        Store(request.output).write_bytes(FAILURE_FILE, json.dumps(failure).encode())
        raise


def _fit(request: RankRequest, num_ranks: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    plan, use_gpu = request.plan, _num_gpus() > 0
    cpus = _cpus_per_rank(num_ranks)
    settings = {
        "plan": {
            "config": plan.config.model_dump(mode="json"),
            "num_samples": plan.num_samples,
            "num_steps": plan.num_steps,
            "warmup_steps": plan.warmup_steps,
            "classes": plan.classes,
        },
        "output": request.output,
        "tokenizer": request.tokenizer,
        "num_cpus": cpus,
    }
    with tempfile.TemporaryDirectory(prefix="pairmill-ray-train-") as ray_files:
        return TorchTrainer(
            rank_main,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=num_ranks,
                use_gpu=use_gpu,
                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=RunConfig(
                name="train",
                storage_path=ray_files,  # Ray's own notes; the run's checkpoints never pass through it
                failure_config=FailureConfig(max_failures=plan.config.train.max_restarts),
            ),
        ).fit()


def _num_gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _cpus_per_rank(num_ranks: int) -> int:
    """Cores that every rank can have on its node: an equal share, less where nodes do not divide evenly."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    for cpus in range(max(1, sum(nodes) // num_ranks), 0, -1):
        if sum(cores // cpus for cores in nodes) >= num_ranks:
            return cpus
    raise RequestError(f"train.num_ranks={num_ranks}: the cluster has {sum(nodes)} cores, every rank needs one")


def _this_rank(plan: TrainPlan, num_cpus: int) -> Rank:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    num_threads = plan.config.train.num_threads or num_cpus
    return Rank(index=dist.get_rank(), num_ranks=dist.get_world_size(), device=device, num_threads=num_threads)


def _show_newest(store: Store, display: TrainDisplay) -> None:
    if progress := read_progress(store):
        display.show(progress)


def _raise_failure(store: Store) -> None:
    """Raise what a rank left behind, if one did."""
    try:
        failure = json.loads(store.read_bytes(FAILURE_FILE))
    except FileNotFoundError:
        return
    raise (RequestError if failure["status"] == RequestError.exit_status else RunError)(failure["message"])


def _first_failure(error: BaseException) -> str:
    """The most telling line of an error: of a rank that failed, not of the layers above it."""
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    rank, inner = next(iter(failures.items()), (None, error))
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()] or [type(inner).__name__]
    text = lines[-1] if len(lines[-1]) <= MAX_ERROR_LENGTH else lines[-1][:MAX_ERROR_LENGTH] + "..."
    return text if rank is None else f"rank {rank} failed: {text}"


@contextlib.contextmanager
def single_group() -> Iterator[None]:
    """A process group of one, or the one that there is."""
    if dist.is_initialized():
        yield
        return
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGINT or SIGTERM has come; a second signal interrupts at once."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    saved = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


class _Background:
    """A function in a thread of its own: Ray Train takes over SIGINT when it is called in the main thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.value: Any = None
        self.error: BaseException | None = None
        self._function = function
        # Not Thread.join: interrupted by Ctrl-C it takes the thread for ended (CPython 3.11, bpo-45274).
        self._done = threading.Event()
        threading.Thread(target=self._run, name="fit", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end, at most so long; whether it has come."""
        return self._done.wait(timeout_s)

    def _run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:  # handed to the thread that waits
            self.error = error
        finally:
            self._done.set()
