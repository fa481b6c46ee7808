"""Files and folders appear as a whole or not at all."""

from pathlib import Path

import pytest

from hfslim.reporting.staged_writes import flush, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_whole(path, "old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        write_whole(path, "half")
    assert path.read_text() == "old" and names(tmp_path) == ["report.json"]
    write_whole(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["report.json"]


def test_a_folder_is_hidden_until_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "cache"
    with whole_folder(target) as staged:
        (staged / "keys").write_text("1")
        assert not target.exists() and staged.name.startswith(".")
    assert names(target) == ["keys"] and names(target.parent) == ["cache"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out") as staged:
        (staged / "model").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []


def test_a_folder_that_was_filled_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "cache"
    with pytest.raises(OSError, match="not empty"), whole_folder(target) as staged:
        (staged / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert names(tmp_path) == ["cache"] and names(target) == ["theirs"]


def test_flushing_reaches_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    flush(tmp_path / "a")
    assert len(flushed) == 3
