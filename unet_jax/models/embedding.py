"""What makes features of tokens: words and their characters, as vectors."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax.models import blocks

# Characters that a feature of the characters sees at once.
_WINDOW = 5
_UNKNOWN = 1


class TokenEmbedding(nn.Module):
  """Vectors of words, and of their characters, side by side.

  Of the characters c_1..c_M, with embeddings e and 0 beyond both ends:

    max_i relu(W [e_{i-2}, ..., e_{i+2}] + b)

  over the characters that are there: so beginnings and endings differ from the
  middle. On GPU the gradient of an embedding is added up in no fixed order.

  Reference: dos Santos & Zadrozny 2014, Learning character-level
    representations for part-of-speech tagging, section 2.1.2; the unknown word
    trained by dropout: Kiperwasser & Goldberg 2016,
    https://arxiv.org/abs/1603.04351, section 4.1.

  Attributes:
    num_words, num_characters: rows of the tables; row 0 pads, 1 is unknown.
    others: as in `schema.ModelConfig`.
  """

  embedding: str
  num_words: int
  num_characters: int
  word_width: int
  character_width: int
  character_features: int
  word_dropout: float
  embedding_dropout: float

  @nn.compact
  def __call__(self, ids: jax.Array, train: bool) -> jax.Array:
    """Ids [B, T, 1 + M], of the word and of its characters, to [B, T, E].

    Where the word's id is 0 there is no token, and all features are 0.
    """
    ids = jnp.asarray(ids, jnp.int32)
    words, characters, parts = ids[..., 0], ids[..., 1:], []
    if self.embedding in ("words", "both"):
      known = words
      if train and self.word_dropout:
        rng = self.make_rng("dropout")
        hide = jax.random.bernoulli(rng, self.word_dropout, words.shape)
        known = jnp.where(hide, _UNKNOWN, words)
      parts.append(_table(self.num_words, self.word_width, "words")(known))
    if self.embedding in ("characters", "both"):
      size = (self.num_characters, self.character_width)
      y = _only(characters > 0, _table(*size, "characters")(characters))
      y = nn.relu(blocks.dense(self.character_features)(_windows(y)))
      parts.append(jnp.max(_only(characters > 0, y), axis=-2))
    x = jnp.concatenate(parts, -1)
    x = nn.Dropout(self.embedding_dropout, deterministic=not train)(x)
    return _only(words > 0, x)


def _table(rows: int, width: int, name: str) -> nn.Embed:
  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # Flat: XLA compiles a shaped draw for seconds.
    values = jax.random.normal(key, (math.prod(shape),), dtype)
    return values.reshape(shape) / math.sqrt(width)

  return nn.Embed(rows, width, embedding_init=init, name=name)


def _only(where: jax.Array, x: jax.Array) -> jax.Array:
  return jnp.where(where[..., None], x, 0)


def _windows(x: jax.Array) -> jax.Array:
  """[..., M, C] to [..., M, _WINDOW C], 0 beyond both ends."""
  before, length = _WINDOW // 2, x.shape[-2]
  ends = [(0, 0)] * (x.ndim - 2) + [(before, _WINDOW - 1 - before), (0, 0)]
  x = jnp.pad(x, ends)
  shifted = [x[..., k : k + length, :] for k in range(_WINDOW)]
  return jnp.concatenate(shifted, axis=-1)


def make_hide(real: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """A function that gives 0 where no token is, at any level of the network.

  Args:
    real: bool [B, T], where tokens are.

  Returns:
    A function of x [B, T / 2^l, C]; a coarse position is hidden where all the
    tokens below it are.
  """

  def hide(x: jax.Array) -> jax.Array:
    batch, length, _ = x.shape
    return _only(real.reshape(batch, length, -1).any(-1), x)

  return hide
