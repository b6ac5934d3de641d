"""The schema: every field of a run, its type, its default and its limits.

The dataclasses below are the only list of fields. Limits of one field stand
beside it; what is right alone but wrong together is in `faults`.
"""

import dataclasses
from typing import Any

from unet_jax import geometry
from unet_jax.presets import PRESETS

# Steps are counted in int32, and the step after the last one is named too.
_MAX_STEPS = 2**31 - 2
# A running average with decay 1 would never move.
_MAX_DECAY = 0.99999


# Scores that eval.extra_metrics adds, by the name that asks for them; the first
# of each is NaN where the others are too.
EXTRA_METRICS = {
  "surface": ("hd95", "asd", "nsd"),
  "rand": ("rand_error", "rand_precision", "rand_recall"),
  "vi": ("vi", "vi_split", "vi_merge"),
  "isbi": ("isbi_rand", "isbi_info"),
  "warping": ("warping_error",),
  "instances": ("ap", "ap50", "ap75", "f1", "pq", "aji"),
  "calibration": ("ece",),
}
# Scores of which less is better.
ERRORS = (
  *("loss", "hd95", "asd", "rand_error", "vi", "vi_split", "vi_merge"),
  *("warping_error", "ece"),
)


def _field(
  default: Any,
  *,
  choices: tuple[str, ...] = (),
  low: float | None = None,
  high: float | None = None,
) -> Any:
  """A dataclass field with its choices or its closed range [low, high]."""
  limits = {"choices": choices, "low": low, "high": high}
  return dataclasses.field(default=default, metadata=limits)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. Levels count from 0 = full resolution."""

  # A named network; it sets the fields of its PRESETS table.
  preset: str = _field("", choices=("", *PRESETS))
  # Spatial axes of the input.
  dims: int = _field(2, low=1, high=3)
  # Channels of every level, the bottleneck last.
  widths: tuple[int, ...] = _field((16, 32, 64, 128), low=1)
  # "same" keeps the size; "valid" loses a border, as in the paper.
  padding: str = _field("same", choices=("same", "valid"))
  # Sizes that are no multiple of 2^depth: pad the image by mirroring, or pad
  # each upsampled feature by 0 (milesial) or by its last pixel (MONAI).
  odd_size: str = _field(
    "pad_input", choices=("pad_input", "pad_up", "pad_up_replicate")
  )
  # What makes features of the tokens of data.source="tokens": word embeddings,
  # a convolution over character embeddings, or both side by side.
  embedding: str = _field(
    "none", choices=("none", "words", "characters", "both")
  )
  # Width of a word's embedding.
  word_width: int = _field(128, low=1)
  # Width of a character's embedding.
  character_width: int = _field(32, low=1)
  # Features of a word's characters.
  character_features: int = _field(64, low=1)
  # Rate at which training hides known words, so that the embedding of the
  # unknown word is trained too.
  word_dropout: float = _field(0.0, low=0.0, high=0.99)
  # Dropout rate of what the embedding gives.
  embedding_dropout: float = _field(0.0, low=0.0, high=0.99)
  # Normalisation after every 3x3 convolution.
  norm: str = _field("batch", choices=("none", "batch", "group", "instance"))
  # Statistics of norm="batch": over the global batch, or of each device's own
  # examples (the classic pmap form: the result depends on how many devices).
  norm_scope: str = _field("global", choices=("global", "device"))
  # Weight of the old running statistics of batch norm (PyTorch: 1 - momentum).
  norm_momentum: float = _field(0.9, low=0.0, high=_MAX_DECAY)
  # Groups of norm="group"; must divide every width.
  norm_groups: int = _field(8, low=1)
  # Activation after every 3x3 convolution.
  activation: str = _field("relu", choices=("relu", "leaky_relu", "gelu"))
  # Slope of activation="leaky_relu" below 0.
  leaky_slope: float = _field(0.01, low=0.0, high=1.0)
  # Whether 3x3 convolutions have a bias.
  bias: bool = _field(True)
  # What the network computes in; parameters, sums and metrics are float32.
  dtype: str = _field("float32", choices=("float32", "bfloat16"))
  # What the backward pass computes again instead of keeping it: nothing, all
  # inside a pair of convolutions, or all inside a level. XLA on CPU undoes it.
  remat: str = _field("none", choices=("none", "block", "level"))
  # How 3-wide convolutions are computed on CPU: in the fastest form, or XLA's.
  conv: str = _field("fast", choices=("fast", "xla"))
  # Short skips around each pair of convolutions (Drozdzal et al. 2016).
  residual: bool = _field(False)
  # Rate at which an example skips the convolutions of a residual block, in
  # training (Huang et al. 2016, the same at every depth).
  stochastic_depth: float = _field(0.0, low=0.0, high=0.99)
  # A gate a channel at the end of each pair of convolutions.
  squeeze_excite: bool = _field(False)
  # Dropout rate at the end of the contracting path (its last two levels).
  dropout: float = _field(0.0, low=0.0, high=0.99)
  # Dropout rate between the two convolutions of every pair.
  block_dropout: float = _field(0.0, low=0.0, high=0.99)
  # Downsampling: 2-wide max-pooling, or a learned 2-wide convolution, stride 2.
  pool: str = _field("max", choices=("max", "stride"))
  # The axes that each pooling halves, one entry a pooling, the finest first:
  # ("12", "012") leaves axis 0, of thick slices, alone at first; () = all axes.
  pool_axes: tuple[str, ...] = _field(())
  # What follows the convolutions of the coarsest level: nothing, or
  # self-attention layers over its pixels (TransUNet).
  bottleneck: str = _field("conv", choices=("conv", "transformer"))
  # Layers of bottleneck="transformer".
  bottleneck_layers: int = _field(2, low=1)
  # Their heads; must divide the last width.
  bottleneck_heads: int = _field(4, low=1)
  # Upsampling: learned, half-pixel linear, or linear with aligned corners.
  up: str = _field(
    "transpose", choices=("transpose", "linear", "linear_aligned")
  )
  # How features and skips are joined on the way up: the U, UNet++ or UNet 3+.
  decoder: str = _field("plain", choices=("plain", "nested", "full_scale"))
  # Each level of decoder="plain" ends with the width of the level above.
  narrow_decoder: bool = _field(False)
  # What the skip connection carries; formulas in unet_jax/models/skips.py. The
  # last four are controls: the capacity without the information.
  skip: str = _field(
    "concat",
    choices=(
      *("none", "concat", "add", "mul", "proj", "scalar"),
      *("respath", "se", "scse", "attn_oktay", "attn_same"),
      *("uctrans", "udtrans"),
      *("zeros", "noise", "shuffle", "dup"),
    ),
  )
  # Switches the skip of each level; () = all on.
  skip_levels: tuple[bool, ...] = _field(())
  # Kernel of the convolution that gives the logits.
  head_kernel: int = _field(1, low=1, high=3)
  # Logits of every decoder level (decoder="nested": of every column) in the
  # loss, with weights 1, 1/2, 1/4, ... normalised.
  deep_supervision: bool = _field(False)
  # decoder="full_scale" also learns which classes an image has, and predicts no
  # others.
  classification_guided: bool = _field(False)

  @property
  def depth(self) -> int:
    """Poolings."""
    return len(self.widths) - 1

  @property
  def depths(self) -> tuple[int, ...]:
    """Poolings of each axis."""
    factors = geometry.pool_factors(self.pool_axes, self.dims, self.depth)
    return tuple(
      sum(factor[axis] > 1 for factor in factors) for axis in range(self.dims)
    )

  @property
  def size_rule(self) -> str:
    """What `geometry` calls padding."""
    return geometry.size_rule(self.padding, self.odd_size)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where examples come from and how they are cut."""

  # The kind of source.
  source: str = _field(
    "synthetic", choices=("synthetic", "folder", "volumes", "tokens", "tfds")
  )
  # Folder of source="folder" and, for NIfTI and npy of three axes, "volumes":
  # images/ masks/ [train.txt val.txt test.txt]; of source="tokens": train.tsv
  # val.tsv [test.tsv]; of source="tfds" the folder that sets are prepared in,
  # "" = TFDS's own.
  dir: str = _field("")
  # Of source="tfds": NAME[/CONFIG][:VERSION], the latest version without one.
  name: str = _field("")
  # Its splits and their parts, as "train[:80%]"; "" = there is none.
  tfds_train: str = _field("train")
  # Likewise for val.
  tfds_val: str = _field("val")
  # Likewise for test.
  tfds_test: str = _field("test")
  # Its features; "" = "image", and the only other image that it has.
  image_feature: str = _field("")
  # The feature that holds label ids.
  mask_feature: str = _field("")
  # 1 = one sigmoid logit (background, foreground); K >= 2 = softmax.
  num_classes: int = _field(1, low=1, high=255)
  # Channels that the network sees; grey and colour are converted.
  channels: int = _field(1, low=1)
  # Input size of a training crop; one entry stands for all axes.
  crop_size: tuple[int, ...] = _field((64,), low=1)
  # Evaluation and prediction pad images to multiples of this, beside what the
  # network needs (1 = no more than that); larger = fewer shapes to compile.
  pad_multiple: int = _field(1, low=1)
  # Share of training crops that are made to hold a foreground pixel; others
  # hold one by chance.
  foreground_share: float = _field(0.0, low=0.0, high=1.0)
  # The classes that foreground_share means, each as often; () = 1..K-1.
  foreground_classes: tuple[int, ...] = _field((), low=0)
  # Pixels between objects count more in training, by the map of the 2015 paper.
  # Objects are the ids of instances/, or connected pixels of one class above 0.
  weight_map: str = _field("none", choices=("none", "instances", "components"))
  # Largest weight that the map adds (w0).
  w0: float = _field(10.0, low=0.0)
  # Its standard deviation in pixels, of the sum of two distances.
  sigma: float = _field(5.0, low=0.01)
  # Training labels become background where two objects touch, as in the paper.
  separate: bool = _field(False)
  # Label id that counts nowhere: not in the loss, not in a metric.
  ignore_label: int | None = _field(None, low=0, high=255)
  # The id in the mask files of class 0, 1, ...; () = files hold class ids.
  mask_values: tuple[int, ...] = _field((), low=0, high=255)
  # Intensities: unchanged, each image to mean 0 and standard deviation 1, or
  # by the mean and standard deviation of the training split.
  normalize: str = _field("image", choices=("none", "image", "dataset"))
  # Two percentiles, such as (0.5, 99.5): values of an image below and above
  # them become them, before anything else; () = nothing is clipped.
  clip_percentiles: tuple[float, ...] = _field((), low=0.0, high=100.0)
  # Masks whose label ids are checked before training; check is by header else.
  check_masks: int = _field(500, low=0)
  # Voxel spacing, an entry an axis, that volumes are resampled to as they are
  # read, where their header tells theirs; predicted masks come back on the grid
  # of the file. Scores are those of the resampled masks. () = as they are.
  spacing: tuple[float, ...] = _field((), low=1e-9)
  # Images with more pixels are refused before they are decoded.
  max_pixels: int = _field(2**27, low=1)
  # Share of the val split, made when the folder has no split file.
  val_fraction: float = _field(0.15, low=0.0, high=0.9)
  # Share of the test split, likewise.
  test_fraction: float = _field(0.15, low=0.0, high=0.9)
  # Column of the tag in a .tsv, from 1 = the form.
  tag_column: int = _field(2, low=2)
  # Words and characters that train.tsv has less often are unknown.
  min_count: int = _field(2, low=1)
  # Rows of the word embedding, two of them for padding and the unknown; of more
  # words the most frequent are known.
  num_words: int = _field(10000, low=3)
  # Rows of the character embedding, likewise.
  num_characters: int = _field(128, low=3)
  # Characters of a token that the network sees; of a longer one both ends.
  max_characters: int = _field(16, low=1)
  # Lengths below crop_size that short sentences are padded to; each is one more
  # shape to compile.
  buckets: tuple[int, ...] = _field((), low=1)
  # Cross-validation: train and val together, shuffled, are cut into so many
  # folds; 0 = as the split says. The test split stays.
  num_folds: int = _field(0, low=0)
  # Which of them is val, from 0.
  fold: int = _field(0, low=0)
  # Host threads that read and decode.
  num_threads: int = _field(2, low=1)
  # Size of a synthetic image; one entry stands for all axes.
  synthetic_size: tuple[int, ...] = _field((64,), low=8)
  # Number of synthetic examples in train.
  synthetic_train: int = _field(256, low=1)
  # Likewise for val.
  synthetic_val: int = _field(32, low=1)
  # Likewise for test.
  synthetic_test: int = _field(32, low=1)
  # None = bright cells. A number: cells differ from the background by the grain
  # of their texture alone, from 0 = clearly to 1 = not at all.
  synthetic_texture: float | None = _field(None, low=0.0, high=1.0)
  # Above 0 there is a split "shifted" beside test: the same cells, so much
  # nearer to the background. Studies score it too.
  synthetic_shift: float = _field(0.0, low=0.0, high=1.0)

  @property
  def examples(self) -> str:
    """What messages call the examples."""
    return "sentences" if self.source == "tokens" else "images"


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """Random changes of training crops, inside the step. 0 or False = off."""

  # Mirror each axis with probability 1/2.
  flip: bool = _field(True)
  # Random quarter turns in every plane (half turns where the sides of the crop
  # differ, or the spacings of a volume).
  turn: bool = _field(True)
  # Largest shift, as a share of the crop's side.
  shift: float = _field(0.0, low=0.0, high=1.0)
  # Largest rotation in degrees, either way, in every plane; of volumes in
  # space, whatever their spacing.
  rotate: float = _field(0.0, low=0.0, high=180.0)
  # Largest relative change of scale: 0.2 = from 1/1.2 to 1.2.
  scale: float = _field(0.0, low=0.0, high=4.0)
  # Standard deviation in pixels of the elastic displacements (paper: 10); of
  # volumes in pixels of the axis where they are closest.
  elastic: float = _field(0.0, low=0.0)
  # Points an axis of the coarse displacement grid (paper: 3).
  elastic_grid: int = _field(3, low=2)
  # Largest additive change, in units of the crop's standard deviation.
  brightness: float = _field(0.0, low=0.0)
  # Largest relative change of contrast: 0.2 = from 1/1.2 to 1.2.
  contrast: float = _field(0.0, low=0.0, high=8.0)
  # Largest exponent of a gamma curve: 0.5 = from 1/1.5 to 1.5.
  gamma: float = _field(0.0, low=0.0, high=8.0)
  # Largest standard deviation of Gaussian noise, in units of the crop's.
  noise: float = _field(0.0, low=0.0)
  # Rate at which a crop gets a box of the batch's next one, mask and all (Yun
  # et al. 2019). Made on the host, before all others.
  cutmix: float = _field(0.0, low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """A weighted sum of losses."""

  # Names in unet_jax/objectives/losses.py.
  terms: tuple[str, ...] = _field(
    ("cross_entropy", "dice"),
    choices=(
      *("cross_entropy", "binary_cross_entropy", "focal", "top_k"),
      *("dice", "tversky", "focal_tversky"),
      *("lovasz", "lovasz_hinge", "boundary"),
    ),
  )
  # Factor of each term; () = 1 each.
  weights: tuple[float, ...] = _field((), low=0.0)
  # Factor of each class 0..K-1 (two for num_classes=1); () = 1 each.
  class_weights: tuple[float, ...] = _field((), low=0.0)
  # Those factors from the training split, kept in class_weights.json: its
  # pixels over (classes x pixels of the class).
  balanced: bool = _field(False)
  # Share of the truth that cross_entropy spreads over all classes.
  label_smoothing: float = _field(0.0, low=0.0, high=1.0)
  # Exponent of "focal"; 0 = cross_entropy.
  focal_gamma: float = _field(2.0, low=0.0)
  # Share of the pixels, the hardest, that "top_k" averages over.
  top_k_share: float = _field(0.1, low=1e-6, high=1.0)
  # Price of what is invented in "tversky" and "focal_tversky".
  tversky_alpha: float = _field(0.3, low=0.0)
  # Price of what is missed, likewise.
  tversky_beta: float = _field(0.7, low=0.0)
  # "focal_tversky" takes this root; 1 = tversky.
  tversky_gamma: float = _field(4 / 3, low=0.1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The update rule and its schedule."""

  # The rule.
  name: str = _field("adamw", choices=("sgd", "adam", "adamw"))
  # Peak learning rate.
  learning_rate: float = _field(1e-3, low=0.0)
  # Shape of the learning rate after warm-up.
  schedule: str = _field("cosine", choices=("constant", "cosine", "polynomial"))
  # Steps of linear growth from 0.
  warmup_steps: int = _field(0, low=0, high=_MAX_STEPS)
  # Last learning rate as a share of the peak (cosine, polynomial).
  end_factor: float = _field(0.0, low=0.0, high=1.0)
  # Exponent of schedule="polynomial".
  power: float = _field(0.9, low=0.0)
  # Momentum of sgd; first-moment decay (b1) of adam and adamw.
  momentum: float = _field(0.9, low=0.0, high=_MAX_DECAY)
  # Second-moment decay of adam.
  b2: float = _field(0.999, low=0.0, high=_MAX_DECAY)
  # Decay of kernels; biases and norms are left alone. Decoupled for adamw,
  # added to the gradient for sgd and adam.
  weight_decay: float = _field(1e-4, low=0.0)
  # Largest global gradient norm; 0 = no clipping.
  clip_norm: float = _field(0.0, low=0.0)
  # Decay of the exponential moving average used at evaluation; 0 = none.
  ema_decay: float = _field(0.0, low=0.0, high=_MAX_DECAY)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop. Every *_every counts steps; 0 = only at the end."""

  # Optimizer steps of the whole run; a finished run may be extended.
  num_steps: int = _field(300, low=1, high=_MAX_STEPS)
  # Examples a step, over all devices and hosts.
  batch_size: int = _field(8, low=1)
  # Microbatches that a step works through one after another, for less memory.
  # The gradient is that of the whole batch, but batch norm sees a microbatch.
  accumulate: int = _field(1, low=1)
  # How often a train line is written.
  log_every: int = _field(20, low=0, high=_MAX_STEPS)
  # How often eval.split is scored.
  eval_every: int = _field(100, low=0, high=_MAX_STEPS)
  # How often the state is saved, beside each evaluation.
  checkpoint_every: int = _field(100, low=0, high=_MAX_STEPS)
  # Latest checkpoints kept, beside the best.
  keep_checkpoints: int = _field(2, low=1)
  # Steps in a row with a non-finite loss or gradient that stop the run.
  max_skipped: int = _field(5, low=1, high=_MAX_STEPS)
  # Steps recorded by the JAX profiler, after step 5; 0 = no trace.
  profile_steps: int = _field(0, low=0, high=_MAX_STEPS)
  # Also measure, at the joins of each level: the norms of the gradient through
  # the skip and through the deeper path, and the skip's share of the energy.
  probe_skips: bool = _field(False)
  # Images of the validation split drawn at each evaluation.
  num_pictures: int = _field(4, low=0)
  # Folder of another run whose best weights step 0 starts from; "" = none.
  init_from: str = _field("")
  # Which: shell patterns of paths such as "params/encoder_0/Conv_0/kernel",
  # where * crosses slashes ("*/encoder_*"); () = all that both networks have.
  init_include: tuple[str, ...] = _field(())
  # Which not, though included: "*/head/*".
  init_exclude: tuple[str, ...] = _field(())


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Scoring. Every image whole, at its own size, exactly once."""

  # What evaluation scores.
  split: str = _field("val", choices=("train", "val", "test", "shifted"))
  # Most images in one batch.
  batch_size: int = _field(8, low=1)
  # Most pixels in one batch (one image a device at least).
  batch_pixels: int = _field(2**20, low=1)
  # Which metric, and so which checkpoint, is best; a larger value is better,
  # except for the loss, errors and distances. Any of extra_metrics' too.
  best_metric: str = _field(
    "dice",
    choices=(
      *("dice", "iou", "dice_per_image", "pixel_accuracy", "loss"),
      *("accuracy", "entity_f1"),
      *(name for names in EXTRA_METRICS.values() for name in names),
    ),
  )
  # Classes that `dice` and `iou` average over; () = 1..K-1.
  foreground: tuple[int, ...] = _field((), low=0)
  # Also: does high uncertainty (entropy) find errors? The area under the curve
  # of risk over coverage, for pixels and for images.
  risk_coverage: bool = _field(False)
  # Columns of model.decoder="nested" that evaluation and prediction use, L1 to
  # L4 of UNet++; 0 = all. Needs model.deep_supervision.
  prune: int = _field(0, low=0)
  # Scores computed on the host, for each image; unet_jax/scoring.py says what
  # they are and what they need. The log says what they cost.
  extra_metrics: tuple[str, ...] = _field((), choices=tuple(EXTRA_METRICS))
  # How predicted pixels become objects: pieces that hang together, or those
  # grown over the boundary class by a watershed.
  instances_from: str = _field(
    "components", choices=("components", "watershed")
  )
  # Classes of the objects; () = 1..K-1 but for the boundary class.
  instance_classes: tuple[int, ...] = _field((), low=0)
  # Class of the pixels between objects that touch, for the watershed.
  boundary_class: int | None = _field(None, low=0)
  # Least probability of a pixel that the watershed starts from.
  seed_probability: float = _field(0.5, low=0.0, high=1.0)
  # Size of a pixel along each axis, for surface distances; () = as the data
  # say, or 1.
  spacing: tuple[float, ...] = _field((), low=1e-9)
  # Distance up to which surfaces agree (nsd), in the same unit.
  surface_tolerance: float = _field(1.0, low=0.0)
  # Also find, for each image, the size of each object (connected part) of the
  # truth and how much of it was found; studies then show it by size.
  objects: bool = _field(False)
  # Also score with the skips of one level at a time zeroed, averaged over the
  # image, or taken from the next image: three more passes a level.
  probe_skips: bool = _field(False)


@dataclasses.dataclass(frozen=True)
class PredictConfig:
  """What `--mode predict` writes."""

  # "ids" = class ids; "scaled" = ids spread over 0..255 (0/255 for one class);
  # "palette" = ids in a PNG that shows them in colours, "colors" = the colours
  # (in 2D).
  mask_values: str = _field(
    "ids", choices=("ids", "scaled", "palette", "colors")
  )
  # Also write STEM_probability.npy, float32 [*S, K].
  probability: bool = _field(False)
  # Most images to predict; 0 = all.
  max_images: int = _field(0, low=0)
  # Size of the tiles that large images are cut into, one entry for all axes;
  # smaller images are mirrored up to it, so that there is one compilation.
  # () = images are predicted whole up to `whole_pixels`, beyond in tiles of
  # about eval.batch_pixels.
  tile: tuple[int, ...] = _field((), low=1)
  # Largest image that is predicted whole where `tile` is ().
  whole_pixels: int = _field(2**22, low=1)
  # Tiles in one batch.
  tile_batch: int = _field(1, low=1)
  # Views whose probabilities are averaged: 1, or 8 flips and turns in 2D (the 8
  # mirrors in 3D, 2 in 1D).
  views: int = _field(1, low=1, high=8)
  # Also write STEM_uncertainty.png and predictions.json and .csv: the entropy
  # of the mean probability, or what members or dropout samples disagree on.
  uncertainty: str = _field(
    "none", choices=("none", "entropy", "mutual_information")
  )
  # Passes with dropout on, whose probabilities are averaged; 0 = one without.
  dropout_samples: int = _field(0, low=0)
  # Also write STEM_instances.png: the connected regions, numbered, 16-bit.
  instances: bool = _field(False)
  # Also write STEM_polygons.geojson: their outlines (in 2D).
  polygons: bool = _field(False)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
  """How the step is spread over devices."""

  # "jit": global arrays over a mesh; "pmap": the same step, a copy a device.
  strategy: str = _field("jit", choices=("jit", "pmap"))
  # Devices that share one image, cut along its first axis ("jit").
  space: int = _field(1, low=1)


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """What may differ wherever the run goes on: it changes no number."""

  # Folder of compiled programs: "user" = in the user's cache folder, "" = none.
  compilation_cache: str = _field("user")
  # Most megabytes of decoded examples that training keeps in memory; 0 = none.
  example_cache_mb: int = _field(1024, low=0)
  # Folder of weight maps: "user" = in the user's cache folder, "" = none.
  map_cache: str = _field("user")
  # Without a step for so long, the run prints where it hangs and ends; 0 = it
  # waits for ever.
  hang_seconds: int = _field(3600, low=0)
  # Without a sign of life from another host for so long, the run ends.
  heartbeat_seconds: int = _field(100, low=10)
  # A damaged checkpoint ends the run; else the one before it takes its place.
  strict_restore: bool = _field(False)


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """An ablation study: the arms of the config file's `sweep()`, repeated."""

  # Every arm is trained with each of these seeds; data order and augmentation
  # of a seed are the same in every arm.
  seeds: tuple[int, ...] = _field((0, 1, 2), low=0, high=2**31 - 1)
  # Only these arms, by name, and the baseline of each of their groups; empty =
  # all. More can be named later, in the same folder.
  arms: tuple[str, ...] = _field(())
  # What all arms get: equally many steps, or multiply-accumulates, or seconds
  # (arms dearer than the baseline take fewer steps). Seconds are measured, so
  # the steps depend on the machine; budget.json keeps them.
  budget: str = _field("steps", choices=("steps", "macs", "seconds"))
  # Differences of the score within +- this do not matter.
  margin: float = _field(0.01, low=1e-9)
  # The report also shows a percentile bootstrap's intervals, which are too
  # narrow with few seeds.
  bootstrap: bool = _field(False)
  # Difficult images that are kept of each arm, and drawn in the report.
  num_pictures: int = _field(4, low=0)


@dataclasses.dataclass(frozen=True)
class Config:
  """One run. Everything random in it is a function of `seed`."""

  seed: int = _field(0, low=0, high=2**31 - 1)
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  augment: AugmentConfig = AugmentConfig()
  loss: LossConfig = LossConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  predict: PredictConfig = PredictConfig()
  parallel: ParallelConfig = ParallelConfig()
  runtime: RuntimeConfig = RuntimeConfig()
  study: StudyConfig = StudyConfig()

  @property
  def num_labels(self) -> int:
    """Label ids that a mask may hold: two for the one sigmoid logit."""
    return max(self.data.num_classes, 2)

  @property
  def input_size(self) -> tuple[int, ...]:
    """The training crop as the network sees it: [*S, C].

    The "channels" of a token are the id of its word and of each character.
    """
    data = self.data
    ids = data.source == "tokens"
    return (*data.crop_size, 1 + data.max_characters if ids else data.channels)
