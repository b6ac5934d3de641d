"""`--mode demo`: a page on this machine where an image is dropped.

Flask serves it, the extra `[demo]`: one page, one request. It listens on
127.0.0.1 alone and answers to no other name, so no page of the network can ask
through the browser. No path of the client is ever opened: what is sent are the
bytes of an image, which are decoded under a name of our own. The page loads
nothing from anywhere.

Flask 3.1.3 is seven packages. Gradio 6.31.0 is 52, and asks its makers' server
for the newest version; NiceGUI 3.18.0 is 49; the page would be theirs.
"""

import base64
import importlib.util
import io
import pathlib
import socket
import tempfile
import threading
import time
from collections.abc import Callable
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
_HTML = "text/html; charset=utf-8"
_HEADERS = {
  "Cache-Control": "no-store",
  "X-Content-Type-Options": "nosniff",
  "Content-Security-Policy": "default-src 'none'; img-src data: blob:;"
  " style-src 'unsafe-inline'; script-src 'unsafe-inline';"
  " connect-src 'self'; frame-ancestors 'none'",
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
    UserError: no run, not of pictures, no Flask, or the port is taken.
  """
  if importlib.util.find_spec("flask") is None:
    raise UserError("--mode demo needs Flask; pip install 'unet_jax[demo]'")
  answers = {str(workdir): make_answer(cfg, workdir, step)}
  if other is not None:
    second = workdir_lib.read_config(other)
    if str(other) in answers:
      raise UserError(f"--compare {other} is the run itself; name another")
    answers[str(other)] = make_answer(second, other, None)
  with make_server(answers, port) as server:
    writers.log(
      f"the page is at http://127.0.0.1:{server.port}/; Ctrl-C ends it"
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


def make_server(answers: dict[str, Answer], port: int) -> Any:
  """Listens on 127.0.0.1; `answers` are those of the runs, by name.

  Returns:
    A `werkzeug.serving.BaseWSGIServer`.

  Raises:
    UserError: the port is taken.
  """
  app = make_app(answers)
  from werkzeug import serving

  class Quiet(serving.WSGIRequestHandler):
    timeout = 60  # Seconds that a client may be silent.

    def log(self, *args: Any) -> None:
      """Nothing: what matters is on the page."""

  try:  # Bound here: else werkzeug ends the process where it cannot.
    listener = socket.create_server(("127.0.0.1", port))
  except (OSError, OverflowError) as error:
    raise UserError(f"--port {port}: {error}; give another, or 0") from error
  with listener:
    return serving.make_server(
      "127.0.0.1",
      listener.getsockname()[1],
      app,
      threaded=True,
      request_handler=Quiet,
      fd=listener.fileno(),
    )


def make_app(answers: dict[str, Answer]) -> Any:
  """The page and its one request, as a `flask.Flask`.

  GET / is the page, POST /predict an image; all else is refused, in a line.
  """
  import flask
  from werkzeug import exceptions

  app = flask.Flask(__name__, static_folder=None)
  app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]

  @app.before_request
  def refuse_other_sites() -> None:
    origin = flask.request.headers.get("Origin")
    if origin not in (None, flask.request.host_url.rstrip("/")):
      flask.abort(403, "not asked by the page")

  @app.get("/")
  def show() -> Any:
    return flask.Response(_PAGE.read_bytes(), content_type=_HTML)

  @app.post("/predict")
  def predict_all() -> dict[str, Any]:
    length = flask.request.content_length
    if not length:
      flask.abort(411, "nothing was sent")
    if length > MAX_BYTES:
      flask.abort(
        413,
        f"the file has {length:,} bytes, more than {MAX_BYTES:,}; drop a"
        " smaller one, or use --mode predict",
      )
    data = flask.request.get_data()
    runs = [{"name": name, **answer(data)} for name, answer in answers.items()]
    return {"runs": runs}

  @app.errorhandler(UserError)
  def explain(error: UserError) -> tuple[dict[str, str], int]:
    return {"error": " ".join(str(error).split())}, 400

  @app.errorhandler(exceptions.HTTPException)
  def refuse(error: Any) -> tuple[dict[str, str], int]:
    return {"error": error.description}, error.code

  @app.after_request
  def guard(response: Any) -> Any:
    response.headers.update(_HEADERS)
    return response

  return app
