"""Explanations: closed forms on nets of one layer, and the sanity check."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image
from scipy import ndimage, stats

import unet_jax.main
from tests import runs
from unet_jax import config, workdir
from unet_jax.data import normalize, pipeline
from unet_jax.inspect import attributions, explain, explain_page
from unet_jax.models import build_model
from unet_jax.runtime import parallel

RNG = np.random.default_rng(0)
KERNEL = jnp.asarray(RNG.normal(size=(3, 3, 2, 1)).astype(np.float32))
IMAGE = jnp.asarray(RNG.random((9, 11, 2), np.float32))


def convolved(x, times=1):
  """One 3-wide convolution at the pixel (4, 5), linear in the image."""
  y = jax.lax.conv_general_dilated(
    x[None], KERNEL, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return y[0, 4, 5, 0] * times


def test_integrated_gradients_of_a_linear_net_are_its_terms():
  baseline = jnp.full_like(IMAGE, 0.25)
  found = attributions.integrated_gradients(convolved, IMAGE, baseline, steps=3)
  expected = np.zeros(IMAGE.shape, np.float32)
  window = np.s_[3:6, 4:7]
  expected[window] = KERNEL[..., 0] * (IMAGE - baseline)[window]
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_integrated_gradients_are_complete():
  """Sum of attributions = difference of outputs, for a curved net too."""
  curved = lambda x: jnp.sin(convolved(x)) + jnp.mean(jnp.square(x))
  baseline = jnp.zeros_like(IMAGE)
  difference = float(curved(IMAGE) - curved(baseline))
  gaps = []
  for steps in (4, 32):
    found = attributions.integrated_gradients(curved, IMAGE, baseline, steps)
    gaps.append(abs(float(found.sum()) - difference))
  assert gaps[1] < 1e-3 * abs(difference)
  assert gaps[1] < gaps[0] / 20  # The midpoint rule's error falls as 1 / n^2.


def test_occlusion_is_nothing_outside_the_receptive_field():
  found = attributions.occlusion(convolved, IMAGE, (1, 1))
  mean = np.asarray(IMAGE.mean((0, 1)))
  expected = np.zeros(IMAGE.shape[:-1], np.float32)
  window = np.s_[3:6, 4:7]
  lost = KERNEL[..., 0] * (np.asarray(IMAGE)[window] - mean)
  expected[window] = lost.sum(-1)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  outside = np.ones(found.shape, bool)
  outside[window] = False
  assert (found[outside] == 0).all()
  # Larger windows tile the image, the last ones cut off at its border.
  tiles = attributions.occlusion(convolved, IMAGE, (4, 4))
  assert (tiles[8:] == 0).all() and tiles[4, 5] != 0
  assert len(np.unique(tiles[4:8, 4:8])) == 1


def test_the_receptive_field_of_a_convolution_is_its_kernel():
  found = attributions.receptive_field(lambda x: convolved(x, -2.0), IMAGE)
  expected = np.zeros(IMAGE.shape[:-1], np.float32)
  expected[3:6, 4:7] = 2 * np.abs(KERNEL[..., 0]).sum(-1)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_seg_grad_cam_is_the_papers_sum():
  activation = RNG.normal(size=(4, 5, 3)).astype(np.float32)
  gradient = RNG.normal(size=(4, 5, 3)).astype(np.float32)
  expected = np.zeros((4, 5))
  for c in range(3):
    alpha = sum(gradient[i, j, c] for i in range(4) for j in range(5)) / 20
    expected += alpha * activation[..., c]
  found = attributions.seg_grad_cam(
    jnp.asarray(activation), jnp.asarray(gradient)
  )
  np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_log_odds(classes):
  logits = RNG.normal(size=(6, classes)).astype(np.float32)
  p = nn.softmax(logits) if classes > 1 else nn.sigmoid(logits)
  for k in range(classes):
    np.testing.assert_allclose(
      attributions.log_odds(jnp.asarray(logits), k),
      np.log(p[:, k] / (1 - p[:, k])),
      rtol=1e-4,
      atol=1e-5,
    )


# --- A trained network --------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("explain") / "run"
  flags = ["model.skip=attn_same", "model.widths=4,8,8", "train.num_steps=24"]
  flags = [f"--config.{flag}" for flag in flags]
  assert unet_jax.main.main(runs.arguments(folder, *flags)) == 0
  return folder


@pytest.fixture(scope="module")
def parts(trained):
  cfg = config.parse(json.loads((trained / "config.json").read_text()))
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  loaded = workdir.load_trained(cfg, trained, mesh)
  image = RNG.normal(size=(13, 18, 1)).astype(np.float32)
  image[3:8, 4:10] += 3
  return cfg, loaded, image


# From the last layer to the first.
CASCADE = "head", "decoder/", "encoder_2", "encoder_1", "encoder_0"


def maps_of(asked):
  """All maps, and two that do not or hardly ask the network, as controls."""
  maps = {}
  for method in explain.METHODS.values():
    found = method(asked)[0].items()
    maps |= {k.split(" of ")[0]: np.asarray(v) for k, v in found}
  image = np.asarray(asked.image)[..., 0]
  edges = np.hypot(ndimage.sobel(image, 0), ndimage.sobel(image, 1))
  some = maps["integrated gradients"]
  mixed = edges / edges.std() + 0.2 * some / some.std()
  return maps | {"edges": edges, "mostly edges": mixed}


def similarity(a, b):
  """|Spearman's rho| of two maps; of a constant one there is none."""
  if not (a.std() and b.std()):
    return 0.0
  return abs(stats.spearmanr(a.ravel(), b.ravel()).statistic)


