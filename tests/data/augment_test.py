"""Augmentation against numpy, scipy and its own promises of independence."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from unet_jax.data import augment as augment_lib
from unet_jax.schema import AugmentConfig

OFF = AugmentConfig(flip=False, turn=False)
FULL = AugmentConfig(
  flip=True,
  turn=True,
  shift=0.2,
  rotate=180.0,
  scale=0.5,
  elastic=3.0,
  elastic_grid=4,
  brightness=0.3,
  contrast=0.4,
  gamma=0.5,
  noise=0.2,
)
TRANSFORMS = [
  f.name
  for f in dataclasses.fields(AugmentConfig)
  if f.name not in ("elastic_grid", "cutmix")
]


def only(*names: str) -> AugmentConfig:
  on = {name: getattr(FULL, name) for name in names}
  return dataclasses.replace(OFF, elastic_grid=FULL.elastic_grid, **on)


@functools.cache
def jitted(cfg: AugmentConfig):
  return jax.jit(augment_lib.make_augment(cfg))


@functools.cache
def many_draws(cfg: AugmentConfig, num: int, shape: tuple[int, ...]):
  keys = jax.random.split(jax.random.key(5), num)
  draw = jax.jit(jax.vmap(lambda key: augment_lib.draw(cfg, key, shape)))
  return jax.tree.map(np.asarray, draw(keys))


@jax.jit
def apply(example, draws):
  return augment_lib.apply_draws(example, draws)


def make_batch(num: int, *shape: int, seed: int = 0) -> dict[str, np.ndarray]:
  """A batch whose pixels all differ; image shape (*S, C)."""
  rng = np.random.default_rng(seed)
  size = (num, *shape[:-1])
  return {
    "id": np.arange(num, dtype=np.int32) * 7 + 3,
    "image": rng.normal(5, 2, (num, *shape)).astype(np.float32),
    "label": rng.integers(0, 4, size).astype(np.int32),
    "weight": rng.uniform(0.5, 1, size).astype(np.float32),
    "valid": np.ones(num, np.float32),
  }


def make_example(*shape: int):
  batch = make_batch(1, *shape)
  return tuple(batch[name][0] for name in ("image", "label", "weight"))


def assert_same(got: dict, want: dict) -> None:
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name], err_msg=name)


# --- A function of (rng, id) and nothing else --------------------------------


def test_everything_off_passes_the_inputs_through():
  batch = make_batch(2, 4, 4, 1)
  augment = augment_lib.make_augment(OFF)
  jaxpr = jax.make_jaxpr(augment)(batch, jax.random.key(0)).jaxpr
  assert jaxpr.outvars == jaxpr.invars[: len(batch)]


def test_same_key_and_id_give_the_same_bits_and_others_do_not():
  batch, rng = make_batch(8, 12, 12, 2), jax.random.key(1)
  # The same picture everywhere: only the ids can make a difference.
  for name in ("image", "label", "weight"):
    batch[name][:] = batch[name][:1]
  out = jitted(FULL)(batch, rng)
  assert_same(jitted(FULL)(batch, rng), out)
  images = [np.asarray(image).tobytes() for image in out["image"]]
  assert len(set(images)) == 8
  other = jitted(FULL)(batch, jax.random.fold_in(rng, 1))
  assert not {np.asarray(image).tobytes() for image in other["image"]} & {
    *images
  }
  twins = {**batch, "id": np.full(8, 3, np.int32)}
  out = jitted(FULL)(twins, rng)
  for name in ("image", "label", "weight"):
    assert (np.asarray(out[name]) == np.asarray(out[name][:1])).all()


def test_place_and_batch_size_and_devices_do_not_matter():
  batch, rng = make_batch(8, 12, 12, 2), jax.random.key(2)
  want = jax.tree.map(np.asarray, jitted(FULL)(batch, rng))
  order = np.random.default_rng(0).permutation(8)
  shuffled = jitted(FULL)({k: v[order] for k, v in batch.items()}, rng)
  assert_same(shuffled, {k: v[order] for k, v in want.items()})
  for half in (slice(0, 4), slice(4, 8)):
    out = jitted(FULL)({k: v[half] for k, v in batch.items()}, rng)
    assert_same(out, {k: v[half] for k, v in want.items()})
  mesh = jax.make_mesh((8,), ("data",))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  spread = jax.device_put(batch, sharding)
  compiled = jitted(FULL).lower(spread, rng).compile()
  out = compiled(spread, jax.device_put(rng, compiled.input_shardings[0][1]))
  assert out["image"].sharding.is_equivalent_to(sharding, 4)
  # One example a device is another program: sums round differently.
  image = out.pop("image")
  np.testing.assert_allclose(image, want.pop("image"), atol=5e-5)
  assert_same(out, want)
  # No pixel may travel: each device augments its own examples.
  text = compiled.as_text()
  for collective in ("all-gather", "all-to-all", "all-reduce", "permute"):
    assert collective not in text


def test_switching_one_transform_does_not_change_the_draws_of_another():
  shape = (4, 4, 1)

  @jax.jit
  def draw_all(key):
    alone = {n: augment_lib.draw(only(n), key, shape) for n in TRANSFORMS}
    return augment_lib.draw(FULL, key, shape), alone

  full, alone = draw_all(jax.random.key(0))
  assert list(full) and set(full) == set(TRANSFORMS)
  for name in TRANSFORMS:
    assert_same(alone[name], {name: full[name]})


# --- What is drawn -----------------------------------------------------------


def test_draws_have_the_distributions_that_the_config_promises():
  draws = many_draws(FULL, 1500, (4, 4, 4, 1))
  assert draws["turn"].shape == (1500, 3) and draws["flip"].shape == (1500, 3)
  for name, sides in (("flip", 2), ("turn", 4)):
    for column in draws[name].T:
      counts = np.bincount(column, minlength=sides)
      assert len(counts) == sides
      assert scipy.stats.chisquare(counts).pvalue > 1e-3

  def assert_uniform(values, low, high):
    test = scipy.stats.kstest(values, "uniform", (low, high - low))
    assert test.pvalue > 1e-3

  for name, limit in (("shift", 0.2), ("rotate", 180), ("brightness", 0.3)):
    assert_uniform(draws[name].reshape(1500, -1)[:, 0], -limit, limit)
  for name, limit in (("scale", 1.5), ("contrast", 1.4), ("gamma", 1.5)):
    log_limit = np.log(limit)
    assert_uniform(np.log(draws[name]), -log_limit, log_limit)
  # Different axes and planes draw for themselves.
  for name in ("shift", "rotate"):
    correlation = np.corrcoef(draws[name].T)[np.triu_indices(3, 1)]
    assert np.abs(correlation).max() < 0.1


def test_noise_level_is_uniform_and_the_field_is_normal():
  noise = many_draws(only("noise"), 400, (24, 24, 1))["noise"]
  level = noise.std(1)
  # 576 pixels know their deviation to 3 %.
  test = scipy.stats.kstest(level, "uniform", (0, FULL.noise))
  assert test.pvalue > 1e-3
  unit = noise[level.argmax()] / level.max()
  assert scipy.stats.kstest(unit, "norm").pvalue > 1e-3


def test_elastic_displacements_have_the_standard_deviation_at_grid_points():
  cfg = dataclasses.replace(OFF, elastic=10.0, elastic_grid=3)
  vectors = many_draws(cfg, 2000, (9, 5, 1))["elastic"]
  upsample = jax.jit(jax.vmap(lambda v: augment_lib.upsample(v, (9, 5))))
  field = np.asarray(upsample(vectors))
  assert field.shape == (2000, 2, 9, 5)
  at_points = field[:, :, ::4, ::2].reshape(2000, -1)
  np.testing.assert_allclose(at_points, vectors, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(at_points.std(0), 10, rtol=0.08)
  np.testing.assert_allclose(at_points.mean(0), 0, atol=1)
  assert np.abs(np.corrcoef(at_points.T) - np.eye(18)).max() < 0.12


# --- Flips and turns ---------------------------------------------------------


def test_the_eight_symmetries_of_the_square_are_equally_frequent():
  num = 1600
  batch = make_batch(num, 3, 3, 1)
  batch["label"][:] = np.arange(9).reshape(3, 3)
  batch["image"][:] = batch["label"][..., None]
  batch["weight"][:] = batch["label"] / np.float32(8)
  out = jitted(only("flip", "turn"))(batch, jax.random.key(0))
  label = np.asarray(out["label"])
  # Image and weight went exactly where the label went.
  np.testing.assert_array_equal(out["image"][..., 0], label)
  np.testing.assert_array_equal(out["weight"], label / np.float32(8))
  picture = np.arange(9).reshape(3, 3)
  symmetries = [
    np.rot90(side, k) for side in (picture, picture[::-1]) for k in range(4)
  ]
  counts = [(label == s).all((1, 2)).sum() for s in symmetries]
  assert sum(counts) == num
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("size", [(7,), (4, 6), (3, 5, 3)])
def test_flips_and_turns_only_move_pixels(size):
  batch = make_batch(24, *size, 2)
  out = jitted(only("flip", "turn"))(batch, jax.random.key(3))
  moved = 0
  for i in range(24):

    def triples(b, i=i):
      rows = [b["image"][i].reshape(-1, 2), b["label"][i].reshape(-1, 1)]
      rows.append(b["weight"][i].reshape(-1, 1))
      return sorted(map(tuple, np.concatenate(rows, axis=1).tolist()))

    assert triples(jax.tree.map(np.asarray, out)) == triples(batch)
    moved += (np.asarray(out["label"][i]) != batch["label"][i]).any()
  assert moved >= 5


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 2)])
def test_flips_are_those_of_numpy(axes):
  example = make_example(2, 3, 4, 2)
  got = apply(example, {"flip": np.isin(range(3), axes)})
  for before, after in zip(example, got, strict=True):
    np.testing.assert_array_equal(after, np.flip(before, axes))


@pytest.mark.parametrize("turn", [(1, 0, 0), (2, 3, 1), (3, 1, 2)])
def test_turns_in_space_are_those_of_numpy(turn):
  example = make_example(3, 3, 3, 1)
  got = apply(example, {"turn": np.int32(turn)})
  for before, after in zip(example, got, strict=True):
    for k, plane in zip(turn, ((0, 1), (0, 2), (1, 2)), strict=True):
      before = np.rot90(before, k, plane)
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(("turn", "halves"), [(1, 0), (2, 2), (3, 2)])
def test_unequal_sides_turn_by_halves(turn, halves):
  example = make_example(4, 6, 1)
  got = apply(example, {"turn": np.int32([turn])})
  np.testing.assert_array_equal(got[1], np.rot90(example[1], halves))


# --- Resampling --------------------------------------------------------------


@pytest.mark.parametrize("size", [(7,), (6, 5), (4, 1, 5)])
def test_zero_parameters_change_no_bit(size):
  dims, planes = len(size), {1: 0, 2: 1, 3: 3}[len(size)]
  draws = {
    "shift": np.zeros(dims, np.float32),
    "rotate": np.zeros(planes, np.float32),
    "scale": np.float32(1),
    "elastic": np.zeros(dims * 3**dims, np.float32),
  }
  example = make_example(*size, 2)
  for before, after in zip(example, apply(example, draws), strict=True):
    np.testing.assert_array_equal(after, before)


def rotation(angles, dims: int) -> np.ndarray:
  """The planes' Givens rotations in float64, first plane first."""
  planes = [(i, j) for i in range(dims) for j in range(i + 1, dims)]
  matrix = np.eye(dims)
  for angle, (i, j) in zip(np.radians(angles), planes, strict=True):
    givens = np.eye(dims)
    givens[i, i] = givens[j, j] = np.cos(angle)
    givens[i, j], givens[j, i] = -np.sin(angle), np.sin(angle)
    matrix = givens @ matrix
  return matrix


