"""The demo model draws what it is asked for, and guidance moves it: measured on finished pixels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine, node

pytestmark = pytest.mark.usefixtures("comfyui")

PICTURES, SCENE_SEED = 6, 11


NETWORKS = {"UNet": ("demo_", "euler_ancestral", "normal"), "transformer": ("demo_transformer_", "euler", "simple")}


@pytest.fixture
def demo(request) -> SimpleNamespace:
    import nodes

    network = getattr(request, "param", "UNet")
    heads, sampler, scheduler = NETWORKS[network]
    model, clip, vae = node("RG_LoadDemoModel", network=network)

    def encode(text):
        return nodes.CLIPTextEncode().encode(clip, text)[0]

    def draw(prompt, count=PICTURES, target=None, **settings):
        """Pictures (count, 128, 128, 3) of a prompt, guided if there is a target."""
        latent = nodes.EmptyLatentImage().generate(128, 128, count)[0]
        inputs = {
            "model": model, "seed": 4, "steps": 20, "cfg": 3.0, "sampler_name": sampler, "scheduler": scheduler,
            "positive": encode(prompt), "negative": encode(""), "latent_image": latent, "denoise": 1.0,
        }  # fmt: skip
        if target is None:
            samples = nodes.KSampler().sample(**inputs)[0]
        else:
            more = {"strength": 1.0, "mode": "fast", "iterations": 1, "source_cfg": -1.0, **settings}
            samples = node("RG_ReadoutGuidedKSampler", **inputs, target=target, **more)
        return nodes.VAEDecode().decode(vae, samples)[0]

    return SimpleNamespace(model=model, clip=clip, vae=vae, encode=encode, draw=draw, heads=heads)


def share(pictures: torch.Tensor, channel: int) -> float:
    """The part of the pixels in which one colour channel stands clearly above both others."""
    others = pictures[..., [c for c in range(3) if c != channel]].amax(-1)
    return float((pictures[..., channel] - others > 0.25).float().mean())


@pytest.mark.parametrize("demo", list(NETWORKS), indirect=True)
def test_it_paints_the_colours_of_the_prompt(demo):
    red, blue = (demo.draw(f"a {colour} figure, grey wall", count=16) for colour in ("red", "blue"))
    assert share(red, 0) > 2 * share(blue, 0) + 0.01  # shirts are of any colour
    assert share(blue, 2) > 2 * share(red, 2) + 0.01
    grey, pink = (demo.draw(f"a red figure, {wall} wall")[:, :10].mean((0, 1, 2)) for wall in ("grey", "pink"))
    assert (grey.max() - grey.min()) < 0.05
    assert pink[0] - pink[1] > 0.1


def test_its_autoencoder_rebuilds_a_picture(demo):
    import nodes

    picture = node("RG_DemoScene", seed=3, count=2, figure_only=False)[0]
    latent = nodes.VAEEncode().encode(demo.vae, picture)[0]
    assert latent["samples"].shape == (2, 8, 16, 16)
    assert (nodes.VAEDecode().decode(demo.vae, latent)[0] - picture).abs().mean() < 0.02


def test_words_can_be_weighted_and_strange_ones_are_named(demo, caplog):
    plain, strong = demo.encode("a red figure")[0][0], demo.encode("a (red:1.5) figure")[0][0]
    assert not torch.equal(plain, strong)
    demo.encode("a zebra, grey wall")
    assert "does not know the words: zebra" in caplog.text


# ten guided steps of five updates are the paper's fifty
@pytest.mark.parametrize(
    ("demo", "mode", "settings"),
    [("UNet", "fast", {}), ("UNet", "reference", {"iterations": 5}), ("transformer", "fast", {})],
    indirect=["demo"],
)
@pytest.mark.parametrize("control", ["pose", "depth", "edges"])
def test_guidance_halves_the_control_error(demo, control, mode, settings):
    measure, pictures = engine("demo.measure"), engine("demo.scene_pictures")
    outputs = dict(
        zip(
            ("picture", "pose", "depth", "edges"),
            node("RG_DemoScene", seed=SCENE_SEED, count=PICTURES, figure_only=True),
            strict=False,
        )
    )
    head = node("RG_LoadReadoutHead", head_name=f"{demo.heads}{control}.safetensors", kind="auto")
    target = node("RG_ReadoutTarget", head=head, weight=1.0, start_percent=0.0, end_percent=0.5, image=outputs[control])
    scenes = pictures.sample_scenes(SCENE_SEED, PICTURES, figure_only=True)
    prompt = "a purple figure, teal wall"

    def error(drawn):
        return measure.control_errors(control, drawn, scenes, measure.load_estimator()).mean()

    guided = demo.draw(prompt, target=target, mode=mode, **settings)
    assert error(guided) < 0.5 * error(demo.draw(prompt))


def test_the_estimator_reads_rendered_scenes(demo):
    measure, pictures = engine("demo.measure"), engine("demo.scene_pictures")
    drawn = node("RG_DemoScene", seed=5, count=16, figure_only=True)[0]
    scenes = pictures.sample_scenes(5, 16, figure_only=True)
    estimator = measure.load_estimator()
    assert measure.control_errors("pose", drawn, scenes, estimator).mean() < 1.5
    assert measure.control_errors("depth", drawn, scenes, estimator).mean() < 0.02
    assert measure.control_errors("edges", drawn, scenes, estimator).mean() == 0
