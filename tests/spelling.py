"""American spelling everywhere: the British forms that are not to occur, and their replacement.

    python -m tests.spelling [--fix] [PATH ...]

lists them, with their lines, in the tracked files; `--fix` replaces them, in identifiers too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["american", "british", "files"]

ROOT = Path(__file__).parents[1]
ISE = (
    "initial normal orthogonal orthonormal parametr reparametr real general optim minim maxim "
    "regular trivial factor symmetr vector serial deserial recogn organ summar util special penal "
    "quant dequant discret standard random local visual synchron emphas categor diagonal material "
    "stabil equal linear polar memor final custom author character harmon canonical capital "
    "prior sanit parallel formal central digit modular neutral raster item token"
)
PAIRS = {
    "centre": "center", "centres": "centers", "centred": "centered", "centring": "centering",
    "recentre": "recenter", "recentres": "recenters", "recentred": "recentered",
    "grey": "gray", "greyscale": "grayscale", "licence": "license", "defence": "defense",
    "offence": "offense", "catalogue": "catalog", "artefact": "artifact", "artefacts": "artifacts",
    "programme": "program", "judgement": "judgment", "whilst": "while",
    "amongst": "among", "learnt": "learned", "spelt": "spelled", "spoilt": "spoiled",
    "fibre": "fiber", "fibres": "fibers", "metre": "meter", "metres": "meters",
    "sceptical": "skeptical", "practise": "practice", "fulfil": "fulfill", "analyse": "analyze",
    "analysed": "analyzed", "acknowledgement": "acknowledgment",
}  # fmt: skip
for stem in ISE.split():
    for end in ("e", "ed", "es", "er", "ers", "ing", "ation", "ations", "able"):
        PAIRS[f"{stem}is{end}"] = f"{stem}iz{end}"
for stem in ("colour", "behaviour", "neighbour", "favour", "honour", "flavour", "labour"):
    for end in ("", "s", "ed", "ing", "able", "ite", "hood", "al", "map", "maps"):
        PAIRS[stem + end] = stem[:-2] + "r" + end
for stem in ("label", "model", "cancel", "travel", "signal", "channel", "level", "marshal"):
    for end in ("ed", "ing", "er"):
        PAIRS[f"{stem}l{end}"] = stem + end
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # the words of identifiers, too
KINDS = {".py", ".pyi", ".md", ".yml", ".toml", ".ipynb", ".css", ".cff"}
SELF = {"tests/spelling.py", "tests/test_spelling.py"}


def files(names: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the tracked text files."""
    tracked = subprocess.run(
        ["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        if name not in SELF and Path(name).suffix in KINDS:
            yield ROOT / name


def american(text: str) -> str:
    """Replace British forms and keep the case of the first letter, or of all."""

    def replace(match: re.Match[str]) -> str:
        found = match[0]
        new = PAIRS.get(found.lower(), found)
        if new == found or found.islower():
            return new
        return new.upper() if found.isupper() else new.capitalize()

    return WORD.sub(replace, text)


def british(path: Path) -> list[str]:
    """Return the lines with British forms, with the place."""
    text = path.read_text()
    if not {word.lower() for word in set(WORD.findall(text))} & PAIRS.keys():
        return []
    return [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for number, line in enumerate(text.splitlines(), 1)
        for word in WORD.findall(line)
        if word.lower() in PAIRS
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="of the repository; all by default")
    parser.add_argument("--fix", action="store_true", help="replace them")
    arguments = parser.parse_args()
    found = 0
    for path in files(arguments.paths):
        lines = british(path)
        found += len(lines)
        if lines:
            sys.stdout.write("\n".join(lines) + "\n")
        if lines and arguments.fix:
            path.write_text(american(path.read_text()))
    return int(found > 0 and not arguments.fix)


if __name__ == "__main__":
    raise SystemExit(main())
