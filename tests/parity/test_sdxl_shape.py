"""SDXL's shape against the paper's procedure written out plainly, on a random UNet and random heads.

The oracle knows nothing of the engine: DDIM on VP latents, all four rows (source and guided, both branches) in one batch,
features resized before the head, AdamW through plain autograd.
"""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine, node
from small_models import sdxl_model
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("comfyui")

CFG, LEARNING_RATE = 5.0, 0.02


def oracle_head(state: dict, features: list[torch.Tensor], emb: torch.Tensor | None) -> torch.Tensor:
    """The aggregation network, from its state dict."""

    def conv(x, name, padding=0):
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, padding=padding)
        return F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])

    mixed = 0.0
    for i, (feature, weight) in enumerate(zip(features, state["mixing_weights"].softmax(0), strict=True)):
        at = f"bottleneck_layers.{i}"
        out = conv(feature, f"{at}.conv1").relu()
        if emb is not None:
            e = F.linear(emb, state[f"{at}.emb_layers.weight"], state[f"{at}.emb_layers.bias"]).relu()
            out = out + e[:, :, None, None]
        out = conv(conv(out, f"{at}.conv2", 1).relu(), f"{at}.conv3")
        shortcut = conv(feature, f"{at}.shortcut") if f"{at}.shortcut.weight" in state else feature
        mixed = mixed + weight * (out + shortcut).relu()
    if "output_head.0.weight" not in state:
        return mixed
    for layer, padding in ((0, 1), (2, 1), (4, 0)):
        weight, bias = state[f"output_head.{layer}.weight"], state[f"output_head.{layer}.bias"]
        mixed = F.conv2d(mixed, weight, bias, padding=padding)
        mixed = F.silu(mixed) if layer < 4 else mixed.tanh()
    return mixed


def oracle_run(unet, states, control, points, z, sigmas, timesteps, words, pooled, guided_steps) -> torch.Tensor:
    """z (1, 4, H, W) at the first sigma -> the guided z at the last."""
    caught: dict[int, torch.Tensor] = {}
    embs = []
    handles = [
        block[0].out_layers.register_forward_hook(lambda _m, _i, out, i=i: caught.__setitem__(i, out))
        for i, block in enumerate(unet.output_blocks)
    ]
    handles.append(unet.time_embed.register_forward_hook(lambda _m, _i, out: embs.append(out)))
    size = z.shape[-2:]

    def forward(z, t):
        rows = torch.cat([z, z])  # unconditional source and guided, then conditional ones
        context = words.repeat_interleave(2, 0)
        eps = unet(rows, t.expand(4), context=context, y=pooled.repeat_interleave(2, 0))
        features = [F.interpolate(caught[i], size, mode="bilinear") for i in range(len(caught))]
        return eps, features, embs.pop()

    def branch_loss(z, features, emb, row):
        low, high = z.detach().min(), z.detach().max()

        def read(name, row, with_emb=True):
            return oracle_head(states[name], [f[row : row + 1] for f in features], emb[:1] if with_emb else None)

        spatial = (read("spatial", row + 1) + 0.5) * (high - low) + low
        wanted = (control + 0.5) * (high - low) + low
        loss = 0.5 * F.mse_loss(spatial, wanted)
        look, source_look = read("appearance", row + 1), read("appearance", row).detach()
        loss = loss + (1 - F.cosine_similarity(look, source_look, dim=1)).mean() * (high - low) ** 2
        moved = F.normalize(read("correspondence", row + 1, False).flatten(2), dim=1)
        source = F.normalize(read("correspondence", row, False).detach().flatten(2), dim=1)
        similarity = (torch.einsum("bdn,bdm->bnm", source, moved) + 1) / 2
        starts, ends = (p[:, 0] * size[1] + p[:, 1] for p in points)
        return loss - 0.5 * similarity[:, starts, ends].mean() + 0.5 * similarity[:, starts, starts].mean()

    z = z.repeat(2, 1, 1, 1)
    for i, t in enumerate(timesteps):
        if i in guided_steps:
            z = z.detach().requires_grad_()
            optimiser = torch.optim.AdamW([z], lr=LEARNING_RATE, weight_decay=0.0)
            _, features, emb = forward(z, t)
            loss = branch_loss(z, features, emb, 0) + branch_loss(z, features, emb, 2)
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            z = z.detach()
            eps, _, _ = forward(z, t)
            eps = eps[:2] + CFG * (eps[2:] - eps[:2])
            alpha, following = (1 / (1 + sigmas[k] ** 2) for k in (i, i + 1))
            clean = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
            z = following.sqrt() * clean + (1 - following).sqrt() * eps
    for handle in handles:
        handle.remove()
    return z


