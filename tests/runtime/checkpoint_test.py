"""Checkpoints under faults: killed, full, flipped, truncated, mismatched."""

import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests import runs
from unet_jax.errors import UserError
from unet_jax.runtime import checkpoint


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: optax.OptState


def make_state(seed, *, width=2, dtype=np.float32):
  rng = np.random.default_rng(seed)
  kernel = jnp.asarray(rng.normal(size=(8, width)).astype(dtype))
  params = {"conv": {"kernel": kernel}}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  state = State(jnp.asarray(seed, jnp.int32), params, tx.init(params))
  return jax.device_put(state, jax.devices()[0])


def like(state, sharding=None):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding or x.sharding
    ),
    state,
  )


def assert_equal_bits(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def open_checkpoints(
  directory, log=None, *, keep_latest=2, writable=True, strict=False
):
  return checkpoint.Checkpointer(
    directory,
    keep_latest=keep_latest,
    writable=writable,
    strict=strict,
    log=(log if log is not None else []).append,
  )


def save_steps(directory, steps, **options):
  with open_checkpoints(directory, **options) as checkpointer:
    for step in steps:
      checkpointer.save(step, make_state(step), score=None, meta={"step": step})


def names(directory):
  return sorted(path.name for path in directory.iterdir())


def largest_file(step_folder):
  files = [path for path in step_folder.rglob("d/*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


# Runs in a new interpreter: `directory` and the imports are given.
CHILD = """
import sys, time, pathlib, jax, jax.numpy as jnp, numpy as np
from unet_jax.runtime import checkpoint
directory = pathlib.Path(sys.argv[1])
def state(step, n=8):
  x = np.random.default_rng(step).normal(size=n).astype(np.float32)
  return {"x": jnp.asarray(x)}
"""


def child_state(step, n=8):
  x = np.random.default_rng(step).normal(size=n).astype(np.float32)
  return {"x": jax.device_put(x, jax.devices()[0])}


def start_child(script, directory):
  return subprocess.Popen(
    [sys.executable, "-W", "error", "-c", CHILD + script, str(directory)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"XLA_FLAGS": ""},
  )


def kill_after_line(child, line, seconds=0.0):
  for text in child.stdout:
    if text.strip() == line:
      break
  time.sleep(seconds)
  child.send_signal(signal.SIGKILL)
  child.communicate()
  assert child.returncode == -signal.SIGKILL


def test_state_meta_and_step_come_back_exactly(tmp_path):
  meta = {"total": 0.1 + 0.2, "count": 2**53 + 1, "names": ["a", None, True]}
  with open_checkpoints(tmp_path) as checkpointer:
    checkpointer.save(7, make_state(7), score=0.5, meta=meta)
    checkpointer.wait()
    checkpointer.poll()
    state, found, step = checkpointer.restore(like(make_state(7)))
  assert_equal_bits(state, make_state(7))
  assert found == meta
  assert step == 7


def test_nothing_to_restore_is_none_when_reading_and_when_writing(tmp_path):
  for folder, writable in [(tmp_path / "a", True), (tmp_path / "b", False)]:
    with open_checkpoints(folder, writable=writable) as checkpointer:
      assert checkpointer.restore(like(make_state(0))) is None
      assert checkpointer.steps() == []
      assert checkpointer.best_step() is None
    assert folder.exists() == writable


def test_s1_leaving_by_an_exception_commits_and_passes_it_on(tmp_path):
  for index, error in enumerate([KeyError, KeyboardInterrupt, SystemExit]):
    directory = tmp_path / str(index)
    with pytest.raises(error):
      with open_checkpoints(directory) as checkpointer:
        checkpointer.save(1, make_state(1), score=None, meta={})
        raise error("stop")
    with open_checkpoints(directory, writable=False) as checkpointer:
      state, _, step = checkpointer.restore(like(make_state(0)))
    assert step == 1
    assert_equal_bits(state, make_state(1))


def test_s1_the_end_of_the_interpreter_commits_and_prints_nothing(tmp_path):
  child = start_child(
    """
from absl import logging
logging.set_verbosity(logging.INFO)  # As absl.app.run does.
saver = checkpoint.Checkpointer(
  directory, keep_latest=1, writable=True, log=print)
with saver:
  saver.save(1, state(1), score=0.5, meta={})
  saver.save(2, state(2, 2_000_000), score=None, meta={})
  sys.exit(3)
""",
    tmp_path,
  )
  out, err = child.communicate(timeout=60)
  assert (child.returncode, out, err) == (3, "", "")
  with open_checkpoints(tmp_path, writable=False) as checkpointer:
    assert checkpointer.steps() == [1, 2]
    state, _, _ = checkpointer.restore(like(child_state(2, 2_000_000)))
  assert_equal_bits(state, child_state(2, 2_000_000))


def test_killed_just_before_the_commit_restores_the_step_before(tmp_path):
  # All bytes of step 2 are on disk; only the rename is missing.
  child = start_child(
    """
saver = checkpoint.Checkpointer(
  directory, keep_latest=1, writable=True, log=print)
saver.save(1, state(1), score=None, meta={})
saver.wait()
write_digests = checkpoint.write_digests
def write_and_hang(*args):
  write_digests(*args)
  print("before commit", flush=True)
  time.sleep(60)
checkpoint.write_digests = write_and_hang
saver.save(2, state(2), score=None, meta={})
saver.wait()
""",
    tmp_path,
  )
  kill_after_line(child, "before commit")
  assert names(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]
  with open_checkpoints(tmp_path, writable=False) as checkpointer:
    assert checkpointer.restore(like(child_state(1)))[2] == 1
  assert names(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]
  log = []
  with open_checkpoints(tmp_path, log) as checkpointer:
    # S6: gone before anything else happens, and said so.
    assert names(tmp_path) == ["1"]
    assert len(log) == 1 and "2.orbax-checkpoint-tmp: deleted" in log[0]
    state, _, step = checkpointer.restore(like(child_state(1)))
    assert step == 1
    assert_equal_bits(state, child_state(1))
    checkpointer.save(2, child_state(2), score=None, meta={})
  assert names(tmp_path) == ["1", "2"]


def test_killed_at_any_moment_leaves_whole_checkpoints(tmp_path):
  child = start_child(
    """
saver = checkpoint.Checkpointer(
  directory, keep_latest=1, writable=True, log=print)
for step in range(1, 1000):
  saver.save(step, state(step, 500_000), score=None, meta={"step": step})
  if step == 3:
    print("third", flush=True)
""",
    tmp_path,
  )
  kill_after_line(child, "third", random.uniform(0.0, 0.3))
  # No moment lies between a commit and its digests: the newest folder is whole.
  # (An older one may be half deleted.)
  newest = max(int(name) for name in names(tmp_path) if name.isdigit())
  assert checkpoint.find_damage(tmp_path / str(newest)) is None
  with open_checkpoints(tmp_path) as checkpointer:
    state, meta, step = checkpointer.restore(like(child_state(0, 500_000)))
  assert step == newest >= 2
  assert meta == {"step": step}
  assert_equal_bits(state, child_state(step, 500_000))
  assert all(name.isdigit() for name in names(tmp_path))


def test_s2_nan_is_never_best_and_the_best_outlives_many_saves(tmp_path):
  scores = [0.1, 0.9, float("nan"), 0.3, None, float("inf"), 0.2, None]
  with open_checkpoints(tmp_path) as checkpointer:
    for step, score in enumerate(scores, start=1):
      checkpointer.save(step, make_state(step), score=score, meta={})
      checkpointer.wait()
      assert checkpointer.best_step() == min(step, 2)
    assert checkpointer.steps() == [2, 7, 8]
  # The score is on disk: a later process keeps the best, too.
  with open_checkpoints(tmp_path) as checkpointer:
    for step in (9, 10, 11):
      checkpointer.save(step, make_state(step), score=0.5, meta={})
    checkpointer.wait()
    assert checkpointer.steps() == [2, 10, 11]
  with open_checkpoints(tmp_path, writable=False) as checkpointer:
    assert checkpointer.best_step() == 2
    assert checkpointer.steps() == [2, 10, 11]
    state, _, _ = checkpointer.restore(like(make_state(0)), step=2)
  assert_equal_bits(state, make_state(2))


@pytest.mark.parametrize(
  "scores, best",
  [
    ([0.0, None, None], 1),
    ([-3.0, -2.0, -5.0], 2),
    ([0.5, 0.5, 0.4], 2),
    ([None, float("nan"), None], None),
  ],
)
def test_best_is_the_largest_score_and_of_equals_the_later(
  tmp_path, scores, best
):
  with open_checkpoints(tmp_path, keep_latest=1) as checkpointer:
    for step, score in enumerate(scores, start=1):
      checkpointer.save(step, make_state(step), score=score, meta={})
    checkpointer.wait()
    assert checkpointer.best_step() == best
    assert checkpointer.steps() == sorted({best, 3} - {None})


def test_a_better_save_takes_the_place_of_the_best_at_once(tmp_path):
  with open_checkpoints(tmp_path, keep_latest=1) as checkpointer:
    for step, score in ((1, 0.5), (2, 0.9)):
      checkpointer.save(step, make_state(step), score=score, meta={})
      checkpointer.wait()
      assert checkpointer.steps() == [step]


def test_s3_a_refused_save_is_an_error(tmp_path):
  save_steps(tmp_path, [10, 20])
  with open_checkpoints(tmp_path) as checkpointer:
    for step in (10, 15, 20):
      with pytest.raises(UserError, match=rf"checkpoint {step} was refused"):
        checkpointer.save(step, make_state(step), score=None, meta={})
    checkpointer.save(30, make_state(30), score=None, meta={})
    with pytest.raises(UserError, match="checkpoint 30 was refused"):
      checkpointer.save(30, make_state(30), score=None, meta={})
  assert names(tmp_path) == ["20", "30"]


def test_a_score_can_come_after_the_save(tmp_path):
  save_steps(tmp_path, [10, 20])
  with open_checkpoints(tmp_path) as checkpointer:
    checkpointer.restore(like(make_state(0)))
    checkpointer.set_score(20, 0.5)
    assert checkpointer.best_step() == 20
    # In flight: waits for it. Another score replaces the first.
    checkpointer.save(30, make_state(30), score=None, meta={})
    checkpointer.set_score(30, 0.9)
    assert checkpointer.best_step() == 30
    checkpointer.set_score(30, float("nan"))
    assert checkpointer.best_step() == 20
  with open_checkpoints(tmp_path, writable=False) as checkpointer:
    assert checkpointer.best_step() == 20 and checkpointer.steps() == [20, 30]
    state, _, _ = checkpointer.restore(like(make_state(0)), step=20)
    assert_equal_bits(state, make_state(20))


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, pathlib.Path.unlink])
def test_s4_a_damaged_step_is_named_and_the_one_before_used(tmp_path, damage):
  save_steps(tmp_path, [1, 2])
  path = largest_file(tmp_path / "2")
  damage(path)
  log = []
  with open_checkpoints(tmp_path, log, writable=False) as checkpointer:
    state, meta, step = checkpointer.restore(like(make_state(0)))
    assert_equal_bits(state, make_state(1))
    assert (meta, step) == ({"step": 1}, 1)
    with pytest.raises(UserError, match=path.name) as caught:
      checkpointer.restore(like(make_state(0)), step=2)
  assert "\n" not in str(caught.value) and "[1]" in str(caught.value)
  assert len(log) == 1
  assert path.name in log[0] and "damaged" in log[0] and "using 1" in log[0]
  assert names(tmp_path) == ["1", "2"]
  # A run that writes repeats the lost steps, so it clears the way.
  with open_checkpoints(tmp_path, log) as checkpointer:
    assert checkpointer.restore(like(make_state(0)))[2] == 1
    assert names(tmp_path) == ["1"]
    checkpointer.save(2, make_state(2), score=None, meta={})
    checkpointer.wait()
    assert_equal_bits(
      checkpointer.restore(like(make_state(0)))[0], make_state(2)
    )


def test_s4_every_file_that_restore_reads_has_a_digest(tmp_path):
  save_steps(tmp_path, [1])
  unprotected = {"digests.json", "_CHECKPOINT_METADATA", "commit_success.txt"}
  for path in (tmp_path / "1").rglob("*"):
    name = path.relative_to(tmp_path / "1").as_posix()
    if path.is_file() and name not in unprotected:
      data = path.read_bytes()
      flip_a_bit(path)
      assert name in checkpoint.find_damage(tmp_path / "1")
      path.write_bytes(data)
  assert checkpoint.find_damage(tmp_path / "1") is None
  (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text("garbage{")
  with open_checkpoints(tmp_path) as checkpointer:
    assert_equal_bits(
      checkpointer.restore(like(make_state(0)))[0], make_state(1)
    )


@pytest.mark.parametrize(
  "content",
  [
    b"null",
    b"[]",
    b"3",
    b"",
    b"\xff",
    b"{}",
    b'{"score": 1.0, "files": {"a": 1}}',
    b'{"score": 1.0, "files": [["a", 1]]}',
    b'{"score": 1.0, "files": {}, "sha256": null}',
  ],
)
def test_s4_digests_of_any_other_content_are_damaged(tmp_path, content):
  (tmp_path / "digests.json").write_bytes(content)
  assert checkpoint.find_damage(tmp_path) == (
    "damaged, digests.json is not what was written"
  )
  assert checkpoint.read_score(tmp_path) is None


@pytest.mark.parametrize(
  "old, new",
  [
    ('"score": 0.25', '"score": 9.25'),
    ('"score": 0.25', '"score": null'),
    ('"score"', '"scorf"'),
    ('"sha256": "', '"sha256": "0'),
    ('"sha256"', '"sha257"'),
  ],
)
def test_s4_a_changed_score_is_damage_and_never_the_best(tmp_path, old, new):
  with open_checkpoints(tmp_path) as checkpointer:
    checkpointer.save(1, make_state(1), score=0.5, meta={})
    checkpointer.save(2, make_state(2), score=0.25, meta={})
  path = tmp_path / "2" / "digests.json"
  text = path.read_text()
  assert checkpoint.read_score(tmp_path / "2") == 0.25
  path.write_text(text.replace(old, new))
  assert path.read_text() != text
  assert checkpoint.read_score(tmp_path / "2") is None
  with open_checkpoints(tmp_path, writable=False) as checkpointer:
    assert checkpointer.best_step() == 1
    with pytest.raises(UserError, match=r"damaged, digests\.json"):
      checkpointer.restore(like(make_state(0)), step=2)
    assert checkpointer.restore(like(make_state(0)))[2] == 1


def test_s4_a_step_without_digests_is_incomplete(tmp_path):
  save_steps(tmp_path, [1, 2])
  (tmp_path / "2" / "digests.json").unlink()
  log = []
  with open_checkpoints(tmp_path, log) as checkpointer:
    assert checkpointer.steps() == [1]
    with pytest.raises(UserError, match="2: its save did not complete"):
      checkpointer.restore(like(make_state(0)), step=2)
    assert checkpointer.restore(like(make_state(0)))[2] == 1
  assert names(tmp_path) == ["1"]
  assert "its save did not complete; using 1" in log[0]


def test_s4_strict_uses_no_other_step_and_reads_what_is_whole(tmp_path):
  log = []
  with open_checkpoints(tmp_path, log, keep_latest=3) as checkpointer:
    for step, score in ((1, 0.9), (2, 0.1), (3, None)):
      checkpointer.save(step, make_state(step), score=score, meta={})
  with open_checkpoints(tmp_path, log, strict=True) as checkpointer:
    assert checkpointer.best_step() == 1
    assert checkpointer.restore(like(make_state(0)))[2] == 3
  assert log == []
  truncate(tmp_path / "1" / "digests.json")
  truncate(largest_file(tmp_path / "3"))
  with open_checkpoints(tmp_path, log, writable=False) as checkpointer:
    assert checkpointer.best_step() == 2
    assert checkpointer.restore(like(make_state(0)))[2] == 2
  assert [line.split(": ")[0][-2:] for line in log] == ["/1", "/3"]
  assert all(line.endswith("; using 2") for line in log)
  with open_checkpoints(tmp_path, strict=True) as checkpointer:
    for ask in (
      checkpointer.best_step,
      lambda: checkpointer.restore(like(make_state(0))),
    ):
      with pytest.raises(UserError, match=r"/[13]: damaged.* to use 2 in its"):
        ask()
    assert names(tmp_path) == ["1", "2", "3"]


def test_s4_a_lone_incomplete_step_is_cleared_a_damaged_one_is_not(tmp_path):
  save_steps(tmp_path, [1])
  digests = (tmp_path / "1" / "digests.json").read_bytes()
  (tmp_path / "1" / "digests.json").write_bytes(digests[:-20])
  with open_checkpoints(tmp_path) as checkpointer:
    with pytest.raises(UserError, match=r"/1: damaged.*no checkpoint is whole"):
      checkpointer.restore(like(make_state(0)))
    assert names(tmp_path) == ["1"]
    assert checkpointer.best_step() is None
    (tmp_path / "1" / "digests.json").unlink()
    assert checkpointer.restore(like(make_state(0))) is None
    assert names(tmp_path) == []
    checkpointer.save(1, make_state(1), score=None, meta={})
  assert names(tmp_path) == ["1"]


def test_a_missing_step_lists_the_others(tmp_path):
  save_steps(tmp_path, [1, 2])
  with open_checkpoints(tmp_path, writable=False) as checkpointer:
    with pytest.raises(UserError, match=r"no such checkpoint.*\[1, 2\]"):
      checkpointer.restore(like(make_state(0)), step=3)


@pytest.mark.parametrize(
  "other, first",
  [
    (dict(width=3), r"/mu/conv/kernel: .*float32\[8, 2\].*float32\[8, 3\]"),
    (dict(dtype=jnp.bfloat16), r"/mu/conv/kernel: .*float32.*bfloat16"),
  ],
)
def test_s5_other_shapes_and_dtypes_are_refused(tmp_path, other, first):
  save_steps(tmp_path, [1])
  log = []
  with open_checkpoints(tmp_path, log, writable=False) as checkpointer:
    with pytest.raises(UserError, match=first) as caught:
      checkpointer.restore(like(make_state(0, **other)))
  assert "(3 differences)" in str(caught.value)  # The kernel, its mu and nu.
  assert "config.json" in str(caught.value)
  assert "\n" not in str(caught.value)
  assert len(log[0].splitlines()) == 3
  assert names(tmp_path) == ["1"]


def test_s5_other_paths_are_refused_in_twenty_lines(tmp_path):
  save_steps(tmp_path, [1])
  leaf = like(make_state(0)).step
  log = []
  with open_checkpoints(tmp_path, log) as checkpointer:
    with pytest.raises(UserError, match=r"nothing.*\(35 differences\)"):
      checkpointer.restore({f"w{i}": leaf for i in range(30)})
  lines = log[0].splitlines()
  assert len(lines) == 20 and all(": the checkpoint has " in x for x in lines)


def test_restores_on_another_number_of_devices(tmp_path):
  mesh = Mesh(np.array(jax.devices()), ("data",))
  assert mesh.size == 8
  sharded = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  alone = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  state = make_state(5)
  x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)

  def tree(over_data, replicated):
    return {
      "x": jax.device_put(x, over_data),
      "state": jax.device_put(state, replicated),
    }

  eight, one = tree(sharded, whole), tree(alone, alone)
  with open_checkpoints(tmp_path) as checkpointer:
    checkpointer.save(1, eight, score=None, meta={})
    on_one, _, _ = checkpointer.restore(like(one))
    assert on_one["x"].sharding == alone
    assert_equal_bits(on_one, eight)
    checkpointer.save(2, on_one, score=None, meta={})
    on_eight, _, _ = checkpointer.restore(like(eight))
    assert on_eight["x"].sharding == sharded
    assert on_eight["state"].params["conv"]["kernel"].sharding == whole
    assert_equal_bits(on_eight, eight)


def test_polling_does_not_wait_for_the_save(tmp_path, monkeypatch):
  written, write = threading.Event(), checkpoint.write_digests
  monkeypatch.setattr(
    checkpoint, "write_digests", lambda *args: written.wait(9) and write(*args)
  )
  with open_checkpoints(tmp_path) as checkpointer:
    checkpointer.save(1, make_state(1), score=None, meta={})
    checkpointer.poll()
    assert checkpointer.steps() == []
    written.set()
    checkpointer.wait()
    assert checkpointer.steps() == [1]


def test_a_bug_in_a_save_is_no_full_disk(tmp_path, monkeypatch):
  def fail(*_):
    raise RuntimeError("a bug")

  with open_checkpoints(tmp_path) as checkpointer:
    with monkeypatch.context() as patch:
      patch.setattr(checkpoint, "write_digests", fail)
      checkpointer.save(1, make_state(1), score=None, meta={})
      with pytest.raises(RuntimeError, match="a bug"):
        checkpointer.wait()
    assert names(tmp_path) == []
    checkpointer.save(1, make_state(1), score=None, meta={})
  assert names(tmp_path) == ["1"]


def test_an_error_of_closing_is_told_where_no_save_failed(
  tmp_path, monkeypatch
):
  checkpointer = open_checkpoints(tmp_path)
  close = checkpoint.ocp.CheckpointManager.close

  def close_and_fail(manager):
    close(manager)
    raise RuntimeError("not closed")

  monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "close", close_and_fail)
  with pytest.raises(RuntimeError, match="not closed"):
    checkpointer.close()


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
  subtract = jax.jit(lambda x: x - 1, donate_argnums=0)
  x = child_state(1, 4_000_000)["x"]
  with open_checkpoints(tmp_path) as checkpointer:
    checkpointer.save(1, {"x": x}, score=None, meta={})
    for _ in range(5):
      x = subtract(x)
    x.block_until_ready()
    found, _, _ = checkpointer.restore(like(child_state(0, 4_000_000)))
  assert_equal_bits(found, child_state(1, 4_000_000))


