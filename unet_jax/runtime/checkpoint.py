"""Checkpoints that are whole or are not there: the only door to orbax.

A step folder holds `state` (arrays), `meta` (JSON) and `digests.json`: the
score, the size and sha256 of every file, and a sha256 of all that. The digests
are written, and the files flushed to disk, before orbax renames the folder into
place. So a process killed at any moment leaves a whole checkpoint or a
temporary folder, and what the disk does to the bytes afterwards is found before
they are restored.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from unet_jax.errors import DiskError, UserError
from unet_jax.runtime import parallel, storage

PyTree = Any

DIGESTS = "digests.json"
MAX_DIFF_LINES = 20

_INCOMPLETE = "its save did not complete"
# Orbax writes these after the digests; nothing is restored from them.
_WITHOUT_DIGEST = ("_CHECKPOINT_METADATA", "commit_success.txt")
# TensorStore passes on only the text of the system's error.
_DISK_FULL = tuple(
  os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
)


class Checkpointer:
  """Saves in the background and restores only what is proved whole.

  A context manager: leaving it, by an exception too, waits for the save in
  flight and raises its error. All processes make the same calls in the same
  order; process 0 writes. Two runs must not share a folder.

  Args:
    directory: holds one folder a step; made if `writable`.
    keep_latest: checkpoints kept (at least 1), beside the best one.
    writable: False only reads: nothing is made, renamed or deleted.
    log: receives what was found damaged, deleted or different.
    is_primary: whether this process removes what failed saves left behind.
    strict: where a checkpoint is damaged, none before it is used in its place.
  """

  def __init__(
    self,
    directory: str | pathlib.Path,
    *,
    keep_latest: int,
    writable: bool,
    log: Callable[[str], None],
    is_primary: bool = True,
    strict: bool = False,
  ):
    self._directory = storage.absolute(storage.to_path(directory))
    self._keep_latest = keep_latest
    self._writable = writable
    self._is_primary = is_primary
    self._strict = strict
    self._log = log
    self._in_flight: _Save | None = None
    self._failed = False
    _tell_failures_once()
    if writable and is_primary:
      # Orbax would do it too, but in the background and without a word.
      for folder in self._unfinished("*"):
        log(f"{folder}: deleted, {_INCOMPLETE}")
        storage.remove_tree(folder)
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        create=writable,
        read_only=not writable,
        cleanup_tmp_directories=writable,
        preservation_policy=self,
        async_options=ocp.options.AsyncOptions(
          # Process 0 calls it when all files are written, before the rename.
          post_finalization_callback=self._write_digests,
          barrier_sync_fn=_meet,
        ),
      ),
    )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Waits for the save in flight, raises its error, stops all threads."""
    try:
      self.wait()
    finally:
      # Of a save that failed, and was told, orbax may raise more errors.
      told = (Exception,) if self._failed else ()
      with contextlib.suppress(*told):
        self._manager.close()

  def save(
    self, step: int, state: PyTree, *, score: float | None, meta: dict
  ) -> None:
    """Starts to write a checkpoint; `state` may be donated on return.

    First waits for the save before it. Keeps the latest `keep_latest` steps
    and the one with the largest score (the later of equal ones).

    Args:
      step: later than every existing step.
      state: tree of global `jax.Array`s.
      score: larger is better. None (not evaluated), NaN and infinities are
        never best.
      meta: anything JSON can hold; floats come back exactly.

    Raises:
      UserError: the disk is full, or this step or a later one exists.
    """
    self.wait()
    score = _finite(score)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    self._in_flight = _Save(step, score, num_bytes)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    )
    try:
      accepted = self._manager.save(step, args=args)
    except Exception as error:
      raise self._clean_up_after(error) from error
    if not accepted:
      self._in_flight = None
      raise UserError(
        f"{self._directory}: checkpoint {step} was refused because of"
        f" {list(self._manager.all_steps())}; delete the later ones or use"
        " another workdir"
      )

  def poll(self) -> None:
    """Raises the error of a save that has ended; cheap: call it every step."""
    if self._in_flight and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Blocks until the save in flight is committed; raises its error."""
    if self._in_flight is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._clean_up_after(error) from error
    self._in_flight = None

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: object
  ) -> list[bool]:
    """Orbax asks at each save which checkpoints stay.

    Its own `BestN` ranks NaN anywhere, and reads its metrics unverified.
    """
    steps = [checkpoint.step for checkpoint in checkpoints]
    kept = {*steps[-self._keep_latest :], self._best_of(steps)}
    return [step in kept for step in steps]

  def set_score(self, step: int, score: float) -> None:
    """Gives a checkpoint the score of an evaluation that came later."""
    self.wait()
    if self._is_primary:
      content = _read_digests(self._folder(step))
      _put_digests(self._folder(step), _finite(score), content["files"])

  def steps(self) -> list[int]:
    """The complete steps, ascending; `restore` finds out which are damaged."""
    return [
      step
      for step in sorted(self._manager.all_steps())
      if (self._folder(step) / DIGESTS).is_file()
    ]

  def best_step(self) -> int | None:
    """The complete step with the largest score, or None if none has one.

    Raises:
      UserError: `strict`, and a score cannot be read.
    """
    steps = self.steps()
    best = self._best_of(steps)
    for step in steps:
      if _read_digests(self._folder(step)) is None:
        problem = find_damage(self._folder(step))
        self._tell(step, problem, best or "the newest")
    return best

  def restore(
    self, abstract_state: PyTree, *, step: int | None = None
  ) -> tuple[PyTree, dict, int] | None:
    """Verifies and reads a checkpoint, on any number of devices.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      step: exactly this one. None takes the newest that is whole; later ones
        are logged and, if writable, deleted: training repeats them exactly,
        and orbax saves no step before an existing one.

    Returns:
      (state, meta, step); None if `step` is None and there is no checkpoint.

    Raises:
      UserError: `step` is missing or damaged, all checkpoints are damaged, or
        paths, shapes or dtypes differ from `abstract_state`.
    """
    self.wait()
    broken, result = [], None
    if step is None:
      step, broken = self._find_newest_whole()
    elif problem := find_damage(self._folder(step)):
      others = [other for other in self.steps() if other != step] or "none"
      raise UserError(
        f"{self._folder(step)}: {problem}; other checkpoints: {others}"
      )
    if step is not None:
      self._check_same_arrays(step, abstract_state)
      args = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state),
        meta=ocp.args.JsonRestore(),
      )
      restored = self._manager.restore(step, args=args)
      result = restored.state, restored.meta, step
    if self._writable:
      # Not before: restoring is also the barrier after which no other process
      # still verifies them.
      for bad in broken:
        self._log(f"{self._folder(bad)}: deleted")
        self._manager.delete(bad)
    return result

  def _folder(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _unfinished(self, step: int | str) -> list[pathlib.Path]:
    if storage.is_remote(self._directory):  # Nothing is renamed there.
      found = sorted(self._directory.glob(str(step)))
      return [p for p in found if not storage.is_committed(p)]
    return sorted(self._directory.glob(f"{step}{ocp.utils.TMP_DIR_SUFFIX}*"))

  def _write_digests(self) -> None:
    (folder,) = self._unfinished(self._in_flight.step)
    write_digests(folder, self._in_flight.score)

  def _clean_up_after(self, error: Exception) -> Exception:
    """Removes the failed save; returns what to raise for it."""
    failed, self._in_flight, self._failed = self._in_flight, None, True
    if self._is_primary:
      for folder in self._unfinished(failed.step):
        storage.remove_tree(folder)
    # Orbax has forgotten the steps that this save was to replace.
    self._manager.reload()
    if not any(text in str(error) for text in _DISK_FULL):
      return error
    free = shutil.disk_usage(self._directory).free
    return DiskError(
      f"{self._directory}: no room for checkpoint {failed.step}: it needs up to"
      f" {failed.num_bytes:,} bytes, {free:,} are free; earlier checkpoints are"
      " intact: make room and run again to resume"
    )

  def _best_of(self, steps: Sequence[int]) -> int | None:
    scores = {step: read_score(self._folder(step)) for step in steps}
    if self._in_flight and self._in_flight.step in scores:
      scores[self._in_flight.step] = self._in_flight.score
    ranked = [(s, step) for step, s in scores.items() if s is not None]
    return max(ranked)[1] if ranked else None

  def _find_newest_whole(self) -> tuple[int | None, list[int]]:
    """The newest whole step, and the later ones, which are not."""
    problems = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      problem = find_damage(self._folder(step))
      if problem is None:
        for bad, text in problems.items():
          self._tell(bad, text, step)
        return step, list(problems)
      problems[step] = problem
    # A first save cut short costs nothing; a damaged run must not start anew
    # in silence.
    for bad, text in problems.items():
      if text != _INCOMPLETE:
        raise UserError(
          f"{self._folder(bad)}: {text}, and no checkpoint is whole;"
          f" bring one back or delete {self._directory} to start from step 0"
        )
    return None, list(problems)

  def _tell(self, bad: int, problem: str, step: int | str) -> None:
    """Says which step takes the place of a bad one; strict, raises it."""
    folder = self._folder(bad)
    if self._strict:
      raise UserError(
        f"{folder}: {problem}; bring it back, or set"
        f" config.runtime.strict_restore=False to use {step} in its place"
      )
    self._log(f"{folder}: {problem}; using {step}")

  def _check_same_arrays(self, step: int, abstract_state: PyTree) -> None:
    """Raises a UserError where orbax would cast, reshape or print a tree."""
    folder = self._folder(step)
    stored = ocp.StandardCheckpointHandler().metadata(folder / "state")
    lines = list_differences(stored, abstract_state)
    if lines:
      self._log("\n".join(lines[:MAX_DIFF_LINES]))
      raise UserError(
        f"{folder}: {lines[0]} ({len(lines)} differences); the checkpoint"
        " belongs to another model: compare config.json"
      )


@dataclasses.dataclass(frozen=True)
class _Save:
  """A save in flight."""

  step: int
  score: float | None
  num_bytes: int


def _meet(*, key: str, timeout_ms: int) -> None:
  """Orbax's barrier between processes, but not after a save that failed.

  Where a save fails, orbax's thread comes here with the error before it lets go
  of it. It would wait for the others, which wait for it at an earlier barrier.
  """
  in_background = threading.current_thread() is not threading.main_thread()
  many = parallel.this_host().count > 1
  if many and in_background and (error := sys.exception()):
    raise error
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def write_digests(folder: pathlib.Path, score: float | None) -> None:
  """Describes every file of a step folder in digests.json; flushes them all."""
  files = {}
  for path in storage.list_files(folder):
    name = path.relative_to(folder).as_posix()
    if name not in _WITHOUT_DIGEST:
      with path.open("rb") as file:
        if not storage.is_remote(path):
          os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[name] = [file.tell(), digest]
  _put_digests(folder, score, files)


def _put_digests(
  folder: pathlib.Path, score: float | None, files: dict[str, Any]
) -> None:
  """Writes digests.json at once or not at all."""
  content = {"score": score, "files": files}
  if storage.is_remote(folder):
    text = json.dumps({**content, "sha256": _sha256(content)}, indent=1)
    return storage.write_whole(folder / DIGESTS, text.encode())
  temporary = folder / f"{DIGESTS}.tmp"
  with temporary.open("w") as file:
    json.dump({**content, "sha256": _sha256(content)}, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(folder / DIGESTS)


def _finite(score: float | None) -> float | None:
  """NaN and infinities are no score: they must never be best."""
  return score if score is not None and math.isfinite(score) else None


def find_damage(folder: pathlib.Path) -> str | None:
  """What is wrong with a step folder, naming the file; None if it is whole."""
  if not folder.is_dir():
    return "no such checkpoint"
  if not (folder / DIGESTS).is_file():
    return _INCOMPLETE
  content = _read_digests(folder)
  if content is None:
    return f"damaged, {DIGESTS} is not what was written"
  for name, (size, digest) in content["files"].items():
    path = folder / name
    if not path.is_file():
      return f"damaged, {name} is missing"
    with path.open("rb") as file:
      read = hashlib.file_digest(file, "sha256").hexdigest()
      if file.tell() != size:
        return f"damaged, {name} has {file.tell()} bytes instead of {size}"
      if read != digest:
        return f"damaged, {name} is not what was written"
  return None


def read_score(folder: pathlib.Path) -> float | None:
  """The score of a complete step; None if it has none, or it is damaged."""
  content = _read_digests(folder)
  return None if content is None else content["score"]


def _read_digests(folder: pathlib.Path) -> dict[str, Any] | None:
  """Scores and files, as `write_digests` left them; None if they changed."""
  try:
    content = json.loads((folder / DIGESTS).read_bytes())
  except (OSError, ValueError):
    return None
  if not isinstance(content, dict):
    return None
  digest = content.pop("sha256", None)
  return content if digest == _sha256(content) else None


def _sha256(content: dict[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def list_differences(stored: PyTree, wanted: PyTree) -> list[str]:
  """Paths whose dtype or shape differs, one line each, in order of the path."""
  have, want = _describe(stored), _describe(wanted)
  return [
    f"{path}: the checkpoint has {have.get(path) or 'nothing'}, the model"
    f" {want.get(path) or 'nothing'}"
    for path in sorted(have.keys() | want.keys())
    if have.get(path) != want.get(path)
  ]


def _describe(tree: PyTree) -> dict[str, str]:
  """Path -> dtype and shape, as "params/conv/kernel" -> "float32[3, 3]"."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _tell_failures_once() -> None:
  """What a failed save leaves behind is not printed: its error is raised."""
  # Orbax logs, with a traceback, every error that it also raises; asyncio those
  # of arrays that failed after the first; Python the arrays never begun.
  absl_logging.get_absl_logger().addFilter(_is_not_from_orbax)
  logging.getLogger("asyncio").addFilter(_is_no_task_of_orbax)
  warnings.filterwarnings(
    "ignore", r"coroutine 'async_serialize_from_host\b", RuntimeWarning
  )
  if sys.unraisablehook is sys.__unraisablehook__:  # Nobody else's.
    sys.unraisablehook = _print_but_late_writes


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
  return f"{os.sep}orbax{os.sep}" not in record.pathname


def _is_no_task_of_orbax(record: logging.LogRecord) -> bool:
  # By the file that it runs, or the path ".orbax-checkpoint-tmp" of its error.
  text = record.getMessage()
  late = "exception was never retrieved" in text or "but it is pending" in text
  return not late or "orbax" not in text


def _print_but_late_writes(unraisable: Any) -> None:
  """`sys.unraisablehook`, without a word on writes that nobody waits for.

  When one array of a save has failed, orbax closes the event loop; tensorstore
  then reports each of the others to it, from a thread of its own. The failure
  itself is raised.
  """
  error = unraisable.exc_value
  closed = isinstance(error, RuntimeError) and str(error) == (
    "Event loop is closed"
  )
  if not (closed and unraisable.object is None):
    sys.__unraisablehook__(unraisable)
