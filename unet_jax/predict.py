"""Using a trained network: images of any size in, masks out."""

import collections
import functools
import io
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import config as config_lib
from unet_jax import import_weights
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import decode, nifti, normalize, pipeline
from unet_jax.errors import UserError
from unet_jax.exchange import import_torch
from unet_jax.inspect import pictures
from unet_jax.objectives import metrics
from unet_jax.runtime import parallel, signals, storage, writers

# An image float32 [*S, C], as `decode.read_image` gives it, to class ids uint8
# [*S] and probabilities float32 [*S, K] in [0, 1] (K = 1: of the foreground).
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_predictor(
  workdir: str | pathlib.Path | None = None,
  *,
  step: int | None = None,
  weights: str | pathlib.Path | None = None,
) -> Callable[[np.ndarray], np.ndarray]:
  """Loads the run in `workdir` for use in a notebook, or a PyTorch network.

  Args:
    workdir: folder of a training run.
    step: the checkpoint; None takes the best.
    weights: a PyTorch state dict, in the place of a run.

  Returns:
    A function of an image [*S] or [*S, C] of any size (uint8, uint16, bool, or
    float in the range that the network was trained on) that gives its mask,
    uint8 class ids [*S].
  """
  if weights is None:
    workdir = storage.to_path(workdir)
    cfg = workdir_lib.read_config(workdir)
  else:
    weights = pathlib.Path(weights)
    cfg = config_lib.parse(import_torch.infer_config(weights))
  predict = make_predict(cfg, workdir, step=step, weights=weights)

  def predictor(image: np.ndarray) -> np.ndarray:
    image = decode.to_image(
      np.asarray(image),
      channels=cfg.data.channels,
      dims=cfg.model.dims,
      name="the image",
    )
    return predict(image)[0]

  return predictor


