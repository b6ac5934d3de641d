"""`--mode demo`: a page on this machine where an image is dropped.

The standard library serves it: one page, one request, no dependency. It listens
on 127.0.0.1 alone and answers to no other name, so no page of the network can
ask through the browser. No path of the client is ever opened: what is sent are
the bytes of an image, which are decoded under a name of our own.
"""

import base64
import http.server
import io
import json
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import numpy as np
from PIL import Image

from unet_jax import predict
from unet_jax import workdir as workdir_lib
from unet_jax.config import Config
from unet_jax.data import decode
from unet_jax.errors import UserError
from unet_jax.inspect import pictures
from unet_jax.runtime import signals, writers

# A request with more bytes is refused before it is read.
MAX_BYTES = 64 * 2**20
_PAGE = pathlib.Path(__file__).with_name("demo.html")
# What a file starts with, and the suffix that it is decoded as.
_MAGIC = {
  b"\x89PNG": ".png",
  b"\xff\xd8\xff": ".jpg",
  b"II*\0": ".tif",
  b"MM\0*": ".tif",
  b"BM": ".bmp",
  b"\x93NUMPY": ".npy",
}

# The bytes of an image file to what the page shows.
Answer = Callable[[bytes], dict[str, Any]]


def run(
  cfg: Config,
  workdir: pathlib.Path,
  other: pathlib.Path | None,
  *,
  port: int,
  step: int | None = None,
) -> None:
  """Serves the page until a signal ends it.

  Args:
    cfg: the run's config.
    workdir: folder of the training run.
    other: folder of another run, to compare with; None shows one.
    port: of the page; 0 takes a free one.
    step: the checkpoint of `workdir`; None takes the best.

  Raises:
    UserError: no run, not of pictures, or the port is taken.
  """
  answers = {str(workdir): make_answer(cfg, workdir, step)}
  if other is not None:
    second = workdir_lib.read_config(other)
    if str(other) in answers:
      raise UserError(f"--compare {other} is the run itself; name another")
    answers[str(other)] = make_answer(second, other, None)
  with make_server(answers, port) as server:
    writers.log(
      f"the page is at http://127.0.0.1:{server.server_port}/; Ctrl-C ends it"
    )
    with signals.GracefulStop() as stop:
      threading.Thread(target=server.serve_forever, daemon=True).start()
      while not stop.requested:
        time.sleep(0.2)
    server.shutdown()
  raise signals.Stopped(stop.requested)


def make_answer(cfg: Config, workdir: pathlib.Path, step: int | None) -> Answer:
  """What is shown of an image: class ids and maps as PNG, names and colours."""
  if cfg.model.dims != 2:
    raise UserError(
      f"the demo shows pictures, and the run in {workdir} has model.dims="
      f"{cfg.model.dims}; use --mode predict"
    )
  model = predict.make_predict(cfg, workdir, step=step)
  colors = pictures.class_colors(cfg.num_labels).tolist()
  lock = threading.Lock()  # One image at a time, so one is in memory.

  def answer(data: bytes) -> dict[str, Any]:
    image = read(data, cfg)
    with lock:
      start = time.monotonic()
      mask, probability = model(image)
      seconds = time.monotonic() - start
    if probability.shape[-1] == 1:
      probability = np.concatenate([1 - probability, probability], -1)
    classes = [
      {
        "name": f"class {k}",
        "color": colors[k],
        "share": float(np.mean(mask == k)),
        "probability": _png(_grey(probability[..., k])),
      }
      for k in range(cfg.num_labels)
    ]
    return {
      "height": mask.shape[0],
      "width": mask.shape[1],
      "seconds": seconds,
      "input": _png(pictures.to_rgb(image)),
      "mask": _png(mask),
      "uncertainty": _png(_grey(entropy(probability))),
      "entropy": float(entropy(probability).mean()),
      "classes": classes,
    }

  return answer


def entropy(probability: np.ndarray) -> np.ndarray:
  """-sum_k p_k log p_k / log K of [*S, K], in [0, 1]: [*S]."""
  p = np.clip(probability.astype(np.float64), 1e-12, 1)
  return -(p * np.log(p)).sum(-1) / np.log(p.shape[-1])


