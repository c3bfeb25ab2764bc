"""The package that the ComfyUI registry gets: valid to its own tool, whole, loadable, without what users don't need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from comfyui_host import REPOSITORY, find_comfyui
from PIL import Image

#: A folder with comfy-cli and what it needs, as `nox -s tests` installs it.
COMFY_CLI = "READOUT_GUIDANCE_COMFY_CLI"
#: What no clone has.
LEFT_OVER = (".git", ".nox", ".venv", "__pycache__", ".*_cache", "demo_out", "*.egg-info", "build", "dist", "node.zip")
MOST_BYTES = 40_000_000
PATIENCE_S = 240.0
LOADS = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes
assert asyncio.run(nodes.load_custom_node(sys.argv[2]))
from pathlib import Path
import folder_paths
shipped = {path.stem for path in Path(sys.argv[2], "web", "docs").glob("*.md")}
assert shipped and shipped <= set(nodes.NODE_CLASS_MAPPINGS), shipped
nodes.NODE_CLASS_MAPPINGS["RG_LoadDemoModel"].execute()
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository without what was left over in it."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(*LEFT_OVER))
    return copy


@pytest.fixture(scope="module")
def comfy(checkout: Path, tmp_path_factory: pytest.TempPathFactory):
    """comfy(words) runs ComfyUI's command line in the checkout, without a network and with a home of its own."""
    folder, home = os.environ.get(COMFY_CLI, ""), str(tmp_path_factory.mktemp("home"))
    if not folder or not Path(folder, "comfy_cli").is_dir():
        pytest.skip(f"needs comfy-cli in {COMFY_CLI}")
    offline = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    where = {"HOME": home, "USERPROFILE": home, "APPDATA": home, "LOCALAPPDATA": home, "PYTHONPATH": folder}

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *words]
        ran = subprocess.run(
            command, cwd=checkout, env={**os.environ, **where, **offline}, capture_output=True, text=True,
            encoding="utf-8", timeout=PATIENCE_S,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    return run


@pytest.fixture(scope="module")
def packed(comfy, checkout: Path) -> zipfile.ZipFile:
    comfy("node", "pack")
    return zipfile.ZipFile(checkout / "node.zip")


def test_the_registrys_tool_finds_nothing_to_say(comfy):
    said = comfy("node", "validate")
    assert "All validation checks passed" in said
    assert "Warning" not in said


def test_everything_that_runs_is_packed(packed):
    wanted = [REPOSITORY / name for name in ("__init__.py", "pyproject.toml", "README.md", "LICENSE")]
    for folder in ("nodes", "rg_engine", "web", "locales", "example_workflows"):
        wanted += [path for path in (REPOSITORY / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = {path.relative_to(REPOSITORY).as_posix() for path in wanted}
    assert not names - set(packed.namelist())


def test_what_users_need_not_have_is_not_packed(packed):
    names = packed.namelist()
    assert not [name for name in names if name.startswith(("tests/", ".ci/", ".github/", ".git/")) or name == "noxfile.py"]
    assert not [name for name in names if name.startswith("docs/") and not name.endswith(".md")]
    assert sum(each.file_size for each in packed.infolist()) <= MOST_BYTES


def test_the_package_loads_in_comfyui(packed, tmp_path):
    packed.extractall(tmp_path / "readout-guidance")
    ran = subprocess.run(
        [sys.executable, "-c", LOADS, str(find_comfyui()), str(tmp_path / "readout-guidance")], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def registry(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ".github/registry.py", *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=PATIENCE_S)


def test_a_tag_is_published_only_with_its_version_and_links(checkout):
    pyproject = checkout / "pyproject.toml"
    before = pyproject.read_text(encoding="utf-8")
    version = next(line for line in before.splitlines() if line.startswith("version = ")).split('"')[1]
    try:
        refused = registry(checkout, "someone/somewhere", "--check", f"v{version}")
        assert "does not link to someone/somewhere" in refused.stderr
        assert not registry(checkout, "someone/somewhere").returncode
        assert registry(checkout, "someone/somewhere", "--check", "v99.0").returncode
        assert not registry(checkout, "someone/somewhere", "--check", f"v{version}").returncode
        written = pyproject.read_text(encoding="utf-8")
        assert 'Repository = "https://github.com/someone/somewhere"\n' in written
        for name in ("Icon", "Banner"):
            file = f"docs/{name.lower()}.png"
            assert f'{name} = "https://raw.githubusercontent.com/someone/somewhere/HEAD/{file}"\n' in written
            assert (REPOSITORY / file).is_file()
        assert not registry(checkout, "another/place").returncode
        assert "someone" not in pyproject.read_text(encoding="utf-8")
    finally:
        pyproject.write_text(before, encoding="utf-8")


def test_icon_and_banner_have_the_sizes_that_the_registry_takes():
    with Image.open(REPOSITORY / "docs" / "icon.png") as icon, Image.open(REPOSITORY / "docs" / "banner.png") as banner:
        assert max(icon.size) <= 400
        assert icon.width == icon.height
        assert banner.width * 9 == banner.height * 21


def test_the_public_workflows_run_the_readmes_commands():
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))["jobs"]
    steps = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert {"pipx run nox -s demo", "pipx run nox -s tests"} <= set(steps["readme"])
    assert {"windows-latest", "macos-latest"} == set(jobs["engine"]["strategy"]["matrix"]["os"])
    assert "pipx run nox -s tests -- tests/engine" in steps["engine"]


@pytest.mark.parametrize("name", ["bug", "question"])
def test_issue_forms_ask_for_the_line_of_the_log(name):
    form = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    (line,) = [part for part in form["body"] if part.get("id") == "line"]
    assert "Readout Guidance" in line["attributes"]["label"]
