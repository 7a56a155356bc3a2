"""What counts as the same kind of machine: moemm/testing/kind.py."""

from __future__ import annotations

import pytest

from moemm.testing.kind import differing, machine_kind

V3 = "avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


def cpuinfo(vendor: str, model: int, flags: str, clock: str = "2596.1") -> str:
    block = f"vendor_id\t: {vendor}\ncpu family\t: 25\nmodel\t\t: {model}\ncpu MHz\t\t: {clock}\nflags\t\t: {flags}\n"
    return f"processor\t: 0\n{block}\nprocessor\t: 1\n{block}\n"


AMD = cpuinfo("AuthenticAMD", 17, V4)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (cpuinfo("GenuineIntel", 17, V4), "cpu: "),
        (cpuinfo("AuthenticAMD", 1, V4), "cpu: "),
        (cpuinfo("AuthenticAMD", 17, V3), "level: x86-64-v4, not x86-64-v3"),
        (cpuinfo("AuthenticAMD", 17, "sse2"), "level: x86-64-v4, not any"),
        (cpuinfo("AuthenticAMD", 17, V4.replace(" fma", "")), "level: x86-64-v4, not any"),
        ("", "cpu: "),
    ],
    ids=["vendor", "model", "no AVX-512", "no AVX", "no FMA", "no /proc/cpuinfo"],
)
def test_processors_that_may_add_in_another_order_are_of_other_kinds(other: str, said: str) -> None:
    assert said in differing(machine_kind(AMD), machine_kind(other))


def test_clock_and_number_of_cores_make_no_kind() -> None:
    assert machine_kind(AMD) == machine_kind(cpuinfo("AuthenticAMD", 17, V4, clock="3000.0").partition("\n\n")[0])
    assert differing(machine_kind(), machine_kind()) == ""


def test_what_a_library_was_told_makes_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = machine_kind()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert "MKL_CBWR=COMPATIBLE" in differing(machine_kind(), before)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert machine_kind()["torch"].split()[1] == "DEFAULT"


def test_another_compiler_and_no_library_at_all_make_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(compiler: str) -> str:
        info = {"build": {"compiler": compiler, "flags": "-O3"} if compiler else None}
        monkeypatch.setattr("moemm.testing.kind.backend_info", lambda: info)
        return machine_kind()["ops"]

    assert [built("c++ 12"), built("c++ 13"), built("")] == ["c++ 12 -O3", "c++ 13 -O3", "plain PyTorch"]
