"""Batch norm in as few passes over the data as it takes."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax.precision import narrow, widen


class BatchNorm(nn.Module):
  """Batch norm over all axes but the last, as PyTorch does it.

  Normalises by the biased variance, but keeps a running average of the unbiased
  one, n / (n - 1) times as large for n values a channel: flax's own keeps the
  biased one. Statistics are those of the global batch: under `jit` because the
  array is global, under `pmap` because `axis_name` averages them (over equal
  shards). Running statistics keep `momentum` of the old value. Of a bfloat16
  array all is in float32, but for the gradient with respect to it.

  With `per_device` each device's examples have statistics of their own, and
  the running ones take the mean of those: under `pmap` over `axis_name`, under
  `jit` over `shards` equal parts of the batch.
  """

  use_running_average: bool
  momentum: float
  axis_name: str | None = None
  per_device: bool = False
  shards: int = 1
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features, first = (x.shape[-1],), self.is_initializing()
    axis_name = None if first else self.axis_name
    scale = self.param("scale", nn.initializers.ones, features)
    bias = self.param("bias", nn.initializers.zeros, features)
    old_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
    old_var = self.variable("batch_stats", "var", jnp.ones, features)
    if self.use_running_average:
      moments = old_mean.value, old_var.value
      return _affine(x, *moments, scale, bias, self.epsilon)
    own, local = x, self.per_device and not first
    if local:
      own = x.reshape(self.shards, -1, *x.shape[1:])
      normalize = functools.partial(_normalize, None, self.epsilon)
      normalize = jax.vmap(normalize, in_axes=(0, None, None, None))
    else:
      normalize = functools.partial(_normalize, axis_name, self.epsilon)
    y, mean, var = normalize(own, scale, bias, old_mean.value)
    if local:
      y, mean, var = y.reshape(x.shape), mean.mean(0), var.mean(0)
      if axis_name is not None:
        mean, var = jax.lax.pmean((mean, var), axis_name)
    if not first:
      count = _count(own[0], None) if local else _count(x, axis_name)
      unbiased = var * (count / max(count - 1, 1))
      for old, new in ((old_mean, mean), (old_var, unbiased)):
        old.value = self.momentum * old.value + (1 - self.momentum) * new
    return y


def _count(x: jax.Array, axis_name: str | None) -> int:
  """Values a channel, over all devices."""
  return x.size // x.shape[-1] * _sum_over(axis_name, 1)


def _sum_over(axis_name: str | None, tree: Any) -> Any:
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _affine(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
) -> jax.Array:
  to_x = (1,) * (x.ndim - 1) + scale.shape
  factor = (scale * jax.lax.rsqrt(var + epsilon)).reshape(to_x)
  y = (widen(x) - mean.reshape(to_x)) * factor + bias.reshape(to_x)
  return narrow(x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(
  axis_name: str | None,
  epsilon: float,
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  near: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(y, mean, variance) of a batch; the moments have no gradient.

  Both moments are sums of x less `near`, an old mean: read in one pass, and
  without the lost digits of the mean square less the squared mean.
  """
  axes, count = tuple(range(x.ndim - 1)), _count(x, axis_name)
  shifted = widen(x) - near.reshape((1,) * (x.ndim - 1) + near.shape)
  sums = jnp.sum(shifted, axes), jnp.sum(jnp.square(shifted), axes)
  mean, square = (s / count for s in _sum_over(axis_name, sums))
  var = jnp.maximum(square - jnp.square(mean), 0)
  mean += near
  return _affine(x, mean, var, scale, bias, epsilon), mean, var


def _normalize_forward(
  axis_name: str | None, epsilon: float, x: jax.Array, *others: jax.Array
) -> Any:
  out = _normalize(axis_name, epsilon, x, *others)
  return out, (x, others[0], *out[1:])


def _normalize_backward(
  axis_name: str | None, epsilon: float, saved: Any, gradients: Any
) -> Any:
  """Two sums, then one pass, with z = (x - mean) / std.

    dx = scale / std (dy - mean(dy) - z mean(dy z))

  Reference: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167, section 3.
  """
  (x, scale, mean, var), dy = saved, widen(gradients[0])
  axes, to_x = tuple(range(x.ndim - 1)), (1,) * (x.ndim - 1) + scale.shape
  inverse = jax.lax.rsqrt(var + epsilon)
  z = (widen(x) - mean.reshape(to_x)) * inverse.reshape(to_x)
  # Of this device alone: the train step adds the gradients of parameters.
  sums = jnp.sum(dy * z, axes), jnp.sum(dy, axes)
  means = (s / _count(x, axis_name) for s in _sum_over(axis_name, sums))
  dyz, dy_mean = (m.reshape(to_x) for m in means)
  dx = (scale * inverse).reshape(to_x) * (dy - dy_mean - z * dyz)
  return dx.astype(x.dtype), *sums, jnp.zeros_like(mean)


_normalize.defvjp(_normalize_forward, _normalize_backward)
