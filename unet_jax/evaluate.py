"""Scoring: every example whole, at its own size, exactly once."""

import contextlib
import csv
import dataclasses
import functools
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
from unet_jax.data.tokens import TokenSource
from unet_jax.errors import UserError
from unet_jax.inspect import pictures
from unet_jax.models.probes import CUTS, Cut
from unet_jax.models.skips import Context
from unet_jax.objectives import losses, metrics, objects, spans, uncertainty
from unet_jax.runtime import parallel, signals, storage, watchdog, writers
from unet_jax.schema import ERRORS, EXTRA_METRICS

# How finely the uncertainty of a pixel is told apart.
_BINS = 2**14
# More sizes, and so compilations, in one pass deserve a hint.
_MANY_SIZES = 12

EvalStep = Callable[..., dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Scores of one split.

  Attributes:
    summary: pooled and mean scores; keys as in `metrics.summarize`, `loss`, and
      those of `scoring`; of tokens also `accuracy` and, where tags are those of
      entities, the keys of `spans.summarize`.
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
  """Jits (variables, batch, how) -> sums of each example, whole on every host.

  `how` is that of a `probes.Cut`, or None. With `members` they are those of an
  ensemble, and so are the variables.
  """
  model = workdir_lib.make_model(
    cfg, prune=cfg.eval.prune, **program.sharded_fields(mesh)
  )
  loss_fn = losses.make_loss(**dataclasses.asdict(cfg.loss))
  labels = cfg.num_labels

  def eval_step(
    variables: Any, batch: dict[str, jax.Array], how: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    batch = parallel.cut_images(batch, mesh)
    label, weight = batch["label"], batch["weight"]
    if members:
      mean = ensemble_lib.mean_logits(members, variables, batch["image"])
      outputs = [mean]
    else:
      outputs = _apply(model, variables, batch, how)
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
  model: nn.Module,
  variables: Any,
  batch: dict[str, jax.Array],
  how: jax.Array | None = None,
) -> list[jax.Array]:
  """The logits of every output. With partners, their images join the batch."""
  image, context, n = batch["image"], Context(), batch["image"].shape[0]
  others = None
  if "partner" in batch:
    image, row = jnp.concatenate([image, batch["partner"]]), jnp.arange(2 * n)
    context = Context(partner=(row + n) % (2 * n))
    # Partners stay whole, else an example would get its own features back.
    others = row % n + n
  if how is not None:
    context = context._replace(cut=Cut(how, others))
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
  how: Sequence[int] | None = None,
  by_object: bool = False,
  stop: signals.GracefulStop | None = None,
  dog: watchdog.Watchdog | None = None,
) -> Evaluation:
  """One pass over a source.

  Sums come from the device one example at a time and are added in 64 bits on
  the host, so neither the batch size nor the number of devices is in the
  result. `how` cuts skips, see `probes.Cut`; with `by_object` rows also have
  `object_pixels` and `object_found`, see `objects.find_objects`.

  Raises:
    signals.Stopped: `stop` was requested; nothing was written.
  """
  cfg = cfg if how is None else _without_extras(cfg)
  n, labels = len(source), cfg.num_labels
  outputs = num_outputs(cfg)
  loss = np.zeros(n)
  confusion = np.zeros((n, outputs, labels, labels), np.int64)
  seen = np.zeros(n, np.int64)
  predictions, extra, found = {}, scoring.ExtraScores(cfg, source), [{}] * n
  kept = range(n) if _has_entities(source) else picture_ids
  grades = np.zeros((n, 2 * _BINS if cfg.eval.risk_coverage else 0), np.int64)
  host = parallel.this_host()
  batches = _batches(source, normalization, cfg, mesh, how)
  cut = () if how is None else (np.asarray(how, np.int32),)
  _hint_at_many_shapes(source, cfg)

  def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    requested = stop.requested if stop is not None else None
    asked = np.full(len(batch["id"]), requested or 0, np.int32)
    return parallel.put_batch({**batch, "stop": asked}, mesh)

  with contextlib.closing(parallel.prefetch(batches, put)) as ready:
    for sent, batch in writers.track(ready, "evaluating, batch"):
      if host.count == 1 and stop is not None and stop.requested:
        raise signals.Stopped(stop.requested)
      out = dict(eval_step(variables, batch, *cut))
      maps = out.pop("prediction"), out.pop("probability", None)
      if len(kept) == n:  # At once: an access to the device takes time.
        maps = np.asarray(maps[0]), maps[1]
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
          graded = out["graded"][row].ravel()
          grades[i] = np.bincount(graded, None, 2 * _BINS + 1)[:-1]
        if i in kept:
          predictions[i] = _cut_out(maps[0][row], source, i)
        if by_object:
          found[i] = _objects(_cut_out(maps[0][row], source, i), source, i, cfg)
      if cfg.eval.extra_metrics:
        for scored in _own_examples(sent, maps, host):
          extra.add(*scored)
          if dog is not None:
            dog.alive()
  if not (seen == 1).all():
    raise RuntimeError(f"examples seen {seen.min()} to {seen.max()} times")

  summary, rows = _summarize(source.names, loss, confusion, cfg)
  summary |= _risks(grades, rows)
  more, columns, bins = extra.finish()
  rows = [a | b | c for a, b, c in zip(rows, columns, found, strict=True)]
  more |= _token_scores(source, summary, predictions)
  predictions = {i: x for i, x in predictions.items() if i in picture_ids}
  return Evaluation(summary | more, rows, predictions, bins)


