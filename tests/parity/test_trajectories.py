"""The paper's own runs, reproduced through the nodes in real ComfyUI (reference mode)."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from comfyui_host import engine, node
from safetensors.torch import load_file
from small_models import PARITY, parity_model

pytestmark = pytest.mark.usefixtures("comfyui")


@pytest.fixture
def golden() -> dict[str, torch.Tensor]:
    return load_file(PARITY / "golden.safetensors")


@pytest.fixture
def heads(tmp_path):
    """The kit's heads in a model folder of their own, by name."""
    import folder_paths

    for path in PARITY.glob("head_*.pt"):
        shutil.copy(path, tmp_path)
    folder = engine("comfy_host.folders").FOLDER
    folder_paths.add_model_folder_path(folder, str(tmp_path))
    yield lambda name: node("RG_LoadReadoutHead", head_name=f"head_{name}.pt", kind="auto")
    folder_paths.folder_names_and_paths[folder][0].remove(str(tmp_path))
    folder_paths.filename_list_cache.pop(folder, None)


def sample(golden, run: str, target, cfg: float, noise=None, **settings) -> torch.Tensor:
    """The end of a guided run on the kit's sigmas, as z (1, 4, 16, 16)."""
    import comfy.samplers
    from comfy.k_diffusion import sampling

    def conditioning(name):
        return [[golden[f"{run}.{name}"], {}]]

    sigmas, z_start = golden[f"{run}.sigmas"], golden[f"{run}.z_start"]
    options = {}
    if noise is not None:
        at = {round(float(s), 4): noise[i] for i, s in enumerate(sigmas[:-1])}
        options["noise_sampler"] = lambda sigma, _next: at[round(float(sigma), 4)]
    function = sampling.sample_euler if noise is None else sampling.sample_euler_ancestral
    guider = node(
        "RG_ReadoutGuider", model=parity_model(), positive=conditioning("cond"), negative=conditioning("uncond"), cfg=cfg,
        target=target, **{"strength": 1.0, "mode": "reference", "iterations": 1, "source_cfg": -1.0, **settings},
    )  # fmt: skip
    x_start = z_start * (1 + sigmas[0] ** 2).sqrt()
    out = guider.sample(
        x_start / sigmas[0], torch.zeros_like(z_start), comfy.samplers.KSAMPLER(function, options), sigmas, seed=0
    )
    x = guider.model_patcher.model.process_latent_in(out)
    return x / (1 + sigmas[-1] ** 2).sqrt()


def relative_to_effect(ours, golden, run) -> float:
    source, guided = golden[f"{run}.z"][-1]
    return float((ours[0] - guided).norm() / (guided - source).norm())


def test_spatial_trajectory_with_ancestral_noise(golden, heads):
    target = node(
        "RG_ReadoutTarget", head=heads("spatial"), weight=0.5, start_percent=0.0, end_percent=0.5,
        image=(golden["spatial.control"] + 0.5).permute(1, 2, 0)[None],
    )  # fmt: skip
    ours = sample(golden, "spatial", target, 7.5, noise=golden["spatial.noise"])
    assert relative_to_effect(ours, golden, "spatial") < 0.1


def test_spatial_trajectory_of_two_iterations_in_the_middle(golden, heads):
    target = node(
        "RG_ReadoutTarget", head=heads("spatial"), weight=0.5, start_percent=0.25, end_percent=0.75,
        image=(golden["spatial.control"] + 0.5).permute(1, 2, 0)[None],
    )  # fmt: skip
    ours = sample(golden, "spatial2", target, 5.0, iterations=2)
    assert relative_to_effect(ours, golden, "spatial2") < 0.1


def test_drag_trajectory(golden, heads):
    starts, ends = golden["drag.points"]
    drags = [
        {"from": [(float(c0) + 0.5) / 16, (float(r0) + 0.5) / 16], "to": [(float(c1) + 0.5) / 16, (float(r1) + 0.5) / 16]}
        for (r0, c0), (r1, c1) in zip(starts, ends, strict=True)
    ]
    points, _ = node("RG_DragPoints", points=json.dumps({"version": 1, "drags": drags}))
    look = node("RG_ReadoutTarget", head=heads("appearance"), weight=1.0, start_percent=0.0, end_percent=0.5)
    target = node(
        "RG_ReadoutTarget", head=heads("correspondence"), weight=1.0, start_percent=0.0, end_percent=0.5,
        drag_points=points, previous=look,
    )  # fmt: skip
    ours = sample(golden, "drag", target, 3.5, source_cfg=1.0)
    assert relative_to_effect(ours, golden, "drag") < 0.1