def test_a_guided_run_with_all_three_losses():
    import comfy.samplers
    from comfy.k_diffusion import sampling

    generator = torch.Generator().manual_seed(0)
    model = sdxl_model()
    network = model.model.diffusion_model
    backbone = engine("comfy_host.loaded.model").backbone_of(model)
    assert backbone.channels == (128,) * 3 + (64,) * 3 + (32,) * 3
    heads = engine("heads")

    def head(kind):
        with torch.inference_mode(False):
            torch.manual_seed(len(kind))
            made = heads.AggregationNetwork(
                backbone.channels,
                projection_channels=128,
                emb_width=backbone.emb_width,
                output_channels=3 if kind == "spatial" else 0,
            )
        spec = heads.HeadSpec(kind=kind, feature_channels=backbone.channels, use_emb=kind != "correspondence")
        return heads.ReadoutHead(network=made.requires_grad_(False), spec=spec, name=kind)

    kit = {kind: head(kind) for kind in ("spatial", "appearance", "correspondence")}
    timesteps = torch.tensor([900, 700, 500, 300, 100])
    sampler_sigmas = torch.stack([model.model.model_sampling.sigma(t) for t in (*timesteps, torch.tensor(0))])
    z = torch.randn(1, 4, 16, 16, generator=generator)
    words, pooled = torch.randn(2, 8, 64, generator=generator), torch.randn(2, 1280, generator=generator)
    control = torch.rand(1, 3, 16, 16, generator=generator)
    cells = torch.randint(0, 16, (2, 3, 2), generator=generator)  # from and to, three points, (row, column)

    drags = [
        {
            "from": [(float(a[1]) + 0.5) / 16, (float(a[0]) + 0.5) / 16],
            "to": [(float(b[1]) + 0.5) / 16, (float(b[0]) + 0.5) / 16],
        }
        for a, b in zip(*cells, strict=True)
    ]
    import json

    points, _ = node("RG_DragPoints", points=json.dumps({"version": 1, "drags": drags}))
    common = {"start_percent": 0.0, "end_percent": 0.5}
    target = node("RG_ReadoutTarget", head=kit["spatial"], weight=0.5, image=control.permute(0, 2, 3, 1), **common)
    target = node("RG_ReadoutTarget", head=kit["appearance"], weight=1.0, previous=target, **common)
    target = node("RG_ReadoutTarget", head=kit["correspondence"], weight=1.0, drag_points=points, previous=target, **common)
    negative, positive = ([[words[i : i + 1], {"pooled_output": pooled[i : i + 1]}]] for i in range(2))
    guider = node(
        "RG_ReadoutGuider", model=model, positive=positive, negative=negative, cfg=CFG, target=target, strength=1.0,
        mode="reference", iterations=1, source_cfg=-1.0,
    )  # fmt: skip
    x = z * (1 + sampler_sigmas[0] ** 2).sqrt()
    euler = comfy.samplers.KSAMPLER(sampling.sample_euler)
    out = guider.sample(x / sampler_sigmas[0], torch.zeros_like(z), euler, sampler_sigmas, seed=0)
    ours = model.model.process_latent_in(out) / (1 + sampler_sigmas[-1] ** 2).sqrt()

    with torch.inference_mode(False), torch.enable_grad():
        y = torch.cat([model.model.encode_adm(pooled_output=p[None].clone(), width=128, height=128) for p in pooled])
        states = {kind: {k: v.clone() for k, v in each.network.state_dict().items()} for kind, each in kit.items()}
        unet = sdxl_model().model.diffusion_model.requires_grad_(False)
        source, guided = oracle_run(
            unet, states, control.clone() - 0.5, cells.clone(), z.clone(), sampler_sigmas.clone(), timesteps.clone().float(),
            words.clone(), y.clone(), guided_steps={0, 1, 2},
        )  # fmt: skip
    assert not network.output_blocks[0][0].out_layers._forward_hooks
    assert (ours[0] - guided).norm() < 0.1 * (guided - source).norm()
