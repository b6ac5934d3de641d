"""Hippocampus in MR volumes, front and rear part (Medical Decathlon, task 4).

python -m unet_jax.main --config configs/hippocampus3d.py \
    --config.data.dir=DIR --workdir runs/hippocampus3d

DIR holds images/STEM.nii.gz, masks/STEM.nii.gz (0 = background, 1 = anterior,
2 = posterior), train.txt and val.txt; needs pip install 'unet_jax[nifti]'.
Volumes of about 35 x 50 x 36 voxels of one millimetre, evaluated whole.
1500 steps, under 20 minutes on two quiet CPU cores; mean Dice of the two parts
0.867 on val (15 volumes, one seed; a location prior reaches 0.71).
"""

import ml_collections

from unet_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
  """A small U-Net of three axes; front and rear are classes: no flips."""
  config = default_config()
  config.model.dims = 3
  config.model.widths = (16, 32, 64, 128)
  config.data.source = "volumes"
  config.data.num_classes = 3
  config.data.crop_size = (32, 48, 32)
  config.data.pad_multiple = 8
  config.augment.flip = False
  config.augment.turn = False
  config.augment.rotate = 15.0
  config.augment.scale = 0.2
  config.augment.brightness = 0.2
  config.augment.contrast = 0.2
  config.augment.gamma = 0.2
  config.augment.noise = 0.1
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 30
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.99
  config.train.num_steps = 1500
  config.train.batch_size = 2
  config.train.eval_every = 250
  config.train.checkpoint_every = 250
  return config
