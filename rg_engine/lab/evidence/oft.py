"""``python -m rg_engine evaluate oft``: a figure that the demo model does not know, taught by OFT, COFT and a LoRA of the
same size in the same loop, over the steps of their training; scored on finished pixels."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...adapters import turn
from ...adapters.energy import hyperspherical_energy
from ...adapters.learning import AdapterExamples, AdapterTraining, OftSettings, Turns
from ...comfy_host.adapters.training.turning import TurnedModel, new_turns, trainable
from ...comfy_host.loaded.frozen_model import FrozenModel, with_frozen_model
from ...demo.scene_pictures import subject_pictures
from ...demo.world import COLOURS, SUBJECT_COLOURS, WALLS
from ...training.loop import Progress
from ..demo_world import World, encoded
from .low_rank import LowRank, LowRankModel

SEED, PICTURES = 5, 8  # of the subject
STEPS, LOOKS = 600, (50, 100, 200, 400, 600)
SAMPLER_STEPS, CFG = 20, 3.0
LEARNED = "a teal figure"
#: Prompts with the subject, and which colour of a solid they ask for; and prompts with other figures.
WITH = {
    "a teal figure, grey wall": None,
    "a teal figure and a blue ball, cream wall": "blue",
    "a teal figure and a yellow box, pink wall": "yellow",
    "a teal figure and a green ball, teal wall": "green",
}
WITHOUT = ("a red figure, grey wall", "a blue figure, cream wall")
NEAR = 60.0  # colours are the same below this distance, of 255 a channel
SOLID_SHARE = 0.01  # of the picture, that a solid takes at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    rate: float
    coft_eps: float = 0.0
    rank: int = 0  # of a LoRA


#: Learning rates: of 1e-3, 3e-3 and 1e-2 the largest with which each still follows prompts after 60 steps.
METHODS = (
    Method(name="OFT", rate=3e-3),
    Method(name="COFT", rate=3e-3, coft_eps=4e-3),
    Method(name="LoRA", rate=3e-3, rank=6),
)


def oft_table(world: World) -> list[dict[str, Any]]:
    """A row a method and look: the likeness of the subject, how much of the prompt is there, how much of the subject other
    figures got, the energy's drift."""
    pictures, _ = subject_pictures(SEED, PICTURES)
    with torch.inference_mode():
        latents = world.vae.encode(pictures)
        prompts = {text: encoded(world.clip, [text]) for text in (LEARNED, "", *WITH, *WITHOUT)}
    with torch.inference_mode(False):
        examples = AdapterExamples(latents=latents.clone())
    expected = colour_shares(pictures)
    return [row for method in METHODS for row in _rows(world, method, examples, prompts, expected)]


