"""The schema: every field of a run, its type, its default and its limits.

The dataclasses below are the only list of fields. `default_config` turns them
into the ml-collections `ConfigDict` that config files edit (locked, so a typo
fails in the file), `override` applies one command-line value to it, and `parse`
turns it back into a frozen `Config` whose existence proves that types, choices,
ranges and sizes are right. Nothing here touches a device or imports jax.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from unet_jax import geometry
from unet_jax.errors import UserError

# What a preset sets. A field named here cannot be overruled.
PRESETS: Mapping[str, Mapping[str, Any]] = {
  # Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, section 2.
  "unet2015": {
    "dims": 2,
    "widths": (64, 128, 256, 512, 1024),
    "padding": "valid",
    "norm": "none",
    "up": "transpose",
    "decoder": "plain",
    "skip": "concat",
    "activation": "relu",
    "bias": True,
    "dropout": 0.5,
  },
  # The small PyTorch U-Net that this project grew from: three poolings,
  # aligned bilinear upsampling, batch norm (PyTorch momentum 0.1).
  "seed": {
    "dims": 2,
    "widths": (64, 128, 256, 512),
    "padding": "same",
    "norm": "batch",
    "norm_momentum": 0.9,
    "up": "linear_aligned",
    "decoder": "plain",
    "skip": "concat",
    "activation": "relu",
    "bias": True,
    "dropout": 0.0,
  },
}


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
  # Normalisation after every 3x3 convolution.
  norm: str = _field("batch", choices=("none", "batch", "group", "instance"))
  # Weight of the old running statistics of batch norm (PyTorch: 1 - momentum).
  norm_momentum: float = _field(0.9, low=0.0, high=1.0)
  # Groups of norm="group"; must divide every width.
  norm_groups: int = _field(8, low=1)
  # Upsampling: learned, half-pixel linear, or linear with aligned corners.
  up: str = _field(
    "transpose", choices=("transpose", "linear", "linear_aligned")
  )
  # How features and skips are joined on the way up.
  decoder: str = _field("plain", choices=("plain",))
  # What the skip connection carries.
  skip: str = _field("concat", choices=("none", "concat"))
  # Switches the skip of each level; () = all on.
  skip_levels: tuple[bool, ...] = _field(())
  # Activation after every 3x3 convolution.
  activation: str = _field("relu", choices=("relu", "leaky_relu", "gelu"))
  # Whether 3x3 convolutions have a bias.
  bias: bool = _field(True)
  # Dropout rate at the end of the contracting path (its last two levels).
  dropout: float = _field(0.0, low=0.0, high=0.99)


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
  warmup_steps: int = _field(0, low=0)
  # Last learning rate as a share of the peak (cosine, polynomial).
  end_factor: float = _field(0.0, low=0.0, high=1.0)
  # Exponent of schedule="polynomial".
  power: float = _field(0.9, low=0.0)
  # Momentum of sgd; first-moment decay (b1) of adam and adamw.
  momentum: float = _field(0.9, low=0.0, high=1.0)
  # Second-moment decay of adam.
  b2: float = _field(0.999, low=0.0, high=1.0)
  # Decay of kernels; biases and norms are left alone. Decoupled for adamw,
  # added to the gradient for sgd and adam.
  weight_decay: float = _field(1e-4, low=0.0)
  # Largest global gradient norm; 0 = no clipping.
  clip_norm: float = _field(0.0, low=0.0)
  # Decay of the exponential moving average used at evaluation; 0 = none.
  ema_decay: float = _field(0.0, low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop. Every *_every counts steps; 0 = only at the end."""

  # Optimizer steps of the whole run; a finished run may be extended.
  num_steps: int = _field(300, low=1)
  # Examples a step, over all devices and hosts.
  batch_size: int = _field(8, low=1)
  # How often a train line is written.
  log_every: int = _field(20, low=0)
  # How often eval.split is scored.
  eval_every: int = _field(100, low=0)
  # How often the state is saved, beside each evaluation.
  checkpoint_every: int = _field(100, low=0)
  # Latest checkpoints kept, beside the best.
  keep_checkpoints: int = _field(2, low=1)
  # Steps in a row with a non-finite loss or gradient that stop the run.
  max_skipped: int = _field(5, low=1)
  # Steps recorded by the JAX profiler, after step 5; 0 = no trace.
  profile_steps: int = _field(0, low=0)
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

  def build(cls: type) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
      if dataclasses.is_dataclass(field.type):
        config[field.name] = build(field.type)
      elif field.default is None:
        # A plain None would accept no override.
        config[field.name] = config_dict.placeholder(_inner_type(field.type))
      else:
        config[field.name] = field.default
    return config

  return build(Config).lock()


