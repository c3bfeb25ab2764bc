"""The authors' settings, by name (DOODL's demo notebook, and the defaults of ``gen``)."""

from __future__ import annotations

import dataclasses

from .update import UpdateSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """update; updates, how many; crops and crop_power, of losses that look at crops. All: 50 steps, cfg 7.5, coupled
    latents."""

    name: str
    update: UpdateSettings
    updates: int = 50
    crops: int = 16
    crop_power: float = 0.3


_USUAL = UpdateSettings(mode="reference", noise=1e-4)

PRESETS = (
    Preset(name="CLIP text", update=_USUAL),
    Preset(name="classifier", update=dataclasses.replace(_USUAL, loss_scale=0.05, clip=1e-2, noise=1e-3)),
    Preset(
        name="personalisation", update=dataclasses.replace(_USUAL, loss_scale=3.0, clip=3e-3, noise=0.0), updates=500,
        crop_power=0.06,
    ),
    Preset(
        name="aesthetic editing", update=dataclasses.replace(_USUAL, noise=0.0, tied=False, keep="none"), updates=25,
    ),
    Preset(name="symmetry", update=_USUAL),
)  # fmt: skip


def preset(name: str) -> Preset:
    return next(each for each in PRESETS if each.name == name)
