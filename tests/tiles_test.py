"""Tiles, held to what the network gives for the whole image."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax import geometry, tiles
from unet_jax.data import pipeline, windows
from unet_jax.models import build_model
from unet_jax.schema import ModelConfig

PLAIN = {"normalization": {"mode": "none"}}


class Net:
  """A small random network in double precision, and one image."""

  def __init__(self, size, depth=2, dtype=np.float64, **fields):
    fields = {
      "dims": len(size),
      "widths": (2,) * (depth + 1),
      "norm": "batch",
      "conv": "xla",
      **fields,
    }
    self.size = size
    self.need = tiles.needs([ModelConfig(**fields)])
    self.model = build_model(num_classes=2, **fields)
    rng = np.random.default_rng(0)
    self.image = rng.normal(size=(*size, 1)).astype(np.float32)
    whole = self.pad(self.image)
    shapes = jax.eval_shape(self.model.init, jax.random.key(0), whole[None])
    # Positive kernels, with few signs: no ReLU is dead, and all pixels count.
    draw = lambda x: (rng.uniform(0.1, 1, x.shape)).astype(dtype)
    self.variables = jax.tree.map(draw, shapes)
    model, variables = self.model, self.variables
    self.apply = jax.jit(lambda x: model.apply(variables, x.astype(dtype)))

  def pad(self, image, multiple=1):
    need = self.need
    return pipeline.pad_for_network(image, need.depths[0], need.rule, multiple)

  def whole(self):
    """Logits [*S, K] of the image as a whole."""
    logits = self.apply(self.pad(self.image)[None])[0]
    return np.asarray(logits)[tuple(slice(0, n) for n in self.size)]

  def axes(self, tile, **how):
    how = {"around": self.need.around and self.need.around[0], **how}
    return tuple(
      geometry.plan_tiles(
        n, self.need.depths[0], self.need.rule, tile=tile, **how
      )
      for n in self.size
    )

  def tiled(self, axes, batch=3, views=1):
    """Logits [*S, K] from tiles; logits take the place of probabilities."""

    def apply(batch):
      logits = self.apply(batch)
      return jnp.zeros(logits.shape[:-1], jnp.uint8), logits[None]

    picture, plan = windows.of_array(self.image), tiles.Plan(axes, batch, views)
    return tiles.whole(tiles.stream(picture, plan, apply, **PLAIN)).samples[0]

  def legal(self, last, step=1):
    need = self.need
    first = geometry.nearest_tile(
      1, need.depths[0], need.rule, need.around[0], False
    )
    legal = [
      t
      for t in range(first, last + 1)
      if geometry.is_legal(t, need.depths[0], need.rule)
    ]
    return legal[::step]


def distance(a, b):
  return np.abs(a - b).max() / np.abs(b).max()


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


NETS = [
  {},
  {"padding": "valid"},
  {"norm": "none", "up": "linear"},
  {"padding": "valid", "skip": "attn_oktay", "up": "linear"},
  {"decoder": "full_scale", "up": "linear"},
  {"odd_size": "pad_up", "up": "linear"},
  {"skip": "respath", "residual": True, "pool": "stride", "head_kernel": 3},
]
MORE = [
  {"padding": "valid", "up": "linear"},
  {"skip": "attn_oktay"},
  {"padding": "valid", "skip": "attn_oktay"},
  {"decoder": "nested"},
  {"decoder": "nested", "padding": "valid"},
  {"odd_size": "pad_up_replicate"},
  {"skip": "attn_same", "norm": "none", "pool": "stride"},
]
NETS += [pytest.param(fields, marks=pytest.mark.slow) for fields in MORE]


@pytest.mark.parametrize("fields", NETS, ids=str)
@pytest.mark.usefixtures("x64")
def test_every_tile_equals_the_whole_signal(fields):
  """All legal tiles up to the signal's length, wherever they lie."""
  step = 4 if fields.get("odd_size") else 1
  net = Net((75,), **fields)
  whole, legal = net.whole(), net.legal(72, step)
  assert len(legal) > 3
  for tile in legal:
    axes = net.axes(tile)
    assert len(axes[0].windows) > 1
    assert distance(net.tiled(axes), whole) < 1e-12, tile


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.usefixtures("x64")
def test_a_tile_equals_the_whole_at_every_offset(padding, depth):
  """Not only those that are planned: every multiple of 2^depth."""
  net = Net((90,), depth, padding=padding)
  padded, whole = net.pad(net.image), net.whole()
  (axis,) = net.axes(net.legal(80)[1])
  around, grid = net.need.around[0], 2**depth
  offsets = range(0, axis.whole - axis.tile + 1, grid)
  batch = np.stack([padded[s : s + axis.tile] for s in offsets])
  logits = np.asarray(net.apply(batch))
  for start, own in zip(offsets, logits, strict=True):
    first = start + axis.before if start else 0
    last = (start + axis.tile - around[1]) // grid * grid
    last = len(whole) if start == axis.whole - axis.tile else last
    assert last > first
    kept = own[first - start : last - start]
    assert distance(kept, whole[first:last]) < 1e-12


