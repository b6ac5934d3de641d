"""Parts of the network against formulas written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from unet_jax.models import blocks


def aligned(x):
  """PyTorch's align_corners=True on one axis, point by point."""
  n = len(x)
  out = []
  for i in range(2 * n):
    position = i * (n - 1) / (2 * n - 1)
    k = min(int(position), n - 1)
    f = position - k
    out.append((1 - f) * x[k] + f * x[min(k + 1, n - 1)])
  return np.array(out)


def half_pixel(x):
  """PyTorch's align_corners=False on one axis, point by point."""
  n = len(x)
  out = []
  for i in range(2 * n):
    position = max((i + 0.5) / 2 - 0.5, 0)
    k = min(int(position), n - 1)
    f = position - k
    out.append((1 - f) * x[k] + f * x[min(k + 1, n - 1)])
  return np.array(out)


@pytest.mark.parametrize(
  ("module", "formula"),
  [(blocks.AlignedUp, aligned), (blocks.LinearUp, half_pixel)],
)
@pytest.mark.parametrize("shape", [(5,), (1,), (3, 4), (2, 1, 3)])
def test_upsampling_equals_the_formula(module, formula, shape):
  x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
  expected = x
  for axis in range(1, x.ndim - 1):
    expected = np.apply_along_axis(formula, axis, expected)
  got = module(features=7).apply({}, jnp.asarray(x))
  np.testing.assert_allclose(got, expected, atol=1e-6)


def test_transpose_up_adds_one_tap_a_pixel():
  """y[2i + a] = x[i] K[1 - a] + b: kernel 2, stride 2, nothing overlaps."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 4)), "float32")
  module = blocks.TransposeUp(features=5)
  variables = module.init(jax.random.key(0), x)
  weights = variables["params"]["ConvTranspose_0"]
  y = module.apply(variables, x)
  # Flax correlates the dilated input, so its taps [2, 2, in, out] come mirrored
  # with respect to PyTorch's.
  taps = weights["kernel"][::-1, ::-1]
  expected = jnp.einsum("bhwc,ijcd->bhiwjd", x, taps)
  np.testing.assert_allclose(
    y,
    expected.reshape(1, 6, 4, 5) + weights["bias"][None, None, None],
    atol=1e-5,
  )


def test_he_normal_is_the_papers_and_not_truncated():
  shape = (3, 3, 64, 64)
  draws = np.asarray(blocks.he_normal(jax.random.key(0), shape)).ravel()
  std = np.sqrt(2 / (9 * 64))
  assert stats.kstest(draws / std, "norm").pvalue > 0.01
  # A truncated normal, JAX's default, has nothing beyond 2 standard deviations.
  assert abs(np.mean(np.abs(draws) > 2 * std) - 0.0455) < 0.005


def test_crop():
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(
    blocks.crop_to(x, (2, 2))[0, ..., 0], [[5, 6], [9, 10]]
  )


# --- Stochastic depth ---------------------------------------------------------


def residual_block(rate, train):
  """(inputs, outputs, branch) of a residual block in which nothing clips."""
  identity = lambda *_, **__: lambda x: x
  layers = blocks.Layers(
    conv=lambda *_, **__: lambda x: 3 * x,
    norm=identity,
    activation=lambda x: x,
    dropout=identity,
    drop_branch=lambda: blocks.DropBranch(rate, not train),
    residual=True,
  )
  x = jnp.asarray(np.random.default_rng(0).normal(size=(400, 2, 3, 1)))
  block = blocks.ConvBlock((1, 1), layers)
  return x, block.apply({}, x, rngs={"dropout": jax.random.key(0)})


def test_stochastic_depth_drops_the_branch_of_whole_examples():
  rate = 0.3
  x, y = residual_block(rate, train=True)
  branch = np.asarray(y - x).reshape(400, -1)
  dropped = (branch == 0).all(1)
  # 120 expected; the standard deviation is 9.
  assert abs(dropped.sum() - 120) < 40
  want = 9 * np.asarray(x).reshape(400, -1) / (1 - rate)
  np.testing.assert_allclose(branch[~dropped], want[~dropped], rtol=1e-5)


@pytest.mark.parametrize(("rate", "train"), [(0.3, False), (0.0, True)])
def test_without_it_the_block_is_whole(rate, train):
  x, y = residual_block(rate, train)
  np.testing.assert_allclose(y, 10 * x, rtol=1e-6)
