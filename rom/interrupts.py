"""Ctrl-C as a request: the step under way ends, and the caller saves."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a flag, so that the step under way ends; the second acts as usual."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Interrupts:
        try:
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: then nobody sends us signals
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
