"""The drag editor on the Drag Points node: what a user does with it, in both node renderers of two versions of the page."""

from __future__ import annotations

import json

import pytest
from comfyui_server import EXTENSION
from drag_editor import PAGES, drags, graph, text

ARROW = (0.2, 0.3, 0.6, 0.7)
RED = (255, 92, 92)  # the head of an arrow in the node's output
SHOWS_WIDE = "document.querySelector('.rg-drag-stage img')?.naturalWidth === 600"


def between(node_type, name):
    """The workflow with an arrow and a node between Load Image and Drag Points."""
    workflow = graph(text(ARROW))
    workflow["nodes"].append(
        {
            "id": 4, "type": node_type, "pos": [-800, 500], "size": [200, 50], "mode": 0, "flags": {}, "order": 1,
            "inputs": [{"name": name, "type": "IMAGE", "link": 3}],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}], "properties": {}, "widgets_values": [],
        }
    )  # fmt: skip
    workflow["links"] = [[3, 1, 0, 4, 0, "IMAGE"], [1, 4, 0, 2, 0, "IMAGE"], [2, 2, 1, 3, 0, "IMAGE"]]
    workflow["nodes"][0]["outputs"][0]["links"] = [3]
    return workflow


# Pointer


def test_a_press_and_a_pull_make_an_arrow(editor):
    editor.drag(*ARROW)
    assert editor.drags == [ARROW]
    assert editor.said == "Arrow 1 of 1, end at 60%, 70%"


def test_a_click_makes_an_anchor(editor):
    editor.click(0.5, 0.25)
    assert editor.drags == [(0.5, 0.25, 0.5, 0.25)]
    assert editor.said == "Anchor 1 of 1, at 50%, 25%"


def test_ends_and_whole_arrows_move(editor):
    editor.load(text(ARROW))
    editor.drag(0.6, 0.7, 0.8, 0.7)
    assert editor.drags == [(0.2, 0.3, 0.8, 0.7)]
    editor.drag(0.2, 0.3, 0.2, 0.7)
    assert editor.drags == [(0.2, 0.7, 0.8, 0.7)]
    editor.drag(0.5, 0.7, 0.6, 0.3)
    assert editor.drags == [(0.3, 0.3, 0.9, 0.3)]


def test_what_is_pulled_off_the_picture_stays_on_its_border(editor):
    editor.drag(0.5, 0.5, 1.2, -0.4)
    assert editor.drags == [(0.5, 0.5, 1.0, 0.0)]
    editor.drag(0.75, 0.25, 0.0, 0.25)  # the whole arrow: it keeps its shape
    assert editor.drags == [(0.0, 0.5, 0.5, 0.0)]


def test_a_double_click_or_a_right_click_on_an_end_deletes_the_arrow(editor):
    editor.load(text(ARROW, (0.8, 0.2, 0.8, 0.8)))
    editor.click(0.6, 0.7, click_count=2)
    assert editor.drags == [(0.8, 0.2, 0.8, 0.8)]
    editor.click(0.8, 0.2, button="right")
    assert editor.drags == []


def test_a_finger_draws_and_moves_and_does_not_move_the_node(editor):
    before = editor.page.evaluate("[...app.graph.getNodeById(2).pos]")
    editor.touch((0.2, 0.3), (0.4, 0.4), (0.6, 0.7))
    assert editor.drags == [ARROW]
    editor.touch((0.59, 0.68), (0.7, 0.6), (0.79, 0.48))  # a fingertip beside the end
    assert editor.drags == [(0.2, 0.3, 0.8, 0.5)]
    assert editor.steps == 2
    assert editor.page.evaluate("[...app.graph.getNodeById(2).pos]") == before


def test_a_pen_draws_and_moves_like_a_mouse(editor):
    editor.pen((0.2, 0.3), (0.4, 0.4), (0.6, 0.7))
    assert editor.drags == [ARROW]
    editor.pen((0.6, 0.7), (0.7, 0.6), (0.8, 0.5))
    assert editor.drags == [(0.2, 0.3, 0.8, 0.5)]
    assert editor.steps == 2


@pytest.mark.parametrize("second", ["on the picture", "on the graph"])
def test_two_fingers_zoom_the_graph_and_draw_nothing(editor, second):
    first, pulled = editor.place(0.3, 0.5), editor.place(0.4, 0.6)
    other = editor.place(0.7, 0.5) if second == "on the picture" else (250, 700)
    apart = (other[0] + (other[0] - pulled[0]) / 2, other[1])
    editor.fingers([first], [pulled], [pulled, other], [first, apart], [first], [])
    assert editor.points == text()
    assert editor.said == "No arrows"
    assert editor.page.locator(".rg-drag-arrows g").count() == 0, "half an arrow is left"
    assert editor.page.evaluate("app.canvas.ds.scale") != 1
    editor.look()
    editor.touch((0.2, 0.3), (0.4, 0.4), (0.6, 0.7))
    assert editor.drags == [ARROW]


