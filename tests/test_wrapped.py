"""What has to be known of models that something else has changed; more in `tests/test_compile.py`."""

import torch

from hf_mbp import wrapped


def test_elements_of_a_parameter_that_zero_3_has_put_aside() -> None:
    parameter = torch.nn.Parameter(torch.empty(0))
    assert wrapped.num_elements(torch.nn.Parameter(torch.zeros(2, 3))) == 6
    parameter.ds_numel = 12
    assert wrapped.num_elements(parameter) == 12
