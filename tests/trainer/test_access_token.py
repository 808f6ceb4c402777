import copy
import pickle
from pathlib import Path

import torch
from transformers import TrainingArguments

from rankdyna_trainer.trainer.access_token import UnsavedToken, protect_token


def test_only_pickle_loses_it() -> None:
    token = UnsavedToken("hf_secret")
    assert f"Bearer {token}" == "Bearer hf_secret"
    assert copy.copy(token) == copy.deepcopy({"token": token})["token"] == "hf_secret"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert b"secret" not in pickle.dumps(token, protocol)
        assert pickle.loads(pickle.dumps(token, protocol)) is None


def test_training_arguments(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), hub_token="hf_secret", hub_model_id="user/model", report_to="none")
    protect_token(args)
    torch.save(args, tmp_path / "training_args.bin")
    assert args.hub_token == "hf_secret"
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert loaded.hub_token is None and loaded.hub_model_id == "user/model"


def test_no_token_stays_none(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to="none")
    protect_token(args)
    assert args.hub_token is None
