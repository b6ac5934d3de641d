"""What each skip computes, against its formula in NumPy, pixel by pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from tests.models.variants import fill
from unet_jax.models import blocks, build_model, skips
from unet_jax.models.skips import SKIPS, Context, Wires

RNG = np.random.default_rng(0)
sigmoid = special.expit


def layers(**fields):
  fields = {"norm": "none", "dims": 2, **fields}
  return build_model(num_classes=1, **fields)._layers(train=False)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def wires(side=5, up=5, coarse=7, num_sides=1, size=4):
  """Two examples of size x size pixels."""
  return Wires(
    sides=[draw(2, size, size, side) for _ in range(num_sides)],
    up=draw(2, size, size, up),
    coarse=draw(2, size // 2, size // 2, coarse),
    context=Context(),
  )


def join(skip, w, level=1, width=5, **rngs):
  """(parameters, joined feature)."""
  module = SKIPS[skip].join(layers(), level, width)
  variables = fill(module, w)
  y = jax.jit(functools.partial(module.apply, **rngs))(variables, w)
  return variables.get("params", {}), np.asarray(y)


def apply(weights, x):
  """A 1x1 convolution or a dense layer."""
  kernel = np.asarray(weights["kernel"])
  y = x @ kernel.reshape(kernel.shape[-2:])
  return y + weights["bias"] if "bias" in weights else y


def assert_close(got, expected):
  np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


# --- Joins --------------------------------------------------------------------


def test_concat_and_none():
  w = wires(num_sides=2)
  assert_close(join("concat", w)[1], np.concatenate([*w.sides, w.up], -1))
  assert_close(join("none", w)[1], w.up)


@pytest.mark.parametrize(
  ("skip", "op"), [("add", np.add), ("mul", np.multiply)]
)
def test_add_and_mul_project_what_comes_from_below_where_channels_differ(
  skip, op
):
  w = wires(num_sides=2)
  params, y = join(skip, w)
  assert not params
  assert_close(y, op(op(w.sides[0], w.sides[1]), w.up))
  w = wires(up=9)
  params, y = join(skip, w)
  assert_close(y, op(w.sides[0], apply(params["Conv_0"], w.up)))


def test_dup_shows_twice_what_is_known():
  w = wires()
  params, y = join("dup", w)
  assert not params
  assert_close(y, np.concatenate([w.up, w.up], -1))
  w = wires(up=9)
  params, y = join("dup", w)
  expected = np.concatenate([apply(params["Conv_0"], w.up), w.up], -1)
  assert_close(y, expected)
  assert y.shape == join("concat", w)[1].shape


def test_proj_and_scalar():
  w = wires(num_sides=2)
  params, y = join("proj", w)
  halves = [apply(params[f"Conv_{k}"], w.sides[k]) for k in range(2)]
  assert_close(y, np.concatenate([*halves, w.up], -1))
  params, y = join("scalar", w)
  gates = [sigmoid(params[f"a_{k}"]) for k in range(2)]
  scaled = [gate * x for gate, x in zip(gates, w.sides, strict=True)]
  assert_close(y, np.concatenate([*scaled, w.up], -1))


def test_zeros():
  w = wires()
  expected = np.concatenate([np.zeros_like(w.sides[0]), w.up], -1)
  assert_close(join("zeros", w)[1], expected)


def test_attention_of_oktay():
  w = wires()
  params, y = join("attn_oktay", w)
  x, theta = w.sides[0], np.asarray(params["Conv_0"]["kernel"])
  assert "bias" not in params["Conv_0"]
  hidden = np.zeros((2, 2, 2, 5))
  for i in range(2):
    for j in range(2):
      patch = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
      hidden[:, i, j] = np.einsum("bhwc,hwcd->bd", patch, theta)
  hidden = np.maximum(hidden + apply(params["Conv_1"], w.coarse), 0)
  alpha = sigmoid(apply(params["Conv_2"], hidden))
  alpha = blocks.LinearUp().apply({}, jnp.asarray(alpha, "float32"))
  gated = apply(params["Conv_3"], np.asarray(alpha) * x)
  assert_close(y, np.concatenate([gated, w.up], -1))
  # "Level 0 ungated".
  assert_close(join("attn_oktay", w, level=0)[1], join("concat", w)[1])


def test_attention_at_the_same_size():
  w = wires(side=6)
  params, y = join("attn_same", w)
  assert params["Conv_0"]["kernel"].shape[-1] == 3
  hidden = apply(params["Conv_0"], w.up) + apply(params["Conv_1"], w.sides[0])
  alpha = sigmoid(apply(params["Conv_2"], np.maximum(hidden, 0)))
  assert_close(y, np.concatenate([alpha * w.sides[0], w.up], -1))


def test_fusion_of_uctrans():
  w = wires(up=9)
  params, y = join("uctrans", w)
  x_mean, g_mean = (a.mean((1, 2)) for a in (w.sides[0], w.up))
  total = apply(params["Dense_0"], x_mean) + apply(params["Dense_1"], g_mean)
  gate = sigmoid(total / 2)[:, None, None]
  assert_close(y, np.concatenate([gate * w.sides[0], w.up], -1))


def standardized(matrix):
  return (matrix - matrix.mean()) / np.sqrt(matrix.var() + 1e-5)


def softmax(matrix):
  return special.softmax(matrix, axis=-1)


def test_recalibration_of_udtrans():
  """Tokens on a 2 x 2 grid, the decoder feature on 4 x 4: patches of 2."""
  w = wires(up=6)._replace(sides=[draw(2, 2, 2, 8)])
  params, y = join("udtrans", w)
  dense = [np.asarray(params[f"Dense_{i}"]["kernel"]) for i in range(4)]
  embed = np.asarray(params["Conv_0"]["kernel"])
  for b in range(2):
    d = np.stack(
      [
        np.einsum(
          "hwc,hwcd->d",
          w.up[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2],
          embed,
        )
        for i in range(2)
        for j in range(2)
      ]
    )
    d += np.asarray(params["Conv_0"]["bias"])
    tokens = w.sides[0][b].reshape(4, 8)
    query, key, value = d @ dense[0], tokens @ dense[1], tokens @ dense[2]
    probs = softmax(standardized(query.T @ key))
    o = (probs @ value.T).T @ dense[3]
    o = np.maximum(apply(params["Conv_1"], o), 0).reshape(2, 2, 5)
    o = o.repeat(2, 0).repeat(2, 1)
    o *= np.maximum(apply(params["Conv_2"], w.up[b]), 0)
    assert_close(y[b], np.concatenate([o, w.up[b]], -1))


# --- Noise and shuffle --------------------------------------------------------


def noise_of(ids, seed=0, level=1):
  x = np.zeros((len(ids), 2, 2, 3), np.float32)
  w = Wires([x], x, x, Context(id=jnp.asarray(ids)))
  rngs = {"rngs": {"noise": jax.random.key(seed)}}
  return join("noise", w, level=level, **rngs)[1][..., :3]


def test_noise_is_keyed_by_step_and_example():
  many, one = noise_of([4, 9, 7]), noise_of([9])
  np.testing.assert_array_equal(many[1], one[0])  # Whatever is around it.
  assert not np.allclose(many[0], many[1])
  assert not np.allclose(noise_of([9], seed=1), one)  # The step's key.
  draws = noise_of(np.arange(2000)).ravel()
  assert abs(draws.mean()) < 0.03 and abs(draws.std() - 1) < 0.03


def test_noise_in_use_is_one_fixed_draw():
  w = wires(side=3, up=3, coarse=3)
  first = join("noise", w)[1][..., :3]
  np.testing.assert_array_equal(first[0], first[1])
  other = w._replace(sides=[draw(2, 4, 4, 3)], context=Context(jnp.arange(2)))
  np.testing.assert_array_equal(join("noise", other)[1][..., :3], first)
  # Another wire, another draw: what a place of the decoder is called decides.
  module = SKIPS["noise"].join(layers(), 1, 3, name="skip_0_1")
  named = module.apply({}, w)[..., :3]
  assert not np.allclose(named, first)


def test_shuffle_takes_the_partner():
  x = draw(3, 2, 2, 4)
  w = Wires([x], x, x, Context(partner=jnp.array([2, 0, 1])))
  np.testing.assert_array_equal(join("shuffle", w)[1][..., :4], x[[2, 0, 1]])
  with pytest.raises(ValueError, match="needs another example"):
    join("shuffle", w._replace(context=Context()))


# --- Carries ------------------------------------------------------------------


def carry(skip, features, on=(True, True), **fields):
  module = SKIPS[skip].carry(layers(**fields), on, features[0].shape[-1])
  variables = fill(module, features)
  out = jax.jit(module.apply)(variables, features)
  return variables.get("params", {}), [np.asarray(x) for x in out]


def pyramid():
  return [draw(2, 8, 8, 4), draw(2, 4, 4, 6), draw(2, 2, 2, 8)]


def se(params, x):
  hidden = np.maximum(apply(params["Dense_0"], x.mean((1, 2))), 0)
  return x * sigmoid(apply(params["Dense_1"], hidden))[:, None, None]


def test_se_and_scse_with_few_channels():
  features = pyramid()
  params, out = carry("se", features)
  assert params["SqueezeExcite_0"]["Dense_0"]["kernel"].shape == (4, 1)
  for level in (0, 1):
    expected = se(params[f"SqueezeExcite_{level}"], features[level])
    assert_close(out[level], expected)
  params, out = carry("scse", features)
  for level in (0, 1):
    x = features[level]
    by_pixel = x * sigmoid(apply(params[f"Conv_{level}"], x))
    assert_close(out[level], se(params[f"SqueezeExcite_{level}"], x) + by_pixel)
  assert_close(out[2], features[2])


def test_respath_is_longer_where_the_gap_is_wider():
  params, _ = carry("respath", pyramid())
  # A 3x3 and a 1x1 kernel each time: twice at level 0, once at level 1.
  shapes = [params[f"Conv_{i}"]["kernel"].shape for i in range(6)]
  assert shapes == [
    *((3, 3, 4, 4), (1, 1, 4, 4)) * 2,
    *((3, 3, 6, 6), (1, 1, 6, 6)),
  ]
  assert "Conv_6" not in params


def test_respath_adds_a_wide_and_a_narrow_convolution():
  features = pyramid()
  params, out = carry("respath", features)
  for level, first in ((0, 0), (1, 4)):
    x = features[level]
    for i in range(first, first + 2 * (2 - level), 2):
      wide, narrow = params[f"Conv_{i}"], params[f"Conv_{i + 1}"]
      padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
      size, total = x.shape[1], wide["bias"] + apply(narrow, x)
      for a in range(3):
        for b in range(3):
          window = padded[:, a : a + size, b : b + size]
          total = total + window @ wide["kernel"][a, b]
      x = np.maximum(total, 0)
    np.testing.assert_allclose(out[level], x, atol=1e-4)


def test_levels_that_are_off_are_left_alone():
  for skip in ("se", "scse", "respath", "uctrans", "udtrans"):
    features = pyramid()
    _, out = carry(skip, features, on=(False, True))
    np.testing.assert_array_equal(out[0], features[0])
    assert not np.array_equal(out[1], features[1])
    params, out = carry(skip, features, on=(False, False))
    assert not params


def layer_norm(params, x):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]


def gelu(x):
  return x * special.ndtr(x)


def feed_forward(params, x):
  return apply(params["Dense_1"], gelu(apply(params["Dense_0"], x)))


def patches(params, x, patch):
  """One example [S, S, C] -> tokens [N, E], in row order."""
  kernel, n = np.asarray(params["kernel"]), x.shape[0] // patch
  rows = [
    np.einsum(
      "hwc,hwcd->d",
      x[i * patch : (i + 1) * patch, j * patch : (j + 1) * patch],
      kernel,
    )
    for i in range(n)
    for j in range(n)
  ]
  return np.stack(rows) + params["bias"]


class Numbered:
  """Parameters in the order in which a compact module made them."""

  def __init__(self, params):
    self.params, self.used = params, {}

  def next(self, kind):
    i = self.used.setdefault(kind, 0)
    self.used[kind] += 1
    return self.params[f"{kind}_{i}"]


def test_channel_transformer_of_uctrans():
  """The equations with loops over examples, layers, heads and levels."""
  features, heads = pyramid(), 4
  params, out = carry("uctrans", features)
  for b in range(2):
    numbered = Numbered(params)
    convs = [numbered.next("Conv") for _ in range(4)]
    tokens = [
      patches(convs[level], features[level][b], 2 ** (2 - level))
      for level in (0, 1)
    ]
    for _ in range(4):
      everything = np.concatenate(tokens, -1)
      everything = layer_norm(numbered.next("LayerNorm"), everything)
      c = everything.shape[-1]
      key = apply(numbered.next("Dense"), everything).reshape(-1, heads, c)
      value = apply(numbered.next("Dense"), everything).reshape(-1, heads, c)
      new = []
      for t in tokens:
        normed = layer_norm(numbered.next("LayerNorm"), t)
        query = apply(numbered.next("Dense"), normed)
        query = query.reshape(-1, heads, t.shape[-1])
        contexts = []
        for h in range(heads):
          scores = query[:, h].T @ key[:, h] / np.sqrt(c)
          contexts.append((softmax(standardized(scores)) @ value[:, h].T).T)
        t = t + apply(numbered.next("Dense"), np.mean(contexts, 0))
        normed = layer_norm(numbered.next("LayerNorm"), t)
        new.append(t + feed_forward(numbered.next("FeedForward"), normed))
      tokens = new
    for level, t in enumerate(tokens):
      t = layer_norm(numbered.next("LayerNorm"), t)
      t = np.maximum(apply(convs[2 + level], t), 0).reshape(2, 2, -1)
      patch = 2 ** (2 - level)
      spread = t.repeat(patch, 0).repeat(patch, 1)
      np.testing.assert_allclose(
        out[level][b], features[level][b] + spread, atol=2e-4
      )


def test_dual_attention_of_udtrans():
  features, heads = pyramid(), 4
  params, out = carry("udtrans", features)
  assert out[0].shape == out[1].shape == (2, 2, 2, 8)  # 2 x widths[0]
  for b in range(2):
    numbered = Numbered(params)
    tokens = [
      patches(numbered.next("Conv"), features[level][b], 2 ** (2 - level))
      for level in (0, 1)
    ]
    for _ in range(4):
      fused = np.concatenate(tokens, -1)
      fused = layer_norm(numbered.next("LayerNorm"), fused)
      query, key = (apply(numbered.next("Dense"), fused) for _ in range(2))
      probs = softmax(standardized(query.T @ key))
      fused = (probs @ apply(numbered.next("Dense"), fused).T).T
      fused = np.concatenate([fused[:, :8], fused[:, 8:]])  # As more tokens.
      key = apply(numbered.next("Dense"), fused).reshape(-1, heads, 2)
      value = apply(numbered.next("Dense"), fused).reshape(-1, heads, 2)
      new = []
      for t in tokens:
        normed = layer_norm(numbered.next("LayerNorm"), t)
        query = apply(numbered.next("Dense"), normed).reshape(-1, heads, 2)
        context = np.stack(
          [
            softmax(standardized(query[:, h] @ key[:, h].T)) @ value[:, h]
            for h in range(heads)
          ],
          axis=1,
        )
        t = t + apply(numbered.next("Dense"), context.reshape(t.shape))
        normed = layer_norm(numbered.next("LayerNorm"), t)
        new.append(t + feed_forward(numbered.next("FeedForward"), normed))
      tokens = new
    for level, t in enumerate(tokens):
      t = layer_norm(numbered.next("LayerNorm"), t)
      np.testing.assert_allclose(out[level][b].reshape(4, 8), t, atol=2e-4)


def test_reconstruct_commutes_with_spreading():
  """What saves the work: the published order gives the same."""
  x = draw(2, 3, 3, 4)

  def spread_first(self, x):
    y = blocks.nearest_up(x, 2)
    y = self.norm(4)(self.conv(4, 1)(y))
    return jax.nn.relu(y)

  class Both(blocks.nn.Module):
    first: bool

    @blocks.nn.compact
    def __call__(self, x):
      parts = layers(norm="instance")
      if self.first:
        return spread_first(parts, x)
      return skips.reconstruct(parts, x, 2)

  variables = fill(Both(True), x)
  assert_close(Both(False).apply(variables, x), Both(True).apply(variables, x))
