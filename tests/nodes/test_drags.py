"""Drags: anchors and other odd arrows, masks of what may move, pictures of another aspect, frames."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_host import engine

RIGHT, LEFT = ((0.3, 0.3), (0.7, 0.6)), ((0.7, 0.6), (0.3, 0.3))
ANCHOR = ((0.2, 0.8), (0.2, 0.8))


@pytest.fixture
def kit(small, monkeypatch):
    """small, and: target(*arrows, ...); draw(target, ...) -> latent; guider(target, **settings); calls(), of the network."""
    monkeypatch.setattr(engine("comfy_host.guided.model"), "SOURCES", engine("comfy_host.guided.source_pass").SourcePasses())
    head, seen = small.head("correspondence"), []
    small.model.model.diffusion_model.register_forward_pre_hook(lambda *_: seen.append(1))
    inputs = {
        "seed": 5, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "positive": small.positive,
        "negative": small.negative, "latent": latent(),
    }  # fmt: skip

    def target(*arrows, **more):
        drags = tuple(engine("types").Drag(*arrow) for arrow in arrows)
        return engine("guidance").Target(**{"head": head, "drags": drags, "end_percent": 0.6, **more})

    def draw(target, strength=2.0, **more):
        seen.clear()
        settings = engine("guidance").GuidanceSettings(strength=strength)
        return engine("comfy_host.guided.sampling").guided_ksampler(small.model, target, settings, **{**inputs, **more})[
            "samples"
        ]

    def guider(target, **settings):
        settings = engine("guidance").GuidanceSettings(**settings)
        make = engine("comfy_host.guided.sampling").readout_guider
        return make(small.model, small.positive, small.negative, 4.0, target, settings)

    return SimpleNamespace(small=small, head=head, target=target, draw=draw, guider=guider, calls=lambda: len(seen))


def latent(height=8, width=8, batch=1):
    return {"samples": torch.zeros(batch, 4, height, width)}


def refused(match):
    return pytest.raises(engine("errors").TargetError, match=match)


# Arrows


def test_a_drag_brings_what_was_at_its_start_to_its_end(kit):
    from comfyui_host import node

    def likeness(samples):
        """Of what is at the end now to what was at the start in the source."""
        readouts = [
            node("RG_ReadOut", model=kit.small.model, head=kit.head, latent={"samples": each}, noise_percent=0.1, seed=0,
                 positive=kit.small.positive)[0]
            for each in (source, samples)
        ]  # fmt: skip
        gather = engine("losses.correspondence").gather
        start, end = (gather(maps, torch.tensor([point])) for maps, point in zip(readouts, RIGHT, strict=True))
        return float(torch.cosine_similarity(start, end, dim=1))

    source = kit.draw(None, steps=8)
    assert likeness(kit.draw(kit.target(RIGHT), steps=8)) > likeness(source) + 0.03


def test_an_anchor_alone_changes_nothing(kit):
    assert torch.allclose(kit.draw(kit.target(ANCHOR)), kit.draw(None), rtol=1e-3, atol=0.1)


def test_an_anchor_beside_a_drag_counts(kit):
    alone, anchored = kit.draw(kit.target(RIGHT)), kit.draw(kit.target(RIGHT, ANCHOR))
    assert torch.isfinite(anchored).all()
    assert (anchored - alone).norm() > 0.02 * (alone - kit.draw(None)).norm()


def test_the_loss_of_an_anchor_is_least_where_nothing_changed(comfyui):
    correspondence_loss = engine("losses").correspondence_loss
    source, other = torch.randn(2, 1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    starts, ends = torch.tensor([[0.1, 0.1], [0.9, 0.9]]), torch.tensor([[0.1, 0.9], [0.9, 0.9]])  # a drag and an anchor
    changed = source.clone()
    changed[..., 2:, 2:] = other[..., 2:, 2:]  # about the anchor
    losses = [float(correspondence_loss(readout, source, starts=starts, ends=ends)) for readout in (source, changed)]
    assert losses[0] < losses[1]


def test_an_arrow_drawn_twice_is_the_arrow(kit):
    once, twice, unguided = kit.draw(kit.target(RIGHT)), kit.draw(kit.target(RIGHT, RIGHT)), kit.draw(None)
    assert (once - twice).norm() < 0.05 * (once - unguided).norm()


def test_arrows_that_cross_or_change_places(kit):
    unguided = kit.draw(None)
    for arrows in ((RIGHT, LEFT), (RIGHT, ((0.7, 0.3), (0.3, 0.6)))):
        out = kit.draw(kit.target(*arrows))
        assert torch.isfinite(out).all()
        assert not torch.allclose(out, unguided, atol=1.0)


def test_two_hundred_arrows_cost_no_more_model_calls_than_one(kit):
    points = torch.rand(200, 2, 2, generator=torch.Generator().manual_seed(0)).tolist()
    kit.draw(kit.target(RIGHT))
    calls = kit.calls()
    out = kit.draw(kit.target(*((tuple(a), tuple(b)) for a, b in points)), seed=6)
    assert torch.isfinite(out).all()
    assert kit.calls() == calls


def test_arrows_to_the_border_of_the_picture(kit):
    assert torch.isfinite(kit.draw(kit.target(((0.0, 0.0), (1.0, 1.0)), ((1.0, 0.5), (0.0, 0.5))))).all()


def test_no_arrows_and_arrows_off_the_picture_are_refused(kit):
    parse = engine("guidance.points").parse_drags
    with refused("connect drag_points with an arrow"):
        kit.target()
    with refused("connect drag_points with an arrow"):
        kit.target(drags=parse('{"version": 1, "drags": []}'))
    with refused(r"\(1.2, 0.5\) lies outside the picture"):
        kit.target(((0.5, 0.5), (1.2, 0.5)))
    with refused(r"drag 2: .*\(0.5, -0.1\) lies outside the picture"):
        parse('{"version": 1, "drags": [{"from": [0, 0], "to": [1, 1]}, {"from": [0.5, -0.1], "to": [0, 0]}]}')


@pytest.mark.parametrize("sampler", ["dpm_adaptive", "dpm_fast", "uni_pc"])
def test_samplers_that_step_in_their_own_way(kit, sampler):
    """dpm_adaptive takes other steps in the guided pass than in the source's."""
    inputs = {"sampler_name": sampler, "steps": 8, "seed": 0}
    unguided = kit.draw(None, **inputs)
    out = kit.draw(kit.target(RIGHT), strength=16.0, **inputs)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, unguided, atol=1.0)


