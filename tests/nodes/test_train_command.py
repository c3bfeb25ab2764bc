"""``python -m rg_engine train``: a head from folders, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from comfyui_host import engine
from command_line import run
from PIL import Image

STEPS = 5


def config(folder: Path, out: str, **changed: object) -> Path:
    """A config file for the spatial data in ``folder``."""
    values = {
        "kind": "spatial", "out": out, "pictures": "pictures", "controls": "controls", "prompt": "captions", "size": 64,
        "width": 64, "steps": STEPS, "batch": 4, "validate_every": 2, "validation_share": 0.25, "shift": 0.1,
        "learning_rate": "1e-3", "device": "cpu", **changed,
    }  # fmt: skip
    path = folder / f"{Path(out).stem}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()), encoding="utf-8")
    return path


def losses(log: Path) -> list[float]:
    """Every loss and validation of a log, in order."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["validation"] is not None] == [2, 4, STEPS]
    return [value for line in lines for value in (line["loss"], line["validation"]) if value is not None]


@pytest.fixture(scope="module")
def data(_started_comfyui: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pictures/ with captions and controls/ of eight scenes of the demo world."""
    folder = tmp_path_factory.mktemp("data")
    drawn = engine("demo.scene_pictures").scene_pictures(3, 8)
    for name, layer in (("pictures", drawn.picture), ("controls", drawn.depth)):
        (folder / name).mkdir()
        for i, picture in enumerate(layer.numpy()):
            Image.fromarray((picture * 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    for i, caption in enumerate(drawn.captions):
        (folder / "pictures" / f"{i}.txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(data: Path) -> SimpleNamespace:
    """What one process said, and the folder it wrote into."""
    ended = run("rg_engine", "train", "--config", str(config(data, "heads/depth.safetensors")))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return SimpleNamespace(said=ended.stdout, folder=data / "heads")


def test_a_head_is_trained_from_folders(comfyui, alone):
    head = engine("heads").load_head(alone.folder / "depth.safetensors")
    assert (head.spec.kind, head.output_channels) == ("spatial", 1)
    assert head.spec.training["steps"] == STEPS
    assert head.spec.training["model"] == "demo"
    assert all(loss > 0 for loss in losses(alone.folder / "depth.jsonl"))
    with Image.open(alone.folder / "depth.png") as plot:
        assert plot.size == (720, 400)
    assert sorted(path.name for path in alone.folder.iterdir()) == ["depth.jsonl", "depth.png", "depth.safetensors"]
    assert f"step {STEPS} of {STEPS}: loss" in alone.said
    assert alone.said.strip().endswith("depth.safetensors")


def test_two_processes_have_the_loss_curve_of_one(data, alone):
    path = config(data, "two/depth.safetensors")
    ended = run(
        "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "rg_engine", "train", "--config", str(path)
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(data / "two" / "depth.jsonl") == pytest.approx(losses(alone.folder / "depth.jsonl"), rel=1e-5)
    assert sorted(path.name for path in (data / "two").iterdir()) == ["depth.jsonl", "depth.png", "depth.safetensors"]


def test_a_bad_config_is_told_in_a_line_and_nothing_is_written(data):
    ended = run("rg_engine", "train", "--config", str(config(data, "bad/depth.safetensors", stepps=3)))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: 'depth.yaml' has settings that don't exist: stepps")
    assert "Traceback" not in ended.stderr
    assert not (data / "bad").exists()
