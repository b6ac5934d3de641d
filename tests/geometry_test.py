"""Sizes, checked by walking through the network pixel by pixel."""

import itertools

import pytest

from unet_jax import geometry


def walk(size, depth):
  """What valid convolutions and even poolings leave of `size`; None if odd."""
  sizes = []
  for _ in range(depth):
    size -= 2
    size -= 2
    if size <= 0 or size % 2:
      return None
    sizes.append(size)
    size //= 2
  size -= 4
  if size <= 0:
    return None
  for skip in reversed(sizes):
    size *= 2
    assert skip >= size
    size -= 4
  return size if size > 0 else None


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_valid_sizes_equal_a_walk_through_the_network(depth):
  for size in range(1, 700):
    expected = walk(size, depth)
    assert geometry.is_legal(size, depth, "valid") == (expected is not None)
    if expected is not None:
      assert geometry.output_size(size, depth, "valid") == expected


def test_the_papers_numbers():
  assert geometry.output_size(572, 4, "valid") == 388
  assert geometry.valid_loss(4) == 184
  assert geometry.crop_margins(4) == [88, 40, 16, 4]
  legal = [s for s in range(1, 600) if geometry.is_legal(s, 4, "valid")]
  assert legal == list(range(188, 600, 16))


def test_an_illegal_size_names_its_neighbours():
  with pytest.raises(ValueError, match="nearest: 556, 572"):
    geometry.output_size(570, 4, "valid")
  with pytest.raises(ValueError, match="nearest: 188"):
    geometry.output_size(100, 4, "valid")
  with pytest.raises(ValueError, match="nearest: 96, 112"):
    geometry.output_size(100, 4, "same")


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("multiple", [1, 12, 32])
@pytest.mark.parametrize("depth", [1, 3, 4])
def test_padding_is_the_least_that_covers(depth, multiple, padding):
  """By trying every size in turn."""
  margin = (sum_of_losses(depth) if padding == "valid" else 0) // 2
  for size in range(1, 300):
    covered = next(n for n in range(size, 2 * 300) if n % multiple == 0)
    for wanted in range(covered + 2 * margin, 2000):
      if padding == "same":
        if wanted % 2**depth == 0 and wanted % multiple == 0:
          break
      elif (walk(wanted, depth) or 0) >= covered:
        break
    pad = geometry.plan_pad(size, depth, padding, multiple)
    assert pad == geometry.Pad(margin, wanted)


def sum_of_losses(depth):
  """The smallest legal input less what comes out of it."""
  size = next(s for s in range(1, 1000) if walk(s, depth))
  return size - walk(size, depth)


def test_a_legal_size_is_left_alone():
  assert geometry.plan_pad(264, 3, "same") == geometry.Pad(0, 264)
  assert geometry.plan_pad(388, 4, "valid") == geometry.Pad(92, 572)
  for size in range(8, 2000, 8):
    assert geometry.plan_pad(size, 3, "same").size == size


def test_a_network_that_pads_on_the_way_up_takes_what_a_pooling_leaves():
  assert geometry.size_rule("same", "pad_up") == "any"
  assert geometry.size_rule("valid", "pad_input") == "valid"
  for depth in (1, 2, 4):
    for size in range(1, 70):
      legal = size >> depth > 0  # Halved, rounding down, it leaves a pixel.
      assert geometry.is_legal(size, depth, "any") == legal
      padded = geometry.plan_pad(size, depth, "any")
      assert padded == geometry.Pad(0, max(size, 2**depth))
  assert geometry.plan_pad(37, 4, "any", multiple=8).size == 40
  assert geometry.output_size(37, 4, "any") == 37
  with pytest.raises(ValueError, match="size 15 does not survive"):
    geometry.output_size(15, 4, "any")


# --- Exhaustive for small integers --------------------------------------------

PADDINGS = ("same", "valid", "any")


def comes_out(size, depth, padding):
  """What a network gives for `size` pixels; None where it cannot take them."""
  if padding == "valid":
    return walk(size, depth)
  left = size
  for _ in range(depth):
    if padding == "same" and left % 2:
      return None
    left //= 2
  return size if left > 0 else None


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_every_small_size_is_legal_as_the_network_says(depth, padding):
  legal = [n for n in range(1, 400) if comes_out(n, depth, padding)]
  for size in range(-2, 300):
    assert geometry.is_legal(size, depth, padding) == (size in legal)
    below = max((n for n in legal if n <= size), default=0)
    above = min(n for n in legal if n >= size)
    assert geometry.nearest_legal(size, depth, padding) == (below, above)
    if size in legal:
      out = geometry.output_size(size, depth, padding)
      assert out == comes_out(size, depth, padding)
    else:
      with pytest.raises(ValueError) as caught:
        geometry.output_size(size, depth, padding)
      nearest = f"{below}, {above}" if below else f"{above}"
      assert str(caught.value).endswith(f"; nearest: {nearest}")
      assert f"size {size} does not" in str(caught.value)
      assert f"{depth} poolings" in str(caught.value)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_crops_are_the_skip_less_what_it_meets(depth):
  """Both followed through a valid network, for every size that it takes."""
  for size in (n for n in range(1, 700) if walk(n, depth)):
    skips, now = [], size
    for _ in range(depth):
      skips.append(now - 4)
      now = skips[-1] // 2
    now -= 4
    for level in reversed(range(depth)):
      now *= 2
      assert geometry.crop_margins(depth)[level] == (skips[level] - now) / 2
      now -= 4


