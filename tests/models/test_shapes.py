"""Operators whose result's form is known without asking torch: it is what torch would say."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pemn_surgery.models import shapes
from pemn_surgery.models.operators import look_up

TYPES = [torch.float32, torch.bfloat16, torch.float64]
sizes = st.integers(1, 4)
lists = st.lists(sizes, min_size=1, max_size=3)
types = st.sampled_from(TYPES)


def formed(func, *args, **kwargs):
    """What `Call` gives for the shapes of these arguments; checked to be the short way."""
    name = func.__name__
    on_meta = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
    shape = look_up(name).shape
    assert shape is not None
    assert shape(*on_meta, **kwargs) is not None
    return shapes.Call(func, name, tuple(on_meta), kwargs, 1).run()


def assert_form(func, *args, **kwargs):
    found, expected = formed(func, *args, **kwargs), func(*args, **kwargs)
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@given(lists, sizes, st.booleans(), types)
def test_linear(front, out, with_bias, dtype):
    bias = torch.zeros(out, dtype=dtype) if with_bias else None
    assert_form(
        F.linear, torch.zeros(*front, 3, dtype=dtype), torch.zeros(out, 3, dtype=dtype), bias
    )


@given(lists, types)
def test_layer_norm(front, dtype):
    x = torch.zeros(*front, 4, dtype=dtype)
    assert_form(F.layer_norm, x, (4,), torch.ones(4, dtype=dtype))
    found = formed(F.layer_norm, x.transpose(0, -2), (4,))
    assert found.is_contiguous()
    assert_form(F.rms_norm, x, (4,))


@given(lists, types)
def test_norms_of_channels(space, dtype):
    x = torch.zeros(2, 4, *space, dtype=dtype)
    assert_form(F.batch_norm, x, torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype))
    assert_form(F.group_norm, x, 2)
    assert_form(F.gelu, x)


@given(sizes, sizes, sizes, sizes, types)
def test_attention(heads, queries, keys, width, dtype):
    query = torch.zeros(2, heads, queries, 3, dtype=dtype)
    key = torch.zeros(2, heads, keys, 3, dtype=dtype)
    value = torch.zeros(2, heads, keys, width, dtype=dtype)
    assert_form(F.scaled_dot_product_attention, query, key, value)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (F.linear, (torch.zeros(2, 4), torch.zeros(3, 5))),
        (F.linear, (torch.zeros(2, 5), torch.zeros(3, 5, dtype=torch.float64))),
        (F.linear, (torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(4))),
        (
            F.scaled_dot_product_attention,
            (torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)),
        ),
    ],
)
def test_what_does_not_fit_is_left_to_torch(func, args):
    on_meta = tuple(arg.to("meta") for arg in args)
    shape = look_up(func.__name__).shape
    assert shape is not None
    assert shape(*on_meta) is None
    with pytest.raises(RuntimeError):
        func(*args)


def test_grouped_attention_is_left_to_torch():
    query, key = torch.zeros(2, 4, 5, 3, device="meta"), torch.zeros(2, 2, 5, 3, device="meta")
    function = F.scaled_dot_product_attention
    shape = look_up(function.__name__).shape
    assert shape is not None
    assert shape(query, key, key, enable_gqa=True) is None
    call = shapes.Call(function, function.__name__, (query, key, key), {"enable_gqa": True}, 1)
    assert call.run().shape == (2, 4, 5, 3)
