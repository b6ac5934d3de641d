"""What is compiled is kept, and is compiled once."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from tests import runs
from unet_jax.main import main
from unet_jax.runtime import compilation


def start(workdir, cache, *flags):
  """A run of its own, in whose environment nothing names a cache folder."""
  env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  env |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
  env["XLA_FLAGS"] = runs.xla_flags(devices=1)
  done = subprocess.run(
    [
      *(sys.executable, "-W", "error", "-m", "unet_jax.main"),
      *runs.arguments(workdir, "--config.train.num_steps=2", *flags),
    ],
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


def programs(cache):
  return {p.name for p in pathlib.Path(cache).rglob("*-cache")}


def test_the_second_start_compiles_nothing_anew(tmp_path):
  cache = tmp_path / "cache"
  start(tmp_path / "first", cache)
  steps = lambda: {p for p in programs(cache) if "train_step" in p}
  kept = programs(cache / "unet_jax" / "compiled")
  assert len(steps()) == 1
  start(tmp_path / "second", cache)
  # Small programs are kept when a busy machine takes 0.2 s to compile them.
  assert steps() <= kept <= programs(cache)
  runs.assert_same_run(tmp_path / "first", tmp_path / "second", step=2)


@pytest.mark.slow
def test_it_can_be_turned_off_and_belongs_to_no_run(tmp_path):
  cache = tmp_path / "cache"
  off = "--config.runtime.compilation_cache="
  start(tmp_path / "run", cache, off)
  assert not cache.exists()
  # The same run goes on with another folder.
  other = tmp_path / "other"
  flag = f"--config.runtime.compilation_cache={other}"
  start(tmp_path / "run", cache, "--config.train.num_steps=3", flag)
  assert programs(other) and not cache.exists()


def test_a_folder_that_cannot_be_written_is_no_error(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.setattr(compilation.jax.config, "update", pytest.fail)
  (tmp_path / "file").write_text("")
  # Where the environment names a folder, that one is used.
  compilation.keep_compiled(str(tmp_path / "new"))
  assert not (tmp_path / "new").exists()
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.undo()
  try:
    jax.config.update("jax_compilation_cache_dir", None)
    compilation.keep_compiled(str(tmp_path / "file" / "cache"))
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update("jax_compilation_cache_dir", before)
  assert "compiled programs are not kept" in capfd.readouterr().err


def test_longer_runs_compile_no_more(tmp_path):
  """Neither steps nor evaluations, pictures or saves compile twice."""
  compiled = []

  def listen(name, *_, **__):
    if name == "/jax/core/compile/backend_compile_duration":
      compiled.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  counts = []
  for steps in (8, 24):  # One evaluation, and three.
    jax.clear_caches()
    compiled.clear()
    flag = f"--config.train.num_steps={steps}"
    workdir = tmp_path / str(steps)
    assert main(runs.arguments(workdir, flag)) == 0
    counts.append(len(compiled))
  jax.monitoring.clear_event_listeners()
  lines = (tmp_path / "24" / "metrics.jsonl").read_text().splitlines()
  scored = [x for x in map(json.loads, lines) if x["split"] == "val"]
  assert len(scored) == 3
  assert counts[0] == counts[1] > 0
