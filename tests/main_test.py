"""The command line: modes, files, exit codes. One run serves all tests."""

import csv
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

import unet_jax.main
from tests import runs
from unet_jax import config as config_lib
from unet_jax import evaluate, predict
from unet_jax import workdir as workdir_lib
from unet_jax.data import pipeline


def run(*argv):
  """Runs the command line in this process, on 8 devices."""
  return unet_jax.main.main([str(a) for a in argv])


def read_csv(path):
  return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("trained")
  assert run(*runs.arguments(workdir)) == 0
  return workdir


def test_training_leaves_what_the_contract_names(trained):
  config = json.loads((trained / "config.json").read_text())
  assert config["train"]["num_steps"] == 24
  env = json.loads((trained / "env.json").read_text())
  assert env["versions"]["jax"] == jax.__version__
  assert env["device_count"] == 8
  assert {"git", "command", "process_count", "cpu_count"} <= env.keys()
  assert (trained / "checkpoints" / "24").is_dir()
  assert list((trained / "tensorboard").glob("events*"))
  picture = np.asarray(Image.open(trained / "pictures" / "step_24.png"))
  assert picture.std() > 10
  last = runs.read_metrics(trained)[-1]
  assert {"dice", "iou", "dice_per_class", "loss"} <= last.keys()


def test_evaluate_scores_the_best_checkpoint_as_training_did(trained):
  flags = runs.arguments(trained, mode="evaluate")
  assert run(*flags) == 0
  scores = json.loads((trained / "evaluation_val.json").read_text())
  lines = [r for r in runs.read_metrics(trained) if r["split"] == "val"]
  best = max(lines, key=lambda r: r["dice"])
  assert scores == best
  rows = read_csv(trained / "evaluation_val_per_image.csv")
  assert len(rows) == 5
  dice = [float(r["dice"]) for r in rows if r["dice"]]
  np.testing.assert_allclose(np.mean(dice), scores["dice_per_image"])


def test_evaluation_uses_the_moving_average(trained):
  cfg = workdir_lib.read_config(trained)
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "space"))
  loaded = workdir_lib.load_trained(cfg, trained, mesh, step=24)
  stored = runs.read_state(trained, 24)
  path = "['params']['head']['kernel']"
  used = loaded.variables["params"]["head"]["kernel"]
  np.testing.assert_array_equal(used, stored["['ema']" + path])
  assert not np.array_equal(used, stored[path])


def test_best_metric_names_what_best_means(tmp_path):
  """A lower loss is better, a higher accuracy is."""
  for metric, best in (("loss", min), ("pixel_accuracy", max)):
    workdir = tmp_path / metric
    flags = [f"--config.eval.best_metric={metric}"]
    assert run(*runs.arguments(workdir, *flags)) == 0
    lines = [r for r in runs.read_metrics(workdir) if r["split"] == "val"]
    expected = best(lines, key=lambda r: r[metric])["step"]
    assert run("--workdir", workdir, "--mode", "evaluate") == 0
    scores = json.loads((workdir / "evaluation_val.json").read_text())
    assert scores["step"] == expected


def test_evaluate_another_step_and_split(trained):
  flags = ["--step", 21, "--config.eval.split=test"]
  assert run(*runs.arguments(trained, *flags, mode="evaluate")) == 0
  scores = json.loads((trained / "evaluation_test.json").read_text())
  assert (scores["step"], scores["split"]) == (21, "test")


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 3), (8, 8)])
def test_scores_do_not_know_devices_or_batch_size(trained, devices, batch_size):
  cfg = workdir_lib.read_config(trained)
  grid = np.array(jax.devices()[:devices]).reshape(-1, 1)
  mesh = Mesh(grid, ("data", "space"))
  loaded = workdir_lib.load_trained(cfg, trained, mesh)
  changed = config_lib.to_dict(cfg)
  changed["eval"]["batch_size"] = batch_size
  cfg = config_lib.parse(changed)
  result = evaluate.evaluate(
    evaluate.make_eval_step(cfg, mesh),
    loaded.variables,
    pipeline.make_source(cfg, "val", trained / "split"),
    loaded.normalization,
    cfg=cfg,
    mesh=mesh,
  )
  lines = [r for r in runs.read_metrics(trained) if r["step"] == loaded.step]
  expected = next(r for r in lines if r["split"] == "val")
  for key, value in result.summary.items():
    if "loss" in key:
      np.testing.assert_allclose(value, expected[key], rtol=1e-5)
    else:
      assert value == expected[key], key


