"""Calls to a store that is not a local disk: again after what passes by itself, and one clear error for what does not.

Clients retry on their own for some seconds; a store that is restarted or asks to slow down takes longer.
"""

import errno
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from cluster.errors import RunError

logger = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long a call is repeated before the run stops; the same command goes on later."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0

# s3fs reports HTTP 500 as EREMOTEIO, 503 and SlowDown as EBUSY, what it does not know as EIO.
_PASSING_ERRNO = frozenset(
    {
        *(errno.EBUSY, errno.EIO, errno.EREMOTEIO, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT),
        *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH),
    }
)
# Of botocore, aiohttp and azure, by name: the clients are optional, and these have no base in the standard library.
_PASSING_NAMES = frozenset(
    {
        *("HTTPClientError", "EndpointConnectionError", "IncompleteReadError", "ResponseStreamingError"),
        *("ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError"),
        *("ServiceRequestError", "ServiceResponseError"),
    }
)
_NO_ACCESS_NAMES = frozenset({"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"})


def call(url: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`, repeated while the store is out of order.

    url: what the call is about, for messages. An absent or already present object (FileNotFoundError,
    FileExistsError) is an answer and passes through. RunError when access is refused, or the store stays away.
    """
    deadline, wait_s = time.monotonic() + PATIENCE_S, FIRST_WAIT_S
    while True:
        try:
            return function(*args, **kwargs)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each store's library has errors of its own
            if _is_refused(error):
                raise RunError(
                    f"{url}: access refused ({_said(error)}); check the store's credentials and endpoint in the "
                    "environment of this command and, on a cluster, of its nodes"
                ) from error
            if not is_passing(error):
                raise
            if time.monotonic() + wait_s > deadline:
                raise RunError(
                    f"{url}: the store has not answered properly for {PATIENCE_S:.0f} s ({_said(error)}); "
                    "run the same command again when it does"
                ) from error
            logger.warning("%s: %s; trying again", url, _said(error))
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment."""
    if isinstance(error, PermissionError):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or _named(error, _PASSING_NAMES):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _is_refused(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or _named(error, _NO_ACCESS_NAMES)


def _named(error: BaseException, names: frozenset[str]) -> bool:
    return any(base.__name__ in names for base in type(error).__mro__)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
