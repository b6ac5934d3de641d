"""Where a network looked, and what each skip carries: `--mode explain`.

All that is asked is asked of one number, the score: the log odds of a class,
log p / (1 - p), which for K = 1 is the logit, averaged over the pixels that
were predicted as the class. Maps have the image's size; mirroring to what the
network takes is part of the function that is explained.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import geometry, inputs
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import normalize, windows
from unet_jax.errors import UserError, check_all_done
from unet_jax.inspect import attributions, explain_page
from unet_jax.runtime import parallel, signals, writers

# Larger images are explained in their centre: pixels an axis, by axes.
_MOST = {1: 4096, 2: 512, 3: 64}
# Occluders along an axis, by axes.
_PATCHES = {1: 32, 2: 8, 3: 4}


# --- One image ----------------------------------------------------------------


class Asked(NamedTuple):
  """What is asked of one image.

  Attributes:
    cfg: the run's config.
    trace: of `attributions.make_trace`, on the run's variables.
    image: normalised, [*S, C].
    mask: predicted class ids [*S].
    k: the channel of the logits that is explained.
    region: float [*S], 1 / n on the n pixels that the score averages.
  """

  cfg: Config
  trace: Callable[..., attributions.Trace]
  image: jax.Array
  mask: np.ndarray
  k: int
  region: np.ndarray

  def score(self, image: jax.Array, **hooks: Any) -> jax.Array:
    logits = self.trace(image, **hooks).logits
    return jnp.sum(attributions.log_odds(logits, self.k) * self.region)

  @property
  def point(self) -> tuple[int, ...]:
    """The pixel of the region that is nearest to its centre."""
    inside = np.argwhere(self.region > 0)
    distance = np.square(inside - inside.mean(0)).sum(-1)
    return tuple(inside[np.argmin(distance)].tolist())


# A method's maps by title, and its numbers.
Found = tuple[dict[str, np.ndarray], dict[str, Any]]


def ask(
  cfg: Config, model: nn.Module, variables: Any, image: np.ndarray
) -> Asked:
  """Chooses the class: the commonest predicted one that is foreground.

  Where there is none, the likeliest, over all pixels.
  """
  # One program for all images of a size.
  trace = functools.partial(_trace_of(cfg, model, image.shape[:-1]), variables)
  logits = np.asarray(trace(image).logits)
  labels = max(cfg.data.num_classes, 2)
  one = cfg.data.num_classes == 1
  mask = (logits[..., 0] > 0).astype(int) if one else logits.argmax(-1)
  foreground = cfg.eval.foreground or range(1, labels)
  counts = [np.sum(mask == k) for k in foreground]
  label = foreground[int(np.argmax(counts))]
  region = (mask == label).astype(np.float32)
  if not region.any():
    if not one:
      label = max(foreground, key=lambda k: logits[..., k].mean())
    region = np.ones_like(region)
  k = 0 if one else label
  region /= region.sum()
  return Asked(cfg, trace, jnp.asarray(image), mask, k, region)


_trace_of = functools.lru_cache(maxsize=8)(attributions.make_trace)


def _integrated(asked: Asked) -> Found:
  baseline = jnp.zeros_like(asked.image)
  found = attributions.integrated_gradients(asked.score, asked.image, baseline)
  difference = float(asked.score(asked.image) - asked.score(baseline))
  numbers = {"sum": float(found.sum()), "difference": difference}
  return {"integrated gradients": found.sum(-1)}, numbers


def _occluded(asked: Asked) -> Found:
  most = _PATCHES[asked.image.ndim - 1]
  window = [-(-n // most) for n in asked.image.shape[:-1]]
  found = attributions.occlusion(asked.score, asked.image, window)
  title = f"occlusion by {' x '.join(map(str, window))}"
  return {title: found}, {"window": window, "largest": float(found.max())}


def _field(asked: Asked) -> Found:
  point = asked.point
  single = asked._replace(region=np.zeros_like(asked.region))
  single.region[point] = 1
  found = np.asarray(attributions.receptive_field(single.score, asked.image))
  # Roots: the field falls off like a Gaussian, and its rim would not be seen.
  title = f"receptive field of {', '.join(map(str, point))} (root)"
  offsets = np.indices(found.shape) - np.reshape(
    point, (-1, *(1,) * len(point))
  )
  radius = np.abs(offsets).max(0).ravel()
  order = np.argsort(radius, kind="stable")
  share = np.cumsum(found.ravel()[order]) / max(found.sum(), 1e-30)
  inside = radius[order][min(np.searchsorted(share, 0.95), radius.size - 1)]
  numbers = {"point": list(point), "radius_95": int(inside)}
  return {title: np.sqrt(found)}, numbers


def _cams(asked: Asked) -> Found:
  features = asked.trace(asked.image).features
  zeros = {k: jnp.zeros_like(x)[None] for k, x in features.items()}
  score = lambda add, image: asked.score(image, add=add)
  gradients = jax.grad(score)(zeros, asked.image)
  maps, numbers = {}, {}
  for name, x in sorted(features.items(), key=_along_the_u):
    cam = np.asarray(attributions.seg_grad_cam(x, gradients[name][0]))
    level = int(attributions.BLOCK.fullmatch(name)[2])
    maps[f"CAM {name}"] = to_image(cam, level, asked)
    numbers[name] = float(cam.max())
  return maps, numbers


def _along_the_u(item: tuple[str, Any]) -> tuple[bool, int]:
  path, level = attributions.BLOCK.fullmatch(item[0]).groups()
  down = path == "encoder"
  return not down, int(level) if down else -int(level)


def _knocked_out(asked: Asked) -> Found:
  def probability(keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = asked.trace(asked.image, keep=keep).logits
    return jax.nn.sigmoid(attributions.log_odds(logits, asked.k)), asked.score(
      asked.image, keep=keep
    )

  depth = asked.cfg.model.depth
  on = asked.cfg.model.skip_levels or (True,) * depth
  whole, score = probability(jnp.ones(depth))
  maps, numbers = {}, {}
  for level in range(depth):
    if on[level] and asked.cfg.model.skip != "none":
      keep = jnp.ones(depth).at[level].set(0)
      without, reduced = probability(keep)
      maps[f"lost without skip {level}"] = np.asarray(whole - without)
      flipped = np.mean(
        (np.asarray(whole) > 0.5) != (np.asarray(without) > 0.5)
      )
      numbers[f"skip_{level}"] = {
        "score_lost": float(score - reduced),
        "pixels_changed": float(flipped),
      }
  return maps, numbers


def _gates(asked: Asked) -> Found:
  maps, numbers = {}, {}
  for name, gates in asked.trace(asked.image).gates.items():
    for i, gate in enumerate(gates):
      own = name if len(gates) == 1 else f"{name}, {i}"
      numbers[own] = float(gate.mean())
      if gate.ndim == asked.image.ndim and max(gate.shape[:-1]) > 1:
        level = int(re.search(r"\d+", name)[0])
        gate = np.asarray(gate.astype(jnp.float32))[..., 0]
        maps[f"gate {own}"] = to_image(gate, level, asked)
  return maps, numbers


METHODS: dict[str, Callable[[Asked], Found]] = {
  "integrated_gradients": _integrated,
  "occlusion": _occluded,
  "receptive_field": _field,
  "skip_knock_out": _knocked_out,
  "seg_grad_cam": _cams,
  "gates": _gates,
}


def to_image(values: np.ndarray, level: int, asked: Asked) -> np.ndarray:
  """A map of a level, enlarged and laid where it belongs on the image."""
  model, multiple = asked.cfg.model, asked.cfg.data.pad_multiple
  sizes = asked.image.shape[:-1]
  pads = geometry.plan_pads(sizes, model.depths, model.size_rule, multiple)
  pooled = geometry.pool_factors(model.pool_axes, model.dims, model.depth)
  factors = geometry.level_factor(pooled, 0, level)
  for axis, (pad, n) in enumerate(zip(pads, sizes, strict=True)):
    values = values.repeat(factors[axis], axis)
    # Valid padding takes as much from both sides.
    missing = pad.size - values.shape[axis]
    before = missing // 2 if model.size_rule == "valid" else 0
    around = [(0, 0)] * values.ndim
    around[axis] = (before, missing - before)
    values = np.pad(values, around)
    values = values.take(np.arange(pad.before, pad.before + n), axis)
  return values


# --- The mode -----------------------------------------------------------------


def run(
  cfg: Config,
  workdir: pathlib.Path,
  input_path: pathlib.Path | None,
  *,
  step: int | None = None,
) -> None:
  """`--mode explain`: leaves explain/NAME.png, explain.json and a page of all.

  Args:
    cfg: the run's config; `predict.max_images` is the most that are explained.
    workdir: folder of the training run.
    input_path: an image or a folder of images; None takes `cfg.eval.split`.
    step: the checkpoint; None takes the best.

  Raises:
    UserError: no image was found, or some could not be read.
  """
  if cfg.model.skip == "shuffle":
    raise UserError(
      "model.skip='shuffle' takes features of another example, which a single"
      " image lacks; explain a run of another skip"
    )
  if cfg.data.source == "tokens":
    raise UserError(
      "data.source='tokens' has no picture to explain; use --mode predict"
    )
  if cfg.data.spacing:
    raise UserError(
      "data.spacing is not explained yet: maps would lie on another grid than"
      " the image; leave it to --mode predict"
    )
  images = inputs.list_images(cfg, workdir, input_path)
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  trained = workdir_lib.load_trained(cfg, workdir, mesh, step=step)
  make = functools.partial(ask, cfg, trained.model, trained.variables)
  output, records, failures = workdir / "explain", [], []
  with signals.GracefulStop() as stop:
    for name, read in writers.track(images, "explaining"):
      try:
        picture = read()
        image, note = _centre(picture)
        # As predicted: by the pixels of the whole image.
        parts = windows.parts(picture)
        how = normalize.of_image(trained.normalization, parts)
      except UserError as error:
        failures.append(str(error))
        continue
      asked = make(normalize.normalize(image, how))
      maps, numbers = _explain(asked, stop, name)
      page = explain_page.draw(image, asked.mask, maps, asked.point, cfg)
      explain_page.save(output / f"{name}.png", page)
      records.append({"image": name, "part": note, **numbers})
  workdir_lib.write_json(workdir / "explain.json", {"images": records})
  explain_page.write_index(output, records)
  writers.log(f"{len(records)} images explained, in {output}")
  check_all_done(failures, len(images), "images were not explained")


def _explain(asked: Asked, stop: Any, name: str) -> Found:
  """All maps and numbers of an image."""
  label = asked.k if asked.cfg.data.num_classes > 1 else 1
  maps, numbers = {}, {"class": label, "score": float(asked.score(asked.image))}
  for method, explain in writers.track(_named(METHODS), f"{name}:"):
    if stop.requested:
      raise signals.Stopped(stop.requested)
    found, numbers[method] = explain(asked)
    maps |= found
  return maps, numbers


def _named(table: dict[str, Any]) -> list[tuple[str, Any]]:
  return list(table.items())


def _centre(picture: windows.Picture) -> tuple[np.ndarray, str]:
  """The middle of a large image, and which part it is."""
  most = _MOST[len(picture.size)]
  starts = [max(n - most, 0) // 2 for n in picture.size]
  image = picture.read(
    [(i, min(i + most, n)) for i, n in zip(starts, picture.size, strict=True)]
  )
  if image.shape[:-1] == picture.size:
    return image, "all"
  both = (" x ".join(map(str, s)) for s in (image.shape[:-1], picture.size))
  return image, "centre {} of {}".format(*both)
