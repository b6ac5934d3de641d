"""The network: counts of the paper, ranks, norms, sizes, gradients."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.variants import abstract, count, fill, num_params
from unet_jax import batch_norm, presets
from unet_jax.models import build_model

# preset, other fields, channels, classes, size in, size out, parameters
PUBLISHED = [
  ("unet2015", {}, 1, 2, 572, 388, 31_030_658),
  ("unet2015", {}, 3, 2, 572, 388, 31_031_810),
  ("unet2015", {}, 1, 1, 572, 388, 31_030_593),
  ("seed", {}, 3, 1, 256, 256, 7_788_545),
  ("milesial", {}, 3, 2, 256, 256, 31_037_698),
  ("milesial_bilinear", {}, 3, 2, 256, 256, 17_263_042),
  ("monai_basic", {}, 1, 2, 64, 64, 1_978_466),
  ("monai_basic", {"dims": 3}, 1, 2, 16, 16, 5_749_410),
  ("unetpp", {}, 1, 1, 96, 96, 9_041_601),
  ("unetpp", {"deep_supervision": True}, 1, 1, 96, 96, 9_041_700),
  ("unet3p", {}, 1, 1, 320, 320, 26_970_625),
  ("unet3p", {"deep_supervision": True}, 1, 1, 320, 320, 26_988_485),
]


@pytest.mark.parametrize(
  ("preset", "fields", "channels", "num_classes", "size", "out", "expected"),
  PUBLISHED,
)
def test_presets_have_the_published_counts(
  preset, fields, channels, num_classes, size, out, expected
):
  model = build_model(num_classes=num_classes, preset=preset, **fields)
  shape = (1, *(size,) * model.dims, channels)
  variables, logits = abstract(model, shape)
  assert count(variables["params"]) == expected
  assert logits.shape == (1, *(out,) * model.dims, num_classes)


def test_every_preset_is_tested():
  # "attention" is counted with the overheads of the skips.
  assert set(presets.PRESETS) == {row[0] for row in PUBLISHED} | {"attention"}


# --- The overheads that the literature's formulas give, on the 2015 widths ----

WIDTHS = (64, 128, 256, 512, 1024)


def overhead(**fields):
  base = {"num_classes": 2, "widths": WIDTHS}
  return num_params(**base, **fields) - num_params(**base)


@pytest.mark.parametrize(
  ("skip", "millions"),
  [
    ("proj", -1.39),
    ("respath", 4.60),
    ("attn_oktay", 2.41),
    ("attn_same", 0.35),
  ],
)
def test_skips_cost_what_their_formulas_say(skip, millions):
  assert round(overhead(skip=skip) / 1e6, 2) == millions


def test_small_skips_cost_what_their_formulas_say():
  assert round(overhead(skip="se") / 1e3, 1) == 44.5
  assert round(overhead(skip="scse") / 1e3, 1) == 45.5
  assert overhead(skip="scalar") == 4
  for control in ("zeros", "noise", "shuffle", "dup"):
    assert overhead(skip=control) == 0
  # The gated preset is the batch-norm network and the gate, nothing else.
  attention = num_params(num_classes=2, preset="attention")
  plain = num_params(num_classes=2, widths=WIDTHS)
  assert attention - plain == overhead(skip="attn_oktay")


@pytest.mark.parametrize("skip", ["none", "add", "mul"])
def test_the_joined_half_of_the_kernels_is_a_tenth_of_the_parameters(skip):
  missing = [36_864, 147_456, 589_824, 2_359_296]
  assert overhead(skip=skip) == -sum(missing)
  if skip == "none":
    for level, expected in enumerate(missing):
      levels = tuple(k != level for k in range(4))
      assert overhead(skip_levels=levels) == -expected


def test_the_channel_transformer_is_as_large_as_the_authors():
  model = build_model(num_classes=1, widths=WIDTHS, skip="uctrans")
  params = abstract(model, (1, 32, 32, 1))[0]["params"]
  # Theirs for 224 pixels also has a position embedding of 14 x 14 patches.
  position = 14 * 14 * sum(WIDTHS[:4])
  assert round((count(params["decoder"]["carry"]) + position) / 1e6, 1) == 52.4


def test_2015_parameters_by_part():
  """UNET2015.md: 64-128-...; each up-convolution halves the channels."""
  model = build_model(num_classes=2, preset="unet2015")
  params = abstract(model, (1, 188, 188, 1))[0]["params"]
  encoder = [count(params[f"encoder_{i}"]) for i in range(5)]
  assert encoder == [37_568, 221_440, 885_248, 3_539_968, 14_157_824]
  ups = [count(params["decoder"][f"up_{i}"]) for i in (3, 2, 1, 0)]
  assert ups == [2_097_664, 524_544, 131_200, 32_832]
  convs = [count(params["decoder"][f"decoder_{i}"]) for i in (3, 2, 1, 0)]
  assert convs == [7_078_912, 1_769_984, 442_624, 110_720]
  assert count(params["head"]) == 130


def test_skip_none_is_skip_levels_off():
  shapes = []
  for fields in ({"skip": "none"}, {"skip_levels": (False, False)}):
    model = build_model(num_classes=1, widths=(4, 6, 8), **fields)
    params = abstract(model, (1, 8, 8, 1))[0]["params"]
    shapes.append(jax.tree.map(jnp.shape, params))
  assert shapes[0] == shapes[1]


# --- Ranks, norms, sizes -----------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm", ["none", "batch", "group", "instance"])
def test_a_network_of_any_rank_is_the_2d_network_seen_along_its_axes(
  dims, norm
):
  """An input constant along extra axes gives the output of the lower rank.

  Circularly it would be exact; here the zero border of padding="same" differs,
  so the kernels are made to look along the first axis only.
  """
  fields = {"num_classes": 2, "widths": (4, 8), "norm": norm, "norm_groups": 2}
  fields |= {"up": "linear"}
  line = build_model(dims=1, **fields)
  model = build_model(dims=dims, **fields)
  x = np.random.default_rng(0).normal(size=(2, 8, 1)).astype(np.float32)
  variables = fill(line, x)
  extra = tuple(range(2, dims + 1))

  def widen(kernel):
    if kernel.ndim != 3:
      return kernel
    shape = (kernel.shape[0], *(1,) * (dims - 1), *kernel.shape[1:])
    pad = (kernel.shape[0] - 1) // 2
    spread = [(0, 0), *[(pad, pad)] * (dims - 1), (0, 0), (0, 0)]
    return jnp.pad(kernel.reshape(shape), spread)

  wide = jax.tree.map(widen, variables)
  x_wide = np.broadcast_to(
    np.expand_dims(x, extra), (2, 8, *(4,) * (dims - 1), 1)
  )
  expected = np.expand_dims(jax.jit(line.apply)(variables, x), extra)
  got = np.asarray(jax.jit(model.apply)(wide, x_wide))
  np.testing.assert_allclose(
    got, np.broadcast_to(expected, got.shape), atol=2e-5
  )


def test_batch_norm_keeps_pytorchs_momentum_of_one_tenth():
  norm = batch_norm.BatchNorm(use_running_average=False, momentum=0.9)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 3)), "float32")
  variables = norm.init(jax.random.key(0), x)
  y, updates = norm.apply(variables, x, mutable=["batch_stats"])
  new = updates["batch_stats"]
  np.testing.assert_allclose(new["mean"], 0.1 * x.mean((0, 1)), atol=1e-6)
  # The running variance is the unbiased one, the normalising one is not.
  np.testing.assert_allclose(
    new["var"], 0.9 + 0.1 * x.var((0, 1), ddof=1), atol=1e-6
  )
  expected = (x - x.mean((0, 1), keepdims=True)) / np.sqrt(
    x.var((0, 1), keepdims=True) + 1e-5
  )
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_instance_norm_sees_one_example_and_batch_norm_all():
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
  other = x.copy()
  other[1] *= 5
  for norm, depends in (("instance", False), ("group", False), ("batch", True)):
    model = build_model(num_classes=1, widths=(4, 8), norm=norm, norm_groups=2)
    variables = fill(model, x)

    @jax.jit
    def first(x, model=model, variables=variables):
      y, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
      return y[0]

    assert bool(jnp.allclose(first(x), first(other), atol=1e-5)) != depends


def test_wrong_rank_and_wrong_size_are_refused_with_the_nearest():
  model = build_model(num_classes=1, widths=(4, 8, 16))
  with pytest.raises(ValueError, match="dims=2"):
    abstract(model, (1, 8, 1))
  with pytest.raises(ValueError, match="nearest: 8, 12"):
    abstract(model, (1, 8, 10, 1))


def test_dropout_acts_at_the_end_of_the_contracting_path_in_training_only():
  model = build_model(num_classes=1, widths=(4, 8, 8), norm="none", dropout=0.5)
  x = jnp.ones((1, 8, 8, 1))
  variables = fill(model, x)

  @jax.jit
  def apply(key):
    _, updates = model.apply(
      variables,
      x,
      train=True,
      rngs={"dropout": key},
      capture_intermediates=True,
      mutable=["intermediates"],
    )
    return updates["intermediates"]

  tree, other = apply(jax.random.key(0)), apply(jax.random.key(1))
  shares = []
  for name in ("Dropout_0", "Dropout_1"):
    dropped = tree[name]["__call__"][0]
    level = 1 + int(name[-1])
    before = tree[f"encoder_{level}"]["__call__"][0]
    kept = np.asarray(dropped != 0)
    np.testing.assert_allclose(
      np.asarray(dropped)[kept], 2 * np.asarray(before)[kept], rtol=1e-6
    )
    shares.append(kept.mean())
  assert "Dropout_2" not in tree
  assert 0 < np.mean(shares) < 1
  heads = [t["head"]["__call__"][0] for t in (tree, other)]
  assert not np.allclose(*heads), "another key drops others"


def test_gradient_equals_finite_differences():
  with jax.enable_x64(True):
    model = build_model(
      num_classes=2, widths=(2, 4), activation="gelu", up="linear_aligned"
    )
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 4, 1)))
    variables = fill(model, x, dtype=np.float64)
    readout = jnp.asarray(rng.normal(size=(2, 4, 4, 2)))

    @jax.jit
    def value(params):
      y, _ = model.apply(
        {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
      )
      return jnp.sum(readout * y)

    params = variables["params"]
    direction = jax.tree.map(
      lambda p: jnp.asarray(rng.normal(size=p.shape)), params
    )
    step = 1e-5
    ahead = jax.tree.map(lambda p, d: p + step * d, params, direction)
    behind = jax.tree.map(lambda p, d: p - step * d, params, direction)
    numeric = (value(ahead) - value(behind)) / (2 * step)
    grads = jax.jit(jax.grad(value))(params)
    exact = sum(
      jnp.sum(g * d)
      for g, d in zip(
        jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True
      )
    )
    np.testing.assert_allclose(numeric, exact, rtol=1e-6)


def test_the_module_is_pure():
  """Same inputs, same bits; init and apply leave the module as it was."""
  model = build_model(num_classes=1, widths=(4, 8))
  x = jnp.ones((1, 8, 8, 1))
  first = jax.jit(model.init)(jax.random.key(0), x)
  again = jax.jit(model.init)(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert model == build_model(num_classes=1, widths=(4, 8))
  assert hash(model) == hash(build_model(num_classes=1, widths=(4, 8)))


def test_cold_init_compiles_fast():
  """Small shaped random draws compile for seconds each; ours are drawn flat.

  CPU time, so that a busy machine does not matter. The bound is no speed claim:
  it is far above what ours takes and below what JAX's own initialisers take.
  """
  model = build_model(num_classes=1, widths=(5, 9))
  x = jnp.ones((1, 6, 6, 1))
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    start = time.process_time()
    jax.jit(model.init).lower(jax.random.key(0), x).compile()
    seconds = time.process_time() - start
  finally:
    jax.config.update("jax_enable_compilation_cache", True)
  assert seconds < 8
