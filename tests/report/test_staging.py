import os
import tempfile
from pathlib import Path

import pytest

from rankdyna_trainer.report.staging import staging_folder, stale_staging


@pytest.mark.parametrize("absolute", [False, True], ids=["Python 3.11", "Python 3.12"])
@pytest.mark.parametrize("directory", ["out", "link", "other/../out"])
def test_a_folder_in_use_is_not_taken_for_one_that_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str, absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("other").mkdir()
    Path("link").symlink_to("out")
    made = tempfile.mkdtemp
    # What this one returns depends on the version, whatever the folder is.
    as_version = os.path.abspath if absolute else str
    monkeypatch.setattr("tempfile.mkdtemp", lambda **options: as_version(made(**options)))
    with staging_folder(Path(directory)) as staging:
        assert staging.is_absolute() or not absolute
        assert stale_staging(Path(directory)) == [] and staging.is_dir()
    assert not staging.exists()