@pytest.mark.parametrize(
  ("size", "angles", "shift", "scale"),
  [
    ((9, 11), (33.0,), (0.0, 0.0), 1.0),
    ((9, 12), (-140.0,), (0.13, -0.31), 0.6),
    ((13,), (), (0.27,), 1.7),
    ((6, 5, 7), (25.0, -50.0, 110.0), (0.1, 0.0, -0.3), 1.2),
  ],
)
def test_resampling_agrees_with_scipy_in_double(size, angles, shift, scale):
  image, label, weight = make_example(*size, 2)
  draws = {"rotate": angles, "shift": shift, "scale": scale}
  draws = {name: np.float32(value) for name, value in draws.items()}
  got = apply((image, label, weight), draws)
  grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
  centre = (np.reshape(size, (-1,) + (1,) * len(size)) - 1) / 2
  points = np.tensordot(rotation(angles, len(size)), grid - centre, 1) / scale
  points += centre - (np.float64(shift) * size).reshape(centre.shape)
  read = functools.partial(
    scipy.ndimage.map_coordinates, coordinates=points, mode="mirror"
  )
  for channel in range(2):
    want = read(image[..., channel].astype(np.float64), order=1)
    np.testing.assert_allclose(got[0][..., channel], want, atol=2e-5)
  # Nearest pixels, but for those on the very border between two.
  sides = np.reshape(size, centre.shape)
  clear = (np.abs(points % 1 - 0.5) > 1e-4).all(0)
  inside = ((points > -0.5) & (points < sides - 0.5)).all(0)
  assert clear.mean() > 0.9 and 0.2 < inside.mean() < 1
  for after, before in zip(got[1:], (label, weight), strict=True):
    want = np.where(inside, read(before, order=0), 0)
    np.testing.assert_array_equal(np.asarray(after)[clear], want[clear])


