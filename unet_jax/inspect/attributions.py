"""Attributions of a score to pixels, and the network with hooks to explain.

The methods take any function of an image, so that tests ask them about
functions whose answer is known.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.config import Config
from unet_jax.data import pipeline
from unet_jax.models import blocks, skips

# Points on the path of integrated gradients.
_STEPS = 32
# The blocks of a network, by level; those of a nested decoder by column too.
BLOCK = re.compile(r"(encoder|decoder)_(\d+)(?:_\d+)?")

# An image [*S, C] to a number.
Score = Callable[[jax.Array], jax.Array]


def integrated_gradients(
  score: Score, image: jax.Array, baseline: jax.Array, steps: int = _STEPS
) -> jax.Array:
  """What each value adds to the score on the way from the baseline: [*S, C].

    (x - b) 1/n sum_{k < n} grad f(b + (k + 1/2) / n (x - b))

  Their sum is f(x) - f(b), up to the error of the midpoint rule.

  Reference: Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, eq. 1.
  """
  gradient, total = jax.grad(score), jnp.zeros_like(image)
  for k in range(steps):
    total += gradient(baseline + (k + 0.5) / steps * (image - baseline))
  return (image - baseline) * total / steps


def occlusion(
  score: Score, image: jax.Array, window: Sequence[int]
) -> np.ndarray:
  """What the score loses when a window shows the image's mean: [*S].

  Windows tile the image; every pixel has the number of its window.

  Reference: Zeiler & Fergus 2014, https://arxiv.org/abs/1311.2901, section 4.2.
  """
  sizes = image.shape[:-1]
  fill = np.asarray(image).mean(tuple(range(len(sizes))))
  whole, out = score(image), np.zeros(sizes, np.float32)
  starts = map(range, itertools.repeat(0), sizes, window)
  for start in itertools.product(*starts):
    place = tuple(slice(i, i + n) for i, n in zip(start, window, strict=True))
    covered = np.array(image)
    covered[place] = fill
    out[place] = whole - score(jnp.asarray(covered))
  return out


def receptive_field(score: Score, image: jax.Array) -> jax.Array:
  """|d score / d x| summed over channels: [*S], for the score of one pixel.

  Reference: Luo et al. 2016, https://arxiv.org/abs/1701.04128, section 2.
  """
  return jnp.abs(jax.grad(score)(image)).sum(-1)


def seg_grad_cam(activation: jax.Array, gradient: jax.Array) -> jax.Array:
  """relu(sum_c mean(gradient_c) activation_c): [*S, C] each -> [*S].

  Reference: Vinogradova et al. 2020, https://arxiv.org/abs/2002.11434, eq. 2;
    there with the logit in place of its log odds.
  """
  axes = tuple(range(activation.ndim - 1))
  return nn.relu((gradient.mean(axes, keepdims=True) * activation).sum(-1))


def log_odds(logits: jax.Array, k: int) -> jax.Array:
  """The log odds of class `k`, log p_k / (1 - p_k), of [..., K]."""
  if logits.shape[-1] == 1:
    return logits[..., 0]
  others = jnp.delete(logits, k, axis=-1, assume_unique_indices=True)
  return logits[..., k] - jax.nn.logsumexp(others, axis=-1)


# --- The network with hooks ---------------------------------------------------


class Trace(NamedTuple):
  """One pass: logits [*S, K], block features by name, gates by name."""

  logits: jax.Array
  features: dict[str, jax.Array]
  gates: dict[str, list[jax.Array]]


def make_trace(
  cfg: Config, model: nn.Module, size: tuple[int, ...]
) -> Callable[..., Trace]:
  """The network on a normalised image [*S, C] of one size.

  The function takes the variables and the image; `add`, what to add to each
  block's output; and `keep` [depth], the factor on what arrives sideways at
  each level.
  """
  depths, rule = cfg.model.depths, cfg.model.size_rule
  flat = np.arange(np.prod(size), dtype=np.int32).reshape(*size, 1)
  index = pipeline.pad_for_network(flat, depths, rule, cfg.data.pad_multiple)
  window = tuple(slice(0, n) for n in size)

  def trace(
    variables: Any, image: jax.Array, add: Any = None, keep: Any = None
  ) -> Trace:
    features = {}

    def hook(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
      module = context.module
      if context.method_name != "__call__":
        return call(*args, **kwargs)
      if isinstance(module, skips.Join) and keep is not None:
        sides = [keep[module.level].astype(x.dtype) * x for x in args[0].sides]
        args = (args[0]._replace(sides=sides), *args[1:])
      y = call(*args, **kwargs)
      name = str(module.name)
      if isinstance(module, blocks.ConvBlock) and BLOCK.fullmatch(name):
        y = y if add is None else y + add[name]
        features[name] = y
      return y

    x = image.reshape(-1, image.shape[-1])[index[..., 0]][None]
    with nn.intercept_methods(hook):
      logits, state = model.apply(variables, x, mutable=["intermediates"])
    gates = {}
    for path, value in jax.tree_util.tree_leaves_with_path(state):
      name = next(p.key for p in path if str(p.key).startswith("skip_"))
      gates.setdefault(name, []).append(value[0])
    features = {k: x[0] for k, x in features.items()}
    return Trace(logits[0][window], features, gates)

  return jax.jit(trace)