def read(data: bytes, cfg: Config) -> np.ndarray:
  """Decodes an image that was sent, as `decode.read_image` does a file."""
  suffix = next((s for m, s in _MAGIC.items() if data.startswith(m)), None)
  if suffix is None:
    raise UserError("this is no PNG, JPEG, TIFF, BMP or npy; drop another file")
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / f"image{suffix}"
    path.write_bytes(data)
    try:
      return decode.read_image(
        path,
        channels=cfg.data.channels,
        dims=2,
        max_pixels=cfg.data.max_pixels,
      )
    except UserError as error:  # The name means nothing to who dropped it.
      raise UserError(str(error).replace(str(path), "the image")) from error


def _grey(values: np.ndarray) -> np.ndarray:
  return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)


def _png(array: np.ndarray) -> str:
  buffer = io.BytesIO()
  Image.fromarray(array).save(buffer, "PNG")
  text = base64.b64encode(buffer.getvalue()).decode()
  return f"data:image/png;base64,{text}"


# --- The server ---------------------------------------------------------------


def make_server(
  answers: dict[str, Answer], port: int
) -> http.server.ThreadingHTTPServer:
  """Listens on 127.0.0.1; `answers` are those of the runs, by name.

  Raises:
    UserError: the port is taken.
  """
  names, models = list(answers), list(answers.values())

  class Handler(_Handler):
    def answer(self, data: bytes) -> dict[str, Any]:
      return {"runs": _ask(names, models, data)}

  try:
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
  except (OSError, OverflowError) as error:
    raise UserError(f"--port {port}: {error}; give another, or 0") from error


def _ask(
  names: Sequence[str], models: Sequence[Answer], data: bytes
) -> list[dict[str, Any]]:
  return [
    {"name": name, **model(data)}
    for name, model in zip(names, models, strict=True)
  ]


class _Handler(http.server.BaseHTTPRequestHandler):
  """GET / is the page, POST /predict an image; all else is refused."""

  timeout = 60
  protocol_version = "HTTP/1.1"

  def do_GET(self) -> None:
    if self._is_ours() and self.path == "/":
      self._send(HTTPStatus.OK, "text/html; charset=utf-8", _PAGE.read_bytes())
    else:
      self._refuse(HTTPStatus.NOT_FOUND, "there is one page, /")

  def do_POST(self) -> None:
    length = self.headers["Content-Length"] or ""
    self.close_connection = True  # What is not read must not be a request.
    if not self._is_ours() or self.path != "/predict":
      self._refuse(HTTPStatus.FORBIDDEN, "not asked by the page")
    elif not length.isdecimal() or not int(length):
      self._refuse(HTTPStatus.LENGTH_REQUIRED, "nothing was sent")
    elif int(length) > MAX_BYTES:
      self._refuse(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f"the file has {int(length):,} bytes, more than {MAX_BYTES:,}; drop a"
        " smaller one, or use --mode predict",
      )
    else:
      self._predict(int(length))

  def _predict(self, length: int) -> None:
    try:
      found = self.answer(self.rfile.read(length))
    except UserError as error:
      self._refuse(HTTPStatus.BAD_REQUEST, str(error))
      return
    text = json.dumps(found).encode()
    self._send(HTTPStatus.OK, "application/json", text)

  def _is_ours(self) -> bool:
    """Whether the request names this server: no other site's page does."""
    port = self.server.server_port
    hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost")]
    origin = self.headers["Origin"]
    return self.headers["Host"] in hosts and (
      origin is None or origin in [f"http://{host}" for host in hosts]
    )

  def _refuse(self, status: HTTPStatus, why: str) -> None:
    text = json.dumps({"error": " ".join(why.split())}).encode()
    self._send(status, "application/json", text)

  def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
    self.send_response(status)
    headers = {
      "Content-Type": kind,
      "Content-Length": str(len(body)),
      "Cache-Control": "no-store",
      "X-Content-Type-Options": "nosniff",
      "Content-Security-Policy": "default-src 'none'; img-src data: blob:;"
      " style-src 'unsafe-inline'; script-src 'unsafe-inline';"
      " connect-src 'self'; frame-ancestors 'none'",
    }
    for name, value in headers.items():
      self.send_header(name, value)
    if self.close_connection:
      self.send_header("Connection", "close")
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, format: str, *args: Any) -> None:
    """Nothing: what matters is on the page."""
