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

from unet_jax import config as config_lib
from unet_jax import evaluate as evaluate_lib
from unet_jax import optimizer, run_log
from unet_jax import state as state_lib
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import augment, folder, pipeline
from unet_jax.errors import UserError
from unet_jax.objectives import losses
from unet_jax.runtime import checkpoint, parallel, signals, writers
from unet_jax.state import TrainState
from unet_jax.train_step import StepSums, TrainStep, make_train_step

__all__ = ["make_train_step", "train_and_evaluate"]

# First step of the optional profiler trace: compilation is over by then.
_PROFILE_FROM = 5


def due(step: int, every: int, last: int) -> bool:
  """Whether something that happens every so often (0 = never) happens now."""
  return step == last or (every > 0 and step % every == 0)


# --- What a run is made of ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Parts:
  """What a run is made of; nothing in it changes."""

  cfg: Config
  workdir: pathlib.Path
  mesh: Mesh
  host: parallel.Host
  train_source: pipeline.Source
  eval_source: pipeline.Source
  normalization: dict[str, Any]
  schedule: optimizer.Schedule
  train_step: TrainStep
  eval_step: evaluate_lib.EvalStep
  rng: jax.Array


def _build(cfg: Config, workdir: pathlib.Path) -> _Parts:
  """Reads and checks the data, and jits the steps once."""
  mesh, host = parallel.make_mesh(), parallel.this_host()
  parallel.check_batch_size(cfg.train.batch_size, mesh, "train.batch_size")
  train_source = pipeline.make_source(cfg, "train", workdir)
  eval_source = pipeline.make_source(cfg, cfg.eval.split, workdir)
  for source in (train_source, eval_source):
    folder.check_source(source, cfg.data.check_masks)

  model = workdir_lib.make_model(cfg)
  schedule = optimizer.make_schedule(cfg.optimizer, cfg.train.num_steps)
  train_step = make_train_step(
    model=model,
    loss_fn=losses.make_loss(**dataclasses.asdict(cfg.loss)),
    tx=optimizer.make_optimizer(cfg.optimizer),
    schedule=schedule,
    augment_fn=augment.make_augment(cfg.augment),
    ema_decay=cfg.optimizer.ema_decay,
  )
  whole, split = parallel.replicated(mesh), parallel.over_data(mesh)
  return _Parts(
    cfg=cfg,
    workdir=workdir,
    mesh=mesh,
    host=host,
    train_source=train_source,
    eval_source=eval_source,
    normalization=workdir_lib.load_normalization(cfg, workdir, train_source),
    schedule=jax.jit(schedule),
    train_step=jax.jit(
      train_step,
      in_shardings=(whole, split, whole),
      out_shardings=whole,
      donate_argnums=0,
    ),
    eval_step=evaluate_lib.make_eval_step(cfg, model, mesh),
    rng=jax.random.key(cfg.seed),
  )


def init(cfg: Config, mesh: Mesh) -> TrainState:
  """The state of step 0, made where it will live."""
  shape = (1, *cfg.data.crop_size, cfg.data.channels)
  make = jax.jit(
    lambda rng: state_lib.init_state(
      workdir_lib.make_model(cfg),
      optimizer.make_optimizer(cfg.optimizer),
      rng,
      shape,
      ema=cfg.optimizer.ema_decay > 0,
    ),
    out_shardings=parallel.replicated(mesh),
  )
  # Not the key of the steps: those fold the step number into key(seed).
  return make(jax.random.fold_in(jax.random.key(cfg.seed), 2**31 - 1))


# --- The loop -----------------------------------------------------------------


def train_and_evaluate(cfg: Config, workdir: pathlib.Path) -> None:
  """Trains to `cfg.train.num_steps`, evaluating and saving on the way.

  Continues where the last complete checkpoint in `workdir` ends.

  Raises:
    UserError: data, config or folder are wrong, or too many steps in a row
      were not finite.
    signals.Stopped: a signal asked to stop; the state was saved.
  """
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.GracefulStop())
    workdir_lib.start(cfg, workdir)
    parts = _build(cfg, workdir)
    checkpointer = stack.enter_context(
      checkpoint.Checkpointer(
        workdir / "checkpoints",
        keep_latest=cfg.train.keep_checkpoints,
        writable=True,
        is_primary=parts.host.is_primary,
        log=writers.log,
      )
    )
    like = workdir_lib.abstract_state(cfg, parts.mesh)
    restored = checkpointer.restore(like)
    if restored is None:
      state, meta, first_step = init(cfg, parts.mesh), {}, 0
    else:
      state, meta, first_step = restored
      writers.log(f"resumed from step {first_step}")
    log = run_log.RunLog(cfg, workdir, parts.eval_source, first_step)
    stack.enter_context(contextlib.closing(log))
    _introduce(parts, state, log, first_step)
    _loop(parts, state, meta, first_step, checkpointer, log, stop)
    checkpointer.wait()
    best = checkpointer.best_step()
  writers.log(
    f"done: {cfg.train.num_steps} steps; best {cfg.eval.best_metric} on"
    f" {cfg.eval.split} at step {best}; pictures in {workdir / 'pictures'}"
  )


