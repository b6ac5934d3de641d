"""From the features of all levels back to full resolution."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from unet_jax.models import blocks, skips


class PlainDecoder(nn.Module):
  """Up, join the skip, two convolutions; once for every level."""

  widths: tuple[int, ...]
  up: str
  skip: str
  skip_levels: tuple[bool, ...]
  block: blocks.ModuleDef

  @nn.compact
  def __call__(self, features: Sequence[jax.Array]) -> jax.Array:
    """[B, *(S / 2^l), widths[l]] of all levels l -> [B, *S, widths[0]]."""
    x = features[-1]
    for level in reversed(range(len(features) - 1)):
      x = blocks.UPS[self.up](self.widths[level], name=f"up_{level}")(x)
      kind = self.skip if self.skip_levels[level] else "none"
      # Valid padding leaves x smaller than its skip: cropped here, once.
      cropped = list(features)
      cropped[level] = blocks.crop_to(features[level], x.shape[1:-1])
      x = skips.SKIPS[kind](name=f"skip_{level}")(cropped, x, level)
      x = self.block(self.widths[level], name=f"decoder_{level}")(x)
    return x


DECODERS: dict[str, Callable[..., nn.Module]] = {"plain": PlainDecoder}
