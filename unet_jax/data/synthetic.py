"""Synthetic microscopy: cells of which every pixel is known, on any axes.

Example i of a split is a pure function of (seed, split, i). Bright deformed
cells touch and overlap; halos, out-of-focus light, uneven illumination, texture
and noise keep a threshold from finding them.

With `data.synthetic_texture` cells are as bright and as varied as what is
around them, and only the grain differs; the split "shifted" has the cells of
"test" with a grain nearer to that of the background.

Reference: Kamath et al. 2023, Do We Really Need That Skip-Connection?, whose
  foreground is blended with the texture of the background in the same way.
"""

import dataclasses
import math
import pathlib

import numpy as np
from scipy import ndimage

from unet_jax.config import Config

_SPLIT_IDS = {"train": 0, "val": 1, "test": 2, "shifted": 2}
# Grain of background and cells: standard deviations in pixels of the two
# Gaussians whose difference filters the noise.
_GRAINS = (1.0, 2.0), (2.0, 4.0)

_RADIUS = (5.0, 9.0)
# Share of the image that the cells would cover side by side.
_COVERAGE = (0.15, 0.5)
# Reach of a cell's light, in radii: beyond it the halo is not drawn.
_REACH = 2.2


class SyntheticSource:
  """Cells of kinds 1..K-1 on background 0; see `unet_jax.data.source`.

  `num_classes` 1 and 2 know one kind of cell. With more, kinds differ in
  brightness and in how dark their inside is. Cells drawn later lie on top. An
  example also has "instances", int32 [*S]: 0 = background, else one id a cell.
  """

  def __init__(self, cfg: Config, split: str, split_dir: pathlib.Path | None):
    del split_dir
    self._size = cfg.data.synthetic_size
    self._num_kinds = max(cfg.data.num_classes, 2) - 1
    self._channels = cfg.data.channels
    self._seed = (cfg.seed, _SPLIT_IDS[split])
    shifted = split == "shifted"
    num = getattr(
      cfg.data, "synthetic_test" if shifted else f"synthetic_{split}"
    )
    self._texture = cfg.data.synthetic_texture
    if shifted:
      self._texture = min(self._texture + cfg.data.synthetic_shift, 1.0)
    self.names = [f"{split}_{i:05d}" for i in range(num)]

  @staticmethod
  def list_splits(cfg: Config, split_dir: pathlib.Path | None) -> list[str]:
    del split_dir
    return [s for s in _SPLIT_IDS if s != "shifted" or cfg.data.synthetic_shift]

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    if not 0 <= index < len(self):
      raise IndexError(index)
    rng = np.random.default_rng((*self._seed, index))
    cells = _draw_cells(rng, self._size, self._num_kinds)
    body = np.zeros(self._size, np.float32)
    halo = np.zeros(self._size, np.float32)
    ids = np.zeros(self._size, np.int32)
    for i in range(len(cells.radius)):
      _paint(cells, i, body, halo, ids)
    kinds = np.append(0, cells.kind).astype(np.int32)
    if self._texture is None:
      image = _expose(rng, body, halo, self._channels)
    else:
      image = _weave(rng, ids > 0, self._channels, self._texture)
    return {
      "image": image,
      "label": kinds[ids],
      "weight": np.ones(self._size, np.float32),
      "instances": ids,
    }

  def image(self, index: int) -> np.ndarray:
    return self[index]["image"]

  def instances(self, index: int) -> np.ndarray:
    return self[index]["instances"]

  def size(self, index: int) -> tuple[int, ...]:
    del index
    return self._size

  def path(self, index: int) -> None:
    """Drawn, not read."""

  def spacing(self, index: int) -> None:
    """Drawn without a unit."""

  def check(self, index: int, *, read_label: bool) -> None:
    """Nothing can be wrong with drawn data."""


@dataclasses.dataclass(frozen=True)
class _Cells:
  """N deformed ellipsoids on D axes, the topmost last."""

  radius: np.ndarray  # [N]
  centre: np.ndarray  # [N, D]
  axes: np.ndarray  # [N, D, D], pixels to the frame where the cell is a ball
  lobes: np.ndarray  # [N, D, 2]
  kind: np.ndarray  # [N], 1..num_kinds
  brightness: np.ndarray  # [N]
  hollow: np.ndarray  # [N]


def _draw_cells(
  rng: np.random.Generator, size: tuple[int, ...], num_kinds: int
) -> _Cells:
  dims = len(size)
  most = min(_RADIUS[1], min(size) / 4)
  # Volume of a typical cell: a ball in 1, 2 or 3 dimensions.
  volume = (2, math.pi, 4.19)[dims - 1] * (0.8 * most) ** dims
  coverage = rng.uniform(*_COVERAGE)
  num = max(round(coverage * math.prod(size) / volume), 1)
  radius = rng.uniform(min(_RADIUS[0], most), most, num)
  turn, _ = np.linalg.qr(rng.normal(size=(num, dims, dims)))
  stretch = np.exp(rng.uniform(-0.25, 0.25, (num, 1, dims)))
  kind = rng.integers(1, num_kinds + 1, num)
  # 0 for the first kind, 1 for the last.
  shade = (kind - 1) / max(num_kinds - 1, 1)
  return _Cells(
    radius=radius,
    centre=rng.uniform(0, size, (num, dims)),
    axes=(turn / (radius[:, None, None] * stretch)).astype(np.float32),
    lobes=rng.normal(0, 1.5, (num, dims, 2)).astype(np.float32),
    kind=kind,
    brightness=rng.uniform(0.18, 0.42, num) + 0.25 * shade,
    hollow=rng.uniform(0.0, 0.4, num) + 0.4 * shade,
  )


