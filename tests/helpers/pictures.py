"""Drawn images of four kinds: horizontal and vertical stripes, discs and crosses."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw

from rayfed_sub.core.rng import stream

KINDS = ("cross", "disc", "lying", "standing")


def drawn(kind: str, number: int, side: int = 24) -> Image.Image:
    """Gray, light on dark; place, size and brightness vary with the number."""
    shift, width, light = (int(x) for x in stream(0, "picture", kind, number).integers((0, 2, 120), (6, 5, 256)))
    image = Image.new("L", (side, side), color=number % 40)
    pen = ImageDraw.Draw(image)
    if kind == "disc":
        pen.ellipse((shift, shift, side - 7 + shift, side - 7 + shift), fill=light)
    if kind == "cross":
        pen.line((shift, 0, side - shift, side), fill=light, width=width)
        pen.line((side - shift, 0, shift, side), fill=light, width=width)
    for place in range(shift, side, 8):
        if kind == "lying":
            pen.rectangle((0, place, side, place + width), fill=light)
        if kind == "standing":
            pen.rectangle((place, 0, place + width, side), fill=light)
    return image


def filed(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
    """The image encoded in that format."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def album(path: Path, each: int) -> str:
    """Write a Parquet file of so many images of each kind: PNG and JPEG in turn, with columns image, label, file."""
    rows = [
        {
            "image": filed(drawn(kind, number, 20 + number % 8), ("PNG", "JPEG")[number % 2]),
            "label": kind,
            "file": f"{kind}/{number}",
        }
        for number in range(each)
        for kind in KINDS
    ]
    pd.DataFrame(rows).to_parquet(path)
    return str(path)