@pytest.mark.parametrize("space", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, (1, 2), (0, 3)])
def test_pads_of_several_axes_are_the_least_that_fit(depth, space):
  depths = (depth,) * 2 if isinstance(depth, int) else depth
  for padding in PADDINGS:
    for multiple, n, m in itertools.product((1, 3), range(1, 20), (5, 16)):
      got = geometry.plan_pads((n, m), depth, padding, multiple, space)
      assert len(got) == 2
      for axis, (size, d, pad) in enumerate(
        zip((n, m), depths, got, strict=True)
      ):
        unit = space * 2**d if axis == 0 and space > 1 else 1
        # What comes out covers the axis, its multiple and its device's share.
        covered = next(
          k for k in itertools.count(size) if k % multiple == k % unit == 0
        )
        fits = (
          k
          for k in itertools.count(covered)
          if (comes_out(k, d, padding) or 0) >= covered
          and (padding != "same" or k % multiple == k % unit == 0)
        )
        assert pad.size == next(fits)
        assert pad.before == (pad.size - comes_out(pad.size, d, padding)) / 2


def test_what_is_not_said_asks_for_nothing():
  pads = geometry.plan_pads((9, 9), 2, "same", 1)
  assert pads == [geometry.Pad(0, 12)] * 2
  around = geometry.reach(1, "any", (False,))
  tile = {"tile": 35, "around": around}
  axis = geometry.plan_tiles(61, 1, "any", **tile)
  assert (axis.tile, axis.whole) == (35, 61)
  turned = geometry.plan_tiles(61, 1, "any", **tile, views=True)
  width, narrower = (plan.windows[0][1] for plan in (axis, turned))
  assert width == narrower + 2


def test_pads_need_a_depth_for_each_axis():
  with pytest.raises(ValueError):
    geometry.plan_pads((8, 8), (1, 1, 1), "same", 1)


