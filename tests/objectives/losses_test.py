import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import strategies as st

from unet_jax import schema
from unet_jax.objectives import losses

# (term, number of logits): every way a loss can be reached.
CASES = [
  ("cross_entropy", 1),
  ("cross_entropy", 3),
  ("binary_cross_entropy", 1),
  ("focal", 1),
  ("focal", 3),
  ("top_k", 1),
  ("top_k", 3),
  ("dice", 1),
  ("dice", 3),
  ("tversky", 3),
  ("focal_tversky", 1),
  ("lovasz", 1),
  ("lovasz", 3),
  ("lovasz_hinge", 1),
  ("boundary", 1),
  ("boundary", 3),
]
CLASS_WEIGHTS = np.array([0.5, 2.0, 3.0])
all_cases = pytest.mark.parametrize(("term", "num_logits"), CASES)


def example(num_logits, shape=(2, 3, 4), seed=0):
  """Random float64 logits, labels, weights with zeros, class weights."""
  rng = np.random.default_rng(seed)
  num_labels = max(num_logits, 2)
  logits = 2 * rng.normal(size=(*shape, num_logits))
  label = rng.integers(0, num_labels, shape).astype(np.int32)
  weight = rng.uniform(0.5, 2, shape) * (rng.uniform(size=shape) > 0.3)
  return logits, label, weight, CLASS_WEIGHTS[:num_labels]


def log_probs(pixel):
  """Log-probabilities of all class ids at one pixel, by SciPy."""
  if len(pixel) == 1:
    return scipy.special.log_expit(np.array([-pixel[0], pixel[0]]))
  return scipy.special.log_softmax(pixel)


def loop_cross_entropy(logits, label, weight, class_weights):
  total, norm = 0.0, 0.0
  for index in np.ndindex(label.shape):
    if weight[index] > 0:
      w = weight[index] * class_weights[label[index]]
      total -= w * log_probs(logits[index])[label[index]]
      norm += w
  return total / norm if norm else 0.0


def loop_dice(logits, label, weight, class_weights):
  total = 0.0
  for k in range(1, len(class_weights)):
    both, size = 0.0, 0.0
    for index in np.ndindex(label.shape):
      if weight[index] > 0:
        p = np.exp(log_probs(logits[index]))[k]
        both += weight[index] * p * (label[index] == k)
        size += weight[index] * (p + (label[index] == k))
    total += class_weights[k] * (1 - (2 * both + 1) / (size + 1))
  return total / class_weights[1:].sum()


def loop_focal(logits, label, weight, class_weights):
  total, norm = 0.0, 0.0
  for index in np.ndindex(label.shape):
    if weight[index] > 0:
      w = weight[index] * class_weights[label[index]]
      log_p = log_probs(logits[index])[label[index]]
      total -= w * (1 - np.exp(log_p)) ** 2 * log_p
      norm += w
  return total / norm if norm else 0.0


def loop_top_k(logits, label, weight, class_weights):
  """The hardest tenth of the weight, taken from the top, pixel by pixel."""
  pixels = []
  for index in np.ndindex(label.shape):
    if weight[index] > 0:
      w = weight[index] * class_weights[label[index]]
      pixels.append((-log_probs(logits[index])[label[index]], w))
  left = budget = 0.1 * sum(w for _, w in pixels)
  total = 0.0
  for loss, w in sorted(pixels, reverse=True):
    total += loss * min(w, left)
    left -= min(w, left)
  return total / budget if budget else 0.0


def loop_tversky(logits, label, weight, class_weights, root=1.0):
  total = 0.0
  for k in range(1, len(class_weights)):
    both, invented, missed = 0.5, 0.0, 0.0
    for index in np.ndindex(label.shape):
      if weight[index] > 0:
        p, g = np.exp(log_probs(logits[index]))[k], label[index] == k
        both += weight[index] * p * g
        invented += weight[index] * p * (not g)
        missed += weight[index] * (1 - p) * g
    score = both / (both + 0.3 * invented + 0.7 * missed)
    total += class_weights[k] * (1 - score) ** (1 / root)
  return total / class_weights[1:].sum()


