"""Models by their names on the Hugging Face Hub: downloaded once, and a Hub out of reach asked once."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser

from .command_cases import model

__all__ = ["model"]  # a fixture


class Hub(http.server.ThreadingHTTPServer):
    """A Hugging Face Hub of this machine: it serves the files of ``folder``, or answers all with another status."""

    daemon_threads = True

    def __init__(self, folder: Path, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.status, self.asked = folder, status, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append((self.command, Path(self.path).name))
        path, status = self.server.folder / Path(self.path).name, self.server.status
        there = status == 200 and path.exists()
        content = path.read_bytes() if there else b""
        self.send_response(status if there or status != 200 else 404)
        self.send_header("Content-Length", str(len(content)))
        if there:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """It has the model at every name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # it asks the real one
    with Hub(model) as made:
        yield made
        made.shutdown()


def connections(listening: socket.socket) -> int:
    """How many wait at a socket where nobody answers."""
    listening.setblocking(False)
    for count in range(100):
        try:
            listening.accept()
        except BlockingIOError:
            return count
    raise AssertionError("more than anybody would make")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def url_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def load(hub: str, cache: Path, **options: object) -> Denoiser:
    return Denoiser.from_pretrained("owner/name", endpoint=hub, cache_dir=cache, **options)


OUT_OF_REACH = r"^owner/name: is neither a folder with .* nor a model within reach on the Hugging Face Hub \({}.*\)$"


@pytest.mark.parametrize(("status", "most"), [(500, 1), (503, 1), (504, 1), (401, 2), (403, 2), (404, 2)])
def test_a_hub_without_the_model_is_not_asked_again(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], status: int, most: int
) -> None:
    """What answers with an error of its own is asked no more; what refuses may give to who has a token."""
    hub.status = status
    with pytest.raises(InputError, match=OUT_OF_REACH.format(f".*{status}")):
        load(hub.url, tmp_path / "cache")
    assert hub.asked == [("HEAD", "config.json")] * most
    assert capfd.readouterr().err == ""


def test_a_hub_that_never_answers_is_asked_once(
    silent: socket.socket, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=OUT_OF_REACH.format("no answer within 0.2 s; HF_HUB_ETAG_TIMEOUT=10 waits")):
        load(url_of(silent), tmp_path / "cache", etag_timeout=0.2)
    assert connections(silent) == 1
    assert capfd.readouterr().err == ""


def test_a_hub_that_is_not_there(silent: socket.socket, tmp_path: Path) -> None:
    url = url_of(silent)
    silent.close()
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*refused")):
        load(url, tmp_path / "cache")


def test_names_that_no_hub_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^own er/name: is neither a folder .*'own er/name'"):
        Denoiser.from_pretrained("own er/name", cache_dir=tmp_path)


def test_models_are_downloaded_and_then_there_without_a_hub(
    hub: Hub, silent: socket.socket, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cache = Denoiser.from_pretrained(model).state_dict(), tmp_path / "cache"

    def assert_loads(url: str, **options: object) -> None:
        found = load(url, cache, **options).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    assert_loads(hub.url)
    assert [name for command, name in hub.asked if command == "GET"] == ["config.json", "model.safetensors"]
    hub.asked.clear()
    assert_loads(hub.url)
    assert all(command == "HEAD" for command, _ in hub.asked)
    assert_loads(hub.url, revision="main")
    hub.status = 503
    assert_loads(hub.url)
    assert_loads(url_of(silent), etag_timeout=0.2)
    hub.asked.clear()
    assert_loads(hub.url, local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_loads(hub.url)
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*offline mode is enabled")):
        load(hub.url, tmp_path / "empty")
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*offline mode is enabled")):
        load(hub.url, cache, force_download=True)
    assert hub.asked == []


def test_a_hub_with_half_a_model(hub: Hub, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*404")):
        load(hub.url, tmp_path / "cache")


def test_predicting_with_a_model_out_of_reach(silent: socket.socket, tmp_path: Path) -> None:
    """One connection and one line, also where huggingface_hub would ask for other things first."""
    environment = {"HF_ENDPOINT": url_of(silent), "HF_HOME": str(tmp_path / "home"), "HF_HUB_ETAG_TIMEOUT": "1"}
    command = [sys.executable, "-m", "stflow_fast", "predict", "owner/name", "x.h5", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert ended.returncode == 2
    *before, complaint = ended.stderr.splitlines()
    assert re.search(OUT_OF_REACH.format("no answer within 1 s"), complaint.removeprefix("stflow-fast: "))
    assert all(line.startswith("slide ") for line in before)  # the progress bar
    assert connections(silent) == 1
    assert not (tmp_path / "out").exists()
