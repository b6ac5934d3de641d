"""Which skip for how hard a texture? After Kamath et al. 2023, synthetic.

python -m unet_jax.main --mode ablate --config configs/ablations/texture.py \
    --workdir runs/texture
python -m unet_jax.main --mode report --workdir runs/texture

Cells differ from the background by their grain alone, less and less so over
five difficulties, each with `concat` for its baseline. Every network is also
scored on the split "shifted": the cells of test, harder to tell than those
that it was trained on.
"""

import ml_collections

from unet_jax.studies import bases
from unet_jax.studies.sweep import Arm, arm, baseline, within

# How much of a cell's grain is the background's.
SIMILARITIES = (0.0, 0.2, 0.4, 0.6, 0.7)


def get_config(data: str = "synthetic") -> ml_collections.ConfigDict:
  """The base of every arm; there is no other data than synthetic."""
  config = bases.get_base(data)
  config.data.synthetic_texture = SIMILARITIES[0]
  config.data.synthetic_shift = 0.15
  return config


def sweep() -> list[Arm]:
  """Four networks at each difficulty."""
  networks = (
    baseline({}, "concat")
    + arm({"model.skip": "none"}, "none")
    + arm({"model.skip": "attn_oktay"}, "attn_oktay")
    + arm({"model.decoder": "nested"}, "nested")
  )
  return [
    a
    for similarity in SIMILARITIES
    for a in within({"data.synthetic_texture": similarity}, networks)
  ]
