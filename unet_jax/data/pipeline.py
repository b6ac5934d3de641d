"""Batches of any step, and batches that score every example once.

Order and crops are functions of (seed, step), so a run resumes from the step
alone, and threads and hosts change nothing. Grain shuffles and prefetches.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from unet_jax import geometry
from unet_jax.config import Config
from unet_jax.data import normalize
from unet_jax.data.folder import FolderSource
from unet_jax.data.source import Source
from unet_jax.data.synthetic import SyntheticSource
from unet_jax.errors import UserError


def make_source(cfg: Config, split: str, split_dir: pathlib.Path) -> Source:
  """The source of one split.

  Args:
    cfg: the run; `data.source` names an entry of SOURCES.
    split: "train", "val" or "test".
    split_dir: the workdir, where a seeded split is kept.
  """
  return SOURCES[cfg.data.source](cfg, split, split_dir)


def _make_synthetic(cfg: Config, split: str, split_dir: pathlib.Path) -> Source:
  del split_dir
  return SyntheticSource(cfg.data, split, cfg.model.dims, cfg.seed)


def _make_folder(cfg: Config, split: str, split_dir: pathlib.Path) -> Source:
  return FolderSource(cfg.data, split, split_dir, cfg.model.dims, cfg.seed)


# --- Mirrored borders ---------------------------------------------------------


def mirror_pad(array: np.ndarray, pads: Sequence[geometry.Pad]) -> np.ndarray:
  """Mirrors the first len(pads) axes about their first and last elements.

  A pad longer than the axis runs back and forth; an axis of one element is
  repeated.

  Args:
    array: [*S, ...].
    pads: elements before and after each axis of *S.

  Returns:
    The padded array, same dtype.
  """
  starts = [-pad.before for pad in pads]
  sizes = [
    pad.before + n + pad.after
    for pad, n in zip(pads, array.shape, strict=False)
  ]
  return _mirrored_window(array, starts, sizes)


def pad_for_network(image: np.ndarray, depth: int, padding: str) -> np.ndarray:
  """Mirror-pads an image of any size so that the network predicts all of it.

  The output for the padded image starts at the image's first pixel; cut it to
  the image's size.

  Args:
    image: [*S, C].
    depth: number of poolings.
    padding: "same" or "valid".

  Returns:
    The padded image [*P, C].
  """
  pads = [geometry.plan_pad(n, depth, padding) for n in image.shape[:-1]]
  return mirror_pad(image, pads)


def random_crop(
  example: Mapping[str, np.ndarray],
  crop_size: Sequence[int],
  margin: int,
  rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Cuts the network's input tile out of an example, at a uniform position.

  The output window (the tile less `margin` on every side) lies inside the
  image, or the image inside the window where it is smaller. Whatever of the
  tile lies outside is mirrored and has weight 0.

  Args:
    example: arrays [*S, ...] by name, with "weight" [*S].
    crop_size: the tile's size.
    margin: pixels that the network loses on each side; 0 for padding="same".
    rng: decides the position.

  Returns:
    The same names, arrays [*crop_size, ...].
  """
  size = example["weight"].shape
  starts, inside = [], np.ones((), np.float32)
  for n, crop in zip(size, crop_size, strict=True):
    slack = n - (crop - 2 * margin)
    start = int(rng.integers(min(slack, 0), max(slack, 0) + 1)) - margin
    positions = np.arange(start, start + crop)
    within = (positions >= 0) & (positions < n)
    inside = inside[..., None] * within.astype(np.float32)
    starts.append(start)
  cut = {k: _mirrored_window(a, starts, crop_size) for k, a in example.items()}
  return cut | {"weight": cut["weight"] * inside}


def _mirrored_window(
  array: np.ndarray, starts: Sequence[int], sizes: Sequence[int]
) -> np.ndarray:
  """The window [start, start + size) of each axis of a mirrored array."""
  for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
    n = array.shape[axis]
    # A triangle wave: 0 1 2 1 0 1 ... for n = 3.
    index = np.arange(start, start + size) % max(2 * (n - 1), 1)
    array = array.take(n - 1 - abs(index - (n - 1)), axis)
  return array


# --- Training -----------------------------------------------------------------