def test_factors_say_how_often_an_axis_was_halved():
  assert geometry.pool_factors((), 2, 3) == ((2, 2),) * 3
  axes = ("12", "0", "012", "2")
  factors = geometry.pool_factors(axes, 3, 4)
  for fine, coarse in itertools.combinations_with_replacement(range(5), 2):
    size = [2**6] * 3
    for pooled in axes[fine:coarse]:
      for axis in map(int, pooled):
        size[axis] //= 2
    got = geometry.level_factor(factors, fine, coarse)
    assert got == tuple(2**6 // n for n in size)


# --- Tiles --------------------------------------------------------------------


def seen(pixels, depth, padding, wide_up, head_kernel, factors):
  """The input pixels of some outputs, one layer after another, as sets."""
  first = 0 if padding == "valid" else -1
  conv = lambda ps: {p + k for p in ps for k in range(first, first + 3)}

  def up(ps, factor, wide):
    # Between the centres of two pixels of the level below, or a copy of one.
    ends = (-1, 1) if wide and factor > 1 else (0,)
    return {(p + k) // factor for p in ps for k in ends}

  half = head_kernel // 2
  pixels = {p + k for p in pixels for k in range(-half, half + 1)}
  for wide, factor in zip(wide_up, factors, strict=True):
    pixels = up(conv(conv(pixels)), factor, wide)
  for factor in reversed(factors):
    pixels = {factor * p + k for p in conv(conv(pixels)) for k in range(factor)}
  return conv(conv(pixels))


REACHES = [
  (depth, padding, wide, head, factors)
  for depth in (1, 2, 3)
  for padding in ("same", "valid", "any")
  for wide in itertools.product((False, True), repeat=depth)
  for head in (1, 3, 5)
  for factors in itertools.product((1, 2), repeat=depth)
]


def test_reach_is_what_a_walk_back_through_every_layer_meets():
  for depth, padding, wide, head, factors in REACHES:
    before, after = geometry.reach(depth, padding, wide, head, factors)
    grid = 2**depth
    for low, high in ((0, grid), (3 * grid, 5 * grid)):
      found = seen(range(low, high), depth, padding, wide, head, factors)
      assert (min(found), max(found) + 1) == (low - before, high + after)


def test_factors_of_two_are_the_default():
  for depth, padding, wide, head, _ in REACHES:
    assert geometry.reach(depth, padding, wide, head) == geometry.reach(
      depth, padding, wide, head, (2,) * depth
    )
  with pytest.raises(ValueError):
    geometry.reach(2, "same", (False,) * 2, 1, (2, 2, 2))
  assert geometry.reach(4, "same", (False,) * 4) == (94, 94)
  assert geometry.reach(4, "valid", (False,) * 4) == (0, 188)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_small_plan_sees_what_it_needs(depth, padding, views):
  """All small images by all tiles, those too that leave no window."""
  around = geometry.reach(depth, padding, (False,) * depth)
  grid, plans = 2**depth, 0
  legal = [n for n in range(1, 400) if comes_out(n, depth, padding)]
  window = lambda n: geometry.tile_window(n, depth, around, views)
  first = next(n for n in legal if window(n) >= grid)
  for tile in range(1, first + 1):
    least = geometry.nearest_tile(tile, depth, padding, around, views)
    assert least == first
  tiles = [n for n in legal if n < first + 20]
  for tile, multiple in itertools.product(tiles, (1, 3)):
    for size in range(1, 3 * first, (1, 5, 19)[depth - 1]):
      make = lambda t, size=size, m=multiple: geometry.plan_tiles(
        size, depth, padding, tile=t, around=around, multiple=m, views=views
      )
      pad = geometry.plan_pad(size, depth, padding, multiple)
      if tile >= pad.size:
        axis = make(tile)
        assert axis == geometry.TileAxis(
          *(size, tile, tile, tile - 2 * pad.before, 0, pad.before, grid),
          ((0, size),),
        )
        assert axis.start((0, size)) == 0
      elif tile < first and padding != "any":
        with pytest.raises(ValueError, match=f"a tile of {tile} .* {first}$"):
          make(tile)
      elif tile >= first:
        _check_plan(make(tile), size, pad, tile, around, views)
        plans += 1
  assert plans > 40


def _check_plan(axis, size, pad, tile, around, views):
  """Each tile sees what its window needs, and no wider window would do."""
  grid = axis.grid
  assert (axis.size, axis.whole, axis.pad) == (size, pad.size, pad.before)
  assert tile <= axis.tile < tile + grid
  assert axis.out == axis.tile - 2 * pad.before
  starts = [a for a, _ in axis.windows]
  assert [0, *(b for _, b in axis.windows)] == [*starts, size]
  width = axis.windows[0][1]
  assert starts == list(range(0, size, width))
  assert width % grid == 0 or width == size

  def is_seen(low, high):
    start = axis.start((low, high))
    assert 0 <= start <= axis.whole - axis.tile and start % grid == 0
    # Outwards to the grid, as `reach` counts.
    low, high = low // grid * grid, -(-high // grid) * grid
    left = start == 0 or start <= low - around[0]
    right = start == axis.whole - axis.tile
    return left and (right or high + around[1] <= start + axis.tile)

  assert all(is_seen(*window) for window in axis.windows)
  offsets = range(0, size, 1 if views else grid)
  if views:  # As a mirrored image has them, anywhere.
    assert all(is_seen(k, min(k + width, size)) for k in offsets)
  if len(axis.windows) > 3:
    wider = width + grid
    assert not all(is_seen(k, min(k + wider, size)) for k in offsets)


def test_tiles_of_what_sees_everything_overlap_by_half():
  for depth, padding in itertools.product((1, 2), PADDINGS):
    for tile in [n for n in range(1, 50) if comes_out(n, depth, padding)]:
      out = comes_out(tile, depth, padding)
      for size in range(1, 120, 7):
        axis = geometry.plan_tiles(size, depth, padding, tile=tile, around=None)
        pad = geometry.plan_pad(size, depth, padding)
        if size <= axis.out:
          assert axis.windows == ((0, size),)
          assert axis.whole == axis.tile >= tile
          continue
        assert tile <= axis.tile < tile + 2**depth
        assert axis.out == out + axis.tile - tile
        assert (axis.grid, axis.before, axis.pad) == (1, 0, pad.before)
        assert axis.size == size
        assert axis.whole == size + 2 * pad.before
        starts = [a for a, _ in axis.windows]
        assert all(b - a == axis.out for a, b in axis.windows)
        assert starts[0] == 0 and starts[-1] == size - axis.out
        steps = [b - a for a, b in itertools.pairwise(starts)]
        assert set(steps[:-1]) <= {max(axis.out // 2, 1)}
        assert 0 < steps[-1] <= max(axis.out // 2, 1)
        assert [axis.start(w) for w in axis.windows] == starts
