"""Losses of one example each; the caller averages over the batch.

All take `(logits, label, weight, class_weights)`:

  logits         float [B, *S, K]; K == 1 is one sigmoid logit (labels 0 and 1),
                 K >= 2 a softmax over K classes. Any number of spatial axes.
  label          int32 [B, *S], class ids; any id where `weight` is 0.
  weight         float32 [B, *S], >= 0; 0 = the pixel counts nowhere: whatever
                 its label and logits are (255, NaN), its gradient is exactly 0.
  class_weights  float32 [max(K, 2)], >= 0, factor of each class.

and return [B] in float32 (float64 for float64 logits). An example without a
counted pixel has loss 0 and gradient 0. A counted pixel whose label is no class
makes its example NaN: loud, where indexing would wrap or clip.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

# One pixel on both sides of the Dice fraction, in units of `weight`.
DICE_SMOOTHING = 1.0

Array = jax.Array
LossTerm = Callable[[Array, Array, Array, Array], Array]
Loss = Callable[[Array, Array, Array], tuple[Array, dict[str, Array]]]


def make_loss(
  *,
  terms: tuple[str, ...],
  weights: tuple[float, ...],
  class_weights: tuple[float, ...],
) -> Loss:
  """The sum of `weights` times `terms`, names in `LOSSES`, as one function.

  No weights, or no class weights, are 1 each.

  Returns:
    `loss_fn(logits, label, weight) -> (loss, parts)`: the sum [B] and each term
    by name [B], without its factor. Label and weight are centre-cropped to the
    logits where valid padding made those smaller.
  """
  weights = weights or (1.0,) * len(terms)

  def loss_fn(
    logits: Array, label: Array, weight: Array
  ) -> tuple[Array, dict[str, Array]]:
    *_, num_logits = logits.shape
    factors = np.float32(class_weights or (1.0,) * max(num_logits, 2))
    label = center_crop(label, logits.shape[1:-1])
    weight = center_crop(weight, logits.shape[1:-1])
    parts = {t: LOSSES[t](logits, label, weight, factors) for t in terms}
    loss = sum(w * parts[t] for t, w in zip(terms, weights, strict=True))
    return loss, parts

  return loss_fn


def cross_entropy(
  logits: Array, label: Array, weight: Array, class_weights: Array
) -> Array:
  """Mean of -log softmax(logits)[label] under the weights.

  With w = weight * class_weights[label], each example's loss is

    sum(w * -log p[label]) / sum(w).

  Dividing by the class weights too is PyTorch's convention (CrossEntropyLoss,
  reduction="mean"), here within each example: scaling all of them changes
  nothing. K == 1 is `binary_cross_entropy`.

  Reference: Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, eq. 1,
  which sums instead of averaging.
  """
  if logits.shape[-1] == 1:
    return binary_cross_entropy(logits, label, weight, class_weights)
  logits, label, weight = _mask(logits, label, weight)
  # A one-hot mask, not an index: its gradient is elementwise, whereas that of a
  # gather is a scatter, slow on TPU and of no fixed order on GPU.
  is_truth = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  log_probs = jnp.where(is_truth, jax.nn.log_softmax(logits), 0)
  return _mean(-log_probs.sum(-1), weight * _of_class(class_weights, label))


def binary_cross_entropy(
  logits: Array, label: Array, weight: Array, class_weights: Array
) -> Array:
  """`cross_entropy` of one sigmoid logit z: K must be 1.

  -log sigmoid(z) = log(1 + exp(-z)) where label is 1, the same of -z where it
  is 0. With class weights (a, b): PyTorch's `pos_weight` = b / a, but averaged
  with the weights. More logits are a ValueError.
  """
  if logits.shape[-1] != 1:
    raise ValueError(
      f"binary_cross_entropy takes one logit, got {logits.shape[-1]}; use"
      " cross_entropy"
    )
  logits, label, weight = _mask(logits, label, weight)
  z = logits[..., 0]
  loss = jax.nn.softplus(jnp.where(label == 1, -z, z))
  return _mean(loss, weight * _of_class(class_weights, label))


def dice(
  logits: Array, label: Array, weight: Array, class_weights: Array
) -> Array:
  """Soft Dice loss over the foreground classes 1..K-1 (class 1 for K == 1).

  With p the probability and g the 0/1 truth of class k, sums over the pixels of
  one example, and e = DICE_SMOOTHING:

    D_k = (2 sum(weight p g) + e) / (sum(weight p) + sum(weight g) + e)
    loss = sum_k(class_weights[k] (1 - D_k)) / sum_k(class_weights[k])

  in [0, 1]. A class without truth has loss n / (n + 1) for n pixels predicted:
  0 if it is left alone, and a useful gradient if it is not, which a tiny e does
  not give. Foreground weights of 0 alone give loss 0.

  Reference: Drozdzal et al. 2016, https://arxiv.org/abs/1608.04117, without e.
  Milletari et al. 2016 (V-Net), https://arxiv.org/abs/1606.04797, section 3,
  squares p and g below the line.
  """
  logits, label, weight = _mask(logits, label, weight)
  if logits.shape[-1] == 1:
    probs = jax.nn.sigmoid(logits)
  else:
    probs = jax.nn.softmax(logits)[..., 1:]
  num_labels = probs.shape[-1] + 1
  truth = jax.nn.one_hot(label, num_labels, dtype=probs.dtype)[..., 1:]
  weight = weight[..., None]
  axes = tuple(range(1, label.ndim))
  overlap = jnp.sum(weight * probs * truth, axis=axes)
  size = jnp.sum(weight * (probs + truth), axis=axes)
  score = (2 * overlap + DICE_SMOOTHING) / (size + DICE_SMOOTHING)
  factors = jnp.broadcast_to(jnp.asarray(class_weights)[None, 1:], score.shape)
  return _mean(1 - score, factors)


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


def _mask(
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


def _of_class(class_weights: Array, label: Array) -> Array:
  """class_weights[label], without a gather: on TPU that goes pixel by pixel."""
  is_class = jax.nn.one_hot(label, len(class_weights), dtype=bool)
  return jnp.where(is_class, jnp.asarray(class_weights), 0).sum(-1)


def _mean(values: Array, weight: Array) -> Array:
  """sum(weight * values) / sum(weight) of each example, 0 for no weight."""
  axes = tuple(range(1, values.ndim))
  total = jnp.sum(weight, axis=axes)
  safe_total = jnp.where(total == 0, 1, total)
  return jnp.sum(weight * values, axis=axes) / safe_total


LOSSES: Mapping[str, LossTerm] = {
  "cross_entropy": cross_entropy,
  "binary_cross_entropy": binary_cross_entropy,
  "dice": dice,
}
