"""The schema: what is accepted, what is refused, and in which words."""

import ast
import json
import pathlib

import pytest

from unet_jax import config as config_lib
from unet_jax import presets, schema
from unet_jax.errors import UserError


def parse(**overrides):
  config = config_lib.default_config()
  keys = [key.replace("__", ".") for key in overrides]
  for key, text in zip(keys, overrides.values(), strict=True):
    config_lib.override(config, key, text)
  return config_lib.parse(config, overridden=tuple(keys))


def test_defaults_survive_configdict_and_json():
  cfg = parse()
  assert config_lib.parse(config_lib.default_config()) == cfg
  again = config_lib.parse(json.loads(json.dumps(config_lib.to_dict(cfg))))
  assert again == cfg


def test_every_field_has_a_comment():
  text = pathlib.Path(schema.__file__).read_text()
  for node in ast.walk(ast.parse(text)):
    if not isinstance(node, ast.ClassDef) or node.name == "Config":
      continue
    for field in node.body:
      if isinstance(field, ast.AnnAssign):
        above = text.splitlines()[field.lineno - 2].strip()
        assert above.startswith("#"), f"{node.name}.{field.target.id}"


@pytest.mark.parametrize(
  ("key", "text", "value"),
  [
    ("model.widths", "8,16", (8, 16)),
    ("model.widths", "(8, 16)", (8, 16)),
    ("model.skip_levels", "true,0,True", (True, False, True)),
    ("optimizer.learning_rate", "1", 1.0),
    ("optimizer.learning_rate", "1e-4", 1e-4),
    ("augment.flip", "false", False),
    ("data.ignore_label", "255", 255),
    ("data.ignore_label", "none", None),
    ("data.dir", "1", "1"),
    ("loss.terms", "dice", ("dice",)),
    ("loss.terms", "('dice', 'cross_entropy')", ("dice", "cross_entropy")),
    ("model.skip_levels", "()", ()),
    ("study.arms", "skip=none,skip=add", ("skip=none", "skip=add")),
  ],
)
def test_text_becomes_the_type_of_the_field(key, text, value):
  cfg = parse(**{key.replace(".", "__"): text})
  section, name = key.split(".")
  got = getattr(getattr(cfg, section), name)
  assert got == value
  assert type(got) is type(value)


def test_a_none_field_can_be_set_in_a_config_file():
  config = config_lib.default_config()
  config.data.ignore_label = 255
  assert config_lib.parse(config).data.ignore_label == 255


