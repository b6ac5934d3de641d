"""A trained network as one file that runs without this package.

The file holds a program of `jax.export` for every platform, of any batch and
any size that the network takes, and the weights. Normalisation, network, views,
probabilities and mask are in it; mirroring and cutting back, which depend on
the image's size, are in the loader that lies beside it, `load.py`.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import io
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import unet_jax
from unet_jax import config as config_lib
from unet_jax import geometry, predict
from unet_jax import state as state_lib
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import windows
from unet_jax.errors import UserError
from unet_jax.exchange import inference, load, to_onnx
from unet_jax.runtime import parallel, writers

PLATFORMS = ("cpu", "cuda", "tpu")
# Probabilities of the program may differ by so much from those of `predict`.
# Most do not differ at all; the manifest has the figure.
_MOST = 1e-4
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "flatbuffers")


def run(
  cfg: Config,
  workdir: pathlib.Path,
  *,
  step: int | None = None,
  onnx: Sequence[int] = (),
) -> None:
  """`--mode export`: leaves model.npz, manifest.json, load.py in export/.

  Args:
    cfg: the run's config.
    workdir: folder of the training run.
    step: the checkpoint; None takes the best.
    onnx: the size of the images of a model.onnx beside them; () = no such file.

  Raises:
    UserError: the network cannot be expressed, or flatbuffers is missing.
  """
  _check(cfg, onnx)
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  trained = workdir_lib.load_trained(cfg, workdir, mesh, step=step)
  weights = state_lib.flatten(trained.variables)
  program, form = _export_any_form(cfg, trained, weights)
  arrays = {k: np.asarray(x) for k, x in weights.items()}
  buffer = io.BytesIO()
  np.savez(buffer, program=np.frombuffer(program, np.uint8), **arrays)
  text = config_lib.to_text(cfg)
  manifest = {
    "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    "step": trained.step,
    "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    "num_classes": cfg.data.num_classes,
    "channels": cfg.data.channels,
    "dims": cfg.model.dims,
    "normalization": trained.normalization,
    "axes": size_rules(cfg),
    "platforms": PLATFORMS,
    "conv": form,
    "views": cfg.predict.views,
    "versions": {
      "unet_jax": unet_jax.__version__,
      **{p: importlib.metadata.version(p) for p in _PACKAGES},
    },
  }
  output = workdir / "export"
  loader = pathlib.Path(load.__file__).read_bytes()
  writers.write_atomically(output / "model.npz", buffer.getvalue())
  writers.write_atomically(output / "load.py", loader)
  (output / "model.onnx").unlink(missing_ok=True)  # Of an export before.
  workdir_lib.write_json(output / "manifest.json", manifest)
  difference = _compare(cfg, workdir, output, trained.step)
  manifest["largest_difference"] = difference
  if onnx:
    path = output / "model.onnx"
    found = to_onnx.write(cfg, workdir, trained, path, onnx)
    manifest["onnx"] = {"size": onnx, "largest_difference": found}
  workdir_lib.write_json(output / "manifest.json", manifest)
  writers.log(
    f"wrote {output}: step {trained.step}, {len(buffer.getvalue()):,} bytes for"
    f" {', '.join(PLATFORMS)}; probabilities differ by {difference:.0e} at most"
    " from --mode predict"
  )
  _say_what_differs(cfg)


def _check(cfg: Config, onnx: Sequence[int]) -> None:
  """Raises a UserError for what cannot be exported."""
  if cfg.model.skip == "shuffle":
    raise UserError(
      "model.skip='shuffle' cannot be exported: it takes features of another"
      " example, which a single image lacks; export a run of another skip"
    )
  if cfg.data.source == "tokens":
    raise UserError(
      "data.source='tokens' cannot be exported: words are looked up outside of"
      " the network; use --mode predict"
    )
  if cfg.data.spacing:
    raise UserError(
      "data.spacing cannot be exported: an array has no spacing to resample"
      " from; use --mode predict"
    )
  if importlib.util.find_spec("flatbuffers") is None:
    raise UserError(
      "--mode export needs flatbuffers; pip install 'unet_jax[export]'"
    )
  if onnx:
    to_onnx.check(cfg, onnx)


def _say_what_differs(cfg: Config) -> None:
  if cfg.predict.views > 1:
    writers.log(
      "views are of the padded image: near the last pixels of sizes that the"
      " network does not take as they are they differ from --mode predict"
    )
  if cfg.model.size_rule == "any":
    writers.log(
      f"model.odd_size={cfg.model.odd_size}: sizes that are no multiple of"
      f" {2**cfg.model.depth} are mirrored to one, and differ from --mode"
      " predict near the last pixels"
    )


def size_rules(cfg: Config) -> list[dict[str, int]]:
  """What `load.py` pads each axis by: `geometry.plan_pad` as four sums.

  An axis of n pixels becomes unit * h - less pixels, h at least `least` and so
  large that n, rounded up to `step`, and `before` on both sides are covered.
  Sizes that a network pads on its way up are mirrored here, as all others are.
  """
  rule, multiple = _rule(cfg), cfg.data.pad_multiple
  less = geometry.LOSS_PER_LEVEL if rule == "valid" else 0
  rules = []
  for depth in cfg.model.depths:
    unit, (_, smallest) = 2**depth, geometry.nearest_legal(1, depth, rule)
    rules.append(
      {
        "before": geometry.margin(depth, rule),
        "step": math.lcm(multiple, unit) if rule == "same" else multiple,
        "unit": unit,
        "less": less,
        "least": (smallest + less) // unit,
      }
    )
  return rules


def _rule(cfg: Config) -> str:
  return "valid" if cfg.model.size_rule == "valid" else "same"


def _export_any_form(
  cfg: Config, trained: workdir_lib.Trained, weights: dict[str, jax.Array]
) -> tuple[bytes, str]:
  """The program with the convolutions of `predict`, or else with XLA's own."""
  forms = dict.fromkeys((cfg.model.conv, "xla"))
  for form in forms:
    try:
      views = windows.all_views(cfg.model.dims, cfg.predict.views)
      wrap = inference.average_views(views) if len(views) > 1 else lambda n: n
      before = [rule["before"] for rule in size_rules(cfg)]
      model, how = trained.model.clone(conv=form), trained.normalization
      program = inference.make_program(model, how, before, views=wrap)
      return _export(cfg, program, weights), form
    except (TypeError, ValueError, NotImplementedError) as error:
      problem = str(error).splitlines()[0]
  raise UserError(
    f"this network cannot be exported for any size: {problem}; change the"
    " model, or use --mode predict"
  )


