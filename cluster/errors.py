"""The error that a user can fix, and the exit statuses of a command.

An exception that carries `exit_status` is printed as one line for the user; any other is a bug, and its
traceback is printed. `schematics.sheets.DataError` has its own `exit_status`, since schematics may not import
cluster.
"""

FAILED = 1  # an error that the user can fix, printed as one line
USAGE = 2  # a wrong command line
CRASH = 70  # an unexpected exception, a hung step or a lost rank: start again from the last checkpoint
AGAIN = 75  # saved, but not requeued: the same command resumes from here (EX_TEMPFAIL)
INTERRUPTED = 130  # ended after Ctrl-C
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
