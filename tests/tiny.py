"""The smallest run that has everything: batch norm, augmentation, EMA."""

from unet_jax.config import default_config


def get_config():
  config = default_config()
  config.model.widths = (2, 4)
  config.data.synthetic_size = (16,)
  config.data.crop_size = (16,)
  config.data.synthetic_train = 20
  config.data.synthetic_val = 5
  config.data.synthetic_test = 5
  config.augment.brightness = 0.2
  config.optimizer.learning_rate = 0.02
  config.optimizer.warmup_steps = 2
  config.optimizer.ema_decay = 0.5
  config.train.num_steps = 24
  config.train.batch_size = 8
  config.train.log_every = 5
  config.train.eval_every = 8
  config.train.checkpoint_every = 3
  config.train.num_pictures = 1
  return config
