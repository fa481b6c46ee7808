"""Plain values as readable JSON."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["readable_json"]


def readable_json(content: Any) -> str:
    """Return content as indented JSON, with each list of numbers on one line."""
    text = json.dumps(content, indent=2)
    numbers = r"\[\n\s+([^\[\]{}\"]+?)\n\s+\]"
    return re.sub(numbers, lambda found: "[" + re.sub(r"\n\s+", " ", found[1]) + "]", text)
