"""The Ray session of a command: the user's cluster when one is named, else a local Ray that ends with the command."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from cluster.config import Config, key
from cluster.errors import RequestError
from cluster.executor import Executor, InlineExecutor, RayExecutor
from cluster.lifeline import lifeline

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0


class RayConfig(Config):
    """Where the work runs."""

    address: str = key(
        "",
        "Ray cluster to use: host:port, 'auto' for the one on this machine, 'inline' for no Ray at all; "
        "empty: $RAY_ADDRESS if set, else a local Ray that stops with the command",
        affects_result=False,
    )
    num_cpus: int | None = key(
        None, "cores that a local Ray may use; null: all", affects_result=False, unit="cores", ge=1
    )


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[Executor]:
    """An executor for the time of a command. Raises RequestError when the named cluster cannot be reached."""
    if config.address == "inline":
        yield InlineExecutor()
        return
    start_ray(config)
    with connected():
        yield RayExecutor(is_local=_address(config) == "local")


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """What is done with the Ray that `start_ray` has connected to; leaves it at the end."""
    import ray

    with lifeline(ray.get_runtime_context().gcs_address):
        try:
            yield
        finally:
            ray.shutdown()


def start_ray(config: RayConfig) -> None:
    """Connect to the cluster that the config names, or start a local Ray that the network cannot reach."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    require_reachable(config)
    address = _address(config)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    quiet: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        # Ray puts the current directory first on its workers' path, where a user's folder named `pipeline` or
        # `training` would hide ours. Paths of a run are absolute by now.
        with contextlib.chdir("/"):
            if address == "local":
                with _loopback_only():
                    ray.init("local", num_cpus=config.num_cpus, include_dashboard=False, **quiet)
            else:
                ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, (str(error).strip() or type(error).__name__).splitlines()[0]) from None
    except SystemExit as stop:  # of the handler that Ray has for SIGTERM while it starts
        raise KeyboardInterrupt from stop
    finally:
        _set_handlers(handlers)


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Let the Ray that is started inside listen on 127.0.0.1 alone, as it does on macOS and Windows.

    Elsewhere Ray takes the machine's outer address, even where it is told 127.0.0.1, and every one of its processes
    listens to the network. The switch is a constant read at import, and for its processes an environment variable.
    """
    from ray._private import ray_constants

    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    kept, before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if kept is None:
            del os.environ[name]
        else:
            os.environ[name] = kept


def require_reachable(config: RayConfig) -> None:
    """Raise RequestError if nothing listens at the cluster's address: `ray.init` would try it for many minutes.

    Commands ask before they write anything.
    """
    address = _address(config)
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise _no_cluster(address, error.strerror or str(error)) from None


def _no_cluster(address: str, reason: str) -> RequestError:
    return RequestError(
        f"ray.address={address}: no Ray cluster answers there ({reason}); "
        "start one with `ray start --head`, or leave ray.address empty for a local one"
    )


def _address(config: RayConfig) -> str:
    return config.address or os.environ.get("RAY_ADDRESS") or "local"


def _set_handlers(handlers: Mapping[signal.Signals, Any]) -> None:
    """Take back the signals: Ray's own handler, installed by `ray.init`, aborts the process on SIGTERM."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