@pytest.mark.parametrize("stride", [13, 14, 15, 17])
@pytest.mark.usefixtures("x64")
def test_a_stride_off_the_grid_fails(stride):
  """The comparison above is one that can fail: poolings pair other pixels."""
  net = Net((90,))
  (axis,) = net.axes(64)
  assert axis.windows[1][0] == 16
  steps = tuple((s, min(s + stride, 90)) for s in range(0, 90, stride))
  off = dataclasses.replace(axis, grid=1, windows=steps)
  assert distance(net.tiled((off,)), net.whole()) > 1e-6


@pytest.mark.usefixtures("x64")
def test_less_context_fails():
  """What `reach` asks for is needed, to the pixel."""
  net = Net((90,))
  before, after = net.need.around[0]
  for less in ((before - 4, after), (before, after - 4)):
    axes = net.axes(64, around=less)
    assert distance(net.tiled(axes), net.whole()) > 1e-12


@pytest.mark.parametrize(
  "fields",
  [
    *({}, {"up": "linear"}, {"skip": "attn_oktay"}, {"decoder": "nested"}),
    *({"decoder": "full_scale"}, {"head_kernel": 3}),
    *({"padding": "valid"}, {"padding": "valid", "up": "linear"}),
  ],
  ids=str,
)
@pytest.mark.usefixtures("x64")
def test_reach_is_where_the_gradient_is(fields):
  """Positive kernels let no path cancel: the support is exact."""
  net = Net((200,), **fields)
  padded = jnp.asarray(net.pad(net.image), jnp.float64)
  before, after = net.need.around[0]
  low, high = 96, 104  # An output window on the grid.
  apply = lambda x: net.model.apply(net.variables, x[None])[0, low:high].sum()
  # As if every activation were linear, else a maximum hides its neighbours.
  seen = np.flatnonzero(np.asarray(_support(net, apply, padded)))
  assert seen.min() >= low - before and seen.max() < high + after
  assert seen.min() == low - before or fields.get("skip")
  assert seen.max() == high + after - 1 or fields.get("skip")


def _support(net, apply, padded):
  """Where any of many random images has a gradient: maxima move about."""
  images = np.random.default_rng(1).normal(size=(200, *padded.shape))
  grads = jax.jit(jax.vmap(jax.grad(apply)))(jnp.asarray(images))
  return np.abs(grads).sum((0, -1)) > 0


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_tiles_in_two_axes_and_single_precision(padding):
  net = Net((53, 60), 1, np.float32, padding=padding, norm="none", conv="fast")
  whole = net.whole()
  for tile in net.legal(34, 4):
    assert distance(net.tiled(net.axes(tile)), whole) < 1e-5, tile


@pytest.mark.usefixtures("x64")
def test_tiles_of_volumes():
  net = Net((24, 12, 22), 1)
  axes = tuple(
    geometry.plan_tiles(n, 1, "same", tile=t, around=net.need.around[0])
    for n, t in zip(net.size, (20, 12, 20), strict=True)  # As is automatic.
  )
  assert [len(axis.windows) for axis in axes] == [6, 1, 6]
  assert distance(net.tiled(axes), net.whole()) < 1e-12


def test_a_tile_sees_the_mirrored_pixels_of_the_whole():
  net = Net((23, 37), 2, padding="valid")
  padded, picture = net.pad(net.image), windows.of_array(net.image)
  for starts in [(-20, -20), (0, 3), (5, -20)]:
    sizes = (60, 52)
    got = windows.read_mirrored(picture, starts, sizes)
    at = [s + geometry.margin(2, "valid") for s in starts]
    place = tuple(slice(a, a + n) for a, n in zip(at, sizes, strict=True))
    expected = padded[place]
    inside = tuple(slice(0, n) for n in expected.shape[:-1])
    np.testing.assert_array_equal(got[inside], expected)


# --- Views --------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_views_are_the_mean_over_turned_images():
  """By turning the image by hand, as a whole and in tiles."""
  size = (37, 44)
  net = Net(size, 1)
  total = np.zeros((*size, 2))
  for turns, flip in itertools.product(range(4), (False, True)):
    turn = lambda x, k=turns, f=flip: np.rot90(x[::-1] if f else x, k)
    own = Net(size, 1)
    own.variables, own.apply = net.variables, net.apply
    own.image = np.ascontiguousarray(turn(net.image))
    own.size = own.image.shape[:-1]
    back = np.rot90(own.whole(), -turns)
    total += back[::-1] if flip else back
  sizes = [p.size for p in geometry.plan_pads(size, 1, "same", 1)]
  whole = tuple(
    geometry.plan_tiles(n, 1, "same", tile=t, around=(8, 8), views=True)
    for n, t in zip(size, sizes, strict=True)
  )
  for axes in (whole, net.axes(24, views=True)):
    assert distance(net.tiled(axes, batch=2, views=8), total / 8) < 1e-12


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_all_views_are_different_and_undone(dims):
  size = (3, 4, 5)[:dims]
  array = np.random.default_rng(0).normal(size=(*size, 2))
  picture, seen = windows.of_array(array), set()
  for view in windows.all_views(dims, 8):
    turned = windows.in_memory(view.of(picture)).array
    seen.add((turned.shape, turned.tobytes()))
    np.testing.assert_array_equal(view.undo(turned), array)
    window = [(1, 2), (0, 3), (2, 4)][:dims]
    place = tuple(slice(*w) for w in view.window(window, size))
    part = array[tuple(slice(*w) for w in window)]
    np.testing.assert_array_equal(view.undo(turned[place]), part)
  assert len(seen) == (2, 8, 8)[dims - 1]


