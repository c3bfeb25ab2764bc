"""The layouts in the wild, a file each. A new one is a file and a line here."""

from . import authors, comfyui, control, kohya, lycoris, native, onetrainer, peft

LAYOUTS = (
    native.LAYOUT,
    authors.LAYOUT,
    control.LAYOUT,
    peft.LAYOUT,
    onetrainer.LAYOUT,
    lycoris.LAYOUT,
    kohya.LAYOUT,
    comfyui.LAYOUT,
)
