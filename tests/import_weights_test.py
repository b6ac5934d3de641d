"""PyTorch weights on the command line: imported, predicted with, trained on."""

import json

import numpy as np
import pytest
from PIL import Image

import unet_jax.main
from tests import runs

torch = pytest.importorskip("torch", reason="needs the extra [torch]")

from tests.exchange import torch_nets  # noqa: E402 (it imports torch)
from unet_jax import predict  # noqa: E402

WIDTHS = (8, 5, 6, 7)
# The imported network, on data that is quickly drawn and evaluated.
SMALL = ["--config.data.synthetic_size=16", "--config.data.crop_size=16"]
SMALL += [f"--config.data.synthetic_{s}=8" for s in ("train", "val", "test")]
SMALL += ["--config.train.num_steps=2", "--config.optimizer.ema_decay=0.5"]
# So that what it ends with is what it started from, but for the statistics.
SMALL += ["--config.optimizer.learning_rate=0"]


def run(*argv):
  return unet_jax.main.main([str(x) for x in argv])


def refused(capfd, *argv):
  capfd.readouterr()
  assert run(*argv) == 2
  error = capfd.readouterr().err.strip()
  assert error.startswith("error: ")
  assert len(error.splitlines()) == 1
  return error


@pytest.fixture(scope="module")
def net():
  net = torch_nets.randomise(torch_nets.Seed(3, 1, WIDTHS))
  image = np.random.default_rng(0).random((1, 40, 40, 3), np.float32)
  # So that there is foreground and background.
  net.conv_last.bias.data -= float(torch_nets.logits(net, image).mean())
  return net


@pytest.fixture(scope="module")
def weights(net, tmp_path_factory):
  path = tmp_path_factory.mktemp("weights") / "unet_weights.pth"
  torch.save({**net.state_dict(), "mask_values": [0, 255]}, path)
  return path


