"""The loss of a chain of targets, with small real heads on random features."""

from __future__ import annotations

import pytest
import torch

from rg_engine.errors import TargetError
from rg_engine.guidance import Branch, Objective, Target
from rg_engine.heads import HeadSpec, PixelNetwork, ReadoutHead
from rg_engine.losses import appearance_loss, correspondence_loss, matching_loss, sketch_loss, spatial_loss
from rg_engine.types import Drag

SIZE, BATCH, CPU = (8, 8), 2, torch.device("cpu")
CHANNELS = (8, 12, 32)  # of make_features
DRAGS = (Drag((0.2, 0.3), (0.6, 0.55)), Drag((0.9, 0.1), (0.8, 0.4)))


@pytest.fixture
def branch(make_features):
    """Makes a branch with random features, and z of a given scale."""

    def make(seed=0, z_scale=1.0):
        features, emb = make_features(BATCH, seed)
        z = torch.randn(BATCH, 4, *SIZE, generator=torch.Generator().manual_seed(seed)) * z_scale
        return Branch(features=features, emb=emb, z=z, noise_level=torch.linspace(0.3, 0.6, BATCH))

    return make


@pytest.fixture
def sketch_head():
    network = PixelNetwork(CHANNELS, output_channels=4, widths=(16, 8)).eval().requires_grad_(False)
    return ReadoutHead(network=network, spec=HeadSpec(kind="lgp", feature_channels=CHANNELS), name="a sketch head")


@pytest.fixture
def image():
    return torch.rand(BATCH, *SIZE, 3)


def objective(*targets, **more):
    return Objective(targets, SIZE, BATCH, CPU, **more)


def extent(*zs):
    flat = torch.cat([z.flatten(1) for z in zs], 1)
    return flat.amax(1) - flat.amin(1)


def test_a_spatial_target_compares_the_readout_with_its_control(make_head, branch, image):
    head, b = make_head(control_range=(-1.0, 1.0)), branch()
    mask = torch.rand(1, *SIZE)
    loss, readouts = objective(Target(head=head, image=image, mask=mask, weight=0.5)).loss(b, [0])
    readout = head.read(b.features, b.emb, SIZE)
    control = 2 * image.permute(0, 3, 1, 2) - 1
    expected = spatial_loss(
        readout, control, control_range=(-1.0, 1.0), z_extent=extent(b.z), mask=mask[None].expand(BATCH, -1, -1, -1)
    )
    torch.testing.assert_close(loss, 0.5 * expected)
    assert torch.equal(readouts[0], readout)


def test_the_loss_is_the_weighted_sum_over_the_active_targets(make_head, branch, image):
    a = Target(head=make_head(seed=1), image=image, weight=0.5)
    b = Target(head=make_head(output_channels=1, seed=2), image=image, weight=3.0)
    step = branch()
    loss_a, loss_b = (objective(target).loss(step, [0])[0] for target in (a, b))
    both = objective(a, b)
    torch.testing.assert_close(both.loss(step, [0, 1])[0], loss_a + loss_b)
    torch.testing.assert_close(both.loss(step, [1])[0], loss_b)
    assert both.loss(step, [1])[1].keys() == {1}


def test_targets_that_share_a_head_run_it_once(make_head, branch, image):
    head, calls = make_head(), []
    head.network.register_forward_hook(lambda *_: calls.append(1))
    shared = objective(Target(head=head, image=image), Target(head=head, image=1 - image))
    loss, readouts = shared.loss(branch(), [0, 1])
    assert len(calls) == 1
    assert readouts[0] is readouts[1]
    apart = [objective(target).loss(branch(), [0])[0] for target in shared.targets]
    torch.testing.assert_close(loss, sum(apart))


@pytest.mark.parametrize("wider", ["source", "guided"])
def test_the_extent_of_z_is_taken_over_source_and_guided_together(make_head, branch, image, wider):
    spatial = objective(Target(head=make_head(), image=image))
    guided = branch(seed=1, z_scale=1.0 if wider == "source" else 3.0)
    start = branch(seed=2, z_scale=3.0 if wider == "source" else 1.0)
    alone, _ = spatial.loss(guided, [0])
    together, _ = spatial.loss(guided, [0], spatial.source_step(start))
    torch.testing.assert_close(together, alone * (extent(guided.z, start.z) / extent(guided.z)) ** 2)


