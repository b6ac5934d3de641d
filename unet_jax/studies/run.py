"""The runs of a study: arms x seeds, each an ordinary training run.

All arms come first with the first seed, so that there is a table early. What
results.jsonl holds is done; what was killed resumes in its folder.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from unet_jax import config as config_lib
from unet_jax import evaluate as evaluate_lib
from unet_jax import program, run_log, train
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import pipeline
from unet_jax.errors import DiskError, UserError
from unet_jax.runtime import parallel, signals, storage, writers
from unet_jax.studies import budget, sweep, tpe

# Steps that the time of a plan is measured on, after one that compiles; and
# that of a budget of seconds.
_MEASURED_STEPS, _BUDGET_STEPS = 2, 10
# Sections of the config that no number of a run depends on.
_NO_NUMBERS = ("study", "runtime")


@dataclasses.dataclass(frozen=True)
class _Planned:
  """One run of the study."""

  id: str
  arm: sweep.Arm
  seed: int
  cfg: Config
  params: int
  macs: int


def run(
  config: ml_collections.ConfigDict,
  arms: Sequence[sweep.Arm] | sweep.Search,
  workdir: pathlib.Path,
  *,
  shard: tuple[int, int] = (0, 1),
  dry_run: bool = False,
) -> None:
  """`--mode ablate`: trains what is missing and scores it once.

  A run that fails is recorded with its reason, and the rest goes on.

  Args:
    config: of the file, with the overrides of the command line.
    arms: checked; their overrides come last. Or a search, whose trials are run
      one after another.
    workdir: gets runs/ID, results.jsonl (with several shards
      results-I-of-N.jsonl), and config.json, that of the baseline.
    shard: (i, n), this process does every n-th run, from the i-th.
    dry_run: only says what would be done, and how long it may take.

  Raises:
    UserError: an arm is no config, the folder holds another study, or a run
      failed (after all others were done).
    signals.Stopped: a signal asked to stop; the run in progress was saved.
  """
  if storage.is_remote(workdir):
    raise UserError(f"--workdir {workdir}: a study needs a folder on a disk")
  if isinstance(arms, sweep.Search):
    if shard != (0, 1):
      raise UserError("--shard: the trials of a search need one another")
    _search(config, arms, workdir, dry_run)
    return
  planned = _plan(config, arms, workdir)
  done = _known(planned, workdir)
  finished = {k for k, record in done.items() if record["status"] == "done"}
  index, count = shard
  # Of all runs, not of the missing: a shard that starts again keeps its own.
  mine = [x for x in planned[index::count] if x.id not in finished]
  num_done = sum(x.id in finished for x in planned)
  writers.log(
    f"{len(arms)} arms x {len(planned) // len(arms)} seeds: {len(planned)}"
    f" runs, {num_done} done, {len(mine)} to do here"
  )
  if dry_run:
    _describe_plan(planned, mine)
    return
  name = "results.jsonl" if count == 1 else f"results-{index}-of-{count}.jsonl"
  with _opened(workdir, name, planned[0].cfg):
    failed = _run_all(mine, workdir, workdir / name)
  if failed:
    raise UserError(
      f"{len(failed)} of {len(mine)} runs failed ({', '.join(failed[:3])}); see"
      f" 'reason' in {workdir / name}, and start again to repeat them"
    )
  writers.log(f"done: results in {workdir / name}; --mode report draws them")


@contextlib.contextmanager
def _opened(workdir: pathlib.Path, name: str, cfg: Config) -> Iterator[None]:
  """The folder of a study, locked, with what says what it is."""
  with workdir_lib.locked(workdir, f".{name}.lock"):
    workdir_lib.write_json(workdir / "config.json", config_lib.to_dict(cfg))
    workdir_lib.write_environment(workdir)
    yield


def _known(
  planned: Sequence[_Planned], workdir: pathlib.Path
) -> dict[str, dict[str, Any]]:
  """What is recorded of these runs, by id; with these configs, or refused."""
  found = {record["id"]: record for record in read_results(workdir)}
  for item in planned:
    old = found.get(item.id)
    if old and old["config_hash"] != _hash(item.cfg):
      raise UserError(
        f"{workdir} holds {item.id} with another config; take another --workdir"
      )
  return {x.id: found[x.id] for x in planned if x.id in found}


def _search(
  config: ml_collections.ConfigDict,
  search: sweep.Search,
  workdir: pathlib.Path,
  dry_run: bool,
) -> None:
  """Trial by trial; each is chosen by the scores on val of those before.

  What is recorded, failed or not, is taken as it is: another outcome would
  choose other trials. The baseline, which no choice depends on, is repeated.
  """
  first, path = sweep.baseline({}), workdir / "results.jsonl"
  planned = _plan(config, first, workdir)
  number = len(planned) * (search.trials + 1)
  writers.log(f"a search of {search.trials} trials: {number} runs")
  if dry_run:
    _describe_plan(planned, planned)
    writers.log("the trials are chosen as it goes; a baseline's time each")
    return
  tpe.suggest(search, [])  # Is it installed?
  with _opened(workdir, path.name, planned[0].cfg):
    known = _known(planned, workdir)
    is_done = lambda x: x.id in known and known[x.id]["status"] == "done"
    _run_all([x for x in planned if not is_done(x)], workdir, path)
    scores: list[float | None] = []
    while len(scores) < search.trials:
      arm = sweep.trial(len(scores), tpe.suggest(search, scores))
      planned = _plan(config, [*first, arm], workdir)
      planned = [x for x in planned if x.arm is arm]
      known = _known(planned, workdir)
      _run_all([x for x in planned if x.id not in known], workdir, path)
      found = [r.get("best_score") for r in _known(planned, workdir).values()]
      scores.append(None if None in found else float(np.mean(found)))
  ranked = [k for k, score in enumerate(scores) if score is not None]
  if not ranked:
    raise UserError(f"no trial has a score; see 'reason' in {path}")
  best = max(ranked, key=lambda k: scores[k])
  writers.log(
    f"done: best is trial {best}, {scores[best]:.4f} on"
    f" {planned[0].cfg.eval.split}; results in {path}; --mode report draws them"
  )


def _run_all(
  mine: Sequence[_Planned], workdir: pathlib.Path, path: pathlib.Path
) -> list[str]:
  """Does the runs, a line of `path` for each; the ids of those that failed."""
  failed = []
  with contextlib.closing(writers.JsonlWriter(path)) as writer:
    for number, item in enumerate(mine, 1):
      writers.log(f"run {number} of {len(mine)}: {item.id}")
      record = _run_one(item, workdir)
      writer.write(record)
      writer.flush()
      if record["status"] != "done":
        failed.append(item.id)
        writers.log(f"{item.id} failed: {record['reason']}")
  return failed


def read_results(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """All records of a study, its shards' too; of equal ids the last counts."""
  records = {}
  for path in sorted(workdir.glob("results*.jsonl")):
    records.update({r["id"]: r for r in writers.read_jsonl(path)})
  return list(records.values())


