"""A run saved on 8 devices goes on anywhere: devices, strategies, hosts."""

import shutil

import jax
import numpy as np
import pytest

from tests import runs
from tests.cluster_test import SGD, assert_near, train
from unet_jax import workdir as workdir_lib
from unet_jax.runtime import parallel

LAST, FROM = 24, 12
FLAGS = (*SGD, "--config.train.keep_checkpoints=20")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """The whole run on 8 devices, and it as it was at step FROM."""
  whole = tmp_path_factory.mktemp("saved") / "whole"
  train(whole, *FLAGS)
  half = whole.with_name("half")
  shutil.copytree(whole, half)
  for step in (half / "checkpoints").glob("[0-9]*"):
    if int(step.name) > FROM:
      shutil.rmtree(step)
  return whole, half


@pytest.mark.fault(10)
@pytest.mark.parametrize("space", [1, 2])
@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_every_array_comes_back_to_the_bit(saved, num_devices, space):
  _, half = saved
  stored = runs.read_state(half, FROM)
  cfg = workdir_lib.read_config(half)
  mesh = parallel.make_mesh(space, jax.devices()[:num_devices])
  with workdir_lib.open_checkpoints(cfg, half, writable=False) as checkpoints:
    state, _, step = checkpoints.restore(workdir_lib.abstract_state(cfg, mesh))
  assert step == FROM
  leaves = jax.tree.leaves(state)
  assert len(leaves) == len(stored) > 30
  for leaf in leaves:
    assert len(leaf.addressable_shards) == num_devices
  found = sorted(np.asarray(x).tobytes() for x in leaves)
  assert found == sorted(x.tobytes() for x in stored.values())


@pytest.mark.fault(10)
@pytest.mark.parametrize(
  ("hosts", "devices", "flags"),
  [
    (1, 1, ()),
    pytest.param(
      1, 2, ("--config.parallel.strategy=pmap",), marks=pytest.mark.slow
    ),
    (1, 4, ("--config.parallel.space=2",)),
    pytest.param(2, 8, (), marks=pytest.mark.slow),
    pytest.param(
      2, 4, ("--config.parallel.strategy=pmap",), marks=pytest.mark.slow
    ),
    pytest.param(2, 8, ("--config.parallel.space=2",), marks=pytest.mark.slow),
  ],
)
def test_the_run_goes_on_as_it_would_have(
  saved, tmp_path, hosts, devices, flags
):
  whole, half = saved
  shutil.copytree(half, tmp_path / "run")
  outputs = train(
    tmp_path / "run", *FLAGS, *flags, hosts=hosts, devices=devices
  )
  assert f"resumed from step {FROM}" in outputs[0]
  assert_near(tmp_path / "run", whole, 1e-4)
  # What was measured before the restart stands as it was.
  lines = [
    [r for r in runs.read_metrics(run) if r["step"] <= FROM]
    for run in (whole, tmp_path / "run")
  ]
  assert lines[0] == lines[1] and len(lines[0]) >= 3
