"""The command line: `python -m unet_jax.main --config configs/NAME.py ...`.

Flags live here and nowhere else. The config is checked before jax is imported,
so a mistake costs no start-up.
"""

import argparse
import pathlib
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from unet_jax import config as config_lib
from unet_jax import presets
from unet_jax.config import Config
from unet_jax.errors import UserError
from unet_jax.runtime import memory, signals, storage, writers

# Sections that a mode other than train may set; the rest belongs to the run.
_FREE_SECTIONS = ("eval", "parallel", "predict", "runtime", "study")
# Modes that the processes of a cluster work on together.
_ON_MANY_HOSTS = ("train", "evaluate")
_OVERRIDE = re.compile(r"--config\.([\w.]+)(?:=(.*))?", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a mode; 0 done, 2 the user can mend it, 130/143 stopped, 1 a bug."""
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    flags, rest = _make_parser().parse_known_args(argv)
    flags.rest = rest
    overrides = _parse_overrides(rest)
    _check_flags(flags)
    workdir = storage.to_path(flags.workdir or ".")
    cfg = _load_config(flags, workdir, overrides)
    _start(cfg, flags.mode)
    MODES[flags.mode](cfg, workdir, flags)
  except UserError as error:
    return _refuse(str(error))
  except OSError as error:  # A folder or a disk: the user's, not ours.
    return _refuse(f"{error}; check path and disk")
  except signals.Stopped as stopped:
    command = shlex.join(["python", "-m", "unet_jax.main", *argv])
    saved = (
      "the state was saved, resume with"
      if flags.mode == "train"
      else ("start again with")
    )
    writers.log(f"{stopped}; {saved}: {command}")
    return signals.exit_status(stopped.signum)
  except KeyboardInterrupt:  # Before or after the loop: nothing to save.
    writers.log("stopped by SIGINT")
    return 130
  except Exception as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      return _refuse(
        "out of device memory; lower config.train.batch_size,"
        " config.data.crop_size or config.eval.batch_pixels"
      )
    traceback.print_exc()  # A bug of ours: this helps us mend it.
    _tell_others("a bug; its traceback is in what that host printed")
    return 1
  return 0


def _refuse(problem: str) -> int:
  """Prints the one line, here and on the hosts that wait for this one."""
  problem = " ".join(problem.split())
  writers.log(f"error: {problem}")
  _tell_others(problem)
  return 2


def _tell_others(problem: str) -> None:
  if "unet_jax.runtime.parallel" in sys.modules:
    from unet_jax.runtime import parallel

    parallel.tell_others(problem)


class _Parser(argparse.ArgumentParser):
  """Wrong usage is the user's to mend: one line, status 2."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")


def _make_parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="python -m unet_jax.main",
    allow_abbrev=False,
    description="U-Net research in JAX.",
    epilog="--config.SECTION.FIELD=VALUE overrides a field of the config, for"
    " example --config.train.num_steps=1000 --config.model.widths=16,32,64.",
  )
  parser.add_argument(
    "--config",
    metavar="FILE.py[:ARGUMENT]",
    help="the config, a .py or a run's config.json; optional once --workdir"
    " holds a run",
  )
  parser.add_argument(
    "--workdir",
    metavar="DIR",
    help="the folder of the run; to predict with --weights, no more than where"
    " predictions/ is made, and optional",
  )
  parser.add_argument(
    "--mode", choices=list(MODES), default="train", help="what to do"
  )
  parser.add_argument(
    "--step", type=int, help="checkpoint to evaluate or predict with; best"
  )
  parser.add_argument(
    "--input",
    metavar="FILE_OR_DIR",
    help="what to predict or explain, or a quoted pattern such as 'DIR/*.png';"
    " the examples of eval.split without it",
  )
  parser.add_argument(
    "--output",
    metavar="DIR",
    help="where predictions go; WORKDIR/predictions without it",
  )
  parser.add_argument(
    "--ensemble",
    metavar="DIR",
    action="append",
    help="to predict with, or to score: another run, averaged with that of"
    " --workdir; repeatable",
  )
  _add_flags_of_one_mode(parser)
  return parser


