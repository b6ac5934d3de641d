"""Losses of one example each; the caller averages over the batch.

All take `(logits, label, weight, class_weights)`:

  logits         float [B, *S, K]; K == 1 is one sigmoid logit (labels 0 and 1),
                 K >= 2 a softmax over K classes. Any number of spatial axes.
  label          int32 [B, *S], class ids; any id where `weight` is 0.
  weight         float32 [B, *S], >= 0; 0 = the pixel counts nowhere: whatever
                 its label and logits are (255, NaN), its gradient is exactly 0.
  class_weights  float32 [max(K, 2)], >= 0, factor of each class.

and return [B] in float32 (float64 for float64 logits); some take parameters by
name, which are fields of `schema.LossConfig`. An example without a counted
pixel has loss 0 and gradient 0. A counted pixel whose label is no class makes
its example NaN: loud, where indexing would wrap or clip. None looks at another
example, so losses of a batch add up over devices and microbatches.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from unet_jax.objectives import pixel_losses, region_losses
from unet_jax.objectives.pixels import center_crop

__all__ = ["LOSSES", "PARAMETERS", "Loss", "center_crop", "make_loss"]

Array = jax.Array
LossTerm = Callable[..., Array]
Loss = Callable[[Array, Array, Array], tuple[Array, dict[str, Array]]]


def make_loss(
  *,
  terms: tuple[str, ...],
  weights: tuple[float, ...],
  class_weights: tuple[float, ...],
  **parameters: float,
) -> Loss:
  """The sum of `weights` times `terms`, names in `LOSSES`, as one function.

  No weights, or no class weights, are 1 each. Of the other fields of
  `schema.LossConfig` each term takes its own.

  Returns:
    `loss_fn(logits, label, weight) -> (loss, parts)`: the sum [B] and each term
    by name [B], without its factor. Label and weight are centre-cropped to the
    logits where valid padding made those smaller.
  """
  weights = weights or (1.0,) * len(terms)
  own = {
    t: {n: parameters[n] for n in PARAMETERS.get(t, ()) if n in parameters}
    for t in terms
  }

  def loss_fn(
    logits: Array, label: Array, weight: Array
  ) -> tuple[Array, dict[str, Array]]:
    *_, num_logits = logits.shape
    factors = np.float32(class_weights or (1.0,) * max(num_logits, 2))
    label = center_crop(label, logits.shape[1:-1])
    weight = center_crop(weight, logits.shape[1:-1])
    parts = {
      t: LOSSES[t](logits, label, weight, factors, **own[t]) for t in terms
    }
    loss = sum(w * parts[t] for t, w in zip(terms, weights, strict=True))
    return loss, parts

  return loss_fn


LOSSES: Mapping[str, LossTerm] = {
  "cross_entropy": pixel_losses.cross_entropy,
  "binary_cross_entropy": pixel_losses.binary_cross_entropy,
  "focal": pixel_losses.focal,
  "top_k": pixel_losses.top_k,
  "dice": region_losses.dice,
  "tversky": region_losses.tversky,
  "focal_tversky": region_losses.focal_tversky,
  "lovasz": region_losses.lovasz,
  "lovasz_hinge": region_losses.lovasz_hinge,
  "boundary": region_losses.boundary,
}
# The fields of schema.LossConfig that a term takes, by name.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
  "cross_entropy": ("label_smoothing",),
  "binary_cross_entropy": ("label_smoothing",),
  "focal": ("focal_gamma",),
  "top_k": ("top_k_share",),
  "tversky": ("tversky_alpha", "tversky_beta"),
  "focal_tversky": ("tversky_alpha", "tversky_beta", "tversky_gamma"),
}
