"""Volumes from disk to disk: files made here, and the real hippocampus."""

import csv
import dataclasses
import gzip
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from unet_jax import config as config_lib
from unet_jax import main, predict
from unet_jax import workdir as workdir_lib
from unet_jax.data import decode, normalize, pipeline
from unet_jax.data.folder import check_source
from unet_jax.errors import UserError
from unet_jax.inspect import pictures

nib = pytest.importorskip("nibabel")

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
CODES = ("RAS", "LPS", "SAR", "AIL")


def draw(seed, size=(7, 12, 9)):
  """A bright ball, whose upper half is class 2; axes run right, front, up."""
  rng = np.random.default_rng(seed)
  centre = [rng.uniform(0.35, 0.65) * n for n in size]
  grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
  offsets = grid - np.reshape(centre, (3, 1, 1, 1))
  label = np.where((offsets**2).sum(0) < 10, 1 + (offsets[2] > 0), 0)
  return rng.normal(label > 0, 0.2), label.astype(np.uint8)


def write_folder(root):
  """Volumes turned each in its own way, of dtypes and ranges of their own."""
  for kind in ("images", "masks", "instances"):
    (root / kind).mkdir(parents=True)
  affine = np.diag([2.0, 1.0, 1.0, 1.0])
  for i in range(8):
    image, label = draw(i, (7 + i % 2, 12 - i % 3, 9))
    if i == 7:  # One is an array alone.
      np.save(root / "images" / "v7.npy", image.astype(np.float32))
      np.save(root / "masks" / "v7.npy", label)
      continue
    turn = nib.orientations.axcodes2ornt(CODES[i % len(CODES)])
    turn = nib.orientations.ornt_transform(
      nib.orientations.axcodes2ornt("RAS"), turn
    )
    scaled = (10.0**i) * (image + 3)
    scaled = scaled.astype(np.float32 if i % 2 else np.float64)
    parts = {"images": scaled, "masks": label}
    if i == 1:
      parts["instances"] = label.astype(np.int16) * 300
    for kind, array in parts.items():
      volume = nib.Nifti1Image(array, affine).as_reoriented(turn)
      nib.save(volume, root / kind / f"v{i}.nii.gz")
  (root / "train.txt").write_text("v0\nv1\nv2\nv3\nv4\n")
  (root / "val.txt").write_text("v5\nv6\nv7\n")


