"""Is it the information, or the capacity? Skips that carry nothing.

python -m unet_jax.main --mode ablate --config configs/ablations/controls.py \
    --workdir runs/controls
python -m unet_jax.main --mode report --workdir runs/controls

`none` has no wire, `none_wide` as many parameters as `concat`; `zeros`,
`noise`, `shuffle` and `dup` keep the wire and replace what it carries.

On real data: `--config configs/ablations/controls.py:isbi2012
--config.data.dir=DIR` (or `:dsb2018`).
"""

import ml_collections

from unet_jax.studies import bases
from unet_jax.studies.sweep import Arm, arm, baseline, grid


def get_config(data: str = "synthetic") -> ml_collections.ConfigDict:
  """The base of every arm."""
  return bases.get_base(data)


def sweep() -> list[Arm]:
  """Concatenation against its controls."""
  wide = {"model.skip": "none", "model.widths": (8, 17, 34, 67)}
  return (
    baseline({}, "concat")
    + grid({"model.skip": ("none",)})
    + arm(wide, "none_wide")
    + grid({"model.skip": ("zeros", "noise", "shuffle", "dup")})
  )
