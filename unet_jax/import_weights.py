"""Networks that PyTorch trained, in use here."""

import pathlib
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from unet_jax import state as state_lib
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import normalize, pipeline
from unet_jax.errors import UserError
from unet_jax.exchange import import_torch
from unet_jax.runtime import parallel, writers


def load_weights(
  cfg: Config, path: pathlib.Path, mesh: Mesh
) -> workdir_lib.Trained:
  """The network of `cfg` with the weights of a PyTorch state dict.

  Raises:
    UserError: the file cannot be read, or its tensors are not those of `cfg`
      (each is named); or `data.normalize` asks for a training split.
  """
  if cfg.data.normalize == "dataset":
    raise UserError(
      "config.data.normalize='dataset' is fitted on examples; use --mode"
      " import_weights first, or 'none'"
    )
  values, _ = _read(cfg, path, mesh)
  variables = traverse_util.unflatten_dict(values, sep="/")
  return workdir_lib.Trained(
    model=workdir_lib.make_model(cfg),
    variables=jax.device_put(variables, parallel.replicated(mesh)),
    normalization=normalize.fit_normalization(
      [], cfg.data.normalize, clip=cfg.data.clip_percentiles
    ),
    step=0,
  )


def run(cfg: Config, workdir: pathlib.Path, path: pathlib.Path) -> None:
  """`--mode import_weights`: a state dict becomes checkpoint 0 of a new run.

  All else that a run needs is made too, so that it can be evaluated, predicted
  with, and trained further with the same config.

  Args:
    cfg: its network is that of the file.
    workdir: gets config.json, env.json, normalization.json, checkpoints/0, and
      import_report.txt, which says where every tensor went.
    path: the weight file.

  Raises:
    UserError: the file cannot be read, its tensors are not those of `cfg`, or
      `workdir` has checkpoints.
  """
  if workdir_lib.has_checkpoints(workdir):
    raise UserError(f"{workdir} holds a run already; take another --workdir")
  mesh = parallel.make_mesh()
  values, report = _read(cfg, path, mesh)
  with workdir_lib.claim(cfg, workdir):
    source = []
    if cfg.data.normalize == "dataset":
      splits = workdir_lib.split_dir(workdir)
      source = pipeline.make_source(cfg, "train", splits)
    workdir_lib.fit_normalization(cfg, workdir, source)
    workdir_lib.write_environment(workdir)
    writers.write_atomically(workdir / "import_report.txt", report.encode())
    state = workdir_lib.init_state(cfg, mesh)
    state = state_lib.with_variables(state, values)
    with workdir_lib.open_checkpoints(cfg, workdir, writable=True) as saver:
      saver.save(0, state, score=None, meta={})
  writers.log(
    f"{report.splitlines()[0]}; {len(values)} arrays imported, listed in"
    f" {workdir / 'import_report.txt'}"
  )


def _read(
  cfg: Config, path: pathlib.Path, mesh: Mesh
) -> tuple[dict[str, Any], str]:
  """An array for every variable of `cfg`'s network, and the report."""
  state = import_torch.read_state_dict(path)
  layout = import_torch.recognise(state)
  abstract = state_lib.eval_variables(workdir_lib.abstract_state(cfg, mesh))
  shapes = {k: x.shape for k, x in state_lib.flatten(abstract).items()}
  values = import_torch.to_variables(state, layout, shapes)
  lines = [f"{path}: {layout.preset}"]
  for name, theirs in layout.model.items():
    ours = getattr(cfg.model, name)
    lines.append(f"model.{name}: {ours}")
    if ours != theirs:  # And no shape could tell.
      lines[-1] += f", though {layout.preset} has {theirs}"
      writers.log(lines[-1])
  for key, tensor in state.tensors.items():
    target = layout.targets.get(key, "ignored")
    lines.append(f"{key} {list(tensor.shape)} -> {target}")
  lines += [f"{key} -> ignored, {x}" for key, x in state.others.items()]
  return values, "\n".join([*lines, ""])
