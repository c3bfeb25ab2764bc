"""Training data in folders and the config that names them: what is read, and what is refused in which words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rg_engine.errors import TrainingError
from rg_engine.training.config import TrainingConfig, read_config
from rg_engine.training.data.folders import FileExamples, gather_files, load_picture, prompt_of

KINDS = ("spatial", "keypoint", "lgp", "correspondence", "appearance")
SIZE = (48, 32)  # of the pictures in pixels: the centre square is 32 wide and begins 8 from the left
JOINTS = [[24.0, 16.0, 1.0], [8.0, 32.0, 1.0], [2.0, 16.0, 1.0], [24.0, 16.0, 0.0]]  # centre, corner, cropped, not seen
TRACKS = [[[24.0, 16.0], [8.0, 0.0], [2.0, 16.0]], [[32.0, 24.0], [40.0, 32.0], [24.0, 16.0]]]  # two frames of three points


def draw(path: Path, shade: int = 128, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Tiny data of every kind."""
    for i in range(3):
        draw(tmp_path / "pictures" / f"{i}.png", 80 * i)
        draw(tmp_path / "controls" / f"{i}.png")
        np.savez(tmp_path / "controls" / f"{i}.npz", keypoints=np.array(JOINTS))
    for name in ("one", "two"):
        for i in range(2):
            draw(tmp_path / "clips" / name / f"{i}.png")
            draw(tmp_path / "identities" / name / f"{i}.jpg")
        np.savez(tmp_path / "clips" / name / "tracks.npz", tracks=np.array(TRACKS))
    return tmp_path


def write(folder: Path, **settings: object) -> Path:
    """A config for the data in ``folder``."""
    sources = {name: name for name in ("pictures", "controls", "clips", "identities")}
    path = folder / "train.json"
    path.write_text(json.dumps({"out": "head.safetensors", "size": 64, "examples": 6, **sources, **settings}))
    return path


def gather(folder: Path, kind: str, **settings: object) -> FileExamples:
    return gather_files(read_config(write(folder, kind=kind, **settings)))


def refused(words: str):
    return pytest.raises(TrainingError, match=words)


# What is read


def test_pictures_come_with_the_control_of_their_name(folder):
    draw(folder / "controls" / "alone.png")
    (folder / "pictures" / "notes.txt").write_text("no picture")
    for kind in ("spatial", "lgp"):
        files = gather(folder, kind)
        assert [path.name for path in files.pictures] == ["0.png", "1.png", "2.png"]
        assert [path.parent.name + "/" + path.name for path in files.controls] == [f"controls/{i}.png" for i in range(3)]
        assert files.groups.tolist() == [[0], [1], [2]]
        assert files.truth is None


def test_a_control_may_have_another_ending_and_size_than_its_picture(folder):
    (folder / "controls" / "0.png").unlink()
    draw(folder / "controls" / "0.JPG", size=(96, 64))
    assert gather(folder, "spatial").controls[0].name == "0.JPG"


def test_keypoints_become_a_heat_map_each_empty_where_a_joint_is_not_seen(folder):
    files = gather(folder, "keypoint", size=256)
    assert files.truth.shape == (3, 4, 32, 32)
    centre, corner, cropped, unseen = files.truth[0]
    torch.testing.assert_close(centre, centre.flip(0, 1))
    torch.testing.assert_close(centre[15:17, 15:17], centre.amax().expand(2, 2))  # its peak is between these cells
    assert centre.amax() > 0.5
    assert corner.argmax() == 31 * 32, "down the left edge of the crop"
    assert cropped.amax() < 0.01
    assert unseen.amax() == 0


def test_keypoints_without_a_third_column_are_all_seen(folder):
    for i in range(3):
        np.savez(folder / "controls" / f"{i}.npz", keypoints=np.array(JOINTS)[:, :2])
    truth = gather(folder, "keypoint", size=256).truth
    assert torch.equal(truth[:, 3], truth[:, 0])


def test_a_joint_leaves_a_mark_also_in_small_pictures(folder):
    """The demo model's 128 pixels are 16 cells."""
    for size in (64, 128, 512):
        assert gather(folder, "keypoint", size=size).truth[:, 0].amax() > 0.5


