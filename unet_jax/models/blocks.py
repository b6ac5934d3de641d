"""The parts of a U-Net, for 1, 2 and 3 spatial axes: [B, *S, C]."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# A Module class, or a `functools.partial` of one, waiting for its features.
ModuleDef = Callable[..., Any]


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


class DoubleConv(nn.Module):
  """Two 3-wide convolutions, each followed by norm and activation.

  `conv` and `norm` come bound to everything but their features, so this module
  knows neither rank nor padding.
  """

  features: int
  conv: ModuleDef
  norm: ModuleDef
  activation: Callable[[jax.Array], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for _ in range(2):
      x = self.conv(self.features)(x)
      x = self.activation(self.norm()(x))
    return x


class Identity(nn.Module):
  """The norm that is none."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x


def max_pool(x: jax.Array) -> jax.Array:
  """Halves every spatial axis: [B, *S, C] -> [B, *(S / 2), C]."""
  window = (2,) * (x.ndim - 2)
  return nn.max_pool(x, window, strides=window)


def crop_to(x: jax.Array, spatial: tuple[int, ...]) -> jax.Array:
  """The centre of `x` [B, *S, C] with the spatial shape `spatial`."""
  window = [slice(None)]
  for have, want in zip(x.shape[1:-1], spatial, strict=True):
    start = (have - want) // 2
    window.append(slice(start, start + want))
  return x[tuple(window)]


# --- Upsampling ---------------------------------------------------------------


class TransposeUp(nn.Module):
  """Learned 2-wide, stride-2 transposed convolution to `features` channels."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    two = (2,) * (x.ndim - 2)
    return nn.ConvTranspose(
      self.features, two, strides=two, padding="VALID", kernel_init=he_normal
    )(x)


class LinearUp(nn.Module):
  """Doubles by linear interpolation at half-pixel centres; channels stay.

  y[2i] = x[i-1] / 4 + 3 x[i] / 4 and y[2i+1] = 3 x[i] / 4 + x[i+1] / 4 on every
  axis, the border repeated: PyTorch's `align_corners=False`. Shifts and sums,
  so that a sharded axis needs its neighbours only.
  """

  features: int

  def __call__(self, x: jax.Array) -> jax.Array:
    for axis in range(1, x.ndim - 1):
      n = x.shape[axis]
      first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
      last = jax.lax.slice_in_dim(x, n - 1, n, axis=axis)
      rest = jax.lax.slice_in_dim(x, 0, n - 1, axis=axis)
      left = jnp.concatenate([first, rest], axis)
      rest = jax.lax.slice_in_dim(x, 1, n, axis=axis)
      right = jnp.concatenate([rest, last], axis)
      pair = [0.25 * left + 0.75 * x, 0.75 * x + 0.25 * right]
      shape = (*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])
      x = jnp.stack(pair, axis + 1).reshape(shape)
    return x


class AlignedUp(nn.Module):
  """Doubles by linear interpolation with aligned corners; channels stay.

  y[i] = (1 - f) x[k] + f x[k+1] with k + f = i (n - 1) / (2n - 1): PyTorch's
  `align_corners=True`. The result depends on the size of the whole axis, so a
  tile never equals the whole image.
  """

  features: int

  def __call__(self, x: jax.Array) -> jax.Array:
    for axis in range(1, x.ndim - 1):
      matrix = jnp.asarray(aligned_matrix(x.shape[axis]), x.dtype)
      y = jnp.tensordot(x, matrix, (axis, 1), precision="highest")
      x = jnp.moveaxis(y, -1, axis)
    return x


def aligned_matrix(n: int) -> np.ndarray:
  """The [2n, n] matrix of `AlignedUp` on one axis, float64, rows sum to 1."""
  position = np.arange(2 * n) * (n - 1) / (2 * n - 1)
  below = np.minimum(position.astype(int), max(n - 2, 0))
  share = position - below
  matrix = np.zeros((2 * n, n))
  rows = np.arange(2 * n)
  matrix[rows, below] += 1 - share
  matrix[rows, np.minimum(below + 1, n - 1)] += share
  return matrix


# --- Tables: the choices of config.ModelConfig --------------------------------

UPS = {
  "transpose": TransposeUp,
  "linear": LinearUp,
  "linear_aligned": AlignedUp,
}

ACTIVATIONS = {
  "relu": nn.relu,
  "leaky_relu": nn.leaky_relu,
  "gelu": nn.gelu,
}


def make_norm(
  name: str, *, train: bool, momentum: float, groups: int, axis_name: str | None
) -> ModuleDef:
  """Binds a norm to everything, so that blocks call it without arguments.

  Batch norm's statistics are those of the global batch: under `jit` because the
  array is global, under `pmap` because `axis_name` averages them. Running
  statistics keep `momentum` of the old value.
  """
  norms = {
    "none": Identity,
    "batch": functools.partial(
      nn.BatchNorm,
      use_running_average=not train,
      momentum=momentum,
      epsilon=1e-5,
      axis_name=axis_name,
    ),
    "group": functools.partial(nn.GroupNorm, num_groups=groups, epsilon=1e-5),
    "instance": functools.partial(nn.InstanceNorm, epsilon=1e-5),
  }
  return norms[name]
