"""Foreground crops, CutMix and balanced weights: shares, places, repeats."""

import numpy as np
import pytest

from unet_jax import config
from unet_jax.data import balance, pipeline, rare
from unet_jax.data.synthetic import SyntheticSource
from unet_jax.errors import UserError

NONE = {"mode": "none", "mean": None, "std": None}


class Dots:
  """A large empty image with one pixel of class 1 and a block of class 2."""

  names = ("a", "b")

  def __len__(self):
    return 2

  def __getitem__(self, index):
    label = np.zeros((40, 40), np.int32)
    label[3, 30], label[20:24, 20:24] = 1, 2
    weight = np.ones((40, 40), np.float32)
    weight[20:22] = 0
    image = np.full((40, 40, 1), index, np.float32)
    return {"image": image, "label": label, "weight": weight}


def make_config(*, batch=16, padding="same", crop=8, **sections):
  return config.parse(
    {
      "model": {"widths": (2, 4), "padding": padding},
      "data": {"crop_size": (crop,), "num_classes": 3, **sections.pop("data")},
      "train": {"batch_size": batch},
      **sections,
    }
  )


def batches(cfg, steps, first=0, source=None, **hosts):
  made = pipeline.train_batches(
    source or Dots(), NONE, cfg=cfg, first_step=first, **hosts
  )
  taken = [next(made) for _ in range(steps)]
  made.close()
  return taken


def shares(cfg, steps=15, margin=0):
  """How many crops have a counted pixel of class 1, of 2, of either."""
  hits = []
  for batch in batches(cfg, steps):
    for label, weight in zip(batch["label"], batch["weight"], strict=True):
      inner = slice(margin, len(label) - margin)
      seen = np.where(weight > 0, label, 0)[inner, inner]
      hits.append([(seen == 1).any(), (seen == 2).any(), (seen > 0).any()])
  return np.mean(hits, axis=0)


def test_crops_hold_the_foreground_with_the_given_share():
  # By chance, of 33 x 33 windows: class 1 is in 4 x 8 of them, near the upper
  # border; the counted half of class 2, 2 x 4 pixels, in 9 x 11.
  chance = np.array([4 * 8 / 33**2, 9 * 11 / 33**2])
  plain = shares(make_config(data={}))
  np.testing.assert_allclose(plain[:2], chance, atol=0.06)
  forced = shares(make_config(data={"foreground_share": 0.6}))
  # Each class as often, though one has 8 times the pixels; 240 crops have a
  # standard deviation of 0.03.
  np.testing.assert_allclose(forced[:2], 0.3 + 0.4 * chance, atol=0.1)
  np.testing.assert_allclose(forced[2], 0.6 + 0.4 * chance.sum(), atol=0.1)
  assert shares(make_config(data={"foreground_share": 1.0}))[2] == 1


def test_the_pixel_is_in_what_valid_padding_predicts():
  cfg = make_config(padding="valid", crop=20, data={"foreground_share": 1.0})
  assert shares(cfg, 8, margin=8)[2] == 1


def test_classes_may_be_chosen():
  data = {"foreground_share": 1.0, "foreground_classes": (1,)}
  assert shares(make_config(data=data), 5)[0] == 1


def test_the_pixel_is_anywhere_in_the_window():
  cut, rng = np.zeros(8), np.random.default_rng(0)
  label = np.zeros((40,), np.int32)
  label[20] = 1
  example = {
    "image": label[:, None].astype(np.float32),
    "label": label,
    "weight": np.ones(40, np.float32),
  }
  for _ in range(1600):
    cut += pipeline.random_crop(example, (8,), 0, rng, (20,))["label"]
  assert cut.sum() == 1600  # 200 expected in each place, 5 sd are 66.
  assert (abs(cut - 200) < 66).all()


def test_no_such_class_is_an_ordinary_crop():
  rng = np.random.default_rng(0)
  example = {"label": np.zeros((4, 4), int), "weight": np.ones((4, 4))}
  assert rare.choose_pixel(example, [1, 2], rng) is None


# --- CutMix -------------------------------------------------------------------


def test_a_box_comes_from_the_next_crop_mask_and_weight_too():
  # Images are 0 or 1 throughout, so where a pixel comes from is seen.
  cfg = make_config(batch=2, augment={"cutmix": 1.0}, data={})
  plain = batches(make_config(batch=2, data={}), 40)
  mixed, areas = batches(cfg, 40), []
  for before, after in zip(plain, mixed, strict=True):
    for j in range(2):
      mine, other = before["image"][j], before["image"][1 - j]
      if mine.max() == other.max():
        continue
      pasted = (after["image"][j] != mine)[..., 0]
      areas.append(pasted.mean())
      rows, columns = pasted.any(1), pasted.any(0)
      np.testing.assert_array_equal(pasted, np.outer(rows, columns))
      for name in ("label", "weight"):
        want = np.where(pasted, before[name][1 - j], before[name][j])
        np.testing.assert_array_equal(after[name][j], want)
  assert len(areas) > 20
  assert 0.15 < np.mean(areas) < 0.45  # 1/2, less what the border cuts off.


def test_the_rate_is_that_of_the_config():
  cfg = make_config(augment={"cutmix": 0.3}, data={})
  source = SyntheticSource(cfg, "train", None)
  plain = make_config(data={})
  pairs = zip(
    batches(plain, 18, source=source),
    batches(cfg, 18, source=source),
    strict=True,
  )
  changed = [
    (a["image"][j] != b["image"][j]).any() for a, b in pairs for j in range(16)
  ]
  assert abs(np.mean(changed) - 0.3) < 0.13


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_and_restarts_change_nothing(hosts):
  data = {"foreground_share": 0.5}
  cfg = make_config(batch=4, augment={"cutmix": 0.7}, data=data)
  alone = batches(cfg, 6)
  parts = [
    batches(cfg, 3, first=3, host=h, num_hosts=hosts) for h in range(hosts)
  ]
  for step in range(3):
    for name, want in alone[3 + step].items():
      got = np.concatenate([part[step][name] for part in parts])
      np.testing.assert_array_equal(got, want, err_msg=name)


# --- Class weights ------------------------------------------------------------


def test_balanced_weights_are_those_of_the_counted_pixels():
  # Of 1520 counted pixels an image: 1511 - 0, 1 of class 1, 8 of class 2.
  weights = balance.fit_class_weights(Dots(), 4)
  np.testing.assert_allclose(
    weights, [1520 / 4 / 1511, 1520 / 4, 1520 / 4 / 8, 1]
  )
  np.testing.assert_array_equal(
    balance.class_counts(Dots(), 0, 4), [1511, 1, 8, 0]
  )


@pytest.mark.parametrize(
  ("sections", "words"),
  [
    ({"loss": {"balanced": True, "class_weights": (1, 1)}}, "leave one"),
    ({"data": {"separate": True}}, "weight_map=instances"),
    ({"data": {"foreground_classes": (2,)}}, "nearest: 1"),
    ({"model": {"stochastic_depth": 0.1}}, "model.residual=true"),
    (
      {"augment": {"cutmix": 0.5}, "train": {"batch_size": 1}},
      "batch_size=1 has none",
    ),
    (
      {"loss": {"terms": ("lovasz_hinge",)}, "data": {"num_classes": 2}},
      "nearest: 'lovasz'",
    ),
  ],
)
def test_what_is_wrong_together_is_refused(sections, words):
  with pytest.raises(UserError, match=words):
    config.parse(sections)
