import pytest
from checks import weight_decay


@pytest.mark.parametrize("name", weight_decay.OPTIMIZERS)
def test_all_forms_keep_the_same(name: str) -> None:
    make = weight_decay.OPTIMIZERS[name]
    left = [weight_decay.remaining_norms(model, make, 3)[3] for model in weight_decay.forms().values()]
    assert left[0] < 0.99
    assert left == pytest.approx([left[0]] * 3, rel=1e-5)
