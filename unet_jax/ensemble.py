"""Several trained networks as one: their probabilities, and their mean."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.errors import UserError
from unet_jax.objectives import metrics


@dataclasses.dataclass(frozen=True)
class Group:
  """Members of one architecture, which one program evaluates.

  Attributes:
    model: what they share.
    variables: theirs, stacked on a first axis, where there are several.
    count: of the members.
    change: scale and shift [count, C], from an image as the first member of all
      wants it normalised to what each member wants; None = it is the same.
  """

  model: nn.Module
  variables: Any
  count: int
  change: tuple[np.ndarray, np.ndarray] | None = None

  def logits(self, variables: Any, image: jax.Array, **how: Any) -> jax.Array:
    """Logits [count, B, *S, K] of an image [B, *S, C]."""
    if self.count == 1 and self.change is None:
      return self.model.apply(variables, image, **how)[None]

    def one(variables: Any, change: Any) -> jax.Array:
      x = image
      if change is not None:
        shape = (1,) * (image.ndim - 1) + (-1,)
        scale, shift = (c.reshape(shape).astype(x.dtype) for c in change)
        x = x * scale + shift
      return self.model.apply(variables, x, **how)

    if self.count == 1:
      change = tuple(c[0] for c in self.change)
      return one(variables, change)[None]
    axes = (0, None if self.change is None else 0)
    change = self.change and tuple(map(jnp.asarray, self.change))
    return jax.vmap(one, axes)(variables, change)


def check_source(cfg: Config) -> None:
  """Refuses tokens: each run numbers words by a vocabulary of its own."""
  if cfg.data.source == "tokens":
    raise UserError(
      "--ensemble averages networks that see the same numbers, and runs on"
      " tokens number words each in their own way; leave it out"
    )


def load(
  first: workdir_lib.Trained,
  cfg: Config,
  workdirs: Sequence[pathlib.Path],
  mesh: Mesh,
) -> tuple[list[Group], list[Config]]:
  """The first member and the best checkpoints of the runs in `workdirs`.

  Returns:
    The groups, and every member's config.

  Raises:
    UserError: a run's data or classes are others than the first's.
  """
  check_source(cfg)
  members = [(cfg, first)]
  for workdir in workdirs:
    own = workdir_lib.read_config(workdir)
    _check(cfg, own, workdir)
    members.append((own, workdir_lib.load_trained(own, workdir, mesh)))
  by_model: dict[nn.Module, list[workdir_lib.Trained]] = {}
  for _, trained in members:
    by_model.setdefault(trained.model, []).append(trained)
  groups = [_group(model, own, first) for model, own in by_model.items()]
  return groups, [own for own, _ in members]


def _group(
  model: nn.Module,
  members: list[workdir_lib.Trained],
  first: workdir_lib.Trained,
) -> Group:
  trees = [m.variables for m in members]
  variables = trees[0]
  if len(trees) > 1:
    variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  change = None
  if any(m.normalization != first.normalization for m in members):
    changes = [_change(first.normalization, m.normalization) for m in members]
    change = tuple(np.stack(c) for c in zip(*changes, strict=True))
  return Group(model, variables, len(members), change)


def _change(old: dict[str, Any], new: dict[str, Any]) -> tuple:
  """Scale and shift that turn (x - m) / s of `old` into that of `new`."""
  std, mean = np.array(old["std"]), np.array(old["mean"])
  scale = np.divide(1, new["std"], where=np.array(new["std"]) > 0, out=0 * std)
  return std * scale, (mean - np.array(new["mean"])) * scale


def _check(cfg: Config, own: Config, workdir: pathlib.Path) -> None:
  names = ("num_classes", "channels", "normalize", "clip_percentiles")
  for name in (*names, "spacing"):
    a, b = getattr(cfg.data, name), getattr(own.data, name)
    if a != b:
      raise UserError(
        f"--ensemble {workdir}: data.{name}={b} but {a} in the first run;"
        " members must see and say the same"
      )
  if cfg.model.dims != own.model.dims:
    raise UserError(
      f"--ensemble {workdir}: model.dims={own.model.dims} but"
      f" {cfg.model.dims} in the first run; members must take the same images"
    )
  if own.model.size_rule == "valid" or cfg.model.size_rule == "valid":
    same = (own.model.size_rule, own.model.depth) == (
      cfg.model.size_rule,
      cfg.model.depth,
    )
    if not same:
      raise UserError(
        f"--ensemble {workdir}: loses other borders than the first run; with"
        " padding='valid' members need the same depth"
      )


# --- Probabilities ------------------------------------------------------------


def probabilities(logits: jax.Array) -> jax.Array:
  """Of each class [..., K]; K = 1: of the foreground."""
  if logits.shape[-1] == 1:
    return jax.nn.sigmoid(logits)
  return jax.nn.softmax(logits)


def mean_logits(
  groups: Sequence[Group], variables: Sequence[Any], image: jax.Array
) -> jax.Array:
  """Logits [B, *S, K] of the mean probabilities of all members."""
  logits = jnp.concatenate(
    [g.logits(own, image) for g, own in zip(groups, variables, strict=True)]
  )
  total = lambda x: jax.nn.logsumexp(x, axis=0)
  if logits.shape[-1] == 1:
    return total(jax.nn.log_sigmoid(logits)) - total(-jax.nn.softplus(logits))
  return total(jax.nn.log_softmax(logits)) - np.log(len(logits))


def most_probable(probability: jax.Array) -> jax.Array:
  """Class ids int32 [...] of probabilities [..., K]."""
  if probability.shape[-1] == 1:
    return metrics.predict_labels(probability - 0.5)
  return metrics.predict_labels(probability)


def make_apply(
  groups: Sequence[Group], *, dropout_samples: int, seed: int, each: bool
) -> Any:
  """Jits image [B, *S, C] -> (mask, probabilities).

  The mask is uint8 [B, *S'], the probabilities float32 [N, B, *S', K]. N = 1:
  the mean over all members and dropout samples; with `each` one for each. A
  single network's mask is that of its logits, to the bit.
  """

  @jax.jit
  def apply(variables: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = []
    for group, own in zip(groups, variables, strict=True):
      if not dropout_samples:
        found.append(group.logits(own, image))
        continue

      def sample(i: jax.Array, group: Group = group, own: Any = own) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), i)
        return group.logits(own, image, drop=True, rngs={"dropout": key})

      draws = jax.lax.map(sample, jnp.arange(dropout_samples))
      found.append(draws.reshape(-1, *draws.shape[2:]))
    spatial = found[0].shape[2:-1]
    window = tuple(slice(0, n) for n in spatial)
    logits = jnp.concatenate([y[(slice(None),) * 2 + window] for y in found])
    probability = probabilities(logits)
    if len(logits) == 1:
      mask = metrics.predict_labels(logits[0])
    else:
      mask = most_probable(jnp.mean(probability, 0))
    if not each:
      probability = jnp.mean(probability, 0, keepdims=True)
    return mask.astype(jnp.uint8), probability

  variables = [group.variables for group in groups]
  return lambda image: apply(variables, image)
