"""Which state of the source the figures belong to. Imports nothing that must be built first."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

VARIABLE = "ROM_COMMIT"  # the commit of a copy that left its .git behind


def commit() -> str:
    """The checkout's commit, with + if files differ from it; outside git $ROM_COMMIT, or `unknown`."""
    here = Path(__file__).parent
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(VARIABLE) or "unknown"
    return name.stdout.strip() + ("+" if dirty.stdout else "")
