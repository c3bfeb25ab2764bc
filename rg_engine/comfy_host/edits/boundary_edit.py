"""Edits a picture by one move across a boundary: up to the mixing step, the move, and down again."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import latent_preview
import torch
from torch import Tensor

from ...boundaries import MOVES, Boundary, coordinate
from ...boundaries.boundary import LAST_TIMESTEP
from ...errors import BoundaryError
from ...guidance.targets import fit
from ..loaded.kept import Fingerprint, Kept
from ..loaded.model import known_backbone
from ..loaded.random_state import random_state_kept
from .crossing import Crossing, directions_of, go_down_across, path_of
from .hidden import Hidden
from .inversion import INVERTED, inversion_of
from .levels import sigmas_at, timesteps_up_to
from .passes import Prompts, SharedNoise, State, go_down, go_up, is_guided, unguided

MOST_INVERSIONS = 12
#: The inversions of this session, by all that they follow from, and where edited pictures came from.
INVERSIONS: Kept[State] = Kept(MOST_INVERSIONS)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """A boundary, how far to move across it, and where: mask (B or 1, H, W) in 0..1. previous: the edits made before it."""

    boundary: Boundary
    strength: float
    move: str = "by"
    mask: Tensor | None = None
    previous: Edit | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise BoundaryError(f"the strength is {self.strength}: give a number, 0 to leave the picture as it is")
        if self.move not in MOVES:
            raise BoundaryError(f"there is no move {self.move!r}: choose among {', '.join(MOVES)}")
        if self.mask is not None:
            check_mask(self.mask)
        for part in self.boundary.parts:
            if part.space == "region" and self.mask is None:
                raise BoundaryError("the boundary was fitted in a region: connect a mask of it in this picture")

    def chain(self) -> list[Edit]:
        """The edits in the order in which they are made."""
        return [*(self.previous.chain() if self.previous is not None else []), self]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditSettings:
    """strengths: a version of the picture for each, in place of the last edit's own. eta: 0 is DDIM, 1 the paper's code's.

    steps: levels from the picture up to the mixing step, 0 the boundary's own; noise_steps: levels of the whole way, of a
    picture that is sampled. refinements: of the inversion. stale: h handed on as the paper's code does.
    """

    strengths: tuple[float, ...] = ()
    eta: float = 0.0
    seed: int = 0
    steps: int = 0
    noise_steps: int = 0
    refinements: int = 0
    stale: bool = True

    def __post_init__(self) -> None:
        if not all(math.isfinite(each) for each in (*self.strengths, self.eta)) or not 0 <= self.eta <= 1:
            raise BoundaryError(f"strengths {self.strengths} must be numbers, and eta {self.eta:g} must lie between 0 and 1")


def check_mask(mask: Tensor) -> None:
    """Raises BoundaryError unless it is (B, H, W), of numbers."""
    if mask.ndim != 3 or not bool(torch.isfinite(mask).all()):
        raise BoundaryError(f"the mask is {tuple(mask.shape)}, or has values that are no numbers: give a mask of (B, H, W)")


def parse_strengths(text: str) -> tuple[float, ...]:
    """Strengths of a text like "-2, -1, 0, 1, 2". Raises BoundaryError for anything else."""
    try:
        return tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError as error:
        raise BoundaryError(f"strengths are {text!r}: give numbers, as -2, -1, 0, 1, 2") from error


def edit_pictures(
    model: Any, edit: Edit, latent: dict[str, Any], settings: EditSettings, prompts: Prompts, *, guided: Any = None
) -> tuple[dict[str, Any], str]:
    """A LATENT of the edited pictures (of each strength in turn, all pictures), and what was done, in words.

    An empty latent is sampled from noise of the seed and moved on its way. guided: a model for the way down, the same one
    with other guidance. Raises BoundaryError.
    """
    edits = edit.chain()
    chain = [each.boundary for each in edits]
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    _check(model, edits, samples, latent)
    directions = directions_of(chain)
    prompts.of(torch.arange(len(samples)), len(samples))
    path = path_of(model) if any(part.space == "h" for boundary in chain for part in boundary.parts) else None

    top = max(boundary.mixing_step for boundary in chain)
    steps = settings.steps or max(boundary.steps for boundary in chain)
    timesteps = sorted({*timesteps_up_to(top, steps), *(boundary.mixing_step for boundary in chain)})
    drawn = not bool(torch.count_nonzero(samples))
    noise_levels = settings.noise_steps or min(round(steps * LAST_TIMESTEP / top), LAST_TIMESTEP)
    above = [t for t in timesteps_up_to(LAST_TIMESTEP, noise_levels) if t > top] if drawn else timesteps[:-1]
    total = len(above) + len(timesteps)
    preview = latent_preview.prepare_callback(model, total)
    strengths = settings.strengths or (edit.strength,)
    versions, pictures = len(strengths), len(samples)

    with random_state_kept(comfy.model_management.get_torch_device()):
        if drawn:
            state, came = _from_noise(guided or model, samples, latent, above, top, settings.seed, prompts, path, preview)
        else:
            state, came = _inverted(model, samples, timesteps, settings.refinements, prompts, path, preview)
        crossings = [
            Crossing(
                boundary=each.boundary, move=each.move, mask=_cells(each.mask, samples, versions), directions=directions[k],
                strength=_by_version(strengths if each is edit else (each.strength,) * versions, pictures),
            )
            for k, each in enumerate(edits)
        ]  # fmt: skip
        h = None if state.h is None else _repeat(state.h, versions)
        start = State(timestep=top, z=_repeat(state.z, versions), h=h)
        out, moved = go_down_across(
            guided or model, start, timesteps[::-1], crossings, prompts, eta=settings.eta, stale=settings.stale,
            noise=SharedNoise(settings.seed, samples.shape, versions) if settings.eta > 0 else None,
            callback=lambda step, denoised, x, _: preview(len(above) + step, denoised, x, total),
        )  # fmt: skip
    out = out.to(comfy.model_management.intermediate_device())
    plain = path is None and settings.eta == 0 and guided is None and not is_guided(model)
    if plain and all(boundary.mixing_step == top for boundary in chain):
        INVERSIONS.keep(
            _fingerprint(model, out, timesteps, settings.refinements, prompts, path), moved
        )  # it is known exactly
    words = [came, f"Down in {len(timesteps)} calls, eta {settings.eta:g}.", *_told(crossings, start, prompts)]
    kept = {key: value for key, value in latent.items() if key not in ("batch_index", "samples", INVERTED)}
    return {**kept, "samples": out}, "\n".join(words)


def network_of(model: Any) -> str:
    """What a boundary belongs to: the kind of network, in words."""
    network = model.get_model_object("diffusion_model")
    backbone = known_backbone(network)
    return type(network).__name__ if backbone is None else backbone.describe()


def prompt_digest(positive: Any) -> str:
    return "" if positive is None else Fingerprint(positive).digest[:12]


def _check(model: Any, edits: Sequence[Edit], samples: Tensor, latent: dict[str, Any]) -> None:
    network, shape = network_of(model), tuple(samples.shape[1:])
    if samples.ndim != 4:
        raise BoundaryError(f"the latent is {tuple(samples.shape)}: pictures are edited, (B, C, h, w), not videos")
    if "noise_mask" in latent:
        raise BoundaryError("the latent has a noise mask, which an inverted picture can't keep: remove it, and connect mask")
    if inversion_of(latent) is not None:
        raise BoundaryError("the latent is inverted already (Invert Latent), up to noise: connect the picture's own latent")
    if not bool(torch.isfinite(samples).all()):
        raise BoundaryError("the latent has values that are not numbers (NaN): look at where it comes from")
    for each in edits:
        boundary = each.boundary
        if boundary.network != network or boundary.latent_shape[0] != shape[0]:
            raise BoundaryError(
                f"the boundary was fitted on {boundary.network}, {boundary.latent_shape[0]} latent channels; this model is "
                f"{network}, {shape[0]}: use a boundary of this kind of model"
            )
        if boundary.latent_shape != shape and any(part.space != "region" for part in boundary.parts):
            raise BoundaryError(
                f"the boundary was fitted on latents of {_size(boundary.latent_shape)}, this one is {_size(shape)}: a "
                f"boundary in {boundary.space} holds for its own size only. Resize the picture, or fit in a region"
            )
        if each.mask is not None and len(each.mask) not in (1, len(samples)):
            raise BoundaryError(f"there are {len(each.mask)} masks for {len(samples)} pictures: give one, or one each")
        if each.mask is not None and not bool(
            (fit(each.mask[:, None].float(), (shape[-2], shape[-1])).flatten(1).sum(1) > 0).all()
        ):
            raise BoundaryError("a mask is empty: paint what the boundary is about")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _inverted(
    model: Any, samples: Tensor, timesteps: list[int], refinements: int, prompts: Prompts, path: str | None, preview: Any
) -> tuple[State, str]:
    print_of = _fingerprint(model, samples, timesteps, refinements, prompts, path)
    known = INVERSIONS.find(print_of)
    if known is not None:
        return known, "The inversion was kept from before."
    (state,) = go_up(
        model, samples, timesteps, prompts, keep=timesteps[-1:], path=path, refinements=refinements, callback=preview
    )
    INVERSIONS.keep(print_of, state)
    calls = (len(timesteps) - 1) * (1 + refinements)
    return state, f"Inverted to timestep {timesteps[-1]} in {calls} calls."


def _fingerprint(
    model: Any, samples: Tensor, timesteps: list[int], refinements: int, prompts: Prompts, path: str | None
) -> Fingerprint:
    patched = (model.model, str(model.patches_uuid), model.object_patches, model.injections, model.model_options)
    sigmas = sigmas_at(model.get_model_object("model_sampling"), timesteps)
    asked = (prompts.positive, prompts.negative, prompts.cfg)
    return Fingerprint(
        patched, unguided(model).wrappers, model.callbacks, samples, timesteps, sigmas, refinements, asked, path
    )


def _from_noise(
    model: Any, samples: Tensor, latent: dict[str, Any], above: list[int], top: int, seed: int, prompts: Prompts, path:
    str | None, preview: Any,
) -> tuple[State, str]:  # fmt: skip
    z = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    hidden = None if path is None else Hidden(path)
    first = State(timestep=above[-1], z=z.float().cpu())
    _, state = go_down(model, first, [*above[::-1], top], prompts, hidden=hidden, callback=preview)
    return state, f"Sampled from noise of seed {seed} to timestep {top} in {len(above)} calls."


def _by_version(strengths: Sequence[float], pictures: int) -> Tensor:
    return torch.tensor(strengths, dtype=torch.float64).repeat_interleave(pictures)


def _repeat(value: Tensor, versions: int) -> Tensor:
    return value.repeat(versions, *[1] * (value.ndim - 1))


def _cells(mask: Tensor | None, samples: Tensor, versions: int) -> Tensor | None:
    if mask is None:
        return None
    cells = fit(mask[:, None].float().clamp(0, 1).cpu(), (samples.shape[-2], samples.shape[-1]))
    return cells if len(cells) == 1 else _repeat(cells, versions)


def _told(crossings: Sequence[Crossing], start: State, prompts: Prompts) -> list[str]:
    words = []
    for number, each in enumerate(crossings, 1):
        boundary = each.boundary
        if boundary.prompt != prompt_digest(prompts.positive):
            words.append(f"Boundary {number} was fitted with another prompt than this picture's.")
        for part, direction in zip(boundary.parts, each.directions, strict=True):
            if direction.kept < 0.999:
                words.append(f"Boundary {number} in {part.space}: {1 - direction.kept:.0%} of it was an earlier one's.")
            value = start.z if part.space != "h" else start.h
            if value is not None and boundary.mixing_step == start.timestep:
                along = (coordinate(part, value, each.mask) - part.middle) / (part.gap / 2)
                places = ", ".join(f"{float(v):+.2f}" for v in along[:8])
                words.append(
                    f"Boundary {number} in {part.space}: pictures began at {places} (the classes' means are -1 and +1)."
                )
    return words
