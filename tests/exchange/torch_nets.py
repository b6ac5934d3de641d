"""The published networks in PyTorch, with their key names, for comparison."""

import numpy as np
import torch
from torch import nn


def double_conv(inside, outside, middle=None, bias=True):
  middle = middle or outside
  return nn.Sequential(
    nn.Conv2d(inside, middle, 3, padding=1, bias=bias),
    nn.BatchNorm2d(middle),
    nn.ReLU(),
    nn.Conv2d(middle, outside, 3, padding=1, bias=bias),
    nn.BatchNorm2d(outside),
    nn.ReLU(),
  )


class Named(nn.Module):
  """Puts a module one name deeper: Named(conv=...) -> "conv.0.weight"."""

  def __init__(self, **modules):
    super().__init__()
    for name, module in modules.items():
      self.add_module(name, module)

  def forward(self, x):
    for module in self.children():
      x = module(x)
    return x


def doubled():
  return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


class Seed(nn.Module):
  """Three poolings, aligned bilinear upsampling, [up; skip]."""

  def __init__(
    self, channels=3, classes=1, widths=(64, 128, 256, 512), head="conv_last"
  ):
    super().__init__()
    self.depth, self.head = len(widths) - 1, head
    ins = (channels, *widths)
    for n, width in enumerate(widths):
      block = Named(conv=double_conv(ins[n], width))
      self.add_module(f"dconv_down{n + 1}", block)
    for n in range(self.depth):
      block = Named(conv=double_conv(widths[n] + widths[n + 1], widths[n]))
      self.add_module(f"dconv_up{n + 1}", block)
    self.add_module(head, nn.Conv2d(widths[0], classes, 1))

  def forward(self, x):
    skips = []
    for n in range(self.depth + 1):
      x = nn.functional.max_pool2d(x, 2) if n else x
      x = getattr(self, f"dconv_down{n + 1}")(x)
      skips.append(x)
    for n in reversed(range(self.depth)):
      x = torch.cat([doubled()(x), skips[n]], dim=1)
      x = getattr(self, f"dconv_up{n + 1}")(x)
    return getattr(self, self.head)(x)


class Milesial(nn.Module):
  """Four poolings; the upsampled feature is padded to its skip."""

  def __init__(self, channels, classes, width=64, bilinear=False):
    super().__init__()
    widths = [width * 2**n for n in range(5)]
    if bilinear:
      widths[4] //= 2
    self.inc = Named(double_conv=double_conv(channels, width, bias=False))
    for n in range(4):
      block = double_conv(widths[n], widths[n + 1], bias=False)
      pooled = nn.Sequential(nn.MaxPool2d(2), Named(double_conv=block))
      self.add_module(f"down{n + 1}", Named(maxpool_conv=pooled))
    for n in reversed(range(4)):
      inside, outside = 2 * widths[n], widths[n]
      if bilinear:
        up, outside = doubled(), widths[max(n - 1, 0)]
        block = double_conv(inside, outside, inside // 2, bias=False)
      else:
        up = nn.ConvTranspose2d(inside, outside, 2, stride=2)
        block = double_conv(inside, outside, bias=False)
      pair = Named(up=up, conv=Named(double_conv=block))
      self.add_module(f"up{4 - n}", pair)
    self.outc = Named(conv=nn.Conv2d(width, classes, 1))

  def forward(self, x):
    skips = [self.inc(x)]
    for n in range(1, 5):
      skips.append(getattr(self, f"down{n}")(skips[-1]))
    x = skips.pop()
    for n in range(1, 5):
      level, skip = getattr(self, f"up{n}"), skips.pop()
      x = level.up(x)
      rows = skip.shape[2] - x.shape[2]
      columns = skip.shape[3] - x.shape[3]
      # At most one pixel, which half a pixel rounded puts at the end.
      x = nn.functional.pad(x, [0, columns, 0, rows])
      x = level.conv(torch.cat([skip, x], dim=1))
    return self.outc(x)


def randomise(net, seed=0):
  """Random weights, norms and running statistics, for logits of about 1."""
  generator = torch.Generator().manual_seed(seed)
  for name, x in net.state_dict().items():
    if x.is_floating_point():
      noise = torch.randn(x.shape, generator=generator)
      if x.ndim > 1:
        x.copy_(noise * (2 / x[0].numel()) ** 0.5)
      elif name.endswith("running_var") or "weight" in name:
        x.copy_(0.8 + 0.2 * noise.abs())
      else:
        x.copy_(noise * 0.3)
  return net.eval()


def logits(net, image):
  """[B, *S, C] -> [B, *S, K] through PyTorch."""
  with torch.no_grad():
    out = net(torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
  return np.moveaxis(out.numpy(), 1, -1)
