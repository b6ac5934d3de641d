"""Compiled programs are kept on disk, so that the second start is quick."""

import pathlib
import platform
import re
import zlib

import jax

from unet_jax.runtime import storage, writers

# Least recently used programs go first. A limit also makes JAX lock the folder,
# so that several processes may share it.
_MAX_BYTES = 2 * 2**30
# Programs that compile faster are not kept, seconds.
_WORTH_KEEPING = 0.2


def keep_compiled(folder: str) -> None:
  """Keeps what JAX compiles in `folder`; "user" is the user's cache folder.

  Nothing happens for "", where the environment already names a folder
  (JAX_COMPILATION_CACHE_DIR), or, with a line that says so, where the folder
  cannot be written. A program is found by its own text and the versions and
  options that it was compiled with, so what is computed does not change.
  """
  if not folder or jax.config.jax_compilation_cache_dir:
    return
  path = _user_folder() if folder == "user" else pathlib.Path(folder)
  if not storage.make_writable(path):
    writers.log(f"cannot write to {path}: compiled programs are not kept")
    return
  jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
  jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING
  )
  jax.config.update("jax_compilation_cache_dir", str(path))


def _user_folder() -> pathlib.Path:
  return storage.user_cache() / "compiled" / _instruction_set()


def _instruction_set() -> str:
  """A name for this kind of processor.

  A home may be shared with other kinds; a program for one can crash on another.
  """
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text()
  except OSError:  # Not Linux.
    text = ""
  flags = sorted(set(re.findall(r"^(?:flags|Features)\s*:.*", text, re.M)))
  return f"{platform.machine()}-{zlib.crc32(' '.join(flags).encode()):08x}"
