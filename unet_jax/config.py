"""The schema: every field of a run, its type, its default and its limits.

The dataclasses below are the only list of fields. `default_config` turns them
into the ml-collections `ConfigDict` that config files edit (locked, so a typo
fails in the file), `override` applies one command-line value to it, and `parse`
turns it back into a frozen `Config` whose existence proves that types, choices,
ranges and sizes are right. Nothing here touches a device or imports jax.
"""

import contextlib
import dataclasses
import difflib
import json
import pathlib
import runpy
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from unet_jax import geometry
from unet_jax.errors import UserError

# The blocks of the 2015 paper.
_CLASSIC = {
  "odd_size": "pad_input",
  "activation": "relu",
  "bias": True,
  "residual": False,
  "squeeze_excite": False,
  "block_dropout": 0.0,
  "pool": "max",
  "bottleneck": "conv",
  "up": "transpose",
  "decoder": "plain",
  "narrow_decoder": False,
  "skip": "concat",
  "head_kernel": 1,
}
_SAME_BATCH = {
  **_CLASSIC,
  "padding": "same",
  "norm": "batch",
  "norm_momentum": 0.9,
  "dropout": 0.0,
}
# What a preset sets. A field named here cannot be overruled.
PRESETS: Mapping[str, Mapping[str, Any]] = {
  # Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, section 2.
  "unet2015": {
    **_CLASSIC,
    "dims": 2,
    "widths": (64, 128, 256, 512, 1024),
    "padding": "valid",
    "norm": "none",
    "dropout": 0.5,
  },
  # The small PyTorch U-Net that this project grew from: three poolings,
  # aligned bilinear upsampling, batch norm (PyTorch momentum 0.1).
  "seed": {
    **_SAME_BATCH,
    "dims": 2,
    "widths": (64, 128, 256, 512),
    "up": "linear_aligned",
  },
  # github.com/milesial/Pytorch-UNet, bilinear=False and True.
  "milesial": {
    **_SAME_BATCH,
    "dims": 2,
    "widths": (64, 128, 256, 512, 1024),
    "odd_size": "pad_up",
    "bias": False,
  },
  "milesial_bilinear": {
    **_SAME_BATCH,
    "dims": 2,
    "widths": (64, 128, 256, 512, 512),
    "odd_size": "pad_up",
    "bias": False,
    "up": "linear_aligned",
    "narrow_decoder": True,
  },
  # MONAI's BasicUNet with its default features, in 2D or 3D.
  "monai_basic": {
    **_CLASSIC,
    "widths": (32, 32, 64, 128, 256),
    "padding": "same",
    "odd_size": "pad_up_replicate",
    "norm": "instance",
    "activation": "leaky_relu",
    "leaky_slope": 0.1,
    "dropout": 0.0,
  },
  # Zhou et al. 2018, https://arxiv.org/abs/1807.10165, the authors' Keras code.
  "unetpp": {
    **_CLASSIC,
    "widths": (32, 64, 128, 256, 512),
    "padding": "same",
    "norm": "none",
    "dropout": 0.0,
    "decoder": "nested",
  },
  # Huang et al. 2020, https://arxiv.org/abs/2004.08790, the authors' PyTorch
  # code, whose head is 3x3.
  "unet3p": {
    **_SAME_BATCH,
    "widths": (64, 128, 256, 512, 1024),
    "up": "linear",
    "decoder": "full_scale",
    "head_kernel": 3,
  },
  # Oktay et al. 2018, https://arxiv.org/abs/1804.03999: the gate, on the
  # 2015 widths.
  "attention": {
    **_SAME_BATCH,
    "widths": (64, 128, 256, 512, 1024),
    "skip": "attn_oktay",
  },
}
# Pixels an axis of the input that a preset is drawn with: its paper's, or 256.
_REFERENCE_SIZES = {"unet2015": 572, "unet3p": 320}
# Steps are counted in int32, and the step after the last one is named too.
_MAX_STEPS = 2**31 - 2
# A running average with decay 1 would never move.
_MAX_DECAY = 0.99999


