"""Max-pooling and linear interpolation, with gradients by hand.

Both act on [B, *S, C], in a form by platform. XLA's own are slow on CPU: there
a pooling window's gradient is a search with indices, an interpolation a matrix
product between two transposes. On TPU and GPU the pooling is XLA's own, and an
interpolation is written so that it fuses into the convolution that reads it.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A factor for all spatial axes, or one for each.
Factor = int | Sequence[int]


def each_axis(factor: Factor, dims: int) -> tuple[int, ...]:
  """The factor of each of `dims` axes."""
  return (factor,) * dims if isinstance(factor, int) else tuple(factor)


def max_pool(x: jax.Array, factor: Factor) -> jax.Array:
  """Divides every spatial axis by its `factor`, a power of 2, rounding down.

  The first of equal largest pixels in a window of 2 gets the gradient.
  """
  factors = each_axis(factor, x.ndim - 2)
  while max(factors) > 1:
    x = _halve(tuple(min(f, 2) for f in factors), x)
    factors = tuple(max(f // 2, 1) for f in factors)
  return x


def linear_up(x: jax.Array, factor: Factor, aligned: bool) -> jax.Array:
  """Linear interpolation to `factor` times as many pixels on every axis.

  New pixel i = factor j + phase lies at j + o on the old grid, and is
  (1 - |o|) x[j] + |o| x[j +- 1], the border repeated. With `aligned` corners
  j + o = i (n - 1) / (factor n - 1), so that o depends on the size n of the
  axis; else centres are half a pixel in: j + o = (i + 1/2) / factor - 1/2.
  """
  for axis, f in enumerate(each_axis(factor, x.ndim - 2), 1):
    if f > 1:
      x = _enlarge((axis, f, aligned), x)
  return x


# --- Max-pooling --------------------------------------------------------------


# A window is 2 wide on the axes that are halved, 1 on the others.
def _corners(window: tuple[int, ...], x: jax.Array) -> list[jax.Array]:
  """The pixels of all windows, 2^d of them, each as one array, row by row."""
  ends = [n // w * w for n, w in zip(x.shape[1:-1], window, strict=True)]
  return [
    x[(slice(None), *map(slice, corner, ends, window))]
    for corner in itertools.product(*map(range, window))
  ]


def _largest(window: tuple[int, ...], x: jax.Array) -> jax.Array:
  return functools.reduce(jnp.maximum, _corners(window, x))


def _largest_xla(window: tuple[int, ...], x: jax.Array) -> jax.Array:
  return nn.max_pool(x, window_shape=window, strides=window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _halve(window: tuple[int, ...], x: jax.Array) -> jax.Array:
  cpu, xla = (functools.partial(f, window) for f in (_largest, _largest_xla))
  return lax.platform_dependent(x, cpu=cpu, default=xla)


def _halve_forward(window: tuple[int, ...], x: jax.Array) -> Any:
  y = _halve(window, x)
  return y, (x, y)


def _halve_backward(
  window: tuple[int, ...], saved: Any, dy: jax.Array
) -> tuple[jax.Array]:
  def cpu(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
    free, parts = jnp.ones(y.shape, bool), []
    for pixel in _corners(window, x):
      first = (pixel == y) & free
      free &= ~first
      parts.append(jnp.where(first, dy, jnp.zeros_like(dy)))
    for axis in reversed(range(1, x.ndim - 1)):
      if window[axis - 1] > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [_interleave(pair, axis) for pair in pairs]
    dx = parts[0]
    odd = [(0, n - m) for n, m in zip(x.shape, dx.shape, strict=True)]
    return jnp.pad(dx, odd)

  def xla(x: jax.Array, _: jax.Array, dy: jax.Array) -> jax.Array:
    return jax.vjp(functools.partial(_largest_xla, window), x)[1](dy)[0]

  return (lax.platform_dependent(*saved, dy, cpu=cpu, default=xla),)


_halve.defvjp(_halve_forward, _halve_backward)


# --- Interpolation ------------------------------------------------------------


def _taps(n: int, factor: int, aligned: bool) -> np.ndarray:
  """Weights [factor, 3, n]: of x[j - 1], x[j], x[j + 1] in each phase."""
  if not isinstance(n, int):
    return _symbolic_taps(n, factor, aligned)
  phase, j = np.arange(factor)[:, None], np.arange(n)
  if aligned:
    offset = (phase * (n - 1) - j * (factor - 1)) / (factor * n - 1)
  else:
    offset = (phase + 0.5) / factor - 0.5 + np.zeros(n)
  taps = np.stack([-offset, 1 - abs(offset), offset], axis=1).clip(0)
  # Beyond the border lies the border again.
  taps[:, 1, 0] += taps[:, 0, 0]
  taps[:, 1, -1] += taps[:, 2, -1]
  taps[:, 0, 0] = taps[:, 2, -1] = 0
  return taps


def _symbolic_taps(n: Any, factor: int, aligned: bool) -> jax.Array:
  """`_taps` to the bit, float32, of a size that only `jax.export` has.

  Quotients of integers, each rounded once, are what float64 is rounded to.
  """
  phase, j = jnp.arange(factor)[:, None], jnp.arange(n)[None]
  last = jnp.asarray(n) - 1
  if aligned:
    top, bottom = phase * last - j * (factor - 1), factor * last + factor - 1
  else:
    top, bottom = 2 * phase + 1 - factor + 0 * j, jnp.asarray(2 * factor)
    beyond = ((j == 0) & (top < 0)) | ((j == last) & (top > 0))
    top = jnp.where(beyond, 0, top)
  taps = jnp.stack([-top, bottom - abs(top), top], axis=1).clip(0)
  return taps.astype(jnp.float32) / bottom.astype(jnp.float32)


def _along(values: np.ndarray, axis: int, like: jax.Array) -> jax.Array:
  shape = [1] * like.ndim
  shape[axis] = values.shape[0]
  return jnp.asarray(values, like.dtype).reshape(shape)


def _shift(x: jax.Array, axis: int, by: int) -> jax.Array:
  """x[j + by] at j, zeros beyond the border."""
  pads = [(0, 0, 0)] * x.ndim
  pads[axis] = (-by, by, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), pads)


def _weigh(
  x: jax.Array,
  axis: int,
  step: int,
  weights: Iterable[np.ndarray],
  like: Iterable[np.ndarray] | None = None,
) -> jax.Array:
  """sum_k weights[k, i] x[i + (k - 1) step], zeros beyond the border.

  Weights that are 0 for all i are left out: those of `like`, where given.
  """
  like = weights if like is None else like
  shifts = zip((-step, 0, step), weights, like, strict=True)
  terms = [
    _along(w, axis, x) * _shift(x, axis, by) for by, w, u in shifts if u.any()
  ]
  return sum(terms[1:], terms[0])


def _adjoint(weights: np.ndarray, step: int) -> np.ndarray:
  """The weights of `_weigh`'s gradient."""
  before, here, after = weights
  beyond = np.zeros(step)
  return np.stack(
    [
      np.concatenate([beyond, after[:-step]]),
      here,
      np.concatenate([before[step:], beyond]),
    ]
  )


