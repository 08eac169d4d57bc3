"""`pairmill submit`: the same command as a Ray job on a cluster, its log followed, its exit status returned.

YAML files are read here and travel as settings, so the cluster needs no copy of them. Ray's token authentication is
used when a token is to be had (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token).
"""

import asyncio
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config import load_yaml
from cluster.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, RequestError, RunError

SUBMITTABLE = ("build", "repair", "train", "eval")
POLL_INTERVAL_S = 1.0
AGENT_PATIENCE_S = 30.0
HELP = """usage: pairmill submit build|repair|train|eval [CONFIG.yaml] [dotted.key=value ...] --address URL [options]

  --address URL   the cluster's dashboard, such as http://127.0.0.1:8265; default $RAY_API_SERVER_ADDRESS or
                  $RAY_ADDRESS
  --job-id ID     name the job (default: one made by Ray)
  --detach        print the job's id and return at once

YAML files are read here and sent as settings. Inputs and outputs must be reachable from the cluster.
A cluster with token authentication: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that holds the token.
Returns the command's own exit status. Ctrl-C stops following; the job goes on."""


def submit_command(words: Sequence[str]) -> int:
    """Parse the words after `pairmill submit` and run the job to its end (or return at once with --detach)."""
    rest = list(words)
    if not rest or "--help" in rest or "-h" in rest:
        print(HELP)
        return EXIT_DONE
    address = _take_option(rest, "--address") or os.environ.get("RAY_API_SERVER_ADDRESS")
    address = address or os.environ.get("RAY_ADDRESS")
    job_id = _take_option(rest, "--job-id")
    detach = "--detach" in rest
    if detach:
        rest.remove("--detach")
    if not rest or rest[0] not in SUBMITTABLE:
        raise RequestError(f"say what to submit: {', '.join(SUBMITTABLE)}; got {rest[0] if rest else 'nothing'}")
    if not address:
        raise RequestError("no cluster named; give --address http://HOST:8265 (the Ray dashboard)")
    client = connect(address)
    submitted = _hand_in(client, address, entrypoint(rest), job_id)
    print(f"job {submitted} on {address}; stop it with: ray job stop --address {address} {submitted}", file=sys.stderr)
    return EXIT_DONE if detach else follow(client, submitted)


def connect(address: str) -> Any:
    """A Ray job client for the cluster at `address`. RequestError tells an unreachable one from a refused token."""
    _use_token_if_there_is_one()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    # It tells of every WebSocket that it closes.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"--address {address}: the cluster refused us ({reason}); it uses token authentication: "
            "set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"--address {address}: no Ray dashboard answers there ({str(error).splitlines()[0]}); "
            "give the address that `ray start --head` printed, such as http://127.0.0.1:8265"
        ) from None


def entrypoint(words: Sequence[str]) -> str:
    """The shell line of a job: the same command with YAML files inlined.

    It runs in this directory with this Python where the node has them (one machine, a shared home), else in Ray's
    working directory with the node's own `python`.
    """
    command, *rest = words
    settings: list[str] = []
    for word in rest:
        is_file = word.endswith((".yaml", ".yml")) and "=" not in word
        settings += as_settings(load_yaml(word)) if is_file else [word]
    arguments = shlex.join(["-P", "-m", "cluster.cli", command, *settings])
    here, python = shlex.quote(str(Path.cwd())), shlex.quote(sys.executable)
    warning = shlex.quote(f"pairmill: no folder {Path.cwd()} on this node; relative paths will not be found")
    return (
        f"cd {here} 2>/dev/null || echo {warning} >&2; "
        f"if [ -x {python} ]; then python={python}; else python=python; fi; "
        f'exec "$python" {arguments}'
    )


def as_settings(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested values as `dotted.key=value` words; values are written as JSON, which YAML reads."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            words += as_settings(value, f"{prefix}{name}.")
        else:
            words.append(f"{prefix}{name}={json.dumps(value)}")
    return words


def _hand_in(client: Any, address: str, line: str, job_id: str | None) -> str:
    """Submit the job and return its id. A cluster that has just started has no agent for jobs yet: wait for it."""
    deadline = time.monotonic() + AGENT_PATIENCE_S
    while True:
        try:
            return str(client.submit_job(entrypoint=line, submission_id=job_id))
        except (RuntimeError, ValueError, OSError) as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                said = _last_line(error)
                raise RequestError(f"--address {address}: the cluster did not take the job: {said}") from None
        time.sleep(POLL_INTERVAL_S)


def follow(client: Any, job_id: str) -> int:
    """Print a job's log as it grows and return its exit status once it has ended.

    Raises RunError when the job failed before the command started, or the cluster can no longer be asked.
    """
    try:
        asyncio.run(_print_log(client, job_id))
        while not (status := client.get_job_status(job_id)).is_terminal():
            time.sleep(POLL_INTERVAL_S)
    except KeyboardInterrupt:
        print(f"\nno longer following; job {job_id} goes on (ray job logs --follow {job_id})", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # of whatever library Ray's client uses for the network
        raise RunError(
            f"lost sight of job {job_id}: {_last_line(error)}; it may go on: ray job status {job_id}, "
            f"ray job logs --follow {job_id}"
        ) from None
    info = client.get_job_info(job_id)
    print(f"job {job_id}: {status.value.lower()}", file=sys.stderr)
    if status.value == "SUCCEEDED":
        return EXIT_DONE
    if status.value == "STOPPED":
        return EXIT_INTERRUPTED
    if info.driver_exit_code is None:
        raise RunError(f"job {job_id} failed before the command started: {info.message}")
    return int(info.driver_exit_code) if info.driver_exit_code > 0 else EXIT_FAILED


async def _print_log(client: Any, job_id: str) -> None:
    async for text in client.tail_job_logs(job_id):
        print(text, end="", flush=True)


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _use_token_if_there_is_one() -> None:
    """Ray's job client sends a token only in token mode, which it does not enter by itself."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    default = Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH") or default.exists():
        os.environ["RAY_AUTH_MODE"] = "token"


def _take_option(words: list[str], name: str) -> str | None:
    """Remove `--name VALUE` or `--name=VALUE` from the words and return VALUE."""
    for index, word in enumerate(words):
        if word == name:
            if index + 1 == len(words):
                raise RequestError(f"{name}: needs a value")
            del words[index]
            return words.pop(index)
        if word.startswith(f"{name}="):
            del words[index]
            return word.partition("=")[2]
    return None
