"""Run a script as its own program, and end the process as soon as it has returned or failed.

gloo's threads ask for the interpreter's lock to let go of the tensors of a finished collective. One
that is late, and asks while the interpreter is shutting down, aborts the process (exit code -6),
whatever the script came to. So there is no shutdown: the process ends with the script's exit code.

Usage: start.py SCRIPT [ARGUMENT …]
"""

import os
import runpy
import sys
import traceback
from pathlib import Path


def exit_code(script: str) -> int:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code = exit_code(sys.argv[0])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
