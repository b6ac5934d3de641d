"""What the ready studies train: small networks on one of three data sets.

Sizes that two CPU cores carry through many arms and seeds; a study of your own
starts from any config.
"""

import ml_collections

from unet_jax.config import default_config
from unet_jax.errors import UserError


def get_base(data: str) -> ml_collections.ConfigDict:
  """The config that the arms of a ready study change.

  Args:
    data: "synthetic", or "isbi2012" or "dsb2018", whose folder the command line
      names: --config.data.dir=DIR.
  """
  if data not in BASES:
    raise UserError(f"no base {data!r}; choose one of {sorted(BASES)}")
  config = default_config()
  config.model.widths = (8, 16, 32, 64)
  config.optimizer.learning_rate = 3e-3
  config.optimizer.warmup_steps = 20
  config.optimizer.clip_norm = 1.0
  config.train.num_steps = 400
  config.train.batch_size = 8
  config.train.log_every = 50
  config.train.eval_every = 100
  config.train.checkpoint_every = 200
  config.train.num_pictures = 0
  config.study.seeds = (0, 1, 2, 3, 4)
  BASES[data](config)
  return config


def _synthetic(config: ml_collections.ConfigDict) -> None:
  config.data.synthetic_size = (64,)
  config.data.crop_size = (64,)


def _isbi2012(config: ml_collections.ConfigDict) -> None:
  config.data.source = "folder"
  config.data.num_classes = 2
  config.data.crop_size = (96,)
  config.augment.rotate = 45.0
  config.augment.elastic = 5.0
  config.augment.brightness = 0.2
  config.eval.foreground = (0,)  # The membrane.


def _dsb2018(config: ml_collections.ConfigDict) -> None:
  config.data.source = "folder"
  config.data.channels = 3
  config.data.crop_size = (96,)
  config.data.pad_multiple = 64
  config.augment.rotate = 15.0
  config.augment.brightness = 0.3
  config.augment.contrast = 0.3


BASES = {"synthetic": _synthetic, "isbi2012": _isbi2012, "dsb2018": _dsb2018}
