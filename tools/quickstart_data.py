"""Makes data/quickstart/ from a folder of the suite's files: `MOEMM_SUITE=FOLDER python tools/quickstart_data.py`.

Writes the six files that may be shared freely, and LICENCES.md with the origin, licence and sha256 of each.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from moemm.data import DataFile, repack_file

NAMES = ("digits_hard", "avclip", "watch", "vowels", "adult", "reviews")
_TARGET = Path(__file__).parent.parent / "data" / "quickstart"
_HEADER = """# Origin and licence of the quickstart data

Six small real data sets, in moemm's HDF5 format (docs/data.md). They were read from the packages named under
*source* and written again by `tools/quickstart_data.py` with checksums; no value was changed by that. *Pairing* says
which signals really belong together and *honesty* what is not as it was recorded: quote both with any result.
The licences below are those of the data; the code of moemm has its own.
"""


def section(path: Path) -> str:
    """The entry of one file in LICENCES.md."""
    with DataFile(path) as file:
        info = file.info
        modalities = ", ".join(f"{m.name} ({m.kind})" for m in file.modalities)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rows = {
        "samples": str(info.num_samples),
        "modalities": modalities,
        "licence": info.licence,
        "source": ", ".join(f"`{source}`" for source in info.sources),
        "pairing": info.pairing,
        "honesty": info.honesty,
        "sha256": f"`{digest}`",
    }
    return f"\n## {path.name}\n\n" + "".join(f"- **{key}**: {value}\n" for key, value in rows.items())


def main() -> int:
    """Writes the files; 2 where MOEMM_SUITE names no folder."""
    suite = os.environ.get("MOEMM_SUITE")
    if not suite or not Path(suite).is_dir():
        print("set MOEMM_SUITE to the folder that holds " + ", ".join(f"{name}.h5" for name in NAMES), file=sys.stderr)
        return 2
    _TARGET.mkdir(parents=True, exist_ok=True)
    text = _HEADER
    for name in NAMES:
        target = _TARGET / f"{name}.h5"
        info = repack_file(Path(suite) / f"{name}.h5", target)
        text += section(target)
        print(f"{target.name}: {info.num_samples} samples, {info.num_bytes} bytes")
    (_TARGET / "LICENCES.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
