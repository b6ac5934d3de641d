"""Probes: against networks whose joins are opened by hand."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax.models import build_model, skips
from unet_jax.models.probes import CUTS, Cut, overhear
from unet_jax.models.skips import Context

SHAPE = (2, 4, 4, 1)
# Of 2 x 2 levels; each decoder with another kind of join.
NETS = {
  "plain": {"decoder": "plain", "skip": "concat", "remat": "level"},
  "gate": {"decoder": "plain", "skip": "se"},
  "cut": {"decoder": "plain", "skip": "add", "skip_levels": (True, False)},
  "none": {"decoder": "plain", "skip": "none"},
  "nested": {"decoder": "nested", "skip": "concat"},
  "full_scale": {"decoder": "full_scale", "skip": "scalar"},
}


def run(model, variables, image, **fields):
  return jax.jit(lambda v, x: model.apply(v, x, **fields))(variables, image)


def make(name):
  """(model, variables, image, weights of a loss) in float64."""
  model = build_model(
    num_classes=1, widths=(2, 3, 4), norm="none", **NETS[name]
  )
  rng = np.random.default_rng(0)
  image = jnp.array(rng.normal(size=SHAPE))
  variables = jax.tree.map(
    lambda x: x + 0.5 * rng.normal(size=x.shape),
    jax.jit(model.init)(jax.random.key(0), image),
  )
  shape = jax.eval_shape(model.apply, variables, image).shape
  return model, variables, image, jnp.array(rng.normal(size=shape))


@contextlib.contextmanager
def opened(change):
  """Every join gets `change(its path, wires)` in place of its wires."""

  def intercept(call, args, kwargs, context):
    if isinstance(context.module, skips.Join):
      if context.method_name == "__call__":
        args = (change(context.module, args[0]), *args[1:])
    return call(*args, **kwargs)

  with nn.intercept_methods(intercept):
    yield


def split_gradients(model, variables, image, weights):
  """Of the loss by what is added to each wire: {(join, level, side): ...}."""
  shapes = {}

  def note(join, wires):
    for k, x in [*enumerate(wires.sides), ("up", wires.up)]:
      shapes[join.name, join.level, str(k)] = x.shape
    return wires

  with opened(note):
    jax.eval_shape(model.apply, variables, image)

  @jax.jit
  def loss(added):
    def add(join, wires):
      get = lambda k: added[join.name, join.level, str(k)]
      sides = [x + get(k) for k, x in enumerate(wires.sides)]
      return wires._replace(sides=sides, up=wires.up + get("up"))

    with opened(add):
      return jnp.sum(weights * model.apply(variables, image))

  zeros = {key: jnp.zeros(shape) for key, shape in shapes.items()}
  return loss, jax.jit(jax.grad(loss))(zeros)


def heard(model, variables, image, weights):
  def loss(ears):
    y, sown = model.apply(
      variables, image, context=Context(ears=ears), mutable=["energy"]
    )
    return jnp.sum(weights * y), sum(jax.tree.leaves(sown["energy"]))

  depth = len(model.widths) - 1
  return jax.jit(jax.grad(loss, has_aux=True))(jnp.full((2, depth), 0.5))


@pytest.mark.parametrize("name", NETS)
def test_squares_are_those_of_the_opened_network(name):
  with jax.enable_x64(True):
    model, variables, image, weights = make(name)
    loss, gradients = split_gradients(model, variables, image, weights)
    expected = np.zeros((2, 2))
    for (_, level, k), g in gradients.items():
      expected[int(k == "up"), level] += np.sum(np.square(g))
    squares, _ = heard(model, variables, image, weights)
    np.testing.assert_allclose(squares, expected, rtol=1e-9, atol=0)
    off = name == "none" or name == "cut"
    assert (np.asarray(squares)[0, 1] == 0) == off
    # And finite differences: along itself a gradient's slope is its norm.
    for level in (0, 1):
      at = lambda t, level=level: {
        key: t * g * (key[1] == level) / np.sqrt(expected[:, level].sum())
        for key, g in gradients.items()
      }
      slope = (loss(at(1e-6)) - loss(at(-1e-6))) / 2e-6
      norm = np.sqrt(expected[:, level].sum())
      np.testing.assert_allclose(slope, norm, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "cut", "nested", "full_scale"])
def test_energies_are_those_of_what_is_joined(name):
  with jax.enable_x64(True):
    model, variables, image, weights = make(name)
    joined = {}

    def add_up(join, wires):
      sides = wires.sides
      if name == "full_scale":  # sigma(a) x.
        params = variables["params"]["decoder"][join.name]
        a = [nn.sigmoid(params[f"a_{k}"]) for k in range(len(sides))]
        sides = [a * x for a, x in zip(a, sides, strict=True)]
      up = wires.up
      if sides and up.shape[-1] != sides[0].shape[-1]:
        assert not isinstance(join, skips.Add), "W u is not looked at here"
      joined[join.name, join.level] = sides, up
      return wires

    def look(variables, image):
      with opened(add_up):
        model.clone(remat="none").apply(variables, image)
      return list(joined.values())

    expected = np.zeros((2, 2, 2))
    found = jax.jit(look)(variables, image)
    for (_, level), (sides, up) in zip(joined, found, strict=True):
      squares = lambda xs: sum(np.sum(np.square(x), (1, 2, 3)) for x in xs)
      expected[0, level] += squares(sides)
      expected[1, level] += squares([*sides, up])
    _, energy = heard(model, variables, image, weights)
    np.testing.assert_allclose(energy, expected, rtol=1e-9)


def test_overhear_changes_nothing_and_counts_every_use():
  x, ear = jnp.arange(4.0), jnp.array(3.0)
  f = lambda x, ear: jnp.sum(overhear(x, ear) ** 2 + 3 * overhear(x, ear))
  gradient, total = jax.grad(f, argnums=(0, 1))(x, ear)
  np.testing.assert_allclose(gradient, 2 * x + 3)
  np.testing.assert_allclose(total, np.sum((2 * x) ** 2) + 4 * 9)
  half = jnp.bfloat16(1.0) * x.astype(jnp.bfloat16)
  _, total = jax.grad(f, argnums=(0, 1))(half, ear)
  assert total.dtype == jnp.float32
  assert jax.grad(f, argnums=1)(x, jnp.array(0.0)) == 0  # Nobody listens.


@pytest.mark.parametrize("decoder", ["plain", "nested", "full_scale"])
def test_cuts_are_those_of_the_opened_network(decoder):
  """Shuffled: features of the other image, whole, as it alone makes them."""
  model, variables, image, _ = make(decoder)
  model, image = model.clone(remat="none"), image.astype(np.float32)

  def by_hand(variables, image):
    kept = {}
    with opened(lambda join, wires: kept.setdefault(join.name, wires)):
      outputs = [model.apply(variables, image[1:])]

    def cut(kind, join, wires):
      def change(k, x):
        # Side k of the full-scale decoder comes from level k.
        if (k if decoder == "full_scale" else join.level) != 1:
          return x
        mean = jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)
        return (x, 0 * x, mean, kept[join.name].sides[k])[kind]

      sides = [change(k, x) for k, x in enumerate(wires.sides)]
      return wires._replace(sides=sides)

    for kind in range(len(CUTS)):
      with opened(functools.partial(cut, kind)):
        outputs.append(model.apply(variables, image[:1]))
    return outputs

  @jax.jit
  def cut(how):
    context = Context(cut=Cut(how, jnp.array([1, 1])))
    return model.apply(variables, image, context=context)

  other, *expected = jax.jit(by_hand)(variables, image)
  for kind, y in enumerate(expected):
    got = cut(jnp.array([0, kind]))
    np.testing.assert_allclose(got[:1], y, atol=1e-5)
    assert (np.abs(y - expected[0]).max() > 1e-3) == (kind > 0)
  np.testing.assert_allclose(got[1:], other, atol=1e-5)


def test_a_zeroed_skip_is_a_kernel_without_its_rows():
  model, variables, image, _ = make("plain")
  image = image.astype(np.float32)
  context = Context(cut=Cut(jnp.array([1, 0])))
  got = run(model, variables, image, context=context)
  params = jax.device_get(variables["params"])
  kernel = params["decoder"]["decoder_0"]["Conv_0"]["kernel"].copy()
  kernel[:, :, :2] = 0
  params["decoder"]["decoder_0"]["Conv_0"]["kernel"] = kernel
  expected = run(model, {**variables, "params": params}, image)
  np.testing.assert_allclose(got, expected, atol=1e-6)
