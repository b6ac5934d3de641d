"""Prediction from files to files: parts, members, formats, names, failures."""

import csv
import json

import jax
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

import unet_jax.main
from tests import tiny
from unet_jax import bands, ensemble, outputs, predict, tiles
from unet_jax import config as config_lib
from unet_jax import workdir as workdir_lib
from unet_jax.data import pipeline, tiff, windows
from unet_jax.errors import UserError
from unet_jax.inspect import pictures
from unet_jax.runtime import parallel


def configure(**overrides):
  config = tiny.get_config()
  config.optimizer.ema_decay = 0.0
  for key, value in overrides.items():
    section, name = key.split("__")
    config[section][name] = value
  return config


def make_run(workdir, seed=0, **overrides):
  """A run at step 0, whose network is random."""
  config = configure(**overrides)
  config.seed = seed
  cfg = config_lib.parse(config)
  mesh = parallel.make_mesh()
  with workdir_lib.claim(cfg, workdir):
    splits = workdir_lib.split_dir(workdir)
    source = pipeline.make_source(cfg, "train", splits)
    workdir_lib.fit_normalization(cfg, workdir, source)
    state = workdir_lib.init_state(cfg, mesh)
    with workdir_lib.open_checkpoints(cfg, workdir, writable=True) as saver:
      saver.save(0, state, score=None, meta={})
  return workdir


def asked(workdir, **overrides):
  """The config of a run, with what is asked of the prediction."""
  changed = config_lib.to_dict(workdir_lib.read_config(workdir))
  for key, value in overrides.items():
    section, name = key.split("__")
    changed[section][name] = value
  return config_lib.parse(changed)


def run(workdir, *flags, mode="predict"):
  argv = ["--workdir", workdir, "--mode", mode, *flags]
  return unet_jax.main.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def net(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("net"))


def picture(*size, seed=0, dtype=np.uint16):
  high = np.iinfo(dtype).max
  return np.random.default_rng(seed).integers(0, high, size, dtype)


def as_image(array):
  scale = np.float32(np.iinfo(array.dtype).max)
  return (array.astype(np.float32) / scale)[..., None]


# --- Parts --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiled", "strips", "npy"])
def test_what_is_streamed_equals_the_whole_image(net, tmp_path, kind):
  """Files in parts to files in parts, against one array at once."""
  array, path = picture(150, 171), tmp_path / "large.tif"
  if kind == "npy":
    path = tmp_path / "large.npy"
    np.save(path, array)
  else:
    how = {"tile": (64, 48)} if kind == "tiled" else {"rowsperstrip": 7}
    tifffile.imwrite(path, array, photometric="minisblack", **how)
  flags = ["--input", path, "--output", tmp_path / "out"]
  flags += ["--config.predict.tile=34", "--config.predict.whole_pixels=1"]
  flags += ["--config.predict.probability=true"]
  flags += ["--config.predict.uncertainty=entropy"]
  assert run(net, *flags, "--config.predict.tile_batch=3") == 0
  mask, probability = predict.make_predict(asked(net), net)(as_image(array))
  if kind == "npy":
    got = np.load(tmp_path / "out" / "large_mask.npy")
  else:
    with tifffile.TiffFile(tmp_path / "out" / "large_mask.tif") as file:
      assert file.pages[0].is_tiled
      got = file.asarray()
  close = abs(probability[..., 0] - 0.5) < 1e-5
  np.testing.assert_array_equal(got[~close], mask[~close])
  assert 0 < mask.mean() < 1 and close.mean() < 0.2  # Of dead ReLUs: 1/2.
  found = np.load(tmp_path / "out" / "large_probability.npy")
  np.testing.assert_allclose(found, probability, atol=1e-5)
  unsure = np.load(tmp_path / "out" / "large_uncertainty.npy")
  rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
  (row,) = csv.DictReader(rows)
  assert float(row["uncertainty"]) == pytest.approx(unsure.mean(), rel=1e-5)
  assert int(row["pixels_class_1"]) == got.sum()
  assert sorted(p.name[0] for p in (tmp_path / "out").iterdir()) == sorted(
    "lllllpp"
  )
  # The pictures are those of an image that is predicted whole.
  Image.fromarray(array).save(tmp_path / "small.png")
  flags = ["--input", tmp_path / "small.png", "--output", tmp_path / "whole"]
  assert run(net, *flags, "--config.predict.uncertainty=entropy") == 0
  for picture_of, most in (("uncertainty", 1), ("overlay", 0)):
    files = "out/large", "whole/small"
    paths = [tmp_path / f"{name}_{picture_of}.png" for name in files]
    a, b = (np.asarray(Image.open(path)).astype(int) for path in paths)
    near = ndimage.binary_dilation(close)  # Rims: of the pixels beside too.
    assert abs(a - b)[~near].max() <= most and near.mean() < 0.5
    assert a.std() > 1


