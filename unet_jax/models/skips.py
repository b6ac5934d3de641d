"""What a skip connection carries from the encoder to the decoder.

One protocol: `Skip()(features, up, level) -> joined`, where `features` are the
encoder's outputs of all levels (0 = full resolution), cropped by the decoder to
the size of `up` at `level`; `up` is the upsampled decoder feature [B, *S, C];
the result [B, *S, C'] enters the level's convolutions. An entry is a Module of
a few lines and one line in the table.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


class NoSkip(nn.Module):
  """The wire is absent: the decoder sees only what came from below."""

  def __call__(
    self, features: Sequence[jax.Array], up: jax.Array, level: int
  ) -> jax.Array:
    return up


class Concat(nn.Module):
  """[x; up] along channels, the paper's skip (Ronneberger et al. 2015)."""

  def __call__(
    self, features: Sequence[jax.Array], up: jax.Array, level: int
  ) -> jax.Array:
    return jnp.concatenate([features[level], up], axis=-1)


SKIPS = {"none": NoSkip, "concat": Concat}
