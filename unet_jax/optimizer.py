"""The update rule and its schedule, from plain values.

The learning rate is not part of the optax chain: the train step multiplies the
updates by `-schedule(step)`. So the rate is a function of the step alone; it
survives skipped steps, and a finished run can be extended.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unet_jax.schema import OptimizerConfig

Schedule = Callable[[jax.Array], jax.Array]


def make_schedule(cfg: OptimizerConfig, num_steps: int) -> Schedule:
  """Learning rate of step 0..num_steps - 1, float32.

  Linear warm-up: rate = peak (step + 1) / warmup_steps. Then, with t the share
  of the remaining steps that is done, 0 <= t < 1, and e = end_factor:
    constant: peak; cosine: peak (e + (1 - e) (1 + cos(pi t)) / 2);
    polynomial: peak (e + (1 - e) (1 - t)^power).
  """

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rest = max(num_steps - cfg.warmup_steps, 1)
    t = jnp.clip((step - cfg.warmup_steps) / rest, 0.0, 1.0)
    shape = {
      "constant": jnp.ones_like(t),
      "cosine": (1 + jnp.cos(jnp.pi * t)) / 2,
      "polynomial": (1 - t) ** cfg.power,
    }[cfg.schedule]
    end = 1.0 if cfg.schedule == "constant" else cfg.end_factor
    warmup = jnp.minimum((step + 1) / max(cfg.warmup_steps, 1), 1.0)
    return cfg.learning_rate * warmup * (end + (1 - end) * shape)

  return schedule


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """Clipping, the rule and weight decay; everything but the learning rate."""
  rules = {
    "sgd": lambda: optax.trace(cfg.momentum),
    "adam": lambda: optax.scale_by_adam(cfg.momentum, cfg.b2),
    "adamw": lambda: optax.scale_by_adam(cfg.momentum, cfg.b2),
  }
  parts = [rules[cfg.name]()]
  if cfg.weight_decay:
    decay = optax.add_decayed_weights(cfg.weight_decay, mask=is_kernel)
    # Decoupled: after the moments (Loshchilov and Hutter 2019). Else the decay
    # is part of the gradient, as in PyTorch's SGD and Adam.
    parts = [*parts, decay] if cfg.name == "adamw" else [decay, *parts]
  if cfg.clip_norm:
    parts = [optax.clip_by_global_norm(cfg.clip_norm), *parts]
  return optax.chain(*parts)


def is_kernel(params: Any) -> Any:
  """A tree of bools: True for convolution kernels, False for biases, norms."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == "kernel", params
  )
