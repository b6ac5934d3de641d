"""The convolution, and its forms by platform: what `nn.Conv` computes with.

On GPU and TPU every convolution is XLA's own. XLA on CPU is fast in two
dimensions, slow in three, and slow at the gradient of the kernel; there other
forms of the same sums take over where `benchmarks/conv_forms.py` measured them
to be faster. The form depends on the shapes of one example alone, never on a
clock, a batch size or a device count: runs repeat to the bit.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from unet_jax.precision import promote

Pads = tuple[tuple[int, int], ...]

# Below these XLA's own forms are about as fast, or take a few milliseconds at
# most: multiply-accumulates of an example in three dimensions; for the gradient
# of a 2D kernel, pixels of an example times its channels in or out, the fewer.
_MIN_VOLUME_MACS = 2**22
_MIN_PLANE = 2**20
# Pixels of an example in one product of `_kernel_grad`: what stays in cache.
_BLOCK_PIXELS = 1024


def conv_general_dilated(
  x: jax.Array,
  kernel: jax.Array,
  window_strides: tuple[int, ...],
  padding: str | Pads,
  **options: Any,
) -> jax.Array:
  """`lax.conv_general_dilated` of channels-last arrays, in the fastest form.

  Equal to XLA's up to rounding, in value and in both gradients. Differentiable
  in reverse only where a form of ours is taken.

  Args:
    x: [B, *S, C].
    kernel: [*K, C, D].
    window_strides: as XLA's.
    padding: as XLA's.
    **options: as XLA's.

  Returns:
    [B, *S', D].
  """
  wide = set(kernel.shape[:-2]) == {3} and set(window_strides) == {1}
  plain = all(
    value in (None, 1) or set(value) == {1}
    for key, value in options.items()
    if key != "dimension_numbers"
  )
  spatial = x.shape[1:-1]
  pads = padding
  if isinstance(padding, str):
    pads = lax.padtype_to_pads(
      spatial, kernel.shape[:-2], window_strides, padding
    )
  pads = tuple(tuple(pair) for pair in pads)
  if not (wide and plain and _is_ours(spatial, kernel.shape, pads)):
    return lax.conv_general_dilated(
      x, kernel, window_strides, padding, **options
    )
  return _conv(pads, x, kernel)


def _is_ours(
  spatial: tuple[int, ...], kernel: tuple[int, ...], pads: Pads
) -> bool:
  inputs, outputs = kernel[-2:]
  sizes = zip(spatial, pads, strict=True)
  pixels = math.prod(n + sum(pair) - 2 for n, pair in sizes)
  if len(spatial) == 3:
    return pixels * 27 * inputs * outputs >= _MIN_VOLUME_MACS
  return len(spatial) == 2 and pixels * min(inputs, outputs) >= _MIN_PLANE


def _xla(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """XLA's own, strides 1."""
  axes = "DHW"[-len(pads) :]
  numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
  strides = (1,) * len(pads)
  return lax.conv_general_dilated(
    x, kernel, strides, pads, dimension_numbers=numbers
  )


# The switch by platform is outside the differentiation: else the residuals of
# all its branches would be kept.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
  cpu, xla = (functools.partial(f, pads) for f in (_cpu, _xla))
  return lax.platform_dependent(x, kernel, cpu=cpu, default=xla)


def _conv_forward(pads: Pads, x: jax.Array, kernel: jax.Array) -> Any:
  return _conv(pads, x, kernel), (x, kernel)


def _conv_backward(pads: Pads, saved: Any, dy: jax.Array) -> Any:
  def backward(form: Any, dy: jax.Array, *inputs: jax.Array) -> Any:
    return jax.vjp(functools.partial(form, pads), *inputs)[1](dy)

  cpu, xla = (functools.partial(backward, f) for f in (_cpu, _xla))
  return lax.platform_dependent(dy, *saved, cpu=cpu, default=xla)


_conv.defvjp(_conv_forward, _conv_backward)


def _cpu(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
  if len(pads) == 2:
    return _planar(pads, x, kernel)
  # A volume is a batch of its slices, each with the two next to it as more
  # channels: sum_k conv2d(x[d + k], kernel[k]).
  x = jnp.pad(x, ((0, 0), pads[0], *((0, 0),) * 3))
  depth = x.shape[1] - 2
  x = jnp.concatenate([x[:, k : k + depth] for k in range(3)], axis=-1)
  kernel = jnp.moveaxis(kernel, 0, 2)
  kernel = kernel.reshape(3, 3, -1, kernel.shape[-1])
  y = _planar(pads[1:], x.reshape(-1, *x.shape[2:]), kernel)
  return y.reshape(-1, depth, *y.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _planar(pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
  return _xla(pads, x, kernel)


def _planar_forward(pads: Pads, x: jax.Array, kernel: jax.Array) -> Any:
  return _xla(pads, x, kernel), (x, kernel)


def _planar_backward(pads: Pads, saved: Any, dy: jax.Array) -> Any:
  x, kernel = saved
  _, vjp = jax.vjp(functools.partial(_xla, pads), x, kernel)
  dx, dkernel = vjp(dy)
  if dy.shape[1] * dy.shape[2] * min(kernel.shape[-2:]) >= _MIN_PLANE:
    dkernel = _kernel_grad(pads, x, dy)
  return dx, dkernel


_planar.defvjp(_planar_forward, _planar_backward)


def _kernel_grad(pads: Pads, x: jax.Array, dy: jax.Array) -> jax.Array:
  """The gradient of a 3x3 kernel, block of rows by block of rows.

    dK[i, j] = sum_{n, h, w} x[n, h + i, w + j]^T dy[n, h, w]

  as products of [pixels, 3 C] and [pixels, 3 D]: three rows of x side by side,
  and three columns of dy. Nine copies of x, the usual form, would cost more
  than the products. Examples are summed last, so that a batch that is split
  over devices meets once.
  """
  n, height, width, d = dy.shape
  c = x.shape[-1]
  rows = max(1, min(height, _BLOCK_PIXELS // width))
  blocks = -(-height // rows)
  missing = blocks * rows - height  # Zeros add nothing.
  x = jnp.pad(x, ((0, 0), (pads[0][0], pads[0][1] + missing), pads[1], (0, 0)))
  dy = jnp.pad(dy, ((0, 0), (0, missing), (2, 2), (0, 0)))

  def add_block(block: jax.Array, total: jax.Array) -> jax.Array:
    xs = lax.dynamic_slice_in_dim(x, block * rows, rows + 2, axis=1)
    dys = lax.dynamic_slice_in_dim(dy, block * rows, rows, axis=1)
    left = jnp.concatenate([xs[:, i : i + rows] for i in range(3)], -1)
    right = jnp.concatenate(
      [dys[:, :, 2 - j : 4 - j + width] for j in range(3)], -1
    )
    left, right = left.reshape(n, -1, 3 * c), right.reshape(n, -1, 3 * d)
    return total + lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))))

  total = jnp.zeros((n, 3 * c, 3 * d), dy.dtype)
  total = lax.fori_loop(0, blocks, add_block, total).sum(0)
  return total.reshape(3, c, 3, d).transpose(0, 2, 1, 3)


class ConvTranspose(nn.Module):
  """Transposed convolution whose window is its stride: nothing overlaps.

  The parameters of `nn.ConvTranspose`, as one matrix product: pixel i becomes
  the block y[f i + a] = x[i] K[f - 1 - a] + b.
  """

  features: int
  factor: int
  kernel_init: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d, f = x.ndim - 2, self.factor
    shape = ((f,) * d) + (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = promote(x, kernel, bias)
    y = jnp.tensordot(x, jnp.flip(kernel, range(d)), (-1, d))
    # [B, *S, f, ..., D]: each window beside its axis.
    pairs = [axis for k in range(1, d + 1) for axis in (k, k + d)]
    y = y.transpose(0, *pairs, 2 * d + 1)
    y = y.reshape(x.shape[0], *(n * f for n in x.shape[1:-1]), self.features)
    return y + bias.reshape((1,) * (d + 1) + bias.shape)


# The choices of config.model.conv: what `nn.Conv` is given; None is XLA's own.
FORMS = {"fast": conv_general_dilated, "xla": None}
