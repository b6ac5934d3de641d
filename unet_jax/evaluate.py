"""Scoring: every example whole, at its own size, exactly once."""

import contextlib
import csv
import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jax.sharding import Mesh

from unet_jax import ensemble as ensemble_lib
from unet_jax import program, scoring
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import pipeline
from unet_jax.inspect import pictures
from unet_jax.models.skips import Context
from unet_jax.objectives import losses, metrics, uncertainty
from unet_jax.runtime import parallel, signals, storage, watchdog, writers
from unet_jax.schema import ERRORS, EXTRA_METRICS

# How finely the uncertainty of a pixel is told apart.
_BINS = 2**14
# More sizes, and so compilations, in one pass deserve a hint.
_MANY_SIZES = 12

EvalStep = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Scores of one split.

  Attributes:
    summary: pooled and mean scores; keys as in `metrics.summarize`, `loss`, and
      those of `scoring`.
    rows: scores of each image, in the order of the source, with its `name`.
    predictions: int32 label maps [*S] of the ids that were asked for.
    bins: of `calibration.bin_confidence` over all images, if asked for.
  """

  summary: dict[str, Any]
  rows: list[dict[str, Any]]
  predictions: dict[int, np.ndarray]
  bins: np.ndarray | None = None


def make_eval_step(
  cfg: Config, mesh: Mesh, members: Sequence[ensemble_lib.Group] = ()
) -> EvalStep:
  """Jits (variables, batch) -> sums of each example, whole on every host.

  With `members` they are those of an ensemble, and so are the variables.
  """
  model = workdir_lib.make_model(
    cfg, prune=cfg.eval.prune, **program.sharded_fields(mesh)
  )
  loss_fn = losses.make_loss(**dataclasses.asdict(cfg.loss))
  labels = cfg.num_labels

  def eval_step(
    variables: Any, batch: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    batch = parallel.cut_images(batch, mesh)
    label, weight = batch["label"], batch["weight"]
    if members:
      mean = ensemble_lib.mean_logits(members, variables, batch["image"])
      outputs = [mean]
    else:
      outputs = _apply(model, variables, batch)
    loss, _ = loss_fn(outputs[0], label, weight)
    confusions = [metrics.confusion(y, label, weight, labels) for y in outputs]
    extra = {}
    if scoring.needs_probability(cfg):
      extra = {"probability": metrics.probabilities(outputs[0])}
    if cfg.eval.risk_coverage:
      extra["graded"] = _grade(outputs[0], label, weight)
    return extra | {
      "id": batch["id"],
      "valid": batch["valid"],
      "loss": loss,
      "confusion": jnp.stack(confusions, 1),
      "prediction": metrics.predict_labels(outputs[0]),
      "stop": jnp.max(batch["stop"]),
    }

  return jax.jit(eval_step, out_shardings=parallel.replicated(mesh))


def _grade(logits: jax.Array, label: jax.Array, weight: jax.Array) -> jax.Array:
  """2 bin + (1 where wrong), int32 [B, *S]; 2 bins where nothing counts.

  The bin is that of the entropy of the probabilities, as a share of its most.
  """
  p = metrics.probabilities(logits)
  share = entr(p).sum(-1) / uncertainty.highest(p.shape[-1])
  bins = jnp.clip(share * _BINS, 0, _BINS - 1).astype(jnp.int32)
  wrong = metrics.predict_labels(logits) != label
  return jnp.where(weight > 0, 2 * bins + wrong, 2 * _BINS)


def _apply(
  model: nn.Module, variables: Any, batch: dict[str, jax.Array]
) -> list[jax.Array]:
  """The logits of every output. With partners, their images join the batch."""
  image, context, n = batch["image"], Context(), batch["image"].shape[0]
  if "partner" in batch:
    image = jnp.concatenate([image, batch["partner"]])
    context = Context(partner=(jnp.arange(2 * n) + n) % (2 * n))
  outputs = model.apply(variables, image, context=context, every_output=True)
  return [logits[:n] for logits in outputs.logits]


def evaluate(
  eval_step: EvalStep,
  variables: Any,
  source: pipeline.Source,
  normalization: dict[str, Any],
  *,
  cfg: Config,
  mesh: Mesh,
  picture_ids: Sequence[int] = (),
  stop: signals.GracefulStop | None = None,
  dog: watchdog.Watchdog | None = None,
) -> Evaluation:
  """One pass over a source.

  Sums come from the device one example at a time and are added in 64 bits on
  the host, so neither the batch size nor the number of devices is in the
  result.

  Raises:
    signals.Stopped: `stop` was requested; nothing was written.
  """
  n, labels = len(source), cfg.num_labels
  outputs = num_outputs(cfg)
  loss = np.zeros(n)
  confusion = np.zeros((n, outputs, labels, labels), np.int64)
  seen = np.zeros(n, np.int64)
  grades = np.zeros((n, 2 * _BINS if cfg.eval.risk_coverage else 0), np.int64)
  predictions, extra = {}, scoring.ExtraScores(cfg, source)
  host = parallel.this_host()
  batches = pipeline.eval_batches(
    source,
    normalization,
    cfg=cfg,
    num_devices=mesh.shape["data"],
    space=mesh.shape["space"],
    host=host.index,
    num_hosts=host.count,
  )
  _hint_at_many_shapes(source, cfg)

  def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    requested = stop.requested if stop is not None else None
    asked = np.full(len(batch["id"]), requested or 0, np.int32)
    return parallel.put_batch({**batch, "stop": asked}, mesh)

  with contextlib.closing(parallel.prefetch(batches, put)) as ready:
    for sent, batch in writers.track(ready, "evaluating, batch"):
      if host.count == 1 and stop is not None and stop.requested:
        raise signals.Stopped(stop.requested)
      out = dict(eval_step(variables, batch))
      maps = out.pop("prediction"), out.pop("probability", None)
      out = jax.device_get(out)
      if dog is not None:
        dog.alive()
      if host.count > 1 and out["stop"]:  # All hosts read the same.
        raise signals.Stopped(int(out["stop"]))
      for row in np.flatnonzero(out["valid"]):
        i = int(out["id"][row])
        seen[i] += 1
        loss[i] = out["loss"][row]
        confusion[i] = out["confusion"][row]
        if cfg.eval.risk_coverage:
          found = np.bincount(out["graded"][row].ravel(), None, 2 * _BINS + 1)
          grades[i] = found[:-1]
        if i in picture_ids:
          window = tuple(slice(0, size) for size in source.size(i))
          predictions[i] = np.asarray(maps[0][row])[window]
      if cfg.eval.extra_metrics:
        for scored in _own_examples(sent, maps, host):
          extra.add(*scored)
          if dog is not None:
            dog.alive()
  if not (seen == 1).all():
    raise RuntimeError(f"examples seen {seen.min()} to {seen.max()} times")

  summary, rows = _summarize(source.names, loss, confusion, cfg)
  if cfg.eval.risk_coverage:
    summary |= _risks(grades, rows)
  more, columns, bins = extra.finish()
  rows = [row | own for row, own in zip(rows, columns, strict=True)]
  return Evaluation(summary | more, rows, predictions, bins)


def _own_examples(
  sent: dict[str, np.ndarray],
  maps: tuple[jax.Array, jax.Array | None],
  host: parallel.Host,
) -> Iterator[tuple]:
  """What `ExtraScores.add` takes, of each valid example that this host sent.

  The maps are those of the whole batch, on every host.
  """
  maps = [None if m is None else np.asarray(m) for m in maps]
  count = len(sent["id"])
  for k in np.flatnonzero(sent["valid"]):
    row = host.index * count + k
    own = (None if m is None else m[row] for m in maps)
    yield int(sent["id"][k]), sent["label"][k], sent["weight"][k], *own


def num_outputs(cfg: Config) -> int:
  """Outputs that are scored: the prediction, and those of deep supervision."""
  if not cfg.model.deep_supervision:
    return 1
  if cfg.model.decoder == "full_scale":
    return cfg.model.depth + 1
  return cfg.eval.prune or cfg.model.depth


def _summarize(
  names: Sequence[str], loss: np.ndarray, confusion: np.ndarray, cfg: Config
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The summary and the rows of an `Evaluation`, from sums of each image."""
  deep, confusion = confusion, confusion[:, 0]
  summary = metrics.summarize(confusion, cfg.eval.foreground)
  if cfg.model.deep_supervision:
    per_output = [
      metrics.summarize(deep[:, k], cfg.eval.foreground)["dice"]
      for k in range(deep.shape[1])
    ]
    summary = {**summary, "dice_per_output": per_output}
  counted = confusion.sum((1, 2)) > 0  # An image that is all ignored has none.
  mean_loss = float(loss[counted].mean()) if counted.any() else float("nan")
  rows = metrics.per_image_rows(confusion, cfg.eval.foreground)
  rows = [
    {"name": names[i], "loss": float(loss[i]), **row}
    for i, row in enumerate(rows)
  ]
  return {"loss": mean_loss, **summary}, rows


def _risks(grades: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, float]:
  """Whether uncertainty finds errors, of pixels and of images.

  Each row gets its mean `uncertainty`, a share of the highest.
  """
  right, wrong = np.moveaxis(grades.reshape(len(grades), _BINS, 2), -1, 0)
  counts, bins = right + wrong, np.arange(_BINS)
  total = np.maximum(counts.sum(1), 1)
  mean = (counts * (bins + 0.5)).sum(1) / total / _BINS
  for row, value in zip(rows, mean, strict=True):
    row["uncertainty"] = float(value)
  pixels = uncertainty.risk_coverage(bins, wrong.sum(0), counts.sum(0))
  shown = counts.sum(1) > 0
  images = uncertainty.risk_coverage(
    mean[shown], (wrong.sum(1) / total)[shown], None
  )
  return {**pixels, **{f"{k}_per_image": v for k, v in images.items()}}


def _hint_at_many_shapes(source: pipeline.Source, cfg: Config) -> None:
  sizes = {source.size(i) for i in range(len(source))}
  if len(sizes) > _MANY_SIZES and cfg.data.pad_multiple == 1:
    writers.log(
      f"images of {len(sizes)} sizes, each compiled once;"
      " config.data.pad_multiple=64 at training makes them fewer"
    )


def score(summary: dict[str, Any], best_metric: str) -> float:
  """The value of `eval.best_metric`, turned so that larger is better."""
  value = summary[best_metric]
  return -value if best_metric in ERRORS else value


def run(
  cfg: Config,
  workdir: pathlib.Path,
  *,
  step: int | None = None,
  ensemble: Sequence[str] = (),
) -> None:
  """`--mode evaluate`: scores a checkpoint and writes JSON and CSV.

  Args:
    cfg: the run's config; `cfg.eval.split` says what is scored.
    workdir: folder of a training run.
    step: the checkpoint; None takes the best.
    ensemble: folders of more runs; their mean probabilities are scored, in
      evaluation_SPLIT_ensemble.json and .csv.
  """
  splits = workdir_lib.split_dir(workdir)
  source = pipeline.make_source(cfg, cfg.eval.split, splits)
  mesh = parallel.make_mesh(cfg.parallel.space)
  trained = workdir_lib.load_trained(cfg, workdir, mesh, step=step)
  variables, members, split = trained.variables, [], cfg.eval.split
  if ensemble:
    folders = [storage.to_path(folder) for folder in ensemble]
    members, _ = ensemble_lib.load(trained, cfg, folders, mesh)
    variables, split = (
      [group.variables for group in members],
      f"{split}_ensemble",
    )
    # Only the prediction is averaged.
    model = dataclasses.replace(cfg.model, deep_supervision=False)
    cfg = dataclasses.replace(cfg, model=model)
  with signals.GracefulStop() as stop:
    result = evaluate(
      make_eval_step(cfg, mesh, members),
      variables,
      source,
      trained.normalization,
      cfg=cfg,
      mesh=mesh,
      stop=stop,
    )
  if parallel.this_host().is_primary:
    record = {"step": trained.step, "split": cfg.eval.split, **result.summary}
    if ensemble:
      record["members"] = [str(workdir), *map(str, ensemble)]
    workdir_lib.write_json(workdir / f"evaluation_{split}.json", record)
    write_csv(workdir / f"evaluation_{split}_per_image.csv", result.rows)
    if result.bins is not None:
      path = workdir / f"evaluation_{split}_reliability.png"
      pictures.save_png(path, pictures.reliability(result.bins))
  writers.log(
    f"{split}, step {trained.step}, {len(source)} images: "
    + describe(result.summary)
  )
  writers.log(f"wrote {workdir / f'evaluation_{split}.json'}")


def describe(summary: dict[str, Any]) -> str:
  """The scores people ask for first, on one line."""
  keys = ("dice", "iou", "dice_per_image", "pixel_accuracy", "loss")
  keys += tuple(
    names[0] for names in EXTRA_METRICS.values() if names[0] in summary
  )
  return "  ".join(f"{key} {summary[key]:.4f}" for key in keys)


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """One line an image; a class that is absent has an empty cell."""
  text = io.StringIO()
  table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
  table.writeheader()
  # NaN is the one value that is not equal to itself.
  table.writerows({k: v if v == v else "" for k, v in r.items()} for r in rows)
  writers.write_atomically(path, text.getvalue().encode())