def test_pictures_of_what_is_large_are_made_smaller(tmp_path, monkeypatch):
  """Means of squares, ids of their middles: by slices, from uneven bands."""
  monkeypatch.setattr(bands, "MOST", 16)
  cfg = config_lib.parse(
    configure(data__num_classes=3, predict__uncertainty="mutual_information")
  )
  rng, size = np.random.default_rng(0), (43, 61)  # 4 by 4 pixels, some fewer.
  image = rng.random((*size, 1), np.float32)
  mask = rng.integers(0, 3, size).astype(np.uint8)
  samples = rng.dirichlet((1, 1, 1), (2, *size)).astype(np.float32)
  read = lambda window: image[tuple(slice(*w) for w in window)]
  cuts = [(0, 7), (7, 8), (8, 30), (30, 43)]
  row = bands.write(
    cfg,
    tmp_path,
    "a",
    windows.Picture(size, read, suffix=".npy"),
    (tiles.Band(mask[a:b], samples[:, a:b]) for a, b in cuts),
  )
  unsure = outputs.uncertainty_map(cfg, samples)
  blocks = [
    [np.s_[i : i + 4, j : j + 4] for j in range(0, 61, 4)]
    for i in range(0, 43, 4)
  ]
  each = lambda f: np.array([[f(place) for place in row] for row in blocks])
  expected = pictures.overlay(
    each(lambda place: image[place].mean((0, 1))),
    mask[np.ix_([*range(2, 42, 4), 42], [*range(2, 61, 4), 60])],
    num_labels=3,
  )
  found = np.asarray(Image.open(tmp_path / "a_overlay.png")).astype(int)
  assert found.shape == (11, 16, 3) and abs(found - expected).max() <= 1
  grey = 255 * each(lambda place: unsure[place].mean()) / unsure.max()
  found = np.asarray(Image.open(tmp_path / "a_uncertainty.png"))
  np.testing.assert_allclose(found, grey, atol=0.51)
  assert row["uncertainty_highest"] == unsure.max() and found.max() < 250
  np.testing.assert_array_equal(np.load(tmp_path / "a_mask.npy"), mask)


def test_one_program_for_all_tiles_and_images(net, monkeypatch):
  """Larger and smaller images, all traced once."""
  traced = []
  logits = ensemble.Group.logits

  def count(self, variables, image, **how):
    traced.append(image.shape)
    return logits(self, variables, image, **how)

  monkeypatch.setattr(ensemble.Group, "logits", count)
  cfg = asked(net, predict__tile=(34, 34), predict__tile_batch=2)
  apply = predict.make_predict(cfg, net)
  for size in [(90, 41), (34, 34), (7, 100), (60, 60)]:
    mask, _ = apply(as_image(picture(*size)))
    assert mask.shape == size
  assert traced == [(2, 34, 34, 1)]


def test_normalization_of_an_image_in_parts(tmp_path):
  """Mean and deviation over all of it, in bands, are those of numpy."""
  array = picture(900, 700)
  tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
  whole = tiff.open_picture(tmp_path / "a.tif", channels=1, dims=2)
  from unet_jax.data import normalize

  bands = windows.Picture(whole.size, whole.read)
  fitted = normalize.fit_parts(
    bands.read([(s, min(s + 77, 900)), (0, 700)]) for s in range(0, 900, 77)
  )
  image = as_image(array).astype(np.float64)
  np.testing.assert_allclose(fitted["mean"], image.mean(), rtol=1e-12)
  np.testing.assert_allclose(fitted["std"], image.std(), rtol=1e-12)


