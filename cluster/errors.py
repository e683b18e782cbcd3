"""The mistake of a user, and the statuses with which a command ends.

An exception that carries `exit_status` is one line for the person at the keyboard; any other is a bug and
ends as a traceback. `schematics.sheets.DataError` carries one too, since schematics imports nothing of ours.
"""

FAILED = 1  # an error that the person can mend, told in one line
USAGE = 2  # a wrong command line
CRASH = 70  # what nobody expected, a hung step, a lost rank: worth starting again from the last checkpoint
AGAIN = 75  # saved, but not requeued: the same command goes on from here (EX_TEMPFAIL)
INTERRUPTED = 130  # ended after Ctrl-C
TERMINATED = 143  # saved after TERM


class UserError(Exception):
    """One line for the person at the keyboard: it names the file or flag and the cure."""

    exit_status = FAILED
