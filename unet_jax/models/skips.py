"""What a skip connection carries from the encoder to the decoder.

A skip has two halves, each a Module of a few lines, and one line in the table
at the foot. `carry` is what happens to the encoder's features, all levels at
once, before they travel; most skips have none. `join` is how, at one place of
the decoder, what arrives sideways (cropped to size) meets what comes from
below; it enters the convolutions. A level that is off has the join of "none".
"""

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax.models import blocks, probes
from unet_jax.precision import gate, layer_norm, widen


class Context(NamedTuple):
  """What the information controls need to know of the batch, and the probes.

  Attributes:
    id: int32 [B], example ids; they key the noise of skip="noise" in training.
    partner: int32 [B], index in the global batch of the example whose features
      skip="shuffle" takes: in training the next valid one, in evaluation the
      next example id, whose image the caller has appended to the batch, so
      that a score does not depend on the batch.
    ears: float [2, depth], 1, or 0 where nobody listens, whose gradient is that
      of `probes.overhear` at the joins of each level: sideways, and from below.
      The joins then also sow their `probes.energies`, as "energy".
    cut: what arrives in place of the skips' features.
  """

  id: jax.Array | None = None
  partner: jax.Array | None = None
  ears: jax.Array | None = None
  cut: probes.Cut | None = None


NO_CONTEXT = Context()


class Wires(NamedTuple):
  """What meets at one place of the decoder.

  Attributes:
    sides: [B, *S, C_k], what arrives sideways. One in the plain decoder; all
      nodes to the left in the nested one, the encoder's first; the encoder's
      features at this level and above in the full-scale one.
    up: [B, *S, C], from below, upsampled.
    coarse: [B, *(S / 2), C'], from below, as it was (S / 2 of pooled axes).
    context: of the batch.
  """

  sides: Sequence[jax.Array]
  up: jax.Array
  coarse: jax.Array
  context: Context


# --- Joins --------------------------------------------------------------------


class Join(nn.Module):
  """[x; u] along channels, the paper's skip (Ronneberger et al. 2015).

  Most other joins are [f(x_1), ..., f(x_n); u], and f their `side`; others
  have other `terms`, or another way to `merge` them. `width` are the channels
  of the level's encoder feature; `axis_name` is that of `pmap`.
  """

  layers: blocks.Layers
  level: int
  width: int
  axis_name: str | None = None

  @nn.compact
  def __call__(self, wires: Wires) -> jax.Array:
    sides, up = self.terms(wires)
    if (ears := wires.context.ears) is not None:
      found = probes.energies(sides, up, self.level, ears)
      self.sow("energy", "found", found)
    return self.merge(sides, up)

  def terms(self, wires: Wires) -> tuple[Sequence[jax.Array], jax.Array]:
    """What is joined: sideways, and from below."""
    sides = [self.side(k, x, wires) for k, x in enumerate(wires.sides)]
    return sides, wires.up

  def merge(self, sides: Sequence[jax.Array], up: jax.Array) -> jax.Array:
    """The joined feature."""
    return jnp.concatenate([*sides, up], axis=-1)

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    """What becomes of x = wires.sides[k]."""
    return x

  def gated(self, x: jax.Array, by: jax.Array) -> jax.Array:
    """The product with a gate, which `inspect.explain` sees."""
    self.sow("intermediates", "gate", by)
    return gate(x, by)

  def up_like(self, x: jax.Array, wires: Wires) -> jax.Array:
    """W u with the channels of x; W is 1x1, and absent where they are equal."""
    if wires.up.shape[-1] == x.shape[-1]:
      return wires.up
    return self.layers.conv(x.shape[-1], 1)(wires.up)


class Nothing(Join):
  """u: the wire is absent, the decoder sees only what came from below."""

  def terms(self, wires: Wires) -> tuple[Sequence[jax.Array], jax.Array]:
    return [], wires.up

  def merge(self, sides: Sequence[jax.Array], up: jax.Array) -> jax.Array:
    return up


class Add(Join):
  """x + W u (FCN, LinkNet), W as in `Join.up_like`."""

  def terms(self, wires: Wires) -> tuple[Sequence[jax.Array], jax.Array]:
    return wires.sides, self.up_like(wires.sides[0], wires)

  def merge(self, sides: Sequence[jax.Array], up: jax.Array) -> jax.Array:
    return sum(sides, up)


class Multiply(Add):
  """x * W u, elementwise (MONAI's SkipMode.MUL), W as in `Join.up_like`."""

  def merge(self, sides: Sequence[jax.Array], up: jax.Array) -> jax.Array:
    return math.prod(sides, start=up)