def test_stacks_are_pages_in_2d_and_volumes_in_3d(net, tmp_path):
  stack = picture(3, 20, 18)
  tifffile.imwrite(tmp_path / "s.tif", stack, photometric="minisblack")
  flags = ["--input", tmp_path / "s.tif", "--output", tmp_path / "flat"]
  assert run(net, *flags) == 0
  predictor = predict.load_predictor(net)
  for i, page in enumerate(stack):
    mask = np.asarray(Image.open(tmp_path / "flat" / f"s_{i}_mask.png"))
    np.testing.assert_array_equal(mask, predictor(page))
  size = {"data__synthetic_size": (8,), "data__crop_size": (8,)}
  deep = make_run(tmp_path / "deep", model__dims=3, **size)
  flags = ["--input", tmp_path / "s.tif", "--output", tmp_path / "out"]
  assert run(deep, *flags) == 0
  mask = tifffile.imread(tmp_path / "out" / "s_mask.tif").reshape(stack.shape)
  np.testing.assert_array_equal(mask, predict.load_predictor(deep)(stack))
  # Its middle slices are drawn as those of a volume that is read whole.
  np.save(tmp_path / "t.npy", stack)
  flags = ["--input", tmp_path / "t.npy", "--output", tmp_path / "out"]
  assert run(deep, *flags) == 0
  drawn = [
    np.asarray(Image.open(tmp_path / "out" / f"{name}_overlay.png"))
    for name in ("s", "t")
  ]
  np.testing.assert_array_equal(*drawn)


def test_without_tifffile_the_extra_is_named(net, tmp_path, monkeypatch, capfd):
  tifffile.imwrite(
    tmp_path / "s.tif", picture(3, 20, 18), photometric="minisblack"
  )
  monkeypatch.setattr(tiff, "is_here", lambda: False)
  with pytest.raises(UserError, match=r"pip install unet_jax\[tiff\]"):
    tiff.open_picture(tmp_path / "s.tif", channels=1, dims=3)


def test_blending_is_said_once(tmp_path, capfd):
  workdir = make_run(tmp_path / "run", model__norm="instance")
  cfg = asked(workdir, predict__tile=(16, 16))
  apply = predict.make_predict(cfg, workdir)
  for _ in range(2):
    mask, probability = apply(as_image(picture(40, 50)))
    np.testing.assert_array_equal(mask, probability[..., 0] > 0.5)
  said = capfd.readouterr().err
  assert said.count("model.norm='instance' looks at the whole image") == 1


# --- Members ------------------------------------------------------------------


@pytest.mark.parametrize(
  "others",
  [
    [{}, {}],
    [{"model__widths": (2, 3, 4), "model__norm": "none"}],
  ],
  ids=["same", "others"],
)
def test_an_ensemble_is_the_mean_of_its_members(net, tmp_path, others):
  image = as_image(picture(21, 30))
  folders = [net] + [
    make_run(tmp_path / str(i), seed=i + 1, **fields)
    for i, fields in enumerate(others)
  ]
  # Sizes that all of them take: what is mirrored is then the same.
  own = lambda folder: asked(folder, data__pad_multiple=4)
  apply = predict.make_predict(own(net), net, ensemble=folders[1:])
  mask, probability = apply(image)
  alone = [predict.make_predict(own(f), f)(image)[1] for f in folders]
  np.testing.assert_allclose(probability, np.mean(alone, 0), atol=1e-6)
  assert np.std(alone, axis=0).max() > 1e-3
  np.testing.assert_array_equal(mask, probability[..., 0] > 0.5)


def test_members_may_be_normalised_by_their_own_folds(tmp_path):
  """Each member sees the image as it saw its training split."""
  how = {"data__normalize": "dataset"}
  folders = [make_run(tmp_path / str(i), seed=i, **how) for i in range(3)]
  for i, folder in enumerate(folders):
    path = folder / "normalization.json"
    fitted = json.loads(path.read_text())
    fitted |= {"mean": [0.1 + 0.2 * i], "std": [0.2 + 0.1 * i]}
    path.write_text(json.dumps(fitted))
  image = as_image(picture(16, 16))
  _, got = predict.make_predict(
    asked(folders[0]), folders[0], ensemble=folders[1:]
  )(image)
  alone = [predict.make_predict(asked(f), f)(image)[1] for f in folders]
  np.testing.assert_allclose(got, np.mean(alone, 0), atol=1e-6)