def test_clips_give_pairs_of_frames_with_the_points_seen_in_both(folder):
    visible = np.array([[True, True, True], [True, False, True]])
    np.savez(folder / "clips" / "two" / "tracks.npz", tracks=np.array(TRACKS), visible=visible)
    files = gather(folder, "correspondence", examples=40)
    assert len(files.pictures) == 4
    assert set(map(tuple, files.groups.tolist())) == {(0, 1), (1, 0), (2, 3), (3, 2)}
    assert files.truth.shape == (40, 64, 2, 2)
    # As fractions of the centre square; the third point is cropped away in one frame, the second is hidden in clip two.
    first, second = [[0.5, 0.5], [0.75, 0.75]], [[0.0, 0.0], [1.0, 1.0]]
    for group, points in zip(files.groups.tolist(), files.truth, strict=True):
        given = points[~points.isnan().flatten(1).any(1)].tolist()
        expected = [first] if group[0] >= 2 else [first, second]
        assert sorted(given) == sorted(pair if group[0] < group[1] else pair[::-1] for pair in expected)


def test_identities_give_triplets_of_one_twice_and_another(folder):
    files = gather(folder, "appearance", examples=40)
    assert len(files.pictures) == 4
    for anchor, same, other in files.groups.tolist():
        assert anchor != same
        assert anchor // 2 == same // 2 != other // 2
    assert {anchor for anchor, _, _ in files.groups.tolist()} == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", ["correspondence", "appearance"])
def test_what_is_drawn_from_clips_and_identities_follows_from_the_seed(folder, kind):
    first, again, other = (gather(folder, kind, seed=seed).groups.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_picture_is_its_centre_square_resized(tmp_path):
    stripes = np.zeros((32, 48, 3), np.uint8)
    stripes[:, :8] = stripes[:, 40:] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    picture = load_picture(tmp_path / "a.png", 16)
    assert picture.shape == (16, 16, 3)
    assert picture.amax() == 0, "the white margins are cropped away"


def test_a_picture_of_any_colour_mode_has_three_channels(tmp_path):
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (20, 20)).save(tmp_path / "a.png")
        assert load_picture(tmp_path / "a.png", 8).shape == (8, 8, 3)


def test_a_prompt_is_the_text_beside_its_picture(folder):
    (folder / "pictures" / "0.txt").write_text(" a cat \n", encoding="utf-8")
    assert prompt_of(folder / "pictures" / "0.png") == "a cat"
    with refused(r"'1.png' has no caption: expected '1.txt' beside it, or set prompt"):
        prompt_of(folder / "pictures" / "1.png")


# What is refused


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_folder(folder, kind):
    (folder / "nothing").mkdir()
    sources = {"pictures": "nothing", "controls": "nothing", "clips": "nothing", "identities": "nothing"}
    with refused("there is no .* in .*nothing"):
        gather(folder, kind, **sources)


@pytest.mark.parametrize(("kind", "wanted"), [("spatial", "1.png"), ("lgp", "1.png"), ("keypoint", "1.npz")])
def test_a_picture_without_a_control(folder, kind, wanted):
    for control in (folder / "controls").glob("1.*"):
        control.unlink()
    with refused(rf"1 of 3 pictures have no control of the same name \(1\.png\): expected {wanted} in 'controls'"):
        gather(folder, kind)


def test_a_clip_without_tracks(folder):
    (folder / "clips" / "two" / "tracks.npz").unlink()
    with refused(r"tracks\.npz"):
        gather(folder, "correspondence")


@pytest.mark.parametrize("name", ["clips", "identities"])
def test_a_subfolder_without_pictures(folder, name):
    (folder / name / "zzz").mkdir()
    with refused("'zzz': there is no .png or .jpg or .jpeg"):
        gather(folder, {"clips": "correspondence", "identities": "appearance"}[name])


@pytest.mark.parametrize("kind", ["spatial", "lgp"])
def test_a_control_of_another_aspect_ratio(folder, kind):
    draw(folder / "controls" / "1.png", size=(32, 32))
    with refused("'1.png' is 48x32 and its control '1.png' 32x32: they must show the same part of the scene"):
        gather(folder, kind)


@pytest.mark.parametrize("name", ["pictures/1.png", "controls/1.png"])
def test_a_file_that_is_no_picture(folder, name):
    (folder / name).write_bytes(b"no picture")
    with refused("'1.png' is no picture that can be read"):
        gather(folder, "spatial")


@pytest.mark.parametrize("kept", [0, 4, 60, 400, 2000])
def test_a_picture_that_is_cut_off(tmp_path, kept):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused("'a.png' is no picture that can be read"):
        load_picture(path, 8)


