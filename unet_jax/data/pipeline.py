"""Batches of any step, and batches that score every example once.

Order and crops are functions of (seed, step), so a run resumes from the step
alone, and threads and hosts change nothing. Grain shuffles and prefetches.

A batch of b examples is a dict: id int32 [b]; image float32 [b, *S, C],
normalised; label int32 and weight float32 over pixels (0 = counts nowhere);
valid float32 [b] (0 = only fills the batch). Of tokens the image is int32, ids,
which are neither normalised nor mirrored. Training crops of volumes also have
their spacing, float32 [b, D].
"""

import math
import pathlib
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from unet_jax import geometry
from unet_jax.config import Config
from unet_jax.data import buckets, normalize, rare, respace, weight_map, windows
from unet_jax.data.folder import FolderSource
from unet_jax.data.source import Source
from unet_jax.data.synthetic import SyntheticSource
from unet_jax.data.tfds import TfdsSource
from unet_jax.data.tokens import TokenSource
from unet_jax.errors import UserError

# The choices of config.data.source.
SOURCES = {
  "synthetic": SyntheticSource,
  "folder": FolderSource,
  # The same layout, of NIfTI and npy volumes.
  "volumes": FolderSource,
  "tokens": TokenSource,
  "tfds": TfdsSource,
}
# What the pipeline reads of an example.
_ARRAYS = ("image", "label", "weight")
_Arrays = dict[str, np.ndarray]
_Read = Callable[[int], _Arrays]


def make_source(
  cfg: Config, split: str, split_dir: pathlib.Path, *, lenient: bool = False
) -> Source:
  """The source of a split; a seeded split is kept in `split_dir`.

  With `lenient`, a missing file is an error when it is read, where the source
  knows of that.
  """
  kind = SOURCES[cfg.data.source]
  more = {"lenient": True} if lenient and hasattr(kind, "raw_ids") else {}
  source = kind(cfg, split, split_dir, **more)
  if cfg.data.spacing:
    source = respace.Respaced(source, cfg.data.spacing, cfg.data.max_pixels)
  if cfg.model.skip == "shuffle" and len(source) < 2:
    raise UserError(
      "model.skip='shuffle' takes features of another example, and the split"
      f" {split!r} has one; give it two"
    )
  return source


def list_splits(cfg: Config, split_dir: pathlib.Path) -> list[str]:
  """The splits that `make_source` accepts; no example is read."""
  return SOURCES[cfg.data.source].list_splits(cfg, split_dir)


# --- Mirrored borders ---------------------------------------------------------


def pad_for_network(
  image: np.ndarray,
  depth: int | Sequence[int],
  padding: str,
  multiple: int,
  space: int = 1,
) -> np.ndarray:
  """Mirror-pads an image [*S, C] of any size so that all of it is predicted.

  The output for the padded image starts at the image's first pixel; cut it to
  the image's size. The padded size is that of `geometry.plan_pads`.
  """
  pads = geometry.plan_pads(image.shape[:-1], depth, padding, multiple, space)
  starts = [-pad.before for pad in pads]
  return _mirrored_window(image, starts, [pad.size for pad in pads])


def random_crop(
  example: Mapping[str, np.ndarray],
  crop_size: Sequence[int],
  margin: int,
  rng: np.random.Generator,
  pixel: Sequence[int] | None = None,
) -> _Arrays:
  """Cuts the network's input tile out of an example, at a uniform position.

  The output window (the tile less `margin` on every side) lies inside the
  image, or the image inside the window where it is smaller. Whatever of the
  tile lies outside is mirrored and has weight 0.

  Args:
    example: image, label and weight of an example.
    crop_size: the tile's size.
    margin: pixels that the network takes from each side.
    rng: decides the position.
    pixel: one that the output window holds, at a uniform place in it.
  """
  size = example["weight"].shape
  starts, inside = [], np.ones((), np.float32)
  for axis, (n, crop) in enumerate(zip(size, crop_size, strict=True)):
    window = crop - 2 * margin
    low, high = min(n - window, 0), max(n - window, 0)
    if pixel is not None:
      low = max(low, pixel[axis] - window + 1)
      high = min(high, pixel[axis])
    start = int(rng.integers(low, high + 1)) - margin
    positions = np.arange(start, start + crop)
    within = (positions >= 0) & (positions < n)
    inside = inside[..., None] * within.astype(np.float32)
    starts.append(start)
  cut = {k: _mirrored_window(example[k], starts, crop_size) for k in _ARRAYS}
  return cut | {"weight": cut["weight"] * inside}