@pytest.fixture(scope="module")
def imported(weights, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("imported")
  flags = ["--mode", "import_weights", "--weights", weights]
  assert run(*flags, "--workdir", workdir, *SMALL) == 0
  return workdir


def test_the_seeds_demo_in_one_command(net, weights, tmp_path, monkeypatch):
  """A grey picture of any size becomes a mask of 0 and 255."""
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  for height, width in [(37, 50), (24, 40)]:
    grey = rng.integers(0, 256, (height, width), np.uint8)
    Image.fromarray(grey).save("cell.png")
    flags = ["--mode", "predict", "--weights", weights, "--input", "cell.png"]
    # A workdir says where predictions go, and no more.
    flags += ["--workdir", "there"] if height == 24 else []
    assert run(*flags, "--config.predict.mask_values=scaled") == 0
    folder = "there/predictions" if height == 24 else "predictions"
    mask = np.asarray(Image.open(f"{folder}/cell_mask.png"))
    # To a multiple of 8, by mirroring; then three equal channels in 0..1.
    padding = [(0, -height % 8), (0, -width % 8)]
    padded = np.pad(grey, padding, mode="reflect").astype(np.float32) / 255
    image = np.repeat(padded[None, ..., None], 3, axis=-1)
    logits = torch_nets.logits(net, image)[0, :height, :width, 0]
    sure = np.abs(logits) > 1e-4
    np.testing.assert_array_equal(mask[sure], 255 * (logits > 0)[sure])
    assert mask.shape == (height, width)
    assert set(np.unique(mask)) == {0, 255}


def test_imported_weights_predict_in_bfloat16(net, weights, tmp_path):
  image = np.random.default_rng(1).integers(0, 256, (40, 48, 3), np.uint8)
  Image.fromarray(image).save(tmp_path / "cell.png")
  flags = ["--mode", "predict", "--weights", weights, "--output", tmp_path]
  flags += ["--input", tmp_path / "cell.png", "--config.model.dtype=bfloat16"]
  assert run(*flags) == 0
  mask = np.asarray(Image.open(tmp_path / "cell_mask.png"))
  logits = torch_nets.logits(net, image[None].astype(np.float32) / 255)[0]
  wrong = mask != (logits[..., 0] > 0)
  # Where the logit is near 0, and nowhere else.
  assert wrong.mean() < 0.05
  assert np.abs(logits[wrong]).max(initial=0) < 0.05 * np.abs(logits).max()


def test_load_predictor_takes_weights(tmp_path):
  """Of an odd size, which milesial's decoder pads itself."""
  net = torch_nets.randomise(torch_nets.Milesial(3, 4, 4))
  path = tmp_path / "weights.pth"
  torch.save(net.state_dict(), path)
  image = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
  mask = predict.load_predictor(weights=path)(image)
  logits = torch_nets.logits(net, image[None].astype(np.float32) / 255)[0]
  best = np.sort(logits, axis=-1)
  sure = best[..., -1] - best[..., -2] > 1e-4
  np.testing.assert_array_equal(mask[sure], logits.argmax(-1)[sure])
  assert len(np.unique(mask)) > 1


def test_an_imported_network_is_a_run(net, imported, tmp_path):
  """It is evaluated, predicted with, and trained on, in its workdir."""
  report = (imported / "import_report.txt").read_text()
  assert "unet_weights.pth: seed" in report
  line = "dconv_up3.conv.0.weight [6, 13, 3, 3] -> params/decoder/decoder_2/"
  assert line in report
  assert "mask_values -> ignored, not a tensor: [0, 255]" in report
  assert "dconv_up3.conv.1.num_batches_tracked [] -> ignored" in report
  assert (imported / "env.json").exists()
  state = runs.read_state(imported, 0)
  kernel = net.state_dict()["conv_last.weight"].numpy().transpose(2, 3, 1, 0)
  for tree in ("['params']", "['ema']['params']"):
    stored = state[f"{tree}['head']['kernel']"]
    np.testing.assert_array_equal(stored, kernel)

  common = ["--workdir", imported]
  assert run(*common, "--mode", "evaluate") == 0
  assert run(*common, "--mode", "predict", "--output", tmp_path / "out") == 0
  scores = json.loads((imported / "evaluation_val.json").read_text())
  assert scores["step"] == 0
  assert run(*common) == 0
  metrics = runs.read_metrics(imported)
  assert metrics[-1]["step"] == 2
  trained = runs.read_state(imported, 2)
  for path, value in state.items():
    if path.startswith("['params']"):
      np.testing.assert_array_equal(trained[path], value)
    if path.startswith("['batch_stats']"):
      assert not np.array_equal(trained[path], value)


def test_a_config_of_the_same_network_may_be_given(weights, tmp_path, capfd):
  text = "from unet_jax.config import default_config\n\n\ndef get_config():\n"
  text += "  config = default_config()\n  config.data.channels = 3\n"
  text += f"  config.model.widths = {WIDTHS}\n"
  text += "  config.model.up = 'linear_aligned'\n"
  text += "  config.model.activation = 'gelu'\n"
  text += "  config.data.normalize = 'dataset'\n  return config\n"
  config = tmp_path / "config.py"
  config.write_text(text)
  flags = ["--mode", "import_weights", "--weights", weights]
  flags += ["--config", config, "--workdir", tmp_path / "run"]
  assert run(*flags, *SMALL) == 0
  # What no shape can tell is the user's to say, and is said.
  assert "model.activation: gelu, though seed has relu" in (
    capfd.readouterr().err
  )
  fitted = json.loads((tmp_path / "run" / "normalization.json").read_text())
  assert len(fitted["mean"]) == 3
  image = tmp_path / "image.png"
  Image.new("L", (8, 8)).save(image)
  flags = ["--mode", "predict", "--weights", weights, "--config", config]
  assert "'dataset'" in refused(capfd, *flags, "--input", image)
  flags[1] = "import_weights"
  flags += ["--workdir", tmp_path / "other"]
  line = refused(capfd, *flags, "--config.data.channels=1")
  assert "dconv_down1.conv.0.weight" in line
  assert "--config" in line
  assert not (tmp_path / "other").exists()


def test_usage_mistakes_are_one_line(imported, weights, tmp_path, capfd):
  mode = ["--mode", "import_weights"]
  assert "--weights is missing" in refused(capfd, *mode, "--workdir", tmp_path)
  line = refused(capfd, *mode, "--weights", weights)
  assert "--workdir is missing" in line
  flags = [*mode, "--weights", weights, "--workdir", imported]
  assert "holds a run already" in refused(capfd, *flags)
  line = refused(capfd, "--mode", "evaluate", *flags[2:])
  assert "--weights has no meaning" in line
  mode = ["--mode", "predict", "--weights", weights]
  assert "--input" in refused(capfd, *mode)
  line = refused(capfd, *mode, "--input", tmp_path, "--step", 1)
  assert "no steps" in line
  line = refused(capfd, *mode[:2], "--weights", tmp_path, "--input", tmp_path)
  assert "no weight file" in line
