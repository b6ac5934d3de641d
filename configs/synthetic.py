"""Cells that the program draws itself: the first run, no download.

python -m unet_jax.main --config configs/synthetic.py --workdir runs/first

About two minutes on two CPU cores; foreground Dice of at least 0.95 on
held-out images. The argument is the number of spatial axes: `:1`, `:2`, `:3`.
"""

import ml_collections

from unet_jax.config import default_config


def get_config(dims: str = "2") -> ml_collections.ConfigDict:
  """The config of the demo."""
  config = default_config()
  config.model.dims = int(dims)
  config.model.widths = (16, 32, 64)
  config.data.source = "synthetic"
  config.data.crop_size = (64,)
  config.data.synthetic_size = (64,)
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 20
  config.train.num_steps = 300
  config.train.batch_size = 8
  return config
