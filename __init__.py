"""Readout Guidance for ComfyUI: steer a frozen model with small heads that read its features."""

import logging
import sys

WEB_DIRECTORY = "./web"
OLDEST_COMFYUI = (0, 3, 64)


def _warn_if_too_old(version: str | None) -> bool:
    """Older ComfyUIs skip this extension without saying why."""
    numbers = tuple(int(part) for part in (version or "").split(".") if part.isdigit())
    too_old = bool(numbers) and numbers < OLDEST_COMFYUI
    if too_old:
        needed = ".".join(map(str, OLDEST_COMFYUI))
        logging.warning("Readout Guidance needs ComfyUI %s or later and this is %s: update ComfyUI.", needed, version)
    return too_old


_warn_if_too_old(getattr(sys.modules.get("comfyui_version"), "__version__", None))


async def comfy_entrypoint():
    """ComfyUI's entry point. Imports are here, so that tests and users of the engine need no ComfyUI."""
    from comfy_api.latest import ComfyExtension

    from .nodes import NODES
    from .rg_engine.comfy_host.boundary_folder import register_boundary_folder
    from .rg_engine.comfy_host.folders import register_folders

    class ReadoutGuidance(ComfyExtension):
        async def get_node_list(self):
            return list(NODES)

    register_folders()
    register_boundary_folder()
    return ReadoutGuidance()
