"""``nox -s gallery``: the pictures of README and templates, by the demo command and from ComfyUI's real page."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "web"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from comfyui_host import REPOSITORY
from emblem import banner, icon
from scenes import TEMPLATES, drag_editor, needs_files, page_of, three_nodes
from studio import started

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.json"))
FROM_THE_PAGE = {
    "drag_editor": drag_editor,
    "three_nodes": three_nodes,
    **{name: page_of(name) for name in NAMES if needs_files(name)},
}
DRAWN = {"icon": icon, "banner": banner}
FROM_THE_DEMO = [name for name in NAMES if not needs_files(name)]
ALWAYS = {"pose", "depth", "edges"}  # the demo command makes these whatever it is asked for


def run_demo(names: list[str], out: Path) -> None:
    """The pictures of templates that need no files, by the demo command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rg_engine", "demo", "--out", folder, "--modes", "fast", "reference", "--edits"]
        subprocess.run([*command, *(name for name in names if name not in ALWAYS)], cwd=REPOSITORY, check=True)
        for name in names:
            shutil.copy(Path(folder, f"{name}.jpg"), out / "example_workflows")


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests/gallery", description=__doc__)
    every = [*FROM_THE_DEMO, *FROM_THE_PAGE, *DRAWN]
    parser.add_argument("--only", nargs="+", default=every, choices=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--out", type=Path, default=REPOSITORY, help="the repository unless told")
    return parser


def main() -> None:
    options = command_line().parse_args()
    for folder in ("docs", "example_workflows", "web/docs"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    for name in options.only:
        if name in DRAWN:
            DRAWN[name]().save(options.out / "docs" / f"{name}.png", optimize=True)
    made = [name for name in options.only if name in FROM_THE_DEMO]
    if made:
        run_demo(made, options.out)
    taken = [name for name in options.only if name in FROM_THE_PAGE]
    if taken:
        with started() as (server, browser):
            for name in taken:
                FROM_THE_PAGE[name](server, browser, options.out)
                print(f"made {name}", flush=True)


if __name__ == "__main__":
    main()
