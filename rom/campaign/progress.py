"""How far a campaign is: a bar on a terminal with tqdm, otherwise a line every few seconds, on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 5.0


class Progress:
    """Counts faults; a context manager."""

    def __init__(self, faults: int, done: int, shown: bool) -> None:
        self.faults, self.done, self.shown = faults, done, shown
        self.before, self.started = done, time.monotonic()
        self._line = self.started
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm  # noqa: PLC0415 - an extra
            except ImportError:
                return self
            self._bar = tqdm(total=self.faults, initial=self.done, unit=" faults", dynamic_ncols=True, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, faults: int) -> None:
        """So many more are in the store."""
        self.done += faults
        if self._bar is not None:
            self._bar.update(faults)
            return
        now = time.monotonic()
        if now - self._line >= LINE_SECONDS:
            self._line = now
            rate = (self.done - self.before) / (now - self.started)
            left = (self.faults - self.done) / rate
            self.say(
                f"{self.done / self.faults:4.0%}  {self.done:,} of {self.faults:,} faults  {rate:,.0f} faults/s  "
                f"about {_clock(left)} left"
            )

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self.shown:
            return
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.write(text, file=sys.stderr)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
