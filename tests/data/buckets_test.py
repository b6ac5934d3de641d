"""Buckets: few shapes, every sentence equally often, nothing lost."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from tests.data.tokens_test import make_config
from unet_jax.data import buckets, pipeline
from unet_jax.data.tokens import TokenSource

LENGTHS = np.random.default_rng(0).integers(1, 40, 101).tolist()
MODE = {"mode": "none", "mean": None, "std": None}


@pytest.fixture
def cfg(tmp_path):
  """Sentences of LENGTHS; token t of sentence i is the word "i_t"."""
  for split in ("train", "val"):
    text = "\n".join(
      "".join(f"{i}_{t}\t{'XY'[t % 2]}\n" for t in range(n))
      for i, n in enumerate(LENGTHS)
    )
    (tmp_path / f"{split}.tsv").write_text(text)
  cfg = make_config(
    tmp_path,
    data__num_classes=2,
    data__buckets=(8, 16),
    data__crop_size=(24,),
    data__max_characters=6,
  )
  train = dataclasses.replace(cfg.train, batch_size=6)
  return dataclasses.replace(cfg, train=train)


@pytest.fixture
def source(cfg, tmp_path):
  return TokenSource(cfg, "train", tmp_path / "split")


@pytest.mark.parametrize(
  ("length", "padded"),
  [(1, 8), (8, 8), (9, 16), (24, 24), (25, 48), (48, 48), (49, 72)],
)
def test_the_shortest_length_that_holds_a_sentence(cfg, length, padded):
  assert buckets.padded_length(length, cfg.data) == padded


def test_an_epoch_sees_every_sentence_about_once(cfg):
  plan = buckets.plan_training(LENGTHS, cfg)
  rows = buckets.train_lengths(LENGTHS, cfg.data)
  shares = {n: (rows == n).sum() for n in (8, 16, 24)}
  counts = {n: round(m / 6) for n, m in shares.items()}
  steps, epochs = sum(counts.values()), 20
  seen = collections.Counter()
  for epoch in range(epochs):
    lengths = collections.Counter()
    for step in range(epoch * steps, (epoch + 1) * steps):
      ids, length = plan(step)
      assert len(ids) == 6 and (rows[ids] == length).all()
      seen.update(ids.tolist())
      lengths[length] += 1
    assert lengths == counts
  for i, n in enumerate(rows):
    # Of a bucket that is k batches an epoch each is seen 6 k / m times in one.
    expected = epochs * 6 * counts[n] / shares[n]
    assert abs(seen[i] - expected) < 1


def test_a_bucket_smaller_than_a_batch_repeats_its_sentences(cfg):
  plan = buckets.plan_training([3, 5, 20], cfg)
  batches = [plan(step) for step in range(4)]
  assert {n for _, n in batches} == {8, 24}
  for ids, length in batches:
    assert sorted(ids) == ([2] * 6 if length == 24 else [0, 0, 0, 1, 1, 1])


def batches_of(cfg, source, first=0, end=30, **hosts):
  return list(
    pipeline.train_batches(
      source, MODE, cfg=cfg, first_step=first, end_step=end, **hosts
    )
  )


def test_a_batch_is_a_function_of_its_step_and_of_the_seed(cfg, source):
  whole, late = batches_of(cfg, source), batches_of(cfg, source, 17)
  for a, b in zip(whole[17:], late, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])
  other = batches_of(dataclasses.replace(cfg, seed=1), source)
  ids = [[b["id"].tolist() for b in run] for run in (whole, other)]
  assert ids[0] != ids[1]
  assert {b["label"].shape for b in whole} == {(6, 8), (6, 16), (6, 24)}


def test_hosts_share_the_batch_of_one(cfg, source):
  whole = batches_of(cfg, source, end=8)
  parts = [
    batches_of(cfg, source, end=8, host=h, num_hosts=2) for h in range(2)
  ]
  for batch, *mine in zip(whole, *parts, strict=True):
    for name, array in batch.items():
      both = np.concatenate([m[name] for m in mine])
      np.testing.assert_array_equal(both, array)


def check_row(source, batch, row, *, whole):
  """A row is its sentence, or a window of it, with nothing behind it."""
  example = source[int(batch["id"][row])]
  n, real = len(example["label"]), batch["weight"][row] > 0
  count = int(real.sum())
  assert real[:count].all()
  assert count == (n if whole else min(n, len(real)))
  image, label = batch["image"][row], batch["label"][row]
  assert image.dtype == np.int32 and not image[count:].any()
  assert not label[count:].any()
  starts = [
    start
    for start in range(n - count + 1)
    if (example["image"][start : start + count] == image[:count]).all()
  ]
  assert len(starts) == 1
  window = slice(starts[0], starts[0] + count)
  np.testing.assert_array_equal(label[:count], example["label"][window])
  return starts[0]


def test_training_rows_are_sentences_and_long_ones_are_cut_anywhere(
  cfg, source
):
  starts = collections.defaultdict(set)
  for batch in batches_of(cfg, source, end=60):
    for row, i in enumerate(batch["id"].tolist()):
      starts[i].add(check_row(source, batch, row, whole=False))
  longest = max(starts, key=lambda i: LENGTHS[i])
  assert len(starts[longest]) > 1
  assert all(starts[i] == {0} for i in starts if LENGTHS[i] <= 24)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_evaluation_sees_every_sentence_whole_and_once(
  cfg, source, num_devices
):
  seen = []
  shapes = set()
  for batch in pipeline.eval_batches(
    source, MODE, cfg=cfg, num_devices=num_devices
  ):
    shapes.add(batch["label"].shape[1])
    assert len(batch["id"]) % num_devices == 0
    for row in np.flatnonzero(batch["valid"]):
      check_row(source, batch, row, whole=True)
      seen.append(int(batch["id"][row]))
  assert sorted(seen) == list(range(len(LENGTHS)))
  assert shapes == {8, 16, 24, 48}


def test_the_real_sentences_take_few_shapes(data_root, tmp_path):
  cfg = make_config(
    data_root / "ewt_upos",
    data__num_classes=17,
    data__buckets=(16, 32),
    data__crop_size=(64,),
  )
  source = TokenSource(cfg, "val", tmp_path)
  lengths = [source.size(i)[0] for i in range(len(source))]
  padded = [buckets.padded_length(n, cfg.data) for n in lengths]
  assert len(set(lengths)) > 50 and len(set(padded)) <= 5
  # And a single length would take more than twice as much.
  assert sum(padded) < 0.4 * 64 * len(lengths)
  plan = buckets.plan_training(lengths, cfg)
  shapes = {plan(step)[1] for step in itertools.islice(range(1000), 300)}
  assert shapes == {16, 32, 64}
