"""A run that starts from the weights of another run."""

import fnmatch
import pathlib
from collections.abc import Collection

from jax.sharding import Mesh

from unet_jax import config as config_lib
from unet_jax import state as state_lib
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import vocabulary
from unet_jax.errors import UserError
from unet_jax.runtime import storage, writers


def load(
  cfg: Config, workdir: pathlib.Path, state: state_lib.TrainState, mesh: Mesh
) -> state_lib.TrainState:
  """A state of step 0, with the weights that `cfg.train` names.

  They are what the other run's best checkpoint is evaluated with: its averages
  where it keeps any. This run's own averages start there too. What the other
  network lacks, and what the patterns leave out, keeps its initial value; each
  array is listed in init_report.txt.

  Raises:
    UserError: there is no such run, a pattern matches nothing, or an array has
      another shape there.
  """
  folder = storage.to_path(cfg.train.init_from)
  key = f"config.train.init_from={folder}"
  remedy = (
    f"{key} must name the folder of a run, seen from {pathlib.Path.cwd()}"
  )
  config = workdir_lib.read_json(folder / "config.json", remedy)
  other = workdir_lib.load_trained(config_lib.parse(config), folder, mesh)
  have = state_lib.flatten(other.variables)
  want = state_lib.flatten(state_lib.eval_variables(state))
  chosen = _choose(cfg, want)
  loaded = {path: have[path] for path in chosen if path in have}
  _check_vocabulary(cfg, workdir, folder, loaded)
  wrong = [
    f"{path} is {x.shape} there and {want[path].shape} here"
    for path, x in loaded.items()
    if x.shape != want[path].shape
  ]
  if wrong or not loaded:
    what = "; ".join(wrong) or "it has nothing of what is included"
    raise UserError(f"{key}: {what}; mend config.train.init_exclude")

  lines = [f"{folder}, step {other.step}"]
  for path, x in sorted({**have, **want}.items()):
    if path in loaded:
      what = "loaded"
    else:
      what = "initial value" if path in want else "left out"
    lines.append(f"{what:13} {path} {list(x.shape)}")
  report = workdir / "init_report.txt"
  writers.write_atomically(report, "\n".join([*lines, ""]).encode())
  writers.log(
    f"{len(loaded)} of {len(want)} arrays from step {other.step} of {folder};"
    f" see {report}"
  )
  return state_lib.with_variables(state, loaded)


def _choose(cfg: Config, paths: Collection[str]) -> list[str]:
  """The paths that are included and not excluded."""
  include, exclude = cfg.train.init_include, cfg.train.init_exclude
  for name, patterns in (("include", include), ("exclude", exclude)):
    for pattern in patterns:
      if not fnmatch.filter(paths, pattern):
        raise UserError(
          f"config.train.init_{name}: {pattern!r} matches no array; they are"
          f" named as {max(paths)}"
        )

  def matches(path: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

  return [
    path
    for path in paths
    if matches(path, include or ("*",)) and not matches(path, exclude)
  ]


def _check_vocabulary(
  cfg: Config,
  workdir: pathlib.Path,
  folder: pathlib.Path,
  loaded: Collection[str],
) -> None:
  """Rows of an embedding, and logits, mean nothing beside other words.

  Raises:
    UserError: they are loaded, and the other run's vocabulary is another.
  """
  if cfg.data.source != "tokens":
    return
  mine, theirs = (
    vocabulary.load(workdir_lib.split_dir(x)) for x in (workdir, folder)
  )
  readers = {
    "words": "params/embed/words/embedding",
    "characters": "params/embed/characters/embedding",
    "tags": "params/head/kernel",
  }
  for name, path in readers.items():
    if path in loaded and getattr(mine, name) != getattr(theirs, name):
      pattern = "*/" + path.split("/", 1)[1].rsplit("/", 1)[0] + "/*"
      raise UserError(
        f"config.train.init_from={folder}: has other {name}, so {path} means"
        f" others; add {pattern} to config.train.init_exclude"
      )
