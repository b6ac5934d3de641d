"""From the schema to the config of a run: files, overrides, checks.

`default_config` turns the dataclasses of `schema` into the ml-collections
`ConfigDict` that config files edit (locked, so a typo fails in the file),
`override` applies one command-line value to it, and `parse` turns it back into
a frozen `Config` whose existence proves that types, choices, ranges and sizes
are right. Nothing here touches a device or imports jax.
"""

import contextlib
import dataclasses
import difflib
import inspect
import json
import pathlib
import runpy
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from unet_jax.errors import UserError
from unet_jax.faults import find_faults
from unet_jax.presets import PRESETS
from unet_jax.schema import Config

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
  fault = next(find_faults(cfg), None)
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


# --- Reading files and the command line --------------------------------------


def load_config(spec: str | pathlib.PurePath) -> ml_collections.ConfigDict:
  """Loads `FILE.py[:argument]` (its `get_config`) or a `config.json`.

  A config file is code and is executed; a `.json` is data.

  Raises:
    UserError: the file is missing or broken, or names an unknown field.
  """
  stem, colon, argument = str(spec).partition(".py:")
  path = pathlib.Path(f"{stem}.py") if colon else spec
  if isinstance(path, str):  # Else a path, perhaps of gs://.
    path = pathlib.Path(path)
  if path.suffix not in (".py", ".json") or not path.is_file():
    raise UserError(
      f"no config file {str(path)!r}; give --config configs/NAME.py or a"
      " config.json"
    )
  with _blamed_on(path):
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


def load_sweep(spec: str) -> Any:
  """What the `sweep` of a config file returns; its argument is optional.

  Raises:
    UserError: the file has none, or fails.
  """
  stem, _, argument = spec.partition(".py:")
  path = pathlib.Path(f"{stem.removesuffix('.py')}.py")
  with _blamed_on(path):
    sweep = runpy.run_path(str(path)).get("sweep")
    if sweep is None:
      raise UserError("define a function sweep() that returns arms")
    takes_one = bool(inspect.signature(sweep).parameters)
    return sweep(*([argument] if argument and takes_one else []))


@contextlib.contextmanager
def _blamed_on(path: pathlib.Path) -> Iterator[None]:
  """An error of the user's file, as one line that names it."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  except Exception as error:
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
  _set(config, key, text, _read_text)


def assign(config: ml_collections.ConfigDict, key: str, value: Any) -> None:
  """Sets the dotted `key` of `config` to a value, in place, as `override`."""
  _set(config, key, value, lambda _, value: value)


def _set(
  config: ml_collections.ConfigDict,
  key: str,
  value: Any,
  read: Callable[[Any, Any], Any],
) -> None:
  cls, node, path = Config, config, "config"
  *sections, name = key.split(".")
  for section in sections:
    cls = _find_field(cls, section, path).type
    node, path = node[section], f"{path}.{section}"
  field = _find_field(cls, name, path)
  value = read(field.type, value)
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

  def spread(section: str, name: str) -> tuple[int, ...]:
    size, dims = getattr(getattr(cfg, section), name), cfg.model.dims
    if len(size) not in (1, dims):
      raise UserError(
        f"config.{section}.{name}={size} has {len(size)} entries for"
        f" model.dims={dims}; give {dims}, or one for all"
      )
    return size * dims if len(size) == 1 else size

  names = ("crop_size", "synthetic_size")
  data = {name: spread("data", name) for name in names}
  tile = spread("predict", "tile") if cfg.predict.tile else ()
  return dataclasses.replace(
    cfg,
    data=dataclasses.replace(cfg.data, **data),
    predict=dataclasses.replace(cfg.predict, tile=tile),
  )