def _mirrored_window(
  array: np.ndarray, starts: Sequence[int], sizes: Sequence[int]
) -> np.ndarray:
  """The window [start, start + size) of each axis of a mirrored array.

  Axes are mirrored about their first and last elements, back and forth as long
  as it takes; an axis of one element is repeated.
  """
  for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
    index = windows.mirrored_index(array.shape[axis], start, size)
    array = array.take(index, axis)
  return array


# --- Training -----------------------------------------------------------------


def train_batches(
  source: Source,
  normalization: Mapping[str, Any],
  *,
  cfg: Config,
  first_step: int,
  end_step: int | None = None,
  host: int = 0,
  num_hosts: int = 1,
) -> Generator[_Arrays, None, None]:
  """This host's batches of steps first_step up to end_step - 1, or for ever.

  Each epoch is a new permutation; a batch may span two, so none is cut short.
  All hosts' batches, concatenated, are that of a single host. Labels cover the
  whole crop, also with padding="valid" (the loss cuts them); all are valid.
  Weights are those of `config.data.weight_map`. What else changes an example
  here (`data.foreground_share`, `augment.cutmix`) is a function of the seed and
  its place in the run alone.

  A batch of tokens has sentences of one bucket, see `buckets.plan_training`.

  Raises:
    UserError: the batch cannot be divided, or (iterating) a file is damaged.
  """
  batch_size = cfg.train.batch_size
  if batch_size % num_hosts:
    raise UserError(
      f"config.train.batch_size={batch_size} is not divisible by {num_hosts}"
      f" hosts; nearest: {-(-batch_size // num_hosts) * num_hosts}"
    )
  mine = _host_slice(batch_size, host, num_hosts)
  cut = _make_cut(source, normalization, cfg)

  def load(step: int, ids: np.ndarray, length: int = 0) -> _Arrays:
    examples = []
    for j in range(mine.start, mine.stop):
      crop = cut(int(ids[j]), step * batch_size + j, length)
      if cfg.augment.cutmix:
        mix = np.random.default_rng((cfg.seed, step * batch_size + j, 1))
        if mix.uniform() < cfg.augment.cutmix:
          # The batch's next crop, whichever host has that one.
          k = (j + 1) % batch_size
          other = cut(int(ids[k]), step * batch_size + k, length)
          crop = rare.paste_box(crop, other, mix)
      examples.append(crop)
    batch = _stack(ids[mine], examples, [1] * len(examples))
    if cfg.data.source == "volumes":
      known = [source.spacing(int(i)) for i in ids[mine]]
      equal = (1.0,) * cfg.model.dims
      batch["spacing"] = np.array([s or equal for s in known], np.float32)
    return batch

  if cfg.data.source == "tokens":
    lengths = [source.size(i)[0] for i in range(len(source))]
    plan = buckets.plan_training(lengths, cfg)
    steps = grain.MapDataset.range(end_step or 2**62)
    batches = steps.map(lambda step: load(int(step), *plan(int(step))))
    return _prefetch(batches, first_step, cfg.data.num_threads)
  order = grain.MapDataset.range(len(source)).seed(cfg.seed).shuffle()
  # For ever, but for a length that Python can hold: grain's own endless one
  # overflows when it is cut into batches of one.
  order = order.repeat(2**62 // len(source))
  batches = order.batch(batch_size)[:end_step].map_with_index(load)
  return _prefetch(batches, first_step, cfg.data.num_threads)


def _make_cut(
  source: Source, normalization: Mapping[str, Any], cfg: Config
) -> Callable[[int, int, int], _Arrays]:
  """(index, place in the run, tokens or 0) -> a training crop of it."""
  margin = geometry.margin(cfg.model.depth, cfg.model.size_rule)
  data, cache = cfg.data, None
  mapped = data.weight_map != "none"
  if mapped:
    cache = weight_map.open_cache(cfg.runtime.map_cache)

  def read_weighted(index: int) -> _Arrays:
    if not mapped:
      return _read(source, index, normalization)
    example = weight_map.read(source, index, cfg, cache)
    return _normalized(example, normalization)

  read = _remember(read_weighted, cfg)
  classes = data.foreground_classes or range(1, cfg.num_labels)

  def cut(index: int, place: int, length: int) -> _Arrays:
    example, pixel = read(index), None
    # By place, not by id: a small source repeats an id within a batch.
    rng = np.random.default_rng((cfg.seed, place))
    if length:
      return buckets.cut(example, length, rng)
    if data.foreground_share and rng.uniform() < data.foreground_share:
      pixel = rare.choose_pixel(example, classes, rng)
    return random_crop(example, data.crop_size, margin, rng, pixel)

  return cut


# --- Evaluation ---------------------------------------------------------------


def eval_batches(
  source: Source,
  normalization: Mapping[str, Any],
  *,
  cfg: Config,
  num_devices: int,
  space: int = 1,
  host: int = 0,
  num_hosts: int = 1,
  partners: bool = False,
) -> Generator[_Arrays, None, None]:
  """This host's batches that hold every example once, whole, at its own size.

  With `partners`, and with skip="shuffle", a batch also has `partner`, the
  images of the next example ids, cut or mirrored to the same size.

  Batches hold images of one padded size, no more than `eval.batch_size` and
  `eval.batch_pixels` allow but at least one for each of the `num_devices` (or
  groups of `space` devices that share an image), and are filled up with
  repeated examples of valid=0. All hosts have equally many.

  Images are padded by mirroring. Labels lie on the grid of the network's
  output, which starts at the image's first pixel; weight is 0 beyond the image.

  Raises:
    UserError: (iterating) a file is damaged.
  """
  n = len(source)
  sizes = [source.size(i) for i in range(n)]
  partners = partners or cfg.model.skip == "shuffle"
  plan = _plan_eval(sizes, cfg, num_devices, space, partners)

  def load(planned: tuple[list[int], list[int]]) -> _Arrays:
    ids, valid = (
      values[_host_slice(len(values), host, num_hosts)] for values in planned
    )
    examples = [_pad(_read(source, i, normalization), cfg, space) for i in ids]
    batch = _stack(ids, examples, valid)
    if partners:
      others = [_read(source, (i + 1) % n, normalization) for i in ids]
      size = batch["image"].shape[1:-1]
      margin = geometry.margin(cfg.model.depth, cfg.model.size_rule)
      starts = [-margin] * len(size)
      images = [_mirrored_window(x["image"], starts, size) for x in others]
      batch["partner"] = np.stack(images)
    return batch

  batches = grain.MapDataset.source(plan).map(load)
  return _prefetch(batches, 0, cfg.data.num_threads)


def _pad(example: Mapping[str, np.ndarray], cfg: Config, space: int) -> _Arrays:
  if cfg.data.source == "tokens":
    length = buckets.padded_length(len(example["label"]), cfg.data)
    return buckets.pad(example, length)
  depths, padding = cfg.model.depths, cfg.model.size_rule
  multiple = cfg.data.pad_multiple
  image = pad_for_network(example["image"], depths, padding, multiple, space)
  sizes = zip(image.shape, depths, example["label"].shape, strict=False)
  after = [
    (0, geometry.output_size(padded, depth, padding) - n)
    for padded, depth, n in sizes
  ]
  return {
    "image": image,
    "label": np.pad(example["label"], after),
    "weight": np.pad(example["weight"], after),
  }


def _plan_eval(
  sizes: Sequence[tuple[int, ...]],
  cfg: Config,
  num_devices: int,
  space: int,
  partners: bool = False,
) -> list[tuple[list[int], list[int]]]:
  """`id` and `valid` of global batches, smallest shapes first."""
  depths, padding = cfg.model.depths, cfg.model.size_rule
  multiple = cfg.data.pad_multiple
  groups: dict[tuple[int, ...], list[int]] = {}
  for i, size in enumerate(sizes):
    if cfg.data.source == "tokens":
      shape = (buckets.padded_length(size[0], cfg.data),)
    else:
      pads = geometry.plan_pads(size, depths, padding, multiple, space)
      shape = tuple(pad.size for pad in pads)
    groups.setdefault(shape, []).append(i)
  plan = []
  for shape, ids in sorted(groups.items()):
    pixels = math.prod(shape) * (1 + partners)
    most = min(cfg.eval.batch_size, cfg.eval.batch_pixels // pixels)
    most = max(most // num_devices, 1) * num_devices
    # As equal as possible, so that few images only fill.
    num_batches = -(-len(ids) // most)
    batch_size = -(-len(ids) // (num_batches * num_devices)) * num_devices
    for start in range(0, len(ids), batch_size):
      chosen = ids[start : start + batch_size]
      num_fill = batch_size - len(chosen)
      valid = [1] * len(chosen) + [0] * num_fill
      plan.append((chosen + [chosen[-1]] * num_fill, valid))
  return plan


# --- Both ---------------------------------------------------------------------


def _host_slice(batch_size: int, host: int, num_hosts: int) -> slice:
  local = batch_size // num_hosts
  return slice(host * local, (host + 1) * local)


def _read(source: Source, i: int, normalization: Mapping[str, Any]) -> _Arrays:
  return _normalized(source[i], normalization)


def _normalized(
  example: Mapping[str, np.ndarray], normalization: Mapping[str, Any]
) -> _Arrays:
  image = example["image"]
  if image.dtype != np.int32:  # Ids have no intensity.
    image = normalize.normalize(image, normalization)
  return {name: example[name] for name in _ARRAYS} | {"image": image}


def _remember(read: _Read, cfg: Config) -> _Read:
  """`read`, but keeping what it gave, up to runtime.example_cache_mb."""
  # And drops nothing: in permutations, what was used least recently comes next.
  kept, free, lock = {}, cfg.runtime.example_cache_mb * 2**20, threading.Lock()

  def remember(index: int) -> _Arrays:
    nonlocal free
    if (example := kept.get(index)) is None:
      example = read(index)
      size = sum(array.nbytes for array in example.values())
      with lock:
        if index not in kept and size <= free:
          kept[index], free = example, free - size
    return example

  return remember


def _stack(
  ids: Sequence[int],
  examples: Sequence[Mapping[str, np.ndarray]],
  valid: Sequence[int],
) -> _Arrays:
  batch = {name: np.stack([e[name] for e in examples]) for name in _ARRAYS}
  return batch | {
    "id": np.asarray(ids, np.int32),
    "valid": np.asarray(valid, np.float32),
  }


def _prefetch(
  batches: grain.MapDataset, first: int, num_threads: int
) -> Generator[_Arrays, None, None]:
  """Elements first, first + 1, ... in order, loaded ahead on threads."""
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  iterator = iter(batches.to_iter_dataset(options))
  iterator.set_state({"next_index": first})
  try:
    yield from iterator
  finally:
    iterator.close()
