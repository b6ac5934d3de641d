"""Losses that are means over pixels; arguments as in `losses`."""

import jax
import jax.numpy as jnp

from unet_jax.objectives import pixels

Array = jax.Array


def cross_entropy(
  logits: Array,
  label: Array,
  weight: Array,
  class_weights: Array,
  *,
  label_smoothing: float = 0.0,
) -> Array:
  """Mean of -log softmax(logits)[label] under the weights.

  With c the class weights and w = weight * c[label], each example's loss is

    sum(w * -log p[label]) / sum(w).

  Dividing by the class weights too is PyTorch's convention (CrossEntropyLoss,
  reduction="mean"), here within each example: scaling all of them changes
  nothing. With s = label_smoothing the truth is 1 - s at the label and s / K
  everywhere, each class with its own weight, as there:

    sum(weight * ((1 - s) c[label] -log p[label] + s / K sum_k c_k -log p_k))
      / sum(w)

  K == 1 is `binary_cross_entropy`.

  Reference: Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, eq. 1,
  which sums instead of averaging. Smoothing: Szegedy et al. 2016,
  https://arxiv.org/abs/1512.00567, section 7.
  """
  logits, label, weight = pixels.mask(logits, label, weight)
  own = weight * pixels.of_class(class_weights, label)
  loss = own * _surprise(logits, label)
  if label_smoothing:
    num_labels = len(class_weights)
    of_any = sum(
      class_weights[k] * _surprise(logits, jnp.full_like(label, k))
      for k in range(num_labels)
    )
    loss *= 1 - label_smoothing
    loss += label_smoothing / num_labels * weight * of_any
    # Where no label has a factor there is nothing to divide by.
    axes = tuple(range(1, own.ndim))
    loss *= jnp.sum(own, axis=axes, keepdims=True) != 0
  return pixels.ratio(loss, own)


def binary_cross_entropy(
  logits: Array,
  label: Array,
  weight: Array,
  class_weights: Array,
  *,
  label_smoothing: float = 0.0,
) -> Array:
  """`cross_entropy` of one sigmoid logit z: K must be 1.

  -log sigmoid(z) = log(1 + exp(-z)) where label is 1, the same of -z where it
  is 0. With class weights (a, b): PyTorch's `pos_weight` = b / a, but averaged
  with the weights. Smoothing takes two classes. More logits are a ValueError.
  """
  _check_one_logit("binary_cross_entropy", logits)
  return cross_entropy(
    logits, label, weight, class_weights, label_smoothing=label_smoothing
  )


def focal(
  logits: Array,
  label: Array,
  weight: Array,
  class_weights: Array,
  *,
  focal_gamma: float = 2.0,
) -> Array:
  """Cross-entropy that well-classified pixels hardly count in.

  With p the probability of the label, w = weight * class_weights[label] and
  g = focal_gamma (0 is `cross_entropy`):

    sum(w (1 - p)^g (-log p)) / sum(w)

  The class weights are the paper's alpha. The paper divides by the number of
  positive anchors, this by all weights.

  Reference: Lin et al. 2017, https://arxiv.org/abs/1708.02002, equations 4, 5.
  """
  logits, label, weight = pixels.mask(logits, label, weight)
  # As a power of e, since the slope of x^g at 0 is infinite for g < 1.
  doubt = jnp.exp(focal_gamma * _log_doubt(logits, label))
  own = weight * pixels.of_class(class_weights, label)
  return pixels.mean(doubt * _surprise(logits, label), own)


def top_k(
  logits: Array,
  label: Array,
  weight: Array,
  class_weights: Array,
  *,
  top_k_share: float = 0.1,
) -> Array:
  """`cross_entropy` of the hardest pixels of each example.

  With l = -log p[label], w = weight * class_weights[label], s = top_k_share and
  pixels by falling l, the mean of l over those that hold the share s of the
  weight, the last of them in part:

    sum_i l_i a_i / (s W),  a_i = min(w_i, max(0, s W - sum_{j<i} w_j)),
    W = sum_i w_i

  With equal weights and whole s N: the mean over the s N largest. A weight of 2
  is a pixel twice. s = 1 is `cross_entropy`.

  Reference: Wu et al. 2016, https://arxiv.org/abs/1605.06885, section 3.1, and
  nnU-Net's TopKLoss, Isensee et al. 2021,
  https://doi.org/10.1038/s41592-020-01008-z; both over a batch.
  """
  logits, label, weight = pixels.mask(logits, label, weight)
  loss = _surprise(logits, label)
  own = weight * pixels.of_class(class_weights, label)
  loss, own = (x.reshape(x.shape[0], -1) for x in (loss, own))
  budget = top_k_share * jnp.sum(own, axis=-1, keepdims=True)
  ordered, places = pixels.sort_descending(loss, own)
  before = jnp.cumsum(ordered, axis=-1) - ordered
  taken = jnp.clip(budget - before, 0, ordered)
  taken = pixels.unsort(taken, places)
  return pixels.ratio(loss * taken, taken)


def _surprise(logits: Array, label: Array) -> Array:
  """-log p[label] [B, *S] of safe logits and labels."""
  if logits.shape[-1] == 1:
    z = logits[..., 0]
    return jax.nn.softplus(jnp.where(label == 1, -z, z))
  # A one-hot mask, not an index: its gradient is elementwise, whereas that of a
  # gather is a scatter, slow on TPU and of no fixed order on GPU.
  is_truth = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  return -jnp.where(is_truth, jax.nn.log_softmax(logits), 0).sum(-1)


def _log_doubt(logits: Array, label: Array) -> Array:
  """log(1 - p[label]) [B, *S], exact where p is nearly 1."""
  if logits.shape[-1] == 1:
    z = logits[..., 0]
    return -jax.nn.softplus(jnp.where(label == 1, z, -z))
  is_truth = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
  others = jax.nn.logsumexp(logits, axis=-1, where=~is_truth)
  return others - jax.nn.logsumexp(logits, axis=-1)


def _check_one_logit(name: str, logits: Array) -> None:
  if logits.shape[-1] != 1:
    raise ValueError(
      f"{name} takes one logit, got {logits.shape[-1]}; use cross_entropy"
    )
