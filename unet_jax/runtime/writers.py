"""What a run leaves behind: JSON lines, TensorBoard events, console lines.

Also the one way to write a file whole (`write_atomically`). Everything here
runs on one host; nothing touches a device.
"""

import contextlib
import datetime
import errno
import json
import math
import os
import pathlib
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, TextIO, TypeVar

import numpy as np

from unet_jax.errors import DiskError, UserError
from unet_jax.runtime import storage

# EFBIG: a file size limit; EDQUOT: a quota. To the user all are a full disk.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

Item = TypeVar("Item")


# --- Whole files ------------------------------------------------------------


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file so that a reader, or a crash, sees the old or the new one.

  Folders are made. The data is on disk when the function returns.

  Raises:
    UserError: it cannot be written; an old file is as it was.
  """
  path = storage.to_path(path)
  if storage.is_remote(path):
    with _explained(path):
      return storage.write_whole(path, data)
  # A name of its own: two processes may write the same file.
  temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
  with _explained(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      with open(temp, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temp, path)
    except BaseException:
      temp.unlink(missing_ok=True)
      raise
  _sync_dir(path.parent)


def _sync_dir(path: pathlib.Path) -> None:
  """Makes the names in a folder, not only the files, survive a power cut."""
  with contextlib.suppress(OSError):  # Some network disks cannot.
    fd = os.open(path, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
  """Turns an error of the disk into one line: which file, why, what to do."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or str(error)
    remedy = "check the path and its permissions"
    if error.errno in _FULL:
      folder = next(p for p in path.parents if p.exists())
      free = shutil.disk_usage(folder).free
      reason += f" ({free} bytes free on the disk)"
      remedy = "make room and run again"
    elif isinstance(error, (FileExistsError, NotADirectoryError)):
      reason, remedy = "a folder in its path is a file", "take another path"
    raise DiskError(f"cannot write {path}: {reason}; {remedy}") from error


# --- JSON lines -------------------------------------------------------------


class JsonlWriter:
  """Appends records to a file, one JSON object a line, each in one write.

  A power cut, or a SIGKILL (Linux looks for it between the pages of a write),
  can leave the last line torn: `read_jsonl` skips it, and opening mends it.
  Opening creates the file and its folder. Only one process may have it open.
  """

  def __init__(self, path: str | os.PathLike):
    self._path = pathlib.Path(path)
    cut_lines_after(self._path, math.inf)
    with _explained(self._path):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = open(self._path, "ab", buffering=0)
    _sync_dir(self._path.parent)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends one record, of anything that `plain` takes.

    Floats come back bit for bit.

    Raises:
      UserError: the disk is full; the file ends with the last whole line.
    """
    line = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
    fd = self._file.fileno()
    size = os.fstat(fd).st_size
    with _explained(self._path):
      try:
        while line:  # A disk that fills up takes a part; the next call says so.
          line = line[os.write(fd, line) :]
      except OSError:
        os.ftruncate(fd, size)
        raise

  def flush(self) -> None:
    """Returns when every line is on disk."""
    with _explained(self._path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Flushes and closes."""
    with self._file:
      self.flush()


