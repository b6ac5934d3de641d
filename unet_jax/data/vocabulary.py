"""Ids of words, characters and tags, fitted once and kept with the run."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from unet_jax.errors import UserError
from unet_jax.runtime import writers
from unet_jax.schema import DataConfig

# Ids of words and characters: 0 pads, 1 is unknown, the known follow.
_UNKNOWN, _FIRST = 1, 2

Encode = Callable[[Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What has an id, in the order of the ids.

  Words are in lower case: characters tell what the case is. `tags` start at
  id 0, words and characters at id 2.
  """

  words: list[str]
  characters: list[str]
  tags: list[str]


def fit(
  sentences: Iterable[tuple[Sequence[str], Sequence[str]]], cfg: DataConfig
) -> Vocabulary:
  """Of (forms, tags) of the training split.

  Words and characters that it has `cfg.min_count` times, the most frequent
  first and ties by the alphabet, as many as have a row; all tags, sorted.
  """
  words, characters, tags = (collections.Counter() for _ in range(3))
  for forms, own in sentences:
    tags.update(own)
    for form in forms:
      words[form.lower()] += 1
      characters.update(form)

  def known(counter: collections.Counter, rows: int) -> list[str]:
    frequent = [(-n, x) for x, n in counter.items() if n >= cfg.min_count]
    return [x for _, x in sorted(frequent)][: rows - _FIRST]

  return Vocabulary(
    words=known(words, cfg.num_words),
    characters=known(characters, cfg.num_characters),
    tags=sorted(tags),
  )


def make_encode(vocabulary: Vocabulary, max_characters: int) -> Encode:
  """A function of forms [T] that gives int32 [T, 1 + M], M characters at most.

  Of each form the word's id, then those of its characters, then 0. Of a form
  with more than M characters both ends are seen: the first M // 2 and the last.
  """
  words = {x: i for i, x in enumerate(vocabulary.words, _FIRST)}
  characters = {x: i for i, x in enumerate(vocabulary.characters, _FIRST)}
  head = max_characters // 2
  tail = max_characters - head

  def encode(forms: Sequence[str]) -> np.ndarray:
    ids = np.zeros((len(forms), 1 + max_characters), np.int32)
    for row, form in zip(ids, forms, strict=True):
      row[0] = words.get(form.lower(), _UNKNOWN)
      if len(form) > max_characters:
        form = form[:head] + form[-tail:]
      own = [characters.get(x, _UNKNOWN) for x in form]
      row[1 : 1 + len(own)] = own
    return ids

  return encode


def path_in(split_dir: pathlib.Path) -> pathlib.Path:
  """Where a run keeps its vocabulary."""
  return split_dir / "vocabulary.json"


def save(vocabulary: Vocabulary, split_dir: pathlib.Path) -> None:
  """Writes it atomically, as JSON."""
  text = json.dumps(dataclasses.asdict(vocabulary), ensure_ascii=False)
  writers.write_atomically(path_in(split_dir), f"{text}\n".encode())


def load(split_dir: pathlib.Path) -> Vocabulary:
  """What `save` wrote.

  Raises:
    UserError: it is missing or damaged.
  """
  path = path_in(split_dir)
  try:
    vocabulary = Vocabulary(**json.loads(path.read_bytes()))
    parts = dataclasses.astuple(vocabulary)
    if not all(isinstance(x, str) for part in parts for x in part):
      raise ValueError("an entry is no text")
  except (OSError, ValueError, TypeError) as error:
    raise UserError(
      f"{path} is not what was written: {error}; without it nothing can be"
      " predicted; train anew"
    ) from error
  return vocabulary
