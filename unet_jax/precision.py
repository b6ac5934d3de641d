"""Half precision: products and what is kept in bfloat16, sums in float32.

The network casts its input, and from there each layer follows what enters it:
it makes bfloat16 of bfloat16, and does with all else what flax does. Parameters
stay float32. A sum in bfloat16 stops growing at 2^8 times its terms, and such a
sum is the gradient of all that is spread over pixels: so biases, norms and
gates are applied in float32 (products add up in it anyway), and a kernel's
gradient leaves its product in float32: what devices add is not rounded first.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Layer = Callable[[jax.Array], jax.Array]

# The choices of config.model.dtype: what the input is cast to; None: nothing.
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16}


def follow(layer: Layer) -> Layer:
  """`layer`, giving bfloat16 for bfloat16."""
  return lambda x: narrow(x, layer(x))


def layer_norm() -> Layer:
  """Of the last axis."""
  return follow(nn.LayerNorm())


def promote(
  x: jax.Array, kernel: jax.Array, bias: Any, still: bool = False, **_: Any
) -> Any:
  """What flax's layers take as `promote_dtype`; the bias stays as it is.

  So does the kernel beside bfloat16: `dot_general` and `conv` narrow it where
  they can widen its gradient. With `still` the bias has no gradient.
  """
  bias = jax.lax.stop_gradient(bias) if still else bias
  if x.dtype != jnp.bfloat16:
    x, kernel = nn.dtypes.promote_dtype(x, kernel)
  return x, kernel, bias


def dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None
) -> jax.Array:
  """`lax.dot_general` of x [..., C] and a kernel, over C, without batch axes.

  In bfloat16 where x is; the kernel's gradient keeps the kernel's type.
  """
  del precision  # As everywhere: of the platform.
  if x.dtype == kernel.dtype:
    return jax.lax.dot_general(x, kernel, dimension_numbers)
  return _dot(dimension_numbers[0][1][0], x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(axis: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jnp.tensordot(x, narrow(x, kernel), (-1, axis))


def _dot_backward(axis: int, saved: Any, dy: jax.Array) -> Any:
  x, kernel = saved
  dx = jax.vjp(lambda x: jnp.tensordot(x, narrow(x, kernel), (-1, axis)), x)[1]
  rows = tuple(range(x.ndim - 1))
  dkernel = jnp.tensordot(
    x, dy, (rows, rows), preferred_element_type=kernel.dtype
  )
  return *dx(dy), jnp.moveaxis(dkernel, 0, axis)


_dot.defvjp(lambda axis, *xs: (_dot(axis, *xs), xs), _dot_backward)


def gate(x: jax.Array, by: jax.Array) -> jax.Array:
  """The product of x and what is spread over it."""
  return narrow(x, x * widen(by))


def widen(x: jax.Array) -> jax.Array:
  """At least float32."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def narrow(x: jax.Array, y: jax.Array) -> jax.Array:
  """`y`, in bfloat16 where `x` is."""
  return y.astype(x.dtype) if x.dtype == jnp.bfloat16 else y
