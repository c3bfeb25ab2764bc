"""Training examples and settings: what is refused, in words, and how examples are kept back."""

from __future__ import annotations

import math

import pytest
import torch
from small_training import BACKBONE, KINDS, examples

from rg_engine.errors import TrainingError
from rg_engine.heads import PixelNetwork
from rg_engine.training import Examples, TrainingSettings, in_a_row, new_head

LATENTS = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
MAPS = torch.rand(12, 2, 8, 8, generator=torch.Generator().manual_seed(1))
TRACKS = torch.rand(6, 5, 2, 2, generator=torch.Generator().manual_seed(2))


def spoilt(tensor, value, *place):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


@pytest.mark.parametrize(
    ("kind", "latents", "truth", "words"),
    [
        ("spatial", LATENTS[:3], MAPS[:3], "3 examples are too few to train a spatial head: give 4 or more"),
        ("correspondence", LATENTS[:6], TRACKS[:3], "3 examples are too few to train a correspondence head"),
        ("spatial", LATENTS[0], MAPS, r"latents have shape \(4, 8, 8\)"),
        ("spatial", LATENTS[:, :0], MAPS, r"latents have shape \(12, 0, 8, 8\)"),
        ("spatial", spoilt(LATENTS, math.nan, 3, 1, 2, 3), MAPS, "latents hold NaN"),
        ("appearance", spoilt(LATENTS, math.inf, 11), None, "latents hold NaN or infinite"),
        ("spatial", LATENTS, None, "a spatial head needs targets: one map for each picture"),
        ("lgp", LATENTS, None, "a lgp head needs targets: one map"),
        ("correspondence", LATENTS, None, "a correspondence head needs targets: point tracks"),
        ("appearance", LATENTS, MAPS, r"targets have shape \(12, 2, 8, 8\) for 4 examples .* a mask for each picture"),
        ("appearance", LATENTS, MAPS[:4], "there are 2 masks for the 3 pictures of each example"),
        ("appearance", LATENTS, torch.rand(4, 3, 8, 7), "targets are 7x8 cells and the latents 8x8"),
        ("spatial", LATENTS, MAPS[:11], r"targets have shape \(11, 2, 8, 8\) for 12 examples"),
        ("spatial", LATENTS, MAPS[:, 0], r"targets have shape \(12, 8, 8\)"),
        ("keypoint", LATENTS, MAPS[..., :7], "targets are 7x8 cells and the latents 8x8"),
        ("spatial", LATENTS, spoilt(MAPS, math.nan, 0, 0, 0, 0), "targets hold NaN"),
        ("spatial", LATENTS, spoilt(MAPS, -math.inf, 5), "targets hold NaN or infinite"),
        ("correspondence", LATENTS, TRACKS[:4], r"targets have shape \(4, 5, 2, 2\) for 6 examples"),
        ("correspondence", LATENTS, TRACKS.repeat(2, 1, 1, 1), r"targets have shape \(12, 5, 2, 2\) for 6 examples"),
        ("correspondence", LATENTS, torch.rand(6, 5, 3, 2), r"tracks have shape \(6, 5, 3, 2\): expected point tracks"),
        ("correspondence", LATENTS, torch.rand(6, 5, 2, 3), r"tracks have shape \(6, 5, 2, 3\)"),
        ("correspondence", LATENTS, TRACKS * math.nan, "no point in any of the tracks"),
        ("correspondence", LATENTS, TRACKS[:, :0], "no point in any of the tracks"),
        ("correspondence", LATENTS, spoilt(TRACKS, 1.5, 1, 2, 0, 1), "to 1.5, outside the picture"),
        ("correspondence", LATENTS, spoilt(TRACKS, -0.25, 1, 2, 1, 0), "from -0.25 .*outside the picture"),
        ("correspondence", LATENTS, spoilt(TRACKS, math.inf, 0, 0, 0, 0), "to inf, outside the picture"),
        ("correspondence", LATENTS[:11], TRACKS, "pairs of pictures in a row, and 11 pictures can't be divided by 2"),
        ("appearance", LATENTS[:11], None, "triplets of pictures in a row, and 11 pictures can't be divided by 3"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_words(kind, latents, truth, words):
    with pytest.raises(TrainingError, match=words):
        in_a_row(kind, latents, truth).split(0.1)


@pytest.mark.parametrize("groups", [torch.arange(12).view(4, 3), torch.arange(12)])
def test_examples_have_as_many_pictures_as_their_kind_needs(groups):
    with pytest.raises(TrainingError, match="examples of a correspondence head have 2 pictures each"):
        Examples(kind="correspondence", latents=LATENTS, truth=TRACKS, groups=groups)


def test_tracks_on_the_border_and_some_padding_are_accepted():
    tracks = spoilt(spoilt(spoilt(TRACKS, math.nan, 0), 0.0, 1, 0), 1.0, 2, 0)
    assert len(in_a_row("correspondence", LATENTS, tracks)) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_examples_in_a_row_are_one_by_one_pairs_or_triplets(kind):
    each = {"correspondence": 2, "appearance": 3}.get(kind, 1)
    given = examples(kind, 5)
    assert given.groups.tolist() == [list(range(i * each, (i + 1) * each)) for i in range(5)]
    assert given.cells == (8, 8)


@pytest.mark.parametrize(
    ("count", "share", "kept"), [(12, 0.25, 3), (100, 0.1, 10), (12, 0.01, 1), (8, 0.5, 4), (4, 0.1, 1)]
)
@pytest.mark.parametrize("kind", ["spatial", "correspondence", "appearance"])
def test_a_share_of_the_examples_is_kept_back_and_none_is_in_both_parts(kind, count, share, kept):
    given = examples(kind, count)
    learned, kept_back = given.split(share)
    assert (len(learned), len(kept_back)) == (count - kept, kept)
    rows = [part.groups[:, 0] // given.groups.shape[1] for part in (learned, kept_back)]
    assert torch.cat(rows).sort().values.tolist() == list(range(count))
    for part, own in zip((learned, kept_back), rows, strict=True):
        assert torch.equal(part.groups, given.groups[own])
        assert given.truth is None or torch.equal(part.truth, given.truth[own])
        assert part.latents is given.latents


def test_examples_kept_back_are_spread_over_all():
    _, kept_back = examples("spatial", 100).split(0.1)
    assert torch.equal(kept_back.groups[:, 0], torch.arange(0, 100, 11))


def test_of_no_share_nothing_is_kept_back():
    given = examples()
    assert given.split(0.0) == (given, None)


def test_examples_kept_back_may_be_without_a_point():
    given = examples("correspondence", 8)
    given.truth[0] = math.nan  # the first is kept back
    learned, kept_back = given.split(0.1)
    assert (len(learned), len(kept_back)) == (7, 1)


# Settings


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": 0}, "steps is 0: it must be 1 or more"),
        ({"batch": 0}, "batch is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"noise_draws": -1}, "noise_draws is -1: it must be 0 or more"),
        ({"validate_every": -1}, "validate_every is -1"),
        ({"patience": -1}, "patience is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0: it must be between 0 and 1, and not 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": math.inf}, "learning_rate is inf"),
        ({"ema": 0.0}, "ema is 0: .*not 0"),
        ({"ema": 1.01}, "ema is 1.01"),
        ({"shift": -0.1}, "shift is -0.1: it must be between 0 and 0.5"),
        ({"shift": 0.6}, "shift is 0.6"),
        ({"validation_share": 0.51}, "validation_share is 0.51"),
        ({"validation_share": math.nan}, "validation_share is nan"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown: expected one of fp32, bf16, fp16"),
        ({"timestep_convention": "x"}, "timestep_convention 'x' is unknown: expected one of t, reversed"),
        ({"batch": 8, "accumulate": 3}, "a batch of 8 can't be divided into 3 microbatches"),
    ],
)
def test_a_setting_out_of_range_is_refused_in_words(changed, words):
    with pytest.raises(TrainingError, match=words):
        TrainingSettings(**changed)


def test_settings_at_the_ends_of_their_ranges_are_accepted():
    TrainingSettings(
        steps=1, batch=1, learning_rate=1.0, ema=1.0, shift=0.5, validation_share=0.5, validate_every=0, seed=2**64 - 1
    )
    TrainingSettings(shift=0.0, validation_share=0.0, batch=4, accumulate=4)


# Fresh heads


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_is_of_its_kind_and_follows_from_its_seed(kind):
    def weights(seed):
        head = new_head(kind, BACKBONE, name="h", output_channels=channels, projection=32, seed=seed)
        return torch.cat([value.flatten() for value in head.network.state_dict().values()]), head

    channels = 0 if kind in ("correspondence", "appearance") else 2
    state = torch.get_rng_state()
    (first, head), (again, _), (other, _) = weights(1), weights(1), weights(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert (head.spec.kind, head.output_channels) == (kind, channels)
    assert (head.spec.feature_channels, head.spec.taps, head.spec.backbone) == ((8, 6), ("full", "half"), "projection")
    assert isinstance(head.network, PixelNetwork) == (kind == "lgp")
    assert head.emb_width == (None if kind in ("correspondence", "lgp") else 2)
    assert head.spec.activation == ("none" if kind in ("keypoint", "lgp") else "tanh")
    assert head.spec.control_range == ((0.0, 1.0) if kind == "keypoint" else (-0.5, 0.5))
