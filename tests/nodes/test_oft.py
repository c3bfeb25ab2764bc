"""Load OFT: an adapter on a loaded model, wherever its weights are."""

from __future__ import annotations

import shutil

import pytest
import torch
from comfyui_host import engine, node
from oft_kit import KIT, adapter, golden, kit_file, model, network_output
from safetensors.torch import load_file, save_file
from small_models import PARITY

pytestmark = pytest.mark.usefixtures("comfyui")
SIDES = ["authors_db_oft", "peft_cayley", "lycoris_boft_rescaled", "kohya_sdxl_names"]


@pytest.fixture
def folder(tmp_path):
    """A models/oft of ComfyUI's, for this test only; a secret lies beside it."""
    import folder_paths

    home = tmp_path / "oft"
    home.mkdir()
    shutil.copy(kit_file("peft_cayley"), tmp_path / "secret.safetensors")
    folder_paths.add_model_folder_path("oft", str(home))
    yield home
    folder_paths.folder_names_and_paths["oft"][0].remove(str(home))
    folder_paths.filename_list_cache.pop("oft", None)


def put(folder, name: str) -> str:
    """A file of the kit into models/oft, with PEFT's settings beside it; its name in the list."""
    shutil.copytree(KIT / name, folder / name)
    return str((folder / name / kit_file(name).name).relative_to(folder))


def load(patcher, file: str = "none", strength: float = 1.0, **inputs):
    """MODEL, CLIP, OFT, report, CONTROL_NET."""
    return node("RG_LoadOFT", model=patcher, file=file, strength=strength, **inputs)


def refused(match: str):
    return pytest.raises(engine("errors").AdapterError, match=match)


def error(ours, theirs) -> float:
    return float((ours - theirs).abs().max())


def patched_output(patcher, **how) -> torch.Tensor:
    """The network's output with the patches in force, and the model as before afterwards."""
    patcher.patch_model(**how)
    out = network_output(patcher)
    patcher.unpatch_model()
    return out


@pytest.mark.parametrize("name", SIDES)
def test_a_file_by_its_name(folder, name):
    patcher = model()
    before = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    turned, clip, oft, report, control = load(patcher, put(folder, name))
    assert error(patched_output(turned), golden(name)["unet.out"]) < 1e-5
    assert (clip, control) == (None, None)
    assert f"{len(oft.layers)} of {len(oft.layers)} layers" in report
    after = patcher.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert patcher.patches == {}


def test_the_report_says_which_energy_is_kept(folder):
    def drifts(report: str) -> tuple[float, float]:
        line = next(line for line in report.splitlines() if line.startswith("energy"))
        rows, columns = line.split("drift ")[1:]
        return float(rows.split(";")[0]), float(columns)

    rows, columns = drifts(load(model(), put(folder, "authors_db_oft"))[3])
    assert rows < 1e-6 < 1e-5 < columns
    rows, columns = drifts(load(model(), put(folder, "lycoris_diag"))[3])
    assert columns < 1e-6 < 1e-5 < rows


@pytest.mark.parametrize("name", SIDES)
def test_low_vram(name):
    """Layers are patched when they run."""
    turned = load(model(), oft=adapter(name))[0]
    turned.patch_model(lowvram_model_memory=1)
    patched = [m for m in turned.model.modules() if getattr(m, "weight_function", None)]
    assert patched
    assert error(network_output(turned), golden(name)["unet.out"]) < 1e-5
    turned.unpatch_model()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_cast_weights_in_low_vram_are_turned_in_fp32(dtype):
    """As the rotation of the weights that are stored, to what the compute dtype keeps of them."""
    patcher = model(dtype)
    turned = load(patcher, oft=adapter("authors_db_oft"))[0]
    turned.patch_model(lowvram_model_memory=1)
    out = network_output(turned)
    turned.unpatch_model()
    exact = model()
    exact.model.diffusion_model.load_state_dict(
        {key: value.float() for key, value in patcher.model.diffusion_model.state_dict().items()}
    )
    wanted = patched_output(load(exact, oft=adapter("authors_db_oft"))[0])
    assert error(out, wanted) < 1e-4


