"""Turn signals into a flag that the training loop reads, and do nothing else. No torch is imported here.

A Python handler runs only between two bytecodes of the main thread, so not while that thread waits inside a
C++ collective. Therefore the C part of the handler writes the signal's number to a pipe, at once and on
whichever thread receives it, and a thread of this module reads the pipe. The main thread blocks the signals
for its children: DataLoader workers inherit the mask, so a signal sent to all processes of the job step does
not end them.

Until `Signals` is created, a signal kills the process. Under Slurm start Python as
`srun env --block-signal=USR2 python ...`: a signal that comes during the imports then stays pending.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

from cluster.errors import INTERRUPTED, UserError

GO_ON, REQUEUE, STOP = 0, 1, 2


class Signals:
    """The flag is `level`: GO_ON, REQUEUE (USR2: save and run again) or STOP (TERM, Ctrl-C: save and end).

    LINEWORK_REQUEUE_SIGNAL names another signal than USR2. ctrl_c: whether Ctrl-C is such a signal too; a
    second Ctrl-C then ends the process at once. Create it in the main thread, before the first DataLoader
    worker.
    """

    def __init__(self, ctrl_c: bool = True) -> None:
        self.level = GO_ON
        self.name = ""
        self.requeue = requeue_signal()
        self.trapped = {self.requeue, signal.SIGTERM} | ({signal.SIGINT} if ctrl_c else set())
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in self.trapped}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.trapped)

    def close(self) -> None:
        """Restore the previous signal handlers and mask."""
        signal.set_wakeup_fd(self._old_wakeup)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)
        for number, handler in self._handlers.items():
            # A second USR2 may still arrive, and the default handler would kill a run that has ended well.
            with contextlib.suppress(TypeError):
                signal.signal(number, signal.SIG_IGN if number == self.requeue else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _listen(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.trapped)  # one thread must receive them
        while (number := os.read(self._reader, 1)[0]) != 0:
            if number not in self.trapped:
                continue
            if number == signal.SIGINT and self.level == STOP:
                os._exit(INTERRUPTED)
            level = REQUEUE if number == self.requeue else STOP
            if level > self.level:
                self.name, self.level = signal.Signals(number).name, level


def requeue_signal() -> signal.Signals:
    """USR2, or the one that LINEWORK_REQUEUE_SIGNAL names (USR2, SIGUSR2 or a number)."""
    text = os.environ.get("LINEWORK_REQUEUE_SIGNAL", "USR2")
    try:
        if text.isdigit():
            return signal.Signals(int(text))
        return signal.Signals["SIG" + text.upper().removeprefix("SIG")]
    except (KeyError, ValueError):
        raise UserError(f"LINEWORK_REQUEUE_SIGNAL={text}: no such signal; give USR2 or RTMIN") from None