class Project(Join):
  """[W x; u] with W 1x1 to half of x's channels (DeepLabv3+ style)."""

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    return self.layers.conv(max(x.shape[-1] // 2, 1), 1)(x)


class Scalar(Join):
  """[sigma(a) x; u], a learned from 0: one readable weight a wire."""

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    a = self.param(f"a_{k}", nn.initializers.zeros, ())
    return self.gated(x, nn.sigmoid(a))


class AttentionOktay(Join):
  """Attention gate on a half-size grid, gated by the coarser decoder feature.

  alpha = sigma(psi relu(theta x + phi g)), theta 2-wide with stride 2 and no
  bias, phi and psi 1x1, as many hidden channels as x has; alpha is upsampled
  linearly, and norm(W(alpha x)) is joined to u. Level 0 is not gated.

  Reference: Oktay et al. 2018, https://arxiv.org/abs/1804.03999, equations 1
    and 2; as in the authors' Attention-Gated-Networks, grid_attention_layer.py.
  """

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    if self.level == 0:
      return x
    layers, features = self.layers, x.shape[-1]
    # 1 along an axis that the pooling left out.
    sizes = zip(x.shape[1:-1], wires.coarse.shape[1:-1], strict=True)
    factor = tuple(1 if fine == coarse else 2 for fine, coarse in sizes)
    theta = layers.conv(features, factor, strides=factor, use_bias=False)(x)
    y = nn.relu(theta + layers.conv(features, 1)(wires.coarse))
    alpha = blocks.LinearUp(factor=factor)(nn.sigmoid(layers.conv(1, 1)(y)))
    alpha = blocks.pad_to(alpha, x.shape[1:-1], "edge")
    return layers.norm(features)(layers.conv(features, 1)(self.gated(x, alpha)))


class AttentionSame(Join):
  """[alpha x; u] with a gate of the skip's own size, as MONAI's, not Oktay's.

  alpha = sigma(norm psi relu(norm W_g u + norm W_x x)), all 1x1, half of x's
  channels hidden.
  """

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    def conv_norm(x: jax.Array, features: int) -> jax.Array:
      return self.layers.norm(features)(self.layers.conv(features, 1)(x))

    hidden = max(x.shape[-1] // 2, 1)
    y = nn.relu(conv_norm(wires.up, hidden) + conv_norm(x, hidden))
    return self.gated(x, nn.sigmoid(conv_norm(y, 1)))


class CrossAttention(Join):
  """[sigma((L_x mean x + L_g mean u) / 2) x; u]: UCTransNet's fusion (CCA).

  Reference: Wang et al. 2022, https://arxiv.org/abs/2109.04335. The authors'
    code puts a ReLU after the gate, which does nothing to what a ReLU made.
  """

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    y = blocks.dense(x.shape[-1])(blocks.spatial_mean(x))
    y += blocks.dense(x.shape[-1])(blocks.spatial_mean(wires.up))
    return self.gated(x, nn.sigmoid(y / 2))


class RecalibrationAttention(Join):
  """UDTransNet's decoder-guided recalibration (DRA, the channel-wise form).

  With the tokens t of `DualAttention` and d the decoder feature u cut into as
  many patches, Q = W_q d, K = W_k t, V = W_v t:

    o = Up(relu(norm(R W_o (softmax(norm(Q^T K)) V^T)^T))) * relu(norm(W u))

  and [o; u]; softmax over K's channels, the norm in it over the whole matrix.

  Reference: Wang et al. 2024, https://arxiv.org/abs/2312.15182; the authors'
    UDTransNet.py, DRA_C.
  """

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    layers, up, grid = self.layers, wires.up, x.shape[1:-1]
    patch = up.shape[1] // grid[0]
    d = layers.conv(up.shape[-1], patch, strides=patch)(up)
    query, key, value = (linear(flatten(y), self.width) for y in (d, x, x))
    o = blocks.attend("bnq,bnk->bqk", query, key, value, normed=True)
    o = linear(o, self.width)
    o = reconstruct(layers, o.reshape(-1, *grid, self.width), patch)
    mask = layers.norm(self.width)(layers.conv(self.width, 1)(up))
    return o * nn.relu(mask)


# --- Information controls: the capacity of "concat", without the information --


class Zeros(Join):
  """[0; u]: what the skip adds in parameters alone."""

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    return jnp.zeros_like(x)


class Noise(Join):
  """[e; u], e from N(0, 1) anew in each step.

  Keyed by (seed, step, example id). Without a "noise" rng, in evaluation and
  prediction, it is one fixed draw a wire, the same for every example.
  """

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    place = zlib.crc32((self.name or "").encode())
    ids, key = jnp.zeros(x.shape[0], jnp.int32), jax.random.key(place)
    if self.has_rng("noise"):
      ids, key = wires.context.id, self.make_rng("noise")
    key, size = jax.random.fold_in(key, k), math.prod(x.shape[1:])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    # Flat: XLA compiles a shaped draw for seconds. Wide: bfloat16's are coarse.
    draw = jax.vmap(lambda key: jax.random.normal(key, (size,), widen(x).dtype))
    return draw(keys).reshape(x.shape).astype(x.dtype)


class Shuffle(Join):
  """[x of another example; u]: of `Context.partner`, without a gradient.

  A single image has no partner: ValueError.
  """

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    if self.is_initializing():
      return x
    if wires.context.partner is None:
      raise ValueError("skip='shuffle' needs another example: none given")
    x = jax.lax.stop_gradient(x)
    if self.axis_name is not None:
      x = jax.lax.all_gather(x, self.axis_name, tiled=True)
    return x[wires.context.partner]


class Duplicate(Join):
  """[W u; u], W as in `Join.up_like`: the capacity, filled with the known."""

  def side(self, k: int, x: jax.Array, wires: Wires) -> jax.Array:
    return self.up_like(x, wires)


# --- Carries ------------------------------------------------------------------


class Carry(nn.Module):
  """Maps the features of all levels to those that travel.

  Most treat each level by itself, by their `change`. `on` says which levels
  travel; `width` are the channels of level 0.
  """

  layers: blocks.Layers
  on: tuple[bool, ...]
  width: int

  @nn.compact
  def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
    out = list(features)
    for level, on in enumerate(self.on):
      if on:
        out[level] = self.change(out[level], len(self.on) - level)
    return out

  def change(self, x: jax.Array, height: int) -> jax.Array:
    """What becomes of x, `height` levels above the bottleneck."""
    return x


class ResPath(Carry):
  """x <- act(norm(3x3 x) + norm(1x1 x)), depth - level times.

  Reference: Ibtehaz and Rahman 2020 (MultiResUNet),
    https://arxiv.org/abs/1902.04049, figure 4: 4, 3, 2, 1 times at depth 4.
  """

  def change(self, x: jax.Array, height: int) -> jax.Array:
    layers, c = self.layers, x.shape[-1]
    for _ in range(height):
      wide = layers.norm(c)(layers.conv(c, 3, padding="SAME")(x))
      x = layers.activation(wide + layers.norm(c)(layers.conv(c, 1)(x)))
    return x


class Squeeze(Carry):
  """x gated by channel, see `blocks.SqueezeExcite`."""

  def change(self, x: jax.Array, height: int) -> jax.Array:
    return blocks.SqueezeExcite()(x)


class SpatialSqueeze(Carry):
  """The sum of x gated by channel and x gated by pixel, sigma(w . x) x.

  Reference: Roy et al. 2018 (scSE), https://arxiv.org/abs/1803.02579.
  """

  def change(self, x: jax.Array, height: int) -> jax.Array:
    by_pixel = gate(x, nn.sigmoid(self.layers.conv(1, 1)(x)))
    return blocks.SqueezeExcite()(x) + by_pixel


# --- Transformers over the tokens of all levels -------------------------------


def linear(x: jax.Array, features: int) -> jax.Array:
  """W x."""
  return blocks.dense(features, use_bias=False)(x)


def flatten(x: jax.Array) -> jax.Array:
  """[B, *S, C] -> [B, N, C]."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def reconstruct(layers: blocks.Layers, x: jax.Array, patch: int) -> jax.Array:
  """relu(norm(1x1 x)), then every token spread over its patch.

  The published codes spread first: patch^dims times the work, and all but equal
  (the running variance is that of fewer values).
  """
  x = layers.norm(x.shape[-1])(layers.conv(x.shape[-1], 1)(x))
  return blocks.nearest_up(nn.relu(x), patch)


class ChannelTransformer(Carry):
  """UCTransNet's channel-wise cross attention over all levels (CCT).

  Tokens T_l are patches of level l, 2^(depth - l) wide: one a bottleneck pixel.
  In each layer and for each head, with K and V from the norm of all levels'
  tokens side by side, C channels in all:

    T_l <- T_l + W_o mean_heads(softmax(norm(Q_l^T K / sqrt C)) V^T)^T
    T_l <- T_l + W_2 gelu(W_1 norm T_l)

  Then x_l + Up(relu(norm(W T_l))). The softmax is over the C channels, the norm
  inside it over a head's whole matrix. A level that is off gives no tokens. Of
  the authors' code two things are left out: position embeddings, which fix the
  image size, and dropout at 0.1.

  Reference: Wang et al. 2022, https://arxiv.org/abs/2109.04335; the authors'
    CTrans.py.
  """

  num_layers: int = 4
  num_heads: int = 4

  @nn.compact
  def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
    out, grids = list(features), {}
    for level, on in enumerate(self.on):
      if on:
        grids[level] = self.embed(features[level], len(self.on) - level)
    tokens = [flatten(grid) for grid in grids.values()]
    for _ in range(self.num_layers if tokens else 0):
      tokens = self.layer(tokens)
    for t, (level, grid) in zip(tokens, grids.items(), strict=True):
      t = layer_norm()(t).reshape(grid.shape)
      out[level] = self.leave(features[level], t, len(self.on) - level)
    return out

  def embed(self, x: jax.Array, height: int) -> jax.Array:
    return self.layers.conv(x.shape[-1], 2**height, strides=2**height)(x)

  def leave(self, x: jax.Array, t: jax.Array, height: int) -> jax.Array:
    """What travels instead of x, given its tokens t."""
    return x + reconstruct(self.layers, t, 2**height)

  def layer(self, tokens: list[jax.Array]) -> list[jax.Array]:
    """One layer of the equations above."""

    def heads(x: jax.Array) -> jax.Array:  # Every head sees all channels.
      y = linear(x, self.num_heads * x.shape[-1])
      return y.reshape(*x.shape[:-1], self.num_heads, x.shape[-1])

    everything = layer_norm()(jnp.concatenate(tokens, -1))
    key, value = heads(everything), heads(everything)
    out = []
    for t in tokens:
      query = heads(layer_norm()(t)) / math.sqrt(everything.shape[-1])
      y = blocks.attend("bnhq,bnhk->bhqk", query, key, value, normed=True)
      t += linear(y.mean(2), t.shape[-1])
      out.append(t + blocks.FeedForward(expand=4)(layer_norm()(t)))
    return out


class DualAttention(ChannelTransformer):
  """UDTransNet's dual attention (DAT): what travels are the tokens themselves.

  The patches of `ChannelTransformer`, with 2 x widths[0] channels a level (128
  in the paper). In each layer first channel fusion of all levels side by side,
  M = (softmax(norm(Q^T K)) V^T)^T; then each level attends to the levels'
  parts of M as so many more tokens, T_l <- T_l + W_o softmax(norm(Q_l K^T)) V,
  and a feed-forward layer twice as wide follows. Left out as there.

  Reference: Wang et al. 2024, https://arxiv.org/abs/2312.15182; the authors'
    DAT.py.
  """

  def embed(self, x: jax.Array, height: int) -> jax.Array:
    # A multiple of the heads.
    features = self.num_heads * max(2 * self.width // self.num_heads, 1)
    return self.layers.conv(features, 2**height, strides=2**height)(x)

  def leave(self, x: jax.Array, t: jax.Array, height: int) -> jax.Array:
    return t

  def layer(self, tokens: list[jax.Array]) -> list[jax.Array]:
    def heads(x: jax.Array) -> jax.Array:
      return linear(x, x.shape[-1]).reshape(*x.shape[:-1], self.num_heads, -1)

    fused = layer_norm()(jnp.concatenate(tokens, -1))
    query, key, value = (linear(fused, fused.shape[-1]) for _ in range(3))
    fused = blocks.attend("bnq,bnk->bqk", query, key, value, normed=True)
    fused = jnp.concatenate(jnp.split(fused, len(tokens), -1), 1)
    key, value = heads(fused), heads(fused)
    out = []
    for t in tokens:
      query = heads(layer_norm()(t))
      y = blocks.attend("bnhc,bmhc->bhnm", query, key, value, normed=True)
      t += linear(y.reshape(t.shape), t.shape[-1])
      out.append(t + blocks.FeedForward(expand=2)(layer_norm()(t)))
    return out


# --- The table: the choices of schema.ModelConfig.skip ------------------------


class Skip(NamedTuple):
  """The two halves of a skip."""

  join: type[Join]
  carry: type[Carry] | None = None


SKIPS = {
  "none": Skip(Nothing),
  "concat": Skip(Join),
  "add": Skip(Add),
  "mul": Skip(Multiply),
  "proj": Skip(Project),
  "scalar": Skip(Scalar),
  "respath": Skip(Join, ResPath),
  "se": Skip(Join, Squeeze),
  "scse": Skip(Join, SpatialSqueeze),
  "attn_oktay": Skip(AttentionOktay),
  "attn_same": Skip(AttentionSame),
  "uctrans": Skip(CrossAttention, ChannelTransformer),
  "udtrans": Skip(RecalibrationAttention, DualAttention),
  "zeros": Skip(Zeros),
  "noise": Skip(Noise),
  "shuffle": Skip(Shuffle),
  "dup": Skip(Duplicate),
}
