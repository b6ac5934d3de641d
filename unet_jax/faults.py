"""Fields of a config that are right alone but wrong together."""

import math
from collections.abc import Iterator

from unet_jax import geometry, token_faults
from unet_jax.schema import EXTRA_METRICS, Config


def find_faults(cfg: Config) -> Iterator[str]:
  """Yields `field: what to do` for what is right alone but wrong together."""
  yield from token_faults.find_faults(cfg)
  yield from _model_faults(cfg)
  yield from _data_faults(cfg)
  yield from _crop_faults(cfg)
  yield from _loss_faults(cfg)
  yield from _predict_faults(cfg)
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
  if model.stochastic_depth and not model.residual:
    yield (
      f"model.stochastic_depth={model.stochastic_depth} skips the convolutions"
      " of residual blocks; add model.residual=true"
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


def _volume_faults(cfg: Config) -> Iterator[str]:
  dims, clip = cfg.model.dims, cfg.data.clip_percentiles
  if cfg.data.source == "volumes" and dims != 3:
    yield (
      f"data.source='volumes' has 3 axes but model.dims={dims}; nearest: 3"
    )
  if cfg.data.spacing and cfg.data.source != "volumes":
    yield (
      f"data.spacing={cfg.data.spacing} has no meaning for data.source="
      f"{cfg.data.source!r}, whose files tell none; nearest: ()"
    )
  if len(cfg.data.spacing) not in (0, 3):
    yield f"data.spacing={cfg.data.spacing}: give 3 entries, one an axis"
  if clip and not (len(clip) == 2 and clip[0] < clip[1]):
    yield (
      f"data.clip_percentiles={clip}: give a lower and an upper one; nearest:"
      " (0.5, 99.5)"
    )


def _data_faults(cfg: Config) -> Iterator[str]:
  data, labels = cfg.data, cfg.num_labels
  ignored, values = data.ignore_label, data.mask_values
  yield from _volume_faults(cfg)
  if data.source in ("folder", "volumes") and not data.dir:
    yield (
      "data.dir is empty; name the folder with images/ and masks/:"
      " --config.data.dir=DIR"
    )
  if data.source == "tfds" and not data.name:
    yield ("data.name is empty; name a prepared set: --config.data.name=NAME")
  if data.source == "tfds" and cfg.model.dims != 2:
    dims = cfg.model.dims
    yield f"model.dims={dims}: pictures of tfds have 2 axes; nearest: 2"
  if ignored is not None and not values and ignored < labels:
    yield f"data.ignore_label={ignored} is a class; nearest: {labels}"
  if values and not len(values) == len(set(values)) == labels:
    yield f"data.mask_values={values}: give {labels} different ids, one a class"
  if ignored in values:
    yield (
      f"data.ignore_label={ignored} is also in data.mask_values; leave it out"
      " of one of the two"
    )
  if data.num_folds == 1 or (data.fold and data.fold >= data.num_folds):
    yield (
      f"data.fold={data.fold} of data.num_folds={data.num_folds}: give two"
      " folds or more, and one of 0..num_folds - 1"
    )
  if data.num_folds and data.source not in ("folder", "volumes"):
    yield (
      f"data.num_folds={data.num_folds} cuts up a folder, not"
      f" data.source={data.source!r}; nearest: 0"
    )
  if data.val_fraction + data.test_fraction > 0.95:
    yield (
      "data.val_fraction + data.test_fraction leave nothing to train on;"
      " nearest: 0.15 each"
    )
  textured = data.source == "synthetic" and data.synthetic_texture is not None
  if data.synthetic_shift and not textured:
    yield (
      f"data.synthetic_shift={data.synthetic_shift} is of a texture: set"
      " data.synthetic_texture too, or leave it out"
    )
  if textured and labels > 2:
    yield (
      f"data.synthetic_texture has one kind of cell; data.num_classes="
      f"{data.num_classes}; nearest: 2"
    )
  if cfg.eval.split == "shifted" and not data.synthetic_shift:
    yield (
      "eval.split='shifted' needs data.synthetic_shift; nearest:"
      " eval.split='test'"
    )
  if max(cfg.eval.foreground, default=0) >= labels:
    yield (
      f"eval.foreground={cfg.eval.foreground}: no such class; nearest:"
      f" {labels - 1}"
    )


def _crop_faults(cfg: Config) -> Iterator[str]:
  data, labels = cfg.data, cfg.num_labels
  if max(data.foreground_classes, default=0) >= labels:
    yield (
      f"data.foreground_classes={data.foreground_classes}: no such class;"
      f" nearest: {labels - 1}"
    )
  if data.separate and data.weight_map == "none":
    yield (
      "data.separate needs to know the objects; add data.weight_map=instances"
      " (or components, w0 may be 0)"
    )
  if cfg.augment.cutmix and cfg.train.batch_size < 2:
    yield (
      "augment.cutmix takes from another crop of the batch, and"
      " train.batch_size=1 has none; nearest: 2"
    )


def _predict_faults(cfg: Config) -> Iterator[str]:
  predict, model = cfg.predict, cfg.model
  if predict.views not in (1, 8):
    yield f"predict.views={predict.views}: one or all; nearest: 8"
  if predict.views > 1 and model.dims == 2 and len(set(model.depths)) > 1:
    yield (
      f"predict.views={predict.views} turns images, of which model.pool_axes="
      f"{model.pool_axes} pools the axes unequally; nearest: 1"
    )
  for axis, size in enumerate(predict.tile):
    try:
      geometry.output_size(size, model.depths[axis], model.size_rule)
    except ValueError as error:
      yield f"predict.tile, axis {axis}: {error}"
  if predict.dropout_samples and not (model.dropout or model.block_dropout):
    yield (
      f"predict.dropout_samples={predict.dropout_samples}: the network drops"
      " nothing, so all would be equal; nearest: 0"
    )
  flat = predict.polygons or predict.mask_values in ("palette", "colors")
  if model.dims != 2 and flat:
    yield (
      f"predict.polygons, and mask_values={predict.mask_values!r}, are of"
      f" pictures, but model.dims={model.dims}; leave them out"
    )


def _loss_faults(cfg: Config) -> Iterator[str]:
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
  if loss.balanced and loss.class_weights:
    yield "loss.balanced finds loss.class_weights; leave one of the two out"
  for name, nearest in (
    ("binary_cross_entropy", "cross_entropy"),
    ("lovasz_hinge", "lovasz"),
  ):
    if name in terms and cfg.data.num_classes > 1:
      yield (
        f"loss.terms: {name!r} needs data.num_classes=1; nearest: {nearest!r}"
      )


def _training_faults(cfg: Config) -> Iterator[str]:
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
