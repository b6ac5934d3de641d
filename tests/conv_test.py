"""Our forms of the convolution against XLA's own: values and both gradients."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.models import variants
from unet_jax import conv, conv_table
from unet_jax.models import build_model

NUMBERS = {
  d: nn.linear._conv_dimension_numbers((0,) * (d + 2)) for d in (1, 2, 3)
}


def draw(shape, dtype, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def results(form, x, kernel, readout, strides, padding):
  """(value, gradient of x, gradient of the kernel) under jit."""
  apply = functools.partial(
    form,
    window_strides=strides,
    padding=padding,
    dimension_numbers=NUMBERS[x.ndim - 2],
  )

  @jax.jit
  def run(x, kernel):
    y, vjp = jax.vjp(apply, x, kernel)
    return y, *vjp(readout)

  return run(x, kernel)


def compare(spatial, kernel, inputs, outputs, padding, stride, dtype, batch=1):
  d = len(spatial)
  x = draw((batch, *spatial, inputs), dtype)
  k = draw((*(kernel,) * d, inputs, outputs), dtype, 1)
  strides = (stride,) * d
  plain = functools.partial(
    lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    dimension_numbers=NUMBERS[d],
  )
  readout = draw(jax.eval_shape(plain, x, k).shape, dtype, 2)
  ours = results(conv.conv_general_dilated, x, k, readout, strides, padding)
  theirs = results(lax.conv_general_dilated, x, k, readout, strides, padding)
  bound = 1e-12 if dtype == np.float64 else 2e-5
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, atol=bound * np.abs(b).max(), rtol=0)


@pytest.fixture(params=["i", "o"])
def always(monkeypatch, request):
  """Our forms for every size, so that the tests can be small."""
  letters = {"value": request.param, "kernel": "b"}
  monkeypatch.setattr(conv, "_look_up", lambda what, *_: letters[what])
  monkeypatch.setattr(conv, "_MIN_MACS", 0)
  monkeypatch.setattr(conv, "_BLOCK_PIXELS", 24)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
  ("spatial", "inputs", "outputs", "batch"),
  [
    ((9,), 2, 3, 2),
    ((7, 11), 1, 4, 1),
    ((8, 8), 3, 1, 3),
    ((13, 5), 2, 2, 2),
    ((5, 7, 6), 2, 3, 1),
    ((4, 5, 5), 1, 2, 2),
  ],
)
def test_values_and_gradients_are_xlas(
  always, spatial, inputs, outputs, batch, padding
):
  with jax.enable_x64(True):
    for dtype in (np.float64, np.float32):
      compare(spatial, 3, inputs, outputs, padding, 1, dtype, batch)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
  ("kernel", "stride"), [(1, 1), (1, 2), (2, 2), (2, 1), (3, 2), (3, 3)]
)
def test_other_kernels_and_strides(always, kernel, stride, padding):
  """Odd sizes too: what no window covers is left, or padded."""
  with jax.enable_x64(True):
    for spatial in ((9,), (8, 7), (5, 6, 4)):
      compare(spatial, kernel, 2, 3, padding, stride, np.float64, 2)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_many_channels_as_the_table_has_them(padding):
  compare((128, 129), 3, 64, 65, padding, 1, np.float32)
  compare((18, 16), 3, 512, 512, padding, 1, np.float32)
  compare((9, 8, 7), 3, 32, 33, padding, 1, np.float32)
  compare((8, 8, 8), 3, 257, 63, padding, 1, np.float32)
  compare((64, 64), 1, 512, 3, padding, 1, np.float32)


def test_the_table_is_whole_and_the_nearest_class_is_taken():
  count = len(conv_table.CHANNELS)
  legal = {"value": "xio", "kernel": "xb"}
  for (what, axes, size), grid in conv_table.FORMS.items():
    assert [len(row) for row in grid] == [count] * count
    assert set("".join(grid)) <= set(legal[what])
    for i, k in itertools.product(range(count), repeat=2):
      channels = [2 ** conv_table.CHANNELS[n] for n in (i, k)]
      # As many pixels or a few more, as with padding="valid" or any image.
      for pixels in (2**size, 2**size + 2 ** (size - 2)):
        kernel = (3,) * axes + tuple(channels)
        assert conv._look_up(what, pixels, kernel) == grid[i][k]
  assert {key[:2] for key in conv_table.FORMS} == {
    ("kernel", 2),
    ("kernel", 3),
    ("value", 3),
  }


def loss(form, x, kernel):
  y = form(x, kernel, (1,) * (x.ndim - 2), "SAME",
           dimension_numbers=NUMBERS[x.ndim - 2])  # fmt: skip
  return jnp.sum(jnp.sin(y))


@pytest.mark.parametrize("spatial", [(8, 6), (4, 5, 6)])
def test_under_vmap_remat_pmap_and_a_sharded_jit(always, spatial):
  x = draw((8, *spatial, 3), np.float32)
  k = draw((*(3,) * len(spatial), 3, 2), np.float32, 1)
  grad = jax.grad(functools.partial(loss, conv.conv_general_dilated), (0, 1))
  plain = jax.grad(functools.partial(loss, lax.conv_general_dilated), (0, 1))
  check = functools.partial(
    jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
  )
  expected = jax.jit(plain)(x, k)
  check(jax.jit(grad)(x, k), expected)

  remat = jax.checkpoint(functools.partial(loss, conv.conv_general_dilated))
  check(jax.jit(jax.grad(remat, (0, 1)))(x, k), expected)

  kernels = np.stack([k, 2 * k])
  check(
    jax.jit(jax.vmap(grad, (None, 0)))(x, kernels),
    jax.jit(jax.vmap(plain, (None, 0)))(x, kernels),
  )

  mesh = Mesh(np.array(jax.devices()), ("data",))
  split = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  sharded = jax.jit(
    grad, in_shardings=(split, whole), out_shardings=(split, whole)
  )
  check(sharded(x, k), expected)

  shards = x.reshape(8, 1, *x.shape[1:])
  by_device = jax.pmap(grad, in_axes=(0, None))(shards, k)
  check(by_device[0].reshape(x.shape), expected[0])
  check(by_device[1].sum(0), expected[1])


def test_only_cpu_programs_hold_our_forms(always):
  x, k = draw((1, 8, 8, 4), np.float32), draw((3, 3, 4, 4), np.float32)
  grad = jax.jit(
    jax.grad(functools.partial(loss, conv.conv_general_dilated), (0, 1))
  )
  programs = {
    platform: grad.trace(x, k).lower(lowering_platforms=(platform,)).as_text()
    for platform in ("cpu", "cuda", "tpu")
  }
  loops = {name: "stablehlo.while" in text for name, text in programs.items()}
  assert loops == {"cpu": True, "cuda": False, "tpu": False}
  # The same convolutions as XLA's own gradient has.
  plain = jax.grad(functools.partial(loss, lax.conv_general_dilated), (0, 1))
  count = jax.jit(plain).lower(x, k).as_text().count("stablehlo.convolution")
  for name in ("cuda", "tpu"):
    assert programs[name].count("stablehlo.convolution") == count


def test_one_value_turns_it_off(always):
  x = draw((1, 8, 8, 1), np.float32)
  outputs, texts = [], []
  for form in ("fast", "xla"):
    model = build_model(num_classes=1, widths=(4, 4), norm="none", conv=form)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def total(params, model=model):
      return model.apply({"params": params}, x).sum()

    grad = jax.jit(jax.grad(total))
    outputs.append(grad(variables["params"]))
    texts.append(grad.lower(variables["params"]).as_text())
  assert ["stablehlo.while" in text for text in texts] == [True, False]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
    *outputs,
  )


def test_the_form_depends_on_one_example_alone():
  """The program for many is the program for one, whatever it is."""
  for (h, w, c), padding in itertools.product(
    [(128, 128, 64), (64, 64, 128)], ["SAME", "VALID"]
  ):
    programs = []
    for batch in (1, 2, 7):
      x = jax.ShapeDtypeStruct((batch, h, w, c), jnp.float32)
      k = jax.ShapeDtypeStruct((3, 3, c, 256), jnp.float32)

      def total(x, k, padding=padding):
        y = conv.conv_general_dilated(x, k, (1, 1), padding)
        return jnp.sum(jnp.sin(y))

      text = jax.jit(jax.grad(total, (0, 1))).lower(x, k).as_text()
      programs.append(re.findall(r"= stablehlo\.(\w+)", text))
    assert programs[0] == programs[1] == programs[2]


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("spatial", [(5,), (3, 4), (2, 3, 2)])
def test_the_transposed_convolution_is_flaxs(spatial, factor):
  with jax.enable_x64(True):
    x = draw((2, *spatial, 3), np.float64)
    window = (factor,) * len(spatial)
    theirs = nn.ConvTranspose(5, window, window, "VALID")
    ours = conv.ConvTranspose(5, factor, nn.initializers.ones)
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
      jnp.shape, jax.eval_shape(ours.init, jax.random.key(0), x)
    )
    variables = jax.tree.map(lambda s: draw(s.shape, np.float64, 1), shapes)

    def both(module):
      def total(variables, x):
        return jnp.sum(jnp.sin(module.apply(variables, x)))

      y = module.apply(variables, x)
      return y, *jax.jit(jax.grad(total, (0, 1)))(variables, x)

    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12),
      both(ours),
      both(theirs),
    )


@pytest.fixture
def on_tpu(monkeypatch):
  """The forms for TPU, computed here."""

  def choose(*args, cpu, default, tpu=None):
    return (tpu or default)(*args)

  monkeypatch.setattr(lax, "platform_dependent", choose)


@pytest.mark.parametrize(
  ("spatial", "kernel", "inputs", "outputs", "seam"),
  [
    ((9,), 3, 5, 3, 2),
    ((7, 6), 3, 5, 3, 2),
    ((4, 5, 6), 3, 3, 2, 1),
    ((7, 6), 1, 5, 1, 0),
    ((4, 5, 6), 1, 3, 1, 2),
  ],
)
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_the_forms_for_tpu(
  on_tpu, spatial, kernel, inputs, outputs, seam, padding
):
  d = len(spatial)
  window = conv._Window((1,) * d, ((0, 0),) * d, seam)
  kernel = (kernel,) * d + (inputs, outputs)
  assert conv._tpu_form(window, (2, *spatial, inputs), kernel)
  options = {
    "window_strides": (1,) * d,
    "padding": padding,
    "dimension_numbers": NUMBERS[d],
  }

  def run(form, x, k):
    def total(x, k):
      return jnp.sum(jnp.sin(form(x, k, **options)))

    return jax.value_and_grad(jax.checkpoint(total), (0, 1))(x, k)

  form = functools.partial(conv.conv_general_dilated, seam=seam)
  ours, plain = (
    functools.partial(run, f) for f in (form, lax.conv_general_dilated)
  )
  with jax.enable_x64(True):
    x = jnp.asarray(draw((2, *spatial, inputs), np.float64))
    k = jnp.asarray(draw(kernel, np.float64, 1))
    check = functools.partial(
      jax.tree.map, lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12)
    )
    check(jax.jit(ours)(x, k), plain(x, k))
    xs, ks = jnp.stack([x, -x]), jnp.stack([k, 2 * k])
    check(jax.jit(jax.vmap(ours))(xs, ks), jax.vmap(plain)(xs, ks))
    check(jax.pmap(ours)(xs, ks), jax.vmap(plain)(xs, ks))


@pytest.mark.parametrize(
  "fields",
  [
    {"skip": "concat"},
    {"skip": "add"},
    {"skip": "attn_oktay", "odd_size": "pad_up"},
    {"decoder": "nested", "residual": True},
    {"decoder": "full_scale", "deep_supervision": True},
    {"decoder": "full_scale", "skip": "mul"},
    {"dims": 3, "up": "linear_aligned"},
    {"padding": "valid", "narrow_decoder": True, "norm": "none"},
  ],
)
def test_a_network_on_tpu_is_the_network(monkeypatch, fields):
  """Value and gradients of all parameters, in float64."""
  model = build_model(num_classes=1, **{"widths": (2, 3, 4), **fields})
  size = 12 if model.dims == 2 else 8
  size = 44 if model.padding == "valid" else size
  with jax.enable_x64(True):
    x = jnp.asarray(draw((2, *(size,) * model.dims, 1), np.float64))
    variables = variants.fill(model, x, dtype=np.float64)

    def total(params, variables=variables):
      y, _ = model.apply(
        {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
      )
      return jnp.sum(jnp.sin(y))

    expected = jax.jit(jax.value_and_grad(total))(variables["params"])
    seams = []
    monkeypatch.setattr(
      conv, "_apart", lambda *a, form=conv._apart: seams.append(a) or form(*a)
    )
    monkeypatch.setattr(
      lax,
      "platform_dependent",
      lambda *a, cpu, default, tpu=None: (tpu or default)(*a),
    )
    got = jax.jit(jax.value_and_grad(lambda p: total(p)))(variables["params"])
  assert bool(seams) == (model.skip not in ("add", "mul"))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-9),
    got,
    expected,
  )


def test_a_bias_before_batch_norm_stays():
  """Its gradient is rounding: it shifts what batch norm shifts back."""
  x = draw((2, 8, 8, 1), np.float32)
  for norm, train in itertools.product(("batch", "instance"), (True, False)):
    model = build_model(num_classes=1, widths=(4, 4), norm=norm)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    def total(params, model=model, variables=variables, train=train):
      y, _ = model.apply(
        {**variables, "params": params}, x, train=train, mutable=["batch_stats"]
      )
      return jnp.sum(jnp.sin(y))

    grads = jax.jit(jax.grad(total))(variables["params"])
    conv_0 = grads["encoder_0"]["Conv_0"]
    assert np.any(conv_0["bias"]) == (norm != "batch" or not train)
    assert np.any(conv_0["kernel"])
    assert np.any(grads["head"]["bias"])
