"""The demo model's parts are trained by the shared loop: each goes on where it broke off."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rg_engine.demo.autoencoder import LATENT_CHANNELS, Autoencoder
from rg_engine.demo.text import WORDS, pad, tokenize
from rg_engine.lab import demo_parts
from rg_engine.lab.demo_clip import contrastive_loss, train_clip
from rg_engine.training import loop


class SmallDenoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.time = nn.Conv2d(LATENT_CHANNELS, LATENT_CHANNELS, 1), nn.Embedding(1000, LATENT_CHANNELS)

    def predict(self, z, timestep, tokens):
        return self.mix(z) + (self.time(timestep) + self.time(tokens).mean(1))[:, :, None, None]


class SmallPair(nn.Module):
    """The mean colours of a picture's quarters, and of words."""

    def __init__(self):
        super().__init__()
        self.colours, self.words = nn.Linear(12, 8), nn.Embedding(len(WORDS), 8)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def pictures(self, values):
        return self.colours(nn.functional.adaptive_avg_pool2d(values, 2).flatten(1))

    def texts(self, tokens):
        return self.words(tokens).mean(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six pictures of the demo world and their latents."""
    folder = tmp_path_factory.mktemp("data")
    demo_parts.make_pictures(folder, shards=1, per_shard=6)
    demo_parts.encode_pictures(folder, frozen())
    return folder


def frozen():
    torch.manual_seed(0)
    return Autoencoder().eval().requires_grad_(False)


def autoencoder(data, out):
    demo_parts.train_autoencoder(data, out, steps=3, batch=2)


def denoiser(data, out):
    network = SmallDenoiser()
    demo_parts.train_denoiser(network, network.predict, data, out, steps=3, batch=4)


def estimator(data, out):
    demo_parts.train_estimator(data, frozen(), out, steps=3, batch=2)


def clip(data, out):
    train_clip(SmallPair(), lambda text: pad(tokenize(text)[0]), data, out, frozen(), steps=3, batch=4)


@pytest.mark.parametrize("train", [autoencoder, denoiser, estimator, clip], ids=lambda f: f.__name__)
def test_a_part_broken_off_ends_as_in_one_go(data, tmp_path, monkeypatch, train):
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY_S", -1.0)
    whole, part = tmp_path / "whole" / "a.safetensors", tmp_path / "part" / "a.safetensors"
    torch.manual_seed(1)
    train(data, whole)
    report = demo_parts.Progress
    monkeypatch.setattr(loop, "Progress", lambda **news: breaking_off() if news["step"] == 2 else report(**news))
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        train(data, part)
    monkeypatch.setattr(loop, "Progress", report)
    torch.manual_seed(2)  # other weights to begin with, other noise in between
    train(data, part)
    assert part.read_bytes() == whole.read_bytes()
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in load_file(part).values())
    assert [json.loads(line)["step"] for line in part.with_suffix(".log").read_text().splitlines()] == [3]
    assert json.loads(whole.with_suffix(".log").read_text()).keys() == {"step", "loss", "steps_per_s"}


def breaking_off():
    raise KeyboardInterrupt


def test_a_pair_learns_which_caption_and_which_of_the_pictures_that_share_one():
    cosines = torch.tensor([[4.0, 1.0, 0.5], [3.0, 0.0, 1.0], [0.0, 2.0, 1.5]], requires_grad=True)
    own = torch.tensor([0, 0, 1])  # the third caption is no picture's
    across = [-cosines[i].log_softmax(0)[own[i]] for i in range(3)]
    down = cosines[:, :2].softmax(0)
    wanted = (sum(across) / 3 - (down[:2, 0].sum().log() + down[2, 1].log()) / 2) / 2
    found = contrastive_loss(cosines, own)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found, cosines)
    assert gradient.isfinite().all()
    assert gradient[2, 1] < 0 < gradient[2, 0]
