"""Options from a file, and the file of those that a run had."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

# In the output folder: `--config` takes it.
SETTINGS = "settings.yaml"
# Of which one excludes the other.
RATIOS = ("rank_ratio", "param_ratio")
# What nobody else should read.
SECRETS = ("hub_token", "push_to_hub_token")


def with_file(args: Sequence[str] | None, parser: ArgumentParser) -> list[str]:
    """
    A command line in which `--config FILE` is replaced by the options of the file, which come first: those that are
    given on the command line as well win.

    Args:
        args: the command line; by default that of the process.
        parser: whose options a file may have. It reports what is wrong, and ends the process.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    given, words = finder.parse_known_args(args if args is not None else sys.argv[1:])
    if given.config is None:
        return words
    settings = _read(given.config, parser)
    named = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    if named & {*RATIOS}:
        settings = {name: value for name, value in settings.items() if name not in RATIOS}
    return [word for name, value in settings.items() for word in _words(name, value)] + words


def effective(parser: Any, args: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """
    The options of a run that are not those of a run without options: given, of a file, of a preset, or of the script.

    Args:
        parser: with the defaults of the script and the preset.
        args: the command line, from [`with_file`].
        defaults: of the dataclasses alone, by name.
    """
    chosen = {name: getattr(value, "value", value) for name, value in vars(parser.parse_known_args(args)[0]).items()}
    # The parser makes a list of one size as well.
    ratios = {name: chosen.get(name) for name in RATIOS}
    chosen |= {name: several[0] for name, several in ratios.items() if isinstance(several, list) and len(several) == 1}
    return {
        name: value for name, value in chosen.items() if value != defaults.get(name) and name not in (*SECRETS, "tiny")
    }


def _read(path: str, parser: ArgumentParser) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {' '.join(str(error).split())}")
    if not isinstance(settings, dict):
        parser.error(f"--config {path} must be a mapping of options to values, such as `rank_ratio: 0.2`")
    known = {action.dest for action in parser._actions} - {"help"}
    if unknown := [str(name) for name in settings if name not in known]:
        parser.error(f"--config {path} has options that there are not: {', '.join(unknown)}")
    return {name: value for name, value in settings.items() if value is not None}


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]
