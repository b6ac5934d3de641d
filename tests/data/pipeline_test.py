"""Order, crops and padding against brute force; many hosts against one."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from unet_jax import config, geometry, schema
from unet_jax.data import pipeline
from unet_jax.errors import UserError

NONE = {"mode": "none", "mean": None, "std": None}


class Numbers:
  """Example i is filled with i + 1, or counts its pixels from i * 1000."""

  def __init__(self, sizes, *, counting=False):
    self.sizes = sizes
    self.counting = counting
    self.names = [str(i) for i in range(len(sizes))]

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, index):
    size = self.sizes[index]
    label = np.full(size, index + 1, np.int32)
    if self.counting:
      label = np.arange(np.prod(size), dtype=np.int32).reshape(size)
      label += 1000 * index
    return {
      "image": label[..., None].astype(np.float32),
      "label": label,
      "weight": np.ones(size, np.float32),
      "instances": label,
    }

  def size(self, index):
    return self.sizes[index]


def make_config(*, padding="same", dims=2, crop=4, widths=(8, 16), **sections):
  if padding == "valid":
    crop = geometry.nearest_legal(crop, len(widths) - 1, "valid")[1]
  sections.setdefault("data", {})
  sections["data"] = {"crop_size": (crop,), **sections["data"]}
  model = {"dims": dims, "widths": widths, "padding": padding}
  return config.parse({"model": model, **sections})


def take(batches, num):
  return list(itertools.islice(batches, num))


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype
    np.testing.assert_array_equal(a[name], b[name])


# --- Mirroring and crops ------------------------------------------------------


def mirrored(n, before, after):
  """Indexes by walking to and fro, one step at a time."""

  def walk(steps):
    position, direction, path = 0, 1, []
    for _ in range(steps):
      if n > 1 and not 0 <= position + direction < n:
        direction = -direction
      position += direction if n > 1 else 0
      path.append(position)
    return path

  right = walk(n - 1 + after)[n - 1 :]
  return walk(before)[::-1] + list(range(n)) + right


@pytest.mark.parametrize("n", [1, 2, 3, 5])
# Two poolings take 20 pixels from each side; "valid" sizes are 4 m less 4.
@pytest.mark.parametrize(
  ("padding", "multiple", "before", "sizes"),
  [
    ("same", 1, 0, (lambda n: -(-n // 4) * 4, 4)),
    ("same", 12, 0, (lambda n: 12, 12)),
    ("valid", 1, 20, (lambda n: -(-n // 4) * 4 + 40, 44)),
    ("valid", 16, 20, (lambda n: 56, 56)),
  ],
)
def test_padding_mirrors_to_and_fro(n, padding, multiple, before, sizes):
  image = np.random.default_rng(0).normal(size=(n, 4, 2))
  got = pipeline.pad_for_network(image, 2, padding, multiple)
  rows = mirrored(n, before, sizes[0](n) - before - n)
  columns = mirrored(4, before, sizes[1] - before - 4)
  np.testing.assert_array_equal(got, image[rows][:, columns])


def crop_of(size, crop, margin, seed):
  label = np.arange(np.prod(size)).reshape(size)
  example = {
    "image": label[..., None].astype(np.float32),
    "label": label,
    "weight": np.full(size, 0.5, np.float32),
  }
  return pipeline.random_crop(
    example, crop, margin, np.random.default_rng(seed)
  )


@pytest.mark.parametrize("margin", [0, 3])
def test_output_windows_lie_inside_and_are_uniform(margin):
  size, window = (9, 7), (4, 5)
  crop = [w + 2 * margin for w in window]
  corners = np.zeros((6, 3))
  padded = np.pad(np.arange(63).reshape(size), margin, mode="reflect")
  for seed in range(900):
    got = crop_of(size, crop, margin, seed)
    inner = tuple(slice(margin, margin + w) for w in window)
    corner = np.unravel_index(got["label"][inner][0, 0], size)
    corners[corner] += 1
    # The whole tile, context included, is a piece of the mirrored image.
    tile = tuple(slice(c, c + s) for c, s in zip(corner, crop, strict=True))
    np.testing.assert_array_equal(got["label"], padded[tile])
    np.testing.assert_array_equal(got["image"][..., 0], padded[tile])
    # Only pixels of the image itself have weight.
    own = np.pad(np.full(size, 0.5), margin)[tile]
    np.testing.assert_array_equal(got["weight"], own)
  # 50 expected in each of the 18 places; 5 standard deviations are 34.
  assert (abs(corners - 50) < 34).all()


@pytest.mark.parametrize("size", [(1,), (3, 2), (2, 9, 4)])
def test_images_smaller_than_the_window(size):
  crop = (8,) * len(size)
  for seed in range(20):
    got = crop_of(size, crop, 0, seed)
    own = [min(n, 8) for n in size]
    # Each pixel of the image that fits is there once, with its weight.
    seen = got["label"][got["weight"] > 0]
    assert len(seen) == len(np.unique(seen)) == np.prod(own)
    assert got["weight"].sum() == 0.5 * np.prod(own)
    assert set(np.unique(got["label"])) <= set(range(np.prod(size)))
    np.testing.assert_array_equal(got["image"][..., 0], got["label"])


# --- Training -----------------------------------------------------------------


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_batches_depend_on_nothing_but_the_step(padding):
  sizes = [(int(9 + i % 5), 12) for i in range(11)]
  source = Numbers(sizes, counting=True)
  cfg = make_config(padding=padding, train={"batch_size": 6}, seed=3)
  want = take(pipeline.train_batches(source, NONE, cfg=cfg, first_step=0), 12)
  for threads, first in [(1, 0), (7, 0), (3, 4), (2, 11)]:
    data = dataclasses.replace(cfg.data, num_threads=threads)
    other = dataclasses.replace(cfg, data=data)
    batches = pipeline.train_batches(source, NONE, cfg=other, first_step=first)
    for a, b in zip(take(batches, 12 - first), want[first:], strict=True):
      assert_same(a, b)
  hosts = [
    pipeline.train_batches(
      source, NONE, cfg=cfg, first_step=2, host=h, num_hosts=2
    )
    for h in range(2)
  ]
  for whole in want[2:6]:
    parts = [next(host) for host in hosts]
    joined = {k: np.concatenate([p[k] for p in parts]) for k in whole}
    assert_same(joined, whole)
  another = dataclasses.replace(cfg, seed=4)
  batches = pipeline.train_batches(source, NONE, cfg=another, first_step=0)
  assert (next(batches)["image"] != want[0]["image"]).any()


def test_each_epoch_is_a_new_permutation():
  source = Numbers([(4, 4)] * 10)
  cfg = make_config(train={"batch_size": 4})
  batches = pipeline.train_batches(source, NONE, cfg=cfg, first_step=0)
  batches = take(batches, 20)
  for batch in batches:
    assert batch["id"].dtype == np.int32 and (batch["valid"] == 1).all()
    np.testing.assert_array_equal(batch["label"][:, 0, 0], batch["id"] + 1)
  epochs = np.concatenate([b["id"] for b in batches]).reshape(8, 10)
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in epochs}) == 8


@pytest.mark.parametrize("num", [1, 4, 7])
def test_batches_of_one(num):
  """The paper's batch; an endless length would not fit an integer."""
  cfg = make_config(train={"batch_size": 1})
  source = Numbers([(4, 4)] * num)
  batches = pipeline.train_batches(source, NONE, cfg=cfg, first_step=0)
  ids = [int(b["id"][0]) for b in take(batches, 2 * num)]
  assert sorted(ids[:num]) == sorted(ids[num:]) == list(range(num))


