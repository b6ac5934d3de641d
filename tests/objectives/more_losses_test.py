"""Losses against published values, PyTorch, SciPy, and one another."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.objectives.losses_test import CASES, all_cases, example, f32
from unet_jax.objectives import losses, region_losses
from unet_jax.schema import LossConfig


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled(term, parameters, *arrays):
  return losses.LOSSES[term](*arrays, **dict(parameters))


def value(term, *arrays, **parameters):
  """Loss [B] in float64."""
  kinds = (np.float64, np.int32, np.float64, np.float64)
  arrays = [np.asarray(x, k) for x, k in zip(arrays, kinds, strict=True)]
  with jax.enable_x64(True):
    loss = compiled(term, tuple(parameters.items()), *arrays)
  return np.asarray(loss)


def one_pixel(p, **parameters):
  """A pixel whose truth, class 1, has probability p."""
  logits = np.log([[[p / (1 - p)]]])
  ones = np.ones((1, 1))
  return {
    term: value(term, logits, np.int32([[1]]), ones, [1.0, 1.0], **own)[0]
    for term, own in {"cross_entropy": {}, "focal": parameters}.items()
  }


@pytest.mark.parametrize(("p", "times"), [(0.9, 100), (0.968, 1000)])
def test_focal_is_as_much_lower_as_its_paper_says(p, times):
  # Lin et al. 2017, section 3.2: with gamma = 2 a pixel of p = 0.9 has 100
  # times less loss than with cross-entropy, of p = 0.968 a thousand times.
  losses_of = one_pixel(p, focal_gamma=2.0)
  lower = losses_of["cross_entropy"] / losses_of["focal"]
  np.testing.assert_allclose(lower, times, rtol=0.03)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_ends_of_the_parameters_are_the_plain_losses(num_logits):
  arrays = example(num_logits)
  same = [
    ("focal", {"focal_gamma": 0.0}, "cross_entropy"),
    ("top_k", {"top_k_share": 1.0}, "cross_entropy"),
    ("tversky", {"tversky_alpha": 0.5, "tversky_beta": 0.5}, "dice"),
    ("focal_tversky", {"tversky_gamma": 1.0}, "tversky"),
  ]
  for term, parameters, plain in same:
    np.testing.assert_allclose(
      value(term, *arrays, **parameters), value(plain, *arrays), rtol=1e-12
    )


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_has_a_slope_where_the_truth_is_certain(gamma):
  logits = jnp.float32([[[40.0, -40.0], [-40.0, 40.0]]])
  focal = losses.LOSSES["focal"]
  rest = jnp.int32([[0, 0]]), jnp.ones((1, 2)), np.ones(2, np.float32)
  total = lambda x: focal(x, *rest, focal_gamma=gamma).sum()
  grad = jax.jit(jax.grad(total))(logits)
  assert np.isfinite(grad).all()
  assert grad[0, 1, 0] < 0 < grad[0, 1, 1]  # The wrong pixel is mended.


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_that_of_pytorch(smoothing):
  logits, label, weight, class_weights = example(3)
  got = value(
    *("cross_entropy", logits, label, weight > 0, class_weights),
    label_smoothing=smoothing,
  )
  for i in range(len(label)):
    counted = weight[i] > 0
    want = torch.nn.functional.cross_entropy(
      torch.tensor(logits[i][counted]),
      torch.tensor(label[i][counted], dtype=torch.int64),
      weight=torch.tensor(class_weights),
      label_smoothing=smoothing,
    )
    np.testing.assert_allclose(got[i], want.item(), rtol=1e-12)


def test_label_smoothing_of_one_logit_is_that_of_two_classes():
  logits, *rest = example(1)
  two = np.concatenate([np.zeros_like(logits), logits], axis=-1)
  one = value("cross_entropy", logits, *rest, label_smoothing=0.2)
  both = value("cross_entropy", two, *rest, label_smoothing=0.2)
  np.testing.assert_allclose(one, both, rtol=1e-12)


def test_smoothing_costs_nothing_where_no_label_has_a_factor():
  """Of one example; the other of the batch costs what it costs alone."""
  logits, label, _, _ = example(3, (2, 4, 5))
  factors, ones = [0.0, 0.05, 1.0], np.ones(label.shape)
  label = np.where([[[True]], [[False]]], 0, label)
  both = value(
    "cross_entropy", logits, label, ones, factors, label_smoothing=0.3
  )
  other = [x[1:] for x in (logits, label, ones)]
  alone = value("cross_entropy", *other, factors, label_smoothing=0.3)
  assert both[0] == 0 and both[1] == alone[0] > 0
  # A pixel whose factor is 1 is like any other.
  one = [logits[:1, :1, :1], label[1:, :1, :1] * 0 + 2, ones[:1, :1, :1]]
  assert value("cross_entropy", *one, factors, label_smoothing=0.3)[0] > 0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_top_k_is_the_mean_of_the_largest(share):
  rng = np.random.default_rng(0)
  logits, label = rng.normal(size=(2, 20, 3)), rng.integers(0, 3, (2, 20))
  got = value(
    "top_k", logits, label, np.ones((2, 20)), np.ones(3), top_k_share=share
  )
  each = torch.nn.functional.cross_entropy(
    torch.tensor(logits).movedim(-1, 1), torch.tensor(label), reduction="none"
  )
  want = each.topk(round(20 * share), dim=1).values.mean(1)
  np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("num_logits", [1, 3])
def test_lovasz_of_a_hard_prediction_is_1_minus_iou(num_logits):
  rng = np.random.default_rng(1)
  size, num_labels = (2, 40), max(num_logits, 2)
  label, found = rng.integers(0, num_labels, (2, *size))
  label[1][label[1] == num_labels - 1] = 0  # An absent class does not count.
  if num_logits == 1:
    label[1, 0] = 1
    logits = np.where(found == 1, 50.0, -50.0)[..., None]
  else:
    logits = 100.0 * np.eye(num_labels)[found]
  got = value("lovasz", logits, label, np.ones(size), np.ones(num_labels))
  for i in range(2):
    classes = np.unique(label[i]) if num_logits > 1 else [1]
    ious = [
      ((label[i] == k) & (found[i] == k)).sum()
      / ((label[i] == k) | (found[i] == k)).sum()
      for k in classes
    ]
    np.testing.assert_allclose(got[i], 1 - np.mean(ious), rtol=1e-9)


def test_lovasz_hinge_without_foreground_is_its_worst_pixel():
  logits = np.array([[-3.0, 0.5, -0.2]])[..., None]
  got = value(
    "lovasz_hinge", logits, np.zeros((1, 3)), np.ones((1, 3)), np.ones(2)
  )
  np.testing.assert_allclose(got, [1.5])


signed_distance = jax.jit(
  functools.partial(region_losses.signed_distance, dtype=jnp.dtype("float32"))
)


@pytest.mark.parametrize("shape", [(50,), (23, 17), (9, 8, 7)])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_signed_distance_is_that_of_scipy(shape, share):
  # The authors' one_hot2dist, of whole images.
  inside = np.random.default_rng(0).uniform(size=(2, *shape)) < share
  inside.reshape(2, -1)[:, :2] = [True, False]
  got = signed_distance(inside, np.ones_like(inside))
  for phi, here in zip(got, inside, strict=True):
    out = ndimage.distance_transform_edt(~here)
    into = ndimage.distance_transform_edt(here)
    want = out * ~here - (into - 1) * here
    np.testing.assert_allclose(phi, want, rtol=1e-6)


@pytest.mark.parametrize("filled", [False, True])
def test_an_image_without_a_border_has_no_distance(filled):
  inside = np.full((1, 6, 5), filled)
  got = signed_distance(inside, np.ones_like(inside))
  assert not np.any(got)


def test_boundary_pulls_each_pixel_by_its_distance():
  # d loss / d p = phi / N; p' = p (1 - p) for one logit.
  label = np.int32([[0, 0, 0, 1, 1, 1, 0]])
  rest = label, np.ones((1, 7), np.float32), np.ones(2, np.float32)
  total = lambda z: losses.LOSSES["boundary"](z, *rest).sum()
  grad = jax.jit(jax.grad(total))(jnp.zeros((1, 7, 1)))
  phi = np.array([3, 2, 1, 0, -1, 0, 1])
  np.testing.assert_allclose(grad[0, :, 0], phi / 7 / 4, atol=1e-7)


@all_cases
def test_an_example_knows_of_no_other(term, num_logits):
  """So that losses add up over devices, microbatches and padding."""
  logits, label, weight, class_weights = example(num_logits, (3, 4, 5))
  together = value(term, logits, label, weight, class_weights)
  for i in range(3):
    rows = (x[i : i + 1] for x in (logits, label, weight))
    alone = value(term, *rows, class_weights)
    np.testing.assert_allclose(together[i], alone[0], rtol=1e-12)


@pytest.mark.parametrize(
  ("term", "num_logits"), [c for c in CASES if c[0] != "boundary"]
)
def test_a_weight_of_2_is_a_pixel_twice(term, num_logits):
  logits, label, _, class_weights = example(num_logits, (1, 30))
  times = np.random.default_rng(3).integers(0, 4, 30)
  repeated = (np.repeat(x, times, axis=1) for x in (logits, label))
  ones = np.ones((1, times.sum()))
  np.testing.assert_allclose(
    value(term, logits, label, times[None], class_weights),
    value(term, *repeated, ones, class_weights),
    rtol=1e-11,
  )


def test_the_parameters_are_fields_with_the_same_defaults():
  fields = {f.name: f.default for f in dataclasses.fields(LossConfig)}
  for term, names in losses.PARAMETERS.items():
    keywords = {
      p.name: p.default
      for p in inspect.signature(losses.LOSSES[term]).parameters.values()
      if p.kind is p.KEYWORD_ONLY
    }
    assert keywords == {name: fields[name] for name in names}
  of_terms = {name for names in losses.PARAMETERS.values() for name in names}
  common = {"terms", "weights", "class_weights", "balanced"}
  assert set(fields) == of_terms | common


@pytest.mark.parametrize(
  ("term", "name"),
  [(t, n) for t, names in losses.PARAMETERS.items() for n in names],
)
def test_a_field_of_the_config_reaches_its_term(term, name):
  arrays = f32(*example(1))[:3]
  cfg = dataclasses.asdict(LossConfig(terms=(term,)))
  moved = dataclasses.asdict(LossConfig(terms=(term,), **{name: 0.77}))
  loss, _ = jax.jit(losses.make_loss(**cfg))(*arrays)
  other, _ = jax.jit(losses.make_loss(**moved))(*arrays)
  assert (np.abs(loss - other) > 1e-4).all()


def test_any_weighted_sum_by_config():
  arrays = f32(*example(3))[:3]
  terms = ("focal", "lovasz", "boundary", "top_k")
  factors = (0.5, 2.0, 0.01, 3.0)
  make = lambda **x: jax.jit(
    losses.make_loss(**dataclasses.asdict(LossConfig(**x)))
  )
  loss, parts = make(terms=terms, weights=factors, focal_gamma=1.0)(*arrays)
  alone = [make(terms=(t,), focal_gamma=1.0)(*arrays)[0] for t in terms]
  want = sum(f * x for f, x in zip(factors, alone, strict=True))
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert set(parts) == set(terms)
