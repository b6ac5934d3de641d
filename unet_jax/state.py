"""The train state: arrays only, so a checkpoint is the state."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util


@flax.struct.dataclass
class TrainState:
  """Everything a step changes.

  Attributes:
    step: int32, steps done.
    params: the model's parameters.
    batch_stats: running statistics of batch norm, or {}.
    opt_state: of the optax chain.
    ema: moving averages {"params", "batch_stats"}, or {} without them.
    skipped: int32, steps that changed nothing because they were not finite.
    skipped_in_row: int32, how many of them came last.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any
  skipped: jax.Array
  skipped_in_row: jax.Array


def init_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  rng: jax.Array,
  image_shape: tuple[int, ...],
  *,
  ema: bool = False,
) -> TrainState:
  """The state of step 0, for images of the shape [B, *S, C]."""
  variables = model.init(rng, jnp.zeros(image_shape))
  variables = {"batch_stats": {}, **variables}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    opt_state=tx.init(variables["params"]),
    # A copy: one buffer cannot be donated twice.
    ema=jax.tree.map(jnp.copy, variables) if ema else {},
    skipped=jnp.zeros((), jnp.int32),
    skipped_in_row=jnp.zeros((), jnp.int32),
  )


def eval_variables(state: TrainState) -> dict[str, Any]:
  """What evaluation and prediction apply: the averages where there are any."""
  return state.ema or {
    "params": state.params,
    "batch_stats": state.batch_stats,
  }


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Arrays of nested dicts by path, as "params/encoder_0/Conv_0/kernel"."""
  return traverse_util.flatten_dict(variables, sep="/")


def with_variables(state: TrainState, flat: Mapping[str, Any]) -> TrainState:
  """`state` with the arrays of `flat`; its averages, if any, start there too.

  Args:
    state: of step 0, on its devices.
    flat: parameters and batch statistics by path; others stay as they are.
  """
  old = flatten({"params": state.params, "batch_stats": state.batch_stats})
  # Copies: one buffer cannot be donated twice, nor one that numpy owns.
  new = {
    k: jnp.copy(jax.device_put(x, old[k].sharding)) for k, x in flat.items()
  }
  tree = traverse_util.unflatten_dict({**old, **new}, sep="/")
  tree = {"batch_stats": {}, **tree}
  return state.replace(
    **tree, ema=jax.tree.map(jnp.copy, tree) if state.ema else {}
  )