def test_fp8_patched_in_place_rounds_once_more():
    patcher = model(torch.float8_e4m3fn)
    turned = load(patcher, oft=adapter("authors_db_oft"))[0]
    plain, low = network_output(patcher), None
    turned.patch_model(lowvram_model_memory=1)
    low = network_output(turned)
    turned.unpatch_model()
    whole = patched_output(turned)
    assert float((whole - low).norm() / (low - plain).norm()) < 0.1


def test_a_part_of_a_fused_weight_is_turned_in_place():
    patch, adapters = engine("comfy_host.adapters.patch"), engine("adapters")
    import comfy.lora

    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, 4, generator=generator)
    rotation = adapters.Rotation(q=a - a.mT, side="out")
    fused = torch.randn(24, 6, generator=generator)
    key = "qkv.weight"
    patches = [(1.0, patch.RotationPatch.of(rotation, 1.0, key), 1.0, (0, 8, 8), None)]
    made = comfy.lora.calculate_weight(patches, fused.clone(), key)
    assert torch.equal(made[:8], fused[:8])
    assert torch.equal(made[16:], fused[16:])
    assert error(made[8:16], rotation.turn(fused[8:16])) < 1e-6


def test_it_is_made_anew_from_copies_of_its_weights():
    patch = engine("comfy_host.adapters.patch").RotationPatch
    rotation, weight = adapter("lycoris_diag").layers[2].rotation, torch.randn(32, 32)
    made = patch.of(rotation, 1.0, "w")
    again = type(made)(made.loaded_keys, made.weights)
    assert torch.equal(again.calculate_weight(weight.clone(), "w", 0.5), made.calculate_weight(weight.clone(), "w", 0.5))


def test_a_hook_scales_the_strength():
    import comfy.hooks

    patcher, name = model(), "peft_cayley"
    apply, patch = engine("comfy_host.adapters.apply"), engine("comfy_host.adapters.patch")
    found = apply.fit(adapter(name), patcher)
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    turned = patcher.clone()
    patches = {layer.place[0]: patch.RotationPatch.of(layer.rotation, 1.0, "") for layer in found.layers}
    turned.add_hook_patches(hook=hook, patches=patches, strength_patch=0.5)
    turned.patch_model()
    turned.patch_hooks(group)
    layer = found.layers[0]
    weight = turned.model.state_dict()[layer.place[0]].clone()
    turned.unpatch_hooks()
    turned.unpatch_model()
    assert error(weight, layer.rotation.turn(patcher.model.state_dict()[layer.place[0]], 0.5)) < 1e-6


def test_beside_a_lora_in_the_order_of_the_graph():
    """LoRA then OFT turns the LoRA as well."""
    patcher = model()
    layer = engine("comfy_host.adapters.apply").fit(adapter("peft_cayley"), patcher).layers[0]
    key, weight = layer.place[0], patcher.model.state_dict()[layer.place[0]]
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    def made(*steps):
        on = patcher
        for step in steps:
            on = step(on)
        on.patch_model()
        weight = on.model.state_dict()[key].clone()
        on.unpatch_model()
        return weight

    def lora(on):
        on = on.clone()
        on.add_patches({key: ("diff", (delta,))})
        return on

    def oft(on):
        return load(on, oft=adapter("peft_cayley"))[0]

    assert error(made(lora, oft), layer.rotation.turn(weight + delta)) < 1e-6
    assert error(made(oft, lora), layer.rotation.turn(weight) + delta) < 1e-6
    assert "patched before" in load(lora(patcher), oft=adapter("peft_cayley"))[3]
    assert "patched before" not in load(patcher, oft=adapter("peft_cayley"))[3]


def test_two_adapters_are_a_product_and_a_way_back_is_one():
    patcher, oft = model(), adapter("authors_db_oft")
    there = load(patcher, oft=oft)[0]
    back = load(there, oft=oft, strength=-1.0)[0]
    assert error(patched_output(back), network_output(patcher)) < 1e-5