def make_predict(
  cfg: Config,
  workdir: pathlib.Path | None,
  *,
  step: int | None = None,
  weights: pathlib.Path | None = None,
) -> Predict:
  """The whole pipeline: normalise, pad by mirroring, network, crop back.

  With `weights`, a PyTorch state dict, nothing is read from `workdir`.
  """
  if cfg.model.skip == "shuffle":
    raise UserError(
      "model.skip='shuffle' takes features of another example, which a single"
      " image lacks; score the network with --mode evaluate"
    )
  mesh = parallel.make_mesh()
  if weights is None:
    trained = workdir_lib.load_trained(cfg, workdir, mesh, step=step)
  else:
    trained = import_weights.load_weights(cfg, weights, mesh)

  @jax.jit  # Compiled once for each padded size.
  def apply(variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = trained.model.apply(variables, image[None])
    if cfg.data.num_classes == 1:
      probability = jax.nn.sigmoid(logits)
    else:
      probability = jax.nn.softmax(logits)
    mask = metrics.predict_labels(logits).astype(jnp.uint8)
    return mask[0], probability[0]

  def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image = normalize.normalize(image, trained.normalization)
    padded = pipeline.pad_for_network(
      image, cfg.model.depths, cfg.model.size_rule, cfg.data.pad_multiple
    )
    window = tuple(slice(0, size) for size in image.shape[:-1])
    mask, probability = apply(trained.variables, jnp.asarray(padded))
    return np.asarray(mask)[window], np.asarray(probability)[window]

  return predict


def run(
  cfg: Config,
  workdir: pathlib.Path,
  input_path: pathlib.Path | None,
  output: pathlib.Path,
  *,
  step: int | None = None,
  weights: pathlib.Path | None = None,
) -> None:
  """`--mode predict`: writes a mask and an overlay for each image.

  An image that cannot be read is reported and the others go on.

  Args:
    cfg: the run's config; `cfg.predict` says what is written.
    workdir: folder of the training run; not looked at with `weights`.
    input_path: an image or a folder of images; None takes `cfg.eval.split`.
    output: folder of the results.
    step: the checkpoint; None takes the best.
    weights: a PyTorch state dict, in the place of a run.

  Raises:
    UserError: no image was found, or some could not be read.
  """
  if input_path is not None and storage.resolve(input_path) == (
    storage.resolve(output)
  ):
    raise UserError(f"--output {output} is the input; name another folder")
  images = _list_images(cfg, workdir, input_path)
  predict = make_predict(cfg, workdir, step=step, weights=weights)
  failures = []
  with signals.GracefulStop() as stop:
    for name, path, read in writers.track(images, "predicting"):
      if stop.requested:
        raise signals.Stopped(stop.requested)
      try:
        image = read()
      except UserError as error:
        failures.append(str(error))
        continue
      _write(cfg, output, name, image, *predict(image), like=path)
  writers.log(f"{len(images) - len(failures)} images predicted, in {output}")
  if failures:
    raise UserError(
      f"{len(failures)} of {len(images)} images were not predicted:"
      f" {'; '.join(failures[:3])}{'; ...' if len(failures) > 3 else ''}"
    )


def _list_images(
  cfg: Config, workdir: pathlib.Path, input_path: pathlib.Path | None
) -> list[tuple[str, pathlib.Path | None, Callable[[], np.ndarray]]]:
  """(output name, file, function that reads it) of everything to predict."""
  if input_path is None:
    splits = workdir_lib.split_dir(workdir)
    source = pipeline.make_source(cfg, cfg.eval.split, splits)
    images = [
      (name, source.path(i), functools.partial(source.image, i))
      for i, name in enumerate(source.names)
    ]
  else:
    images = [
      (name, path, functools.partial(_read, cfg, path))
      for name, path in _named_files(input_path)
    ]
  return images[: cfg.predict.max_images or None]


def _read(cfg: Config, path: pathlib.Path) -> np.ndarray:
  return decode.read_image(
    path,
    channels=cfg.data.channels,
    dims=cfg.model.dims,
    max_pixels=cfg.data.max_pixels,
  )


def _named_files(path: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
  """Files with their output names: the stem, or the file name where it clashes.

  Raises:
    UserError: there is no such path, or no image in it.
  """
  if path.is_dir():
    files = sorted(
      p
      for p in path.iterdir()
      if decode.suffix_of(p) in decode.SUFFIXES and not p.name.startswith(".")
    )
  elif path.is_file():
    files = [path]
  else:
    raise UserError(f"--input {path} does not exist; give an image or a folder")
  if not files:
    raise UserError(
      f"--input {path} holds no image; supported: {', '.join(decode.SUFFIXES)}"
    )
  stems = [decode.stem_of(p) for p in files]
  counts = collections.Counter(stems)
  pairs = zip(files, stems, strict=True)
  names = [stem if counts[stem] == 1 else p.name for p, stem in pairs]
  if len(set(names)) < len(names):  # One file's stem is another's whole name.
    names = [p.name for p in files]
  return list(zip(names, files, strict=True))


def _write(
  cfg: Config,
  output: pathlib.Path,
  name: str,
  image: np.ndarray,
  mask: np.ndarray,
  probability: np.ndarray,
  *,
  like: pathlib.Path | None,
) -> None:
  """Files of one image; those of a NIfTI volume `like` are as it is turned."""
  labels = cfg.num_labels
  values = mask
  if cfg.predict.mask_values == "scaled":
    values = (mask.astype(np.int32) * 255 // (labels - 1)).astype(np.uint8)
  is_nifti = like is not None and decode.suffix_of(like) in nifti.SUFFIXES
  if is_nifti:
    path = output / f"{name}_mask.nii.gz"
    writers.write_atomically(path, nifti.mask_bytes(values, like))
    probability = nifti.to_file_axes(probability, like)
  elif cfg.model.dims == 2:
    pictures.save_png(output / f"{name}_mask.png", values)
  else:
    _save_npy(output / f"{name}_mask.npy", values)
  if cfg.model.dims > 1:
    draw = pictures.overlay if cfg.model.dims == 2 else pictures.slices
    overlay = draw(image, mask, num_labels=labels)
    pictures.save_png(output / f"{name}_overlay.png", overlay)
  if cfg.predict.probability:
    _save_npy(output / f"{name}_probability.npy", probability)


def _save_npy(path: pathlib.Path, array: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, array)
  writers.write_atomically(path, buffer.getvalue())
