"""What a run tells while it trains: metrics.jsonl, TensorBoard, pictures."""

import pathlib
import time
from typing import Any

import clu.metrics
import jax
import numpy as np
from PIL import Image

from unet_jax import evaluate as evaluate_lib
from unet_jax.config import Config
from unet_jax.data import pipeline
from unet_jax.data.tokens import TokenSource
from unet_jax.inspect import pictures, sentences
from unet_jax.objectives import metrics
from unet_jax.runtime import parallel, storage, writers
from unet_jax.train_step import SkipProbes, StepSums

# In train lines with train.probe_skips: lists of a number a level.
PROBES = ("skip_gradient_norm", "deep_gradient_norm", "skip_energy_share")
# In every line: what this process spent since the last one, or since it began
# with the run; the CPU seconds are those of all its threads. Work that was lost
# and done again counts once, as its lines do.
SPENT = {"wall_seconds": time.monotonic, "cpu_seconds": time.process_time}


class RunLog:
  """The open files of a run; `source` is what its pictures show.

  Opening it for a run that resumes removes what was written beyond
  `first_step`, so that no line is repeated.
  """

  def __init__(
    self,
    cfg: Config,
    workdir: pathlib.Path,
    source: pipeline.Source,
    first_step: int,
  ):
    self._cfg = cfg
    self._source = source
    self._mirror = storage.Mirror(workdir, ("metrics.jsonl",))
    self._metrics = self._mirror.folder / "metrics.jsonl"
    self._pictures = workdir / "pictures"
    writers.cut_lines_after(self._metrics, first_step)
    self._jsonl = writers.JsonlWriter(self._metrics)
    self._board = writers.TensorBoardWriter(
      self._mirror.folder / "tensorboard", first_step=first_step
    )
    self.progress = writers.Progress(
      cfg.train.num_steps,
      first_step,
      batch_size=cfg.train.batch_size,
      examples=cfg.data.examples,
    )
    self._clocks = {name: clock() for name, clock in SPENT.items()}

  def has(self, step: int) -> bool:
    """Whether the evaluation of `step` is in the file."""
    records = writers.read_jsonl(self._metrics)
    # Not by the split: the training examples can be evaluated too.
    found = any(r["step"] == step and "num_images" in r for r in records)
    return bool(parallel.from_primary(found))

  def text(self, step: int, name: str, text: str) -> None:
    """Shows a text in TensorBoard, as it stands."""
    self._board.text(step, name, f"```\n{text}\n```")

  def train(
    self, step: int, window: StepSums, *, skipped: int, rate: float
  ) -> None:
    """Writes the mean of the steps since the last line."""
    record = {
      "step": step,
      "split": "train",
      **mean_sums(window, self._cfg.eval.foreground),
      "learning_rate": rate,
      "skipped": skipped,
      "examples_per_second": self.progress.examples_per_second,
    }
    self._write(record)
    shown = ("loss", "dice", "learning_rate")
    self.progress.report(step, {key: record[key] for key in shown})

  def evaluation(self, step: int, result: evaluate_lib.Evaluation) -> None:
    """Writes the scores and draws the examples that were kept for it."""
    split = self._cfg.eval.split
    self._write({"step": step, "split": split, **result.summary})
    scores = evaluate_lib.describe(result.summary)
    writers.log(f"step {step}  on {split}: {scores}")
    if result.predictions:
      panel = self._panel(result)
      path = self._pictures / f"step_{step}.png"
      pictures.save_png(path, panel)
      self._board.image(step, f"{split}/predictions", np.asarray(panel))
    if result.bins is not None:
      diagram = pictures.reliability(result.bins)
      pictures.save_png(self._pictures / "reliability.png", diagram)
      self._board.image(step, f"{split}/reliability", np.asarray(diagram))
    records = writers.read_jsonl(self._metrics)
    keys = ("train/loss", f"{split}/loss", "train/dice", f"{split}/dice")
    chart = pictures.curves(records, keys)
    pictures.save_png(self._pictures / "curves.png", chart)

  def flush(self) -> None:
    """Returns when every line is on disk, or in the bucket."""
    self._jsonl.flush()
    self._board.flush()
    self._mirror.upload()

  def close(self) -> None:
    """Flushes and closes all files."""
    self._jsonl.close()
    self._board.close()
    self._mirror.close()

  def _write(self, record: dict[str, Any]) -> None:
    now = {name: clock() for name, clock in SPENT.items()}
    spent = {name: now[name] - self._clocks[name] for name in now}
    self._clocks = now
    self._jsonl.write({**record, **spent})
    split = record["split"]
    left_out = ("step", "split", "absent_classes")
    scalars = {
      f"{split}/{k}": v for k, v in record.items() if k not in left_out
    }
    self._board.scalars(record["step"], scalars)

  def _panel(self, result: evaluate_lib.Evaluation) -> Image.Image:
    source, predictions = self._source, sorted(result.predictions.items())
    if isinstance(source, TokenSource):
      return sentences.panel(
        [
          {
            "name": source.names[i],
            "forms": source.sentences[i].forms,
            "tags": source.sentences[i].tags,
            "prediction": [source.tags[k] for k in prediction],
            "scores": {"accuracy": result.rows[i]["pixel_accuracy"]},
          }
          for i, prediction in predictions
        ]
      )
    rows = []
    for i, prediction in predictions:
      example = source[i]
      row = {key: example[key] for key in ("image", "label", "weight")}
      row |= {"prediction": prediction, "name": source.names[i]}
      rows.append({**row, "scores": {"dice": result.rows[i]["dice"]}})
    return pictures.panel(rows)


