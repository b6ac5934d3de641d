"""PyTorch state dicts become our variables: the only door to torch.

Three published networks are known by the names of their tensors; widths, depth,
channels and classes are read from the shapes. A weight file is data: a pickle
is read by torch's restricted unpickler alone, and one that asks for anything
but tensors is refused. Nothing here touches a device.

What is undone: PyTorch's kernels are [out, in, *K], and [in, out, *K] with
mirrored taps where they are transposed; the seed's network concatenates
[up; skip], we [skip; up].
"""

import dataclasses
import itertools
import pathlib
import pickle
import re
import statistics
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from unet_jax import config as config_lib
from unet_jax import presets
from unet_jax.errors import UserError

# Older ones run code that a file brings, in spite of weights_only
# (CVE-2025-32434, CVE-2026-24747).
_TORCH = (2, 10)
_INSTALL = "pip install -e .[torch]"
# Where training scripts keep the state dict among other things.
_WRAPPERS = ("state_dict", "model_state_dict")
# Steps that batch norm has seen; with a momentum, nothing reads it.
_COUNTER = ".num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class StateDict:
  """A weight file: tensors by key (floats as float32), and what else it has."""

  path: pathlib.Path
  tensors: Mapping[str, np.ndarray]
  others: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The network that a state dict describes.

  Attributes:
    preset: ours, of which it has all but the sizes.
    model: values of `schema.ModelConfig`.
    channels, num_classes: of the images, and of the logits.
    targets: our path of each key that the network may have.
  """

  preset: str
  model: Mapping[str, Any]
  channels: int
  num_classes: int
  targets: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Network:
  """Names of modules, of a level or of (level, depth).

  Attributes:
    encoder, decoder: double convolutions.
    inner: their first convolution and norm, second convolution and norm.
    up: the transposed convolution; without any, it is the `linear_preset`.
    heads: names that the last convolution has had.
  """

  preset: str
  encoder: Callable[[int], str]
  decoder: Callable[[int, int], str]
  inner: tuple[str, str, str, str]
  up: Callable[[int, int], str]
  heads: tuple[str, ...]
  linear_preset: str


_NETWORKS = (
  _Network(
    preset="seed",
    encoder=lambda n: f"dconv_down{n + 1}.conv",
    decoder=lambda n, depth: f"dconv_up{n + 1}.conv",
    inner=("0", "1", "3", "4"),
    up=lambda n, depth: "",
    heads=("conv_last", "outc", "outc.conv"),
    linear_preset="seed",
  ),
  # https://github.com/milesial/Pytorch-UNet, unet/unet_parts.py
  _Network(
    preset="milesial",
    encoder=lambda n: (
      f"down{n}.maxpool_conv.1.double_conv" if n else "inc.double_conv"
    ),
    decoder=lambda n, depth: f"up{depth - n}.conv.double_conv",
    inner=("0", "1", "3", "4"),
    up=lambda n, depth: f"up{depth - n}.up",
    heads=("outc.conv",),
    linear_preset="milesial_bilinear",
  ),
  # https://github.com/Project-MONAI/MONAI, monai/networks/nets/basic_unet.py
  _Network(
    preset="monai_basic",
    encoder=lambda n: f"down_{n}.convs" if n else "conv_0",
    decoder=lambda n, depth: f"upcat_{n + 1}.convs",
    inner=("conv_0.conv", "conv_0.adn.N", "conv_1.conv", "conv_1.adn.N"),
    up=lambda n, depth: f"upcat_{n + 1}.upsample.deconv",
    heads=("final_conv",),
    linear_preset="monai_basic",
  ),
)
# Our leaf for each of theirs.
_LEAVES = {"weight": "params/{}/kernel", "bias": "params/{}/bias"}
_NORM_LEAVES = {
  "weight": "params/{}/scale",
  "bias": "params/{}/bias",
  "running_mean": "batch_stats/{}/mean",
  "running_var": "batch_stats/{}/var",
}


# --- Reading ------------------------------------------------------------------


def read_state_dict(path: pathlib.Path) -> StateDict:
  """Reads a .pth, .pt or .safetensors file; no code in it is run.

  It holds a state dict, or a dict with one under "state_dict" or
  "model_state_dict".

  Raises:
    UserError: no such file, torch is missing or too old, or the file is
      damaged, asks for code, or claims more than it holds.
  """
  read = _READERS.get(path.suffix.lower())
  if read is None or not path.is_file():
    raise UserError(
      f"--weights {path} is no weight file; give one that ends in"
      f" {', '.join(_READERS)}"
    )
  try:
    return read(path)
  except UserError:
    raise
  except ImportError as error:
    raise UserError(f"{path} is not read: {error}; {_INSTALL}") from error
  except Exception as error:  # A damaged file meets many kinds.
    raise UserError(f"{path}: {_complaint(error)}") from error


def _read_safetensors(path: pathlib.Path) -> StateDict:
  import ml_dtypes  # noqa: F401 (numpy then knows bfloat16)
  import safetensors.numpy

  tensors = {
    _clean(key): x if x.dtype.kind in "biu" else x.astype(np.float32)
    for key, x in safetensors.numpy.load_file(path).items()
  }
  return StateDict(path, tensors, {})


def _read_pickle(path: pathlib.Path) -> StateDict:
  import torch

  if tuple(map(int, torch.__version__.split(".")[:2])) < _TORCH:
    raise ImportError(f"torch {torch.__version__} may run code in it")
  if zipfile.is_zipfile(path):  # Before torch 1.6 it was none.
    with zipfile.ZipFile(path) as archive:
      _check_size(sum(x.file_size for x in archive.infolist()), path)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Of pickles that it then refuses.
    loaded = torch.load(path, map_location="cpu", weights_only=True)

  others = {}
  for name in _WRAPPERS:
    if isinstance(loaded, Mapping) and name in loaded:
      others |= {str(k): "beside the weights" for k in loaded if k != name}
      loaded = loaded[name]
  if not isinstance(loaded, Mapping):
    kind = type(loaded).__name__
    raise UserError(f"{path} holds a {kind}; save model.state_dict()")
  tensors = {}
  for key, value in loaded.items():
    if isinstance(value, torch.Tensor):
      tensors[_clean(key)] = value
    else:
      others[_clean(key)] = f"not a tensor: {value!r:.60}"
  # Strides can make a terabyte of one stored number.
  _check_size(sum(x.nbytes for x in tensors.values()), path)
  for key, x in tensors.items():
    x = x.detach()
    tensors[key] = (x.float() if x.is_floating_point() else x).numpy()
  return StateDict(path, tensors, others)


_READERS = {
  ".pth": _read_pickle,
  ".pt": _read_pickle,
  ".safetensors": _read_safetensors,
}


def _clean(key: Any) -> str:
  """Without what parallel and compiled modules put in front."""
  return re.sub(r"^(module\.|_orig_mod\.)+", "", str(key))


def _check_size(size: int, path: pathlib.Path) -> None:
  """Refuses a file that would unpack to more than it is."""
  if size > path.stat().st_size:
    raise UserError(
      f"{path} unpacks to {size:,} bytes, more than it has; save the weights"
      " anew: torch.save(model.state_dict(), FILE)"
    )


def _complaint(error: Exception) -> str:
  """What is wrong with a file; torch's own words advise to run the code."""
  if isinstance(error, pickle.UnpicklingError):
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"asks for {named[1]}" if named else "damaged, or no state dict"
    return (
      f"{what}, and no code is run from a weight file; save the weights alone:"
      " torch.save(model.state_dict(), FILE)"
    )
  reason = " ".join(str(error).split())[:100] or type(error).__name__
  return f"not a readable weight file ({reason}); replace it"


