"""What the tests of the network share: tiny networks, drawn by NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax.models import build_model
from unet_jax.schema import ModelConfig

SKIPS = ModelConfig.__dataclass_fields__["skip"].metadata["choices"]
DECODERS = ModelConfig.__dataclass_fields__["decoder"].metadata["choices"]
# Through these no information of the example travels (or no gradient).
SILENT = ("none", "zeros", "noise", "shuffle", "dup")
# What config.parse refuses.
REFUSED = {
  ("shuffle", "nested"),
  ("udtrans", "nested"),
  ("udtrans", "full_scale"),
}
PAIRS = [(s, d) for s in SKIPS for d in DECODERS if (s, d) not in REFUSED]


def count(tree):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def abstract(model, shape):
  """Shapes of variables and logits; nothing is computed."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  return variables, jax.eval_shape(model.apply, variables, x)


def num_params(shape=(1, 32, 32, 1), **fields):
  model = build_model(**{"num_classes": 1, **fields})
  x = jnp.zeros((*shape[:1], *shape[1:2] * model.dims, shape[-1]))
  return count(jax.eval_shape(model.init, jax.random.key(0), x)["params"])


def fresh(state):
  """A state of step 0 of these shapes, as an initialiser would make it."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key if hasattr(path[-1], "key") else ""
    if name == "kernel":
      scale = math.sqrt(2 / math.prod(leaf.shape[:-1]))
      return (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype)
    ones = name in ("scale", "var")
    return np.full(leaf.shape, float(ones), leaf.dtype)

  drawn = jax.tree_util.tree_map_with_path(
    draw, {"params": state.params, "batch_stats": state.batch_stats}
  )
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
  return zeros.replace(**drawn)


def fill(module, *args, dtype=np.float32, seed=1):
  """Variables drawn by NumPy: nothing to compile."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "var":
      return np.ones(leaf.shape, dtype)
    fan_in = math.prod(leaf.shape[:-1])
    scale = math.sqrt(2 / fan_in) if leaf.ndim > 1 else 0.1
    return np.asarray(scale * rng.normal(size=leaf.shape), dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)