def make_config(root, **fields):
  config = config_lib.default_config()
  config.model.dims, config.model.widths = 3, (4, 6, 8)
  config.model.pool_axes = ("12", "012")
  config.data.source, config.data.dir = "volumes", str(root)
  config.data.num_classes, config.data.crop_size = 3, (6, 8, 8)
  config.data.clip_percentiles = (1.0, 99.0)
  config.augment.rotate, config.augment.elastic = 20.0, 0.5
  config.optimizer.learning_rate = 0.02
  config.train.num_steps, config.train.batch_size = 12, 8
  config.train.eval_every = config.train.checkpoint_every = 12
  config.train.num_pictures = 1
  for name, value in fields.items():
    config_lib.assign(config, name.replace("__", "."), value)
  return config_lib.parse(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  root = tmp_path_factory.mktemp("volumes")
  write_folder(root / "data")
  (root / "config.json").write_text(
    config_lib.to_text(make_config(root / "data"))
  )
  workdir = root / "run"
  flags = ["--config", str(root / "config.json"), "--workdir", str(workdir)]
  assert main.main(flags) == 0
  return root / "data", workdir


def test_examples_are_the_drawings_however_they_are_stored(trained):
  cfg = workdir_lib.read_config(trained[1])
  source = pipeline.make_source(cfg, "train", None)
  for i, name in enumerate(source.names):
    assert name == f"v{i}"
    image, label = draw(i, (7 + i % 2, 12 - i % 3, 9))
    example = source[i]
    np.testing.assert_array_equal(example["label"], label)
    got = normalize.normalize(example["image"], {"mode": "image"})[..., 0]
    want = (image - image.mean()) / image.std()
    np.testing.assert_allclose(got, want, atol=1e-3)
    assert source.size(i) == label.shape and source.spacing(i) == (2, 1, 1)
    source.check(i, read_label=True)
  _, label = draw(1, (8, 11, 9))
  np.testing.assert_array_equal(source.instances(1), 300 * label.astype(int))
  assert source.instances(0) is None
  val = pipeline.make_source(cfg, "val", None)
  assert val.names[2] == "v7" and val.spacing(2) is None


def test_training_crops_know_their_spacing(trained):
  cfg = workdir_lib.read_config(trained[1])
  cfg = dataclasses.replace(
    cfg, train=dataclasses.replace(cfg.train, batch_size=3)
  )
  for split, want in (("train", [2, 2, 2]), ("val", [1, 2, 2])):
    source = pipeline.make_source(cfg, split, None)
    batches = pipeline.train_batches(
      source, {"mode": "none"}, cfg=cfg, first_step=0, end_step=1
    )
    spacing = next(batches)["spacing"]
    assert spacing.dtype == np.float32 and (spacing[:, 1:] == 1).all()
    np.testing.assert_array_equal(np.sort(spacing[:, 0]), want)


def test_predicted_volumes_score_as_evaluation_does(trained, tmp_path):
  root, workdir = trained
  flags = ["--workdir", str(workdir), "--mode"]
  assert main.main([*flags, "evaluate"]) == 0
  rows = csv.DictReader(
    (workdir / "evaluation_val_per_image.csv").read_text().splitlines()
  )
  rows = {row["name"]: row for row in rows}
  out = str(tmp_path / "out")
  flags += ["predict", "--input", str(root / "images"), "--output", out]
  assert main.main([*flags, "--config.predict.probability=true"]) == 0
  for i in range(8):
    path = root / "images" / f"v{i}.nii.gz"
    if i == 7:
      truth = np.load(root / "masks" / "v7.npy")
      mask = np.load(tmp_path / "out" / "v7_mask.npy")
    else:
      image = nib.load(path)
      saved = nib.load(tmp_path / "out" / f"v{i}_mask.nii.gz")
      np.testing.assert_array_equal(saved.affine, image.affine)
      assert saved.header.get_zooms() == image.header.get_zooms()
      mask = np.asarray(saved.dataobj)
      truth = np.asarray(nib.load(root / "masks" / f"v{i}.nii.gz").dataobj)
    assert mask.shape == truth.shape and mask.dtype == np.uint8
    probability = np.load(tmp_path / "out" / f"v{i}_probability.npy")
    np.testing.assert_array_equal(probability.argmax(-1), mask)
    if f"v{i}" in rows:
      for k in (1, 2):
        both = np.sum((mask == k) & (truth == k))
        dice = 2 * both / (np.sum(mask == k) + np.sum(truth == k))
        row = rows[f"v{i}"]
        np.testing.assert_allclose(
          float(row[f"dice_class_{k}"]), dice, atol=1e-6
        )
    with Image.open(tmp_path / "out" / f"v{i}_overlay.png") as overlay:
      assert overlay.width > 700


def test_a_scaled_volume_is_predicted_alike(trained):
  root, workdir = trained
  predictor = predict.load_predictor(workdir)
  image = decode.read_image(
    root / "images" / "v5.nii.gz", channels=1, dims=3, max_pixels=10**4
  )
  mask = predictor(image)
  assert mask.any()
  np.testing.assert_array_equal(predictor(image * 1e-4 + 7), mask)


def refused(cfg, message):
  source = pipeline.make_source(cfg, "train", None)
  with pytest.raises(UserError, match=message) as caught:
    check_source(source, 10)
  assert "\n" not in str(caught.value)


def test_a_mask_elsewhere_is_refused_before_training(tmp_path):
  write_folder(tmp_path)
  cfg = make_config(tmp_path)
  path = tmp_path / "masks" / "v1.nii.gz"
  mask = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
  moved = mask.affine + np.outer([1, 0, 0, 0], [0, 0, 0, 5])
  nib.save(nib.Nifti1Image(np.asarray(mask.dataobj), moved), path)
  refused(cfg, r"v1.nii.gz and .*v1.nii.gz lie 5 voxels apart")
  nib.save(mask.slicer[:-1], path)
  refused(cfg, r"v1.nii.gz is 8 x 11 x 9 but .* is .*; give both the same size")
  odd = np.asarray(mask.dataobj) + np.float32(0.5)
  nib.save(nib.Nifti1Image(odd, mask.affine), path)
  refused(cfg, r"v1.nii.gz: 792 of 792 values are no whole numbers")
  path.unlink()
  np.save(tmp_path / "masks" / "v1.npy", np.asarray(mask.dataobj))
  refused(cfg, r"v1.nii.gz is turned by its header")
  np.save(
    tmp_path / "images" / "v0.npy", np.array([[[None]]]), allow_pickle=True
  )
  (tmp_path / "images" / "v0.nii.gz").unlink()
  refused(cfg, r"v0.npy: not a readable npy file")


@pytest.mark.parametrize(("factor", "hints"), [(1.2, 0), (1.3, 1)])
def test_unequal_spacings_are_said(tmp_path, capsys, factor, hints):
  write_folder(tmp_path)
  for kind in ("images", "masks"):
    path = tmp_path / kind / "v0.nii.gz"
    volume = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    affine = volume.affine * [factor, 1, 1, 1]
    nib.save(nib.Nifti1Image(np.asarray(volume.dataobj), affine), path)
  source = pipeline.make_source(make_config(tmp_path), "train", None)
  check_source(source, 0)
  line = f"spacings from 2 x 1 x 1 to {2 * factor:.3g} x 1 x 1:"
  assert capsys.readouterr().err.count(line) == hints


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model__dims": 2}, "data.source='volumes' has 3 axes"),
    ({"data__dir": ""}, "data.dir is empty"),
    ({"data__clip_percentiles": (99.0, 1.0)}, "a lower and an upper"),
    ({"data__clip_percentiles": (1.0,)}, "a lower and an upper"),
  ],
)
def test_faults_of_the_config(fields, message, tmp_path):
  if "model__dims" in fields:
    fields = {**fields, "data__crop_size": (8,), "model__pool_axes": ()}
  with pytest.raises(UserError, match=message):
    make_config(tmp_path, **fields)


