"""Trains the seed's network in PyTorch for as long as our finished runs took.

  python benchmarks/results_peer.py DIR [--clock wall|cpu]

DIR is the folder of a study of one arm, as `configs/results.py` makes it. For
each finished run of it: the same splits, crops in the same order,
normalisation, losses, flips and turns, optimizer and learning rates (as a
share of the time), scored by our code on the same images. Not the rest of our
augmentation, and no moving average of the weights. Where there is a test
split, the best of as many looks at val (at most) is scored; else the last, as
of our runs. Time is counted from the making of the network, as ours is from
the first look at the data; of its looks at val the network's passes count, not
the scoring by our code, while all of ours counts. On a machine that is shared,
give --clock cpu: the CPU seconds of all threads.

Leaves DIR/peer/ID.json; run again = goes on. Needs the extra [torch].
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import peers
import torch
from torch.nn import functional

from unet_jax import evaluate as evaluate_lib
from unet_jax import optimizer as optimizer_lib
from unet_jax import run_log
from unet_jax import workdir as workdir_lib
from unet_jax.data import pipeline
from unet_jax.objectives import losses, metrics
from unet_jax.objectives.region_losses import DICE_SMOOTHING
from unet_jax.runtime import parallel, writers
from unet_jax.studies import run as studies

WIDTHS = (64, 128, 256, 512)  # The seed's.
SAVE_EVERY = 300  # Seconds.


def flipped(batch, augment, rng):
  """The batch with each example mirrored and turned as `augment` allows."""
  batch = {k: batch[k].copy() for k in ("image", "label", "weight")}
  size = batch["label"].shape[1:]
  for i, arrays in enumerate(zip(*batch.values(), strict=True)):
    axes = [a for a in range(len(size)) if augment.flip and rng.random() < 0.5]
    arrays = [np.flip(x, axes) for x in arrays]
    for a, b in itertools.combinations(range(len(size)), 2):
      quarters = rng.integers(4) if augment.turn else 0
      quarters &= 3 if size[a] == size[b] else 2
      arrays = [np.rot90(x, quarters, (a, b)) for x in arrays]
    for whole, one in zip(batch.values(), arrays, strict=True):
      whole[i] = one
  return batch


def cross_entropy(logits, label, weight):
  """As `pixel_losses.cross_entropy`: [B] of logits [B, K, *S]."""
  if logits.shape[1] == 1:
    truth = label.to(logits.dtype)
    loss = functional.binary_cross_entropy_with_logits(
      logits[:, 0], truth, reduction="none"
    )
  else:
    loss = functional.cross_entropy(logits, label, reduction="none")
  axes = tuple(range(1, label.dim()))
  return (weight * loss).sum(axes) / weight.sum(axes).clamp(min=1e-9)


def dice(logits, label, weight):
  """As `region_losses.dice`: [B] of logits [B, K, *S]."""
  if logits.shape[1] == 1:
    p, truth = logits.sigmoid(), (label == 1).unsqueeze(1)
  else:
    p = logits.softmax(1)[:, 1:]
    classes = torch.arange(1, logits.shape[1])
    classes = classes.view(1, -1, *(1,) * (label.dim() - 1))
    truth = label.unsqueeze(1) == classes
  axes, weight = tuple(range(2, p.dim())), weight.unsqueeze(1)
  overlap = (weight * p * truth).sum(axes)
  size = (weight * (p + truth)).sum(axes)
  return (1 - (2 * overlap + DICE_SMOOTHING) / (size + DICE_SMOOTHING)).mean(1)


LOSSES = {"cross_entropy": cross_entropy, "dice": dice}


def check(cfg):
  """Exits where the losses of a run are not those above."""
  plain = dataclasses.replace(type(cfg.loss)(), terms=cfg.loss.terms)
  if cfg.loss != plain or not set(cfg.loss.terms) <= set(LOSSES):
    sys.exit(f"error: no PyTorch loss as {cfg.loss}; write it in {__file__}")
  if cfg.optimizer.name != "adamw":
    sys.exit(f"error: no optimizer {cfg.optimizer.name}; the peer has adamw")


def to_torch(batch):
  """Tensors of a batch, channels second (in memory last)."""
  image = torch.from_numpy(np.array(batch["image"])).movedim(-1, 1)
  label = torch.from_numpy(batch["label"].astype(np.int64))
  return image, label, torch.from_numpy(np.array(batch["weight"]))


def make_network(cfg):
  """The network and its optimizer."""
  torch.manual_seed(cfg.seed)
  net = peers.UNet(
    cfg.model.dims,
    cfg.model.widths,
    "aligned",
    channels=cfg.data.channels,
    outputs=cfg.data.num_classes,
  )
  if cfg.model.dims == 2:
    net = net.to(memory_format=torch.channels_last)
  own, kernels = cfg.optimizer, [p for p in net.parameters() if p.dim() > 1]
  others = [p for p in net.parameters() if p.dim() <= 1]
  groups = [
    {"params": kernels, "weight_decay": own.weight_decay},
    {"params": others, "weight_decay": 0.0},
  ]
  return net, torch.optim.AdamW(groups, lr=0.0, betas=(own.momentum, own.b2))


def read_clocks():
  """Seconds of each clock, from some origin."""
  return {name: read() for name, read in run_log.SPENT.items()}


def make_eval_step(net, cfg, passes):
  """What `evaluate.make_eval_step` makes, with the network in PyTorch.

  Adds to `passes` the seconds of the network alone, by clock.
  """
  loss_fn = losses.make_loss(**dataclasses.asdict(cfg.loss))

  def eval_step(_, batch):
    image, *_ = to_torch({k: np.asarray(v) for k, v in batch.items()})
    begin = read_clocks()
    with torch.inference_mode():
      logits = net(image).movedim(1, -1).contiguous().numpy()
    for name, end in read_clocks().items():
      passes[name] += end - begin[name]
    logits, label, weight = jnp.asarray(logits), batch["label"], batch["weight"]
    confusion = metrics.confusion(logits, label, weight, cfg.num_labels)
    return {
      "id": batch["id"],
      "valid": batch["valid"],
      "loss": loss_fn(logits, label, weight)[0],
      "confusion": confusion[:, None],
      "prediction": metrics.predict_labels(logits),
      "stop": jnp.max(batch["stop"]),
    }

  return eval_step


class Run:
  """A training run of the peer; what it is made of is in a file."""

  def __init__(self, folder, path, clock, budget, widths=WIDTHS):
    cfg = workdir_lib.read_config(folder)
    check(cfg)
    model = dataclasses.replace(cfg.model, preset="", widths=widths)
    self.cfg = dataclasses.replace(cfg, model=model)
    self.folder, self.path, self.clock, self.budget = (
      folder,
      path,
      clock,
      budget,
    )
    self.normalization = workdir_lib.load_normalization(folder)
    steps = np.arange(cfg.train.num_steps)
    schedule = optimizer_lib.make_schedule(cfg.optimizer, len(steps))
    self.rates = np.asarray(jax.vmap(schedule)(steps))
    self.started = read_clocks()
    self.net, self.optimizer = make_network(self.cfg)
    self.state = {
      **{"step": 0, "looks": 0, "look_seconds": 0.0},
      **{"best_score": -np.inf, "best": None},
    }
    self.before = dict.fromkeys(run_log.SPENT, 0.0)
    if path.with_suffix(".pt").exists():
      kept = torch.load(path.with_suffix(".pt"), weights_only=True)
      self.net.load_state_dict(kept["net"])
      self.optimizer.load_state_dict(kept["optimizer"])
      self.state, self.before = kept["state"], kept["spent"]

  def spent(self):
    """Seconds since the making of the network, by clock, but for scoring."""
    return {
      k: self.before[k] + now - self.started[k]
      for k, now in read_clocks().items()
    }

  def left(self):
    """Seconds until the last look at val has to begin."""
    used = self.spent()[f"{self.clock}_seconds"]
    return self.budget - used - self.state["look_seconds"]

  def source(self, split):
    return pipeline.make_source(
      self.cfg, split, workdir_lib.split_dir(self.folder)
    )

  def score(self, split):
    """Our scores of the network as it is; its passes alone cost it time."""
    before, passes = self.spent(), dict.fromkeys(run_log.SPENT, 0.0)
    self.net.eval()
    result = evaluate_lib.evaluate(
      make_eval_step(self.net, self.cfg, passes),
      None,
      self.source(split),
      self.normalization,
      cfg=self.cfg,
      mesh=parallel.make_mesh(1),
    )
    self.net.train()
    for name, total in self.spent().items():
      self.before[name] -= total - before[name] - passes[name]
    return result

  def save(self):
    """All that another process needs to go on."""
    buffer, parts = io.BytesIO(), (self.net, self.optimizer)
    net, optimizer = (part.state_dict() for part in parts)
    kept = {"net": net, "optimizer": optimizer, "state": self.state}
    torch.save({**kept, "spent": self.spent()}, buffer)
    writers.write_atomically(self.path.with_suffix(".pt"), buffer.getvalue())

  def look(self):
    """Scores val, as our runs do now and then, and keeps the best."""
    begin = self.spent()[f"{self.clock}_seconds"]
    cfg, state = self.cfg, self.state
    result = self.score(cfg.eval.split)
    score = evaluate_lib.score(result.summary, cfg.eval.best_metric)
    if score > state["best_score"]:
      weights = {k: v.clone() for k, v in self.net.state_dict().items()}
      state["best_score"], state["best"] = score, weights
    if every := cfg.train.eval_every:
      state["looks"] = self.place() // every
    used = self.spent()[f"{self.clock}_seconds"]
    state["look_seconds"] = used - begin
    writers.log(
      f"{self.path.stem}  step {state['step']}  {used:.0f} of"
      f" {self.budget:.0f} s  {cfg.eval.best_metric} {score:.4f}"
    )
    self.save()

  def step(self, batch):
    """One step of training, at the learning rate of its time."""
    cfg, number = self.cfg, self.state["step"]
    place = self.place()
    rng = np.random.default_rng((cfg.seed, number))
    image, *truth = to_torch(flipped(batch, cfg.augment, rng))
    for group in self.optimizer.param_groups:
      group["lr"] = float(self.rates[place])
    self.optimizer.zero_grad()
    logits = self.net(image)
    sum(LOSSES[t](logits, *truth).mean() for t in cfg.loss.terms).backward()
    if cfg.optimizer.clip_norm:
      parameters = self.net.parameters()
      torch.nn.utils.clip_grad_norm_(parameters, cfg.optimizer.clip_norm)
    self.optimizer.step()
    self.state["step"] += 1

  def place(self):
    """The step that our run was at after this share of its time."""
    share = self.spent()[f"{self.clock}_seconds"] / self.budget
    return min(int(share * len(self.rates)), len(self.rates) - 1)

  def train(self):
    """Trains until the time is up; the record of the finished run."""
    batches = pipeline.train_batches(
      self.source("train"),
      self.normalization,
      cfg=self.cfg,
      first_step=self.state["step"],
    )
    every, saved = self.cfg.train.eval_every, time.monotonic()
    with contextlib.closing(batches):
      while self.left() > 0:
        self.step(next(batches))
        if every and self.place() // every > self.state["looks"]:
          self.look()
          saved = time.monotonic()
        elif time.monotonic() > saved + SAVE_EVERY:
          self.save()
          saved = time.monotonic()
    self.look()
    spent = {k: round(v, 3) for k, v in self.spent().items()}
    splits = workdir_lib.split_dir(self.folder)
    tested = "test" in pipeline.list_splits(self.cfg, splits)
    if tested:
      self.net.load_state_dict(self.state["best"])
    split = "test" if tested else self.cfg.eval.split
    result = self.score(split)
    return {
      "seed": self.cfg.seed,
      "split": split,
      "metrics": result.summary,
      "per_image": result.rows,
      "step": self.state["step"],
      "params": sum(p.numel() for p in self.net.parameters()),
      "clock": self.clock,
      "budget_seconds": self.budget,
      **spent,
      "torch": torch.__version__,
      "threads": torch.get_num_threads(),
    }


def run(study, clock, widths=WIDTHS):
  """What is missing beside the finished runs of a study."""
  if clock == "cpu":
    # Two threads that wait for one another on a busy machine cost 3 times the
    # CPU of one, which would be taken from the peer's.
    torch.set_num_threads(1)
  for record in studies.read_results(study):
    path = study / "peer" / f"{record['id']}.json"
    if record["status"] != "done" or path.exists():
      continue
    folder = study / "runs" / record["id"]
    if workdir_lib.read_config(folder).data.source == "tokens":
      sys.exit("no peer: the seed's network reads images, not words")
    one = Run(folder, path, clock, record[f"{clock}_seconds"], widths)
    workdir_lib.write_json(path, {"id": record["id"], **one.train()})
    path.with_suffix(".pt").unlink(missing_ok=True)


def main():
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("study", type=pathlib.Path, metavar="DIR")
  parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
  flags = parser.parse_args()
  with workdir_lib.locked(flags.study, ".peer.lock"):
    run(flags.study, flags.clock)


if __name__ == "__main__":
  main()
