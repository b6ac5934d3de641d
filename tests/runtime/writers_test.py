import io
import json
import os
import pathlib
import pty
import signal
import socket
import struct
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from unet_jax.errors import UserError
from unet_jax.runtime import writers

ROOT = pathlib.Path(__file__).parents[2]


def _run(code, *args):
  """Runs `code` in another process; its last lines tell what it saw."""
  return subprocess.run(
    [sys.executable, "-c", code, *map(str, args)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def _write(path, records):
  writer = writers.JsonlWriter(path)
  for record in records:
    writer.write(record)
  writer.close()


# --- Whole files ------------------------------------------------------------


def test_write_atomically_replaces_and_leaves_nothing_else(tmp_path):
  path = tmp_path / "a" / "b" / "file.bin"
  writers.write_atomically(path, b"old")
  writers.write_atomically(path, b"new")
  assert path.read_bytes() == b"new"
  assert os.listdir(path.parent) == ["file.bin"]


def test_full_disk_leaves_the_old_file(tmp_path):
  path = tmp_path / "file.bin"
  path.write_bytes(b"old")
  code = """
import resource, sys
from unet_jax.errors import UserError
from unet_jax.runtime import writers
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
  writers.write_atomically(sys.argv[1], bytes(5000))
except UserError as error:
  sys.exit(f"user: {error}")
"""
  err = _run(code, path).stderr
  assert err.startswith(f"user: cannot write {path}: File too large (")
  assert path.read_bytes() == b"old"
  assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.parametrize(
  "taken, path, reason",
  [
    ("out", "out/a/b.png", "a folder in its path is a file"),
    ("out", "out/b.png", "a folder in its path is a file"),
    ("b.png/x", "b.png", "Is a directory"),
  ],
)
def test_a_path_that_cannot_be_written_is_told_in_one_line(
  tmp_path, taken, path, reason
):
  (tmp_path / taken).parent.mkdir(exist_ok=True)
  (tmp_path / taken).touch()
  with pytest.raises(UserError) as caught:
    writers.write_atomically(tmp_path / path, b"data")
  text = str(caught.value)
  assert text.startswith(f"cannot write {tmp_path / path}: {reason}; ")
  assert text.endswith(("another path", "permissions")) and "\n" not in text
  assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / taken]


def test_a_folder_of_someone_else_is_told_in_one_line(tmp_path):
  path = tmp_path / "file.bin"
  path.write_bytes(b"old")
  code = """
import os, sys
import tensorboardX.proto.event_pb2  # While its files can be read.
from unet_jax.errors import UserError
from unet_jax.runtime import writers
os.chmod(os.path.dirname(sys.argv[1]), 0o500)
if os.getuid() == 0:
  os.setuid(65534)
for write in (
  lambda: writers.write_atomically(sys.argv[1], b"new"),
  lambda: writers.JsonlWriter(sys.argv[2]),
  lambda: writers.TensorBoardWriter(sys.argv[3], first_step=0),
):
  try:
    write()
  except UserError as error:
    print(error)
"""
  others = tmp_path / "m.jsonl", tmp_path / "tensorboard"
  done = _run(code, path, *others)
  tmp_path.chmod(0o700)
  lines = done.stdout.splitlines()
  assert len(lines) == 3, done.stderr
  for line, name in zip(lines, (path, *others), strict=True):
    assert line.startswith(f"cannot write {name}") and "Permission" in line
    assert line.endswith("check the path and its permissions")
  assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.bin"]


def test_two_processes_may_write_one_file(tmp_path, monkeypatch):
  # The second writer comes in when the first has written and not yet renamed.
  path, real = tmp_path / "file.bin", os.replace

  def interrupted(source, target):
    monkeypatch.setattr(os, "replace", real)
    writers.write_atomically(path, b"second")
    real(source, target)

  monkeypatch.setattr(os, "replace", interrupted)
  writers.write_atomically(path, b"first")
  assert path.read_bytes() == b"first"
  assert os.listdir(tmp_path) == ["file.bin"]


# --- JSON lines -------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
  values=st.lists(
    st.one_of(
      st.none(),
      st.booleans(),
      st.integers(-(2**63), 2**63),
      st.floats(allow_nan=False, allow_infinity=False),
      st.text(),
    )
  )
)
def test_plain_values_come_back_bit_for_bit(values, tmp_path_factory):
  path = tmp_path_factory.mktemp("jsonl") / "m.jsonl"
  _write(path, [{"z": 1, "values": values, "a": {"b": values}}])
  (record,) = writers.read_jsonl(path)
  assert list(record) == ["z", "values", "a"]  # Keys in the given order.
  assert repr(record["values"]) == repr(values)
  assert path.read_bytes().count(b"\n") == 1


