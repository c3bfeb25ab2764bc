"""The editor on the node of a subgraph, to which the `points` of a Drag Points node inside are promoted."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from drag_editor import PAGES, graph, text

ARROW, LONGER, ANCHOR = (0.2, 0.3, 0.6, 0.7), (0.2, 0.3, 0.8, 0.7), (0.9, 0.9, 0.9, 0.9)
HOST, OTHER = 7, 8
SHOWS_WIDE = "[...document.querySelectorAll('.rg-drag-stage img')].some(i => i.checkVisibility() && i.naturalWidth === 600)"
#: The oldest page knows promoted widgets only as links from the subgraph's inputs.
BY_NAME = PAGES[:-1]
#: Before about 1.40, nodes of one subgraph share the widgets that are promoted to them.
OF_THEIR_OWN = PAGES[:2]


def promoted(by_name: bool = False) -> dict[str, Any]:
    """Load Image, a subgraph with Drag Points, Preview Image; the subgraph's node has the arrow."""
    workflow = graph(text(ARROW))
    load, inner, preview = workflow["nodes"]
    subgraph = "22222222-2222-4222-8222-222222222222"
    host: dict[str, Any] = {
        "id": HOST, "type": subgraph, "pos": [0, 0], "size": [420, 460], "mode": 0, "flags": {}, "order": 1,
        "inputs": [{"name": "image", "type": "IMAGE", "link": 3}],
        "outputs": [{"name": "preview", "type": "IMAGE", "links": [4]}], "properties": {}, "widgets_values": [],
    }  # fmt: skip
    links = [_link(1, -10, 0, 2, 0, "IMAGE"), _link(2, 2, 1, -20, 0, "IMAGE")]
    inputs = [_slot(1, "image", "IMAGE", 1)]
    points = {"name": "points", "type": "STRING", "widget": {"name": "points"}, "link": None}
    inner["inputs"].append(dict(points))
    if by_name:
        host["properties"]["proxyWidgets"] = [["2", "points"]]
    else:
        host["inputs"].append(points)
        host["widgets_values"].append(text(ARROW))
        inner["inputs"][1]["link"] = 5
        links.append(_link(5, -10, 1, 2, 1, "STRING"))
        inputs.append(_slot(2, "points", "STRING", 5))
    definition = {
        "id": subgraph, "version": 1, "revision": 0, "name": "Drags", "config": {}, "extra": {}, "groups": [],
        "state": {"lastGroupId": 0, "lastNodeId": 9, "lastLinkId": 9, "lastRerouteId": 0}, "widgets": [],
        "inputNode": {"id": -10, "bounding": [-300, 0, 120, 60]}, "outputNode": {"id": -20, "bounding": [600, 0, 120, 60]},
        "inputs": inputs, "outputs": [_slot(3, "preview", "IMAGE", 2)], "nodes": [inner], "links": links,
    }  # fmt: skip
    load["outputs"][0]["links"], preview["inputs"][0]["link"] = [3], 4
    workflow["nodes"] = [load, preview, host]
    workflow["links"] = [[3, 1, 0, HOST, 0, "IMAGE"], [4, HOST, 0, 3, 0, "IMAGE"]]
    workflow["definitions"] = {"subgraphs": [definition]}
    return {**workflow, "last_node_id": 9, "last_link_id": 9}


def _link(key: int, origin: int, origin_slot: int, target: int, target_slot: int, kind: str) -> dict[str, Any]:
    ends = {"origin_id": origin, "origin_slot": origin_slot, "target_id": target, "target_slot": target_slot}
    return {"id": key, **ends, "type": kind}


def _slot(key: int, name: str, kind: str, link: int) -> dict[str, Any]:
    return {"id": f"33333333-3333-4333-8333-33333333333{key}", "name": name, "type": kind, "linkIds": [link], "pos": [0, 0]}


def draw_undo_and_reload(editor):
    editor.until(SHOWS_WIDE)
    editor.drag(0.6, 0.7, 0.8, 0.7)
    assert editor.drags_to_run == [[LONGER]]
    assert editor.page.evaluate("[...app.canvas.selectedItems].map(item => Number(item.id))") == [HOST]
    editor.press("Control+z")
    assert editor.drags_to_run == [[ARROW]]
    editor.press("Control+y")
    assert editor.steps == 1
    saved = json.loads(editor.page.evaluate("JSON.stringify((app.rootGraph ?? app.graph).serialize())"))
    editor.load(workflow=saved, node=HOST)
    editor.until(SHOWS_WIDE)
    assert editor.said == "1 arrow"
    assert editor.drags_to_run == [[LONGER]]


def test_it_shows_there_and_what_is_drawn_there_runs_and_is_saved(opened):
    opened.load(workflow=promoted(), node=HOST)
    draw_undo_and_reload(opened)


@pytest.mark.parametrize("opened", BY_NAME, ids="-".join, indirect=True, scope="session")
def test_it_does_so_where_the_widget_is_promoted_by_its_name(opened):
    opened.load(workflow=promoted(by_name=True), node=HOST)
    draw_undo_and_reload(opened)


@pytest.mark.parametrize("opened", OF_THEIR_OWN, ids="-".join, indirect=True, scope="session")
def test_two_nodes_of_one_subgraph_have_arrows_and_pictures_of_their_own(opened):
    workflow = promoted()
    load, _, host = copy.deepcopy(workflow["nodes"])
    load.update(id=9, pos=[-800, 900], widgets_values=["tall.png", "image"])
    load["outputs"][0]["links"] = [6]
    host.update(id=OTHER, pos=[0, 900], widgets_values=[text(ANCHOR)])
    host["inputs"][0]["link"], host["outputs"][0]["links"] = 6, []
    workflow["nodes"] += [load, host]
    workflow["links"].append([6, 9, 0, OTHER, 0, "IMAGE"])
    opened.load(workflow=workflow, node=HOST)
    opened.until(SHOWS_WIDE)
    assert opened.drags_to_run == [[ARROW], [ANCHOR]]
    opened.drag(0.6, 0.7, 0.8, 0.7)
    assert opened.drags_to_run == [[LONGER], [ANCHOR]]
    opened.until("[...document.querySelectorAll('.rg-drag-stage img')].some(i => i.naturalHeight === 500)")