def _field(
  default: Any,
  *,
  choices: tuple[str, ...] = (),
  low: float | None = None,
  high: float | None = None,
) -> Any:
  """A dataclass field with its choices or its closed range [low, high]."""
  limits = {"choices": choices, "low": low, "high": high}
  return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. Levels count from 0 = full resolution."""

  # A named network; it sets the fields of its PRESETS table.
  preset: str = _field("", choices=("", *PRESETS))
  # Spatial axes of the input.
  dims: int = _field(2, low=1, high=3)
  # Channels of every level, the bottleneck last.
  widths: tuple[int, ...] = _field((16, 32, 64, 128), low=1)
  # "same" keeps the size; "valid" loses a border, as in the paper.
  padding: str = _field("same", choices=("same", "valid"))
  # Sizes that are no multiple of 2^depth: pad the image by mirroring, or pad
  # each upsampled feature by 0 (milesial) or by its last pixel (MONAI).
  odd_size: str = _field(
    "pad_input", choices=("pad_input", "pad_up", "pad_up_replicate")
  )
  # Normalisation after every 3x3 convolution.
  norm: str = _field("batch", choices=("none", "batch", "group", "instance"))
  # Weight of the old running statistics of batch norm (PyTorch: 1 - momentum).
  norm_momentum: float = _field(0.9, low=0.0, high=_MAX_DECAY)
  # Groups of norm="group"; must divide every width.
  norm_groups: int = _field(8, low=1)
  # Activation after every 3x3 convolution.
  activation: str = _field("relu", choices=("relu", "leaky_relu", "gelu"))
  # Slope of activation="leaky_relu" below 0.
  leaky_slope: float = _field(0.01, low=0.0, high=1.0)
  # Whether 3x3 convolutions have a bias.
  bias: bool = _field(True)
  # Short skips around each pair of convolutions (Drozdzal et al. 2016).
  residual: bool = _field(False)
  # A gate a channel at the end of each pair of convolutions.
  squeeze_excite: bool = _field(False)
  # Dropout rate at the end of the contracting path (its last two levels).
  dropout: float = _field(0.0, low=0.0, high=0.99)
  # Dropout rate between the two convolutions of every pair.
  block_dropout: float = _field(0.0, low=0.0, high=0.99)
  # Downsampling: 2-wide max-pooling, or a learned 2-wide convolution, stride 2.
  pool: str = _field("max", choices=("max", "stride"))
  # What follows the convolutions of the coarsest level: nothing, or
  # self-attention layers over its pixels (TransUNet).
  bottleneck: str = _field("conv", choices=("conv", "transformer"))
  # Layers of bottleneck="transformer".
  bottleneck_layers: int = _field(2, low=1)
  # Their heads; must divide the last width.
  bottleneck_heads: int = _field(4, low=1)
  # Upsampling: learned, half-pixel linear, or linear with aligned corners.
  up: str = _field(
    "transpose", choices=("transpose", "linear", "linear_aligned")
  )
  # How features and skips are joined on the way up: the U, UNet++ or UNet 3+.
  decoder: str = _field("plain", choices=("plain", "nested", "full_scale"))
  # Each level of decoder="plain" ends with the width of the level above.
  narrow_decoder: bool = _field(False)
  # What the skip connection carries; formulas in unet_jax/models/skips.py. The
  # last four are controls: the capacity without the information.
  skip: str = _field(
    "concat",
    choices=(
      *("none", "concat", "add", "mul", "proj", "scalar"),
      *("respath", "se", "scse", "attn_oktay", "attn_same"),
      *("uctrans", "udtrans"),
      *("zeros", "noise", "shuffle", "dup"),
    ),
  )
  # Switches the skip of each level; () = all on.
  skip_levels: tuple[bool, ...] = _field(())
  # Kernel of the convolution that gives the logits.
  head_kernel: int = _field(1, low=1, high=3)
  # Logits of every decoder level (decoder="nested": of every column) in the
  # loss, with weights 1, 1/2, 1/4, ... normalised.
  deep_supervision: bool = _field(False)
  # decoder="full_scale" also learns which classes an image has, and predicts no
  # others.
  classification_guided: bool = _field(False)

  @property
  def depth(self) -> int:
    """Poolings."""
    return len(self.widths) - 1

  @property
  def size_rule(self) -> str:
    """What `geometry` calls padding."""
    return geometry.size_rule(self.padding, self.odd_size)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where examples come from and how they are cut."""

  # The kind of source.
  source: str = _field("synthetic", choices=("synthetic", "folder"))
  # Folder of source="folder": images/ masks/ [train.txt val.txt test.txt].
  dir: str = _field("")
  # 1 = one sigmoid logit (background, foreground); K >= 2 = softmax.
  num_classes: int = _field(1, low=1, high=255)
  # Channels that the network sees; grey and colour are converted.
  channels: int = _field(1, low=1)
  # Input size of a training crop; one entry stands for all axes.
  crop_size: tuple[int, ...] = _field((64,), low=1)
  # Evaluation and prediction pad images to multiples of this, beside what the
  # network needs (1 = no more than that); larger = fewer shapes to compile.
  pad_multiple: int = _field(1, low=1)
  # Label id that counts nowhere: not in the loss, not in a metric.
  ignore_label: int | None = _field(None, low=0, high=255)
  # The id in the mask files of class 0, 1, ...; () = files hold class ids.
  mask_values: tuple[int, ...] = _field((), low=0, high=255)
  # Intensities: unchanged, each image to mean 0 and standard deviation 1, or
  # by the mean and standard deviation of the training split.
  normalize: str = _field("image", choices=("none", "image", "dataset"))
  # Masks whose label ids are checked before training; check is by header else.
  check_masks: int = _field(500, low=0)
  # Images with more pixels are refused before they are decoded.
  max_pixels: int = _field(2**27, low=1)
  # Share of the val split, made when the folder has no split file.
  val_fraction: float = _field(0.15, low=0.0, high=0.9)
  # Share of the test split, likewise.
  test_fraction: float = _field(0.15, low=0.0, high=0.9)
  # Host threads that read and decode.
  num_threads: int = _field(2, low=1)
  # Size of a synthetic image; one entry stands for all axes.
  synthetic_size: tuple[int, ...] = _field((64,), low=8)
  # Number of synthetic examples in train.
  synthetic_train: int = _field(256, low=1)
  # Likewise for val.
  synthetic_val: int = _field(32, low=1)
  # Likewise for test.
  synthetic_test: int = _field(32, low=1)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """Random changes of training crops, inside the step. 0 or False = off."""

  # Mirror each axis with probability 1/2.
  flip: bool = _field(True)
  # Random quarter turns in every plane (half turns where sides differ).
  turn: bool = _field(True)
  # Largest shift, as a share of the crop's side.
  shift: float = _field(0.0, low=0.0, high=1.0)
  # Largest rotation in degrees, either way, in every plane.
  rotate: float = _field(0.0, low=0.0, high=180.0)
  # Largest relative change of scale: 0.2 = from 1/1.2 to 1.2.
  scale: float = _field(0.0, low=0.0, high=4.0)
  # Standard deviation in pixels of the elastic displacements (paper: 10).
  elastic: float = _field(0.0, low=0.0)
  # Points an axis of the coarse displacement grid (paper: 3).
  elastic_grid: int = _field(3, low=2)
  # Largest additive change, in units of the crop's standard deviation.
  brightness: float = _field(0.0, low=0.0)
  # Largest relative change of contrast: 0.2 = from 1/1.2 to 1.2.
  contrast: float = _field(0.0, low=0.0, high=8.0)
  # Largest exponent of a gamma curve: 0.5 = from 1/1.5 to 1.5.
  gamma: float = _field(0.0, low=0.0, high=8.0)
  # Largest standard deviation of Gaussian noise, in units of the crop's.
  noise: float = _field(0.0, low=0.0)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """A weighted sum of losses."""

  # Names in unet_jax/objectives/losses.py.
  terms: tuple[str, ...] = _field(
    ("cross_entropy", "dice"),
    choices=("cross_entropy", "binary_cross_entropy", "dice"),
  )
  # Factor of each term; () = 1 each.
  weights: tuple[float, ...] = _field((), low=0.0)
  # Factor of each class 0..K-1 (two for num_classes=1); () = 1 each.
  class_weights: tuple[float, ...] = _field((), low=0.0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The update rule and its schedule."""

  # The rule.
  name: str = _field("adamw", choices=("sgd", "adam", "adamw"))
  # Peak learning rate.
  learning_rate: float = _field(1e-3, low=0.0)
  # Shape of the learning rate after warm-up.
  schedule: str = _field("cosine", choices=("constant", "cosine", "polynomial"))
  # Steps of linear growth from 0.
  warmup_steps: int = _field(0, low=0, high=_MAX_STEPS)
  # Last learning rate as a share of the peak (cosine, polynomial).
  end_factor: float = _field(0.0, low=0.0, high=1.0)
  # Exponent of schedule="polynomial".
  power: float = _field(0.9, low=0.0)
  # Momentum of sgd; first-moment decay (b1) of adam and adamw.
  momentum: float = _field(0.9, low=0.0, high=_MAX_DECAY)
  # Second-moment decay of adam.
  b2: float = _field(0.999, low=0.0, high=_MAX_DECAY)
  # Decay of kernels; biases and norms are left alone. Decoupled for adamw,
  # added to the gradient for sgd and adam.
  weight_decay: float = _field(1e-4, low=0.0)
  # Largest global gradient norm; 0 = no clipping.
  clip_norm: float = _field(0.0, low=0.0)
  # Decay of the exponential moving average used at evaluation; 0 = none.
  ema_decay: float = _field(0.0, low=0.0, high=_MAX_DECAY)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop. Every *_every counts steps; 0 = only at the end."""

  # Optimizer steps of the whole run; a finished run may be extended.
  num_steps: int = _field(300, low=1, high=_MAX_STEPS)
  # Examples a step, over all devices and hosts.
  batch_size: int = _field(8, low=1)
  # How often a train line is written.
  log_every: int = _field(20, low=0, high=_MAX_STEPS)
  # How often eval.split is scored.
  eval_every: int = _field(100, low=0, high=_MAX_STEPS)
  # How often the state is saved, beside each evaluation.
  checkpoint_every: int = _field(100, low=0, high=_MAX_STEPS)
  # Latest checkpoints kept, beside the best.
  keep_checkpoints: int = _field(2, low=1)
  # Steps in a row with a non-finite loss or gradient that stop the run.
  max_skipped: int = _field(5, low=1, high=_MAX_STEPS)
  # Steps recorded by the JAX profiler, after step 5; 0 = no trace.
  profile_steps: int = _field(0, low=0, high=_MAX_STEPS)
  # Images of the validation split drawn at each evaluation.
  num_pictures: int = _field(4, low=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Scoring. Every image whole, at its own size, exactly once."""

  # What evaluation scores.
  split: str = _field("val", choices=("train", "val", "test"))
  # Most images in one batch.
  batch_size: int = _field(8, low=1)
  # Most pixels in one batch (one image a device at least).
  batch_pixels: int = _field(2**20, low=1)
  # Which metric, and so which checkpoint, is best; a larger value is better,
  # except for "loss".
  best_metric: str = _field(
    "dice",
    choices=("dice", "iou", "dice_per_image", "pixel_accuracy", "loss"),
  )
  # Classes that `dice` and `iou` average over; () = 1..K-1.
  foreground: tuple[int, ...] = _field((), low=0)
  # Columns of model.decoder="nested" that evaluation and prediction use, L1 to
  # L4 of UNet++; 0 = all. Needs model.deep_supervision.
  prune: int = _field(0, low=0)


@dataclasses.dataclass(frozen=True)
class PredictConfig:
  """What `--mode predict` writes."""

  # "ids" = class ids; "scaled" = ids spread over 0..255 (0/255 for one class).
  mask_values: str = _field("ids", choices=("ids", "scaled"))
  # Also write STEM_probability.npy, float32 [*S, K].
  probability: bool = _field(False)
  # Most images to predict; 0 = all.
  max_images: int = _field(0, low=0)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """How the step is spread over devices."""

  # "jit": global arrays over a mesh.
  strategy: str = _field("jit", choices=("jit",))


@dataclasses.dataclass(frozen=True)
class Config:
  """One run. Everything random in it is a function of `seed`."""

  seed: int = _field(0, low=0, high=2**31 - 1)
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  augment: AugmentConfig = AugmentConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  predict: PredictConfig = PredictConfig()
  parallel: ParallelConfig = ParallelConfig()


# --- From the schema to a ConfigDict and back -------------------------------


def default_config() -> ml_collections.ConfigDict:
  """The schema's defaults as a locked ConfigDict for a config file to edit."""
  return _to_config_dict(Config())


def _to_config_dict(cfg: Any) -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  for field in dataclasses.fields(cfg):
    value = getattr(cfg, field.name)
    kind, _, optional = _dissect(field.type)
    if dataclasses.is_dataclass(value):
      value = _to_config_dict(value)
    elif optional:  # A plain None would accept no other value.
      value = config_dict.FieldReference(value, field_type=kind)
    config[field.name] = value
  return config.lock()


def reference_size(preset: str) -> int:
  """Pixels an axis of the input that `preset` is drawn with."""
  return _REFERENCE_SIZES.get(preset, 256)


def parse(
  config: Mapping[str, Any], *, overridden: tuple[str, ...] = ()
) -> Config:
  """Checks a ConfigDict (or a dict read from JSON) and freezes it.

  Fields that `config` lacks take their defaults; a preset is applied (and
  refuses its fields among the dotted keys `overridden` of the command line);
  one-entry sizes are spread over all axes.

  Raises:
    UserError: a field is unknown, or its type, choice, range or size is wrong.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  cfg = _parse_section(Config, config, "config")
  cfg = _apply_preset(cfg, overridden)
  cfg = _spread_sizes(cfg)
  fault = next(_find_faults(cfg), None)
  if fault is not None:
    raise UserError(f"config.{fault}")
  return cfg


def to_dict(cfg: Config) -> dict[str, Any]:
  """The JSON form of a config: nested dicts, tuples as lists."""
  return json.loads(json.dumps(dataclasses.asdict(cfg)))


def to_text(cfg: Config) -> str:
  """The JSON form, indented."""
  return json.dumps(to_dict(cfg), indent=2)


def differing_keys(old: Config, new: Config) -> list[str]:
  """Lines `key: old -> new` for every field that differs."""
  lines = []

  def compare(a: dict[str, Any], b: dict[str, Any], path: str) -> None:
    for key in a:
      if isinstance(a[key], dict):
        compare(a[key], b[key], f"{path}{key}.")
      elif a[key] != b[key]:
        lines.append(f"{path}{key}: {a[key]} -> {b[key]}")

  compare(to_dict(old), to_dict(new), "")
  return lines


def num_labels(cfg: Config) -> int:
  """Label ids that a mask may hold: two for the one sigmoid logit."""
  return max(cfg.data.num_classes, 2)


# --- Reading files and the command line --------------------------------------


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Loads `FILE.py[:argument]` (its `get_config`) or a `config.json`.

  A config file is code and is executed; a `.json` is data.

  Raises:
    UserError: the file is missing or broken, or names an unknown field.
  """
  stem, colon, argument = spec.partition(".py:")
  path = pathlib.Path(f"{stem}.py" if colon else spec)
  if path.suffix not in (".py", ".json") or not path.is_file():
    raise UserError(
      f"no config file {str(path)!r}; give --config configs/NAME.py or a"
      " config.json"
    )
  try:
    if path.suffix == ".json":
      raw = json.loads(path.read_text())
      return _to_config_dict(_parse_section(Config, raw, "config"))
    names = runpy.run_path(str(path))
    if "get_config" not in names:
      raise UserError("define a function get_config()")
    config = names["get_config"](*([argument] if argument else []))
    if not isinstance(config, ml_collections.ConfigDict):
      raise UserError("get_config() must return default_config(), edited")
    return config
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  except Exception as error:  # The file is the user's.
    reason = " ".join(str(error).strip("\"'").split())
    raise UserError(
      f"{path}: {type(error).__name__}: {reason}; mend the config file"
    ) from error


def override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
  """Sets the dotted `key` of `config` from command-line text, in place.

  The schema's type decides how the text is read: `8,16` and `(8, 16)` for
  tuples, `true/false/1/0` for bools, `none` for fields that may be None.

  Raises:
    UserError: the key is unknown or the text does not fit its field.
  """
  cls, node, path = Config, config, "config"
  *sections, name = key.split(".")
  for section in sections:
    cls = _find_field(cls, section, path).type
    node, path = node[section], f"{path}.{section}"
  field = _find_field(cls, name, path)
  value = _read_text(field.type, text)
  node[name] = _parse_field(field, value, f"{path}.{name}")


def _read_text(kind: Any, text: str) -> Any:
  """The value that `text` spells; text that spells none is left as it is."""
  kind, is_tuple, optional = _dissect(kind)
  if optional and text.lower() in ("none", ""):
    return None
  if is_tuple:
    parts = [p.strip().strip("'\"") for p in text.strip("()[] ").split(",")]
    return tuple(_read_text(kind, p) for p in parts if p)
  if kind is bool:
    switches = {"true": True, "1": True, "false": False, "0": False}
    return switches.get(text.lower(), text)
  if kind in (int, float):
    for number in (int, float):
      with contextlib.suppress(ValueError):
        return number(text)
  return text


# --- One field at a time ------------------------------------------------------


def _dissect(kind: Any) -> tuple[Any, bool, bool]:
  """The type of a field's entries, whether it is a tuple, and may be None."""
  parts = typing.get_args(kind) or (kind,)
  is_tuple = typing.get_origin(kind) is tuple
  return parts[0], is_tuple, types.NoneType in parts


def _find_field(cls: type, name: str, path: str) -> dataclasses.Field:
  # What is no section has no fields.
  fields = getattr(cls, "__dataclass_fields__", {})
  if name in fields:
    return fields[name]
  close = difflib.get_close_matches(name, fields, 1, cutoff=0.5)
  known = f"known: {', '.join(fields) or 'none'}"
  hint = f"did you mean {close[0]!r}?" if close else known
  raise UserError(f"{path} has no field {name!r}; {hint}")


def _parse_section(cls: type, raw: Any, path: str) -> Any:
  if not isinstance(raw, Mapping):
    names = ", ".join(f.name for f in dataclasses.fields(cls))
    raise UserError(
      f"{path}={raw!r}: {path} is a section, in JSON one JSON object; set its"
      f" fields: {names}"
    )
  values = {}
  for name, value in raw.items():
    field = _find_field(cls, name, path)
    values[name] = _parse_field(field, value, f"{path}.{name}")
  return cls(**values)


def _parse_field(field: dataclasses.Field, value: Any, path: str) -> Any:
  """The checked value of one field, from a file or from text."""
  if dataclasses.is_dataclass(field.type):
    return _parse_section(field.type, value, path)
  kind, is_tuple, optional = _dissect(field.type)
  if optional and value is None:
    return None
  if not is_tuple:
    return _parse_entry(kind, field.metadata, value, path)
  if not isinstance(value, (tuple, list)):
    raise UserError(f"{path}={value!r}: must be a tuple of {kind.__name__}")
  return tuple(_parse_entry(kind, field.metadata, v, path) for v in value)


def _parse_entry(
  kind: type, limits: Mapping[str, Any], value: Any, path: str
) -> Any:
  what = f"{path}={value!r}"
  # bool is an int in Python; a switch is not a number here.
  if kind is float and type(value) in (int, float):
    if not abs(value) <= sys.float_info.max:  # So written, it refuses nan.
      raise UserError(f"{what}: must be a finite number")
    value = float(value)
  if type(value) is not kind:
    raise UserError(f"{what}: must be of type {kind.__name__}")
  choices, low, high = limits["choices"], limits["low"], limits["high"]
  if choices and value not in choices:
    close = difflib.get_close_matches(value, choices, 1, cutoff=0.3)
    nearest = f"; nearest: {close[0]!r}" if close else ""
    raise UserError(f"{what}: choose one of {list(choices)}{nearest}")
  if low is not None and value < low:
    raise UserError(f"{what}: too small; nearest: {low}")
  if high is not None and value > high:
    raise UserError(f"{what}: too large; nearest: {high}")
  return value


# --- Fields that depend on one another ---------------------------------------


def _apply_preset(cfg: Config, overridden: tuple[str, ...]) -> Config:
  preset = cfg.model.preset
  table = PRESETS[preset] if preset else {}
  for name in table:
    if f"model.{name}" in overridden:
      raise UserError(
        f"config.model.{name} is set by model.preset={preset!r}; leave one of"
        " the two out"
      )
  return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **table))