def test_an_appearance_target_compares_with_the_source(make_head, branch):
    head = make_head("appearance")
    look, guided, start = objective(Target(head=head)), branch(seed=1), branch(seed=2)
    source = look.source_step(start)
    expected = appearance_loss(
        head.read(guided.features, guided.emb, SIZE),
        head.read(start.features, start.emb, SIZE),
        z_extent=extent(guided.z, start.z),
    )
    torch.testing.assert_close(look.loss(guided, [0], source)[0], expected)
    torch.testing.assert_close(look.loss(start, [0], source)[0], torch.zeros(BATCH), atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", [correspondence_loss, matching_loss])
def test_a_correspondence_target_follows_its_drags_from_the_source(make_head, branch, loss):
    head = make_head("correspondence", use_emb=False)
    drag = objective(Target(head=head, drags=DRAGS), paper_drags=loss is correspondence_loss)
    guided, start = branch(seed=1), branch(seed=2)
    expected = loss(
        head.read(guided.features, None, SIZE),
        head.read(start.features, None, SIZE),
        starts=torch.tensor([drag.start for drag in DRAGS]),
        ends=torch.tensor([drag.end for drag in DRAGS]),
    )
    torch.testing.assert_close(drag.loss(guided, [0], drag.source_step(start))[0], expected)


@pytest.mark.parametrize("given", [torch.rand(1, 5, 8, 8), torch.rand(BATCH, 5, 8, 8)], ids=["one for all", "one for each"])
def test_a_keypoint_target_compares_heat_maps_with_the_readout_given(make_head, branch, given):
    head, b = make_head("keypoint", output_channels=5, activation="none", control_range=(0.0, 1.0)), branch()
    mask = torch.rand(1, *SIZE)
    loss, readouts = objective(Target(head=head, readout=given, mask=mask, weight=2.0)).loss(b, [0])
    control, region = given.expand(BATCH, -1, -1, -1), mask[None].expand(BATCH, -1, -1, -1)
    expected = spatial_loss(readouts[0], control, control_range=(0.0, 1.0), z_extent=extent(b.z), mask=region)
    torch.testing.assert_close(loss, 2 * expected)
    assert torch.equal(readouts[0], head.read(b.features, b.emb, SIZE))


@pytest.mark.parametrize("what", ["reference_latent", "readout"])
def test_an_lgp_target_compares_encoded_edges_with_the_sketch_at_its_noise_level(sketch_head, branch, what):
    b, sketch, mask = branch(), torch.randn(1, 4, *SIZE), torch.rand(BATCH, *SIZE)
    target = Target(head=sketch_head, mask=mask, **{what: sketch})
    loss, readouts = objective(target).loss(b, [0])
    readout = sketch_head.network(b.features, b.noise_level, SIZE)
    torch.testing.assert_close(loss, sketch_loss(readout, sketch, mask=mask[:, None]))
    torch.testing.assert_close(loss, ((readout - sketch).square() * mask[:, None]).sum((1, 2, 3)) / mask.sum((1, 2)) / 4)
    assert torch.equal(readouts[0], readout)
    assert not objective(target).needs_source


def test_an_lgp_head_in_a_branch_without_a_noise_level_says_what_it_needs(sketch_head, branch):
    b = branch()
    nameless = Branch(features=b.features, emb=b.emb, z=b.z)
    with pytest.raises(TargetError, match="'a sketch head' reads the noise level"):
        objective(Target(head=sketch_head, readout=torch.randn(1, 4, *SIZE))).loss(nameless, [0])


def test_a_target_is_met_where_the_readout_is_the_one_given(make_head, sketch_head, branch):
    b = branch()
    for head in (make_head("keypoint", output_channels=5), make_head(), sketch_head):
        readout = head.read(b.features, b.emb, SIZE, b.noise_level)
        loss, _ = objective(Target(head=head, readout=readout)).loss(b, [0])
        torch.testing.assert_close(loss, torch.zeros(BATCH))


def test_of_the_source_only_the_readouts_that_are_compared_with_it_are_kept(make_head, branch, image):
    spatial, look = Target(head=make_head(), image=image), Target(head=make_head("appearance"))
    step = branch()
    step.features[0].requires_grad_()
    kept = objective(spatial, look).source_step(step)
    assert kept.readouts.keys() == {1}
    assert not kept.readouts[1].requires_grad
    assert objective(spatial, look).needs_source
    assert not objective(spatial).needs_source


def test_gradients_reach_every_feature_map_and_each_picture_s_stay_in_its_row(make_head, branch, image):
    step = branch()
    for feature in step.features:
        feature.requires_grad_()
    loss, _ = objective(Target(head=make_head(), image=image)).loss(step, [0])
    for gradient in torch.autograd.grad(loss[0], step.features):
        assert gradient[0].abs().max() > 0
        assert gradient[1].abs().max() == 0


def test_a_batch_that_does_not_fit_the_targets_is_refused(make_head, image):
    with pytest.raises(TargetError, match="batch of 2 but 3"):
        Objective([Target(head=make_head(), image=image)], SIZE, 3, CPU)