def test_clipping_is_at_numpys_percentiles_of_each_channel():
  rng = np.random.default_rng(0)
  image = rng.standard_t(1, (6, 7, 8, 2)).astype(np.float32)
  image[..., 1] *= 100
  fitted = normalize.fit_normalization([], "none", clip=(5, 90))
  got = normalize.normalize(image, json.loads(json.dumps(fitted)))
  for channel in (0, 1):
    low, high = np.percentile(image[..., channel], (5, 90))
    want = np.clip(image[..., channel], low, high)
    np.testing.assert_allclose(got[..., channel], want, rtol=1e-6)
  fitted = normalize.fit_normalization([], "image", clip=(5, 90))
  scaled = normalize.normalize(image, fitted)
  np.testing.assert_allclose(
    scaled, (got - got.mean((0, 1, 2))) / got.std((0, 1, 2)), atol=1e-4
  )

  # In parts an image has no percentiles; of one part it has its own.
  own = normalize.of_image(fitted, iter([image]))
  np.testing.assert_array_equal(normalize.normalize(image[:2], own), scaled[:2])
  with pytest.raises(UserError, match="asks for an image whole"):
    normalize.of_image(fitted, iter([image[:2], image[2:]]))

  class Images(list):
    image = list.__getitem__

  fitted = normalize.fit_normalization(Images([image]), "dataset", clip=(5, 90))
  np.testing.assert_allclose(fitted["mean"], got.mean((0, 1, 2)), rtol=1e-4)


def test_the_overlay_shows_the_middle_slices_and_up_is_up():
  """One labelled voxel a slice: where its colour is found in the picture."""
  image = np.random.default_rng(0).normal(size=(16, 8, 32, 1))
  for axis in range(3):
    label = np.zeros((16, 8, 32), int)
    voxel = [3, 6, 25]
    voxel[axis] = label.shape[axis] // 2
    label[tuple(voxel)] = 1
    picture = pictures.slices(image, label, num_labels=2).astype(int)
    right, up = (k for k in range(3) if k != axis)
    sides = np.array([label.shape[right], label.shape[up]])
    factor = 256 // sides.max()
    color = np.abs(picture - [230, 159, 0]).sum(-1) == 0
    rows, columns = np.nonzero(color)
    # A frame of one pixel around the voxel's square.
    assert np.ptp(rows) == np.ptp(columns) == factor - 1
    corner = np.array([columns.min(), rows.min()])
    margin = (256 - sides[0] * factor) // 2
    want = [
      272 * axis + 8 + margin + voxel[right] * factor,
      22 + 264 + (sides[1] - 1 - voxel[up]) * factor,
    ]
    np.testing.assert_array_equal(corner, want)
    # In another slice it is not seen there.
    hidden = pictures.slices(image, np.roll(label, 1, axis), num_labels=2)
    column = hidden[:, 272 * axis : 272 * (axis + 1)].astype(int)
    assert (np.abs(column - [230, 159, 0]).sum(-1) > 0).all()


# --- The real hippocampus -----------------------------------------------------


def test_every_hippocampus_is_read(data_root, tmp_path):
  config = config_lib.load_config(CONFIGS / "hippocampus3d.py")
  config.data.dir = str(data_root / "hippocampus3d")
  cfg = config_lib.parse(config)
  counts = np.zeros(3)
  for split, num in (("train", 60), ("val", 15)):
    source = pipeline.make_source(cfg, split, tmp_path)
    assert len(source) == num
    check_source(source, num)
    for i in range(num):
      example, path = source[i], source.path(i)
      want = nib.as_closest_canonical(nib.load(path))
      np.testing.assert_array_equal(example["image"][..., 0], want.get_fdata())
      assert source.spacing(i) == want.header.get_zooms() == (1, 1, 1)
      counts += np.bincount(example["label"].ravel(), minlength=3)
      image = normalize.normalize(example["image"], {"mode": "image"})
      assert abs(image.mean()) < 1e-4 and abs(image.std() - 1) < 1e-4
  share = counts / counts.sum()
  assert 0.02 < share[2] < share[1] < 0.03
