"""DDP and FSDP2 over NCCL, each with one process under torchrun, beside a process by itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import gpu_processes
from support.gpu_processes import BASES, WRAPPERS, Started
from support.on_gpu import groups_elsewhere
from transformers import AutoModelForCausalLM

SECONDS = 90


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_ends_as_one_that_is_not(
    started: dict[tuple[str, str], Started], tmp_path: Path, device: torch.device, wrapper: str, basis: str
) -> None:
    code, output = started[wrapper, basis].wait(SECONDS)
    assert code == 0, f"exit code: {code}\n{output[-5000:]}"
    folder = started[wrapper, basis].folder
    result = json.loads((folder / "trained.json").read_text())
    assert result["device"] == device.type
    expected = {"ddp": "DistributedDataParallel", "fsdp": "DTensor"}[wrapper]
    assert expected in result["classes"], f"trained as {result['classes']}"
    assert sum(result["ranks"]) == 77 and all(map(math.isfinite, result["losses"])), result
    tensors, loaded = (
        load_file(folder / "trained.safetensors"),
        AutoModelForCausalLM.from_pretrained(folder).state_dict(),
    )
    assert tensors.keys() == loaded.keys()
    different = [name for name, value in tensors.items() if not torch.equal(value, loaded[name])]
    assert not different, f"weights that are not loaded as they were: {different}"
    if basis == "weights":  # the other ones are made at another step where a wrapper holds the parameters
        gpu_processes.run({"output_dir": str(tmp_path / "alone")} | BASES[basis])
        alone = json.loads((tmp_path / "alone" / "trained.json").read_text())
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-3)
        assert groups_elsewhere(result["ranks"], alone["ranks"]) <= 2, f"{result['ranks']}, alone {alone['ranks']}"
