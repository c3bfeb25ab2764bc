"""Every adapter file of the kit, loaded onto real ComfyUI's UNet: the weights that its own tool means."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine
from oft_kit import FACTS, FOLDERS, KIT, ON_UNET, adapter, coft_eps, golden, model, network_output
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("comfyui")
PREFIX = "diffusion_model."


def fitted(folder: str, patcher, **options):
    return engine("comfy_host.adapters.apply").fit(adapter(folder, **options), patcher)


def weights(folder: str, patcher, strength: float = 1.0, **options) -> dict[str, torch.Tensor]:
    """Every weight with the adapter on it, as ComfyUI's ModelPatcher makes it, and the network's output."""
    on, _ = engine("comfy_host.adapters.apply").apply(fitted(folder, patcher, **options), patcher, None, strength, 0.0)
    on.patch_model()
    made = {key: value.clone() for key, value in on.model.state_dict().items()}
    made["out"] = network_output(on)
    on.unpatch_model()
    return made


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max())


def test_the_kit_is_whole():
    assert len(FOLDERS) >= 30


@pytest.mark.parametrize("folder", ON_UNET)
def test_weights_and_output_at_strength_1(folder):
    wanted, patcher = golden(folder), model()
    made = weights(folder, patcher)
    for key in (key for key in wanted if key.startswith("W.")):
        assert error(made[PREFIX + key.removeprefix("W.")], wanted[key]) < 2e-6, key
    assert error(made["out"], wanted["unet.out"]) < 1e-5
    assert error(network_output(patcher), load_file(KIT / "inputs.safetensors")["base.out"]) < 1e-5


@pytest.mark.parametrize("folder", [name for name in FOLDERS if "flux" in name])
def test_parts_of_fused_rows(folder):
    wanted, layers = golden(folder), adapter(folder).layers
    bases = [key.removeprefix("base.") for key in wanted if key.startswith("base.")]
    for key in bases:
        weight = wanted[f"base.{key}"].clone()
        for layer in (layer for layer in layers if layer.name == key.removesuffix(".weight").replace(".", "_")):
            rows = slice(layer.rotation.rows[0], sum(layer.rotation.rows))
            weight[rows] = layer.rotation.turn(weight[rows])
        assert error(weight, wanted[f"W.{key}"]) < 2e-6


@pytest.mark.parametrize("folder", [name for name in ON_UNET if name != "peft_0_13"])  # its R.KEY is recorded transposed
def test_rotations_are_in_one_convention(folder):
    wanted, turn = golden(folder), engine("adapters").turn
    found = {layer.place[0]: layer.rotation for layer in fitted(folder, model()).layers}
    for key in (key for key in wanted if key.startswith("R.")):
        rotation, theirs = found[PREFIX + key.removeprefix("R.")], wanted[key]
        ours = rotation.blocks()
        if rotation.is_butterfly:
            ours = turn(torch.eye(theirs.shape[-1]), ours, "out")[None]
        assert error(ours.expand_as(theirs), theirs) < 2e-6, key


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("strength", [0.5, 1.5, -1.0])
def test_every_strength_is_orthogonal(folder, strength):
    orthogonal = engine("adapters.orthogonal")
    for layer in adapter(folder).layers:
        assert orthogonal.orthogonality_error(layer.rotation.blocks(strength)) <= 1e-6, layer.key


@pytest.mark.parametrize("folder", [name for name in ON_UNET if any(key.startswith("S.") for key in golden(name))])
def test_recorded_strengths(folder):
    wanted, patcher = golden(folder), model()
    found = {layer.place[0]: layer.rotation for layer in fitted(folder, patcher).layers}
    state, orthogonal, turn = patcher.model.state_dict(), engine("adapters.orthogonal"), engine("adapters").turn
    for key in (key for key in wanted if key.startswith("S.")):
        _, whole, fraction, rule, name = key.split(".", 4)
        strength, weight, rotation = float(f"{whole}.{fraction}"), state[PREFIX + name], found[PREFIX + name]
        if rule == "cayley":
            assert error(rotation.turn(weight, strength), wanted[key]) < 2e-6
        if rule == "poly":
            blocks = orthogonal.neumann(strength * rotation.q, rotation.series)
            assert error(turn(weight, blocks, rotation.side), wanted[key]) < 2e-6


@pytest.mark.parametrize("folder", ON_UNET)
def test_strength_0_is_the_model_itself(folder):
    patcher = model()
    on, _ = engine("comfy_host.adapters.apply").apply(fitted(folder, patcher), patcher, None, 0.0, 0.0)
    assert on.patches == {}
    assert torch.equal(network_output(on), network_output(patcher))


@pytest.mark.parametrize("folder", [name for name in ON_UNET if any(key.startswith("Wplain.") for key in golden(name))])
def test_coft_left_out(folder):
    """Without coft_eps, a file that does not say that it is COFT is read as plain OFT."""
    if "t2i" in folder:
        pytest.skip("oft-t2i's files say it themselves")
    wanted, made = golden(folder), weights(folder, model(), eps=0.0)
    for key in (key for key in wanted if key.startswith("Wplain.")):
        assert error(made[PREFIX + key.removeprefix("Wplain.")], wanted[key]) < 2e-6
    assert bool(adapter(folder, eps=0.0).notes) == (coft_eps(folder) > 0 or folder.startswith("authors"))


@pytest.mark.parametrize("folder", [name for name in ON_UNET if FACTS[name].get("energy")])
def test_energy_as_recorded(folder):
    """The authors' figures, and that side in keeps the rows' energy, side out the columns'."""
    energy, patcher, wanted = engine("adapters.energy").hyperspherical_energy, model(), golden(folder)
    state, facts = patcher.model.state_dict(), FACTS[folder]
    for key, told in facts["energy"].items():
        before, after = state[PREFIX + key], wanted[f"W.{key}"]
        for side, name in (("rows", "rows"), ("columns", "cols")):
            assert energy(before, side, half_space=True) == pytest.approx(told[f"{name}_before"], abs=1e-6)
            assert energy(after, side, half_space=True) == pytest.approx(told[f"{name}_after"], abs=1e-6)
        kept = {"in": "rows", "out": "columns"}[facts["side"]]
        orthogonal = facts["orthogonality_error"] < 1e-5 and "conv" not in folder and "rescaled" not in folder
        if orthogonal:
            assert abs(energy(after, kept) - energy(before, kept)) < 1e-6
