"""Resampling to a spacing: a ramp, SciPy, and a run from disk to disk."""

import json

import numpy as np
import pytest
from scipy import ndimage

from tests import volumes_test
from unet_jax import config as config_lib
from unet_jax import main, predict, tiles
from unet_jax.data import nifti, pipeline, respace
from unet_jax.errors import UserError

nib = pytest.importorskip("nibabel")

GRIDS = [
  ((9, 7, 5), (2.0, 1.0, 3.1), (1.0, 1.3, 1.7)),
  ((12, 11, 10), (0.7, 0.9, 1.1), (1.6, 2.2, 1.1)),
  ((1, 6, 8), (5.0, 1.0, 1.0), (1.0, 0.6, 1.0)),
]


def resized(size, old, new):
  return respace.new_size(size, old, new, max_pixels=10**6, path="x.nii.gz")


def places(size, spacing):
  """Where the voxels are along each axis, from the centre of the volume."""
  return [
    (np.arange(n) - (n - 1) / 2) * h for n, h in zip(size, spacing, strict=True)
  ]


def ramp(axes):
  x, y, z = np.meshgrid(*axes, indexing="ij")
  return (3 + 0.5 * x - 2 * y + 0.25 * z).astype(np.float32)


@pytest.mark.parametrize(("size", "old", "new"), GRIDS)
def test_a_ramp_stays_where_it_is(size, old, new):
  there = places(size, old)
  image = ramp(there)[..., None]
  target = resized(size, old, new)
  found = respace.resample(image, old, new, target, linear=True)
  # Beyond the outermost voxels their own value holds.
  axes = [
    np.clip(x, t[0], t[-1])
    for x, t in zip(places(target, new), there, strict=True)
  ]
  np.testing.assert_allclose(found[..., 0], ramp(axes), atol=1e-4)
  assert found.dtype == np.float32
  for n, m, a, b in zip(target, size, old, new, strict=True):
    assert abs(n * b - m * a) <= max(b / 2, b - m * a)  # The same extent.


@pytest.mark.parametrize(("size", "old", "new"), GRIDS)
@pytest.mark.parametrize("linear", [True, False])
def test_it_is_scipys(size, old, new, linear):
  rng = np.random.default_rng(0)
  # Off the ties, of which each has its own rule.
  new = tuple(x * 1.013 for x in new)
  array = rng.integers(0, 9, size).astype(np.float32 if linear else np.uint8)
  target = resized(size, old, new)
  steps = np.array(new) / old
  offset = (np.array(size) - 1) / 2 - (np.array(target) - 1) / 2 * steps
  expected = ndimage.affine_transform(
    array, steps, offset, target, order=int(linear), mode="nearest"
  )
  found = respace.resample(array, old, new, target, linear=linear)
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert found.dtype == array.dtype


def test_where_both_grids_have_one_extent_it_is_zoom():
  image = np.random.default_rng(1).normal(size=(6, 8, 4)).astype(np.float32)
  old, new = (2.0, 1.0, 1.0), (1.0, 2.0, 0.5)
  found = respace.resample(image, old, new, (12, 4, 8), linear=True)
  assert resized(image.shape, old, new) == (12, 4, 8)
  expected = ndimage.zoom(
    image, (2, 0.5, 2), order=1, mode="nearest", grid_mode=True
  )
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ids_come_back_from_a_finer_grid():
  ids = np.random.default_rng(2).integers(0, 99, (4, 5, 6)).astype(np.int32)
  finer = respace.resample(
    ids, (1, 1, 1), (0.5,) * 3, (8, 10, 12), linear=False
  )
  assert set(finer.ravel()) == set(ids.ravel())
  back = respace.resample(finer, (0.5,) * 3, (1, 1, 1), ids.shape, linear=False)
  np.testing.assert_array_equal(back, ids)


# --- From disk to disk --------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run that sees voxels of one millimetre; files have 2 x 1 x 1."""
  root = tmp_path_factory.mktemp("respaced")
  volumes_test.write_folder(root / "data")
  fields = {"data__spacing": (1.0, 1.0, 1.0), "data__pad_multiple": 16}
  for name in ("num_steps", "eval_every", "checkpoint_every"):
    fields[f"train__{name}"] = 3
  cfg = volumes_test.make_config(root / "data", **fields)
  (root / "config.json").write_text(config_lib.to_text(cfg))
  flags = ["--config", str(root / "config.json"), "--workdir"]
  assert main.main([*flags, str(root / "run")]) == 0
  return cfg, root


