"""Times the forms of 3-wide convolutions on CPU, and writes conv_table.py.

  python benchmarks/conv_forms.py [--write]

A row a shape class: two examples of so many pixels and channels. "value" is the
output and the gradient of the input, "kernel" the gradient of the kernel.
`ratio` is XLA's median / the fastest of ours; ours enters the table where it is
above 1.1, so that noise does not.
"""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from unet_jax import conv, conv_table

CHANNELS = (0, 4, 6, 8, 10)  # log2
PIXELS = {2: (10, 12, 14, 16, 18), 3: (9, 12, 15, 18)}
SLICES = {"i": conv._slices_in, "o": conv._slices_out}
WORTH = 1.1
# The table does not know the batch: XLA is at its best for one example.
BATCH = 2
# A class of more multiply-accumulates takes the letter it has at fewer pixels,
# at the fewest that of fewer channels out.
MAX_MACS = 2**34

TABLE = '''"""The fastest form of a 3-wide convolution on CPU, by shape class.

Measured and written by benchmarks/conv_forms.py. A grid has a row for each of
the channels in, and a letter for each of the channels out:

  x  that of XLA
  i  a volume as slices, those of the kernel as channels in
  o  likewise, as channels out
  b  the gradient of the kernel block by block
"""

# log2 of the channels in, and of the channels out.
CHANNELS = {channels}

# (what, spatial axes, log2 of the pixels of an example)
FORMS = {{
{forms}
}}
'''


def candidates(what, axes):
  """The forms by letter: functions of (x, kernel, dy)."""
  window = conv._Window((1,) * axes, ((1, 1),) * axes)

  def value(form, x, kernel, dy):
    y, vjp = jax.vjp(lambda x: form(window, x, kernel), x)
    return y, vjp(dy)

  def kernel_grad(form, x, kernel, dy):
    return jax.vjp(lambda kernel: form(window, x, kernel), kernel)[1](dy)

  if what == "value":
    forms = {"x": conv._xla, **SLICES}
    return {k: functools.partial(value, form) for k, form in forms.items()}
  # In volumes the slices' gradient, by XLA, is the one to beat.
  usual = conv._xla if axes == 2 else conv._slices_out
  return {
    "x": functools.partial(kernel_grad, usual),
    "b": lambda x, kernel, dy: conv._kernel_grad(window.pads, x, dy),
  }


def measure(what, axes, size, inputs, outputs):
  """Median seconds of each form, taken in turns."""
  base, extra = divmod(size, axes)
  spatial = [2 ** (base + (k < extra)) for k in range(axes)]
  x = jnp.ones((BATCH, *spatial, 2**inputs))
  kernel = jnp.ones((*(3,) * axes, 2**inputs, 2**outputs))
  dy = jnp.ones((BATCH, *spatial, 2**outputs))
  forms = candidates(what, axes)
  steps = {name: jax.jit(form) for name, form in forms.items()}
  times = {name: [] for name in steps}
  for turn in range(5):
    for name, step in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(step(x, kernel, dy))
      if turn:  # The first one compiles.
        times[name].append(time.perf_counter() - start)
  return {name: statistics.median(seconds) for name, seconds in times.items()}


def choose(what, axes, size, inputs, outputs):
  """The letter of a class; prints its row."""
  seconds = measure(what, axes, size, inputs, outputs)
  xla = seconds.pop("x")
  letter = min(seconds, key=seconds.get)
  ratio = xla / seconds[letter]
  row = {
    "name": f"{what} {axes}D 2^{size} pixels {2**inputs}->{2**outputs}",
    "ours": letter,
    "ours_seconds": round(seconds[letter], 5),
    "peer": "XLA",
    "peer_seconds": round(xla, 5),
    "ratio": round(ratio, 2),
  }
  print(json.dumps(row), flush=True)
  return letter if ratio > WORTH else "x"


def grid(what, axes, size, smaller):
  """The letters of all channels; `smaller` has them for fewer pixels."""
  letters = {}
  for ins, outs in itertools.product(CHANNELS, repeat=2):
    macs = 3**axes * 2 ** (size + ins + outs)
    if macs < conv._MIN_MACS:
      letter = "x"
    elif macs <= MAX_MACS:
      letter = choose(what, axes, size, ins, outs)
    elif smaller:
      letter = smaller[ins, outs]
    letters[ins, outs] = letter
  return letters


def rows(what, axes):
  """The lines of the table, from few pixels to many."""
  letters = {}
  for size in PIXELS[axes]:
    letters = grid(what, axes, size, letters)
    lines = ["".join(letters[i, k] for k in CHANNELS) for i in CHANNELS]
    yield f"  {(what, axes, size)!r}: {tuple(lines)!r},"


def main():
  """Measures all classes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--write", action="store_true")
  write = parser.parse_args().write
  classes = [("kernel", 2), ("kernel", 3), ("value", 3)]
  forms = [line for what, axes in classes for line in rows(what, axes)]
  text = TABLE.format(channels=CHANNELS, forms="\n".join(forms))
  if write:
    pathlib.Path(conv_table.__file__).write_text(text.replace("'", '"'))


if __name__ == "__main__":
  main()