def test_strength_0_is_bit_identical():
    patcher = model()
    turned = load(patcher, oft=adapter("comfyui_trained"), strength=0.0)[0]
    assert turned.patches == {}
    assert torch.equal(patched_output(turned), network_output(patcher))


def test_a_saved_checkpoint_holds_the_turned_weights(tmp_path):
    import comfy.sd

    turned = load(model(), oft=adapter("lycoris_diag"))[0]
    comfy.sd.save_checkpoint(str(tmp_path / "merged.safetensors"), turned)
    saved, wanted = load_file(tmp_path / "merged.safetensors"), golden("lycoris_diag")
    for key in (key.removeprefix("W.") for key in wanted if key.startswith("W.")):
        assert error(saved[f"model.diffusion_model.{key}"], wanted[f"W.{key}"]) < 2e-6


def test_a_polynomial_may_be_made_orthogonal():
    orthogonal = engine("adapters.orthogonal")
    as_file, exact = load(model(), oft=adapter("peft_neumann")), load(model(), oft=adapter("peft_neumann"), orthogonal=True)
    assert "a polynomial" in as_file[3]
    assert "a polynomial" not in exact[3]
    layers = engine("comfy_host.adapters.apply").fit(exact[2], model()).layers
    assert max(orthogonal.orthogonality_error(layer.rotation.blocks()) for layer in layers) < 1e-6


def test_a_control_checkpoint_gives_a_control_net(folder):
    name = "authors_control_oft"
    patcher, wanted = model(), golden(name)
    turned, _, _, report, control = load(patcher, put(folder, name))
    assert "hint network" in report
    picture = wanted["hint"].movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)  # each cell is 8 px
    control = control.copy().set_cond_hint(picture.movedim(-1, 1), 1.0, (0.0, 1.0))
    given = load_file(KIT / "inputs.safetensors")
    x = given["x"]
    features = control.get_control(x, torch.ones(2), {}, 1, {})
    features_error = error(features["input"][0], wanted["hint_features"])
    assert features_error < 1e-5 * float(wanted["hint_features"].abs().max())
    turned.patch_model()
    network = turned.model.diffusion_model
    out = network(
        x, given["timestep"].expand(2), context=given["context"], control={k: list(v) for k, v in features.items()}
    )
    turned.unpatch_model()
    assert error(out, wanted["unet.out_with_hint"]) < 1e-5


def test_control_by_oft_samples_with_apply_controlnet(small):
    """In its percents, at its strength, for both prompts, beside the adapter's model."""
    import nodes

    oft = adapter("authors_control_oft")
    hint = {key: tensor * (1e-4 if key.startswith("14.") else 1.0) for key, tensor in oft.hint.items()}
    oft = engine("adapters").Adapter(layout=oft.layout, layers=oft.layers, hint=hint)
    turned, _, _, _, control = load(model(), oft=oft)
    picture = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(2))

    def sampled(strength: float, end: float = 1.0) -> torch.Tensor:
        conds = nodes.ControlNetApplyAdvanced().apply_controlnet(
            small.positive, small.negative, control, picture, strength, 0.0, end
        )
        return small.plain(model=turned, positive=conds[0], negative=conds[1])

    plain = small.plain(model=turned)
    assert torch.equal(sampled(0.0), plain)
    whole, half, early = sampled(1.0), sampled(0.5), sampled(1.0, end=0.3)
    assert torch.isfinite(whole).all()
    for other in (plain, half, early):
        assert error(whole, other) > 1e-3


