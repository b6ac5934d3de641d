"""Times a forward pass against PyTorch's, side by side: a JSON object a row.

  python benchmarks/inference.py [NAME ...] [--steps N]

In turns, see turns.py. One image or tile from device memory to logits, which
stay there: running statistics of batch norm, no dropout, no gradient; jitted
with us, in `eval()` and `inference_mode` in PyTorch. The networks are those of
train_step.py; reading the image, padding it and writing the mask is not timed.
"""

import train_step
import turns

# name -> (a network of train_step.py, input [B, *S])
CASES = {
  "infer_seed": ("seed", (1, 512, 512)),
  "infer_unet2015": ("unet2015", (1, 572, 572)),
  "infer_volume": ("volume", (1, 64, 64, 64)),
}


def make_our_forward(fields, shape):
  """The network as evaluation and prediction apply it."""
  import jax
  import numpy as np

  from unet_jax.models import build_model

  model = build_model(num_classes=1, **fields)
  rng = np.random.default_rng(0)
  x = jax.device_put(rng.normal(size=(*shape, 1)).astype(np.float32))
  variables = jax.jit(model.init)(jax.random.key(0), x)
  apply = jax.jit(model.apply)
  return lambda: jax.block_until_ready(apply(variables, x))


def make(name, who):
  """One forward pass, ours or PyTorch's, as a function."""
  network, shape = CASES[name]
  _, ours, theirs = train_step.CASES[network]
  if who == "ours":
    return make_our_forward(ours, shape)
  import peers

  return peers.make_forward(theirs, shape, who)


if __name__ == "__main__":
  turns.main(make, CASES, doc=__doc__)
