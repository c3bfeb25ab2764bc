"""What the documents say exists: files and headings that links lead to, commands, settings, templates."""

from __future__ import annotations

import ast
import dataclasses
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from comfyui_host import REPOSITORY, engine

from rg_engine.__main__ import command_line
from rg_engine.adapters.learning.config import OftConfig
from rg_engine.adapters.learning.settings import OftSettings
from rg_engine.training.config import TrainingConfig
from rg_engine.training.settings import TrainingSettings

HELP = REPOSITORY / "web" / "docs"
DOCUMENTS = [
    REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted(HELP.glob("*.md")),
]  # fmt: skip
TEMPLATES = REPOSITORY / "example_workflows"
#: Folders that a path in code style begins with.
FOLDERS = ("rg_engine", "tests", "docs", "nodes", "web", "example_workflows", "locales")
SUBCOMMANDS = command_line()._subparsers._group_actions[0].choices  # type: ignore[union-attr]


@pytest.fixture(params=DOCUMENTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each block of code."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield found[1], found[2]


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(path: Path) -> list[str]:
    """Where links and pictures of a document lead, but for other sites."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(path: Path) -> set[str]:
    """The headings of a document, as links name them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code(path: Path) -> list[str]:
    """What stands in code style between the words, a line of it."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose(path))]


def commands(path: Path) -> list[str]:
    """Commands of this project's: whole ones, and what follows ``python -m rg_engine`` by itself."""
    lines = [line for _, block in fences(path.read_text(encoding="utf-8")) for line in block.splitlines()]
    whole = [text for text in [*lines, *code(path)] if re.match(r"(python|torchrun) .*-m rg_engine|(pipx run )?nox -", text)]
    return whole + [f"python -m rg_engine {text}" for text in code(path) if " " in text and text.split()[0] in SUBCOMMANDS]


def sessions() -> set[str]:
    """What noxfile.py can be asked for."""
    tree = ast.parse((REPOSITORY / "noxfile.py").read_text(encoding="utf-8"))
    return {
        each.name for each in tree.body if isinstance(each, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("nox.session") for decorator in each.decorator_list)
    }  # fmt: skip


def test_every_link_leads_to_a_file_and_a_heading(document):
    broken = []
    for link in links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_help_pages_link_only_to_what_the_page_serves_with_them():
    assert not [link for path in HELP.glob("*.md") for link in links(path) if "/" in link.partition("#")[0]]


def test_every_file_that_is_named_exists(document):
    named = [name for name in code(document) if re.fullmatch(r"[\w./-]+", name) and name.split("/")[0] in FOLDERS]
    paths = [name for name in named if "/" in name and "NAME" not in name]
    assert not [name for name in paths if not (REPOSITORY / name).exists()]


def test_every_command_is_one(document, comfyui):
    evaluate = engine("lab.evaluate")
    tables, ways = {*evaluate.TABLES, *evaluate.OF_ONE}, set(engine("lab.cost.benchmark").WAYS)
    for command in commands(document):
        words = shlex.split(command, comments=True)
        asked, _, more = " ".join(words).partition(" -- ")
        if "rg_engine" in words:
            options = parsed(words[words.index("rg_engine") + 1 :], command)
            assert set(getattr(options, "tables", ())) <= tables, command
            assert set(getattr(options, "ways", None) or ()) <= ways, command
            continue
        session = asked.split()[asked.split().index("-s") + 1]
        assert session in sessions(), command
        more_words = words[words.index("--") + 1 :] if more else []
        if session in SUBCOMMANDS:
            parsed([session, *more_words], command)
        elif session == "tests":
            assert all((REPOSITORY / word).exists() for word in more_words if not word.startswith("-")), command
        elif session == "gallery":
            gallery_command_line().parse_args(more_words)


def parsed(words: list[str], command: str):
    try:
        return command_line().parse_args(words)
    except SystemExit as error:
        raise AssertionError(f"not a command: {command}") from error


def gallery_command_line():
    gallery = runpy.run_path(str(REPOSITORY / "tests" / "gallery" / "__main__.py"))
    return gallery["command_line"]()


def test_the_readme_has_the_two_commands():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert {"pipx run nox -s demo", "pipx run nox -s tests"} <= set(lines)


@pytest.mark.parametrize(
    ("name", "tables"),
    [("training", (TrainingConfig, TrainingSettings)), ("oft", (OftConfig, OftSettings))],
)
def test_settings_in_the_documents_exist(name, tables):
    text = (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
    (block,) = [content for language, content in fences(text) if language == "yaml"]
    known = {field.name for table in tables for field in dataclasses.fields(table)}
    assert set(yaml.safe_load(block)) <= known


def test_every_template_is_in_the_gallery_with_its_picture():
    shown = set(links(REPOSITORY / "docs" / "gallery.md"))
    templates = {f"../example_workflows/{path.name}" for path in TEMPLATES.glob("*.json")}
    pictures = {str(Path(template).with_suffix(".jpg").as_posix()) for template in templates}
    assert {link for link in shown if link.endswith((".json", ".jpg"))} == templates | pictures


def test_every_node_is_in_the_list_of_nodes():
    linked = {Path(link).stem for link in links(REPOSITORY / "docs" / "nodes.md")}
    assert {path.stem for path in HELP.glob("*.md")} <= linked


def test_the_moving_picture_is_small_enough_for_a_readme():
    assert (HELP / "drag_editor.webp").stat().st_size <= 1_500_000
