"""The step: what it computes, what it refuses, and on how many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from unet_jax import state as state_lib
from unet_jax import train_step as train_step_lib
from unet_jax.data import augment
from unet_jax.models import build_model
from unet_jax.objectives import losses
from unet_jax.optimizer import make_optimizer, make_schedule
from unet_jax.runtime import parallel
from unet_jax.schema import AugmentConfig, OptimizerConfig

SIZE, BATCH = 8, 8
RNG = jax.random.key(7)


def batch_of(step, dtype=np.float32, batch=BATCH):
  """Uneven content: example i has i times the contrast and its own offset."""
  rng = np.random.default_rng(step)
  scale = np.arange(1, batch + 1).reshape(-1, 1, 1, 1)
  image = rng.normal(size=(batch, SIZE, SIZE, 1)) * scale + scale
  label = (image[..., 0] > scale[..., 0]).astype(np.int32)
  weight = (rng.random(label.shape) > 0.1 * (step % 3)).astype(dtype)
  return {
    "id": np.arange(batch, dtype=np.int32) + step * batch,
    "image": image.astype(dtype),
    "label": label,
    "weight": weight,
    "valid": np.ones(batch, dtype),
  }


def make(
  axis_name=None,
  name="sgd",
  norm="batch",
  aug=None,
  skip="concat",
  dropout=0.0,
  **fields,
):
  """(model, step) of a small network; batch norm and clipping on."""
  cfg = OptimizerConfig(
    name=name, learning_rate=0.05, clip_norm=1.0, schedule="constant"
  )
  model = build_model(
    num_classes=2,
    widths=(3, 4),
    norm=norm,
    norm_groups=1,
    axis_name=axis_name,
    skip=skip,
    dropout=dropout,
  )
  loss_fn = losses.make_loss(
    terms=("cross_entropy", "dice"),
    weights=(1.0, 0.5),
    class_weights=(1.0, 2.0),
  )
  step = train_step_lib.make_train_step(
    model=model,
    loss_fn=loss_fn,
    tx=make_optimizer(cfg),
    schedule=make_schedule(cfg, 100),
    augment_fn=augment.make_augment(aug) if aug else None,
    axis_name=axis_name,
    **fields,
  )
  return model, make_optimizer(cfg), step


@functools.cache
def initial(name="sgd", norm="batch", ema=False):
  model, tx, _ = make(name=name, norm=norm)
  shape = (1, SIZE, SIZE, 1)
  init = jax.jit(
    lambda rng: state_lib.init_state(model, tx, rng, shape, ema=ema)
  )
  return jax.device_get(init(jax.random.key(0)))


def cast(state, dtype):
  return jax.tree.map(
    lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, state
  )


def mesh_of(num_devices):
  devices = np.array(jax.devices()[:num_devices]).reshape(-1, 1)
  return Mesh(devices, ("data", "space"))


def jitted(step, num_devices):
  mesh = mesh_of(num_devices)
  whole, split = parallel.replicated(mesh), parallel.over_data(mesh)
  fn = jax.jit(step, in_shardings=(whole, split, whole), out_shardings=whole)
  return lambda state, batch: fn(state, batch, RNG)


def pmapped(step):
  fn = jax.pmap(
    step, axis_name="data", in_axes=(None, 0, None), out_axes=(None, None)
  )

  def run(state, batch):
    shards = jax.tree.map(
      lambda x: x.reshape(8, x.shape[0] // 8, *x.shape[1:]), batch
    )
    return fn(state, shards, RNG)

  return run


def trajectory(run, state, dtype, num_steps=30, batch=BATCH):
  history = []
  for step in range(num_steps):
    state, sums = run(state, batch_of(step, dtype, batch))
    history.append(float(sums.loss.total) / float(sums.loss.count))
  return jax.device_get(state), np.array(history)


# --- One trajectory on any number of devices ---------------------------------


@pytest.mark.parametrize(
  "accumulate", [2, pytest.param(1, marks=pytest.mark.slow)]
)
def test_1_and_8_devices_and_pmap_agree_to_1e_9_in_float64(accumulate):
  """HOUSE part 0: 30 steps; params, optimizer state and batch statistics."""
  batch = BATCH * accumulate
  with jax.enable_x64(True):
    start = cast(initial(), np.float64)
    _, _, step = make(accumulate=accumulate)
    _, _, step_of_axis = make(axis_name="data", accumulate=accumulate)
    one, loss_one = trajectory(jitted(step, 1), start, np.float64, batch=batch)
    for run in (jitted(step, 8), pmapped(step_of_axis)):
      other, loss = trajectory(run, start, np.float64, batch=batch)
      np.testing.assert_allclose(loss, loss_one, rtol=1e-9)
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
        other,
        one,
      )
  assert loss_one[-1] < loss_one[0], "it learns, so the test can see drift"
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), one.batch_stats, start.batch_stats
  )
  assert min(jax.tree.leaves(moved)) > 1e-6


@pytest.mark.parametrize(("name", "bound"), [("sgd", 1e-4), ("adamw", 1e-3)])
def test_1_and_8_devices_agree_in_float32(name, bound):
  start = initial(name)
  _, _, step = make(name=name)
  runs = jitted(step, 1), jitted(step, 8)
  if name == "sgd":
    states = [run(start, batch_of(0))[0] for run in runs]
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      *jax.device_get(states),
    )
  losses_of = [trajectory(run, start, np.float32)[1] for run in runs]
  np.testing.assert_allclose(*losses_of, rtol=bound)


def test_the_sums_of_a_step_do_not_know_the_strategy():
  """Counts too: a window of steps may go on with other devices."""
  start = initial()
  runs = [jitted(make()[2], 1), jitted(make()[2], 8), pmapped(make("data")[2])]
  first, *others = [jax.device_get(run(start, batch_of(0))[1]) for run in runs]
  assert float(first.grad_norm.count) == 1
  for other in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), other, first
    )


def test_augmentation_does_not_know_the_device_count():
  aug = AugmentConfig(rotate=30.0, brightness=0.5, noise=0.2)
  start = initial()
  _, _, step = make(aug=aug)
  results = [jitted(step, n)(start, batch_of(0))[0] for n in (1, 8)]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    *jax.device_get(results),
  )
  _, _, plain = make()
  without = jitted(plain, 8)(start, batch_of(0))[0]
  kernel = results[0].params["head"]["kernel"]
  assert not np.allclose(kernel, without.params["head"]["kernel"], atol=1e-5)


@pytest.mark.parametrize("skip", ["noise", "shuffle"])
def test_controls_do_not_know_the_device_count(skip):
  """Noise goes with the example, the partner comes from the global batch."""
  start = initial()
  runs = [
    jitted(make(skip=skip)[2], 1),
    jitted(make(skip=skip)[2], 8),
    pmapped(make("data", skip=skip)[2]),
  ]
  first, *others = [run(start, batch_of(0)) for run in runs]
  for other in others:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
      jax.device_get(other[0].params),
      jax.device_get(first[0].params),
    )
  # The same network with the example's own features does something else.
  own = jitted(make()[2], 1)(start, batch_of(0))[1]
  assert abs(float(own.loss.total - first[1].loss.total)) > 1e-3


def test_partners_are_valid_examples():
  """What only fills the batch lends its features to nobody."""
  start = initial()
  step = jax.jit(make(skip="shuffle")[2])
  batch = batch_of(0, batch=4)
  batch["valid"] = np.float32([1, 1, 1, 0])
  first = step(start, batch, RNG)[1]
  batch["image"][3] *= -7  # It enters the batch statistics as zeros.
  again = step(start, batch, RNG)[1]
  np.testing.assert_array_equal(first.loss.total, again.loss.total)
  everyone = train_step_lib._context(batch, None).partner
  np.testing.assert_array_equal(everyone[:3], [1, 2, 0])


@pytest.mark.parametrize(
  ("ids", "valid", "expected"),
  [
    ([5, 6, 7], [1, 1, 1], [1, 2, 0]),
    ([5, 6, 7, 7], [1, 1, 1, 0], [1, 2, 0, 0]),
    ([5, 5, 6, 5], [1, 1, 1, 1], [2, 2, 3, 2]),  # Two epochs meet.
    ([5, 6, 7, 8], [1, 0, 0, 1], [3, 3, 3, 0]),
  ],
)
def test_the_partner_is_the_next_valid_example_with_another_id(
  ids, valid, expected
):
  got = train_step_lib.next_other(jnp.array(ids), jnp.array(valid, jnp.float32))
  np.testing.assert_array_equal(got, expected)


# --- Microbatches -------------------------------------------------------------


def test_microbatches_have_the_gradient_of_the_whole_batch():
  """Without batch norm; the last examples only fill, unevenly."""
  with jax.enable_x64(True):
    start = cast(initial(norm="group"), np.float64)
    batch = batch_of(0, np.float64, 12)
    batch["valid"][9:] = 0
    whole, parts = (
      jax.jit(make(norm="group", accumulate=n)[2])(start, batch, RNG)
      for n in (1, 4)
    )
    assert_near = functools.partial(
      np.testing.assert_allclose, rtol=1e-9, atol=1e-9
    )
    jax.tree.map(assert_near, *jax.device_get((parts[0], whole[0])))
    # All but the gradient's own mean, which is of steps, is of examples.
    jax.tree.map(assert_near, *jax.device_get((parts[1], whole[1])))
  assert int(parts[1].loss.count) == 9


def test_a_microbatch_is_every_nth_example_and_moves_the_statistics():
  """The running mean after two microbatches, from two steps that are one."""
  start, momentum = initial(), 0.9
  batch = batch_of(0)
  new = jax.jit(make(accumulate=2)[2])(start, batch, RNG)[0]
  model, _, _ = make()
  stats = start.batch_stats
  for part in (slice(0, None, 2), slice(1, None, 2)):
    _, updates = model.apply(
      {"params": start.params, "batch_stats": stats},
      batch["image"][part],
      train=True,
      mutable=["batch_stats"],
    )
    stats = updates["batch_stats"]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    jax.device_get(new.batch_stats),
    jax.device_get(stats),
  )
  first = jax.tree.leaves(start.batch_stats)[0]
  assert not np.allclose(jax.tree.leaves(stats)[0], momentum * first)


def test_partners_stay_within_their_microbatch():
  """An example of the other microbatch cannot change a loss."""
  start = initial(norm="none")
  step = jax.jit(make(norm="none", skip="shuffle", accumulate=2)[2])
  batch = batch_of(0, batch=4)
  batch["weight"][1::2] = 0  # Of the second microbatch only features count.
  first = step(start, batch, RNG)[1]
  batch["image"][1::2] *= -7
  again = step(start, batch, RNG)[1]
  np.testing.assert_array_equal(first.loss.total, again.loss.total)
  batch["image"][2] *= -7
  other = step(start, batch, RNG)[1]
  assert float(other.loss.total) != float(first.loss.total)


def test_dropout_is_another_in_every_microbatch_and_on_no_device_count():
  start = initial()
  runs = [
    jitted(make(accumulate=2, dropout=0.5)[2], n)(start, batch_of(0, batch=16))
    for n in (1, 8)
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6),
    *jax.device_get([r[0].params for r in runs]),
  )
  same = batch_of(0, batch=16)
  same["image"][1::2], same["label"][1::2] = (
    same["image"][::2],
    same["label"][::2],
  )
  same["weight"][:] = 1
  # The two microbatches are equal, so without dropout nothing changes when
  # there is only one of them.
  results = {}
  for dropout in (0.0, 0.5):
    whole = jax.jit(make(norm="none", accumulate=2, dropout=dropout)[2])
    half = jax.jit(make(norm="none", dropout=dropout)[2])
    start = initial(norm="none")
    a = whole(start, same, RNG)[1].loss.total
    b = 2 * half(start, {k: v[::2] for k, v in same.items()}, RNG)[1].loss.total
    results[dropout] = abs(float(a - b)) / float(b)
  assert results[0.0] < 1e-5 < results[0.5]


# --- What one step computes --------------------------------------------------


def test_one_step_is_the_gradient_of_the_mean_over_valid_examples():
  """Against a loss written out here; the third example only pads the batch."""
  start = initial(norm="none")
  model, tx, step = make(norm="none")
  batch = batch_of(1, batch=3)
  batch["valid"] = np.float32([1, 1, 0])
  batch["image"][2] = np.nan  # Whatever is in it.
  new, sums = jax.jit(step)(start, batch, RNG)

  @jax.jit
  def mean_loss(params):
    logits = model.apply({"params": params}, batch["image"][:2])
    probs = jax.nn.softmax(logits)
    truth = jax.nn.one_hot(batch["label"][:2], 2)
    weight = batch["weight"][:2]
    factor = weight * (1 + batch["label"][:2])  # Class weights 1 and 2.
    picked = jnp.sum(truth * jnp.log(probs), -1)
    ce = -jnp.sum(factor * picked, (1, 2)) / jnp.sum(factor, (1, 2))
    p, g = probs[..., 1], truth[..., 1]
    overlap = 2 * jnp.sum(weight * p * g, (1, 2)) + 1
    size = jnp.sum(weight * (p + g), (1, 2)) + 1
    return jnp.mean(ce + 0.5 * (1 - overlap / size))

  value, grads = jax.value_and_grad(mean_loss)(start.params)
  updates, _ = tx.update(grads, tx.init(start.params), start.params)
  expected = jax.tree.map(lambda p, u: p - 0.05 * u, start.params, updates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    jax.device_get(new.params),
    jax.device_get(expected),
  )
  assert int(sums.loss.count) == 2
  np.testing.assert_allclose(sums.loss.total / 2, value, rtol=1e-5)
  np.testing.assert_allclose(
    sums.grad_norm.total, optax.tree.norm(grads), rtol=1e-5
  )
  assert int(sums.confusion.counts.sum()) == int(batch["weight"][:2].sum())
  assert int(new.step) == 1


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
  start = initial(ema=True)
  _, _, step = make(ema_decay=0.9)
  step = jax.jit(step)
  bad = batch_of(0)
  bad["image"][3, 2, 2] = np.inf
  bad["weight"][:] = 1
  state, sums = step(start, bad, RNG)
  assert not bool(sums.finite)
  for name in ("params", "batch_stats", "opt_state", "ema"):
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.device_get(getattr(state, name)),
      getattr(start, name),
    )
  assert (int(state.step), int(state.skipped)) == (1, 1)
  assert float(sums.loss.count) == 0, "and poisons no mean"
  assert float(sums.loss.total) == 0
  state, sums = step(state, bad, RNG)
  assert int(sums.skipped_in_row) == 2
  state, sums = step(state, batch_of(0), RNG)
  assert bool(sums.finite)
  assert (int(state.skipped), int(state.skipped_in_row)) == (2, 0)


def test_the_moving_average_forgets_the_start_soon():
  """a_t = d a_{t-1} + (1 - d) x_t, d = min(0.9, (1 + t) / (10 + t))."""
  start = initial(ema=True)
  _, _, step = make(ema_decay=0.9)
  step, state, expected = jax.jit(step), start, start.ema
  for t in range(3):
    state, _ = step(state, batch_of(t), RNG)
    d = (1 + t) / (10 + t)
    current = {"params": state.params, "batch_stats": state.batch_stats}
    expected = jax.tree.map(
      lambda old, new, d=d: d * old + (1 - d) * np.asarray(new),
      expected,
      current,
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    jax.device_get(state.ema),
    expected,
  )
  assert state_lib.eval_variables(state) is state.ema


def test_parameters_that_would_overflow_are_not_taken():
  """A finite gradient can still make parameters that are not."""
  start = initial()
  tx = optax.scale(1e38)
  model, _, _ = make()
  step = train_step_lib.make_train_step(
    model=model,
    loss_fn=losses.make_loss(
      terms=("cross_entropy",), weights=(), class_weights=()
    ),
    tx=tx,
    schedule=lambda step: jnp.float32(1e3),
  )
  start = start.replace(opt_state=tx.init(start.params))
  state, sums = jax.jit(step)(start, batch_of(0), RNG)
  assert not bool(sums.finite)
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(state.params), start.params
  )


def test_the_state_is_donated():
  """No second copy of the parameters lives through the step."""
  _, _, step = make()
  mesh = mesh_of(1)
  whole = parallel.replicated(mesh)
  fn = jax.jit(step, donate_argnums=0, out_shardings=whole)
  state = jax.device_put(initial(), whole)
  fn(state, batch_of(0), RNG)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
