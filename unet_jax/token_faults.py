"""Fields of a config that mean nothing for tokens, or nothing without them."""

import dataclasses
from collections.abc import Iterator

from unet_jax.schema import Config


def find_faults(cfg: Config) -> Iterator[str]:
  """Yields `field: what to do`, as `faults.find_faults`."""
  if cfg.data.source == "tokens":
    yield from _of_tokens(cfg)
    yield from _of_augmentation(cfg)
    yield from _of_buckets(cfg)
    return
  if cfg.model.embedding != "none":
    yield (
      f"model.embedding={cfg.model.embedding!r} needs data.source='tokens';"
      " nearest: 'none'"
    )
  if cfg.data.buckets:
    yield f"data.buckets={cfg.data.buckets} needs data.source='tokens'"
  if cfg.eval.best_metric in ("accuracy", "entity_f1"):
    yield (
      f"eval.best_metric={cfg.eval.best_metric!r} needs data.source='tokens';"
      " nearest: 'pixel_accuracy'"
    )


def _of_tokens(cfg: Config) -> Iterator[str]:
  data, model, predict = cfg.data, cfg.model, cfg.predict
  if not data.dir:
    yield (
      "data.dir is empty; name the folder with train.tsv and val.tsv:"
      " --config.data.dir=DIR"
    )
  wanted = {
    "model.dims": (model.dims, 1),
    "model.padding": (model.padding, "same"),
    "model.odd_size": (model.odd_size, "pad_input"),
    "data.normalize": (data.normalize, "none"),
    "data.channels": (data.channels, 1),
    "data.ignore_label": (data.ignore_label, None),
    "data.mask_values": (data.mask_values, ()),
    "data.weight_map": (data.weight_map, "none"),
    "data.foreground_share": (data.foreground_share, 0.0),
    "parallel.space": (cfg.parallel.space, 1),
    # Tags are written, and probabilities on request.
    "predict.mask_values": (predict.mask_values, "ids"),
    "predict.views": (predict.views, 1),
    "predict.uncertainty": (predict.uncertainty, "none"),
    "predict.dropout_samples": (predict.dropout_samples, 0),
    "predict.instances": (predict.instances, False),
  }
  for name, (value, only) in wanted.items():
    if value != only:
      yield (
        f"{name}={value!r} has no meaning for data.source='tokens'; nearest:"
        f" {only!r}"
      )
  if model.embedding == "none":
    yield "model.embedding='none': tokens have no intensity; nearest: 'both'"
  if model.skip == "shuffle":
    yield "model.skip='shuffle' takes images; nearest for tokens: 'zeros'"
  if others := set(cfg.eval.extra_metrics) - {"calibration"}:
    yield (
      f"eval.extra_metrics: {min(others)!r} is defined for images; for tokens"
      " there is 'calibration'"
    )
  if data.num_classes < 2:
    yield "data.num_classes=1: give the number of tags, at least 2"


def _of_augmentation(cfg: Config) -> Iterator[str]:
  for name, value in dataclasses.asdict(cfg.augment).items():
    if value and name != "elastic_grid":  # Which says nothing of its own.
      yield (
        f"augment.{name} changes images, and tokens are none; set"
        f" config.augment.{name}={False if value is True else 0}"
      )


def _of_buckets(cfg: Config) -> Iterator[str]:
  data, model = cfg.data, cfg.model
  if any(n >= cfg.data.crop_size[0] for n in data.buckets):
    yield (
      f"data.buckets={data.buckets}: lengths below data.crop_size="
      f"{cfg.data.crop_size[0]}, which is the longest itself"
    )
  step = 2**model.depth
  for n in data.buckets:
    if n % step:
      yield (
        f"data.buckets: {n} does not survive {model.depth} poolings; nearest:"
        f" {max(round(n / step), 1) * step}"
      )
