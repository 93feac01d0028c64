"""Draw the results of several checkpoints, or of several runs of `eetrain evaluate`, in one picture.

    python recipes/e2e/frontier.py --out frontier.png NAME=results.json [NAME=results.json ...]

A file's policies may lack timings; a second file under the same name may add them for some policies.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eetrain.evaluation import FrontierPoint, draw_frontier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="NAME=FILE")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    points: dict[tuple[str, str], FrontierPoint] = {}
    num_blocks = 0
    for item in args.results:
        name, _, file = item.partition("=")
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        num_blocks = content["num_blocks"]
        for row in content["policies"]:
            known = points.get((name, row["policy"]))
            points[name, row["policy"]] = FrontierPoint(
                policy=row["policy"],
                quality=row["bleu"] if known is None else known.quality,
                blocks=row["blocks_per_token"] if known is None else known.blocks,
                tokens_per_second=row["decode_tokens_per_second"],
                model=name,
            )
    draw_frontier(list(points.values()), args.out, quality="BLEU", num_blocks=num_blocks)


if __name__ == "__main__":
    main()
