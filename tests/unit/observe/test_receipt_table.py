"""A receipt on the screen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from rich.console import Console

from moemm.growth import Proof, Receipt, Size
from moemm.observe.receipt_table import number, render_receipt


def shown(**given: Any) -> str:
    values: dict[str, Any] = {
        "operation": "upcycle copy", "sources": [{"folder": "runs/a", "step": 7, "sha256": "0123456789abcdef"}],
        "target": "runs/b", "changed": ["made experts"], "proofs": [], "before": Size(total=1000, active=500),
        "after": Size(total=4000, active=500), "optimizer": "not kept: there is none", **given,
    }  # fmt: skip
    receipt = json.loads(json.dumps(Receipt(**values).to_dict()))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render_receipt(receipt))
    return capture.get()


def test_it_says_what_was_done_and_to_what() -> None:
    text = shown()
    for part in ("upcycle copy", "runs/a, step 7, sha256 0123456789ab", "runs/b", "- made experts", "4,000", "4.00",
                 "not kept: there is none"):  # fmt: skip
        assert part in text
    assert "measured" not in text, "there is nothing to show"


def test_each_proof_has_its_verdict() -> None:
    proofs = [Proof(what="error", value=3.14e-7, most=1e-5), Proof(what="told", value=0.25)]
    text = shown(proofs=proofs)
    assert "3.14e-07" in text and "at most 1e-05" in text and "holds" in text and "FAILS" not in text


def test_a_failed_proof_is_seen() -> None:
    proofs = [Proof(what="gradient", value=0.0, least=1e-9), Proof(what="error", value=float("nan"), most=1.0)]
    text = shown(proofs=proofs)
    assert text.count("FAILS") == 2 and "not finite" in text and "not every proof holds" in text


def test_a_source_that_is_a_file_has_no_step() -> None:
    text = shown(sources=[{"folder": "vit", "sha256": "ff"}])
    assert "vit, sha256 ff" in text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (12.0, "12"), (1234.0, "1,234"), (0.03141, "0.0314")])
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
