"""A study of three arms, each the tiny run."""

from tests import tiny
from unet_jax.studies.sweep import baseline, grid


def get_config():
  config = tiny.get_config()
  config.train.num_steps = 6
  config.train.checkpoint_every = 2
  config.study.seeds = (0, 1)
  config.study.num_pictures = 2
  return config


def sweep():
  return baseline({}, "concat") + grid({"model.skip": ("none", "add")})