def train_batches(
  source: Source,
  normalization: Mapping[str, Any],
  *,
  cfg: Config,
  first_step: int,
  host: int = 0,
  num_hosts: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """This host's batches of steps first_step, first_step + 1, ... for ever.

  Each epoch is a new permutation; a batch may span two, so none is cut short.
  All hosts' batches, concatenated, are that of a single host.

  Args:
    source: the training split.
    normalization: from `fit_normalization`.
    cfg: the run; `train.batch_size` counts all hosts.
    first_step: step of the first batch.
    host: index of this host.
    num_hosts: must divide the batch size.

  Returns:
    Batches of b = batch_size / num_hosts examples: id int32 [b], image float32
    [b, *crop_size, C], label int32 and weight float32 [b, *crop_size], also
    with padding="valid" (the loss cuts them), valid float32 [b], all 1.

  Raises:
    UserError: the batch cannot be divided, or (iterating) a file is damaged.
  """
  batch_size, depth = cfg.train.batch_size, len(cfg.model.widths) - 1
  _check_hosts(batch_size, num_hosts, "config.train.batch_size")
  is_valid = cfg.model.padding == "valid"
  margin = geometry.valid_loss(depth) // 2 if is_valid else 0

  def load(step: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    examples = []
    mine = _host_slice(batch_size, host, num_hosts)
    for j in range(mine.start, mine.stop):
      example = dict(source[int(ids[j])])
      example.pop("instances", None)
      example["image"] = normalize.normalize(example["image"], normalization)
      # By position, not by id: a small source repeats an id within a batch.
      rng = np.random.default_rng((cfg.seed, step * batch_size + j))
      examples.append(random_crop(example, cfg.data.crop_size, margin, rng))
    return _stack(ids[mine], examples, np.ones(len(examples)))

  order = grain.MapDataset.range(len(source)).seed(cfg.seed).shuffle().repeat()
  batches = order.batch(batch_size).map_with_index(load)
  return _prefetch(batches, first_step, cfg.data.num_threads)


# --- Evaluation ---------------------------------------------------------------


def eval_batches(
  source: Source,
  normalization: Mapping[str, Any],
  *,
  cfg: Config,
  num_devices: int,
  host: int = 0,
  num_hosts: int = 1,
  ids: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """This host's batches that hold every example once, whole, at its own size.

  Batches hold images of one padded size (few, by `geometry`), no more than
  `eval.batch_size` and `eval.batch_pixels` allow but at least one a device, and
  are filled up with repeated examples of valid=0.

  Args:
    source: any split.
    normalization: from `fit_normalization`.
    cfg: the run.
    num_devices: over all hosts; divides every global batch.
    host: index of this host, of `num_hosts`.
    num_hosts: must divide `num_devices`.
    ids: the examples wanted; None = all.

  Returns:
    Batches, equally many on each host: id int32 [b], image float32 [b, *P, C]
    normalised and mirror-padded, label int32 and weight float32 [b, *O] on the
    grid of the network's output, which starts at the image's first pixel (*O =
    *P for "same"; weight 0 beyond the image), valid float32 [b].

  Raises:
    UserError: (iterating) a file is damaged.
  """
  _check_hosts(num_devices, num_hosts, "the number of devices")
  depth, padding = len(cfg.model.widths) - 1, cfg.model.padding
  ids = range(len(source)) if ids is None else ids
  plan = _plan_eval({i: source.size(i) for i in ids}, cfg, num_devices)

  def load(planned: _PlannedBatch) -> dict[str, np.ndarray]:
    mine = _host_slice(len(planned.ids), host, num_hosts)
    examples = [
      _load_whole(source, i, normalization, depth, padding)
      for i in planned.ids[mine]
    ]
    valid = np.arange(len(planned.ids))[mine] < planned.num_valid
    return _stack(planned.ids[mine], examples, valid)

  batches = grain.MapDataset.source(plan).map(load)
  return _prefetch(batches, 0, cfg.data.num_threads)


def _load_whole(
  source: Source,
  index: int,
  normalization: Mapping[str, Any],
  depth: int,
  padding: str,
) -> dict[str, np.ndarray]:
  """The image padded for the network; label and weight for its output, by 0."""
  example = source[index]
  image = normalize.normalize(example["image"], normalization)
  image = pad_for_network(image, depth, padding)
  after = [
    (0, geometry.output_size(padded, depth, padding) - n)
    for padded, n in zip(image.shape, example["label"].shape, strict=False)
  ]
  return {
    "image": image,
    "label": np.pad(example["label"], after),
    "weight": np.pad(example["weight"], after),
  }


@dataclasses.dataclass(frozen=True)
class _PlannedBatch:
  """Examples of one global batch; those from `num_valid` on only fill it."""

  ids: tuple[int, ...]
  num_valid: int


def _plan_eval(
  sizes: Mapping[int, tuple[int, ...]], cfg: Config, num_devices: int
) -> list[_PlannedBatch]:
  """Global batches for examples of the given sizes, smallest shapes first."""
  depth = len(cfg.model.widths) - 1
  groups: dict[tuple[int, ...], list[int]] = {}
  for i, size in sizes.items():
    pads = [geometry.plan_pad(n, depth, cfg.model.padding) for n in size]
    shape = tuple(
      p.before + n + p.after for p, n in zip(pads, size, strict=True)
    )
    groups.setdefault(shape, []).append(i)
  plan = []
  for shape, ids in sorted(groups.items()):
    most = min(cfg.eval.batch_size, cfg.eval.batch_pixels // math.prod(shape))
    most = max(most // num_devices, 1) * num_devices
    # As equal as possible, so that few images only fill.
    num_batches = -(-len(ids) // most)
    batch_size = -(-len(ids) // (num_batches * num_devices)) * num_devices
    for start in range(0, len(ids), batch_size):
      chosen = ids[start : start + batch_size]
      fill = [chosen[-1]] * (batch_size - len(chosen))
      plan.append(_PlannedBatch((*chosen, *fill), len(chosen)))
  return plan


# --- Both ---------------------------------------------------------------------


def _check_hosts(number: int, num_hosts: int, name: str) -> None:
  if number % num_hosts:
    above = -(-number // num_hosts) * num_hosts
    raise UserError(
      f"{name}={number} is not divisible by {num_hosts} hosts; nearest: {above}"
    )


def _host_slice(batch_size: int, host: int, num_hosts: int) -> slice:
  local = batch_size // num_hosts
  return slice(host * local, (host + 1) * local)


def _stack(
  ids: Sequence[int],
  examples: Sequence[Mapping[str, np.ndarray]],
  valid: np.ndarray,
) -> dict[str, np.ndarray]:
  names = ("image", "label", "weight")
  batch = {name: np.stack([e[name] for e in examples]) for name in names}
  return batch | {
    "id": np.asarray(ids, np.int32),
    "valid": np.asarray(valid, np.float32),
  }


def _prefetch(
  batches: grain.MapDataset, first: int, num_threads: int
) -> Iterator[Any]:
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


# The choices of config.data.source.
SOURCES = {"synthetic": _make_synthetic, "folder": _make_folder}
