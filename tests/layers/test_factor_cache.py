import logging
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rankdyna_trainer import RankDynaConfig, SingularGroupLinear, inject_singular_groups
from rankdyna_trainer.layers.factor_cache import SIZE_VARIABLE, FactorizationCache, Factors
from rankdyna_trainer.layers.factorization import factorize

CPU = torch.device("cpu")
KEYS = ["a" * 64, "b" * 64, "c" * 64, "d" * 64]
FILE_BYTES = 100_000


def factors(groups: int = 99) -> Factors:
    """Of which the file is a little smaller than FILE_BYTES."""
    return torch.randn(groups, 100), torch.rand(groups), torch.randn(groups, 149)


def assert_equal(found: Factors | None, expected: Factors) -> None:
    assert found is not None
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def keys_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_gives_the_same_factors_without_computing_them(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(12, 8).to(dtype)
    first = factorize(weight, FactorizationCache(tmp_path / "a" / "cache"))
    monkeypatch.setattr(torch.linalg, "svd", None)
    second = factorize(weight, FactorizationCache(tmp_path / "a" / "cache"))
    assert_equal(second, first)
    assert {factor.dtype for factor in second} == {dtype}
    with pytest.raises(TypeError):
        factorize(weight + 1, FactorizationCache(tmp_path / "a" / "cache"))


def test_key_is_of_values_dtype_and_shape(tmp_path: Path) -> None:
    cache = FactorizationCache(tmp_path)
    weight = torch.zeros(4, 6)
    others = [weight.reshape(6, 4), weight.half(), torch.zeros(4, 3, dtype=torch.float64), weight - 0.0, -weight]
    assert cache.key(weight) == cache.key(weight.clone()) == cache.key(weight.t().contiguous().t())
    assert len({cache.key(other) for other in (weight, *others)}) == len(others)  # weight - 0.0 is weight
    assert re.fullmatch("[0-9a-f]{64}", cache.key(torch.zeros(0, 5)))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty", "other tensors", "one bit", "renamed"])
def test_a_file_that_cannot_be_used_is_replaced(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.randn(12, 8)
    expected = factorize(weight, FactorizationCache(tmp_path))
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-20])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "other tensors":
        save_file({"weight": torch.zeros(2)}, file)
    elif damage == "one bit":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "renamed":
        factorize(weight + 1, FactorizationCache(tmp_path / "other"))
        (other,) = (tmp_path / "other").iterdir()
        os.replace(other, file)
        (tmp_path / "other").rmdir()
    else:
        save_file(load_file(file), file)  # as another program would write it
    assert_equal(factorize(weight, FactorizationCache(tmp_path)), expected)
    assert "made anew" in caplog.text
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


def test_factors_are_no_view_of_the_file(tmp_path: Path) -> None:
    cache, expected = FactorizationCache(tmp_path), factors()
    cache.keep(KEYS[0], expected)
    found = cache.find(KEYS[0], CPU)
    (file,) = tmp_path.iterdir()
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert_equal(found, expected)


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        FactorizationCache(tmp_path).keep(KEYS[0], factors())
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, str(3 * FILE_BYTES / 1e9))
    users_own = [tmp_path / "model.safetensors", tmp_path / "notes.txt", tmp_path / f"{'e' * 63}.safetensors"]
    for path in users_own:
        path.write_bytes(bytes(FILE_BYTES))
        os.utime(path, (0, 0))
    (tmp_path / f"{'f' * 64}.safetensors").mkdir()
    for age, key in enumerate(KEYS[:3]):
        FactorizationCache(tmp_path).keep(key, factors())
        os.utime(tmp_path / f"{key}.safetensors", (1000 + age, 1000 + age))
    assert FactorizationCache(tmp_path).find(KEYS[0], CPU) is not None
    FactorizationCache(tmp_path).keep(KEYS[3], factors())
    assert {KEYS[0], KEYS[2], KEYS[3]} == {key for key in keys_in(tmp_path) if key in KEYS}
    assert all(path.stat().st_size == FILE_BYTES for path in users_own)
    assert (tmp_path / f"{'f' * 64}.safetensors").is_dir()


