"""Several hosts: one trajectory, one writer, one end. Hosts are processes."""

import json
import os
import resource
import signal
import time

import numpy as np
import pytest
from PIL import Image

from tests import runs
from unet_jax.runtime import checkpoint, parallel

slow = pytest.mark.slow

# SGD: AdamW turns the order of a sum into another trajectory.
SGD = ("--config.optimizer.name=sgd", "--config.optimizer.ema_decay=0")
# What the trajectory of a step goes through, microbatches and clipping too.
ALL = (
  *SGD,
  "--config.optimizer.clip_norm=1",
  "--config.train.batch_size=16",
  "--config.train.accumulate=2",
  "--config.train.num_steps=30",
)


def train(workdir, *flags, hosts=1, devices=8):
  """Trains to the end; the output of every host."""
  argv = runs.arguments(workdir, *flags)
  if hosts == 1:
    processes = [runs.start(*argv, devices=devices)]
  else:
    processes = runs.start_hosts(hosts, *argv, devices=devices // hosts)
  done = [runs.finish(process) for process in processes]
  for status, output in done:
    assert status == 0, output
  return [output for _, output in done]


def numbers(record):
  """What is measured in a line of metrics.jsonl, flat."""
  return {
    f"{key}/{i}": value
    for key, values in record.items()
    for i, value in enumerate(np.ravel(values))
    if isinstance(value, (int, float, np.number))
  }


def assert_near(a, b, bound):
  """All numbers of two runs, line by line."""
  ours, theirs = runs.read_metrics(a), runs.read_metrics(b)
  assert len(ours) == len(theirs) > 5
  for x, y in zip(ours, theirs, strict=True):
    x, y = numbers(x), numbers(y)
    assert x.keys() == y.keys()
    for key in x:
      assert abs(x[key] - y[key]) <= bound * max(1, abs(y[key])), (key, x, y)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run of one host with one device."""
  workdir = tmp_path_factory.mktemp("alone")
  train(workdir, *ALL, devices=1)
  return workdir


@pytest.mark.parametrize(
  ("strategy", "hosts"),
  [
    ("pmap", 1),
    pytest.param("jit", 2, marks=slow),
    pytest.param("jit", 1, marks=slow),
    pytest.param("pmap", 2, marks=slow),
  ],
)
def test_the_trajectory_is_that_of_one_device(tmp_path, alone, strategy, hosts):
  flag = f"--config.parallel.strategy={strategy}"
  outputs = train(tmp_path, *ALL, flag, hosts=hosts)
  assert_near(tmp_path, alone, 1e-4)
  if hosts == 2:
    # One writer: every line stands once, and every host says who it is.
    steps = [r["step"] for r in runs.read_metrics(tmp_path)]
    assert steps == sorted(steps)
    said = outputs[1].splitlines()
    assert any("examples: " in line for line in said)
    # But for what the library of CPU collectives says.
    assert all(
      "host 1: " in x for x in said if x and "Gloo" not in x and x != "1"
    )
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["process_count"] == 2
    assert environment["device_count"] == 8


def wait_for_step(workdir, step, processes):
  """Returns once a line of metrics.jsonl has come so far."""
  end = time.monotonic() + 120
  path = workdir / "metrics.jsonl"
  while time.monotonic() < end:
    if path.exists() and any(
      json.loads(line)["step"] >= step for line in path.read_text().splitlines()
    ):
      return
    for process in processes:
      assert process.poll() is None, process.stdout.read()
    time.sleep(0.02)
  raise AssertionError(f"no step {step}")


@pytest.mark.fault(4)
@slow
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_sigterm_to_one_host_stops_all_and_any_number_goes_on(
  tmp_path, alone, strategy
):
  """Preempted, all save the same step; another number of hosts ends the run."""
  flags = (*ALL, f"--config.parallel.strategy={strategy}")
  argv = runs.arguments(tmp_path, *flags)
  processes = runs.start_hosts(2, *argv, devices=4)
  wait_for_step(tmp_path, 5, processes)
  os.kill(processes[1].pid, signal.SIGTERM)
  done = [runs.finish(process) for process in processes]
  for status, output in done:
    assert status == 143, output
    assert "the state was saved" in output
  steps = [int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")]
  assert 5 <= max(steps) < 30
  train(tmp_path, *flags, hosts=1, devices=2)
  assert_near(tmp_path, alone, 1e-4)


@pytest.mark.fault(6)
@slow
def test_a_killed_host_ends_the_other(tmp_path):
  argv = runs.arguments(
    tmp_path,
    "--config.train.num_steps=100000",
    "--config.train.eval_every=0",
    "--config.runtime.heartbeat_seconds=10",
  )
  processes = runs.start_hosts(2, *argv, devices=1)
  wait_for_step(tmp_path, 5, processes)
  os.kill(processes[1].pid, signal.SIGKILL)
  start = time.monotonic()
  status, output = runs.finish(processes[0], timeout=90)
  assert status != 0, output
  assert time.monotonic() - start < 60
  runs.finish(processes[1])


@slow
def test_hosts_that_differ_are_named(tmp_path):
  argv = runs.arguments(tmp_path)
  processes = runs.start_hosts(
    2, *argv, devices=1, own=lambda host: [f"--config.seed={host}"]
  )
  done = [runs.finish(process) for process in processes]
  for status, output in done:
    assert status == 2, output
    errors = [x for x in output.splitlines() if "error: " in x]
    assert len(errors) == 1
    assert "host 1 differs from host 0 in config, seed" in errors[0]


@slow
def test_what_one_host_cannot_do_ends_all_with_its_message(tmp_path):
  """Only host 1, which starts elsewhere, lacks the data."""
  for kind in ("images", "masks"):
    (tmp_path / "data" / kind).mkdir(parents=True)
    for stem in "abcd":
      pixels = np.full((16, 16), 0 if kind == "masks" else 7, np.uint8)
      Image.fromarray(pixels).save(tmp_path / "data" / kind / f"{stem}.png")
  (tmp_path / "elsewhere").mkdir()
  argv = runs.arguments(tmp_path / "run", "--config.data.source=folder")
  processes = runs.start_hosts(
    2,
    *argv,
    "--config.data.dir=data",
    devices=1,
    cwd=lambda host: tmp_path / ("elsewhere" if host else "."),
  )
  (status_0, output_0), (status_1, output_1) = map(runs.finish, processes)
  assert (status_0, status_1) == (2, 2), output_0 + output_1
  assert "error: host 1: " in output_0 and "data" in output_0
  assert "error: " in output_1 and "host 1: host 1" not in output_1


@slow
def test_what_one_host_meets_in_training_ends_the_other_soon(tmp_path):
  """One host needs a damaged image; the other waits for it in a sum."""
  data = tmp_path / "data"
  rng = np.random.default_rng(0)
  for kind in ("images", "masks"):
    (data / kind).mkdir(parents=True)
    for i in range(10):
      pixels = rng.integers(0, 2, (16, 16)).astype(np.uint8)
      Image.fromarray(pixels).save(data / kind / f"{i}.png")
  (data / "train.txt").write_text("\n".join(map(str, range(8))))
  (data / "val.txt").write_text("8\n9")
  whole = (data / "images" / "3.png").read_bytes()
  (data / "images" / "3.png").write_bytes(whole[:-30])  # A whole header.
  argv = runs.arguments(
    tmp_path / "run",
    *("--config.data.source=folder", f"--config.data.dir={data}"),
    "--config.runtime.heartbeat_seconds=10",
  )
  start = time.monotonic()
  done = [runs.finish(p, timeout=120) for p in runs.start_hosts(2, *argv)]
  assert time.monotonic() - start < 90  # Five minutes, if they waited.
  assert_both_say(done, "3.png")


def assert_both_say(done, what):
  """Both hosts end with 2 and one line, one of them with the other's."""
  for status, output in done:
    assert status == 2 and "Traceback" not in output, done
    errors = [x for x in output.splitlines() if "error: " in x]
    assert len(errors) == 1 and what in errors[0], done
  assert any("error: host " in output for _, output in done)


@pytest.mark.fault(8)
@slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_cannot_save_ends_the_other_soon(tmp_path, host):
  """Orbax alone would let both wait for each other, up to 20 minutes."""
  argv = runs.arguments(
    tmp_path,
    *("--config.train.num_steps=100000", "--config.train.eval_every=0"),
    *("--config.train.log_every=0", "--config.train.checkpoint_every=20"),
  )
  processes = runs.start_hosts(2, *argv)
  folder = tmp_path / "checkpoints"
  while not list(folder.glob("*0/digests.json")):
    assert processes[host].poll() is None
    time.sleep(0.02)
  resource.prlimit(processes[host].pid, resource.RLIMIT_FSIZE, (0, 0))
  start = time.monotonic()
  done = [runs.finish(process, timeout=120) for process in processes]
  assert time.monotonic() - start < 60
  assert_both_say(done, "no room for checkpoint")
  steps = [p for p in folder.iterdir() if p.name.isdigit()]
  assert steps and not any(map(checkpoint.find_damage, steps))


@pytest.mark.fault(7)
@slow
def test_two_hosts_evaluate_an_uneven_split_as_one_does(tmp_path, alone):
  """5 images on 8 devices of 2 hosts: padded, counted once."""
  flags = (
    "--config.eval.split=test",
    "--config.eval.extra_metrics=surface,rand,instances,calibration",
  )
  argv = ["--workdir", alone, "--mode", "evaluate", *flags]
  assert runs.finish(runs.start(*argv, devices=1))[0] == 0
  expected = json.loads((alone / "evaluation_test.json").read_text())
  for process in runs.start_hosts(2, *argv, devices=4):
    status, output = runs.finish(process)
    assert status == 0, output
  got = json.loads((alone / "evaluation_test.json").read_text())
  assert expected["num_images"] == 5 and expected["hd95"] > 0
  assert got["surface_undefined"] == expected["surface_undefined"]
  assert got.keys() == expected.keys()
  for key, value in expected.items():
    if isinstance(value, float):
      np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=key)


