"""Integer arithmetic of sizes: what fits, what comes out, what to pad.

One axis at a time, no arrays, no device. `depth` is the number of poolings;
every level applies two convolutions of kernel 3 on the way down and, above the
bottleneck, two on the way up. `padding` is "same", "valid", or "any": same
padding in a network that pads on the way up what an odd size left out.
"""

import dataclasses
import math
from collections.abc import Sequence

# Two unpadded 3-wide convolutions take one pixel from each side, twice.
LOSS_PER_LEVEL = 4


def size_rule(padding: str, odd_size: str) -> str:
  """The `padding` of this module for these fields of `schema.ModelConfig`."""
  return padding if odd_size == "pad_input" else "any"


def output_size(size: int, depth: int, padding: str) -> int:
  """Pixels that come out of the network for `size` pixels in.

  Raises:
    ValueError: `size` does not survive every pooling evenly; the message names
      the nearest sizes that do.
  """
  if not is_legal(size, depth, padding):
    below, above = nearest_legal(size, depth, padding)
    if padding == "any":
      raise ValueError(
        f"size {size} does not survive {depth} poolings; nearest: {above}"
      )
    nearest = f"{below}, {above}" if below else f"{above}"
    raise ValueError(
      f"size {size} does not fit padding={padding!r} with {depth} poolings;"
      f" nearest: {nearest}"
    )
  return size - 2 * margin(depth, padding)


