"""The errors a pairmill command ends with, and the exit status each one means.

PairmillError
├── RequestError   the request was wrong and no work was done   exit 2
└── RunError       the run failed; the same command resumes it  exit 1

An interrupt (Ctrl-C, SIGTERM) is `KeyboardInterrupt` and ends with exit 130.
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_REQUEST = 2
EXIT_INTERRUPTED = 130


class PairmillError(Exception):
    """Base of what a command reports to its user: the text says what, where and what to do."""

    exit_status = EXIT_FAILED


class RequestError(PairmillError):
    """The request cannot be carried out as written; nothing was started and nothing was changed."""

    exit_status = EXIT_BAD_REQUEST


class RunError(PairmillError):
    """The run stopped. What was finished is kept, and the same command goes on from there."""
