"""bfloat16: what is computed in it, what is not, and how near it comes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests.models.variants import DECODERS, PAIRS, SKIPS, fill
from unet_jax import conv, precision
from unet_jax import state as state_lib
from unet_jax.inspect import cost
from unet_jax.models import build_model
from unet_jax.models.skips import Context
from unet_jax.objectives import losses
from unet_jax.optimizer import make_optimizer, make_schedule
from unet_jax.schema import OptimizerConfig
from unet_jax.train_step import make_train_step

SIZE, WIDTHS = 16, (4, 4, 4)
# Two examples, each the other's partner.
CONTEXT = Context(id=jnp.arange(2), partner=jnp.array([1, 0]))
RNGS = {"dropout": jax.random.key(0), "noise": jax.random.key(1)}
# Everything but skips and decoders that touches an array.
BLOCKS = [
  *({"norm": norm, "norm_groups": 2} for norm in ("none", "group", "instance")),
  *({"up": up} for up in ("linear", "linear_aligned")),
  {"residual": True, "squeeze_excite": True, "activation": "gelu"},
  {"pool": "stride", "activation": "leaky_relu", "odd_size": "pad_up"},
  {"bottleneck": "transformer", "block_dropout": 0.1, "dropout": 0.1},
  {"decoder": "nested", "deep_supervision": True, "up": "linear"},
  {
    "decoder": "full_scale",
    "deep_supervision": True,
    "classification_guided": True,
    "up": "linear",
  },
]
CASES = [{"skip": skip, "decoder": decoder} for skip, decoder in PAIRS] + BLOCKS


def make(rank, dtype="bfloat16", **fields):
  fields = {"widths": WIDTHS, **fields}
  return build_model(num_classes=2, dims=rank, dtype=dtype, **fields)


def image_of(rank):
  rng = np.random.default_rng(0)
  return rng.normal(size=(2, *(SIZE,) * rank, 4)).astype(np.float32)


def gradient(model, x):
  """(variables, x) -> gradient of all outputs, as in training."""

  def total(variables, x):
    outputs, _ = model.apply(
      variables,
      x,
      train=True,
      context=CONTEXT,
      every_output=True,
      rngs=RNGS,
      mutable=["batch_stats"],
    )
    return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs))

  return jax.grad(total)


def whole():
  """Every case in every rank; all but one rank, going round, are slow."""
  for i, fields in enumerate(CASES):
    for rank in (1, 2, 3):
      quick = rank == (i + i // 3) % 3 + 1
      yield pytest.param(fields, rank, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("fields", "rank"), [*whole()], ids=str)
def test_products_are_in_bfloat16_and_long_sums_are_not(fields, rank):
  model, x = make(rank, **fields), image_of(rank)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  jaxpr = jax.make_jaxpr(gradient(model, x))(variables, x)
  products = 0
  for eqn in cost.all_eqns(jaxpr.eqns):
    name, operands = eqn.primitive.name, [v.aval for v in eqn.invars]
    if name in ("conv_general_dilated", "dot_general"):
      assert {x.dtype for x in operands} == {jnp.dtype("bfloat16")}, eqn
      products += 1
    if name == "reduce_sum" and operands[0].dtype == jnp.bfloat16:
      # What is spread over a patch's pixels, one axis after the other.
      assert operands[0].size <= 4 * eqn.outvars[0].aval.size, eqn
  # Of every kernel the product, and the gradients that anything needs.
  kernels = [k for k in flat(variables) if k.endswith("kernel")]
  assert products > 2 * len(kernels)


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"conv": "xla"},
    {"residual": True, "squeeze_excite": True},
    {"bottleneck": "transformer"},
  ],
  ids=str,
)
def test_no_kernels_gradient_is_rounded(fields):
  x = image_of(2)
  model = make(2, **fields)
  grads = jax.jit(gradient(model, x))(fill(model, x), x)["params"]
  for name, grad in flat(grads).items():
    if name.endswith("kernel"):
      rounded = grad.astype(jnp.bfloat16).astype(jnp.float32)
      # Of a hundred numbers of 24 bits, none has 16 zeros at the end.
      assert grad.size < 8 or not np.array_equal(grad, rounded), name


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
  ("size", "taps", "strides", "pads", "seam"),
  [
    ((9,), (3,), (1,), ((1, 1),), 0),
    ((40, 40), (3, 3), (1, 1), ((1, 1), (1, 1)), 3),  # Row blocks.
    ((64, 64), (3, 3), (1, 1), ((0, 0), (0, 0)), 0),
    ((10, 11), (3, 3), (2, 2), ((0, 1), (1, 1)), 0),
    ((64, 64), (2, 2), (2, 2), ((0, 0), (0, 0)), 0),  # Patches.
    ((6, 7, 9), (3, 3, 3), (1, 1, 1), ((1, 1),) * 3, 4),
    ((5, 5), (1, 1), (1, 1), ((0, 0), (0, 0)), 0),
  ],
  ids=str,
)
def test_a_kernels_gradient_is_the_sum_of_exact_products(
  size, taps, strides, pads, seam, fast
):
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(2, *size, 8)), jnp.bfloat16)
  kernel = jnp.asarray(rng.normal(size=(*taps, 8, 16)), jnp.float32)
  form = functools.partial(conv.conv_general_dilated, seam=seam, fast=fast)
  y, back = jax.vjp(lambda x, k: form(x, k, strides, pads), x, kernel)
  dy = jnp.asarray(rng.normal(size=y.shape), jnp.bfloat16)
  dx, dkernel = back(dy)
  assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
  axes = "DHW"[-len(size) :]
  with jax.enable_x64(True):
    exact = jax.vjp(
      lambda k: jax.lax.conv_general_dilated(
        x.astype(float),
        k,
        strides,
        pads,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
      ),
      kernel.astype(float),
    )[1](dy.astype(float))[0]
    # A thousandth of what rounding to bfloat16 would do.
    far = np.abs(np.asarray(exact) - np.asarray(dkernel, np.float64)).max()
    assert far < 4e-6 * np.abs(np.asarray(exact)).max()


def near():
  """Each skip and each block once, decoder and rank going round."""
  skips = [(s, DECODERS[i % 3]) for i, s in enumerate(SKIPS)]
  skips = [(s, d if (s, d) in PAIRS else "plain") for s, d in skips]
  fields = [{"skip": s, "decoder": d} for s, d in skips] + BLOCKS
  return [(f, i % 2 + 1) for i, f in enumerate(fields)]


@pytest.mark.parametrize(("fields", "rank"), near(), ids=str)
def test_the_logits_are_float32s_to_bfloat16s_precision(fields, rank):
  x = image_of(rank)
  variables = fill(make(rank, **fields), x)

  def run(dtype):
    model = make(rank, dtype, **fields)
    outputs = jax.jit(
      lambda variables: model.apply(
        variables, x, context=CONTEXT, every_output=True
      )
    )(variables)
    assert {y.dtype for y in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    return np.asarray(outputs.logits[-1])

  exact, half = run("float32"), run("bfloat16")
  error = np.sqrt(np.mean(np.square(half - exact))) / np.std(exact)
  # bfloat16 has 8 binary digits; some layers follow one another.
  assert 2**-12 < error < 2**-4


@pytest.mark.parametrize(
  "fields",
  [
    {"skip": "concat"},
    {"skip": "scalar", "squeeze_excite": True},
    {"skip": "scse", "up": "linear"},
    {"skip": "attn_oktay"},
    {"bottleneck": "transformer"},
  ],
  ids=str,
)
def test_the_gradient_of_what_is_spread_over_pixels_does_not_stall(fields):
  """A bfloat16 sum of 2^13 ones is 2^8 or 2^9: a bias would hardly learn."""
  x = np.abs(np.random.default_rng(0).normal(size=(2, 64, 64, 1)))
  x = x.astype(np.float32)
  fields = {"norm": "none", "activation": "gelu", "widths": (4, 8), **fields}
  variables = fill(make(2, **fields), x)
  grads = [
    flat(
      jax.device_get(jax.jit(gradient(make(2, d, **fields), x))(variables, x))
    )
    for d in ("float32", "bfloat16")
  ]
  spread = [k for k in grads[0] if k.split("/")[-1] in ("bias", "a_0", "scale")]
  norms = {key: np.linalg.norm(grads[0][key]) for key in spread}
  # A key's bias has none, nor has a hidden unit that is dead.
  learning = [k for k in spread if norms[k] > 1e-3 * max(norms.values())]
  assert len(learning) >= 7
  for key in learning:
    exact, half = (grad[key] for grad in grads)
    assert np.linalg.norm(half - exact) < 0.1 * norms[key], (key, exact, half)


def test_the_train_state_and_its_sums_are_those_of_float32():
  cfg = OptimizerConfig(name="adamw", clip_norm=1.0)
  tx, schedule = make_optimizer(cfg), make_schedule(cfg, 10)
  loss_fn = losses.make_loss(
    terms=("cross_entropy", "dice"), weights=(), class_weights=()
  )
  label = jnp.zeros((2, SIZE, SIZE), jnp.int32)
  batch = {
    "id": jnp.arange(2),
    "image": image_of(2),
    "label": label,
    "weight": jnp.ones(label.shape),
    "valid": jnp.ones(2),
  }

  def types(dtype):
    model = make(2, dtype, decoder="nested", deep_supervision=True)
    step = make_train_step(
      model=model, loss_fn=loss_fn, tx=tx, schedule=schedule, ema_decay=0.5
    )
    rng, shape = jax.random.key(0), batch["image"].shape
    state = jax.eval_shape(
      lambda rng: state_lib.init_state(model, tx, rng, shape, ema=True), rng
    )
    new, sums = jax.eval_shape(step, state, batch, rng)
    return [
      {jax.tree_util.keystr(k): (x.shape, x.dtype) for k, x in leaves}
      for leaves in map(jax.tree_util.tree_leaves_with_path, (state, new, sums))
    ]

  start, new, sums = types("bfloat16")
  assert start == new  # A checkpoint does not know the dtype.
  assert [start, new, sums] == types("float32")
  kinds = {jnp.dtype(name) for name in ("float32", "int32", "bool")}
  assert {dtype for _, dtype in {**start, **sums}.values()} == kinds


def test_float32_casts_nothing():
  with jax.enable_x64(True):
    x = image_of(1).astype(np.float64)
    model = make(1, "float32", skip="uctrans", bottleneck="transformer")
    jaxpr = jax.make_jaxpr(model.apply)(fill(model, x, dtype=np.float64), x)
    types = {
      v.aval.dtype
      for eqn in cost.all_eqns(jaxpr.eqns)
      for v in eqn.outvars
      if jnp.issubdtype(v.aval.dtype, jnp.floating)
    }
    assert types == {jnp.dtype("float64")}


def test_an_example_of_each_rule():
  x = jnp.array([1.0, 3.0], jnp.bfloat16)
  third = jnp.float32(1 / 3)
  # Rounded once, after the product in float32.
  np.testing.assert_array_equal(
    precision.gate(x, third), (np.float32([1, 3]) / 3).astype(jnp.bfloat16)
  )
  assert precision.widen(x).dtype == jnp.float32
  x, kernel, bias = precision.promote(x, jnp.full((2, 1), third), jnp.ones(2))
  assert kernel.dtype == bias.dtype == jnp.float32
  # The kernel is rounded for the product.
  y = precision.dot_general(x, kernel, (((0,), (0,)), ((), ())))
  assert y == jnp.bfloat16(4 * jnp.bfloat16(third)) and y.dtype == jnp.bfloat16
