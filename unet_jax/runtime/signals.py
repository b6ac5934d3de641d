"""Stopping on request: Ctrl-C and SIGTERM end a run after its current step."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class Stopped(Exception):
  """Unwinds a run that a signal stopped, after its state was saved.

  Attributes:
    signum: the signal, for `exit_status`.
  """

  def __init__(self, signum: int):
    super().__init__(f"stopped by {signal.Signals(signum).name}")
    self.signum = signum


class GracefulStop:
  """While open, the first SIGINT or SIGTERM is noted instead of fatal.

  The loop polls `requested` at each step and each evaluation batch, saves and
  leaves. Python runs handlers between its own instructions: a signal that
  arrives inside a long call into C++, above all the compilation of the train
  step (minutes), is noted, and answered on the terminal, when that returns.

  A second signal of either kind, once the first is noted, ends the process at
  once, with the exit status of that signal. Outside the main thread nothing is
  installed and `requested` stays None. Open it after
  `jax.distributed.initialize`, which installs a SIGTERM handler of its own.

  Attributes:
    requested: the number of the first signal, None before it.
  """

  def __init__(self):
    self.requested: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "GracefulStop":
    if threading.current_thread() is threading.main_thread():
      for signum in _STOP_SIGNALS:
        self._previous[signum] = signal.signal(signum, self._note)
    return self

  def __exit__(self, *exc_info: object) -> None:
    for signum, handler in self._previous.items():
      # None: a handler that Python did not install and cannot put back.
      signal.signal(signum, signal.SIG_DFL if handler is None else handler)

  def _note(self, signum: int, frame: FrameType | None) -> None:
    del frame
    self.requested = signum
    # The next signal is the kernel's: it ends the process even while the main
    # thread waits inside XLA, where no Python handler would run.
    for other in _STOP_SIGNALS:
      signal.signal(other, signal.SIG_DFL)
    # Not sys.stderr: the signal may have interrupted a write to it.
    message = b"\nstopping after this step; press again to quit at once\n"
    with contextlib.suppress(OSError):  # No terminal; the request stands.
      os.write(_STDERR, message)


def exit_status(signum: int) -> int:
  """The shell's status of a process that a signal stopped: 130 or 143."""
  return 128 + signum
