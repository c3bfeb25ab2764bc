"""``nox -s gallery``: the pictures of README and templates, by the demo command and from ComfyUI's real page."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from comfyui_host import REPOSITORY
from comfyui_server import Server, running_server
from drag_editor import Editor

TEMPLATES = REPOSITORY / "example_workflows"
#: Without what lies over the graph, and with a node's pictures large enough to see.
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Top", "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasMenu": False, "Comfy.Graph.CanvasInfo": False, "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
    "Comfy.Canvas.SelectionToolbox": False,
}  # fmt: skip
#: Where loaders look for the files that they name.
FOLDERS = {
    "CheckpointLoaderSimple": "checkpoints", "UNETLoader": "diffusion_models", "VAELoader": "vae",
    "CLIPLoader": "text_encoders", "DualCLIPLoader": "text_encoders", "RG_LoadReadoutHead": "readout_heads",
}  # fmt: skip
NEED_FILES = ("pose_sd15", "pose_sdxl", "train_flux", "train_z_image")
POSE_SEED = 7
MARGIN_PX = 16
LEFT_OUT = ("RG_ReadOut", "PreviewImage", "Note", "MarkdownNote")
POINTER = [(0, 0), (0, 17), (4, 13), (7, 20), (10, 19), (7, 12), (12, 12)]
DRAG_COLUMNS = {"RG_DragPoints": 0, "RG_ReadoutGuidedKSampler": 400, "SaveImage": 760}
NOT_SHOWN = -4000


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
        with tempfile.TemporaryDirectory() as folder:
            self.page.screenshot(path=Path(folder, "page.png"))
            return Image.open(Path(folder, "page.png")).convert("RGB")

    def whole_graph(self, zoom: float) -> Image.Image:
        """Every node, and nothing of the page's own. Below a zoom of 0.65 the page leaves words out."""
        x, y, w, h = self.page.evaluate(
            """() => {
                const boxes = app.graph.nodes.map(n => n.getBounding ? n.getBounding() : n.boundingRect);
                const [left, top] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])));
                return [left, top, ...[0, 1].map(i => Math.max(...boxes.map(b => b[i] + b[i + 2])) - [left, top][i])];
            }"""
        )
        left, top, (width, height) = 100, 130, (round(side * zoom) + 2 * MARGIN_PX for side in (w, h))
        self.page.set_viewport_size({"width": left + width + 60, "height": top + height + 60})
        self.look(zoom, x, y, left + MARGIN_PX, top + MARGIN_PX)
        return self.take().crop((left, top, left + width, top + height))


def drag_editor(server: Server, browser: Any, out: Path) -> None:
    """Arrows are drawn in the template *drag*, and the next run moves the arm: an animated WebP."""
    workflow = template("drag")
    ids = {node["type"]: node["id"] for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        place = DRAG_COLUMNS.get(node["type"])
        node["pos"] = [place, 0] if place is not None else [NOT_SHOWN, node["pos"][1]]
        if node["type"] == "SaveImage":
            node["size"] = [360, 430]
        if node["type"] == "RG_DragPoints":
            points = json.loads(node["widgets_values"][0])["drags"]
    enlarge_saved(workflow, 2.5)
    studio = Studio(server, browser, (1120, 570))
    editor, page = studio.editor, studio.page
    editor.node = ids["RG_DragPoints"]
    studio.open(workflow)
    studio.look(0.88, 0, 0)
    strength = f"app.graph.getNodeById({ids['RG_ReadoutGuidedKSampler']}).widgets.find(w => w.name === 'strength')"
    asked = page.evaluate(f"{strength}.value")
    page.evaluate(f"{strength}.value = 0")  # the picture as it is without drags
    page.mouse.click(700, 580)
    editor.run()
    editor.until("[...document.querySelectorAll('.rg-drag-stage img')].some(i => !i.hidden && i.naturalWidth === 128)")
    page.evaluate(f"{strength}.value = {asked}")
    editor.button("Clear all arrows").click()
    page.wait_for_timeout(800)
    film = Film(studio)
    film.shoot(900)
    for drag in points:
        start, end = (editor.place(*drag[name]) for name in ("from", "to"))
        film.move(start, 4)
        page.mouse.down()
        if start != end:
            film.move(end, 5)
        page.mouse.up()
        film.shoot(160)
    run = page.get_by_role("button", name="Run", exact=True).first.bounding_box()
    film.move((run["x"] + 40, run["y"] + run["height"] / 2), 6)
    before = editor.runs
    page.mouse.down()
    page.mouse.up()
    while len(editor.runs) == len(before):
        film.shoot(160, pause=250)
    page.wait_for_timeout(1500)
    film.shoot(3500)
    film.save(out / "web" / "docs" / "drag_editor.webp")


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


def three_nodes(server: Server, browser: Any, out: Path) -> None:
    """The template *pose* without what is beside it, the three nodes of this extension in a colour of their own."""
    workflow = copy.deepcopy(template("pose"))
    drop = {node["id"] for node in workflow["nodes"] if node["type"] in LEFT_OUT}
    places = {
        "RG_LoadDemoModel": (0, 0), "CLIPTextEncode": (330, 0), "EmptyLatentImage": (330, 290), "LoadImage": (0, 280),
        "RG_LoadReadoutHead": (0, 150), "RG_ReadoutTarget": (330, 440), "RG_ReadoutGuidedKSampler": (690, 0),
        "VAEDecode": (690, 480), "SaveImage": (1060, 0),
    }  # fmt: skip
    seen = 0
    for node in workflow["nodes"]:
        if node["type"] == "RG_DemoScene":
            node.update(type="LoadImage", title="Pose to follow", widgets_values=["pose.png", "image"], size=[300, 390])
            node["outputs"] = [{"name": "IMAGE", "type": "IMAGE", "links": node["outputs"][1]["links"]}]
        node["pos"] = list(places.get(node["type"], (0, 0)))
        if node["type"] == "CLIPTextEncode":
            node["pos"][1], seen = 145 * seen, seen + 1
        if node["type"] == "SaveImage":
            node["size"] = [220, 260]
        if node["type"] in ("RG_LoadReadoutHead", "RG_ReadoutTarget", "RG_ReadoutGuidedKSampler"):
            node.update(color="#2a4a3a", bgcolor="#33584a")
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] not in drop]
    workflow["groups"] = []
    workflow["links"] = [link for link in workflow["links"] if not {link[1], link[3]} & drop]
    kept = {link[0] for link in workflow["links"]}
    pose = next(node["id"] for node in workflow["nodes"] if node["type"] == "LoadImage")
    for link in workflow["links"]:
        link[2] = 0 if link[1] == pose else link[2]
    for node in workflow["nodes"]:
        for slot in node["outputs"]:
            slot["links"] = [link for link in slot.get("links") or [] if link in kept]
    studio = Studio(server, browser, (1300, 900))
    studio.open(workflow)
    studio.page.mouse.click(1200, 860)
    studio.editor.run()
    studio.page.wait_for_timeout(1500)
    studio.whole_graph(0.95).save(out / "docs" / "three_nodes.jpg", quality=85)


