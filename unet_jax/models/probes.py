"""Probes at the joins of a decoder: what its skips carry, and what they learn.

Both act on what arrives sideways at a join, x, and from below, u, of every
decoder. Without a probe in the `skips.Context` nothing here is in the program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unet_jax.precision import widen

# What may arrive over the wires of a level, by its number in `Cut.how`: x
# itself, 0, each channel's mean over the pixels of the example, or the x of
# another example.
CUTS = ("whole", "zeroed", "averaged", "shuffled")


class Cut(NamedTuple):
  """Replaces what arrives sideways, by the level that it comes from.

  Attributes:
    how: int32 [depth], numbers of CUTS; an array, so that one compiled program
      cuts any level.
    partner: int32 [B], whose x "shuffled" takes. An example that is its own
      partner stays whole. None: nothing is to be shuffled.
  """

  how: jax.Array
  partner: jax.Array | None = None

  def replace_side(self, x: jax.Array, level: int) -> jax.Array:
    """What arrives instead of x [B, *S, C], which comes from `level`."""
    axes = tuple(range(1, x.ndim - 1))
    mean = jnp.mean(widen(x), axes, keepdims=True).astype(x.dtype)
    cases = [x, jnp.zeros_like(x), jnp.broadcast_to(mean, x.shape)]
    if self.partner is not None:
      cases.append(x[self.partner])
    return jax.lax.select_n(self.how[level], *cases)


@jax.custom_vjp
def overhear(x: jax.Array, ear: jax.Array) -> jax.Array:
  """x; but the gradient of `ear` is the sum of squares of x's gradient.

  So the norm of a gradient inside the network costs one pass over it, and the
  gradient itself is not kept. Where `ear` is 0 nobody listens: its gradient is
  0, and is not computed.
  """
  del ear
  return x


def _forward(x: jax.Array, ear: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x, ear


def _backward(
  ear: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  total = _if_heard(ear, lambda: jnp.sum(jnp.square(widen(gradient))))
  return gradient, total.astype(ear.dtype)


def _if_heard(ear: jax.Array, compute: Callable[[], jax.Array]) -> jax.Array:
  """What `compute` gives, or zeros without computing it where `ear` is 0."""
  shape = jax.eval_shape(compute)
  nothing = functools.partial(jnp.zeros, shape.shape, shape.dtype)
  return jax.lax.cond(ear != 0, compute, nothing)


overhear.defvjp(_forward, _backward)


def energies(
  sides: Sequence[jax.Array], up: jax.Array, level: int, ears: jax.Array
) -> jax.Array:
  """Sums of squares of what is joined at `level`, of each example.

  Args:
    sides: [B, *S, C] each.
    up: [B, *S, C].
    level: that of the join.
    ears: [2, depth]; where the first is 0 nobody listens.

  Returns:
    [2, depth, B], 0 at other levels: of the sides, and of all.
  """

  def energy(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(widen(x)), tuple(range(1, x.ndim)))

  def both() -> jax.Array:
    deep = energy(up)
    skip = sum(map(energy, sides), jnp.zeros_like(deep))
    return jnp.stack([skip, skip + deep])

  found = _if_heard(ears[0, level], both)
  empty = jnp.zeros((*ears.shape, len(up)), found.dtype)
  return empty.at[:, level].set(found)
