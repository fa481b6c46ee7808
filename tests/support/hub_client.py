"""Push folders to the Hub that the environment names; prints a line of JSON for each.

Arguments: a JSON list of the keyword arguments of `push`.
"""

import json
import sys
import time

from hfslim.hub.push import PushError, push

if __name__ == "__main__":
    time.sleep = lambda seconds: None  # Neither hfslim nor the Hub client waits before it retries.
    for job in json.loads(sys.argv[1]):
        try:
            print(json.dumps({"commit": push(**job).oid}), flush=True)
        except PushError as error:
            print(json.dumps({"error": str(error)}), flush=True)