def cut_lines_after(path: str | os.PathLike, step: float) -> None:
  """Removes the records of steps beyond `step`, for a run that resumes there.

  A torn last line goes too, records without "step" stay; the other lines keep
  their bytes. The file changes at once or not at all; a missing file is fine.

  Raises:
    UserError: a line before the last is not a JSON object.
  """
  path = pathlib.Path(path)
  if not os.path.exists(path):  # Unlike `path.exists()`, this never raises.
    return
  data = b"".join(
    line + b"\n"
    for line, record in _read_lines(path)
    if record.get("step") is None or record["step"] <= step
  )
  if data != path.read_bytes():
    write_atomically(path, data)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the records of a JSON lines file, but for a torn last line.

  Raises:
    UserError: the file is missing, or an earlier line is not a JSON object.
  """
  return [record for _, record in _read_lines(pathlib.Path(path))]


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  """The lines, without their ends, and their records; see `read_jsonl`."""
  try:
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  found = []
  for i, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
    except ValueError:
      record = None
    if isinstance(record, dict):
      found.append((line, record))
    elif i < len(lines):
      raise UserError(
        f"{path}, line {i}: not a JSON object; remove or mend the line"
      )
  return found


def plain(value: Any) -> Any:
  """`value` in the types that JSON has.

  Arrays and scalars of NumPy and JAX become lists and numbers, at any depth of
  lists and dicts; NaN and infinities, which JSON lacks, become None.
  """
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if hasattr(value, "tolist"):  # NumPy and JAX, arrays and scalars.
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


# --- TensorBoard ------------------------------------------------------------


class TensorBoardWriter:
  """Writes TensorBoard event files; `tensorboard --logdir DIR` shows them.

  Events go through tensorboardX's record writer and not its `SummaryWriter`:
  that one writes from a thread, and when a full disk kills the thread the
  next calls wait for it for ever. Here the error is raised by the call.

  Args:
    log_dir: folder of the event files; made.
    first_step: the step that the run starts or resumes from; what an earlier
      process wrote beyond it is hidden.
  """

  def __init__(self, log_dir: str | os.PathLike, *, first_step: int):
    # Late: modes that draw nothing need not load it.
    from tensorboardX import RecordWriter, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    # TensorBoard reads files in the order of their names. Microseconds: two
    # processes that start within a second must not share a file.
    name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"
    self._path = pathlib.Path(log_dir) / name
    self._event, self._summary = Event, summary
    with _explained(self._path):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      self._file = RecordWriter(str(self._path))
    self._put(file_version="brain.Event:2")
    start = SessionLog(status=SessionLog.START)
    self._put(step=first_step + 1, session_log=start)

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes numbers; None and NaN leave a gap.

    A list of numbers becomes NAME/0, NAME/1, ...; "/" groups names.
    """
    for name, value in values.items():
      if np.ndim(value) == 1:
        self.scalars(step, {f"{name}/{i}": v for i, v in enumerate(value)})
      elif value is not None and not math.isnan(float(value)):
        summary = self._summary.scalar(name, float(value))
        self._put(step=step, summary=summary)

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes one picture, uint8 [H, W, 3]."""
    summary = self._summary.image(name, np.asarray(image), dataformats="HWC")
    self._put(step=step, summary=summary)

  def text(self, step: int, name: str, text: str) -> None:
    """Writes a text, shown as Markdown."""
    self._put(step=step, summary=self._summary.text(name, text))

  def flush(self) -> None:
    """Returns when every event is on disk."""
    with _explained(self._path):
      self._file.flush()

  def close(self) -> None:
    """Flushes and closes."""
    with _explained(self._path), contextlib.closing(self._file):
      self._file.flush()

  def _put(self, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), **fields)
    with _explained(self._path):
      self._file.write(event.SerializeToString())


# --- The console ------------------------------------------------------------


def log(message: str, *, stream: TextIO | None = None) -> None:
  """Tells the user something: one line, on stderr unless said otherwise."""
  _write(sys.stderr if stream is None else stream, message + "\n")


def track(
  items: Iterable[Item],
  what: str,
  *,
  stream: TextIO | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
  """Yields `items` and tells how many are done: `predicting  12/300`.

  Without the total where `items` has no length. On a terminal the count is
  redrawn in place, in a file there is a line a minute.
  """
  stream = sys.stderr if stream is None else stream
  count = _Count(stream, clock, seconds_in_file=60.0)
  total = f"/{len(items)}" if isinstance(items, Sized) else ""
  for i, item in enumerate(items):
    count.show(f"{what}  {i}{total}")
    yield item
  _write(stream, "")


class _Count:
  """A count that is redrawn in place on a terminal, a few times a second."""

  def __init__(
    self, stream: TextIO, clock: Callable[[], float], seconds_in_file: float
  ):
    self._stream = stream
    self._clock = clock
    self._end = "" if _is_terminal(stream) else "\n"
    self._seconds = 0.2 if _is_terminal(stream) else seconds_in_file
    self._shown_at = clock()

  def show(self, text: str) -> None:
    """Writes the text, unless the last one was written a moment ago."""
    if self._clock() - self._shown_at >= self._seconds:
      self._shown_at = self._clock()
      _write(self._stream, text + self._end)


class Progress:
  """How far a run is, how fast, and how long it will still take.

  Speed is the mean over this process, without its first step (which compiles)
  and without pauses (evaluation, saving). The time to go is for the remaining
  steps at the mean time a step so far, with the pauses.

  Args:
    total_steps: steps of the whole run.
    first_step: steps finished by earlier processes; 0 for a new run.
    batch_size: examples a step, over all devices and hosts.
    examples: what they are called.
    stream: where `tick` and `report` write; stderr by default.
    clock: seconds, from any origin.
  """

  def __init__(
    self,
    total_steps: int,
    first_step: int,
    *,
    batch_size: int,
    examples: str = "images",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._examples = examples
    self._total_steps = total_steps
    self._batch_size = batch_size
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._count = _Count(self._stream, clock, seconds_in_file=math.inf)
    # Speed counts from the end of this process's first step.
    self._step = self._start_step = first_step + 1
    self._start_time = clock()
    self._paused = 0.0

  def tick(self, step: int) -> None:
    """Notes that `step` steps are finished; call it after every step."""
    self._step = step
    if step == self._start_step:
      self._start_time, self._paused = self._clock(), 0.0
    self._count.show(self.line(step, {}))

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Takes the time spent inside out of the speed; not to be nested."""
    start = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - start

  @property
  def examples_per_second(self) -> float | None:
    """Examples a second; None until two steps are finished."""
    steps, seconds = self._elapsed()
    seconds -= self._paused
    return steps * self._batch_size / seconds if steps and seconds > 0 else None

  def line(self, step: int, fields: Mapping[str, Any]) -> str:
    """`step  120/300   40%  loss 0.2134  312.4 images/s  eta 0:01:23`."""
    total = self._total_steps
    # Rounded down: 100% means finished.
    percent = f"{100 * step // total:3d}%"
    parts = ["step", f"{step:{len(str(total))}d}/{total}", percent]
    parts += [f"{name} {_short(value)}" for name, value in fields.items()]
    speed = self.examples_per_second
    if speed is not None:
      steps, seconds = self._elapsed()
      eta = datetime.timedelta(seconds=round((total - step) * seconds / steps))
      parts += [f"{_short(speed)} {self._examples}/s", f"eta {eta}"]
    return "  ".join(parts)

  def report(self, step: int, fields: Mapping[str, Any]) -> None:
    """Writes a step and its numbers, texts or Nones in a line that stays."""
    log(self.line(step, fields), stream=self._stream)

  def _elapsed(self) -> tuple[int, float]:
    """Steps and seconds since the first tick, pauses included."""
    return self._step - self._start_step, self._clock() - self._start_time


class NoProgress:
  """Shows nothing, for hosts beside the first."""

  def tick(self, step: int) -> None:
    pass

  def paused(self) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _short(value: Any) -> str:
  """A value in about six characters."""
  if value is None or isinstance(value, (str, bool, int)):
    return "-" if value is None else str(value)
  number = float(value)
  if number == 0 or 0.01 <= abs(number) < 10:
    return f"{number:.4f}"
  return f"{number:.1f}" if 10 <= abs(number) < 1e6 else f"{number:.1e}"


def _is_terminal(stream: TextIO) -> bool:
  return not stream.closed and stream.isatty()


def _write(stream: TextIO, text: str) -> None:
  """Writes over the count that may have been left on a terminal."""
  text = "\r\x1b[K" + text if _is_terminal(stream) else text
  encoding = stream.encoding or "utf-8"
  text = text.encode(encoding, "backslashreplace").decode(encoding)
  # A closed terminal or a full log must not end a run that goes well.
  with contextlib.suppress(OSError, ValueError):
    stream.write(text)
    stream.flush()
