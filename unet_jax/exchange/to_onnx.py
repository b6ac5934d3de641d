"""A trained network as ONNX, for images of one size: `--mode export --onnx`.

By way of TensorFlow Lite: what jax2tf makes of a program is one operation,
XlaCallModule, that tf2onnx 1.17 does not read; TensorFlow's converter does, and
tf2onnx reads its files. It knows no sorting and at most six axes.
"""

import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import ensemble, geometry, predict
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import windows
from unet_jax.errors import UserError
from unet_jax.exchange import inference
from unet_jax.runtime import writers

_PACKAGES = ("tensorflow", "tf2onnx", "onnxruntime")
_OPSET = 17
# Probabilities in onnxruntime may differ by so much from those of `predict`.
_MOST = 1e-4


def check(cfg: Config, size: Sequence[int]) -> None:
  """Raises a UserError for what cannot be expressed, or a missing package."""
  missing = [p for p in _PACKAGES if importlib.util.find_spec(p) is None]
  if missing:
    raise UserError(
      f"--onnx needs {', '.join(missing)}; pip install 'unet_jax[onnx]'"
    )
  model = cfg.model
  if model.dims == 3 or cfg.data.clip_percentiles:
    raise UserError(
      "--onnx: model.dims=3 and data.clip_percentiles have no form that the"
      " converter knows (transposes of 8 axes, sorting); leave --onnx out"
    )
  if len(size) != model.dims:
    raise UserError(
      f"--onnx {','.join(map(str, size))}: {len(size)} sizes, but model.dims="
      f"{model.dims}"
    )
  for n, depth in zip(size, model.depths, strict=True):
    if not geometry.is_legal(n, depth, model.size_rule):
      nearest = geometry.nearest_legal(n, depth, model.size_rule)
      raise UserError(
        f"--onnx: the network takes no size {n} as it is; nearest:"
        f" {', '.join(str(m) for m in nearest if m)}"
      )


def write(
  cfg: Config,
  workdir: pathlib.Path,
  trained: workdir_lib.Trained,
  path: pathlib.Path,
  size: Sequence[int],
) -> float:
  """Writes `path` and gives its largest difference to `predict`.

  Its input is an image float32 [1, *size, C] as decoded, its outputs are
  probabilities float32 [1, *S', K] and class ids uint8 [1, *S'].

  Raises:
    UserError: the converter fails, or probabilities differ by more than 1e-4.
  """
  shape = (1, *size, cfg.data.channels)
  program = _program(cfg, trained)
  image = np.random.default_rng(0).random(shape[1:], np.float32)
  try:
    content = _convert(program, shape)
    _, found = run(content, image)
  except Exception as error:  # Of three packages, of any kind.
    problem = " ".join(str(error).split())[:200]
    raise UserError(
      f"--onnx: this network cannot be converted: {problem}; leave --onnx out"
    ) from error
  expected = predict.make_predict(cfg, workdir, step=trained.step)(image)[1]
  # With valid padding `predict` mirrors what the network takes away.
  inside = tuple(
    slice((n - m) // 2, (n - m) // 2 + m)
    for n, m in zip(expected.shape[:-1], found.shape[:-1], strict=True)
  )
  difference = float(np.abs(found - expected[inside]).max())
  if not difference <= _MOST:
    raise UserError(
      f"--onnx: onnxruntime differs by {difference:.1e} from --mode predict,"
      f" more than {_MOST}; nothing was written"
    )
  writers.write_atomically(path, content)
  return difference


def _program(
  cfg: Config, trained: workdir_lib.Trained
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
  """Normalisation, network, views and mask, of one image of a fixed size."""
  model = trained.model.clone(conv="xla")
  views = windows.all_views(cfg.model.dims, cfg.predict.views)
  wrap = inference.average_views(views) if len(views) > 1 else lambda n: n

  def network(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    p = ensemble.probabilities(model.apply(trained.variables, x))
    return p, p

  def program(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    inside = jnp.ones((*image.shape[:-1], 1), bool)
    x = inference.normalize(
      *(image, inside, trained.normalization, (0,) * cfg.model.dims),
      dtype=jnp.float32,
    )
    p = wrap(network)(x)[0]
    # Without argmax, of which tf2onnx makes a node that onnxruntime refuses.
    best, mask = p[..., 0], jnp.zeros(p.shape[:-1], jnp.int32)
    for k in range(1, p.shape[-1]):
      mask = jnp.where(p[..., k] > best, k, mask)
      best = jnp.maximum(best, p[..., k])
    mask = mask if p.shape[-1] > 1 else best > 0.5
    return p, mask.astype(jnp.uint8)

  return program


def _convert(program: Callable[..., Any], shape: tuple[int, ...]) -> bytes:
  import tensorflow as tf
  import tf2onnx
  from jax.experimental import jax2tf

  spec = tf.TensorSpec(shape, tf.float32, name="image")
  how = {"with_gradient": False, "native_serialization_platforms": ("cpu",)}
  function = tf.function(
    jax2tf.convert(program, **how), autograph=False, input_signature=[spec]
  )
  lite = tf.lite.TFLiteConverter.from_concrete_functions(
    [function.get_concrete_function()], function
  )
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "model.tflite"
    path.write_bytes(lite.convert())
    model, _ = tf2onnx.convert.from_tflite(str(path), opset=_OPSET)
  return model.SerializeToString()


def run(content: bytes, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Class ids [*S'] and probabilities [*S', K] of an image, by onnxruntime."""
  import onnxruntime

  session = onnxruntime.InferenceSession(
    content, providers=["CPUExecutionProvider"]
  )
  (name,) = (entry.name for entry in session.get_inputs())
  probability, mask = session.run(None, {name: image[None]})
  return mask[0], probability[0]
