"""Which positions a mask leaves out."""

import pytest
import torch

from clda_core import CldaError
from clda_core.distillation.masks import nearest, valid_mask


@pytest.mark.parametrize("ignore_index", [255, -100, 0, -1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_a_label_map_leaves_out_the_ignore_index_and_what_is_negative(dtype, ignore_index):
    labels = torch.tensor([0, 1, 18, 127, -1, -100, 156, 255, 256]).to(dtype)
    expected = [label != ignore_index and label >= 0 for label in labels.tolist()]
    assert valid_mask(labels, ignore_index).tolist() == expected


def test_bool_and_float_masks_are_weights_whatever_the_ignore_index():
    for mask in (None, torch.tensor([True, False]), torch.tensor([255.0, 0.5])):
        assert valid_mask(mask, 255) is mask
        assert valid_mask(mask, None) is mask


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64], ids=str)
def test_an_integer_mask_alone_is_ambiguous(dtype):
    with pytest.raises(CldaError, match=r"integer mask is ambiguous.*mask.bool\(\).*ignore_index="):
        valid_mask(torch.ones(2, dtype=dtype), None)


@pytest.mark.parametrize("ignore_index", [1.5, "255", True])
def test_an_ignore_index_is_an_integer(ignore_index):
    with pytest.raises(CldaError, match="ignore_index is not an integer"):
        valid_mask(torch.ones(2, dtype=torch.long), ignore_index)


@pytest.mark.parametrize(("size", "expected"), [(2, [1, 4]), (3, [1, 3, 5]), (6, [0, 1, 2, 3, 4, 5]), (1, [3])])
def test_nearest_takes_the_centres(size, expected):
    assert nearest(torch.arange(6).reshape(1, 6), (size,)).tolist() == [expected]
