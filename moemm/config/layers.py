"""Which layers: the text in `model.experts.groups[].layers`."""

from __future__ import annotations

import re

FORMS = "all, every-N (the last of each N), first-N, last-N, or numbers from 0 joined by commas"


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that `text` names, in order, of 0 to num_layers - 1: `all`, `every-2`, `first-1`, `last-1`, `0,3`.

    Raises ValueError where it is none of FORMS, or names a layer that is not there, or no layer at all.
    """
    numbers = range(num_layers)
    word = re.fullmatch(r"(every|first|last)-([1-9]\d*)", text)
    if text == "all":
        found = list(numbers)
    elif word:
        count = int(word[2])
        found = {
            "every": [layer for layer in numbers if layer % count == count - 1],
            "first": list(numbers[:count]),
            "last": list(numbers[-count:]),
        }[word[1]]
    elif re.fullmatch(r"\d+(,\d+)*", text):
        found = sorted({int(part) for part in text.split(",")})
    else:
        raise ValueError(f"is not one of: {FORMS}")
    if not found or found[-1] >= num_layers:
        raise ValueError(f"names {f'layer {found[-1]}' if found else 'no layer'}; the model has 0 to {num_layers - 1}")
    return tuple(found)
