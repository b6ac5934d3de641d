"""The folder of a run: what is in it, and how a trained network is found.

config.json, env.json, normalization.json, metrics.jsonl, checkpoints/,
tensorboard/, pictures/, and the split that was made for the run.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

import unet_jax
from unet_jax import config as config_lib
from unet_jax import optimizer
from unet_jax import state as state_lib
from unet_jax.config import Config
from unet_jax.data import folder, normalize, pipeline
from unet_jax.errors import UserError
from unet_jax.models import build_model
from unet_jax.runtime import checkpoint, parallel, writers

# What may change when a run is continued in its folder: how long it is.
_MAY_CHANGE = ("train.num_steps",)
# What env.json names; the numbers of a run repeat to the bit only with these.
_PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes atomically; numbers that are not finite become null."""
  text = json.dumps(writers.plain(value), indent=2, allow_nan=False)
  writers.write_atomically(path, f"{text}\n".encode())


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """The config of the run in `workdir`, as data."""
  path = workdir / "config.json"
  if not path.is_file():
    raise UserError(
      f"no run in {workdir}: {path.name} is missing; train first with"
      f" --mode train --workdir {workdir}"
    )
  return json.loads(path.read_text())


def start(cfg: Config, workdir: pathlib.Path) -> None:
  """Claims `workdir` for this run, or continues the run that is there.

  Raises:
    UserError: the folder holds a run with another config, or is read-only.
  """
  if cfg.data.dir and workdir.resolve() == pathlib.Path(cfg.data.dir).resolve():
    raise UserError(f"--workdir {workdir} is the data folder; take another")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"cannot make --workdir {workdir}: {error.strerror}"
    ) from error
  if (workdir / "metrics.jsonl").exists():
    _check_same_run(cfg, workdir)
    _warn_of_other_machine(workdir)
  elif (workdir / "config.json").exists():
    # An earlier start that was refused, before step 1: what it made of its data
    # is not this run's.
    for name in ("normalization.json", *(f"{s}.txt" for s in folder.SPLITS)):
      (workdir / name).unlink(missing_ok=True)
  write_json(workdir / "config.json", config_lib.to_dict(cfg))
  write_json(workdir / "env.json", environment())


def _check_same_run(cfg: Config, workdir: pathlib.Path) -> None:
  old = config_lib.parse(read_config(workdir))
  lines = config_lib.differing_keys(old, cfg)
  refused = [x for x in lines if x.split(":")[0] not in _MAY_CHANGE]
  if refused:
    raise UserError(
      f"{workdir} holds a run with another config ({'; '.join(refused)}); take"
      " another --workdir, or the same values"
    )
  if cfg.train.num_steps < old.train.num_steps:
    raise UserError(
      f"config.train.num_steps={cfg.train.num_steps} is less than the"
      f" {old.train.num_steps} of the run in {workdir}; nearest:"
      f" {old.train.num_steps}"
    )
  if lines:
    writers.log(
      f"extended: {lines[0]}; the learning-rate schedule follows the new length"
    )


def environment() -> dict[str, Any]:
  """What must be equal for a run to repeat to the bit, and what ran it."""
  return {
    "versions": {
      "unet_jax": unet_jax.__version__,
      **{p: importlib.metadata.version(p) for p in _PACKAGES},
    },
    "python": platform.python_version(),
    "platform": platform.platform(),
    "devices": sorted({d.device_kind for d in jax.devices()}),
    "device_count": jax.device_count(),
    "process_count": parallel.this_host().count,
    "cpu_count": len(os.sched_getaffinity(0)),
    "git": _git_revision(),
    "command": shlex.join(["python", "-m", "unet_jax.main", *sys.argv[1:]]),
  }


def _git_revision() -> str | None:
  """Revision of the code, with "-dirty" where it was changed; None without."""
  folder = pathlib.Path(__file__).parent
  command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
  try:
    done = subprocess.run(
      command, cwd=folder, capture_output=True, text=True, timeout=10
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return done.stdout.strip() if done.returncode == 0 else None


def _warn_of_other_machine(workdir: pathlib.Path) -> None:
  path = workdir / "env.json"
  if not path.exists():
    return
  old, new = json.loads(path.read_text()), environment()
  keys = ("versions", "devices", "device_count", "process_count", "cpu_count")
  for key in keys:
    if old.get(key) != new[key]:
      writers.log(
        f"warning: {key} was {old.get(key)}, now {new[key]}: the run goes on,"
        " but not to the bit as it would have"
      )


def load_normalization(
  cfg: Config, workdir: pathlib.Path, source: pipeline.Source | None = None
) -> dict[str, Any]:
  """How intensities are normalised: stored with the run, or fitted once."""
  path = workdir / "normalization.json"
  if path.exists():
    return json.loads(path.read_text())
  if source is None:
    raise UserError(f"{path} is missing; the run in {workdir} is incomplete")
  fitted = normalize.fit_normalization(source, cfg.data.normalize)
  write_json(path, fitted)
  return fitted


# --- A trained network --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
  """A network with its weights, ready to apply."""

  model: nn.Module
  variables: dict[str, Any]
  normalization: dict[str, Any]
  step: int


def make_model(cfg: Config, axis_name: str | None = None) -> nn.Module:
  """The Module that `cfg` describes."""
  fields = dataclasses.asdict(cfg.model)
  return build_model(
    num_classes=cfg.data.num_classes, axis_name=axis_name, **fields
  )


def abstract_state(cfg: Config, mesh: Mesh) -> state_lib.TrainState:
  """Shapes, dtypes and shardings of the state; nothing is computed."""
  shape = (1, *cfg.data.crop_size, cfg.data.channels)
  tree = jax.eval_shape(
    lambda rng: state_lib.init_state(
      make_model(cfg),
      optimizer.make_optimizer(cfg.optimizer),
      rng,
      shape,
      ema=cfg.optimizer.ema_decay > 0,
    ),
    jax.random.key(0),
  )
  sharding = parallel.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def load_trained(
  cfg: Config, workdir: pathlib.Path, mesh: Mesh, *, step: int | None = None
) -> Trained:
  """Restores the best (or the given) checkpoint of the run in `workdir`."""
  directory = workdir / "checkpoints"
  with checkpoint.Checkpointer(
    directory,
    keep_latest=cfg.train.keep_checkpoints,
    writable=False,
    log=writers.log,
  ) as checkpointer:
    chosen = checkpointer.best_step() if step is None else step
    restored = checkpointer.restore(abstract_state(cfg, mesh), step=chosen)
  if restored is None:
    raise UserError(
      f"no checkpoint in {directory}; train first with --mode train --workdir"
      f" {workdir}"
    )
  state, _, found = restored
  return Trained(
    make_model(cfg),
    state_lib.eval_variables(state),
    load_normalization(cfg, workdir),
    found,
  )
