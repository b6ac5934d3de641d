"""An exported network, loaded where this package is not."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unet_jax.main
from tests import runs
from unet_jax import config, geometry, predict
from unet_jax.data import normalize, pipeline
from unet_jax.errors import UserError
from unet_jax.exchange import export, inference, load, to_onnx
from unet_jax.inspect import explain

pytest.importorskip("flatbuffers", reason="needs the extra [export]")

# Of two images in one batch.
SIZES = (33, 30, 2), (38, 7, 2)
# What `load.py` must do without.
ABSENT = "unet_jax flax optax ml_collections PIL orbax grain".split()
CODE = """
import sys
for name in %r:
  sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import numpy as np
from load import load
images, predict = dict(np.load(sys.argv[2])), load(sys.argv[1])
out = {}
for name, image in images.items():
  out["mask_" + name], out["probability_" + name] = predict(image)
np.savez(sys.argv[3], **out)
"""


def trained(workdir, *flags):
  """A run of two steps."""
  argv = runs.arguments(workdir, "--config.train.num_steps=2", *flags)
  assert unet_jax.main.main(argv) == 0


def read_config(workdir):
  return config.parse(json.loads((workdir / "config.json").read_text()))


def run_export(workdir):
  return unet_jax.main.main(["--workdir", str(workdir), "--mode", "export"])


def images_of(dims, channels):
  rng = np.random.default_rng(3)
  sizes = [(5, 9, 4), (16, 16, 8), (21, 34, 7), (1, 40, 3)]
  shapes = [(*size[:dims], channels) for size in sizes]
  return {str(i): rng.random(s, np.float32) for i, s in enumerate(shapes)}


def reload(workdir, images, tmp_path):
  """What a fresh process makes of the exported file."""
  np.savez(tmp_path / "images.npz", **images)
  command = [sys.executable, "-c", CODE % ABSENT, str(workdir / "export")]
  files = [str(tmp_path / f) for f in ("images.npz", "out.npz")]
  subprocess.run([*command, *files], check=True, timeout=300)
  return dict(np.load(files[1]))


def assert_equal_to_predict(workdir, images, tmp_path, atol=0.0):
  found = reload(workdir, images, tmp_path)
  cfg = read_config(workdir)
  ours = predict.make_predict(cfg, workdir)
  for name, image in images.items():
    mask, probability = ours(image)
    assert found[f"mask_{name}"].dtype == np.uint8
    np.testing.assert_allclose(
      found[f"probability_{name}"], probability, rtol=0, atol=atol
    )
    np.testing.assert_array_equal(found[f"mask_{name}"], mask)
    assert probability.std() > 0  # Else equality would say little.


def test_a_fresh_process_predicts_to_the_bit(tmp_path):
  workdir = tmp_path / "run"
  trained(workdir, "--config.data.normalize=image")
  assert run_export(workdir) == 0
  manifest = json.loads((workdir / "export" / "manifest.json").read_text())
  assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
  assert manifest["step"] == 2 and manifest["conv"] == "fast"
  assert manifest["largest_difference"] == 0
  assert_equal_to_predict(workdir, images_of(2, 1), tmp_path)
  # A damaged file is not used.
  path = workdir / "export" / "model.npz"
  data = bytearray(path.read_bytes())
  data[-100] ^= 1
  path.write_bytes(data)
  with pytest.raises(subprocess.CalledProcessError):
    reload(workdir, images_of(2, 1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flags", "atol"),
  [
    (
      [
        "data.normalize=dataset",
        "data.num_classes=3",
        "model.norm=group",
        "model.norm_groups=2",
      ],
      0,
    ),
    (["model.padding=valid", "data.crop_size=60", "data.pad_multiple=6"], 0),
    (["model.dims=3", "data.normalize=none"], 0),
    (["data.clip_percentiles=2,96", "data.pad_multiple=6"], 0),
    (
      [
        "model.dims=3",
        "model.widths=2,4,4",
        "model.pool_axes=12,012",
        "data.clip_percentiles=0.5,99.5",
      ],
      0,
    ),
    (["model.skip=attn_oktay", "model.up=linear"], 1e-6),
    (["model.up=linear_aligned", "model.decoder=nested"], 1e-6),
  ],
)
def test_networks_of_every_kind(flags, atol, tmp_path):
  workdir = tmp_path / "run"
  trained(workdir, *(f"--config.{flag}" for flag in flags))
  assert run_export(workdir) == 0
  cfg = read_config(workdir)
  manifest = json.loads((workdir / "export" / "manifest.json").read_text())
  assert manifest["conv"] == "fast"
  images = images_of(cfg.model.dims, cfg.data.channels)
  assert_equal_to_predict(workdir, images, tmp_path, atol)


@pytest.mark.slow
def test_sizes_padded_on_the_way_up_are_mirrored_instead(tmp_path, capfd):
  """Equal where nothing is padded; else it is said."""
  trained(tmp_path / "run", "--config.model.odd_size=pad_up")
  assert run_export(tmp_path / "run") == 0
  assert "no multiple of 2 are mirrored" in capfd.readouterr().err
  even = {"a": np.random.default_rng(0).random((12, 18, 1), np.float32)}
  assert_equal_to_predict(tmp_path / "run", even, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_views_are_averaged(dims, tmp_path):
  """As `predict` does; of sizes that need no padding, also not square ones."""
  trained(tmp_path / "run", f"--config.model.dims={dims}")
  flags = ["--mode", "export", "--config.predict.views=8"]
  argv = ["--workdir", str(tmp_path / "run"), *flags]
  assert unet_jax.main.main(argv) == 0
  shape = (*(12, 18, 8)[:dims], 1)
  image = np.random.default_rng(0).random(shape, np.float32)
  found = reload(tmp_path / "run", {"a": image}, tmp_path)
  cfg = read_config(tmp_path / "run")
  alone = predict.make_predict(cfg, tmp_path / "run")(image)[1]
  wanted = dataclasses.replace(cfg.predict, views=8)
  cfg = dataclasses.replace(cfg, predict=wanted)
  mask, probability = predict.make_predict(cfg, tmp_path / "run")(image)
  np.testing.assert_allclose(found["probability_a"], probability, atol=1e-6)
  np.testing.assert_array_equal(found["mask_a"], mask)
  assert np.abs(alone - probability).max() > 1e-4


ONNX = [
  (["data.normalize=image", "predict.views=8"], "24,40"),
  (
    ["data.num_classes=3", "data.normalize=dataset", "model.up=linear"],
    "32,16",
  ),
  (["model.padding=valid", "data.crop_size=60"], "36,44"),
  (["model.dims=1", "model.norm=group", "model.norm_groups=2"], "64"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("flags", "size"), ONNX, ids=lambda x: str(x[0]))
def test_onnx_in_onnxruntime(flags, size, tmp_path):
  """Within 1e-4, of images that the conversion has not seen."""
  for name in ("tensorflow", "tf2onnx", "onnxruntime"):
    pytest.importorskip(name, reason="needs the extra [onnx]")
  workdir, flags = tmp_path / "run", [f"--config.{flag}" for flag in flags]
  views = [flag for flag in flags if "views" in flag]
  trained(workdir, *(flag for flag in flags if flag not in views))
  argv = ["--workdir", str(workdir), "--mode", "export", "--onnx", size]
  assert unet_jax.main.main([*argv, *views]) == 0
  manifest = json.loads((workdir / "export" / "manifest.json").read_text())
  assert manifest["onnx"]["largest_difference"] < 1e-4
  cfg = read_config(workdir)
  if views:
    wanted = dataclasses.replace(cfg.predict, views=8)
    cfg = dataclasses.replace(cfg, predict=wanted)
  shape = (*map(int, size.split(",")), cfg.data.channels)
  content = (workdir / "export" / "model.onnx").read_bytes()
  image = np.random.default_rng(7).gamma(2.0, size=shape).astype(np.float32)
  mask, p = to_onnx.run(content, image)
  expected_mask, expected = predict.make_predict(cfg, workdir)(image)
  if mask.shape != expected_mask.shape:  # Valid: the middle.
    inside = tuple(
      slice((a - b) // 2, (a + b) // 2)
      for a, b in zip(expected_mask.shape, mask.shape, strict=True)
    )
    expected, expected_mask = expected[inside], expected_mask[inside]
  np.testing.assert_allclose(p, expected, atol=1e-4)
  assert np.mean(mask != expected_mask) < 0.01 and expected.std() > 0


def test_onnx_that_cannot_be_is_refused(monkeypatch):
  cfg = config.parse(config.default_config())
  monkeypatch.setitem(sys.modules, "tf2onnx", None)
  with pytest.raises(
    UserError, match=r"tf2onnx.*pip install 'unet_jax\[onnx\]'"
  ):
    to_onnx.check(cfg, (64, 64))
  monkeypatch.setattr(to_onnx, "_PACKAGES", ())
  to_onnx.check(cfg, (64, 64))
  with pytest.raises(UserError, match="nearest: 56, 64"):
    to_onnx.check(cfg, (64, 60))
  with pytest.raises(UserError, match="1 sizes, but"):
    to_onnx.check(cfg, (64,))
  raw = config.default_config()
  raw.data.clip_percentiles = (1.0, 99.0)
  with pytest.raises(UserError, match="sorting"):
    to_onnx.check(config.parse(raw), (64, 64))


def test_the_size_rules_are_those_of_the_program():
  """Four sums give the padded size of every image, by brute force."""
  for padding, odd, widths, multiple, pooled in [
    ("same", "pad_input", (2, 4, 8), 1, ()),
    ("same", "pad_input", (2, 4, 8), 6, ("12", "012")),
    ("same", "pad_input", (2, 4, 8), 1, ("2", "12")),
    ("valid", "pad_input", (2, 4, 8), 1, ()),
    ("valid", "pad_input", (2, 4), 10, ()),
  ]:
    cfg = config.default_config()
    cfg.model.update(padding=padding, odd_size=odd, widths=widths)
    cfg.model.update(pool_axes=pooled, dims=3 if pooled else 2)
    cfg.data.pad_multiple = multiple
    cfg.data.crop_size = (60,)
    cfg = config.parse(cfg)
    rules = export.size_rules(cfg)
    assert len(rules) == cfg.model.dims
    for n, (axis, rule) in itertools.product(range(1, 90), enumerate(rules)):
      depth = cfg.model.depths[axis]
      plan = geometry.plan_pad(n, depth, cfg.model.size_rule, multiple)
      want = -(-n // rule["step"]) * rule["step"] + 2 * rule["before"]
      h = max(-(-(want + rule["less"]) // rule["unit"]), rule["least"])
      assert h * rule["unit"] - rule["less"] == plan.size, (padding, n)
      assert rule["before"] == plan.before
      assert pipeline.pad_for_network(
        np.zeros((n, 1)), depth, cfg.model.size_rule, multiple
      ).shape == (plan.size, 1)


@pytest.mark.parametrize("clip", [(), (3, 90)])
@pytest.mark.parametrize("mode", ["none", "image", "dataset"])
@pytest.mark.parametrize("single", [False, True])
def test_the_program_normalises_what_is_not_mirrored(mode, clip, single):
  """Two images in one batch, one of a constant channel; against numpy."""
  rng = np.random.default_rng(1)
  images = [rng.gamma(2.0, size=s).astype(np.float32) for s in SIZES]
  images[1][..., 1] = 0.3
  how = {"mode": mode, "mean": [0.4, 2.0], "std": [0.2, 0.0]}
  how |= {"clip": list(clip)} if clip else {}
  before = (2, 1)
  batch = rng.normal(size=(2, 40, 32, 2)).astype(np.float32)  # All else: noise.
  places = [np.s_[2 : 2 + h, 1 : 1 + w] for h, w, _ in SIZES]
  for out, place, image in zip(batch, places, images, strict=True):
    out[place] = image
  sizes = jnp.asarray([s[:2] for s in SIZES], jnp.int32)
  with jax.enable_x64(not single):
    inside = inference._inside(batch, sizes, before)
    dtype = jnp.float32 if single else jnp.float64
    found = inference.normalize(jnp.asarray(batch), inside, how, before, dtype)
  assert found.dtype == np.float32
  for out, place, image in zip(found, places, images, strict=True):
    expected = normalize.normalize(image, how)
    if single:
      np.testing.assert_allclose(out[place], expected, atol=2e-5)
    else:
      np.testing.assert_array_equal(out[place], expected)
    assert expected[..., 0].std() > 0.1


def test_the_loader_is_short():
  """Forty lines, that a reader of the file takes in at once."""
  assert len(pathlib.Path(load.__file__).read_text().splitlines()) <= 40


def test_what_has_no_single_image_is_refused(tmp_path):
  cfg = config.default_config()
  cfg.model.skip = "shuffle"
  with pytest.raises(UserError, match="another example"):
    export.run(config.parse(cfg), tmp_path)
  with pytest.raises(UserError, match="another example"):
    explain.run(config.parse(cfg), tmp_path, None)


def test_a_spacing_is_refused(tmp_path):
  volumes = config.load_config("configs/hippocampus3d.py")
  volumes.data.dir = str(tmp_path)
  volumes.data.spacing = (1.0, 1.0, 1.0)
  with pytest.raises(UserError, match="an array has no spacing"):
    export.run(config.parse(volumes), tmp_path)


def test_words_are_refused(tmp_path):
  words = config.load_config("configs/ewt_upos.py")
  words.data.dir = str(tmp_path)
  cfg = config.parse(words)
  with pytest.raises(UserError, match="words are looked up outside"):
    export.run(cfg, tmp_path)
  with pytest.raises(UserError, match="no picture"):
    explain.run(cfg, tmp_path, None)