def test_the_text_encoder_is_turned_with_its_own_strength():
    import comfy.model_patcher

    adapters = engine("adapters")
    a = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    rotation = adapters.Rotation(q=a - a.mT, side="out")
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    text_encoder = torch.nn.Module()
    at = text_encoder
    for part in f"clip_l.transformer.{name}".split(".")[:-1]:
        at.add_module(part, torch.nn.Module())
        at = at._modules[part]
    at.add_module("q_proj", torch.nn.Linear(16, 32, bias=False))

    class Clip:
        cond_stage_model = text_encoder

        def __init__(self):
            self.patcher = comfy.model_patcher.ModelPatcher(text_encoder, torch.device("cpu"), torch.device("cpu"))

        def clone(self):
            return Clip()

    key = "lora_te_" + name.replace(".", "_")
    unet = adapter("lycoris_diag_loraunet").layers
    oft = adapters.Adapter(layout="LyCORIS", layers=(*unet, adapters.Layer(key=key, rotation=rotation)))
    _, clip, _, report, _ = load(model(), oft=oft, clip=Clip(), strength_clip=0.5)
    assert "(1 of the text encoder)" in report
    ((weight_key, patches),) = clip.patcher.patches.items()
    weight = text_encoder.state_dict()[weight_key]
    made = patches[0][1].calculate_weight(weight.clone(), weight_key, patches[0][0])
    assert error(made, rotation.turn(weight, 0.5)) < 1e-6
    assert key in load(model(), oft=oft)[3]  # without clip: told that it is not used


# Bad input (section 8 of the design): an error that says what is wrong, and the model as it was.


def test_a_lora(folder):
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2), "lora_unet_x.lora_down.weight": torch.zeros(2, 2)},
              folder / "lora.safetensors")  # fmt: skip
    with refused("no orthogonal adapter.*use Load LoRA"):
        load(model(), "lora.safetensors")


@pytest.mark.parametrize("size", [0, 100, 5_000])
@pytest.mark.parametrize("name", ["authors_db_oft", "lycoris_diag"])
def test_a_truncated_file(folder, name, size):
    path = folder / put(folder, name)
    path.write_bytes(path.read_bytes()[:size])
    with refused("truncated"):
        load(model(), str(path.relative_to(folder)))


class Payload:
    def __reduce__(self):
        return (open, ("executed.txt", "w"))


def test_code_in_a_file_is_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a.processor.to_q_oft.R": Payload()}, folder / "evil.bin")
    with refused("may be code"):
        load(model(), "evil.bin")
    assert not (tmp_path / "executed.txt").exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "..\\secret.safetensors", "{tmp}/secret.safetensors", "nothing.bin"]
)
def test_a_path_instead_of_a_name(folder, tmp_path, name):
    with refused("no adapter named"):
        load(model(), name.format(tmp=tmp_path))


def test_neither_a_file_nor_an_adapter():
    with refused("choose a file"):
        load(model())


def changed(folder, name: str, change) -> str:
    """A file of the kit with its tensors changed; its name in the list."""
    tensors = load_file(kit_file(name))
    change(tensors)
    put(folder, name)
    save_file(tensors, folder / name / kit_file(name).name)
    return f"{name}/{kit_file(name).name}"


def test_two_layouts_in_one_file(folder):
    def add(tensors):
        tensors["oft_unet_x.oft_blocks"] = torch.zeros(2, 2, 2)

    with refused("two layouts"):
        load(model(), changed(folder, "lycoris_diag", add))


@pytest.mark.parametrize("flag", ["clipped_oft", "cans_oft", "dora_log_multiplier", "dora_scale"])
def test_flags_that_change_what_the_numbers_mean(folder, flag):
    def add(tensors):
        base = next(key for key in tensors if key.endswith(".oft_R.weight")).removesuffix(".weight")
        tensors[f"{base}.{flag}" if "oft" in flag else f"{base.removesuffix('.oft_R')}.{flag}"] = torch.tensor(1.0)

    with refused(f"does not explain.*{flag}"):
        load(model(), changed(folder, "onetrainer_oft2", add))


def test_peft_without_its_settings(folder):
    shutil.copy(kit_file("peft_neumann"), folder / "alone.safetensors")
    with refused("adapter_config.json is not beside it.*convention"):
        load(model(), "alone.safetensors")
    turned = load(model(), "alone.safetensors", convention="neumann")[0]
    assert error(patched_output(turned), golden("peft_neumann")["unet.out"]) < 1e-5


