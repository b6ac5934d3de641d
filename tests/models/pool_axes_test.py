"""Poolings that leave axes out: against libraries, and slice by slice.

A network that never pools axis 0, and whose kernels see one slice alone, is the
network of two axes on each slice: of every decoder, pooling and upsampling.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.models.variants import abstract
from unet_jax import config as config_lib
from unet_jax import conv, geometry, resample, tiles
from unet_jax.data import pipeline, windows
from unet_jax.errors import UserError
from unet_jax.inspect import trace
from unet_jax.models import build_model

# decoder, up, pool, skip, odd_size: each at least once.
NETWORKS = [
  ("plain", "transpose", "max", "concat", "pad_input"),
  ("plain", "linear_aligned", "stride", "attn_oktay", "pad_input"),
  ("nested", "linear", "max", "add", "pad_up"),
  ("full_scale", "transpose", "stride", "concat", "pad_input"),
  ("full_scale", "linear", "max", "concat", "pad_up_replicate"),
]


def build(network, **fields):
  decoder, up, pool, skip, odd_size = network
  return build_model(
    num_classes=2,
    widths=(3, 4, 5),
    norm="none",
    deep_supervision=True,
    decoder=decoder,
    up=up,
    pool=pool,
    skip=skip,
    odd_size=odd_size,
    **fields,
  )


def draw(tree, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape) * 0.3, tree)


def one_slice(kernel, like):
  """A kernel of two axes in the middle of one of three."""
  if kernel.shape == like.shape:  # A bias.
    return kernel
  out = np.zeros(like.shape)
  out[like.shape[0] // 2] = kernel
  return out


@pytest.mark.parametrize("network", NETWORKS)
def test_slices_that_are_never_joined_are_pictures(network):
  flat, model = build(network), build(network, dims=3, pool_axes=("12", "12"))
  size = (13, 10) if network[-1] != "pad_input" else (12, 8)
  with jax.enable_x64(True):
    volume = np.random.default_rng(1).normal(size=(1, 3, *size, 2))
    variables, _ = abstract(flat, (1, *size, 2))
    variables = draw(variables)
    shapes, _ = abstract(model, volume.shape)
    spread = jax.tree.map(one_slice, variables, shapes)
    got, want = (
      jax.jit(lambda v, x, m=m: m.apply(v, x, every_output=True).logits)(
        *inputs
      )
      for m, inputs in (
        (model, (spread, volume)),
        (flat, (variables, volume[0])),
      )
    )
    got, want = jax.tree.map(np.asarray, (got, want))
  assert len(got) == len(want) >= 2
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours[0], theirs, atol=1e-11)
    assert np.std(theirs) > 1e-3


def test_an_axis_that_joins_late_is_pooled_late():
  """Axis 0 is left alone once: its slices at level 1 are the input's."""
  model = build_model(
    num_classes=1, dims=3, widths=(2, 2, 2), pool_axes=("12", "012")
  )
  x = jnp.zeros((1, 6, 8, 12, 1))
  variables, logits = abstract(model, x.shape)
  assert logits.shape == (1, 6, 8, 12, 1)
  kernels = variables["params"]["decoder"]
  assert kernels["up_0"]["ConvTranspose_0"]["kernel"].shape == (1, 2, 2, 2, 2)
  assert kernels["up_1"]["ConvTranspose_0"]["kernel"].shape == (2, 2, 2, 2, 2)
  with pytest.raises(ValueError, match=r"size 5 .* with 1 poolings"):
    abstract(model, (1, 5, 8, 12, 1))
  with pytest.raises(ValueError, match=r"size 10 .* with 2 poolings"):
    abstract(model, (1, 6, 10, 12, 1))


@pytest.mark.parametrize("size", [(8, 9), (3, 8, 10)])
def test_pooling_and_interpolation_with_a_factor_an_axis(size):
  factors = (1, 2, 4)[: len(size)]
  x = np.random.default_rng(0).normal(size=(2, *size, 3))
  with jax.enable_x64(True):

    def both(function):
      y, vjp = jax.vjp(function, jnp.asarray(x))
      return y, vjp(jnp.cos(y))[0]

    got = both(lambda x: resample.max_pool(x, factors))
    want = both(lambda x: nn.max_pool(x, factors, factors))
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)
    up = np.asarray(resample.linear_up(jnp.asarray(x), factors, False))
  theirs = torch.nn.functional.interpolate(
    torch.tensor(np.moveaxis(x, -1, 1)),
    scale_factor=tuple(map(float, factors)),
    mode="bilinear" if len(size) == 2 else "trilinear",
  )
  np.testing.assert_allclose(np.moveaxis(up, -1, 1), theirs, atol=1e-12)


def test_the_transposed_convolution_with_a_factor_an_axis_is_flaxs():
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 2, 3))
  with jax.enable_x64(True):
    theirs = nn.ConvTranspose(5, (1, 2, 4), (1, 2, 4), "VALID")
    ours = conv.ConvTranspose(5, (1, 2, 4), nn.initializers.ones)
    variables = draw(jax.eval_shape(theirs.init, jax.random.key(0), x))
    got, want = (m.apply(variables, x) for m in (ours, theirs))
  np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("up", ["transpose", "linear"])