def _add_flags_of_one_mode(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--merge",
    metavar="DIR",
    action="append",
    help="of report: another study, shown as one with this; repeatable",
  )
  parser.add_argument(
    "--topology",
    metavar="KIND:SHAPE",
    help="of compile: cpu:8, or a TPU slice such as v5e:16x16",
  )
  parser.add_argument(
    "--shard",
    metavar="I/N",
    help="of ablate: do every N-th run from the I-th on, I from 0",
  )
  parser.add_argument(
    "--dry-run",
    action="store_true",
    default=None,
    help="of ablate: only say what would be done, and how long it may take",
  )
  parser.add_argument(
    "--weights",
    metavar="FILE",
    help="a PyTorch state dict, .pth or .safetensors: what to import, or to"
    " predict with in the place of a run",
  )
  parser.add_argument(
    "--compare",
    metavar="DIR",
    help="of demo: the folder of another run, to see beside this one",
  )
  parser.add_argument(
    "--port", type=int, help="of demo: the page's port; 8000, 0 = any free one"
  )
  parser.add_argument(
    "--onnx",
    metavar="SIZE",
    help="of export: also model.onnx, for images of this size, as 512,512",
  )


def _check_flags(flags: argparse.Namespace) -> None:
  """Raises a UserError for a flag that the mode would ignore."""
  meant_for = {
    "step": ("evaluate", "predict", "explain", "export", "demo"),
    "input": ("predict", "explain"),
    "output": ("predict",),
    "ensemble": ("evaluate", "predict"),
    "weights": ("predict", "import_weights"),
    "merge": ("report",),
    "shard": ("ablate",),
    "topology": ("compile",),
    "dry_run": ("ablate",),
    "compare": ("demo",),
    "port": ("demo",),
    "onnx": ("export",),
  }
  for name, modes in meant_for.items():
    if getattr(flags, name) is not None and flags.mode not in modes:
      flag = name.replace("_", "-")
      raise UserError(
        f"--{flag} has no meaning for --mode {flags.mode}; it is for"
        f" {' and '.join(modes)}"
      )
  without_run = flags.mode == "predict" and flags.weights
  if without_run and (flags.step is not None or not flags.input):
    raise UserError(
      "--weights has no steps and no examples; give --input alone"
    )
  if not flags.workdir and not without_run:
    raise UserError("--workdir is missing; give --workdir DIR")
  if flags.mode == "compile" and not flags.topology:
    raise UserError("--topology is missing; give cpu:8 or a TPU slice")
  if flags.mode == "import_weights" and not flags.weights:
    raise UserError("--weights is missing; give --weights FILE")


def _parse_overrides(rest: list[str]) -> dict[str, str]:
  """`--config.a.b=v` and `--config.a.b v` -> {"a.b": "v"}, in order."""
  overrides = {}
  rest = list(rest)
  while rest:
    word = rest.pop(0)
    match = _OVERRIDE.fullmatch(word)
    if not match:
      raise UserError(f"unknown argument {word!r}; see --help")
    key, value = match.groups()
    if value is None:
      if not rest or rest[0].startswith("--"):
        raise UserError(f"{word} has no value; write {word}=VALUE")
      value = rest.pop(0)
    overrides[key] = value
  return overrides


def _load_config(
  flags: argparse.Namespace, workdir: pathlib.Path, overrides: dict[str, str]
) -> Config:
  """File < command line; but a trained run keeps what it was trained with."""
  stored = workdir / "config.json"
  fresh = flags.mode in ("train", "ablate") or (
    flags.mode in ("describe", "compile", "check_data") and not stored.exists()
  )
  if flags.weights and flags.config is None:
    from unet_jax.exchange import import_torch

    config = import_torch.infer_config(pathlib.Path(flags.weights))
  elif flags.weights:
    config = config_lib.load_config(flags.config)
  elif fresh:
    if flags.config is None and not stored.exists():
      raise UserError("--config is missing; give --config configs/NAME.py")
    config = config_lib.load_config(flags.config or stored)
  else:
    if not stored.exists():
      raise UserError(
        f"no run in {workdir}: config.json is missing; train first with --mode"
        f" train --workdir {workdir}"
      )
    config = config_lib.load_config(stored)
    if flags.config is not None:
      trained = config_lib.parse(config)
      given = config_lib.load_config(flags.config)
      for section in _FREE_SECTIONS:
        config[section] = given[section]
      for line in config_lib.differing_keys(trained, config_lib.parse(config)):
        writers.log(f"from {flags.config}: {line}")
  before = config.copy_and_resolve_references()
  for key, text in overrides.items():
    config_lib.override(config, key, text)
  if flags.mode == "describe" and config.model.preset:
    size = presets.reference_size(config.model.preset)
    before.data.crop_size = config.data.crop_size = (size,)
  cfg = config_lib.parse(config, overridden=tuple(overrides))
  if not fresh and not flags.weights:
    for line in config_lib.differing_keys(config_lib.parse(before), cfg):
      if line.split(".")[0] not in _FREE_SECTIONS:
        raise UserError(
          f"config.{line} contradicts the run in {workdir}; leave it out"
        )
  return cfg


