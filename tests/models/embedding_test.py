"""Tokens before a U-Net: what a padding may change, and what it may not."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unet_jax.inspect import trace
from unet_jax.models import build_model, embedding

FIELDS = {
  "dims": 1,
  "widths": (4, 6, 8),
  "embedding": "both",
  "num_words": 20,
  "num_characters": 9,
  "word_width": 5,
  "character_width": 3,
  "character_features": 4,
}
MOST = 7


def ids_of(length, batch=2, seed=0):
  """Random tokens [B, T, 1 + MOST] of 1 to MOST characters."""
  rng = np.random.default_rng(seed)
  words = rng.integers(1, 20, (batch, length, 1))
  characters = rng.integers(1, 9, (batch, length, MOST))
  sizes = rng.integers(1, MOST + 1, (batch, length, 1))
  characters *= np.arange(MOST)[None, None] < sizes
  return np.concatenate([words, characters], -1).astype(np.int32)


def pad(ids, length):
  return np.pad(ids, [(0, 0), (0, length - ids.shape[1]), (0, 0)])


def random_variables(model, length, seed=0):
  """Every parameter and statistic random: no bias is 0 by chance."""
  tree = jax.eval_shape(model.init, jax.random.key(0), ids_of(length))
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape) * 0.5
    positive = path[-1].key in ("var", "scale")
    return np.float32(abs(values) + 0.5 if positive else values)

  return jax.tree_util.tree_map_with_path(draw, tree)


VARIANTS = [
  {},
  {"norm": "none"},
  {"pool": "stride", "residual": True},
  {"decoder": "nested", "deep_supervision": True},
  {"skip": "add", "activation": "gelu"},
  {"skip": "respath"},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_how_far_a_sentence_is_padded_changes_no_logit(fields):
  model = build_model(num_classes=3, **{**FIELDS, **fields})
  variables = random_variables(model, 16)
  ids = ids_of(9)
  apply = jax.jit(model.apply)
  shortest, longer, longest = (
    np.asarray(apply(variables, pad(ids, n)))[:, :9] for n in (12, 16, 40)
  )
  spread = np.ptp(shortest)
  bound = 1e-5
  np.testing.assert_allclose(longer, shortest, atol=bound * spread)
  np.testing.assert_allclose(longest, shortest, atol=bound * spread)
  # And the sentence does: the test could fail.
  changed = ids.copy()
  changed[:, 8, 0] = changed[:, 8, 0] % 19 + 1
  other = np.asarray(apply(variables, pad(changed, 12)))[:, :9]
  assert abs(other - shortest).max() > 10 * bound * spread


def test_what_looks_at_the_whole_row_sees_the_padding():
  """The stated exception: statistics over all positions."""
  model = build_model(num_classes=3, **FIELDS, norm="group", norm_groups=2)
  variables = random_variables(model, 16)
  ids = ids_of(9)
  apply = jax.jit(model.apply)
  a, b = (apply(variables, pad(ids, n))[:, :9] for n in (12, 40))
  assert abs(a - b).max() > 1e-3


def test_without_padding_it_is_the_plain_network():
  """The embedding is all that differs from a U-Net on its output."""
  model = build_model(num_classes=3, **FIELDS)
  variables = random_variables(model, 16)
  plain = build_model(
    num_classes=3, **{k: FIELDS[k] for k in ("dims", "widths")}
  )
  own = {k: v for k, v in variables["params"].items() if k != "embed"}
  ids = ids_of(16)
  embed = make_embedding()
  x = embed.apply({"params": variables["params"]["embed"]}, ids, False)
  expected = jax.jit(plain.apply)({**variables, "params": own}, x)
  got = jax.jit(model.apply)(variables, ids)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def make_embedding(kind="both", word_dropout=0.0):
  return embedding.TokenEmbedding(kind, 20, 9, 5, 3, 4, word_dropout, 0.0)


def test_features_of_characters_by_hand():
  """Loops over the formula of the docstring."""
  embed, ids = make_embedding(), ids_of(6)
  variables = random_variables_of(embed, ids)
  params = variables["params"]
  table = params["characters"]["embedding"]
  kernel, bias = params["Dense_0"]["kernel"], params["Dense_0"]["bias"]
  got = np.asarray(embed.apply(variables, ids, False))
  for b, t in itertools.product(range(2), range(6)):
    own = [c for c in ids[b, t, 1:] if c]
    vectors = [np.zeros(3)] * 2 + [table[c] for c in own] + [np.zeros(3)] * 2
    features = [
      np.maximum(np.concatenate(vectors[i : i + 5]) @ kernel + bias, 0)
      for i in range(len(own))
    ]
    expected = np.max(features, axis=0)
    np.testing.assert_allclose(got[b, t, 5:], expected, rtol=1e-5, atol=1e-6)
    word = params["words"]["embedding"][ids[b, t, 0]]
    np.testing.assert_array_equal(got[b, t, :5], word)


def random_variables_of(embed, ids):
  tree = jax.eval_shape(
    functools.partial(embed.init, train=False), jax.random.key(0), ids
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), tree)


def test_padding_has_no_features():
  embed, ids = make_embedding(), pad(ids_of(6), 8)
  out = embed.apply(random_variables_of(embed, ids), ids, False)
  assert not out[:, 6:].any() and (out[:, :6] != 0).any(-1).all()


def test_training_hides_words_and_nothing_else():
  embed, ids = make_embedding(word_dropout=0.3), ids_of(400)
  variables = random_variables_of(embed, ids)
  rngs = {"dropout": jax.random.key(0)}
  out = np.asarray(embed.apply(variables, ids, True, rngs=rngs))
  calm = np.asarray(embed.apply(variables, ids, False))
  unknown = variables["params"]["words"]["embedding"][1]
  hidden = (out[..., :5] == unknown).all(-1) & (ids[..., 0] != 1)
  kept = (out[..., :5] == calm[..., :5]).all(-1)
  assert (hidden | kept).all()
  assert 0.25 < hidden.sum() / (ids[..., 0] != 1).sum() < 0.35
  np.testing.assert_array_equal(out[..., 5:], calm[..., 5:])


@pytest.mark.parametrize(
  ("kind", "lacks"), [("words", "characters"), ("characters", "words")]
)
def test_one_kind_alone_sees_nothing_of_the_other(kind, lacks):
  embed, ids = make_embedding(kind), ids_of(6)
  variables = random_variables_of(embed, ids)
  assert lacks not in variables["params"]
  other = ids_of(6, seed=1)
  mixed = ids.copy()
  part = np.s_[..., 1:] if lacks == "characters" else np.s_[..., 0]
  mixed[part] = other[part]
  np.testing.assert_array_equal(
    embed.apply(variables, mixed, False), embed.apply(variables, ids, False)
  )


def test_describe_finds_the_embedding_before_the_first_level():
  parts = trace.trace_parts(build_model(num_classes=3, **FIELDS), (1, 16, 8))
  embed, first, *_ = parts
  assert (embed.name, embed.shape) == ("embed", (1, 16, 9))
  # Tables, and the convolution over characters: 5 wide, 3 to 4 features.
  assert embed.params == 20 * 5 + 9 * 3 + 5 * 3 * 4 + 4
  assert embed.macs == 16 * MOST * 5 * 3 * 4
  assert first.name == "encoder_0"
  assert [(w.source, w.via) for w in first.wires] == [("input", ("embed",))]


@pytest.mark.parametrize("remat", ["block", "level"])
def test_recomputing_changes_no_gradient(remat):
  ids = pad(ids_of(9), 12)

  def gradient(remat):
    model = build_model(num_classes=3, **FIELDS, remat=remat)
    variables = random_variables(model, 12)

    def loss(params):
      y, _ = model.apply(
        {**variables, "params": params},
        ids,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
      )
      return jnp.mean(y[:, :9] ** 2)

    return jax.jit(jax.grad(loss))(variables["params"])

  a, b = gradient("none"), gradient(remat)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b
  )
  assert abs(a["embed"]["words"]["embedding"]).max() > 0
