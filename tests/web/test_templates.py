"""The example workflows as a user opens them from the page: nothing lies on anything else, and missing files are offered."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from comfyui_host import REPOSITORY
from comfyui_server import EXTENSION
from drag_editor import PAGES, Editor

TEMPLATES = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in REPOSITORY.glob("example_workflows/*.json")}
#: Also with Vue nodes of the oldest page, an experiment then, which draws them as large as it likes.
EVERY_PAGE = [*PAGES, ("oldest", "vue")]
ONE_A_VERSION = [("newest", "canvas"), ("older", "vue"), ("oldest", "canvas")]
#: Notes are read, not scrolled.
LONGEST_NOTE = 550
FILES = (".safetensors", ".pt", ".pth")
OPEN = """
async ([extension, name]) => {
    const file = await fetch(`/api/workflow_templates/${extension}/${name}.json`);
    await app.loadGraphData(await file.json(), true, true, name);
}
"""
#: All nodes in view, and once they stay where they are: [x, y, width, height] of each node with its title, and each group.
BOXES = """
async () => {
    const { ds } = app.canvas, frame = () => new Promise(requestAnimationFrame);
    const corner = document.querySelector('#graph-canvas').getBoundingClientRect();
    const drawn = node => {
        const element = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`);
        if (!element) return [...node.boundingRect];
        const { x, y, width, height } = element.getBoundingClientRect();
        return [
            (x - corner.x) / ds.scale - ds.offset[0], (y - corner.y) / ds.scale - ds.offset[1],
            width / ds.scale, height / ds.scale,
        ];
    };
    const read = () => ({
        nodes: Object.fromEntries(app.graph.nodes.map(node => [`${node.id} ${node.title}`, drawn(node)])),
        notes: app.graph.nodes.filter(node => node.type === 'Note').map(node => `${node.id} ${node.title}`),
        groups: app.graph.groups.map(group => [...group._bounding]),
        vue: !!LiteGraph.vueNodesMode && app.graph.nodes.every(n => document.querySelector(`[data-node-id="${n.id}"]`)),
    });
    [ds.scale, ds.offset[0], ds.offset[1]] = [0.7, 40, 100];
    app.canvas.setDirty(true, true);
    for (let same = 0, before = ''; same < 10; await frame()) {
        const now = JSON.stringify(read());
        same = now === before ? same + 1 : 0;
        before = now;
    }
    return read();
}
"""


def files_of(template: dict[str, Any]) -> dict[str, str]:
    """The files that a template's loaders name, the extension's own left out, and the type of their node."""
    return {
        value: node["type"]
        for node in template["nodes"]
        if "Load" in node["type"]
        for value in node.get("widgets_values") or []
        if isinstance(value, str) and value.endswith(FILES) and not value.startswith("demo_")
    }


WITH_FILES = [name for name in sorted(TEMPLATES) if files_of(TEMPLATES[name])]


@pytest.fixture
def large(opened: Editor):
    """The page on a screen that holds every template; its dialogs are closed."""
    before = opened.page.viewport_size
    opened.page.set_viewport_size({"width": 2700, "height": 1900})
    yield opened
    close_dialogs(opened)
    opened.page.set_viewport_size(before)


def close_dialogs(editor: Editor) -> None:
    close = editor.page.locator("[role=dialog] button[aria-label=Close]")
    while close.count():
        close.last.click()
        editor.page.wait_for_timeout(300)


def common(one: list[float], other: list[float]) -> tuple[float, float]:
    """Width and height of what two boxes share; not positive where they do not."""
    return tuple(min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1))


def holds(group: list[float], box: list[float]) -> bool:
    width, height = common(group, box)
    return width > box[2] - 1 and height > box[3] - 1


@pytest.mark.parametrize("opened", EVERY_PAGE, ids="-".join, indirect=True, scope="session")
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_no_node_lies_on_another_and_each_is_in_its_group(large, name):
    large.page.evaluate(OPEN, [EXTENSION, name])
    seen = large.page.evaluate(BOXES)
    assert len(seen["nodes"]) == len(TEMPLATES[name]["nodes"])
    assert seen["vue"] == (large.renderer == "vue"), "not the renderer that was asked for"
    assert all(min(width, height) > 20 for _, _, width, height in seen["nodes"].values()), "a node is not drawn"
    overlaps = [
        f"{a} and {b} share {width:.0f} x {height:.0f}"
        for (a, one), (b, other) in itertools.combinations(seen["nodes"].items(), 2)
        for width, height in [common(one, other)]
        if width > 1 and height > 1
    ]
    assert not overlaps
    for title, box in seen["nodes"].items():
        groups = [group for group in seen["groups"] if min(common(group, box)) > 1]
        if title in seen["notes"]:
            assert not groups, f"{title} lies on a group"
        else:
            assert [holds(group, box) for group in groups] == [True], f"{title} is not in one group"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_template_has_groups_with_titles_and_one_short_note(name):
    (note,) = [node["widgets_values"][0] for node in TEMPLATES[name]["nodes"] if node["type"] == "Note"]
    assert 0 < len(note) <= LONGEST_NOTE
    titles = [group["title"] for group in TEMPLATES[name]["groups"]]
    assert len(titles) >= 3
    assert all(titles)
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", WITH_FILES)
def test_loaders_say_where_their_files_come_from(name):
    offered = {
        model["name"]: model for node in TEMPLATES[name]["nodes"] for model in node.get("properties", {}).get("models", [])
    }
    assert set(offered) == set(files_of(TEMPLATES[name]))
    for model in offered.values():
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith("/" + model["name"])
        assert model["directory"] in ("checkpoints", "diffusion_models", "text_encoders", "vae", "readout_heads")


@pytest.mark.parametrize("opened", ONE_A_VERSION, ids="-".join, indirect=True, scope="session")
@pytest.mark.parametrize("name", WITH_FILES)
def test_the_page_offers_the_files_that_are_missing(opened, name):
    close_dialogs(opened)
    models = [model for node in TEMPLATES[name]["nodes"] for model in node.get("properties", {}).get("models", [])]
    opened.page.evaluate(OPEN.replace("await app.", "app."), [EXTENSION, name])  # a dialog would be waited for
    details = opened.page.get_by_role("button", name="View details")
    dialog = opened.page.locator("[role=dialog]")
    details.or_(dialog).first.wait_for()
    if details.count():
        details.first.click()
        offer_in_the_side_panel(opened, models)
    else:
        for model in models:
            dialog.get_by_text(f"{model['directory']} / {model['name']}").wait_for()
            download = dialog.locator(f"button[title='{model['url']}']")
            assert download.is_enabled() == model["name"].endswith(".safetensors")  # .pt: newer pages only
    close_dialogs(opened)


def offer_in_the_side_panel(editor: Editor, models: list[dict[str, str]]) -> None:
    """Newer pages list what is missing beside the graph, each with a button to download it and one to copy its address."""
    panel = editor.page.get_by_test_id("error-group-missing-model")
    for model in models:
        panel.get_by_role("button", name=f"Download {model['name']}").wait_for()
        copy = panel.get_by_title(model["name"]).locator("xpath=following-sibling::button").first
        copy.click()
        editor.until(f"navigator.clipboard.readText().then(text => text === {json.dumps(model['url'])})")
