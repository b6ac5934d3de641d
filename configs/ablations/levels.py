"""Which levels need their skip? All subsets of the three wires.

python -m unet_jax.main --mode ablate --config configs/ablations/levels.py \
    --workdir runs/levels
python -m unet_jax.main --mode report --workdir runs/levels

Level 0 is full resolution; `skip_levels=0+1+1` cuts it alone.

On real data: `--config configs/ablations/levels.py:isbi2012
--config.data.dir=DIR` (or `:dsb2018`).
"""

import itertools

import ml_collections

from unet_jax.studies import bases
from unet_jax.studies.sweep import Arm, baseline, grid


def get_config(data: str = "synthetic") -> ml_collections.ConfigDict:
  """The base of every arm."""
  return bases.get_base(data)


def sweep() -> list[Arm]:
  """All subsets but the whole, which is the baseline."""
  subsets = itertools.product((False, True), repeat=3)
  cut = tuple(levels for levels in subsets if not all(levels))
  return baseline({}, "all_on") + grid({"model.skip_levels": cut})
