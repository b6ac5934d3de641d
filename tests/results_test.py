"""The results page and the PyTorch peer beside it."""

import importlib
import itertools
import json
import pathlib
import runpy

import jax
import numpy as np
import pytest
from scipy import stats

from tests import tiny
from unet_jax import config as config_lib
from unet_jax import run_log
from unet_jax import workdir as workdir_lib
from unet_jax.data import pipeline
from unet_jax.objectives import losses
from unet_jax.schema import AugmentConfig

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def peer(monkeypatch):
  # Threads that wait for one another are slow on a machine that is busy.
  pytest.importorskip("torch").set_num_threads(1)
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  return importlib.import_module("results_peer")


# --- The configs --------------------------------------------------------------


def test_the_configs_are_the_ready_ones_but_for_scores_and_seeds():
  path = str(ROOT / "configs" / "results.py")
  for name, (file, scores) in runpy.run_path(path)["SETS"].items():
    config = config_lib.load_config(f"{path}:{name}")
    ready = config_lib.load_config(str(ROOT / "configs" / f"{file}.py"))
    ready.eval.extra_metrics, ready.study.seeds = scores, (0, 1, 2)
    config.data.dir = ready.data.dir = "DIR"
    assert config_lib.parse(config) == config_lib.parse(ready)


# --- The peer -----------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("size", [(9,), (5, 7), (3, 4, 5)])
def test_its_losses_and_their_gradients_are_ours(peer, size, num_classes):
  import torch

  rng = np.random.default_rng(0)
  logits = 3 * rng.normal(size=(2, *size, num_classes)).astype(np.float32)
  label = rng.integers(0, max(num_classes, 2), (2, *size)).astype(np.int32)
  weight = rng.choice([0, 0.5, 2], (2, *size)).astype(np.float32)
  assert (weight == 0).any()
  for term, theirs in peer.LOSSES.items():
    loss_fn = losses.make_loss(terms=(term,), weights=(), class_weights=())
    ours, back = jax.vjp(lambda x, f=loss_fn: f(x, label, weight)[0], logits)
    x = torch.tensor(logits).movedim(-1, 1).requires_grad_()
    found = theirs(x, torch.tensor(label).long(), torch.tensor(weight))
    found.sum().backward()
    np.testing.assert_allclose(found.detach().numpy(), ours, atol=1e-5)
    (slope,) = back(np.ones(2, np.float32))
    np.testing.assert_allclose(x.grad.movedim(1, -1), slope, atol=1e-6)


def test_a_loss_that_it_lacks_is_named(peer):
  config = tiny.get_config()
  config.loss.terms = ("focal",)
  with pytest.raises(SystemExit, match=r"no PyTorch loss as .*focal"):
    peer.check(config_lib.parse(config))


def test_it_is_the_seeds_network(peer):
  # As counted from the code that this project grew from.
  net = peer.peers.UNet(2, peer.WIDTHS, "aligned", channels=3)
  assert sum(p.numel() for p in net.parameters()) == 7_788_545


def test_flips_and_turns_move_image_label_and_weight_together(peer):
  def views(size, augment):
    label = np.arange(np.prod(size), dtype=np.int32).reshape(1, *size)
    batch = {"image": label[..., None] + 0.0, "label": label, "weight": label}
    found = set()
    for seed in range(60):
      out = peer.flipped(batch, augment, np.random.default_rng(seed))
      np.testing.assert_array_equal(out["image"][..., 0], out["label"])
      np.testing.assert_array_equal(out["weight"], out["label"])
      found.add(out["label"].tobytes())
    np.testing.assert_array_equal(label.ravel(), np.arange(label.size))
    return label[0], found

  both = AugmentConfig()
  label, found = views((3, 3), both)
  expected = {
    np.ascontiguousarray(np.rot90(x, k)).tobytes()
    for x, k in itertools.product((label, label.T), range(4))
  }
  assert found == expected
  _, found = views((2, 3), both)
  assert len(found) == 4
  label, found = views((3, 3), AugmentConfig(flip=False, turn=False))
  assert found == {label.tobytes()}


@pytest.fixture
def finished(tmp_path):
  """The folder of a run, with all that the peer reads of it."""
  config = tiny.get_config()
  config.train.num_steps, config.train.eval_every = 8, 3
  cfg = config_lib.parse(config)
  folder = tmp_path / "runs" / "ours-s0"
  workdir_lib.write_json(folder / "config.json", config_lib.to_dict(cfg))
  source = pipeline.make_source(cfg, "train", workdir_lib.split_dir(folder))
  workdir_lib.fit_normalization(cfg, folder, source)
  return folder


@pytest.fixture
def steps_are_seconds(peer, monkeypatch):
  """A clock that every step moves by a second."""
  now, step = [0.0], peer.Run.step

  def tick(run, batch):
    step(run, batch)
    now[0] += 1

  monkeypatch.setattr(peer.Run, "step", tick)
  for name in run_log.SPENT:
    monkeypatch.setitem(run_log.SPENT, name, lambda: now[0])
  return now


