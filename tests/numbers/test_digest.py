"""Digests of tensors: equal where everything about them is, and told apart by anything else."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pemn_surgery.errors import MetaTensorError
from pemn_surgery.numbers import digest
from pemn_surgery.numbers.digest import digest_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]


def of(**tensors):
    return digest_of(lambda: tensors.items())


def by_hand(**tensors):
    """SHA-256 of a line and the bytes of each tensor, in numpy's words."""
    content = b""
    for name, value in tensors.items():
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content += f"{name!r} {value.dtype} {list(value.shape)}\n".encode() + raw
    return hashlib.sha256(content).hexdigest()


@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**20),
)
def test_a_digest_is_of_name_type_shape_and_bytes(shape, dtype, other, seed):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randint(0, 2, shape, generator=generator).to(dtype)
    expected = by_hand(a=value)
    assert of(a=value) == expected == of(a=value.clone())
    assert of(b=value) != expected
    assert of(a=value.view(*shape, 1)) != expected
    assert (of(a=value.to(other)) == expected) == (dtype == other)
    if value.numel():
        changed = value.clone()
        changed.view(-1)[-1] = 1 - changed.view(-1)[-1].to(torch.int64)
        assert of(a=changed) != expected


def test_what_is_remembered_is_what_was_computed(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = {"a": torch.randn(300, 70, generator=generator), "b": torch.randn(5)}
    expected = by_hand(**values)
    assert of(**values) == expected

    def refuse(tensors):
        raise AssertionError("computed again")

    monkeypatch.setattr(digest, "_digest", refuse)
    assert of(**values) == expected
    values["a"].data[1, 2] += 1  # no version counts this
    with pytest.raises(AssertionError, match="computed again"):
        of(**values)


def test_no_more_is_remembered_than_some_models():
    for number in range(2 * digest._MOST_KNOWN):
        of(a=torch.tensor(number))
    assert len(digest._known) == digest._MOST_KNOWN


def test_tensors_without_values_are_refused():
    with pytest.raises(MetaTensorError, match=r"'a' is on the meta device .* Load"):
        of(b=torch.ones(2), a=torch.ones(2, device="meta"))
