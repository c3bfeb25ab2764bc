"""Fixtures. Tests that take ``comfyui`` run in real ComfyUI, inside inference mode as in production."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def _started_comfyui() -> None:
    import comfyui_host

    comfyui_host.start()


@pytest.fixture
def comfyui(_started_comfyui: None) -> Iterator[None]:
    import torch

    with torch.inference_mode():
        yield
