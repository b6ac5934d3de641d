"""The algebra of arms: what it expands to, what it refuses."""

import collections

import pytest

from tests import tiny
from unet_jax import config as config_lib
from unet_jax.errors import UserError
from unet_jax.studies import sweep


def names(arms):
  return [a.name for a in arms]


def test_a_grid_has_every_combination_with_names_that_say_what():
  arms = sweep.grid({"model.skip": ("none", "add"), "model.residual": (0, 1)})
  assert names(arms) == [
    "skip=none,residual=0",
    "skip=none,residual=1",
    "skip=add,residual=0",
    "skip=add,residual=1",
  ]
  assert arms[2].overrides == {"model.skip": "add", "model.residual": 0}


def test_zip_pairs_and_product_combines():
  pairs = sweep.zip_values({"a.x": (1, 2), "a.y": (3, 4)})
  assert [dict(a.overrides) for a in pairs] == [
    {"a.x": 1, "a.y": 3},
    {"a.x": 2, "a.y": 4},
  ]
  both = sweep.product(pairs, sweep.grid({"b": ((True, False),)}))
  assert names(both) == ["x=1,y=3,b=1+0", "x=2,y=4,b=1+0"]
  with pytest.raises(UserError, match="equally many"):
    sweep.zip_values({"a": (1,), "b": (1, 2)})


def test_arms_within_a_group_have_a_baseline_of_their_own():
  nets = sweep.baseline({}, "concat") + sweep.arm({"model.skip": "none"})
  arms = sweep.within({"a.x": 1}, nets) + sweep.within({"a.x": 2}, nets)
  assert names(arms) == [
    "x=1,concat",
    "x=1,skip=none",
    "x=2,concat",
    "x=2,skip=none",
  ]
  assert arms[3].overrides == {"a.x": 2, "model.skip": "none"}
  assert [a.group for a in arms] == ["x=1", "x=1", "x=2", "x=2"]
  assert sweep.check(arms) == arms
  with pytest.raises(UserError, match="0 arms of x=2 are the baseline"):
    sweep.check([*arms[:2], arms[3]])


def test_chosen_arms_come_with_the_baselines_of_their_groups():
  networks = sweep.baseline({}) + sweep.grid({"model.skip": ("none", "add")})
  assert sweep.choose(networks, ()) == networks
  assert sweep.choose(networks, ("skip=add",)) == [networks[0], networks[2]]
  sizes = [
    a
    for size in (32, 64)
    for a in sweep.within({"data.crop_size": (size,)}, networks)
  ]
  found = sweep.choose(sizes, ("crop_size=64,skip=none",))
  assert names(found) == ["crop_size=64,baseline", "crop_size=64,skip=none"]
  with pytest.raises(UserError, match=r"no arm 'add'; choose from .*skip=add"):
    sweep.choose(networks, ("add",))


def test_samples_repeat_with_their_seed_and_fill_their_range():
  space = {"lr": sweep.log_uniform(1e-4, 1e-2), "up": ("linear", "transpose")}
  assert sweep.sample(5, space, seed=1) == sweep.sample(5, space, seed=1)
  assert sweep.sample(5, space, seed=1) != sweep.sample(5, space, seed=2)
  drawn = sweep.sample(2000, space)
  rates = [a.overrides["lr"] for a in drawn]
  assert min(rates) >= 1e-4 and max(rates) <= 1e-2
  below = sum(rate < 1e-3 for rate in rates)
  assert 900 < below < 1100, "half lies below the geometric middle"
  ups = collections.Counter(a.overrides["up"] for a in drawn)
  assert set(ups) == {"linear", "transpose"} and min(ups.values()) > 900


@pytest.mark.parametrize(
  ("arms", "words"),
  [
    ([], "list of arms"),
    (["none"], "list of arms"),
    (sweep.grid({"a": (1, 2)}), "0 arms are the baseline"),
    (sweep.baseline({}, "x") + sweep.baseline({"a": 1}, "y"), "2 arms are"),
    (sweep.baseline({}, "x") + sweep.arm({"a": 1}, "x"), "the same name"),
    (
      sweep.baseline({"a": 1, "b": 2}) + sweep.grid({"b": (2,), "a": (1,)}),
      "the same overrides",
    ),
  ],
)
def test_what_makes_no_study_is_refused(arms, words):
  with pytest.raises(UserError, match=words):
    sweep.check(arms)


def test_folders_of_runs_are_safe_and_distinct():
  assert sweep.run_id("skip=none,up=linear", 3) == "skip=none,up=linear-s3"
  assert "/" not in sweep.run_id("dir=../../etc", 0)


def test_values_are_checked_as_in_a_file():
  config = tiny.get_config()
  config_lib.assign(config, "model.skip_levels", (False,))
  assert config_lib.parse(config).model.skip_levels == (False,)
  with pytest.raises(UserError, match="nearest: 'none'"):
    config_lib.assign(config, "model.skip", "nope")
  with pytest.raises(UserError, match="did you mean 'skip'"):
    config_lib.assign(config, "model.skp", "none")