def cascade(cfg, loaded, image, seeds=2):
  """Similarity with the first maps, by title and by layers drawn anew.

  The question stays: the class, the pixels and the point of the trained net.
  """
  asked = explain.ask(cfg, loaded.model, loaded.variables, image)
  trace, first = asked.trace.func, maps_of(asked)
  old = traverse_util.flatten_dict(loaded.variables, sep="/")
  depth = lambda path: next(
    i
    for i, name in enumerate(CASCADE)
    if path.split("/", 1)[1].startswith(name)
  )
  stages = 0, 1, len(CASCADE) - 1
  curves = {title: np.zeros(len(stages)) for title in first}
  for seed in range(seeds):
    empty = np.zeros((1, *image.shape), np.float32)
    new = loaded.model.init(jax.random.key(seed), empty)
    new = traverse_util.flatten_dict(new, sep="/")
    for i, stage in enumerate(stages):
      mixed = {k: new[k] if depth(k) <= stage else old[k] for k in old}
      variables = traverse_util.unflatten_dict(mixed, sep="/")
      again = asked._replace(trace=functools.partial(trace, variables))
      for title, values in maps_of(again).items():
        curves[title][i] += similarity(first[title], values) / seeds
  return curves


def fades(curve):
  """Whether little is left of a map once every layer was drawn anew."""
  return curve[-1] < min(0.5, curve[0])


def test_explanations_fade_as_layers_are_drawn_anew(parts):
  """Adebayo et al. 2018: a map that does not is a picture of the image.

  Cascading randomisation, https://arxiv.org/abs/1810.03292, section 3.1.
  """
  cfg, loaded, _ = parts
  source = pipeline.make_source(cfg, "val", "")
  image = normalize.normalize(source[1]["image"], loaded.normalization)
  curves = cascade(cfg, loaded, image)
  # Not the field of a pixel, which is no reason for a decision: where it lies
  # and how it falls off is the architecture's, with random weights too (Luo et
  # al. 2016, section 2).
  curves.pop("receptive field")
  assert not fades(curves.pop("edges")) and not fades(
    curves.pop("mostly edges")
  )
  kept = {title: curve for title, curve in curves.items() if not fades(curve)}
  assert not kept and len(curves) == 11, curves
  assert any(curve[0] > 0.7 for curve in curves.values())


def test_a_knocked_out_skip_is_a_skip_of_zeros(parts):
  """Against a network whose gate carries nothing: the joined half is 0."""
  cfg, loaded, image = parts
  make = lambda: functools.partial(
    attributions.make_trace(cfg, loaded.model, (13, 18)), loaded.variables
  )
  trace = make()

  def hook(call, args, kwargs, context):
    if context.module.name == "skip_0" and context.method_name == "side":
      return jnp.zeros_like(call(*args, **kwargs))
    return call(*args, **kwargs)

  with nn.intercept_methods(hook):
    expected = make()(jnp.asarray(image)).logits
  keep = jnp.array([0.0, 1.0])
  found = trace(jnp.asarray(image), keep=keep).logits
  whole = trace(jnp.asarray(image)).logits
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert float(jnp.abs(found - whole).max()) > 1e-2
  kept = trace(jnp.asarray(image), keep=jnp.ones(2)).logits
  np.testing.assert_allclose(kept, whole, atol=1e-6)


def test_the_gate_that_is_shown_is_the_gate(parts):
  """Sigmoids of the level's size, from which the skip's product follows."""
  cfg, loaded, image = parts
  make = lambda: functools.partial(
    attributions.make_trace(cfg, loaded.model, (13, 18)), loaded.variables
  )
  trace = make()
  seen = {}

  def hook(call, args, kwargs, context):
    out = call(*args, **kwargs)
    if context.method_name == "side":
      seen[context.module.name] = args[1], out
    return out

  with nn.intercept_methods(hook):
    with jax.disable_jit():
      gates = trace(jnp.asarray(image)).gates
  assert set(gates) == {"skip_0", "skip_1"}
  for name, (x, out) in seen.items():
    np.testing.assert_allclose(gates[name][0] * x[0], out[0], rtol=1e-5)


