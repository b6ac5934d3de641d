"""The ready studies: every arm is a config, and says what its name says."""

import pathlib

import pytest

from unet_jax import config as config_lib
from unet_jax.errors import UserError
from unet_jax.studies import run, sweep

FOLDER = pathlib.Path("configs/ablations")
NAMES = sorted(p.stem for p in FOLDER.glob("*.py"))
SIZES = {"controls": 7, "skip": 13, "levels": 8, "decoder": 6}
SIZES |= {"short_long": 4, "upsample": 3, "texture": 20}


def plan(name, data="synthetic"):
  path = str(FOLDER / f"{name}.py")
  config = config_lib.load_config(f"{path}:{data}")
  config.study.seeds = (0,)
  if data != "synthetic":
    config.data.dir = "somewhere"
  arms = sweep.check(config_lib.load_sweep(path))
  return run._plan(config, arms, pathlib.Path("unused"))


def test_no_study_is_untested():
  assert set(NAMES) == set(SIZES)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_is_a_config_of_its_own(name):
  planned = plan(name)
  assert len(planned) == SIZES[name]
  assert planned[0].arm.baseline
  assert len({run._hash(x.cfg) for x in planned}) == len(planned)
  configs = {x.arm.name: x.cfg.train for x in planned}
  assert len(set(configs.values())) == 1, "equal steps, equal batches"


@pytest.mark.parametrize("data", ["isbi2012", "dsb2018"])
@pytest.mark.parametrize("name", sorted({*NAMES} - {"texture"}))
def test_every_study_knows_the_real_sets(name, data):
  config = config_lib.load_config(f"{FOLDER / name}.py:{data}")
  config.data.dir = "somewhere"
  cfg = config_lib.parse(config)
  assert cfg.data.source == "folder" and len(cfg.study.seeds) == 5


def test_an_unknown_set_is_refused_with_the_known_ones():
  with pytest.raises(UserError, match="choose one of"):
    config_lib.load_config(f"{FOLDER / 'skip.py'}:nope")


def test_matched_arms_have_the_parameters_of_what_they_are_matched_to():
  params = {x.arm.name: x.params for x in plan("controls")}
  assert params["none_wide"] == pytest.approx(params["concat"], rel=0.01)
  assert params["skip=none"] < 0.95 * params["concat"]
  for control in ("zeros", "noise", "shuffle"):
    assert params[f"skip={control}"] == params["concat"]
  params = {x.arm.name: x.params for x in plan("decoder")}
  for name in ("nested_matched", "full_scale_matched"):
    assert params[name] == pytest.approx(params["plain"], rel=0.01)
  wide, nested = params["plain_wide"], params["decoder=nested"]
  assert wide == pytest.approx(nested, rel=0.02)


def test_levels_are_all_subsets():
  cut = {x.cfg.model.skip_levels for x in plan("levels")}
  assert len(cut) == 8 and () in cut and (False,) * 3 in cut


def test_texture_has_four_networks_and_one_baseline_a_difficulty():
  groups = {}
  for x in plan("texture"):
    groups.setdefault(x.cfg.data.synthetic_texture, []).append(x)
  assert len(groups) == 5
  for similarity, group in groups.items():
    assert {x.arm.group for x in group} == {f"synthetic_texture={similarity}"}
    kinds = {(x.cfg.model.skip, x.cfg.model.decoder) for x in group}
    assert kinds == {
      *(("concat", "plain"), ("none", "plain"), ("attn_oktay", "plain")),
      ("concat", "nested"),
    }
    assert [x.cfg.model.skip for x in group if x.arm.baseline] == ["concat"]
    assert similarity + group[0].cfg.data.synthetic_shift < 1
  with pytest.raises(UserError, match="synthetic_shift"):
    plan("texture", "dsb2018")
