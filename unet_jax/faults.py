"""Fields of a config that are right alone but wrong together."""

import math
from collections.abc import Iterator

from unet_jax import geometry
from unet_jax.schema import EXTRA_METRICS, Config


def find_faults(cfg: Config) -> Iterator[str]:
  """Yields `field: what to do` for what is right alone but wrong together."""
  yield from _model_faults(cfg)
  yield from _data_faults(cfg)
  yield from _training_faults(cfg)
  yield from _scoring_faults(cfg)


def _model_faults(cfg: Config) -> Iterator[str]:
  model, depth = cfg.model, cfg.model.depth
  if depth < 1:
    yield f"model.widths={model.widths}: at least two levels, bottleneck last"
  if len(model.skip_levels) not in (0, depth):
    yield (
      f"model.skip_levels={model.skip_levels}: give {depth} entries, one for"
      " each level above the bottleneck, or none for all on"
    )
  for width in model.widths:
    if model.norm == "group" and width % model.norm_groups:
      yield (
        f"model.norm_groups={model.norm_groups} does not divide width {width};"
        f" nearest: {_nearest_divisor(width, model.norm_groups)}"
      )
  heads, bottom = model.bottleneck_heads, model.widths[-1]
  if model.bottleneck == "transformer" and bottom % heads:
    yield (
      f"model.bottleneck_heads={heads} does not divide width {bottom}; nearest:"
      f" {_nearest_divisor(bottom, heads)}"
    )
  if cfg.eval.prune > depth:
    yield f"eval.prune={cfg.eval.prune}: no such column; nearest: {depth}"
  for is_wrong, fault in _misfits(cfg):
    if is_wrong:
      yield fault
  yield from _pooling_faults(cfg)
  for axis, size in enumerate(cfg.data.crop_size):
    try:
      geometry.output_size(size, model.depths[axis], model.size_rule)
    except ValueError as error:
      yield f"data.crop_size, axis {axis}: {error}"


def _misfits(cfg: Config) -> list[tuple[bool, str]]:
  """Parts of a network that have no meaning together, each with its reason."""
  model, depth = cfg.model, cfg.model.depth
  tokens = model.skip in ("uctrans", "udtrans")
  valid, padded_up = model.padding == "valid", model.odd_size != "pad_input"
  skip, decoder = f"model.skip={model.skip!r}", f"decoder={model.decoder!r}"
  return [
    (
      model.decoder == "full_scale" and valid,
      "model.decoder='full_scale' joins features of all levels, which share no"
      " grid with padding='valid'; nearest: padding='same'",
    ),
    (
      model.head_kernel == 2,
      "model.head_kernel=2 would shift the logits by half a pixel; nearest: 1",
    ),
    (
      model.skip == "none" and model.skip_levels != (),
      f"model.skip_levels={model.skip_levels}: with {skip} there is no wire to"
      " switch; leave it out",
    ),
    (
      model.norm == "instance" and _bottleneck_pixels(cfg) == 1,
      f"data.crop_size={cfg.data.crop_size} leaves one pixel at the bottleneck,"
      f" which model.norm='instance' turns to 0; nearest: {2 ** (depth + 1)}",
    ),
    (
      valid and model.head_kernel > 1,
      f"model.head_kernel={model.head_kernel} needs padding='same'; nearest: 1",
    ),
    (
      valid and padded_up,
      f"model.odd_size={model.odd_size!r} needs padding='same'; nearest:"
      " 'pad_input'",
    ),
    (
      tokens and (valid or padded_up),
      f"{skip} cuts all levels into the same grid of patches, which needs"
      " padding='same' and odd_size='pad_input'",
    ),
    (
      model.skip == "udtrans" and model.decoder != "plain",
      f"{skip} sends tokens that meet one decoder feature a level, which"
      f" {decoder} does not have; nearest: decoder='plain'",
    ),
    (
      model.skip == "shuffle" and model.decoder == "nested",
      f"{skip} would bring back the example's own features through the nodes"
      f" between, with {decoder}; nearest: skip='zeros' or decoder='plain'",
    ),
    (
      model.skip == "shuffle"
      and cfg.train.batch_size // cfg.train.accumulate < 2,
      f"train.batch_size={cfg.train.batch_size}: {skip} takes features of"
      " another example of the batch (of each microbatch); nearest:"
      f" {2 * cfg.train.accumulate}",
    ),
    (
      model.narrow_decoder and model.decoder != "plain",
      f"model.narrow_decoder has no meaning for {decoder}; leave it out",
    ),
    (
      model.classification_guided and model.decoder != "full_scale",
      f"model.classification_guided has no meaning for {decoder}; leave it out",
    ),
    (
      cfg.eval.prune > 0
      and not (model.decoder == "nested" and model.deep_supervision),
      f"eval.prune={cfg.eval.prune} needs model.decoder='nested' trained with"
      " model.deep_supervision=true; nearest: 0",
    ),
  ]


