"""Commands as users run them."""

from __future__ import annotations

import os
import subprocess
import sys

from comfyui_host import REPOSITORY, find_comfyui

PATIENCE_S = 240.0  # the machine may be busy with other things


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command of a user's, in the repository; what it started is ended with it."""
    environment = {**os.environ, "COMFYUI_PATH": str(find_comfyui()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
