"""What is photographed: the drag editor at work, the three nodes, templates that need files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyui_host import REPOSITORY
from comfyui_server import Server
from studio import Film, Studio

TEMPLATES = REPOSITORY / "example_workflows"
#: Where loaders look for the files that they name.
FOLDERS = {
    "CheckpointLoaderSimple": "checkpoints", "UNETLoader": "diffusion_models", "VAELoader": "vae",
    "CLIPLoader": "text_encoders", "DualCLIPLoader": "text_encoders", "RG_LoadReadoutHead": "readout_heads",
}  # fmt: skip
LEFT_OUT = ("RG_ReadOut", "PreviewImage", "Note", "MarkdownNote")
#: Where nodes of the drag editor's film are, and of what size.
DRAG_PLACES = {
    "RG_DragPoints": (0, [360, 470]), "RG_ReadoutGuidedKSampler": (400, [320, 400]), "SaveImage": (760, [360, 430]),
}  # fmt: skip
NOT_SHOWN = -4000


def template(name: str) -> dict[str, Any]:
    return json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))


def needs_files(name: str) -> bool:
    return any(node["type"] in ("CheckpointLoaderSimple", "UNETLoader") for node in template(name)["nodes"])


def drag_editor(server: Server, browser: Any, out: Path) -> None:
    """Arrows are drawn in the template *drag*, and the next run moves the arm: an animated WebP."""
    workflow = template("drag")
    ids = {node["type"]: node["id"] for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] in DRAG_PLACES:
            column, node["size"] = DRAG_PLACES[node["type"]]
            node["pos"] = [column, 0]
        else:
            node["pos"] = [NOT_SHOWN, node["pos"][1]]
        if node["type"] == "RG_DragPoints":
            points = json.loads(node["widgets_values"][0])["drags"]
    workflow["groups"] = []
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


def three_nodes(server: Server, browser: Any, out: Path) -> None:
    """The template *pose* without what is beside it, the three nodes of this extension in a colour of their own."""
    workflow = template("pose")
    drop = {node["id"] for node in workflow["nodes"] if node["type"] in LEFT_OUT}
    places = {
        "RG_LoadDemoModel": (0, 0, 300, 66), "RG_LoadReadoutHead": (0, 150, 300, 82), "LoadImage": (0, 280, 300, 390),
        "CLIPTextEncode": (330, 0, 330, 110), "EmptyLatentImage": (330, 290, 330, 106),
        "RG_ReadoutTarget": (330, 440, 330, 220), "RG_ReadoutGuidedKSampler": (690, 0, 340, 400),
        "VAEDecode": (1060, 380, 220, 46), "SaveImage": (1060, 0, 220, 260),
    }  # fmt: skip
    seen = 0
    for node in workflow["nodes"]:
        if node["type"] == "RG_DemoScene":
            node.update(type="LoadImage", title="Pose to follow", widgets_values=["pose.png", "image"])
            node["outputs"] = [{"name": "IMAGE", "type": "IMAGE", "links": node["outputs"][1]["links"]}]
        place = places.get(node["type"], (0, 0, 100, 100))
        node.update(pos=list(place[:2]), size=list(place[2:]))
        if node["type"] == "CLIPTextEncode":
            node["pos"][1], seen = 145 * seen, seen + 1
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
