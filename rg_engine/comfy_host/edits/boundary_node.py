"""What the Fit Boundary node does around a fit: its pictures, the report in words, the plot and the strip."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import comfy.sample
import torch
from torch import Tensor
from torch.nn import functional as F

from ...boundaries import Boundary, Examples, parse_labels
from ...boundaries.plot import boundary_plot
from ...errors import BoundaryError
from ...guidance.targets import fit
from ..loaded.random_state import random_state_kept
from .boundary_edit import check_mask
from .boundary_fit import FitSettings, Fitted, fit_boundary
from .boundary_measure import STRIP_STRENGTHS
from .passes import Prompts

ENCODED_AT_ONCE = 16
CELL_PX = 8


def fit_in_graph(
    model: Any, having: Any, lacking: Any, labels: str, vae: Any, mask: Tensor | None, mask_lacking: Tensor | None, positive:
    Any, settings: FitSettings,
) -> tuple[Boundary, str, Tensor, Tensor]:  # fmt: skip
    """The boundary of two batches (pictures, or latents), or of one and its labels; a report, its plot, and a strip of
    pictures kept back, a row each, moved further and further."""
    examples = gather_examples(model, having, lacking, labels, vae, mask, mask_lacking)
    with random_state_kept(comfy.model_management.get_torch_device()):
        fitted = fit_boundary(model, examples, settings, Prompts(positive=positive))
    words = report_of(fitted)
    return fitted.boundary, words, boundary_plot(fitted.tried, fitted.boundary.mixing_step), _strip(model, vae, fitted)


def gather_examples(
    model: Any, having: Any, lacking: Any, labels: str, vae: Any, mask: Tensor | None, mask_lacking: Tensor | None
) -> Examples:
    """Raises BoundaryError where batches, labels, masks and sizes don't go together."""
    batches = [_latents(model, each, vae) for each in (having, lacking) if each is not None]
    if len({batch.shape[1:] for batch in batches}) > 1:
        sizes = " and ".join(" x ".join(str(size) for size in batch.shape[1:]) for batch in batches)
        raise BoundaryError(f"the pictures' latents are {sizes}: give all pictures one size")
    if lacking is None and not labels.strip():
        raise BoundaryError("there are only pictures with the attribute: connect lacking, or give labels (1 0 0 1 ...)")
    if lacking is not None and labels.strip():
        raise BoundaryError("there are labels and a second batch: leave labels empty, or connect one batch only")
    if lacking is None:
        told = parse_labels(labels, len(batches[0]))
    else:
        told = torch.cat([torch.full((len(batch),), k == 0) for k, batch in enumerate(batches)])
    latents = torch.cat(batches)
    masks = [_masks(m, len(b), latents) for m, b in zip((mask, mask_lacking), batches, strict=False) if m is not None]
    if len(masks) == 1 and len(batches) == 2:
        if len(mask if mask is not None else mask_lacking) != 1:  # type: ignore[arg-type]
            raise BoundaryError(
                "only one of the batches has masks: connect mask and mask_lacking, or one mask for all pictures"
            )
        masks = [masks[0][:1].expand(len(latents), *masks[0].shape[1:])]
    return Examples(latents=latents, labels=told, masks=torch.cat(masks) if masks else None)


def report_of(fitted: Fitted) -> str:
    boundary, size = fitted.boundary, math.prod(fitted.boundary.latent_shape)
    best = next(tried for tried in fitted.tried if tried.step == boundary.mixing_step)
    kind = "of fits that leave a fifth out" if best.flip is None else "of pictures kept back"
    words = [
        f"A boundary in {boundary.space} at timestep {boundary.mixing_step} of 999, by {boundary.solver}, of "
        f"{boundary.pictures} "
        f"pictures; on {boundary.network}.",
        *(f"{part.space}: the classes are {part.gap:.4g} apart along the normal." for part in boundary.parts),
        f"Accuracy {kind}; flips and change of pictures moved to the other class, flips as a line between the classes' "
        f"finished "
        f"latents tells; norms (of noise: {math.sqrt(size):.1f}):",
    ]
    for tried in fitted.tried:
        accuracy = ", ".join(f"{space} {value:.2f}" for space, value in tried.accuracy.items())
        flips = "" if tried.flip is None else f", flips {tried.flip:.2f}, change {tried.change:.3f}"
        radius = "" if tried.radius is None else f", sampled {tried.radius:.1f}"
        chosen = " <- this one" if tried.step == boundary.mixing_step and len(fitted.tried) > 1 else ""
        words.append(f"  {tried.step}: accuracy {accuracy}{flips}, norm {tried.norm:.1f}{radius}{chosen}")
    if best.flip is None:
        words.append("No pictures were kept back, so flips were not measured: look at the strip.")
    elif best.flip < 0.5:
        words.append(
            "Few pictures flip at strength 1. Look at the strip; fit in a region (with a mask) what does not stand in one "
            "place, in z what moves nothing in h, or move further."
        )
    return "\n".join(words)


def _latents(model: Any, given: Any, vae: Any) -> Tensor:
    if isinstance(given, dict):
        latents = comfy.sample.fix_empty_latent_channels(model, given["samples"])
    elif vae is None:
        raise BoundaryError("the pictures need a VAE to become latents: connect vae, or connect latents")
    else:
        latents = torch.cat([vae.encode(part[..., :3]) for part in given.split(ENCODED_AT_ONCE)])
    wanted = model.model.latent_format.latent_channels
    if latents.ndim != 4 or latents.shape[1] != wanted:
        raise BoundaryError(
            f"the latents are {tuple(latents.shape)} and the model works on (N, {wanted}, h, w): encode pictures with the "
            "model's own VAE"
        )
    return latents.detach().float().cpu().clone()


def _masks(mask: Tensor, pictures: int, latents: Tensor) -> Tensor:
    if len(mask) not in (1, pictures):
        raise BoundaryError(f"there are {len(mask)} masks for {pictures} pictures: give one for all of them, or one each")
    check_mask(mask)
    cells = fit(mask[:, None].float().clamp(0, 1).cpu(), (latents.shape[-2], latents.shape[-1]))
    return cells.expand(pictures, *cells.shape[1:])


def _strip(model: Any, vae: Any, fitted: Fitted) -> Tensor:
    """Rows of pictures by strength, (1, H, W, 3) in 0..1; without a VAE as ComfyUI's previews show latents."""
    latents = fitted.strip.to(comfy.model_management.intermediate_device())
    pictures = vae.decode(latents).clamp(0, 1).cpu() if vae is not None else _preview(model, fitted.strip)
    grid = pictures.unflatten(0, (len(STRIP_STRENGTHS), fitted.strip_pictures))  # (V, n, H, W, 3)
    return torch.cat([torch.cat(list(row), 1) for row in grid.transpose(0, 1)], 0)[None]


def _preview(model: Any, latents: Tensor) -> Tensor:
    shape = model.model.latent_format
    factors = getattr(shape, "latent_rgb_factors", None) or [[1 / latents.shape[1]] * 3] * latents.shape[1]
    bias = getattr(shape, "latent_rgb_factors_bias", None) or [0.0] * 3
    small = torch.einsum("bchw,cd->bdhw", shape.process_in(latents), torch.tensor(factors)) + torch.tensor(bias).view(
        1, 3, 1, 1
    )
    return F.interpolate(((small + 1) / 2).clamp(0, 1), scale_factor=CELL_PX).movedim(1, -1)
