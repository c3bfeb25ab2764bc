"""Follow Crops: a prompt that says which part of the picture is being sampled."""

from __future__ import annotations

import pytest
import torch
from comfyui_host import engine, node

pytestmark = pytest.mark.usefixtures("comfyui")


def refused(match: str):
    return pytest.raises(engine("errors").TargetError, match=match)


def follow(positive, height=128, width=128):
    return node("RG_FollowCrops", positive=positive, image=torch.zeros(1, height, width, 3))


def cropped(positive, left, top, right, bottom):
    """As a detailer crops the masks of its prompts."""
    return [[given, {**options, "mask": options["mask"][:, top:bottom, left:right]}] for given, options in positive]


def conds(small, positive):
    """The prompts as a guider holds them."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(small.model)
    guider.set_conds(positive, small.negative)
    return guider.original_conds["positive"]


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_marked_prompt_gives_the_same_picture(small, sampler):
    plain = small.plain(sampler_name=sampler)
    for positive in (follow(small.positive), cropped(follow(small.positive), 100, 300, 500, 900)):
        assert torch.allclose(small.plain(sampler_name=sampler, positive=positive), plain, rtol=1e-4, atol=1e-4)


def test_several_marked_prompts_give_the_same_picture(small):
    both = [*small.positive, *small.negative]
    marked = small.plain(positive=follow(both))
    assert torch.allclose(marked, small.plain(positive=both), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(marked, small.plain(), rtol=1e-2, atol=1e-2)


def test_a_guider_knows_the_crop(small):
    crop_of = engine("guidance.crop_marks").crop_of
    assert crop_of(conds(small, small.positive)) is None
    assert crop_of(conds(small, follow(small.positive))).is_whole
    found = crop_of(conds(small, cropped(follow(small.positive), 512, 256, 768, 1024)))
    assert (found.x, found.y, found.width, found.height) == pytest.approx((0.5, 0.25, 0.25, 0.75), abs=1e-4)


def test_masks_and_areas_of_the_prompts_own_are_refused(small):
    import nodes

    masked = nodes.ConditioningSetMask().append(small.positive, torch.ones(1, 16, 16), "default", 1.0)[0]
    with refused(r"prompt 1 of 1 has a mask of its own.*remove the node that sets a mask"):
        follow(masked)
    area = nodes.ConditioningSetArea().append(small.positive, 64, 64, 0, 0, 1.0)[0]
    with refused(r"prompt 2 of 2 has an area of its own.*remove the node that sets an area"):
        follow([*small.positive, *area])


def test_a_mask_set_afterwards_is_refused(small):
    import nodes

    masked = nodes.ConditioningSetMask().append(follow(small.positive), torch.ones(1, 16, 16), "default", 1.0)[0]
    with refused("Put Follow Crops last"):
        engine("guidance.crop_marks").crop_of(conds(small, masked))