def loop_focal_tversky(*arrays):
  return loop_tversky(*arrays, root=4 / 3)


def loop_jaccard(errors, truth, weight):
  """The Lovasz extension by its other formula: the area under 1 - IoU(t).

  The pixels whose error is at least t are wrong, for every t above 0.
  """
  total, last = 0.0, 0.0
  for t in sorted({e for e in errors if e > 0}):
    wrong = errors >= t
    both = weight[truth & ~wrong].sum()
    either = weight[truth | wrong].sum()
    total += (t - last) * (1 - both / either if either else 0.0)
    last = t
  return total


def loop_lovasz(logits, label, weight, class_weights):
  counted = weight > 0
  probs = np.array([np.exp(log_probs(z)) for z in logits[counted]])
  label, weight = label[counted], weight[counted]
  total, norm = 0.0, 0.0
  for k in [1] if logits.shape[-1] == 1 else range(len(class_weights)):
    truth = label == k
    if truth.any():
      errors = abs(truth - probs[:, k])
      total += class_weights[k] * loop_jaccard(errors, truth, weight)
      norm += class_weights[k]
  return total / norm if norm else 0.0


def loop_lovasz_hinge(logits, label, weight, class_weights):
  del class_weights  # One class: its weight is divided out.
  counted = weight > 0
  z, truth = logits[counted][:, 0], label[counted] == 1
  return loop_jaccard(1 - np.where(truth, z, -z), truth, weight[counted])


def loop_distance(label, weight, k):
  """phi of every pixel, by all pairs of pixels."""
  counted = [i for i in np.ndindex(label.shape) if weight[i] > 0]
  phi = np.zeros(label.shape)
  inside = {i for i in counted if label[i] == k}
  outside = set(counted) - inside
  for i in counted if inside and outside else ():
    others = outside if i in inside else inside
    nearest = min(np.linalg.norm(np.subtract(i, j)) for j in others)
    phi[i] = 1 - nearest if i in inside else nearest
  return phi


def loop_boundary(logits, label, weight, class_weights):
  total, norm = 0.0, weight.sum() or 1.0
  for k in range(1, len(class_weights)):
    phi = loop_distance(label, weight, k)
    for index in np.ndindex(label.shape):
      if weight[index] > 0:
        p = np.exp(log_probs(logits[index]))[k]
        total += class_weights[k] * weight[index] * p * phi[index] / norm
  return total / class_weights[1:].sum()


LOOPS = {
  "cross_entropy": loop_cross_entropy,
  "binary_cross_entropy": loop_cross_entropy,
  "focal": loop_focal,
  "top_k": loop_top_k,
  "dice": loop_dice,
  "tversky": loop_tversky,
  "focal_tversky": loop_focal_tversky,
  "lovasz": loop_lovasz,
  "lovasz_hinge": loop_lovasz_hinge,
  "boundary": loop_boundary,
}


# One compilation for each term, shape and precision, shared by all tests.
@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(term, logits, label, weight, class_weights):
  """Loss [B] and the gradient of its sum."""
  loss, pullback = jax.vjp(
    lambda x: losses.LOSSES[term](x, label, weight, class_weights), logits
  )
  return loss, pullback(jnp.ones_like(loss))[0]


def value(term, *arrays):
  return value_and_grad(term, *arrays)[0]


def f32(*arrays):
  return [
    np.asarray(a, np.int32 if np.asarray(a).dtype.kind == "i" else np.float32)
    for a in arrays
  ]


def loop(term, logits, label, weight, class_weights):
  """Loss [B] of the loops above."""
  return np.array(
    [
      LOOPS[term](*pixels, class_weights)
      for pixels in zip(logits, label, weight, strict=True)
    ]
  )


@all_cases
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (1, 2, 3, 2)])
def test_value_is_that_of_a_loop_over_pixels(term, num_logits, shape):
  arrays = example(num_logits, shape)
  with jax.enable_x64(True):
    loss = value(term, *arrays)
  assert loss.dtype == np.float64
  np.testing.assert_allclose(loss, loop(term, *arrays), rtol=1e-12)