# --- What cannot be exact -----------------------------------------------------


INEXACT = [
  {"norm": "instance"},
  {"up": "linear_aligned"},
  {"bottleneck": "transformer"},
  {"squeeze_excite": True},
  {"skip": "se"},
  {"skip": "scse"},
  {"skip": "uctrans"},
  {"decoder": "full_scale", "classification_guided": True},
]


@pytest.mark.parametrize("fields", INEXACT, ids=str)
def test_what_sees_the_whole_image_is_named(fields):
  """A far pixel has a gradient, and the program knows."""
  net = Net((64,), 1, np.float32, widths=(4, 4), **fields)
  assert net.need.around is None
  assert tiles.why_inexact(ModelConfig(dims=1, **fields))
  image = jnp.asarray(net.pad(net.image))
  if fields.get("up") == "linear_aligned":  # There it is the size that counts.
    with contextlib.suppress(ValueError):
      a, b = (np.asarray(net.apply(image[None, :n])) for n in (64, 48))
      assert distance(b[0, 16:24], a[0, 16:24]) > 1e-4
    return
  change = image.at[60:].mul(3)
  a, b = (np.asarray(net.apply(x[None]))[0, :8] for x in (image, change))
  known = fields.get("classification_guided")  # A gate that may not switch.
  assert known or np.abs(a - b).max() > 0


def test_blended_tiles_add_up():
  """Where all tiles say the same, so does their blend, with any overlap."""
  image = np.random.default_rng(0).normal(size=(50, 41, 1)).astype(np.float32)
  axes = tuple(
    geometry.plan_tiles(n, 1, "same", tile=16, around=None) for n in (50, 41)
  )
  assert len(axes[0].windows) > 5 and axes[0].windows[-1][1] == 50

  def apply(batch):
    return np.zeros(batch.shape[:-1], np.uint8), np.abs(batch)[None]

  for views in (1, 8):
    plan = tiles.Plan(axes, 2, views)
    bands = list(tiles.stream(windows.of_array(image), plan, apply, **PLAIN))
    assert len(bands) > 3  # In constant memory: rows leave when they are done.
    got = tiles.whole(iter(bands)).samples[0]
    np.testing.assert_allclose(got, np.abs(image), rtol=1e-5)


def test_the_centre_of_a_tile_counts_most():
  axis = geometry.plan_tiles(40, 1, "same", tile=16, around=None)
  weight = tiles._weight([(0, 16)], [axis])[:, 0]
  assert weight.argmax() in (7, 8)
  np.testing.assert_allclose(weight[4] / weight.max(), np.exp(-1.5), rtol=0.03)


# --- Plans --------------------------------------------------------------------


def test_windows_cover_once_and_tiles_stay_on_the_grid():
  """By trying sizes, tiles and paddings."""
  for padding, depth in itertools.product(("same", "valid", "any"), (1, 3)):
    around = geometry.reach(depth, padding, (True,) * depth)
    least = geometry.nearest_tile(1, depth, padding, around, True)
    for size, more in itertools.product((least + 9, 3 * least + 1), range(17)):
      _, tile = geometry.nearest_legal(least + more, depth, padding)
      axis = geometry.plan_tiles(
        size, depth, padding, tile=tile, around=around, views=True
      )
      ends = [0, *(stop for _, stop in axis.windows)]
      assert ends == [*(start for start, _ in axis.windows), size]
      assert geometry.is_legal(axis.tile, depth, padding)
      for window in axis.windows:
        start = axis.start(window)
        assert start % 2**depth == 0
        assert 0 <= start <= axis.whole - axis.tile


def test_a_tile_without_a_window_names_the_nearest():
  with pytest.raises(ValueError, match="nearest: 208"):
    geometry.plan_tiles(900, 4, "same", tile=64, around=(94, 94))


def test_the_papers_tile_goes_in_steps_of_384():
  """572 pixels in, 388 out, and the largest stride on the grid is 384."""
  around = geometry.reach(4, "valid", (False,) * 4)
  axis = geometry.plan_tiles(2000, 4, "valid", tile=572, around=around)
  assert (axis.out, axis.windows[1][0], axis.pad) == (388, 384, 92)
