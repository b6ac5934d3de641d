"""Short and long skips (Drozdzal et al. 2016): both, either, none.

python -m unet_jax.main --mode ablate --config configs/ablations/short_long.py \
    --workdir runs/short_long
python -m unet_jax.main --mode report --workdir runs/short_long

On real data: `--config configs/ablations/short_long.py:isbi2012
--config.data.dir=DIR` (or `:dsb2018`).
"""

import ml_collections

from unet_jax.studies import bases
from unet_jax.studies.sweep import Arm, arm, baseline


def get_config(data: str = "synthetic") -> ml_collections.ConfigDict:
  """The base of every arm."""
  return bases.get_base(data)


def sweep() -> list[Arm]:
  """The four combinations; long skips alone are the baseline."""
  return (
    baseline({}, "long")
    + arm({"model.residual": True}, "long_and_short")
    + arm({"model.residual": True, "model.skip": "none"}, "short")
    + arm({"model.skip": "none"}, "neither")
  )