def test_a_quarter_rotation_is_a_quarter_turn():
  image, label, weight = make_example(6, 6, 1)
  got = apply((image, label, weight), {"rotate": np.float32([90])})
  np.testing.assert_allclose(got[0], np.rot90(image, -1), atol=1e-5)
  np.testing.assert_array_equal(got[1], np.rot90(label, -1))
  np.testing.assert_array_equal(got[2], np.rot90(weight, -1))


def test_scale_two_doubles_an_object_about_the_centre():
  image, label, weight = make_example(12, 12, 1)
  label[:] = 0
  label[4:8, 5:7] = 1
  got = apply((image, label, weight), {"scale": np.float32(2)})
  want = np.zeros((12, 12), int)
  want[2:10, 4:8] = 1
  np.testing.assert_array_equal(got[1], want)
  assert (np.asarray(got[2]) > 0).all()


@pytest.mark.parametrize("pixels", [3, -2, 19])
def test_a_known_shift_has_weight_zero_exactly_where_it_filled(pixels):
  image, label, weight = make_example(8, 5, 1)
  shift = np.float32([pixels / 8, 0])
  got = apply((image, label, weight), {"shift": shift})
  source = np.arange(8) - pixels
  inside = (source >= 0) & (source < 8)
  for after, before in zip(got[1:], (label, weight), strict=True):
    want = np.where(inside[:, None], before[np.clip(source, 0, 7)], 0)
    np.testing.assert_array_equal(after, want)
  mirrored = np.pad(image, ((20, 20), (0, 0), (0, 0)), mode="reflect")
  np.testing.assert_array_equal(got[0], mirrored[source + 20])


