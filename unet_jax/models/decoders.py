"""From the features of all levels back to full resolution.

A decoder maps what the encoder gave, `features` of all levels (0 = full
resolution, the bottleneck last), to the feature maps to be read out: that of
the prediction first, then, coarser and coarser, those of deep supervision.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from unet_jax import geometry, resample
from unet_jax.models import blocks, probes, skips
from unet_jax.models.skips import Context, Wires

# odd_size -> how an upsampled feature is padded to its level's size.
PAD_MODES = {"pad_up": "constant", "pad_up_replicate": "edge"}


class Decoder(nn.Module):
  """What the decoders share; fields as in `unet.UNet`."""

  layers: blocks.Layers
  widths: tuple[int, ...]
  up: str
  skip: str
  skip_levels: tuple[bool, ...]
  odd_size: str = "pad_input"
  narrow: bool = False
  prune: int = 0
  axis_name: str | None = None
  factors: tuple[tuple[int, ...], ...] = ()

  @property
  def depth(self) -> int:
    return len(self.widths) - 1

  def carry(self, features: Sequence[jax.Array]) -> list[jax.Array]:
    """The encoder's features as they travel sideways."""
    carry = skips.SKIPS[self.skip].carry
    if carry is None:
      return list(features)
    finest = self.widths[0]
    return carry(self.layers, self.skip_levels, finest, name="carry")(features)

  def factor(self, fine: int, coarse: int) -> resample.Factor:
    """How many pixels of level `fine` one of `coarse` has, along an axis."""
    if not self.factors:
      return 2 ** (coarse - fine)
    return geometry.level_factor(self.factors, fine, coarse)

  def upsample(
    self, x: jax.Array, like: jax.Array, features: int, name: str, *levels: int
  ) -> jax.Array:
    """Enlarges x from the second of two `levels` to the first, as `like`."""
    up = blocks.UPS[self.up]
    x = up(features, factor=self.factor(*levels), name=name)(x)
    if self.odd_size in PAD_MODES:
      x = blocks.pad_to(x, like.shape[1:-1], PAD_MODES[self.odd_size])
    return x

  def join(
    self,
    wires: Wires,
    level: int,
    name: str,
    origins: Sequence[int] | None = None,
  ) -> jax.Array:
    """What enters the convolutions; valid padding's crop happens here, once.

    Without sides, where the level is off, nothing is joined. `origins` are the
    levels that the sides come from, without it all from `level`.
    """
    kind = self.skip if wires.sides else "none"
    join = skips.SKIPS[kind].join(
      self.layers, level, self.widths[level], self.axis_name, name=name
    )
    size = wires.up.shape[1:-1]
    sides = [blocks.crop_to(x, size) for x in wires.sides]
    up, context = wires.up, wires.context
    if context.cut is not None:
      origins = origins or [level] * len(sides)
      pairs = zip(sides, origins, strict=True)
      sides = [context.cut.replace_side(x, k) for x, k in pairs]
    if context.ears is not None:
      skip, deep = context.ears[:, level]
      sides = [probes.overhear(x, skip) for x in sides]
      up = probes.overhear(up, deep)
    return join(wires._replace(sides=sides, up=up))

  def block(
    self, x: jax.Array, name: str, *widths: int, up: jax.Array | None = None
  ) -> jax.Array:
    """Convolutions to `widths` channels of x, the last of which may be `up`."""
    # A join that adds or multiplies may have fewer channels than `up`.
    seam = 0 if up is None else max(x.shape[-1] - up.shape[-1], 0)
    return self.layers.block(widths, name, seam)(x)