def test_predict_writes_masks_that_score_as_evaluation_does(trained, tmp_path):
  """The whole detour: examples to PNG, files to masks, masks to Dice."""
  cfg = workdir_lib.read_config(trained)
  source = pipeline.make_source(cfg, "val", trained / "split")
  flags = ["--output", tmp_path / "out", "--config.predict.probability=true"]
  assert run(*runs.arguments(trained, *flags, mode="predict")) == 0
  rows = read_csv(trained / "evaluation_val_per_image.csv")
  for i, name in enumerate(source.names):
    mask = np.asarray(Image.open(tmp_path / "out" / f"{name}_mask.png"))
    truth = source[i]["label"]
    assert mask.shape == truth.shape
    both, total = (mask & truth).sum(), mask.sum() + truth.sum()
    if total:
      np.testing.assert_allclose(2 * both / total, float(rows[i]["dice"]))
    probability = np.load(tmp_path / "out" / f"{name}_probability.npy")
    np.testing.assert_array_equal(probability[..., 0] > 0.5, mask)
    overlay = np.asarray(Image.open(tmp_path / "out" / f"{name}_overlay.png"))
    assert overlay.shape == (*truth.shape, 3)


def test_predict_any_size_and_load_predictor_agree(trained, tmp_path):
  rng = np.random.default_rng(0)
  folder = tmp_path / "in"
  folder.mkdir()
  predictor = predict.load_predictor(trained)
  for size in [(1, 1), (5, 40), (33, 17), (16, 16)]:
    image = rng.integers(0, 256, size, np.uint8)
    Image.fromarray(image).save(folder / f"{size[0]}x{size[1]}.png")
  flags = ["--input", folder, "--output", tmp_path / "out"]
  flags += ["--config.predict.mask_values=scaled"]
  assert run(*runs.arguments(trained, *flags, mode="predict")) == 0
  for path in folder.iterdir():
    mask = np.asarray(Image.open(tmp_path / "out" / f"{path.stem}_mask.png"))
    image = np.asarray(Image.open(path))
    assert mask.shape == image.shape
    assert set(np.unique(mask)) <= {0, 255}
    np.testing.assert_array_equal(mask, 255 * predictor(image))


def test_a_padded_image_is_predicted_where_it_stands(trained):
  """13 columns are padded to 14 by mirroring; so is the same done by hand."""
  cfg = workdir_lib.read_config(trained)
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "space"))
  loaded = workdir_lib.load_trained(cfg, trained, mesh)
  image = pipeline.make_source(cfg, "val", trained / "split")[0]["image"][
    :, :13
  ]
  mask, probability = predict.make_predict(cfg, trained)(image)
  assert mask.shape == (16, 13)
  normal = (image - image.mean()) / image.std()
  mirrored = np.concatenate([normal, normal[:, 11:12]], axis=1)
  logits = loaded.model.apply(loaded.variables, mirrored[None])[0, :, :13]
  expected = 1 / (1 + np.exp(-np.asarray(logits)))
  np.testing.assert_allclose(probability, expected, atol=1e-5)


@pytest.mark.fault(14)
def test_broken_images_are_named_and_the_others_predicted(
  trained, tmp_path, capfd
):
  folder = tmp_path / "in"
  folder.mkdir()
  (folder / "bad.png").write_bytes(b"no picture")
  Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "good.png")
  Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "good.tif")
  flags = ["--input", folder, "--output", tmp_path / "out"]
  assert run(*runs.arguments(trained, *flags, mode="predict")) == 2
  assert "bad.png" in capfd.readouterr().err.splitlines()[-1]
  names = sorted(p.name for p in (tmp_path / "out").iterdir())
  assert names == [
    "good.png_mask.png",
    "good.png_overlay.png",
    "good.tif_mask.png",
    "good.tif_overlay.png",
  ]


# --- A folder of images -------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  """Bright squares: mixed sizes, grey and colour, masks of 0 and 255."""
  rng = np.random.default_rng(0)
  root = tmp_path / "data"
  for kind in ("images", "masks"):
    (root / kind).mkdir(parents=True)
  for i in range(12):
    height, width = rng.integers(12, 40, 2)
    mask = np.zeros((height, width), np.uint8)
    top, left = rng.integers(0, 6, 2)
    mask[top : top + 8, left : left + 8] = 255
    image = np.clip(mask * 0.6 + rng.normal(60, 20, mask.shape), 0, 255)
    picture = Image.fromarray(image.astype(np.uint8))
    picture = picture.convert("RGB") if i % 2 else picture
    picture.save(root / "images" / f"{i}.png")
    Image.fromarray(mask).save(root / "masks" / f"{i}.png")
  return root


