"""How a run ends early: by Ctrl-C, or when the minutes that it was given are over."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeIsUp(KeyboardInterrupt):
    """The minutes that a run was given are over; its checkpoint is written."""


class Stop:
    """Whether a run is to end after the step under way."""

    def __init__(self, until: float) -> None:
        """Take the latest time, of `time.monotonic`."""
        self.until, self.asked = until, False

    @property
    def reason(self) -> type[KeyboardInterrupt] | None:
        """What ends the run now; None: it goes on."""
        if self.asked:
            return KeyboardInterrupt
        return TimeIsUp if time.monotonic() > self.until else None

    @contextmanager
    def on_interrupt(self) -> Iterator[None]:
        """Let Ctrl-C finish the step under way; a second one stops at once."""

        def stop(*_: object) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread: Ctrl-C never arrives here
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
