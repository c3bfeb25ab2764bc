"""Readout Guidance for ComfyUI: steer a frozen model with small heads that read its features."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's entry point. Imports are here, so that tests and users of the engine need no ComfyUI."""
    try:
        from comfy_api.latest import ComfyExtension
    except ImportError as error:
        raise ImportError(
            "Readout Guidance needs ComfyUI 0.3.64 or later (its V3 node schema, comfy_api.latest). Update ComfyUI"
        ) from error

    from .nodes import NODES
    from .rg_engine.comfy_host.folders import register_folders

    class ReadoutGuidance(ComfyExtension):
        async def get_node_list(self):
            return list(NODES)

    register_folders()
    return ReadoutGuidance()
