from collections import OrderedDict
from typing import Any, Dict

import numpy as np
import torch

from clda_core._host.plain import copied


def test_a_copied_state_has_nothing_in_common_with_the_original() -> None:
    """What a guard takes back would otherwise have been changed with the original."""
    array, ordered, tensors = np.ones(2), OrderedDict(a=[1]), [torch.ones(2), torch.ones(2)]
    state: Dict[str, Any] = {"tensor": tensors[0], "list": [(tensors[1], array, 0.5)], "ordered": ordered, "no": None}
    kept = copied(state)
    for tensor in tensors:
        tensor.zero_()
    array[:] = 0
    ordered["a"].append(2)
    state["list"].append("more")
    assert list(kept) == list(state)
    assert kept["tensor"].tolist() == [1, 1]
    ((tensor, copy_of_array, number),) = kept["list"]
    assert type(kept["list"][0]) is tuple
    assert (tensor.tolist(), copy_of_array.tolist(), number) == ([1, 1], [1, 1], 0.5)
    assert kept["ordered"] == OrderedDict(a=[1])
    assert kept["no"] is None