@pytest.mark.fault(19)
@pytest.mark.parametrize(
  ("key", "text", "words"),
  [
    ("model.skp", "none", "did you mean 'skip'"),
    ("modle.skip", "none", "did you mean 'model'"),
    ("model.skip", "concatt", "nearest: 'concat'"),
    ("model.skip.x", "1", "has no field"),
    ("model", "1", "is a section"),
    ("model.dims", "4", "too large; nearest: 3"),
    ("model.widths", "8", "at least two levels"),
    ("model.widths", "8,x", "must be of type int"),
    ("model.widths", "8,16.5", "must be of type int"),
    ("model.skip_levels", "true", "give 3 entries"),
    ("model.norm_groups", "3", None),
    ("model.dropout", "1.5", "too large"),
    ("model.preset", "unet2016", "nearest: 'unet2015'"),
    ("model.dtype", "float16", "['float32', 'bfloat16']; nearest: 'bfloat16'"),
    ("seed", "1.5", "must be of type int"),
    ("seed", "-1", "too small; nearest: 0"),
    ("seed", "true", "must be of type int"),
    ("seed", "{[]:1}", "must be of type int"),
    ("seed", "(" * 1000, "must be of type int"),
    ("data.crop_size", "63", "nearest: 56, 64"),
    ("data.crop_size", "64,64,64", "has 3 entries for model.dims=2"),
    ("data.source", "foldr", "nearest: 'folder'"),
    ("data.source", "folder", "data.dir is empty"),
    ("data.ignore_label", "1", "is a class; nearest: 2"),
    ("data.ignore_label", "x", "must be of type int"),
    ("data.mask_values", "0", "give 2 different ids"),
    ("data.mask_values", "0,255,255", "give 2 different ids"),
    ("data.val_fraction", "0.9", "leave nothing to train on"),
    ("optimizer.learning_rate", "abc", "must be of type float"),
    ("optimizer.learning_rate", "-1", "too small"),
    ("optimizer.learning_rate", "1e999", "must be a finite number"),
    ("optimizer.learning_rate", "-inf", "must be a finite number"),
    ("optimizer.learning_rate", "nan", "must be a finite number"),
    ("optimizer.learning_rate", "9" * 400, "must be a finite number"),
    ("optimizer.momentum", "1", "too large; nearest: 0.99999"),
    ("optimizer.b2", "1", "too large; nearest: 0.99999"),
    ("optimizer.ema_decay", "1", "too large; nearest: 0.99999"),
    ("model.norm_momentum", "1", "too large; nearest: 0.99999"),
    ("optimizer.warmup_steps", "301", "nearest: 300"),
    ("augment.flip", "maybe", "must be of type bool"),
    ("augment.flip", "2", "must be of type bool"),
    ("loss.terms", "focall", "choose one of"),
    ("loss.terms", "()", "is empty"),
    ("loss.terms", "dice,dice", "names a loss twice"),
    ("loss.weights", "1", "give 2 entries"),
    ("loss.weights", "1,inf", "must be a finite number"),
    ("loss.class_weights", "1,2,3", "give 2 entries"),
    ("eval.foreground", "2", "nearest: 1"),
    ("train.num_steps", "0", "nearest: 1"),
    ("train.num_steps", str(2**31 - 1), "nearest: 2147483646"),
    ("train.max_skipped", str(2**31 - 1), "nearest: 2147483646"),
    ("data.pad_multiple", "0", "nearest: 1"),
  ],
)
def test_a_mistake_is_one_helpful_line(key, text, words):
  overrides = {key.replace(".", "__"): text}
  if words is None:
    overrides["model__norm"] = "group"
    words = "does not divide width 16; nearest: 2"
  with pytest.raises(UserError) as error:
    parse(**overrides)
  message = str(error.value)
  assert words in message
  assert "\n" not in message


def test_every_step_count_fits_int32():
  cls = schema.TrainConfig.__dataclass_fields__
  counts = [f for n, f in cls.items() if n.endswith(("_steps", "_every"))]
  counts.append(schema.OptimizerConfig.__dataclass_fields__["warmup_steps"])
  assert len(counts) == 6
  for field in counts:
    assert field.metadata["high"] == 2**31 - 2, field.name


def test_unknown_keys_of_a_dict_get_a_hint():
  for raw, word in [
    ({"modle": {}}, "model"),
    ({"train": {"num_step": 3}}, "num_steps"),
  ]:
    with pytest.raises(UserError, match=f"did you mean '{word}'"):
      config_lib.parse(raw)


def test_a_preset_sets_its_fields_and_refuses_them_by_name():
  cfg = parse(model__preset="unet2015", data__crop_size="572")
  for name, value in presets.PRESETS["unet2015"].items():
    assert getattr(cfg.model, name) == value
  with pytest.raises(UserError, match=r"is set by model\.preset"):
    parse(model__preset="unet2015", model__widths="8,16", data__crop_size="572")


def test_valid_padding_refuses_a_crop_and_names_the_nearest():
  with pytest.raises(UserError, match="nearest: 556, 572"):
    parse(model__preset="unet2015", data__crop_size="560")


def test_binary_cross_entropy_needs_one_logit():
  with pytest.raises(UserError, match="nearest: 'cross_entropy'"):
    parse(loss__terms="binary_cross_entropy", data__num_classes="2")


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("config.model.skp = 'none'", "skp"),
    ("config.seed = 'one'", "seed"),
    ("config.train.num_steps = 1.5", "num_steps"),
    ("raise ValueError('two\\nlines')", "two lines"),
    ("return 3", "must return default_config()"),
  ],
)
def test_a_broken_config_file_is_one_line(tmp_path, line, words):
  path = tmp_path / "broken.py"
  path.write_text(
    "from unet_jax.config import default_config\n"
    "def get_config():\n"
    "  config = default_config()\n"
    f"  {line}\n"
    "  return config\n"
  )
  with pytest.raises(UserError) as error:
    config_lib.load_config(str(path))
  assert words in str(error.value)
  assert "broken.py" in str(error.value)
  assert "\n" not in str(error.value)


