"""Skip probes through a run: the step, the log, evaluation, a study's page."""

import csv
import functools
import json

import jax
import numpy as np
import pytest

from tests import tiny
from tests import train_step_test as base
from unet_jax import config as config_lib
from unet_jax import evaluate, program, run_log
from unet_jax.models import probes
from unet_jax.studies import bases, report, run, sweep, tables


def probes_of(run, state, dtype, num_steps=3):
  """Probes of each step, and the last state."""
  found = []
  for step in range(num_steps):
    state, sums = run(state, base.batch_of(step, dtype))
    found.append(jax.device_get(sums.probes))
  return found, jax.device_get(state)


@functools.cache
def one_device():
  with jax.enable_x64(True):
    state = base.cast(base.initial(norm="group"), np.float64)
    _, _, step = base.make(norm="group", probe_every=1)
    return probes_of(base.jitted(step, 1), state, np.float64)


@pytest.mark.parametrize("way", ["8 devices", "pmap", "microbatches"])
def test_probes_are_those_of_the_global_batch(way):
  with jax.enable_x64(True):
    state = base.cast(base.initial(norm="group"), np.float64)
    expected, _ = one_device()
    fields = {"norm": "group", "probe_every": 1}
    if way == "pmap":
      step = base.pmapped(base.make(axis_name="data", **fields)[2])
    elif way == "microbatches":
      step = base.jitted(base.make(accumulate=2, **fields)[2], 1)
    else:
      step = base.jitted(base.make(**fields)[2], 8)
    found, _ = probes_of(step, state, np.float64)
  for a, b in zip(found, expected, strict=True):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), a, b)
    assert (b.norm > 0).all() and b.steps == 1


def test_steps_between_are_not_heard():
  with jax.enable_x64(True):
    state = base.cast(base.initial(norm="group"), np.float64)
    _, _, step = base.make(norm="group", probe_every=2)
    found, _ = probes_of(base.jitted(step, 1), state, np.float64)
    every, _ = one_device()
  assert [float(f.steps) for f in found] == [0, 1, 0]
  assert not any(np.any(x) for x in jax.tree.leaves((found[0], found[2])))
  np.testing.assert_allclose(found[1].norm, every[1].norm, rtol=1e-9)
  np.testing.assert_allclose(found[1].energy, every[1].energy, rtol=1e-9)


def test_with_probes_the_steps_are_the_same():
  with jax.enable_x64(True):
    state = base.cast(base.initial(norm="group"), np.float64)
    found, probed = one_device()
    _, _, step = base.make(norm="group")
    nothing, plain = probes_of(base.jitted(step, 1), state, np.float64)
  assert nothing == [None] * 3 and found[0] is not None
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15),
    probed,
    plain,
  )


def test_what_only_fills_the_batch_is_not_in_the_probes():
  with jax.enable_x64(True):
    state = base.cast(base.initial(norm="group"), np.float64)
    _, _, step = base.make(norm="group", probe_every=1)
    whole = base.batch_of(0, np.float64)
    half = jax.tree.map(lambda x: x[:4], whole)
    filled = {**whole, "valid": np.arange(8) < 4.0}
    step = jax.jit(step)
    _, expected = step(state, half, base.RNG)
    _, found = step(state, filled, base.RNG)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-9),
    found.probes,
    expected.probes,
  )


def test_probes_cost_less_than_two_percent_of_the_arithmetic():
  """As XLA counts it, at the sizes of the ready studies."""
  flops, mesh = [], base.mesh_of(1)
  for on in (False, True):
    config = bases.get_base("synthetic")
    config.train.probe_skips = on
    cfg = config_lib.parse(config)
    lowered = program._jit(cfg, mesh).lower(*program.abstract_inputs(cfg, mesh))
    flops.append(lowered.cost_analysis()["flops"])
  assert 1 < flops[1] / flops[0] < 1.02


def test_a_window_keeps_its_probes_over_a_restart():
  def sums(norm, energy):
    _, _, step = base.make(probe_every=1)
    shapes = jax.eval_shape(step, base.initial(), base.batch_of(0), base.RNG)[1]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    zeros = zeros.replace(stop=None)
    parts = (np.array(norm), np.array(energy), np.ones(()))
    return zeros.replace(probes=type(zeros.probes)(*parts))

  first = sums([[1.0], [4.0]], [[1.0], [4.0]])
  second = sums([[3.0], [0.0]], [[2.0], [2.0]])
  window = run_log.window_to_json(run_log.add_sums(None, first))
  window = run_log.add_sums(json.loads(json.dumps(window)), second)
  means = run_log.mean_sums(window, ())
  assert means["skip_gradient_norm"] == [2.0]
  assert means["deep_gradient_norm"] == [2.0]
  assert means["skip_energy_share"] == [0.5]
  # Nobody listened: the line says nothing, instead of NaN.
  silent = first.replace(probes=jax.tree.map(np.zeros_like, first.probes))
  means = run_log.mean_sums(run_log.add_sums(None, silent), ())
  assert "loss" in means and not set(run_log.PROBES) & set(means)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  """Two arms, one seed, both kinds of probes; and its report."""
  workdir = tmp_path_factory.mktemp("study")
  config = tiny.get_config()
  config.model.widths = (2, 4, 4)
  config.train.num_steps, config.train.log_every = 4, 2
  config.train.eval_every = 4
  config.train.probe_skips = config.eval.probe_skips = True
  config.study.seeds, config.study.num_pictures = (0,), 0
  arms = sweep.baseline({}, "concat")
  arms += sweep.arm({"model.skip_levels": (False, True)}, "cut")
  run.run(config, sweep.check(arms), workdir)
  report.run([workdir], workdir, 0.01)
  return workdir


