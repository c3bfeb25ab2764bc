"""Identity: a region of the picture is compared with a region of the reference, wherever that lies."""

from __future__ import annotations

import math

import pytest
import torch

from rg_engine.errors import TargetError
from rg_engine.guidance import Branch, Objective, Target
from rg_engine.losses import appearance_loss, identity_loss
from rg_engine.types import Drag

CPU = torch.device("cpu")


@pytest.fixture
def maps():
    """A readout and a reference, (2, 6, 5, 4) in float64, and z's extents (2,)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 6, 5, 4, generator=generator, dtype=torch.float64)
    return a, b, torch.tensor([2.0, 3.0], dtype=torch.float64)


def region(rows, columns, size=(5, 4), batch=2):
    mask = torch.zeros(batch, 1, *size, dtype=torch.float64)
    mask[..., rows, columns] = 1
    return mask


def test_a_case_worked_out_by_hand():
    reference = torch.tensor([[[[2.0, 0.0, 5.0]], [[0.0, 0.5, 5.0]]]])  # (1, 2, 1, 3): two directions and a third outside
    reference_mask = torch.tensor([[[[1.0, 1.0, 0.0]]]])
    readout = torch.tensor([[[[3.0, 0.0, -1.0]], [[3.0, 1.0, -1.0]]]])
    loss = identity_loss(readout, reference, reference_mask=reference_mask, z_extent=torch.tensor([2.0]))
    # The mean direction is (1, 1) / 2, whatever the lengths: at 0, 45 and 180 degrees to the readout's three places.
    expected = (0 + (1 - math.sqrt(0.5)) + 2) / 3 * 2**2
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_it_does_not_matter_where_in_its_picture_the_reference_stands(maps):
    readout, reference, extent = maps
    here = identity_loss(readout, reference, reference_mask=region(slice(1, 3), slice(0, 2)), z_extent=extent)
    moved = reference.roll((2, 1), (2, 3))
    there = identity_loss(readout, moved, reference_mask=region(slice(3, 5), slice(1, 3)), z_extent=extent)
    elsewhere = identity_loss(readout, moved, reference_mask=region(slice(1, 3), slice(0, 2)), z_extent=extent)
    torch.testing.assert_close(here, there)
    assert not torch.isclose(here, elsewhere).any()


def test_what_lies_outside_the_reference_s_mask_does_not_count(maps):
    readout, reference, extent = maps
    mask = region(slice(1, 3), slice(0, 2))
    other = torch.where(mask.bool(), reference, torch.randn_like(reference))
    losses = [identity_loss(readout, each, reference_mask=mask, z_extent=extent) for each in (reference, other)]
    torch.testing.assert_close(*losses)


def test_a_soft_mask_weighs_the_reference(maps):
    readout, reference, extent = maps
    mask = region(slice(0, 1), slice(0, 1)) + 0.25 * region(slice(2, 3), slice(3, 4))
    one, other = (
        reference[..., row, column] / reference[..., row, column].norm(dim=1)[:, None] for row, column in ((0, 0), (2, 3))
    )
    mean = (one + 0.25 * other)[:, :, None, None].expand_as(readout)
    torch.testing.assert_close(
        identity_loss(readout, reference, reference_mask=mask, z_extent=extent),
        appearance_loss(readout, mean, z_extent=extent),
    )


def test_it_is_the_appearance_loss_against_a_reference_that_is_the_same_everywhere(maps):
    readout, reference, extent = maps
    even = reference[..., 2:3, 1:2].expand_as(readout)
    mask = region(slice(1, 4), slice(0, 3))
    torch.testing.assert_close(
        identity_loss(readout, even, reference_mask=region(slice(0, 2), slice(0, 1)), z_extent=extent, mask=mask),
        appearance_loss(readout, even, z_extent=extent, mask=mask),
    )


def test_the_mask_says_where_it_should_be_found(maps):
    readout, reference, extent = maps
    wanted, found = region(slice(0, 2), slice(0, 2)), region(slice(2, 5), slice(1, 3))
    readout.requires_grad_()
    loss = identity_loss(readout, reference, reference_mask=wanted, z_extent=extent, mask=found)
    cropped = identity_loss(
        readout[..., 2:5, 1:3], reference[..., :2, :2],
        reference_mask=wanted[..., :2, :2], z_extent=extent,
    )  # fmt: skip
    torch.testing.assert_close(loss, cropped)
    (gradient,) = torch.autograd.grad(loss.sum(), readout)
    inside = found.bool().expand_as(gradient)
    assert (gradient[~inside] == 0).all()
    assert (gradient[inside] != 0).all()


def test_each_picture_has_its_own_reference(maps):
    readout, reference, extent = maps
    masks = torch.cat([region(slice(0, 2), slice(0, 2), batch=1), region(slice(3, 5), slice(1, 4), batch=1)])
    both = identity_loss(readout, reference, reference_mask=masks, z_extent=extent)
    alone = [
        identity_loss(readout[i : i + 1], reference[i : i + 1], reference_mask=masks[i : i + 1], z_extent=extent[i : i + 1])
        for i in range(2)
    ]
    torch.testing.assert_close(both, torch.cat(alone))


def test_a_step_against_the_gradient_makes_it_more_alike(maps):
    readout, reference, extent = maps
    readout.requires_grad_()
    wanted, found = region(slice(0, 2), slice(0, 2)), region(slice(2, 5), slice(1, 3))
    losses = [identity_loss(readout, reference, reference_mask=wanted, z_extent=extent, mask=found)]
    (gradient,) = torch.autograd.grad(losses[0].sum(), readout)
    losses.append(identity_loss(readout - 0.1 * gradient, reference, reference_mask=wanted, z_extent=extent, mask=found))
    assert (losses[1] < losses[0]).all()


def test_readouts_of_zero_give_finite_gradients(maps):
    _, reference, extent = maps
    readout = torch.zeros_like(reference).requires_grad_()
    loss = identity_loss(
        readout, torch.zeros_like(reference), reference_mask=region(slice(0, 2), slice(0, 2)), z_extent=extent
    )
    (gradient,) = torch.autograd.grad(loss.sum(), readout)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(gradient).all()


# As a target


def test_a_target_with_a_reference_mask_compares_regions(make_head, make_features):
    head = make_head("appearance")
    wanted, found = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    wanted[:, :4, :4], found[:, 2:, 4:] = 1, 1
    target = Target(head=head, reference_latent=torch.zeros(1, 4, 8, 8), reference_mask=wanted, mask=found)
    objective = Objective([target], (8, 8), 2, CPU)
    guided, reference = (
        Branch(features=features, emb=emb, z=torch.randn(2, 4, 8, 8))
        for features, emb in (make_features(2, 1), make_features(2, 2))
    )
    loss, _ = objective.loss(guided, [0], objective.source_step(reference, [0]))
    z = torch.cat([guided.z, reference.z], 1).flatten(1)
    expected = identity_loss(
        head.read(guided.features, guided.emb, (8, 8)),
        head.read(reference.features, reference.emb, (8, 8)),
        reference_mask=wanted[None].expand(2, -1, -1, -1),
        z_extent=z.amax(1) - z.amin(1),
        mask=found[None].expand(2, -1, -1, -1),
    )
    torch.testing.assert_close(loss, expected)


def test_without_a_reference_latent_the_region_is_the_source_s(make_head):
    target = Target(head=make_head("appearance"), reference_mask=torch.ones(1, 8, 8))
    assert target.needs_source
    assert not target.needs_reference


@pytest.mark.parametrize("mask", [torch.zeros(1, 8, 8), torch.full((2, 8, 8), 0.4)], ids=["black", "dark"])
def test_a_black_reference_mask_is_refused(make_head, mask):
    with pytest.raises(TargetError, match=r"reference_mask .*'my head' is black: paint what to keep"):
        Target(head=make_head("appearance", name="my head"), reference_mask=mask)


GIVEN = {
    "spatial": {"image": torch.rand(1, 8, 8, 3)},
    "correspondence": {"drags": (Drag((0.1, 0.2), (0.3, 0.4)),)},
    "keypoint": {"readout": torch.rand(1, 5, 8, 8)},
    "lgp": {"reference_latent": torch.rand(1, 5, 8, 8)},
}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_reference_mask_for_another_kind_of_head_is_refused(make_head, kind):
    head = make_head(kind, output_channels=5 if kind in ("keypoint", "lgp") else None)
    with pytest.raises(TargetError, match=f"reference_mask .* is for appearance heads, and this is a {kind} head"):
        Target(head=head, reference_mask=torch.ones(1, 8, 8), **GIVEN[kind])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(8, 8), "expected 3 dimensions"),
        (torch.ones(1, 0, 8), r"\(1, 0, 8\)"),
        (torch.full((1, 8, 8), math.nan), "NaN"),
    ],
)
def test_a_malformed_reference_mask_is_refused(make_head, mask, words):
    with pytest.raises(TargetError, match=f"reference_mask .*{words}"):
        Target(head=make_head("appearance"), reference_mask=mask)


def test_reference_masks_are_one_or_one_for_each_picture(make_head):
    target = Target(head=make_head("appearance"), reference_mask=torch.ones(2, 8, 8))
    target.check_batch(2)
    with pytest.raises(TargetError, match=r"reference_mask .*batch of 2 but 3 pictures are being made"):
        target.check_batch(3)