def test_json_configs_are_data_and_are_checked(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"model": {"widths": [8, 16]}, "data": {"ignore_label": 9}}')
  cfg = config_lib.parse(config_lib.load_config(str(path)))
  assert cfg.model.widths == (8, 16)
  assert cfg.data.ignore_label == 9
  path.write_text('{"model": {"width": [8, 16]}}')
  with pytest.raises(UserError, match="did you mean 'widths'"):
    config_lib.load_config(str(path))
  path.write_text("[1]")
  with pytest.raises(UserError, match="one JSON object"):
    config_lib.load_config(str(path))
  with pytest.raises(UserError, match="no config file"):
    config_lib.load_config(str(tmp_path / "nothing.py"))


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ('{"model": {"width": [8]}}', "config.model has no field 'width'"),
    ('{"model": 3}', "config.model=3: config.model is a section"),
    ('{"model": {"widths": [8, 1.5]}}', "config.model.widths=1.5: must be"),
    ('{"loss": {"weights": [NaN]}}', "config.loss.weights=nan: must be a fin"),
    ('{"optimizer": {"b2": Infinity}}', "config.optimizer.b2=inf: must be"),
    ('{"train": {"num_steps": 0}}', "config.train.num_steps=0: too small"),
    ("{'model'}", "line 1 column 2"),
    ("[1]", "one JSON object"),
  ],
)
def test_a_mistake_in_a_json_config_names_the_file(tmp_path, text, words):
  path = tmp_path / "broken.json"
  path.write_text(text)
  with pytest.raises(UserError) as error:
    config_lib.load_config(str(path))
  assert str(error.value).startswith(f"{path}: ")
  assert words in str(error.value)
  assert "\n" not in str(error.value)


def test_a_json_config_can_be_overridden(tmp_path):
  path = tmp_path / "config.json"
  cfg = parse(data__ignore_label="9", model__widths="8,16")
  path.write_text(config_lib.to_text(cfg))
  config = config_lib.load_config(str(path))
  assert config_lib.parse(config) == cfg
  config_lib.override(config, "data.ignore_label", "none")
  config_lib.override(config, "model.widths", "4,8,16")
  config_lib.override(config, "seed", "3")
  assert config_lib.differing_keys(cfg, config_lib.parse(config)) == [
    "seed: 0 -> 3",
    "model.widths: [8, 16] -> [4, 8, 16]",
    "data.ignore_label: 9 -> None",
  ]


def test_a_colon_in_a_path_is_no_argument(tmp_path):
  folder = tmp_path / "a:b"
  folder.mkdir()
  (folder / "config.json").write_text('{"seed": 5}')
  assert config_lib.load_config(f"{folder}/config.json").seed == 5
  (folder / "c.py").write_text(
    "from unet_jax.config import default_config\n"
    "def get_config(seed='1'):\n"
    "  config = default_config()\n"
    "  config.seed = int(seed)\n"
    "  return config\n"
  )
  assert config_lib.load_config(f"{folder}/c.py").seed == 1
  assert config_lib.load_config(f"{folder}/c.py:7").seed == 7


@pytest.mark.parametrize(
  ("name", "words"),
  [("c.yaml", "no config file"), ("c.py", "get_config()")],
)
def test_a_file_that_is_no_config_says_so(tmp_path, name, words):
  (tmp_path / name).write_text("seed = 1\n")
  with pytest.raises(UserError) as error:
    config_lib.load_config(str(tmp_path / name))
  assert words in str(error.value)
  assert name in str(error.value)


def test_every_ready_config_parses():
  paths = sorted(pathlib.Path("configs").glob("*.py"))
  assert paths
  for path in paths:
    config = config_lib.load_config(str(path))
    if config.data.source != "synthetic":
      config.data.dir = "somewhere"
    config_lib.parse(config)
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_config_takes_an_argument(dims):
  cfg = config_lib.parse(config_lib.load_config(f"configs/synthetic.py:{dims}"))
  assert cfg.model.dims == dims
  assert cfg.data.crop_size == (64,) * dims
