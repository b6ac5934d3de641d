"""The layers and the bans, read from the source."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "unet_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Layer of each module; a folder's name stands for its modules. A module imports
# only lower layers.
LAYERS = [
  {"errors", "geometry", "presets"},
  {"schema"},
  {"token_faults"},
  {"faults"},
  {"config"},
  {"conv_table", "precision", "runtime.storage"},
  {"batch_norm", "conv", "resample"},
  {"state", "optimizer", "models", "objectives", "data.augment", "train_step"},
  {"data", "runtime", "exchange"},
  {"inspect", "scoring", "workdir"},
  {"ensemble", "polygons", "program", "tiles"},
  {
    "check_data",
    "compile_plan",
    "evaluate",
    "exchange.inference",
    "import_weights",
    "init_from",
    "inspect.describe",
    "tag",
  },
  {"inputs", "outputs", "run_log"},
  {"bands"},
  {
    "train",
    "predict",
    "studies.bases",
    "studies.charts",
    "studies.statistics",
    "studies.sweep",
  },
  {"studies.analysis", "studies.budget", "studies.tpe"},
  {"studies.tables"},
  {
    "demo",
    "exchange.export",
    "exchange.to_onnx",
    "inspect.explain",
    "studies.report",
    "studies.run",
  },
  {"main"},
]
# Imports within one layer or folder that are meant.
SIBLINGS = {
  ("models.unet", "models.decoders"),
  ("models.unet", "models.blocks"),
  ("models.unet", "models.embedding"),
  ("models.embedding", "models.blocks"),
  ("models.decoders", "models.skips"),
  ("models.decoders", "models.blocks"),
  ("models.decoders", "models.probes"),
  ("models.skips", "models.probes"),
  ("models", "models.unet"),
  ("data.pipeline", "data.folder"),
  ("data.pipeline", "data.synthetic"),
  ("data.pipeline", "data.normalize"),
  ("data.pipeline", "data.source"),
  ("data.pipeline", "data.buckets"),
  ("data.pipeline", "data.tokens"),
  ("data.tokens", "data.vocabulary"),
  ("data.vocabulary", "runtime.writers"),
  ("data.pipeline", "data.windows"),
  ("data.windows", "data.decode"),
  ("data.tiff", "data.decode"),
  ("data.tiff", "data.windows"),
  ("data.folder", "data.decode"),
  ("data.decode", "data.nifti"),
  ("data.folder", "data.labels"),
  ("data.folder", "data.source"),
  ("data.folder", "runtime.writers"),
  ("data.pipeline", "data.weight_map"),
  ("data.pipeline", "data.rare"),
  ("data.pipeline", "data.respace"),
  ("data.respace", "data.source"),
  ("data.weight_map", "data.source"),
  ("data.weight_map", "runtime.writers"),
  ("data.balance", "data.source"),
  ("data.balance", "runtime.writers"),
  ("data.normalize", "data.source"),
  ("data.pipeline", "data.tfds"),
  ("data.tfds", "data.decode"),
  ("data.tfds", "data.labels"),
  ("data.tfds_builders", "data.folder"),
  ("data.check", "data.leaks"),
  ("data.check", "data.pipeline"),
  ("data.check", "data.source"),
  ("data.check", "data.trivial"),
  ("data.check", "runtime.writers"),
  ("data.proposal", "data.check"),
  ("train_step", "state"),
  ("train_step", "optimizer"),
  ("train_step", "objectives"),
  ("train_step", "models"),
  ("models.unet", "models.skips"),
  ("models.skips", "models.blocks"),
  ("objectives.supervision", "objectives.losses"),
  ("objectives.partition", "objectives.topology"),
  ("objectives.instances", "objectives.topology"),
  ("objectives.instances", "objectives.partition"),
  ("inspect.data_report", "inspect.pages"),
  ("inspect.data_report", "inspect.pictures"),
  ("inspect.explain_page", "inspect.pages"),
  ("objectives.losses", "objectives.pixel_losses"),
  ("objectives.losses", "objectives.region_losses"),
  ("objectives.losses", "objectives.pixels"),
  ("objectives.pixel_losses", "objectives.pixels"),
  ("objectives.region_losses", "objectives.pixels"),
  ("inspect.pictures", "runtime.writers"),
  ("runtime.compilation", "runtime.writers"),
  ("runtime.checkpoint", "runtime.parallel"),
  ("inspect.trace", "inspect.cost"),
  ("inspect.drawing", "inspect.trace"),
  ("inspect.drawing", "inspect.svg"),
  ("exchange.export", "exchange.to_onnx"),
  ("exchange.export", "exchange.inference"),
  ("inspect.explain", "inspect.attributions"),
  ("inspect.explain", "inspect.explain_page"),
  ("inspect.explain_page", "inspect.pictures"),
}
# A library and the only modules that may import it.
DOORS = {
  "argparse": {"main"},
  "etils": {"runtime.storage"},
  "fsspec": {"runtime.storage"},
  "absl": {"runtime.checkpoint"},
  "orbax": {"runtime.checkpoint"},
  "tensorboardX": {"runtime.writers"},
  "grain": {"data.pipeline"},
  "flask": {"demo"},
  "onnxruntime": {"exchange.to_onnx"},
  "tensorflow": {"exchange.to_onnx"},
  "tf2onnx": {"exchange.to_onnx"},
  "werkzeug": {"demo"},
  "nibabel": {"data.nifti"},
  "tifffile": {"data.tiff"},
  "safetensors": {"exchange.import_torch"},
  "signal": {"runtime.signals"},
  "faulthandler": {"runtime.watchdog"},
  "tensorflow_datasets": {"data.tfds", "data.tfds_builders"},
  "optuna": {"studies.tpe"},
  "torch": {"exchange.import_torch"},
}
# Names that only runtime/parallel may take from jax.
PARALLEL_ONLY = {"process_index", "process_count", "distributed", "Mesh"}


def name_of(path):
  parts = path.relative_to(PACKAGE).with_suffix("").parts
  return ".".join(p for p in parts if p != "__init__")


def layer_of(module):
  for name in (module, module.split(".")[0]):
    for i, layer in enumerate(LAYERS):
      if name in layer:
        return i
  raise AssertionError(f"{module} has no layer; add it to LAYERS")


def imports_of(tree):
  """(module, name) of every import; name is None for `import module`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from ((node.module, alias.name) for alias in node.names)


