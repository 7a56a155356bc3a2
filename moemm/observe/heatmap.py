"""A heat map as a picture, for TensorBoard. With Pillow and not matplotlib: a training run would wait for that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from moemm.observe.colour import ink, level

CELL_WIDTH, CELL_HEIGHT, MARGIN, FONT = 46, 22, 10, 12
MAX_LABEL = 28
FORBIDDEN = (225, 225, 225)


def draw_heatmap(share_RC: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str) -> np.ndarray:
    """(H, W, 3) uint8 picture of shares (R, C) from 0 to 1, in percent; NaN cells are grey, with a dash."""
    font = ImageFont.load_default(FONT)
    labels, heads = [_cut(name) for name in rows], [_cut(name) for name in columns]
    left = MARGIN + max((int(font.getlength(text)) for text in labels), default=0) + MARGIN
    cell = max([CELL_WIDTH, *(int(font.getlength(text)) + 8 for text in heads)])
    top = MARGIN + 2 * CELL_HEIGHT
    width = max(left + cell * len(heads), MARGIN + int(font.getlength(title))) + MARGIN
    picture = Image.new("RGB", (width, top + CELL_HEIGHT * len(labels) + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title, "black", font)
    for column, text in enumerate(heads):
        draw.text((left + cell * (column + 0.5), top - 4), text, "black", font, anchor="ms")
    for row, text in enumerate(labels):
        y = top + CELL_HEIGHT * row
        draw.text((left - MARGIN, y + CELL_HEIGHT / 2), text, "black", font, anchor="rm")
        for column, value in enumerate(share_RC[row]):
            known = bool(np.isfinite(value))
            colour = level(float(value)) if known else FORBIDDEN
            x = left + cell * column
            draw.rectangle((x, y, x + cell - 2, y + CELL_HEIGHT - 2), colour)
            middle = (x + cell / 2, y + CELL_HEIGHT / 2)
            draw.text(middle, f"{100 * value:.0f}" if known else "-", ink(colour), font, anchor="mm")
    return np.asarray(picture)


def _cut(name: str) -> str:
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 3] + "..."