def _rows(
    world: World, method: Method, examples: AdapterExamples, prompts: dict[str, Any], expected: Tensor
) -> list[dict[str, Any]]:
    settings = OftSettings(
        steps=STEPS, batch=4, learning_rate=method.rate, coft_eps=method.coft_eps, warm_up=10, schedule="constant",
        validate_every=0, ema=0.9,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []

    @torch.inference_mode(False)
    @torch.enable_grad()
    def work(frozen: FrozenModel) -> None:
        turns, model = _learner(frozen, method, settings)
        with model:
            training = AdapterTraining(turns, examples, model.loss, settings, facts={})
            spent, began = 0.0, time.perf_counter()

            def look(progress: Progress) -> None:
                nonlocal spent, began
                if progress.step not in LOOKS:
                    return
                spent += time.perf_counter() - began
                average = training.best_turns()
                made = {text: _sampled(world, model, average, text) for text in (*WITH, *WITHOUT)}
                recent = [loss for _, loss, _ in training.history[-25:]]
                numbers = sum(parameter.numel() for parameter in average.parameters())
                rows.append({
                    "method": method.name, "numbers": numbers, "steps": progress.step, "seconds": round(spent, 1),
                    "loss": round(sum(recent) / len(recent), 4), **scores(made, expected),
                    "energy drift": f"{energy_drift(frozen, average):.1e}",
                })  # fmt: skip
                print(rows[-1], flush=True)
                began = time.perf_counter()

            training.run(look)

    more = {"negative": prompts[""], **{text: prompts[text] for text in (*WITH, *WITHOUT)}}
    with_frozen_model(world.model, prompts[LEARNED], (4, *examples.latents.shape[1:]), work, tapped=False, more=more)
    return rows


def _learner(frozen: FrozenModel, method: Method, settings: OftSettings) -> tuple[Any, TurnedModel]:
    if not method.rank:
        return new_turns(frozen.network, settings)[0], TurnedModel(frozen, "full")
    state = frozen.network.state_dict()
    keys = trainable(frozen.network, settings.layers)
    shapes = {key: tuple(state[f"{key.removeprefix('diffusion_model.')}.weight"].shape) for key in keys}
    return LowRank(shapes, method.rank, settings.seed), LowRankModel(frozen, "full")


def _sampled(world: World, model: TurnedModel, turns: Any, text: str) -> Tensor:
    noise = np.random.default_rng((SEED, len(text))).standard_normal((world.pictures, 8, 16, 16), dtype=np.float32)
    latents = model.sample(turns, torch.from_numpy(noise), SAMPLER_STEPS, CFG, text)
    with torch.inference_mode():
        return world.vae.decode(latents).clamp(0, 1).cpu()


def scores(made: dict[str, Tensor], expected: Tensor) -> dict[str, float]:
    """subject: how much of its two colours is there (0.8 in other pictures of it, as sizes differ); prompt: walls and solids
    that are there of those asked for; leak: the subject's colours in pictures of other figures; others: whether those are
    there."""
    subject, asked = [], []
    for text, solid in WITH.items():
        pictures = made[text]
        subject.append(likeness(pictures, expected))
        asked.append(wall_is(pictures, text.rsplit(", ", 1)[1].split()[0]))
        if solid is not None:
            asked.append((near(pictures, COLOURS[solid]).flatten(1).mean(1) > SOLID_SHARE).float())
    leak = torch.cat([likeness(made[text], expected) for text in WITHOUT])
    figures = torch.cat(
        [(near(made[text], COLOURS[text.split()[1]]).flatten(1).mean(1) > SOLID_SHARE).float() for text in WITHOUT]
    )
    return {
        "subject": round(float(torch.cat(subject).mean()), 3), "prompt": round(float(torch.cat(asked).mean()), 3),
        "leak": round(float(leak.mean()), 3), "others": round(float(figures.mean()), 3),
    }  # fmt: skip


def near(pictures: Tensor, colour: tuple[int, int, int]) -> Tensor:
    """Where pictures (N, H, W, 3) in 0..1 have a colour, shaded or not, (N, H, W)."""
    wanted = torch.tensor(colour, dtype=torch.float32)
    return ((pictures * 255 - wanted).norm(dim=-1) < NEAR).float()


def colour_shares(pictures: Tensor) -> Tensor:
    """The mean share of a picture that each of the subject's colours takes, (2,)."""
    return torch.stack([near(pictures, colour).mean() for colour in SUBJECT_COLOURS.values()])


def likeness(pictures: Tensor, expected: Tensor) -> Tensor:
    """(N,), in 0..1."""
    shares = torch.stack([near(pictures, colour).flatten(1).mean(1) for colour in SUBJECT_COLOURS.values()], 1)
    return (shares / expected).clamp(max=1).mean(1)


def wall_is(pictures: Tensor, name: str) -> Tensor:
    """Whether the upper part of each picture is nearest to a wall's colour, (N,)."""
    upper = pictures[:, : pictures.shape[1] * 2 // 5].flatten(1, 2).median(1).values * 255  # (N, 3)
    walls = torch.tensor(list(WALLS.values()), dtype=torch.float32)
    return (torch.cdist(upper, walls).argmin(1) == list(WALLS).index(name)).float()


@torch.no_grad()
def energy_drift(frozen: FrozenModel, turns: Any) -> float:
    """The largest drift of the neurons' mean energy among four layers."""
    state, drifts = frozen.network.state_dict(), []
    for key, change in list(turns.in_force().items())[:4]:
        weight = state[f"{key.removeprefix('diffusion_model.')}.weight"].float()
        after = turn(weight, change, "in") if isinstance(turns, Turns) else weight + change[1] @ change[0]
        drifts.append(abs(hyperspherical_energy(after) - hyperspherical_energy(weight)))
    return max(drifts)