@all_cases
def test_float32_is_near_the_loop(term, num_logits):
  arrays = example(num_logits)
  loss = value(term, *f32(*arrays))
  assert loss.dtype == np.float32
  np.testing.assert_allclose(loss, loop(term, *arrays), rtol=2e-6)


@all_cases
def test_gradient_is_the_difference_quotient_of_the_loop(term, num_logits):
  logits, *rest = example(num_logits)
  with jax.enable_x64(True):
    _, grad = value_and_grad(term, logits, *rest)
  step, expected = 1e-5, np.zeros_like(logits)
  for index in np.ndindex(logits.shape):
    moved = logits.copy()
    moved[index] += step
    above = loop(term, moved, *rest)[index[0]]
    moved[index] -= 2 * step
    below = loop(term, moved, *rest)[index[0]]
    expected[index] = (above - below) / (2 * step)
  assert np.abs(expected).max() > 1e-2
  np.testing.assert_allclose(grad, expected, atol=1e-9)


def test_class_weights_follow_the_convention_of_pytorch():
  # nn.CrossEntropyLoss(weight=[1, 3]) of probabilities 1/2 and 1/4 for truths
  # 0 and 1: (1 log 2 + 3 log 4) / (1 + 3); dividing by 2 pixels gives 2.4.
  logits = np.log(np.float32([[[0.5, 0.5], [0.75, 0.25]]]))
  label = np.int32([[0, 1]])
  for scale in (1, 10):
    loss = value(
      "cross_entropy",
      logits,
      label,
      np.ones((1, 2), np.float32),
      np.float32([scale, 3 * scale]),
    )
    np.testing.assert_allclose(loss, [7 / 4 * np.log(2)], rtol=1e-6)


@all_cases
def test_nothing_is_looked_up_pixel_by_pixel(term, num_logits):
  """A TPU would: half a million look-ups for eight images."""
  text = str(jax.make_jaxpr(value_and_grad, 0)(term, *example(num_logits)))
  assert "gather" not in text
  assert "scatter" not in text


@pytest.mark.parametrize(
  "term",
  ["cross_entropy", "focal", "top_k", "dice", "focal_tversky", "boundary"],
)
def test_one_logit_is_two_classes_with_a_zero_logit(term):
  logits, label, weight, class_weights = f32(*example(1))
  two = np.concatenate([np.zeros_like(logits), logits], axis=-1)
  np.testing.assert_allclose(
    value(term, logits, label, weight, class_weights),
    value(term, two, label, weight, class_weights),
    rtol=1e-5,
  )


@all_cases
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
  junk=st.lists(
    st.tuples(
      st.sampled_from([0.0, 3.0, -1e4, 1e38, np.inf, -np.inf, np.nan]),
      st.sampled_from([0, 1, 2, 255, -1, 2**31 - 1, -(2**31)]),
    ),
    min_size=24,
    max_size=24,
  )
)
def test_what_has_weight_0_changes_nothing(term, num_logits, junk):
  logits, label, weight, class_weights = f32(*example(num_logits))
  ignored = weight == 0
  assert 0 < ignored.sum() < 24
  junk_logits, junk_label = (
    np.reshape(column, label.shape) for column in zip(*junk, strict=True)
  )
  changed = np.where(ignored[..., None], junk_logits[..., None], logits)
  changed_label = np.where(ignored, junk_label, label)
  loss, grad = value_and_grad(term, logits, label, weight, class_weights)
  loss2, grad2 = value_and_grad(
    term,
    changed.astype(np.float32),
    changed_label.astype(np.int32),
    weight,
    class_weights,
  )
  np.testing.assert_array_equal(loss, loss2)
  np.testing.assert_array_equal(grad, grad2)
  assert not np.asarray(grad2)[ignored].any()


