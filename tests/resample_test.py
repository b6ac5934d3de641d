"""Pooling against XLA's, interpolation against PyTorch's; gradients too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unet_jax import resample

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.fixture(params=["cpu", "default"], autouse=True)
def platform(monkeypatch, request):
  """Both forms, whatever the tests run on."""

  def choose(*args, **forms):
    return forms[request.param](*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", choose)


def value_and_gradient(function, x, seed=1):
  """f(x), and the gradient of a random functional of it."""
  y, vjp = jax.vjp(function, x)
  dy = np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)
  return np.asarray(y), np.asarray(vjp(jnp.asarray(dy))[0]), dy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(7,), (8, 6), (5, 9), (2, 3), (4, 5, 6)])
def test_max_pool_equals_xlas(size, dtype):
  """Half of the values are equal: the first of equal ones gets the gradient."""
  x = np.random.default_rng(0).integers(0, 3, (2, *size, 3))
  x = jnp.asarray(x, dtype)
  window = (2,) * len(size)
  expected = value_and_gradient(lambda x: nn.max_pool(x, window, window), x)
  got = value_and_gradient(lambda x: resample.max_pool(x, 2), x)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [(17,), (9, 12)])
@pytest.mark.parametrize("factor", [1, 4, 8])
def test_wider_windows(size, factor):
  x = np.random.default_rng(0).normal(size=(2, *size, 3))  # All different.
  x, window = jnp.asarray(x, "float32"), (factor,) * len(size)
  expected = value_and_gradient(lambda x: nn.max_pool(x, window, window), x)
  got = value_and_gradient(lambda x: resample.max_pool(x, factor), x)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_pooling_what_is_not_a_number_is_not_a_number():
  x = jnp.asarray([[[1.0], [np.nan], [2.0], [3.0]]])
  assert np.array_equal(resample.max_pool(x, 2)[0, :, 0], [np.nan, 3], True)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("size", [(1,), (6,), (5, 4), (1, 2), (2, 3, 5)])
def test_linear_up_equals_pytorchs(size, factor, aligned):
  x = np.random.default_rng(0).normal(size=(2, *size, 3))
  with jax.enable_x64(True):
    function = lambda x: resample.linear_up(x, factor, aligned)
    y, dx, dy = value_and_gradient(jax.jit(function), jnp.asarray(x))
  theirs = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
  up = torch.nn.functional.interpolate(
    theirs, scale_factor=factor, mode=MODES[len(size)], align_corners=aligned
  )
  up.backward(torch.tensor(np.moveaxis(dy, -1, 1)))
  up = np.moveaxis(up.detach().numpy(), 1, -1)
  np.testing.assert_allclose(y, up, atol=1e-12)
  gradient = np.moveaxis(theirs.grad.numpy(), 1, -1)
  np.testing.assert_allclose(dx, gradient, atol=1e-12)


def test_under_vmap_and_remat():
  x = np.random.default_rng(0).normal(size=(3, 2, 4, 6, 2)).astype("float32")

  def gradient(x):
    def total(x):
      y = resample.linear_up(resample.max_pool(x, 2), 2, False)
      return jnp.sum(jnp.sin(y))

    return jax.grad(jax.checkpoint(total))(x)

  one_by_one = jnp.stack([gradient(jnp.asarray(part)) for part in x])
  np.testing.assert_allclose(
    jax.jit(jax.vmap(gradient))(x), one_by_one, atol=1e-6
  )
