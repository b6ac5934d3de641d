"""Several outputs, one loss: the weights, and the presence of a class."""

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.objectives import losses
from unet_jax.objectives.supervision import presence_loss, supervise

RNG = np.random.default_rng(0)
LOSS = losses.make_loss(
  terms=("cross_entropy", "dice"), weights=(1.0, 0.5), class_weights=()
)
LABEL = jnp.asarray(RNG.integers(0, 3, (2, 4, 4)), jnp.int32)
WEIGHT = jnp.asarray(RNG.random((2, 4, 4)) > 0.2, jnp.float32)


def logits():
  return jnp.asarray(RNG.normal(size=(2, 4, 4, 3)), "float32")


def test_one_output_is_the_loss_itself():
  y = logits()
  loss, parts = supervise(LOSS, [y], None, LABEL, WEIGHT)
  expected, terms = LOSS(y, LABEL, WEIGHT)
  np.testing.assert_array_equal(loss, expected)
  assert parts.keys() == terms.keys()


def test_outputs_weigh_1_half_quarter_normalised():
  outputs = [logits() for _ in range(3)]
  loss, parts = supervise(LOSS, outputs, None, LABEL, WEIGHT)
  each = [LOSS(y, LABEL, WEIGHT)[0] for y in outputs]
  expected = (4 * each[0] + 2 * each[1] + each[2]) / 7
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  for k in range(3):
    np.testing.assert_array_equal(parts[f"output_{k}"], each[k])
  # The terms are those of the prediction.
  terms = LOSS(outputs[0], LABEL, WEIGHT)[1]
  np.testing.assert_array_equal(parts["dice"], terms["dice"])


def test_presence_is_a_binary_cross_entropy_a_class():
  presence = jnp.asarray([[2.0, -1.0], [0.5, 3.0]])
  label = jnp.asarray([[0, 1, 1], [2, 0, 9]], jnp.int32)
  weight = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
  # Of the first example class 1 is there; of the second nothing that counts.
  truth = np.array([[1, 0], [0, 0]])
  p = 1 / (1 + np.exp(-np.asarray(presence)))
  expected = -np.where(truth, np.log(p), np.log(1 - p)).mean(-1)
  got = presence_loss(presence, label, weight)
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  # An example of which nothing counts has no loss and no gradient.
  grad = jax.grad(lambda z: presence_loss(z, label, 0 * weight).sum())(presence)
  assert not np.any(grad)


def test_presence_is_added_and_cropped_with_the_logits():
  presence = jnp.asarray([[2.0, -1.0], [0.5, 3.0]])
  y = logits()
  wide = jnp.pad(LABEL, ((0, 0), (2, 2), (2, 2)), constant_values=2)
  ones = jnp.ones(wide.shape)
  loss, parts = supervise(LOSS, [y], presence, wide, ones)
  inner = presence_loss(presence, LABEL, jnp.ones(LABEL.shape))
  np.testing.assert_allclose(parts["presence"], inner)
  np.testing.assert_allclose(loss, LOSS(y, wide, ones)[0] + inner, rtol=1e-6)
