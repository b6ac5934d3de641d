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
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO, TypeVar

import numpy as np

from unet_jax.errors import UserError

# EFBIG: a file size limit; EDQUOT: a quota. To the user all are a full disk.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_CLEAR_LINE = "\r\x1b[K"

Item = TypeVar("Item")


# --- Whole files ------------------------------------------------------------


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file so that a reader, or a crash, sees the old or the new one.

  Folders are made. The data is on disk when the function returns.

  Raises:
    UserError: the disk is full; the old file is as it was.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temp = path.with_name(f".{path.name}.tmp")
  try:
    with _full_disk(path), open(temp, "wb") as file:
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
  fd = os.open(path, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # Some network disks cannot.
      os.fsync(fd)
  finally:
    os.close(fd)


@contextlib.contextmanager
def _full_disk(path: pathlib.Path) -> Iterator[None]:
  """Turns a full disk into one line that names the file and what is free."""
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL:
      raise
    free = shutil.disk_usage(path.parent).free
    raise UserError(
      f"cannot write {path}: {error.strerror} ({free} bytes free on the disk);"
      " make room and run again"
    ) from error


# --- JSON lines -------------------------------------------------------------


class JsonlWriter:
  """Appends records to a file, one JSON object a line, never half a line.

  Opening creates the file and its folder, and mends a last line that a power
  cut left torn. Only one process may have the file open.
  """

  def __init__(self, path: str | os.PathLike):
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    _mend(self._path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    self._fd = os.open(self._path, flags, 0o666)
    _sync_dir(self._path.parent)

  def write(self, record: Mapping[str, Any]) -> None:
    """Appends one record.

    Args:
      record: values are None, bool, int, float, str, NumPy or JAX arrays and
        scalars, and lists and dicts of these. Floats come back bit for bit;
        NaN and infinities, which JSON lacks, become null.

    Raises:
      UserError: the disk is full; the file ends with the last whole line.
    """
    line = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
    size = os.fstat(self._fd).st_size
    with _full_disk(self._path):
      try:
        written = os.write(self._fd, line)
        while written < len(line):  # A disk that fills up; this call says so.
          written += os.write(self._fd, line[written:])
      except OSError:
        os.ftruncate(self._fd, size)
        raise

  def flush(self) -> None:
    """Returns when every line is on disk."""
    with _full_disk(self._path):
      os.fsync(self._fd)

  def close(self) -> None:
    """Flushes and closes; a second call does nothing."""
    if self._fd < 0:
      return
    try:
      self.flush()
    finally:
      os.close(self._fd)
      self._fd = -1


def cut_lines_after(path: str | os.PathLike, step: int) -> int:
  """Removes the records of steps beyond `step`, for a run that resumes there.

  A torn last line goes too, records without "step" stay; the other lines keep
  their bytes. The file changes at once or not at all; a missing file is fine.

  Returns:
    The number of lines removed.

  Raises:
    UserError: a line before the last is not a JSON object.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return 0
  lines = path.read_bytes().splitlines(keepends=True)
  records = read_jsonl(path)  # Shorter by one where the last line is torn.
  kept = [
    line.rstrip(b"\n") + b"\n"
    for line, record in zip(lines, records, strict=False)
    if record.get("step") is None or record["step"] <= step
  ]
  if kept != lines:
    write_atomically(path, b"".join(kept))
  return len(lines) - len(kept)


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads the records of a JSON lines file, but for a torn last line.

  Raises:
    UserError: the file is missing, or an earlier line is not a JSON object.
  """
  try:
    lines = pathlib.Path(path).read_bytes().splitlines()
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  records = [_parse_line(line) for line in lines]
  if records and records[-1] is None:
    records.pop()
  for i, record in enumerate(records):
    if record is None:
      raise UserError(
        f"{path}, line {i + 1}: not a JSON object; remove or mend the line"
      )
  return records


def plain(value: Any) -> Any:
  """`value` in the types that JSON has: arrays become lists, NaN None."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if hasattr(value, "tolist"):  # NumPy and JAX, arrays and scalars.
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _mend(path: pathlib.Path) -> None:
  """Cuts a torn last line; a whole one that lacks its newline gets it."""
  data = path.read_bytes() if path.exists() else b""
  start = data.rstrip(b"\n").rfind(b"\n") + 1
  last = data[start:].rstrip(b"\n")
  tail = b"" if _parse_line(last) is None else last + b"\n"
  if data[start:] != tail:
    write_atomically(path, data[:start] + tail)


def _parse_line(line: bytes) -> dict[str, Any] | None:
  """The record of one line, None for anything but a whole JSON object."""
  try:
    record = json.loads(line)
  except ValueError:
    return None
  return record if isinstance(record, dict) else None


# --- TensorBoard ------------------------------------------------------------


class TensorBoardWriter:
  """Writes TensorBoard event files; `tensorboard --logdir DIR` shows them.

  Events go through tensorboardX's record writer and not its `SummaryWriter`:
  that one writes from a thread, and when a full disk kills the thread the
  next calls wait for it for ever. Here the error is raised by the call.
  """

  def __init__(self, log_dir: str | os.PathLike, *, first_step: int):
    """Opens a new event file.

    Args:
      log_dir: folder of the event files.
      first_step: the step that the run starts or resumes from; what an earlier
        process wrote beyond it is hidden.
    """
    # Late: modes that draw nothing need not load it.
    from tensorboardX import RecordWriter, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder = pathlib.Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files in the order of their names. Microseconds: two
    # processes that start within a second must not share a file.
    name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"
    self._path = folder / name
    self._event, self._summary = Event, summary
    self._file = RecordWriter(str(self._path))
    self._closed = False
    self._put(Event(file_version="brain.Event:2"))
    start = SessionLog(status=SessionLog.START)
    self._put(Event(step=first_step + 1, session_log=start))

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes numbers; None and NaN leave a gap.

    Args:
      step: number of finished steps.
      values: name -> number, None, or a list of these, which becomes NAME/0,
        NAME/1, ...; "/" groups names.
    """
    for name, value in values.items():
      if isinstance(value, (list, tuple)) or np.ndim(value) == 1:
        self.scalars(step, {f"{name}/{i}": v for i, v in enumerate(value)})
      elif value is not None and not math.isnan(float(value)):
        self._put_summary(step, self._summary.scalar(name, float(value)))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Writes one picture, uint8 [H, W, 3]."""
    summary = self._summary.image(name, np.asarray(image), dataformats="HWC")
    self._put_summary(step, summary)

  def text(self, step: int, name: str, text: str) -> None:
    """Writes a text, shown as Markdown."""
    self._put_summary(step, self._summary.text(name, text))

  def flush(self) -> None:
    """Returns when every event is on disk."""
    with _full_disk(self._path):
      self._file.flush()

  def close(self) -> None:
    """Flushes and closes; a second call does nothing."""
    if self._closed:
      return
    self._closed = True
    with _full_disk(self._path):
      try:
        self._file.flush()
      finally:
        self._file.close()

  def _put_summary(self, step: int, summary: Any) -> None:
    self._put(self._event(step=step, summary=summary))

  def _put(self, event: Any) -> None:
    event.wall_time = time.time()
    with _full_disk(self._path):
      self._file.write(event.SerializeToString())


# --- The console ------------------------------------------------------------


def log(message: str, *, stream: TextIO | None = None) -> None:
  """Tells the user something: one line, on stderr unless said otherwise."""
  stream = sys.stderr if stream is None else stream
  _write(stream, _clear(stream) + message + "\n")


def track(
  items: Sequence[Item],
  what: str,
  *,
  stream: TextIO | None = None,
  clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
  """Yields `items` and tells how many are done: `predicting  12/300`.

  On a terminal the count is redrawn in place, in a file there is a line a
  minute.
  """
  stream = sys.stderr if stream is None else stream
  in_place = _is_terminal(stream)
  told = clock()
  for i, item in enumerate(items):
    if clock() - told >= (0.2 if in_place else 60.0):
      told = clock()
      end = "" if in_place else "\n"
      _write(stream, f"{_clear(stream)}{what}  {i}/{len(items)}{end}")
    yield item
  _write(stream, _clear(stream))


class Progress:
  """How far a run is, how fast, and how long it will still take.

  Speed is the mean over this process, without its first step (which compiles)
  and without pauses (evaluation, saving).
  """

  def __init__(
    self,
    total_steps: int,
    first_step: int,
    *,
    batch_size: int,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts to count.

    Args:
      total_steps: steps of the whole run.
      first_step: steps finished by earlier processes; 0 for a new run.
      batch_size: examples a step, over all devices and hosts.
      stream: where `tick` and `report` write; stderr by default.
      clock: seconds, from any origin.
    """
    self._total_steps = total_steps
    self._step = first_step
    self._batch_size = batch_size
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    # Set by the first tick: the step and the time that speed counts from.
    self._start: tuple[int, float] | None = None
    self._excluded = 0.0
    self._paused_at: float | None = None
    self._last_drawn = -math.inf

  def tick(self, step: int) -> None:
    """Notes that `step` steps are finished; call it after every step.

    On a terminal the count is redrawn in place, a few times a second.
    """
    self._step = step
    now = self._clock()
    if self._start is None:
      self._start, self._excluded = (step, now), 0.0
    if _is_terminal(self._stream) and now - self._last_drawn >= 0.2:
      self._last_drawn = now
      _write(self._stream, _CLEAR_LINE + self.line(step, {}))

  def exclude(self, seconds: float) -> None:
    """Takes seconds that were not training out of the speed."""
    self._excluded += seconds

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Takes the time spent inside out of the speed; not to be nested."""
    self._paused_at = self._clock()
    try:
      yield
    finally:
      self.exclude(self._clock() - self._paused_at)
      self._paused_at = None

  @property
  def examples_per_second(self) -> float | None:
    """Examples a second; None until two steps are finished."""
    if self._start is None:
      return None
    first_step, start = self._start
    now = self._clock() if self._paused_at is None else self._paused_at
    seconds = now - start - self._excluded
    num_examples = (self._step - first_step) * self._batch_size
    return num_examples / seconds if num_examples and seconds > 0 else None

  def line(self, step: int, fields: Mapping[str, Any]) -> str:
    """`step  120/300   40%  loss 0.2134  312.4 images/s  eta 0:01:23`.

    Args:
      step: number of finished steps.
      fields: name -> number, text or None, in the order shown.
    """
    total = self._total_steps
    # Rounded down: 100% means finished.
    percent = f"{100 * step // total:3d}%"
    parts = ["step", f"{step:{len(str(total))}d}/{total}", percent]
    parts += [f"{name} {_short(value)}" for name, value in fields.items()]
    speed = self.examples_per_second
    if speed is not None:
      seconds = round((total - step) * self._batch_size / speed)
      eta = datetime.timedelta(seconds=max(seconds, 0))
      parts += [f"{_short(speed)} images/s", f"eta {eta}"]
    return "  ".join(parts)

  def report(self, step: int, record: Mapping[str, Any]) -> None:
    """Writes the line of one record of metrics.jsonl.

    Lists and times stay in the file; `split` leads, unless it is "train".
    """
    fields = {}
    split = record.get("split", "train")
    if split != "train":
      fields["on"] = split
    for name, value in record.items():
      timed = any(word in name for word in ("second", "time", "eta"))
      if name in ("step", "split") or timed or np.ndim(value) > 0:
        continue
      fields[name] = value
    log(self.line(step, fields), stream=self._stream)


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


def _clear(stream: TextIO) -> str:
  """What removes the count that `tick` may have left on a terminal."""
  return _CLEAR_LINE if _is_terminal(stream) else ""


def _write(stream: TextIO, text: str) -> None:
  encoding = stream.encoding or "utf-8"
  text = text.encode(encoding, "backslashreplace").decode(encoding)
  # A closed terminal or a full log must not end a run that goes well.
  with contextlib.suppress(OSError, ValueError):
    stream.write(text)
    stream.flush()
