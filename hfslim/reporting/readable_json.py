"""Plain values as JSON that people can read."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["lined"]


def lined(content: Any) -> str:
    """Return content as JSON that people can read: indented, but lists of numbers on one line."""
    text = json.dumps(content, indent=2)
    numbers = r"\[\n\s+([^\[\]{}\"]+?)\n\s+\]"
    return re.sub(numbers, lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)