def folder_flags(root):
  flags = [f"--config.data.dir={root}", "--config.data.source=folder"]
  return [*flags, "--config.data.mask_values=0,255"]


def test_a_folder_of_mixed_images_is_learned(folder, tmp_path):
  before = sorted(p.name for p in folder.rglob("*"))
  flags = [*folder_flags(folder), "--config.train.profile_steps=2"]
  flags += ["--config.train.num_steps=60", "--config.train.eval_every=0"]
  flags += [
    "--config.data.normalize=dataset",
    "--config.train.checkpoint_every=0",
  ]
  workdir = tmp_path / "run"
  assert run(*runs.arguments(workdir, *flags)) == 0
  record = runs.read_metrics(workdir)[-1]
  assert record["dice"] > 0.8
  assert list((workdir / "profile").rglob("*.xplane.pb"))
  # The seeded split is kept with the run; the data folder is as it was.
  assert sorted(p.name for p in folder.rglob("*")) == before
  split = workdir / "split"
  stems = [(split / f"{s}.txt").read_text().split() for s in ("train", "val")]
  assert not set(stems[0]) & set(stems[1])
  fitted = json.loads((workdir / "normalization.json").read_text())
  pixels = []
  for stem in stems[0]:
    image = np.asarray(Image.open(folder / "images" / f"{stem}.png"))
    image = image[..., 0] if image.ndim == 3 else image
    pixels.append(image.ravel() / 255)
  np.testing.assert_allclose(
    fitted["mean"], [np.concatenate(pixels).mean()], rtol=1e-5
  )
  np.testing.assert_allclose(
    fitted["std"], [np.concatenate(pixels).std()], rtol=1e-5
  )


@pytest.mark.fault(14, 15, 16, 18)
@pytest.mark.parametrize(
  ("spoil", "words"),
  [
    (lambda r: (r / "masks" / "3.png").unlink(), "3"),
    (lambda r: (r / "images" / "3.png").write_bytes(b"x"), "3.png"),
    (
      lambda r: Image.new("L", (7, 7)).save(r / "masks" / "3.png"),
      "3.png",
    ),
    (
      lambda r: Image.fromarray(
        np.full(
          np.asarray(Image.open(r / "masks" / "3.png")).shape, 9, np.uint8
        )
      ).save(r / "masks" / "3.png"),
      "9",
    ),
    (lambda r: (r / "train.txt").write_text("3\n"), "val"),
    (lambda r: shutil.rmtree(r / "masks"), "masks"),
  ],
)
def test_a_broken_folder_is_refused_before_step_1(
  folder, tmp_path, capfd, spoil, words
):
  spoil(folder)
  workdir = tmp_path / "run"
  line = refused(capfd, *runs.arguments(workdir, *folder_flags(folder)))
  assert words in line
  assert not (workdir / "metrics.jsonl").exists()


def test_a_refused_start_does_not_spoil_the_workdir(folder, tmp_path, capfd):
  """Mending the mistake, even with another data folder, is enough."""
  workdir = tmp_path / "run"
  flags = folder_flags(folder)
  broken = [*flags, "--config.data.mask_values=0,254"]
  assert "255" in refused(capfd, *runs.arguments(workdir, *broken))
  stale = (workdir / "split" / "train.txt").read_text()
  for kind in ("images", "masks"):
    for path in list((folder / kind).iterdir()):
      path.rename(path.with_name(f"new_{path.name}"))
  flags += ["--config.train.num_steps=2", "--config.train.eval_every=0"]
  assert run(*runs.arguments(workdir, *flags)) == 0
  assert (workdir / "split" / "train.txt").read_text() != stale
  line = refused(capfd, *runs.arguments(folder, *flags))
  assert "is the data folder" in line


# --- What is refused ----------------------------------------------------------


def refused(capfd, *argv):
  """Runs, expects exit status 2 and one line; returns the line."""
  capfd.readouterr()
  assert run(*argv) == 2
  error = capfd.readouterr().err.strip()
  assert error.startswith("error: ")
  assert len(error.splitlines()) == 1
  return error


