"""BoundaryDiffusion's own figures through the nodes: fit, edit, and the statistic by which it chooses a mixing step."""

from __future__ import annotations

import pytest
from boundary_kit import golden, relative, settings
from comfyui_host import engine, node
from small_models import parity_model

pytestmark = pytest.mark.usefixtures("comfyui")
SCALE = 0.18215  # of ComfyUI's latents of this model


def positive():
    return [[golden()["ctx"], {}]]


def fitted(model, **inputs):
    facts = settings()["settings"]
    count = facts["n_train"]
    labels = " ".join(str(int(label)) for label in golden()["inv.labels"][:count])
    given = {
        "space": "both", "mixing_step": facts["t_0"], "steps": facts["n_inv"], "solver": "svm", "held_out": 0.0, **inputs
    }  # fmt: skip
    pictures = {"samples": golden()["inv.x0"][:count] / SCALE}
    return node("RG_FitBoundary", model=model, having=pictures, labels=labels, positive=positive(), **given)


def test_fit_and_edit():
    model, facts = parity_model(), settings()
    boundary, report, _, _ = fitted(model)
    for part in boundary.parts:
        normal = part.normal.flatten().double()
        assert float(normal @ golden()[f"fit.{part.space}.n"].double()) >= 0.9999
        tight = golden()[f"fit.{part.space}.coef_tight"]
        assert relative(normal, tight / tight.norm()) < 1e-4
    assert f"norm {float(golden()['inv.up_norms'][: facts['settings']['n_train'], -1].mean()):.1f}" in report
    count = facts["settings"]["n_train"]
    made, _, _ = node(
        "RG_BoundaryEdit", model=model, boundary=boundary, latent={"samples": golden()["inv.x0"][count : count + 1] / SCALE},
        positive=positive(), strength=1.0, move="distance", cfg=1.0, eta=0.0, seed=0,
        strengths=", ".join(str(each) for each in facts["d"]),
    )  # fmt: skip
    theirs = golden()["edit_eta0.z"][:, -1]  # with a normal that is 5e-4 off the optimum
    for ours, wanted in zip(made["samples"] * SCALE, theirs, strict=True):
        assert float((ours - wanted).norm() / (wanted - golden()["edit.unedited"][-1]).norm()) < 1e-2
    assert relative(made["samples"] * SCALE, theirs) < 1e-3
    one, _, _ = node(
        "RG_BoundaryEdit", model=model, boundary=boundary, latent={"samples": golden()["inv.x0"][count : count + 1] / SCALE},
        positive=positive(), strength=1.0, move="distance", cfg=1.0, eta=0.0, seed=0, distance=facts["d"][0],
    )  # fmt: skip
    assert relative(one["samples"], made["samples"][:1]) < 1e-4


def test_norms_of_latents_on_their_way_from_noise():
    measure, passes = engine("comfy_host.edits.boundary_measure"), engine("comfy_host.edits.passes")
    steps = sorted(settings()["settings"]["radius_at"])[1:]  # the way to the last takes long
    found = measure.radii_from(parity_model(), golden()["radius.z_T"], steps, 999, passes.Prompts(positive=positive()))
    for step in steps:
        assert found[step] == pytest.approx(float(golden()[f"radius.sampled_at_{step}"].mean()), rel=1e-4)
        assert found[step] == pytest.approx(settings()["radius_mean"][str(step)], rel=1e-4)
