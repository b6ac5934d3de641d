"""Files of tokens: what reads, what gets an id, and every way to be wrong."""

import json

import numpy as np
import pytest

from unet_jax import config as config_lib
from unet_jax.data import tokens
from unet_jax.data.vocabulary import Vocabulary, make_encode
from unet_jax.errors import UserError

TRAIN = (
  "# sent_id = first\n"
  "The\tDET\nCat\tNOUN\nsat\tVERB\n\n"
  "#\tSYM\n1\tNUM\n\n\n"
  "the\tDET\ncat\tNOUN\nthe\tDET\n"
)
VAL = "# sent_id = v\nA\tDET\nsat\tVERB\n"


@pytest.fixture
def root(tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  (folder / "train.tsv").write_text(TRAIN)
  (folder / "val.tsv").write_text(VAL)
  return folder


def make_config(root, **fields):
  config = config_lib.default_config()
  values = {
    "model.dims": 1,
    "model.widths": (2, 4),
    "model.embedding": "both",
    "augment.flip": False,
    "augment.turn": False,
    "data.source": "tokens",
    "data.dir": str(root),
    "data.normalize": "none",
    "data.num_classes": 5,
    "data.crop_size": (8,),
    "data.max_characters": 4,
    "data.min_count": 1,
    **{key.replace("__", "."): value for key, value in fields.items()},
  }
  for key, value in values.items():
    config_lib.assign(config, key, value)
  return config_lib.parse(config)


def make(root, split="train", **fields):
  cfg = make_config(root, **fields)
  return tokens.TokenSource(cfg, split, root.parent / "split")


def refused(call, *words):
  with pytest.raises(UserError) as error:
    call()
  assert "\n" not in str(error.value)
  for word in words:
    assert str(word) in str(error.value)


# --- Reading ------------------------------------------------------------------


def test_sentences_names_and_a_token_that_looks_like_a_comment(root):
  source = make(root)
  assert [s.forms for s in source.sentences] == [
    ("The", "Cat", "sat"),
    ("#", "1"),
    ("the", "cat", "the"),
  ]
  assert source.names == ["first", "line_6", "line_10"]
  assert source.sentences[1].tags == ("SYM", "NUM")
  assert [source.size(i) for i in range(3)] == [(3,), (2,), (3,)]


@pytest.mark.parametrize("edit", ["crlf", "bom", "no_last_newline", "blanks"])
def test_what_editors_do_to_a_file_changes_nothing(root, edit):
  expected = tokens.read_sentences(root / "train.tsv", 2)
  data = (root / "train.tsv").read_bytes()
  if edit == "crlf":
    data = data.replace(b"\n", b"\r\n")
  elif edit == "bom":
    data = b"\xef\xbb\xbf" + data
  elif edit == "no_last_newline":
    data = data.rstrip(b"\n")
  else:
    data += b"\n  \n\n"
  (root / "train.tsv").write_bytes(data)
  assert tokens.read_sentences(root / "train.tsv", 2) == expected


def test_a_token_may_hold_what_python_calls_a_line_end(root):
  (root / "train.tsv").write_text("a\u2028b\tX\nc\x0cd\tY\n", encoding="utf-8")
  (sentence,) = tokens.read_sentences(root / "train.tsv", 2)
  assert sentence.forms == ("a\u2028b", "c\x0cd")


def test_another_column_can_be_the_tag(root):
  (root / "train.tsv").write_text("The\tDET\tDT\ncat\tNOUN\tNN\n")
  (sentence,) = tokens.read_sentences(root / "train.tsv", 3)
  assert sentence.tags == ("DT", "NN")


def test_names_that_repeat_are_made_unique(root):
  text = "# sent_id = a\nx\tX\n\n# sent_id = a\ny\tY\n"
  (root / "train.tsv").write_text(text)
  names = [s.name for s in tokens.read_sentences(root / "train.tsv", 2)]
  assert names == ["a_line_2", "a_line_5"]


@pytest.mark.parametrize(
  ("train", "val", "words"),
  [
    ("a\tX\nb\n", VAL, ["train.tsv:2", "'b' has no tab"]),
    ("a\tX\n\tY\n", VAL, ["train.tsv:2", "form is empty"]),
    ("a\tX\n\n\nb\t\n", VAL, ["train.tsv:4", "tag is empty"]),
    (TRAIN, "# sent_id = v\nA\tDET\nsat\tVRB\n", ["val.tsv:3", "'VRB'"]),
    (TRAIN, b"A\tDET\nsat\xe9\tVERB\n", ["val.tsv:2", "0xe9", "UTF-8"]),
    (TRAIN, "", ["val.tsv", "no token"]),
    (TRAIN, "\n# sent_id = v\n\n", ["val.tsv", "no token"]),
    (TRAIN + "!\tPUNCT\n", VAL, ["6 tags", "num_classes=6 (now 5)", "PUNCT"]),
    (TRAIN, None, ["train.tsv but no val.tsv"]),
    (None, VAL, ["no train.tsv in"]),
  ],
)
def test_every_way_to_be_wrong_names_the_line(root, train, val, words):
  for name, text in (("train", train), ("val", val)):
    path = root / f"{name}.tsv"
    if text is None:
      path.unlink()
    else:
      path.write_bytes(text if isinstance(text, bytes) else text.encode())
  refused(lambda: [make(root, split) for split in ("train", "val")], *words)


def test_a_missing_column_is_named(root):
  refused(
    lambda: make(root, data__tag_column=3),
    "train.tsv:2",
    "2 columns",
    "config.data.tag_column=3",
  )


@pytest.mark.parametrize(
  ("name", "text", "expected"),
  [
    ("a.tsv", "The\tDET\ncat\n\n#\n", [("The", "cat"), ("#",)]),
    ("a.txt", "The cat sat\n\nNo .\n", [("The", "cat", "sat"), ("No", ".")]),
    ("a.txt", "The\ncat\n\nNo\n", [("The", "cat"), ("No",)]),
    ("a.txt", "The\tDET\ncat\tNOUN\n", [("The", "cat")]),
  ],
)
def test_what_is_predicted_can_be_text_or_a_table(
  tmp_path, name, text, expected
):
  (tmp_path / name).write_text(text)
  assert tokens.read_forms(tmp_path / name) == expected


# --- Ids ----------------------------------------------------------------------


def test_ids_of_words_and_characters(root):
  source = make(root, data__max_characters=4)
  words = ["the", "cat", "#", "1", "sat"]
  saved = json.loads((root.parent / "split" / "vocabulary.json").read_text())
  # By frequency, then by the alphabet; id 0 pads and 1 is unknown.
  assert saved["words"] == words
  assert saved["tags"] == source.tags == ["DET", "NOUN", "NUM", "SYM", "VERB"]
  ids = {c: i for i, c in enumerate(saved["characters"], 2)}
  example = source[0]
  assert example["image"].dtype == np.int32
  assert example["image"].tolist() == [
    [2, ids["T"], ids["h"], ids["e"], 0],
    [3, ids["C"], ids["a"], ids["t"], 0],
    [6, ids["s"], ids["a"], ids["t"], 0],
  ]
  assert example["label"].tolist() == [0, 1, 4]
  assert example["weight"].tolist() == [1, 1, 1]
  assert make(root, "val").image(0)[0].tolist() == [1, 1, 0, 0, 0]


def test_rare_words_are_unknown_and_the_most_frequent_are_kept(root):
  rare = make(root, data__min_count=2)
  assert rare.image(0)[:, 0].tolist() == [2, 3, 1]
  (root.parent / "split" / "vocabulary.json").unlink()
  few = make(root, data__num_words=3, data__num_characters=4)
  assert few.image(0)[:, 0].tolist() == [2, 1, 1]
  assert few.image(0)[:, 1:].max() == 3


def test_of_a_long_word_both_ends_are_seen():
  vocabulary = Vocabulary([], list("abcdefg"), ["X", "Y"])
  encode = make_encode(vocabulary, 4)
  assert encode(["abcdefg"])[0].tolist() == [1, 2, 3, 7, 8]
  assert encode(["abcd"])[0].tolist() == [1, 2, 3, 4, 5]
  assert make_encode(vocabulary, 1)(["abc"])[0].tolist() == [1, 4]


def test_the_run_keeps_its_vocabulary_when_the_data_change(root):
  before = make(root)[0]["image"]
  (root / "train.tsv").write_text("zebra\tNOUN\n" * 50 + "\n" + TRAIN)
  assert make(root).image(1).tolist() == before.tolist()


def test_a_damaged_vocabulary_is_refused(root):
  make(root)
  path = root.parent / "split" / "vocabulary.json"
  for text in ("{", '{"words": []}', '{"words":[1],"characters":[],"tags":[]}'):
    path.write_text(text)
    refused(lambda: make(root), "vocabulary.json", "train anew")


# --- Config -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("augment.flip", True, ["augment.flip", "config.augment.flip=False"]),
    ("augment.noise", 0.1, ["config.augment.noise=0"]),
    ("model.dims", 2, ["model.dims=2", "nearest: 1"]),
    ("model.padding", "valid", ["model.padding", "nearest: 'same'"]),
    ("model.embedding", "none", ["model.embedding", "nearest: 'both'"]),
    ("model.skip", "shuffle", ["model.skip"]),
    ("data.normalize", "image", ["data.normalize", "nearest: 'none'"]),
    ("data.num_classes", 1, ["data.num_classes=1"]),
    ("data.ignore_label", 200, ["data.ignore_label=200", "nearest: None"]),
    ("data.buckets", (8,), ["data.buckets=(8,)", "below data.crop_size=8"]),
    ("data.buckets", (3,), ["data.buckets: 3", "nearest: 4"]),
    ("data.dir", "", ["data.dir is empty"]),
    ("eval.extra_metrics", ("rand",), ["'rand'", "'calibration'"]),
    ("data.weight_map", "components", ["data.weight_map", "nearest: 'none'"]),
    ("data.foreground_share", 0.5, ["data.foreground_share=0.5"]),
    ("parallel.space", 2, ["parallel.space=2", "nearest: 1"]),
    ("predict.views", 8, ["predict.views=8", "nearest: 1"]),
    ("predict.uncertainty", "entropy", ["predict.uncertainty='entropy'"]),
  ],
)
def test_what_tokens_cannot_have_is_refused(root, field, value, words):
  refused(lambda: make_config(root, **{field: value}), *words)


def test_images_have_no_embedding_and_no_accuracy_of_tokens():
  for field, value in (
    ("model.embedding", "both"),
    ("data.buckets", (16,)),
    ("eval.best_metric", "entity_f1"),
  ):
    config = config_lib.default_config()
    config_lib.assign(config, field, value)
    refused(lambda config=config: config_lib.parse(config), field, "tokens")


# --- Real data ----------------------------------------------------------------


def test_the_real_sentences(data_root):
  for split, count in (("train", 12544), ("val", 2001)):
    path = data_root / "ewt_upos" / f"{split}.tsv"
    read = tokens.read_sentences(path, 2)
    assert len(read) == len({s.name for s in read}) == count
    # A comment has no tab, and a token has.
    lines = path.read_text().split("\n")
    assert sum(len(s.forms) for s in read) == sum("\t" in x for x in lines)
  # Tokens that a reader of comments would lose.
  assert any("#" in s.forms for s in read)