def _export(
  cfg: Config, program: Callable[..., Any], weights: dict[str, jax.Array]
) -> bytes:
  rules, axes = size_rules(cfg), "hwd"[: cfg.model.dims]
  named = list(zip(axes, rules, strict=True))
  sizes = [f"{rule['unit']}*{a} - {rule['less']}" for a, rule in named]
  shape = jax.export.symbolic_shape(
    ", ".join(["b", *sizes, str(cfg.data.channels)]),
    constraints=[f"{a} >= {rule['least']}" for a, rule in named],
  )
  size = jax.ShapeDtypeStruct((shape[0], cfg.model.dims), jnp.int32)
  abstract = {
    k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in weights.items()
  }
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  make = jax.export.export(jax.jit(program), platforms=PLATFORMS)
  return bytes(make(abstract, image, size).serialize())


def _compare(
  cfg: Config, workdir: pathlib.Path, output: pathlib.Path, step: int
) -> float:
  """Largest difference of a probability between the file and `predict`."""
  exported = load.load(output)
  ours = predict.make_predict(cfg, workdir, step=step)
  rng, worst = np.random.default_rng(0), 0.0
  # Alone and whole: what the program is.
  wanted = dataclasses.replace(type(cfg.predict)(), views=cfg.predict.views)
  cfg = dataclasses.replace(cfg, predict=wanted)
  units = [2**depth for depth in cfg.model.depths]
  odd = cfg.model.size_rule != "any" and cfg.predict.views == 1
  for more in (1, 3):  # Odd sizes where they mean the same, two padded shapes.
    sizes = [u * (more + i % 2) + 3 * odd for i, u in enumerate(units)]
    shape = (*sizes, cfg.data.channels)
    image = rng.random(shape, np.float32)
    found, expected = exported(image)[1], ours(image)[1]
    worst = max(worst, float(np.abs(found - expected).max()))
  if not worst <= _MOST:
    raise UserError(
      f"the exported program differs by {worst:.1e} from --mode predict, more"
      f" than {_MOST}; {output} is not to be used, predict with the run"
    )
  return worst
