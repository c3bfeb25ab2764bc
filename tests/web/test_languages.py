"""The nodes in the languages that the page offers: titles, inputs, connections and help as a user reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from comfyui_host import REPOSITORY
from drag_editor import Editor

LOCALES = REPOSITORY / "locales"
#: The oldest page has fewer; no page has German in its menu yet.
EVERYWHERE = {"es", "fr", "ja", "ko", "ru", "zh", "zh-TW"}
PAGES = [("newest", "canvas"), ("newest", "vue"), ("oldest", "canvas")]
#: A Readout Target alone on the graph: its labels, and where on the screen its weight is.
SHOWN = """
() => {
    app.graph.clear();
    const node = LiteGraph.createNode('RG_ReadoutTarget'), { ds } = app.canvas;
    app.graph.add(node);
    node.pos = [300, 200];
    [ds.scale, ds.offset[0], ds.offset[1]] = [1, 0, 0];
    app.canvas.setDirty(true, true);
    const corner = document.querySelector('#graph-canvas').getBoundingClientRect();
    const weight = node.widgets.find(widget => widget.name === 'weight');
    return new Promise(done => setTimeout(() => done({
        title: node.title,
        inputs: Object.fromEntries([
            ...node.inputs.map(input => [input.name, input.label ?? input.localized_name]),
            ...node.widgets.map(widget => [widget.name, widget.label]),
        ]),
        output: node.outputs[0].localized_name,
        weight: [corner.x + node.pos[0] + 60, corner.y + node.pos[1] + (weight.last_y ?? weight.y) + 10],
    }), 500));
}
"""
#: What the page's translator makes of texts by their keys.
SAY = """
keys => {
    const root = document.querySelector('#vue-app').__vue_app__.config.globalProperties;
    return keys.map(key => root.$t(key));
}
"""


def language_files(language: str) -> dict[str, Any]:
    texts = [json.loads((LOCALES / language / name).read_text(encoding="utf-8")) for name in ("nodeDefs.json", "main.json")]
    return {"nodeDefs": texts[0], **texts[1]}


def by_key(texts: Any, key: str = "") -> dict[str, str]:
    """Each text by its path, as the page's translator names it."""
    if isinstance(texts, str):
        return {key: texts}
    return {path: text for name, below in texts.items() for path, text in by_key(below, f"{key}.{name}".strip(".")).items()}


def speak(editor: Editor, language: str) -> None:
    """Open the page anew in a language."""
    assert editor.server.request("/settings/Comfy.Locale", language)[0] == 200
    editor.open_page()


def see_help(editor: Editor, place: list[float], label: str, text: str) -> None:
    """Rest the pointer on a widget until the page says a text there."""
    if editor.renderer == "vue":
        editor.page.locator("[data-node-id]").get_by_text(label, exact=True).last.hover()
    else:
        editor.page.mouse.move(place[0] - 40, place[1])
        editor.page.mouse.move(*place)
    editor.page.locator(".node-tooltip, [role=tooltip]").filter(visible=True, has_text=text).first.wait_for()


@pytest.fixture
def page(opened: Editor):
    yield opened
    speak(opened, "en")


@pytest.mark.parametrize("opened", PAGES, ids="-".join, indirect=True, scope="session")
def test_the_page_says_titles_inputs_and_help_in_its_language(page):
    options = page.page.evaluate("app.ui.settings.settingsLookup['Comfy.Locale'].options.map(option => option.value)")
    offered = {entry.name for entry in LOCALES.iterdir() if entry.is_dir()} & set(options)
    assert offered >= EVERYWHERE
    for language in sorted(offered):
        speak(page, language)
        texts = language_files(language)
        said = by_key(texts)
        assert page.page.evaluate(SAY, list(said)) == list(said.values()), "a letter was taken for a mark"
        target = texts["nodeDefs"]["RG_ReadoutTarget"]
        shown = page.page.evaluate(SHOWN)
        assert shown["title"] == target["display_name"]
        assert shown["inputs"] == {name: told["name"] for name, told in target["inputs"].items()}
        assert shown["output"] == texts["dataTypes"]["READOUT_TARGET"]
        weight = target["inputs"]["weight"]
        see_help(page, shown["weight"], weight["name"], weight["tooltip"])
