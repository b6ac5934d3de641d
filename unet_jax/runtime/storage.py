"""Folders on disk or on gs://: all that differs, and the only door to epath.

An object store writes a file whole or not at all, cannot append to one, and
has no locks: hence `write_whole`, `Mirror` and `owned`.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import pathlib
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator

from unet_jax.errors import DiskError, UserError

_SCHEME = "gs://"
# A pod that was started again may have its old name and process id.
_ME = f"{socket.gethostname()}, process {os.getpid()}, {secrets.token_hex(4)}"


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is on gs://; pathlib would make it gs:/."""
  return os.fspath(path).startswith(_SCHEME)


def to_path(path: str | os.PathLike) -> pathlib.Path:
  """A `pathlib.Path`, or for gs:// an `epath.Path`, which is used like one.

  Raises:
    UserError: packages are missing, or the bucket cannot be reached.
  """
  if not is_remote(path):
    return pathlib.Path(path)
  epath = _prepare()
  _check_bucket(os.fspath(path).removeprefix(_SCHEME).split("/")[0])
  return epath.Path(path)


@functools.cache
def _prepare():  # noqa: ANN202 (a module)
  try:
    found = [importlib.util.find_spec(x) for x in ("gcsfs", "google.cloud")]
    if None in found or not importlib.util.find_spec("google.cloud.storage"):
      raise ImportError
    import fsspec
  except ImportError as error:
    raise UserError(
      "gs:// needs more packages; pip install unet_jax[gcs]"
    ) from error
  # Orbax writes arrays past fsspec, so what fsspec remembers would be stale.
  for name in ("gs", "gcs"):
    fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
  os.environ.setdefault("EPATH_USE_TF", "false")  # Not if it happens to exist.
  from etils import epath

  return epath


@functools.cache
def _check_bucket(name: str) -> None:
  """Asks once, so that a wrong name or missing rights are one clear line."""
  root = _prepare().Path(f"{_SCHEME}{name}")
  try:
    next(root.iterdir(), None)
  except Exception as error:  # Of four libraries, and few are OSErrors.
    raise UserError(
      f"cannot read {root}: {error or type(error).__name__}; check the bucket's"
      " name, and log in with `gcloud auth application-default login`"
    ) from error


def absolute(path: pathlib.Path) -> pathlib.Path:
  """A path that does not depend on the current folder."""
  return path if is_remote(path) else path.absolute()


def resolve(path: pathlib.Path) -> pathlib.Path:
  """The path with links followed; there are none on gs://."""
  return path if is_remote(path) else path.resolve()


def on_disk(path: pathlib.Path) -> pathlib.Path:
  """The path, or for one on gs:// a temporary path that is not copied there."""
  if not is_remote(path):
    return path
  return pathlib.Path(tempfile.gettempdir(), f"unet_jax_{path.name}")


def user_cache() -> pathlib.Path:
  """The program's part of the user's cache folder."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "unet_jax"


def make_writable(folder: pathlib.Path) -> bool:
  """Makes a folder on this disk; whether files can be written there."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return False
  return os.access(folder, os.W_OK)


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes an object on gs://: it is the old or the new one at any moment.

  Raises:
    OSError: it cannot be written.
  """
  try:
    path.write_bytes(data)
  except Exception as error:  # Most are not OSErrors, see above.
    text = f"{error or type(error).__name__}"
    raise OSError(errno.EIO, text) from error


def list_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """All files below a folder, sorted; epath refuses `rglob`."""
  if not is_remote(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())
  files = []
  for path in sorted(folder.iterdir()):
    files += list_files(path) if path.is_dir() else [path]
  return files


def remove_tree(folder: pathlib.Path) -> None:
  """Removes a folder, if it is there."""
  if not is_remote(folder):
    shutil.rmtree(folder, ignore_errors=True)
  elif folder.exists():
    folder.rmtree()


def is_committed(step_folder: pathlib.Path) -> bool:
  """Whether orbax finished a folder; on disk an unfinished one has no name."""
  # Written last where nothing can be renamed.
  done = "commit_success.txt"
  return not is_remote(step_folder) or (step_folder / done).is_file()


# --- Who writes ---------------------------------------------------------------


@contextlib.contextmanager
def owned(workdir: pathlib.Path, log: Callable[[str], None]) -> Iterator[None]:
  """Makes a folder on gs:// this process's, from whoever had it before.

  Nothing there tells a run that was killed from one that lives. So the newest
  run wins, says so, and the other ends at its next `check_owner`, which comes
  before each checkpoint.
  """
  path = workdir / ".lock"
  if (old := _owner(path)) not in (None, _ME):
    log(
      f"{workdir} was not given back by the run on {old}; if that one still"
      " runs, it ends at its next checkpoint"
    )
  write_whole(path, _ME.encode())
  try:
    yield
  finally:
    if _owner(path) == _ME:
      path.unlink(missing_ok=True)


def check_owner(workdir: pathlib.Path) -> None:
  """Raises a UserError if another run has taken the folder on gs://."""
  if (owner := _owner(workdir / ".lock")) not in (None, _ME):
    raise UserError(
      f"another run writes to {workdir}, on {owner}; this one ends, take"
      " another --workdir for it"
    )


def _owner(path: pathlib.Path) -> str | None:
  try:
    return path.read_bytes().decode()
  except FileNotFoundError:
    return None


# --- Files that grow ----------------------------------------------------------


class Mirror:
  """Where the growing files of a folder are written: `folder`, on disk.

  That is `target` itself, or for gs:// a temporary folder that `upload` copies
  there. All methods do nothing where `target` is on disk.

  Args:
    target: the folder they belong to.
    names: files that an earlier run left there and this one continues.
  """

  def __init__(self, target: pathlib.Path, names: tuple[str, ...] = ()):
    self.folder = self._target = target
    self._sent: dict[pathlib.Path, tuple[int, int]] = {}
    if is_remote(target):
      self.folder = pathlib.Path(tempfile.mkdtemp(prefix="unet_jax_"))
      for name in names:
        if (target / name).is_file():
          (self.folder / name).write_bytes((target / name).read_bytes())

  def upload(self) -> None:
    """Returns when every file is in the bucket as it is on disk.

    Raises:
      UserError: it cannot be written, or another run has taken the folder.
    """
    if self.folder == self._target:
      return
    check_owner(self._target)
    for path in list_files(self.folder):
      name, stat = path.relative_to(self.folder).as_posix(), path.stat()
      version = (stat.st_size, stat.st_mtime_ns)
      if self._sent.get(path) != version:
        try:
          write_whole(self._target / name, path.read_bytes())
        except OSError as error:
          raise DiskError(
            f"cannot write {self._target / name}: {error.strerror}; check the"
            " network and run again to resume"
          ) from error
        self._sent[path] = version

  def close(self) -> None:
    """Uploads, and removes the temporary folder."""
    if self.folder != self._target:
      try:
        self.upload()
      finally:
        shutil.rmtree(self.folder, ignore_errors=True)
