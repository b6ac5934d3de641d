"""Pure Flax (linen) modules that define any U-Net."""

from unet_jax.models.unet import UNet, build_model

__all__ = ["UNet", "build_model"]
