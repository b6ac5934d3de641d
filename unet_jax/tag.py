"""Using a trained network on tokens: sentences of any length in, tags out."""

import collections
import io
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import buckets, pipeline, tokens
from unet_jax.data import vocabulary as vocabulary_lib
from unet_jax.errors import UserError, check_all_done
from unet_jax.runtime import parallel, signals, writers

_SUFFIXES = (".tsv", ".txt")
_Sentences = Sequence[Sequence[str]]
# Sentences to tags of each, and to probabilities float32 [T, K] of each.
Tag = Callable[[_Sentences], tuple[list[list[str]], list[np.ndarray]]]


def make_tag(
  cfg: Config, workdir: pathlib.Path, *, step: int | None = None
) -> Tag:
  """The whole pipeline: ids, padding as in evaluation, network.

  Each sentence for itself: what else is tagged with it changes nothing.
  """
  mesh = parallel.make_mesh()
  trained = workdir_lib.load_trained(cfg, workdir, mesh, step=step)
  vocabulary = vocabulary_lib.load(workdir_lib.split_dir(workdir))
  encode = vocabulary_lib.make_encode(vocabulary, cfg.data.max_characters)

  @jax.jit  # Compiled once for each padded length.
  def apply(variables: Any, ids: jax.Array) -> jax.Array:
    return jax.nn.softmax(trained.model.apply(variables, ids))

  def tag(sentences: _Sentences) -> tuple[list[list[str]], list[np.ndarray]]:
    probs: dict[int, np.ndarray] = {}
    for chosen, length in _batches(sentences, cfg):
      shape = (cfg.eval.batch_size, length, 1 + cfg.data.max_characters)
      ids = np.zeros(shape, np.int32)
      for row, i in zip(ids, chosen, strict=False):
        row[: len(sentences[i])] = encode(sentences[i])
      out = np.asarray(apply(trained.variables, jnp.asarray(ids)))
      for row, i in zip(out, chosen, strict=False):
        probs[i] = row[: len(sentences[i])]
    ordered = [probs[i] for i in range(len(sentences))]
    names = vocabulary.tags
    return [[names[k] for k in p.argmax(-1)] for p in ordered], ordered

  return tag


def _batches(
  sentences: _Sentences, cfg: Config
) -> Iterator[tuple[list[int], int]]:
  """Indices of sentences of one padded length, and the length."""
  groups = collections.defaultdict(list)
  for i, forms in enumerate(sentences):
    groups[buckets.padded_length(len(forms), cfg.data)].append(i)
  for length, own in sorted(groups.items()):
    for start in range(0, len(own), cfg.eval.batch_size):
      yield own[start : start + cfg.eval.batch_size], length


def load_tagger(
  cfg: Config, workdir: pathlib.Path, *, step: int | None = None
) -> Callable[[str | Sequence[str]], list[str]]:
  """A function of a sentence, its tokens or text to split, that gives tags."""
  tag = make_tag(cfg, workdir, step=step)

  def tagger(sentence: str | Sequence[str]) -> list[str]:
    forms = sentence.split() if isinstance(sentence, str) else list(sentence)
    return tag([forms])[0][0] if forms else []

  return tagger


def run(
  cfg: Config,
  workdir: pathlib.Path,
  input_path: pathlib.Path | None,
  output: pathlib.Path,
  *,
  step: int | None = None,
) -> None:
  """`--mode predict` for tokens: writes STEM_tags.tsv for each file.

  Files are .tsv or .txt, see `tokens.read_forms`; without `input_path` it is
  the sentences of `cfg.eval.split`, as SPLIT_tags.tsv. A file that cannot be
  read is reported and the others go on.

  Raises:
    UserError: no file was found, or some could not be read.
  """
  files = _list_files(cfg, workdir, input_path)
  tag = make_tag(cfg, workdir, step=step)
  failures, count = [], 0
  with signals.GracefulStop() as stop:
    for name, read in writers.track(files, "predicting"):
      if stop.requested:
        raise signals.Stopped(stop.requested)
      try:
        sentences = read()
      except UserError as error:
        failures.append(str(error))
        continue
      count += len(sentences)
      _write(cfg, output, name, sentences, *tag(sentences))
  writers.log(f"{count} sentences tagged, in {output}")
  check_all_done(failures, len(files), "files were not tagged")


def _list_files(
  cfg: Config, workdir: pathlib.Path, path: pathlib.Path | None
) -> list[tuple[str, Callable[[], _Sentences]]]:
  """(output name, function that reads the sentences) of each input."""
  if path is None:
    splits = workdir_lib.split_dir(workdir)
    source = pipeline.make_source(cfg, cfg.eval.split, splits)
    forms = [sentence.forms for sentence in source.sentences]
    return [(cfg.eval.split, lambda: forms[: cfg.predict.max_images or None])]
  if path.is_dir():
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
  elif path.is_file():
    files = [path]
  else:
    raise UserError(f"--input {path} does not exist; give a file or a folder")
  if not files:
    raise UserError(
      f"--input {path} holds no sentences; supported: {', '.join(_SUFFIXES)}"
    )
  stems = collections.Counter(p.stem for p in files)
  return [
    (p.stem if stems[p.stem] == 1 else p.name, lambda p=p: tokens.read_forms(p))
    for p in files
  ]


def _write(
  cfg: Config,
  output: pathlib.Path,
  name: str,
  sentences: _Sentences,
  tags: list[list[str]],
  probs: list[np.ndarray],
) -> None:
  text = io.StringIO()
  for pairs in zip(sentences, tags, strict=True):
    text.writelines(f"{f}\t{t}\n" for f, t in zip(*pairs, strict=True))
    text.write("\n")
  writers.write_atomically(
    output / f"{name}_tags.tsv", text.getvalue().encode()
  )
  if cfg.predict.probability:
    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(probs))
    path = output / f"{name}_probability.npy"
    writers.write_atomically(path, buffer.getvalue())