def parse(
  config: Mapping[str, Any], *, overridden: tuple[str, ...] = ()
) -> Config:
  """Checks a ConfigDict (or a dict read from JSON) and freezes it.

  Args:
    config: all or some fields of the schema, nested as the schema is.
    overridden: dotted keys given on the command line; a preset refuses them.

  Returns:
    The frozen `Config`, preset applied, one-entry sizes spread over all axes.

  Raises:
    UserError: a field is unknown, or its type, choice, range or size is wrong.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  cfg = _parse_class(Config, config, "config")
  cfg = _apply_preset(cfg, overridden)
  cfg = _spread_sizes(cfg)
  _check_together(cfg)
  return cfg


def to_dict(cfg: Config) -> dict[str, Any]:
  """The JSON form of a config: nested dicts, tuples as lists."""
  return json.loads(json.dumps(dataclasses.asdict(cfg)))


def to_text(cfg: Config) -> str:
  """The JSON form, indented."""
  return json.dumps(to_dict(cfg), indent=2)


def config_hash(cfg: Config) -> str:
  """First 12 hex digits of the SHA-256 of the config's sorted JSON."""
  text = json.dumps(to_dict(cfg), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def differing_keys(old: Config, new: Config) -> list[str]:
  """Lines `key: old -> new` for every field that differs."""

  def flatten(node: Any, path: str) -> dict[str, Any]:
    if not isinstance(node, dict):
      return {path: node}
    parts = [flatten(v, f"{path}.{k}".lstrip(".")) for k, v in node.items()]
    return {k: v for part in parts for k, v in part.items()}

  a, b = flatten(to_dict(old), ""), flatten(to_dict(new), "")
  return [f"{k}: {a[k]} -> {b[k]}" for k in a if a[k] != b[k]]


# --- Reading files and the command line --------------------------------------


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Loads `FILE.py[:argument]` (its `get_config`) or a `config.json`.

  A config file is code and is executed; a `.json` is data.

  Raises:
    UserError: the file is missing or broken, or names an unknown field.
  """
  name, _, argument = spec.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    raise UserError(
      f"no config file {name!r}; give --config configs/NAME.py or a config.json"
    )
  if path.suffix == ".json":
    config = default_config()
    _update(config, _read_json(path), name)
    return config
  module_spec = importlib.util.spec_from_file_location("run_config", path)
  if module_spec is None:
    raise UserError(f"config file {name!r}: must end in .py or .json")
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
  except UserError as error:
    raise UserError(f"{name}: {error}") from error
  except Exception as error:  # The file is the user's code.
    reason = " ".join(str(error).strip("\"'").split())
    raise UserError(
      f"{name}: {type(error).__name__}: {reason}; mend the config file"
    ) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f"{name}: get_config() must return default_config(), edited"
    )
  return config


def override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
  """Sets the dotted `key` of `config` from command-line text, in place.

  The schema's type decides how the text is read: `8,16` and `(8, 16)` for
  tuples, `true/false/1/0` for bools, `none` for fields that may be None.

  Raises:
    UserError: the key is unknown or the text does not fit its type.
  """
  cls, node = Config, config
  *sections, name = key.split(".")
  for i, section in enumerate(sections):
    field = _find_field(cls, section, ".".join(sections[:i]))
    if not dataclasses.is_dataclass(field.type):
      raise UserError(f"config.{key}: config.{section} has no fields")
    cls, node = field.type, node[section]
  field = _find_field(cls, name, ".".join(sections))
  if dataclasses.is_dataclass(field.type):
    names = ", ".join(f.name for f in dataclasses.fields(field.type))
    raise UserError(
      f"config.{key} is a section; set one of its fields: {names}"
    )
  node[name] = _read_text(field.type, text, f"config.{key}")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    loaded = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
  if not isinstance(loaded, dict):
    raise UserError(f"{path}: must hold one JSON object of config sections")
  return loaded


def _update(config: ml_collections.ConfigDict, raw: dict, path: str) -> None:
  cfg = dataclasses.asdict(_parse_class(Config, raw, path))
  for section, value in cfg.items():
    if isinstance(value, dict):
      for name, leaf in value.items():
        config[section][name] = leaf
    else:
      config[section] = value


def _find_field(cls: type, name: str, path: str) -> dataclasses.Field:
  fields = {f.name: f for f in dataclasses.fields(cls)}
  where = f"config.{path}" if path else "config"
  if name not in fields:
    raise UserError(_unknown(name, fields, where))
  return fields[name]


def _unknown(name: str, known: typing.Iterable[str], where: str) -> str:
  close = difflib.get_close_matches(name, known, 1, cutoff=0.5)
  hint = (
    f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
  )
  return f"{where} has no field {name!r}; {hint}"


def _inner_type(kind: Any) -> Any:
  """`int | None` -> int; every other type as it is."""
  if isinstance(kind, types.UnionType):
    return next(t for t in typing.get_args(kind) if t is not type(None))
  return kind


def _type_name(kind: Any) -> str:
  if typing.get_origin(kind) is tuple:
    return f"a tuple of {typing.get_args(kind)[0].__name__}"
  if isinstance(kind, types.UnionType):
    return f"{_inner_type(kind).__name__} or none"
  return f"of type {kind.__name__}"


def _read_text(kind: Any, text: str, path: str) -> Any:
  if kind is str:
    return text
  if isinstance(kind, types.UnionType):
    if text.lower() in ("none", ""):
      return None
    return _read_text(_inner_type(kind), text, path)
  if kind is bool and text.lower() in ("true", "1", "false", "0"):
    return text.lower() in ("true", "1")
  if typing.get_origin(kind) is tuple:
    item = typing.get_args(kind)[0]
    parts = [p.strip().strip("'\"") for p in text.strip("()[] ").split(",")]
    return tuple(_read_text(item, p, path) for p in parts if p)
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  return _parse_value(kind, value, path)


def _parse_class(cls: type, raw: Any, path: str) -> Any:
  if not isinstance(raw, Mapping):
    raise UserError(f"{path}={raw!r} must be a section with fields")
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for name in raw:
    if name not in fields:
      raise UserError(_unknown(name, fields, path))
  values = {}
  for name, value in raw.items():
    field, where = fields[name], f"{path}.{name}"
    if dataclasses.is_dataclass(field.type):
      values[name] = _parse_class(field.type, value, where)
    else:
      values[name] = _parse_value(field.type, value, where)
      _check_limits(field, values[name], where)
  return cls(**values)


def _parse_value(kind: Any, value: Any, path: str) -> Any:
  if isinstance(kind, types.UnionType):
    return (
      None if value is None else _parse_value(_inner_type(kind), value, path)
    )
  if typing.get_origin(kind) is tuple and isinstance(value, (tuple, list)):
    item = typing.get_args(kind)[0]
    return tuple(_parse_value(item, v, path) for v in value)
  # bool is an int in Python; a switch is not a number here.
  if kind is float and type(value) in (int, float):
    return float(value)
  if type(value) is kind:
    return value
  raise UserError(f"{path}={value!r}: must be {_type_name(kind)}")


def _check_limits(field: dataclasses.Field, value: Any, path: str) -> None:
  choices, low, high = (field.metadata[k] for k in ("choices", "low", "high"))
  for item in value if isinstance(value, tuple) else (value,):
    if choices and item not in choices:
      close = difflib.get_close_matches(str(item), choices, 1, cutoff=0.3)
      nearest = f"; nearest: {close[0]!r}" if close else ""
      raise UserError(
        f"{path}={item!r}: choose one of {list(choices)}{nearest}"
      )
    if item is None or isinstance(item, (str, bool)):
      continue
    if item != item:
      raise UserError(f"{path}=nan: must be a number")
    if low is not None and item < low:
      raise UserError(f"{path}={item}: too small; nearest: {low}")
    if high is not None and item > high:
      raise UserError(f"{path}={item}: too large; nearest: {high}")


# --- Fields that depend on one another ---------------------------------------


def _apply_preset(cfg: Config, overridden: tuple[str, ...]) -> Config:
  if not cfg.model.preset:
    return cfg
  table = PRESETS[cfg.model.preset]
  for key in overridden:
    section, _, name = key.partition(".")
    if section == "model" and name in table:
      raise UserError(
        f"config.{key} is set by model.preset={cfg.model.preset!r}; leave one"
        " of the two out"
      )
  model = dataclasses.replace(cfg.model, **table)
  return dataclasses.replace(cfg, model=model)


def _spread_sizes(cfg: Config) -> Config:
  """One entry of a size stands for all axes."""
  spread = {}
  for name in ("crop_size", "synthetic_size"):
    size = getattr(cfg.data, name)
    if len(size) == 1:
      size *= cfg.model.dims
    if len(size) != cfg.model.dims:
      raise UserError(
        f"config.data.{name}={size} has {len(size)} entries for"
        f" model.dims={cfg.model.dims}; give {cfg.model.dims}, or one for all"
      )
    spread[name] = size
  return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **spread))


def _check_together(cfg: Config) -> None:
  """Raises a UserError for fields that are right alone but wrong together."""
  _check_model(cfg)
  _check_data(cfg)
  _check_loss(cfg)
  steps, warmup = cfg.train.num_steps, cfg.optimizer.warmup_steps
  if warmup > steps:
    raise UserError(
      f"config.optimizer.warmup_steps={warmup} is more than"
      f" train.num_steps={steps}; nearest: {steps}"
    )


def num_labels(cfg: Config) -> int:
  """Label ids that a mask may hold: two for the one sigmoid logit."""
  return max(cfg.data.num_classes, 2)


def _check_model(cfg: Config) -> None:
  model = cfg.model
  if len(model.widths) < 2:
    raise UserError(
      f"config.model.widths={model.widths}: give at least two levels, the"
      " bottleneck last"
    )
  depth = len(model.widths) - 1
  if model.skip_levels and len(model.skip_levels) != depth:
    raise UserError(
      f"config.model.skip_levels={model.skip_levels}: give {depth} entries,"
      " one for each level above the bottleneck, or none for all on"
    )
  for width in model.widths:
    if model.norm == "group" and width % model.norm_groups:
      divisors = [d for d in range(1, width + 1) if width % d == 0]
      nearest = min(divisors, key=lambda d: abs(d - model.norm_groups))
      raise UserError(
        f"config.model.norm_groups={model.norm_groups} does not divide width"
        f" {width}; nearest: {nearest}"
      )
  for axis, size in enumerate(cfg.data.crop_size):
    try:
      geometry.output_size(size, depth, model.padding)
    except ValueError as error:
      raise UserError(f"config.data.crop_size, axis {axis}: {error}") from error


def _check_data(cfg: Config) -> None:
  data = cfg.data
  if data.source == "folder" and not data.dir:
    raise UserError(
      "config.data.dir is empty; name the folder with images/ and masks/:"
      " --config.data.dir=DIR"
    )
  labels = num_labels(cfg)
  ignored = data.ignore_label
  if ignored is not None and not data.mask_values and ignored < labels:
    raise UserError(
      f"config.data.ignore_label={ignored} is a class; nearest: {labels}"
    )
  if data.mask_values and len(set(data.mask_values)) != labels:
    raise UserError(
      f"config.data.mask_values={data.mask_values}: give {labels} different"
      " ids, one a class"
    )
  if ignored is not None and ignored in data.mask_values:
    raise UserError(
      f"config.data.ignore_label={ignored} is also in data.mask_values; leave"
      " it out of one of the two"
    )
  if data.val_fraction + data.test_fraction > 0.95:
    raise UserError(
      "config.data.val_fraction + data.test_fraction leave nothing to train"
      " on; nearest: 0.15 each"
    )
  for label in cfg.eval.foreground:
    if label >= labels:
      raise UserError(
        f"config.eval.foreground={label}: no such class; nearest: {labels - 1}"
      )


def _check_loss(cfg: Config) -> None:
  loss, labels = cfg.loss, num_labels(cfg)
  if not loss.terms:
    raise UserError("config.loss.terms is empty; nearest: cross_entropy")
  if len(set(loss.terms)) != len(loss.terms):
    raise UserError(
      f"config.loss.terms={loss.terms} names a loss twice; raise its factor in"
      " loss.weights instead"
    )
  if loss.weights and len(loss.weights) != len(loss.terms):
    raise UserError(
      f"config.loss.weights={loss.weights}: give {len(loss.terms)} entries,"
      " one a term, or none for 1 each"
    )
  if loss.class_weights and len(loss.class_weights) != labels:
    raise UserError(
      f"config.loss.class_weights={loss.class_weights}: give {labels}"
      " entries, one a class"
    )
  if "binary_cross_entropy" in loss.terms and cfg.data.num_classes > 1:
    raise UserError(
      "config.loss.terms: 'binary_cross_entropy' needs data.num_classes=1;"
      " nearest: 'cross_entropy'"
    )