def test_examples_lie_on_the_new_grid(trained):
  cfg, root = trained
  source = pipeline.make_source(cfg, "train", root / "run" / "split")
  for i in range(len(source)):
    image, label = volumes_test.draw(i, (7 + i % 2, 12 - i % 3, 9))
    size = (2 * label.shape[0], *label.shape[1:])
    example = source[i]
    assert source.size(i) == example["label"].shape == size
    assert source.spacing(i) == (1.0, 1.0, 1.0)
    np.testing.assert_array_equal(example["label"], label.repeat(2, 0))
    assert example["weight"].shape == size and example["weight"].all()
    # Linear along the axis that was doubled, whatever the units of the file.
    want = ndimage.zoom(
      image, (2, 1, 1), order=1, mode="nearest", grid_mode=True
    )
    got = np.corrcoef(example["image"].ravel(), want.ravel())[0, 1]
    assert got > 0.99999
  _, label = volumes_test.draw(1, (8, 11, 9))
  np.testing.assert_array_equal(
    source.instances(1), 300 * label.repeat(2, 0).astype(int)
  )
  val = pipeline.make_source(cfg, "val", root / "run" / "split")
  assert val.spacing(2) is None and val.size(2) == np.load(val.path(2)).shape


def test_predictions_come_back_on_the_grid_of_the_file(trained, tmp_path):
  cfg, root = trained
  path = root / "data" / "images" / "v5.nii.gz"
  flags = ["--mode", "predict", "--workdir", str(root / "run")]
  more = ["--input", str(path), "--config.predict.probability=true"]
  assert main.main([*flags, *more, "--output", str(tmp_path / "one")]) == 0
  mask = nib.load(tmp_path / "one" / "v5_mask.nii.gz")
  image = nib.load(path)
  np.testing.assert_allclose(mask.affine, image.affine)
  assert mask.shape == image.shape
  # By hand: the volume as it is read, the network, each probability back.
  source = pipeline.make_source(cfg, "val", root / "run" / "split")
  run = predict.make_predict(cfg, root / "run")
  _, probs = run(source.image(0))
  size = source.stored.size(0)
  ones = (1.0, 1.0, 1.0)
  back = respace.resample(probs, ones, (2.0, 1.0, 1.0), size, linear=True)
  canonical = nib.as_closest_canonical(mask)
  np.testing.assert_array_equal(
    np.asarray(canonical.dataobj), tiles.most_probable(back)
  )
  np.testing.assert_array_equal(
    np.load(tmp_path / "one" / "v5_probability.npy"),
    nifti.to_file_axes(back, path),
  )
  # The examples of a split are the same files.
  split = ["--config.predict.max_images=1", "--output", str(tmp_path / "val")]
  assert main.main([*flags, *split]) == 0
  again = nib.load(tmp_path / "val" / "v5_mask.nii.gz")
  np.testing.assert_array_equal(
    np.asarray(again.dataobj), np.asarray(mask.dataobj)
  )


def test_what_does_not_go_with_it_is_refused(trained, tmp_path, capfd):
  _, root = trained
  for fields, message in (
    ({"data__spacing": (1.0, 1.0)}, "give 3 entries"),
    (
      {"data__spacing": (0.001,) * 3, "data__max_pixels": 10**5},
      "voxels of it, more than data.max_pixels=100000",
    ),
  ):
    with pytest.raises(UserError, match=message):
      other = volumes_test.make_config(root / "data", **fields)
      source = pipeline.make_source(other, "train", tmp_path)
      source.check(0, read_label=False)
  config = config_lib.default_config()
  config.data.spacing = (1.0, 1.0, 1.0)
  with pytest.raises(
    UserError, match=r"no meaning for data.source='synthetic'"
  ):
    config_lib.parse(config)
  run = ["--workdir", str(root / "run")]
  assert main.main([*run, "--mode", "explain"]) == 2
  assert "data.spacing is not explained" in capfd.readouterr().err


def test_the_report_knows_both_grids(trained, tmp_path):
  _, root = trained
  flags = ["--config", str(root / "config.json"), "--workdir", str(tmp_path)]
  assert main.main([*flags, "--mode", "check_data"]) == 0
  report = json.loads((tmp_path / "data_report.json").read_text())
  assert "8 x 11 x 9" in json.dumps(report)