# The oldest page loses count of the fingers when a touch is taken away, and takes no click from then on.
@pytest.mark.parametrize("opened", PAGES[:-1], ids="-".join, indirect=True, scope="session")
def test_a_touch_that_the_system_takes_away_leaves_all_as_it_was(editor):
    editor.load(text(ARROW))
    editor.touch((0.6, 0.7), (0.7, 0.6), (0.9, 0.5), cancelled=True)
    editor.touch((0.1, 0.8), (0.2, 0.8), (0.3, 0.8), cancelled=True)
    assert editor.points == text(ARROW)
    assert editor.page.locator(".rg-drag-arrows g").count() == 1
    assert editor.steps == 0
    editor.touch((0.6, 0.7), (0.7, 0.6), (0.8, 0.5))
    assert editor.drags == [(0.2, 0.3, 0.8, 0.5)]


# Keyboard


def test_the_keyboard_does_it_all(editor):
    editor.load(text(ARROW, (0.9, 0.9, 0.9, 0.9)))
    editor.click(0.4, 0.5)  # the shaft: takes the focus, changes nothing
    assert editor.said == "Arrow 1 of 2, from 20%, 30% to 60%, 70%"
    editor.press("Tab", "Tab")
    assert editor.said == "Arrow 1 of 2, end at 60%, 70%"
    editor.press("Shift+ArrowRight", "ArrowUp", "ArrowUp")
    assert editor.drags[0] == (0.2, 0.3, 0.65, 0.69)
    editor.press("Tab", "Delete")
    assert editor.drags == [(0.2, 0.3, 0.65, 0.69)]
    assert editor.page.evaluate("app.graph.nodes.length") == 3
    editor.press("Enter", "Shift+ArrowDown")
    assert editor.drags[1] == (0.45, 0.5, 0.55, 0.55)
    editor.press("Escape")
    assert editor.said == "2 arrows"


def test_tab_leads_out_of_the_editor_past_the_last_end(editor):
    editor.load(text(ARROW))
    editor.click(0.2, 0.3)
    editor.press("Tab", "Tab")
    assert editor.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Undo"


def test_a_held_arrow_key_is_one_edit(editor):
    editor.load(text(ARROW))
    editor.click(0.6, 0.7)
    for _ in range(5):
        editor.page.keyboard.down("ArrowRight")
    assert editor.steps == 0
    editor.page.keyboard.up("ArrowRight")
    assert editor.steps == 1
    editor.press("Control+z")
    assert editor.drags == [ARROW]


# Undo


def test_each_edit_is_one_step_of_comfyuis_history(editor):
    editor.drag(*ARROW)
    editor.click(0.9, 0.9)
    editor.drag(0.6, 0.7, 0.7, 0.7)
    editor.press("Delete")
    assert editor.steps == 4


def test_undo_inside_the_editor_undoes_its_last_edit_only(editor):
    editor.drag(*ARROW)
    editor.click(0.9, 0.9)
    editor.press("Control+z")
    assert editor.drags == [ARROW]
    assert editor.steps == 1, "ComfyUI's history is where the editor's is"
    editor.press("Control+z", "Control+y", "Control+Shift+Z")
    assert len(editor.drags) == 2
    assert editor.steps == 2
    editor.button("Undo").click()
    editor.button("Undo").click()
    assert editor.drags == []
    editor.button("Redo").click()
    assert editor.drags == [ARROW]
    assert editor.steps == 1


def test_comfyuis_undo_brings_earlier_arrows_back_and_the_editor_goes_on_from_there(editor):
    editor.drag(*ARROW)
    editor.click(0.9, 0.9)
    editor.leave()
    editor.graph_step("Control+z")
    assert editor.drags == [ARROW]
    assert editor.said == "1 arrow"
    editor.button("Undo").click()
    assert editor.drags == []
    editor.leave()
    editor.graph_step("Control+y")
    assert editor.drags == [ARROW]


# What is kept


def test_the_workflow_has_the_points_as_one_text_and_no_picture(editor):
    editor.drag(*ARROW)
    saved = editor.saved
    (values,) = (node["widgets_values"] for node in saved["nodes"] if node["type"] == "RG_DragPoints")
    assert json.loads(values[0])["version"] == 1
    assert len(json.dumps(saved)) < 10_000


def test_arrows_are_there_after_a_reload_of_the_page(editor):
    arrow = (0.15, 0.35, 0.65, 0.85)  # no other test's: the page keeps drafts, a moment after the change
    editor.drag(*arrow)
    editor.until("[localStorage, sessionStorage].some(s => Object.values(s).some(v => v.includes('[0.65, 0.85]')))")
    editor.open_page()
    editor.until("app.graph.getNodeById(2)?.widgets?.[0].value.includes('from')")
    editor.look()
    assert editor.drags == [arrow]
    assert editor.said == "1 arrow"


