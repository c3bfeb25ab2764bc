"""Targets and drags: what is refused, and what a control becomes at latent size."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rg_engine.errors import TargetError
from rg_engine.guidance import Target, chain
from rg_engine.guidance.points import draw_drags, parse_drags
from rg_engine.guidance.targets import fit
from rg_engine.types import Drag

CPU = torch.device("cpu")
IMAGE = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(0))
DRAGS = (Drag((0.1, 0.2), (0.3, 0.4)),)


@pytest.mark.parametrize(
    ("kind", "given", "words"),
    [
        ("spatial", {"weight": -1.0}, "weight .*0 or more"),
        ("spatial", {"weight": math.nan}, "weight"),
        ("spatial", {"weight": math.inf}, "weight"),
        ("spatial", {"start_percent": -0.1}, "between 0 and 1"),
        ("spatial", {"end_percent": 1.1}, "between 0 and 1"),
        ("spatial", {"end_percent": math.nan}, "between 0 and 1"),
        ("spatial", {"start_percent": 0.5, "end_percent": 0.5}, "0.5 is not before end_percent 0.5"),
        ("spatial", {"start_percent": 0.7, "end_percent": 0.2}, "never guide"),
        ("spatial", {"image": None}, "connect image"),
        ("spatial", {"image": torch.rand(8, 8, 3)}, r"image .*\(8, 8, 3\): expected 4 dimensions"),
        ("spatial", {"image": torch.rand(1, 0, 8, 3)}, r"image .*\(1, 0, 8, 3\)"),
        ("spatial", {"image": torch.full((1, 8, 8, 3), math.nan)}, "image .*NaN"),
        ("spatial", {"image": torch.full((1, 8, 8, 3), math.inf)}, "image .*infinite"),
        ("spatial", {"image": torch.rand(1, 8, 8, 4)}, "3 channels but image has 4"),
        ("spatial", {"image": torch.rand(1, 8, 8, 1)}, "3 channels but image has 1"),
        ("spatial", {"mask": torch.rand(8, 8)}, "mask .*expected 3 dimensions"),
        ("spatial", {"mask": torch.rand(0, 8, 8)}, r"mask .*\(0, 8, 8\)"),
        ("spatial", {"mask": torch.full((1, 8, 8), math.nan)}, "mask .*NaN"),
        ("appearance", {"reference_latent": torch.rand(4, 8, 8)}, "reference_latent .*expected 4 dimensions"),
        ("appearance", {"reference_latent": torch.full((1, 4, 8, 8), math.nan)}, "reference_latent .*NaN"),
        ("correspondence", {}, "connect drag_points"),
        ("correspondence", {"drags": ()}, "connect drag_points"),
        ("keypoint", {}, "connect readout"),
        ("lgp", {}, "connect reference_latent"),
        ("spatial", {"readout": torch.rand(1, 2, 8, 8)}, "reads 3 channels but readout has 2"),
        ("spatial", {"readout": torch.rand(3, 8, 8)}, "readout .*expected 4 dimensions"),
        ("keypoint", {"readout": torch.rand(1, 3, 8, 8)}, "reads 5 channels but readout has 3"),
        ("keypoint", {"readout": torch.full((1, 5, 8, 8), math.nan)}, "readout .*NaN"),
        ("keypoint", {"image": IMAGE}, "connect readout"),
        ("lgp", {"reference_latent": torch.rand(1, 16, 8, 8)}, "reads 5 channels but reference_latent has 16"),
        ("lgp", {"readout": torch.rand(1, 1, 8, 8)}, "reads 5 channels but readout has 1"),
        ("lgp", {"reference_latent": torch.full((1, 5, 8, 8), math.inf)}, "reference_latent .*infinite"),
        ("lgp", {"image": IMAGE}, "connect reference_latent"),
    ],
)
def test_a_bad_target_is_refused_in_words(make_head, kind, given, words):
    channels = 5 if kind in ("keypoint", "lgp") else None
    with pytest.raises(TargetError, match=words):
        Target(
            head=make_head(kind, name="my head", output_channels=channels),
            **{"image": IMAGE if kind == "spatial" else None, **given},
        )


def test_good_targets_of_each_kind_are_accepted_and_say_whether_they_need_a_source(make_head):
    spatial = Target(head=make_head(), image=IMAGE, mask=torch.ones(1, 3, 5))
    look = Target(head=make_head("appearance"))
    other_look = Target(head=make_head("appearance"), reference_latent=torch.zeros(1, 4, 8, 8))
    drag = Target(head=make_head("correspondence"), drags=DRAGS)
    pose = Target(head=make_head("keypoint", output_channels=5), readout=torch.zeros(1, 5, 6, 7))
    sketch = Target(head=make_head("lgp", output_channels=5), reference_latent=torch.zeros(1, 5, 8, 8))
    everything = (spatial, look, other_look, drag, pose, sketch)
    assert [target.needs_source for target in everything] == [False, True, False, True, False, False]
    assert [target.needs_reference for target in everything] == [False, False, True, False, False, False]


@pytest.mark.parametrize("what", ["image", "mask", "reference_latent", "readout"])
def test_pictures_are_one_or_one_for_each_latent(make_head, what):
    shape = {"image": (8, 8, 3), "mask": (8, 8), "reference_latent": (4, 8, 8), "readout": (3, 8, 8)}[what]

    def target(batch):
        return Target(head=make_head(), **{"image": IMAGE, what: torch.ones(batch, *shape)})

    target(1).check_batch(3)
    target(3).check_batch(3)
    with pytest.raises(TargetError, match=f"{what} .*batch of 2 but 3 pictures are being made"):
        target(2).check_batch(3)
    with pytest.raises(TargetError, match="batch of 2 but 1 picture is being made"):
        target(2).check_batch(1)


# Controls and regions


def test_fit_crops_to_the_aspect_ratio_about_the_centre():
    wide = torch.rand(2, 3, 4, 10)
    assert torch.equal(fit(wide, (4, 4)), wide[..., 3:7])
    tall = torch.rand(2, 3, 10, 4)
    assert torch.equal(fit(tall, (2, 4)), tall[..., 4:6, :])


def test_fit_averages_when_it_shrinks():
    picture = torch.rand(2, 3, 8, 16)
    expected = picture[..., 4:12].reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(fit(picture, (4, 4)), expected)


def test_fit_interpolates_when_it_enlarges():
    picture = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])
    assert fit(picture, (4, 4)).tolist() == [[[[0.0, 0.25, 0.75, 1.0]] * 4]]


@pytest.mark.parametrize(("shape", "size"), [((1, 300), (16, 16)), ((300, 1), (16, 8)), ((3, 7), (5, 64)), ((1, 1), (2, 9))])
def test_fit_gives_the_size_asked_for_from_any_picture(shape, size):
    torch.testing.assert_close(fit(torch.ones(1, 3, *shape), size), torch.ones(1, 3, *size))


def test_a_control_lies_in_the_head_s_range_for_every_picture_of_the_batch(make_head):
    image = torch.cat([torch.zeros(1, 8, 4, 3), torch.ones(1, 8, 4, 3)], 2)
    control = Target(head=make_head(control_range=(-0.5, 2.0)), image=image).control((4, 4), 3, CPU)
    assert control.shape == (3, 3, 4, 4)
    assert control[..., :2].unique().tolist() == [-0.5]
    assert control[..., 2:].unique().tolist() == [2.0]


def test_a_head_of_one_channel_is_compared_with_the_mean_of_the_colours(make_head):
    target = Target(head=make_head(output_channels=1, control_range=(0.0, 1.0)), image=IMAGE)
    torch.testing.assert_close(target.control((8, 8), 1, CPU), IMAGE.mean(-1)[:, None])


@pytest.mark.parametrize(
    ("kind", "what"), [("spatial", "readout"), ("keypoint", "readout"), ("lgp", "readout"), ("lgp", "reference_latent")]
)
def test_what_a_head_has_read_is_a_control_as_it_is(make_head, kind, what):
    given = 3 * torch.randn(1, 5, 4, 6)
    target = Target(head=make_head(kind, output_channels=5, control_range=(0.0, 1.0)), **{what: given})
    assert torch.equal(target.control((4, 6), 2, CPU), given.expand(2, -1, -1, -1))
    torch.testing.assert_close(target.control((2, 3), 1, CPU), given.view(1, 5, 2, 2, 3, 2).mean((3, 5)))


def test_a_readout_goes_before_an_image_or_a_latent(make_head):
    maps, latent = torch.randn(2, 1, 5, 4, 4)
    spatial = Target(head=make_head(output_channels=3), image=IMAGE, readout=maps[:, :3])
    sketch = Target(head=make_head("lgp", output_channels=5), reference_latent=latent, readout=maps)
    assert torch.equal(spatial.control((4, 4), 1, CPU), maps[:, :3])
    assert torch.equal(sketch.control((4, 4), 1, CPU), maps)


def test_a_region_is_the_mask_at_latent_size(make_head):
    mask = torch.zeros(1, 8, 8)
    mask[:, :3] = 1
    region = Target(head=make_head(), image=IMAGE, mask=mask).region((4, 4), 2, CPU)
    assert region.shape == (2, 1, 4, 4)
    assert region[0, 0, :, 0].tolist() == [1.0, 0.5, 0.0, 0.0]


def test_what_a_target_does_not_have_is_none(make_head):
    target = Target(head=make_head("correspondence"), drags=DRAGS, image=IMAGE)
    assert target.control((4, 4), 1, CPU) is None
    assert target.region((4, 4), 1, CPU) is None


def test_a_chain_runs_from_first_to_last_and_leaves_out_weight_0(make_head):
    first = Target(head=make_head(), image=IMAGE)
    idle = Target(head=make_head(), image=IMAGE, weight=0.0, previous=first)
    last = Target(head=make_head(), image=IMAGE, previous=idle)
    assert chain(last) == (first, last)
    assert chain(None) == ()


# Drags


def points(*drags, version=1):
    return json.dumps({"version": version, "drags": list(drags)})


def test_drags_are_read_from_their_json():
    assert parse_drags(points({"from": [0, 0.25], "to": [1, 0.5]}, {"from": [0.1, 0.2], "to": [0.3, 0.4], "note": "x"})) == (
        Drag((0.0, 0.25), (1.0, 0.5)),
        Drag((0.1, 0.2), (0.3, 0.4)),
    )


@pytest.mark.parametrize("text", ["", "  \n", points()])
def test_no_drags_are_none(text):
    assert parse_drags(text) == ()


GOOD = {"from": [0.5, 0.5], "to": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"version": 1,\n "drags"', "not JSON .line 2"),
        ("[" * 100000, "not JSON"),
        ('{"version": 1, "drags": [' + "9" * 5000 + "]}", "points|drag 1"),
        ("[]", "no list of drags"),
        ("null", "no list of drags"),
        ('{"version": 1}', "no list of drags"),
        ('{"version": 1, "drags": {}}', "no list of drags"),
        ('{"drags": []}', "version None"),
        (points(version=2), "version 2.*reads version 1"),
        (points(GOOD, 3), "drag 2 needs a 'from' and a 'to'"),
        (points({"from": [0, 0]}), "drag 1 needs"),
        (points({"from": 1, "to": [0, 0]}), "'from' of drag 1 is 1"),
        (points({"from": [0, 0, 0], "to": [0, 0]}), r"'from' of drag 1 is \[0, 0, 0\]"),
        (points({"from": [0, 0], "to": [0, "1"]}), r"'to' of drag 1.*expected two numbers"),
        (points({"from": [0, 0], "to": [0, True]}), "'to' of drag 1"),
        (points({"from": [0, 0], "to": [0, None]}), "'to' of drag 1"),
        (points(GOOD, {"from": [0, 0], "to": [0, 1.5]}), r"drag 2: .*\(0, 1.5\) lies outside"),
        (points({"from": [-0.1, 0], "to": [0, 0]}), r"drag 1: .*\(-0.1, 0\) lies outside"),
        ('{"version": 1, "drags": [{"from": [NaN, 0], "to": [0, 0]}]}', r"drag 1: .*\(nan, 0\)"),
        ('{"version": 1, "drags": [{"from": [Infinity, 0], "to": [0, 0]}]}', "drag 1"),
        ('{"version": 1, "drags": [{"from": [1' + "0" * 400 + ', 0], "to": [0, 0]}]}', "drag 1"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_points_are_refused_and_say_where(text, words):
    with pytest.raises(TargetError, match=words):
        parse_drags(text)


@pytest.mark.parametrize("point", [(-0.01, 0.5), (0.5, 1.01), (math.nan, 0.5), (0.5, math.inf)])
def test_a_drag_stays_inside_the_picture(point):
    for ends in ((point, (0.5, 0.5)), ((0.5, 0.5), point)):
        with pytest.raises(TargetError, match="outside the picture"):
            Drag(*ends)


def test_drags_are_drawn_where_they_are_and_nowhere_else():
    pictures = torch.full((2, 64, 96, 3), 0.5)
    drawn = draw_drags((Drag((0.25, 0.5), (0.75, 0.5)),), pictures)
    changed = (drawn - pictures).abs().amax(-1) > 0.1
    assert drawn.shape == pictures.shape
    assert changed[:, 32, 24:72].all()  # the arrow
    assert not changed[:, :20].any()
    assert not changed[:, 44:].any()
    blue, red = drawn[0, 32, 24], drawn[0, 32, 69]
    assert blue[2] > blue[0]  # a ring at the start
    assert red[0] > red[2]  # a head at the end


def test_a_mask_that_is_cropped_away_is_refused_instead_of_guiding_nowhere(make_head):
    left = torch.zeros(1, 8, 16)
    left[:, :, :3] = 1
    given = {"reference_latent": torch.zeros(1, 4, 8, 8), "reference_mask": left}
    target = Target(head=make_head("appearance"), **given)
    assert target.region((8, 16), 1, CPU, "reference_mask").max() == 1
    with pytest.raises(TargetError, match=r"reference_mask .* cropped away, since .* aspect 8:8"):
        target.region((8, 8), 1, CPU, "reference_mask")


def test_frames_of_a_target_without_weight_do_not_count(make_head):
    head = make_head("correspondence")
    first = Target(head=head, drags=DRAGS, frames=5, weight=0.0)
    assert Target(head=head, drags=DRAGS, frames=2, previous=first).drag_frames == 2