def test_of_a_model_larger_than_the_limit_a_part_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Were each layer to push out one that comes before it, the next run would find none at all."""
    monkeypatch.setenv(SIZE_VARIABLE, str(2 * FILE_BYTES / 1e9))
    for _ in range(2):
        cache = FactorizationCache(tmp_path)
        caplog.clear()
        for key in KEYS:
            if cache.find(key, CPU) is None:
                cache.keep(key, factors())
        assert keys_in(tmp_path) == KEYS[:2]
        assert len(caplog.records) == 1
        assert f"is full of what this run uses (raise {SIZE_VARIABLE}?)" in caplog.text


def test_limit_of_zero_keeps_nothing_and_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FactorizationCache(tmp_path).keep(KEYS[0], factors())
    monkeypatch.setenv(SIZE_VARIABLE, "0")
    FactorizationCache(tmp_path).keep(KEYS[1], factors())
    assert keys_in(tmp_path) == KEYS[:1]


@pytest.mark.parametrize("value", ["", "20 GB", "-1", "nan"])
def test_limit_that_is_none(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIZE_VARIABLE, value)
    with pytest.raises(ValueError, match=f"{SIZE_VARIABLE} must be a number of at least 0: got '{value}'"):
        FactorizationCache(tmp_path)


def test_what_a_killed_process_left_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    left, recent = (tmp_path / f"{KEYS[0]}.{digit * 32}.tmp" for digit in "01")
    users_own = tmp_path / "letter.tmp"
    for path in (left, recent, users_own):
        path.write_bytes(b"half")
    for path in (left, users_own):
        os.utime(path, (time.time() - 7200,) * 2)
    FactorizationCache(tmp_path).keep(KEYS[0], factors())
    assert set(tmp_path.iterdir()) == {recent, users_own, tmp_path / f"{KEYS[0]}.safetensors"}


def inject_two(cache: Path) -> nn.Sequential:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(60, 40)) for _ in range(2)))
    inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5, factorization_cache=str(cache)))
    return model


def test_folder_that_is_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        caplog.clear()
        inject_two(cache)
        assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
        assert f"The factorization cache {cache} cannot be used" in caplog.text
    assert (tmp_path / "file").read_text() == "mine"


def test_read_only_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = factors()
    FactorizationCache(tmp_path).keep(KEYS[0], kept)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for module, name in ((Path, "write_bytes"), (os, "utime"), (os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(module, name, refuse)
    cache = FactorizationCache(tmp_path)
    assert_equal(cache.find(KEYS[0], CPU), kept)
    for key in KEYS[1:]:
        cache.keep(key, factors())
    assert len(caplog.records) == 1 and "cannot be written ([Errno 13] Permission denied)" in caplog.text
    assert keys_in(tmp_path) == KEYS[:1]


def test_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The kernel lets this process write no file of that size: the write stops in the middle."""
    resource = pytest.importorskip("resource", reason="only Unix can limit the size of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        model = inject_two(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caplog.records) == 1 and "cannot be written ([Errno 27] File too large)" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert all(isinstance(block[0], SingularGroupLinear) for block in model)


def test_folder_that_vanishes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FactorizationCache(tmp_path / "cache")
    (tmp_path / "cache").rmdir()
    assert cache.find(KEYS[0], CPU) is None
    cache.keep(KEYS[0], factors())
    assert len(caplog.records) == 1 and "cannot be written" in caplog.text


def test_files_that_another_process_deletes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS[:2]:
        FactorizationCache(tmp_path).keep(key, factors())
    monkeypatch.setenv(SIZE_VARIABLE, str(2 * FILE_BYTES / 1e9))
    listing = list(tmp_path.iterdir())
    (tmp_path / f"{KEYS[0]}.safetensors").unlink()
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listing))
    cache = FactorizationCache(tmp_path)
    assert cache.find(KEYS[0], CPU) is None
    cache.keep(KEYS[2], factors())
    assert cache.find(KEYS[2], CPU) is not None and cache.find(KEYS[1], CPU) is not None


PROCESS = """
import sys, torch
from safetensors.torch import save_file
from torch import nn
from rankdyna_trainer import RankDynaConfig, inject_singular_groups

torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(96, 64)) for _ in range(12)))
print("ready", flush=True)
sys.stdin.readline()
inject_singular_groups(model, RankDynaConfig(rank_ratio=0.5, factorization_cache=sys.argv[1]))
save_file(model.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["20", pytest.param("0.0002", marks=pytest.mark.long)])
def test_two_processes_at_once(limit: str, tmp_path: Path) -> None:
    """Also while the limit, of 4 files, makes each delete what the other may be about to read."""
    outputs = [tmp_path / f"{i}.safetensors" for i in range(2)]
    environment = {**os.environ, SIZE_VARIABLE: limit, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, tmp_path / "cache", output],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"LOCAL_RANK": str(rank)},
        )
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    one, other = (load_file(output) for output in outputs)
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    kept = [path.name for path in (tmp_path / "cache").iterdir()]
    assert kept and all(re.fullmatch(r"[0-9a-f]{64}\.safetensors", name) for name in kept)
    if limit == "20":
        # torchao, where it is installed, tells of its own libraries, and of torch's, whenever it is imported.
        lines = [line for text in told for line in text.splitlines()]
        assert len(kept) == 12 and not [line for line in lines if "torchao" not in line and "_pytree.py" not in line]
    else:
        assert "cannot be" not in "".join(told)