def test_a_copy_of_the_node_has_arrows_of_its_own(editor):
    editor.drag(*ARROW)
    editor.press("Escape", "Escape", "Control+c")  # out of the editor; its node is the selected one
    editor.leave()
    editor.press("Control+v")
    editor.until("app.graph.nodes.filter(n => n.type === 'RG_DragPoints').length === 2")
    copy = "app.graph.nodes.find(n => n.type === 'RG_DragPoints' && n.id != 2)"
    assert editor.page.evaluate(f"{copy}.widgets[0].value") == editor.points
    editor.page.evaluate(f"app.graph.remove({copy})")
    assert editor.drags == [ARROW]


def test_arrows_and_picture_are_there_after_a_look_at_another_tab(editor):
    editor.drag(*ARROW)
    editor.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    editor.until("app.graph.nodes.every(n => n.type !== 'RG_DragPoints')")
    editor.page.evaluate(
        """() => {
            const store = app.extensionManager.workflow, other = store.openWorkflows.at(-2);
            return app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow') ?? other;
        }"""
    )
    editor.until("app.graph.getNodeById(2)?.widgets?.[0].value.includes('from')")
    editor.look()
    assert editor.drags == [ARROW]
    editor.button("Undo").click()
    assert editor.drags == []


def test_ctrl_s_inside_the_editor_saves_the_workflow(editor):
    file = editor.server.base / "user/default/workflows" / f"dragged {editor.renderer}.json"

    def saved():
        nodes = json.loads(file.read_text())["nodes"] if file.exists() else []
        return [drags(node["widgets_values"][0]) for node in nodes if node["type"] == "RG_DragPoints"]

    editor.drag(*ARROW)
    editor.press("Control+s")
    editor.page.get_by_role("dialog").get_by_role("textbox").fill(file.stem)
    editor.press("Enter")
    editor.server.wait(lambda: saved() == [[ARROW]], "the file")
    editor.drag(0.6, 0.7, 0.8, 0.7)
    editor.press("Control+s")
    editor.server.wait(lambda: saved() == [[(0.2, 0.3, 0.8, 0.7)]], "the file of the second save")


# Seeing it


@pytest.mark.parametrize("zoom", [0.25, 2.0])
def test_it_works_at_any_zoom(editor, zoom):
    editor.look(zoom)
    editor.drag(*ARROW)
    assert editor.drags == [pytest.approx(ARROW, abs=0.02)]
    editor.drag(0.6, 0.7, 0.8, 0.5)
    assert editor.drags == [pytest.approx((0.2, 0.3, 0.8, 0.5), abs=0.03)]


def test_the_wheel_over_it_zooms_the_graph(editor):
    editor.page.mouse.move(*editor.place(0.5, 0.5))
    editor.page.mouse.wheel(0, 200)
    editor.until("app.canvas.ds.scale < 1")


def test_a_tall_picture_keeps_its_shape(editor):
    editor.load(picture="tall.png")
    box = editor.page.locator(".rg-drag-stage img").first.bounding_box()
    assert box["height"] / box["width"] == pytest.approx(2.5, rel=0.02)
    editor.drag(0.1, 0.1, 0.9, 0.9)
    assert editor.drags == [(0.1, 0.1, 0.9, 0.9)]


def test_its_parts_have_names(editor):
    editor.page.get_by_role("application", name="Drag points editor").wait_for()
    for name in ("Undo", "Redo", "Delete arrow", "Clear all arrows"):
        assert editor.button(name).is_visible()
    editor.drag(*ARROW)
    assert editor.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Arrow 1 of 1, end at 60%, 70%"
    editor.button("Clear all arrows").click()
    assert editor.drags == []


# Hard inputs


