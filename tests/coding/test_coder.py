"""The stream: constriction and the coder in Python make the same bytes, and nothing else ends."""

import subprocess
import sys
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pemn_surgery.coding import coder, table

PIECES = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from([32768, 50000, 65000, 65472]), st.floats(0, 1)),
    max_size=5,
)


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(coder, "library", lambda: None)


def drawn(pieces, seed):
    generator = np.random.default_rng(seed)
    for count, density, share in pieces:
        flags = generator.random(count) < share
        yield np.packbits(flags, bitorder="little"), count, density


def written(pieces):
    writer = coder.Writer()
    for piece in pieces:
        writer.write(*piece)
    return writer.stream()


def assert_read(stream, pieces):
    reader = coder.Reader(stream)
    for packed, count, density in pieces:
        np.testing.assert_array_equal(reader.read(count, density), packed)
    reader.end()


@given(PIECES, st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_both_coders_make_the_same_bytes(pieces, seed):
    pieces = [*drawn(pieces, seed)]
    stream = written(pieces)
    assert_read(stream, pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder, "library", lambda: None)
        assert written(pieces) == stream
        assert_read(stream, pieces)


def test_long_streams_are_the_same_too(without_library):
    pieces = [*drawn([(2**18, 60000, 0.9), (1001, 40000, 0.6), (2**17 + 3, 65472, 1)], 0)]
    stream = written(pieces)
    assert_read(stream, pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder, "library", _library)
        assert written(pieces) == stream
        assert_read(stream, pieces)


def _library():
    return pytest.importorskip("constriction").stream


@pytest.mark.parametrize("density", [32768, 50000, 65472])
@pytest.mark.parametrize("weights", [1, 8])
def test_constriction_has_exactly_our_frequencies(density, weights):
    """A symbol's is how many states of one word lead to it: at its first and its last."""
    stack, frequencies = _library().stack.AnsCoder, table.frequencies(density, weights)
    model = coder._model(density, weights, _library())
    below = [0, *accumulate(frequencies)]
    for symbol, (first, after) in enumerate(pairwise(below)):
        for state in (first, after - 1):
            # A state of one word and this remainder; the upper byte is not 0, as of a word it is.
            word = np.array([1 << 24 | state], np.uint32)
            assert stack(word).decode(model) == symbol


def test_the_stream_of_nothing_is_empty():
    assert written([]) == b""
    assert_read(b"", [])
    assert written([(np.empty(0, np.uint8), 0, 40000)]) == b""


ONES = np.full(4, 255, np.uint8)


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize(
    ("stream", "count", "said"),
    [
        (b"", 1, "ends before its weights"),
        (b"", 8, "ends before its weights"),
        (written([(ONES, 32, 40000)]), 40, "ends before its weights"),
        (written([(ONES, 32, 40000)]), 33, "ends before its weights"),
        (written([(ONES, 32, 40000)]), 24, "does not end with its weights"),
        (written([(ONES, 32, 40000)]), 31, "does not end|ends before"),
        (written([(ONES, 32, 40000)])[:-1], 32, "does not end|ends before"),
        (written([(ONES, 32, 40000)]) + b"\1", 32, "does not end|ends before"),
        (written([(ONES, 32, 40000)]) + b"\0", 32, "ends in a byte 0"),
        (written([(ONES, 32, 40001)]), 32, "does not end|ends before"),
        (bytes([1, 0, 0, 0, 1]), 10**5, "ends before its weights"),
    ],
)
def test_streams_that_do_not_end_clean_are_refused(stream, count, said, is_plain, monkeypatch):
    if is_plain:
        monkeypatch.setattr(coder, "library", lambda: None)

    def read():
        reader = coder.Reader(stream)
        reader.read(count, 40000)
        reader.end()

    with pytest.raises(coder.CodeError, match=said):
        read()


@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from([32768, 50000, 65472]))
@settings(deadline=None)
def test_both_coders_read_any_bytes_alike(stream, count, density):
    found = []
    for library in (coder.library, lambda: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coder, "library", library)
            try:
                reader = coder.Reader(stream)
                found.append(reader.read(count, density).tolist())
                reader.end()
            except coder.CodeError as error:
                found.append(str(error))
    assert found[: len(found) // 2] == found[len(found) // 2 :]


def test_without_the_library_the_other_coder_serves():
    text = (
        "import sys; sys.modules['constriction'] = None\n"
        "from pemn_surgery.coding import coder\n"
        "assert type(coder._stack()) is coder.PlainStack\n"
    )
    subprocess.run([sys.executable, "-c", text], check=True)


def test_the_library_is_imported_when_it_is_needed():
    text = "import sys, pemn_surgery.coding.codec\nassert 'constriction' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", text], check=True)