def test_labels_follow_the_image_through_every_geometric_transform():
  cfg = only("flip", "turn", "shift", "rotate", "scale", "elastic")
  batch = make_batch(16, 32, 32, 1)
  blocks = np.random.default_rng(1).integers(0, 2, (16, 4, 4))
  batch["label"] = np.kron(blocks, np.ones((8, 8), int)).astype(np.int32)
  batch["image"] = batch["label"][..., None].astype(np.float32)
  batch["weight"][:] = 1
  out = jitted(cfg)(batch, jax.random.key(4))
  image, label, weight = (
    np.asarray(out[n]) for n in ("image", "label", "weight")
  )
  image = image[..., 0]
  assert set(np.unique(weight)) == {0, 1}
  assert (label[weight == 0] == 0).all()
  # All pixels that the linear reading mixed agree: so must the nearest.
  pure = (np.abs(image - image.round()) < 1e-5) & (weight == 1)
  assert pure.mean() > 0.4
  np.testing.assert_array_equal(label[pure], image.round()[pure])
  assert (label != batch["label"]).any((1, 2)).all()


# --- Bicubic interpolation of the elastic grid -------------------------------


def keys_kernel(x: float) -> float:
  """Cubic convolution kernel with a = -1/2, Keys 1981."""
  x = abs(x)
  if x < 1:
    return 1.5 * x**3 - 2.5 * x**2 + 1
  return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


@pytest.mark.parametrize(("size", "grid"), [(9, 2), (13, 3), (32, 5)])
def test_cubic_matrix_is_convolution_with_the_kernel_of_keys(size, grid):
  values = np.random.default_rng(0).normal(size=grid)
  if grid == 2:
    first, last = 2 * values[0] - values[1], 2 * values[1] - values[0]
  else:
    first = 3 * values[0] - 3 * values[1] + values[2]
    last = 3 * values[-1] - 3 * values[-2] + values[-3]
  padded = [first, *values, last]
  want = [
    sum(v * keys_kernel(at + 1 - k) for k, v in enumerate(padded))
    for at in np.linspace(0, grid - 1, size)
  ]
  got = augment_lib.cubic_matrix(size, grid) @ values
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_upsampling_reproduces_polynomials_of_degree_two_on_three_axes():
  def field(a, b, c):
    return np.stack([a**2 + b * c, b**2 - a, c**2 + a * b * c])

  def on(*sizes):
    axes = [np.linspace(-1, 1, n) for n in sizes]
    return field(*np.meshgrid(*axes, indexing="ij"))

  vectors = on(4, 4, 4).astype(np.float32).reshape(-1)
  got = augment_lib.upsample(jnp.asarray(vectors), (7, 6, 5))
  np.testing.assert_allclose(got, on(7, 6, 5), atol=1e-5)


