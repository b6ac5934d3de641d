"""The U-Net: contract, expand, and join what the two paths know."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax import conv, geometry, precision, presets, resample
from unet_jax.models import blocks, decoders, embedding
from unet_jax.models.skips import NO_CONTEXT, Context


class Outputs(NamedTuple):
  """Everything that a loss may look at.

  Attributes:
    logits: [B, *S', K] each, S' that of the first: the prediction; with deep
      supervision others follow, coarser and coarser.
    presence: [B, F], with `classification_guided` the logits of "the example
      has class k" for F foreground classes; else None.
  """

  logits: tuple[jax.Array, ...]
  presence: jax.Array | None


class UNet(nn.Module):
  """An encoder-decoder with skips; fields as in `schema.ModelConfig`.

  Attributes:
    num_classes: channels of the logits; 1 is one sigmoid logit.
    num_words, num_characters: rows of the embeddings of tokens.
    prune: columns of a nested decoder that are built; 0 = all.
    axis_name: the `pmap` axis over which batch norm averages, or None.
    shards: devices over which `jit` splits the batch, for norm_scope="device".
  """

  num_classes: int
  dims: int = 2
  widths: tuple[int, ...] = (16, 32, 64, 128)
  padding: str = "same"
  odd_size: str = "pad_input"
  embedding: str = "none"
  num_words: int = 0
  num_characters: int = 0
  word_width: int = 128
  character_width: int = 32
  character_features: int = 64
  word_dropout: float = 0.0
  embedding_dropout: float = 0.0
  norm: str = "batch"
  norm_scope: str = "global"
  norm_momentum: float = 0.9
  norm_groups: int = 8
  dtype: str = "float32"
  remat: str = "none"
  conv: str = "fast"
  activation: str = "relu"
  leaky_slope: float = 0.01
  bias: bool = True
  residual: bool = False
  stochastic_depth: float = 0.0
  squeeze_excite: bool = False
  dropout: float = 0.0
  block_dropout: float = 0.0
  pool: str = "max"
  pool_axes: tuple[str, ...] = ()
  bottleneck: str = "conv"
  bottleneck_layers: int = 2
  bottleneck_heads: int = 4
  up: str = "transpose"
  decoder: str = "plain"
  narrow_decoder: bool = False
  skip: str = "concat"
  skip_levels: tuple[bool, ...] = ()
  head_kernel: int = 1
  deep_supervision: bool = False
  classification_guided: bool = False
  prune: int = 0
  axis_name: str | None = None
  shards: int = 1

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    train: bool = False,
    drop: bool | None = None,
    context: Context = NO_CONTEXT,
    every_output: bool = False,
  ) -> jax.Array | Outputs:
    """Maps images to logits.

    Args:
      x: [B, *S, C], every S one that `geometry.is_legal` accepts; with an
        embedding [B, T, 1 + M], ids as `embedding.TokenEmbedding` takes them.
      train: use the batch's own statistics (and update the running ones) and
        drop activations; needs `mutable=["batch_stats"]` and a "dropout" rng,
        with skip="noise" also a "noise" rng.
      drop: whether to drop activations; None = as `train` says.
      context: what skip="noise" and "shuffle" need to know of the batch.
      every_output: return `Outputs` in place of its first logits.

    Returns:
      Logits [B, *S', num_classes] of `geometry.output_size`, at least float32.

    Raises:
      ValueError: wrong rank or illegal size; names the nearest legal sizes.
    """
    drop = train if drop is None else drop
    depth = len(self.widths) - 1
    if x.ndim != self.dims + 2:
      raise ValueError(f"input {x.shape}: not [B, *S, C] of dims={self.dims}")
    if (self.skip, self.decoder) == ("shuffle", "nested"):
      raise ValueError("the nodes between bring the example's features back")
    for axis, size in enumerate(x.shape[1:-1]):
      rule = geometry.size_rule(self.padding, self.odd_size)
      halved = sum(factor[axis] > 1 for factor in self._factors())
      geometry.output_size(size, halved, rule)

    x, hide = self._embed(x, train)
    layers = self._layers(train, hide, drop)
    x, features = jnp.asarray(x, precision.DTYPES[self.dtype]), []

    def descend(self: UNet, x: jax.Array, level: int) -> jax.Array:
      if level:
        x = self._pool(x, layers, level)
      return layers.block((self.widths[level],) * 2, f"encoder_{level}")(x)

    for level in range(depth + 1):
      x = layers.level(self, functools.partial(descend, level=level))(x)
      if level == depth and self.bottleneck == "transformer":
        sizes = (self.bottleneck_layers, self.bottleneck_heads)
        x = blocks.Transformer(*sizes, name="transformer")(x)
      if level >= depth - 1:  # The end of the contracting path.
        x = nn.Dropout(self.dropout, deterministic=not drop)(x)
      features.append(x)

    make, on = decoders.DECODERS[self.decoder], self.skip_levels
    fields = (self.widths, self.up, self.skip, on or (True,) * depth)
    fields += (self.odd_size, self.narrow_decoder, self.prune, self.axis_name)
    fields += (self._factors() if self.pool_axes else (),)
    decoder = make(layers, *fields, name="decoder")
    logits, presence = self._read_out(decoder(features, context), layers), None
    if self.classification_guided:
      presence = self._presence(features[-1], layers, train)
      if not train:
        logits = [_gate(y, presence) for y in logits]
    return Outputs(tuple(logits), presence) if every_output else logits[0]

  def _embed(
    self, x: jax.Array, train: bool
  ) -> tuple[jax.Array, precision.Layer | None]:
    """Features of tokens, and what hides the padding behind them."""
    if self.embedding == "none":
      return x, None
    embed = embedding.TokenEmbedding(
      *(self.embedding, self.num_words, self.num_characters),
      *(self.word_width, self.character_width, self.character_features),
      *(self.word_dropout, self.embedding_dropout),
      name="embed",
    )
    return embed(x, train), embedding.make_hide(x[..., 0] > 0)

  def _layers(
    self,
    train: bool,
    hide: precision.Layer | None = None,
    drop: bool = False,
  ) -> blocks.Layers:
    """All that the parts are made of, bound to the fields."""

    def make_conv(
      features: int,
      kernel: resample.Factor,
      strides: resample.Factor = 1,
      seam: int = 0,
      **fields: Any,
    ) -> precision.Layer:
      wide, form = kernel == 3, conv.FORMS[self.conv]
      # Before a norm, where batch norm takes the bias out again: its gradient
      # would be rounding alone, and cost a pass over the data.
      still = train and wide and "use_bias" not in fields
      still = still and self.norm == "batch"
      defaults = {
        "padding": self.padding.upper() if wide else "VALID",
        "use_bias": self.bias if wide else True,
        "kernel_init": blocks.he_normal,
        "promote_dtype": functools.partial(precision.promote, still=still),
        "conv_general_dilated": functools.partial(form, seam=seam),
      }
      window, steps = (
        resample.each_axis(size, self.dims) for size in (kernel, strides)
      )
      layer = nn.Conv(features, window, steps, **{**defaults, **fields})
      layer = precision.follow(layer)
      return layer if hide is None else lambda x: layer(hide(x))

    norm = blocks.make_norm(
      *(self.norm, train, self.norm_momentum, self.norm_groups),
      axis_name=self.axis_name,
      per_device=self.norm_scope == "device",
      shards=self.shards,
    )
    activate = blocks.ACTIVATIONS[self.activation](self.leaky_slope)
    activation = activate if hide is None else lambda x: hide(activate(x))
    dropout = functools.partial(
      nn.Dropout, self.block_dropout, deterministic=not drop
    )
    drop_branch = functools.partial(
      blocks.DropBranch, self.stochastic_depth, deterministic=not train
    )
    return blocks.Layers(
      *(make_conv, norm, activation, dropout, drop_branch),
      *(self.residual, self.squeeze_excite, self.remat),
    )

  def _factors(self) -> tuple[tuple[int, ...], ...]:
    depth = len(self.widths) - 1
    return geometry.pool_factors(self.pool_axes, self.dims, depth)

  def _pool(self, x: jax.Array, layers: blocks.Layers, level: int) -> jax.Array:
    """From the level above to `level`."""
    factor = self._factors()[level - 1]
    if self.pool == "max":
      return resample.max_pool(x, factor)
    name = f"pool_{level}"
    return layers.conv(x.shape[-1], factor, strides=factor, name=name)(x)

  def _read_out(
    self, outputs: Sequence[jax.Array], layers: blocks.Layers
  ) -> list[jax.Array]:
    """Logits of the outputs, enlarged linearly to the size of the first.

    All centres coincide, so valid padding's larger maps are cropped.
    """
    logits, spatial = [], outputs[0].shape[1:-1]
    # Counted from the whole network's prediction: pruning finds its own.
    skipped = len(self.widths) - 1 - self.prune if self.prune else 0
    for k, x in enumerate(outputs if self.deep_supervision else outputs[:1]):
      name = f"head_{k + skipped}" if k + skipped else "head"
      shape = (self.num_classes, self.head_kernel)
      y = layers.conv(*shape, padding="SAME", use_bias=True, name=name)(x)
      y = precision.widen(y)
      if self.decoder != "nested" and k:
        factor = geometry.level_factor(self._factors(), 0, k)
        y = blocks.LinearUp(factor=factor)(y)
      y = blocks.crop_to(y, spatial)
      logits.append(blocks.pad_to(y, spatial, "edge"))
    return logits

  def _presence(
    self, x: jax.Array, layers: blocks.Layers, train: bool
  ) -> jax.Array:
    """Which foreground classes the example has: 1x1 at the bottom, then max.

    Reference: Huang et al. 2020, https://arxiv.org/abs/2004.08790, section 2.3:
      dropout, 1x1 convolution, max-pooling, sigmoid; there for one organ.
    """
    x = nn.Dropout(0.5, deterministic=not train)(x)
    has = layers.conv(max(self.num_classes - 1, 1), 1, name="presence")
    return jnp.max(precision.widen(has(x)), axis=tuple(range(1, x.ndim - 1)))


def _gate(logits: jax.Array, presence: jax.Array) -> jax.Array:
  """Takes absent classes (presence logit < 0) out of the prediction.

  The paper multiplies logits by 0 or 1, which leaves a probability of 1/2. Here
  they are reflected about the pixel's smallest logit, a single one about 0.
  """
  absent = presence < 0
  absent = absent.reshape(-1, *(1,) * (logits.ndim - 2), absent.shape[-1])
  if logits.shape[-1] == 1:
    return jnp.where(absent, -jnp.abs(logits), logits)
  reflected = 2 * jnp.min(logits, axis=-1, keepdims=True) - logits[..., 1:]
  foreground = jnp.where(absent, reflected, logits[..., 1:])
  return jnp.concatenate([logits[..., :1], foreground], axis=-1)


def build_model(*, num_classes: int, preset: str = "", **fields: Any) -> UNet:
  """A U-Net from plain values; a preset overrules the fields it names.

  Example: `build_model(num_classes=2, preset="unet2015")` is the paper's
  network, 31,030,658 parameters for one input channel.
  """
  table = dict(presets.PRESETS[preset]) if preset else {}
  return UNet(num_classes=num_classes, **{**fields, **table})
