"""From the ids in a mask to classes."""

import numpy as np

from unet_jax.errors import UserError
from unet_jax.schema import DataConfig


def to_classes(
  ids: np.ndarray, cfg: DataConfig, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Class ids int32 [*S] and weights float32 [*S] of a mask's ids int [*S].

  By `data.mask_values` and `data.num_classes`; `data.ignore_label` becomes
  class 0 with weight 0.

  Raises:
    UserError: an id is none of them; `name` says in which mask.
  """
  values = cfg.mask_values or tuple(range(max(cfg.num_classes, 2)))
  # File id -> class; entry 256 stands for every id that is no byte.
  lookup = np.full(257, -1, np.int32)
  lookup[list(values)] = range(len(values))
  label = lookup[np.where((ids < 0) | (ids > 255), 256, ids)]
  ignored = np.zeros(ids.shape, bool)
  if cfg.ignore_label is not None:
    ignored = ids == cfg.ignore_label
  unknown = (label < 0) & ~ignored
  if unknown.any():
    found, counts = np.unique(ids[unknown], return_counts=True)
    listed = [f"{i} ({n} pixels)" for i, n in zip(found, counts, strict=True)]
    known = ", ".join(map(str, values))
    raise UserError(
      f"{name}: label ids {', '.join(listed[:5])}"
      f"{', ...' if len(listed) > 5 else ''} are none of"
      f" {known if cfg.mask_values else f'0..{values[-1]}'}; set"
      " config.data.ignore_label= (counts nowhere), config.data.mask_values="
      " (the id of each class, such as 0,255) or config.data.num_classes="
    )
  label[ignored] = 0
  return label, (~ignored).astype(np.float32)