def _plan(
  config: ml_collections.ConfigDict,
  arms: Sequence[sweep.Arm],
  workdir: pathlib.Path,
) -> list[_Planned]:
  """Every run, in order; every config is checked before the first starts."""
  arms = sorted(arms, key=lambda arm: not arm.baseline)
  seeds, whole = config_lib.parse(config).study.seeds, []
  if len(set(seeds)) != len(seeds) or not seeds:
    raise UserError(f"config.study.seeds={seeds}: give different ones")
  costs: dict[str, tuple[int, int]] = {}
  for seed in seeds:
    for arm in arms:
      own = config.copy_and_resolve_references()
      try:
        for key, value in arm.overrides.items():
          config_lib.assign(own, key, value)
        config_lib.assign(own, "seed", seed)
        cfg = config_lib.parse(own)
      except UserError as error:
        raise UserError(f"arm {arm.name!r}: {error}") from error
      if arm.name not in costs:
        costs[arm.name] = budget.count(cfg)
      run_id = sweep.run_id(arm.name, seed)
      whole.append(_Planned(run_id, arm, seed, cfg, *costs[arm.name]))
  return _fit_budget(whole, workdir)


def _fit_budget(
  planned: list[_Planned], workdir: pathlib.Path
) -> list[_Planned]:
  """Steps that cost each arm as much as its group's baseline."""
  kind = planned[0].cfg.study.budget
  first = {x.arm.name: x for x in reversed(planned)}
  if kind == "steps":
    return planned
  if kind == "macs":
    spent = {name: x.macs for name, x in first.items()}
  else:
    configs = {x.arm.name: x.cfg for x in planned}
    spent = budget.measure(configs, workdir, _BUDGET_STEPS)
  basic = {
    x.arm.group: spent[name] for name, x in first.items() if x.arm.baseline
  }

  def fit(x: _Planned) -> _Planned:
    share = basic[x.arm.group] / spent[x.arm.name]
    return dataclasses.replace(x, cfg=budget.fit(x.cfg, share))

  return [fit(x) for x in planned]


