"""A server, a browser, and the page in it as a camera has it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comfyui_server import Server, running_server
from drag_editor import Editor
from PIL import Image, ImageDraw

from rg_engine.demo.scene_pictures import scene_pictures
from rg_engine.guidance.pictures import as_image

#: Without what lies over the graph.
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Top", "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False, "Comfy.Graph.CanvasInfo": False, "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.Canvas.SelectionToolbox": False,
}  # fmt: skip
POSE_SEED = 7
MARGIN_PX = 16
POINTER = [(0, 0), (0, 17), (4, 13), (7, 20), (10, 19), (7, 12), (12, 12)]


@contextlib.contextmanager
def started() -> Iterator[tuple[Server, Any]]:
    """A server, with a pose and a picture among its inputs, and a browser."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        sys.exit("needs chromium or google-chrome on the PATH")
    with tempfile.TemporaryDirectory() as folder, running_server(Path(folder)) as server, sync_playwright() as playwright:
        scene = scene_pictures(POSE_SEED, 1, figure_only=True)
        for name in ("pose", "picture"):
            place = server.base / "input" / f"{name.replace('picture', 'scene')}.png"
            as_image(getattr(scene, name)[0]).resize((512, 512), Image.Resampling.LANCZOS).save(place)
        settings = server.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(SETTINGS), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield server, browser
        browser.close()


class Studio:
    """The page with a graph in it, and a camera."""

    def __init__(self, server: Server, browser: Any, size: tuple[int, int]) -> None:
        self.size = size
        context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        self.editor = Editor(server, context.new_page(), "canvas")
        self.editor.open_page()
        self.page = self.editor.page

    def open(self, workflow: dict[str, Any]) -> None:
        self.editor.load(workflow=workflow, look=False)

    def look(self, zoom: float, x: float, y: float, left: int = 80, top: int = 130) -> None:
        """Bring a point of the graph to (left, top) of the page."""
        self.page.evaluate(
            "([s, x, y]) => { const { ds } = app.canvas; ds.scale = s; ds.offset[0] = x; ds.offset[1] = y;"
            " app.canvas.deselectAll(); app.canvas.setDirty(true, true); }",
            [zoom, left / zoom - x, top / zoom - y],
        )
        self.page.wait_for_timeout(800)

    def take(self) -> Image.Image:
        return Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")

    def whole_graph(self, zoom: float) -> Image.Image:
        """Every node and group, and nothing of the page's own. Below a zoom of 0.65 the page leaves words out."""
        x, y, w, h = self.page.evaluate(
            """() => {
                const groups = app.graph.groups.map(g => [...g.pos, ...g.size]);
                const boxes = [...app.graph.nodes.map(n => n.getBounding ? n.getBounding() : n.boundingRect), ...groups];
                const [left, top] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])));
                return [left, top, ...[0, 1].map(i => Math.max(...boxes.map(b => b[i] + b[i + 2])) - [left, top][i])];
            }"""
        )
        left, top, (width, height) = 100, 130, (round(side * zoom) + 2 * MARGIN_PX for side in (w, h))
        self.page.set_viewport_size({"width": left + width + 60, "height": top + height + 60})
        self.look(zoom, x, y, left + MARGIN_PX, top + MARGIN_PX)
        return self.take().crop((left, top, left + width, top + height))


class Film:
    """Screenshots with the pointer drawn in, since a page without a screen has none."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.at = (560.0, 520.0)
        self.frames: list[Image.Image] = []
        self.lasts: list[int] = []

    def shoot(self, lasts_ms: int, pause: int = 0) -> None:
        self.studio.page.wait_for_timeout(pause)
        frame = self.studio.take()
        x, y = self.at
        ImageDraw.Draw(frame).polygon([(x + dx, y + dy) for dx, dy in POINTER], fill="white", outline="black")
        if self.frames and frame.tobytes() == self.frames[-1].tobytes():
            self.lasts[-1] += lasts_ms
            return
        self.frames.append(frame)
        self.lasts.append(lasts_ms)

    def move(self, to: tuple[float, float], frames: int) -> None:
        before = self.at
        for i in range(1, frames + 1):
            self.at = tuple(a + (b - a) * i / frames for a, b in zip(before, to, strict=True))  # type: ignore[assignment]
            self.studio.page.mouse.move(*self.at)
            self.shoot(60)

    def save(self, path: Path) -> None:
        first, *rest = self.frames
        first.save(path, save_all=True, append_images=rest, duration=self.lasts, loop=0, quality=55, method=6)