def _batches(
  source: pipeline.Source,
  normalization: dict[str, Any],
  cfg: Config,
  mesh: Mesh,
  how: Sequence[int] | None,
) -> Iterator[dict[str, np.ndarray]]:
  """This host's share of the batches."""
  host = parallel.this_host()
  return pipeline.eval_batches(
    source,
    normalization,
    cfg=cfg,
    num_devices=mesh.shape["data"],
    space=mesh.shape["space"],
    host=host.index,
    num_hosts=host.count,
    partners=how is not None and CUTS.index("shuffled") in how,
  )


def _has_entities(source: pipeline.Source) -> bool:
  return isinstance(source, TokenSource) and spans.are_entities(source.tags)


def _token_scores(
  source: pipeline.Source,
  summary: dict[str, Any],
  predictions: dict[int, np.ndarray],
) -> dict[str, Any]:
  """What the summary of tokens has beside that of images."""
  if not isinstance(source, TokenSource):
    return {}
  scores = {"accuracy": summary["pixel_accuracy"]}
  if _has_entities(source):
    truth = [sentence.tags for sentence in source.sentences]
    found = [
      [source.tags[k] for k in predictions[i]] for i in range(len(source))
    ]
    scores |= spans.summarize(truth, found)
  return scores


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


def probe_skips(
  score: Callable[..., Evaluation], whole: Evaluation, cfg: Config
) -> Evaluation:
  """Adds to `whole` the Dice with the skips of one level at a time cut.

  Args:
    score: `evaluate` of the same network and source, given `how`.
    whole: what it gives without.
    cfg: of the run.

  Returns:
    `whole`; its summary has `dice_zeroed`, `dice_averaged` and `dice_shuffled`,
    lists of a number a level, and its rows `dice_zeroed_0`, ...: NaN where a
    level has no wire, where skip="shuffle" brings another image's feature
    anyway, and where there is no other image.
  """
  model, depth = cfg.model, cfg.model.depth
  on = model.skip_levels or (model.skip != "none",) * depth
  has_others = model.skip != "shuffle" and len(whole.rows) > 1
  summary, rows = dict(whole.summary), [dict(row) for row in whole.rows]
  for number, name in enumerate(CUTS[1:], 1):
    summary[f"dice_{name}"] = [float("nan")] * depth
    for level in range(depth):
      key, found = f"dice_{name}_{level}", [{}] * len(rows)
      if on[level] and (has_others or name != "shuffled"):
        writers.log(f"skips of level {level} {name}:")
        result = score(how=[number * (k == level) for k in range(depth)])
        summary[f"dice_{name}"][level] = result.summary["dice"]
        found = result.rows
      for row, other in zip(rows, found, strict=True):
        row[key] = other["dice"] if other else float("nan")
  return dataclasses.replace(whole, summary=summary, rows=rows)


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


def _without_extras(cfg: Config) -> Config:
  """Of what is cut the Dice is enough."""
  few = dataclasses.replace(cfg.eval, extra_metrics=(), risk_coverage=False)
  return dataclasses.replace(cfg, eval=few)


def _cut_out(mask: jax.Array, source: pipeline.Source, i: int) -> np.ndarray:
  """The mask [*S] of example i without what pads it."""
  return np.asarray(mask)[tuple(slice(0, n) for n in source.size(i))]


def _objects(
  mask: np.ndarray, source: pipeline.Source, i: int, cfg: Config
) -> dict[str, list[Any]]:
  example = source[i]
  classes = cfg.eval.foreground or tuple(range(1, cfg.num_labels))
  pixels, share = objects.find_objects(
    example["label"], mask, example["weight"], classes
  )
  return {"object_pixels": pixels, "object_found": share}


def _risks(grades: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, float]:
  """Whether uncertainty finds errors, of pixels and of images.

  Each row gets its mean `uncertainty`, a share of the highest. Without grades
  there is nothing to say.
  """
  if not grades.size:
    return {}
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
  is_image = cfg.data.source != "tokens"
  if is_image and len(sizes) > _MANY_SIZES and cfg.data.pad_multiple == 1:
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
  cfg = workdir_lib.load_class_weights(cfg, workdir)
  trained = workdir_lib.load_trained(cfg, workdir, mesh, step=step)
  variables, members, split = trained.variables, [], cfg.eval.split
  if ensemble and cfg.eval.probe_skips:
    raise UserError(
      "eval.probe_skips cuts the skips of one network; leave out --ensemble"
    )
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
    score = functools.partial(
      evaluate,
      make_eval_step(cfg, mesh, members),
      variables,
      source,
      trained.normalization,
      cfg=cfg,
      mesh=mesh,
      stop=stop,
    )
    result = score(by_object=cfg.eval.objects)
    if cfg.eval.probe_skips:
      result = probe_skips(score, result, cfg)
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
    f"{split}, step {trained.step}, {len(source)} {cfg.data.examples}: "
    + describe(result.summary)
  )
  writers.log(f"wrote {workdir / f'evaluation_{split}.json'}")


def describe(summary: dict[str, Any]) -> str:
  """The scores people ask for first, on one line."""
  keys = ("dice", "iou", "dice_per_image", "pixel_accuracy", "loss")
  if "accuracy" in summary:
    keys = ("accuracy", "entity_f1", "dice", "loss")
  keys += tuple(names[0] for names in EXTRA_METRICS.values())
  shown = [key for key in keys if key in summary]
  return "  ".join(f"{key} {summary[key]:.4f}" for key in shown)


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """One line an image; a class that is absent has an empty cell."""
  text = io.StringIO()
  table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
  table.writeheader()

  def cell(value: Any) -> Any:
    if isinstance(value, list):
      return " ".join(map(str, value))
    return value if value == value else ""  # NaN is not equal to itself.

  table.writerows({k: cell(v) for k, v in r.items()} for r in rows)
  writers.write_atomically(path, text.getvalue().encode())