def _loop(
  parts: _Parts,
  state: TrainState,
  meta: dict[str, Any],
  first_step: int,
  checkpointer: checkpoint.Checkpointer,
  log: run_log.RunLog,
  stop: signals.GracefulStop,
) -> None:
  """Step n is dispatched before the sums of step n - 1 are read.

  Order at a step: train line, evaluation and its line, both on disk, then the
  checkpoint. So the lines up to a checkpoint exist when it counts.
  """
  cfg, last = parts.cfg.train, parts.cfg.train.num_steps
  window, pending = meta.get("window"), None
  if meta.get("evaluation_due"):
    checkpointer.delete(first_step)  # Saved again below, with its score.
    _evaluate_and_save(
      parts, state, window, first_step, checkpointer, log, stop
    )
  batches = pipeline.train_batches(
    parts.train_source,
    parts.normalization,
    cfg=parts.cfg,
    first_step=first_step,
    host=parts.host.index,
    num_hosts=parts.host.count,
  )
  for step in range(first_step + 1, last + 1):
    _profile(parts, step - first_step, state)
    batch = next(batches)
    state, sums = parts.train_step(
      state, parallel.put_batch(batch, parts.mesh), parts.rng
    )
    if pending is not None:
      window = _read(parts, window, *pending)
    pending = (step, batch["id"], sums)
    log.progress.tick(step)
    checkpointer.poll()

    log_now = due(step, cfg.log_every, last)
    eval_now = due(step, cfg.eval_every, last)
    save_now = due(step, cfg.checkpoint_every, last) or stop.requested
    if not (log_now or eval_now or save_now):
      continue
    window, pending = _read(parts, window, *pending), None
    if log_now:
      rate = float(parts.schedule(np.int32(step - 1)))
      log.train(step, window, skipped=int(state.skipped), rate=rate)
      window = None
    with log.progress.paused():
      if eval_now:
        _evaluate_and_save(parts, state, window, step, checkpointer, log, stop)
      elif save_now:
        log.flush()
        meta = {"window": run_log.window_to_json(window)}
        checkpointer.save(step, state, score=None, meta=meta)
    if stop.requested and step < last:
      raise signals.Stopped(stop.requested)


def _read(
  parts: _Parts,
  window: run_log.Window,
  step: int,
  ids: np.ndarray,
  sums: StepSums,
) -> run_log.Window:
  """Adds a step's sums to the window; ends a run that no longer learns."""
  if not sums.finite:
    names = ", ".join(parts.train_source.names[i] for i in ids)
    writers.log(
      f"step {step}: loss or gradient not finite, nothing changed; examples:"
      f" {names}"
    )
    in_row = int(sums.skipped_in_row)
    if in_row >= parts.cfg.train.max_skipped:
      raise UserError(
        f"{in_row} steps in a row, up to step {step}, had a loss or gradient"
        f" that is not finite (examples {names}); look at these, or lower"
        " config.optimizer.learning_rate"
      )
  return run_log.add_sums(window, sums)


def _evaluate_and_save(
  parts: _Parts,
  state: TrainState,
  window: run_log.Window,
  step: int,
  checkpointer: checkpoint.Checkpointer,
  log: run_log.RunLog,
  stop: signals.GracefulStop,
) -> None:
  """Scores the state and saves it with its score.

  Raises:
    signals.Stopped: stopped in the middle; the state was saved with a note that
      its evaluation is due.
  """
  meta = {"window": run_log.window_to_json(window)}
  try:
    result = evaluate_lib.evaluate(
      parts.eval_step,
      state_lib.eval_variables(state),
      parts.eval_source,
      parts.normalization,
      cfg=parts.cfg,
      mesh=parts.mesh,
      picture_ids=_spread(len(parts.eval_source), parts.cfg.train.num_pictures),
      stop=stop,
    )
  except signals.Stopped:
    log.flush()
    meta["evaluation_due"] = True
    checkpointer.save(step, state, score=None, meta=meta)
    raise
  log.evaluation(step, result)
  log.flush()
  score = evaluate_lib.score(result.summary, parts.cfg.eval.best_metric)
  checkpointer.save(step, state, score=score, meta=meta)


def _spread(n: int, count: int) -> list[int]:
  """Up to `count` indices below n, from the first to the last."""
  return sorted({round(i) for i in np.linspace(0, n - 1, min(count, n))})


def _introduce(
  parts: _Parts, state: TrainState, log: run_log.RunLog, first_step: int
) -> None:
  """Says what will run, and on what."""
  cfg = parts.cfg
  table = clu.parameter_overview.get_parameter_overview(
    state.params, include_stats=False
  )
  writers.write_atomically(parts.workdir / "parameters.txt", table.encode())
  log.text(first_step, "parameters", table)
  log.text(first_step, "config", config_lib.to_text(cfg))
  count = clu.parameter_overview.count_parameters(state.params)
  devices = parts.mesh.devices.size
  writers.log(
    f"{len(parts.train_source)} training examples, {len(parts.eval_source)} in"
    f" {cfg.eval.split}; {count:,} parameters; {devices}"
    f" {parts.mesh.devices.flat[0].platform} device(s); batch"
    f" {cfg.train.batch_size} of {' x '.join(map(str, cfg.data.crop_size))}"
  )
  if first_step < cfg.train.num_steps:
    writers.log("compiling the train step")


def _profile(parts: _Parts, steps_here: int, state: TrainState) -> None:
  """Starts and ends the optional profiler trace, around whole steps."""
  length = parts.cfg.train.profile_steps
  if length and steps_here == _PROFILE_FROM:
    jax.profiler.start_trace(str(parts.workdir / "profile"))
  if length and steps_here == _PROFILE_FROM + length:
    jax.block_until_ready(state)
    jax.profiler.stop_trace()
    writers.log(f"profiler trace in {parts.workdir / 'profile'}")
