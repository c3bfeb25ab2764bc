"""``python -m rg_engine languages``: the nodes in other languages, as ComfyUI's page reads them.

One list a language, ``locales/<language>.json``, has each English text of the node schemas once, with its translation; null
where the word stays as it is. The folder ``locales/<language>`` is made of it: nodeDefs.json, and main.json with the types
of connections, which name the outputs that have no other name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..comfy_host.bootstrap import REPOSITORY
from ..errors import ReadoutGuidanceError

LOCALES = REPOSITORY / "locales"
#: This extension's own connections.
TYPES = (
    "READOUT_HEAD", "READOUT_TARGET", "DRAG_POINTS", "READOUT", "TRACKS", "OFT", "READOUT_KEYFRAMES", "PICTURE_LOSS",
    "BOUNDARY", "BOUNDARY_EDIT",
)  # fmt: skip
#: The page takes these for its own marks in a text.
MARKS = set("{}@|")
#: A word or two may stay as they are in a language, a sentence may not.
LONGEST_KEPT = 3
PATHS = re.compile(r"(?:models|output)/\w+|\.(?:safetensors|pth?)\b", re.ASCII)

Infos = dict[str, dict[str, Any]]
Words = dict[str, str | None]


def node_infos() -> Infos:
    """What the page is told about each of this extension's nodes, which have been loaded, by node id."""
    import nodes

    ours = {key: node for key, node in nodes.NODE_CLASS_MAPPINGS.items() if key.startswith("RG_")}
    return {key: node.GET_NODE_INFO_V1() for key, node in ours.items()}


def english(infos: Infos) -> list[str]:
    """Every text of the schemas once: types, names of nodes, inputs and outputs, then sentences."""
    names: list[str | None] = [*TYPES, *(info["display_name"] for info in infos.values())]
    sentences: list[str | None] = []
    for info in infos.values():
        sentences.append(info["description"])
        for name, tooltip in _inputs(info):
            names.append(name)
            sentences.append(tooltip)
        for _, shown, tooltip in _outputs(info):
            names.append(shown)
            sentences.append(tooltip)
    return list(dict.fromkeys(text for text in (*names, *sentences) if text))


def node_defs(infos: Infos, words: Words) -> dict[str, Any]:
    """nodeDefs.json: display_name, description, inputs by name and outputs by number, of each node."""

    def say(**texts: str | None) -> dict[str, str]:
        return {key: words[text] or text for key, text in texts.items() if text}

    return {
        node_id: {
            **say(display_name=info["display_name"], description=info["description"]),
            "inputs": {name: say(name=name, tooltip=tooltip) for name, tooltip in _inputs(info)},
            "outputs": {str(i): say(name=name, tooltip=tooltip) for i, name, tooltip in _outputs(info)},
        }
        for node_id, info in infos.items()
    }


def folder_files(infos: Infos, words: Words) -> dict[str, str]:
    """The files of a language's folder."""
    contents = {
        "nodeDefs.json": node_defs(infos, words),
        "main.json": {"dataTypes": {name: words[name] or name for name in TYPES}},
    }
    return {name: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for name, content in contents.items()}


def problems(texts: list[str], words: Words) -> list[str]:
    """What is wrong with a language's list, a line each."""
    found = [f"missing: {text}" for text in texts if text not in words]
    found += [f"stale: {text}" for text in words if text not in texts]
    for text, said in words.items():
        if said is None:
            if len(text.split()) > LONGEST_KEPT:
                found.append(f"untranslated: {text}")
        elif said.strip() in ("", text):
            found.append(f"untranslated (null keeps a word as it is): {text}")
        elif MARKS & set(said):
            found.append(f"the page reads one of {' '.join(sorted(MARKS))} as its own mark: {said}")
        elif lost := set(PATHS.findall(text)) - set(PATHS.findall(said)):
            found.append(f"without {', '.join(sorted(lost))}: {said}")
    return found


def read_lists(folder: Path = LOCALES) -> dict[str, Words]:
    """Each language's list, by the language's name in the page (zh, pt-BR)."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}


def write_languages(folder: Path = LOCALES) -> None:
    """Make every language's folder of its list. Raises ReadoutGuidanceError, before it writes, if a list is not right."""
    from .workflow import load_extension

    load_extension()
    infos = node_infos()
    lists, texts = read_lists(folder), english(infos)
    wrong = [f"{language}.json: {line}" for language, words in lists.items() for line in problems(texts, words)]
    if wrong:
        raise ReadoutGuidanceError("mend these lists in locales first:\n" + "\n".join(wrong))
    for language, words in lists.items():
        (folder / language).mkdir(exist_ok=True)
        for name, content in folder_files(infos, words).items():
            (folder / language / name).write_text(content, encoding="utf-8", newline="\n")
    print(f"wrote {len(lists)} languages of {len(texts)} texts into {folder}")


def _inputs(info: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """(name, tooltip) of each input."""
    for part in ("required", "optional"):
        for name, spec in info["input"].get(part, {}).items():
            yield name, spec[1].get("tooltip") if len(spec) > 1 else None


def _outputs(info: dict[str, Any]) -> Iterator[tuple[int, str | None, str | None]]:
    """(number, name, tooltip) of each output; no name where the page shows its type."""
    tooltips = info.get("output_tooltips") or [None] * len(info["output"])
    for i, (kind, name, tooltip) in enumerate(zip(info["output"], info["output_name"], tooltips, strict=True)):
        yield i, None if name == kind else name, tooltip
