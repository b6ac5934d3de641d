"""Membranes in electron microscopy (ISBI 2012 challenge, 512 x 512 grey).

python -m unet_jax.main --config configs/isbi2012.py --config.data.dir=DIR \
    --workdir runs/isbi2012

DIR as in configs/folder.py, masks with 0 = membrane and 1 = cell interior.
The score is the membrane's: "all interior" would reach a Dice of 0.89.
About 20 minutes on two CPU cores; membrane IoU 0.67 on val, as
docs/first_runs.md shows.
"""

import ml_collections

from unet_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  """A small U-Net with the augmentation of the paper."""
  config = default_config()
  config.model.widths = (16, 32, 64, 128)
  config.data.source = "folder"
  config.data.num_classes = 2
  config.data.channels = 1
  config.data.crop_size = (128,)
  config.augment.rotate = 45.0
  config.augment.elastic = 5.0
  config.augment.brightness = 0.2
  config.augment.contrast = 0.2
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 50
  config.optimizer.clip_norm = 1.0
  config.eval.foreground = (0,)
  config.train.num_steps = 800
  config.train.batch_size = 8
  config.train.eval_every = 200
  config.train.checkpoint_every = 200
  return config
