"""One loss from everything that a network puts out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from unet_jax.objectives import losses


def supervise(
  loss_fn: losses.Loss,
  logits: Sequence[jax.Array],
  presence: jax.Array | None,
  label: jax.Array,
  weight: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Deep supervision, and the loss of the class presence where there is one.

  With L_0 the loss of the prediction and L_k that of output k, on the same
  labels at full resolution:

    L = sum_k 2^-k L_k / sum_k 2^-k + L_presence

  One output and no presence is `loss_fn` itself.

  Args:
    loss_fn: (logits, label, weight) -> (loss [B], parts).
    logits: [B, *S, K] each, as in `models.unet.Outputs`.
    presence: [B, F] or None, likewise.
    label: as `loss_fn` takes it.
    weight: likewise.

  Returns:
    The loss [B] and its parts [B] by name: those of the prediction, and
    "output_0", "output_1", ... and "presence" where there are such.
  """
  losses_k, parts = [], {}
  for y in logits:
    loss, terms = loss_fn(y, label, weight)
    losses_k.append(loss)
    parts = parts or dict(terms)
  factors = [0.5**k for k in range(len(logits))]
  total = sum(f * x for f, x in zip(factors, losses_k, strict=True))
  total /= sum(factors)
  if len(logits) > 1:
    parts |= {f"output_{k}": loss for k, loss in enumerate(losses_k)}
  if presence is not None:
    spatial = logits[0].shape[1:-1]
    label, weight = (losses.center_crop(x, spatial) for x in (label, weight))
    parts["presence"] = presence_loss(presence, label, weight)
    total += parts["presence"]
  return total, parts


def presence_loss(
  presence: jax.Array, label: jax.Array, weight: jax.Array
) -> jax.Array:
  """Mean over the foreground classes of the binary cross-entropy [B].

  The truth of class k is whether any pixel of weight above 0 has it. An example
  without such a pixel has loss 0.

  Reference: Huang et al. 2020, https://arxiv.org/abs/2004.08790, section 2.3.
  """
  axes = tuple(range(1, label.ndim))
  classes = range(1, presence.shape[-1] + 1)
  has = [jnp.any((label == k) & (weight > 0), axis=axes) for k in classes]
  z = jnp.where(jnp.stack(has, -1), -presence, presence)
  counted = jnp.any(weight > 0, axis=axes)
  return jnp.where(counted, jnp.mean(jax.nn.softplus(z), axis=-1), 0.0)
