"""Which skip? All kinds that carry the encoder's features.

python -m unet_jax.main --mode ablate --config configs/ablations/skip.py \
    --workdir runs/skip
python -m unet_jax.main --mode report --workdir runs/skip

On real data: `--config configs/ablations/skip.py:isbi2012
--config.data.dir=DIR` (or `:dsb2018`).
"""

import ml_collections

from unet_jax.studies import bases
from unet_jax.studies.sweep import Arm, baseline, grid


def get_config(data: str = "synthetic") -> ml_collections.ConfigDict:
  """The base of every arm."""
  return bases.get_base(data)


def sweep() -> list[Arm]:
  """Every kind against concatenation."""
  kinds = (
    *("none", "add", "mul", "proj", "scalar", "respath", "se", "scse"),
    *("attn_oktay", "attn_same", "uctrans", "udtrans"),
  )
  return baseline({}, "concat") + grid({"model.skip": kinds})
