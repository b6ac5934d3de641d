"""Every variant trains: the loss of a fixed batch falls.

In `make test` a covering of all pairs of skip, decoder and rank; the whole
matrix is slow.
"""

import itertools

import jax
import numpy as np
import pytest

from tests.models.variants import DECODERS, PAIRS, REFUSED, SKIPS, fresh
from unet_jax import config as config_lib
from unet_jax import state as state_lib
from unet_jax.errors import UserError
from unet_jax.models import build_model
from unet_jax.objectives import losses
from unet_jax.optimizer import make_optimizer, make_schedule
from unet_jax.schema import OptimizerConfig
from unet_jax.train_step import make_train_step

SIZE, STEPS = 16, 30
MATRIX = [(s, d, rank) for s, d in PAIRS for rank in (1, 2, 3)]


def covering():
  """For each skip and decoder one rank, going round; all pairs occur."""
  chosen = [
    (s, d, (SKIPS.index(s) + DECODERS.index(d)) % 3 + 1) for s, d in PAIRS
  ]
  # Skips that not every decoder takes have not met every rank.
  met = {(s, rank) for s, _, rank in chosen}
  missing = [
    (s, "plain", rank)
    for s, rank in itertools.product(SKIPS, (1, 2, 3))
    if (s, rank) not in met
  ]
  return chosen + missing


def train(skip, decoder, rank, **fields):
  """Losses of a few steps on one batch."""
  model = build_model(
    num_classes=2,
    dims=rank,
    widths=(4, 4, 4),
    skip=skip,
    decoder=decoder,
    **fields,
  )
  cfg = OptimizerConfig(learning_rate=0.02, schedule="constant")
  tx = make_optimizer(cfg)
  loss_fn = losses.make_loss(
    terms=("cross_entropy",), weights=(), class_weights=()
  )
  step = jax.jit(
    make_train_step(
      model=model, loss_fn=loss_fn, tx=tx, schedule=make_schedule(cfg, STEPS)
    )
  )
  rng = np.random.default_rng(0)
  # Blocks as large as a bottleneck pixel: to be learned without any skip too.
  image = rng.normal(size=(2, *(SIZE // 4,) * rank, 1)).astype(np.float32)
  for axis in range(1, rank + 1):
    image = image.repeat(4, axis)
  label = (image[..., 0] > 0).astype(np.int32)
  batch = {
    "id": np.arange(2, dtype=np.int32),
    "image": image,
    "label": label,
    "weight": np.ones(label.shape, np.float32),
    "valid": np.ones(2, np.float32),
  }
  shape = (1, *image.shape[1:])
  state = jax.eval_shape(
    lambda key: state_lib.init_state(model, tx, key, shape), jax.random.key(0)
  )
  state, values = fresh(state), []  # Drawn by NumPy: nothing to compile.
  for _ in range(STEPS):
    state, sums = step(state, batch, jax.random.key(1))
    assert sums.finite
    values.append(float(sums.loss.total) / float(sums.loss.count))
  return values


def test_the_covering_covers_every_pair():
  cases = covering()
  assert {c[:2] for c in cases} == set(PAIRS)
  for other in (0, 1):
    pairs = {(c[other], c[2]) for c in cases}
    names = (SKIPS, DECODERS)[other]
    assert pairs == set(itertools.product(names, (1, 2, 3)))


def covering_cases():
  """Those of two axes, all skips and all decoders among them, are fast."""
  for case in covering():
    marks = () if case[2] == 2 else pytest.mark.slow
    yield pytest.param(*case, marks=marks)


@pytest.mark.parametrize(("skip", "decoder", "rank"), [*covering_cases()])
def test_a_pairwise_covering_trains(skip, decoder, rank):
  values = train(skip, decoder, rank)
  assert values[-1] < 0.9 * values[0]


@pytest.mark.slow
@pytest.mark.parametrize(("skip", "decoder", "rank"), MATRIX)
def test_the_whole_matrix_trains(skip, decoder, rank):
  values = train(skip, decoder, rank)
  assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize(
  "fields",
  [
    {"decoder": "plain", "residual": True, "squeeze_excite": True},
    {"decoder": "nested", "deep_supervision": True, "pool": "stride"},
    {
      "decoder": "full_scale",
      "deep_supervision": True,
      "classification_guided": True,
      "up": "linear",
    },
    {
      "decoder": "plain",
      "bottleneck": "transformer",
      "block_dropout": 0.1,
      "deep_supervision": True,
      "norm": "group",
      "norm_groups": 2,
    },
  ],
)
@pytest.mark.parametrize(
  "rank", [1, 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_blocks_bottlenecks_and_deep_supervision_train(fields, rank):
  values = train("concat", rank=rank, **fields)
  assert values[-1] < values[0]


def parse(**fields):
  config = config_lib.default_config()
  for key, text in fields.items():
    config_lib.override(config, key.replace("__", "."), text)
  return config_lib.parse(config)


def test_the_config_accepts_and_refuses_the_same_pairs():
  for skip, decoder in itertools.product(SKIPS, DECODERS):
    fields = {"model__skip": skip, "model__decoder": decoder}
    if (skip, decoder) not in REFUSED:
      parse(**fields)
      continue
    with pytest.raises(UserError, match=f"{skip}.*{decoder}"):
      parse(**fields)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"decoder": "full_scale", "padding": "valid"}, "share no grid"),
    ({"skip": "uctrans", "padding": "valid"}, "same grid of patches"),
    ({"skip": "udtrans", "odd_size": "pad_up"}, "same grid of patches"),
    ({"odd_size": "pad_up", "padding": "valid"}, "needs padding='same'"),
    ({"head_kernel": "3", "padding": "valid"}, "needs padding='same'"),
    ({"head_kernel": "2"}, "half a pixel; nearest: 1"),
    ({"skip": "none", "skip_levels": "1,0,1"}, "no wire to switch"),
    ({"narrow_decoder": "1", "decoder": "nested"}, "no meaning"),
    ({"classification_guided": "1"}, "no meaning"),
    ({"bottleneck": "transformer", "bottleneck_heads": "3"}, "nearest: 2"),
  ],
)
def test_parts_without_a_common_meaning_are_refused_with_a_reason(
  fields, match
):
  # 92 pixels are legal for valid padding at depth 3.
  size = {"data__crop_size": "92"} if "padding" in fields else {}
  with pytest.raises(UserError, match=match):
    parse(**size, **{f"model__{k}": v for k, v in fields.items()})


def test_pruning_and_shuffling_need_something_to_prune_and_shuffle():
  nested = {"model__decoder": "nested", "model__deep_supervision": "1"}
  assert parse(eval__prune="2", **nested).eval.prune == 2
  for fields, match in (
    ({"eval__prune": "4", **nested}, "no such column; nearest: 3"),
    ({"eval__prune": "2"}, "needs model.decoder='nested'"),
    ({"model__skip": "shuffle", "train__batch_size": "1"}, "nearest: 2"),
    ({"model__norm": "instance", "data__crop_size": "8"}, "nearest: 16"),
  ):
    with pytest.raises(UserError, match=match):
      parse(**fields)
