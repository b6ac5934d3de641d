"""Nested and full-scale decoders, deep supervision, pruning, odd sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.variants import abstract, count, fill
from unet_jax.models import blocks, build_model, decoders, unet
from unet_jax.models.skips import NO_CONTEXT

RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def make(**fields):
  fields = {"widths": (3, 4, 5), "norm": "none", "num_classes": 2, **fields}
  return build_model(**fields)


def run(model, variables, x, **fields):
  return jax.jit(lambda v, x: model.apply(v, x, **fields))(variables, x)


# --- UNet++ -------------------------------------------------------------------


def test_a_pruned_network_is_a_deep_output_of_the_whole():
  """L1..L3 of the paper: the same parameters, the columns beyond never run."""
  fields = {"widths": (3, 4, 5, 6), "decoder": "nested"}
  model = make(deep_supervision=True, **fields)
  x = draw(1, 16, 16, 1)
  variables = fill(model, x)
  whole = run(model, variables, x, every_output=True).logits
  assert len(whole) == 3
  for columns in (1, 2, 3):
    pruned = model.clone(prune=columns)
    np.testing.assert_allclose(
      run(pruned, variables, x), whole[3 - columns], atol=1e-6
    )
    small = count(abstract(pruned, x.shape)[0]["params"])
    if columns < 3:
      assert small < count(variables["params"])


def test_without_deep_supervision_there_is_one_head():
  for decoder in ("plain", "nested", "full_scale"):
    params = abstract(make(decoder=decoder), (1, 8, 8, 1))[0]["params"]
    assert [name for name in params if "head" in name] == ["head"]


def test_nested_with_one_level_is_the_plain_network():
  x = draw(1, 8, 8, 1)
  plain = make(widths=(3, 4))
  nested = make(widths=(3, 4), decoder="nested")
  variables = fill(plain, x)
  decoder = variables["params"]["decoder"]
  renamed = {
    name.replace("_0", "_0_1"): value for name, value in decoder.items()
  }
  moved = {"params": {**variables["params"], "decoder": renamed}}
  np.testing.assert_array_equal(run(nested, moved, x), run(plain, variables, x))


def apply_part(module, params, *args):
  return np.asarray(module.apply({"params": params}, *args))


def test_nested_nodes_are_computed_as_the_equation_says():
  """x_{i,j} = H([x_{i,0}, ..., x_{i,j-1}; U(x_{i+1,j-1})]), node by node."""
  model = make(decoder="nested")
  layers = model._layers(train=False)
  features = [draw(1, 8, 8, 3), draw(1, 4, 4, 4), draw(1, 2, 2, 5)]
  decoder = decoders.NestedDecoder(
    layers, model.widths, "transpose", "concat", (True, True)
  )
  variables = fill(decoder, features, NO_CONTEXT)
  params = variables["params"]
  nodes = {(i, 0): x for i, x in enumerate(features)}
  for j in (1, 2):
    for i in range(3 - j):
      width = model.widths[i]
      up = blocks.TransposeUp(width)
      up = apply_part(up, params[f"up_{i}_{j}"], nodes[i + 1, j - 1])
      joined = np.concatenate([*(nodes[i, k] for k in range(j)), up], -1)
      block = blocks.ConvBlock((width, width), layers)
      nodes[i, j] = apply_part(block, params[f"decoder_{i}_{j}"], joined)
  got = jax.jit(decoder.apply)(variables, features, NO_CONTEXT)
  for y, j in zip(got, (2, 1), strict=True):
    np.testing.assert_allclose(y, nodes[0, j], atol=1e-4)


# --- UNet 3+ ------------------------------------------------------------------


def test_full_scale_nodes_are_computed_as_the_equation_says():
  """d_i = H([C(D(x_k))_{k<i}, C(x_i), C(U(d_k))_{k>i}]), branch by branch."""
  model = make(decoder="full_scale")
  layers = model._layers(train=False)
  features = [draw(1, 8, 8, 3), draw(1, 4, 4, 4), draw(1, 2, 2, 5)]
  decoder = decoders.FullScaleDecoder(
    layers, model.widths, "linear", "concat", (True, True)
  )
  variables = fill(decoder, features, NO_CONTEXT)
  params, decoded = variables["params"], {2: features[2]}

  def conv(name, x, width=3):
    return apply_part(blocks.ConvBlock((width,), layers), params[name], x)

  def pool(x, factor):
    b, h, w, c = x.shape
    tiles = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return tiles.max((2, 4))

  def up(x, factor):
    return np.asarray(blocks.LinearUp(factor=factor).apply({}, x))

  for i in (1, 0):
    branches = [
      conv(f"side_{k}_{i}", pool(features[k], 2 ** (i - k)))
      for k in range(i + 1)
    ]
    branches += [
      conv(f"deep_{k}_{i}", up(decoded[k], 2 ** (k - i)))
      for k in range(i + 1, 3)
    ]
    joined = np.concatenate(branches, -1)
    decoded[i] = conv(f"decoder_{i}", joined, width=9)
  got = jax.jit(decoder.apply)(variables, features, NO_CONTEXT)
  for i, y in enumerate(got):
    np.testing.assert_allclose(y, decoded[i], atol=1e-4)


def test_full_scale_widths_and_what_a_cut_level_leaves_out():
  model = make(decoder="full_scale", up="linear")
  params = abstract(model, (1, 8, 8, 1))[0]["params"]["decoder"]

  def channels(name):
    return params[name]["Conv_0"]["kernel"].shape[-2:]

  # Every branch to widths[0] channels, every node to as many for each level.
  assert channels("side_0_0") == (3, 3) and channels("side_1_1") == (4, 3)
  assert channels("deep_2_0") == (5, 3) and channels("deep_1_0") == (9, 3)
  assert channels("decoder_0") == channels("decoder_1") == (9, 9)
  cut = make(decoder="full_scale", up="linear", skip_levels=(False, True))
  params = abstract(cut, (1, 8, 8, 1))[0]["params"]["decoder"]
  assert not [name for name in params if name.startswith("side_0")]
  # Level 1 never goes to a finer one as a side: it is below it.
  assert [n for n in params if n.startswith("side")] == ["side_1_1"]
  assert channels("decoder_0") == (6, 9)


# --- Deep supervision ---------------------------------------------------------


@pytest.mark.parametrize(
  ("decoder", "padding", "outputs"),
  [("plain", "same", 2), ("plain", "valid", 2), ("nested", "valid", 2),
   ("full_scale", "same", 3)],
)  # fmt: skip
def test_deep_outputs_lie_on_the_grid_of_the_prediction(
  decoder, padding, outputs
):
  model = make(decoder=decoder, padding=padding, deep_supervision=True)
  size = 44 if padding == "valid" else 8
  x = draw(1, size, size, 1)
  variables = fill(model, x)
  result = run(model, variables, x, every_output=True)
  shapes = {y.shape for y in result.logits}
  assert len(result.logits) == outputs and len(shapes) == 1
  np.testing.assert_array_equal(run(model, variables, x), result.logits[0])
  assert result.presence is None


def test_deep_outputs_are_enlarged_about_the_same_centre():
  """A coarse map that is linear in the row stays so on the fine grid."""
  for padding, size in (("same", 8), ("valid", 44)):
    model = make(padding=padding, deep_supervision=True)
    x = draw(1, size, size, 1)
    variables = fill(model, x)
    seen = {}

    def spy(f, args, kwargs, context, seen=seen):
      y = f(*args, **kwargs)
      name = context.module.name or ""
      if name.startswith("head"):  # Row numbers of the map's own grid.
        n = y.shape[1]
        rows = jnp.arange(n, dtype=y.dtype) - (n - 1) / 2
        y = jnp.broadcast_to(rows[None, :, None, None], y.shape)
        seen[name] = n
      return y

    with blocks.nn.intercept_methods(spy):
      main, deep = model.apply(variables, x, every_output=True).logits
    inside = slice(1, -1) if padding == "same" else slice(None)
    np.testing.assert_allclose(
      np.asarray(deep)[0, inside, 0, 0],
      np.asarray(main)[0, inside, 0, 0] / 2,
      atol=1e-6,
    )
    assert set(seen) == {"head", "head_1"}


# --- The classification-guided module -----------------------------------------


def test_absent_classes_are_taken_out_of_the_prediction():
  logits = jnp.asarray([[[0.0, 5.0, 1.0]], [[0.0, 5.0, 1.0]]])
  presence = jnp.asarray([[-1.0, 1.0], [-1.0, -1.0]])
  gated = unet._gate(logits, presence)
  np.testing.assert_array_equal(jnp.argmax(gated, -1), [[2], [0]])
  # Reflected about the smallest logit: as unlikely as they were likely.
  np.testing.assert_array_equal(gated[:, 0], [[0, -5, 1], [0, -5, -1]])
  two = unet._gate(jnp.asarray([[[-3.0, 5.0]]]), jnp.asarray([[-1.0]]))
  np.testing.assert_allclose(
    jax.nn.softmax(two)[0, 0], jax.nn.softmax(jnp.array([5.0, -3.0]))
  )
  # The one logit of a single class: background, as sure as it was.
  z = jnp.asarray([[[3.0]], [[-2.0]], [[3.0]]])
  gated = unet._gate(z, jnp.asarray([[-1.0], [-1.0], [1.0]]))
  np.testing.assert_array_equal(gated[:, 0, 0], [-3, -2, 3])


def test_presence_gates_in_use_and_not_in_training():
  model = make(decoder="full_scale", classification_guided=True, num_classes=1)
  x = draw(2, 8, 8, 1)
  variables = fill(model, x)
  bias = variables["params"]["presence"]["bias"]
  bias[:] = -100.0  # Sure that there is nothing.
  assert (run(model, variables, x) <= 0).all()
  rngs = {"dropout": jax.random.key(0)}
  outputs = model.apply(variables, x, train=True, every_output=True, rngs=rngs)
  assert outputs.presence.shape == (2, 1)
  assert (outputs.logits[0] > 0).any()


def test_presence_is_the_largest_response_at_the_bottom():
  fields = {"decoder": "full_scale", "classification_guided": True}
  model = make(num_classes=3, deep_supervision=True, **fields)
  x = draw(2, 8, 8, 1)
  variables = fill(model, x)
  outputs, seen = model.apply(
    variables,
    x,
    every_output=True,
    capture_intermediates=lambda module, _: module.name == "presence",
    mutable=["intermediates"],
  )
  response = seen["intermediates"]["presence"]["__call__"][0]
  np.testing.assert_array_equal(outputs.presence, response.max((1, 2)))
  # In use every output is gated alike.
  raw = model.clone(classification_guided=False)
  plain = raw.apply(variables, x, every_output=True).logits
  for y, z in zip(outputs.logits, plain, strict=True):
    np.testing.assert_allclose(y, unet._gate(z, outputs.presence), atol=1e-6)


# --- Odd sizes, blocks, bottleneck --------------------------------------------


@pytest.mark.parametrize("odd_size", ["pad_up", "pad_up_replicate"])
@pytest.mark.parametrize("decoder", ["plain", "nested", "full_scale"])
def test_networks_that_pad_on_the_way_up_take_any_size(odd_size, decoder):
  model = make(odd_size=odd_size, decoder=decoder, deep_supervision=True)
  even = make(decoder=decoder, deep_supervision=True)
  x = draw(1, 8, 12, 1)
  variables = fill(model, x)
  np.testing.assert_array_equal(
    run(model, variables, x), run(even, variables, x)
  )
  odd = draw(1, 9, 7, 1)
  result = run(model, variables, odd, every_output=True).logits
  assert {y.shape for y in result} == {(1, 9, 7, 2)}
  with pytest.raises(ValueError, match="nearest: 4"):
    model.apply(variables, draw(1, 3, 8, 1))
  with pytest.raises(ValueError, match="nearest: 8, 12"):
    even.apply(variables, odd)


def test_a_narrow_decoder_keeps_a_channel():
  model = make(widths=(1, 4), narrow_decoder=True, skip_levels=(False,))
  assert abstract(model, (1, 4, 4, 1))[1].shape == (1, 4, 4, 2)


def test_shuffled_skips_are_refused_in_a_nested_network_built_by_hand():
  with pytest.raises(ValueError, match="nodes between"):
    abstract(make(decoder="nested", skip="shuffle"), (1, 8, 8, 1))


def test_short_skips_add_the_input():
  """Kernels of 0 leave the shortcut: the identity, or a 1x1 convolution."""
  layers = make(residual=True)._layers(train=False)
  x = np.abs(draw(1, 4, 4, 3))
  block = blocks.ConvBlock((3, 3), layers)
  zeros = jax.tree.map(np.zeros_like, fill(block, x))
  np.testing.assert_array_equal(block.apply(zeros, x), x)
  block = blocks.ConvBlock((3, 5), layers)
  variables = fill(block, x)
  params = jax.tree.map(np.zeros_like, variables["params"])
  params["shortcut"] = variables["params"]["shortcut"]
  kernel, bias = params["shortcut"]["kernel"], params["shortcut"]["bias"]
  expected = np.maximum(x @ kernel[0, 0] + bias, 0)
  np.testing.assert_allclose(
    block.apply({"params": params}, x), expected, atol=1e-5
  )


def test_short_skips_of_valid_convolutions_are_cropped():
  layers = make(residual=True, padding="valid")._layers(train=False)
  x = np.abs(draw(1, 9, 9, 3))
  block = blocks.ConvBlock((3, 3), layers)
  zeros = jax.tree.map(np.zeros_like, fill(block, x))
  np.testing.assert_array_equal(block.apply(zeros, x), x[:, 2:-2, 2:-2])


def test_squeeze_excite_gates_each_channel_of_a_block():
  layers = make(squeeze_excite=True, activation="gelu")._layers(train=False)
  x = draw(2, 4, 4, 3)
  block = blocks.ConvBlock((3, 3), layers)
  variables = fill(block, x)
  params = variables["params"]
  layers = make(activation="gelu")._layers(train=False)
  plain = blocks.ConvBlock((3, 3), layers)
  before = np.asarray(plain.apply(variables, x))
  gates = np.asarray(block.apply(variables, x)) / before
  np.testing.assert_allclose(gates, gates[:, :1, :1] + 0 * gates, atol=1e-4)
  assert 0 < gates.min() and gates.max() < 1
  assert np.ptp(gates[0]) > 0.01
  assert params["SqueezeExcite_0"]["Dense_0"]["kernel"].shape == (3, 1)


def test_block_dropout_acts_between_the_convolutions():
  model = make(block_dropout=0.5)
  x = draw(2, 8, 8, 1)
  variables = fill(model, x)
  first, again, other = (
    model.apply(
      variables, x, train=True, rngs={"dropout": jax.random.key(seed)}
    )
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, other)
  np.testing.assert_array_equal(
    run(model, variables, x), run(make(), variables, x)
  )


def test_learned_pooling_halves_with_its_own_taps():
  model = make(widths=(3, 4), pool="stride")
  params = abstract(model, (1, 8, 8, 1))[0]["params"]
  assert params["pool_1"]["kernel"].shape == (2, 2, 3, 3)
  layers = model._layers(train=False)
  x = draw(1, 6, 4, 3)

  class Pool(nn.Module):
    @nn.compact
    def __call__(self, x):
      return layers.conv(3, 2, strides=2)(x)

  variables = fill(Pool(), x)
  y = Pool().apply(variables, x)
  weights = variables["params"]["Conv_0"]
  kernel, bias = weights["kernel"], weights["bias"]
  expected = np.einsum("bihjwc,hwcd->bijd", x.reshape(1, 3, 2, 2, 2, 3), kernel)
  np.testing.assert_allclose(y, expected + bias, atol=1e-5)


def test_attention_at_the_bottom_is_flaxs():
  x, heads = draw(2, 5, 8), 2
  module = blocks.Transformer(num_layers=1, num_heads=heads)
  params = dict(fill(module, x)["params"])
  for part, weights in params.items():  # The rest does nothing.
    if part.startswith("FeedForward"):
      params[part] = jax.tree.map(np.zeros_like, weights)

  def norm(k, x):
    return nn.LayerNorm().apply({"params": params[f"LayerNorm_{k}"]}, x)

  theirs = {}
  for name, k in zip(("query", "key", "value"), range(3), strict=True):
    kernel, bias = (params[f"Dense_{k}"][part] for part in ("kernel", "bias"))
    theirs[name] = {
      "kernel": kernel.reshape(8, heads, -1),
      "bias": bias.reshape(heads, -1),
    }
  out = params["Dense_3"]
  theirs["out"] = {**out, "kernel": out["kernel"].reshape(heads, -1, 8)}
  attention = nn.MultiHeadDotProductAttention(heads)
  y = x + attention.apply({"params": theirs}, norm(0, x))
  np.testing.assert_allclose(
    module.apply({"params": params}, x), norm(2, y), atol=1e-5
  )


def test_attention_at_the_bottom_sees_every_pixel_and_no_order():
  """Self-attention without positions commutes with moving the pixels."""
  module = blocks.Transformer(num_layers=2, num_heads=2)
  x = draw(1, 4, 3, 8)
  variables = fill(module, x)
  order = RNG.permutation(12)

  def moved(x):
    return x.reshape(1, 12, 8)[:, order].reshape(x.shape)

  y = np.asarray(module.apply(variables, x))
  np.testing.assert_allclose(
    module.apply(variables, moved(x)), moved(y), atol=1e-5
  )
  one = x.copy()
  one[0, 0, 0] = draw(8)
  changed = np.abs(np.asarray(module.apply(variables, one)) - y).max(-1)
  assert (changed > 0).all()
  model = make(bottleneck="transformer", bottleneck_heads=5)
  params = abstract(model, (1, 8, 8, 1))[0]["params"]
  assert "transformer" in params
  logits = run(model, fill(model, draw(1, 8, 8, 1)), draw(1, 8, 12, 1))
  assert logits.shape == (1, 8, 12, 2)  # Any legal size, after any other.
