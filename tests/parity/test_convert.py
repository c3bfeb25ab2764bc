"""The authors' head files, converted there and back without loss."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from small_models import PARITY

from rg_engine.__main__ import main
from rg_engine.convert import convert_head
from rg_engine.errors import HeadFileError
from rg_engine.heads import ReadoutHead, load_head

KIT = sorted(PARITY.glob("head_*.pt"))


@pytest.fixture
def changed(tmp_path):
    """changed(**what): the kit's spatial head file with parts replaced."""

    def write(**what):
        path = tmp_path / "theirs.pt"
        torch.save({**torch.load(KIT[-1], weights_only=True), **what}, path)
        return path

    return write


def there_and_back(path, folder) -> tuple[dict, dict]:
    """The file as it was and as it comes back."""
    ours, back = folder / "ours.safetensors", folder / "back.pt"
    convert_head(path, ours)
    convert_head(ours, back)
    return tuple(torch.load(each, weights_only=True) for each in (path, back))


def readout(head: ReadoutHead) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, channels, 6, 6, generator=generator) for channels in head.spec.feature_channels]
    emb = torch.randn(2, head.network.emb_width or 1, generator=generator)
    return head.read(maps, emb, (12, 12))


def test_the_kit_has_a_head_of_each_kind_that_the_authors_made():
    assert [load_head(path).spec.kind for path in KIT] == ["appearance", "correspondence", "spatial"]


@pytest.mark.parametrize("path", KIT, ids=lambda path: path.stem)
def test_tensors_config_and_step_come_back_as_they_were(path, tmp_path):
    before, after = there_and_back(path, tmp_path)
    assert after["config"] == before["config"]
    assert type(after["step"]) is type(before["step"])
    assert after["step"] == before["step"]
    first, last = before["aggregation_network"], after["aggregation_network"]
    assert sorted(last) == sorted(first)
    for key, tensor in first.items():
        assert last[key].dtype == tensor.dtype
        assert last[key].shape == tensor.shape
        assert torch.equal(last[key], tensor), key


@pytest.mark.parametrize("path", KIT, ids=lambda path: path.stem)
def test_the_converted_file_is_the_same_head(path, tmp_path):
    convert_head(path, tmp_path / "ours.safetensors")
    theirs, ours = load_head(path), load_head(tmp_path / "ours.safetensors")
    assert ours.spec == theirs.spec
    assert torch.equal(readout(ours), readout(theirs))


def test_half_precision_and_constants_of_their_training_stay_as_they_are(changed, tmp_path):
    tensors = torch.load(KIT[-1], weights_only=True)["aggregation_network"]
    mixed = {key: tensor.half() if tensor.ndim > 1 else tensor for key, tensor in tensors.items()}
    mixed["logit_scale"] = torch.tensor(2.5, dtype=torch.bfloat16)
    before, after = there_and_back(changed(aggregation_network=mixed), tmp_path)
    assert {key: (value.dtype, value.shape) for key, value in after["aggregation_network"].items()} == {
        key: (value.dtype, value.shape) for key, value in before["aggregation_network"].items()
    }
    assert all(torch.equal(value, mixed[key]) for key, value in after["aggregation_network"].items())


def test_what_a_config_may_hold_comes_back_with_its_types(changed, tmp_path):
    config = {
        "control_range": (-0.5, 0.5), "nested": {"pairs": [(1, 2), [3, (4.0,)]], "empty": [(), [], {}]}, "none": None,
        "true": True, "whole": 3, "part": 0.1, "one": 1.0, "words": "déjà vu",
    }  # fmt: skip
    before, after = there_and_back(changed(config=config), tmp_path)
    assert repr(after["config"]) == repr(before["config"]) == repr(config)


@pytest.mark.parametrize("step", [None, 0, 100000])
def test_a_step_comes_back(changed, tmp_path, step):
    before, after = there_and_back(changed(step=step), tmp_path)
    assert repr(after["step"]) == repr(before["step"])


def test_a_step_that_is_no_plain_number_is_refused(changed, tmp_path):
    with pytest.raises(HeadFileError, match="step"):
        convert_head(changed(step=torch.tensor(5)), tmp_path / "ours.safetensors")


@pytest.mark.parametrize(
    "config",
    [{"mean": torch.ones(2)}, {"deep": [{"set": torch.float16}]}, {"dims": {0: 64}}],
    ids=["tensor", "dtype", "key"],
)
def test_a_config_that_json_cannot_hold_is_refused_and_nothing_is_written(changed, tmp_path, config, capsys):
    path, ours = changed(config=config), tmp_path / "ours.safetensors"
    with pytest.raises(HeadFileError, match=r"the config holds .* can't be kept in a \.safetensors file"):
        convert_head(path, ours)
    assert not ours.exists()
    assert main(["convert", str(path), str(ours)]) == 2
    assert capsys.readouterr().err.startswith("error: the config holds")


def test_the_command_converts_there_and_back(tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.pt"
    assert main(["convert", str(KIT[0]), str(ours)]) == 0
    assert main(["convert", str(ours), str(back)]) == 0
    assert torch.load(back, weights_only=True)["config"] == torch.load(KIT[0], weights_only=True)["config"]
    with safe_open(ours, framework="pt") as file:
        assert set(file.keys()) == set(torch.load(KIT[0], weights_only=True)["aggregation_network"])


def test_a_head_of_ours_as_an_authors_file_reads_the_same(tmp_path):
    """A head without anything of theirs kept: the layout is described from what it is."""
    convert_head(KIT[-1], tmp_path / "a.safetensors")
    convert_head(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    )  # written by save_head, which keeps our metadata only
    convert_head(tmp_path / "b.safetensors", tmp_path / "c.pt")
    assert torch.equal(readout(load_head(tmp_path / "c.pt")), readout(load_head(KIT[-1])))
