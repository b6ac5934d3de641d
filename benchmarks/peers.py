"""The same networks in PyTorch for the timing scripts: a step, a forward pass.

Needs the extra [torch]. Layouts are PyTorch's ways to run a network: eager,
channels-last memory, and compiled in that memory.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import nn


class Block(nn.Sequential):
  """Two 3-wide convolutions, with batch norm where it is asked for."""

  def __init__(self, dims, inputs, outputs, norm, padding):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    batch = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    layers = []
    for channels in (inputs, outputs):
      layers.append(conv(channels, outputs, 3, padding=padding))
      layers += [batch(outputs)] if norm else []
      layers.append(nn.ReLU(inplace=True))
    super().__init__(*layers)


class UNet(nn.Module):
  """Contract, expand, concatenate: `up` is "transpose" or "aligned"."""

  def __init__(
    self, dims, widths, up, *, norm=True, valid=False, channels=1, outputs=1
  ):
    super().__init__()
    padding = 0 if valid else 1
    inputs = [channels, *widths[:-1]]
    pairs = list(zip(inputs, widths, strict=True))
    self.down = nn.ModuleList(Block(dims, *p, norm, padding) for p in pairs)
    self.pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dims - 1](2)
    deconv = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    self.up, self.merge = nn.ModuleList(), nn.ModuleList()
    for fine, coarse in list(itertools.pairwise(widths))[::-1]:
      if up == "transpose":
        self.up.append(deconv[dims - 1](coarse, fine, 2, stride=2))
        joined = 2 * fine
      else:
        mode = ("linear", "bilinear", "trilinear")[dims - 1]
        layer = nn.Upsample(scale_factor=2, mode=mode, align_corners=True)
        self.up.append(layer)
        joined = fine + coarse
      self.merge.append(Block(dims, joined, fine, norm, padding))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    self.head = conv(widths[0], outputs, 1)

  def forward(self, x):
    features = []
    for level, block in enumerate(self.down):
      x = block(self.pool(x) if level else x)
      features.append(x)
    for up, merge, skip in zip(
      self.up, self.merge, features[-2::-1], strict=True
    ):
      x = up(x)
      for axis, size in enumerate(x.shape[2:], start=2):
        skip = skip.narrow(axis, (skip.shape[axis] - size) // 2, size)
      x = merge(torch.cat([skip, x], 1))
    return self.head(x)


def make_step(fields: dict, shape: tuple[int, ...], layout: str) -> Callable:
  """A function that does one SGD step on binary cross-entropy."""
  net, x = _lay_out(fields, shape, layout)
  net.train()
  y = (torch.rand_like(net(x)) > 0.5).float()
  run = torch.compile(net) if layout == "compile" else net
  optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
  loss_fn = nn.BCEWithLogitsLoss()

  def step() -> None:
    optimizer.zero_grad()
    loss_fn(run(x), y).backward()
    optimizer.step()

  return step


def make_forward(fields: dict, shape: tuple[int, ...], layout: str) -> Callable:
  """A function that does one forward pass as for prediction."""
  net, x = _lay_out(fields, shape, layout)
  net.eval()
  run = torch.compile(net) if layout == "compile" else net

  def forward() -> None:
    with torch.inference_mode():
      run(x)

  return forward


def make_network(fields: dict, dims: int, layout: str) -> Callable:
  """A function of float32 [B, 1, *S] that gives a network's logits."""
  net, _ = _lay_out(fields, (1, *(64,) * dims), layout)
  net.eval()
  compiled = torch.compile(net) if layout == "compile" else net

  def run(batch: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(np.ascontiguousarray(batch))
    if layout != "eager" and dims > 1:
      memory = (torch.channels_last, torch.channels_last_3d)[dims - 2]
      x = x.to(memory_format=memory)
    with torch.inference_mode():
      return compiled(x).numpy()

  return run


def _lay_out(
  fields: dict, shape: tuple[int, ...], layout: str
) -> tuple[nn.Module, torch.Tensor]:
  """The network and an input of one channel, shape [B, *S], in memory."""
  torch.manual_seed(0)
  net = UNet(len(shape) - 1, **fields)
  x = torch.randn(shape[0], 1, *shape[1:])
  if layout != "eager" and len(shape) > 2:
    memory = (torch.channels_last, torch.channels_last_3d)[len(shape) - 3]
    net, x = net.to(memory_format=memory), x.to(memory_format=memory)
  return net, x
