"""A real ComfyUI server for tests: ``main.py`` with this extension in a base directory of its own, used over HTTP.

Not named ``server``: ComfyUI has a module of that name.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from comfyui_host import REPOSITORY, find_comfyui

EXTENSION = "readout_guidance"
#: Everything here may run on a machine that is busy with other things.
PATIENCE_S = 180.0
#: Of ComfyUI's folder: what the base directory has instead, and the extra model paths of whoever set the folder up.
NOT_COPIED = {
    "extra_model_paths.yaml", ".git", "tests", "tests-unit", "models", "custom_nodes", "input", "output", "temp", "user",
}  # fmt: skip

T = TypeVar("T")
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the machine's would not find 127.0.0.1


class Server:
    """A running server. ``base`` is its base directory (models, input, output, custom_nodes)."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], base: Path, log: Path) -> None:
        self.url = url
        self.base = base
        self._process = process
        self._log = log

    def request(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """GET, or POST of JSON where there is a body: the status, whatever it is, and what came."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _OPENER.open(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def json(self, path: str) -> Any:
        status, content = self.request(path)
        assert status == 200, f"GET {path} gave {status}: {content[:300]!r}"
        return json.loads(content)

    def refusal(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """The node_errors of a prompt that must not be accepted."""
        status, content = self.request("/prompt", {"prompt": prompt})
        assert status == 400, f"the prompt was not refused: {status} {content[:300]!r}"
        return json.loads(content)["node_errors"]

    def queue(self, prompt: dict[str, Any]) -> str:
        """Hand in a prompt that must be accepted; returns its id."""
        status, content = self.request("/prompt", {"prompt": prompt})
        assert status == 200, f"the prompt was refused: {content.decode()[:2000]}"
        return json.loads(content)["prompt_id"]

    def finished(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a prompt, once it has one."""
        return self.wait(lambda: self.json(f"/history/{prompt_id}").get(prompt_id), f"the end of prompt {prompt_id}")

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Run a prompt to its end; returns the outputs by node id."""
        entry = self.finished(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", f"the prompt failed: {entry['status']['messages']}"
        return entry["outputs"]

    def wait(self, look: Callable[[], T | None], what: str) -> T:
        """Poll until ``look`` gives something."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self._process.poll() is None:
            found = look()
            if found:
                return found
            time.sleep(0.1)
        state = "is running" if self._process.poll() is None else f"ended with {self._process.returncode}"
        raise AssertionError(f"waited for {what}; the server {state}. Its log's tail:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def running_server(folder: Path, page: Path | None = None) -> Iterator[Server]:
    """Start ComfyUI in the empty ``folder``, with this extension as its only one; it is killed on exit.

    ``page`` is another build of ComfyUI's page (the ``static`` folder of a frontend package) than the installed one.
    """
    original, comfyui, base, log = find_comfyui(), folder / "comfyui", folder / "base", folder / "server.log"

    def left_out(inside: str, names: list[str]) -> set[str]:
        return {"__pycache__"} | (NOT_COPIED if Path(inside) == original else set())

    shutil.copytree(original, comfyui, ignore=left_out)
    for name in ("models/readout_heads", "custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True)
    _install(base / "custom_nodes" / EXTENSION)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "main.py", "--cpu", "--port", str(port), "--disable-auto-launch", "--base-directory", str(base),
        "--output-directory", str(base / "output"), "--temp-directory", str(base), "--database-url", "sqlite:///:memory:",
        "--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", EXTENSION,
    ]  # fmt: skip
    if page:
        command += ["--front-end-root", str(page)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=comfyui, stdout=out, stderr=subprocess.STDOUT)
    try:
        server = Server(f"http://127.0.0.1:{port}", process, base, log)
        server.wait(lambda: _answers(server), "the server's start")
        yield server
    finally:
        process.kill()
        process.wait()


def _install(place: Path) -> None:
    """This repository as a custom node: a link, or a copy where links can't be made."""
    try:
        place.symlink_to(REPOSITORY, target_is_directory=True)
    except OSError:
        shutil.copytree(REPOSITORY, place, ignore=shutil.ignore_patterns(".git", ".nox", ".venv", "__pycache__", "demo_out"))


def _answers(server: Server) -> bool:
    try:
        return server.request("/system_stats")[0] == 200
    except OSError:  # not listening yet
        return False
