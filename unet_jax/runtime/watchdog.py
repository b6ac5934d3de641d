"""Ends a run that hangs, and shows where."""

import faulthandler
import sys


class Watchdog:
  """While open, `seconds` without `alive()` end the process.

  It first writes to stderr what every thread was doing. A thread of the C
  library does both, so that it works where Python waits inside XLA for another
  host. The exit status is 1. The first `alive()` arms it; 0 seconds never do.
  """

  def __init__(self, seconds: int):
    self._seconds = seconds

  def __enter__(self) -> "Watchdog":
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()

  def alive(self) -> None:
    """Says that the run goes on; cheap."""
    if self._seconds:
      faulthandler.dump_traceback_later(
        self._seconds, exit=True, file=sys.__stderr__
      )