def test_two_hundred_arrows_stay_usable(editor):
    rows = [(round(0.05 * (i % 20), 3), round(0.1 * (i // 20), 3)) for i in range(200)]
    editor.load(text(*((x, y, round(x + 0.03, 3), round(y + 0.05, 3)) for x, y in rows)))
    assert editor.said == "200 arrows"
    editor.click(0.5, 0.5)
    editor.press("Delete")
    assert len(editor.drags) == 199


def test_of_duplicate_arrows_the_one_drawn_last_is_taken_and_crossing_ones_keep_their_ends(editor):
    editor.load(text(ARROW, ARROW, (0.2, 0.7, 0.6, 0.3)))
    editor.drag(0.6, 0.7, 0.9, 0.7)
    assert editor.drags == [ARROW, (0.2, 0.3, 0.9, 0.7), (0.2, 0.7, 0.6, 0.3)]


def test_a_text_that_cannot_be_read_is_kept_until_it_is_replaced(editor):
    editor.load('{"version": 2, "drags": []}')
    assert editor.points == '{"version": 2, "drags": []}'
    assert "version" in editor.page.locator(".rg-drag-note").first.inner_text()
    editor.drag(*ARROW)
    assert editor.drags == [ARROW]
    editor.press("Control+z")
    assert editor.points == '{"version": 2, "drags": []}'


# Which picture


def test_the_picture_is_found_through_a_reroute(editor):
    workflow = between("Reroute", "")
    editor.load(workflow=workflow)
    editor.until(SHOWS_WIDE)


def test_it_works_inside_a_subgraph(editor):
    editor.drag(*ARROW)
    editor.page.evaluate(
        """() => {
            const graph = app.canvas.graph, { subgraph } = graph.convertToSubgraph(new Set([graph.getNodeById(2)]));
            app.canvas.setGraph(subgraph);
        }"""
    )
    editor.until("app.canvas.graph !== (app.rootGraph ?? app.graph) && app.canvas.graph.nodes.length === 1")
    node = editor.page.evaluate("app.canvas.graph.nodes[0].id")
    editor.look(node=node)
    editor.until(SHOWS_WIDE)
    editor.drag(0.6, 0.7, 0.8, 0.7)
    (inner,) = editor.saved["definitions"]["subgraphs"][0]["nodes"]
    assert '"to": [0.8, 0.7]' in inner["widgets_values"][0]
    editor.press("Control+z")
    (inner,) = editor.saved["definitions"]["subgraphs"][0]["nodes"]
    assert '"to": [0.6, 0.7]' in inner["widgets_values"][0]


def test_points_that_come_over_a_link_are_used(editor):
    workflow = graph(text((0.9, 0.9, 0.9, 0.9)))
    workflow["nodes"][1]["inputs"].append({"name": "points", "type": "STRING", "widget": {"name": "points"}, "link": 3})
    workflow["nodes"].append(
        {
            "id": 4, "type": "PrimitiveStringMultiline", "pos": [-800, 500], "size": [300, 120], "mode": 0, "flags": {},
            "order": 0, "inputs": [], "outputs": [{"name": "STRING", "type": "STRING", "links": [3]}], "properties": {},
            "widgets_values": [text(ARROW)],
        }
    )  # fmt: skip
    workflow["links"].append([3, 4, 0, 2, 1, "STRING"])
    editor.load(workflow=workflow, look=False)  # some versions hide an editor whose value comes over a link
    editor.until("app.graph.getNodeById(2)?.inputs[1].link")
    editor.page.evaluate("app.queuePrompt(0)")
    assert editor.colour_in_preview(0.585, 0.685) == RED


def test_another_file_in_load_image_shows_at_once(editor):
    editor.page.evaluate("app.graph.getNodeById(1).widgets[0].value = 'tall.png'")
    editor.leave()
    editor.until("document.querySelector('.rg-drag-stage img').naturalHeight === 500")


def test_a_run_shows_the_picture_that_came_in_and_draws_the_arrows(editor):
    editor.load(workflow=between("ImageInvert", "image"))  # the page can't know what it makes before the run
    assert editor.page.locator(".rg-drag-note").first.inner_text() == "The connected picture shows here after a run"
    editor.page.evaluate("app.queuePrompt(0)")
    editor.until(SHOWS_WIDE)
    assert editor.colour_in_preview(0.585, 0.685) == RED


def test_where_comfyui_runs_on_every_change_it_runs_on_every_edit(editor):
    before = list(editor.runs)

    def ran():
        new = [run["prompt"][2]["2"]["inputs"]["points"] for key, run in editor.runs.items() if key not in before]
        return [drags(points) for points in new]

    mode = "app.extensionManager.queueSettings.mode"
    editor.page.evaluate(f"{mode} = 'change'")
    try:
        editor.drag(*ARROW)
        editor.server.wait(lambda: len(ran()) == 1, "the run of the new arrow")
        editor.press("Control+z")
        editor.server.wait(lambda: len(ran()) == 2, "the run without it")
        editor.press("Control+y")
        editor.server.wait(lambda: len(ran()) == 3, "the run with it again")
        editor.press("Tab", "Tab")  # to the arrow's end
        editor.page.keyboard.down("ArrowRight")
        editor.page.keyboard.down("ArrowRight")
        editor.page.keyboard.up("ArrowRight")
        editor.server.wait(lambda: len(ran()) == 4, "the run of the moved end")
    finally:
        editor.page.evaluate(f"{mode} = 'disabled'")
    assert ran() == [[ARROW], [], [ARROW], [(0.2, 0.3, 0.61, 0.7)]]


def test_nothing_broke_on_the_page(editor):
    assert [error for error in editor.errors if EXTENSION in error] == []
