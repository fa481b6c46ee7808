"""Run a script as its own program, and end the process as soon as it has returned.

gloo's threads ask for the interpreter's lock to let go of the tensors of a finished collective. One
that is late, and asks while the interpreter is shutting down, aborts the process (exit code -6),
whatever the script came to. So there is no shutdown: the process ends with what the script did.

Usage: start.py SCRIPT [ARGUMENT …]
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