@all_cases
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_stay_finite(term, num_logits, size):
  _, label, weight, class_weights = f32(*example(num_logits))
  logits = np.full((*label.shape, num_logits), -size, np.float32)
  logits[..., -1] = size
  loss, grad = value_and_grad(term, logits, label, weight, class_weights)
  assert np.isfinite(loss).all()
  assert np.isfinite(grad).all()
  assert (loss > 0).all() or term == "boundary"


def test_cross_entropy_of_a_huge_wrong_logit_is_its_margin():
  ones = np.ones((1, 1), np.float32)
  one = value(
    "cross_entropy",
    np.float32([[[-1e4]]]),
    np.int32([[1]]),
    ones,
    np.float32([1, 1]),
  )
  three = value(
    "cross_entropy",
    np.float32([[[1e4, -1e4, 0]]]),
    np.int32([[1]]),
    ones,
    np.float32([1, 1, 1]),
  )
  assert (one[0], three[0]) == (1e4, 2e4)


@all_cases
def test_all_ignored_and_nothing_else_costs_nothing(term, num_logits):
  logits, label, weight, class_weights = f32(*example(num_logits))
  label[0], weight[0] = 255, 0
  logits[0] = np.nan
  loss, grad = value_and_grad(term, logits, label, weight, class_weights)
  assert loss[0] == 0
  assert not grad[0].any()
  assert loss[1] > 0 or (term == "boundary" and loss[1] < 0)
  assert grad[1].any()


@all_cases
def test_class_weights_of_0_cost_nothing(term, num_logits):
  logits, label, weight, class_weights = f32(*example(num_logits))
  loss, grad = value_and_grad(term, logits, label, weight, 0 * class_weights)
  assert not loss.any()
  assert not grad.any()


@all_cases
@pytest.mark.parametrize("wrong", [-1, 3, 255])
def test_a_counted_label_that_is_no_class_is_loud(term, num_logits, wrong):
  logits, label, weight, class_weights = f32(*example(num_logits))
  weight[0, 0, 0], label[0, 0, 0] = 1, wrong
  loss = value(term, logits, label, weight, class_weights)
  assert np.isnan(loss[0])
  assert np.isfinite(loss[1])


@pytest.mark.parametrize("num_predicted", [0, 1, 9])
def test_dice_of_a_class_without_truth_is_n_over_n_plus_1(num_predicted):
  logits = np.full((1, 20, 1), -100, np.float32)
  logits[:, :num_predicted] = 100
  label, weight = np.zeros((1, 20), np.int32), np.ones((1, 20), np.float32)
  loss, grad = value_and_grad("dice", logits, label, weight, np.float32([1, 1]))
  np.testing.assert_allclose(
    loss, [num_predicted / (num_predicted + 1)], atol=1e-6
  )
  assert np.isfinite(grad).all()


def test_dice_is_0_for_the_truth_and_near_1_for_its_opposite():
  label = (np.arange(100) < 30).astype(np.int32)[None]
  weight, class_weights = np.ones((1, 100), np.float32), np.float32([1, 1])
  right = (200.0 * label - 100).astype(np.float32)[..., None]
  loss = value("dice", right, label, weight, class_weights)
  opposite = value("dice", -right, label, weight, class_weights)
  np.testing.assert_allclose(loss, [0], atol=1e-6)
  np.testing.assert_allclose(opposite, [1 - 1 / 101], rtol=1e-6)


@all_cases
def test_one_pixel(term, num_logits):
  logits, label, weight, class_weights = example(num_logits, (1, 1))
  weight[:] = 0.25
  arrays = (logits, label, weight, class_weights)
  loss = value(term, *f32(*arrays))
  np.testing.assert_allclose(loss, loop(term, *arrays), rtol=1e-5)


@all_cases
def test_half_precision_logits_are_computed_in_float32(term, num_logits):
  logits, label, weight, class_weights = f32(*example(num_logits))
  half = jnp.asarray(logits, jnp.bfloat16)
  loss = value(term, half, label, weight, class_weights)
  same = value(term, half.astype(jnp.float32), label, weight, class_weights)
  assert loss.dtype == jnp.float32
  np.testing.assert_array_equal(loss, same)