def _spread_sizes(cfg: Config) -> Config:
  """One entry of a size stands for all axes."""
  spread, dims = {}, cfg.model.dims
  for name in ("crop_size", "synthetic_size"):
    size = getattr(cfg.data, name)
    spread[name] = size * dims if len(size) == 1 else size
    if len(spread[name]) != dims:
      raise UserError(
        f"config.data.{name}={size} has {len(size)} entries for"
        f" model.dims={dims}; give {dims}, or one for all"
      )
  return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **spread))


def _find_faults(cfg: Config) -> Iterator[str]:
  """Yields `field: what to do` for what is right alone but wrong together."""
  yield from _model_faults(cfg)
  yield from _data_faults(cfg)
  yield from _training_faults(cfg)


def _model_faults(cfg: Config) -> Iterator[str]:
  model, depth = cfg.model, cfg.model.depth
  if depth < 1:
    yield f"model.widths={model.widths}: at least two levels, bottleneck last"
  if len(model.skip_levels) not in (0, depth):
    yield (
      f"model.skip_levels={model.skip_levels}: give {depth} entries, one for"
      " each level above the bottleneck, or none for all on"
    )
  for width in model.widths:
    if model.norm == "group" and width % model.norm_groups:
      yield (
        f"model.norm_groups={model.norm_groups} does not divide width {width};"
        f" nearest: {_nearest_divisor(width, model.norm_groups)}"
      )
  heads, bottom = model.bottleneck_heads, model.widths[-1]
  if model.bottleneck == "transformer" and bottom % heads:
    yield (
      f"model.bottleneck_heads={heads} does not divide width {bottom}; nearest:"
      f" {_nearest_divisor(bottom, heads)}"
    )
  if cfg.eval.prune > depth:
    yield f"eval.prune={cfg.eval.prune}: no such column; nearest: {depth}"
  for is_wrong, fault in _misfits(cfg):
    if is_wrong:
      yield fault
  for axis, size in enumerate(cfg.data.crop_size):
    try:
      geometry.output_size(size, depth, model.size_rule)
    except ValueError as error:
      yield f"data.crop_size, axis {axis}: {error}"