# --- Modes: jax is imported here ----------------------------------------------


def _start(cfg: Config, mode: str) -> None:
  from unet_jax.runtime import compilation, parallel

  compilation.keep_compiled(cfg.runtime.compilation_cache)
  if mode in _ON_MANY_HOSTS:
    parallel.start_cluster(cfg.runtime.heartbeat_seconds)


def _train(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax import train

  train.train_and_evaluate(cfg, workdir)


def _ablate(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax.studies import run, sweep

  if flags.config is None or flags.config.endswith(".json"):
    raise UserError("--config is missing; give the .py that has the sweep()")
  arms = sweep.check(config_lib.load_sweep(flags.config))
  arms = sweep.choose(arms, cfg.study.arms)
  shard = re.fullmatch(r"(\d+)/(\d+)", flags.shard or "0/1")
  if not shard or int(shard[1]) >= int(shard[2]):
    raise UserError(
      f"--shard {flags.shard}: give I/N with I from 0 to N - 1, as 0/2 and 1/2"
    )
  # As given, not as parsed: an arm may choose another preset or size.
  config = config_lib.load_config(flags.config)
  for key, text in _parse_overrides(flags.rest).items():
    config_lib.override(config, key, text)
  run.run(
    config,
    arms,
    workdir,
    shard=(int(shard[1]), int(shard[2])),
    dry_run=bool(flags.dry_run),
  )


def _report(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax.studies import report

  folders = [workdir, *map(storage.to_path, flags.merge or ())]
  report.run(
    folders,
    workdir,
    cfg.study.margin,
    cfg.study.bootstrap,
    cfg.study.num_pictures,
  )


def _compile(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax import compile_plan

  compile_plan.run(cfg, workdir, flags.topology)


def _evaluate(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax import evaluate

  ensemble = flags.ensemble or ()
  evaluate.run(cfg, workdir, step=flags.step, ensemble=ensemble)


def _predict(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax import predict

  output = storage.to_path(flags.output or workdir / "predictions")
  source = storage.to_path(flags.input) if flags.input else None
  weights = pathlib.Path(flags.weights) if flags.weights else None
  predict.run(
    cfg,
    workdir,
    source,
    output,
    step=flags.step,
    weights=weights,
    ensemble=flags.ensemble or (),
  )


def _check_data(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax import check_data

  check_data.run(cfg, workdir)


def _describe(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax.inspect import describe

  describe.run(cfg, workdir)


def _import_weights(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax import import_weights

  import_weights.run(cfg, workdir, pathlib.Path(flags.weights))


def _explain(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax.inspect import explain

  source = storage.to_path(flags.input) if flags.input else None
  explain.run(cfg, workdir, source, step=flags.step)


def _export(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax.exchange import export

  sizes = flags.onnx.split(",") if flags.onnx is not None else []
  if not all(n.isdecimal() for n in sizes):
    raise UserError(f"--onnx {flags.onnx}: give a size, as 512,512")
  export.run(cfg, workdir, step=flags.step, onnx=[int(n) for n in sizes])


def _demo(
  cfg: Config, workdir: pathlib.Path, flags: argparse.Namespace
) -> None:
  from unet_jax import demo

  other = storage.to_path(flags.compare) if flags.compare else None
  port = 8000 if flags.port is None else flags.port
  demo.run(cfg, workdir, other, port=port, step=flags.step)


MODES = {
  "train": _train,
  "evaluate": _evaluate,
  "predict": _predict,
  "ablate": _ablate,
  "report": _report,
  "compile": _compile,
  "check_data": _check_data,
  "describe": _describe,
  "import_weights": _import_weights,
  "explain": _explain,
  "export": _export,
  "demo": _demo,
}


def run() -> None:
  """The console script."""
  memory.use_huge_pages()
  status = main()
  if status in (1, 2) and "unet_jax.runtime.parallel" in sys.modules:
    from unet_jax.runtime import parallel

    parallel.leave_cluster(status)
  sys.exit(status)


if __name__ == "__main__":
  run()
