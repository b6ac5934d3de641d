"""Crops with more of what is rare: a pixel that they hold, a box pasted in."""

from collections.abc import Mapping, Sequence

import numpy as np


def choose_pixel(
  example: Mapping[str, np.ndarray],
  classes: Sequence[int],
  rng: np.random.Generator,
) -> tuple[int, ...] | None:
  """A counted pixel of one of `classes`, or None where there is none.

  Each class that the example has is as likely, and so is each of its pixels.
  """
  counted = np.where(example["weight"] > 0, example["label"], -1)
  present = [k for k in classes if (counted == k).any()]
  if not present:
    return None
  places = np.flatnonzero(counted == rng.choice(present))
  return np.unravel_index(rng.choice(places), counted.shape)


def paste_box(
  crop: Mapping[str, np.ndarray],
  other: Mapping[str, np.ndarray],
  rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """CutMix: a box of `other` in the place of the same box, mask and all.

  The box has the share 1 - u of the crop's pixels, u uniform on [0, 1], the
  crop's proportions and a uniform centre, and is cut at the crop's border.

  Reference: Yun et al. 2019, https://arxiv.org/abs/1905.04899, equation 2; for
  masks French et al. 2020, https://arxiv.org/abs/1906.01916.
  """
  size = crop["label"].shape
  share = (1 - rng.uniform()) ** (1 / len(size))
  box = []
  for n in size:
    centre, side = rng.uniform(0, n), share * n
    start, stop = round(centre - side / 2), round(centre + side / 2)
    box.append(slice(max(start, 0), max(stop, 0)))
  mixed = {name: array.copy() for name, array in crop.items()}
  for name, array in mixed.items():
    array[tuple(box)] = other[name][tuple(box)]
  return mixed
