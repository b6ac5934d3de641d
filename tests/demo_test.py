"""The demo page: its server asked by hand, and a picture dropped on it."""

import base64
import contextlib
import http.client
import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

import unet_jax.main
from tests import runs
from unet_jax import config, demo, predict
from unet_jax.errors import UserError

pytest.importorskip("flask", reason="needs the extra [demo]")
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folders = []
  for name, classes in (("one", 1), ("two", 3)):
    folder = tmp_path_factory.mktemp("demo") / name
    flags = [f"--config.data.num_classes={classes}"]
    flags += ["--config.train.num_steps=4", "--config.data.max_pixels=300000"]
    assert unet_jax.main.main(runs.arguments(folder, *flags)) == 0
    folders.append(folder)
  return folders


def read_config(folder):
  return config.parse(json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def port(trained):
  answers = {
    folder.name: demo.make_answer(read_config(folder), folder, None)
    for folder in trained
  }
  with demo.make_server(answers, 0) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.port
    server.shutdown()


def ask(port, method, path, body=None, **headers):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  headers = {k.replace("_", "-"): v for k, v in headers.items()}
  connection.request(method, path, body, headers)
  reply = connection.getresponse()
  data = reply.read()
  connection.close()
  return reply.status, reply.headers, data


def png(array):
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, "PNG")
  return buffer.getvalue()


def decoded(source):
  kind, text = source.split(",")
  assert kind == "data:image/png;base64"
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_the_answer_is_that_of_predict(port, trained):
  pixels = np.random.default_rng(0).integers(0, 256, (19, 30), np.uint8)
  status, _, data = ask(port, "POST", "/predict", png(pixels))
  assert status == 200
  found = json.loads(data)["runs"]
  assert [run["name"] for run in found] == ["one", "two"]
  for run, folder in zip(found, trained, strict=True):
    cfg = read_config(folder)
    model = predict.make_predict(cfg, folder)
    mask, p = model(pixels[..., None].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(decoded(run["mask"]), mask)
    p = np.concatenate([1 - p, p], -1) if p.shape[-1] == 1 else p
    assert len(run["classes"]) == p.shape[-1] == cfg.num_labels
    for k, one in enumerate(run["classes"]):
      grey = decoded(one["probability"])
      np.testing.assert_allclose(grey / 255, p[..., k], atol=0.5 / 255 + 1e-6)
      assert one["share"] == np.mean(mask == k)
    bits = -(p * np.log2(p)).sum(-1) / np.log2(p.shape[-1])
    grey = decoded(run["uncertainty"]) / 255
    np.testing.assert_allclose(grey, bits, atol=0.5 / 255 + 1e-5)


def test_entropy_is_one_where_all_is_open_and_nothing_where_sure():
  p = np.array([[1 / 3] * 3, [1, 0, 0], [0.5, 0.5, 0]], np.float32)
  found = demo.entropy(p)
  np.testing.assert_allclose(found, [1, 0, np.log(2) / np.log(3)], atol=1e-6)


def test_what_is_no_image_is_refused_in_a_line(port):
  large = png(np.zeros((600, 600), np.uint8))
  truncated = png(np.random.default_rng(0).integers(0, 99, (40, 40), np.uint8))
  for body, why in [
    (b"/etc/passwd", "no PNG"),
    (b"../../config.json", "no PNG"),
    (large, "data.max_pixels=300000"),
    (truncated[:200], "not a readable png"),
  ]:
    status, _, data = ask(port, "POST", "/predict", body)
    error = json.loads(data)["error"]
    assert status == 400 and why in error and "\n" not in error
    assert "/tmp" not in error  # Nor does it tell where things lie.


def test_no_path_of_the_client_is_opened(port):
  for path in ("/../demo.py", "/etc/passwd", "/demo.html", "//etc/passwd"):
    assert ask(port, "GET", path)[0] == 404
  status, headers, data = ask(port, "GET", "/")
  assert status == 200 and b"<canvas" not in data and b"Drop an image" in data
  assert "default-src 'none'" in headers["Content-Security-Policy"]
  assert b"http://" not in data and b"https://" not in data


def test_other_sites_and_large_files_are_refused(port):
  image = png(np.zeros((8, 8), np.uint8))
  post = lambda **headers: ask(port, "POST", "/predict", image, **headers)[0]
  assert post() == 200
  assert post(Origin=f"http://127.0.0.1:{port}") == 200
  assert post(Origin="https://example.org") == 403
  assert post(Origin="http://127.0.0.1:1") == 403
  # A name of another site that leads here (DNS rebinding).
  assert post(Host="example.org") == 400
  assert ask(port, "GET", "/", Host=f"example.org:{port}")[0] == 400
  # Told by its length alone: not a byte of it is read.
  with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Content-Length: {demo.MAX_BYTES + 1}\r\n\r\n"
    link.sendall(head.encode())
    assert link.recv(100).startswith(b"HTTP/1.1 413")
  # Nor may it come in pieces that do not say how many they are.
  with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
    head = f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    link.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    link.sendall(b"1000\r\n" + bytes(4096) + b"\r\n")
    assert link.recv(100).startswith(b"HTTP/1.1 411")


def test_without_flask_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "flask", None)
  cfg = config.parse(config.default_config())
  with pytest.raises(UserError, match=r"pip install 'unet_jax\[demo\]'"):
    demo.run(cfg, pathlib.Path("none"), None, port=0)


