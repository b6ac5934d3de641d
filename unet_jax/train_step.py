"""One train step: a pure function of (state, batch, rng).

The same function runs under `jit` on global arrays and, with an `axis_name`,
under `pmap`: only sums cross devices.
"""

from collections.abc import Callable
from typing import Any

import clu.metrics
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from unet_jax.objectives import losses, metrics
from unet_jax.optimizer import Schedule
from unet_jax.state import TrainState

Batch = dict[str, jax.Array]
TrainStep = Callable[
  [TrainState, Batch, jax.Array], tuple[TrainState, "StepSums"]
]


@flax.struct.dataclass
class StepSums:
  """What one step adds up, on device; a skipped step adds nothing.

  Attributes:
    loss, parts: of the examples, and each term of the loss.
    grad_norm: global norm before clipping, of the steps.
    confusion: pixels by truth and prediction, before the update.
    finite: whether loss and gradient were finite (not a sum).
    skipped_in_row: steps skipped up to this one (not a sum).
  """

  loss: clu.metrics.Average
  parts: dict[str, clu.metrics.Average]
  grad_norm: clu.metrics.Average
  confusion: metrics.Confusion
  finite: jax.Array
  skipped_in_row: jax.Array


def make_train_step(
  *,
  model: nn.Module,
  loss_fn: losses.Loss,
  tx: optax.GradientTransformation,
  schedule: Schedule,
  augment_fn: Callable[[Batch, jax.Array], Batch] | None = None,
  ema_decay: float = 0.0,
  axis_name: str | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, StepSums]]:
  """Makes the pure function (state, batch, rng) -> (state, sums).

  The objective is sum(valid * loss) / sum(valid) over the global batch. Under
  `jit` the arrays are global and `axis_name` is None; under `pmap` each device
  differentiates its own share of the sum, and the shares are added. A step
  whose loss or gradient is not finite changes nothing but the counters.

  Args:
    model: maps images [B, *S, C] to logits; batch norm must know `axis_name`.
    loss_fn: (logits, label, weight) -> (loss [B], parts [B] each).
    tx: gives updates without the learning rate.
    schedule: learning rate of a step.
    augment_fn: (batch, rng) -> batch, keyed by example id.
    ema_decay: of the moving average of the parameters; 0 = none.
    axis_name: the `pmap` axis, or None.
  """

  def add_over_devices(tree: Any) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)

  def train_step(
    state: TrainState, batch: Batch, rng: jax.Array
  ) -> tuple[TrainState, StepSums]:
    rng = jax.random.fold_in(rng, state.step)
    augment_rng, dropout_rng = jax.random.split(rng)
    if augment_fn is not None:
      batch = augment_fn(batch, augment_rng)
    if axis_name is not None:
      index = jax.lax.axis_index(axis_name)
      dropout_rng = jax.random.fold_in(dropout_rng, index)
    valid = batch["valid"]
    count = add_over_devices(jnp.sum(valid))

    def objective(params: Any) -> tuple[jax.Array, Any]:
      logits, updates = model.apply(
        {"params": params, "batch_stats": state.batch_stats},
        batch["image"],
        train=True,
        rngs={"dropout": dropout_rng},
        mutable=["batch_stats"],
      )
      loss, parts = loss_fn(logits, batch["label"], batch["weight"])
      batch_stats = updates.get("batch_stats", {})
      # No psum in here: its transpose would scale the gradient.
      return jnp.sum(loss * valid) / count, (loss, parts, logits, batch_stats)

    grads, aux = jax.grad(objective, has_aux=True)(state.params)
    loss, parts, logits, batch_stats = aux
    grads = add_over_devices(grads)
    grad_norm = optax.tree.norm(grads)
    total = add_over_devices(jnp.sum(loss * valid))
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    rate = schedule(state.step)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    ema = jax.tree.map(
      lambda e, p: ema_decay * e + (1 - ema_decay) * p,
      state.ema,
      params if ema_decay else {},
    )
    new = state.replace(
      params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
    )
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    new = new.replace(
      step=state.step + 1,
      skipped=state.skipped + jnp.where(finite, 0, 1),
      skipped_in_row=in_row,
    )

    average = clu.metrics.Average.from_model_output
    sums = StepSums(
      loss=average(loss, mask=valid),
      parts={name: average(value, mask=valid) for name, value in parts.items()},
      grad_norm=average(grad_norm),
      confusion=metrics.Confusion.from_model_output(
        logits=logits,
        label=losses.center_crop(batch["label"], logits.shape[1:-1]),
        weight=losses.center_crop(batch["weight"], logits.shape[1:-1]),
        valid=valid,
      ),
      finite=finite,
      skipped_in_row=in_row,
    )
    sums = sums.replace(
      loss=add_over_devices(sums.loss),
      parts=add_over_devices(sums.parts),
      confusion=add_over_devices(sums.confusion),
    )
    kept = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), sums)
    return new, kept.replace(finite=finite, skipped_in_row=in_row)

  return train_step