@pytest.mark.parametrize(
    ("keypoints", "words"),
    [
        ([[24.0, 33.0]], "keypoints outside of '1.png', which is 48x32 pixels"),
        ([[-1.0, 3.0, 1.0]], "keypoints outside of '1.png'"),
        ([[float("nan"), 3.0]], "keypoints outside of '1.png'"),
        ([1.0, 2.0], r"keypoints of shape \(2,\): expected \(J, 2\)"),
        ([[1.0, 2.0, 1.0, 1.0]], r"keypoints of shape \(1, 4\)"),
        (np.zeros((0, 2)), r"keypoints of shape \(0, 2\)"),
        ([[1.0, 2.0]], r"keypoints come in different numbers \(\[1, 4\]\): every picture needs as many"),
    ],
)
def test_bad_keypoints(folder, keypoints, words):
    np.savez(folder / "controls" / "1.npz", keypoints=np.array(keypoints))
    with refused(words):
        gather(folder, "keypoint")


def test_a_joint_that_is_not_seen_may_lie_anywhere(folder):
    for i in range(3):
        np.savez(folder / "controls" / f"{i}.npz", keypoints=np.array([[24.0, 16.0, 1.0], [-99.0, np.nan, 0.0]]))
    maps = gather(folder, "keypoint").truth
    assert torch.isfinite(maps).all()
    assert maps[:, 1].amax() == 0


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"tracks": np.full((2, 3, 2), 33.0)}, "points outside its frames of 48x32 pixels that are marked visible"),
        ({"tracks": np.full((2, 3, 2), -1.0)}, "points outside its frames"),
        ({"tracks": np.full((2, 3, 2), np.nan)}, "points outside its frames"),
        ({"tracks": np.zeros((3, 3, 2))}, r"tracks of shape \(3, 3, 2\) for 2 frames: expected \(frames, points, 2\)"),
        ({"tracks": np.zeros((2, 3, 3))}, r"tracks of shape \(2, 3, 3\)"),
        ({"tracks": np.zeros((2, 2))}, r"tracks of shape \(2, 2\)"),
        ({"tracks": np.array(TRACKS), "visible": np.ones((3, 2), bool)}, r"visible of shape \(3, 2\): expected \(2, 3\)"),
        ({"points": np.array(TRACKS)}, "tracks"),
    ],
)
def test_bad_tracks(folder, arrays, words):
    np.savez(folder / "clips" / "one" / "tracks.npz", **arrays)
    with refused(words):
        gather(folder, "correspondence")


def test_tracks_outside_the_frame_that_are_hidden_there_are_left_out(folder):
    tracks = np.array(TRACKS)
    tracks[1, 1] = (-50.0, np.nan)
    for name in ("one", "two"):
        np.savez(folder / "clips" / name / "tracks.npz", tracks=tracks, visible=np.isfinite(tracks).all(2))
    files = gather(folder, "correspondence")
    assert (~files.truth.isnan().flatten(2).any(2)).sum(1).tolist() == [1] * 6


def test_clips_whose_frames_share_no_point(folder):
    for name in ("one", "two"):
        np.savez(
            folder / "clips" / name / "tracks.npz", tracks=np.array(TRACKS), visible=np.array([[True] * 3, [False] * 3])
        )
    with refused("hardly any two frames share a point that is seen in both"):
        gather(folder, "correspondence")


def test_a_clip_of_one_frame(folder):
    (folder / "clips" / "one" / "1.png").unlink()
    np.savez(folder / "clips" / "one" / "tracks.npz", tracks=np.array(TRACKS)[:1])
    with refused("for 1 frames: expected"):
        gather(folder, "correspondence")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_damaged_npz(folder, content):
    (folder / "controls" / "1.npz").write_bytes(content)
    with refused(r"controls/1\.npz can't be read: expected an \.npz with keypoints"):
        gather(folder, "keypoint")


def test_an_npz_with_code_is_not_run(folder):
    np.savez(folder / "controls" / "1.npz", keypoints=np.array([print], dtype=object))
    with refused(r"1\.npz"):
        gather(folder, "keypoint")


def test_one_identity(folder):
    for path in (folder / "identities" / "two").iterdir():
        path.unlink()
    (folder / "identities" / "two").rmdir()
    with refused("there is one identity only: two or more are needed"):
        gather(folder, "appearance")


def test_one_picture_of_an_identity(folder):
    (folder / "identities" / "two" / "1.jpg").unlink()
    with refused("identity 'two' has one picture: two or more are needed"):
        gather(folder, "appearance")


# The config


