"""`rankdyna compress`: a model is factored at once, without training."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..baselines import fwsvd, svd, tfwsvd, whitened_svd
from .console import (
    AsJson,
    Checkpoint,
    Excluded,
    Output,
    Targets,
    TrustRemoteCode,
    Variant,
    check_kept,
    check_output,
    chosen,
    local_folder,
    processing_class,
)
from .convert import save_and_tell
from .loading import load_dense
from .text_rows import ROWS, MaxLength, TextColumns, is_classifier, read_examples


class Method(StrEnum):
    """The baselines."""

    svd = "svd"
    fwsvd = "fwsvd"
    tfwsvd = "tfwsvd"
    whitened = "whitened"


class Scope(StrEnum):
    """Where the groups of whitened compete."""

    local = "local"
    global_ = "global"


# Those that take data.
WITH_DATA: dict[Method, Callable[..., nn.Module]] = {
    Method.fwsvd: fwsvd,
    Method.tfwsvd: tfwsvd,
    Method.whitened: whitened_svd,
}

Methods = Annotated[
    Method,
    typer.Option(
        "--method",
        metavar="<name>",
        help="svd, fwsvd, tfwsvd or whitened. fwsvd and tfwsvd need one of the two files below, whitened the second.",
    ),
]
RankRatio = Annotated[
    float | None, typer.Option("--rank_ratio", help="The part of each layer's singular groups to keep.")
]
ParamRatio = Annotated[
    float | None, typer.Option("--param_ratio", help="Instead: the part of each layer's parameters to keep.")
]
Scopes = Annotated[
    Scope | None,
    typer.Option(
        "--rank_scope",
        help="Of whitened: local brings each layer to the same ratio; global chooses groups by the loss that is "
        "expected of each, for which classifiers need labels.",
        show_default="local",
    ),
]
FisherFile = Annotated[
    Path | None, typer.Option("--fisher_file", help="Fisher information, as the scripts' --fisher_file keeps it.")
]
TrainFile = Annotated[
    Path | None, typer.Option("--train_file", help="Or rows to learn from: .jsonl, .json, .csv or .txt.")
]
LabelColumn = Annotated[str, typer.Option("--label_column", help="The column of the class.")]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device_map",
        metavar="<name>",
        help="As from_pretrained takes it, such as cuda or auto; or disk, from which one layer is read at a time. "
        "svd, and whitened with the local scope, take layers that are offloaded.",
        show_default="cpu",
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option("--offload_folder", help="For offloaded weights whose files cannot be read as they are."),
]
MaxSamples = Annotated[
    int | None,
    typer.Option("--max_train_samples", min=1, help="Take the first rows only; whitened takes 512 by default."),
]


def compress(
    model: Checkpoint,
    method: Methods,
    output_dir: Output,
    rank_ratio: RankRatio = None,
    param_ratio: ParamRatio = None,
    rank_scope: Scopes = None,
    target_modules: Targets = None,
    exclude_modules: Excluded = None,
    fisher_file: FisherFile = None,
    train_file: TrainFile = None,
    text_column: TextColumns = ["text"],  # noqa: B006
    label_column: LabelColumn = "label",
    max_length: MaxLength = 128,
    max_train_samples: MaxSamples = None,
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    variant: Variant = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """
    Compress a fine-tuned model at once, without training.

    svd keeps the largest singular values of each layer. fwsvd and tfwsvd
    weight them by Fisher information, estimated on texts with a class (for
    sequence classification) or plain texts (for causal language models).
    whitened keeps what matters most to the layers' outputs on texts, which
    need no class unless --rank_scope is global; of a model that generates
    one text from another, name both columns. The result loads with
    from_pretrained, and may be trained on.

    Examples:

    \b
      rankdyna compress ./model --method svd --rank_ratio 0.3 -o ./small
      rankdyna compress big --method fwsvd --rank_ratio .3 --train_file a.csv -o s
    """
    modules: Any = {"target_modules": target_modules, "exclude_modules": exclude_modules}
    config = chosen(rank_ratio=rank_ratio, param_ratio=param_ratio, **modules)
    _check_for_method(method, rank_scope, fisher_file, train_file)
    placed: Any = {"device_map": _map_of(device_map), "offload_folder": offload_folder}
    check_output(output_dir)
    folder = local_folder(model, trust_remote_code)
    loaded = load_dense(folder, variant, trust_remote_code, **placed).eval()
    processing = processing_class(folder, trust_remote_code)
    check_kept(loaded, output_dir, processing)
    if method is Method.svd:
        svd(loaded, config)
    else:
        data: Any = _read_fisher(fisher_file) if fisher_file else None
        if train_file:
            unlabelled = method is Method.whitened and not (rank_scope is Scope.global_ and is_classifier(loaded))
            columns = (text_column, None if unlabelled else label_column)
            limit = max_train_samples or (ROWS if method is Method.whitened else None)
            data = read_examples(loaded, processing, train_file, *columns, max_length, limit)
        scope = {"rank_scope": rank_scope.value} if rank_scope else {}
        WITH_DATA[method](loaded, config, data, **scope)
    save_and_tell(model, output_dir, loaded, processing, as_json)


def _map_of(name: str | None) -> Any:
    """What `from_pretrained` takes for a name, of which it knows all but this one."""
    if name != "disk":
        return name
    if transformers.__version__.startswith("4."):
        raise typer.BadParameter("--device_map disk needs transformers 5; in Python, transformers 4 takes other maps.")
    return {"": "disk"}


def _check_for_method(
    method: Method, rank_scope: Scope | None, fisher_file: Path | None, train_file: Path | None
) -> None:
    if rank_scope is not None and method is not Method.whitened:
        raise typer.BadParameter(f"--method {method} brings each layer to the same ratio: drop --rank_scope.")
    given = [path for path in (fisher_file, train_file) if path is not None]
    if method is Method.svd:
        fits, wanted = not given, "neither --fisher_file nor --train_file"
    elif method is Method.whitened:
        fits, wanted = given == [train_file], "--train_file, and no --fisher_file: it needs no gradients"
    else:
        fits, wanted = len(given) == 1, "one of --fisher_file and --train_file"
    if not fits:
        raise typer.BadParameter(f"--method {method} takes {wanted}.")
    for path in given:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")


def _read_fisher(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--fisher_file {path} cannot be read: {error}.") from error
