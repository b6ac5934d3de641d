"""The U-Net: contract, expand, and join what the two paths know."""

import functools
from typing import Any

import flax.linen as nn
import jax

from unet_jax import config, geometry
from unet_jax.models import blocks, decoders


class UNet(nn.Module):
  """An encoder-decoder with skips; fields as in `config.ModelConfig`.

  Attributes:
    num_classes: channels of the logits; 1 is one sigmoid logit.
    axis_name: the `pmap` axis over which batch norm averages, or None.
  """

  num_classes: int
  dims: int = 2
  widths: tuple[int, ...] = (16, 32, 64, 128)
  padding: str = "same"
  norm: str = "batch"
  norm_momentum: float = 0.9
  norm_groups: int = 8
  up: str = "transpose"
  decoder: str = "plain"
  skip: str = "concat"
  skip_levels: tuple[bool, ...] = ()
  activation: str = "relu"
  bias: bool = True
  dropout: float = 0.0
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    """Maps images to logits.

    Args:
      x: [B, *S, C], every S one that `geometry.is_legal` accepts.
      train: use the batch's own statistics (and update the running ones) and
        drop activations; needs `mutable=["batch_stats"]` and a "dropout" rng.

    Returns:
      Logits [B, *S', num_classes]; S' = S for padding="same" and S minus
      `geometry.valid_loss(depth)` for "valid".

    Raises:
      ValueError: wrong rank or illegal size; names the nearest legal sizes.
    """
    depth = len(self.widths) - 1
    if x.ndim != self.dims + 2:
      raise ValueError(
        f"input {x.shape}: expected [B, *S, C], dims={self.dims}"
      )
    for size in x.shape[1:-1]:
      geometry.output_size(size, depth, self.padding)

    block = self._block(train)
    features = []
    for level, width in enumerate(self.widths):
      x = blocks.max_pool(x) if level else x
      x = block(width, name=f"encoder_{level}")(x)
      if level >= depth - 1:  # The end of the contracting path.
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
      features.append(x)
    x = decoders.DECODERS[self.decoder](
      self.widths,
      up=self.up,
      skip=self.skip,
      skip_levels=self.skip_levels or (True,) * depth,
      block=block,
      name="decoder",
    )(features)
    return nn.Conv(
      self.num_classes,
      (1,) * self.dims,
      kernel_init=blocks.he_normal,
      name="head",
    )(x)

  def _block(self, train: bool) -> blocks.ModuleDef:
    """`DoubleConv` bound to everything but its features and name."""
    conv = functools.partial(
      nn.Conv,
      kernel_size=(3,) * self.dims,
      padding=self.padding.upper(),
      use_bias=self.bias,
      kernel_init=blocks.he_normal,
    )
    norm = blocks.make_norm(
      self.norm,
      train=train,
      momentum=self.norm_momentum,
      groups=self.norm_groups,
      axis_name=self.axis_name,
    )
    return functools.partial(
      blocks.DoubleConv,
      conv=conv,
      norm=norm,
      activation=blocks.ACTIVATIONS[self.activation],
    )


def build_model(*, num_classes: int, preset: str = "", **fields: Any) -> UNet:
  """A U-Net from plain values; a preset overrules the fields it names.

  Example: `build_model(num_classes=2, preset="unet2015")` is the paper's
  network, 31,030,658 parameters for one input channel.
  """
  table = dict(config.PRESETS[preset]) if preset else {}
  return UNet(num_classes=num_classes, **{**fields, **table})
