"""What nobody thought of: configs, bytes and records drawn by hypothesis.

The examples are the same at every run; `pytest -m slow` tries more of them.
"""

import dataclasses
import io
import json
import os
import pathlib
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import unet_jax.main
from tests import runs
from unet_jax import config as config_lib
from unet_jax import schema
from unet_jax.data import decode
from unet_jax.errors import UserError
from unet_jax.exchange import import_torch
from unet_jax.studies import report


def fuzz(examples):
  return settings(
    max_examples=examples,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
  )


# --- Configs ------------------------------------------------------------------

# What keeps a run small, or needs files; all other fields are drawn.
_FIXED = {
  "model.widths": st.sampled_from([(2, 4), (4, 4, 8), (3, 5), (8, 8)]),
  "model.preset": st.just(""),
  "model.norm_groups": st.sampled_from([1, 2, 4]),
  "model.bottleneck_layers": st.integers(1, 2),
  "model.bottleneck_heads": st.sampled_from([1, 2, 4]),
  "model.conv": st.just("fast"),
  "data.source": st.just("synthetic"),
  "data.num_classes": st.integers(1, 4),
  "data.channels": st.integers(1, 3),
  "data.crop_size": st.sampled_from([(8,), (12,), (16,), (20,), (16, 8), (9,)]),
  "data.synthetic_size": st.sampled_from([(8,), (16,), (13,), (20, 9)]),
  "data.mask_values": st.just(()),
  "loss.terms": st.lists(
    st.sampled_from(
      schema.LossConfig.__dataclass_fields__["terms"].metadata["choices"]
    ),
    min_size=1,
    max_size=2,
    unique=True,
  ).map(tuple),
  "loss.weights": st.just(()),
  "train.batch_size": st.sampled_from([8, 16]),
  "train.accumulate": st.integers(1, 2),
  "eval.best_metric": st.just("loss"),
  "parallel.space": st.integers(1, 2),
}
# Sections whose fields change what a step computes.
_SECTIONS = ("model", "data", "augment", "loss", "optimizer", "parallel")
_SKIPPED = ("data.dir", "data.max_pixels", "data.num_threads")


def _values(field):
  """Values of a field from its type and limits, the edges among them."""
  kind, limits = field.type, field.metadata
  if limits["choices"]:
    return st.sampled_from(limits["choices"])
  low, high = limits["low"], limits["high"]
  if kind is bool:
    return st.booleans()
  if kind is int:
    return st.integers(int(low or 0), int(min(high or 4, 4)))
  if kind is float:
    return st.floats(low or 0.0, min(high or 2.0, 2.0))
  return st.just(field.default)


def _all_fields():
  for name in (*_SECTIONS, "train", "eval"):
    section = schema.Config.__dataclass_fields__[name].type
    for field in dataclasses.fields(section):
      key = f"{name}.{field.name}"
      if key in _FIXED:
        yield key, _FIXED[key]
      elif name in _SECTIONS and key not in _SKIPPED:
        yield key, _values(field)


# Few fields of each draw differ from the tiny run: a config that is wrong in
# five places says nothing about the sixth.
_OVERRIDES = st.lists(
  st.one_of(*[st.tuples(st.just(k), v) for k, v in _all_fields()]),
  max_size=8,
  unique_by=lambda pair: pair[0],
).map(dict)


def _text(value):
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _flags(overrides):
  return [f"--config.{key}={_text(v)}" for key, v in overrides.items()]


@fuzz(300)
@given(overrides=_OVERRIDES)
def test_a_config_is_accepted_or_refused_in_one_line(overrides):
  config = config_lib.load_config(runs.CONFIG)
  try:
    for key, value in overrides.items():
      config_lib.override(config, key, _text(value))
    config_lib.parse(config, overridden=tuple(overrides))
  except UserError as error:
    assert len(str(error).strip().splitlines()) == 1
    assert "config" in str(error)


