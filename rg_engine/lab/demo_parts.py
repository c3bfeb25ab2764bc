"""Trains the demo model's parts on the demo world: the autoencoder, the denoiser with its text encoder, the estimator.

Every training resumes from its checkpoint, logs a JSON line now and then, and runs on whatever device it is given. The
denoiser is handed in by the caller: nothing here imports ComfyUI, so that processes can draw pictures without it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..demo import autoencoder, estimator, render, text, world
from ..training.loop import LoopSettings, Progress, Training

LOG_EVERY_S = 20.0
SIZE_PX = 128
PARTS = ("pictures", "autoencoder", "latents", "denoiser", "transformer", "estimator", "clip", "heads")


def make_pictures(folder: Path, shards: int, per_shard: int = 2000, workers: int = 1) -> None:
    """Render shards of scenes (picture, caption, disparity, joints) into ``folder``; those already there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    one = partial(_make_shard, folder, per_shard)
    if workers == 1:
        list(map(one, range(shards)))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(one, range(shards)))


def _make_shard(folder: Path, per_shard: int, shard: int) -> None:
    path = folder / f"pictures_{shard:04d}.npz"
    if path.exists():
        return
    rng = np.random.default_rng([20, shard])
    images = np.empty((per_shard, SIZE_PX, SIZE_PX, 3), np.uint8)
    depth = np.empty((per_shard, SIZE_PX // 2, SIZE_PX // 2), np.float16)
    joints = np.full((per_shard, len(world.JOINTS), 2), np.nan, np.float32)
    captions = []
    for i in range(per_shard):
        scene = world.sample_scene(rng)
        drawn = render.render(scene, SIZE_PX)
        images[i], depth[i] = drawn.image, drawn.depth[::2, ::2]
        if scene.figure is not None:
            joints[i] = scene.figure.joints()
        captions.append(scene.caption())
    unfinished = path.with_suffix(".partial.npz")
    np.savez(unfinished, images=images, depth=depth, joints=joints, captions=np.array(captions))
    os.replace(unfinished, path)


def train_autoencoder(data: Path, out: Path, steps: int, batch: int = 16, device: str = "cpu") -> None:
    model = autoencoder.Autoencoder().to(device)
    pictures = _load(data, "images")

    def draw(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = np.random.default_rng([21, step])
        x = _as_input(pictures[rng.integers(len(pictures), size=batch)], device)
        yield x, 0.1 * _latent_noise(batch, step, device)

    train_part(model, draw, partial(autoencoder.loss, model), out, loop_settings(steps, 2e-3), batch, device)
    model.normalise(_as_input(pictures[:512], device))
    _save(out, model)


def encode_pictures(data: Path, model: autoencoder.Autoencoder, device: str = "cpu") -> None:
    """Write each shard's latents (float16) beside it."""
    for path in sorted(data.glob("pictures_*.npz")):
        target = path.with_name(path.name.replace("pictures", "latents"))
        if target.exists() or ".partial" in path.name:
            continue
        shard = np.load(path)
        with torch.inference_mode():
            parts = [model.encode(_as_input(part, device)).half().cpu() for part in np.array_split(shard["images"], 20)]
        np.savez(target, latents=torch.cat(parts).numpy(), captions=shard["captions"])


def train_denoiser(
    model: nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    data: Path,
    out: Path,
    steps: int,
    batch: int = 1024,
    learning_rate: float = 1.5e-3,
    device: str = "cpu",
) -> None:
    """Train ``model`` to predict v on the cached latents (SD's noise schedule, 12% of the captions left out).

    ``predict(z, timestep, tokens)`` runs it; z (B, C, h, w) is the VP latent, timestep (B,) in 0..999, tokens (B, 16).
    """
    draw_pictures = _pictures_and_words(data, batch, device)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0).float().to(device)

    def draw(step: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        x0, words, time, noise = draw_pictures(step)
        t = (time * 1000).long().clamp(max=999)
        a, s = alpha_bar[t].sqrt()[:, None, None, None], (1 - alpha_bar[t]).sqrt()[:, None, None, None]
        yield a * x0 + s * noise, t, words, a * noise - s * x0

    def compute_loss(z: Tensor, t: Tensor, words: Tensor, v: Tensor) -> Tensor:
        return nn.functional.mse_loss(predict(z, t, words).float(), v)

    train_part(model, draw, compute_loss, out, loop_settings(steps, learning_rate), batch, device)


def train_transformer(
    model: nn.Module,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    encode: Callable[[Tensor], Tensor],
    data: Path,
    out: Path,
    steps: int,
    batch: int = 128,
    learning_rate: float = 1e-3,
    device: str = "cpu",
) -> None:
    """Train ``model`` to predict a flow's velocity on the cached latents, at noise levels of the middle more than at others
    (as 2403.03206), the captions' tokens encoded by the frozen ``encode``.

    ``predict(x, sigma, words)`` runs it; x (B, C, h, w), sigma (B,) in 0..1, words (B, 16, E).
    """
    draw_pictures = _pictures_and_words(data, batch, device)

    def draw(step: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        x0, words, time, noise = draw_pictures(step)
        sigma = torch.lerp(time, torch.special.ndtri(time.clamp(1e-6, 1 - 1e-6)).sigmoid(), 0.7)
        with torch.no_grad():
            context = encode(words)
        yield torch.lerp(x0, noise, sigma[:, None, None, None]), sigma, context, noise - x0

    def compute_loss(x: Tensor, sigma: Tensor, context: Tensor, v: Tensor) -> Tensor:
        return nn.functional.mse_loss(predict(x, sigma, context).float(), v)

    train_part(model, draw, compute_loss, out, loop_settings(steps, learning_rate), batch, device)


def train_estimator(
    data: Path, model: autoencoder.Autoencoder, out: Path, steps: int, batch: int = 32, device: str = "cpu"
) -> None:
    """Train the pixel estimator, half on rendered pictures, half on the same after a round trip through the autoencoder."""
    net = estimator.Estimator().to(device)
    pictures, depth, joints = _load(data, "images"), _load(data, "depth"), _load(data, "joints")

    def draw(step: int) -> Iterator[tuple[Tensor, ...]]:
        rng = np.random.default_rng([23, step])
        pick = rng.integers(len(pictures), size=batch)
        noise = 0.15 * rng.random() * _latent_noise(batch // 2, step, device)
        truth = (torch.from_numpy(values[pick]).to(device) for values in (joints, depth))
        yield _as_input(pictures[pick], device), noise, *truth

    def compute_loss(x: Tensor, noise: Tensor, joints: Tensor, depth: Tensor) -> Tensor:
        half = len(noise)
        with torch.no_grad():
            rebuilt = model.decode(model.encode(x[:half]) + noise).clamp(-1, 1)
        return estimator.loss(net(torch.cat([rebuilt, x[half:]])), joints, depth)

    train_part(net, draw, compute_loss, out, loop_settings(steps, 2e-3), batch, device)


def _pictures_and_words(data: Path, batch: int, device: str) -> Callable[[int], tuple[Tensor, ...]]:
    """A step to its latents (B, C, h, w), captions' tokens (B, 16; 12% left out), times spread over 0..1 (B,) and noise."""
    latents = torch.from_numpy(_load(data, "latents", "latents")).to(device)
    tokens = text.as_tokens([str(caption) for caption in _load(data, "captions", "latents")]).to(device)

    def draw(step: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(step)
        chance = partial(torch.rand, batch, generator=generator, device=device)
        pick = (chance() * len(latents)).long()
        x0, words = latents[pick].float(), tokens[pick] * (chance() >= 0.12)[:, None]  # 0 is padding: no caption
        time = (chance() + torch.arange(batch, device=device)) / batch
        return x0, words, time, torch.randn(x0.shape, generator=generator, device=device)

    return draw


def load_shards(data: Path, key: str, prefix: str = "pictures") -> Iterator[np.ndarray]:
    shards = [p for p in sorted(data.glob(f"{prefix}_*.npz")) if ".partial" not in p.name]
    if not shards:
        raise FileNotFoundError(f"no {prefix}_*.npz in {data}: render pictures first")
    return (np.load(path)[key] for path in shards)


def _load(data: Path, key: str, prefix: str = "pictures") -> np.ndarray:
    return np.concatenate(list(load_shards(data, key, prefix)))


def _as_input(images: np.ndarray, device: str) -> Tensor:
    x = torch.from_numpy(images).to(device).float().div(127.5).sub(1).permute(0, 3, 1, 2)  # (B, 3, H, W)
    return x.contiguous(memory_format=torch.channels_last)


def _latent_noise(count: int, step: int, device: str) -> Tensor:
    """For latents of pictures, the same for the same step."""
    cells = SIZE_PX // autoencoder.DOWNSCALE
    noise = torch.randn(count, autoencoder.LATENT_CHANNELS, cells, cells, generator=torch.Generator().manual_seed(step))
    return noise.to(device)


def loop_settings(steps: int, learning_rate: float) -> LoopSettings:
    return LoopSettings(
        steps=steps, learning_rate=learning_rate, warm_up=300, ema=0.9985, young_ema=True, clip=1.0, betas=(0.9, 0.99),
        weight_decay=0.01, precision="bf16",
    )  # fmt: skip


def train_part(
    model: nn.Module, draw: Callable[[int], Iterator[tuple[Tensor, ...]]], compute_loss: Callable[..., Tensor], out: Path,
    settings: LoopSettings, batch: int, device: str,
) -> None:  # fmt: skip
    """Train ``model``, which becomes its moving average, and save that; goes on from ``out``.state, logs to ``out``.log."""
    facts = {"weights": sum(p.numel() for p in model.parameters()), "batch": batch, **dataclasses.asdict(settings)}
    training = Training(
        model, draw, compute_loss, settings, name=out.stem, facts=facts, device=device, checkpoint=out.with_suffix(".state")
    )
    losses: list[float] = []
    logged = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal logged
        losses.append(progress.loss)
        now = time.monotonic()
        if now - logged > LOG_EVERY_S or progress.step == progress.steps:
            line = {
                "step": progress.step,
                "loss": round(float(np.mean(losses)), 5),
                "steps_per_s": round(len(losses) / (now - logged), 2),
            }
            with open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            _save(out, training.best())
            losses.clear()
            logged = now

    training.run(report)
    model.load_state_dict(training.best().state_dict())
    _save(out, model)


def _save(out: Path, model: nn.Module) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().half().contiguous().cpu() for k, v in model.state_dict().items()}, out)
