"""What a config for a data set should say, from what was read of it."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unet_jax import geometry
from unet_jax.config import Config
from unet_jax.data.check import IGNORED, Facts

# Largest side of a crop, and input pixels of a batch, by spatial axes.
_CROP = {1: 1024, 2: 256, 3: 64}
_BATCH_PIXELS = {1: 2**15, 2: 2**18, 3: 2**19}
_MOST_EXAMPLES = 16
# More label ids than these are instances or colours, hardly classes.
_MOST_CLASSES = 64
_MOST_WEIGHT = 20.0


class Proposal(NamedTuple):
  """A field of the config, its value, and why."""

  field: str
  value: Any
  why: str


def propose(cfg: Config, facts: Sequence[Facts]) -> list[Proposal]:
  """Fields that suit the examples; those that nothing is known of are left out.

  Labels stay as the config has them where it fits all masks.
  """
  train = [f for f in facts if f.split == "train"] or list(facts)
  ids = count_ids(facts)
  found, classes = [], _classes(cfg, facts, ids)
  if classes:
    found += classes
    found += _weights(classes, count_ids(train))
  images = [f for f in train if f.size]
  if images and cfg.data.source != "tokens":  # No values, no crops.
    found += _channels(cfg, [f for f in facts if f.size])
    found += _normalize(images)
    crop = _crop_size(cfg, images)
    found += [crop, _batch_size(cfg, crop.value, len(train))]
  return found


def to_flags(cfg: Config, proposals: Sequence[Proposal]) -> str:
  """The line of command-line overrides."""
  needed = [
    p for p in proposals if p.value != () or current(cfg, p.field) != ()
  ]
  return " ".join(f"--config.{p.field}={_text(p.value)}" for p in needed)


def current(cfg: Config, field: str) -> Any:
  """The value that the config has of a dotted field."""
  section, name = field.split(".")
  return getattr(getattr(cfg, section), name)


def count_ids(facts: Sequence[Facts]) -> dict[int, int]:
  """Pixels of each label id over all masks, ids ascending."""
  total: Counter[int] = Counter()
  for f in facts:
    total.update(f.ids or {})
  return {i: total[i] for i in sorted(total)}


def _text(value: Any) -> str:
  if isinstance(value, tuple):
    return ",".join(map(_text, value))
  return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _classes(
  cfg: Config, facts: Sequence[Facts], ids: dict[int, int]
) -> list[Proposal]:
  """num_classes, mask_values, ignore_label; nothing if ids are no classes."""
  data, seen = cfg.data, set(ids) - {IGNORED}
  values = data.mask_values or tuple(range(cfg.num_labels))
  allowed = {*values} | ({data.ignore_label} - {None})
  if seen and seen <= allowed and seen >= set(values):
    why = "the config fits all masks"
    kept = ("num_classes", "mask_values", "ignore_label")
    return [Proposal(f"data.{k}", getattr(data, k), why) for k in kept]
  outside = not seen or min(seen) < 0 or max(seen) > 255
  if outside or len(seen) > _MOST_CLASSES:
    return []
  ignored = data.ignore_label if data.ignore_label in seen else None
  # 255 beside low ids is the usual mark of what counts nowhere.
  if ignored is None and 255 in seen and len(seen) > 2:
    if other_encoding(facts):
      seen -= {255}
    else:
      ignored = 255
  classes = sorted(seen - {ignored})
  if len(classes) < 2:  # The other class is in no mask.
    classes = [0, max(classes, default=0) or 1]
  count = len(classes)
  is_plain = classes == list(range(count))
  listed = ", ".join(map(str, sorted(seen)))
  one = count == 2 and data.num_classes != 2
  why = f"label ids found: {listed}"
  return [
    Proposal("data.num_classes", 1 if one else count, why),
    Proposal(
      "data.mask_values",
      () if is_plain else tuple(classes),
      "files hold class ids" if is_plain else "the id of class 0, 1, ...",
    ),
    Proposal(
      "data.ignore_label",
      ignored,
      "all ids are classes"
      if ignored is None
      else f"{ignored} beside low ids usually counts nowhere",
    ),
  ]


def other_encoding(facts: Sequence[Facts]) -> list[Facts]:
  """Masks of 0 and 255 alone, if 255 is in no other but 1 is: to be mended."""
  pairs = [f for f in facts if f.ids and 255 in f.ids]
  alone = all(set(f.ids) <= {0, 255} for f in pairs)
  plain = any(1 in f.ids for f in facts if f.ids)
  return pairs if alone and plain else []


def _weights(
  classes: Sequence[Proposal], ids: dict[int, int]
) -> list[Proposal]:
  """w_k = N / (K n_k), so that each class weighs the same; at most 20."""
  num_classes, values, _ = (p.value for p in classes)
  values = values or tuple(range(max(num_classes, 2)))
  counts = [ids.get(i, 0) for i in values]
  total = sum(counts)
  if not total:
    return []
  weights = tuple(
    round(min(total / (len(counts) * n), _MOST_WEIGHT), 3) if n else 1.0
    for n in counts
  )
  why = "pixels over (classes x pixels of the class), of train, at most 20"
  return [Proposal("loss.class_weights", weights, why)]


def _channels(cfg: Config, images: Sequence[Facts]) -> list[Proposal]:
  kinds = sorted({f.channels for f in images})
  mixed = kinds == [1, 3]
  if len(kinds) > 1 and not mixed:
    return []
  value = 3 if mixed else kinds[0]
  why = f"channels of the images: {', '.join(map(str, kinds))}"
  if cfg.data.channels in (1, 3) and set(kinds) <= {1, 3} and mixed:
    value = cfg.data.channels
  return [Proposal("data.channels", value, why)]


def _normalize(images: Sequence[Facts]) -> list[Proposal]:
  """Image by image where images differ more than pixels within them."""
  means = np.array([f.mean for f in images])
  stds = np.array([f.std for f in images])
  within = math.sqrt(float(np.mean(stds**2)))
  between = float(means.std())
  low, high = np.quantile(stds[stds > 0], (0.1, 0.9)) if stds.any() else (1, 1)
  alike = between <= 0.5 * within and high <= 2 * low
  why = (
    f"means of images differ by {between:.3g}, pixels within them by"
    f" {within:.3g}; contrasts by a factor of {high / low:.2g}"
  )
  return [Proposal("data.normalize", "dataset" if alike else "image", why)]


def _crop_size(cfg: Config, images: Sequence[Facts]) -> Proposal:
  """The largest legal size up to nearly all images' and a limit."""
  dims, rule = cfg.model.dims, cfg.model.size_rule
  sides = np.quantile([f.size for f in images], 0.1, axis=0, method="lower")
  margin, sizes = geometry.margin(cfg.model.depth, rule), []
  for axis, side in enumerate(sides.astype(int).tolist()):
    depth = cfg.model.depths[axis]
    # With valid padding the tile is larger than what it predicts.
    most = min(side, _CROP[dims]) + 2 * margin
    shared = axis == 0 and cfg.parallel.space > 1
    step = cfg.parallel.space * 2**depth if shared else 1
    fits = lambda n, step=step, depth=depth: (
      geometry.is_legal(n, depth, rule) and n % step == 0
    )
    smallest = next(n for n in itertools.count(1) if fits(n))
    sizes.append(next(filter(fits, range(most, 0, -1)), smallest))
  text = " x ".join(map(str, sides.astype(int).tolist()))
  why = f"legal for the network; nine of ten images have at least {text}"
  return Proposal("data.crop_size", tuple(sizes), why)


def _batch_size(
  cfg: Config, crop_size: tuple[int, ...], num_train: int
) -> Proposal:
  """A power of two times `train.accumulate`, of about as many pixels."""
  pixels = _BATCH_PIXELS[cfg.model.dims]
  most = min(pixels // math.prod(crop_size), _MOST_EXAMPLES, num_train)
  size = 2 ** int(math.log2(max(most, 1)))
  if cfg.model.skip == "shuffle":
    size = max(size, 2)
  size *= cfg.train.accumulate
  why = f"about {pixels:,} pixels, no more than train has; divide by devices"
  return Proposal("train.batch_size", size, why)