def own_imports(tree):
  """Modules of this package that a module imports, without the prefix."""
  known = {name_of(p) for p in FILES}
  for module, name in imports_of(tree):
    if module.split(".")[0] != "unet_jax":
      continue
    inner = module.removeprefix("unet_jax").lstrip(".")
    full = f"{inner}.{name}".lstrip(".")
    yield full if full in known else inner


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_imports_only_lower_layers(path):
  me = name_of(path)
  if not me:
    return
  for other in own_imports(ast.parse(path.read_text())):
    if not other:  # The package itself: its version.
      continue
    allowed = layer_of(other) < layer_of(me) or (me, other) in SIBLINGS
    folder = (me.split(".")[0], other.split(".")[0])
    assert allowed or folder in SIBLINGS or (me, folder[1]) in SIBLINGS, (
      f"{me} imports {other}: not a lower layer"
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_library_has_one_door(path):
  me, text = name_of(path), path.read_text()
  for module, _ in imports_of(ast.parse(text)):
    door = DOORS.get(module.split(".")[0])
    assert door is None or me in door, f"{me} imports {module}"
  if not me.startswith("runtime") and me != "main":
    assert "os.environ" not in text and "getenv" not in text, (
      f"{me} reads environment variables"
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_bans(path):
  me, tree = name_of(path), ast.parse(path.read_text())
  for node in ast.walk(tree):
    where = f"{me}:{getattr(node, 'lineno', 0)}"
    assert not isinstance(node, (ast.Global, ast.Assert)), where
    if isinstance(node, ast.ExceptHandler):
      assert node.type is not None, f"{where}: bare except"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      assert node.func.id not in ("print", "eval", "exec"), where
    if isinstance(node, ast.ImportFrom):
      assert all(alias.name != "*" for alias in node.names), where
    if isinstance(node, ast.Attribute) and me != "runtime.parallel":
      value = node.value
      is_jax = isinstance(value, ast.Name) and value.id == "jax"
      assert not (is_jax and node.attr in PARALLEL_ONLY), (
        f"{where}: {node.attr}"
      )
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
      defaults = [*node.args.defaults, *node.args.kw_defaults]
      mutable = (ast.List, ast.Dict, ast.Set)
      assert not any(isinstance(d, mutable) for d in defaults), where
    is_get = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    if is_get and node.func.attr == "get" and len(node.args) == 2:
      owner = ast.unparse(node.func.value)
      assert "cfg" not in owner and "config" not in owner, where


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_functions_stay_short(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      doc = ast.get_docstring(node)
      lines = node.end_lineno - node.lineno + 1 - len((doc or "").splitlines())
      limit = 110 if node.name == "make_train_step" else 75
      assert lines <= limit, f"{name_of(path)}.{node.name} has {lines} lines"


def test_the_package_stays_small():
  total = sum(len(p.read_text().splitlines()) for p in FILES)
  assert total <= 24300


def test_the_config_is_checked_without_jax():
  code = (
    "import sys, unet_jax.main, unet_jax.config as c;"
    "c.parse(c.load_config('configs/synthetic.py'));"
    "assert 'jax' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_choices_are_the_tables():
  from unet_jax import conv, precision, presets, schema, scoring
  from unet_jax.data import pipeline
  from unet_jax.models import blocks, decoders, skips, unet
  from unet_jax.objectives import losses

  def choices(section, name):
    return set(section.__dataclass_fields__[name].metadata["choices"])

  assert choices(schema.ModelConfig, "conv") == set(conv.FORMS)
  assert choices(schema.ModelConfig, "dtype") == set(precision.DTYPES)
  assert choices(schema.ModelConfig, "up") == set(blocks.UPS)
  assert choices(schema.ModelConfig, "activation") == set(blocks.ACTIVATIONS)
  assert choices(schema.ModelConfig, "skip") == set(skips.SKIPS)
  assert choices(schema.ModelConfig, "decoder") == set(decoders.DECODERS)
  assert choices(schema.LossConfig, "terms") == set(losses.LOSSES)
  assert choices(schema.DataConfig, "source") == set(pipeline.SOURCES)
  assert choices(schema.EvalConfig, "extra_metrics") == set(scoring.EXTRAS)
  # A model is built from the fields of its section, name by name.
  padded = choices(schema.ModelConfig, "odd_size") - {"pad_input"}
  assert padded == set(decoders.PAD_MODES)
  fields = set(schema.ModelConfig.__dataclass_fields__) - {"preset"}
  assert fields <= set(unet.UNet.__dataclass_fields__)
  for preset in presets.PRESETS.values():
    assert set(preset) <= fields


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
  root = PACKAGE.parent
  done = subprocess.run(
    [sys.executable, "-m", "ruff", *command.split(), "."],
    cwd=root,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout
