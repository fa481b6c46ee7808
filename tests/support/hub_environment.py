"""The environment of a process that talks to the Hub server of a test."""

import os
from pathlib import Path

from hub_server import Hub


def environment(hub: Hub, home: Path, token: str | None = "hf_lab") -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE", "HF_TOKEN"}
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    # The client's 10 seconds may pass on a machine that is busy.
    ours |= {"HF_HUB_ETAG_TIMEOUT": "120", "HF_HUB_DOWNLOAD_TIMEOUT": "120"}
    ours |= {"HF_TOKEN": token} if token else {}
    return {key: value for key, value in os.environ.items() if key not in offline} | ours
