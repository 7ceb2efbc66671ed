"""A seed gives the same numbers on every machine, device, dtype and library version.

Integers come from numpy's Philox-4x64-10 bit generator (Salmon et al., *Parallel random numbers:
as easy as 1, 2, 3*, SC 2011), whose integer stream numpy promises never to change. Everything
after the integers uses only operations that IEEE 754 defines to the last bit (+, -, *, / and
square root), so no C library's ``log`` or ``cos`` can make two machines differ.

A *stream* is a name ("bank", "scores/layer1.0.conv1.weight"): each name has its own independent
sequence, so adding a layer never shifts the numbers of another one.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

KEY_BYTES = 16

# Values per pass: the temporaries of one pass stay in the processor's cache.
_CHUNK = 1 << 16


def integers(seed: int, stream: str, count: int) -> NDArray[np.uint32]:
    """Return the first numbers of a stream.

    Returns:
        Array of shape (count,): each 64-bit Philox word gives its low half, then its high half.
    """
    generator = np.random.Philox(key=np.frombuffer(key_of(seed, stream), dtype="<u8"))
    return _words(generator, count)


def uniform(seed: int, stream: str, count: int, bound: float) -> NDArray[np.float32]:
    """Return numbers uniform in [-bound, bound), on a grid of 2**24 equal steps.

    Args:
        seed: Any integer.
        stream: Name of the sequence.
        count: How many numbers.
        bound: Half the width of the interval.

    Returns:
        Float array of shape (count,).
    """
    width = np.float32(bound)

    def transform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
        centred = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
        return centred * width

    return _by_chunks(seed, stream, count, transform)


def normal(seed: int, stream: str, count: int, std: float) -> NDArray[np.float32]:
    """Return numbers from the normal distribution with mean 0.

    The inverse of the cumulative distribution at the midpoints of 2**32 equal steps
    (Wichura, *Algorithm AS 241*, Applied Statistics 37, 1988), rounded to float32 once.

    Args:
        seed: Any integer.
        stream: Name of the sequence.
        count: How many numbers.
        std: Standard deviation.

    Returns:
        Float array of shape (count,).
    """

    def transform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
        probability = (words.astype(np.float64) + 0.5) * 2.0**-32
        return (_normal_quantile(probability) * std).astype(np.float32)

    return _by_chunks(seed, stream, count, transform)


def signs(seed: int, stream: str, count: int, magnitude: float) -> NDArray[np.float32]:
    """Return ``+magnitude`` or ``-magnitude`` with equal probability.

    Args:
        seed: Any integer.
        stream: Name of the sequence.
        count: How many numbers.
        magnitude: The absolute value of every number.

    Returns:
        Float array of shape (count,).
    """
    size = np.float32(magnitude)

    def transform(words: NDArray[np.uint32]) -> NDArray[np.float32]:
        return np.where(words >> np.uint32(31), size, -size)

    return _by_chunks(seed, stream, count, transform)


def permutation(seed: int, stream: str, count: int) -> NDArray[np.int64]:
    """Return an order of ``count`` things: the one that sorts the stream's numbers.

    Returns:
        Array of shape (count,) holding 0 ... count - 1 once each; equal numbers keep their order.
    """
    return np.argsort(integers(seed, stream, count), kind="stable")


def key_of(seed: int, stream: str) -> bytes:
    """Return the 16 bytes that decide a stream's numbers: they stand for seed and name."""
    return hashlib.sha256(f"pemn:{seed}:{stream}".encode()).digest()[:KEY_BYTES]


def pieces(key: bytes, count: int) -> Iterator[NDArray[np.uint32]]:
    """Yield the first numbers of a stream, as `integers` returns them, piece by piece.

    Args:
        key: What `key_of` returned.
        count: How many numbers.
    """
    generator = np.random.Philox(key=np.frombuffer(key, dtype="<u8"))
    for start in range(0, count, _CHUNK):
        yield _words(generator, min(_CHUNK, count - start))


def _words(generator: np.random.Philox, count: int) -> NDArray[np.uint32]:
    pairs = generator.random_raw((count + 1) // 2).astype("<u8", copy=False)
    return pairs.view("<u4").astype(np.uint32, copy=False)[:count]


def _by_chunks(
    seed: int,
    stream: str,
    count: int,
    transform: Callable[[NDArray[np.uint32]], NDArray[np.float32]],
) -> NDArray[np.float32]:
    values = np.empty(count, dtype=np.float32)
    for place, words in enumerate(pieces(key_of(seed, stream), count)):
        values[place * _CHUNK : (place + 1) * _CHUNK] = transform(words)
    return values


def _polynomial(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    """Return c0 + c1 x + c2 x^2 + ... by Horner's rule, one rounding an operation."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value *= x
        value += coefficient
    return value


def _log(x: Floats) -> Floats:
    """Return the natural logarithm of positive numbers with IEEE-exact operations only.

    x = 2**e (1 + f); log(1 + f) = 2s + s R(s^2) with s = f / (2 + f), as in fdlibm's ``e_log.c``.
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < _SQRT_HALF
    mantissa = np.where(small, mantissa * 2.0, mantissa)
    exponent = exponent - small
    f = mantissa - 1.0
    s = f / (f + 2.0)
    square = s * s
    return exponent * _LN_2 + (2.0 * s + s * (square * _polynomial(square, _LOG_SERIES)))


def _normal_quantile(probability: Floats) -> Floats:
    """Return x with Phi(x) = probability (Wichura 1988), for 1e-11 < probability < 1 - 1e-11."""
    q = probability - 0.5
    r = 0.180625 - q * q
    value = q * _polynomial(r, _CENTRE_TOP) / _polynomial(r, _CENTRE_BOTTOM)
    tail = np.flatnonzero(np.abs(q) > 0.425)
    q_tail = q[tail]
    outer = np.sqrt(-_log(np.minimum(probability[tail], 1.0 - probability[tail]))) - 1.6
    quantile = _polynomial(outer, _TAIL_TOP) / _polynomial(outer, _TAIL_BOTTOM)
    value[tail] = np.where(q_tail < 0, -quantile, quantile)
    return value


_SQRT_HALF = 0.70710678118654757
_LN_2 = 0.69314718055994529
_LOG_SERIES = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
_CENTRE_TOP = (
    3.3871328727963666080e0,
    1.3314166789178437745e2,
    1.9715909503065514427e3,
    1.3731693765509461125e4,
    4.5921953931549871457e4,
    6.7265770927008700853e4,
    3.3430575583588128105e4,
    2.5090809287301226727e3,
)
_CENTRE_BOTTOM = (
    1.0,
    4.2313330701600911252e1,
    6.8718700749205790830e2,
    5.3941960214247511077e3,
    2.1213794301586595867e4,
    3.9307895800092710610e4,
    2.8729085735721942674e4,
    5.2264952788528545610e3,
)
_TAIL_TOP = (
    1.42343711074968357734e0,
    4.63033784615654529590e0,
    5.76949722146069140550e0,
    3.64784832476320460504e0,
    1.27045825245236838258e0,
    2.41780725177450611770e-1,
    2.27238449892691845833e-2,
    7.74545014278341407640e-4,
)
_TAIL_BOTTOM = (
    1.0,
    2.05319162663775882187e0,
    1.67638483018380384940e0,
    6.89767334985100004550e-1,
    1.48103976427480074590e-1,
    1.51986665636164571966e-2,
    5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)
