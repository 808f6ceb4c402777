import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.models import load_model
from tasks import tiny_tasks


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is of Linux")
def test_no_page_of_the_file_counts_as_memory_of_the_model(tmp_path: Path) -> None:
    model: Any = tiny_tasks.model("llama")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), 0)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert loaded.lm_head.weight.equal(model.lm_head.weight)
