"""What an exported file holds: from decoded pixels to mask and probabilities.

Any batch and any size: all of it can be traced with symbolic shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from unet_jax import ensemble
from unet_jax.data import windows
from unet_jax.objectives import metrics

# Normalised images [B, *S, C] to probabilities [B, *S', K] and class ids.
Network = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def make_program(
  model: nn.Module,
  normalization: dict[str, Any],
  before: Sequence[int],
  *,
  views: Callable[[Network], Network] = lambda n: n,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """What is exported.

  Args:
    model: the network.
    normalization: as of `normalize.normalize`.
    before: pixels mirrored in front of each axis.
    views: wraps the network, for instance to average over mirrored images.

  Returns:
    A function of weights (by path), images float32 [B, *S, C] as decoded, then
    mirrored, and their sizes int32 [B, dims] before, that gives masks uint8
    [B, *S'] and probabilities float32 [B, *S', K].
  """

  def program(
    weights: dict[str, jax.Array], image: jax.Array, size: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    variables = traverse_util.unflatten_dict(weights, sep="/")

    def network(x: jax.Array) -> tuple[jax.Array, jax.Array]:
      logits = model.apply(variables, x)
      return ensemble.probabilities(logits), metrics.predict_labels(logits)

    def double(image: jax.Array, inside: jax.Array) -> jax.Array:
      with jax.enable_x64(True):  # As numpy does; TPU has no float64.
        return normalize(image, inside, normalization, before, jnp.float64)

    def single(image: jax.Array, inside: jax.Array) -> jax.Array:
      return normalize(image, inside, normalization, before, jnp.float32)

    inside = _inside(image, size, before)
    x = jax.lax.platform_dependent(image, inside, tpu=single, default=double)
    probability, mask = views(network)(x)
    return mask.astype(jnp.uint8), probability

  return program


def average_views(
  views: Sequence[windows.View],
) -> Callable[[Network], Network]:
  """The mean probability over views of the padded image."""

  def wrap(network: Network) -> Network:
    def mean(x: jax.Array) -> tuple[jax.Array, jax.Array]:
      total = 0
      for view in views:
        flips = [axis for axis, flip in enumerate(view.flips, 1) if flip]
        order = (0, *(1 + a for a in view.axes), x.ndim - 1)
        seen = jnp.flip(x.transpose(order), flips)
        probability = jnp.flip(network(seen)[0], flips)
        # Flips and one exchange of axes: the order is its own inverse.
        total += probability.transpose(order)
      probability = total / len(views)
      return probability, ensemble.most_probable(probability)

    return mean

  return wrap


def _inside(
  image: jax.Array, size: jax.Array, before: Sequence[int]
) -> jax.Array:
  """Where [B, *S, 1] the pixels lie that are not mirrored ones."""
  inside = jnp.ones((*image.shape[:-1], 1), bool)
  for axis, start in enumerate(before):
    index = jax.lax.broadcasted_iota(jnp.int32, inside.shape, 1 + axis) - start
    stop = size[:, axis].reshape(-1, *(1,) * (image.ndim - 1))
    inside &= (index >= 0) & (index < jnp.broadcast_to(stop, inside.shape))
  return inside


def normalize(
  image: jax.Array,
  inside: jax.Array,
  normalization: dict[str, Any],
  before: Sequence[int],
  dtype: Any,
) -> jax.Array:
  """`data.normalize` of the pixels inside: the same sums in another order."""
  axes = tuple(range(1, image.ndim - 1))
  channels = lambda x: jnp.asarray(x, dtype).reshape(*(1,) * len(axes), 1, -1)
  if "clip" in normalization:
    image = jnp.clip(image, *_bounds(image, inside, normalization, dtype))
  if normalization["mode"] == "none":
    return image
  x = image.astype(dtype)
  if normalization["mode"] == "image":
    first = x[(slice(None), *(slice(n, n + 1) for n in before))]
    mean_of = lambda y: jnp.mean(y, axes, where=inside, keepdims=True)
    mean = first + mean_of(x - first)
    std = jnp.sqrt(mean_of(jnp.square(x - mean)))
  else:
    mean, std = channels(normalization["mean"]), channels(normalization["std"])
  scale = jnp.where(std > 0, 1 / jnp.where(std > 0, std, 1), 0)
  return ((x - mean) * scale).astype(jnp.float32)


def _bounds(
  image: jax.Array, inside: jax.Array, normalization: dict[str, Any], dtype: Any
) -> list[jax.Array]:
  """The two percentiles [B, ..., C] as numpy interpolates them."""
  spatial = (1,) * (image.ndim - 2)
  pixels = jnp.where(inside, image, jnp.inf)
  pixels = pixels.reshape(image.shape[0], -1, image.shape[-1]).sort(1)
  last = inside.sum(tuple(range(1, image.ndim))).astype(dtype) - 1
  # Else negative places are counted from a symbolic size, in 64 bits, which jax
  # 0.10.2 then takes for the same size where x64 is off.
  within, bounds = "promise_in_bounds", []
  for percent in normalization["clip"]:
    place = (percent / 100 * last)[:, None, None]
    below = jnp.floor(place)
    a, b = (
      jnp.take_along_axis(pixels, i.astype(jnp.int32), 1, mode=within)
      for i in (below, jnp.ceil(place))
    )
    a, b, t = a.astype(dtype), b.astype(dtype), place - below
    step = b - a
    value = jnp.where(t < 0.5, a + step * t, b - step * (1 - t))
    value = value.reshape(value.shape[0], *spatial, value.shape[-1])
    bounds.append(value.astype(jnp.float32))
  return bounds