@pytest.mark.fault(19)
def test_usage_mistakes_are_one_line(trained, tmp_path, capfd):
  assert "--workdir" in refused(capfd, "--config", runs.CONFIG)
  assert "--config" in refused(capfd, "--workdir", tmp_path)
  assert "'trian'" in refused(capfd, *runs.arguments(tmp_path, mode="trian"))
  assert "--wrkdir" in refused(capfd, *runs.arguments(tmp_path, "--wrkdir=x"))
  assert "no value" in refused(
    capfd, *runs.arguments(tmp_path, "--config.seed")
  )
  line = refused(capfd, *runs.arguments(tmp_path, "--config.sed=1"))
  assert "'seed'" in line
  line = refused(capfd, *runs.arguments(tmp_path, mode="evaluate"))
  assert "no run in" in line
  flags = ["--step", 7]
  line = refused(capfd, *runs.arguments(trained, *flags, mode="evaluate"))
  assert "7" in line
  flags = ["--config.model.widths=4,8"]
  line = refused(capfd, *runs.arguments(trained, *flags, mode="evaluate"))
  assert "contradicts" in line
  flags = ["--config.eval.split=train", "--config.data.source=folder"]
  line = refused(capfd, *runs.arguments(trained, *flags, mode="predict"))
  assert "config.data" in line
  flags = ["--input", tmp_path / "nothing"]
  line = refused(capfd, *runs.arguments(trained, *flags, mode="predict"))
  assert "does not exist" in line
  line = refused(capfd, *runs.arguments(tmp_path, "--step", 3))
  assert "--step has no meaning" in line
  assert not (tmp_path / "config.json").exists()


def test_a_workdir_that_is_not_ours_is_left_alone(trained, tmp_path, capfd):
  (tmp_path / "config.json").write_text('{"foreign": 1}')
  assert "'foreign'" in refused(capfd, *runs.arguments(tmp_path))
  assert (tmp_path / "config.json").read_text() == '{"foreign": 1}'
  (tmp_path / "config.json").write_text('{"seed": ')
  assert "config.json" in refused(capfd, *runs.arguments(tmp_path))
  (tmp_path / "file").write_text("")
  line = refused(capfd, *runs.arguments(tmp_path / "file"))
  assert "--workdir" in line
  # A run whose metrics were moved away is still that run.
  workdir = tmp_path / "run"
  shutil.copytree(trained, workdir)
  (workdir / "metrics.jsonl").unlink()
  line = refused(capfd, *runs.arguments(workdir, "--config.seed=9"))
  assert "seed: 0 -> 9" in line


@pytest.mark.fault(20)
def test_two_runs_in_one_workdir_are_refused(tmp_path, capfd):
  cfg = config_lib.parse(config_lib.load_config(runs.CONFIG))
  with workdir_lib.claim(cfg, tmp_path):
    assert "another run" in refused(capfd, *runs.arguments(tmp_path))


def test_a_config_file_given_to_evaluate_says_what_it_changes(
  trained, tmp_path, capfd
):
  text = pathlib.Path(runs.CONFIG).read_text()
  other = tmp_path / "other.py"
  other.write_text(
    text.replace("  return", '  config.eval.split = "test"\n  return')
  )
  argv = ["--config", other, "--workdir", trained, "--mode", "evaluate"]
  assert run(*argv) == 0
  assert "eval.split: val -> test" in capfd.readouterr().err
  assert (trained / "evaluation_test.json").exists()


def test_a_batch_that_does_not_divide_is_refused(tmp_path, capfd):
  flags = ["--config.train.batch_size=12"]
  line = refused(capfd, *runs.arguments(tmp_path, *flags))
  assert "nearest: 16" in line


@pytest.mark.fault(20)
def test_another_config_in_the_same_workdir_is_refused(trained, capfd):
  before = (trained / "config.json").read_bytes()
  flags = ["--config.optimizer.learning_rate=0.5", "--config.seed=3"]
  line = refused(capfd, *runs.arguments(trained, *flags))
  assert "optimizer.learning_rate: 0.02 -> 0.5" in line
  assert "seed: 0 -> 3" in line
  line = refused(capfd, *runs.arguments(trained, "--config.train.num_steps=8"))
  assert "nearest: 24" in line
  assert (trained / "config.json").read_bytes() == before


def test_a_finished_run_can_be_extended(trained, tmp_path, capfd):
  workdir = tmp_path / "longer"
  shutil.copytree(trained, workdir)
  flags = ["--config.train.num_steps=30"]
  assert run(*runs.arguments(workdir, *flags)) == 0
  output = capfd.readouterr().err
  assert "train.num_steps: 24 -> 30" in output
  assert "schedule follows the new length" in output
  old, new = runs.read_metrics(trained), runs.read_metrics(workdir)
  assert new[: len(old)] == old
  rates = {r["step"]: r["learning_rate"] for r in new if r["split"] == "train"}
  # Cosine of 30 steps: step 25 is the 23rd of 28 after the warm-up of 2.
  expected = 0.02 * (1 + np.cos(np.pi * 22 / 28)) / 2
  np.testing.assert_allclose(rates[25], expected, rtol=1e-5)


