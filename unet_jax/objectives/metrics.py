"""Overlap metrics: counted on device, divided once on the host.

One confusion matrix holds all that Dice, IoU, precision, recall and accuracy
need: int [..., L, L], rows the truth, columns the prediction, entries pixels.
Counts add up exactly over batches, tiles and devices; ratios do not. Names of
classes are their ids 0..L-1 with L = max(K, 2), K the channels of the logits.

Logits are float [B, *S, K]; labels int32 [B, *S] class ids, any where the
weight, float32 [B, *S], is 0. A pixel counts, once, where its weight is > 0.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

# --- On device ----------------------------------------------------------------


def predict_labels(logits: jax.Array) -> jax.Array:
  """The most probable class, int32 [B, *S]; the smallest id on a tie.

  For K == 1 that is logit > 0.
  """
  if logits.shape[-1] == 1:
    return (logits[..., 0] > 0).astype(jnp.int32)
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def probabilities(logits: jax.Array) -> jax.Array:
  """Of each class, float32 [B, *S, L]; K == 1 gives two."""
  logits = logits.astype(jnp.float32)
  if logits.shape[-1] == 1:
    return jax.nn.sigmoid(jnp.concatenate([-logits, logits], -1))
  return jax.nn.softmax(logits)


def confusion(
  logits: jax.Array, label: jax.Array, weight: jax.Array, num_labels: int
) -> jax.Array:
  """Confusion matrix of each example, int32 [B, L, L], L = `num_labels`.

  Exact up to 2^31 pixels an example. A pixel whose label is no class is left
  out.
  """
  batch_size = label.shape[0]
  # Ids below 0 belong to no class, so they have no 1 in their one-hot row.
  truth = jnp.where(weight > 0, label, -1).reshape(batch_size, -1)
  predicted = predict_labels(logits).reshape(batch_size, -1)
  # A product of one-hots is a fast histogram on every device, a scatter only on
  # a CPU. 8 bits keep it small; the sums are 32-bit integers.
  return jnp.einsum(
    "bnt,bnp->btp",
    jax.nn.one_hot(truth, num_labels, dtype=jnp.int8),
    jax.nn.one_hot(predicted, num_labels, dtype=jnp.int8),
    preferred_element_type=jnp.int32,
  )


@flax.struct.dataclass
class Confusion(metrics.Metric):
  """The confusion matrix of all valid examples of some batches.

  Attributes:
    counts: int32 [L, L], exact up to 2^31 pixels: beyond a few batches, add up
      `compute()` on the host.
  """

  counts: jax.Array

  @classmethod
  def from_model_output(
    cls,
    *,
    logits: jax.Array,
    label: jax.Array,
    weight: jax.Array,
    valid: jax.Array,
    **_: Any,
  ) -> "Confusion":
    """Counts one batch; `valid` float32 [B], 0 = it only pads the batch."""
    num_labels = max(logits.shape[-1], 2)
    counts = confusion(logits, label, weight, num_labels)
    return cls(jnp.where(valid[:, None, None] > 0, counts, 0).sum(0, jnp.int32))

  def merge(self, other: "Confusion") -> "Confusion":
    """The counts of both."""
    return self.replace(counts=self.counts + other.counts)

  def compute(self) -> np.ndarray:
    """The counts on the host, int64 [L, L]; `summarize` takes a stack."""
    return np.asarray(self.counts, np.int64)


# --- On the host --------------------------------------------------------------


def summarize(
  confusion_per_image: np.ndarray, foreground: tuple[int, ...]
) -> dict[str, Any]:
  """Scores of a data set from the confusion matrices [N, L, L] of its images.

  With t, p and c the pixels of a class in the truth, in the prediction and in
  both: dice = 2c / (t + p), iou = c / (t + p - c), precision = c / p,
  recall = c / t. A class in neither is absent: NaN, and no part of any mean. A
  mean over nothing is NaN. The means go over the `foreground` ids, () = 1..L-1.

  Returns:
    dice, iou: mean over the foreground classes, pooled over all pixels.
    dice_per_class, iou_per_class, precision_per_class, recall_per_class: lists
      over all L classes, pooled. Precision is NaN where the class was never
      predicted, recall where it is not in the truth.
    dice_per_image, iou_per_image: mean over the images of each image's mean
      over the foreground classes present in it.
    images_without_foreground: the images which that mean leaves out.
    pixel_accuracy: share of pixels whose class is right.
    absent_classes: ids in neither truth nor prediction.
    num_images, num_pixels.

  Reference: Dice 1945, https://doi.org/10.2307/1932409; Jaccard 1912,
  https://doi.org/10.1111/j.1469-8137.1912.tb05611.x.
  """
  per_image = np.asarray(confusion_per_image, np.int64)
  pooled = per_image.sum(0)
  each, total = _scores(per_image), _scores(pooled)
  classes = list(foreground or range(1, len(pooled)))
  image_dice = _mean(each["dice"][:, classes])
  image_iou = _mean(each["iou"][:, classes])
  return {
    "dice": float(_mean(total["dice"][classes])),
    "iou": float(_mean(total["iou"][classes])),
    **{f"{name}_per_class": total[name].tolist() for name in total},
    "dice_per_image": float(_mean(image_dice)),
    "iou_per_image": float(_mean(image_iou)),
    "images_without_foreground": int(np.isnan(image_dice).sum()),
    "pixel_accuracy": float(_accuracy(pooled)),
    "absent_classes": np.flatnonzero(np.isnan(total["dice"])).tolist(),
    "num_images": len(per_image),
    "num_pixels": int(pooled.sum()),
  }


def per_image_rows(
  confusion_per_image: np.ndarray, foreground: tuple[int, ...]
) -> list[dict[str, float | int]]:
  """One table row for each image, in the order given.

  Dice, iou, pixel_accuracy, pixels and dice_class_0, ... are defined as in
  `summarize`; NaN where the image has no such class. `foreground_pixels` are
  those of the truth.
  """
  per_image = np.asarray(confusion_per_image, np.int64)
  each = _scores(per_image)
  classes = list(foreground or range(1, per_image.shape[-1]))
  dice, iou = _mean(each["dice"][:, classes]), _mean(each["iou"][:, classes])
  accuracy = _accuracy(per_image)
  return [
    {
      "dice": float(dice[i]),
      "iou": float(iou[i]),
      "pixel_accuracy": float(accuracy[i]),
      "pixels": int(per_image[i].sum()),
      "foreground_pixels": int(per_image[i, classes].sum()),
      **{f"dice_class_{k}": float(d) for k, d in enumerate(each["dice"][i])},
    }
    for i in range(len(per_image))
  ]


def _scores(counts: np.ndarray) -> dict[str, np.ndarray]:
  """Scores float64 [..., L] of counts int64 [..., L, L]; NaN where absent."""
  both = np.diagonal(counts, axis1=-2, axis2=-1)
  truth, predicted = counts.sum(-1), counts.sum(-2)
  return {
    "dice": _ratio(2 * both, truth + predicted),
    "iou": _ratio(both, truth + predicted - both),
    "precision": _ratio(both, predicted),
    "recall": _ratio(both, truth),
  }


def _accuracy(counts: np.ndarray) -> np.ndarray:
  right = np.trace(counts, axis1=-2, axis2=-1)
  return _ratio(right, counts.sum((-2, -1)))


def _mean(values: np.ndarray) -> np.ndarray:
  """Mean over the last axis of what is not NaN."""
  present = ~np.isnan(values)
  return _ratio(np.where(present, values, 0).sum(-1), present.sum(-1))


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
  """Quotient in float64, NaN where bottom is 0, without a warning."""
  nothing = np.full(np.shape(top), np.nan)
  return np.divide(top, bottom, out=nothing, where=np.not_equal(bottom, 0))
