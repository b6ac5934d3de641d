"""What devices say to one another, read from a compiled program's text."""

import collections
import math
import re
from typing import Any

_KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+|c\d+)\[([\d,]*)\]")
# %name = TYPE kind(operands); an asynchronous one starts and is done.
_LINE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(_KINDS)})(-start)?\(")


def count_collectives(text: str) -> dict[str, dict[str, int]]:
  """Collectives by kind: how many, and the bytes that they give a device.

  A loop's body counts once.

  Args:
    text: `Compiled.as_text()`.

  Returns:
    {kind: {"count", "bytes"}}.
  """
  found: dict[str, dict[str, int]] = collections.defaultdict(
    lambda: {"count": 0, "bytes": 0}
  )
  for match in _LINE.finditer(text):
    type_, kind, start = match.groups()
    sizes = _array_bytes(type_)
    if start and kind != "all-reduce":
      # (what goes in, what comes out, what it is synchronised by).
      sizes = [max(sizes)]
    found[kind]["count"] += 1
    found[kind]["bytes"] += sum(sizes)
  return dict(found)


def _array_bytes(type_: Any) -> list[int]:
  return [
    (_BITS.get(kind) or int(re.sub(r"\D", "", kind)))
    * math.prod(int(n) for n in dims.split(",") if n)
    // 8
    for kind, dims in _ARRAY.findall(type_)
  ]
