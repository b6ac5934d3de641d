"""PyTorch's networks against ours: same weights, same logits; and bad files."""

import collections
import dataclasses
import functools
import os
import pickle
import sys
import warnings
import zipfile

import jax
import numpy as np
import pytest

import unet_jax.main
from unet_jax import config as config_lib
from unet_jax import import_weights, optimizer, train_step
from unet_jax import state as state_lib
from unet_jax.errors import UserError
from unet_jax.exchange import import_torch
from unet_jax.objectives import losses
from unet_jax.runtime import parallel

torch = pytest.importorskip("torch", reason="needs the extra [torch]")
safetensors_torch = pytest.importorskip(
  "safetensors.torch", reason="needs the extra [torch]"
)

from tests.exchange import torch_nets  # noqa: E402 (it imports torch)

WIDTHS = (8, 5, 6, 7)
SEED_NETS = {
  "conv_last": lambda: torch_nets.Seed(3, 1, WIDTHS),
  "outc": lambda: torch_nets.Seed(1, 3, WIDTHS[:3], head="outc"),
}


def save(net, path):
  if path.suffix == ".safetensors":
    safetensors_torch.save_file(net.state_dict(), path)
  else:
    torch.save(net.state_dict(), path)
  return path


def load(path):
  """(config, model, variables) of a weight file."""
  cfg = config_lib.parse(import_torch.infer_config(path))
  trained = import_weights.load_weights(cfg, path, parallel.make_mesh())
  return cfg, trained


def image(net_channels, size, seed=0):
  shape = (2, *size, net_channels)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def difference(net, path, size, contrast=1.0):
  """Largest difference of the logits."""
  cfg, trained = load(path)
  x = 0.5 + contrast * image(cfg.data.channels, size)
  want = torch_nets.logits(net, x)
  got = trained.model.apply(trained.variables, x)
  assert got.shape == want.shape
  assert want.std() > 0.1
  return np.abs(np.asarray(got) - want).max()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("name", SEED_NETS)
def test_the_seeds_network_gives_pytorchs_logits(tmp_path, name, suffix):
  net = torch_nets.randomise(SEED_NETS[name]())
  path = save(net, tmp_path / f"weights{suffix}")
  assert difference(net, path, (24, 40)) < 1e-4


def test_the_seeds_network_is_the_published_one(tmp_path):
  """At its full widths it has the published number of parameters."""
  net = torch_nets.randomise(torch_nets.Seed())
  path = save(net, tmp_path / "unet_weights.pth")
  _, trained = load(path)
  count = sum(x.size for x in jax.tree.leaves(trained.variables["params"]))
  assert count == 7_788_545
  assert difference(net, path, (16, 40)) < 1e-4


def monai(dims, features=(4, 4, 8, 16, 32, 4), **fields):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of libraries that it imports.
    nets = pytest.importorskip("monai.networks.nets", reason="needs monai")
  return nets.BasicUNet(dims, 2, 3, features, **fields)


OTHERS = {
  "milesial": lambda: torch_nets.Milesial(2, 3, 4),
  "milesial_bilinear": lambda: torch_nets.Milesial(2, 1, 4, bilinear=True),
  "monai_2d": lambda: monai(2),
  "monai_3d": lambda: monai(3),
  "monai_batch": lambda: monai(2, norm="batch", bias=False),
}


