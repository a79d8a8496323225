from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

from clda_core._host.layout import is_dense, laid_out_like, overlaps, strided

LAYOUTS: Dict[str, Callable[[Tensor], Tensor]] = {
    "row-major": lambda x: x.clone(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    "expanded": lambda x: x[:1].clone().expand(x.shape),
    "a slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every other element": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


def values(layout: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randn(4, 3, 2, 5, generator=generator))


def in_memory_order(tensor: Tensor, like: Tensor) -> List[float]:
    """Return the elements of a tensor as they lie in the memory of a dense one."""
    order = sorted(range(like.dim()), key=lambda dim: -like.stride(dim))
    return [float(value) for value in tensor.permute(order).reshape(-1)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("like", ["row-major", "channels last", "permuted"])
def test_a_tensor_is_brought_to_the_memory_order_of_a_dense_one(layout: str, like: str) -> None:
    tensor, parameter = values(layout), values(like, 1)
    found = laid_out_like(tensor, parameter)
    assert torch.equal(found, tensor)
    assert found.stride() == parameter.stride()
    memory = found.as_strided((found.numel(),), (1,), found.storage_offset())
    assert memory.tolist() == in_memory_order(tensor, parameter)


def test_a_tensor_of_the_right_order_is_not_copied() -> None:
    tensor = values("channels last")
    assert laid_out_like(tensor, values("channels last", 1)) is tensor
    flat, parameter = torch.randn(4, 3, 1, 1), torch.randn(4, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    found = laid_out_like(flat, parameter)
    assert found.data_ptr() == flat.data_ptr()
    assert found.stride() == parameter.stride()


def test_dtype_and_values_stay_where_the_other_is_not_dense() -> None:
    tensor = values("channels last").double()
    found = laid_out_like(tensor, values("a slice"))
    assert found.dtype == torch.float64
    assert torch.equal(found, tensor)


def test_a_sparse_gradient_is_densified() -> None:
    embedding = nn.Embedding(6, 2, sparse=True)
    (gradient,) = torch.autograd.grad(embedding(torch.tensor([1, 4, 4])).sum(), [embedding.weight])
    assert gradient.is_sparse
    assert strided(gradient).tolist() == [[0, 0], [1, 1], [0, 0], [0, 0], [2, 2], [0, 0]]
    assert laid_out_like(gradient, embedding.weight).stride() == embedding.weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_dense(layout: str) -> None:
    assert is_dense(values(layout)) == (layout in ("row-major", "channels last", "permuted"))


def halves(cut: Callable[[Tensor, int], Tensor]) -> Tuple[Tensor, Tensor]:
    whole = torch.zeros(6, 4)
    return cut(whole, 0), cut(whole, 1)


WHOLE = torch.zeros(6, 4)
APART = {
    "of their own": lambda: (torch.zeros(6), torch.zeros(6)),
    "rows": lambda: halves(lambda whole, part: whole[3 * part : 3 * part + 3]),
    "columns": lambda: halves(lambda whole, part: whole[:, 2 * part : 2 * part + 2]),
    "every other column": lambda: halves(lambda whole, part: whole[:, part::2]),
    "empty": lambda: (WHOLE[:0], WHOLE),
}
TOGETHER = {
    "the same memory": lambda: (WHOLE, WHOLE.view(-1)),
    "transposed": lambda: (WHOLE, WHOLE.t()),
    "a slice of the other": lambda: (WHOLE, WHOLE[2:3]),
    "one row in common": lambda: (WHOLE[:3], WHOLE[2:]),
    "one column in common": lambda: (WHOLE[:, :3], WHOLE[:, 2:]),
    "other dtypes": lambda: (torch.view_as_real(COMPLEX), COMPLEX),
}
COMPLEX = torch.zeros(3, dtype=torch.complex64)


@pytest.mark.parametrize("case", APART)
def test_tensors_without_a_common_element_do_not_overlap(case: str) -> None:
    a, b = APART[case]()
    assert overlaps({"a": a, "b": b}) == []


@pytest.mark.parametrize("case", TOGETHER)
def test_tensors_with_a_common_element_overlap(case: str) -> None:
    a, b = TOGETHER[case]()
    for first, second in ((a, b), (b, a)):
        between: Any = {"before": torch.zeros(3), "a": first, "other": torch.zeros(8), "b": second}
        assert [set(pair) for pair in overlaps(between)] == [{"a", "b"}]


def test_a_tensor_that_overlaps_itself() -> None:
    assert overlaps({"a": torch.zeros(1).expand(3)}) == [("a", "a")]
    assert overlaps({"a": torch.arange(6.0).as_strided((4, 3), (1, 1))}) == [("a", "a")]
    assert overlaps({"a": torch.zeros(1, 4).expand(1, 4), "b": torch.zeros(4, 6)[:, ::3]}) == []