def _train(overrides):
  """Two steps: either they are done, or nothing was begun."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / "run"
    flags = ["--config.train.num_steps=2", "--config.train.eval_every=0"]
    flags += ["--config.optimizer.warmup_steps=0"]
    flags += ["--config.train.num_pictures=0", "--config.train.max_skipped=9"]
    argv = runs.arguments(workdir, *flags, *_flags(overrides))
    status = unet_jax.main.main(argv)
    assert status in (0, 2), overrides
    steps = workdir / "checkpoints" / "2"
    assert steps.is_dir() == (status == 0), overrides
    if status == 2:
      assert not (workdir / "metrics.jsonl").exists(), overrides


@fuzz(4)
@given(overrides=_OVERRIDES)
def test_an_accepted_config_trains_two_steps(overrides):
  _train(overrides)


@pytest.mark.slow
@fuzz(60)
@given(overrides=_OVERRIDES)
def test_many_accepted_configs_train_two_steps(overrides):
  _train(overrides)


# --- Bytes --------------------------------------------------------------------


def _pictures():
  """Small valid files of every kind, to be damaged."""
  rng = np.random.default_rng(0)
  grey = rng.integers(0, 255, (9, 7)).astype(np.uint8)
  color = rng.integers(0, 255, (9, 7, 3)).astype(np.uint8)
  files = {}
  for name, array in (("grey", grey), ("color", color)):
    for kind in ("png", "tif", "bmp", "jpg"):
      buffer = io.BytesIO()
      Image.fromarray(array).save(
        buffer, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind)
      )
      files[f"{name}.{kind}"] = buffer.getvalue()
  turned = Image.Exif()
  turned[0x0112] = 6  # On its side.
  deep = Image.fromarray(grey.astype(np.uint16) * 257)
  for name, image, how in (
    ("palette.png", Image.fromarray(grey).quantize(7), {}),
    ("bits.png", Image.fromarray(grey > 99), {}),
    ("deep.png", deep, {}),
    ("deep.tif", deep, {}),
    ("alpha.png", Image.fromarray(color).convert("RGBA"), {}),
    ("turned.jpg", Image.fromarray(color), {"exif": turned}),
    ("turned.png", Image.fromarray(grey), {"exif": turned}),
  ):
    image.save(
      buffer := io.BytesIO(), Image.registered_extensions()[name[-4:]], **how
    )
    files[name] = buffer.getvalue()
  buffer = io.BytesIO()
  np.save(buffer, grey.astype(np.float32))
  files["grey.npy"] = buffer.getvalue()
  return files


_FILES = _pictures()


@st.composite
def _damaged(draw, files):
  """(name, bytes): a valid file with bytes changed, cut, doubled or renamed."""
  name = draw(st.sampled_from(sorted(files)))
  content = bytearray(files[name])
  for _ in range(draw(st.integers(0, 4))):
    at = draw(st.integers(0, len(content) - 1))
    content[at] = draw(st.integers(0, 255))
  cut = draw(st.integers(0, len(content)))
  how = draw(st.sampled_from(["keep", "cut", "double", "head", "other"]))
  content = {
    "keep": content,
    "cut": content[:cut],
    "double": content + content[cut:],
    "head": content[:8] + draw(st.binary(max_size=64)),
    "other": draw(st.binary(max_size=64)),
  }[how]
  suffix = draw(st.sampled_from([pathlib.Path(name).suffix, ".png", ".npy"]))
  return f"file{suffix}", bytes(content)


def _read(name, content):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / name
    path.write_bytes(content)
    limits = {"dims": 2, "max_pixels": 4096}
    for read in (
      lambda: decode.read_image(path, channels=1, **limits),
      lambda: decode.read_mask(path, **limits),
      lambda: decode.image_size(path, 2),
    ):
      try:
        value = read()
      except UserError as error:
        assert name in str(error)
        continue
      if isinstance(value, np.ndarray):
        assert value.size <= 4096 and np.isfinite(value).all()
    assert os.listdir(folder) == [name]


@fuzz(300)
@given(file=_damaged(_FILES))
def test_damaged_pictures_are_read_or_named(file):
  _read(*file)


@pytest.mark.slow
@fuzz(20000)
@given(file=_damaged(_FILES))
def test_many_damaged_pictures_are_read_or_named(file):
  _read(*file)


def _state_dicts():
  torch = pytest.importorskip("torch")
  from safetensors.torch import save

  state = {"conv.weight": torch.zeros(2, 1, 3, 3), "conv.bias": torch.zeros(2)}
  buffer = io.BytesIO()
  torch.save(state, buffer)
  return {"a.pth": buffer.getvalue(), "a.safetensors": save(state)}


def _check_state_dicts(examples):
  files = _state_dicts()

  @fuzz(examples)
  @given(file=_damaged(files), suffix=st.sampled_from([".pth", ".safetensors"]))
  def check(file, suffix):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / f"weights{suffix}"
      path.write_bytes(file[1])
      try:
        import_torch.read_state_dict(path)
      except UserError as error:
        assert path.name in str(error)
      assert os.listdir(folder) == [path.name]

  check()


def test_damaged_weights_are_read_or_named():
  _check_state_dicts(100)


@pytest.mark.slow
def test_many_damaged_weights_are_read_or_named():
  _check_state_dicts(5000)


# --- Records ------------------------------------------------------------------

_JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8), inner, max_size=3)
  ),
  max_leaves=6,
)


def _record():
  return {
    **{"id": "a-s0", "arm": "a", "seed": 0, "overrides": {}, "params": 9},
    **{"config_hash": "x", "macs": 9, "metrics": {"dice": 0.5}, "seconds": 1.0},
    **{"per_image": [{"name": "i", "dice": 0.5}], "git": None, "device": "cpu"},
  }


@fuzz(60)
@given(key=st.sampled_from(sorted(_record())), value=_JSON)
def test_strange_results_make_a_report_or_are_named(key, value):
  """A field of one record is replaced by anything that JSON can hold."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    lines = [json.dumps({**_record(), key: value})]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")
    try:
      report.run([folder], folder, 0.01)
    except UserError as error:
      assert len(str(error).splitlines()) == 1
      assert sorted(os.listdir(folder)) == ["results.jsonl"]


@fuzz(100)
@given(content=st.binary(max_size=200))
def test_results_that_are_no_records_are_named(content):
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    (folder / "results.jsonl").write_bytes(content)
    with pytest.raises(UserError):
      report.run([folder], folder, 0.01)
