"""The schema: what is accepted, what is refused, and in which words."""

import ast
import json
import pathlib

import pytest

from unet_jax import config as config_lib
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
  assert config_lib.config_hash(again) == config_lib.config_hash(cfg)


def test_every_field_has_a_comment():
  text = pathlib.Path(config_lib.__file__).read_text()
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
    ("seed", "1.5", "must be of type int"),
    ("seed", "-1", "too small; nearest: 0"),
    ("seed", "true", "must be of type int"),
    ("data.crop_size", "63", "nearest: 56, 64"),
    ("data.crop_size", "64,64,64", "has 3 entries for model.dims=2"),
    ("data.source", "foldr", "nearest: 'folder'"),
    ("data.source", "folder", "data.dir is empty"),
    ("data.ignore_label", "1", "is a class; nearest: 2"),
    ("data.ignore_label", "x", "must be of type int"),
    ("data.mask_values", "0", "give 2 different ids"),
    ("data.val_fraction", "0.9", "leave nothing to train on"),
    ("optimizer.learning_rate", "abc", "must be of type float"),
    ("optimizer.learning_rate", "-1", "too small"),
    ("optimizer.warmup_steps", "301", "nearest: 300"),
    ("augment.flip", "maybe", "must be of type bool"),
    ("augment.flip", "2", "must be of type bool"),
    ("loss.terms", "focall", "choose one of"),
    ("loss.terms", "()", "is empty"),
    ("loss.terms", "dice,dice", "names a loss twice"),
    ("loss.weights", "1", "give 2 entries"),
    ("loss.class_weights", "1,2,3", "give 2 entries"),
    ("eval.foreground", "2", "nearest: 1"),
    ("train.num_steps", "0", "nearest: 1"),
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
  assert key.split(".")[-1] in message or "config" in message


def test_a_preset_sets_its_fields_and_refuses_them_by_name():
  cfg = parse(model__preset="unet2015", data__crop_size="572")
  for name, value in config_lib.PRESETS["unet2015"].items():
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


def test_every_ready_config_parses():
  paths = sorted(pathlib.Path("configs").glob("*.py"))
  assert paths
  for path in paths:
    config = config_lib.load_config(str(path))
    if config.data.source == "folder":
      config.data.dir = "somewhere"
    config_lib.parse(config)
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_config_takes_an_argument(dims):
  cfg = config_lib.parse(config_lib.load_config(f"configs/synthetic.py:{dims}"))
  assert cfg.model.dims == dims
  assert cfg.data.crop_size == (64,) * dims