class SilentLog:
  """What the other hosts have in its place: host 0 writes for all."""

  progress = writers.NoProgress()

  def has(self, step: int) -> bool:
    return bool(parallel.from_primary(False))

  def text(self, *_: Any) -> None:
    pass

  def train(self, *_: Any, **__: Any) -> None:
    pass

  evaluation = text

  def flush(self) -> None:
    pass

  close = flush


Log = RunLog | SilentLog


def open_log(
  cfg: Config,
  workdir: pathlib.Path,
  source: pipeline.Source,
  first_step: int,
  host: parallel.Host,
) -> Log:
  """The log of this host; only host 0's writes."""
  with parallel.same_fate():
    if not host.is_primary:
      return SilentLog()
    return RunLog(cfg, workdir, source, first_step)


# --- Sums since the last log line, on the host --------------------------------

# As added up so far; as the leaves that a checkpoint kept; or empty.
Window = StepSums | list[Any] | None


def add_sums(window: Window, sums: StepSums) -> StepSums:
  """Adds a step's sums to the window's, in 64 bits.

  Args:
    window: the sums so far; a list of leaves as `window_to_json` left them, or
      None for an empty window.
    sums: of one step, on device; this waits for them.
  """

  def wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float64 if x.dtype.kind == "f" else np.int64)

  sums = jax.tree.map(wide, jax.device_get(sums))
  if window is None:
    return sums
  if isinstance(window, list):
    leaves = [np.asarray(leaf) for leaf in window]
    window = jax.tree.unflatten(jax.tree.structure(sums), leaves)
  return jax.tree.map(np.add, window, sums)


def window_to_json(window: Window) -> list[Any] | None:
  """The window's leaves as plain numbers; repr of a float64 is exact."""
  if window is None or isinstance(window, list):
    return window
  return [leaf.tolist() for leaf in jax.tree.leaves(window)]


def mean_sums(window: StepSums, foreground: tuple[int, ...]) -> dict[str, Any]:
  """The means of a window: loss, its terms if several, Dice, gradient norm.

  With `train.probe_skips`, where a step was heard, also of each level: the
  norms of the loss's gradient by what arrives at its joins sideways and from
  below, and the share of the first in the sum of squares of what is joined.
  """

  def mean(average: clu.metrics.Average) -> float:
    count = float(average.count)
    return float(average.total) / count if count else float("nan")

  parts = {f"loss_{name}": mean(part) for name, part in window.parts.items()}
  counts = window.confusion.counts[None]
  heard = window.probes is not None and window.probes.steps > 0
  return {
    "loss": mean(window.loss),
    **(parts if len(parts) > 1 else {}),
    "dice": metrics.summarize(counts, foreground)["dice"],
    "grad_norm": mean(window.grad_norm),
    **(_mean_probes(window.probes) if heard else {}),
  }


def _mean_probes(probes: SkipProbes) -> dict[str, list[float]]:
  def ratio(a: np.ndarray, b: np.ndarray) -> list[float]:
    nothing = np.full(np.shape(a), np.nan)
    return np.divide(a, b, out=nothing, where=np.not_equal(b, 0)).tolist()

  norms = [ratio(norm, probes.steps) for norm in probes.norm]
  return dict(zip(PROBES, [*norms, ratio(*probes.energy)], strict=True))
