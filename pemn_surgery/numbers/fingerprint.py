"""Identifies the base that masks belong to, so that they never load onto another one.

The base is the frozen numbers under the masks. Where a seed makes them, the fingerprint hashes how
(bank, seed, prototypes) and the targets; otherwise it hashes the values. A checkpoint that was
trained in float32 is often served in bfloat16 or float16, so the values are hashed once per type
that they can be rounded to, and two fingerprints agree if they agree wherever both are known.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pemn_surgery.errors import FingerprintError, PemnWarning
from pemn_surgery.numbers.bank import BankSpec, Layout, Shape
from pemn_surgery.numbers.digest import bytes_of, sums_of

Fingerprint = dict[str, str]

_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT_BYTES = 4

# Fingerprints of this process by the sums of the values: a second adapter of the same base, whose
# values are as they were, need not wait for SHA-256 of three types.
_known: dict[str, Fingerprint] = {}
_MOST_KNOWN = 64


def make_fingerprint(
    spec: BankSpec,
    layout: Layout | None,
    targets: Sequence[tuple[str, Shape]],
    values: Callable[[], Iterable[Tensor]],
    *,
    as_drawn: bool = True,
) -> Fingerprint:
    """Return the fingerprint of a base.

    Args:
        spec: What decides the frozen numbers.
        layout: The bank's prototypes, None for ``bank="own"``.
        targets: Name and shape of every masked weight.
        values: Gives the frozen numbers themselves, one weight at a time; called only where no
            seed makes them.
        as_drawn: Whether numbers that a seed made are as it made them.

    Returns:
        16 hexadecimal digits by dtype; empty if values are on the meta device.
    """
    recipe = {
        "layout": layout.as_dict() if layout else {"spec": spec.as_dict()},
        "targets": [[name, list(shape)] for name, shape in sorted(targets)],
    }
    start = json.dumps(recipe, sort_keys=True).encode()
    if spec.drawn and as_drawn:
        return _digests(start, ())
    key = sums_of(start, values())
    if key is None:
        return {}
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.pop(next(iter(_known)))
        _known[key] = _digests(start, values())
    return dict(_known[key])


def _digests(start: bytes, values: Iterable[Tensor]) -> Fingerprint:
    digests = {name: hashlib.sha256(start) for name in _TYPES}
    for value in values:
        digests = {n: digest for n, digest in digests.items() if _rounds_to(value.dtype, _TYPES[n])}
        for name, digest in digests.items():
            digest.update(bytes_of(value.to(_TYPES[name])))
    return {name: digest.hexdigest()[:16] for name, digest in digests.items()}


def check_fingerprint(expected: Mapping[str, str], actual: Mapping[str, str], base: str) -> None:
    """Refuse masks of another base.

    Raises:
        FingerprintError: If the two differ where both are known.
    """
    common = [name for name in _TYPES if name in expected and name in actual]
    different = [name for name in common if expected[name] != actual[name]]
    if different:
        message = (
            f"The masks were trained on a base with fingerprint {_shown(expected, different[0])}, "
            f"but {base} has {_shown(actual, different[0])}: its frozen weights differ. Load the "
            "checkpoint (or the seed) that the adapter was trained on. Nothing was changed."
        )
        raise FingerprintError(message)
    if expected and actual and not common:
        warnings.warn(
            f"The base could not be checked: the masks know it in {', '.join(expected)}, it is "
            f"loaded in {', '.join(actual)}.",
            PemnWarning,
            stacklevel=2,
        )


def agree(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Tell whether two fingerprints are known in one type at least, and equal in all such types."""
    common = first.keys() & second.keys()
    return bool(common) and all(first[name] == second[name] for name in common)


def _shown(fingerprint: Mapping[str, str], name: str) -> str:
    """Return the digits of values in one type, and in which type their base is held."""
    if len(fingerprint) == len(_TYPES) and len(set(fingerprint.values())) == 1:
        return f"{fingerprint[name]} (drawn from a seed)"  # the same in every type
    held = next(held for held in _TYPES if held in fingerprint)  # the widest has all
    return f"{fingerprint[name]} ({held}{f', rounded to {name}' * (held != name)})"


def short_form(fingerprint: Mapping[str, str]) -> bytes:
    """Return the 12 bytes that a stored mask carries: four per dtype, zero where unknown."""
    parts = (fingerprint.get(name, "0" * 16) for name in _TYPES)
    return b"".join(bytes.fromhex(part)[:_SHORT_BYTES] for part in parts)


def from_short_form(stored: bytes) -> Fingerprint:
    """Return what a stored mask says of its base, in the digits of `shorten`."""
    parts = [stored[place : place + _SHORT_BYTES] for place in range(0, len(stored), _SHORT_BYTES)]
    return {name: part.hex() for name, part in zip(_TYPES, parts, strict=True) if any(part)}


def shorten(fingerprint: Mapping[str, str]) -> Fingerprint:
    """Return the fingerprint cut to the digits that a stored mask carries."""
    return {name: digest[: 2 * _SHORT_BYTES] for name, digest in fingerprint.items()}


def types_of(held: Sequence[torch.dtype]) -> list[str]:
    """Return the dtypes that a fingerprint is made in, for weights of the given ones."""
    return [name for name, dtype in _TYPES.items() if all(_rounds_to(one, dtype) for one in held)]


def _rounds_to(held: torch.dtype, dtype: torch.dtype) -> bool:
    """Tell whether values of one type, rounded to ``dtype``, are what a cast model holds."""
    return held in (dtype, torch.float32, torch.float64)
