"""Schedules and rules against optax's own and written-out updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unet_jax import optimizer
from unet_jax.schema import OptimizerConfig

STEPS = np.arange(100)


def rates(num_steps=100, **fields):
  cfg = OptimizerConfig(learning_rate=0.3, **fields)
  return np.asarray(optimizer.make_schedule(cfg, num_steps)(STEPS))


def test_schedules_equal_optax():
  np.testing.assert_allclose(rates(schedule="constant"), 0.3, rtol=1e-6)
  cosine = optax.cosine_decay_schedule(0.3, 100, alpha=0.1)
  np.testing.assert_allclose(
    rates(schedule="cosine", end_factor=0.1), cosine(STEPS), rtol=1e-5
  )
  poly = optax.polynomial_schedule(0.3, 0.0, 0.9, 100)
  np.testing.assert_allclose(
    rates(schedule="polynomial", power=0.9), poly(STEPS), rtol=1e-5
  )


def test_warm_up_is_linear_and_reaches_the_peak():
  warm = rates(schedule="cosine", warmup_steps=10)
  np.testing.assert_allclose(warm[:10], 0.3 * np.arange(1, 11) / 10, rtol=1e-6)
  cosine = optax.cosine_decay_schedule(0.3, 90)
  np.testing.assert_allclose(warm[10:], cosine(STEPS[:90]), rtol=1e-5)


def test_the_schedule_follows_the_length_of_the_run():
  longer = rates(num_steps=200, schedule="cosine")
  np.testing.assert_allclose(
    longer, optax.cosine_decay_schedule(0.3, 200)(STEPS), rtol=1e-5
  )


def test_a_schedule_needs_no_fractional_power_of_a_negative_number():
  cfg = OptimizerConfig(schedule="polynomial", warmup_steps=5)
  late = optimizer.make_schedule(cfg, 10)(np.arange(30))
  assert bool(jnp.all(jnp.isfinite(late)))
  assert float(late[-1]) == 0


PARAMS = {
  "conv": {"kernel": np.float32([[1.0, -2.0]]), "bias": np.float32([0.5])},
  "norm": {"scale": np.float32([2.0]), "bias": np.float32([1.0])},
}


def grads(step):
  rng = np.random.default_rng(step)
  return jax.tree.map(
    lambda p: rng.normal(size=p.shape).astype(np.float32), PARAMS
  )


def run(tx, rate, steps=5):
  params, state = PARAMS, tx.init(PARAMS)
  for step in range(steps):
    updates, state = tx.update(grads(step), state, params)
    params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
  return params


def run_optax(tx, steps=5):
  params, state = PARAMS, tx.init(PARAMS)
  for step in range(steps):
    updates, state = tx.update(grads(step), state, params)
    params = optax.apply_updates(params, updates)
  return params


MASK = {
  "conv": {"kernel": True, "bias": False},
  "norm": {"scale": False, "bias": False},
}


@pytest.mark.parametrize(
  ("cfg", "expected"),
  [
    (
      OptimizerConfig(name="adamw", weight_decay=0.1),
      optax.adamw(0.01, weight_decay=0.1, mask=MASK),
    ),
    (OptimizerConfig(name="adam", weight_decay=0.0), optax.adam(0.01)),
    (
      OptimizerConfig(name="adam", weight_decay=0.1),
      optax.chain(optax.add_decayed_weights(0.1, MASK), optax.adam(0.01)),
    ),
    (
      OptimizerConfig(name="sgd", momentum=0.99, weight_decay=0.0),
      optax.sgd(0.01, momentum=0.99),
    ),
    (
      OptimizerConfig(name="sgd", weight_decay=0.0, clip_norm=0.5),
      optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.01, 0.9)),
    ),
  ],
)
def test_rules_equal_optax(cfg, expected):
  got = run(optimizer.make_optimizer(cfg), 0.01)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    got,
    run_optax(expected),
  )


def test_weight_decay_leaves_biases_and_norms_alone():
  base = OptimizerConfig(weight_decay=0.0)
  decayed = dataclasses.replace(base, weight_decay=0.5)
  a, b = (run(optimizer.make_optimizer(c), 0.01) for c in (base, decayed))
  np.testing.assert_array_equal(a["conv"]["bias"], b["conv"]["bias"])
  jax.tree.map(np.testing.assert_array_equal, a["norm"], b["norm"])
  assert not np.allclose(a["conv"]["kernel"], b["conv"]["kernel"])
