"""The runs behind docs/RESULTS.md: a ready config as it stands, three seeds.

python -m unet_jax.main --mode ablate --config configs/results.py:dsb2018 \
    --config.data.dir=DIR --workdir runs/results/dsb2018

The argument is a key of SETS. Only the scores that the page shows are added to
the config. `benchmarks/results.py` does all of them.
"""

import pathlib

import ml_collections

from unet_jax.config import load_config
from unet_jax.studies.sweep import Arm, baseline

# set -> (the file beside this one, scores to add)
SETS = {
  "synthetic": ("synthetic", ()),
  "dsb2018": ("folder", ("instances",)),
  "isbi2012": ("isbi2012", ("rand", "vi")),
  "hippocampus3d": ("hippocampus3d", ()),
  "ewt_upos": ("ewt_upos", ()),
}


def get_config(name: str = "synthetic") -> ml_collections.ConfigDict:
  """The config of a set."""
  if name not in SETS:
    raise ValueError(f"no set {name!r}; choose one of {sorted(SETS)}")
  file, scores = SETS[name]
  config = load_config(pathlib.Path(__file__).with_name(f"{file}.py"))
  config.eval.extra_metrics = scores
  config.study.seeds = (0, 1, 2)
  return config


def sweep() -> list[Arm]:
  """One arm."""
  return baseline({}, "ours")
