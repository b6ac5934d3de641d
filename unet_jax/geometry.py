"""Integer arithmetic of sizes: what fits, what comes out, what to pad.

One axis at a time, no arrays, no device. `depth` is the number of poolings;
every level applies two convolutions of kernel 3 on the way down and, above the
bottleneck, two on the way up.
"""

import dataclasses

# Two unpadded 3-wide convolutions take one pixel from each side, twice.
LOSS_PER_LEVEL = 4


def output_size(size: int, depth: int, padding: str) -> int:
  """Pixels that come out of the network for `size` pixels in.

  Raises:
    ValueError: `size` does not survive every pooling evenly; the message names
      the nearest sizes that do.
  """
  if not is_legal(size, depth, padding):
    below, above = nearest_legal(size, depth, padding)
    nearest = f"{below}, {above}" if below else f"{above}"
    raise ValueError(
      f"size {size} does not fit padding={padding!r} with {depth} poolings;"
      f" nearest: {nearest}"
    )
  return size - (valid_loss(depth) if padding == "valid" else 0)


def is_legal(size: int, depth: int, padding: str) -> bool:
  """Whether every pooling meets an even size and something comes out.

  For valid padding the sizes are those of the paper (572 -> 388 at depth 4):
  every size before a pooling is even, and the output is positive.
  """
  if size < 1:
    return False
  if padding == "same":
    return size % 2**depth == 0
  for _ in range(depth):
    size -= LOSS_PER_LEVEL
    if size < 2 or size % 2:
      return False
    size //= 2
  size -= LOSS_PER_LEVEL
  for _ in range(depth):
    size = 2 * size - LOSS_PER_LEVEL
  return size > 0


def nearest_legal(size: int, depth: int, padding: str) -> tuple[int, int]:
  """The largest legal size <= `size` (0 if none) and the smallest >= it."""
  below = size
  while below > 0 and not is_legal(below, depth, padding):
    below -= 1
  above = max(size, 1)
  while not is_legal(above, depth, padding):
    above += 1
  return max(below, 0), above


def valid_loss(depth: int) -> int:
  """Pixels that valid padding takes from an axis in all: 184 at depth 4.

  Level l loses 4 pixels of its own resolution, 4 * 2^l of the input's, once on
  the way down and, but for the bottleneck, once on the way up.
  """
  down = sum(LOSS_PER_LEVEL * 2**level for level in range(depth + 1))
  up = sum(LOSS_PER_LEVEL * 2**level for level in range(depth))
  return down + up


def crop_margins(depth: int) -> list[int]:
  """Pixels cropped from each side of the skip of level 0, 1, ... (valid).

  The paper's 88, 40, 16 and 4 at depth 4: all that the levels below lose, in
  pixels of the skip's own level.
  """
  return [valid_loss(depth - 1 - level) for level in range(depth)]


def round_size(size: int, multiple: int) -> int:
  """`size` rounded up to one of about eight sizes an octave.

  The step is the largest power of two up to size / 8, at least `multiple`, so
  mixed image sizes fall into few shapes (each is one compilation) and at most
  an eighth of an axis is padding.
  """
  step = multiple
  while step * 2 * 8 <= size:
    step *= 2
  return -(-size // step) * step


@dataclasses.dataclass(frozen=True)
class Pad:
  """Mirrored pixels before and after one axis."""

  before: int
  after: int


def plan_pad(size: int, depth: int, padding: str) -> Pad:
  """How to pad an axis of any size so that all its pixels get a prediction.

  The network's output for the padded axis starts at the image's first pixel and
  is at least `size` long. With padding="same" everything is added after the
  image, so the phase of the poolings is that of the image itself.

  Args:
    size: pixels of the image, at least 1.
    depth: number of poolings.
    padding: "same" or "valid".
  """
  wanted = round_size(size, 2**depth)
  if padding == "same":
    return Pad(0, wanted - size)
  loss = valid_loss(depth)
  _, legal = nearest_legal(wanted + loss, depth, padding)
  return Pad(loss // 2, legal - size - loss // 2)
