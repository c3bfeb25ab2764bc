"""The icon (400 x 400) and the banner (21:9) of the registry: a scene of the demo world and what a head reads in it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rg_engine.demo.render import edge_map, pose_map, render
from rg_engine.demo.world import Figure, Identity, Scene

ICON_PX = 400
BANNER_PX = (1260, 540)
GROUND = (24, 26, 30)
#: A wave: see Figure.pose.
POSE = (0.05, -2.0, -0.7, 1.1, 1.2, -0.35, 0.1, 0.4, 0.1)


def scene() -> Scene:
    figure = Figure(identity=Identity(colour="orange", shirt="blue", thickness=0.055), x=0.5, base_y=0.95, pose=POSE)
    return Scene(figure=figure, solids=(), wall="teal")


def icon() -> Image.Image:
    """The figure, and beyond a slanted line its pose as a head reads it."""
    drawn = scene()
    picture = Image.fromarray(render(drawn, ICON_PX).image)
    pose = Image.fromarray(as_bytes(pose_map(drawn.figure, ICON_PX)))
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).polygon(
        [(0.62 * ICON_PX, 0), (ICON_PX, 0), (ICON_PX, ICON_PX), (0.38 * ICON_PX, ICON_PX)], fill=255
    )
    picture.paste(pose, mask=mask)
    return picture


def banner() -> Image.Image:
    """Pose, depth and edges above one another, the picture beside them, and the name."""
    width, height = BANNER_PX
    drawn = scene()
    large, small = render(drawn, height), render(drawn, height // 3)
    image = Image.new("RGB", BANNER_PX, GROUND)
    image.paste(Image.fromarray(large.image), (width - height, 0))
    read = (pose_map(drawn.figure, height // 3), small.depth, edge_map(small.image))
    for row, control in enumerate(read):
        image.paste(Image.fromarray(as_bytes(control)).convert("RGB"), (width - height - height // 3, row * height // 3))
    pen = ImageDraw.Draw(image)
    pen.text((56, 160), "Readout\nGuidance", fill="white", font=ImageFont.load_default(84), spacing=8)
    pen.text((60, 372), "the model says what it sees,\nand paints what you ask", fill=(170, 178, 190),
             font=ImageFont.load_default(30), spacing=8)  # fmt: skip
    return image


def as_bytes(picture: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3), bytes or 0..1, as bytes."""
    return picture if picture.dtype == np.uint8 else np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8)
