"""Every wire: for each skip, decoder and level, what reaches the readout.

What should reach it is found by walking a graph that is written here from the
papers' formulas; what does is where the gradient of a random readout of the
decoder is not 0.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.variants import PAIRS, SILENT, fill
from unet_jax import geometry
from unet_jax.models import build_model, decoders
from unet_jax.models.skips import Context

WIDTHS = (4, 6, 8)
DEPTH = 2
MASKS = list(itertools.product([False, True], repeat=DEPTH))
# Two examples, each the other's partner.
CONTEXT = Context(id=jnp.arange(2), partner=jnp.array([1, 0]))


def reached(decoder, skip, levels):
  """Encoder levels from which a path leads to the prediction."""
  on = [level and skip not in SILENT for level in levels]
  into = {}  # A node's name -> the nodes that enter it.
  if decoder == "nested":
    for j in range(1, DEPTH + 1):
      for i in range(DEPTH - j + 1):
        sides = [(i, k) for k in range(j)] if on[i] else []
        into[i, j] = [(i + 1, j - 1), *sides]
    goal, encoder = (0, DEPTH), {(i, 0): i for i in range(DEPTH + 1)}
  else:
    encoder = {("e", i): i for i in range(DEPTH + 1)}
    into["d", DEPTH] = [("e", DEPTH)]
    for i in range(DEPTH):
      if decoder == "plain":
        sources = [("d", i + 1)] + ([("e", i)] if on[i] else [])
      else:
        sources = [("d", k) for k in range(i + 1, DEPTH + 1)]
        sources += [("e", k) for k in range(i + 1) if on[k]]
      into["d", i] = sources
    goal = ("d", 0)
  seen, todo = set(), [goal]
  while todo:
    node = todo.pop()
    seen.add(node)
    todo += into.get(node, [])
  return {encoder[node] for node in seen if node in encoder}


def make_decoder(decoder, skip, levels, *, dims=1, padding="same", **fields):
  """A decoder and what an encoder might give it."""
  model = build_model(
    num_classes=1,
    dims=dims,
    widths=WIDTHS,
    norm="none",
    padding=padding,
    activation="gelu",  # No unit is dead, so a gradient of 0 is a cut wire.
  )
  module = decoders.DECODERS[decoder](
    model._layers(train=False), WIDTHS, fields.pop("up", "transpose"), skip,
    levels, **fields,
  )  # fmt: skip
  # With valid padding: an image of 44 pixels, less what convolutions took.
  sizes = (40, 16, 4) if padding == "valid" else (8, 4, 2)
  rng = np.random.default_rng(0)
  features = [
    rng.normal(size=(2, *(size,) * dims, width)).astype(np.float32)
    for size, width in zip(sizes, WIDTHS, strict=True)
  ]
  return module, features


def gradients(module, features, seed=2):
  """d(random readout of the prediction's features) / d features."""
  variables = fill(module, features, CONTEXT)
  shape = jax.eval_shape(module.apply, variables, features, CONTEXT)[0].shape
  readout = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  # Of the first example alone: the other is only its partner.
  readout[1:] = 0

  def read(features):
    return jnp.sum(readout * module.apply(variables, features, CONTEXT)[0])

  return jax.jit(jax.grad(read))(features)


def arrived(grads):
  return {level for level, g in enumerate(grads) if np.any(g[0] != 0)}


@pytest.mark.parametrize(("skip", "decoder"), PAIRS)
def test_the_gradient_reaches_exactly_what_the_config_says(skip, decoder):
  for levels in MASKS:
    module, features = make_decoder(decoder, skip, levels)
    grads = gradients(module, features)
    assert arrived(grads) == reached(decoder, skip, levels), levels
    for g in grads:  # Nothing crosses from one example to another.
      assert not np.any(g[1] != 0), levels


@pytest.mark.parametrize(
  ("decoder", "dims", "padding", "up"),
  [
    ("plain", 2, "same", "linear"),
    ("plain", 2, "valid", "transpose"),
    ("plain", 3, "same", "linear_aligned"),
    ("nested", 2, "valid", "linear"),
    ("nested", 3, "same", "transpose"),
    ("full_scale", 2, "same", "linear"),
    ("full_scale", 3, "same", "linear"),
  ],
)
def test_ranks_paddings_and_ups_have_the_same_wires(decoder, dims, padding, up):
  for levels in [(True, False), (False, True)]:
    module, features = make_decoder(
      decoder, "concat", levels, dims=dims, padding=padding, up=up
    )
    grads = gradients(module, features)
    assert arrived(grads) == reached(decoder, "concat", levels), levels
    if padding == "valid" and decoder == "plain" and levels[0]:
      # The crop is centred: nothing outside it is read.
      seen = np.flatnonzero(np.any(np.asarray(grads[0]) != 0, axis=(0, 2, 3)))
      margin = geometry.crop_margins(DEPTH)[0]
      assert (seen[0], seen[-1]) == (margin, 40 - margin - 1)


@pytest.mark.parametrize("decoder", ["plain", "nested", "full_scale"])
@pytest.mark.parametrize("skip", ["zeros", "noise", "dup", "none"])
def test_controls_carry_no_information_of_the_example(skip, decoder):
  """Another image's features change nothing, in training and in use."""
  module, features = make_decoder(decoder, skip, (True, True))
  variables = fill(module, features, CONTEXT)
  other = [2 - 3 * x for x in features[:-1]] + features[-1:]
  for rngs in ({}, {"noise": jax.random.key(3)}):
    apply = jax.jit(functools.partial(module.apply, rngs=rngs))
    here = apply(variables, features, CONTEXT)[0]
    there = apply(variables, other, CONTEXT)[0]
    np.testing.assert_array_equal(here, there)


def test_the_same_test_sees_information_where_there_is_some():
  module, features = make_decoder("plain", "concat", (True, True))
  variables = fill(module, features, CONTEXT)
  other = [2 - 3 * x for x in features[:-1]] + features[-1:]
  here = module.apply(variables, features, CONTEXT)[0]
  assert not np.allclose(here, module.apply(variables, other, CONTEXT)[0])


@pytest.mark.parametrize("decoder", ["plain", "full_scale"])
def test_shuffle_shows_the_partner_and_not_the_example(decoder):
  module, features = make_decoder(decoder, "shuffle", (True, True))
  variables = fill(module, features, CONTEXT)

  @jax.jit
  def first(features):
    return module.apply(variables, features, CONTEXT)[0][0]

  def changed(example):
    changed = [x.copy() for x in features]
    for x in changed[:-1]:
      x[example] = 2 - 3 * x[example]
    return not np.allclose(first(features), first(changed))

  assert not changed(0), "its own features"
  assert changed(1), "its partner's"


def test_none_is_all_levels_off_and_zeros_keeps_the_parameters():
  def shapes(skip, levels):
    module, features = make_decoder("plain", skip, levels)
    return jax.tree.map(np.shape, fill(module, features, CONTEXT)["params"])

  off = shapes("concat", (False, False))
  assert shapes("none", (True, True)) == off
  assert shapes("zeros", (True, True)) == shapes("concat", (True, True)) != off
