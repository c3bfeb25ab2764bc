"""CLIP's losses through ComfyUI's own CLIP and CLIP Vision, small and with random weights; what does not fit is refused."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node

WIDTH = 24
TEXT = {
    "architectures": ["CLIPTextModel"], "bos_token_id": 0, "eos_token_id": 49407, "hidden_act": "quick_gelu",
    "hidden_size": WIDTH, "intermediate_size": 48, "layer_norm_eps": 1e-5, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 2, "num_hidden_layers": 3, "pad_token_id": 1,
    "projection_dim": WIDTH, "vocab_size": 49408,
}  # fmt: skip
VISION = {
    "hidden_act": "quick_gelu", "hidden_size": 32, "image_size": 28, "intermediate_size": 48, "layer_norm_eps": 1e-5,
    "model_type": "clip_vision_model", "num_attention_heads": 2, "num_channels": 3, "num_hidden_layers": 3,
    "patch_size": 7, "projection_dim": WIDTH,
}  # fmt: skip


def fill(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        wide = parameter.ndim > 1
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if wide else 0.1) + (0 if wide else 0.5))


@pytest.fixture
def pair(comfyui, tmp_path):
    """clip, and vision(**config), made as ComfyUI makes them."""
    import comfy.clip_vision
    import comfy.sd
    import comfy.sd1_clip

    class Target:
        params: dict = {}
        tokenizer = comfy.sd1_clip.SD1Tokenizer
        clip = functools.partial(
            comfy.sd1_clip.SD1ClipModel,
            clip_model=functools.partial(
                comfy.sd1_clip.SDClipModel, textmodel_json_config=TEXT, return_projected_pooled=False
            ),
        )

    def vision(**changed):
        path = tmp_path / "vision.json"
        config = {key: value for key, value in {**VISION, **changed}.items() if value is not None}
        path.write_text(json.dumps(config))
        made = comfy.clip_vision.ClipVisionModel(path)
        fill(made.model, seed=1)
        return made

    clip = comfy.sd.CLIP(Target)
    fill(clip.cond_stage_model, seed=2)
    return SimpleNamespace(clip=clip, vision=vision)


def loss(vision, **inputs):
    return node("RG_ClipLoss", clip_vision=vision, weight=1.0, **inputs)


def refused(match):
    return pytest.raises(engine("errors").OptimizationError, match=match)


def test_the_text_is_projected_into_the_pictures_space(pair):
    found = loss(pair.vision(), clip=pair.clip, text="a red ball").measure.wanted
    tokens = pair.clip.tokenize("a red ball")["l"]
    encoder = pair.clip.cond_stage_model.clip_l
    unprojected = encoder.encode_token_weights(tokens)[1][0]
    torch.testing.assert_close(found, unprojected.float() @ encoder.transformer.text_projection.weight.float().T)
    assert encoder.return_projected_pooled is False  # as it was


def test_pictures_are_read_as_comfyui_reads_them(pair):
    """But for its rounding to 1/255."""
    vision = pair.vision()
    picture = torch.rand(1, 28, 28, 3, generator=torch.Generator().manual_seed(1))
    ours = engine("comfy_host.optimized.measured.vision").PictureEncoder(vision).of_pictures(picture)
    theirs = vision.encode_image(picture)["image_embeds"]
    assert float(torch.cosine_similarity(ours, theirs)) > 0.999


@pytest.mark.parametrize("crops", [0, 3])
@pytest.mark.parametrize("by", ["text", "image"])
def test_the_gradient_is_that_of_differences(pair, crops, by):
    """Through layers that add in place, which is silently wrong without care."""
    wanted = (
        {"clip": pair.clip, "text": "a red ball"}
        if by == "text"
        else {"image": torch.rand(3, 40, 40, 3, generator=torch.Generator().manual_seed(4))}
    )
    measure = loss(pair.vision(), crops=crops, crop_loss="mean", **wanted).measure

    def value(images):
        return measure(images, torch.Generator().manual_seed(3)).sum().double()

    with torch.inference_mode(False):
        images = 0.3 * torch.randn(1, 3, 48, 56, generator=torch.Generator().manual_seed(2))
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf), leaf)
        direction = gradient / gradient.norm()
        with torch.no_grad():
            slope = (value(images + 0.3 * direction) - value(images - 0.3 * direction)) / 0.6
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_a_picture_is_optimized_towards_its_reference(pair):
    import nodes

    model, clip, vae = node("RG_LoadDemoModel")
    reference = node("RG_DemoScene", seed=3, count=1, figure_only=True)[0]
    prompts = {
        "positive": nodes.CLIPTextEncode().encode(clip, "a red figure")[0],
        "negative": nodes.CLIPTextEncode().encode(clip, "")[0],
    }
    out = node(
        "RG_OptimizeNoise", model=model, seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="normal", **prompts,
        latent_image={"samples": torch.zeros(1, 4, 16, 16)}, denoise=1.0, vae=vae,
        loss=loss(pair.vision(), image=reference, crops=2), updates=8, strength=2.0,
    )  # fmt: skip
    assert min(out[3]) < out[3][0]


def test_what_does_not_fit_is_refused(pair):
    vision, picture = pair.vision(), torch.rand(1, 28, 28, 3)
    with refused("no projection into CLIP's space"):
        loss(pair.vision(projection_dim=None), image=picture)
    with refused("gives 16 features and this CLIP clip_l: 24"):
        loss(pair.vision(projection_dim=16), clip=pair.clip, text="a ball")
    with refused("text needs a CLIP"):
        loss(vision, text="a ball")
    with refused("neither text nor image"):
        loss(vision, clip=pair.clip, text="  ")
    with refused("both text and image"):
        loss(vision, clip=pair.clip, text="a ball", image=picture)
    projection = pair.clip.cond_stage_model.clip_l.transformer.text_projection.weight
    for broken in (torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH), torch.full((WIDTH, WIDTH), float("nan"))):
        projection.copy_(broken)
        with refused("holds no text_projection"):
            loss(vision, clip=pair.clip, text="a ball")


def test_a_clip_without_a_known_encoder_is_refused(pair):
    _model, clip, _vae = node("RG_LoadDemoModel")
    with refused("this CLIP has no projection"):
        loss(pair.vision(), clip=clip, text="a red figure")


@pytest.fixture
def folders(tmp_path):
    """aesthetic_heads and classifiers, for this test only."""
    import folder_paths

    made = {}
    for name in ("aesthetic_heads", "classifiers"):
        made[name] = tmp_path / name
        made[name].mkdir()
        folder_paths.add_model_folder_path(name, str(made[name]))
    yield SimpleNamespace(**made)
    for name, path in made.items():
        folder_paths.folder_names_and_paths[name][0].remove(str(path))
        folder_paths.filename_list_cache.pop(name, None)


def test_the_aesthetic_loss_from_a_file(pair, folders):
    import nodes

    torch.save({"weight": torch.randn(1, WIDTH), "bias": torch.tensor([5.0])}, folders.aesthetic_heads / "linear.pth")
    torch.save({"weight": torch.randn(1, 768), "bias": torch.tensor([5.0])}, folders.aesthetic_heads / "wide.pth")
    vision = pair.vision()
    found = node("RG_AestheticLoss", clip_vision=vision, head="linear.pth", weight=1.0, target=6.0)
    with torch.inference_mode(False):
        images = (0.3 * torch.randn(2, 3, 32, 32)).requires_grad_()
        (gradient,) = torch.autograd.grad(found(images, torch.Generator()).sum(), images)
    assert gradient.abs().amax() > 0
    with refused("'wide.pth' rates 768 features and this CLIP Vision model gives 24"):
        node("RG_AestheticLoss", clip_vision=vision, head="wide.pth", weight=1.0)
    fingerprint = nodes.NODE_CLASS_MAPPINGS["RG_AestheticLoss"].fingerprint_inputs
    before = fingerprint(head="linear.pth", clip_vision=None, weight=1.0)
    torch.save({"weight": torch.randn(1, WIDTH), "bias": torch.ones(1), "x": 1}, folders.aesthetic_heads / "linear.pth")
    assert fingerprint(head="linear.pth", clip_vision=None, weight=1.0) != before
    with refused("no file named '../x.pth'"):
        node("RG_AestheticLoss", clip_vision=vision, head="../x.pth", weight=1.0)


def test_the_classifier_loss_from_a_file(comfyui, folders):
    from safetensors.torch import save_file
    from torchvision.models import squeezenet1_1

    with torch.inference_mode(False):
        torch.manual_seed(0)
        network = squeezenet1_1(num_classes=4).eval()
        save_file(network.state_dict(), folders.classifiers / "net.safetensors", {"classes": '["a", "b", "c", "d"]'})
    found = node("RG_ClassifierLoss", classifier="net.safetensors", label="c", weight=1.0)
    with torch.inference_mode(False):
        images = (0.3 * torch.randn(2, 3, 224, 224)).requires_grad_()
        (gradient,) = torch.autograd.grad(found(images, torch.Generator()).sum(), images)
        pixels = engine("optimization.pixels")
        logits = network(pixels.normalised(pixels.as_pixels(images), pixels.IMAGENET_MEAN, pixels.IMAGENET_STD))
        (wanted,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor([2, 2])) * 2, images)
    torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-7)
    with refused("no class 'e'"):
        node("RG_ClassifierLoss", classifier="net.safetensors", label="e", weight=1.0)