def _misfits(cfg: Config) -> list[tuple[bool, str]]:
  """Parts of a network that have no meaning together, each with its reason."""
  model = cfg.model
  tokens = model.skip in ("uctrans", "udtrans")
  valid, padded_up = model.padding == "valid", model.odd_size != "pad_input"
  skip, decoder = f"model.skip={model.skip!r}", f"decoder={model.decoder!r}"
  return [
    (
      model.decoder == "full_scale" and valid,
      "model.decoder='full_scale' joins features of all levels, which share no"
      " grid with padding='valid'; nearest: padding='same'",
    ),
    (
      valid and model.head_kernel > 1,
      f"model.head_kernel={model.head_kernel} needs padding='same'; nearest: 1",
    ),
    (
      valid and padded_up,
      f"model.odd_size={model.odd_size!r} needs padding='same'; nearest:"
      " 'pad_input'",
    ),
    (
      tokens and (valid or padded_up),
      f"{skip} cuts all levels into the same grid of patches, which needs"
      " padding='same' and odd_size='pad_input'",
    ),
    (
      model.skip == "udtrans" and model.decoder != "plain",
      f"{skip} sends tokens that meet one decoder feature a level, which"
      f" {decoder} does not have; nearest: decoder='plain'",
    ),
    (
      model.skip == "shuffle" and model.decoder == "nested",
      f"{skip} would bring back the example's own features through the nodes"
      f" between, with {decoder}; nearest: skip='zeros' or decoder='plain'",
    ),
    (
      model.skip == "shuffle" and cfg.train.batch_size < 2,
      f"train.batch_size={cfg.train.batch_size}: {skip} takes features of"
      " another example of the batch; nearest: 2",
    ),
    (
      model.narrow_decoder and model.decoder != "plain",
      f"model.narrow_decoder has no meaning for {decoder}; leave it out",
    ),
    (
      model.classification_guided and model.decoder != "full_scale",
      f"model.classification_guided has no meaning for {decoder}; leave it out",
    ),
    (
      cfg.eval.prune > 0
      and not (model.decoder == "nested" and model.deep_supervision),
      f"eval.prune={cfg.eval.prune} needs model.decoder='nested' trained with"
      " model.deep_supervision=true; nearest: 0",
    ),
  ]


