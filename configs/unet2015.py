"""U-Net as in its paper, on membranes in electron microscopy (ISBI 2012).

python -m unet_jax.main --config configs/unet2015.py --config.data.dir=DIR \
    --workdir runs/unet2015

DIR as in configs/isbi2012.py. 31 million parameters, made for a GPU: a step is
one tile of 572 x 572 and takes 3 s on two CPU cores. `:small` has an eighth of
the channels. Objects are the connected cells; with DIR/instances of their ids:
--config.data.weight_map=instances. Learning rate, schedule, number of steps and
sizes of shift and of changes in grey are not in the paper; the rest is.
"""

import ml_collections

from unet_jax.config import default_config


def get_config(size: str = "paper") -> ml_collections.ConfigDict:
  """Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, section 3."""
  config = default_config()
  if size == "small":
    config.model.widths = (8, 16, 32, 64, 128)
    config.model.padding = "valid"
    config.model.norm = "none"
    config.model.dropout = 0.5
  else:
    config.model.preset = "unet2015"
  config.data.source = "folder"
  config.data.num_classes = 2
  config.data.crop_size = (572,)
  config.data.weight_map = "components"
  config.data.w0 = 10.0
  config.data.sigma = 5.0
  config.data.separate = True
  config.augment.flip = False
  config.augment.turn = False
  config.augment.shift = 0.1
  config.augment.rotate = 180.0
  config.augment.elastic = 10.0
  config.augment.elastic_grid = 3
  config.augment.brightness = 0.2
  config.augment.contrast = 0.2
  config.loss.terms = ("cross_entropy",)
  config.loss.balanced = True
  config.optimizer.name = "sgd"
  config.optimizer.learning_rate = 1e-3
  config.optimizer.momentum = 0.99
  config.optimizer.schedule = "constant"
  config.optimizer.weight_decay = 0.0
  config.eval.foreground = (0,)
  config.train.num_steps = 20_000
  config.train.batch_size = 1
  config.train.eval_every = 500
  config.train.checkpoint_every = 500
  return config
