"""The error that a user can fix, and the exit statuses of a command.

An exception that carries `exit_status` is printed as one line for the user; any other is a bug, and its
traceback is printed. `schematics.sheets.DataError` has its own `exit_status`, since schematics may not import
cluster.
"""

import errno
import os
from pathlib import Path

FAILED = 1  # an error that the user can fix, printed as one line
USAGE = 2  # a wrong command line
CRASH = 70  # an unexpected exception, a hung step or a lost rank: start again from the last checkpoint
AGAIN = 75  # saved, but not requeued: the same command resumes from here (EX_TEMPFAIL)
INTERRUPTED = 130  # ended after Ctrl-C
UNREAD = 141  # ended as the reader of standard output had left
TERMINATED = 143  # saved after TERM


class UserError(Exception):
    """An error that the user can fix. Its message is one line that names the file or flag and the cure."""

    exit_status = FAILED


class GpuFault(UserError):
    """A GPU that a job was given and that is lost or does not compute, in one line that names its node.

    slurm/launch.sh reads the node in that line, and lets the job go on without it.
    """

    exit_status = CRASH

    def __init__(self, node: str, what: str) -> None:
        super().__init__(f"GPU fault on {node}: {what}: check nvidia-smi there, or give --device cpu")


# A file system that fails: full, over quota, read-only, broken, gone, forbidden.
DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.EPERM),
)

GONE = "its folder is gone; bring it back, or run the command again to begin anew"


def failing_disk(error: BaseException) -> str:
    """The line for an error of the file system itself; empty for any other error.

    A file that is absent counts only if its folder is gone too: else a wrong name, so a bug, would be hidden.
    """
    if not isinstance(error, OSError):
        return ""
    file = os.fsdecode(error.filename or "")  # TensorBoard has names as bytes
    gone = error.errno == errno.ENOENT and file and not Path(file).parent.exists()
    if error.errno not in DISK and not gone:
        return ""
    reason = f"{os.strerror(error.errno or 0)}; make the disk writable, with room, and run the command again"
    return f"{file or 'a file'}: {GONE if gone else reason}"
