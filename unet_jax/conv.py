"""The convolution, and its forms by platform: what `nn.Conv` computes with.

On GPU every convolution is XLA's own; on TPU all but two kinds, of which other
forms move less through memory. XLA on CPU reaches the speed of a matrix product
in two dimensions where something is padded, a fourth of it where nothing is,
less in three dimensions, and less at the gradient of the kernel; there other
forms of the same sums take over. Which one is read from `conv_table`, by the
shapes of one example alone, never by a clock, a batch size or a device count:
runs repeat to the bit.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from unet_jax import conv_table
from unet_jax.precision import dot_general, narrow, promote, widen

Pads = tuple[tuple[int, int], ...]

# Multiply-accumulates of an example below which XLA's own form is taken: it is
# done in a millisecond.
_MIN_MACS = 2**20
# Pixels of an example in one product of `_kernel_grad`: what stays in cache.
_BLOCK_PIXELS = 1024


class _Window(NamedTuple):
  """What a convolution is, but for its arrays."""

  strides: tuple[int, ...]
  pads: Pads
  seam: int = 0
  fast: bool = True


def conv_general_dilated(
  x: jax.Array,
  kernel: jax.Array,
  window_strides: tuple[int, ...],
  padding: str | Pads,
  *,
  seam: int = 0,
  fast: bool = True,
  **options: Any,
) -> jax.Array:
  """`lax.conv_general_dilated` of channels-last arrays, in the fastest form.

  Equal to XLA's up to rounding, in value and in both gradients. Differentiable
  in reverse only where a form of ours is taken, or in bfloat16.

  Args:
    x: [B, *S, C].
    kernel: [*K, C, D]; beside a bfloat16 x it may be float32: then it is
      rounded, and its gradient is not.
    window_strides: as XLA's.
    padding: as XLA's.
    seam: where two arrays are joined in C, or 0.
    fast: whether forms of ours may take over.
    **options: as XLA's.

  Returns:
    [B, *S', D], of x's dtype.
  """
  plain = all(
    value in (None, 1) or set(value) == {1}
    for key, value in options.items()
    if key != "dimension_numbers"
  )
  pads = padding
  if isinstance(padding, str):
    pads = lax.padtype_to_pads(
      x.shape[1:-1], kernel.shape[:-2], window_strides, padding
    )
  pads = tuple(tuple(p) for p in pads)
  window = _Window(tuple(window_strides), pads, seam, fast)
  shapes = x.shape, kernel.shape
  ours = _form(window, *shapes) or _tpu_form(window, *shapes)
  if plain and (ours or x.dtype != kernel.dtype):
    return _conv(window, x, kernel)
  kernel = narrow(x, kernel)
  return lax.conv_general_dilated(x, kernel, window_strides, padding, **options)


def _form(
  window: _Window, x: tuple[int, ...], kernel: tuple[int, ...]
) -> Callable[..., jax.Array] | None:
  """The form in which CPU computes the value; None is XLA's own.

  Args:
    window: strides and pads.
    x: shape of the input.
    kernel: shape of the kernel.
  """
  if not window.fast:
    return None
  taps = kernel[:-2]
  sizes = zip(x[1:-1], window.pads, taps, window.strides, strict=True)
  pixels = math.prod((n + sum(p) - k) // s + 1 for n, p, k, s in sizes)
  if isinstance(pixels, int):
    return _form_at(pixels, window, kernel)
  # jax.export: the size is known where the program runs.
  bounds = [-(-_MIN_MACS // math.prod(kernel))]
  bounds += [n + 1 for n in _bounds("value", len(taps)) if n >= bounds[0]]
  forms = [_form_at(n, window, kernel) or _xla for n in (0, *bounds)]
  if any(map(any, window.pads)):
    forms = [_xla if form is _plane else form for form in forms]
  forms = [functools.partial(form, window) for form in forms]
  if len({form.func for form in forms}) == 1:
    return forms[0].func
  return lambda _, *arrays: lax.switch(
    sum((jnp.asarray(pixels) >= n).astype(jnp.int32) for n in bounds),
    forms,
    *arrays,
  )


def _form_at(
  pixels: int, window: _Window, kernel: tuple[int, ...]
) -> Callable[..., jax.Array] | None:
  """The form where so many pixels of an example come out."""
  taps, strides = kernel[:-2], window.strides
  if pixels * math.prod(kernel) < _MIN_MACS:
    return None
  if taps == strides and not any(map(any, window.pads)):
    return _patches
  if set(taps) != {3} or set(strides) != {1} or len(taps) == 1:
    return None
  if len(taps) == 2:
    return _plane
  return _SLICES[_look_up("value", pixels, kernel)]


def _bounds(what: str, dims: int) -> list[int]:
  """The most pixels of each shape class but the last."""
  sizes = [size for *start, size in conv_table.FORMS if start == [what, dims]]
  return [math.floor(2 ** (sum(p) / 2)) for p in itertools.pairwise(sizes)]


def _look_up(what: str, pixels: int, kernel: tuple[int, ...]) -> str:
  """The letter of the nearest shape class: of "value" or of "kernel"."""

  def nearest(values: Iterable[int], n: int) -> int:
    return min(values, key=lambda v: abs(v - math.log2(n)))

  key, axes = (what, len(kernel) - 2), conv_table.CHANNELS
  sizes = [size for *start, size in conv_table.FORMS if tuple(start) == key]
  row, column = (axes.index(nearest(axes, n)) for n in kernel[-2:])
  return conv_table.FORMS[*key, nearest(sizes, pixels)][row][column]


def _tpu_form(
  window: _Window, _: tuple[int, ...], kernel: tuple[int, ...]
) -> Callable[..., jax.Array] | None:
  """The form for TPU; None is XLA's own. Arguments as of `_form`."""
  if not window.fast:
    return None
  if set((*kernel[:-2], kernel[-1], *window.strides)) == {1}:
    return None if any(map(any, window.pads)) else _weighted_sum
  return _apart if window.seam else None


# The switch by platform is outside the differentiation: else the residuals of
# all its branches would be kept.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(window: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  forms = (f(window, x.shape, kernel.shape) for f in (_form, _tpu_form))
  cpu, tpu = (functools.partial(form or _xla, window) for form in forms)
  xla = functools.partial(_xla, window)
  kernel = narrow(x, kernel)
  return lax.platform_dependent(x, kernel, cpu=cpu, tpu=tpu, default=xla)


def _conv_backward(window: _Window, saved: Any, dy: jax.Array) -> Any:
  shapes = [array.shape for array in saved]
  form, tpu_form = _form(window, *shapes), _tpu_form(window, *shapes)

  def backward(
    form: Any, dy: jax.Array, x: jax.Array, kernel: jax.Array
  ) -> Any:
    apply = functools.partial(form or _xla, window)
    dx, dkernel = jax.vjp(apply, x, narrow(x, kernel))[1](dy)
    if kernel.dtype != x.dtype:
      dkernel = _wide_kernel_grad(window, x, dy, kernel)
    return dx, dkernel

  def cpu(dy: jax.Array, x: jax.Array, kernel: jax.Array) -> Any:
    # What _plane pads, to be fast, would be dead weight in a gradient.
    dx, dkernel = backward(None if form is _plane else form, dy, x, kernel)
    if form not in (None, _patches):
      pixels = math.prod(dy.shape[1:-1])
      if _look_up("kernel", pixels, kernel.shape) == "b":
        dkernel = _kernel_grad(window.pads, x, dy).astype(kernel.dtype)
    return dx, dkernel

  tpu, xla = (functools.partial(backward, form) for form in (tpu_form, None))
  return lax.platform_dependent(dy, *saved, cpu=cpu, tpu=tpu, default=xla)


_conv.defvjp(lambda window, *xs: (_conv(window, *xs), xs), _conv_backward)


def _xla(window: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """XLA's own."""
  axes = "DHW"[-len(window.pads) :]
  numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
  form = functools.partial(lax.conv_general_dilated, dimension_numbers=numbers)
  return form(x, kernel, window.strides, window.pads)


def _wide_kernel_grad(
  window: _Window, x: jax.Array, dy: jax.Array, kernel: jax.Array
) -> jax.Array:
  """The kernel's gradient by XLA, as wide as the kernel, of narrow arrays.

  A convolution of x with dy, batch and channels having changed places. Where
  two arrays are joined in x, each by itself: TPU never writes them joined.
  """
  axes = "DHW"[-len(window.pads) :]
  # What a window leaves over at the end of an axis is cut off.
  pads = [
    (low, k - 1 - n - low + (m - 1) * s + 1)
    for n, m, k, s, (low, _) in zip(
      x.shape[1:-1],
      dy.shape[1:-1],
      kernel.shape[:-2],
      window.strides,
      window.pads,
      strict=True,
    )
  ]
  form = functools.partial(
    lax.conv_general_dilated,
    window_strides=(1,) * len(axes),
    padding=pads,
    rhs_dilation=window.strides,
    dimension_numbers=(f"C{axes}N", f"I{axes}O", f"{axes}NC"),
    preferred_element_type=kernel.dtype,
  )
  parts = jnp.split(x, [window.seam], -1) if window.seam else [x]
  return jnp.concatenate([form(part, dy) for part in parts], -2)


# --- Forms for TPU ------------------------------------------------------------


def _apart(window: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Each side of the seam by itself: what is joined there is never written."""
  xs, kernels = (
    jnp.split(a, [window.seam], i) for a, i in ((x, -1), (kernel, -2))
  )
  first, second = map(functools.partial(_xla, window), xs, kernels)
  return first + second


def _weighted_sum(_: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A 1-wide convolution to one channel: XLA's fills 127 more with zeros."""
  y = jnp.sum(widen(x) * widen(kernel[..., 0])[None], -1, keepdims=True)
  return y.astype(x.dtype)


# --- Forms for CPU ------------------------------------------------------------


def _patches(window: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """One matrix product, where no two windows overlap."""
  f, d = window.strides, len(window.strides)
  sizes = [n // k for n, k in zip(x.shape[1:-1], f, strict=True)]
  for axis, (n, k) in enumerate(zip(sizes, f, strict=True), 1):
    x = lax.slice_in_dim(x, 0, n * k, axis=axis)
  # [B, *S', *K, C]: each window's pixels beside its channels.
  pairs = [n for pair in zip(sizes, f, strict=True) for n in pair]
  x = x.reshape(x.shape[0], *pairs, x.shape[-1])
  x = x.transpose(0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2), 2 * d + 1)
  return jnp.tensordot(x, kernel, d + 1)


def _plane(window: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """XLA's own; where nothing is padded, with a row of zeros that is cut off."""
  if any(map(any, window.pads)):
    return _xla(window, x, kernel)
  pads = ((0, 1), *window.pads[1:])
  return _xla(window._replace(pads=pads), x, kernel)[:, :-1]


def _slices_in(window: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """A volume as a batch of its slices, those beside each as more channels.

  y[d] = conv2d([x[d], x[d + 1], x[d + 2]], [kernel[0], kernel[1], kernel[2]])
  """
  x = jnp.pad(x, ((0, 0), window.pads[0], *((0, 0),) * 3))
  depth = x.shape[1] - 2
  x = jnp.concatenate([x[:, k : k + depth] for k in range(3)], axis=-1)
  kernel = jnp.moveaxis(kernel, 0, 2)
  kernel = kernel.reshape(3, 3, -1, kernel.shape[-1])
  plane = _Window(window.strides[1:], window.pads[1:])
  n = x.shape[0]
  y = _plane(plane, x.reshape(n * depth, *x.shape[2:]), kernel)
  return y.reshape(n, depth, *y.shape[1:])


def _slices_out(window: _Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same, with the kernel's slices as more channels out, then added.

  y[d] = z_0[d] + z_1[d + 1] + z_2[d + 2], [z_0, z_1, z_2] = conv2d(x, kernel)
  """
  (before, after), d = window.pads[0], kernel.shape[-1]
  kernel = jnp.moveaxis(kernel, 0, 3).reshape(3, 3, -1, 3 * d)
  plane = _Window(window.strides[1:], window.pads[1:])
  slices = math.prod(x.shape[:2])
  z = _plane(plane, x.reshape(slices, *x.shape[2:]), kernel)
  z = z.reshape(*x.shape[:2], *z.shape[1:])

  def part(k: int) -> jax.Array:
    shift = [(0, 0, 0), (before - k, after + k - 2, 0), *((0, 0, 0),) * 3]
    return lax.pad(z[..., k * d : (k + 1) * d], jnp.zeros((), z.dtype), shift)

  return part(0) + part(1) + part(2)


# The letters of conv_table.
_SLICES = {"x": None, "i": _slices_in, "o": _slices_out}


def _kernel_grad(pads: Pads, x: jax.Array, dy: jax.Array) -> jax.Array:
  """The gradient of a 3-wide kernel, block by block along the first axis.

    dK[i, j] = sum_{n, h, w} x[n, h + i, w + j]^T dy[n, h, w]

  as products of [pixels, 3 C] and [pixels, 3 D]: three rows of x side by side,
  and three columns of dy; in volumes three slices of x and all 9 shifts of dy.
  All taps beside x, the usual form, would cost more than the products. Examples
  are summed last, so that a batch that is split over devices meets once.
  """
  n, length, *rest, d = dy.shape
  c, ones = x.shape[-1], ((0, 0),)
  rows = min(max(1, _BLOCK_PIXELS // math.prod(rest)), length)
  blocks = -(-length // rows)
  missing = blocks * rows - length  # Zeros add nothing.
  first = (pads[0][0], pads[0][1] + missing)
  x = jnp.pad(x, (*ones, first, *pads[1:], *ones))
  dy = jnp.pad(dy, (*ones, (0, missing), *((2, 2),) * len(rest), *ones))
  shifts = list(itertools.product(range(3), repeat=len(rest)))

  def shifted(dy: jax.Array, shift: tuple[int, ...]) -> jax.Array:
    cut = (slice(2 - j, 4 - j + m) for j, m in zip(shift, rest, strict=True))
    return dy[(slice(None), slice(None), *cut)]

  def add_block(block: jax.Array, total: jax.Array) -> jax.Array:
    xs = lax.dynamic_slice_in_dim(x, block * rows, rows + 2, axis=1)
    dys = lax.dynamic_slice_in_dim(dy, block * rows, rows, axis=1)
    left = jnp.concatenate([xs[:, i : i + rows] for i in range(3)], -1)
    right = jnp.concatenate([shifted(dys, shift) for shift in shifts], -1)
    return total + lax.dot_general(
      left.reshape(n, -1, 3 * c),
      right.reshape(n, -1, len(shifts) * d),
      (((1,), (1,)), ((0,), (0,))),
      preferred_element_type=total.dtype,
    )

  total = jnp.promote_types(dy.dtype, jnp.float32)
  total = jnp.zeros((n, 3 * c, len(shifts) * d), total)
  total = lax.fori_loop(0, blocks, add_block, total).sum(0)
  total = total.reshape(3, c, *(3,) * len(rest), d)
  return jnp.moveaxis(total, 1, -2)


class ConvTranspose(nn.Module):
  """Transposed convolution whose window is its stride: nothing overlaps.

  The parameters of `nn.ConvTranspose`, as one matrix product: pixel i becomes
  the block y[f i + a] = x[i] K[f - 1 - a] + b.
  """

  features: int
  factor: int | tuple[int, ...]
  kernel_init: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d, f = x.ndim - 2, self.factor
    factors = (f,) * d if isinstance(f, int) else f
    shape = (*factors, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = promote(x, kernel, bias)
    over = ((x.ndim - 1,), (d,)), ((), ())
    y = dot_general(x, jnp.flip(kernel, range(d)), over)
    # [B, *S, f, ..., D]: each window beside its axis.
    pairs = [axis for k in range(1, d + 1) for axis in (k, k + d)]
    y = y.transpose(0, *pairs, 2 * d + 1)
    sizes = map(operator.mul, x.shape[1:-1], factors)
    y = y.reshape(x.shape[0], *sizes, self.features)
    return y + bias.reshape((1,) * (d + 1) + bias.shape)


# The choices of config.model.conv: what `nn.Conv` is given.
FORMS = {
  "fast": conv_general_dilated,
  "xla": functools.partial(conv_general_dilated, fast=False),
}
