"""Tiny runs for the tests: one config, started as a user would start it."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

CONFIG = str(pathlib.Path(__file__).parent / "tiny.py")


def xla_flags(devices):
  """Fake devices, and less of LLVM: the tests' time is compile time."""
  return (
    f"--xla_force_host_platform_device_count={devices}"
    " --xla_backend_optimization_level=0"
  )


def arguments(workdir, *flags, mode="train"):
  """The command line of a tiny run."""
  common = ["--config", CONFIG, "--workdir", str(workdir), "--mode", mode]
  return [*common, *map(str, flags)]


def start(*argv, devices=1, env=None, **popen):
  """Starts `python -m unet_jax.main ARGV` as a process of its own."""
  flags = {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(
    [sys.executable, "-W", "error", "-m", "unet_jax.main", *map(str, argv)],
    env={**os.environ, **flags, **(env or {})},
    text=True,
    stderr=subprocess.STDOUT,
    **{"stdout": subprocess.PIPE, **popen},
  )


def start_hosts(
  count,
  *argv,
  devices=1,
  own=lambda host: (),
  cwd=lambda host: None,
  **popen,
):
  """Starts the same command on `count` hosts, which are processes here.

  `own` gives the arguments that one host has beside those of all, `cwd` the
  folder that it starts in.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  return [
    start(
      *argv,
      *own(host),
      devices=devices,
      cwd=cwd(host),
      **popen,
      env={
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(host),
      },
    )
    for host in range(count)
  ]


def finish(process, timeout=180):
  """(exit status, everything that was printed)."""
  output, _ = process.communicate(timeout=timeout)
  return process.returncode, output


def read_metrics(workdir):
  """metrics.jsonl without what the clock decides."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  timed = ("second", "time", "eta")
  return [
    {k: v for k, v in json.loads(x).items() if not any(t in k for t in timed)}
    for x in lines
  ]


def read_state(workdir, step):
  """Every array of a checkpoint as stored, by path."""
  import jax
  import orbax.checkpoint as ocp

  # As NumPy arrays: whatever devices it was saved on, none is needed.
  handler = ocp.PyTreeCheckpointHandler()
  folder = pathlib.Path(workdir).absolute() / "checkpoints" / str(step)
  names = handler.metadata(folder / "state").tree
  plain = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), names)
  tree = handler.restore(folder / "state", restore_args=plain)
  handler.close()
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_same_run(a, b, step):
  """Equal to the bit: metrics, parameters, optimizer state, statistics."""
  assert read_metrics(a) == read_metrics(b)
  state_a, state_b = read_state(a, step), read_state(b, step)
  assert state_a.keys() == state_b.keys()
  assert any("batch_stats" in key for key in state_a)
  assert any("opt_state" in key for key in state_a)
  for key, value in state_a.items():
    assert value.dtype == state_b[key].dtype, key
    np.testing.assert_array_equal(value, state_b[key], err_msg=key)


@contextlib.contextmanager
def mounted(folder, options):
  """A file system of its own in `folder`; skips where none can be mounted."""
  folder.mkdir(exist_ok=True)
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
  if (
    not shutil.which("mount")
    or subprocess.run(command, capture_output=True).returncode
  ):
    pytest.skip("no right to mount a small tmpfs")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
  """Fills the disk of `folder` but for `leave` bytes; returns the filler."""
  filler = folder / "filler"
  free = shutil.disk_usage(folder).free
  filler.write_bytes(b"\0" * max(free - leave, 0))
  return filler
