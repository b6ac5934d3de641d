"""The paper's weight map against all pairs of pixels; its cache; its errors."""

import numpy as np
import pytest
from PIL import Image

from unet_jax import config, train
from unet_jax.data import pipeline, weight_map
from unet_jax.data.synthetic import SyntheticSource
from unet_jax.errors import UserError
from unet_jax.schema import Config, DataConfig, LossConfig

NONE = {"mode": "none", "mean": None, "std": None}


def brute_force(objects, w0, sigma):
  """The formula, each pixel with each pixel of each object."""
  places = np.argwhere(np.ones(objects.shape, bool))
  ids = [i for i in np.unique(objects) if i != 0]
  term = np.zeros(objects.shape)
  for at in map(tuple, places):
    if objects[at] == 0 and len(ids) > 1:
      nearest = sorted(
        np.sqrt(((np.argwhere(objects == i) - at) ** 2).sum(1)).min()
        for i in ids
      )
      term[at] = w0 * np.exp(-((nearest[0] + nearest[1]) ** 2) / 2 / sigma**2)
  return term


def random_objects(shape, seed):
  """Small boxes with ids that have gaps; one has a second part elsewhere."""
  rng = np.random.default_rng(seed)
  objects = np.zeros(shape, np.int64)
  for number in (3, 4, 9, 70_000, 4):
    start = [rng.integers(0, n - 2) for n in shape]
    box = tuple(slice(s, s + rng.integers(1, 4)) for s in start)
    objects[box] = number
  return objects


