"""A config in a file of its own, in a folder or on the Hub."""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import PushToHubMixin

from .options import shown

CONFIG_NAME = "rankdyna_config.json"


class SavedConfig(PushToHubMixin):
    """What a dataclass needs to be saved, pushed and read again."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(cast(Any, self))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """
        Write `rankdyna_config.json` into a folder, which is made if it is missing.

        Raises:
            NotADirectoryError: `save_directory` is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise NotADirectoryError(f"{directory} is a file: give the folder to save the RankDynaConfig in.")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_kwargs: Any) -> Self:
        """
        Read `rankdyna_config.json` from a folder or a Hub repository.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository.
            hub_kwargs: `revision`, `token`, `cache_dir` and the like, for [`~huggingface_hub.hf_hub_download`].

        Raises:
            TypeError: `pretrained_model_name_or_path` is neither a `str` nor a path.
            ValueError: the file is missing or refused, it is no such config, or its values are out of range.
        """
        source = pretrained_model_name_or_path
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"Give a folder or the name of a Hub repository as str: got {shown(source)}.")
        try:
            path = Path(source) / CONFIG_NAME
            if not path.is_file():
                path = Path(hf_hub_download(str(source), CONFIG_NAME, **hub_kwargs))
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise ValueError(f"{CONFIG_NAME} cannot be read from {source}: {error}") from error
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
        known = {entry.name for entry in fields(cast(Any, cls))}
        if not isinstance(values, dict) or not values.keys() <= known:
            unknown = shown(sorted(values.keys() - known)) if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path} is no RankDynaConfig: it has {unknown}, known are {sorted(known)}.")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is no valid RankDynaConfig: {error}") from error
