"""Batch norm against PyTorch's, in value, gradients and running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from unet_jax.batch_norm import BatchNorm

KINDS = {
  1: torch.nn.BatchNorm1d,
  2: torch.nn.BatchNorm2d,
  3: torch.nn.BatchNorm3d,
}


def draw(shape, seed, mean=0.0):
  return mean + np.random.default_rng(seed).normal(size=shape)


def step(module, variables, x, dy):
  """Output, new statistics, gradients of x and of the parameters."""

  def apply(x, params):
    y, new = module.apply(
      {"params": params, "batch_stats": variables["batch_stats"]},
      x,
      mutable=["batch_stats"],
    )
    return jnp.sum(y * dy), (y, new["batch_stats"])

  grad = jax.grad(apply, (0, 1), has_aux=True)
  (dx, dparams), (y, stats) = grad(x, variables["params"])
  return y, stats, dx, dparams


@pytest.mark.parametrize("size", [(6,), (4, 5), (3, 2, 4)])
def test_two_steps_equal_pytorchs(size):
  shape = (3, *size, 5)
  with jax.enable_x64(True):
    module = BatchNorm(use_running_average=False, momentum=0.9)
    variables = {
      "params": {"scale": draw(5, 1), "bias": draw(5, 2)},
      "batch_stats": {"mean": np.zeros(5), "var": np.ones(5)},
    }
    theirs = KINDS[len(size)](5, eps=1e-5, momentum=0.1).double()
    with torch.no_grad():
      theirs.weight.copy_(torch.tensor(variables["params"]["scale"]))
      theirs.bias.copy_(torch.tensor(variables["params"]["bias"]))
    for seed in (3, 4):
      x, dy = draw(shape, seed, mean=7.0), draw(shape, seed + 10)
      y, stats, dx, dparams = jax.jit(lambda *a: step(module, *a))(
        variables, x, dy
      )
      variables["batch_stats"] = stats
      tx = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
      theirs.zero_grad()
      ty = theirs(tx)
      ty.backward(torch.tensor(np.moveaxis(dy, -1, 1)))
      pairs = [
        (y, np.moveaxis(ty.detach().numpy(), 1, -1)),
        (dx, np.moveaxis(tx.grad.numpy(), 1, -1)),
        (dparams["scale"], theirs.weight.grad.numpy()),
        (dparams["bias"], theirs.bias.grad.numpy()),
        (stats["mean"], theirs.running_mean.numpy()),
        (stats["var"], theirs.running_var.numpy()),
      ]
      for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, atol=1e-11)

    module = BatchNorm(use_running_average=True, momentum=0.9)
    theirs.eval()
    expected = theirs(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()
    np.testing.assert_allclose(
      module.apply(variables, x), np.moveaxis(expected, 1, -1), atol=1e-11
    )


def test_a_mean_far_from_zero_costs_no_digits():
  """The mean square less the squared mean has none left at 3000 +- 1."""
  module = BatchNorm(use_running_average=False, momentum=0.0)
  variables = {
    "params": {"scale": np.ones(2, "f"), "bias": np.zeros(2, "f")},
    "batch_stats": {"mean": np.zeros(2, "f"), "var": np.ones(2, "f")},
  }
  for seed in range(2):  # The first step has no mean to start from.
    x = draw((4, 16, 16, 2), seed, mean=3000.0).astype("f")
    y, variables["batch_stats"], _, _ = step(module, variables, x, x)
  x = x.astype(np.float64)
  expected = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
  np.testing.assert_allclose(y, expected, atol=2e-4)


def test_devices_together_are_one_batch():
  with jax.enable_x64(True):
    x, dy = draw((8, 2, 3, 4), 0, mean=2.0), draw((8, 2, 3, 4), 1)
    variables = {
      "params": {"scale": draw(4, 2), "bias": draw(4, 3)},
      "batch_stats": {"mean": draw(4, 4), "var": np.ones(4)},
    }
    whole = BatchNorm(use_running_average=False, momentum=0.9)
    split = whole.clone(axis_name="data")
    y, stats, dx, dparams = step(whole, variables, x, dy)
    run = jax.pmap(
      lambda x, dy: step(split, variables, x, dy), axis_name="data"
    )
    ys, all_stats, dxs, shares = run(x[:, None], dy[:, None])
    np.testing.assert_allclose(ys[:, 0], y, atol=1e-12)
    np.testing.assert_allclose(dxs[:, 0], dx, atol=1e-12)
    for name in stats:
      for device in all_stats[name]:
        np.testing.assert_allclose(device, stats[name], atol=1e-12)
    for name in dparams:
      np.testing.assert_allclose(shares[name].sum(0), dparams[name], atol=1e-12)
