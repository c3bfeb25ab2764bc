"""From an arrow drawn on the page to the picture that it moved: the example workflow on the demo model, run by the page."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from comfyui_host import REPOSITORY
from drag_editor import Editor, drags
from PIL import Image, ImageChops, ImageStat

EXAMPLE = REPOSITORY / "example_workflows" / "drag.json"
STEPS = 8  # few, to be quick: about a second a run
#: Two pictures are not the same where they differ by this much of 255, on average over all pixels and colours.
CLEARLY = 3.0
RIGHT, LEFT = (0.5, 0.5, 0.75, 0.5), (0.5, 0.5, 0.25, 0.5)


class Example:
    """The example workflow in the page."""

    def __init__(self, editor: Editor) -> None:
        workflow = json.loads(EXAMPLE.read_text(encoding="utf-8"))
        self.ids = {node["type"]: node["id"] for node in workflow["nodes"]}
        for node in workflow["nodes"]:
            if node["type"] in ("KSampler", "RG_ReadoutGuidedKSampler"):
                node["widgets_values"][2] = STEPS
        self.editor = editor
        editor.load(workflow=workflow, node=self.ids["RG_DragPoints"])
        self.drawn = drags(editor.points)
        self.first_run = editor.run()  # without a picture nobody can draw on it
        editor.until("[...document.querySelectorAll('.rg-drag-stage img')].some(i => !i.hidden && i.naturalWidth === 128)")

    def of(self, run: dict[str, Any], node_type: str, output: str) -> Image.Image:
        """A picture that a run made."""
        (file,) = run["outputs"][str(self.ids[node_type])][output]
        _, content = self.editor.server.request(f"/view?filename={file['filename']}&type={file['type']}")
        return Image.open(io.BytesIO(content)).convert("RGB")

    def unguided(self, run: dict[str, Any]) -> Image.Image:
        """The same seed and settings without guidance: what the arrows are drawn on."""
        return self.of(run, "RG_DragPoints", "drag_picture")

    def guided(self, run: dict[str, Any]) -> Image.Image:
        return self.of(run, "SaveImage", "images")

    def drags(self, run: dict[str, Any]) -> list[tuple[float, ...]]:
        return drags(run["prompt"][2][str(self.ids["RG_DragPoints"])]["inputs"]["points"])


@pytest.fixture
def example(opened: Editor) -> Example:
    return Example(opened)


def difference(one: Image.Image, other: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def test_the_arrow_that_was_drawn_is_what_moves_the_picture(example):
    editor = example.editor
    editor.button("Clear all arrows").click()
    editor.drag(*RIGHT)
    right = editor.run()
    editor.drag(0.75, 0.5, 0.25, 0.5)  # the arrow's end
    left = editor.run()
    editor.press("Control+z")
    again = editor.run()
    assert [example.drags(run) for run in (right, left, again)] == [[RIGHT], [LEFT], [RIGHT]]
    assert difference(example.guided(right), example.unguided(right)) > CLEARLY
    assert difference(example.guided(left), example.unguided(left)) > CLEARLY
    assert difference(example.guided(right), example.guided(left)) > CLEARLY
    assert difference(example.unguided(right), example.unguided(left)) == 0
    assert difference(example.guided(right), example.guided(again)) == 0


def test_a_further_arrow_runs_only_what_depends_on_it_and_the_page_shows_the_new_picture(example):
    editor = example.editor
    editor.page.keyboard.down("Shift")  # a new one, whatever is there already
    editor.drag(*RIGHT)
    editor.page.keyboard.up("Shift")
    run = editor.run()
    assert example.drags(run) == [*example.drawn, RIGHT]
    (cached,) = [told["nodes"] for kind, told in run["status"]["messages"] if kind == "execution_cached"]
    ran = {node["class_type"] for key, node in run["prompt"][2].items() if key not in cached}
    assert ran == {"RG_DragPoints", "RG_ReadoutTarget", "RG_ReadoutGuidedKSampler", "VAEDecode", "SaveImage"}
    assert difference(example.guided(run), example.guided(example.first_run)) > CLEARLY
    (file,) = run["outputs"][str(example.ids["SaveImage"])]["images"]
    editor.until(f"app.nodeOutputs[{example.ids['SaveImage']}]?.images?.[0].filename === '{file['filename']}'")