def test_an_incomplete_cluster_is_refused(tmp_path):
  process = runs.start(
    *runs.arguments(tmp_path), env={"JAX_COORDINATOR_ADDRESS": "localhost:1"}
  )
  status, output = runs.finish(process)
  assert status == 2
  assert "error: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES" in output


def test_no_cluster_without_a_word_of_one(monkeypatch):
  for name in list(os.environ):
    if name.startswith(("SLURM", "OMPI", "JAX_COORD", "JAX_NUM_P")):
      monkeypatch.delenv(name)
  assert not parallel.in_cluster()
  monkeypatch.setenv("SLURM_NTASKS", "2")
  assert not parallel.in_cluster(), "an allocation, but no srun"
  monkeypatch.setenv("SLURM_PROCID", "1")
  assert parallel.in_cluster()
  monkeypatch.delenv("SLURM_NTASKS")
  # Files as a TPU's chips have them say nothing without its library.
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(parallel.pathlib.Path, "glob", lambda *_: iter("x"))
  found = {"libtpu": False, "kubernetes": False}
  monkeypatch.setattr(
    parallel.importlib.util, "find_spec", lambda name: found[name] or None
  )
  assert not parallel.in_cluster()
  found["libtpu"] = True
  assert parallel.in_cluster()
  found["libtpu"] = False
  monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
  monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "here")
  assert not parallel.in_cluster()
  found["kubernetes"] = True
  assert parallel.in_cluster()