def test_train_lines_have_a_number_a_level(study):
  path = study / "runs" / "cut-s0" / "metrics.jsonl"
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  lines = [line for line in lines if line["split"] == "train"]
  assert [line["step"] for line in lines] == [2, 4]
  for line in lines:
    assert line["skip_gradient_norm"][0] == 0 < line["skip_gradient_norm"][1]
    assert min(line["deep_gradient_norm"]) > 0
    assert line["skip_energy_share"][0] == 0 < line["skip_energy_share"][1] < 1


def test_results_have_the_dice_without_each_skip(study):
  concat, cut = run.read_results(study)
  for kind in probes.CUTS[1:]:
    assert len(concat["metrics"][f"dice_{kind}"]) == 2
    whole, deep = cut["metrics"][f"dice_{kind}"]
    assert whole is None and deep is not None
    for level in (0, 1):
      rows = [row[f"dice_{kind}_{level}"] for row in concat["per_image"]]
      mean = concat["metrics"][f"dice_{kind}"][level]
      assert abs(np.mean(rows) - mean) < 0.2
  assert [line["step"] for line in concat["probes"]] == [2, 4]
  assert set(run_log.PROBES) == set(concat["probes"][0]) - {"step"}
  assert run_log.PROBES == tables._PROBES
  assert probes.CUTS[1:] == tables._CUTS


def test_the_page_shows_them(study):
  text = (study / "report.md").read_text()
  (concat, _) = run.read_results(study)
  rows = concat["per_image"]
  change = np.mean([r["dice_zeroed_1"] - r["dice"] for r in rows])
  shown = f"{change:+.4f}".replace("-", "\N{MINUS SIGN}")
  assert f"| concat | 1 | 1 | 5 | {shown} |" in text
  assert "| cut | 1 | 1 | 5 |" in text and "| cut | 0 | 1 | 5 |" not in text
  assert "| concat | 0 | 4 | 1 |" in text


def test_evaluate_cuts_as_the_study_does_whatever_the_batch(study):
  """And a zeroed skip is a kernel that lacks its rows."""
  folder = study / "runs" / "concat-s0"
  config = config_lib.load_config(folder / "config.json")
  config.eval.split, config.eval.batch_size = "test", 2
  config.eval.objects = True
  cfg = config_lib.parse(config)
  evaluate.run(cfg, folder)
  found = json.loads((folder / "evaluation_test.json").read_text())
  (concat, _) = run.read_results(study)
  for kind in probes.CUTS[1:]:
    key = f"dice_{kind}"
    np.testing.assert_allclose(found[key], concat["metrics"][key], rtol=1e-12)
  text = (folder / "evaluation_test_per_image.csv").read_text()
  rows = list(csv.DictReader(text.splitlines()))
  assert "dice_shuffled_1" in rows[0]
  # Beside: all objects of an image together are its foreground.
  for row in rows:
    pixels = [int(n) for n in row["object_pixels"].split()]
    found = [float(share) for share in row["object_found"].split()]
    assert sum(pixels) == int(row["foreground_pixels"])
    assert len(found) == len(pixels) and all(0 <= x <= 1 for x in found)


def test_eval_probes_of_one_image_or_shuffle_have_no_shuffled():
  whole = evaluate.Evaluation({"dice": 0.5}, [{"dice": 0.5}], {})
  calls = []

  def score(how):
    calls.append(how)
    return evaluate.Evaluation({"dice": 0.4}, [{"dice": 0.3}], {})

  cfg = config_lib.parse(tiny.get_config())
  found = evaluate.probe_skips(score, whole, cfg)
  assert found.summary["dice_zeroed"] == [0.4]
  assert found.rows[0]["dice_averaged_0"] == 0.3
  assert np.isnan(found.summary["dice_shuffled"]).all()
  assert calls == [[1], [2]]
  assert whole.summary == {"dice": 0.5}, "nothing is changed in place"