def test_arrays_and_scalars_of_numpy_and_jax_become_numbers(tmp_path):
  path = tmp_path / "m.jsonl"
  record = {
    "float32": np.float32(0.1),
    "int": np.int64(7),
    "bool": np.bool_(True),
    "jax": jnp.float32(0.1),
    "bfloat16": jnp.asarray([0.5, 1.5], jnp.bfloat16),
    "array": np.array([[1, 2], [3, 4]]),
    "tuple": (np.float64(0.1), None),
  }
  _write(path, [record])
  (read,) = writers.read_jsonl(path)
  assert np.float32(read["float32"]) == np.float32(0.1)
  assert read["jax"] == read["float32"] == 0.10000000149011612
  assert read["int"] == 7 and read["bool"] is True
  assert read["bfloat16"] == [0.5, 1.5]
  assert read["array"] == [[1, 2], [3, 4]]
  assert read["tuple"] == [0.1, None]


def test_non_finite_numbers_are_null_in_strict_json(tmp_path):
  path = tmp_path / "m.jsonl"
  _write(
    path,
    [{"a": float("nan"), "b": [np.inf, 1.0], "c": jnp.float32(-np.inf)}],
  )

  def refuse(constant):
    raise AssertionError(constant)

  record = json.loads(path.read_text(), parse_constant=refuse)
  assert record == {"a": None, "b": [None, 1.0], "c": None}


def test_each_record_is_one_system_call(tmp_path, monkeypatch):
  calls = []
  real = os.write

  def spy(fd, data):
    calls.append(bytes(data))
    return real(fd, data)

  writer = writers.JsonlWriter(tmp_path / "m.jsonl")
  monkeypatch.setattr(os, "write", spy)
  writer.write({"step": 1, "text": "x" * 100_000})
  writer.close()
  assert len(calls) == 1 and calls[0].endswith(b"}\n")


def test_killed_writer_leaves_whole_lines(tmp_path):
  path = tmp_path / "m.jsonl"
  code = """
import sys
from unet_jax.runtime import writers
writer = writers.JsonlWriter(sys.argv[1])
print("ready", flush=True)
step = 0
while True:
  step += 1
  writer.write({"step": step, "text": "x" * (step % 5000)})
"""
  for delay in (0.0, 0.02, 0.05):
    path.unlink(missing_ok=True)
    with subprocess.Popen(
      [sys.executable, "-c", code, path], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
      process.stdout.readline()
      time.sleep(delay)
      process.send_signal(signal.SIGKILL)
    # Linux looks for the signal between the pages of a write, so the last line
    # may be torn: no reader sees it, and the next opening removes it.
    *whole, _ = path.read_bytes().split(b"\n")
    steps = [json.loads(line)["step"] for line in whole]
    assert steps == list(range(1, len(steps) + 1))
    assert [r["step"] for r in writers.read_jsonl(path)] == steps
    writers.JsonlWriter(path).close()
    assert path.read_bytes() == b"".join(line + b"\n" for line in whole)
  assert steps


def test_full_disk_ends_the_file_with_a_whole_line(tmp_path):
  path = tmp_path / "m.jsonl"
  # 100 bytes short of the second record: the kernel takes a part of it.
  code = """
import resource, sys
from unet_jax.errors import UserError
from unet_jax.runtime import writers
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
writer = writers.JsonlWriter(sys.argv[1])
writer.write({"step": 1, "text": "x" * 1000})
try:
  writer.write({"step": 2, "text": "y" * 1000})
except UserError as error:
  writer.write({"step": 3})
  writer.close()
  sys.exit(f"user: {error}")
"""
  err = _run(code, path).stderr
  assert err.startswith(f"user: cannot write {path}: File too large (")
  assert "bytes free" in err
  assert [r["step"] for r in writers.read_jsonl(path)] == [1, 3]
  assert b"y" not in path.read_bytes()


def test_writing_after_close_is_a_bug_and_not_the_users_error(tmp_path):
  writer = writers.JsonlWriter(tmp_path / "m.jsonl")
  writer.close()
  with pytest.raises(ValueError, match="closed file"):
    writer.write({"step": 1})


@pytest.mark.parametrize(
  "tail, kept",
  [
    (b'{"step": 2, "lo', []),
    (b"\x00\x00\x00\x00", []),
    (b'{"step": 2}', [2]),  # Whole but for its newline, as editors leave it.
    (b'{"step": 2}\n', [2]),
    (b'{"step": 2}\n\n', [2]),
    (b"", []),
  ],
)
def test_open_mends_a_torn_last_line(tmp_path, tail, kept):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"step": 1}\n' + tail)
  _write(path, [{"step": 9}])
  lines = path.read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, *kept, 9]


