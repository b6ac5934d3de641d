"""Max-pooling and linear interpolation as shifts, with gradients by hand.

Both act on [B, *S, C]. XLA's own forms are slow on CPU (a window's gradient
there is a search with indices, an interpolation a matrix product between two
transposes) and move more bytes than needed on TPU; these are elementwise.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def max_pool(x: jax.Array, factor: int) -> jax.Array:
  """Divides every spatial axis by `factor`, a power of 2, rounding down.

  The first of equal largest pixels in a window of 2 gets the gradient.
  """
  while factor > 1:
    x, factor = _halve(x), factor // 2
  return x


def linear_up(x: jax.Array, factor: int, aligned: bool) -> jax.Array:
  """Linear interpolation to `factor` times as many pixels on every axis.

  New pixel i = factor j + phase lies at j + o on the old grid, and is
  (1 - |o|) x[j] + |o| x[j +- 1], the border repeated. With `aligned` corners
  j + o = i (n - 1) / (factor n - 1), so that o depends on the size n of the
  axis; else centres are half a pixel in: j + o = (i + 1/2) / factor - 1/2.
  """
  for axis in range(1, x.ndim - 1):
    x = _enlarge((axis, factor, aligned), x)
  return x


# --- Max-pooling --------------------------------------------------------------


def _corners(x: jax.Array) -> list[jax.Array]:
  """The 2^d pixels of all windows, each as one array, row by row."""
  ends = [n // 2 * 2 for n in x.shape[1:-1]]
  return [
    x[(slice(None), *map(slice, corner, ends, itertools.repeat(2)))]
    for corner in itertools.product((0, 1), repeat=len(ends))
  ]


@jax.custom_vjp
def _halve(x: jax.Array) -> jax.Array:
  return functools.reduce(jnp.maximum, _corners(x))


def _halve_forward(
  x: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  y = _halve(x)
  return y, (x, y)


def _halve_backward(
  saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array]:
  x, y = saved
  free, parts = jnp.ones(y.shape, bool), []
  for pixel in _corners(x):
    first = (pixel == y) & free
    free &= ~first
    parts.append(jnp.where(first, dy, jnp.zeros_like(dy)))
  for axis in reversed(range(1, x.ndim - 1)):
    pairs = zip(parts[::2], parts[1::2], strict=True)
    parts = [_interleave(pair, axis) for pair in pairs]
  dx = parts[0]
  odd = [(0, n - m) for n, m in zip(x.shape, dx.shape, strict=True)]
  return (jnp.pad(dx, odd),)


_halve.defvjp(_halve_forward, _halve_backward)


# --- Interpolation ------------------------------------------------------------


def _taps(n: int, factor: int, aligned: bool) -> np.ndarray:
  """Weights [factor, 3, n]: of x[j - 1], x[j], x[j + 1] in each phase."""
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


def _along(values: np.ndarray, axis: int, like: jax.Array) -> jax.Array:
  shape = [1] * like.ndim
  shape[axis] = len(values)
  return jnp.asarray(values, like.dtype).reshape(shape)


def _shift(x: jax.Array, axis: int, by: int) -> jax.Array:
  """x[j + by] at j, zeros beyond the border."""
  pads = [(0, 0, 0)] * x.ndim
  pads[axis] = (-by, by, 0)
  return lax.pad(x, jnp.zeros((), x.dtype), pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _enlarge(how: tuple[int, int, bool], x: jax.Array) -> jax.Array:
  axis, factor, aligned = how
  phases = []
  for taps in _taps(x.shape[axis], factor, aligned):
    terms = [
      _along(weights, axis, x) * _shift(x, axis, by)
      for by, weights in zip((-1, 0, 1), taps, strict=True)
      if weights.any()
    ]
    phases.append(sum(terms[1:], terms[0]))
  return _interleave(phases, axis)


def _enlarge_forward(
  how: tuple[int, int, bool], x: jax.Array
) -> tuple[jax.Array, None]:
  return _enlarge(how, x), None


def _enlarge_backward(
  how: tuple[int, int, bool], _: None, dy: jax.Array
) -> tuple[jax.Array]:
  axis, factor, aligned = how
  n, terms = dy.shape[axis] // factor, []
  for phase, taps in enumerate(_taps(n, factor, aligned)):
    part = lax.slice_in_dim(dy, phase, n * factor, factor, axis)
    terms += [
      _shift(_along(weights, axis, dy) * part, axis, -by)
      for by, weights in zip((-1, 0, 1), taps, strict=True)
      if weights.any()
    ]
  return (sum(terms[1:], terms[0]),)


_enlarge.defvjp(_enlarge_forward, _enlarge_backward)


def _interleave(phases: tuple[jax.Array, ...], axis: int) -> jax.Array:
  """Array k's pixel j becomes pixel len(phases) j + k of the axis."""
  shape = list(phases[0].shape)
  shape[axis] *= len(phases)
  return jnp.stack(phases, axis + 1).reshape(shape)
