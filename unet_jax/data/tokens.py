"""Sentences with a tag for each token, from files with a token a line.

A line is form TAB tag; a blank line ends a sentence; `# sent_id = NAME` names
the next one. Nothing else is a comment: a token may be "#".
"""

import collections
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from unet_jax.data import vocabulary as vocabulary_lib
from unet_jax.data.vocabulary import Vocabulary
from unet_jax.errors import UserError
from unet_jax.runtime import storage
from unet_jax.schema import Config

_SPLITS = ("train", "val", "test")
_COMMENT = "# sent_id"


@dataclasses.dataclass(frozen=True)
class Sentence:
  """Tokens in order; `line` is the line of the first, from 1."""

  name: str
  line: int
  forms: tuple[str, ...]
  tags: tuple[str, ...]  # One a token, or ().


def read_sentences(path: pathlib.Path, tag_column: int = 0) -> list[Sentence]:
  """The sentences of a .tsv file, UTF-8.

  Args:
    path: the file.
    tag_column: column of the tag, from 1 = the form; 0 reads no tags, so that
      lines may have one column.

  Raises:
    UserError: names the line that has no form or no tag, or is not UTF-8; or
      the file has no token.
  """
  sentences: list[Sentence] = []
  name, rows = "", []

  def end() -> None:
    nonlocal name, rows
    if rows:
      first, forms, tags = rows[0][0], *zip(*(r[1:] for r in rows), strict=True)
      tags = tags if tag_column else ()
      sentence = Sentence(name or f"line_{first}", first, forms, tags)
      sentences.append(sentence)
    name, rows = "", []

  for number, line in enumerate(_read_lines(path), 1):
    if not line.strip(" "):
      end()
    elif line.startswith(_COMMENT):
      end()
      name = line.partition("=")[2].strip()
    else:
      where = f"{path}:{number}"
      rows.append((number, *_parse_token(line, where, tag_column)))
  end()
  if not sentences:
    raise UserError(f"{path} has no token; give one a line, form TAB tag")
  return _with_unique_names(sentences)


def read_forms(path: pathlib.Path) -> list[tuple[str, ...]]:
  """The tokens of each sentence of a file to predict, UTF-8.

  A .tsv file, or one with a tab, has a token a line, its form first. Any other
  has a sentence a line, words apart by blanks; but if no line has more than one
  word, a token a line too.
  """
  lines = _read_lines(path)
  words = [tuple(line.split()) for line in lines]
  a_line = path.suffix.lower() != ".tsv" and not any("\t" in x for x in lines)
  if a_line and any(len(x) > 1 for x in words):
    return [x for x in words if x]
  return [sentence.forms for sentence in read_sentences(path)]


def _read_lines(path: pathlib.Path) -> list[str]:
  """Split at line feeds alone: tokens may hold other ends of lines."""
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(
      f"cannot read {path}: {error.strerror}; give a file with a token a line"
    ) from error
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b"\n") + 1
    raise UserError(
      f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the"
      " file as UTF-8"
    ) from error
  return [line.removesuffix("\r") for line in text.split("\n")]


def _parse_token(line: str, where: str, tag_column: int) -> tuple[str, str]:
  form, *others = line.split("\t")
  if not form.strip():
    raise UserError(f"{where}: the form is empty; write form TAB tag")
  if not tag_column:
    return form, ""
  if not others:
    raise UserError(
      f"{where}: {line[:40]!r} has no tab; write form TAB tag, and a blank line"
      " between sentences"
    )
  if len(others) < tag_column - 1:
    raise UserError(
      f"{where}: has {len(others) + 1} columns; config.data.tag_column="
      f"{tag_column} needs as many"
    )
  tag = others[tag_column - 2]
  if not tag.strip():
    raise UserError(f"{where}: the tag is empty; write form TAB tag")
  return form, tag


def _with_unique_names(sentences: list[Sentence]) -> list[Sentence]:
  counts = collections.Counter(s.name for s in sentences)
  return [
    s
    if counts[s.name] == 1
    else dataclasses.replace(s, name=f"{s.name}_line_{s.line}")
    for s in sentences
  ]


