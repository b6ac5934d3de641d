"""Huge pages: asked of the kernel, seen in what it gave."""

import os
import pathlib
import subprocess
import sys

import pytest

from unet_jax.runtime import memory

# Prints the arguments, the number of starts, and the megabytes of huge pages
# that a process has after it wrote to 64 MB from malloc.
PROGRAM = """
import ctypes, os, sys
print("start", flush=True)
from unet_jax.runtime import memory
memory.use_huge_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 64 * 2**20
ctypes.memset(libc.malloc(ctypes.c_size_t(size)), 1, size)
rows = open("/proc/self/smaps_rollup").read().splitlines()
kb = [int(row.split()[1]) for row in rows if row.startswith("AnonHuge")]
print(sys.argv[1:], os.environ["GLIBC_TUNABLES"], kb[0] // 1024)
"""


def run(**environment):
  base = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, "a b", "--c=d"],
    env={**base, **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout.splitlines()


needs_madvise = pytest.mark.skipif(
  not memory._SWITCH.exists() or "[madvise]" not in memory._SWITCH.read_text(),
  reason="the kernel gives huge pages to all or to none",
)


@needs_madvise
def test_malloc_gets_huge_pages_after_one_new_start():
  *starts, last = run()
  arguments, setting, megabytes = last.rsplit(" ", 2)
  assert starts == ["start", "start"]
  assert arguments == "['a b', '--c=d']"
  assert setting == "glibc.malloc.hugetlb=1"
  assert int(megabytes) >= 56


@needs_madvise
def test_other_settings_are_kept():
  last = run(GLIBC_TUNABLES="glibc.malloc.tcache_count=3")[-1]
  assert "glibc.malloc.tcache_count=3:glibc.malloc.hugetlb=1" in last


def test_the_environment_turns_it_off():
  *starts, last = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
  assert starts == ["start"]
  assert int(last.split()[-1]) == 0


def test_nothing_happens_where_the_kernel_has_none(monkeypatch):
  monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
  monkeypatch.setattr(memory, "_SWITCH", pathlib.Path("/none"))
  monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started anew"))
  memory.use_huge_pages()