# A mask of what may move


def left_half(height=8, width=8):
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


INSIDE = ((0.1, 0.3), (0.4, 0.6))


@pytest.mark.parametrize(
    ("sampler", "mode"), [("euler", "fast"), ("euler", "reference"), ("euler_ancestral", "fast"), ("in place", "fast")]
)
def test_outside_its_mask_a_drag_leaves_every_guided_step_s_latent_as_the_source_s(kit, sampler, mode):
    import comfy.samplers

    def in_place(model, x, sigmas, extra_args, callback, disable):
        """Euler, with a latent that changes in place."""
        x = x.clone()
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones(1), **extra_args)
            callback({"x": x, "i": i, "denoised": denoised})
            x += (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    sampler = comfy.samplers.KSAMPLER(in_place) if sampler == "in place" else comfy.samplers.sampler_object(sampler)
    guider = kit.guider(kit.target(INSIDE, mask=left_half(), end_percent=1.0), mode=mode, strength=2.0, interval=0.0)
    sigmas = comfy.samplers.calculate_sigmas(kit.small.model.get_model_object("model_sampling"), "simple", 4)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = []  # as each step's model call left them: the source's four, then the guided ones
    guider.sample(
        noise, latent()["samples"], sampler, sigmas, callback=lambda step, x0, x, total: latents.append(x.clone()), seed=0
    )
    assert len(latents) == 8
    for source, guided in zip(latents[:4], latents[4:], strict=True):
        torch.testing.assert_close(guided[..., 4:], source[..., 4:], rtol=0, atol=2e-5)  # rounding of values up to 44
        assert not torch.allclose(guided[..., :4], source[..., :4], atol=1e-2)


def test_a_mask_of_what_may_move_keeps_the_rest_of_the_picture_nearer_to_the_source(kit):
    source = kit.draw(None)
    free, held = (kit.draw(kit.target(INSIDE, **more)) - source for more in ({}, {"mask": left_half()}))
    assert held[..., 4:].norm() < free[..., 4:].norm()


def test_with_strength_0_a_drag_with_a_mask_is_ksampler_bit_for_bit(kit):
    unguided = kit.draw(None)
    calls = kit.calls()
    assert torch.equal(kit.draw(kit.target(INSIDE, mask=left_half()), strength=0.0), unguided)
    assert kit.calls() == calls  # no source pass either


def test_an_arrow_from_where_nothing_may_move_is_refused(kit):
    with refused("drag 2 of head 'head_correspondence.pt' starts where the mask is black"):
        kit.draw(kit.target(INSIDE, ((0.8, 0.3), (0.4, 0.6)), mask=left_half()))
    held = kit.draw(kit.target(INSIDE, ((0.8, 0.3), (0.8, 0.3)), mask=left_half()))  # an anchor may
    assert torch.isfinite(held).all()


# Arrows drawn on a picture of another aspect


@pytest.mark.parametrize("size", [(8, 8), (16, 8)])
@pytest.mark.parametrize("stretch", [2.0, 0.5])
def test_arrows_of_another_aspect_go_through_the_crop_about_the_centre(kit, size, stretch):
    """As the picture itself would, of which only the middle half is made."""
    height, width = size
    aspect = stretch * width / height
    along = 0 if stretch > 1 else 1  # which of x and y is cropped

    def arrow(start, end):
        across = [0.4, 0.4]
        across[along] = start
        to = [0.6, 0.6]
        to[along] = end
        return tuple(across), tuple(to)

    mapped = kit.draw(kit.target(arrow(0.375, 0.625), drag_aspect=aspect), latent=latent(height, width))
    assert torch.equal(mapped, kit.draw(kit.target(arrow(0.25, 0.75)), latent=latent(height, width)))
    with refused("drag 2 .*leaves the picture that is made: .*Make the latent of the picture's aspect"):
        kit.draw(kit.target(arrow(0.375, 0.625), arrow(0.5, 0.2), drag_aspect=aspect), latent=latent(height, width))


def test_arrows_of_the_latent_s_aspect_stay_where_they_are(kit):
    same = kit.draw(kit.target(RIGHT, drag_aspect=2.0), latent=latent(8, 16))
    assert torch.equal(same, kit.draw(kit.target(RIGHT), latent=latent(8, 16)))


# Frames


def ends(target):
    return [drag.end for drag in target.drags]


def test_a_frame_takes_every_drag_of_the_chain_part_of_its_way(kit):
    spatial = kit.small.target()
    first = kit.target(((0.5, 0.5), (0.5, 0.1)), previous=spatial)
    last = kit.target(((0.2, 0.4), (0.6, 0.8)), ANCHOR, previous=first, frames=4)
    assert last.drag_frames == 4
    half = last.at_frame(2)
    assert half.drag_frames == 1
    assert [drag.start for drag in half.drags] == [(0.2, 0.4), (0.2, 0.8)]
    torch.testing.assert_close(torch.tensor(ends(half)), torch.tensor([(0.4, 0.6), (0.2, 0.8)]))
    torch.testing.assert_close(torch.tensor(ends(half.previous)), torch.tensor([(0.5, 0.3)]))
    assert half.previous.previous.drags is None
    assert half.previous.previous.image is spatial.image


def test_frames_of_the_first_of_a_chain_are_those_of_all(kit):
    chained = kit.target(RIGHT, previous=kit.target(LEFT, frames=3), frames=2)
    assert chained.drag_frames == 3
    assert ends(chained.at_frame(3)) == [RIGHT[1]]
    assert ends(chained.at_frame(3).previous) == [LEFT[1]]


def test_the_last_frame_has_the_drags_as_they_were_drawn(kit):
    tenths = [step / 10 for step in range(11)]
    target = kit.target(*(((x, y), (y, x)) for x in tenths for y in tenths), frames=3)
    assert target.at_frame(3).drags == target.drags


def test_frames_make_a_picture_each_from_one_source_pass(kit):
    kit.draw(None)
    plain = kit.calls()
    whole = kit.draw(kit.target(RIGHT))
    guided = kit.calls() - plain
    frames = kit.draw(kit.target(RIGHT, frames=3), seed=5)
    assert kit.calls() == 3 * guided  # the source is that of the drag before
    assert frames.shape == (3, 4, 8, 8)
    assert torch.equal(frames[2:], whole)
    halfway = ((0.3, 0.3), (0.3 + 2 / 3 * (0.7 - 0.3), 0.3 + 2 / 3 * (0.6 - 0.3)))
    assert torch.equal(frames[1:2], kit.draw(kit.target(halfway)))
    assert not torch.equal(frames[:1], frames[1:2])
    kit.draw(kit.target(RIGHT, frames=3), seed=6)
    assert kit.calls() == plain + 3 * guided


def test_frames_need_a_single_latent_and_the_sampler_node(kit):
    with refused("drags in 3 frames make a batch of their own: give a latent of one picture, not of 2"):
        kit.draw(kit.target(RIGHT, frames=3), latent=latent(batch=2))
    with refused("set frames of Drag Points to 1 for a guider"):
        kit.guider(kit.target(RIGHT, frames=3))
    with refused("frames is 0: it must be between 1 and 1000"):
        kit.target(RIGHT, frames=0)