def test_starting_late_reads_nothing_before():
  source = Numbers([(4, 4)] * 10**6)
  cfg = make_config(train={"batch_size": 8})
  batch = next(pipeline.train_batches(source, NONE, cfg=cfg, first_step=10**12))
  assert len(np.unique(batch["id"])) == 8


class Counted(Numbers):
  """Numbers that note each reading."""

  def __init__(self, sizes):
    super().__init__(sizes, counting=True)
    self.reads = collections.Counter()

  def __getitem__(self, index):
    self.reads[index] += 1
    return super().__getitem__(index)


def test_nothing_is_read_beyond_the_end():
  source = Counted([(4, 4)] * 24)
  cfg = make_config(train={"batch_size": 4}, data={"num_threads": 4})
  # The same examples; its threads read on for a while.
  other = Counted([(4, 4)] * 24)
  endless = pipeline.train_batches(other, NONE, cfg=cfg, first_step=0)
  want = take(endless, 3)
  ended = pipeline.train_batches(
    source, NONE, cfg=cfg, first_step=1, end_step=3
  )
  got = take(ended, 3)
  assert len(got) == 2
  for a, b in zip(got, want[1:], strict=True):
    assert_same(a, b)
  ids = np.concatenate([b["id"] for b in got]).tolist()
  assert source.reads == collections.Counter(ids)
  done = pipeline.train_batches(source, NONE, cfg=cfg, first_step=3, end_step=3)
  assert take(done, 1) == []


