"""The weight map of the 2015 paper: narrow gaps between objects count more.

  w(x) = w_c(x) + w0 exp(-(d1(x) + d2(x))^2 / (2 sigma^2))

with w_c the weight of the pixel's class and d1, d2 the exact Euclidean
distances, in pixels, from a pixel between objects to the nearest pixels of the
nearest and of the second nearest object; the second term is 0 on objects, and
where there are fewer than two.

Reference: Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, equation 2
and figure 3.
"""

import hashlib
import io
import math
import pathlib
from concurrent import futures

import numpy as np
from scipy import ndimage

from unet_jax.config import Config
from unet_jax.data.source import Source
from unet_jax.errors import UserError
from unet_jax.runtime import storage, writers

# What is below half a unit in the last place of 1 is left out of the map.
_NOTHING = 2.0**-25
# In the name of a cached map: raise it where the numbers change.
_VERSION = 1


def read(
  source: Source, index: int, cfg: Config, cache: pathlib.Path | None
) -> dict[str, np.ndarray]:
  """An example with the map in its weight, as `config.data` asks for.

  The loss multiplies by the class weights w_c (`loss.class_weights`), so that
  weight is w / w_c here, and 0 where it was. With `data.separate` the label is
  0 where objects touch, and they are apart.

  Args:
    source: of the training split.
    index: of the example.
    cfg: its data and loss.
    cache: folder of terms computed earlier, or None.

  Raises:
    UserError: the example has no instances.
  """
  example, data = source[index], cfg.data
  label = example["label"]
  if data.weight_map == "components":
    objects = components(label, cfg.num_labels)
  else:
    objects = _read_instances(source, index)
  if data.separate:
    touching = touches_another(objects)
    objects = np.where(touching, 0, objects)
    label = np.where(touching, 0, label).astype(np.int32)
  term = _cached_term(objects, data.w0, data.sigma, cache)
  factors = np.float32(cfg.loss.class_weights or (1.0,) * cfg.num_labels)
  # A class without weight has no border either; ids beyond are the loss's.
  known = np.where(label < cfg.num_labels, label, 0)
  of_class = factors[known]
  share = np.divide(term, of_class, out=np.zeros_like(term), where=of_class > 0)
  weight = example["weight"] * (1 + share)
  return {**example, "label": label, "weight": weight.astype(np.float32)}


def border_term(objects: np.ndarray, w0: float, sigma: float) -> np.ndarray:
  """The second term of the map, float32 [*S].

  Exact: each object's own distance transform, in the window around it where
  the term is more than 2^-25, is merged into the two smallest.

  Args:
    objects: integers [*S], 0 = between objects, else one id an object.
    w0: the term's largest possible value.
    sigma: in pixels.
  """
  values, inverse = np.unique(objects, return_inverse=True)
  order = np.where(values == 0, 0, np.cumsum(values != 0))
  ids = order[inverse].reshape(objects.shape)
  reach = math.ceil(sigma * math.sqrt(2 * math.log(max(w0 / _NOTHING, 1))))
  nearest = np.full((2, *objects.shape), np.inf)
  for number, box in enumerate(ndimage.find_objects(ids), 1):
    window = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
    distance = ndimage.distance_transform_edt(ids[window] != number)
    first, second = nearest[0][window], nearest[1][window]
    np.minimum(second, np.maximum(first, distance), out=second)
    np.minimum(first, distance, out=first)
  term = w0 * np.exp(-(nearest.sum(0) ** 2) / (2 * sigma**2))
  return np.where((ids == 0) & (term > _NOTHING), term, 0).astype(np.float32)


def touches_another(objects: np.ndarray) -> np.ndarray:
  """Where an object has another one among its 3^D - 1 neighbours, bool [*S].

  Both sides of a contact touch, so a gap two pixels wide is what remains.
  """
  ids = objects.astype(np.int64)
  largest = ndimage.maximum_filter(ids, 3, mode="nearest")
  above_0 = np.where(ids > 0, ids, ids.max() + 1)
  smallest = ndimage.minimum_filter(above_0, 3, mode="nearest")
  return (ids > 0) & ((largest != ids) | (smallest != ids))


def components(label: np.ndarray, num_labels: int) -> np.ndarray:
  """Ids of the face-connected pixels of each class above 0, int32 [*S]."""
  ids = np.zeros(label.shape, np.int32)
  for k in range(1, num_labels):
    found, _ = ndimage.label(label == k)
    ids = np.where(found > 0, found + ids.max(), ids)
  return ids


def check(source: Source, cfg: Config) -> None:
  """Looks for the ids that the map needs, of `data.check_masks` examples.

  Raises:
    UserError: the first example without, or whose ids do not fit.
  """
  if cfg.data.weight_map == "instances":
    count = min(cfg.data.check_masks, len(source))
    read = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    with futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(lambda i: _read_instances(source, i), read))


def _read_instances(source: Source, index: int) -> np.ndarray:
  objects = source.instances(index)
  if objects is None:
    raise UserError(
      f"config.data.weight_map='instances': the example {source.names[index]!r}"
      " has no ids of objects; add DIR/instances/STEM.png, or take 'components'"
    )
  return objects


# --- The cache ----------------------------------------------------------------


def open_cache(folder: str) -> pathlib.Path | None:
  """Where terms are kept: `folder`, for "user" the user's cache; or nowhere.

  A folder that cannot be written is said, and does without.
  """
  if not folder:
    return None
  path = pathlib.Path(folder)
  if folder == "user":
    path = storage.user_cache() / "weight_maps"
  if storage.make_writable(path):
    return path
  writers.log(f"cannot write to {path}: weight maps are not kept")
  return None


def _cached_term(
  objects: np.ndarray, w0: float, sigma: float, cache: pathlib.Path | None
) -> np.ndarray:
  """`border_term`, by what it is made of: ids, not the name of a file."""
  if cache is None:
    return border_term(objects, w0, sigma)
  ids = np.ascontiguousarray(objects, np.int64)
  facts = repr((_VERSION, ids.shape, float(w0), float(sigma))).encode()
  name = hashlib.sha256(facts + ids.tobytes()).hexdigest()
  path = cache / f"{name[:40]}.npy"
  try:
    term = np.load(path)
    if (term.shape, term.dtype) == (objects.shape, np.float32):
      return term
  except (OSError, ValueError, EOFError):  # Not there, or damaged.
    pass
  term, data = border_term(objects, w0, sigma), io.BytesIO()
  np.save(data, term)
  try:
    writers.write_atomically(path, data.getvalue())
  except UserError as error:  # A full disk does not end a run.
    writers.log(f"{error}: this weight map is not kept")
  return term
