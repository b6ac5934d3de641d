"""What all losses share: safe pixels, class factors, weighted means."""

import jax
import jax.numpy as jnp

Array = jax.Array


def center_crop(array: Array, spatial_shape: tuple[int, ...]) -> Array:
  """Cuts equal margins: [B, *S, ...] to [B, *spatial_shape, ...].

  Raises:
    ValueError: a margin is negative, or odd, so that it has no centre.
  """
  cuts = [slice(None)]
  for axis, size in enumerate(spatial_shape, start=1):
    margin = array.shape[axis] - size
    if margin < 0 or margin % 2:
      raise ValueError(
        f"cannot crop axis {axis} of {array.shape} to {size}: the margin"
        f" {margin} must be even and not negative"
      )
    cuts.append(slice(margin // 2, margin // 2 + size))
  return array[tuple(cuts)]


def mask(
  logits: Array, label: Array, weight: Array
) -> tuple[Array, Array, Array]:
  """Makes every pixel safe to compute with.

  Logits in at least float32, 0 where nothing counts; labels always a class;
  weights NaN where a counted label was none.
  """
  counted = weight > 0
  known = (label >= 0) & (label < max(logits.shape[-1], 2))
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  # Masked before the loss, not after: 0 * NaN is NaN, in the gradient too.
  logits = jnp.where(counted[..., None], logits, 0)
  weight = jnp.where(known | ~counted, weight, jnp.nan)
  return logits, jnp.where(known & counted, label, 0), weight


def of_class(class_weights: Array, label: Array) -> Array:
  """class_weights[label], without a gather: on TPU that goes pixel by pixel."""
  is_class = jax.nn.one_hot(label, len(class_weights), dtype=bool)
  return jnp.where(is_class, jnp.asarray(class_weights), 0).sum(-1)


def mean(values: Array, weight: Array) -> Array:
  """sum(weight * values) / sum(weight) of each example, 0 for no weight."""
  return ratio(weight * values, weight)


def ratio(values: Array, weight: Array) -> Array:
  """sum(values) / sum(weight) of each example, sum(values) for no weight."""
  axes = tuple(range(1, values.ndim))
  total = jnp.sum(weight, axis=axes)
  safe_total = jnp.where(total == 0, 1, total)
  return jnp.sum(values, axis=axes) / safe_total


def mean_over_classes(values: Array, class_weights: Array) -> Array:
  """Mean [B] of values [B, F] of the last F classes, under their factors."""
  factors = jnp.asarray(class_weights)[-values.shape[-1] :]
  return mean(values, jnp.broadcast_to(factors[None], values.shape))


def sort_descending(keys: Array, *payload: Array) -> tuple[Array, ...]:
  """`payload` [..., N] by falling keys, and last the places they came from.

  Nothing here has a gradient. `unsort` brings what was made of it back.
  """
  places = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
  operands = jax.lax.stop_gradient((-keys, *payload, places))
  return tuple(jax.lax.sort(operands, num_keys=1))[1:]


def unsort(values: Array, places: Array) -> Array:
  """Values [..., N] back in their places, by a sort in place of a scatter."""
  return jax.lax.sort((places, values), num_keys=1)[1]
