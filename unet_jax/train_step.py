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

from unet_jax.models.skips import Context
from unet_jax.objectives import losses, metrics, supervision
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
    stop: the largest of the batch's `stop`, what hosts ask for (not a sum);
      None without.
    probes: of the joins of each level, None without; see `SkipProbes`.
  """

  loss: clu.metrics.Average
  parts: dict[str, clu.metrics.Average]
  grad_norm: clu.metrics.Average
  confusion: metrics.Confusion
  finite: jax.Array
  skipped_in_row: jax.Array
  stop: jax.Array | None = None
  probes: "SkipProbes | None" = None


@flax.struct.dataclass
class SkipProbes:
  """What the joins of each level saw, before the update.

  Attributes:
    norm: [2, depth], norms of the loss's gradient by what arrives sideways and
      by what comes from below, each over all of the batch; of the steps heard.
    energy: [2, depth], squares of what is joined, of the sides and of all.
    steps: how many were heard.
  """

  norm: jax.Array
  energy: jax.Array
  steps: jax.Array


def make_train_step(
  *,
  model: nn.Module,
  loss_fn: losses.Loss,
  tx: optax.GradientTransformation,
  schedule: Schedule,
  augment_fn: Callable[[Batch, jax.Array], Batch] | None = None,
  ema_decay: float = 0.0,
  accumulate: int = 1,
  probe_every: int = 0,
  axis_name: str | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, StepSums]]:
  """Makes the pure function (state, batch, rng) -> (state, sums).

  The objective is sum(valid * loss) / sum(valid) over the global batch. Under
  `jit` the arrays are global and `axis_name` is None; under `pmap` each device
  differentiates its own share of the sum, and the shares are added. A step
  that is not finite, in its loss, its gradient or what it would make of the
  parameters, changes nothing but the counters.

  Microbatch m of `accumulate` = A holds the examples m, m + A, m + 2 A, ... of
  the batch: the same on any number of devices, each of which has its share of
  every microbatch. The gradient is that of the whole batch, but for batch norm,
  which sees one microbatch after another, and moves its averages at each.

  Args:
    model: a U-Net; batch norm must know `axis_name`.
    loss_fn: (logits, label, weight) -> (loss [B], parts [B] each); of several
      outputs their weighted mean, see `supervision.supervise`.
    tx: gives updates without the learning rate.
    schedule: learning rate of a step.
    augment_fn: (batch, rng) -> batch, keyed by example id.
    ema_decay: d of the moving averages of parameters and batch statistics,
      a_t = d_t a_{t-1} + (1 - d_t) x_t with d_t = min(d, (1 + t) / (10 + t));
      0 = none.
    accumulate: microbatches a step; divides each device's examples.
    probe_every: also give `StepSums.probes`, heard at every so-manieth step
      and 0 at the others; 0 = never. The steps stay the same.
    axis_name: the `pmap` axis, or None.
  """
  gradient = _make_gradient(model, loss_fn, augment_fn, axis_name)
  if accumulate > 1:
    gradient = _over_microbatches(gradient, accumulate)

  def add_over_devices(tree: Any) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)

  def average_with(state: TrainState, params: Any, batch_stats: Any) -> Any:
    if not ema_decay:
      return {}
    # Short at first, so that the initial weights are soon forgotten.
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    return jax.tree.map(
      lambda old, new: decay * old + (1 - decay) * new,
      state.ema,
      {"params": params, "batch_stats": batch_stats},
    )

  def train_step(
    state: TrainState, batch: Batch, rng: jax.Array
  ) -> tuple[TrainState, StepSums]:
    rng = jax.random.fold_in(rng, state.step)
    names = ("augment", "dropout", "noise")
    rngs = dict(zip(names, jax.random.split(rng, 3), strict=True))
    if axis_name is not None:
      index = jax.lax.axis_index(axis_name)
      rngs["dropout"] = jax.random.fold_in(rngs["dropout"], index)
    batch = dict(batch)
    stop = batch.pop("stop", None)
    count = add_over_devices(jnp.sum(batch["valid"]))
    listen = None
    if probe_every:
      listen = ((state.step + 1) % probe_every == 0).astype(float)
    grads, batch_stats, total, sums = gradient(
      state.params, state.batch_stats, batch, count, rngs, listen
    )
    grads, total = add_over_devices((grads, total))
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    rate = schedule(state.step)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    checked = [total, grad_norm, optax.tree.norm(params)]
    finite = jnp.all(jnp.isfinite(jnp.stack(checked)))
    new = state.replace(
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      ema=average_with(state, params, batch_stats),
    )
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    in_row = jnp.where(finite, 0, state.skipped_in_row + 1)
    new = new.replace(
      step=state.step + 1,
      skipped=state.skipped + jnp.where(finite, 0, 1),
      skipped_in_row=in_row,
    )

    # The norm is that of all devices already.
    sums = add_over_devices(sums).replace(grad_norm=_average(grad_norm))
    if (heard := sums.probes) is not None:  # Squares up to here, which add up.
      heard = heard.replace(norm=jnp.sqrt(heard.norm), steps=listen)
      sums = sums.replace(probes=heard)
    sums = jax.tree.map(lambda x: jnp.where(finite, x, jnp.zeros_like(x)), sums)
    if stop is not None:
      stop = jnp.max(stop)
      stop = stop if axis_name is None else jax.lax.pmax(stop, axis_name)
    return new, sums.replace(finite=finite, skipped_in_row=in_row, stop=stop)

  return train_step


# (params, batch statistics, batch, valid examples everywhere, rngs, whether the
#   joins are heard: 1 or 0, or None for a program without probes)
#   -> (gradient, batch statistics, sum of losses, sums), of this device
_Gradient = Callable[
  [Any, Any, Batch, jax.Array, dict[str, jax.Array], jax.Array | None],
  tuple[Any, Any, jax.Array, StepSums],
]


def _make_gradient(
  model: nn.Module,
  loss_fn: losses.Loss,
  augment_fn: Callable[[Batch, jax.Array], Batch] | None,
  axis_name: str | None,
) -> _Gradient:
  """The gradient of the sum of losses over `count`; see `make_train_step`."""

  def gradient(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    count: jax.Array,
    rngs: dict[str, jax.Array],
    listen: jax.Array | None,
  ) -> tuple[Any, Any, jax.Array, StepSums]:
    if augment_fn is not None:
      batch = augment_fn(batch, rngs["augment"])
    valid = batch["valid"]
    # What only pads the batch may hold anything: 0 times NaN is NaN.
    shape = (-1,) + (1,) * (batch["image"].ndim - 1)
    image = batch["image"]
    image = jnp.where(valid.reshape(shape) > 0, image, jnp.zeros_like(image))

    def total_of(loss: jax.Array) -> jax.Array:
      return jnp.sum(jnp.where(valid > 0, loss, 0.0))

    context = _context(batch, axis_name)
    ears = None
    if listen is not None:
      ears = jnp.broadcast_to(listen, (2, len(model.widths) - 1))

    def objective(params: Any, ears: Any) -> tuple[jax.Array, Any]:
      (logits, presence), updates = model.apply(
        {"params": params, "batch_stats": batch_stats},
        image,
        train=True,
        context=context._replace(ears=ears),
        every_output=True,
        rngs={"dropout": rngs["dropout"], "noise": rngs["noise"]},
        mutable=["batch_stats", "energy"],
      )
      loss, parts = supervision.supervise(
        loss_fn, logits, presence, batch["label"], batch["weight"]
      )
      # No psum in here: its transpose would scale the gradient.
      return total_of(loss) / count, (loss, parts, logits[0], updates)

    differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)
    (grads, squares), aux = differentiate(params, ears)
    loss, parts, logits, updates = aux
    sums = _sum_up(batch, logits, loss, parts)
    if listen is not None:
      energy = sum(jax.tree.leaves(updates["energy"])) @ valid
      heard = SkipProbes(squares, energy, jnp.zeros(()))
      sums = sums.replace(probes=heard)
    return grads, updates.get("batch_stats", {}), total_of(loss), sums

  return gradient


def _over_microbatches(gradient: _Gradient, number: int) -> _Gradient:
  """The same, added up over microbatches, one after another."""

  def accumulated(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    count: jax.Array,
    rngs: dict[str, jax.Array],
    listen: jax.Array | None,
  ) -> tuple[Any, Any, jax.Array, StepSums]:
    # Every number-th example: a device finds its share of each on itself.
    micro = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, number, *x.shape[1:]), 1, 0), batch
    )

    def one(m: jax.Array, batch_stats: Any) -> Any:
      part = jax.tree.map(lambda x: x[m], micro)
      own = {**rngs, "dropout": jax.random.fold_in(rngs["dropout"], m)}
      return gradient(params, batch_stats, part, count, own, listen)

    def add(m: jax.Array, done: Any) -> Any:
      grads, batch_stats, *sums = one(m, done[1])
      added = jax.tree.map(jnp.add, (done[0], *done[2:]), (grads, *sums))
      return added[0], batch_stats, *added[1:]

    shapes = jax.eval_shape(one, jnp.zeros((), jnp.int32), batch_stats)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = (zeros[0], batch_stats, *zeros[2:])
    return jax.lax.fori_loop(0, number, add, start)

  return accumulated


def _context(batch: Batch, axis_name: str | None) -> Context:
  """What the information controls need; partners are of the global batch."""
  ids, valid = batch["id"], batch["valid"]
  if axis_name is None:
    return Context(ids, next_other(ids, valid))
  everyone = jax.lax.all_gather((ids, valid), axis_name, tiled=True)
  start = jax.lax.axis_index(axis_name) * len(ids)
  partner = next_other(*everyone)
  mine = jax.lax.dynamic_slice_in_dim(partner, start, len(ids))
  return Context(ids, mine)


def next_other(ids: jax.Array, valid: jax.Array) -> jax.Array:
  """The index of the next valid example with another id, going round.

  Args:
    ids: int32 [B]; a batch that spans two epochs can hold an id twice.
    valid: float32 [B], 0 for what only fills the batch.

  Returns:
    int32 [B]. Without another valid example it is just the next one.
  """
  n = len(ids)
  order = (jnp.arange(n)[:, None] + jnp.arange(1, n + 1)[None]) % n
  is_other = (valid[order] > 0) & (ids[order] != ids[:, None])
  first = jnp.argmax(is_other, axis=1)
  return order[jnp.arange(n), first].astype(jnp.int32)


_average = clu.metrics.Average.from_model_output


def _sum_up(
  batch: Batch, logits: jax.Array, loss: jax.Array, parts: dict[str, jax.Array]
) -> StepSums:
  """The sums over the valid examples of this device."""
  valid, spatial = batch["valid"], logits.shape[1:-1]
  return StepSums(
    loss=_average(loss, mask=valid),
    parts={name: _average(part, mask=valid) for name, part in parts.items()},
    grad_norm=None,
    confusion=metrics.Confusion.from_model_output(
      logits=logits,
      label=losses.center_crop(batch["label"], spatial),
      weight=losses.center_crop(batch["weight"], spatial),
      valid=valid,
    ),
    finite=None,
    skipped_in_row=None,
  )
