"""The drag editor in a real browser: ComfyUI's page from a real server, newest and older, with both node renderers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_server import Server, running_server
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))

from drag_editor import PAGES, Editor

#: A folder with older versions of comfyui-frontend-package, as `nox -s tests` installs them: oldest/ and older/.
OLDER_PAGES = "READOUT_GUIDANCE_OLDER_PAGES"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("needs chromium or google-chrome on the PATH")
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=quiet)
        yield started
        started.close()


@pytest.fixture(scope="session", params=PAGES, ids="-".join)
def opened(request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    page, renderer = request.param
    folder = os.environ.get(OLDER_PAGES)
    static = None if page == "newest" else Path(folder or "", page, "comfyui_frontend_package", "static")
    if static is not None and not (folder and static.is_dir()):
        pytest.skip(f"needs the {page} version of the page in {OLDER_PAGES}")
    server = _server(page, static, tmp_path_factory)
    _settings(server, {"Comfy.VueNodes.Enabled": renderer == "vue"})
    context = browser.new_context(viewport={"width": 1300, "height": 900}, has_touch=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server.url)
    editor = Editor(server, context.new_page(), renderer)
    editor.open_page()
    yield editor
    context.close()


@pytest.fixture
def editor(opened: Editor) -> Editor:
    """An editor without arrows; its picture is a wide one from Load Image."""
    opened.load()
    return opened


_running: dict[str, Any] = {}


@pytest.fixture(scope="session", autouse=True)
def _servers() -> Iterator[None]:
    yield
    for manager, _ in _running.values():
        manager.__exit__(None, None, None)
    _running.clear()


def _server(page: str, static: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """One server a page: both renderers use it."""
    if page not in _running:
        manager = running_server(tmp_path_factory.mktemp(page), static)
        server = manager.__enter__()
        _running[page] = manager, server
        for name, size in (("wide.png", (600, 300)), ("tall.png", (200, 500))):
            picture = Image.new("RGB", size, (200, 190, 160))
            ImageDraw.Draw(picture).ellipse((20, 40, 180, 200), fill=(40, 90, 160))
            picture.save(server.base / "input" / name)
    return _running[page][1]


def _settings(server: Server, settings: dict[str, Any]) -> None:
    """What the page reads when it starts."""
    file = server.base / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Top", **settings}), encoding="utf-8")
