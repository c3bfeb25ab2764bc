"""Inversion, edits and sampling of BoundaryDiffusion's own code, in real ComfyUI."""

from __future__ import annotations

import pytest
import torch
from boundary_kit import golden, relative, settings
from comfyui_host import engine
from small_models import parity_model

pytestmark = pytest.mark.usefixtures("comfyui")


def passes():
    return engine("comfy_host.edits.passes")


def prompts():
    return passes().Prompts(positive=[[golden()["ctx"], {}]])


def as_latent(z: torch.Tensor) -> torch.Tensor:
    """What ComfyUI's latent of this model is, of the network's scale."""
    return z / 0.18215


def timesteps() -> list[int]:
    facts = settings()["settings"]
    found = engine("comfy_host.edits.levels").timesteps_up_to(facts["t_0"], facts["n_inv"])
    assert found == settings()["seq_inv"]
    return found


def invert(rows: slice, keep=None):
    model = parity_model()
    return model, passes().go_up(
        model, as_latent(golden()["inv.x0"][rows]), timesteps(), prompts(), keep=keep or timesteps()[-1:],
        path="middle_block.2",
    )  # fmt: skip


def boundary(space: str, **normals):
    """Of the kit's normals."""
    module = engine("boundaries")
    facts = settings()
    parts = []
    for each in {"both": "zh"}.get(space, space):
        normal = normals.get(each, golden()[f"fit.{each}.n"])
        shape = facts[f"{each}_shape"]
        parts.append(module.Part(space=each, normal=normal.view(shape).float(), middle=0.0, gap=1.0))
    return module.Boundary(
        parts=tuple(parts), mixing_step=facts["settings"]["t_0"], steps=facts["settings"]["n_inv"],
        network=engine("comfy_host.edits.boundary_edit").network_of(parity_model()), latent_shape=tuple(facts["z_shape"]),
        prompt=engine("comfy_host.edits.boundary_edit").prompt_digest([[golden()["ctx"], {}]]),
    )  # fmt: skip


def test_inversion_and_what_is_read_on_the_way():
    _, states = invert(slice(0, 1), keep=timesteps()[1:])
    assert [state.timestep for state in states] == golden()["inv.up_t"][:, 1].tolist()
    for i, state in enumerate(states):
        assert relative(state.z, golden()["inv.up_z"][i : i + 1]) < 1e-4
        assert relative(state.h, golden()["inv.up_h"][i : i + 1]) < 1e-4
        norm = engine("boundaries").mean_norm(state.z)
        assert norm == pytest.approx(float(golden()["inv.up_norms"][0, i]), rel=1e-4)


def test_every_picture_and_its_way_back():
    model, (state,) = invert(slice(None))
    assert relative(state.z, golden()["inv.z"]) < 1e-4
    assert relative(state.h, golden()["inv.h"]) < 1e-4
    back, _ = passes().go_down(model, state, timesteps()[::-1], prompts())
    assert relative(back * 0.18215, golden()["inv.reconstruction"]) < 1e-4


def of_effect(ours, theirs):
    """The difference of final latents, as a part of what the edit does."""
    return float((ours * 0.18215 - theirs).norm() / (theirs - golden()["edit.unedited"][-1:]).norm())


def picture():
    count = settings()["settings"]["n_train"]
    return {"samples": as_latent(golden()["inv.x0"][count : count + 1])}


def edited(space, *, eta=0.0, stale=True, latent=None, **more):
    edit = engine("comfy_host.edits.boundary_edit")
    out, _ = edit.edit_pictures(
        parity_model(), edit.Edit(boundary=boundary(space, **more.pop("normals", {})), strength=0.0, move="distance"),
        latent or picture(), edit.EditSettings(strengths=tuple(settings()["d"]), eta=eta, stale=stale, **more), prompts(),
    )  # fmt: skip
    return out["samples"]


@pytest.mark.parametrize(
    ("space", "stale", "key", "most"),
    [
        ("both", True, "edit_eta0.z", 1e-2), ("z", True, "zonly.z", 1e-2), ("h", True, "honly.final", 5e-2),
        ("h", False, "hfirst.final", 5e-2), ("both", False, "zh_first.final", 1e-2),
    ],
)  # fmt: skip
def test_edits_without_noise(space, stale, key, most):
    theirs = golden()[key]
    theirs = theirs[:, -1] if theirs.ndim == 5 else theirs
    ours = edited(space, stale=stale)
    for each, wanted in zip(ours, theirs, strict=True):
        assert of_effect(each[None], wanted[None]) < most
    if space != "h":
        assert relative(ours * 0.18215, theirs) < 1e-4


@pytest.fixture
def recorded_noise(monkeypatch):
    """The noise of their runs, in place of a seed's."""

    def use(noise: torch.Tensor) -> None:  # (versions, steps, C, h, w)
        count = iter(range(noise.shape[1]))
        monkeypatch.setattr(passes().SharedNoise, "draw", lambda *_: noise[:, next(count)])

    return use


def test_edits_with_their_noise(recorded_noise):
    recorded_noise(golden()["edit.noise"])
    ours, theirs = edited("both", eta=1.0), golden()["edit.z"][:, -1]
    for each, wanted in zip(ours, theirs, strict=True):
        assert of_effect(each[None], wanted[None]) < 1e-2


def test_a_picture_that_is_sampled(recorded_noise, monkeypatch):
    """Their unconditional edit leaves h's normal at its own length."""
    import comfy.sample

    recorded_noise(golden()["uncond.noise"])
    monkeypatch.setattr(comfy.sample, "prepare_noise", lambda *_: golden()["uncond.z_T"])
    ours = edited(
        "both", eta=1.0, latent={"samples": torch.zeros(1, *settings()["z_shape"])}, noise_steps=999,
        normals={"h": golden()["fit.h.coef"]},
    )  # fmt: skip
    assert relative(ours * 0.18215, golden()["uncond.final"]) < 1e-4