def test_members_that_do_not_fit_are_refused(net, tmp_path):
  other = make_run(tmp_path / "rgb", data__channels=3)
  with pytest.raises(UserError, match=r"data.channels=3 but 1"):
    predict.make_predict(asked(net), net, ensemble=[other])
  with pytest.raises(UserError, match=r"no run|cannot read"):
    predict.make_predict(asked(net), net, ensemble=[tmp_path / "none"])


def test_dropout_samples_disagree_and_repeat(tmp_path):
  workdir = make_run(tmp_path / "run", model__dropout=0.5)
  image = windows.of_array(as_image(picture(16, 16)))
  cfg = asked(
    workdir,
    predict__dropout_samples=5,
    predict__uncertainty="mutual_information",
  )
  a, b = (next(predict.make_stream(cfg, workdir)(image)) for _ in range(2))
  np.testing.assert_array_equal(a.samples, b.samples)
  assert a.samples.shape == (5, 16, 16, 1)
  assert a.samples.std(0).mean() > 1e-3
  unsure = outputs.uncertainty_map(cfg, a.samples)
  assert outputs.uncertainty_picture(cfg, unsure, unsure.max()).max() == 255
  assert outputs.row(cfg, "a", a.mask, unsure)["uncertainty_highest"] < 1
  cfg = asked(workdir, predict__dropout_samples=5)
  mean = next(predict.make_stream(cfg, workdir)(image)).samples
  np.testing.assert_allclose(mean[0], a.samples.mean(0), atol=1e-6)
  with pytest.raises(UserError, match="drops nothing"):
    asked(workdir, model__dropout=0.0, predict__dropout_samples=5)
  cfg = asked(workdir, predict__uncertainty="mutual_information")
  with pytest.raises(UserError, match="give --ensemble"):
    predict.make_predict(cfg, workdir)


def test_an_ensemble_is_scored_and_its_uncertainty_too(tmp_path):
  """Twice the same network scores as the network; AURC by hand."""
  workdir = make_run(tmp_path / "run")
  other = make_run(tmp_path / "other", seed=1)
  flag = "--config.eval.risk_coverage=true"
  assert run(workdir, flag, mode="evaluate") == 0
  assert run(workdir, "--ensemble", workdir, mode="evaluate") == 0
  read = lambda name: json.loads((workdir / name).read_text())
  alone, twice = (
    read("evaluation_val.json"),
    read("evaluation_val_ensemble.json"),
  )
  assert twice["dice"] == alone["dice"]
  assert twice["loss"] == pytest.approx(alone["loss"], rel=1e-4)
  assert run(workdir, "--ensemble", other, mode="evaluate") == 0
  both = read("evaluation_val_ensemble.json")
  assert both["members"] == [str(workdir), str(other)]

  cfg = asked(workdir)
  source = pipeline.make_source(cfg, "val", workdir / "split")
  apply, duo = (
    predict.make_predict(cfg, workdir, ensemble=e) for e in ((), (other,))
  )
  unsure, errors, right = [], [], 0
  for i in range(len(source)):
    example = source[i]
    mask, probability = apply(example["image"])
    unsure.append(abs(probability[..., 0] - 0.5).ravel())
    errors.append((mask != example["label"]).ravel())
    right += (duo(example["image"])[0] == example["label"]).mean()
  order = np.argsort(-np.concatenate(unsure), kind="stable")
  wrong = np.concatenate(errors)[order]
  area = np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1))
  assert alone["aurc"] == pytest.approx(area, rel=2e-3)
  assert alone["risk"] == pytest.approx(wrong.mean())
  assert both["pixel_accuracy"] == pytest.approx(right / len(source))


# --- Formats, names, failures -------------------------------------------------


