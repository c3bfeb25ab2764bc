"""Trains the demo model's parts on the demo world: the autoencoder, the denoiser with its text encoder, the estimator.

Every loop resumes from its checkpoint, logs a JSON line now and then, and runs on whatever device it is given. The
denoiser is handed in by the caller (it is ComfyUI's own UNet, which this floor doesn't know).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import autoencoder, estimator, render, text, world

SIZE_PX = 128
PARTS = ("pictures", "autoencoder", "latents", "denoiser", "estimator", "heads")


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

    def compute_loss(step: int) -> Tensor:
        rng = np.random.default_rng([21, step])
        return autoencoder.loss(model, _as_input(pictures[rng.integers(len(pictures), size=batch)], device))

    _loop(model, compute_loss, out, steps, learning_rate=2e-3)
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
    latents = torch.from_numpy(_load(data, "latents", "latents")).to(device)
    tokens = text.as_tokens([str(caption) for caption in _load(data, "captions", "latents")]).to(device)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0).float().to(device)

    def compute_loss(step: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(step)
        draw = partial(torch.rand, batch, generator=generator, device=device)
        pick = (draw() * len(latents)).long()
        x0, words = latents[pick].float(), tokens[pick] * (draw() >= 0.12)[:, None]  # 0 is padding: no caption
        t = ((draw() + torch.arange(batch, device=device)) / batch * 1000).long().clamp(max=999)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        a, s = alpha_bar[t].sqrt()[:, None, None, None], (1 - alpha_bar[t]).sqrt()[:, None, None, None]
        z, v = a * x0 + s * noise, a * noise - s * x0
        return nn.functional.mse_loss(predict(z, t, words).float(), v)

    _loop(model, compute_loss, out, steps, learning_rate)


def train_estimator(
    data: Path, model: autoencoder.Autoencoder, out: Path, steps: int, batch: int = 32, device: str = "cpu"
) -> None:
    """Train the pixel estimator, half on rendered pictures, half on the same after a round trip through the autoencoder."""
    net = estimator.Estimator().to(device)
    pictures, depth, joints = _load(data, "images"), _load(data, "depth"), _load(data, "joints")

    def compute_loss(step: int) -> Tensor:
        rng = np.random.default_rng([23, step])
        pick = rng.integers(len(pictures), size=batch)
        x = _as_input(pictures[pick], device)
        with torch.no_grad():
            z = model.encode(x[: batch // 2])
            rebuilt = model.decode(z + 0.15 * rng.random() * torch.randn_like(z)).clamp(-1, 1)
            x = torch.cat([rebuilt, x[batch // 2 :]])
        return estimator.loss(net(x), torch.from_numpy(joints[pick]).to(device), torch.from_numpy(depth[pick]).to(device))

    _loop(net, compute_loss, out, steps, learning_rate=2e-3)


def _load(data: Path, key: str, prefix: str = "pictures") -> np.ndarray:
    shards = [p for p in sorted(data.glob(f"{prefix}_*.npz")) if ".partial" not in p.name]
    if not shards:
        raise FileNotFoundError(f"no {prefix}_*.npz in {data}: render pictures first")
    return np.concatenate([np.load(path)[key] for path in shards])


def _as_input(images: np.ndarray, device: str) -> Tensor:
    x = torch.from_numpy(images).to(device).float().div(127.5).sub(1).permute(0, 3, 1, 2)  # (B, 3, H, W)
    return x.contiguous(memory_format=torch.channels_last)


def _loop(
    model: nn.Module,
    compute_loss: Callable[[int], Tensor],
    out: Path,
    steps: int,
    learning_rate: float,
    every_s: float = 120.0,
) -> None:
    """AdamW with warm-up and cosine decay, bf16 autocast, EMA; saves the EMA and resumes from ``out``.state."""
    device = next(model.parameters()).device.type
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99), fused=device == "cuda"
    )
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=_moving_average)
    state_path, start = out.with_suffix(".state"), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.load_state_dict(state["average"])
        start = state["step"]
    model.train()
    losses: list[Tensor] = []
    saved = logged = time.monotonic()
    for step in range(start, steps):
        rate = learning_rate * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast(device, torch.bfloat16):
            loss = compute_loss(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(model)
        losses.append(loss.detach())
        now = time.monotonic()
        if now - logged > 20 or step == steps - 1:
            line = {
                "step": step + 1,
                "loss": round(float(torch.stack(losses).mean()), 5),
                "steps_per_s": round(len(losses) / (now - logged), 2),
            }
            with open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            losses, logged = [], now
        if now - saved > every_s or step == steps - 1:
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "average": average.state_dict(),
                "step": step + 1,
            }
            torch.save(state, state_path.with_suffix(".partial"))
            os.replace(state_path.with_suffix(".partial"), state_path)
            _save(out, average.module)
            saved = now
    model.load_state_dict(average.module.state_dict())


@torch.no_grad()
def _moving_average(averages: Any, values: Any, count: Tensor | int) -> None:
    """EMA of 0.9985 that forgets the first steps quickly."""
    count = int(count)
    torch._foreach_lerp_(averages, values, 1 - min(0.9985, (1 + count) / (10 + count)))


def _save(out: Path, model: nn.Module) -> None:
    from safetensors.torch import save_file

    save_file({k: v.detach().half().contiguous().cpu() for k, v in model.state_dict().items()}, out)
