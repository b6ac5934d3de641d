import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.models import variants
from unet_jax.inspect import cost
from unet_jax.models import build_model


def _flops(function, *args):
  """Operations by XLA, two a multiply-accumulate."""
  return jax.jit(function).lower(*args).cost_analysis()["flops"]


def _shape(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _conv(x, kernel, **more):
  numbers = jax.lax.conv_dimension_numbers(
    x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC")
  )
  more = {"window_strides": (1, 1), "padding": "VALID", **more}
  return lambda x, k: jax.lax.conv_general_dilated(
    x, k, dimension_numbers=numbers, **more
  )


@pytest.mark.parametrize(
  "image, kernel, more",
  [
    ((1, 12, 10, 3), (3, 3, 3, 5), {}),
    ((2, 12, 10, 4), (2, 2, 4, 6), {"window_strides": (2, 2)}),
    ((1, 12, 10, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 2)}),
    ((1, 12, 10, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
  ],
)
def test_valid_convolutions_cost_what_xla_says(image, kernel, more):
  x, k = _shape(*image), _shape(*kernel)
  conv = _conv(x, k, **more)
  assert 2 * cost.count_macs(conv, x, k) == _flops(conv, x, k)


def test_a_transposed_convolution_is_not_charged_for_its_zeros():
  x, k = _shape(1, 6, 7, 4), _shape(2, 2, 4, 3)
  up = lambda x, k: jax.lax.conv_transpose(
    x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  macs = cost.count_macs(up, x, k)
  # Every input meets every tap once.
  assert macs == 6 * 7 * 2 * 2 * 4 * 3
  assert 2 * macs == _flops(up, x, k)


def test_same_padding_differs_from_xla_by_the_taps_beyond_the_border():
  n, m, x, k = 12, 9, _shape(1, 12, 9, 4), _shape(3, 3, 4, 5)
  conv = _conv(x, k, padding="SAME")
  assert cost.count_macs(conv, x, k) == 20 * (3 * n) * (3 * m)
  assert _flops(conv, x, k) == 2 * 20 * (3 * n - 2) * (3 * m - 2)


def test_products_loops_and_branches():
  a, b = _shape(3, 5, 7), _shape(3, 7, 2)
  product = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)
  assert cost.count_macs(product, a, b) == 3 * 5 * 7 * 2
  assert _flops(product, a, b) == 2 * 3 * 5 * 7 * 2
  square = _shape(4, 4)
  step = lambda x, _: (jax.jit(jnp.dot)(x, x), None)
  loop = lambda x: jax.lax.scan(step, x, length=6)[0]
  assert cost.count_macs(loop, square) == 6 * 4**3
  branch = lambda x: jax.lax.cond(x[0, 0] > 0, jnp.exp, lambda x: x @ x, x)
  assert cost.count_macs(branch, square) == 4**3
  assert cost.count_macs(jax.checkpoint(loop), square) == 6 * 4**3


def test_a_valid_network_costs_what_xla_says():
  fields = {"padding": "valid", "norm": "none", "widths": (4, 8, 16)}
  model, x = build_model(num_classes=2, **fields), _shape(1, 60, 60, 1)
  variables, _ = variants.abstract(model, x.shape)
  eqns = cost.all_eqns(jax.make_jaxpr(model.apply)(variables, x).jaxpr.eqns)
  # XLA also counts biases, ReLUs, and three comparisons a pooled pixel.
  each = {"add": 1, "max": 1, "reduce_window_max": 3}
  rest = sum(
    each.get(eqn.primitive.name, 0) * eqn.outvars[0].aval.size for eqn in eqns
  )
  macs = cost.count_macs(model.apply, variables, x)
  assert 2 * macs + rest == _flops(model.apply, variables, x)


@pytest.mark.parametrize(
  "size, fields, macs",
  [
    (572, {"preset": "unet2015"}, 150_428_424_448),
    (256, {"widths": (64, 128, 256, 512, 1024)}, 48_096_083_968),
  ],
)
def test_the_papers_network(size, fields, macs):
  model, x = build_model(num_classes=2, **fields), _shape(1, size, size, 1)
  variables, _ = variants.abstract(model, x.shape)
  assert cost.count_macs(model.apply, variables, x) == macs


def test_a_choice_by_platform_counts_its_default():
  """Which form a platform takes is not a property of the network."""

  def product(x):
    return lax.platform_dependent(
      x, cpu=lambda x: x @ x @ x, default=lambda x: x @ x
    )

  square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
  assert cost.count_macs(product, square) == 4**3
