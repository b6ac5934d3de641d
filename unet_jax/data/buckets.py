"""Sentences of many lengths in a few shapes, padded with id 0.

A sentence is padded to the shortest of `data.buckets` and `data.crop_size` that
holds it, in training as in evaluation; what is longer is cut at random in
training, and padded to a multiple of `data.crop_size` in evaluation. So what is
predicted for a sentence depends on nothing but the sentence.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from unet_jax.schema import Config, DataConfig

# Of a step: example ids int64 [B] and the length of its rows.
Plan = Callable[[int], tuple[np.ndarray, int]]


def padded_length(length: int, cfg: DataConfig) -> int:
  """The length that a sentence of `length` tokens is padded to."""
  longest = cfg.crop_size[0]
  fits = [n for n in (*cfg.buckets, longest) if n >= length]
  return min(fits) if fits else -(-length // longest) * longest


def train_lengths(lengths: Sequence[int], cfg: DataConfig) -> np.ndarray:
  """The length of the rows that each sentence is trained in, int64 [N]."""
  longest = cfg.crop_size[0]
  return np.array([min(padded_length(n, cfg), longest) for n in lengths])


def plan_training(lengths: Sequence[int], cfg: Config) -> Plan:
  """The batch of every step: sentences of one bucket, a function of the seed.

  An epoch is a permutation of as many batches of each bucket as its sentences
  fill, rounded, but at least one. A bucket's batches go through permutations
  of its sentences without a gap, so that a batch may span two.
  """
  size, rows = cfg.train.batch_size, train_lengths(lengths, cfg.data)
  found = np.unique(rows)
  members = [np.flatnonzero(rows == n) for n in found]
  counts = [max(round(len(m) / size), 1) for m in members]
  slots = np.repeat(np.arange(len(found)), counts)

  def plan(step: int) -> tuple[np.ndarray, int]:
    epoch, place = divmod(step, len(slots))
    order = np.random.default_rng((cfg.seed, epoch)).permutation(slots)
    bucket = int(order[place])
    batch = epoch * counts[bucket] + int((order[:place] == bucket).sum())
    own = members[bucket]
    rounds, places = np.divmod(np.arange(size) + batch * size, len(own))
    ids = np.empty(size, np.int64)
    for r in np.unique(rounds):
      rng = np.random.default_rng((cfg.seed, bucket, int(r)))
      shuffled = rng.permutation(own)
      ids[rounds == r] = shuffled[places[rounds == r]]
    return ids, int(found[bucket])

  return plan


def cut(
  example: Mapping[str, np.ndarray], length: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
  """A window of `length` tokens, padded behind with id 0 and weight 0.

  Of a longer sentence the window lies at a uniform position.
  """
  n = len(example["weight"])
  start = int(rng.integers(max(n - length, 0) + 1))
  window = {k: array[start : start + length] for k, array in example.items()}
  return pad(window, length)


def pad(
  example: Mapping[str, np.ndarray], length: int
) -> dict[str, np.ndarray]:
  """Pads all arrays [T, ...] with 0 to `length` tokens."""
  return {
    k: np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)])
    for k, x in example.items()
  }