@pytest.mark.fault(13)
def test_steps_that_are_not_finite_end_the_run_with_the_examples(
  tmp_path, capfd
):
  flags = ["--config.optimizer.learning_rate=1e38"]
  flags += ["--config.optimizer.weight_decay=0", "--config.train.max_skipped=3"]
  flags += ["--config.optimizer.name=sgd", "--config.model.norm=none"]
  capfd.readouterr()
  assert run(*runs.arguments(tmp_path, *flags)) == 2
  last = capfd.readouterr().err.splitlines()[-1]
  assert "3 steps in a row" in last
  assert "train" in last


def test_bfloat16_trains_evaluates_and_predicts(tmp_path, capfd):
  flags = ["--config.train.num_steps=2", "--config.model.dtype=bfloat16"]
  assert run(*runs.arguments(tmp_path, *flags)) == 0
  assert run(*runs.arguments(tmp_path, mode="evaluate")) == 0
  record = json.loads((tmp_path / "evaluation_val.json").read_text())
  # Of what was trained, and in the precision that it was trained in.
  logged = runs.read_metrics(tmp_path)[-1]
  assert record["loss"] == pytest.approx(logged["loss"], rel=1e-5)
  flags = ["--config.predict.probability=true", "--config.predict.max_images=1"]
  assert run(*runs.arguments(tmp_path, *flags, mode="predict")) == 0
  (path,) = (tmp_path / "predictions").glob("*_probability.npy")
  assert np.load(path).dtype == np.float32
  other = ["--config.train.num_steps=2"]
  assert run(*runs.arguments(tmp_path, *other)) == 2
  assert "model.dtype: bfloat16 -> float32" in capfd.readouterr().err


def test_valid_padding_trains_and_predicts(tmp_path):
  """The paper's border: crops shrink, whole images come out whole."""
  flags = ["--config.model.padding=valid", "--config.data.crop_size=20"]
  flags += ["--config.train.num_steps=2", "--config.model.up=linear"]
  assert run(*runs.arguments(tmp_path, *flags)) == 0
  record = runs.read_metrics(tmp_path)[-1]
  assert record["num_pixels"] == 5 * 16 * 16
  predictor = predict.load_predictor(tmp_path)
  assert predictor(np.zeros((23, 9), np.uint8)).shape == (23, 9)


@pytest.mark.parametrize("dims", [1, 3])
def test_signals_and_volumes_train_evaluate_and_predict(tmp_path, dims):
  flags = [f"--config.model.dims={dims}", "--config.train.num_steps=2"]
  assert run(*runs.arguments(tmp_path, *flags)) == 0
  assert (tmp_path / "pictures" / "step_2.png").exists()
  flags = ["--config.predict.max_images=1"]
  assert run(*runs.arguments(tmp_path, *flags, mode="predict")) == 0
  (mask,) = (tmp_path / "predictions").glob("*_mask.npy")
  assert np.load(mask).shape == (16,) * dims


@pytest.mark.parametrize(
  ("error", "status", "words"),
  [
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 2, "train.batch_size"),
    (PermissionError(13, "Permission denied", "/there"), 2, "/there"),
    (KeyError("oops"), 1, "Traceback"),
    (KeyboardInterrupt(), 130, "SIGINT"),
  ],
)
def test_what_goes_wrong_has_its_exit_status(
  trained, capfd, monkeypatch, error, status, words
):
  def fail(*_):
    raise error

  monkeypatch.setitem(unet_jax.main.MODES, "evaluate", fail)
  assert run(*runs.arguments(trained, mode="evaluate")) == status
  output = capfd.readouterr().err
  assert words in output
  assert ("Traceback" in output) == (status == 1)


def test_help_exits_0():
  status, output = runs.finish(runs.start("--help"))
  assert status == 0
  assert "--workdir" in output
  assert "predict" in output


def test_a_mistake_exits_2_before_jax_is_imported(tmp_path):
  flags = ["--config.model.skip=concatt"]
  argv = [str(a) for a in runs.arguments(tmp_path, *flags)]
  code = (
    "import sys; from unet_jax.main import main;"
    f" status = main({argv!r}); sys.exit(7 if 'jax' in sys.modules else status)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert done.returncode == 2
  lines = done.stderr.strip().splitlines()
  assert len(lines) == 1
  assert lines[0].startswith(
    "error: config.model.skip='concatt': choose one of ['none', 'concat',"
  )
  assert lines[0].endswith("; nearest: 'concat'")
