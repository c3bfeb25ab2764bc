"""A newcomer's way, as the README has it: a template by its address, Run, and there is a guided picture."""

from __future__ import annotations

import io

import pytest
from comfyui_server import EXTENSION
from drag_editor import PATIENCE_MS
from PIL import Image

GUIDED = "window.app?.graph?.nodes?.some(node => node.type === 'RG_ReadoutGuidedKSampler')"


@pytest.mark.parametrize("opened", [("newest", "canvas")], ids="-".join, indirect=True, scope="session")
def test_the_address_of_a_template_and_one_click_make_a_guided_picture(opened):
    server, page = opened.server, opened.page.context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    before = set(server.json("/history"))
    try:
        page.goto(f"{server.url}/?template=pose&source={EXTENSION}")
        page.wait_for_function(GUIDED)
        page.get_by_role("button", name="Run", exact=True).first.click()
        (run,) = server.wait(
            lambda: [entry for key, entry in server.json("/history").items() if key not in before], "the first picture"
        )
    finally:
        page.close()
    assert run["status"]["status_str"] == "success"
    files = [image for output in run["outputs"].values() for image in output.get("images", ()) if image["type"] == "output"]
    assert files
    _, content = server.request(f"/view?filename={files[0]['filename']}&type=output")
    assert Image.open(io.BytesIO(content)).size == (128, 128)