def test_open_mends_a_file_of_one_torn_line(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"st')
  _write(path, [{"step": 1}])
  assert path.read_bytes() == b'{"step": 1}\n'


def test_cut_keeps_the_bytes_of_the_lines_up_to_the_step(tmp_path):
  path = tmp_path / "m.jsonl"
  kept = b'{"step":10,  "loss":0.5}\n{"note": "no step"}\n{"step": 20}\n'
  path.write_bytes(kept + b'{"step": 21}\n{"step": 30}\n{"step": 4')
  writers.cut_lines_after(path, 20)
  assert path.read_bytes() == kept
  stamp = path.stat().st_mtime_ns
  writers.cut_lines_after(path, 20)
  assert path.stat().st_mtime_ns == stamp  # Nothing to cut: not touched.
  writers.cut_lines_after(path, -1)
  assert path.read_bytes() == b'{"note": "no step"}\n'
  assert os.listdir(tmp_path) == ["m.jsonl"]


def test_cut_of_a_missing_file_is_fine(tmp_path):
  writers.cut_lines_after(tmp_path / "m.jsonl", 5)
  assert os.listdir(tmp_path) == []


def test_resumed_file_equals_an_unbroken_one(tmp_path):
  records = [{"step": s, "loss": 1 / s} for s in range(1, 9)]
  _write(tmp_path / "whole.jsonl", records)
  broken = tmp_path / "broken.jsonl"
  _write(broken, records[:6])
  writers.cut_lines_after(broken, 4)  # The checkpoint is at step 4.
  _write(broken, records[4:])
  assert broken.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_read_accepts_a_torn_last_line_only(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
  assert writers.read_jsonl(path) == [{"step": 1}, {"step": 2}]
  path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match=r"m\.jsonl, line 2: not a JSON object"):
    writers.read_jsonl(path)
  for open_or_cut in (
    lambda: writers.cut_lines_after(path, 5),
    lambda: writers.JsonlWriter(path),
  ):
    with pytest.raises(UserError, match="line 2"):
      open_or_cut()
  path.write_bytes(b"[1]\n{}\n")
  with pytest.raises(UserError, match="line 1"):
    writers.read_jsonl(path)
  with pytest.raises(UserError, match=r"cannot read .*No such file"):
    writers.read_jsonl(tmp_path / "none.jsonl")


# --- TensorBoard ------------------------------------------------------------


def _crc32c(data):
  """Castagnoli, bit by bit, masked as in the TFRecord format."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _read_events(path):
  data, events = path.read_bytes(), []
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    header, body, footer = (
      data[8:12],
      data[12 : 12 + length],
      data[12 + length :],
    )
    assert header == struct.pack("<I", _crc32c(data[:8]))
    assert footer[:4] == struct.pack("<I", _crc32c(body))
    events.append(Event.FromString(body))
    data = footer[4:]
  return events


def test_tensorboard_file_holds_what_was_written(tmp_path):
  writer = writers.TensorBoardWriter(tmp_path / "tb", first_step=40)
  values = {"train/loss": np.float32(0.5), "val/none": None, "val/nan": np.nan}
  writer.scalars(60, {**values, "val/dice_per_class": [0.25, None, 0.75]})
  picture = np.zeros((4, 6, 3), np.uint8)
  picture[1, 2] = (255, 128, 0)
  writer.image(60, "examples", picture)
  writer.text(60, "config", "a *text*")
  writer.flush()
  (path,) = (tmp_path / "tb").iterdir()
  events = _read_events(path)  # Before close: flush is enough.
  writer.close()
  assert path.name.startswith("events.out.tfevents.")
  assert events[0].file_version == "brain.Event:2"
  # TensorBoard hides what earlier files hold from this step on.
  assert events[1].session_log.status == SessionLog.START
  assert events[1].step == 41
  found = [(e.step, e.summary.value[0]) for e in events[2:]]
  assert {step for step, _ in found} == {60}
  assert [(v.tag, v.simple_value) for _, v in found[:3]] == [
    ("train/loss", 0.5),
    ("val/dice_per_class/0", 0.25),
    ("val/dice_per_class/2", 0.75),
  ]
  from PIL import Image

  png = Image.open(io.BytesIO(found[3][1].image.encoded_image_string))
  np.testing.assert_array_equal(np.asarray(png), picture)
  assert found[4][1].tag == "config/text_summary"
  assert found[4][1].tensor.string_val[0] == b"a *text*"


def test_tensorboard_writers_of_one_second_do_not_share_a_file(tmp_path):
  for step in range(3):
    writer = writers.TensorBoardWriter(tmp_path, first_step=step)
    writer.scalars(step, {"loss": step})
    writer.close()
  paths = sorted(tmp_path.iterdir())
  assert [_read_events(p)[1].step for p in paths] == [1, 2, 3]
  assert all(socket.gethostname() in p.name for p in paths)


def test_tensorboard_tells_of_a_full_disk_and_does_not_hang(tmp_path):
  code = """
import resource, sys
from unet_jax.errors import UserError
from unet_jax.runtime import writers
assert "tensorboardX" not in sys.modules
writer = writers.TensorBoardWriter(sys.argv[1], first_step=0)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
  for step in range(1000):
    writer.scalars(step, {"loss": 1.0})
    writer.flush()
except UserError as error:
  sys.exit(f"user: {error}")
"""
  done = _run(code, tmp_path)
  assert done.stderr.startswith(f"user: cannot write {tmp_path}/events.out.")
  assert done.returncode == 1


# --- The console ------------------------------------------------------------


class _Clock:
  now = 1000.0

  def __call__(self):
    return self.now


def _progress(total=300, first=0, stream=None, batch_size=4):
  clock = _Clock()
  stream = io.StringIO() if stream is None else stream
  progress = writers.Progress(
    total, first, batch_size=batch_size, stream=stream, clock=clock
  )
  return progress, clock, stream


def test_speed_leaves_out_the_first_step_and_pauses():
  progress, clock, _ = _progress()
  assert progress.examples_per_second is None
  clock.now += 50  # Compilation.
  progress.tick(1)
  assert progress.examples_per_second is None
  for step in range(2, 12):  # 10 steps of 0.5 s.
    clock.now += 0.5
    progress.tick(step)
  assert progress.examples_per_second == pytest.approx(8.0)
  assert progress.line(11, {}).endswith("8.0000 images/s  eta 0:02:24")
  with progress.paused():
    clock.now += 100
  assert progress.examples_per_second == pytest.approx(8.0)


def test_the_time_to_go_counts_on_pauses_as_they_were():
  # 300 steps of 0.5 s and, after each tenth, a pause of 3 s: 240 s in all.
  progress, clock, _ = _progress(total=301)
  progress.tick(1)  # From here on the clock counts.
  for step in range(2, 302):
    clock.now += 0.5
    progress.tick(step)
    if step % 10 == 1:
      with progress.paused():
        clock.now += 3
    if step == 101:
      assert clock.now == 1000 + 80
      assert progress.line(step, {}).endswith("8.0000 images/s  eta 0:02:40")
  assert clock.now == 1000 + 240
  assert progress.line(301, {}).endswith("8.0000 images/s  eta 0:00:00")


def test_a_pause_ends_when_its_body_raises():
  progress, clock, _ = _progress()
  progress.tick(1)
  clock.now += 1
  progress.tick(2)
  with pytest.raises(ZeroDivisionError), progress.paused():
    clock.now += 9
    raise ZeroDivisionError
  assert progress.examples_per_second == pytest.approx(4.0)


def test_line_reads_as_documented():
  progress, clock, _ = _progress()
  progress.tick(1)
  clock.now += 119
  progress.tick(120)
  line = progress.line(120, {"loss": 0.21341, "lr": 0.000912})
  assert line == (
    "step  120/300   40%  loss 0.2134  lr 9.1e-04  4.0000 images/s  eta 0:03:00"
  )


def test_resumed_run_counts_its_own_steps_and_says_days():
  progress, clock, _ = _progress(total=1_000_000, first=1000, batch_size=1)
  progress.tick(1001)
  clock.now += 100
  progress.tick(1101)
  line = progress.line(1101, {})
  assert (
    line
    == "step     1101/1000000    0%  1.0000 images/s  eta 11 days, 13:28:19"
  )


def test_percent_is_100_only_at_the_end():
  progress, _, _ = _progress(total=1000)
  assert " 99%" in progress.line(999, {})
  assert "100%" in progress.line(1000, {})


@pytest.mark.parametrize(
  "value, text",
  [
    (0, "0"),
    (0.0, "0.0000"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
    (None, "-"),
    (312.44, "312.4"),
    (12345678.0, "1.2e+07"),
    (-0.00123, "-1.2e-03"),
    (np.float32(0.5), "0.5000"),
    (True, "True"),
    ("adam", "adam"),
  ],
)
def test_values_are_short(value, text):
  progress, _, _ = _progress()
  assert progress.line(3, {"x": value}) == f"step    3/300    1%  x {text}"


def test_report_writes_plain_lines_into_a_file():
  progress, clock, stream = _progress()
  for step in range(1, 4):
    clock.now += 1
    progress.tick(step)  # A file gets no count.
  progress.report(3, {"loss": 0.5, "dice": None})
  progress.report(3, {"on": "val", "dice": 0.9})
  tail = "  4.0000 images/s  eta 0:04:57\n"
  assert stream.getvalue() == (
    f"step    3/300    1%  loss 0.5000  dice -{tail}"
    f"step    3/300    1%  on val  dice 0.9000{tail}"
  )


def test_a_terminal_gets_a_count_that_the_next_line_replaces():
  master, slave = pty.openpty()
  with os.fdopen(slave, "w") as stream:
    progress, clock, _ = _progress(stream=stream)
    clock.now += 1
    progress.tick(1)
    clock.now += 0.01
    progress.tick(2)  # Too soon to draw again.
    clock.now += 1
    progress.tick(3)
    writers.log("hello", stream=stream)
    for _ in writers.track("abc", "reading", stream=stream, clock=clock):
      clock.now += 0.15
    writers.log("bye", stream=stream)
    seen = ""
    while "bye" not in seen:  # A terminal hands over what it has.
      seen += os.read(master, 4096).decode()
  os.close(master)
  clear = "\r\x1b[K"
  assert seen.count("step") == 2 and "2/300" not in seen
  assert f"{clear}hello" in seen and "\n" not in seen.split("hello")[0]
  # After 0.3 s; the end of `track` clears it, and so does the next line.
  assert f"hello\r\n{clear}reading  2/3{clear}{clear}bye" in seen


def test_track_yields_all_and_tells_a_file_once_a_minute():
  clock, stream, seen = _Clock(), io.StringIO(), []
  for item in writers.track("abcdef", "reading", stream=stream, clock=clock):
    seen.append(item)
    clock.now += 25
  assert seen == list("abcdef")
  assert stream.getvalue() == "reading  3/6\n"


def test_console_survives_a_narrow_encoding_and_a_closed_stream():
  raw = io.BytesIO()
  stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
  writers.log("Zelle \u00e4 \udcff", stream=stream)
  assert raw.getvalue() == b"Zelle \\xe4 \\udcff\n"
  stream.close()
  writers.log("nobody listens", stream=stream)


def test_console_survives_a_lost_terminal():
  code = """
from unet_jax.runtime import writers
for i in range(3):
  writers.log("nobody listens")
print("alive")
"""
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=writer,
    timeout=60,
    check=False,
  )
  os.close(writer)
  assert done.stdout == b"alive\n"


def test_log_goes_to_stderr(capsys):
  writers.log("hello")
  captured = capsys.readouterr()
  assert captured.err == "hello\n" and captured.out == ""