@pytest.mark.parametrize(
  "size",
  [
    (37, 51, 18),
    pytest.param((32, 48, 16), marks=pytest.mark.slow),
    pytest.param((16, 63, 29), marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize("name", OTHERS)
def test_milesial_and_monai_give_pytorchs_logits(tmp_path, name, size):
  """Sizes that are multiples of 16, and sizes that are not."""
  net = torch_nets.randomise(OTHERS[name]())
  path = save(net, tmp_path / "weights.pth")
  size = size if name == "monai_3d" else size[:2]
  assert difference(net, path, size) < 1e-4


def test_faint_images_too(tmp_path):
  net = torch_nets.randomise(monai(2))
  path = save(net, tmp_path / "weights.pth")
  assert difference(net, path, (64, 96), contrast=0.01) < 1e-4


def test_a_training_step_is_pytorchs(tmp_path):
  """SGD on cross-entropy: the same weights and batch statistics after it."""
  net = torch_nets.randomise(SEED_NETS["conv_last"]())
  cfg, trained = load(save(net, tmp_path / "before.pth"))
  x = image(cfg.data.channels, (16, 24))
  label = np.random.default_rng(1).integers(0, 2, x.shape[:-1]).astype(np.int32)

  tx = optimizer.make_optimizer(
    dataclasses.replace(cfg.optimizer, name="sgd", weight_decay=0.0)
  )
  init = functools.partial(
    state_lib.init_state, trained.model, tx, image_shape=x.shape
  )
  state = jax.jit(init)(jax.random.key(0))
  before = state_lib.flatten(trained.variables)
  state = state_lib.with_variables(state, before)
  step = train_step.make_train_step(
    model=trained.model,
    loss_fn=losses.make_loss(
      terms=("binary_cross_entropy",), weights=(), class_weights=()
    ),
    tx=tx,
    schedule=lambda step: 0.5,
  )
  batch = {"image": x, "label": label, "id": np.arange(2, dtype=np.int32)}
  batch["weight"] = np.ones(label.shape, np.float32)
  batch["valid"] = np.ones(2, np.float32)
  state, _ = jax.jit(step)(state, batch, jax.random.key(0))
  got = state_lib.flatten(state_lib.eval_variables(state))

  net.train()
  sgd = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
  logits = net(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))[:, 0]
  truth = torch.from_numpy(label).float()
  torch.nn.functional.binary_cross_entropy_with_logits(logits, truth).backward()
  sgd.step()
  _, after = load(save(net, tmp_path / "after.pth"))
  for path, want in state_lib.flatten(after.variables).items():
    np.testing.assert_allclose(got[path], want, atol=1e-4, err_msg=path)
    moved = np.abs(want - before[path]).max()
    # A bias in front of batch norm has no gradient.
    assert moved > 1e-3 or path.endswith(("Conv_0/bias", "Conv_1/bias")), path


@pytest.mark.parametrize("wrap", ["module.", "_orig_mod.", "state_dict"])
def test_wrapped_and_half_precision_weights(tmp_path, wrap):
  net = torch_nets.randomise(SEED_NETS["outc"]().half()).float()
  state = net.half().state_dict()
  if wrap == "state_dict":
    state = {"epoch": 3, "model_state_dict": state, "note": "x" * 99}
  else:
    state = {f"{wrap}{key}": x for key, x in state.items()}
  path = tmp_path / "weights.pth"
  torch.save(state, path)
  assert difference(net.float(), path, (8, 12)) < 1e-4


def test_bfloat16_safetensors(tmp_path):
  net = torch_nets.randomise(SEED_NETS["outc"]()).bfloat16()
  path = save(net, tmp_path / "weights.safetensors")
  assert difference(net.float(), path, (8, 12)) < 1e-4


# --- What is refused ----------------------------------------------------------


def refused(path):
  """The one line with which the file is refused."""
  with pytest.raises(UserError) as caught:
    load(path)
  text = str(caught.value)
  assert str(path) in text
  assert len(text.splitlines()) == 1
  return text


class Evil:
  """Unpickled, it makes a file."""

  def __init__(self, target):
    self.target = target

  def __reduce__(self):
    return os.system, (f"touch {self.target}",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capfd):
  target, path = tmp_path / "made", tmp_path / "weights.pth"
  state = torch_nets.Seed(1, 1, (2, 2)).state_dict()
  bad = collections.OrderedDict(state, extra=Evil(target))
  # The test's own check: an unrestricted reader does make the file.
  pickle.loads(pickle.dumps(Evil(target)))
  assert target.exists()
  target.unlink()
  for zipped in (True, False):
    torch.save(bad, path, _use_new_zipfile_serialization=zipped)
    assert "system" in refused(path)
    assert "weights_only" not in refused(path)
  for protocol in range(6):
    path.write_bytes(pickle.dumps(bad, protocol))
    refused(path)
  argv = ["--mode", "import_weights", "--weights", str(path)]
  status = unet_jax.main.main([*argv, "--workdir", str(tmp_path / "run")])
  lines = capfd.readouterr().err.strip().splitlines()
  assert (status, len(lines)) == (2, 1)
  assert not target.exists()


def test_a_whole_model_is_refused_with_the_remedy(tmp_path):
  path = tmp_path / "model.pth"
  torch.save(torch_nets.Seed(1, 1, (2, 2)), path)
  text = refused(path)
  assert "torch_nets.Seed" in text
  assert "state_dict()" in text


def test_damaged_and_foreign_files_are_refused(tmp_path):
  for suffix in (".pth", ".safetensors"):
    path = save(torch_nets.Seed(1, 1, (2, 2)), tmp_path / f"w{suffix}")
    whole = path.read_bytes()
    for size in (0, 1, 7, 100, len(whole) // 2, len(whole) - 1):
      path.write_bytes(whole[:size])
      refused(path)
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    refused(path)
    path.unlink()
    assert "no weight file" in refused(path)
  path = tmp_path / "weights.onnx"
  path.write_bytes(b"x")
  assert ".safetensors" in refused(path)
  path = tmp_path / "w.pth"
  torch.save([torch.zeros(3)], path)
  assert "list" in refused(path)
  torch.save({"backbone.conv.weight": torch.zeros(3), 7: 1}, path)
  text = refused(path)
  assert "backbone.conv.weight" in text
  assert "dconv_down1" in text
  assert "inc.double_conv" in text


def test_a_small_file_cannot_claim_much_memory(tmp_path):
  path = tmp_path / "w.pth"
  state = torch_nets.Seed(1, 1, (2, 2)).state_dict()
  huge = torch.zeros(1).expand(10**6, 10**6)
  torch.save({**state, "conv_last.bias": huge}, path)
  assert "unpacks to 4,000,000," in refused(path)
  torch.save({**state, "zeros": torch.zeros(10**6)}, path)
  with zipfile.ZipFile(path) as archive:
    entries = {x: archive.read(x) for x in archive.namelist()}
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, data in entries.items():
      archive.writestr(name, data)
  assert path.stat().st_size < 10**5
  assert "unpacks" in refused(path)
  torch.save({**state, "conv_last.bias": torch.zeros(3).to_sparse()}, path)
  refused(path)


def test_a_missing_or_old_torch_is_refused(tmp_path, monkeypatch):
  path = save(torch_nets.Seed(1, 1, (2, 2)), tmp_path / "w.pth")
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, "torch", None)
    assert "pip install" in refused(path)
    # What is no pickle needs no torch.
    load(save(torch_nets.Seed(1, 1, (2, 2)), tmp_path / "w.safetensors"))
  for version in ("2.5.1", "2.9.0+cpu"):
    monkeypatch.setattr(torch, "__version__", version)
    assert version in refused(path)
  monkeypatch.setattr(torch, "__version__", "3.0.0a0+git")
  load(path)


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
  path = tmp_path / "w.pth"
  state = torch_nets.Seed(1, 1, (2, 4)).state_dict()
  del state["dconv_down1.conv.1.running_var"]
  state["conv_last.bias"] = torch.zeros(1, dtype=torch.complex64)
  state["attention.weight"] = torch.zeros(7, 8)
  state["dconv_up1.conv.0.weight"] = torch.zeros(2, 9, 3, 3)
  torch.save(state, path)
  text = refused(path)
  for words in (
    "missing dconv_down1.conv.1.running_var for (2,)",
    "unused attention.weight (7, 8)",
    "dconv_up1.conv.0.weight gives float32(3, 3, 9, 2), must be (3, 3, 6, 2)",
    "conv_last.bias gives complex64(1,), must be (1,)",
  ):
    assert words in text
  assert text.count("dconv") == 2  # And nothing else is.


@pytest.mark.parametrize(
  "key", list(torch_nets.Seed(1, 1, (2, 3)).state_dict())
)
def test_any_missing_tensor_is_noticed(tmp_path, key):
  state = torch_nets.Seed(1, 1, (2, 3)).state_dict()
  del state[key]
  torch.save(state, tmp_path / "w.pth")
  if key.endswith("num_batches_tracked"):
    load(tmp_path / "w.pth")
  else:
    assert key in refused(tmp_path / "w.pth")
