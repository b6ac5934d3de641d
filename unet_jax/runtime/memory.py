"""Huge pages for what XLA allocates on CPU."""

import os
import pathlib
import platform
import sys

_SWITCH = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
  """Starts this program anew, once, with malloc asking for huge pages.

  XLA on CPU takes the temporary memory of a step from malloc and gives it back
  after the step. In pages of 4 KB the kernel then clears a gigabyte in 250,000
  pieces at every step, an eighth of the step's time. glibc reads this setting
  only as a process starts. Call it before there is anything to lose.

  Nothing happens where the kernel has no such pages, without glibc, or where
  the environment already decides (GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns
  it off).
  """
  tunables = os.environ.get(_TUNABLES, "")
  on_request = _SWITCH.exists() and "[madvise]" in _SWITCH.read_text()
  if _HUGE_PAGES in tunables or not on_request:
    return
  if platform.libc_ver()[0] != "glibc":
    return
  setting = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
  command = [sys.executable, *sys.orig_argv[1:]]
  os.execve(sys.executable, command, {**os.environ, _TUNABLES: setting})