def _one_by_one(taps: np.ndarray) -> np.ndarray:
  """Weights [3, factor n] of the new pixels."""
  return taps.transpose(1, 2, 0).reshape(3, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enlarge(how: tuple[int, int, bool], x: jax.Array) -> jax.Array:
  axis, factor, aligned = how
  taps = _taps(x.shape[axis], factor, aligned)
  # Which weights are 0 everywhere is the same for all sizes from 2 on.
  symbolic = isinstance(taps, jax.Array)
  like = _taps(2, factor, aligned) if symbolic else taps

  def cpu(x: jax.Array) -> jax.Array:
    pairs = zip(taps, like, strict=True)
    return _interleave([_weigh(x, axis, 1, w, u) for w, u in pairs], axis)

  def fused(x: jax.Array) -> jax.Array:
    x = jnp.repeat(x, factor, axis)
    return _weigh(x, axis, factor, _one_by_one(taps), _one_by_one(like))

  return lax.platform_dependent(x, cpu=cpu, default=fused)


def _enlarge_backward(
  how: tuple[int, int, bool], _: None, dy: jax.Array
) -> tuple[jax.Array]:
  axis, factor, aligned = how
  n = dy.shape[axis] // factor
  taps = _taps(n, factor, aligned)

  def cpu(dy: jax.Array) -> jax.Array:
    terms = []
    for phase, weights in enumerate(taps):
      part = lax.slice_in_dim(dy, phase, n * factor, factor, axis)
      terms.append(_weigh(part, axis, 1, _adjoint(weights, 1)))
    return sum(terms[1:], terms[0])

  def fused(dy: jax.Array) -> jax.Array:
    weights = _adjoint(_one_by_one(taps), factor)
    dx = _weigh(dy, axis, factor, weights)
    shape = (*dy.shape[:axis], n, factor, *dy.shape[axis + 1 :])
    return jnp.sum(dx.reshape(shape), axis + 1)

  return (lax.platform_dependent(dy, cpu=cpu, default=fused),)


_enlarge.defvjp(lambda how, x: (_enlarge(how, x), None), _enlarge_backward)


def _interleave(phases: Sequence[jax.Array], axis: int) -> jax.Array:
  """Array k's pixel j becomes pixel len(phases) j + k of the axis."""
  shape = list(phases[0].shape)
  shape[axis] *= len(phases)
  return jnp.stack(phases, axis + 1).reshape(shape)
