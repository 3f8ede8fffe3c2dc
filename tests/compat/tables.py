"""The tables of the pages for users of a peer: every public name of it, and what became of it."""

import re
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parents[2] / "docs"
ROW = re.compile(r"^\| `(?P<name>[\w.]+)` \| (?P<fate>[^|]+) \|", re.M)


def names_of(page: str, module: ModuleType) -> dict[str, str]:
    """The names in the table, with their fates; the ones called "same" must exist in `module`."""
    text = (DOCS / page).read_text()
    table = text[text.index("## Every public name") :]
    rows = [(match["name"], match["fate"].strip()) for match in ROW.finditer(table)]
    assert len(rows) == len(dict(rows)), "a name stands twice"
    for name, fate in rows:
        value = module
        for part in name.split(".") if not fate.startswith("no") else ():
            assert hasattr(value, part), f"{name} is not there: {fate}"
            value = getattr(value, part)
        assert fate.startswith(("same", "renamed", "no:")), f"{name}: {fate}"
    return dict(rows)
