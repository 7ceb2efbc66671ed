"""``pemn plan``."""

import argparse
import sys
from typing import Any

from pemn_surgery.commands.common import (
    add_command,
    add_json,
    add_model,
    build_without_weights,
    print_json,
)

_OPTIONS = ("bank", "ratio", "length", "bank_init", "seed", "selector", "density", "rest")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plan",
        _run,
        "Say what would happen to every weight of a model, and why; touches nothing.",
        "pemn plan vit_base_patch16_224 --bank rp --ratio 0.01",
    )
    add_model(parser)
    parser.add_argument("--bank", choices=("mp", "rp", "one_layer", "own"), default="mp")
    parser.add_argument("--ratio", type=float, help="rp: share of the largest layer")
    parser.add_argument("--length", type=int, help="rp: length of the vector")
    parser.add_argument(
        "--bank-init", help="kaiming_normal, kaiming_uniform, signed_constant, model"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--selector", choices=("topk", "threshold"), default="topk")
    parser.add_argument("--density", type=float, default=0.5, help="topk: share of ones")
    parser.add_argument("--rest", choices=("train", "norms", "stats", "freeze"))
    add_json(parser)


def _run(parsed: argparse.Namespace) -> int:
    from pemn_surgery.adapters import plan

    model = build_without_weights(parsed.model, parsed.model_arg)
    given = {name: getattr(parsed, name) for name in _OPTIONS if getattr(parsed, name) is not None}
    result = plan(model, **given)
    if parsed.json:
        print_json(result.as_dict())
    else:
        sys.stdout.write(str(result))
    return 0