class PlainDecoder(Decoder):
  """Up, join the skip, two convolutions; once for every level.

  With `narrow` a level's second convolution already has the width of the level
  above, and the first the mean of what enters (milesial's bilinear form).
  """

  @nn.compact
  def __call__(
    self, features: Sequence[jax.Array], context: Context
  ) -> list[jax.Array]:
    x, outputs, carried = features[-1], [], self.carry(features)

    def ascend(self: PlainDecoder, x: jax.Array, level: int) -> jax.Array:
      width = self.widths[level]
      sides = [carried[level]] if self.skip_levels[level] else []
      like, below = features[level], level + 1
      up = self.upsample(x, like, width, f"up_{level}", level, below)
      x = self.join(Wires(sides, up, x, context), level, f"skip_{level}")
      widths = (width, width)
      if self.narrow:
        widths = (max(x.shape[-1] // 2, 1), self.widths[max(level - 1, 0)])
      return self.block(x, f"decoder_{level}", *widths, up=up)

    for level in reversed(range(self.depth)):
      step = functools.partial(ascend, level=level)
      x = self.layers.level(self, step)(x)
      outputs.append(x)
    return outputs[::-1]


class NestedDecoder(Decoder):
  """UNet++: node x_{i,j} joins all nodes to its left and the one below.

    x_{i,j} = H([x_{i,0}, ..., x_{i,j-1}; U(x_{i+1,j-1})])

  The outputs are x_{0,J}, ..., x_{0,1}. A join acts on all that arrives
  sideways, a carry on x_{i,0}; a level that is off has no wire. `prune` = L > 0
  builds L columns alone: L1..L4 of the paper, with the whole one's parameters.

  Reference: Zhou et al. 2018, https://arxiv.org/abs/1807.10165, equation 1.
  """

  @nn.compact
  def __call__(
    self, features: Sequence[jax.Array], context: Context
  ) -> list[jax.Array]:
    nodes = {(i, 0): x for i, x in enumerate(features)}
    carried, columns = self.carry(features), self.prune or self.depth

    def node(
      self: NestedDecoder, below: jax.Array, i: int, j: int
    ) -> jax.Array:
      width, name = self.widths[i], f"{i}_{j}"
      sides = [carried[i], *(nodes[i, k] for k in range(1, j))]
      sides = sides if self.skip_levels[i] else []
      up = self.upsample(below, features[i], width, f"up_{name}", i, i + 1)
      x = self.join(Wires(sides, up, below, context), i, f"skip_{name}")
      return self.block(x, f"decoder_{name}", width, width, up=up)

    for j in range(1, columns + 1):
      for i in range(columns - j + 1):
        step = functools.partial(node, i=i, j=j)
        nodes[i, j] = self.layers.level(self, step)(nodes[i + 1, j - 1])
    return [nodes[0, j] for j in range(columns, 0, -1)]


class FullScaleDecoder(Decoder):
  """UNet 3+: each level joins the encoder down to it, the decoder up to it.

    d_i = H([C(D(x_k))_{k<i}, C(x_i), C(U(d_k))_{k>i}])

  D max-pools, U upsamples by 2^(k-i) in one go, C is a 3-wide convolution to
  widths[0] channels, norm and activation, H the same to len(widths) times as
  many; d of the deepest level is the bottleneck. A skip joins the first two
  kinds to the third; a level k that is off sends x_k to no d_i. With a learned
  `up`, U(d_k) has widths[0] channels. The outputs are d_0, d_1, ..., and the
  bottleneck.

  Reference: Huang et al. 2020, https://arxiv.org/abs/2004.08790, equation 1.
  """

  @nn.compact
  def __call__(
    self, features: Sequence[jax.Array], context: Context
  ) -> list[jax.Array]:
    decoded, carried = {self.depth: features[-1]}, self.carry(features)
    cat, width = self.widths[0], self.widths[0] * len(self.widths)

    def level(self: FullScaleDecoder, below: jax.Array, i: int) -> jax.Array:
      sides, ups = [], []
      on = self.skip != "none"
      origins = [k for k in range(i + 1) if self.skip_levels[k] and on]
      for k in origins:
        x = resample.max_pool(carried[k], self.factor(k, i))
        sides.append(self.block(x, f"side_{k}_{i}", cat))
      for k in range(i + 1, self.depth + 1):
        name = f"{k}_{i}"
        x = self.upsample(decoded[k], features[i], cat, f"up_{name}", i, k)
        ups.append(self.block(x, f"deep_{name}", cat))
      wires = Wires(sides, jnp.concatenate(ups, -1), below, context)
      x = self.join(wires, i, f"skip_{i}", origins)
      return self.block(x, f"decoder_{i}", width, up=wires.up)

    for i in reversed(range(self.depth)):
      step = functools.partial(level, i=i)
      decoded[i] = self.layers.level(self, step)(decoded[i + 1])
    return [decoded[i] for i in range(self.depth + 1)]


DECODERS: dict[str, type[Decoder]] = {
  "plain": PlainDecoder,
  "nested": NestedDecoder,
  "full_scale": FullScaleDecoder,
}
