"""Using a trained network: images of any size in, masks out."""

import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from unet_jax import bands as bands_lib
from unet_jax import config as config_lib
from unet_jax import ensemble as ensemble_lib
from unet_jax import import_weights, inputs, outputs, tag, tiles
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import decode, nifti, respace, windows
from unet_jax.errors import DiskError, UserError, check_all_done
from unet_jax.exchange import import_torch
from unet_jax.inspect import pictures
from unet_jax.runtime import parallel, signals, storage, writers

# An image float32 [*S, C], as `decode.read_image` gives it, to class ids uint8
# [*S] and probabilities float32 [*S, K] in [0, 1] (K = 1: of the foreground).
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_predictor(
  workdir: str | pathlib.Path | None = None,
  *,
  step: int | None = None,
  weights: str | pathlib.Path | None = None,
  ensemble: Sequence[str | pathlib.Path] = (),
) -> Callable[[np.ndarray], np.ndarray]:
  """Loads the run in `workdir` for use in a notebook, or a PyTorch network.

  Args:
    workdir: folder of a training run.
    step: the checkpoint; None takes the best.
    weights: a PyTorch state dict, in the place of a run.
    ensemble: folders of other runs, whose probabilities are averaged with it.

  Returns:
    A function of an image [*S] or [*S, C] of any size (uint8, uint16, bool, or
    float in the range that the network was trained on) that gives its mask,
    uint8 class ids [*S]. For a run on tokens, of a sentence (a list of tokens,
    or text to split at blanks) that gives a list of tags.
  """
  if weights is None:
    workdir = storage.to_path(workdir)
    cfg = workdir_lib.read_config(workdir)
    if cfg.data.source == "tokens":
      return tag.load_tagger(cfg, workdir, step=step)
  else:
    weights = pathlib.Path(weights)
    cfg = config_lib.parse(import_torch.infer_config(weights))
  predict = make_predict(
    cfg, workdir, step=step, weights=weights, ensemble=ensemble
  )

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
  cfg: Config, workdir: pathlib.Path | None, **which: Any
) -> Predict:
  """The whole pipeline, for images that are in memory.

  `which` is as of `make_stream`.
  """
  stream = make_stream(cfg, workdir, **which)

  def predict(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    band = tiles.whole(stream(windows.of_array(image)))
    return band.mask, band.samples.mean(0)

  return predict


def make_stream(
  cfg: Config,
  workdir: pathlib.Path | None,
  *,
  step: int | None = None,
  weights: pathlib.Path | None = None,
  ensemble: Sequence[str | pathlib.Path] = (),
) -> Callable[[windows.Picture], Iterator[tiles.Band]]:
  """The pipeline: normalise, pad by mirroring, tile, network, views, crop back.

  With `weights`, a PyTorch state dict, nothing is read from `workdir`.

  Returns:
    A function that predicts an image, row by row.
  """
  if cfg.model.skip == "shuffle":
    raise UserError(
      "model.skip='shuffle' takes features of another example, which a single"
      " image lacks; score the network with --mode evaluate"
    )
  wanted = cfg.predict
  each = wanted.uncertainty == "mutual_information"
  if each and (1 + len(ensemble)) * max(wanted.dropout_samples, 1) == 1:
    raise UserError(
      "config.predict.uncertainty='mutual_information' is what several say:"
      " give --ensemble DIR or config.predict.dropout_samples=8; nearest:"
      " 'entropy'"
    )
  mesh = parallel.make_mesh()
  if weights is None:
    trained = workdir_lib.load_trained(cfg, workdir, mesh, step=step)
  else:
    trained = import_weights.load_weights(cfg, weights, mesh)
  folders = [storage.to_path(folder) for folder in ensemble]
  members, configs = ensemble_lib.load(trained, cfg, folders, mesh)
  need = tiles.needs([config.model for config in configs])
  apply = ensemble_lib.make_apply(
    members, dropout_samples=wanted.dropout_samples, seed=cfg.seed, each=each
  )
  warned = []

  def stream(picture: windows.Picture) -> Iterator[tiles.Band]:
    plan = _plan(cfg, picture.size, need)
    if need.around is None and not warned and tiles.is_cut(plan):
      reason = next(filter(None, (tiles.why_inexact(c.model) for c in configs)))
      warned.append(reason)
      writers.log(
        f"{reason} looks at the whole image, so tiles cannot equal it: they"
        " overlap by half and are blended; config.predict.whole_pixels="
        f"{math.prod(picture.size)} takes the image whole, if memory allows"
      )
    return tiles.stream(picture, plan, apply, trained.normalization)

  return stream


def _plan(cfg: Config, size: Sequence[int], need: tiles.Needs) -> tiles.Plan:
  try:
    return tiles.plan(cfg, size, need)
  except ValueError as error:
    raise UserError(f"config.predict.tile: {error}") from error


def run(
  cfg: Config,
  workdir: pathlib.Path,
  input_path: pathlib.Path | None,
  output: pathlib.Path,
  *,
  step: int | None = None,
  weights: pathlib.Path | None = None,
  ensemble: Sequence[str] = (),
) -> None:
  """`--mode predict`: writes a mask and an overlay for each image.

  An image that cannot be read is reported and the others go on.

  Args:
    cfg: the run's config; `cfg.predict` says what is written.
    workdir: folder of the training run; not looked at with `weights`.
    input_path: an image, a folder of images, or a glob pattern of them; None
      takes `cfg.eval.split`.
    output: folder of the results.
    step: the checkpoint; None takes the best.
    weights: a PyTorch state dict, in the place of a run.
    ensemble: folders of more runs, averaged with the first.

  Raises:
    UserError: no image was found, or some could not be read.
  """
  if input_path is not None and storage.resolve(input_path) == (
    storage.resolve(output)
  ):
    raise UserError(f"--output {output} is the input; name another folder")
  if cfg.data.source == "tokens":
    if ensemble:
      ensemble_lib.check_source(cfg)
    tag.run(cfg, workdir, input_path, output, step=step)
    return
  images = inputs.list_images(cfg, workdir, input_path)
  stream = make_stream(
    cfg, workdir, step=step, weights=weights, ensemble=ensemble
  )
  failures, rows = [], []
  with signals.GracefulStop() as stop:
    for name, read in writers.track(images, "predicting"):
      if stop.requested:
        raise signals.Stopped(stop.requested)
      try:
        picture = read()
        if picture.array is None:
          _check_parts(cfg, name, picture)
          bands = _until(stop, stream(picture), name)
          rows.append(bands_lib.write(cfg, output, name, picture, bands))
          continue
        band = _predict_whole(cfg, stream, picture, stop, name)
        regions = outputs.regions(cfg, name, band.mask)
      except DiskError:
        raise
      except UserError as error:
        failures.append(str(error))
        continue
      unsure = None
      if cfg.predict.uncertainty != "none":
        unsure = outputs.uncertainty_map(cfg, band.samples)
        regions["uncertainty"] = outputs.uncertainty_picture(
          cfg, unsure, unsure.max()
        )
      rows.append(outputs.row(cfg, name, band.mask, unsure))
      probability = band.samples.mean(0)
      _write(cfg, output, name, picture, band.mask, probability)
      for kind, value in regions.items():
        outputs.save(output / f"{name}_{kind}", value)
  if cfg.predict.uncertainty != "none" and rows:
    outputs.write_rows(output, rows)
  writers.log(f"{len(images) - len(failures)} images predicted, in {output}")
  check_all_done(failures, len(images), "images were not predicted")


def _check_parts(cfg: Config, name: str, picture: windows.Picture) -> None:
  if cfg.predict.instances or cfg.predict.polygons:
    raise UserError(
      f"{name} is predicted in parts, and regions need it whole; set"
      f" config.predict.whole_pixels={math.prod(picture.size)}, or leave"
      " predict.instances and polygons out"
    )


def _predict_whole(
  cfg: Config,
  stream: Callable[[windows.Picture], Iterator[tiles.Band]],
  picture: windows.Picture,
  stop: signals.GracefulStop,
  name: str,
) -> tiles.Band:
  """An image in memory; the network sees it with `data.spacing`."""
  new, size = cfg.data.spacing, picture.size
  if not new or picture.source is None:
    return tiles.whole(_until(stop, stream(picture), name))
  old = nifti.read_grid(picture.source).spacing
  limit = {"max_pixels": cfg.data.max_pixels, "path": picture.source}
  seen = respace.new_size(size, old, new, **limit)
  image = respace.resample(picture.array, old, new, seen, linear=True)
  band = tiles.whole(_until(stop, stream(windows.of_array(image)), name))
  samples = np.stack(
    [respace.resample(x, new, old, size, linear=True) for x in band.samples]
  )
  return tiles.Band(tiles.most_probable(samples.mean(0)), samples)


def _until(
  stop: signals.GracefulStop, bands: Iterator[tiles.Band], name: str
) -> Iterator[tiles.Band]:
  """The bands of an image, with progress, for as long as nobody stops it."""
  for band in writers.track(bands, f"predicting {name}, rows of tiles"):
    if stop.requested:
      raise signals.Stopped(stop.requested)
    yield band


def _write(
  cfg: Config,
  output: pathlib.Path,
  name: str,
  picture: windows.Picture,
  mask: np.ndarray,
  probability: np.ndarray,
) -> None:
  """Files of one image; those of a NIfTI volume lie as it does."""
  values = outputs.mask_values(cfg, mask)
  if picture.source is not None:
    content = nifti.mask_bytes(values, picture.source)
    writers.write_atomically(output / f"{name}_mask.nii.gz", content)
    probability = nifti.to_file_axes(probability, picture.source)
  elif cfg.model.dims == 2:
    pictures.save_png(
      output / f"{name}_mask.png", outputs.mask_picture(cfg, mask)
    )
  else:
    outputs.save_npy(output / f"{name}_mask.npy", values)
  if cfg.model.dims > 1:
    draw = pictures.overlay if cfg.model.dims == 2 else pictures.slices
    overlay = draw(picture.array, mask, num_labels=cfg.num_labels)
    pictures.save_png(output / f"{name}_overlay.png", overlay)
  if cfg.predict.probability:
    outputs.save_npy(output / f"{name}_probability.npy", probability)
