"""The hash that folders and files are found again by."""

from __future__ import annotations

import hashlib
import json


def hash_of(*parts: object) -> str:
    """SHA-256 of what JSON can hold, in hex digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