# --- Recognition --------------------------------------------------------------


def recognise(state: StateDict) -> Layout:
  """Finds out which network the tensors are.

  A norm with running statistics is batch norm; another one is what the preset
  has. Missing and mis-shaped tensors are left to `to_variables`.

  Raises:
    UserError: none of the known networks; names the first keys.
  """
  known = {f"{x.encoder(0)}.{x.inner[0]}.weight": x for x in _NETWORKS}
  for first, network in known.items():
    kernel, widths = state.tensors.get(first, np.zeros(0)), []
    # Most tensors of an encoder block have its width in front.
    while sizes := _sizes(state, network.encoder(len(widths))):
      widths.append(statistics.mode(sizes))
    depth = len(widths) - 1
    heads = [x for x in network.heads if _sizes(state, x)]
    if kernel.ndim < 3 or depth < 1 or not heads:
      continue
    transposed = any(_sizes(state, network.up(n, depth)) for n in range(depth))
    preset = network.preset if transposed else network.linear_preset
    model = {
      **presets.PRESETS[preset],
      "dims": kernel.ndim - 2,
      "widths": tuple(widths),
      "bias": any(
        f"{network.encoder(0)}.{conv}.bias" in state.tensors
        for conv in network.inner[::2]
      ),
    }
    if any(key.endswith("running_mean") for key in state.tensors):
      model["norm"] = "batch"
    return Layout(
      preset=preset,
      model=model,
      channels=kernel.shape[1],
      num_classes=statistics.mode(_sizes(state, heads[-1])),
      targets=_targets(network, model, heads[-1]),
    )
  raise UserError(
    f"{state.path}: unknown network, with the tensors"
    f" {', '.join(list(state.tensors)[:4]) or 'none'}, ...; it must have two"
    f" levels or more, a last convolution, and one of {', '.join(known)}"
  )