# An example of 128 x 128 has 3 arrays of 64 KiB: five make a megabyte.
@pytest.mark.parametrize(("megabytes", "kept"), [(0, 0), (1, 5), (9, 8)])
def test_examples_are_kept_until_the_megabytes_are_full(megabytes, kept):
  source = Counted([(128, 128)] * 8)
  cfg = make_config(
    train={"batch_size": 4},
    data={"num_threads": 1},
    runtime={"example_cache_mb": megabytes},
  )
  batches = pipeline.train_batches(
    source, NONE, cfg=cfg, first_step=0, end_step=6
  )
  for batch in batches:
    assert len(np.unique(batch["id"])) == 4
    for i, label in zip(batch["id"], batch["label"], strict=True):
      # Cut from the right example, though all batches are written to.
      assert (label >= 1000 * i).all() and (label < 1000 * i + 128**2).all()
      assert (np.diff(label, axis=1) == 1).all()
    for array in batch.values():
      array[...] = -1
  assert sorted(source.reads.values()) == [1] * kept + [3] * (8 - kept)


def test_source_smaller_than_a_batch_gets_different_crops():
  source = Numbers([(40, 40)], counting=True)
  cfg = make_config(train={"batch_size": 6})
  batch = next(pipeline.train_batches(source, NONE, cfg=cfg, first_step=0))
  assert (batch["id"] == 0).all()
  assert len({x.tobytes() for x in batch["image"]}) == 6


def test_normalisation_sees_the_whole_image():
  source = Numbers([(8, 8)], counting=True)
  cfg = make_config(train={"batch_size": 5})
  image = {"mode": "image", "mean": None, "std": None}
  batch = next(pipeline.train_batches(source, image, cfg=cfg, first_step=0))
  pixels = np.arange(64)
  want = (batch["label"] - pixels.mean()) / pixels.std()
  np.testing.assert_allclose(batch["image"][..., 0], want, atol=1e-5)


def test_hosts_must_divide_the_batch():
  cfg = make_config(train={"batch_size": 6})
  with pytest.raises(UserError, match=r"batch_size=6 .* 4 hosts; nearest: 8"):
    pipeline.train_batches(
      Numbers([(4, 4)]), NONE, cfg=cfg, first_step=0, num_hosts=4
    )


# --- Evaluation ---------------------------------------------------------------

MIXED = [(33, 40), (64, 64), (1, 1), (35, 40), (64, 64), (20, 70), (64, 64)] * 3


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_every_example_once_whole_and_on_the_output_grid(padding, num_devices):
  source = Numbers(MIXED, counting=True)
  cfg = make_config(
    padding=padding,
    widths=(8, 16, 32),
    crop=64,
    eval={"batch_size": 5, "batch_pixels": 4 * 128 * 128},
    data={"pad_multiple": 16},
  )
  seen = []
  for batch in pipeline.eval_batches(
    source, NONE, cfg=cfg, num_devices=num_devices
  ):
    num, *padded, _ = batch["image"].shape
    if padding == "same":
      assert all(n % 16 == 0 for n in padded)
    assert num % num_devices == 0 and num <= max(5, num_devices)
    output = [geometry.output_size(n, 2, padding) for n in padded]
    assert batch["label"].shape == batch["weight"].shape == (num, *output)
    before = geometry.valid_loss(2) // 2 if padding == "valid" else 0
    for row, i in enumerate(batch["id"]):
      truth = source[i]["label"]
      window = tuple(slice(0, n) for n in truth.shape)
      np.testing.assert_array_equal(batch["label"][row][window], truth)
      assert (batch["weight"][row][window] == 1).all()
      assert batch["weight"][row].sum() == truth.size
      own = tuple(slice(before, before + n) for n in truth.shape)
      np.testing.assert_array_equal(batch["image"][row][own][..., 0], truth)
      if batch["valid"][row]:
        seen.append(int(i))
  assert sorted(seen) == list(range(len(MIXED)))