def test_the_port_is_of_this_machine_alone_and_taken_once(port):
  with socket.socket() as link:
    link.settimeout(2)
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
      assert link.connect_ex((own, port)) != 0
  with pytest.raises(UserError, match="give another"):
    demo.make_server({}, port)


def test_the_mode_serves_until_it_is_stopped(trained):
  flags = ["--compare", trained[1], "--port", 0]
  argv = ["--mode", "demo", "--workdir", trained[0], *flags]
  process = runs.start(*argv)
  for line in process.stdout:
    if "http://127.0.0.1:" in line:
      break
  number = int(line.split("127.0.0.1:")[1].split("/")[0])
  assert ask(number, "GET", "/")[0] == 200
  process.terminate()
  status, output = runs.finish(process)
  assert status == 143, output


# --- In a browser -------------------------------------------------------------


class Browser:
  """Headless Chromium, asked through a pipe by its DevTools protocol."""

  def __init__(self, folder):
    # A name of the shell's: DevTools reads from 3 and writes to 4.
    read, self._to = os.pipe()
    self._from, write = os.pipe()
    program = next(filter(None, map(shutil.which, BROWSERS)))
    command = f'exec "$0" "$@" 3<&{read} 4>&{write}'
    self._process = subprocess.Popen(
      [
        *("bash", "-c", command, program, "--headless", "--no-sandbox"),
        *("--disable-gpu", "--remote-debugging-pipe", "--no-first-run"),
        f"--user-data-dir={folder}/profile",
      ],
      pass_fds=(read, write),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    self._count, self._session, self._buffer = 0, {}, b""

  def call(self, method, **params):
    self._count += 1
    message = {"id": self._count, "method": method, "params": params}
    message |= self._session
    os.write(self._to, json.dumps(message).encode() + b"\0")
    while True:
      while b"\0" not in self._buffer:
        data = os.read(self._from, 2**16)
        assert data, "the browser ended"
        self._buffer += data
      text, self._buffer = self._buffer.split(b"\0", 1)
      reply = json.loads(text)
      if reply.get("id") == self._count:
        assert "error" not in reply, reply
        return reply["result"]

  def open(self, url):
    target = self.call("Target.createTarget", url=url)["targetId"]
    found = self.call("Target.attachToTarget", targetId=target, flatten=True)
    self._session = {"sessionId": found["sessionId"]}
    # A new page is first an empty one, and complete as such.
    self.wait(
      "location.href !== 'about:blank' && document.readyState === 'complete'"
      " && !!document.body"
    )

  def js(self, code):
    found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def wait(self, code, seconds=90):
    end = time.monotonic() + seconds
    while not self.js(code):
      assert time.monotonic() < end, (code, self.js("document.body.innerText"))
      time.sleep(0.1)

  def drop(self, path):
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
      self.call("Input.dispatchDragEvent", type=kind, x=200, y=90, data=data)

  def close(self):
    with contextlib.suppress(AssertionError, OSError):
      self.call("Browser.close")
    self._process.wait(30)
    os.close(self._to)
    os.close(self._from)


@pytest.fixture
def browser(tmp_path):
  if not any(map(shutil.which, BROWSERS)):
    pytest.skip("no Chromium to drop a picture in")
  browser = Browser(tmp_path)
  yield browser
  browser.close()


def size_of(path):
  with Image.open(path) as picture:
    return picture.size


def a_picture(folder):
  """A real microscope image where there is one, else a drawn one."""
  root = pathlib.Path(os.environ.get("UNET_JAX_DATA", "../shared/data"))
  real = sorted((root / "dsb2018" / "images").glob("*.png"))[:20]
  if real:  # The smallest: the runs here take no large ones.
    return min(real, key=size_of).resolve()
  pixels = np.random.default_rng(1).integers(0, 256, (50, 70), np.uint8)
  Image.fromarray(pixels).save(folder / "cells.png")
  return folder / "cells.png"


def shown(browser, i=0):
  """The pixels of a run's picture, [H, W, 3]."""
  url = browser.js(
    f"document.querySelectorAll('canvas')[{i}].toDataURL('image/png')"
  )
  return decoded(url)[..., :3].astype(int)


def test_a_dropped_picture_is_segmented(browser, port, trained, tmp_path):
  path = a_picture(tmp_path)
  browser.open(f"http://127.0.0.1:{port}/")
  (tmp_path / "notes.png").write_text("no picture")
  browser.drop(tmp_path / "notes.png")
  browser.wait("document.getElementById('status').className === 'error'")
  browser.drop(path)
  browser.wait("document.querySelectorAll('canvas').length === 2")
  browser.wait("document.getElementById('status').className === ''")
  status = browser.js("document.getElementById('status').textContent")
  width, height = size_of(path)
  assert status == f"{path.name}: {width} x {height} pixels"
  names = browser.js(
    "[...document.querySelectorAll('h2')].map(x => x.innerText)"
  )
  assert names == ["one", "two"]
  # What is drawn is input and colours, mixed as the slider says.
  run = browser.js("shown[0]")
  mask, plain = decoded(run["mask"]), decoded(run["input"]).astype(int)
  assert mask.shape == (height, width) and mask.any()
  colors = np.array([one["color"] for one in run["classes"]])
  tinted = np.where(mask[..., None] > 0, (plain + colors[mask]) / 2, plain)
  assert np.abs(shown(browser) - tinted).max() <= 1
  set_opacity = "opacity.value = {}; opacity.oninput()"
  browser.js(set_opacity.format(100))
  full = np.where(mask[..., None] > 0, colors[mask], plain)
  np.testing.assert_array_equal(shown(browser), full)
  # Class 1 off: nothing is tinted.
  browser.js("document.querySelector('#classes input[value=\"1\"]').click()")
  np.testing.assert_array_equal(shown(browser), plain)
  browser.js("document.querySelector('[value=uncertainty]').click()")
  weight = decoded(run["uncertainty"])[..., None] / 255
  mixed = plain + weight * (np.array([240, 228, 66]) - plain)
  assert np.abs(shown(browser) - mixed).max() <= 1
  # The mask that is saved is the one of class ids, under the picture's name.
  browser.js(
    "HTMLAnchorElement.prototype.click = function () {"
    " window.saved = [this.download, this.href]; }"
  )
  browser.js("document.querySelectorAll('.run button')[0].click()")
  name, source = browser.js("saved")
  assert name == f"{path.stem}_mask.png"
  np.testing.assert_array_equal(decoded(source), mask)