def test_it_stops_in_time_and_goes_on_to_the_bit(
  peer, finished, steps_are_seconds, tmp_path, monkeypatch
):
  def make(name):
    return peer.Run(finished, tmp_path / name, "cpu", 12.0, widths=(2, 4))

  looks = []
  look = peer.Run.look
  monkeypatch.setattr(
    peer.Run, "look", lambda run: (look(run), looks.append(run.state["step"]))
  )
  whole = make("whole.json")
  record = whole.train()
  assert record["step"] == 12 and record["cpu_seconds"] == 12
  # Our looks after 3 and 6 of 8 steps and at the end, as shares of the time.
  assert looks == [5, 9, 12]

  broken = make("broken.json")
  step = peer.Run.step
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

    def stop(run, batch):
      if run.state["step"] == 7:
        raise KeyboardInterrupt
      step(run, batch)

    patch.setattr(peer.Run, "step", stop)
    broken.train()
  again = make("broken.json")
  assert again.state["step"] == 5  # As of the look at val.
  assert again.train() == record
  for key, value in whole.net.state_dict().items():
    np.testing.assert_array_equal(value, again.net.state_dict()[key], key)


def test_scoring_costs_it_the_passes_of_the_network_alone(
  peer, finished, steps_are_seconds, tmp_path, monkeypatch
):
  now, forward = steps_are_seconds, peer.peers.UNet.forward
  evaluate = peer.evaluate_lib.evaluate

  def slow_forward(net, x):
    now[0] += 0 if net.training else 2
    return forward(net, x)

  def slow_scoring(*args, **fields):
    now[0] += 1000
    return evaluate(*args, **fields)

  monkeypatch.setattr(peer.peers.UNet, "forward", slow_forward)
  monkeypatch.setattr(peer.evaluate_lib, "evaluate", slow_scoring)
  run = peer.Run(finished, tmp_path / "x.json", "wall", 24.0, widths=(2, 4))
  record = run.train()
  # Looks of one batch each, 2 s: after 9 and 18 s, and 2 s before the end.
  assert record["step"] == 24 - 3 * 2
  assert record["wall_seconds"] == 24


def test_its_scores_are_those_of_its_best_network(
  peer, finished, steps_are_seconds, tmp_path
):
  import torch

  run = peer.Run(finished, tmp_path / "x.json", "wall", 12.0, widths=(2, 4))
  record = run.train()
  assert record["split"] == "test"
  assert record["params"] == sum(p.numel() for p in run.net.parameters())
  both = union = 0
  source, net = run.source("test"), run.net.eval()
  net.load_state_dict(run.state["best"])
  for i in range(len(source)):
    x = source[i]["image"]
    x = torch.tensor((x - x.mean()) / x.std()).movedim(-1, 0)[None].float()
    with torch.inference_mode():
      found = net(x)[0, 0].numpy() > 0
    both += (found & (source[i]["label"] == 1)).sum()
    union += found.sum() + (source[i]["label"] == 1).sum()
  assert record["metrics"]["dice"] == pytest.approx(2 * both / union, abs=0.01)


def test_sentences_have_none(peer, finished):
  config = config_lib.load_config(str(ROOT / "configs" / "ewt_upos.py"))
  config.data.dir = "DIR"
  raw = config_lib.to_dict(config_lib.parse(config))
  workdir_lib.write_json(finished / "config.json", raw)
  record = {"id": "ours-s0", "status": "done", "wall_seconds": 1.0}
  study = finished.parents[1]
  (study / "results.jsonl").write_text(json.dumps(record) + "\n")
  with pytest.raises(SystemExit, match="reads images, not words"):
    peer.run(study, "wall")


# --- The page -----------------------------------------------------------------


def write_study(folder, scores, peers=None):
  """A finished study: scores [seeds, images] as Dice, IoU and AP50."""
  folder.mkdir(parents=True)

  def record(seed, row, **more):
    images = [
      {"name": str(i), "dice": x, "iou": x, "ap50": x}
      for i, x in enumerate(row)
    ]
    given = [x for x in row if x is not None]
    pooled = {k: float(np.mean(given)) for k in ("dice", "iou", "ap50")}
    common = {"seed": seed, "split": "test", "per_image": images}
    clocks = {"wall_seconds": 120.0, "cpu_seconds": 180.0, "params": 1234}
    return {**common, **clocks, "metrics": pooled, **more}

  with open(folder / "results.jsonl", "w") as file:
    for seed, row in enumerate(scores):
      more = {"id": f"ours-s{seed}", "status": "done", "curve": [[9, 0.5]]}
      file.write(json.dumps(record(seed, row, **more)) + "\n")
  (folder / "env.json").write_text(
    json.dumps(
      {
        "versions": {"jax": "0.10.2", "unet_jax": "9.8.7"},
        "devices": ["cpu"],
        "processor": "A CPU",
        "cpu_count": 2,
      }
    )
  )
  for seed, row in enumerate(peers or ()):
    path = folder / "peer" / f"ours-s{seed}.json"
    path.parent.mkdir(exist_ok=True)
    more = {"step": 5 + seed, "clock": "cpu", "torch": "2.10", "threads": 1}
    path.write_text(json.dumps(record(seed, row, **more)))