def test_masks_in_colours_regions_and_outlines(net, tmp_path):
  array = picture(24, 30, dtype=np.uint8)
  Image.fromarray(array).save(tmp_path / "a.png")
  expected = predict.load_predictor(net)(array)
  flags = ["--input", tmp_path / "a.png", "--config.predict.instances=true"]
  flags += ["--config.predict.polygons=true"]
  flags += ["--config.predict.uncertainty=entropy"]
  out = tmp_path / "out"
  flags += ["--output", out]
  assert run(net, *flags, "--config.predict.mask_values=palette") == 0
  with Image.open(out / "a_mask.png") as mask:
    assert mask.mode == "P"
    np.testing.assert_array_equal(np.asarray(mask), expected)
    shown = np.asarray(mask.convert("RGB"))
  colors = pictures.class_colors(2)
  np.testing.assert_array_equal(shown, colors[expected])
  numbered = np.asarray(Image.open(out / "a_instances.png"))
  assert numbered.dtype == np.uint16
  np.testing.assert_array_equal(numbered > 0, expected > 0)
  polygons = json.loads((out / "a_polygons.geojson").read_text())
  assert len(polygons["features"]) == numbered.max()
  _, probability = predict.make_predict(asked(net), net)(as_image(array))
  p = probability[..., 0].astype(np.float64)
  entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p))
  unsure = np.asarray(Image.open(out / "a_uncertainty.png"))
  np.testing.assert_allclose(unsure, 255 * entropy, atol=0.51)
  rows = json.loads((out / "predictions.json").read_text())["images"]
  assert rows[0]["uncertainty"] == pytest.approx(entropy.mean(), abs=1e-5)
  assert run(net, *flags, "--config.predict.mask_values=colors") == 0
  mask = np.asarray(Image.open(out / "a_mask.png"))
  np.testing.assert_array_equal(mask, colors[expected])


def test_patterns_and_names_that_never_meet(net, tmp_path, capfd):
  for name in ("in/x/a.png", "in/y/a.png", "in/y/b.png", "in/y/b.txt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(8, 8, dtype=np.uint8)).save(path, "PNG")
  flags = ["--input", tmp_path / "in" / "*" / "*", "--output", tmp_path / "out"]
  assert run(net, *flags) == 0
  names = sorted(p.name for p in (tmp_path / "out").glob("*_mask.png"))
  assert names == [
    "x__a.png_mask.png",
    "y__a.png_mask.png",
    "y__b.png_mask.png",
  ]
  Image.fromarray(picture(8, 8, dtype=np.uint8)).save(tmp_path / "in/y/A.png")
  flags = ["--input", tmp_path / "in" / "y", "--output", tmp_path / "out2"]
  assert run(net, *flags) == 2
  assert "rename one" in capfd.readouterr().err
  assert not (tmp_path / "out2").exists()


def test_a_broken_large_file_is_named_and_leaves_nothing(net, tmp_path, capfd):
  path = tmp_path / "in" / "bad.tif"
  path.parent.mkdir()
  tifffile.imwrite(path, picture(90, 90), photometric="minisblack")
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])
  np.save(tmp_path / "in" / "good.npy", picture(90, 90))
  flags = ["--input", tmp_path / "in", "--output", tmp_path / "out"]
  flags += ["--config.predict.tile=34", "--config.predict.whole_pixels=1"]
  assert run(net, *flags) == 2
  assert "1 of 2 images" in capfd.readouterr().err
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "good_mask.npy",
    "good_overlay.png",
  ]


@pytest.mark.parametrize(
  ("flag", "word"),
  [
    ("views=3", "nearest: 8"),
    ("tile=33", "nearest: 32, 34"),
    ("tile=16", "nearest: 18"),
    ("tile=32,32,32", "3 entries"),
  ],
)
def test_what_cannot_be_is_refused(net, tmp_path, capfd, flag, word):
  Image.fromarray(picture(40, 40, dtype=np.uint8)).save(tmp_path / "a.png")
  flags = ["--input", tmp_path / "a.png", "--output", tmp_path / "out"]
  assert run(net, *flags, f"--config.predict.{flag}") == 2
  assert word in capfd.readouterr().err


def test_the_views_of_a_prediction_turn_with_the_image(net):
  """With all views a turned image has the turned prediction."""
  cfg = asked(net, predict__views=8)
  apply = predict.make_predict(cfg, net)
  image = as_image(picture(21, 34))
  _, expected = apply(image)
  for turn in (lambda x: np.rot90(x), lambda x: x[::-1]):
    _, got = apply(np.ascontiguousarray(turn(image)))
    np.testing.assert_allclose(got, turn(expected), atol=1e-5)
  _, alone = predict.make_predict(asked(net), net)(image)
  assert abs(alone - expected).max() > 1e-3
  assert jax.device_count() > 0
