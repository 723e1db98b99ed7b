"""Write the tables of README.md from results/: `python -m benchmarks.render`.

The text between `<!-- NAME:begin -->` and `<!-- NAME:end -->` becomes the table of results/NAME.json.
Raises FileNotFoundError if a marker has no such file, and ValueError if a file has no marker.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.measure import markdown

HERE = Path(__file__).parent
MARKED = re.compile(r"(<!-- (?P<name>[\w-]+):begin -->\n).*?(<!-- (?P=name):end -->)", re.DOTALL)


def fill(match: re.Match[str]) -> str:
    result = json.loads((HERE / "results" / f"{match['name']}.json").read_text(encoding="utf-8"))
    return f"{match[1]}\n{markdown(result)}\n\n{match[3]}"


def main() -> None:
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    names = {match["name"] for match in MARKED.finditer(text)}
    if unused := {path.stem for path in (HERE / "results").glob("*.json")} - names:
        raise ValueError(
            f"README.md has no markers for {sorted(unused)}: add <!-- NAME:begin -->, :end -->"
        )
    readme.write_text(MARKED.sub(fill, text), encoding="utf-8")


if __name__ == "__main__":
    main()
