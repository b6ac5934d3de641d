"""What every test runs under: 8 devices, strict ranks, a compilation cache."""

import os
import pathlib
import tempfile

from tests import runs

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = runs.xla_flags(devices=8)
# Shared by all workers, by the command-line tests and by later runs.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(tempfile.gettempdir()) / "unet_jax_test_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_root() -> pathlib.Path:
  """The folder of real data sets; skips where it is absent."""
  root = pathlib.Path(os.environ.get("UNET_JAX_DATA", "../shared/data"))
  if not root.is_dir():
    pytest.skip(f"no real data at {root}; set UNET_JAX_DATA")
  return root.resolve()


@pytest.fixture(autouse=True)
def traced_anew():
  """mutmut asks which tests call a function: a compiled one hides its calls."""
  if os.environ.get("MUTANT_UNDER_TEST") == "stats":
    jax.clear_caches()