# --- The source ---------------------------------------------------------------


class TokenSource:
  """DIR/SPLIT.tsv; see `unet_jax.data.source`, but that examples hold ids.

  An image is int32 [T, 1 + M], ids as `vocabulary.make_encode` gives them;
  labels are ids of `tags`. The vocabulary is that of DIR/train.tsv, kept in
  `split_dir`, where later modes find it. Construction reads and checks the
  whole file.

  Raises:
    UserError: a file is missing, a line is malformed, a tag unknown, or there
      are not data.num_classes tags.
  """

  def __init__(self, cfg: Config, split: str, split_dir: pathlib.Path):
    path = _paths(cfg)[split]
    if not path.is_file():
      found = ", ".join(f"{s}.tsv" for s in self.list_splits(cfg, split_dir))
      raise UserError(f"{cfg.data.dir} has {found} but no {split}.tsv; add it")
    vocabulary = _find_vocabulary(cfg, split_dir)
    self.tags = vocabulary.tags
    self.sentences = read_sentences(path, cfg.data.tag_column)
    self.names = [s.name for s in self.sentences]
    self._labels = _encode_tags(self.sentences, self.tags, path)
    most = cfg.data.max_characters
    self._encode = vocabulary_lib.make_encode(vocabulary, most)

  @staticmethod
  def list_splits(cfg: Config, split_dir: pathlib.Path) -> list[str]:
    """The splits that have a file."""
    del split_dir
    paths = _paths(cfg)
    if not paths["train"].is_file():
      raise UserError(
        f"no train.tsv in {cfg.data.dir}; put it there, a token a line (form"
        " TAB tag), or mend config.data.dir"
      )
    return [split for split, path in paths.items() if path.is_file()]

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    label = self._labels[index]
    weight = np.ones(len(label), np.float32)
    return {"image": self.image(index), "label": label, "weight": weight}

  def image(self, index: int) -> np.ndarray:
    return self._encode(self.sentences[index].forms)

  def size(self, index: int) -> tuple[int, ...]:
    return (len(self.sentences[index].forms),)

  def instances(self, index: int) -> None:
    """Tokens have no objects."""

  def path(self, index: int) -> None:
    """Nor files of their own."""

  def spacing(self, index: int) -> None:
    """Nor a size."""

  def check(self, index: int, *, read_label: bool) -> None:
    """Nothing is left to be wrong once the file was read."""


def _paths(cfg: Config) -> dict[str, pathlib.Path]:
  root = storage.to_path(cfg.data.dir)
  return {split: root / f"{split}.tsv" for split in _SPLITS}


def _find_vocabulary(cfg: Config, split_dir: pathlib.Path) -> Vocabulary:
  """The run's own, or that of train.tsv, which is then kept with the run."""
  if vocabulary_lib.path_in(split_dir).is_file():
    return vocabulary_lib.load(split_dir)
  path, wanted = _paths(cfg)["train"], cfg.data.num_classes
  sentences = read_sentences(path, cfg.data.tag_column)
  fitted = vocabulary_lib.fit(((s.forms, s.tags) for s in sentences), cfg.data)
  if len(fitted.tags) != wanted:
    raise UserError(
      f"{path} has {len(fitted.tags)} tags ({_list(fitted.tags)}); set"
      f" config.data.num_classes={len(fitted.tags)} (now {wanted})"
    )
  vocabulary_lib.save(fitted, split_dir)
  return fitted


def _list(tags: Sequence[str]) -> str:
  return ", ".join(tags[:20]) + (", ..." if len(tags) > 20 else "")


def _encode_tags(
  sentences: Sequence[Sentence], tags: Sequence[str], path: pathlib.Path
) -> list[np.ndarray]:
  ids = {tag: i for i, tag in enumerate(tags)}
  for sentence in sentences:
    for place, tag in enumerate(sentence.tags):
      if tag not in ids:
        raise UserError(
          f"{path}:{sentence.line + place}: tag {tag!r} is none of train.tsv's"
          f" ({_list(tags)}); mend the line"
        )
  return [np.array([ids[t] for t in s.tags], np.int32) for s in sentences]