def _nearest_divisor(number: int, wanted: int) -> int:
  divisors = [d for d in range(1, number + 1) if number % d == 0]
  return min(divisors, key=lambda d: abs(d - wanted))


def _data_faults(cfg: Config) -> Iterator[str]:
  data, labels = cfg.data, num_labels(cfg)
  ignored, values = data.ignore_label, data.mask_values
  if data.source == "folder" and not data.dir:
    yield (
      "data.dir is empty; name the folder with images/ and masks/:"
      " --config.data.dir=DIR"
    )
  if ignored is not None and not values and ignored < labels:
    yield f"data.ignore_label={ignored} is a class; nearest: {labels}"
  if values and not len(values) == len(set(values)) == labels:
    yield f"data.mask_values={values}: give {labels} different ids, one a class"
  if ignored in values:
    yield (
      f"data.ignore_label={ignored} is also in data.mask_values; leave it out"
      " of one of the two"
    )
  if data.val_fraction + data.test_fraction > 0.95:
    yield (
      "data.val_fraction + data.test_fraction leave nothing to train on;"
      " nearest: 0.15 each"
    )
  if max(cfg.eval.foreground, default=0) >= labels:
    yield (
      f"eval.foreground={cfg.eval.foreground}: no such class; nearest:"
      f" {labels - 1}"
    )


def _training_faults(cfg: Config) -> Iterator[str]:
  loss, terms = cfg.loss, cfg.loss.terms
  if not terms:
    yield "loss.terms is empty; nearest: cross_entropy"
  if len(set(terms)) != len(terms):
    yield (
      f"loss.terms={terms} names a loss twice; raise its factor in loss.weights"
      " instead"
    )
  for name, each, count in (
    ("weights", "term", len(terms)),
    ("class_weights", "class", num_labels(cfg)),
  ):
    entries = getattr(loss, name)
    if len(entries) not in (0, count):
      yield (
        f"loss.{name}={entries}: give {count} entries, one a {each}, or none"
        " for 1 each"
      )
  if "binary_cross_entropy" in terms and cfg.data.num_classes > 1:
    yield (
      "loss.terms: 'binary_cross_entropy' needs data.num_classes=1; nearest:"
      " 'cross_entropy'"
    )
  warmup, steps = cfg.optimizer.warmup_steps, cfg.train.num_steps
  if warmup > steps:
    yield (
      f"optimizer.warmup_steps={warmup} is more than train.num_steps={steps};"
      f" nearest: {steps}"
    )
