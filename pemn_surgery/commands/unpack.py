"""``pemn unpack``."""

from typing import Any

from pemn_surgery.commands.common import add_command
from pemn_surgery.commands.pack import add_recoding, recode_adapter


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "unpack",
        recode_adapter,
        "Write an adapter's masks as one bit a weight, which transformers' own loaders read too.",
        "pemn unpack small --out tasks/cifar10",
    )
    add_recoding(parser)
    parser.set_defaults(coding="bits")
