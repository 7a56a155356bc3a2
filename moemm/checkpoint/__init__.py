"""Checkpoints that are complete or do not exist."""

from moemm.checkpoint.commit import Keep, Save, commit
from moemm.checkpoint.manifest import Manifest, read_manifest, verify
from moemm.checkpoint.resume import Found, check_compatible, find_newest, newest_complete

__all__ = [
    "Found",
    "Keep",
    "Manifest",
    "Save",
    "check_compatible",
    "commit",
    "find_newest",
    "newest_complete",
    "read_manifest",
    "verify",
]
