"""What tests cannot show with the oldest PyTorch that the library works with."""

import pytest
import torch

TORCH_2_7 = torch.__version__.startswith("2.7.")

WITHOUT_VALUES = pytest.mark.skipif(
    TORCH_2_7, reason="torch 2.7 knows no autocast, and not all operations, of tensors without values"
)
ON_NUMBERED_CPU = pytest.mark.skipif(
    TORCH_2_7, reason="torch 2.7 reads no file onto cpu:0, where transformers wants the optimizer of several processes"
)
