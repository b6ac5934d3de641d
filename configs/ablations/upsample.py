"""How to upsample: learned, linear, linear with aligned corners.

python -m unet_jax.main --mode ablate --config configs/ablations/upsample.py \
    --workdir runs/upsample
python -m unet_jax.main --mode report --workdir runs/upsample

On real data: `--config configs/ablations/upsample.py:isbi2012
--config.data.dir=DIR` (or `:dsb2018`).
"""

import ml_collections

from unet_jax.studies import bases
from unet_jax.studies.sweep import Arm, baseline, grid


def get_config(data: str = "synthetic") -> ml_collections.ConfigDict:
  """The base of every arm."""
  return bases.get_base(data)


def sweep() -> list[Arm]:
  """The three ways."""
  ways = ("linear", "linear_aligned")
  return baseline({}, "transpose") + grid({"model.up": ways})