def _pooling_faults(cfg: Config) -> Iterator[str]:
  """Poolings that leave an axis out."""
  model, axes = cfg.model, "012"[: cfg.model.dims]
  given = f"model.pool_axes={model.pool_axes}"
  if len(model.pool_axes) not in (0, model.depth):
    yield (
      f"{given}: give {model.depth} entries, one for each pooling, or none for"
      " all axes"
    )
  for entry in model.pool_axes:
    if not entry or set(entry) - set(axes) or len(set(entry)) < len(entry):
      yield (
        f"{given}: {entry!r} does not name axes of {axes!r}, once each; take"
        f" {axes!r}"
      )
  if model.pool_axes and model.padding == "valid":
    yield f"{given} needs model.padding='same'; leave one of the two out"
  if model.pool_axes and model.skip in ("uctrans", "udtrans"):
    yield (
      f"{given}: model.skip={model.skip!r} cuts all axes into equal patches;"
      " leave one of the two out"
    )


def _bottleneck_pixels(cfg: Config) -> int:
  """Of a training crop with same padding; valid padding leaves 4 an axis."""
  model = cfg.model
  if model.padding == "valid":
    return 4**model.dims
  sizes = zip(cfg.data.crop_size, model.depths, strict=True)
  return math.prod(size >> depth for size, depth in sizes)


def _nearest_divisor(number: int, wanted: int) -> int:
  divisors = [d for d in range(1, number + 1) if number % d == 0]
  return min(divisors, key=lambda d: abs(d - wanted))


def _data_faults(cfg: Config) -> Iterator[str]:
  data, labels = cfg.data, cfg.num_labels
  ignored, values = data.ignore_label, data.mask_values
  if data.source == "volumes" and cfg.model.dims != 3:
    yield (
      f"data.source='volumes' has 3 axes but model.dims={cfg.model.dims};"
      " nearest: 3"
    )
  clip = data.clip_percentiles
  if clip and not (len(clip) == 2 and clip[0] < clip[1]):
    yield (
      f"data.clip_percentiles={clip}: give a lower and an upper one; nearest:"
      " (0.5, 99.5)"
    )
  if data.source in ("folder", "volumes") and not data.dir:
    yield (
      "data.dir is empty; name the folder with images/ and masks/:"
      " --config.data.dir=DIR"
    )
  if ignored is not None and not values and ignored < labels:
    yield f"data.ignore_label={ignored} is a class; nearest: {labels}"
  if values and not len(values) == len(set(values)) == labels:
    yield f"data.mask_values={values}: give {labels} different ids, one a class"
  if ignored in values:
    yield (
      f"data.ignore_label={ignored} is also in data.mask_values; leave it out"
      " of one of the two"
    )
  if data.val_fraction + data.test_fraction > 0.95:
    yield (
      "data.val_fraction + data.test_fraction leave nothing to train on;"
      " nearest: 0.15 each"
    )
  if max(cfg.eval.foreground, default=0) >= labels:
    yield (
      f"eval.foreground={cfg.eval.foreground}: no such class; nearest:"
      f" {labels - 1}"
    )


