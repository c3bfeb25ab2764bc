"""The demo world: its scenes, its ground truths, and the measures of control on finished pixels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rg_engine.demo.estimator import joint_positions
from rg_engine.demo.measure import chamfer_px, mean_and_error
from rg_engine.demo.render import (
    FIGURE_PART,
    correspondences,
    edge_map,
    joint_heatmaps,
    pose_map,
    render,
    scene_tracks,
)
from rg_engine.demo.scene_pictures import HEATMAP_PX, TRACKED_POINTS, sample_scenes, scene_pictures
from rg_engine.demo.text import MAX_TOKENS, WORDS, pad, tokenize
from rg_engine.demo.world import (
    BONES,
    JOINTS,
    WALL_BASE,
    Identity,
    Scene,
    Solid,
    disparity,
    sample_elsewhere,
    sample_figure,
    sample_identity,
    sample_other_identity,
)

SIZE_PX = 128
HEAD = FIGURE_PART + len(BONES)


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(seed=5, count=8)


@pytest.fixture(scope="module")
def figures():
    """Scenes of a figure alone, with their renderings."""
    return [(scene.figure, render(scene)) for scene in sample_scenes(seed=6, count=8, figure_only=True)]


def many_scenes():
    return sample_scenes(seed=7, count=300)


def test_scenes_of_a_seed_are_the_same_and_the_first_ones_whatever_the_count(scenes):
    assert sample_scenes(seed=5, count=3) == scenes[:3]
    assert sample_scenes(seed=6, count=3) != scenes[:3]


def test_a_scene_holds_a_figure_a_solid_or_both():
    assert all(scene.figure is not None or scene.solids for scene in many_scenes())
    assert {(scene.figure is not None, len(scene.solids)) for scene in many_scenes()} >= {
        (True, 0), (True, 1), (True, 2), (False, 1), (False, 2),
    }  # fmt: skip


def test_every_joint_lies_inside_the_picture():
    joints = np.stack([scene.figure.joints() for scene in many_scenes() if scene.figure is not None])
    assert joints.min() > 0.05
    assert joints.max() < 0.98


def test_a_figure_stands_on_the_floor_where_it_says(figures):
    for figure, _ in figures:
        assert figure.joints()[[10, 13], 1].max() == pytest.approx(figure.base_y)


def test_rendering_is_deterministic(scenes):
    first, again = render(scenes[0]), render(scenes[0])
    for field in dataclasses.fields(first):
        assert np.array_equal(getattr(first, field.name), getattr(again, field.name))


def test_a_picture_s_size_can_be_chosen(scenes):
    drawn = render(scenes[0], 48)
    assert (drawn.image.shape, drawn.depth.shape, drawn.parts.shape) == ((48, 48, 3), (48, 48), (48, 48))


def test_what_stands_nearer_has_more_disparity_and_hides_what_is_behind():
    near, far = (Solid(shape="box", colour="red", x=x, base_y=y, size=0.14) for x, y in ((0.5, 0.95), (0.4, 0.75)))
    both = render(Scene(figure=None, solids=(near, far), wall="grey"))
    alone = render(Scene(figure=None, solids=(far,), wall="grey"))
    in_front, behind = both.parts == HEAD + 1, both.parts == HEAD + 2
    assert np.median(both.depth[in_front]) == pytest.approx(disparity(0.95), abs=0.01)
    assert np.median(both.depth[behind]) == pytest.approx(disparity(0.75), abs=0.01)
    hidden = in_front & (alone.parts == HEAD + 1)
    assert hidden.any()
    assert (both.depth[hidden] > alone.depth[hidden]).all()


def test_the_room_s_disparity_is_the_wall_s_and_then_grows_down_the_floor():
    room = render(Scene(figure=None, solids=(), wall="grey"))
    rows = (np.arange(SIZE_PX) + 0.5) / SIZE_PX
    expected = np.where(rows < WALL_BASE, disparity(WALL_BASE), disparity(rows))
    assert room.depth == pytest.approx(np.tile(expected[:, None], SIZE_PX), abs=0.01)
    assert not room.parts.any()


def test_disparity_stays_in_0_to_1(scenes):
    for scene in scenes:
        depth = render(scene).depth
        assert 0 <= depth.min() <= depth.max() <= 1


def test_a_part_of_the_figure_lies_under_each_joint(figures):
    for figure, drawn in figures:
        cells = np.floor(figure.joints() * SIZE_PX).astype(int)
        assert drawn.figure_mask[cells[:, 1], cells[:, 0]].all()


def test_the_head_and_each_bone_have_their_own_part(figures):
    seen = set().union(*(np.unique(drawn.parts).tolist() for _, drawn in figures))
    drawn_bones = {FIGURE_PART + i for i, bone in enumerate(BONES) if bone != (0, 1)}  # the neck is not drawn
    assert seen == {0, *drawn_bones, HEAD}
    for figure, drawn in figures:
        x, y = np.floor(figure.joints()[0] * SIZE_PX).astype(int)
        assert drawn.parts[y, x] == HEAD


def test_corresponding_points_lie_on_the_same_part_in_both_pictures(figures):
    a, drawn_a = figures[0]
    b = sample_figure(np.random.default_rng(1), a.identity)
    drawn_b = render(Scene(figure=b, solids=(), wall="grey"))
    points = correspondences(a, b, drawn_a.parts, drawn_b.parts, 40, np.random.default_rng(2))
    assert len(points) > 20
    (xa, ya), (xb, yb) = np.floor(points * SIZE_PX).astype(int).transpose(1, 2, 0)
    parts = drawn_a.parts[ya, xa]
    assert np.array_equal(parts, drawn_b.parts[yb, xb])
    assert len(np.unique(parts)) > 5


def test_a_figure_corresponds_to_itself_at_the_same_points(figures):
    figure, drawn = figures[0]
    points = correspondences(figure, figure, drawn.parts, drawn.parts, 10, np.random.default_rng(0))
    assert len(points) == 10
    assert np.array_equal(points[:, 0], points[:, 1])


def test_a_heat_map_peaks_at_its_joint(figures):
    for figure, _ in figures:
        maps = joint_heatmaps(figure, 64)
        peaks = np.array([np.unravel_index(m.argmax(), m.shape) for m in maps])[:, ::-1]
        assert np.abs((peaks + 0.5) / 64 - figure.joints()).max() <= 0.5 / 64 + 1e-6
    assert not joint_heatmaps(None, 64).any()


def test_a_pose_picture_is_white_on_its_joints_and_black_away_from_the_figure(figures):
    for figure, drawn in figures:
        picture = pose_map(figure)
        cells = np.floor(figure.joints() * SIZE_PX).astype(int)
        assert (picture[cells[:, 1], cells[:, 0]] > 200).all()
        assert np.mean(picture[~drawn.figure_mask].any(-1)) < 0.02
        assert np.array_equal(picture, pose_map(figure.joints()))
    assert not pose_map(None).any()


@pytest.mark.parametrize(("height", "strength"), [(1.0, 1.0), (0.5, 1.0), (0.25, 0.5)])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_edge_is_found_at_a_step_and_nowhere_else(height, strength, axis):
    image = np.zeros((12, 12, 3))
    image[:, 6:, 1] = height  # of one colour only
    expected = np.zeros((12, 12))
    expected[:, 5:7] = strength
    if axis == 0:
        image, expected = image.transpose(1, 0, 2), expected.T
    assert edge_map(image) == pytest.approx(expected)
    if height == 1:
        assert edge_map((image * 255).astype(np.uint8)) == pytest.approx(expected)


def test_captions_use_only_words_that_the_demo_model_knows():
    for scene in many_scenes():
        tokens, unknown = tokenize(scene.caption())
        assert not unknown
        assert 0 < len(tokens) <= MAX_TOKENS
        assert scene.caption().replace(",", " ,").split() == [WORDS[token] for token in tokens]


def test_a_caption_names_what_is_there():
    ball = Solid(shape="ball", colour="blue", x=0.8, base_y=0.9, size=0.1)
    cone = Solid(shape="cone", colour="white", x=0.2, base_y=0.9, size=0.1)
    scene = Scene(figure=None, solids=(ball, cone), wall="teal")
    assert scene.caption() == "a white cone and a blue ball, teal wall"


def test_unknown_words_are_reported_and_long_prompts_cut():
    assert tokenize("A red Dragon, grey wall") == ([WORDS.index(w) for w in ("a", "red", ",", "grey", "wall")], ["dragon"])
    tokens, _ = tokenize("red " * 40)
    assert len(tokens) == MAX_TOKENS
    assert pad([3]) == [3] + [0] * (MAX_TOKENS - 1)


def test_scene_pictures_are_batches_of_the_same_scenes(scenes):
    drawn = scene_pictures(5, 2)
    picture, pose, depth, edges, caption = drawn.picture, drawn.pose, drawn.depth, drawn.edges, drawn.captions[0]
    drawn = render(scenes[1])
    for batch in (picture, pose, depth, edges):
        assert batch.shape == (2, SIZE_PX, SIZE_PX, 3)
        assert 0 <= batch.min() <= batch.max() <= 1
    assert picture[1].numpy() == pytest.approx(drawn.image / 255)
    assert depth[1, ..., 0].numpy() == pytest.approx(drawn.depth)
    assert edges[1, ..., 0].numpy() == pytest.approx(edge_map(drawn.image))
    assert caption == scenes[0].caption()


# Pairs and triplets


@pytest.fixture(scope="module")
def pairs():
    """Scenes with a figure and the same things elsewhere, with their renderings."""
    scenes = sample_scenes(seed=8, count=6, sequence="pairs")
    return [(scenes[i : i + 2], [render(scene) for scene in scenes[i : i + 2]]) for i in range(0, 12, 2)]


def things(scene):
    """What stands in a scene, wherever it stands."""
    return [(solid.shape, solid.colour, solid.size) for solid in scene.solids], scene.wall


@pytest.mark.parametrize("identity", [None, Identity(colour="red", shirt="blue", thickness=0.06)])
def test_elsewhere_are_the_same_things_in_other_places(identity):
    for scene in sample_scenes(seed=9, count=20, sequence="pairs")[::2]:
        other = sample_elsewhere(np.random.default_rng(1), scene, identity)
        assert things(other) == things(scene)
        assert other.figure.identity == (identity or scene.figure.identity)
        assert (other.figure.x, other.figure.pose) != (scene.figure.x, scene.figure.pose)
        assert all(a.x != b.x and a.base_y != b.base_y for a, b in zip(scene.solids, other.solids, strict=True))


def test_another_identity_has_another_colour_another_shirt_or_both():
    rng = np.random.default_rng(3)
    ways = set()
    for _ in range(200):
        one = sample_identity(rng)
        other = sample_other_identity(rng, one)
        ways.add((other.colour == one.colour, other.shirt == one.shirt))
    assert ways == {(True, False), (False, True), (False, False)}


def test_scenes_come_in_pairs_and_triplets_of_a_figure():
    plain, pairs, triplets = (sample_scenes(10, 5, sequence=name) for name in ("scenes", "pairs", "triplets"))
    assert (len(plain), len(pairs), len(triplets)) == (5, 10, 15)
    assert [triplets[i] for i in range(15) if i % 3 < 2] == pairs
    for anchor, same, other in zip(triplets[::3], triplets[1::3], triplets[2::3], strict=True):
        assert anchor.figure.identity == same.figure.identity != other.figure.identity
        assert things(anchor) == things(same) == things(other)
        assert len({anchor.figure.pose, same.figure.pose, other.figure.pose}) == 3


@pytest.mark.parametrize("sequence", ["scenes", "pairs", "triplets"])
@pytest.mark.parametrize("figure_only", [False, True])
def test_the_first_of_a_sequence_are_the_same_whatever_the_count(sequence, figure_only):
    few, many = (sample_scenes(11, count, figure_only, sequence) for count in (2, 7))
    assert many[: len(few)] == few
    assert sample_scenes(12, 2, figure_only, sequence) != few
    if figure_only:
        assert not any(scene.solids for scene in many)


def test_tracks_lie_on_the_same_part_in_both_pictures(pairs):
    parts = set()
    for (a, b), (drawn_a, drawn_b) in pairs:
        points = scene_tracks(a, b, drawn_a.parts, drawn_b.parts, 40, np.random.default_rng(0))
        assert 20 < len(points) <= 40
        assert 0 <= points.min() <= points.max() < 1
        (xa, ya), (xb, yb) = np.floor(points * SIZE_PX).astype(int).transpose(1, 2, 0)
        found = drawn_a.parts[ya, xa]
        assert np.array_equal(found, drawn_b.parts[yb, xb])
        room = found == 0
        assert np.array_equal(points[room, 0], points[room, 1]), "the room stays where it is"
        assert not np.isclose(points[~room, 0], points[~room, 1]).all(1).any(), "what stands in it has moved"
        parts |= set(found.tolist())
    assert {0, HEAD + 1} < parts, "the room, a solid and the figure"
    assert len(parts) > 8


def test_a_solid_s_points_keep_their_place_on_it():
    near, far = (Solid(shape="box", colour="red", x=x, base_y=y, size=0.14) for x, y in ((0.3, 0.95), (0.7, 0.8)))
    a, b = (Scene(figure=None, solids=(solid,), wall="grey") for solid in (near, far))
    points = scene_tracks(a, b, render(a).parts, render(b).parts, 30, np.random.default_rng(0))
    moved = points[~(points[:, 0] == points[:, 1]).all(1)]
    places = [(moved[:, k] - (s.x, s.base_y)) / (s.size * disparity(s.base_y)) for k, s in enumerate((near, far))]
    assert len(moved) > 5
    assert places[0] == pytest.approx(places[1])
    assert np.abs(places[0][:, 0]).max() < 1.1


def test_tracks_of_scenes_without_a_figure_lie_on_solids_and_the_room_and_an_empty_room_stays():
    empty = Scene(figure=None, solids=(), wall="pink")
    parts = render(empty).parts
    points = scene_tracks(empty, empty, parts, parts, 12, np.random.default_rng(0))
    assert points.shape == (12, 2, 2)
    assert np.array_equal(points[:, 0], points[:, 1])
    assert len(np.unique(points[:, 0], axis=0)) > 6


def test_pictures_of_pairs_come_with_their_tracks(pairs):
    drawn = scene_pictures(8, 2, sequence="pairs")
    assert drawn.scenes == [scene for scenes, _ in pairs[:2] for scene in scenes]
    assert drawn.captions == [scene.caption() for scene in drawn.scenes]
    assert drawn.picture.shape == (4, SIZE_PX, SIZE_PX, 3)
    assert drawn.tracks.shape == (2, TRACKED_POINTS, 2, 2)
    for tracks, (_, (drawn_a, drawn_b)) in zip(drawn.tracks, pairs, strict=False):
        given = tracks[~tracks.isnan().flatten(1).any(1)].numpy()
        assert len(given) > 10
        (xa, ya), (xb, yb) = np.floor(given * SIZE_PX).astype(int).transpose(1, 2, 0)
        assert np.mean(drawn_a.parts[ya, xa] == drawn_b.parts[yb, xb]) == 1
    again = scene_pictures(8, 1, sequence="pairs")
    assert torch.equal(again.tracks.nan_to_num(), drawn.tracks[:1].nan_to_num())
    assert torch.equal(again.picture, drawn.picture[:2])


def test_pictures_of_triplets_and_single_scenes_have_no_tracks():
    assert scene_pictures(8, 1).tracks.shape == (0, TRACKED_POINTS, 2, 2)
    drawn = scene_pictures(8, 1, sequence="triplets")
    assert drawn.picture.shape[0] == len(drawn.scenes) == 3
    assert drawn.tracks.shape == (0, TRACKED_POINTS, 2, 2)


def test_pictures_come_with_a_heat_map_for_each_joint():
    drawn = scene_pictures(6, 2, figure_only=True)
    assert drawn.keypoints.shape == (2, len(JOINTS), HEATMAP_PX, HEATMAP_PX)
    for maps, scene in zip(drawn.keypoints, drawn.scenes, strict=True):
        peaks = maps.flatten(1).argmax(1)
        found = torch.stack([peaks % HEATMAP_PX, peaks // HEATMAP_PX], 1)
        assert ((found + 0.5) / HEATMAP_PX).numpy() == pytest.approx(scene.figure.joints(), abs=0.51 / HEATMAP_PX)
        assert 0.8 < maps.amax() <= 1


# Measures


def test_the_position_of_a_sharp_heat_map_is_its_cell_s_centre():
    logits = torch.zeros(1, 2, 10, 20)
    logits[0, 0, 7, 3] = logits[0, 1, 0, 19] = 100.0
    expected = torch.tensor([[[3.5 / 20, 7.5 / 10], [19.5 / 20, 0.5 / 10]]])
    torch.testing.assert_close(joint_positions(logits), expected)


def test_positions_of_the_true_heat_maps_are_the_joints(figures):
    figure = figures[0][0]
    logits = torch.tensor(joint_heatmaps(figure, 64)).clamp_min(1e-30).log()[None]
    assert joint_positions(logits)[0].numpy() == pytest.approx(figure.joints(), abs=0.01)


@pytest.mark.parametrize("shift", [0, 3, 10])
def test_the_chamfer_distance_of_a_shifted_line_is_its_shift(shift):
    a, b = np.zeros((2, 32, 32), np.float32)
    a[:, 8], b[:, 8 + shift] = 1, 1
    assert chamfer_px(a, b) == chamfer_px(b, a) == pytest.approx(shift)


def test_the_chamfer_distance_counts_what_is_missing_and_what_is_too_much():
    a, b = np.zeros((2, 32, 32), np.float32)
    a[:, 8], b[:, 8], b[:, 18] = 1, 1, 1
    assert chamfer_px(a, b) == chamfer_px(b, a) == pytest.approx((0 + 10 / 2) / 2)
    assert chamfer_px(a, np.zeros_like(a)) == 32


def test_mean_and_its_standard_error():
    assert mean_and_error(np.array([1.0, 2.0, 3.0])) == pytest.approx((2.0, 1 / 3**0.5))
    assert mean_and_error(np.array([4.0])) == (4.0, 0.0)