def test_tiles_equal_the_whole_image_on_axes_pooled_unequally(up):
  """Tile by tile in float64; a tile that begins off the grid would differ."""
  fields = {"dims": 2, "widths": (2, 2, 2, 2), "up": up}
  fields["pool_axes"] = ("1", "01", "1")
  config = config_lib.default_config()
  config.model.update(fields)
  config.predict.tile = (64, 120)
  cfg = config_lib.parse(config)
  need = tiles.needs([cfg.model])
  assert need.depths == (1, 3)
  plan = tiles.plan(cfg, (150, 203), need)
  assert all(len(axis.windows) > 2 for axis in plan.axes)
  assert [axis.grid for axis in plan.axes] == [2, 8]
  # The thin axis sees less around it, so its tiles give more.
  (near, _), (far, _) = need.around
  assert near < far
  image = np.random.default_rng(0).normal(size=(150, 203, 1))
  model = build_model(num_classes=2, conv="xla", **fields)
  with jax.enable_x64(True):
    padded = pipeline.pad_for_network(image, need.depths, need.rule, 1)
    assert padded.shape == (150, 208, 1)
    variables, _ = abstract(model, (1, *padded.shape))
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape), variables)
    apply = jax.jit(lambda x: model.apply(variables, x.astype("float64")))

    def logits(batch):
      y = apply(batch)
      return jnp.zeros(y.shape[:-1], jnp.uint8), y[None]

    # float32, as tiles are: the same for both.
    whole = np.asarray(apply(padded[None].astype("float32")))[0, :150, :203]
    picture = windows.of_array(image.astype("float32"))
    plain = {"mode": "none", "mean": None, "std": None}
    bands = tiles.stream(picture, plan, logits, plain)
    got = tiles.whole(bands).samples[0]
  assert np.abs(got - whole).max() <= 1e-12 * np.abs(whole).max()


def make_config(**fields):
  config = config_lib.default_config()
  config.model.dims, config.model.widths = 3, (4, 4, 4, 4)
  config.model.pool_axes = ("12", "12", "012")
  config.data.crop_size = (6, 24, 16)
  for name, value in fields.items():
    config_lib.assign(config, name.replace("__", "."), value)
  return config_lib.parse(config)


def test_sizes_by_halving_each_axis_as_told():
  cfg = make_config()
  assert cfg.model.depths == (1, 3, 3)
  factors = geometry.pool_factors(cfg.model.pool_axes, 3, 3)
  assert geometry.level_factor(factors, 0, 2) == (1, 4, 4)
  assert geometry.level_factor(factors, 1, 3) == (2, 4, 4)
  rng = np.random.default_rng(0)
  for size in rng.integers(1, 40, (30, 3)):
    image = np.zeros((*size, 1), np.float32)
    padded = pipeline.pad_for_network(image, cfg.model.depths, "same", 1)
    left = list(padded.shape[:-1])
    for entry in cfg.model.pool_axes:
      for axis in map(int, entry):
        assert left[axis] % 2 == 0
        left[axis] //= 2
    assert all(0 <= p - n < 8 for p, n in zip(padded.shape, size, strict=False))
    assert padded.shape[0] - size[0] < 2


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model__pool_axes": ("12",)}, "give 3 entries"),
    ({"model__pool_axes": ("12", "", "012")}, "'' does not name axes"),
    ({"model__pool_axes": ("12", "13", "012")}, "'13' does not name axes"),
    ({"model__pool_axes": ("12", "11", "012")}, "'11' does not name axes"),
    ({"model__padding": "valid"}, "needs model.padding='same'"),
    ({"model__skip": "uctrans"}, "into equal patches"),
    ({"data__crop_size": (5, 24, 16)}, "axis 0: size 5 .* nearest: 4, 6"),
    ({"data__crop_size": (6, 20, 16)}, "axis 1: size 20 .* nearest: 16, 24"),
    ({"predict__tile": (5, 24, 16)}, "predict.tile, axis 0: size 5"),
    ({"parallel__space": 4}, "data.crop_size: 6 pixels .* nearest: 8"),
  ],
)
def test_what_does_not_fit_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    make_config(**fields)


def test_what_an_output_sees_along_the_axis_that_is_pooled_most():
  both = build_model(num_classes=1, dims=2, widths=(2, 2, 2))
  rows = both.clone(pool_axes=("0", "0"))
  columns = both.clone(pool_axes=("1", "01"))
  fields = trace.receptive_fields(both)
  assert trace.receptive_fields(rows) == fields
  assert trace.receptive_fields(columns) == fields


def test_views_that_turn_pictures_want_axes_alike():
  flat = {"model__dims": 2, "data__crop_size": (24, 16), "predict__views": 8}
  with pytest.raises(UserError, match="pools the axes unequally; nearest: 1"):
    make_config(**flat, model__pool_axes=("1", "01", "01"))
  make_config(**flat, model__pool_axes=("01", "01", "01"))
