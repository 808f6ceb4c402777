"""The check of how far the outputs of factored layers are from the dense ones, on rows that nobody factored by."""

import torch
from checks.output_errors import errors, random_layer

from rankdyna_trainer import LowRankLinear, RankDynaConfig
from rankdyna_trainer.baselines import svd


def test_the_error_is_that_of_the_outputs_and_the_least_in_the_metric_of_the_inputs() -> None:
    model, batches = random_layer(3)
    (row,) = errors(model, batches, 0.2).to_dict("records")
    layer = model.get_submodule("blocks.0.0")
    unseen = torch.cat([batch["x"] for batch in batches[len(batches) // 2 :]])
    expected = unseen @ layer.weight.T
    svd(model, RankDynaConfig(param_ratio=0.2))
    low_rank = model.get_submodule("blocks.0.0")
    assert isinstance(low_rank, LowRankLinear)
    missing = expected - unseen @ low_rank.to_dense_weight().T
    assert abs(row["SVD"] - float(missing.square().sum() / expected.square().sum())) < 1e-4
    assert row["whitened"] < 0.8 * min(row["SVD"], row["FWSVD"])