def _training_faults(cfg: Config) -> Iterator[str]:
  loss, terms = cfg.loss, cfg.loss.terms
  if not terms:
    yield "loss.terms is empty; nearest: cross_entropy"
  if len(set(terms)) != len(terms):
    yield (
      f"loss.terms={terms} names a loss twice; raise its factor in loss.weights"
      " instead"
    )
  for name, each, count in (
    ("weights", "term", len(terms)),
    ("class_weights", "class", cfg.num_labels),
  ):
    entries = getattr(loss, name)
    if len(entries) not in (0, count):
      yield (
        f"loss.{name}={entries}: give {count} entries, one a {each}, or none"
        " for 1 each"
      )
  if "binary_cross_entropy" in terms and cfg.data.num_classes > 1:
    yield (
      "loss.terms: 'binary_cross_entropy' needs data.num_classes=1; nearest:"
      " 'cross_entropy'"
    )
  train, parallel = cfg.train, cfg.parallel
  if train.batch_size % train.accumulate:
    yield (
      f"train.accumulate={train.accumulate} does not divide"
      f" train.batch_size={train.batch_size}; nearest:"
      f" {_nearest_divisor(train.batch_size, train.accumulate)}"
    )
  if parallel.space > 1:
    yield from _space_faults(cfg)
  if (train.init_include or train.init_exclude) and not train.init_from:
    yield "train.init_from is empty: name a run, or leave out the patterns"
  warmup, steps = cfg.optimizer.warmup_steps, cfg.train.num_steps
  if warmup > steps:
    yield (
      f"optimizer.warmup_steps={warmup} is more than train.num_steps={steps};"
      f" nearest: {steps}"
    )


def _scoring_faults(cfg: Config) -> Iterator[str]:
  scores, labels, dims = cfg.eval, cfg.num_labels, cfg.model.dims
  chosen, boundary = scores.extra_metrics, scores.boundary_class
  if len(set(chosen)) != len(chosen):
    yield f"eval.extra_metrics={chosen} names one twice; leave it out"
  for name, metrics in EXTRA_METRICS.items():
    if scores.best_metric in metrics and name not in chosen:
      yield (
        f"eval.best_metric={scores.best_metric!r} is not computed; add {name!r}"
        " to eval.extra_metrics"
      )
  for name in ("warping", "isbi"):
    if name in chosen and dims != 2:
      yield (
        f"eval.extra_metrics: {name!r} is defined for two axes, not"
        f" model.dims={dims}; leave it out"
      )
  for field, ids in (
    ("instance_classes", scores.instance_classes),
    ("boundary_class", () if boundary is None else (boundary,)),
  ):
    if max(ids, default=0) >= labels:
      yield f"eval.{field}={max(ids)}: no such class; nearest: {labels - 1}"
  if boundary in scores.instance_classes:
    yield (
      f"eval.boundary_class={boundary} is also in eval.instance_classes; leave"
      " it out of one of the two"
    )
  if scores.instances_from == "watershed" and boundary is None:
    yield (
      "eval.instances_from='watershed' grows objects over eval.boundary_class;"
      " name it, or take nearest: 'components'"
    )
  if len(scores.spacing) not in (0, dims):
    yield (
      f"eval.spacing={scores.spacing}: give {dims} entries, one an axis, or"
      " none"
    )


def _space_faults(cfg: Config) -> Iterator[str]:
  """Images that several devices share must divide at every level."""
  space, size = cfg.parallel.space, cfg.data.crop_size[0]
  step = space * 2 ** cfg.model.depths[0]
  if cfg.parallel.strategy != "jit":
    yield (f"parallel.space={space} needs parallel.strategy='jit'; nearest: 1")
  if cfg.model.padding == "valid":
    yield (
      f"parallel.space={space}: with model.padding='valid' the devices' shares"
      " of a level differ; nearest: padding='same'"
    )
  if size % step:
    yield (
      f"data.crop_size: {size} pixels do not divide over parallel.space={space}"
      f" at every level; nearest: {max(step, round(size / step) * step)}"
    )
