"""Colour scales that people with any colour vision can read: lightness alone orders them."""

from __future__ import annotations

Colour = tuple[int, int, int]

# Anchors of viridis turned round (light is little), and of a blue-white-orange scale for values on both sides of 0.
_LEVELS: tuple[Colour, ...] = (
    (247, 250, 240), (208, 232, 190), (141, 211, 180), (74, 178, 172), (42, 134, 157), (48, 87, 134), (52, 40, 98)
)  # fmt: skip
_SIDES: tuple[Colour, ...] = (
    (23, 78, 135), (67, 138, 190), (160, 202, 226), (247, 247, 247), (250, 196, 132), (226, 124, 36), (150, 62, 8)
)  # fmt: skip


def level(value: float) -> Colour:
    """0 light to 1 dark; values outside are clipped."""
    return _mix(_LEVELS, value)


def side(value: float) -> Colour:
    """-1 blue, 0 nearly white, 1 brown."""
    return _mix(_SIDES, (value + 1) / 2)


def ink(background: Colour) -> Colour:
    """Black or white, whichever is the easier to read."""
    return (0, 0, 0) if _luminance(background) > 0.18 else (255, 255, 255)


def as_hex(colour: Colour) -> str:
    """`#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _mix(anchors: tuple[Colour, ...], value: float) -> Colour:
    place = min(max(value, 0.0), 1.0) * (len(anchors) - 1)
    first = min(int(place), len(anchors) - 2)
    share = place - first
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(anchors[first], anchors[first + 1], strict=True))
    return red, green, blue


def _luminance(colour: Colour) -> float:
    """Relative luminance (WCAG 2)."""
    red, green, blue = ((c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


LEVEL_STEPS = [level(step / 6) for step in range(7)]
SIDE_STEPS = [side(step / 3 - 1) for step in range(7)]
"""Colours of the two scales from end to end, for their legends."""