@pytest.mark.parametrize("multiple", [1, 64])
def test_one_shape_and_one_size_a_batch(multiple):
  rng = np.random.default_rng(0)
  sizes = [tuple(rng.integers(200, 800, 2).tolist()) for _ in range(300)]
  cfg = make_config(
    widths=(8, 16, 32, 64),
    crop=64,
    eval={"batch_size": 8},
    data={"pad_multiple": multiple},
  )
  plan = pipeline._plan_eval(sizes, cfg, 2, space=1)
  step = max(multiple, 8)
  shape = lambda i: tuple(-(-n // step) * step for n in sizes[i])
  num_images = collections.Counter(shape(i) for i in range(300))
  num_batches = collections.Counter(shape(ids[0]) for ids, _ in plan)
  for ids, valid in plan:
    assert len({shape(i) for i in ids}) == 1
    limit = cfg.eval.batch_pixels // np.prod(shape(ids[0]))
    most = max(min(8, limit) // 2, 1) * 2
    assert len(valid) == len(ids) <= most
    assert len(ids) - sum(valid) < 2 + len(ids) / 2
    least = -(-num_images[shape(ids[0])] // most)
    assert num_batches[shape(ids[0])] == least
  # No shape has two batch sizes: one compilation a shape.
  counts = {(shape(ids[0]), len(ids)) for ids, _ in plan}
  assert len(counts) == len(num_images)
  if multiple == 64:
    assert len(counts) <= 10**2


def test_hosts_share_the_batches_of_one():
  source = Numbers(MIXED, counting=True)
  cfg = make_config(eval={"batch_size": 4})
  whole = list(pipeline.eval_batches(source, NONE, cfg=cfg, num_devices=4))
  hosts = [
    list(
      pipeline.eval_batches(
        source, NONE, cfg=cfg, num_devices=4, host=h, num_hosts=2
      )
    )
    for h in range(2)
  ]
  assert len(hosts[0]) == len(hosts[1]) == len(whole)
  for *parts, batch in zip(*hosts, whole, strict=True):
    joined = {k: np.concatenate([p[k] for p in parts]) for k in batch}
    assert_same(joined, batch)


def test_damage_surfaces_as_a_user_error_with_the_file(tmp_path):
  for kind in ("images", "masks"):
    (tmp_path / kind).mkdir()
    for i in range(4):
      ones = Image.fromarray(np.ones((4, 4), np.uint8))
      ones.save(tmp_path / kind / f"{i}.png")
  data = {"source": "folder", "dir": str(tmp_path), "val_fraction": 0.0}
  cfg = make_config(data=data | {"test_fraction": 0.0})
  source = pipeline.make_source(cfg, "train", tmp_path / "work")
  (tmp_path / "images" / "2.png").write_bytes(b"")
  train = pipeline.train_batches(source, NONE, cfg=cfg, first_step=0)
  with pytest.raises(UserError, match=r"images/2\.png"):
    next(train)
  with pytest.raises(UserError, match=r"images/2\.png"):
    list(pipeline.eval_batches(source, NONE, cfg=cfg, num_devices=1))


def test_sources_are_the_choices_of_the_schema():
  fields = {f.name: f for f in dataclasses.fields(schema.DataConfig)}
  assert set(pipeline.SOURCES) == set(fields["source"].metadata["choices"])
  cfg = make_config(dims=1)
  source = pipeline.make_source(cfg, "val", None)
  assert len(source) == 32 and source.size(0) == (64,)
  for split in pipeline.list_splits(cfg, None):
    assert len(pipeline.make_source(cfg, split, None)) >= 32
  assert len(pipeline.list_splits(cfg, None)) == 3