@pytest.mark.parametrize("shape", [(90,), (31, 24), (9, 8, 7)])
@pytest.mark.parametrize(("w0", "sigma"), [(10.0, 5.0), (2.0, 2.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_term_is_that_of_brute_force(shape, w0, sigma, seed):
  objects = random_objects(shape, seed)
  term = weight_map.border_term(objects, w0, sigma)
  assert term.dtype == np.float32 and term.shape == shape
  assert term.any()
  np.testing.assert_allclose(
    term, brute_force(objects, w0, sigma), rtol=1e-6, atol=2**-24
  )


def test_term_of_two_cells_a_pixel_apart_by_hand():
  # d1 = d2 = 1 between them: 10 exp(-4 / 50); beside them d1 + d2 = 1 + 3.
  objects = np.array([0, 1, 0, 2, 0])
  want = 10 * np.exp(-(np.array([4, 0, 2, 0, 4.0]) ** 2) / 50)
  want[[1, 3]] = 0
  np.testing.assert_allclose(
    weight_map.border_term(objects, 10.0, 5.0), want, rtol=1e-6
  )


@pytest.mark.parametrize("objects", [np.zeros((5, 4)), np.eye(5), np.ones(3)])
def test_fewer_than_two_objects_have_no_gap(objects):
  assert not weight_map.border_term(objects.astype(int), 10.0, 5.0).any()


def test_touching_objects_lose_both_sides_of_the_contact():
  objects = np.array(
    [
      [1, 1, 2, 2, 0],
      [1, 1, 2, 2, 0],
      [0, 0, 0, 0, 0],
      [7, 7, 0, 0, 7],
    ]
  )
  touching = np.zeros((4, 5), bool)
  touching[:2, 1:3] = True
  np.testing.assert_array_equal(weight_map.touches_another(objects), touching)
  corner = np.array([[1, 0], [0, 2]])
  np.testing.assert_array_equal(weight_map.touches_another(corner), corner > 0)


def test_components_are_of_one_class_and_share_faces():
  label = np.array([[1, 1, 2, 0], [0, 0, 2, 0], [1, 0, 0, 1]])
  ids = weight_map.components(label, 3)
  assert np.array_equal(ids == 0, label == 0)
  groups = {tuple(np.argwhere(ids == i)[0]) for i in np.unique(ids)[1:]}
  assert groups == {(0, 0), (0, 2), (2, 0), (2, 3)}
  assert (ids[0, :2] == ids[0, 0]).all()


def make_config(**data):
  loss = LossConfig(class_weights=data.pop("class_weights", ()))
  return Config(data=DataConfig(**data), loss=loss)


class Given:
  """One example with these ids; None is without."""

  names = ("only",)

  def __init__(self, ids, label=None):
    self.ids = ids
    self.label = (ids > 0).astype(np.int32) if label is None else label
    self.weight = np.ones(self.label.shape, np.float32)

  def __len__(self):
    return 1

  def __getitem__(self, index):
    image = np.zeros((*self.label.shape, 1), np.float32)
    return {"image": image, "label": self.label, "weight": self.weight}

  def instances(self, index):
    return self.ids


def read(source, cfg, cache=None):
  return weight_map.read(source, 0, cfg, cache)


def test_times_the_class_weight_it_is_the_papers_map():
  ids = random_objects((30, 20), 2)
  given = Given(ids)
  given.weight[:, :5] = 0
  cfg = make_config(weight_map="instances", class_weights=(0.4, 3.0))
  got = read(given, cfg)
  np.testing.assert_array_equal(got["label"], given.label)
  of_class = np.where(ids > 0, 3.0, 0.4)
  want = of_class + brute_force(ids, 10.0, 5.0)
  want[:, :5] = 0
  np.testing.assert_allclose(got["weight"] * of_class, want, rtol=1e-6)


def test_separate_makes_background_between_touching_cells():
  ids = np.zeros((8, 12), int)
  ids[2:6, 1:6], ids[2:6, 6:11] = 1, 2
  cfg = make_config(weight_map="instances", separate=True)
  got = read(Given(ids), cfg)
  apart = np.where(weight_map.touches_another(ids), 0, ids)
  np.testing.assert_array_equal(got["label"], apart > 0)
  np.testing.assert_allclose(
    got["weight"], 1 + brute_force(apart, 10.0, 5.0), rtol=1e-6
  )
  # d1 + d2 = 1 + 2 in the gap.
  np.testing.assert_allclose(got["weight"][4, 5], 1 + 10 * np.exp(-9 / 50))


def test_a_source_without_ids_is_told_what_to_do():
  given = Given(None, label=np.zeros((4, 4), np.int32))
  for look in (read, weight_map.check):
    with pytest.raises(UserError, match=r"'only' has no ids.*'components'"):
      look(given, make_config(weight_map="instances"))
  by_class = make_config(weight_map="components")
  weight_map.check(given, by_class)
  assert (read(given, by_class)["weight"] == 1).all()


# --- The cache ----------------------------------------------------------------


def test_computed_once_and_found_again(tmp_path, monkeypatch):
  ids = random_objects((20, 20), 0)
  cfg = make_config(weight_map="instances")
  first = read(Given(ids), cfg, tmp_path)
  (kept,) = tmp_path.iterdir()
  own, calls = weight_map.border_term, []

  def count(*args):
    calls.append(args)
    return own(*args)

  monkeypatch.setattr(weight_map, "border_term", count)
  again = read(Given(ids), cfg, tmp_path)
  np.testing.assert_array_equal(first["weight"], again["weight"])
  assert not calls
  # Other ids, another w0: another map. A damaged file is made anew.
  read(Given(ids.T.copy()), cfg, tmp_path)
  wider = make_config(weight_map="instances", w0=9.0)
  read(Given(ids), wider, tmp_path)
  assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 3
  kept.write_bytes(kept.read_bytes()[:200])
  mended = read(Given(ids), cfg, tmp_path)
  np.testing.assert_array_equal(first["weight"], mended["weight"])
  assert len(calls) == 3


def test_the_users_cache_is_where_it_is_kept(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert weight_map.open_cache("user") == tmp_path / "unet_jax/weight_maps"
  assert weight_map.open_cache("") is None
  (tmp_path / "file").write_text("")
  assert weight_map.open_cache(str(tmp_path / "file")) is None


# --- In training --------------------------------------------------------------


def small(**data):
  sizes = {"crop_size": (16, 16), "synthetic_size": (16, 16)}
  return config.parse(
    {
      "model": {"widths": (2, 4)},
      "data": {**sizes, "weight_map": "instances", "normalize": "none", **data},
      "train": {"batch_size": 2},
      "runtime": {"map_cache": ""},
    }
  )


def test_training_has_the_map_and_evaluation_does_not():
  cfg = small(separate=True)
  source = SyntheticSource(cfg, "train", None)
  batches = pipeline.train_batches(source, NONE, cfg=cfg, first_step=0)
  batch = next(batches)
  batches.close()
  for j, index in enumerate(batch["id"]):
    want = weight_map.read(source, index, cfg, None)
    np.testing.assert_array_equal(batch["weight"][j], want["weight"])
    np.testing.assert_array_equal(batch["label"][j], want["label"])
  assert batch["weight"].max() > 3
  scored = pipeline.eval_batches(source, NONE, cfg=cfg, num_devices=1)
  batch = next(scored)
  scored.close()
  assert (batch["weight"] == 1).all()
  for j, index in enumerate(batch["id"]):
    np.testing.assert_array_equal(batch["label"][j], source[index]["label"])


def test_training_looks_for_the_ids_before_it_starts(tmp_path):
  root = tmp_path / "data"
  ids = random_objects((16, 16), 1) % 60_000 * 5
  for kind, array in {
    "images": np.zeros((16, 16), np.uint8),
    "masks": (ids > 0).astype(np.uint8),
    "instances": ids.astype(np.uint16),
  }.items():
    (root / kind).mkdir(parents=True)
    for stem in "abc":
      if (kind, stem) != ("instances", "c"):
        Image.fromarray(array).save(root / kind / f"{stem}.png")
  (root / "train.txt").write_text("a\nb\n")
  (root / "val.txt").write_text("c\n")
  cfg = small(source="folder", dir=str(root))
  source = pipeline.make_source(cfg, "train", tmp_path)
  np.testing.assert_array_equal(source.instances(0), ids)
  assert ids.max() > 255
  weight_map.check(source, cfg)
  # Nobody needs them elsewhere: val has none.
  assert pipeline.make_source(cfg, "val", tmp_path).instances(0) is None
  Image.fromarray(np.zeros((9, 9), np.uint16)).save(root / "instances/b.png")
  with pytest.raises(UserError, match=r"instances/b.png is 9 x 9; give both"):
    weight_map.check(source, cfg)
  (root / "instances/b.png").unlink()
  workdir = tmp_path / "run"
  with pytest.raises(UserError, match="'b' has no ids"):
    train.train_and_evaluate(cfg, workdir)
  assert not (workdir / "checkpoints").exists()
