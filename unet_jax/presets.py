"""Named networks: what a preset sets in `schema.ModelConfig`.

A field named here cannot be overruled; all others stay free.
"""

from collections.abc import Mapping
from typing import Any

# The blocks of the 2015 paper.
_CLASSIC = {
  "odd_size": "pad_input",
  "activation": "relu",
  "bias": True,
  "residual": False,
  "squeeze_excite": False,
  "block_dropout": 0.0,
  "pool": "max",
  "bottleneck": "conv",
  "up": "transpose",
  "decoder": "plain",
  "narrow_decoder": False,
  "skip": "concat",
  "head_kernel": 1,
}
_SAME_BATCH = {
  **_CLASSIC,
  "padding": "same",
  "norm": "batch",
  "norm_momentum": 0.9,
  "dropout": 0.0,
}
# What a preset sets. A field named here cannot be overruled.
PRESETS: Mapping[str, Mapping[str, Any]] = {
  # Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597, section 2.
  "unet2015": {
    **_CLASSIC,
    "dims": 2,
    "widths": (64, 128, 256, 512, 1024),
    "padding": "valid",
    "norm": "none",
    "dropout": 0.5,
  },
  # The small PyTorch U-Net that this project grew from: three poolings,
  # aligned bilinear upsampling, batch norm (PyTorch momentum 0.1).
  "seed": {
    **_SAME_BATCH,
    "dims": 2,
    "widths": (64, 128, 256, 512),
    "up": "linear_aligned",
  },
  # github.com/milesial/Pytorch-UNet, bilinear=False and True.
  "milesial": {
    **_SAME_BATCH,
    "dims": 2,
    "widths": (64, 128, 256, 512, 1024),
    "odd_size": "pad_up",
    "bias": False,
  },
  "milesial_bilinear": {
    **_SAME_BATCH,
    "dims": 2,
    "widths": (64, 128, 256, 512, 512),
    "odd_size": "pad_up",
    "bias": False,
    "up": "linear_aligned",
    "narrow_decoder": True,
  },
  # MONAI's BasicUNet with its default features, in 2D or 3D.
  "monai_basic": {
    **_CLASSIC,
    "widths": (32, 32, 64, 128, 256),
    "padding": "same",
    "odd_size": "pad_up_replicate",
    "norm": "instance",
    "activation": "leaky_relu",
    "leaky_slope": 0.1,
    "dropout": 0.0,
  },
  # Zhou et al. 2018, https://arxiv.org/abs/1807.10165, the authors' Keras code.
  "unetpp": {
    **_CLASSIC,
    "widths": (32, 64, 128, 256, 512),
    "padding": "same",
    "norm": "none",
    "dropout": 0.0,
    "decoder": "nested",
  },
  # Huang et al. 2020, https://arxiv.org/abs/2004.08790, the authors' PyTorch
  # code, whose head is 3x3.
  "unet3p": {
    **_SAME_BATCH,
    "widths": (64, 128, 256, 512, 1024),
    "up": "linear",
    "decoder": "full_scale",
    "head_kernel": 3,
  },
  # Oktay et al. 2018, https://arxiv.org/abs/1804.03999: the gate, on the
  # 2015 widths.
  "attention": {
    **_SAME_BATCH,
    "widths": (64, 128, 256, 512, 1024),
    "skip": "attn_oktay",
  },
}
# Pixels an axis of the input that a preset is drawn with; others have 256.
_REFERENCE_SIZES = {"unet2015": 572, "unet3p": 320}


def reference_size(preset: str) -> int:
  """Pixels an axis of the input that `preset` is drawn with: its paper's."""
  return _REFERENCE_SIZES.get(preset, 256)
