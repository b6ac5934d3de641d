"""The parts of a U-Net, for 1, 2 and 3 spatial axes: [B, *S, C]."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax import batch_norm, conv, resample
from unet_jax.precision import (
  Layer,
  dot_general,
  follow,
  gate,
  layer_norm,
  promote,
  widen,
)

# Channels to one in a squeeze-and-excitation (Hu et al. 2018: 16).
SQUEEZE = 16

Maker = Callable[..., Layer]


def he_normal(
  key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32
) -> jax.Array:
  """Kernels from N(0, 2 / fan_in), not truncated; fan_in = taps x channels in.

  Equal in distribution to `variance_scaling(2.0, "fan_in", "normal")`, but
  drawn flat: XLA compiles a small shaped draw for seconds.

  Reference: He et al. 2015, https://arxiv.org/abs/1502.01852, equation 10; as
    Ronneberger et al. 2015, section 3, ask for.
  """
  std = math.sqrt(2.0 / math.prod(shape[:-1]))
  return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)


def dense(features: int, **fields: Any) -> Layer:
  """W x + b, on the last axis."""
  fields = {
    "kernel_init": he_normal,
    "promote_dtype": promote,
    "dot_general": dot_general,
    **fields,
  }
  return follow(nn.Dense(features, **fields))


@dataclasses.dataclass(frozen=True)
class Layers:
  """What all parts are made of: none knows rank, padding, norm or mode.

  Attributes:
    conv: `conv(features, kernel, strides=1, padding=..., use_bias=...)`; 3-wide
      convolutions default to the network's padding and bias, others to "VALID"
      (what a 1-wide and a patch convolution need) and a bias. `seam=...` says
      after how many channels of the input the second of two joined arrays
      starts: then, on TPU, their concatenation is never written.
    norm: `norm(features)`, the norm of a tensor with so many channels.
    activation: elementwise, after every norm.
    dropout, drop_branch, residual, squeeze_excite: of each `ConvBlock`.
    remat: as in `schema.ModelConfig`.
  """

  conv: Maker
  norm: Maker
  activation: Layer
  dropout: Maker
  drop_branch: Maker
  residual: bool = False
  squeeze_excite: bool = False
  remat: str = "none"

  def block(
    self, widths: tuple[int, ...], name: str, seam: int = 0
  ) -> "ConvBlock":
    """A `ConvBlock`, whose inside is computed again where remat says so."""
    kind = nn.remat(ConvBlock) if self.remat == "block" else ConvBlock
    return kind(widths, self, seam, name=name)

  def level(self, module: nn.Module, compute: Callable[..., Any]) -> Layer:
    """compute(module, ...), computed again where remat="level"."""
    if self.remat == "level":
      compute = nn.remat(compute)
    return functools.partial(compute, module)


class ConvBlock(nn.Module):
  """3-wide convolutions to `widths` channels, each with norm and activation.

  With `layers.residual` the input, through a 1-wide convolution where channels
  differ, is added before the last activation: the short skip of Drozdzal et al.
  2016, https://arxiv.org/abs/1608.04117. `seam` of the input is as in `Layers`.
  """

  widths: tuple[int, ...]
  layers: Layers
  seam: int = 0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    layers, last, y = self.layers, len(self.widths) - 1, x
    for i, width in enumerate(self.widths):
      conv_3 = layers.conv(width, 3, seam=0 if i else self.seam)
      y = layers.norm(width)(conv_3(y))
      if i < last:
        y = layers.dropout()(layers.activation(y))
    y = y if layers.residual else layers.activation(y)
    if layers.squeeze_excite:
      y = SqueezeExcite()(y)
    if layers.residual:
      x = crop_to(x, y.shape[1:-1])
      if x.shape[-1] != width:
        x = layers.conv(width, 1, name="shortcut")(x)
      y = layers.activation(x + layers.drop_branch()(y))
    return y


class DropBranch(nn.Module):
  """Stochastic depth: y of each example is 0 with probability `rate`.

  Else y / (1 - rate), where the paper multiplies by 1 - rate after training.
  One rate for all blocks: the paper's uniform rule.

  Reference: Huang et al. 2016, https://arxiv.org/abs/1603.09382, section 3.
  """

  rate: float
  deterministic: bool

  @nn.compact
  def __call__(self, y: jax.Array) -> jax.Array:
    whole = tuple(range(1, y.ndim))
    return nn.Dropout(self.rate, whole, self.deterministic)(y)


class SqueezeExcite(nn.Module):
  """x sigma(W2 relu(W1 mean(x))), with at least one hidden unit.

  Reference: Hu et al. 2018, https://arxiv.org/abs/1709.01507.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features = x.shape[-1]
    y = nn.relu(dense(max(features // SQUEEZE, 1))(spatial_mean(x)))
    return gate(x, nn.sigmoid(dense(features)(y)))


class Transformer(nn.Module):
  """Pre-norm self-attention layers over all pixels, as at TransUNet's bottom.

  No position embedding, so that any size is accepted. Memory grows with the
  square of the number of pixels.

  Reference: Chen et al. 2021, https://arxiv.org/abs/2102.04306, equations 2, 3.
  """

  num_layers: int
  num_heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, c = x.shape, x.shape[-1]
    x = x.reshape(shape[0], -1, c)
    heads = (*x.shape[:2], self.num_heads, -1)
    for _ in range(self.num_layers):
      y = layer_norm()(x)
      query, key, value = (dense(c)(y).reshape(heads) for _ in range(3))
      query *= math.sqrt(self.num_heads / c)
      y = attend("bqhc,bkhc->bhqk", query, key, value, normed=False)
      x += dense(c)(y.reshape(x.shape))
      x += FeedForward(expand=4)(layer_norm()(x))
    return layer_norm()(x).reshape(shape)


def attend(
  form: str, query: jax.Array, key: jax.Array, value: jax.Array, normed: bool
) -> jax.Array:
  """softmax(Q K) V; `form` is the einsum of Q, with the result's axes, and K.

  With `normed` Q K is brought to mean 0 and variance 1 over its last two axes.
  """
  q, k, scores = form.replace("->", ",").split(",")
  x = widen(jnp.einsum(form, query, key))
  if normed:
    mean, var = (f(x, (-2, -1), keepdims=True) for f in (jnp.mean, jnp.var))
    x = (x - mean) * jax.lax.rsqrt(var + 1e-5)
  probs = nn.softmax(x).astype(value.dtype)
  return jnp.einsum(f"{scores},{k}->{q}", probs, value)


class FeedForward(nn.Module):
  """A transformer's pointwise network: W2 gelu(W1 x), `expand` times wider."""

  expand: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.gelu(dense(self.expand * x.shape[-1])(x), approximate=False)
    return dense(x.shape[-1])(y)


# --- Norms --------------------------------------------------------------------


def make_norm(
  name: str, train: bool, momentum: float, groups: int, **devices: Any
) -> Maker:
  """Binds a norm to everything but the channels of what it normalises.

  `devices` are the fields of `BatchNorm` that speak of them. Group norm takes
  the most groups that divide both `groups` and the channels.
  """
  exact = {"epsilon": 1e-5, "use_fast_variance": False}  # As in BatchNorm.
  norms = {
    "none": lambda features: lambda x: x,
    "batch": lambda features: batch_norm.BatchNorm(
      not train, momentum, **devices
    ),
    "group": lambda n: nn.GroupNorm(math.gcd(groups, n), **exact),
    "instance": lambda features: nn.InstanceNorm(**exact),
  }
  return lambda features: follow(norms[name](features))


# --- Sizes --------------------------------------------------------------------


def spatial_mean(x: jax.Array) -> jax.Array:
  """Mean over all pixels: [B, *S, C] -> [B, 1, ..., C]."""
  return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=True)


def crop_to(x: jax.Array, spatial: tuple[int, ...]) -> jax.Array:
  """The centre of `x` [B, *S, C], nowhere larger than `spatial`."""
  window = [slice(None)]
  for have, want in zip(x.shape[1:-1], spatial, strict=True):
    start = max(have - want, 0) // 2
    window.append(slice(start, start + want))
  return x[tuple(window)]


def pad_to(x: jax.Array, spatial: tuple[int, ...], mode: str) -> jax.Array:
  """Adds pixels behind `x` [B, *S, C] where it is smaller than `spatial`.

  What is added is 0 (mode "constant") or the last pixel again ("edge").
  """
  after = [
    (0, max(want - have, 0))
    for have, want in zip(x.shape[1:-1], spatial, strict=True)
  ]
  return jnp.pad(x, [(0, 0), *after, (0, 0)], mode=mode)


def nearest_up(x: jax.Array, factor: int) -> jax.Array:
  """Repeats every pixel `factor` times along every spatial axis."""
  for axis in range(1, x.ndim - 1):
    x = jnp.repeat(x, factor, axis)
  return x


# --- Upsampling ---------------------------------------------------------------


class TransposeUp(nn.Module):
  """Learned transposed convolution to `features` channels, nothing overlaps.

  The `factor` of this and of all upsampling is one for all axes, or for each.
  """

  features: int
  factor: int | tuple[int, ...] = 2

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return follow(conv.ConvTranspose(self.features, self.factor, he_normal))(x)


class LinearUp(nn.Module):
  """Linear interpolation at half-pixel centres; channels stay.

  PyTorch's `align_corners=False`. A sharded axis needs its neighbours only.
  """

  features: int = 0
  factor: int | tuple[int, ...] = 2

  def __call__(self, x: jax.Array) -> jax.Array:
    return resample.linear_up(x, self.factor, aligned=False)


class AlignedUp(nn.Module):
  """Linear interpolation with aligned corners; channels stay.

  PyTorch's `align_corners=True`. The result depends on the size of the whole
  axis, so a tile never equals the whole image.
  """

  features: int = 0
  factor: int | tuple[int, ...] = 2

  def __call__(self, x: jax.Array) -> jax.Array:
    return resample.linear_up(x, self.factor, aligned=True)


# --- Tables: the choices of schema.ModelConfig --------------------------------

UPS = {
  "transpose": TransposeUp,
  "linear": LinearUp,
  "linear_aligned": AlignedUp,
}

# All take the slope of "leaky_relu" below 0.
ACTIVATIONS = {
  "relu": lambda slope: nn.relu,
  "leaky_relu": lambda slope: lambda x: nn.leaky_relu(x, slope),
  "gelu": lambda slope: nn.gelu,
}
