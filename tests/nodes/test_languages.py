"""The nodes in other languages: each list is whole, and the files that the page reads are made of it."""

from __future__ import annotations

import re

import pytest
from comfyui_host import REPOSITORY, engine

LANGUAGES = ["de", "es", "fr", "ja", "ko", "pt-BR", "ru", "zh", "zh-TW"]
#: A letter that only texts in this language have.
LETTERS = {"ja": "[ぁ-ヿ]", "ko": "[가-힣]", "ru": "[а-яё]", "zh": "[一-鿿]", "zh-TW": "[一-鿿]"}


@pytest.fixture
def infos(comfyui):
    return engine("lab.languages").node_infos()


@pytest.fixture
def texts(infos):
    return engine("lab.languages").english(infos)


def test_every_language_has_its_list():
    assert sorted(file.stem for file in (REPOSITORY / "locales").glob("*.json")) == LANGUAGES
    assert sorted(entry.name for entry in (REPOSITORY / "locales").iterdir() if entry.is_dir()) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_missing_stale_or_untranslated(texts, language):
    languages = engine("lab.languages")
    words = languages.read_lists()[language]
    assert languages.problems(texts, words) == []
    letters = LETTERS.get(language, ".")
    assert not [said for said in words.values() if said and len(said) > 12 and not re.search(letters, said.lower())]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_files_of_the_page_are_made_of_the_list(infos, language):
    languages = engine("lab.languages")
    made = languages.folder_files(infos, languages.read_lists()[language])
    folder = REPOSITORY / "locales" / language
    assert {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()} == made


def test_the_page_names_what_it_shows(infos):
    """Each node, input and output that the page labels, and each text that it shows as help, has its place."""
    from comfy_api.latest import io

    of_comfyui = {kind.io_type for kind in vars(io).values() if hasattr(kind, "io_type")}
    made = engine("lab.languages").node_defs(infos, dict.fromkeys(engine("lab.languages").english(infos)))
    assert set(made) == set(infos)
    for node_id, info in infos.items():
        shown = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert set(made[node_id]["inputs"]) == set(shown)
        for name, (_, options) in shown.items():
            assert made[node_id]["inputs"][name].get("tooltip") == options.get("tooltip")
        for i, (kind, name) in enumerate(zip(info["output"], info["output_name"], strict=True)):
            assert made[node_id]["outputs"][str(i)].get("name") == (None if name == kind else name)
            assert name != kind or kind in (*engine("lab.languages").TYPES, *of_comfyui), f"{kind} is in no list"


def test_what_is_wrong_with_a_list_is_told(comfyui):
    problems = engine("lab.languages").problems
    texts = ["Load a file", "mode", "Heads lie in models/heads.", "a long sentence of words"]
    right = {"Load a file": "Datei laden", "mode": None, "Heads lie in models/heads.": "Köpfe liegen in models/heads."}
    right["a long sentence of words"] = "ein langer Satz"
    assert problems(texts, right) == []
    for changed, told in (
        ({"mode": "mode"}, "untranslated"),
        ({"mode": " "}, "untranslated"),
        ({"a long sentence of words": None}, "untranslated"),
        ({"gone": "weg"}, "stale: gone"),
        ({"Load a file": "{Datei} laden"}, "mark"),
        ({"Heads lie in models/heads.": "Köpfe liegen dort."}, "without models/heads"),
    ):
        (line,) = problems(texts, right | changed)
        assert told in line
    del right["mode"]
    assert problems(texts, right) == ["missing: mode"]
