from typing import Any

import pytest
import torch
from checks import families


@pytest.fixture(scope="module")
def compressed_families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], bool]]:
    """For each family its row of the table, and whether one new process reloaded it with the same logits."""
    folders = {name: tmp_path_factory.mktemp(name) for name in families.FAMILIES}
    compressed = {name: families.compress(name, folder) for name, folder in folders.items()}
    reloaded = families.reload(list(folders.values()))
    return {
        name: (row, torch.equal(after, logits))
        for (name, (row, after)), logits in zip(compressed.items(), reloaded, strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.long
def test_every_family_is_compressed_and_reloaded(
    family: str, compressed_families: dict[str, tuple[dict[str, Any], bool]]
) -> None:
    row, equal = compressed_families[family]
    assert float(row["weights"]) < 1e-5 and float(row["activations"]) < 1e-5
    assert row["kept"] == -(-row["groups"] // 10)
    assert equal