def test_a_config_is_yaml_or_json_and_its_folders_are_beside_it(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    text = "kind: spatial\nout: heads/a.safetensors\npictures: pictures\ncontrols: controls\n"
    text += "learning_rate: 1e-3\nema: 1\nsparse: false\nsteps: 10.0\nmargin: 0.25\n"  # YAML takes 1e-3 for a text
    (folder / "train.yaml").write_text(text)
    config = read_config(folder / "train.yaml")
    assert (config.pictures, config.out) == (folder / "pictures", folder / "heads" / "a.safetensors")
    assert (config.settings.learning_rate, config.settings.ema, config.settings.steps) == (1e-3, 1.0, 10)
    assert (config.sparse, config.margin, config.width) == (False, 0.25, 384)
    assert type(config.settings.steps) is int
    as_json = write(folder, kind="spatial", out="heads/a.safetensors", learning_rate=1e-3, steps=10)
    assert read_config(as_json).settings.learning_rate == 1e-3


def test_absolute_folders_are_taken_as_they_are(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert read_config(write(folder, kind="spatial", pictures=str(elsewhere))).pictures == elsewhere


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"stepps": 3, "batchsize": 2},
            "settings that don't exist: stepps, batchsize. Known are: kind, out, .*steps, batch",
        ),
        ({"kind": None}, "kind is None: expected a text"),
        ({"kind": "pose"}, "kind 'pose' is unknown: expected one of spatial, "),
        ({"out": "head.pt"}, "out is 'head.pt': a head's file ends in .safetensors"),
        ({"out": 3}, "out is 3: expected a text"),
        ({"pictures": "nowhere"}, "pictures: there is no folder '.*nowhere'"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': expected a number"),
        ({"learning_rate": 0}, "learning_rate is 0: it must be between 0 and 1, and not 0"),
        ({"learning_rate": True}, "learning_rate is True"),
        ({"steps": 1.5}, "steps is 1.5: expected a whole number"),
        ({"steps": [1]}, r"steps is \[1\]"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: it must be between 0 and 1"),
        ({"sparse": "yes"}, "sparse is 'yes': expected true or false"),
        ({"prompt": 3}, "prompt is 3: expected a text"),
        ({"precision": "fp8"}, "precision 'fp8' is unknown: expected one of fp32, bf16, fp16"),
        ({"size": 100}, "size is 100: it must be a multiple of 8, 64 or more"),
        ({"size": 32}, "size is 32: it must be a multiple of 8, 64 or more"),
        ({"width": 100}, "width is 100: it must be a multiple of 64"),
        ({"width": 192}, "width is 192: choose one of 64, 128, "),
        ({"examples": 0}, "examples is 0: it must be a multiple of 1, 1 or more"),
        ({"temperature": 0}, "temperature and margin must be above 0"),
        ({"margin": -1}, "temperature and margin must be above 0"),
        ({"device": "cuda:1"}, "device is 'cuda:1': choose auto or cpu"),
        ({"batch": 6, "accumulate": 4}, "a batch of 6 can't be divided into 4 microbatches"),
    ],
)
def test_a_bad_setting_is_refused_by_its_name(folder, changed, words):
    with refused(words):
        read_config(write(folder, **{"kind": "spatial", **changed}))


def test_an_infinite_whole_number(folder):
    (folder / "train.yaml").write_text("kind: spatial\nout: a.safetensors\nsteps: .inf\n")
    with refused("steps is inf: expected"):
        read_config(folder / "train.yaml")


@pytest.mark.parametrize("missing", ["kind", "out"])
def test_a_setting_that_is_needed(folder, missing):
    settings = {"kind": "spatial", "out": "a.safetensors"}
    settings.pop(missing)
    (folder / "train.json").write_text(json.dumps(settings))
    with refused(f"'train.json' does not say {missing}$"):
        read_config(folder / "train.json")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("spatial", "a spatial head is trained from pictures and controls: name the folder pictures"),
        ("keypoint", "name the folder pictures"),
        ("lgp", "name the folder pictures"),
        ("correspondence", "a correspondence head is trained from clips: name the folder clips"),
        ("appearance", "an? appearance head is trained from identities: name the folder identities"),
    ],
)
def test_a_kind_without_its_folders(tmp_path, kind, words):
    with refused(words):
        TrainingConfig(kind=kind, out=tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no settings: expected lines such as 'kind: ...'"),
        (b"spatial", "holds no settings"),
        (b"- kind: spatial", "holds no settings"),
        (b"kind: [spatial", "is neither YAML nor JSON"),
        (b"\xff\xfe\x00kind", "is neither YAML nor JSON"),
        (b"!!python/object/apply:os.getcwd []", "is neither YAML nor JSON"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, words):
    (tmp_path / "train.yaml").write_bytes(content)
    with refused(words):
        read_config(tmp_path / "train.yaml")


def test_a_config_that_is_not_there_or_no_file(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with refused(f"the config {re.escape(repr(str(path)))} can't be read: "):
            read_config(path)