def page_of(name: str) -> Callable[[Server, Any, Path], None]:
    def picture(server: Server, browser: Any, out: Path) -> None:
        """A template that needs files, as the page shows it where they are."""
        workflow = template(name)
        for node in workflow["nodes"]:
            for value in node.get("widgets_values") or []:
                if node["type"] in FOLDERS and str(value).endswith((".safetensors", ".pt")):
                    file = server.base / "models" / FOLDERS[node["type"]] / value
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.touch()
            if node["type"] == "LoadImage":
                shutil.copy(server.base / "input" / ("pose.png" if "pose" in name else "scene.png"),
                            server.base / "input" / node["widgets_values"][0])  # fmt: skip
        studio = Studio(server, browser, (1300, 900))
        studio.open(workflow)
        studio.page.wait_for_timeout(1500)
        studio.whole_graph(0.66).save(out / "example_workflows" / f"{name}.jpg", quality=82)

    return picture


FROM_THE_PAGE: dict[str, Callable[[Server, Any, Path], None]] = {
    "drag_editor": drag_editor,
    "three_nodes": three_nodes,
    **{name: page_of(name) for name in NEED_FILES},
}
FROM_THE_DEMO = sorted({path.stem for path in TEMPLATES.glob("*.json")} - set(NEED_FILES))
ALWAYS = {"pose", "depth", "edges"}  # the demo command makes these whatever it is asked for


def run_demo(names: list[str], out: Path) -> None:
    """The pictures of templates that need no files, by the demo command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rg_engine", "demo", "--out", folder, "--modes", "fast", "reference", "--edits"]
        subprocess.run([*command, *(name for name in names if name not in ALWAYS)], cwd=REPOSITORY, check=True)
        for name in names:
            shutil.copy(Path(folder, f"{name}.jpg"), out / "example_workflows")


def enlarge_saved(workflow: dict[str, Any], by: float) -> None:
    """Put Upscale Image By before Save Image: the page shows no picture larger than it is."""
    save = next(node for node in workflow["nodes"] if node["type"] == "SaveImage")
    link = next(link for link in workflow["links"] if link[0] == save["inputs"][0]["link"])
    node, added = 1 + max(node["id"] for node in workflow["nodes"]), 1 + max(link[0] for link in workflow["links"])
    workflow["links"].append([added, node, 0, save["id"], 0, "IMAGE"])
    link[3] = node
    save["inputs"][0]["link"] = added
    workflow["nodes"].append(
        {
            "id": node, "type": "ImageScaleBy", "pos": [NOT_SHOWN, 0], "size": [300, 110], "mode": 0, "flags": {},
            "order": 99,
            "inputs": [{"name": "image", "type": "IMAGE", "link": link[0]}], "properties": {},
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [added]}], "widgets_values": ["bicubic", by],
        }
    )  # fmt: skip


def template(name: str) -> dict[str, Any]:
    return json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def started() -> Iterator[tuple[Server, Any]]:
    """A server and a browser."""
    from playwright.sync_api import sync_playwright

    from rg_engine.demo.scene_pictures import scene_pictures
    from rg_engine.guidance.pictures import as_image

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


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    every = [*FROM_THE_DEMO, *FROM_THE_PAGE]
    parser.add_argument("--only", nargs="+", default=every, choices=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--out", type=Path, default=REPOSITORY, help="the repository unless told")
    return parser


def main() -> None:
    options = command_line().parse_args()
    for folder in ("docs", "example_workflows", "web/docs"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    made = [name for name in options.only if name in FROM_THE_DEMO]
    if made:
        run_demo(made, options.out)
    taken = [name for name in options.only if name in FROM_THE_PAGE]
    if taken:
        with started() as (server, browser):
            for name in taken:
                FROM_THE_PAGE[name](server, browser, options.out)
                print(f"made {name}", flush=True)


if __name__ == "__main__":
    main()
