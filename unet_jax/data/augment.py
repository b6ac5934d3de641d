"""Random changes of training crops, drawn for each example inside the step.

Order: flips, turns; one resampling (shift, rotation, scale, elastic);
brightness, contrast, gamma, noise. Labels and weights follow the first two and
are untouched by the rest. What is drawn for an example is a function of the
step's key and the example's id alone: not of its place in the batch, nor of the
number of devices, nor of which other transforms are on. (Programs compiled for
other shapes may round the last bits of an image differently.)

`draw` makes the parameters, everything below it takes them. Shapes are those of
one example: image [*S, C], label and weight [*S], with D = 1 to 3 spatial axes
and P = D(D-1)/2 planes (i < j) in the order of `itertools.combinations`.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import ndimage

from unet_jax.schema import AugmentConfig

Batch = dict[str, jax.Array]
Example = tuple[jax.Array, jax.Array, jax.Array]
Draws = Mapping[str, jax.Array]

# The rows of the table of random numbers: append, never reorder.
TRANSFORMS = tuple(
  "flip turn shift rotate scale elastic brightness contrast gamma noise".split()
)


def make_augment(cfg: AugmentConfig) -> Callable[[Batch, jax.Array], Batch]:
  """Builds `augment(batch, rng) -> batch`, a pure function for the train step.

  Args:
    cfg: the largest change of each transform; 0 or False leaves it out.

  Returns:
    A function of a batch (`id` int32 [B], `image` float32 [B, *S, C], `label`
    int32 [B, *S], `weight` float32 [B, *S], of volumes also `spacing` float32
    [B, D], used up; other entries pass through) and a key that already
    depends on seed and step. It keeps shapes and dtypes, and gives label 0 and
    weight 0 to pixels that it had to fill.
  """

  def augment(batch: Batch, rng: jax.Array) -> Batch:
    def augment_one(index: jax.Array, *arrays: jax.Array) -> Example:
      key = jax.random.fold_in(rng, index)
      draws = draw(cfg, key, arrays[0].shape)
      return apply_draws(arrays[:3], draws, *arrays[3:])

    names = ("image", "label", "weight", "spacing")
    arrays = [batch[name] for name in names if name in batch]
    image, label, weight = jax.vmap(augment_one)(batch["id"], *arrays)
    others = {k: v for k, v in batch.items() if k != "spacing"}
    return {**others, "image": image, "label": label, "weight": weight}

  return augment


def draw(
  cfg: AugmentConfig, key: jax.Array, shape: tuple[int, ...]
) -> dict[str, jax.Array]:
  """Draws the parameters of one example with image shape (*S, C).

  Returns:
    Of the transforms that are on: bool `flip` [D], int32 `turn` [P] of 0..3
    quarters; float32 `shift` [D] in sides of the crop, `rotate` [P] in degrees,
    `elastic` [D * grid^D] in pixels, the factors `scale`, `contrast` and
    `gamma` [], and `brightness` [] and `noise` [S * C] in standard deviations.
  """
  dims, num_planes = len(shape) - 1, len(_planes(len(shape) - 1))
  # One flat draw with a row for each transform, on or off: every small draw
  # costs compilation time. float32 whatever jax_enable_x64 says.
  row_key, elastic_key, noise_key = (
    jax.random.fold_in(key, i) for i in range(3)
  )
  rows = jax.random.uniform(row_key, (3 * len(TRANSFORMS),), jnp.float32, -1, 1)
  u = dict(zip(TRANSFORMS, rows.reshape(-1, 3), strict=True))

  def normal(stream: jax.Array, count: int) -> jax.Array:
    return jax.random.normal(stream, (count,), jnp.float32)

  draws = {
    "flip": u["flip"][:dims] > 0,
    "turn": (2 * u["turn"][:num_planes] + 2).astype(jnp.int32),
    "shift": cfg.shift * u["shift"][:dims],
    "rotate": cfg.rotate * u["rotate"][:num_planes],
    "scale": (1 + cfg.scale) ** u["scale"][0],
    "elastic": cfg.elastic * normal(elastic_key, dims * cfg.elastic_grid**dims),
    "brightness": cfg.brightness * u["brightness"][0],
    "contrast": (1 + cfg.contrast) ** u["contrast"][0],
    "gamma": (1 + cfg.gamma) ** u["gamma"][0],
    "noise": (
      cfg.noise * jnp.abs(u["noise"][0]) * normal(noise_key, math.prod(shape))
    ),
  }
  # What is off is not compiled either: nothing uses it.
  return {k: v for k, v in draws.items() if getattr(cfg, k) and v.size}


def apply_draws(
  example: Example, draws: Draws, spacing: jax.Array | None = None
) -> Example:
  """Applies what was drawn to (image, label, weight), in the module's order.

  Where `spacing` [D] tells how far pixels are apart, no quarter turn exchanges
  axes of which it differs, and the rest is as in `source_points`.
  """
  size = example[1].shape
  if spacing is not None and "turn" in draws:
    first, second = spacing[np.array(_planes(len(size))).T]
    even = abs(first - second) <= 0.01 * second
    draws = {**draws, "turn": draws["turn"] & jnp.where(even, 3, 2)}
  if draws.keys() & {"flip", "turn"}:
    # On TPU an index is followed pixel by pixel, and whole pictures are cheap.
    forms = {"cpu": take_pixels, "default": choose_pictures}
    forms = {k: functools.partial(f, draws=draws) for k, f in forms.items()}
    example = jax.lax.platform_dependent(example, **forms)
  if draws.keys() & {"shift", "rotate", "scale", "elastic"}:
    example = resample(example, source_points(size, draws, spacing))
  image, label, weight = example
  return apply_intensities(image, draws), label, weight


def take_pixels(example: Example, draws: Draws) -> Example:
  """Flips and turns, pixel by pixel as `source_pixels` says."""
  pixels = tuple(source_pixels(example[1].shape, draws))
  return tuple(x[pixels] for x in example)


def choose_pictures(example: Example, draws: Draws) -> Example:
  """The same, by choosing between whole pictures."""
  size = example[1].shape

  def change(x: jax.Array) -> jax.Array:
    for i, here in enumerate(draws.get("flip", ())):
      x = jnp.where(here, jnp.flip(x, i), x)
    turns = zip(draws.get("turn", ()), _planes(len(size)), strict=False)
    for quarters, (i, j) in turns:
      x = jnp.where(quarters & 2, jnp.flip(x, (i, j)), x)
      if size[i] == size[j]:
        x = jnp.where(quarters & 1, jnp.rot90(x, 1, (i, j)), x)
    return x

  return tuple(map(change, example))


def source_pixels(size: tuple[int, ...], draws: Draws) -> list[jax.Array]:
  """Which pixel each output pixel is, by flips and turns: D int32 arrays [*S].

  Axis i is mirrored where `flip[i]`, then plane after plane is turned as by
  `np.rot90(x, turn[p], plane p)`: by quarters & 2 where its two sides differ.
  """
  # Indexes, from the last change back to the first: pictures chosen by `where`
  # would be computed anew for every pixel that a resampling reads.
  at = list(np.indices(size, np.int32))
  mirror = lambda i, here: at[i] + here * (size[i] - 1 - 2 * at[i])
  turns = zip(draws.get("turn", ()), _planes(len(size)), strict=False)
  for quarters, (i, j) in reversed(list(turns)):
    quarters &= 3 if size[i] == size[j] else 2
    at[j] = mirror(j, quarters >= 2)
    at[i] = mirror(i, (quarters == 1) | (quarters == 2))
    apart = (quarters & 1) * (at[j] - at[i])
    at[i], at[j] = at[i] + apart, at[j] - apart
  for i, here in enumerate(draws.get("flip", ())):
    at[i] = mirror(i, here)
  return at


def source_points(
  size: tuple[int, ...], draws: Draws, spacing: jax.Array | None = None
) -> list[jax.Array]:
  """Where in the crop each output pixel p is read: D float32 arrays [*S].

  With c the crop's centre, R the product of the planes' Givens rotations, s the
  scale, t the shift and e the elastic displacement,

    x(p) = c + R (p - c) / s - t + e(p)

  so objects grow by s and move by t. Pixel centres are integers; a transform
  that is not in `draws` (as of `draw`) changes nothing. With a `spacing` [D],
  H the diagonal matrix of it and h its smallest, rotations and displacements
  are those of the object: H^-1 R H in the place of R, h H^-1 e in that of e.
  """
  rows = list(np.eye(len(size), dtype=np.float32))
  if "rotate" in draws:
    angles = jnp.deg2rad(draws["rotate"])
    for angle, (i, j) in zip(angles, _planes(len(size)), strict=True):
      cos, sin, first, second = jnp.cos(angle), jnp.sin(angle), rows[i], rows[j]
      rows[i], rows[j] = cos * first - sin * second, sin * first + cos * second
  if "rotate" in draws and spacing is not None:
    rows = [row * (spacing / h) for row, h in zip(rows, spacing, strict=True)]
  if "scale" in draws:
    rows = [row / draws["scale"] for row in rows]
  centres = [np.float32((n - 1) / 2) for n in size]
  axes = [np.arange(n, dtype=np.float32) for n in size]
  grids = np.meshgrid(*axes, indexing="ij", sparse=True)
  offsets = [g - c for g, c in zip(grids, centres, strict=True)]
  points = []
  for row, centre in zip(rows, centres, strict=True):
    # Term by term: exact at identity, and never on a low-precision matrix unit.
    terms = [a * offset for a, offset in zip(row, offsets, strict=True)]
    points.append(jnp.broadcast_to(sum(terms) + centre, size))
  if "shift" in draws:
    shift = draws["shift"] * np.float32(size)
    points = [x - t for x, t in zip(points, shift, strict=True)]
  if "elastic" in draws:
    field = upsample(draws["elastic"], size)
    if spacing is not None:
      ratio = jnp.min(spacing) / spacing
      field *= ratio.reshape(-1, *(1,) * len(size))
    points = [x + e for x, e in zip(points, field, strict=True)]
  return points


def upsample(vectors: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """Bicubic interpolation of a coarse grid of vectors, corners aligned.

  Args:
    vectors: float32 [D * g^D], component first, g points an axis.
    size: the D sides of the result.

  Returns:
    float32 [D, *S].

  Reference: Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, 3.1
  (Gaussian vectors with 10 px on a 3x3 grid, bicubic to each pixel).
  """
  dims = len(size)
  grid = round((vectors.size / dims) ** (1 / dims))
  field = vectors.reshape((dims,) + (grid,) * dims)
  for n in size:
    # Takes the first spatial axis away and puts its fine one last.
    matrix = cubic_matrix(n, grid)
    field = jnp.tensordot(field, matrix, ((1,), (1,)), precision="highest")
  return field


def cubic_matrix(size: int, grid: int) -> np.ndarray:
  """Weights [size, grid] of cubic convolution (a = -1/2) from grid to pixels.

  The piecewise cubic through the points whose slope is half the difference of
  the two neighbours; at the ends the slope of the parabola through three points
  (grid = 2: a line). First and last point lie on the first and last pixel.

  Reference: Keys 1981, Cubic convolution interpolation for digital image
  processing, https://doi.org/10.1109/TASSP.1981.1163711.
  """
  points = np.eye(grid)
  slopes = np.gradient(points, axis=0, edge_order=min(grid - 1, 2))
  at = np.linspace(0, grid - 1, size)
  left = np.minimum(at.astype(int), grid - 2)
  t = (at - left)[:, None]
  matrix = (2 * t**3 - 3 * t**2 + 1) * points[left]
  matrix += (t**3 - 2 * t**2 + t) * slopes[left]
  matrix += (3 * t**2 - 2 * t**3) * points[left + 1]
  matrix += (t**3 - t**2) * slopes[left + 1]
  return matrix.astype(np.float32)


def resample(example: Example, points: list[jax.Array]) -> Example:
  """Reads (image, label, weight) at `points`: linear, nearest, nearest.

  Outside the crop, which ends half a pixel beyond the centres of its border
  pixels, label and weight are 0 and the image is mirrored about those centres.

  Args:
    example: image [*S, C], label [*S], weight [*S].
    points: D float32 arrays [*S], in pixels.
  """
  image, label, weight = example
  inside = True
  for n, x in zip(label.shape, points, strict=True):
    inside &= jnp.abs(x - (n - 1) / 2) <= n / 2
  read = functools.partial(
    ndimage.map_coordinates, coordinates=points, mode="mirror"
  )
  image = jax.vmap(functools.partial(read, order=1), -1, -1)(image)
  label = jnp.where(inside, read(label, order=0), 0)
  weight = jnp.where(inside, read(weight, order=0), 0)
  return image, label, weight


def apply_intensities(image: jax.Array, draws: Draws) -> jax.Array:
  """Brightness, contrast, gamma, noise of image [*S, C], float32.

  Means, deviations and ranges are those of each channel over the crop, as it
  arrives at the transform. Contrast is about the mean; gamma bends the range
  between minimum and maximum and keeps both.
  """
  over_crop = {"axis": tuple(range(image.ndim - 1)), "keepdims": True}
  if "brightness" in draws:
    image = image + draws["brightness"] * jnp.std(image, **over_crop)
  if "contrast" in draws:
    mean = jnp.mean(image, **over_crop)
    image = mean + draws["contrast"] * (image - mean)
  if "gamma" in draws:
    low, high = jnp.min(image, **over_crop), jnp.max(image, **over_crop)
    # In a constant channel image - low is 0, so it stays what it is.
    unit = (image - low) / jnp.maximum(high - low, jnp.finfo(image.dtype).tiny)
    image = low + (high - low) * jnp.clip(unit, 0, 1) ** draws["gamma"]
  if "noise" in draws:
    noise = draws["noise"].reshape(image.shape)
    image = image + noise * jnp.std(image, **over_crop)
  return image


def _planes(dims: int) -> list[tuple[int, int]]:
  return list(itertools.combinations(range(dims), 2))