def test_elastic_adds_the_upsampled_field_to_the_points():
  vectors = np.zeros((2, 3, 3), np.float32)
  vectors[0] = 2.0
  vectors[1] = -1.0
  example = make_example(9, 7, 1)
  got = apply(example, {"elastic": vectors.reshape(-1)})
  # A constant field is a shift: out[i, j] = in[i + 2, j - 1].
  np.testing.assert_allclose(got[0][:7, 1:], example[0][2:, :6], atol=1e-5)
  np.testing.assert_array_equal(got[1][:7, 1:], example[1][2:, :6])
  assert (np.asarray(got[2])[7:] == 0).all()


# --- Intensities -------------------------------------------------------------


def test_intensities_by_their_formulas_one_channel_at_a_time():
  image, label, weight = make_example(6, 7, 2)
  image[..., 1] = 100 * image[..., 1] - 20

  def run(**draws):
    draws = {k: np.float32(v) for k, v in draws.items()}
    got = apply((image, label, weight), draws)
    np.testing.assert_array_equal(got[1], label)
    np.testing.assert_array_equal(got[2], weight)
    return np.asarray(got[0], np.float64)

  x = image.astype(np.float64)
  mean, std = x.mean((0, 1)), x.std((0, 1))
  low, high = x.min((0, 1)), x.max((0, 1))
  noise = np.random.default_rng(2).normal(size=x.shape)
  want = {
    "brightness": (0.4, x + 0.4 * std),
    "contrast": (1.7, mean + 1.7 * (x - mean)),
    "gamma": (0.6, low + (high - low) * ((x - low) / (high - low)) ** 0.6),
    "noise": (noise.reshape(-1), x + noise * std),
  }
  for name, (value, expected) in want.items():
    np.testing.assert_allclose(
      run(**{name: value}), expected, rtol=1e-4, atol=1e-4, err_msg=name
    )
  # Brightness and contrast are seen by gamma, which keeps their range.
  got = run(brightness=0.4, contrast=1.7, gamma=0.6)
  x = mean + 0.4 * std + 1.7 * (x - mean)
  low, high = x.min((0, 1)), x.max((0, 1))
  expected = low + (high - low) * ((x - low) / (high - low)) ** 0.6
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


# --- Whatever comes in -------------------------------------------------------


@pytest.mark.parametrize("size", [(4,), (4, 5, 4)])
def test_constant_tiny_and_unlabelled_crops_stay_finite(size):
  values = np.float32([0, 1, -3e6, 1e-30])
  batch = make_batch(4, *size, 1)
  batch["image"][:] = values.reshape((4,) + (1,) * (len(size) + 1))
  batch["weight"][:] = 0
  out = jitted(FULL)(batch, jax.random.key(6))
  assert {k: v.dtype for k, v in out.items()} == {
    k: v.dtype for k, v in batch.items()
  }
  for got, value in zip(np.asarray(out["image"]), values, strict=True):
    np.testing.assert_allclose(got, value, rtol=1e-5)
  assert (np.asarray(out["weight"]) == 0).all()


def test_a_wider_jax_default_changes_no_draw():
  want = many_draws(FULL, 1500, (4, 4, 4, 1))
  with jax.enable_x64(True):
    got = many_draws.__wrapped__(FULL, 1500, (4, 4, 4, 1))
  assert {k: v.dtype for k, v in got.items()} == {
    k: v.dtype for k, v in want.items()
  }
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", [(5,), (4, 4), (4, 6), (3, 3, 3), (2, 3, 3)])
def test_pixels_and_pictures_are_two_ways_to_one_result(size):
  """The form for CPU and that for TPU: every flip and turn, to the bit."""
  dims = len(size)
  planes = list(itertools.combinations(range(dims), 2))
  rng = np.random.default_rng(0)
  example = (
    rng.normal(size=(*size, 2)).astype(np.float32),
    rng.integers(0, 9, size).astype(np.int32),
    rng.random(size).astype(np.float32),
  )
  example = tuple(map(jnp.asarray, example))
  ways = jax.jit(
    lambda draws: (
      augment_lib.take_pixels(example, draws),
      augment_lib.choose_pictures(example, draws),
    )
  )
  results = set()
  for flip in itertools.product((False, True), repeat=dims):
    for turn in itertools.product(range(4), repeat=len(planes)):
      draws = {"flip": np.array(flip)}
      if planes:
        draws["turn"] = np.array(turn, np.int32)
      pixels, pictures = ways(draws)
      for a, b in zip(pixels, pictures, strict=True):
        np.testing.assert_array_equal(a, b)
      results.add(np.asarray(pixels[0]).tobytes())
  if size in ((5,), (4, 4)):
    assert len(results) == {1: 2, 2: 8}[dims]
