"""Unusual networks, from training to prediction, as a user would run them."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import runs
from unet_jax.main import main


def run(workdir, *flags, mode="train"):
  return main(runs.arguments(workdir, *flags, mode=mode))


def read(path):
  return json.loads(path.read_text())


def read_mask(path):
  with Image.open(path) as image:
    return np.asarray(image)


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
  assert masks[0].shape == masks[1].shape


def test_shuffled_skips_are_scored_without_regard_to_the_batch(tmp_path, capfd):
  assert run(tmp_path, *SHORT, "--config.model.skip=shuffle") == 0
  losses = []
  for size in (1, 3):
    batch = f"--config.eval.batch_size={size}"
    assert run(tmp_path, batch, mode="evaluate") == 0
    losses.append(read(tmp_path / "evaluation_val.json")["loss"])
  assert losses[0] == pytest.approx(losses[1], rel=1e-6)
  capfd.readouterr()
  assert run(tmp_path, mode="predict") == 2
  error = capfd.readouterr().err.strip().splitlines()[-1]
  assert "another example" in error and "--mode evaluate" in error


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