def is_legal(size: int, depth: int, padding: str) -> bool:
  """Whether every pooling meets an even size and something comes out.

  For valid padding the sizes are those of the paper (572 -> 388 at depth 4).
  They lead to b pixels at the bottleneck, before its convolutions:

    size = 2^depth b + 4 (2^0 + ... + 2^(depth - 1)) = 2^depth (b + 4) - 4
  """
  if padding == "any":  # Every pooling must leave a pixel.
    return size >= 2**depth
  remainder = 0 if padding == "same" else -LOSS_PER_LEVEL
  fits = (size - remainder) % 2**depth == 0
  return fits and size > 2 * margin(depth, padding)


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
  the way down and, but for the bottleneck, once on the way up:

    4 (2^0 + ... + 2^depth) + 4 (2^0 + ... + 2^(depth - 1))
  """
  return LOSS_PER_LEVEL * (3 * 2**depth - 2)


def margin(depth: int, padding: str) -> int:
  """Pixels that the network takes from each side."""
  return valid_loss(depth) // 2 if padding == "valid" else 0


def pool_factors(
  pool_axes: Sequence[str], dims: int, depth: int
) -> tuple[tuple[int, ...], ...]:
  """By how much each pooling divides each axis: 2, or 1 where it is left out.

  Args:
    pool_axes: for every pooling the axes that it halves, as "12" or "012"; none
      at all = all axes, always.
    dims: spatial axes.
    depth: poolings.
  """
  halved = pool_axes or ("012",) * depth
  return tuple(
    tuple(2 if str(axis) in axes else 1 for axis in range(dims))
    for axes in halved
  )


def level_factor(
  factors: Sequence[tuple[int, ...]], fine: int, coarse: int
) -> tuple[int, ...]:
  """How many pixels of level `fine` one of `coarse` has, along each axis."""
  crossed = factors[fine:coarse]
  return tuple(
    math.prod(f[axis] for f in crossed) for axis in range(len(factors[0]))
  )


def crop_margins(depth: int) -> list[int]:
  """Pixels cropped from each side of the skip of level 0, 1, ... (valid).

  The paper's 88, 40, 16 and 4 at depth 4: all that the levels below lose, in
  pixels of the skip's own level.
  """
  return [valid_loss(depth - 1 - level) for level in range(depth)]


@dataclasses.dataclass(frozen=True)
class Pad:
  """Pixels mirrored in front of an axis, and its size with those behind it."""

  before: int
  size: int


def plan_pad(size: int, depth: int, padding: str, multiple: int = 1) -> Pad:
  """How to pad an axis so that all its pixels get a prediction.

  The network's output starts at the image's first pixel. With padding="same"
  and "any" everything is added behind the image, up to the smallest legal size
  that is also a multiple of `multiple`; so a legal size stays as it is. With
  "valid" it is the smallest legal size whose output covers `size`, rounded up
  to `multiple`.
  """
  step = math.lcm(multiple, 2**depth) if padding == "same" else multiple
  covered = -(-size // step) * step
  before = margin(depth, padding)
  _, padded = nearest_legal(covered + 2 * before, depth, padding)
  return Pad(before, padded)


def plan_pads(
  size: Sequence[int],
  depth: int | Sequence[int],
  padding: str,
  multiple: int,
  space: int = 1,
) -> list[Pad]:
  """`plan_pad` of all axes; the first also divides over `space` devices.

  `depth` are the poolings of all axes, or of each.
  """
  depths = (depth,) * len(size) if isinstance(depth, int) else depth
  first = math.lcm(multiple, space * 2 ** depths[0]) if space > 1 else multiple
  multiples = [first, *(multiple,) * (len(size) - 1)]
  return [
    plan_pad(n, d, padding, m)
    for n, d, m in zip(size, depths, multiples, strict=True)
  ]


# --- Tiles --------------------------------------------------------------------


def reach(
  depth: int,
  padding: str,
  wide_up: Sequence[bool],
  head_kernel: int = 1,
  factors: Sequence[int] = (),
) -> tuple[int, int]:
  """Pixels around an output window that its values are computed from.

  For a window [p, q) of multiples of 2^depth these are the input's pixels
  [p - before, q + after), in the input's own count: with "valid" output pixel p
  lies at the input's p + margin. They are found by walking the deepest path of
  the network from the output to the input; all others see less, since a level
  further down sees twice as far. So the decoders do not differ.

  Args:
    depth: poolings.
    padding: as everywhere here.
    wide_up: of each level, whether its upsampling, or the gate of its skip,
      interpolates between pixels of the level below.
    head_kernel: width of the last convolution.
    factors: by how much each pooling divides this axis; () = by 2. Where it
      does not, nothing interpolates either.

  Returns:
    before and after: 94 and 94 at depth 4 with "same", 0 and 188 with "valid".
  """
  lost = 0 if padding == "valid" else LOSS_PER_LEVEL // 2
  factors = factors or (2,) * depth

  def walk(low: int, high: int) -> tuple[int, int]:
    low, high = low - head_kernel // 2, high + head_kernel // 2
    for wide, f in zip(wide_up, factors, strict=True):
      low, high = low - lost, high + LOSS_PER_LEVEL - lost
      wide = wide and f > 1
      low, high = (low - wide) // f, (high + wide) // f
    for f in reversed(factors):
      low, high = low - lost, high + LOSS_PER_LEVEL - lost
      low, high = f * low, f * high + f - 1
    return low - lost, high + LOSS_PER_LEVEL - lost

  return -walk(0, 0)[0], walk(-1, -1)[1] + 1


@dataclasses.dataclass(frozen=True)
class TileAxis:
  """How one axis of an image is predicted in tiles of one size.

  Attributes:
    size: pixels of the image.
    whole: pixels of the whole image as padded for the network.
    tile: pixels of a tile, as the network sees it.
    out: pixels that come out of it.
    before: pixels that a tile begins before its window.
    pad: pixels mirrored in front of the image.
    grid: what tiles begin at multiples of; 1 where they need not be exact.
    windows: [start, stop) of the outputs that tiles give, in image pixels.
  """

  size: int
  whole: int
  tile: int
  out: int
  before: int
  pad: int
  grid: int
  windows: tuple[tuple[int, int], ...]

  def start(self, window: tuple[int, int]) -> int:
    """First pixel, in the padded image, of the tile that gives `window`.

    The window may lie anywhere, as it does in a mirrored view of the image.
    """
    first = window[0] // self.grid * self.grid - self.before
    return min(max(first, 0), self.whole - self.tile)


def plan_tiles(
  size: int,
  depth: int,
  padding: str,
  *,
  tile: int,
  around: tuple[int, int] | None,
  multiple: int = 1,
  views: bool = False,
) -> TileAxis:
  """Covers an axis with windows that tiles predict as the whole image would.

  Args:
    size: pixels of the image.
    depth: poolings.
    padding: as everywhere here.
    tile: a legal size; with padding="any" tiles are up to 2^depth - 1 larger,
      so that the last one ends with the image. Larger than the padded image, it
      is what the image is padded to.
    around: `reach`, or None where no tile equals the whole image: then windows
      are whole outputs that overlap by half.
    multiple: as of `plan_pad`.
    views: whether windows may lie off the grid, as those of mirrored views do.

  Raises:
    ValueError: no window is left; names the nearest tile.
  """
  grid, plan = 2**depth, plan_pad(size, depth, padding, multiple)
  whole = max(plan.size, tile)
  if padding == "any" and whole > tile:
    tile += (whole - tile) % grid
  out = tile - 2 * plan.before
  if whole == tile or (around is None and size <= out):
    whole = tile
    windows = ((0, size),)
    return TileAxis(size, whole, tile, out, 0, plan.before, grid, windows)
  if around is None:
    last, stride = size - out, max(out // 2, 1)
    starts = (*range(0, last, stride), last)
    windows = tuple((s, s + out) for s in starts)
    whole = size + 2 * plan.before
    return TileAxis(size, whole, tile, out, 0, plan.before, 1, windows)
  width = tile_window(tile, depth, around, views)
  if width < grid:
    least = nearest_tile(tile, depth, padding, around, views)
    raise ValueError(
      f"a tile of {tile} leaves no pixel that sees all it needs; nearest:"
      f" {least}"
    )
  windows = tuple((s, min(s + width, size)) for s in range(0, size, width))
  before = -(-around[0] // grid) * grid
  return TileAxis(size, whole, tile, out, before, plan.before, grid, windows)


def tile_window(
  tile: int, depth: int, around: tuple[int, int], views: bool
) -> int:
  """Pixels that tiles of one size are apart: a multiple of 2^depth."""
  grid = 2**depth
  before = -(-around[0] // grid) * grid
  return (tile - before - around[1]) // grid * grid - (grid if views else 0)


def nearest_tile(
  tile: int, depth: int, padding: str, around: tuple[int, int], views: bool
) -> int:
  """The smallest legal tile >= `tile` that leaves a window."""
  _, tile = nearest_legal(tile, depth, padding)
  while tile_window(tile, depth, around, views) < 2**depth:
    _, tile = nearest_legal(tile + 1, depth, padding)
  return tile
