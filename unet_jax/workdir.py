"""The folder of a run: what is in it, and how a trained network is found.

config.json, env.json, normalization.json, parameters.txt, metrics.jsonl,
checkpoints/, tensorboard/, pictures/; class_weights.json and split/ with what
was made of the data: a seeded split, or the vocabulary of tokens.
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

import unet_jax
from unet_jax import config as config_lib
from unet_jax import optimizer
from unet_jax import state as state_lib
from unet_jax.config import Config
from unet_jax.data import balance, normalize, pipeline
from unet_jax.errors import DiskError, UserError
from unet_jax.models import build_model
from unet_jax.runtime import checkpoint, parallel, storage, writers

# What may change when a run is continued in its folder: how long it is, and
# what changes no number, but for the order of sums.
_MAY_CHANGE = (
  "train.num_steps",
  "parallel.strategy",
  "parallel.space",
  "model.remat",
  "data.num_threads",
)
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


def read_json(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """Reads a JSON object; the UserError without one ends with `remedy`."""
  try:
    value = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}; {remedy}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} does not hold a JSON object; {remedy}")
  return value


def read_config(workdir: pathlib.Path) -> Config:
  """The config of the run in `workdir`."""
  remedy = (
    "--workdir must name the folder of a run (made by --mode train), or a new"
    " one"
  )
  return config_lib.parse(read_json(workdir / "config.json", remedy))


def split_dir(workdir: pathlib.Path) -> pathlib.Path:
  """Where a split, or a vocabulary, that was made for the run is kept."""
  return workdir / "split"


def has_checkpoints(workdir: pathlib.Path) -> bool:
  """Whether the folder holds a run."""
  return any(
    p.name.isdigit() and storage.is_committed(p)
    for p in (workdir / "checkpoints").glob("*")
  )


@contextlib.contextmanager
def claim(cfg: Config, workdir: pathlib.Path) -> Iterator[None]:
  """Makes `workdir` this run's for as long as the context lasts.

  Host 0 does so for all. The folder holds a run once it holds a checkpoint;
  before that, a start that was refused or ended early leaves nothing that binds
  the next one.

  Raises:
    UserError: the folder holds another config, is in use, or is read-only.
  """
  if not parallel.this_host().is_primary:
    yield
    return
  data = storage.to_path(cfg.data.dir) if cfg.data.dir else None
  if data and storage.resolve(workdir) == storage.resolve(data):
    raise UserError(f"--workdir {workdir} is the data folder; take another")
  with locked(workdir):
    if has_checkpoints(workdir):
      _check_same_run(cfg, workdir)
    elif (workdir / "config.json").exists():
      read_config(workdir)  # Refuses a folder that is somebody else's.
      storage.remove_tree(split_dir(workdir))
      for name in ("normalization.json", "class_weights.json"):
        (workdir / name).unlink(missing_ok=True)
    write_json(workdir / "config.json", config_lib.to_dict(cfg))
    yield


@contextlib.contextmanager
def locked(workdir: pathlib.Path, name: str = ".lock") -> Iterator[None]:
  """Keeps other runs out of the folder; on gs:// see `storage.owned`."""
  if storage.is_remote(workdir):
    with storage.owned(workdir, writers.log):
      yield
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / name, "w")
  except OSError as error:
    raise DiskError(
      f"cannot write to --workdir {workdir}: {error.strerror}; take another"
    ) from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(
        f"another run is writing to {workdir}; wait for it, or take another"
        " --workdir"
      ) from error
    yield


def _check_same_run(cfg: Config, workdir: pathlib.Path) -> None:
  old = read_config(workdir)
  cfg = dataclasses.replace(cfg, runtime=old.runtime)  # Of this machine only.
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
  for line in lines:
    if line.startswith("train.num_steps"):
      writers.log(
        f"extended: {line}; the learning-rate schedule follows the new length"
      )
    else:
      writers.log(f"goes on with {line}")


def write_environment(workdir: pathlib.Path) -> None:
  """Writes env.json; warns if the run was started in another environment."""
  path, new = workdir / "env.json", environment()
  try:
    old = read_json(path, "")
  except UserError:
    old = new
  keys = ("versions", "devices", "device_count", "process_count")
  keys += ("cpu_count", "processor")
  for key in keys:
    if key in old and old[key] != new[key]:
      writers.log(
        f"warning: {key} was {old[key]}, now {new[key]}: the run goes on, but"
        " not to the bit as it would have"
      )
  write_json(path, new)


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
    "cpu_count": _usable_cpus(),
    "processor": _processor(),
    "git": _git_revision(),
    "command": shlex.join(["python", "-m", "unet_jax.main", *sys.argv[1:]]),
  }


