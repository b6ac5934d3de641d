"""Times our forms of the convolution on CPU against XLA's: a row a shape class.

  python benchmarks/conv_forms.py

Forward and both gradients of one 3-wide convolution; `ratio` is XLA's median /
ours. The limits in unet_jax/conv.py are where it falls to 1.
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp

from unet_jax import conv

# batch, spatial, channels in, channels out
CLASSES = (
  (2, (256, 256), 64, 64),
  (2, (256, 256), 192, 64),
  (2, (128, 128), 128, 128),
  (2, (64, 64), 256, 256),
  (2, (64, 64), 32, 32),
  (2, (32, 32), 512, 512),
  (2, (128, 128), 16, 16),
  (1, (64, 64, 64), 1, 16),
  (1, (64, 64, 64), 16, 16),
  (1, (32, 32, 32), 32, 32),
  (1, (16, 16, 16), 64, 64),
  (1, (8, 8, 8), 128, 128),
  (1, (8, 8, 8), 16, 16),
)


def make_step(form, pads):
  """Value and gradients of a readout of the convolution."""

  def total(x, kernel):
    return jnp.sum(form(pads, x, kernel) ** 2)

  return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


def main():
  """A row a class, ours and XLA's in turn."""
  conv._MIN_PLANE = 0  # Ours for all.
  for batch, spatial, inputs, outputs in CLASSES:
    pads = ((1, 1),) * len(spatial)
    x = jnp.ones((batch, *spatial, inputs))
    kernel = jnp.ones((*(3,) * len(spatial), inputs, outputs))
    steps = {"ours": conv._cpu, "xla": conv._xla}
    steps = {name: make_step(form, pads) for name, form in steps.items()}
    times = {name: [] for name in steps}
    for turn in range(6):
      for name, step in steps.items():
        start = time.perf_counter()
        jax.block_until_ready(step(x, kernel))
        if turn:  # The first one compiles.
          times[name].append(time.perf_counter() - start)
    ours, xla = (statistics.median(times[name]) for name in ("ours", "xla"))
    row = {
      "name": f"{batch}x{'x'.join(map(str, spatial))} {inputs}->{outputs}",
      "ours_seconds": round(ours, 4),
      "peer": "XLA",
      "peer_seconds": round(xla, 4),
      "ratio": round(xla / ours, 2),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
