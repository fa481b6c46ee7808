"""The blocks of the documentation, and how those marked `run` are run.

A yaml block is written to the file that its first line names. Alone, with the path of a page, this
file runs that page's blocks in the folder it is called from.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from places import ROOT

from hfslim.cli import main


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    runs: bool
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)( run)?\n(.*?)^```$", text, flags=re.M | re.S):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, found[1], bool(found[2]), found[3])


def commands(text: str) -> Iterator[list[str]]:
    """Split a bash block into its commands, without comments, `> FILE` and `NAME=value`."""
    for line in re.sub(r"\\\n\s*|\s>\s\S+", " ", text).splitlines():
        for part in re.split(r"\s(?:&&|\|)\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def run_page(page: Path) -> None:
    """Run the blocks of a page that are marked, in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.runs:
            try:
                _run(block, names)
            except BaseException as error:
                raise AssertionError(f"{block}: {error!r}") from error


def _run(block: Block, names: dict[str, Any]) -> None:
    if block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)
        return
    if block.language == "yaml":
        Path(block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
        return
    for words in commands(block.text):
        assert words[0] == "hfslim", f"{words}: only hfslim's own commands are marked `run`"
        try:
            main(words[1:])
        except SystemExit as ended:
            assert ended.code == 0, words


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
