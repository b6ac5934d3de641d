"""Which arms a study has: an algebra over dotted keys of the config.

  def sweep():
    return baseline({}) + grid({"model.skip": ("none", "add", "attn_oktay")})

An `Arm` is a name and overrides. `+` chains lists of arms, `product` combines
two lists; names are made of what differs, and explain themselves.
"""

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unet_jax.errors import UserError

Values = Mapping[str, Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Arm:
  """One variant of a study.

  Attributes:
    name: what it is called; also in file names.
    overrides: values by dotted key.
    baseline: whether the others of its group are compared with it.
    group: "", or the name of what only some arms have in common.
  """

  name: str
  overrides: Mapping[str, Any]
  baseline: bool = False
  group: str = ""


def arm(overrides: Mapping[str, Any], name: str = "") -> list[Arm]:
  """One arm, named by its overrides unless `name` is given."""
  return [Arm(name or _name(overrides), dict(overrides))]


def baseline(overrides: Mapping[str, Any], name: str = "baseline") -> list[Arm]:
  """The arm that the others are compared with: the config file with these."""
  return [Arm(name, dict(overrides), baseline=True)]


def grid(values: Values) -> list[Arm]:
  """Every combination: `grid({"a.b": (1, 2), "c": (3, 4)})` has four arms."""
  rows = itertools.product(*values.values())
  return [a for row in rows for a in arm(dict(zip(values, row, strict=True)))]


def zip_values(values: Values) -> list[Arm]:
  """The values side by side: first with first, second with second."""
  if len({len(column) for column in values.values()}) > 1:
    sizes = {key: len(column) for key, column in values.items()}
    raise UserError(f"sweep: zip_values needs equally many values, not {sizes}")
  rows = zip(*values.values(), strict=True)
  return [a for row in rows for a in arm(dict(zip(values, row, strict=True)))]


def product(first: Sequence[Arm], second: Sequence[Arm]) -> list[Arm]:
  """Every arm of `first` with every arm of `second`, whose values win."""
  return [
    Arm(f"{a.name},{b.name}", {**a.overrides, **b.overrides})
    for a, b in itertools.product(first, second)
  ]


def within(overrides: Mapping[str, Any], arms: Sequence[Arm]) -> list[Arm]:
  """The arms, all with these overrides too, as a group with its own baseline.

  `within({"data.crop_size": (64,)}, arms) + within({"data.crop_size": (96,)},
  arms)` compares arms of one crop size with one another.
  """
  group = _name(overrides)
  return [
    Arm(f"{group},{a.name}", {**overrides, **a.overrides}, a.baseline, group)
    for a in arms
  ]


def sample(
  number: int,
  space: Mapping[str, Callable[[random.Random], Any] | Sequence[Any]],
  seed: int = 0,
) -> list[Arm]:
  """Random search: `number` draws, the same for the same seed.

  Args:
    number: of arms.
    space: by dotted key a sequence to choose from, or a function of a
      `random.Random`, such as `log_uniform(1e-4, 1e-2)`.
    seed: of the draws.
  """
  rng = random.Random(seed)

  def draw(choice: Any) -> Any:
    return choice(rng) if callable(choice) else rng.choice(list(choice))

  return [
    a
    for _ in range(number)
    for a in arm({key: draw(choice) for key, choice in space.items()})
  ]


@dataclasses.dataclass(frozen=True)
class LogUniform:
  """Uniform in the logarithm from low to high, rounded to three digits."""

  low: float
  high: float

  def __call__(self, rng: random.Random) -> float:
    return shorten(self.low * (self.high / self.low) ** rng.random())


def log_uniform(low: float, high: float) -> LogUniform:
  """For `sample` and `search`."""
  return LogUniform(low, high)


def shorten(value: float) -> float:
  """Three digits."""
  return float(f"{value:.3g}")


@dataclasses.dataclass(frozen=True)
class Search:
  """Arms that are chosen one after another; see `search`."""

  space: Mapping[str, LogUniform | Sequence[Any]]
  trials: int
  seed: int


def search(
  space: Mapping[str, LogUniform | Sequence[Any]], trials: int, seed: int = 0
) -> Search:
  """What a `sweep()` returns, in place of arms, to look for the best values.

  Trial k is chosen by TPE (extra [optuna]) given the scores of those before on
  `eval.split`, so it needs them all: a search has no shards. The config as it
  stands is the baseline.

  Args:
    space: by dotted key a sequence to choose from, or `log_uniform(low, high)`.
    trials: how many; each is trained with every seed of `study.seeds`.
    seed: of the choices. The same seed and scores give the same trials.
  """
  for key, values in space.items():
    if not isinstance(values, LogUniform) and len(list(values)) == 0:
      raise UserError(f"sweep: {key} has no value to choose from; give some")
  if not space or trials < 1:
    raise UserError("sweep: a search needs a space and at least one trial")
  return Search(dict(space), trials, seed)


def trial(number: int, overrides: Mapping[str, Any]) -> Arm:
  """The arm of a trial."""
  return Arm(f"trial_{number:03d},{_name(overrides)}", dict(overrides))


def check(arms: Any) -> list[Arm] | Search:
  """The arms of a `sweep()`, checked; a `search` is returned as it is.

  Raises:
    UserError: no arm, two of one name or with the same overrides, or a group
      without its one baseline.
  """
  if isinstance(arms, Search):
    return arms
  arms = list(arms) if isinstance(arms, (list, tuple)) else [arms]
  if not arms or not all(isinstance(a, Arm) for a in arms):
    raise UserError(
      "sweep() must return a list of arms; make it with unet_jax.studies.sweep,"
      " as grid({'model.skip': ('none', 'add')})"
    )
  for what, key in (
    ("name", lambda a: a.name),
    ("overrides", lambda a: repr(sorted(a.overrides.items()))),
  ):
    seen: dict[str, str] = {}
    for a in arms:
      if key(a) in seen:
        raise UserError(
          f"sweep(): arms {seen[key(a)]!r} and {a.name!r} have the same {what};"
          " leave one out"
        )
      seen[key(a)] = a.name
  for group in dict.fromkeys(a.group for a in arms):
    number = sum(a.baseline for a in arms if a.group == group)
    if number != 1:
      of = f" of {group}" if group else ""
      raise UserError(
        f"sweep(): {number} arms{of} are the baseline; mark one, with"
        " baseline({...})"
      )
  return arms


def choose(arms: Sequence[Arm] | Search, names: Sequence[str]) -> Any:
  """The arms of these names and the baselines of their groups; () for all."""
  if not names:
    return arms
  if isinstance(arms, Search):
    raise UserError("config.study.arms: the trials of a search have no names")
  known = {a.name: a.group for a in arms}
  if unknown := sorted(set(names) - set(known)):
    raise UserError(
      f"config.study.arms: no arm {unknown[0]!r}; choose from {list(known)}"
    )
  groups = {known[name] for name in names}
  return [
    a for a in arms if a.name in names or (a.baseline and a.group in groups)
  ]


def run_id(name: str, seed: int) -> str:
  """The folder of a run: the arm's name, as far as file systems allow."""
  return f"{re.sub(r'[^A-Za-z0-9_.,=+-]', '_', name)}-s{seed}"


def _name(overrides: Mapping[str, Any]) -> str:
  """`skip=none,up=linear`: the last part of each key, and its value."""
  parts = []
  for key, value in overrides.items():
    if isinstance(value, (tuple, list)):
      value = "+".join(_short(v) for v in value)
    parts.append(f"{key.rsplit('.', 1)[-1]}={_short(value)}")
  return ",".join(parts) or "as_configured"


def _short(value: Any) -> str:
  return "01"[value] if isinstance(value, bool) else str(value)