def _paint(
  cells: _Cells, i: int, body: np.ndarray, halo: np.ndarray, ids: np.ndarray
) -> None:
  """Adds cell `i` to the arrays [*S] in place, as id i + 1."""
  reach = _REACH * cells.radius[i]
  box = tuple(
    slice(max(int(c - reach), 0), int(c + reach) + 2) for c in cells.centre[i]
  )
  spans = [
    np.arange(n, dtype=np.float32)[s] - np.float32(c)
    for n, s, c in zip(body.shape, box, cells.centre[i], strict=True)
  ]
  grid = np.stack(np.meshgrid(*spans, indexing="ij"), axis=-1)
  unit = grid.reshape(-1, len(box)) @ cells.axes[i]
  rho = np.sqrt((unit * unit).sum(-1)) + np.float32(1e-6)
  # Waves over the unit sphere deform the outline, whatever its dimension.
  waves = np.cos(unit @ cells.lobes[i] / rho[:, None] + np.float32(0.7))
  rho *= 1 + np.float32(0.1) * waves.sum(-1)
  rho = rho.reshape(grid.shape[:-1])
  inside = rho < 1
  light = np.float32(cells.brightness[i])
  profile = light * (1 - np.float32(cells.hollow[i]) * (1 - rho * rho))
  np.copyto(body[box], profile, where=inside)
  ids[box][inside] = i + 1
  glow = np.exp(np.minimum(1 - rho, 0) * np.float32(cells.radius[i] / 2.5))
  # Fades to 0 at the edge of the box instead of stopping there.
  glow *= np.clip(_REACH - rho, 0, 1)
  halo[box] += np.float32(0.35) * light * glow


def _expose(
  rng: np.random.Generator, body: np.ndarray, halo: np.ndarray, channels: int
) -> np.ndarray:
  """What the camera records: float32 [*S, channels] in [0, 1]."""
  size = body.shape
  noise = lambda: rng.standard_normal(size, np.float32)
  texture = ndimage.gaussian_filter(noise(), 1.5)
  texture *= 0.02 / (texture.std() + 1e-6)
  lights = [
    body * (1 + 3 * texture),
    halo,
    texture + _out_of_focus(rng, size),
    _illumination(rng, size),
  ]
  # Channel 0 sees all lights alike, the others each in its own proportion.
  mix = 0.65 + 0.35 * np.cos(np.outer(np.arange(channels), np.arange(4)))
  image = np.empty((*size, channels), np.float32)
  for channel, weights in enumerate(mix.astype(np.float32)):
    light = sum(w * x for w, x in zip(weights, lights, strict=True))
    sharp = ndimage.gaussian_filter(light, 0.6)
    image[..., channel] = sharp + 0.02 * noise()
  return np.clip(image, 0, 1)


def _weave(
  rng: np.random.Generator, inside: np.ndarray, channels: int, similarity: float
) -> np.ndarray:
  """Grain alone: float32 [*S, channels] in [0, 1], cells where `inside`.

  With background b and cells c of mean 0 and variance 1, and similarity s, a
  cell shows ((1 - s) c + s b) / sqrt((1 - s)^2 + s^2): its contrast is that of
  b for every s, and for s = 1 there is nothing to see.
  """

  def grain(fine: float, coarse: float) -> np.ndarray:
    noise = rng.standard_normal(inside.shape, np.float32)
    x = ndimage.gaussian_filter(noise, fine)
    x -= ndimage.gaussian_filter(noise, coarse)
    return (x - x.mean()) / (x.std() + 1e-6)

  around, cell = (grain(*sizes) for sizes in _GRAINS)
  own = np.float32(1 - similarity)
  cell = own * cell + np.float32(similarity) * around
  cell /= np.float32(math.hypot(1 - similarity, similarity))
  light = 0.5 + np.float32(0.15) * np.where(inside, cell, around)
  noise = rng.standard_normal((*inside.shape, channels), np.float32)
  return np.clip(light[..., None] + np.float32(0.02) * noise, 0, 1)


def _illumination(
  rng: np.random.Generator, size: tuple[int, ...]
) -> np.ndarray:
  """Background light: a slope and a wave longer than the image."""
  light = np.float32(rng.uniform(0.12, 0.22))
  for n in size:
    t = np.linspace(-0.5, 0.5, n, dtype=np.float32)
    wave = np.cos(rng.uniform(2, 5) * t + rng.uniform(0, 2 * np.pi))
    light = np.add.outer(light, rng.uniform(-0.35, 0.35) * t + 0.08 * wave)
  return light


def _out_of_focus(
  rng: np.random.Generator, size: tuple[int, ...]
) -> np.ndarray:
  """Dim wide spots: cells of other planes, which are background."""
  light = np.zeros(size, np.float32)
  for _ in range(1 + math.prod(size) // 64 ** len(size)):
    spot = np.float32(rng.uniform(0.15, 0.35))
    for n in size:
      t = (np.arange(n) - rng.uniform(0, n)) / rng.uniform(6, 12)
      spot = np.multiply.outer(spot, np.exp(-(t**2) / 2).astype(np.float32))
    light += spot
  return light