def test_settings_of_another_method(folder):
    file = put(folder, "peft_cayley")
    (folder / "peft_cayley" / "adapter_config.json").write_text('{"peft_type": "BOFT"}')
    with refused("BOFT"):
        load(model(), file)


def spoil(value):
    def change(tensors):
        key = next(key for key in tensors if key.endswith((".oft_blocks", ".oft_R.weight")))
        tensors[key] = value(tensors[key])

    return change


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("lycoris_diag", lambda t: t * torch.nan, "NaN or infinite"),
        ("lycoris_diag", lambda t: t * 1e4, r"\|Q\| is .*more than 100"),
        ("lycoris_diag", lambda t: t[:, :-1].contiguous(), "expected square blocks"),
        ("lycoris_diag", lambda t: t[:-1].contiguous(), "7 blocks of 4 for 32 outputs"),
        ("onetrainer_oft2", lambda t: t[:, :-1].contiguous(), "a triangle"),
        ("onetrainer_oft2", lambda t: torch.cat([t, t]), "blocks of 8 for .* inputs"),
        ("lycoris_boft", lambda t: t[..., :-1, :-1].contiguous(), "b must be even"),
        ("lycoris_boft", lambda t: torch.cat([t, t, t]), "butterfly stages"),
    ],
)
def test_numbers_that_can_not_be(folder, name, value, match):
    patcher = model()
    with refused(match):
        load(patcher, changed(folder, name, spoil(value)))
    assert patcher.patches == {}


def test_a_layer_that_is_there_twice():
    oft = adapter("lycoris_diag")
    twice = engine("adapters").Adapter(layout=oft.layout, layers=(*oft.layers, oft.layers[0]))
    with refused("two layers of the file turn"):
        load(model(), oft=twice)


def test_another_kind_of_model(folder):
    from small_models import sdxl_model

    with refused("trained on another kind of model|none of its"):
        load(sdxl_model(), put(folder, "authors_db_oft"))


def test_a_flux_adapter_on_a_unet(folder):
    with refused("Flux, and this is none"):
        load(model(), put(folder, "kohya_flux_toy"))


def test_a_part_that_is_not_in_the_model_is_told(folder):
    def rename(tensors):
        for key in [key for key in tensors if "mid_block" in key]:
            tensors[key.replace("mid_block", "other_block")] = tensors.pop(key)

    report = load(model(), changed(folder, "lycoris_diag", rename))[3]
    assert "not used, not in this model" in report
    assert "other_block" in report


def test_a_number_that_does_not_count_is_told(folder):
    assert "coft_eps 0.1 is not used" in load(model(), put(folder, "lycoris_diag"), coft_eps=0.1)[3]
    assert "coft_eps 0.1 is not used" in load(model(), put(folder, "authors_t2i_coft"), coft_eps=0.1)[3]


def test_a_convolution_of_the_authors_needs_eps(folder):
    with refused("give coft_eps"):
        load(model(), put(folder, "authors_control_conv"))


def test_the_kit_of_this_repository_is_complete():
    assert {path.name for path in (PARITY / "oft").iterdir() if path.is_dir()} >= set(SIDES)


def test_weights_packed_in_an_unknown_way_are_named(folder):
    """As 4-bit layers of packs keep them: bytes, which no shape tells."""
    patcher = model()
    name = put(folder, "peft_cayley")
    key = next(iter(load(patcher, name)[0].patches))
    layer, parameter = key.removeprefix("diffusion_model.").rpartition(".")[::2]
    module = patcher.model.diffusion_model.get_submodule(layer)
    whole = module.weight
    packed = torch.zeros(whole.numel() // 2, 1, dtype=torch.uint8)
    setattr(module, parameter, torch.nn.Parameter(packed, requires_grad=False))
    with refused(rf"{layer}.*quantised in a way that is not known"):
        load(patcher, name)
    assert not patcher.patches
    setattr(module, parameter, whole)