def _usable_cpus() -> int | None:
  """Cores of this process: bits change with them. Not all systems know."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _processor() -> str:
  """The name of the CPU, as far as the system tells it."""
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


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


def fit_normalization(
  cfg: Config, workdir: pathlib.Path, source: pipeline.Source
) -> dict[str, Any]:
  """How intensities are normalised: fitted once, then kept with the run.

  One host does it for all.
  """
  path = workdir / "normalization.json"
  if not path.exists():
    fitted = normalize.fit_normalization(
      source, cfg.data.normalize, clip=cfg.data.clip_percentiles
    )
    write_json(path, fitted)
  return load_normalization(workdir)


def load_normalization(workdir: pathlib.Path) -> dict[str, Any]:
  """What `fit_normalization` kept."""
  path = workdir / "normalization.json"
  remedy = "without it nothing can be predicted; train anew"
  loaded = read_json(path, remedy)
  if set(loaded) - {"clip"} != {"mode", "mean", "std"}:
    raise UserError(f"{path} is not what was written; {remedy}")
  return loaded


def fit_class_weights(
  cfg: Config, workdir: pathlib.Path, source: pipeline.Source
) -> list[float] | None:
  """The weights that `loss.balanced` asks for: counted once, then kept."""
  path = workdir / "class_weights.json"
  if not cfg.loss.balanced:
    return None
  if not path.exists():
    fitted = balance.fit_class_weights(source, cfg.num_labels)
    write_json(path, {"class_weights": fitted})
  return _load_class_weights(cfg, workdir)


def load_class_weights(cfg: Config, workdir: pathlib.Path) -> Config:
  """`cfg` with the class weights that its run was trained with."""
  if not cfg.loss.balanced:
    return cfg
  return with_class_weights(cfg, _load_class_weights(cfg, workdir))


def with_class_weights(cfg: Config, weights: list[float] | None) -> Config:
  """`cfg` with these class weights; None leaves it as it is."""
  if weights is None:
    return cfg
  loss = dataclasses.replace(cfg.loss, class_weights=tuple(weights))
  return dataclasses.replace(cfg, loss=loss)


def _load_class_weights(cfg: Config, workdir: pathlib.Path) -> list[float]:
  path = workdir / "class_weights.json"
  remedy = "train anew, or do without: --config.loss.balanced=false"
  weights = read_json(path, remedy).get("class_weights")
  if not isinstance(weights, list) or len(weights) != cfg.num_labels:
    raise UserError(f"{path} is not what was written; {remedy}")
  return weights


# --- A trained network --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained:
  """A network with its weights, ready to apply."""

  model: nn.Module
  variables: dict[str, Any]
  normalization: dict[str, Any]
  step: int


def make_model(cfg: Config, **fields: Any) -> nn.Module:
  """The Module that `cfg` describes; `fields` of `UNet` that no config has."""
  rows = {
    "num_words": cfg.data.num_words,
    "num_characters": cfg.data.num_characters,
  }
  fields = {**dataclasses.asdict(cfg.model), **rows, **fields}
  return build_model(num_classes=cfg.data.num_classes, **fields)


def init_state(cfg: Config, mesh: Mesh) -> state_lib.TrainState:
  """The state of step 0, made where it will live."""
  make = jax.jit(_init(cfg), out_shardings=parallel.replicated(mesh))
  # Not the key of the steps: those fold the step number into key(seed).
  return make(jax.random.fold_in(jax.random.key(cfg.seed), 2**31 - 1))


def abstract_state(cfg: Config, mesh: Mesh) -> state_lib.TrainState:
  """Shapes, dtypes and shardings of the state; nothing is computed."""
  tree = jax.eval_shape(_init(cfg), jax.random.key(0))
  sharding = parallel.replicated(mesh)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _init(cfg: Config) -> Callable[[jax.Array], state_lib.TrainState]:
  return functools.partial(
    state_lib.init_state,
    make_model(cfg),
    optimizer.make_optimizer(cfg.optimizer),
    image_shape=(1, *cfg.input_size),
    ema=cfg.optimizer.ema_decay > 0,
  )


def open_checkpoints(
  cfg: Config, workdir: pathlib.Path, *, writable: bool
) -> checkpoint.Checkpointer:
  """The run's checkpoints, as a context."""
  return checkpoint.Checkpointer(
    workdir / "checkpoints",
    keep_latest=cfg.train.keep_checkpoints,
    writable=writable,
    is_primary=parallel.this_host().is_primary,
    strict=cfg.runtime.strict_restore,
    log=writers.log,
  )


def load_trained(
  cfg: Config, workdir: pathlib.Path, mesh: Mesh, *, step: int | None = None
) -> Trained:
  """Restores the best (or the given) checkpoint of the run in `workdir`."""
  with open_checkpoints(cfg, workdir, writable=False) as checkpointer:
    chosen = checkpointer.best_step() if step is None else step
    restored = checkpointer.restore(abstract_state(cfg, mesh), step=chosen)
  if restored is None:
    raise UserError(
      f"no checkpoint in {workdir / 'checkpoints'}; train first with --mode"
      f" train --workdir {workdir}"
    )
  state, _, found = restored
  return Trained(
    model=make_model(cfg, prune=cfg.eval.prune),
    variables=state_lib.eval_variables(state),
    normalization=load_normalization(workdir),
    step=found,
  )
