"""The trials of a search, chosen by the tree-structured Parzen estimator.

Reference: Bergstra et al. 2011, Algorithms for hyper-parameter optimization,
  section 4; as in Optuna, the extra [optuna].
"""

from collections.abc import Sequence
from typing import Any

from unet_jax.errors import UserError
from unet_jax.studies import sweep


def suggest(
  search: sweep.Search, scores: Sequence[float | None]
) -> dict[str, Any]:
  """The overrides of the next trial; a function of its arguments alone.

  So a search that was killed needs no state but its results.

  Args:
    search: the space and its seed.
    scores: of all trials before, larger is better; None for one that failed.

  Raises:
    UserError: Optuna is not installed.
  """
  try:
    import optuna
  except ImportError as error:
    raise UserError(
      "sweep: a search needs Optuna; pip install -e .[optuna]"
    ) from error

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  spaces = {}
  for key, values in search.space.items():
    if isinstance(values, sweep.LogUniform):
      spaces[key] = optuna.distributions.FloatDistribution(
        values.low, values.high, log=True
      )
    else:  # By number: a value may be a tuple.
      numbers = range(len(values))
      spaces[key] = optuna.distributions.CategoricalDistribution(numbers)
  sampler = optuna.samplers.TPESampler(seed=search.seed)
  study = optuna.create_study(sampler=sampler, direction="maximize")
  for score in scores:
    # Pruned counts as worst. Of failed ones TPE learns nothing, and comes back.
    failed = optuna.trial.TrialState.PRUNED if score is None else None
    study.tell(study.ask(spaces), score, state=failed)
  found = study.ask(spaces).params
  return {
    key: sweep.shorten(found[key])
    if isinstance(values, sweep.LogUniform)
    else values[found[key]]
    for key, values in search.space.items()
  }