def _sizes(state: StateDict, module: str) -> list[int]:
  """The first dimension of all tensors of a module."""
  return [
    x.shape[0]
    for key, x in state.tensors.items()
    if key.startswith(f"{module}.") and x.ndim
  ]


def _targets(
  network: _Network, model: Mapping[str, Any], head: str
) -> dict[str, str]:
  depth = len(model["widths"]) - 1
  blocks = {network.encoder(n): f"encoder_{n}" for n in range(depth + 1)}
  for n in range(depth):
    blocks[network.decoder(n, depth)] = f"decoder/decoder_{n}"
  norm = {"batch": "BatchNorm", "instance": "InstanceNorm"}[model["norm"]]
  modules = {head: "head"}
  for (theirs, ours), i in itertools.product(blocks.items(), range(4)):
    kind = norm if i % 2 else "Conv"
    modules[f"{theirs}.{network.inner[i]}"] = f"{ours}/{kind}_{i // 2}"
  if model["up"] == "transpose":
    for n in range(depth):
      modules[network.up(n, depth)] = f"decoder/up_{n}/ConvTranspose_0"
  return {
    f"{theirs}.{leaf}": path.format(ours)
    for theirs, ours in modules.items()
    for leaf, path in (_NORM_LEAVES if "Norm" in ours else _LEAVES).items()
  }


def infer_config(path: pathlib.Path) -> ml_collections.ConfigDict:
  """The schema's defaults with the network of a weight file.

  `data.normalize` is "none": the networks' own scripts feed 8-bit values
  divided by 255, which is what the decoder gives.
  """
  layout = recognise(read_state_dict(path))
  config = config_lib.default_config()
  config.model.update(layout.model)
  config.data.channels = layout.channels
  config.data.num_classes = layout.num_classes
  config.data.normalize = "none"
  size = max(config.data.crop_size[0], 2 ** len(layout.model["widths"]))
  config.data.crop_size = config.data.synthetic_size = (size,)
  return config


# --- Translation --------------------------------------------------------------


def to_variables(
  state: StateDict, layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
  """Translates tensors to a network's variables.

  Args:
    state: tensors by their key.
    layout: what `recognise` made of them.
    shapes: of the network's variables by path, as
      "params/encoder_0/Conv_0/kernel".

  Returns:
    Arrays by path, of exactly these shapes.

  Raises:
    UserError: names every tensor that is missing, unused or of another shape.
  """
  values, problems = {}, []
  for key, value in state.tensors.items():
    target = layout.targets.get(key)
    if target in shapes:
      values[target] = _translate(value, target, layout)
    elif not key.endswith(_COUNTER):
      problems.append(f"unused {key} {value.shape}")
  keys = {target: key for key, target in layout.targets.items()}
  for target, want in shapes.items():
    key, got = keys.get(target, target), values.get(target)
    if got is None:
      problems.append(f"missing {key} for {want}")
    elif (got.shape, got.dtype) != (want, np.float32):
      problems.append(f"{key} gives {got.dtype}{got.shape}, must be {want}")
  if problems:
    shown = ("dims", "widths", "norm", "up", "bias")
    fields = ", ".join(f"{name}={layout.model[name]}" for name in shown)
    raise UserError(
      f"{state.path} does not fit: {'; '.join(problems)}; it looks like"
      f" {layout.preset} with {fields}, {layout.channels} channels and"
      f" {layout.num_classes} classes: mend it, or leave --config out"
    )
  return values


def _translate(value: np.ndarray, target: str, layout: Layout) -> np.ndarray:
  """A tensor with our axes; one of another rank is left as it is."""
  dims = layout.model["dims"]
  if not target.endswith("/kernel") or value.ndim != dims + 2:
    return value
  if "ConvTranspose" in target:
    return np.flip(np.moveaxis(value, (0, 1), (-2, -1)), range(dims))
  kernel = np.moveaxis(value, (0, 1), (-1, -2))
  level = re.search(r"decoder_(\d+)/Conv_0", target)
  if layout.preset == "seed" and level:
    kernel = np.roll(kernel, layout.model["widths"][int(level[1])], axis=-2)
  return kernel