def _hash(cfg: Config) -> str:
  """Of all that is in a run's numbers: not of the study, nor of the machine.

  So a version that adds fields to those goes on with the studies of another.
  """
  fields = config_lib.to_dict(cfg)
  text = json.dumps({k: fields[k] for k in fields if k not in _NO_NUMBERS})
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run_one(item: _Planned, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains and scores; the record of results.jsonl."""
  environment = workdir_lib.environment()
  record = {
    "id": item.id,
    "arm": item.arm.name,
    "seed": item.seed,
    "baseline": item.arm.baseline,
    "group": item.arm.group,
    "budget": item.cfg.study.budget,
    "overrides": dict(item.arm.overrides),
    "config_hash": _hash(item.cfg),
    "params": item.params,
    "macs": item.macs,
    "git": environment["git"],
    "device": f"{environment['device_count']} x"
    f" {', '.join(environment['devices'])}",
  }
  folder = workdir / "runs" / item.id
  try:
    train.train_and_evaluate(item.cfg, folder)
    return {**record, "status": "done", "reason": None, **_score(item, folder)}
  except (signals.Stopped, DiskError):  # The run goes on another time.
    raise
  except (UserError, jax.errors.JaxRuntimeError) as error:
    reason = " ".join(str(error).split())
    empty = {"metrics": {}, "per_image": [], "curve": [], "seconds": None}
    empty |= dict.fromkeys(run_log.SPENT)
    return {**record, "status": "failed", "reason": reason, **empty}


def _score(item: _Planned, folder: pathlib.Path) -> dict[str, Any]:
  """The test split, once, with the checkpoint that val chose.

  Without a test split the last checkpoint on `eval.split`: the best one was
  chosen there, and would flatter.
  """
  cfg = workdir_lib.load_class_weights(item.cfg, folder)
  splits = workdir_lib.split_dir(folder)
  there = pipeline.list_splits(cfg, splits)
  tested = "test" in there
  split = "test" if tested else cfg.eval.split
  step = None if tested else cfg.train.num_steps
  source = pipeline.make_source(cfg, split, splits)
  mesh = parallel.make_mesh(cfg.parallel.space)
  trained = workdir_lib.load_trained(cfg, folder, mesh, step=step)
  eval_step = evaluate_lib.make_eval_step(cfg, mesh)

  def evaluate(
    source: pipeline.Source = source, **fields: Any
  ) -> evaluate_lib.Evaluation:
    with signals.GracefulStop() as stop:
      return evaluate_lib.evaluate(
        eval_step,
        trained.variables,
        source,
        trained.normalization,
        cfg=cfg,
        mesh=mesh,
        stop=stop,
        **fields,
      )

  result = evaluate(by_object=cfg.eval.objects)
  if cfg.eval.probe_skips:
    result = evaluate_lib.probe_skips(evaluate, result, cfg)
  names = folder.parent / "difficult.json"
  if item.arm.baseline and not names.exists():
    lowest = _lowest(result.rows, cfg.study.num_pictures)
    workdir_lib.write_json(names, {"names": lowest, "seed": item.seed})
  if names.exists():
    shown = workdir_lib.read_json(names, "delete it")
    ids = [i for i, n in enumerate(source.names) if n in shown["names"]]
    drawn = cfg.data.source != "tokens"  # Ids are no picture.
    if drawn and ids and item.seed == shown["seed"]:
      predictions = evaluate(picture_ids=ids).predictions
      _keep(folder / "difficult.npz", source, predictions)
  other = {}
  if "shifted" in there:
    found = evaluate(pipeline.make_source(cfg, "shifted", splits))
    other = {"metrics": found.summary, "per_image": found.rows}
  compiled = program.compile_train_step(cfg, mesh)
  lines = writers.read_jsonl(folder / "metrics.jsonl")
  scored, metric = [x for x in lines if "num_images" in x], cfg.eval.best_metric
  best = [
    evaluate_lib.score(x, metric) for x in scored if x[metric] is not None
  ]
  return {
    "metrics": result.summary,
    "split": split,
    "step": trained.step,
    "per_image": result.rows,
    **({"shifted": other} if other else {}),
    "curve": [[line["step"], line["dice"]] for line in scored],
    "best_score": max(best, default=None),
    **({"probes": _probes(lines)} if cfg.train.probe_skips else {}),
    "seconds": _seconds(lines, cfg.train.batch_size),
    **{name: _spent(lines, name) for name in run_log.SPENT},
    "memory_bytes": program.peak_bytes(compiled),
  }


def _probes(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """What the train lines say of the skips, by step."""
  keys = ("step", *run_log.PROBES)
  return [{k: x[k] for k in keys} for x in lines if keys[1] in x]


def _lowest(rows: Sequence[Mapping[str, Any]], number: int) -> list[str]:
  """Names of the images with the lowest Dice."""
  scored = [row for row in rows if row["dice"] == row["dice"]]
  return [r["name"] for r in sorted(scored, key=lambda r: r["dice"])[:number]]


def _keep(
  path: pathlib.Path,
  source: pipeline.Source,
  predictions: Mapping[int, np.ndarray],
) -> None:
  """Image, truth and prediction of some examples, for the report.

  One file an image, in a list: sizes differ.
  """
  arrays = {}
  for k, (i, prediction) in enumerate(sorted(predictions.items())):
    example = source[i]
    arrays[f"name_{k}"] = np.array(source.names[i])
    arrays[f"image_{k}"] = example["image"].astype(np.float32)
    arrays[f"label_{k}"] = example["label"].astype(np.uint8)
    arrays[f"weight_{k}"] = example["weight"] > 0
    arrays[f"prediction_{k}"] = prediction.astype(np.uint8)
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  writers.write_atomically(path, buffer.getvalue())


def _seconds(lines: Sequence[Mapping[str, Any]], batch_size: int) -> float:
  """Of all training steps, by the speeds in the train lines; restarts count.

  Compilation, evaluation and saving are not in it.
  """
  total, last = 0.0, 0
  for line in lines:
    if line["split"] == "train" and "learning_rate" in line:
      speed = line["examples_per_second"]
      if speed:
        total += (line["step"] - last) * batch_size / speed
      last = line["step"]
  return round(total, 3)


def _spent(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
  """Seconds of the run whole, with compilation, evaluation and saving.

  None where a line does not say: an older version wrote it.
  """
  parts = [line.get(name) for line in lines]
  return None if None in parts else round(sum(parts), 3)


def _describe_plan(
  planned: Sequence[_Planned], mine: Sequence[_Planned]
) -> None:
  """Every run with its cost, and a time from two steps of the baseline."""
  first = planned[0]
  seconds = budget.step_seconds(first.cfg, _MEASURED_STEPS)
  total = 0.0
  for item in planned:
    if item not in mine:
      continue
    predicted = seconds * item.macs / first.macs * item.cfg.train.num_steps
    total += predicted
    writers.log(
      f"{item.id}: {item.params:,} parameters, {item.macs:,} MACs,"
      f" {item.cfg.train.num_steps} steps, about {predicted:.0f} s of training"
    )
  writers.log(
    f"about {total / 60:.1f} min for {len(mine)} runs, predicted from"
    f" {_MEASURED_STEPS} steps of {first.id} ({seconds:.3f} s each) and the"
    " MACs; compilation and evaluation come on top"
  )
