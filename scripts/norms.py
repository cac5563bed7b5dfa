"""Show the norms: python scripts/norms.py, python scripts/norms.py batch, --compare layer batch."""

from __future__ import annotations

import argparse
from itertools import zip_longest

from gpt.cli.errors import run
from gpt.common.terminal import say, show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "name", nargs="?", help="print the card of this norm; without it, a table of all norms"
    )
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="show cards side by side")
    parser.add_argument("--norm-module", help="a Python file that registers a norm of your own")
    args = parser.parse_args()

    import gpt.norms  # noqa: F401  (registers them; imported here, so that --help is fast)
    from gpt.norms.registry import load_module
    from gpt.probes import cards

    if args.norm_module:
        load_module(args.norm_module)
    if args.compare:
        lines: list[tuple[str, str]] = []
        for part in zip(*map(cards.card, args.compare), strict=True):  # aligned part by part
            lines += zip_longest(*part, fillvalue="")
        width = max(len(left) for left, _ in lines)
        for left, right in lines:
            say(f"{left:<{width}}  │  {right}")
    elif args.name:
        say("\n".join(line for part in cards.card(args.name) for line in part))
    else:
        show(cards.overview())


if __name__ == "__main__":
    run(main)
