"""Whether a denser decoder helps, or only a larger network.

python -m unet_jax.main --mode ablate --config configs/ablations/decoder.py \
    --workdir runs/decoder
python -m unet_jax.main --mode report --workdir runs/decoder

`plain_wide` has the parameters of the nested decoder; the `_matched` arms have
those of the plain one.

On real data: `--config configs/ablations/decoder.py:isbi2012
--config.data.dir=DIR` (or `:dsb2018`).
"""

import ml_collections

from unet_jax.studies import bases
from unet_jax.studies.sweep import Arm, arm, baseline, grid


def get_config(data: str = "synthetic") -> ml_collections.ConfigDict:
  """The base of every arm."""
  return bases.get_base(data)


def sweep() -> list[Arm]:
  """Plain, wide, nested, full-scale; with matched parameters."""
  return (
    baseline({}, "plain")
    + arm({"model.widths": (9, 17, 34, 68)}, "plain_wide")
    + grid({"model.decoder": ("nested", "full_scale")})
    + arm(
      {"model.decoder": "nested", "model.widths": (7, 15, 30, 60)},
      "nested_matched",
    )
    + arm(
      {"model.decoder": "full_scale", "model.widths": (7, 14, 28, 55)},
      "full_scale_matched",
    )
  )
