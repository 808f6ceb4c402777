"""What the progress bar of a `Trainer` shows of a compression."""

from tqdm import tqdm

from ..method.algorithm import RankDyna
from ..report.tables import kept_share
from .calling_trainer import calling_trainer


def show_kept(rankdyna: RankDyna) -> None:
    """Put `kept`, the part of the target layers' parameters that is left, behind the bar of the calling `Trainer`."""
    if (trainer := calling_trainer()) is None:
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(bar := getattr(callback, "training_bar", None), tqdm):
            bar.set_postfix(kept=kept_share(rankdyna), refresh=False)  # drawn when the bar moves on
