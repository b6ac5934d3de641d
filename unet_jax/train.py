"""Training: a short loop around one pure step, with exact resume.

Everything random is a function of (seed, step, example id), so the train state
and the sums since the last log line are all that a checkpoint needs to continue
to the bit.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

import clu.parameter_overview
import jax
import numpy as np
from jax.sharding import Mesh

import unet_jax
from unet_jax import config as config_lib
from unet_jax import evaluate as evaluate_lib
from unet_jax import init_from, optimizer, program, run_log
from unet_jax import state as state_lib
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import folder, pipeline, weight_map
from unet_jax.errors import UserError
from unet_jax.runtime import (
  checkpoint,
  parallel,
  signals,
  storage,
  watchdog,
  writers,
)
from unet_jax.state import TrainState
from unet_jax.train_step import StepSums, TrainStep, make_train_step

__all__ = ["make_train_step", "train_and_evaluate"]

# First step of the optional profiler trace: compilation is over by then.
_PROFILE_FROM = 5


@dataclasses.dataclass(frozen=True)
class _Run:
  """What a run is made of; nothing in it is replaced."""

  cfg: Config
  workdir: pathlib.Path
  mesh: Mesh
  host: parallel.Host
  sources: dict[str, pipeline.Source]
  normalization: dict[str, Any]
  schedule: optimizer.Schedule
  put: program.Put
  train_step: TrainStep
  eval_step: evaluate_lib.EvalStep
  checkpointer: checkpoint.Checkpointer
  log: run_log.RunLog
  stop: signals.GracefulStop
  dog: watchdog.Watchdog

  def asked_to_stop(self, agreed: int) -> int:
    """The signal that ends the run now, or 0; `agreed` came with the sums."""
    alone = self.host.count == 1
    return (self.stop.requested or 0) if alone else agreed


def train_and_evaluate(cfg: Config, workdir: pathlib.Path) -> None:
  """Trains to `cfg.train.num_steps`, evaluating and saving on the way.

  Continues where the last complete checkpoint in `workdir` ends. The data is
  read and checked before a device is touched.

  Raises:
    UserError: data, config or folder are wrong, or too many steps in a row
      were not finite.
    signals.Stopped: a signal asked to stop; the state was saved.
  """
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.GracefulStop())
    host = parallel.this_host()
    parallel.check_same(_facts(cfg))
    with parallel.same_fate():
      stack.enter_context(workdir_lib.claim(cfg, workdir))
    with parallel.same_fate():
      sources, fitted = _check_data(cfg, workdir), None
      if host.is_primary:
        train = sources["train"]
        fitted = (
          workdir_lib.fit_normalization(cfg, workdir, train),
          workdir_lib.fit_class_weights(cfg, workdir, train),
        )
      mesh = parallel.make_mesh(cfg.parallel.space)
      parallel.check_batch_size(
        cfg.train.batch_size, mesh, "train.batch_size", cfg.train.accumulate
      )
    normalization, class_weights = parallel.from_primary(fitted)
    cfg = workdir_lib.with_class_weights(cfg, class_weights)
    if host.is_primary:
      workdir_lib.write_environment(workdir)
    checkpointer = stack.enter_context(
      workdir_lib.open_checkpoints(cfg, workdir, writable=True)
    )
    with parallel.same_fate():
      restored = checkpointer.restore(workdir_lib.abstract_state(cfg, mesh))
    if restored is None:
      state, meta, first_step = workdir_lib.init_state(cfg, mesh), {}, 0
      if cfg.train.init_from:
        state = init_from.load(cfg, workdir, state, mesh)
    else:
      state, meta, first_step = restored
      writers.log(f"resumed from step {first_step}")
    names = {split: source.names for split, source in sources.items()}
    parallel.check_same({"examples": str(names), "step": str(first_step)})
    eval_source = sources[cfg.eval.split]
    log = run_log.open_log(cfg, workdir, eval_source, first_step, host)
    stack.enter_context(contextlib.closing(log))
    schedule = optimizer.make_schedule(cfg.optimizer, cfg.train.num_steps)
    _introduce(cfg, workdir, mesh, sources, log, state, first_step)
    train_step = _compile(cfg, mesh, first_step)
    run = _Run(
      cfg=cfg,
      workdir=workdir,
      mesh=mesh,
      host=host,
      sources=sources,
      normalization=normalization,
      schedule=jax.jit(schedule),
      put=program.make_put(cfg, mesh, lambda: stop.requested or 0),
      train_step=train_step,
      eval_step=evaluate_lib.make_eval_step(cfg, mesh),
      checkpointer=checkpointer,
      log=log,
      stop=stop,
      dog=stack.enter_context(watchdog.Watchdog(cfg.runtime.hang_seconds)),
    )
    _loop(run, state, meta, first_step)
    checkpointer.wait()
    best = checkpointer.best_step()
  writers.log(
    f"done: {cfg.train.num_steps} steps; best {cfg.eval.best_metric} on"
    f" {cfg.eval.split} at step {best or '-'}; pictures in"
    f" {workdir / 'pictures'}"
  )


def _check_data(
  cfg: Config, workdir: pathlib.Path
) -> dict[str, pipeline.Source]:
  """The sources of all splits, their files checked."""
  splits = workdir_lib.split_dir(workdir)
  wanted = {"train", cfg.eval.split, *pipeline.list_splits(cfg, splits)}
  sources = {s: pipeline.make_source(cfg, s, splits) for s in sorted(wanted)}
  for source in sources.values():
    folder.check_source(source, cfg.data.check_masks)
  weight_map.check(sources["train"], cfg)
  return sources


def _facts(cfg: Config) -> dict[str, str]:
  """What all hosts of a run must have in common from the start."""
  same = dataclasses.replace(cfg, runtime=type(cfg.runtime)())
  return {
    "version": unet_jax.__version__,
    "config": config_lib.to_text(same),
    "seed": str(cfg.seed),
  }


def _introduce(
  cfg: Config,
  workdir: pathlib.Path,
  mesh: Mesh,
  sources: dict[str, pipeline.Source],
  log: run_log.Log,
  state: TrainState,
  first_step: int,
) -> None:
  """Says what will run, and on what."""
  table = clu.parameter_overview.get_parameter_overview(
    state.params, include_stats=False
  )
  count = int(clu.parameter_overview.count_parameters(state.params))
  # clu counts a parameter without axes as 1.0.
  table = table.replace(f"Total: {count:,}.0 ", f"Total: {count:,} ")
  if parallel.this_host().is_primary:
    writers.write_atomically(workdir / "parameters.txt", table.encode())
  log.text(first_step, "parameters", table)
  log.text(first_step, "config", config_lib.to_text(cfg))
  sizes = ", ".join(f"{len(s)} {name}" for name, s in sources.items())
  device = mesh.devices.flat[0].platform
  writers.log(
    f"examples: {sizes}; {count:,} parameters; {mesh.devices.size} {device}"
    f" device(s); batch {cfg.train.batch_size} of"
    f" {' x '.join(map(str, cfg.data.crop_size))}"
  )


def _compile(cfg: Config, mesh: Mesh, first_step: int) -> TrainStep | None:
  """The compiled step, if any is left and its memory is there.

  With buckets it is one program for each length of a batch.

  Raises:
    UserError: a device has less memory than the step needs.
  """
  if first_step >= cfg.train.num_steps:
    return None
  lengths = sorted(cfg.data.buckets, reverse=True)
  steps = {}
  for size in (cfg.data.crop_size, *((n,) for n in lengths)):
    own = dataclasses.replace(cfg.data, crop_size=size, buckets=())
    own = dataclasses.replace(cfg, data=own)
    writers.log(
      "compiling the train step" + (f", {size[0]} long" if lengths else "")
    )
    compiled = program.compile_train_step(own, mesh)
    with parallel.same_fate():
      writers.log(program.check_memory(own, mesh, compiled))
    steps[size] = program.make_executor(own, mesh, compiled)
  if len(steps) == 1:
    return steps[cfg.data.crop_size]
  return lambda state, batch, rng: steps[batch["label"].shape[-1:]](
    state, batch, rng
  )


# --- The loop -----------------------------------------------------------------


def due(step: int, every: int, last: int) -> bool:
  """Whether something that happens every so often (0 = never) happens now."""
  return step == last or (every > 0 and step % every == 0)


def _loop(
  run: _Run, state: TrainState, meta: dict[str, Any], first_step: int
) -> None:
  """Step n runs while the sums of step n - 1 and the batch of n + 1 are read.

  Order at a step: train line, evaluation and its line, both on disk, then the
  checkpoint. So the lines up to a checkpoint exist when it counts.
  """
  cfg, last = run.cfg.train, run.cfg.train.num_steps
  rng = program.make_rng(run.cfg, run.mesh)
  window, pending, asked = meta.get("window"), None, 0
  if meta.get("evaluation_due") and not run.log.has(first_step):
    _evaluate_and_save(run, state, window, first_step, again=True)
  batches = pipeline.train_batches(
    run.sources["train"],
    run.normalization,
    cfg=run.cfg,
    first_step=first_step,
    end_step=last,
    host=run.host.index,
    num_hosts=run.host.count,
  )
  ahead = contextlib.closing(parallel.prefetch(batches, run.put))
  with contextlib.ExitStack() as trace, ahead as ready:
    for step, (batch, arrays) in enumerate(ready, first_step + 1):
      _profile(run, trace, step - first_step, state)
      state, sums = run.train_step(state, arrays, rng)
      if pending is not None:
        window, asked = _read(run, window, *pending)
      pending = (step, batch["id"], sums)
      run.dog.alive()
      run.log.progress.tick(step)
      run.checkpointer.poll()

      log_now = due(step, cfg.log_every, last)
      eval_now = due(step, cfg.eval_every, last)
      save_now = due(step, cfg.checkpoint_every, last)
      if not (log_now or eval_now or save_now or run.asked_to_stop(asked)):
        continue
      (window, asked), pending = _read(run, window, *pending), None
      if log_now:
        rate = float(run.schedule(np.int32(step - 1)))
        run.log.train(step, window, skipped=int(state.skipped), rate=rate)
        window = None
      # Read once: what is seen here is saved below.
      stopped_by = run.asked_to_stop(asked)
      with run.log.progress.paused():
        if eval_now:
          _evaluate_and_save(run, state, window, step)
        elif save_now or stopped_by:
          _save(run, state, window, step)
      if stopped_by and step < last:
        raise signals.Stopped(stopped_by)


def _read(
  run: _Run,
  window: run_log.Window,
  step: int,
  ids: np.ndarray,
  sums: StepSums,
) -> tuple[StepSums, int]:
  """Adds a step's sums to the window; ends a run that no longer learns.

  Also gives the signal by which a host asked to stop before the step, or 0.
  """
  if not sums.finite:
    names = [run.sources["train"].names[i] for i in ids]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    writers.log(f"step {step}: not finite, nothing changed; examples: {shown}")
    in_row = int(sums.skipped_in_row)
    if in_row >= run.cfg.train.max_skipped:
      raise UserError(
        f"{in_row} steps in a row, up to step {step}, had a loss or gradient"
        f" that is not finite (last examples: {shown}); look at these, or lower"
        " config.optimizer.learning_rate"
      )
  asked, sums = int(sums.stop), sums.replace(stop=None)
  return run_log.add_sums(window, sums), asked


def _evaluate_and_save(
  run: _Run,
  state: TrainState,
  window: run_log.Window,
  step: int,
  *,
  again: bool = False,
) -> None:
  """Scores the state and saves it with its score.

  Stopped in the middle, it saves the state with a note that its evaluation is
  due; a run that finds the note does it `again`.
  """
  source = run.sources[run.cfg.eval.split]
  count = min(run.cfg.train.num_pictures, len(source))
  shown = {round(i) for i in np.linspace(0, len(source) - 1, count)}
  try:
    result = evaluate_lib.evaluate(
      run.eval_step,
      state_lib.eval_variables(state),
      source,
      run.normalization,
      cfg=run.cfg,
      mesh=run.mesh,
      picture_ids=shown,
      stop=run.stop,
      dog=run.dog,
    )
  except signals.Stopped:
    if not again:
      _save(run, state, window, step, evaluation_due=True)
    raise
  score = evaluate_lib.score(result.summary, run.cfg.eval.best_metric)
  if again:
    # Before the line: where the line is, nothing is due any more.
    run.checkpointer.set_score(step, score)
    run.log.evaluation(step, result)
  else:
    run.log.evaluation(step, result)
    _save(run, state, window, step, score=score)


def _save(
  run: _Run,
  state: TrainState,
  window: run_log.Window,
  step: int,
  *,
  score: float | None = None,
  evaluation_due: bool = False,
) -> None:
  run.log.flush()
  meta = {
    "window": run_log.window_to_json(window),
    "evaluation_due": evaluation_due,
  }
  run.checkpointer.save(step, state, score=score, meta=meta)


def _profile(
  run: _Run, trace: contextlib.ExitStack, steps_here: int, state: TrainState
) -> None:
  """Opens and closes the optional profiler trace, around whole steps."""
  length = run.cfg.train.profile_steps
  folder = storage.on_disk(run.workdir / "profile")
  if length and steps_here == _PROFILE_FROM:
    trace.enter_context(jax.profiler.trace(str(folder)))
    trace.callback(writers.log, f"profiler trace in {folder}")
  if length and steps_here == _PROFILE_FROM + length:
    jax.block_until_ready(state)
    trace.close()
