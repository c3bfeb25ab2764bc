"""Bad input is refused before sampling, in words that say what to do."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from comfyui_host import engine, node
from small_models import PARITY, patcher, sdxl_model

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def folder(tmp_path):
    """A readout_heads folder of ComfyUI's, for this test only; a secret lies beside it."""
    import folder_paths

    heads = tmp_path / "readout_heads"
    heads.mkdir()
    shutil.copy(PARITY / "head_spatial.pt", tmp_path / "secret.pt")
    name = engine("comfy_host.folders").FOLDER
    folder_paths.add_model_folder_path(name, str(heads))
    yield heads
    folder_paths.folder_names_and_paths[name][0].remove(str(heads))
    folder_paths.filename_list_cache.pop(name, None)


def load(name: str, kind: str = "auto"):
    return node("RG_LoadReadoutHead", head_name=name, kind=kind)


def refused(match: str, error: str = "ReadoutGuidanceError"):
    return pytest.raises(getattr(engine("errors"), error), match=match)


class Payload:
    def __reduce__(self):
        return (open, ("executed.txt", "w"))


def test_a_missing_head(folder):
    with refused("no head named 'nothing.pt'"):
        load("nothing.pt")


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_truncated_head(folder, size):
    (folder / "head.pt").write_bytes((PARITY / "head_spatial.pt").read_bytes()[:size])
    with refused("truncated|no PyTorch file|tensors and plain values"):
        load("head.pt")


def test_a_truncated_safetensors(folder):
    whole = folder / "whole.safetensors"
    heads = engine("heads")
    heads.save_head(heads.load_head(PARITY / "head_spatial.pt"), whole)
    (folder / "half.safetensors").write_bytes(whole.read_bytes()[:5000])
    with refused("truncated"):
        load("half.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_with_code_is_not_run(folder, zipped, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"aggregation_network": Payload()}, folder / "evil.pt")
    else:
        (folder / "evil.pt").write_bytes(pickle.dumps(Payload()))
    with refused("not opened|truncated"):
        load("evil.pt")
    assert not (tmp_path / "executed.txt").exists()


@pytest.mark.parametrize("name", ["../secret.pt", "..\\secret.pt", "{tmp}/secret.pt", "sub/../../secret.pt", ""])
def test_a_path_instead_of_a_name(folder, tmp_path, name):
    with refused("no head named"):
        load(name.format(tmp=tmp_path))


def test_a_head_in_a_subfolder_is_found(folder):
    (folder / "sd15").mkdir()
    shutil.copy(PARITY / "head_spatial.pt", folder / "sd15" / "pose.pt")
    import os

    assert load(os.path.join("sd15", "pose.pt")).spec.kind == "spatial"


def test_a_head_of_another_backbone(small):
    small.model = sdxl_model()
    with refused(r"trained on .*9 maps: 6x64, 3x32.* the model is .*9 maps: 3x128, 3x64, 3x32"):
        small.sample(small.target())
    with refused("trained on"):
        node("RG_ReadOut", model=small.model, head=small.head("spatial"), latent=small.latent, noise_percent=0.0, seed=0)


def test_an_sd15_head_on_sdxl_is_named(small):
    features = engine("features")
    sd15, sdxl = (1280,) * 6 + (640,) * 3 + (320,) * 3, (1280,) * 3 + (640,) * 3 + (320,) * 3
    backbone = features.Backbone(name="SDXL", taps=(), channels=sdxl, emb_tap="", emb_width=1280)
    with refused(r"trained on SD1.5 or SD2.x \(12 maps: 6x1280, 3x640, 3x320\), the model is SDXL \(9 maps"):
        features.check_head_fits(backbone, head_name="h", trained_on="unknown", feature_channels=sd15, emb_width=1280)


def test_an_unsupported_backbone(small):
    class Transformer(torch.nn.Module):
        pass

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.diffusion_model = Transformer()

    small.model = patcher(Model())
    with refused("Transformer, which can't be read out yet"):
        small.sample(small.target())


def test_a_control_of_another_batch_size(small):
    target = small.target(image=torch.rand(2, 16, 16, 3))
    latent = {"samples": torch.zeros(3, 4, 16, 16)}
    with refused("image .* batch of 2 but 3 pictures are being made"):
        small.sample(target, latent_image=latent)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_picture(small, value):
    image = small.control.clone()
    image[0, 3, 3, 1] = value
    with refused("NaN or infinite"):
        small.target(image=image)


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.7, 0.2)])
def test_start_after_end(small, start, end):
    with refused("not before end_percent"):
        small.target(start_percent=start, end_percent=end)
    import nodes

    message = nodes.NODE_CLASS_MAPPINGS["RG_ReadoutTarget"].validate_inputs(start_percent=start, end_percent=end)
    assert "not before end_percent" in message


def test_a_target_without_what_its_head_needs(small):
    with refused("needs a control picture"):
        small.target(image=None)
    with refused("needs drags"):
        small.target("correspondence")


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no list of drags"),
        ('{"version": 1}', "no list of drags"),
        ('{"version": 2, "drags": []}', "version 2"),
        ('{"version": 1, "drags": [{"from": [0, 0]}]}', "needs a 'from' and a 'to'"),
        ('{"version": 1, "drags": [{"from": [0, 0], "to": [0]}]}', "expected two numbers"),
        ('{"version": 1, "drags": [{"from": [0, "a"], "to": [0, 0]}]}', "expected two numbers"),
        ('{"version": 1, "drags": [{"from": [0, 1.01], "to": [0, 0]}]}', "outside the picture"),
        ('{"version": 1, "drags": [{"from": [0, 0], "to": [-0.1, 0]}]}', "outside the picture"),
        ('{"version": 1, "drags": [{"from": [0, NaN], "to": [0, 0]}]}', "outside the picture"),
    ],
)
def test_points_that_are_malformed_or_outside(points, message):
    import nodes

    with refused(message):
        node("RG_DragPoints", points=points)
    assert message in nodes.NODE_CLASS_MAPPINGS["RG_DragPoints"].validate_inputs(points=points)


def test_points_of_a_workflow_are_accepted():
    drags, preview = node("RG_DragPoints", points=json.dumps({"version": 1, "drags": [{"from": [0, 0], "to": [1, 1]}]}))
    assert len(drags.drags) == 1
    assert preview.shape == (1, 512, 512, 3)


@pytest.mark.parametrize(
    ("version", "too_old"), [("0.3.63", True), ("0.2.9", True), ("0.3.64", False), ("0.33.0", False), (None, False)]
)
def test_an_old_comfyui_is_told_what_is_needed(version, too_old, caplog):
    import sys

    from comfyui_host import package_name

    assert sys.modules[package_name()]._warn_if_too_old(version) is too_old
    assert ("needs ComfyUI 0.3.64 or later" in caplog.text) is too_old
