"""What is logged while a run shows its progress."""

import logging
from typing import Any

from tqdm import tqdm


class AboveProgressBars(logging.LoggerAdapter[logging.Logger]):
    """A logger whose lines begin at the left, above a progress bar, which goes on below."""

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        """Log a line, as the logger itself does."""
        if self.isEnabledFor(level):
            with tqdm.external_write_mode():
                super().log(level, msg, *args, **{"stacklevel": 2} | options)
