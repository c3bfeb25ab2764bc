"""The demo world's picture-text pair: ComfyUI's own classes, through the same nodes as any CLIP."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node

pytestmark = pytest.mark.usefixtures("comfyui")

#: Unseen scenes, and in how many of them the right caption should be nearer than one that differs in an attribute.
SCENES = 24
AT_LEAST = 0.7


@pytest.fixture
def pair():
    vision, clip = node("RG_LoadDemoClip")
    return SimpleNamespace(vision=vision, clip=clip)


def test_the_right_caption_is_nearer_than_one_that_differs_in_an_attribute(pair):
    scenes = engine("demo.scene_pictures").scene_pictures(4999, SCENES)
    images = scenes.picture.movedim(-1, 1) * 2 - 1
    right: dict[str, list[bool]] = {}

    def distance(text, image):
        loss = node("RG_ClipLoss", clip_vision=pair.vision, weight=1.0, clip=pair.clip, text=text)
        return float(loss(image[None], torch.Generator()))

    for image, caption in zip(images, scenes.captions, strict=True):
        own = distance(caption, image)
        for name, others in engine("demo.wording").variants(caption).items():
            right.setdefault(name, []).append(own < distance(others[len(caption) % len(others)], image))
    poor = {
        name: sum(hits) / len(hits) for name, hits in right.items() if len(hits) > 4 and sum(hits) < AT_LEAST * len(hits)
    }
    assert poor == {}


def test_it_is_trained_as_comfyui_runs_it(pair):
    """Pair's own way through ComfyUI's classes, which write in place, and theirs."""
    clip_file = engine("demo").CLIP
    module = engine("comfy_host.demo_model.clip")
    state = engine("comfy_host.demo_model.files").load(clip_file)
    trained = module.Pair()
    trained.load_state_dict({key: value.float() for key, value in state.items()})
    vision = engine("comfy_host.optimized.measured.vision")
    picture = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    text = "a red figure and a blue ball, grey wall"
    encoder = vision.PictureEncoder(pair.vision)
    pixels = engine("optimization.pixels")
    values = pixels.normalised(picture.movedim(-1, 1), pixels.CLIP_MEAN, pixels.CLIP_STD)
    torch.testing.assert_close(trained.pictures(values), encoder.of_pictures(picture), rtol=1e-4, atol=1e-4)
    tokens = torch.tensor([module.tokens_of(text)])
    found = vision.text_feature(pair.clip, text, encoder.width)
    torch.testing.assert_close(trained.texts(tokens)[0], found, rtol=1e-4, atol=1e-4)
    assert clip_file.stat().st_size <= 3 * 2**20
    assert {value.dtype for value in state.values()} == {torch.float16}


def test_comfyui_reads_pictures_with_it(pair):
    picture = node("RG_DemoScene", seed=5, count=2, figure_only=False)[0]
    theirs = pair.vision.encode_image(picture)["image_embeds"]
    ours = engine("comfy_host.optimized.measured.vision").PictureEncoder(pair.vision).of_pictures(picture)
    assert torch.cosine_similarity(theirs, ours).min() > 0.98


def test_words_can_be_weighted_and_strange_ones_are_named(pair, caplog):
    feature = engine("comfy_host.optimized.measured.vision").text_feature
    plain, strong = (feature(pair.clip, text, 96) for text in ("a red figure", "a (red:1.5) figure"))
    assert pair.clip.tokenize("a (red:1.5) figure")["demo"][0][2][1] == 1.5
    assert plain.shape == strong.shape == (96,)
    feature(pair.clip, "a zebra, grey wall", 96)
    assert "does not know the words: zebra" in caplog.text


def test_a_missing_or_another_version_s_file_is_an_error(monkeypatch, tmp_path):
    from safetensors.torch import load_file, save_file

    module, errors = engine("comfy_host.demo_model.clip"), engine("errors")
    state = load_file(module.CLIP)
    monkeypatch.setattr(module, "CLIP", tmp_path / "clip.safetensors")
    with pytest.raises(errors.ModelWorldError, match=r"clip\.safetensors is missing or damaged"):
        node("RG_LoadDemoClip")
    state.pop("text.text_projection.weight")
    save_file(state, tmp_path / "clip.safetensors")
    with pytest.raises(errors.ModelWorldError, match="does not fit this version"):
        node("RG_LoadDemoClip")


def test_noise_is_optimized_by_its_text_and_by_its_picture(pair):
    import nodes

    model, clip, vae = node("RG_LoadDemoModel")
    prompts = {
        "positive": nodes.CLIPTextEncode().encode(clip, "a figure")[0],
        "negative": nodes.CLIPTextEncode().encode(clip, "")[0],
    }
    picture = node("RG_DemoScene", seed=3, count=1, figure_only=True)[0]
    for asked in ({"clip": pair.clip, "text": "a blue figure, pink wall"}, {"image": picture}):
        loss = node("RG_ClipLoss", clip_vision=pair.vision, weight=1.0, **asked)
        losses = node(
            "RG_OptimizeNoise", model=model, seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="normal", **prompts,
            latent_image={"samples": torch.zeros(1, 4, 16, 16)}, denoise=1.0, vae=vae, loss=loss, updates=4,
        )[3]  # fmt: skip
        assert min(losses) < 0.95 * losses[0]


def test_one_step_guidance_is_euler_without_a_path_and_lowers_the_loss_with_one(pair):
    import nodes

    evidence = engine("lab.evidence.one_step")
    model, clip, vae = node("RG_LoadDemoModel")
    encode = nodes.CLIPTextEncode().encode
    run = {
        "seed": 2, "steps": 3, "cfg": 2.0, "scheduler": "normal", "positive": encode(clip, "a figure")[0],
        "negative": encode(clip, "")[0],
    }  # fmt: skip
    loss = node("RG_ClipLoss", clip_vision=pair.vision, weight=1.0, clip=pair.clip, text="a blue figure, pink wall")
    plain = nodes.KSampler().sample(
        model=model, sampler_name="euler", denoise=1.0, latent_image={"samples": torch.zeros(1, 4, 16, 16)}, **run
    )[0]["samples"]

    def guided(path):
        settings = evidence.OneStep(loss=loss, moves=2, path=path)
        return evidence.one_step_guided(model, vae, settings, latent={"samples": torch.zeros(1, 4, 16, 16)}, **run)

    torch.testing.assert_close(guided(0.0), plain, rtol=1e-3, atol=1e-3)
    values = [float(loss(vae.decode(z).movedim(-1, 1) * 2 - 1, torch.Generator())) for z in (plain, guided(1.0))]
    assert values[1] < values[0]
