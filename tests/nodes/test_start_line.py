"""The line that a question about a run is asked to quote: versions, model, heads, mode."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from comfyui_host import REPOSITORY, engine


@pytest.fixture
def lines(caplog):
    """lines() gives those lines of the log so far."""
    caplog.set_level(logging.INFO, logger="readout_guidance")
    return lambda: [text for text in (record.getMessage() for record in caplog.records) if "backbone" in text]


def version() -> str:
    found = re.search(r'^version = "(.+)"$', Path(REPOSITORY, "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    return found[1]


def test_a_guided_run_says_once_what_it_runs_with(small, lines):
    import comfyui_version

    small.sample(small.target(previous=small.target("appearance")), strength=1.5, mode="reference")
    assert lines() == [
        f"Readout Guidance {version()} (ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, cpu): "
        "backbone a UNet, heads head_appearance.pt (appearance), head_spatial.pt (spatial), mode reference, strength 1.5, "
        "graph full"
    ]


def test_a_head_that_is_used_twice_is_named_once(small, lines):
    head = small.head("spatial")
    small.sample(small.target(previous=small.target()))
    (line,) = lines()
    assert line.count(head.name) == 1


def test_a_run_without_guidance_says_nothing(small, lines):
    small.sample(small.target(), strength=0.0)
    assert not lines()


def test_the_version_is_the_package_s(comfyui):
    assert version() == engine("version").VERSION