@pytest.mark.slow
def test_two_processes_save_together_and_one_restores(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  script = f"""
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize("localhost:{port}", 2, RANK)
mesh = Mesh(np.array(jax.devices()), ("data",))
sharding = NamedSharding(mesh, PartitionSpec("data"))
def tree(step):
  x = np.asarray(state(step)["x"])
  return {{"x": jax.make_array_from_callback(x.shape, sharding, x.__getitem__)}}
like = {{"x": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding)}}
def saver(log):
  return checkpoint.Checkpointer(
    directory, keep_latest=1, writable=True, is_primary=RANK == 0, log=log)
with saver(print) as saving:
  assert saving.restore(like) is None
  for step, score in enumerate([0.9, 0.2, 0.3, None], start=1):
    saving.save(step, tree(step), score=score, meta={{"step": step}})
    saving.poll()
  saving.wait()
  assert saving.steps() == [1, 4] and saving.best_step() == 1
  multihost_utils.sync_global_devices("both have looked")
  if RANK == 0:
    (directory / "4" / "digests.json").unlink()
  multihost_utils.sync_global_devices("process 0 has deleted")
  found, _, step = saving.restore(like)
  assert step == 1 and saving.steps() == [1]
  for got in found["x"].addressable_shards:
    assert np.array_equal(got.data, np.asarray(state(1)["x"])[got.index])
  saving.save(4, tree(4), score=None, meta={{}})
print("end", flush=True)
"""
  children = [
    start_child(script.replace("RANK", str(rank)), tmp_path) for rank in (0, 1)
  ]
  try:
    outputs = [child.communicate(timeout=60) for child in children]
  finally:
    for child in children:
      child.kill()
  for child, (out, err) in zip(children, outputs, strict=True):
    assert child.returncode == 0, err
    assert out.endswith("end\n")
  assert names(tmp_path) == ["1", "4"]
  with open_checkpoints(tmp_path, writable=False) as checkpointer:
    state, _, _ = checkpointer.restore(like(child_state(0)))
  assert_equal_bits(state, child_state(4))


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 2 MB."""
  with runs.mounted(tmp_path / "small", "size=2m") as folder:
    yield folder / "checkpoints"


@pytest.fixture
def small_files(tmp_path):
  """No file may grow beyond 1 MB."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
  yield tmp_path / "checkpoints"
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("left", [2**21, 2**14, 0])
def test_s7_a_full_disk_prints_nothing_but_the_error(small_disk, left):
  """Of many arrays, some are still being written when the first has failed.

  With little left most fail; with nothing, orbax raises again when closed.
  """
  filler = small_disk.parent / "filler"
  filler.write_bytes(b"\0" * (2**21 - left))
  child = start_child(
    """
from unet_jax.errors import UserError
saver = checkpoint.Checkpointer(
  directory, keep_latest=1, writable=True, log=print)
many = {f"{k:03d}": state(k, 60_000)["x"] for k in range(60)}
try:
  with saver:
    saver.save(1, many, score=None, meta={})
except UserError as error:
  time.sleep(1)  # For what comes late.
  sys.exit("no room" in str(error))
""",
    small_disk,
  )
  out, err = child.communicate(timeout=60)
  assert (child.returncode, out, err) == (1, "", "")


def test_s7_asyncio_does_not_tell_again_what_orbax_raised(tmp_path):
  child = start_child(
    """
import asyncio
checkpoint.Checkpointer(directory, keep_latest=1, writable=False, log=print)
async def forget(name):
  error = f"raise ValueError({name!r})"  # As of tensorstore, with the path.
  code = compile(f"async def save(): {error}", name, "exec")
  exec(code, scope := {})
  asyncio.ensure_future(scope["save"]())  # A task, and many gathered.
  asyncio.ensure_future(asyncio.gather(scope["save"](), scope["save"]()))
  await asyncio.sleep(0.01)
asyncio.run(forget("/lib/orbax/checkpoint/serialization.py"))
asyncio.run(forget("/lib/other.py"))
async def leave(name):  # A task that has not ended with its loop.
  code = compile("async def never(): await event.wait()", name, "exec")
  exec(code, scope := {"event": asyncio.Event()})
  task = asyncio.ensure_future(scope["never"]())
  await asyncio.sleep(0)
for name in ("/lib/orbax/checkpoint/store.py", "/lib/other.py"):
  loop = asyncio.new_event_loop()
  loop.run_until_complete(leave(name))
  loop.close()
async def async_serialize_from_host():
  async def write_fragment(): pass
  write_fragment()
asyncio.run(async_serialize_from_host())
async def other(): pass
other()
""",
    tmp_path,
  )
  out, err = child.communicate(timeout=60)
  assert (child.returncode, out) == (0, "")
  assert err.count("Task exception was never retrieved") == 1
  assert err.count("_GatheringFuture exception was never retrieved") == 1
  assert err.count("Task was destroyed but it is pending") == 1
  assert "/lib/other.py" in err and "/orbax/" not in err
  assert "'other' was never awaited" in err and "write_fragment" not in err


@pytest.mark.parametrize("disk", ["small_disk", "small_files"])
@pytest.mark.parametrize("how", ["poll", "save", "wait", "close"])
def test_s7_a_full_disk_is_told_and_harms_nothing(disk, how, request):
  directory = request.getfixturevalue(disk)
  small, large = child_state(1), child_state(2, 2_000_000)
  with open_checkpoints(directory, keep_latest=1) as checkpointer:
    checkpointer.save(1, small, score=None, meta={})
  checkpointer = open_checkpoints(directory, keep_latest=1)
  with pytest.raises(UserError, match="no room for checkpoint 2") as caught:
    checkpointer.save(2, large, score=None, meta={})
    if how == "poll":
      for _ in range(2000):
        checkpointer.poll()
        time.sleep(0.01)
    elif how == "save":
      checkpointer.save(3, small, score=None, meta={})
    elif how == "wait":
      checkpointer.wait()
    elif how == "close":
      checkpointer.close()
  assert "8,000,000 bytes" in str(caught.value)
  assert str(directory) in str(caught.value)
  assert names(directory) == ["1"]
  if how != "close":
    # Told once; with room again, saving goes on and nothing is forgotten.
    checkpointer.save(3, small, score=None, meta={})
    checkpointer.close()
    assert names(directory) == ["3"]
  with open_checkpoints(directory, writable=False) as checkpointer:
    assert_equal_bits(checkpointer.restore(like(small))[0], small)
