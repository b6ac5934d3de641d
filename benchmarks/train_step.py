"""Times a training step against PyTorch's, side by side: a JSON object a row.

  python benchmarks/train_step.py [NAME ...] [--steps N]

In turns, see turns.py. A step is forward, backward and SGD on one batch that
stays the same. The first row is the seed's network.
"""

import turns

# name -> input [B, *S], our model fields, the peer's fields
CASES = {
  "seed": (
    (2, 256, 256),
    {"preset": "seed"},
    {"widths": (64, 128, 256, 512), "up": "aligned"},
  ),
  "unet2015": (
    (1, 572, 572),
    {"preset": "unet2015"},
    {
      "widths": (64, 128, 256, 512, 1024),
      "up": "transpose",
      "norm": False,
      "valid": True,
    },
  ),
  "volume": (
    (1, 64, 64, 64),
    {"dims": 3, "widths": (16, 32, 64, 128)},
    {"widths": (16, 32, 64, 128), "up": "transpose"},
  ),
}


def make_our_step(fields, shape):
  """The train step as the program runs it: SGD, binary cross-entropy."""
  import jax
  import numpy as np

  from unet_jax import state as state_lib
  from unet_jax.models import build_model
  from unet_jax.objectives import losses
  from unet_jax.optimizer import make_optimizer, make_schedule
  from unet_jax.schema import OptimizerConfig
  from unet_jax.train_step import make_train_step

  model = build_model(num_classes=1, **fields)
  cfg = OptimizerConfig(
    name="sgd", learning_rate=0.01, schedule="constant", weight_decay=0.0
  )
  tx = make_optimizer(cfg)
  train_step = make_train_step(
    model=model,
    loss_fn=losses.make_loss(
      terms=("binary_cross_entropy",), weights=(), class_weights=()
    ),
    tx=tx,
    schedule=make_schedule(cfg, 1000),
  )
  train_step = jax.jit(train_step, donate_argnums=0)
  rng = np.random.default_rng(0)
  batch = jax.device_put(
    {
      "id": np.arange(shape[0], dtype=np.int32),
      "image": rng.normal(size=(*shape, 1)).astype(np.float32),
      "label": rng.integers(0, 2, shape).astype(np.int32),
      "weight": np.ones(shape, np.float32),
      "valid": np.ones(shape[0], np.float32),
    }
  )
  init = jax.jit(
    lambda key: state_lib.init_state(model, tx, key, (1, *shape[1:], 1))
  )
  state, key = init(jax.random.key(0)), jax.random.key(1)

  def step():
    nonlocal state
    state, _ = train_step(state, batch, key)
    jax.block_until_ready(state)

  return step


def make(name, who):
  """One training step, ours or PyTorch's, as a function."""
  shape, ours, theirs = CASES[name]
  if who == "ours":
    return make_our_step(ours, shape)
  import peers

  return peers.make_step(theirs, shape, who)


if __name__ == "__main__":
  turns.main(make, CASES, doc=__doc__)
