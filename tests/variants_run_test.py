"""Unusual networks, from training to prediction, as a user would run them."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import runs
from unet_jax import evaluate
from unet_jax import workdir as workdir_lib
from unet_jax.data import normalize, pipeline
from unet_jax.main import main
from unet_jax.models.skips import Context
from unet_jax.runtime import parallel


def run(workdir, *flags, mode="train"):
  return main(runs.arguments(workdir, *flags, mode=mode))


def read(path):
  return json.loads(path.read_text())


def read_mask(path):
  with Image.open(path) as image:
    return np.asarray(image)


SHUFFLE = "--config.model.skip=shuffle"


def pipeline_examples(cfg, workdir):
  source = pipeline.make_source(cfg, "val", workdir)
  return [source[i] for i in range(len(source))]


SHORT = ("--config.train.num_steps=2", "--config.train.log_every=1")


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
  """A UNet++ of two columns with deep supervision."""
  workdir = tmp_path_factory.mktemp("nested")
  flags = [
    "--config.model.widths=2,3,4",
    "--config.model.decoder=nested",
    "--config.model.deep_supervision=true",
  ]
  assert run(workdir, *SHORT, *flags) == 0
  return workdir


def test_every_output_is_in_the_loss_and_scored(nested):
  lines = runs.read_metrics(nested)
  train, val = lines[0], lines[-1]
  outputs = [train["loss_output_0"], train["loss_output_1"]]
  assert train["loss"] == pytest.approx((2 * outputs[0] + outputs[1]) / 3)
  assert len(val["dice_per_output"]) == 2
  assert val["dice_per_output"][0] == val["dice"]


def test_a_pruned_network_scores_as_its_output_did(nested, tmp_path):
  assert run(nested, mode="evaluate") == 0
  whole = read(nested / "evaluation_val.json")
  assert run(nested, "--config.eval.prune=1", mode="evaluate") == 0
  pruned = read(nested / "evaluation_val.json")
  assert pruned["dice"] == whole["dice_per_output"][1]
  assert pruned["dice_per_output"] == [pruned["dice"]]
  masks = []
  for flags in ([], ["--config.eval.prune=1"]):
    out = tmp_path / str(len(flags))
    assert run(nested, *flags, "--output", out, mode="predict") == 0
    files = sorted(out.glob("*_mask.png"))
    masks.append(np.stack([read_mask(path) for path in files]))
  # Not what the whole network predicts, but what its output 1 does.
  assert (masks[0] != masks[1]).any()
  cfg = workdir_lib.read_config(nested)
  whole = workdir_lib.load_trained(cfg, nested, parallel.make_mesh())
  image = np.stack(
    [
      normalize.normalize(example["image"], whole.normalization)
      for example in pipeline_examples(cfg, nested)
    ]
  )
  outputs = whole.model.apply(whole.variables, image, every_output=True)
  expected = np.asarray(outputs.logits[1])[..., 0] > 0
  np.testing.assert_array_equal(masks[1], expected)


def test_shuffled_skips_are_scored_without_regard_to_the_batch(tmp_path, capfd):
  assert run(tmp_path, *SHORT, SHUFFLE) == 0
  losses = []
  for size in (1, 3):
    batch = f"--config.eval.batch_size={size}"
    assert run(tmp_path, batch, mode="evaluate") == 0
    losses.append(read(tmp_path / "evaluation_val.json")["loss"])
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
  # It is the next example of the split that lends its features.
  cfg = workdir_lib.read_config(tmp_path)
  source = pipeline.make_source(cfg, "val", tmp_path)
  batches = pipeline.eval_batches(
    source, {"mode": "none", "mean": [], "std": []}, cfg=cfg, num_devices=1
  )
  batch = next(batches)
  model = workdir_lib.make_model(cfg)
  mesh = parallel.make_mesh()
  variables = workdir_lib.load_trained(cfg, tmp_path, mesh).variables
  (logits,) = evaluate._apply(model, variables, batch)
  for k, i in enumerate(batch["id"]):
    partner = source[(i + 1) % len(source)]["image"]
    np.testing.assert_array_equal(batch["partner"][k], partner)
    pair = np.stack([batch["image"][k], partner])
    context = Context(partner=np.array([1, 0]))
    alone = model.apply(variables, pair, context=context)[0]
    np.testing.assert_allclose(logits[k], alone, atol=1e-5)
  capfd.readouterr()
  assert run(tmp_path, mode="predict") == 2
  error = capfd.readouterr().err.strip().splitlines()[-1]
  assert "another example" in error and "--mode evaluate" in error


def test_shuffling_needs_another_example_in_every_split(tmp_path, capfd):
  for split in ("train", "val"):
    flags = [
      "--config.model.skip=shuffle",
      f"--config.data.synthetic_{split}=1",
    ]
    assert run(tmp_path, *SHORT, *flags) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"{split!r} has one" in error
  assert not (tmp_path / "checkpoints").exists()


def test_a_run_with_noise_dropout_and_bfloat16_resumes_to_the_bit(tmp_path):
  flags = [
    "--config.model.skip=noise",
    "--config.model.block_dropout=0.2",
    "--config.model.dropout=0.2",
    "--config.model.deep_supervision=true",
    "--config.model.dtype=bfloat16",
    # The learning rate must not depend on the length of the run.
    "--config.optimizer.schedule=constant",
    "--config.optimizer.warmup_steps=0",
  ]
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert run(whole, *flags, "--config.train.num_steps=4") == 0
  assert run(parts, *flags, "--config.train.num_steps=2") == 0
  assert run(parts, *flags, "--config.train.num_steps=4") == 0
  a, b = runs.read_state(whole, 4), runs.read_state(parts, 4)
  assert a.keys() == b.keys()
  for key, value in a.items():
    np.testing.assert_array_equal(value, b[key], err_msg=key)


def test_odd_images_enter_a_network_that_pads_on_the_way_up_as_they_are(
  tmp_path,
):
  flags = [
    "--config.model.odd_size=pad_up",
    "--config.data.synthetic_size=19",
    "--config.data.crop_size=17",
  ]
  assert run(tmp_path, *SHORT, *flags) == 0
  assert run(tmp_path, mode="evaluate") == 0
  assert run(tmp_path, mode="predict") == 0
  masks = list((tmp_path / "predictions").glob("*_mask.png"))
  assert masks and {read_mask(path).shape for path in masks} == {(19, 19)}


def test_which_classes_an_image_has_is_learned_and_logged(tmp_path):
  flags = [
    "--config.model.decoder=full_scale",
    "--config.model.classification_guided=true",
  ]
  assert run(tmp_path, *SHORT, *flags) == 0
  line = runs.read_metrics(tmp_path)[0]
  terms = line["loss_cross_entropy"] + line["loss_dice"]
  assert line["loss"] == pytest.approx(terms + line["loss_presence"], rel=1e-5)