def test_thin_axes_are_explained():
  """A level's map is enlarged by what was pooled, axis by axis."""
  fields = {"dims": 3, "widths": (2, 2), "pool_axes": ("01",), "norm": "none"}
  raw = config.default_config()
  raw.model.update(fields)
  raw.data.crop_size = (8,)
  cfg = config.parse(raw)
  model = build_model(num_classes=1, **fields)
  image = RNG.normal(size=(5, 6, 3, 1)).astype(np.float32)
  variables = model.init(jax.random.key(0), np.zeros((1, 6, 6, 3, 1)))
  asked = explain.ask(cfg, model, variables, image)
  for method in (
    explain.METHODS[m] for m in ("seg_grad_cam", "receptive_field")
  ):
    maps, _ = method(asked)
    assert all(m.shape == image.shape[:-1] for m in maps.values())
  cam = explain.METHODS["seg_grad_cam"](asked)[0]["CAM encoder_1"]
  assert (cam[0:2, 2:4] == cam[0, 2]).all(axis=(0, 1)).all() and cam.std() > 0
  raw.model.update(widths=(2, 2, 2), pool_axes=("01", "012"))
  asked = asked._replace(cfg=config.parse(raw))
  for level, factors in ((1, (2, 2, 1)), (2, (4, 4, 2))):
    sizes = [n // f for n, f in zip((8, 8, 4), factors, strict=True)]
    values = RNG.normal(size=sizes)
    wide = np.kron(values, np.ones(factors))[:5, :6, :3]
    found = explain.to_image(values, level, asked)
    np.testing.assert_array_equal(found, wide)
  # Shown is the slice across the shortest axis.
  shown = explain_page.flat(image, 3, (1, 2, 2))
  np.testing.assert_array_equal(shown, image[:, :, 2])


def test_the_mode_leaves_pictures_and_numbers(trained, tmp_path, capfd):
  rng = np.random.default_rng(2)
  for name in ("a", "b"):
    pixels = rng.integers(0, 255, (20, 33), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{name}.png")
  (tmp_path / "c.png").write_bytes(b"no picture")
  argv = ["--workdir", str(trained), "--mode", "explain"]
  assert unet_jax.main.main([*argv, "--input", str(tmp_path)]) == 2
  assert "1 of 3 images were not explained" in capfd.readouterr().err
  records = json.loads((trained / "explain.json").read_text())["images"]
  assert [r["image"] for r in records] == ["a", "b"]
  for record in records:
    found = record["integrated_gradients"]
    gap = abs(found["sum"] - found["difference"])
    assert gap < 0.05 * max(abs(found["difference"]), 0.1)
    assert set(record["skip_knock_out"]) == {"skip_0", "skip_1"}
    assert set(record["gates"]) == {"skip_0", "skip_1"}
    picture = Image.open(trained / "explain" / f"{record['image']}.png")
    assert len(picture.getcolors(2**20)) > 50
  page = (trained / "explain" / "index.html").read_text()
  assert page.count("<img") == 2


def test_a_large_image_is_explained_in_its_middle(
  trained, tmp_path, monkeypatch
):
  """The pixels are those that the network sees in the whole image."""
  array = RNG.integers(0, 255, (21, 34), np.uint8)
  np.save(tmp_path / "a.npy", array)
  monkeypatch.setitem(explain._MOST, 2, 16)
  seen = []
  remember = lambda asked: seen.append(asked.image) or ({}, {})
  monkeypatch.setattr(explain, "METHODS", {"a": remember})
  argv = ["--workdir", str(trained), "--mode", "explain"]
  for flag in ("data.normalize=image", "predict.whole_pixels=1"):  # In parts.
    more = ["--input", str(tmp_path / "a.npy"), f"--config.{flag}"]
    assert unet_jax.main.main([*argv, *more]) == 0
  whole = array[..., None].astype(np.float32) / np.float32(255)
  expected = normalize.normalize(whole, {"mode": "image"})[2:18, 9:25]
  for image in seen:
    np.testing.assert_allclose(image, expected, atol=1e-6)
  records = json.loads((trained / "explain.json").read_text())["images"]
  assert records[0]["part"] == "centre 16 x 16 of 21 x 34"


def test_colours():
  colors, most = explain_page.heat(np.array([[0.0, 2.0]]))
  assert most == 2 and colors.tolist() == [[[0, 0, 4], [252, 255, 164]]]
  colors, _ = explain_page.heat(np.array([[-4.0, 0.0, 4.0]]))
  assert colors.tolist() == [[[5, 48, 97], [255, 255, 255], [178, 24, 43]]]
