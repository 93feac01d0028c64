"""Cut a text of speeches into passages: one JSON object with `text` a line, the last tenth held out for validation.

python recipes/shakespeare/passages.py input.txt --out FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--out", required=True)
    parser.add_argument("--characters", type=int, default=500, help="a passage ends with the speech that reaches this")
    args = parser.parse_args()
    found = passages(Path(args.text).read_text(encoding="utf-8"), args.characters)
    held_out = len(found) // 10
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", found[:-held_out]), ("valid", found[-held_out:])):
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(part)} passages")


def passages(text: str, characters: int) -> list[str]:
    """Whole speeches, joined until they are long enough; what is left at the end is dropped."""
    done: list[str] = []
    speeches: list[str] = []
    for speech in text.split("\n\n"):
        speeches.append(speech)
        if sum(map(len, speeches)) >= characters:
            done.append("\n\n".join(speeches))
            speeches = []
    return done


if __name__ == "__main__":
    main()