def test_binary_cross_entropy_refuses_more_than_one_logit():
  for name in ("binary_cross_entropy", "lovasz_hinge"):
    with pytest.raises(ValueError, match="takes one logit, got 3"):
      losses.LOSSES[name](*f32(*example(3, (2, 5))))


def test_the_table_has_the_choices_of_the_config():
  fields = {f.name: f for f in dataclasses.fields(schema.LossConfig)}
  assert set(losses.LOSSES) == set(fields["terms"].metadata["choices"])


def test_make_loss_adds_the_weighted_terms():
  arrays = f32(*example(3))
  loss_fn = losses.make_loss(
    terms=("cross_entropy", "dice"),
    weights=(0.5, 2.0),
    class_weights=tuple(CLASS_WEIGHTS),
  )
  loss, parts = jax.jit(loss_fn)(*arrays[:3])
  ce, d = loop("cross_entropy", *arrays), loop("dice", *arrays)
  assert list(parts) == ["cross_entropy", "dice"]
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(parts["cross_entropy"], ce, rtol=1e-5)
  np.testing.assert_allclose(parts["dice"], d, rtol=1e-5)
  np.testing.assert_allclose(loss, 0.5 * ce + 2 * d, rtol=1e-5)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_make_loss_takes_1_for_what_is_not_given(num_logits):
  logits, label, weight, _ = f32(*example(num_logits))
  loss_fn = losses.make_loss(
    terms=("cross_entropy", "dice"), weights=(), class_weights=()
  )
  loss, parts = jax.jit(loss_fn)(logits, label, weight)
  ones = np.ones(max(num_logits, 2), np.float32)
  ce = value("cross_entropy", logits, label, weight, ones)
  d = value("dice", logits, label, weight, ones)
  np.testing.assert_allclose(loss, ce + d, rtol=1e-6)
  np.testing.assert_array_equal(parts["dice"], d)
  smooth = losses.make_loss(
    terms=("cross_entropy",), weights=(), class_weights=(), label_smoothing=0.2
  )
  got, _ = smooth(logits, label, weight)
  of_any = [
    value("cross_entropy", logits, label * 0 + k, weight, ones)
    for k in range(len(ones))
  ]
  np.testing.assert_allclose(
    got, 0.8 * ce + 0.2 * np.mean(of_any, 0), rtol=1e-5
  )


def test_make_loss_crops_the_truth_to_the_logits_of_valid_padding():
  logits, label, weight, _ = f32(*example(3, (2, 3, 4)))
  margins = ((0, 0), (2, 2), (1, 1))
  loss_fn = losses.make_loss(terms=("dice",), weights=(), class_weights=())
  cropped, _ = jax.jit(loss_fn)(
    logits,
    np.pad(label, margins, constant_values=1),
    np.pad(weight, margins, constant_values=1),
  )
  plain = value("dice", logits, label, weight, np.ones(3, np.float32))
  np.testing.assert_allclose(cropped, plain, rtol=1e-6)


def test_center_crop_takes_the_middle_and_leaves_other_axes():
  array = np.arange(2 * 6 * 5 * 3).reshape(2, 6, 5, 3)
  cropped = losses.center_crop(array, (2, 3))
  np.testing.assert_array_equal(cropped, array[:, [2, 3]][:, :, [1, 2, 3]])
  np.testing.assert_array_equal(losses.center_crop(array, (6, 5)), array)
  line = losses.center_crop(jnp.arange(10).reshape(1, 10), (4,))
  np.testing.assert_array_equal(line, [[3, 4, 5, 6]])


@pytest.mark.parametrize(("shape", "margin"), [((5, 4), 1), ((6, 6), -1)])
def test_center_crop_refuses_odd_and_negative_margins(shape, margin):
  with pytest.raises(ValueError, match=f"margin {margin} must be even"):
    losses.center_crop(np.zeros((1, 6, 5)), shape)