@pytest.fixture
def make_page(tmp_path, monkeypatch, capsys):
  def make():
    output = tmp_path / "RESULTS.md"
    arguments = ["results.py", str(tmp_path / "runs"), "--output", str(output)]
    monkeypatch.setattr("sys.argv", arguments)
    runpy.run_path(str(ROOT / "docs" / "results.py"), run_name="__main__")
    return output.read_text(), capsys.readouterr().out

  return make


def test_the_page_has_both_kinds_of_interval(make_page, tmp_path):
  ours = np.array([[0.8, 0.6, 0.7], [0.82, 0.6, 0.71], [0.9, 0.71, 0.79]])
  theirs = (ours - np.array([[0.1], [0.12], [0.11]])).tolist()
  write_study(tmp_path / "runs" / "dsb2018", ours.tolist(), theirs)
  page, said = make_page()
  # Pooled: Student's t over three seeds, on the back of an envelope.
  means = ours.mean(1)
  half = stats.t.ppf(0.975, 2) * means.std(ddof=1) / 3**0.5
  mean = means.mean()
  pooled = f"**{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]**"
  rows = [x.split(" | ") for x in page.splitlines() if x.startswith("| ")]
  cells = {row[1]: row[2:] for row in rows if len(row) == 5}
  assert cells["IoU, pooled over pixels"][0] == pooled
  # The difference has no image effect: that of the seeds alone is left, with
  # the same t.
  gap = np.array([0.1, 0.12, 0.11])
  half = stats.t.ppf(0.975, 2) * gap.std(ddof=1) / 3**0.5
  expected = f"+0.110 [{0.11 - half:.3f}, {0.11 + half:.3f}] |"
  assert cells["Dice, mean over images"][2] == expected
  # Images differ more than seeds do: another image counts.
  width = lambda text: np.ptp([float(x) for x in text[9:-3].split(", ")])
  crossed = cells["IoU, mean over images"][0]
  assert width(crossed) > width(pooled)
  assert "machine was shared" in page and "| 1,234 | 5 6 7 |" in page
  assert "| 1,234 | 9 |" in page and "A CPU, 2 cores, 1 thread(s) |" in page
  assert "unet_jax 9.8.7" in page and "torch 2.10" in page
  assert "| 2.0 2.0 2.0 | 3.0 3.0 3.0 | A CPU, 2 cores |" in page
  assert "synthetic: not run" in said and "dsb2018: done\n" in said


def test_images_without_a_score_are_left_out_and_counted(make_page, tmp_path):
  ours = [[0.5, None, 0.7], [0.5, 0.9, 0.7], [0.5, 0.9, 0.7]]
  write_study(tmp_path / "runs" / "dsb2018", ours)
  page, _ = make_page()
  assert "IoU, mean over images, the 2 where it is defined | **0.600" in page
  assert page.count("| not run | not run |") == 5


def test_what_is_not_finished_is_not_on_the_page(make_page, tmp_path):
  full = np.full((3, 2), 0.5).tolist()
  write_study(tmp_path / "runs" / "synthetic", full, full[:2])
  write_study(tmp_path / "runs" / "dsb2018", full[:2])
  page, said = make_page()
  assert "| DSB2018" not in page and "not on this page: DSB2018" in page
  assert "| not run |" in page  # The peer: two of three seeds.
  assert "dsb2018: not run" in said
  with pytest.raises(SystemExit):
    (tmp_path / "runs" / "synthetic" / "results.jsonl").write_text("")
    make_page()


def test_the_launcher_knows_its_sets_and_ends_with_what_fails(monkeypatch):
  names = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
  with pytest.raises(SystemExit) as ended:
    names["start"](["-c", "raise SystemExit(7)"])
  assert ended.value.code == 7
  monkeypatch.setattr("sys.argv", ["results.py", "runs", "pets"])
  with pytest.raises(SystemExit) as ended:
    names["main"]()
  assert ended.value.code == 2
  # Each of ours first; options may stand anywhere.
  started = []
  monkeypatch.setitem(names["main"].__globals__, "start", started.append)
  given = ["RUNS", "--clock", "cpu", "isbi2012", "ewt_upos", "--config.seed=3"]
  monkeypatch.setattr("sys.argv", ["results.py", *given, "--data", "/DATA"])
  names["main"]()
  ours, sentences, peers = started
  assert {"--config.data.dir=/DATA/isbi2012", "--config.seed=3"} <= set(ours)
  assert "configs/results.py:ewt_upos" in sentences
  assert peers[1:] == [
    f"{pathlib.Path('RUNS').resolve()}/isbi2012",
    *given[1:3],
  ]
