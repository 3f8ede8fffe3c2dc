"""The documentation builds without a warning, asks no other host, and its code runs and prints."""

import contextlib
import doctest
import importlib
import io
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from tests.each import each
from tests.test_architecture import SEES
from tests.test_public_api import NAMES, public_modules

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A fenced block of Python; `<!-- skip: the reason -->` on the line above leaves it out.
BLOCK = re.compile(
    r"(?:^<!-- skip: (?P<skip>.+?) -->\n)?^```python\n(?P<code>.*?)^```", re.M | re.S
)
# `<!-- prints -->` below a block of Python: the text block after it is what the code prints.
PRINTS = re.compile(r"\A\n+<!-- prints -->\n```text\n(?P<text>.*?)^```", re.M | re.S)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# What a browser fetches on its own: scripts, style sheets, images, fonts (a link is not).
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?P<src>[^"'\s>]+)"""
    r"""|<link[^>]*rel=["']?(?:stylesheet|preconnect|icon|preload)[^>]*>"""
    r"""|url\(["']?(?P<url>https?:[^)]*)|@import\s+["'](?P<at>[^"']+)"""
)


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def site(tmp_path) -> Path:
    out = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return out


def fetches_nothing_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for file in [*pages, *site.rglob("*.css")]:
        for match in FETCHED.finditer(file.read_text()):
            text = match.group(0)
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|url\(["']?http""", text), text


def sets_its_mathematics(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert "assets/javascripts/mathjax-tex-svg.js" in home


def has_a_place_for_every_public_class_and_function(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    listed = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    rooms = {f"orthonet.{room}" for room in SEES if not room.startswith("_")}
    missing = [
        f"{module}.{name}"
        for module, name in NAMES
        if module in rooms and callable(getattr(importlib.import_module(module), name))
        if f"{module}.{name}" not in listed
    ]
    assert not missing


def takes_no_shape_for_an_emphasis(site: Path) -> None:
    """`(*, n), (*, m)` in a docstring needs backticks, or Markdown eats the asterisks."""
    eaten = re.compile(r"<em>[^<]*\)[^<]*\(</em>")
    for file in sorted((site / "api").rglob("*.html")):
        assert not eaten.findall(file.read_text()), file


# One test, so that one process builds the site once.
@each(
    "check",
    [
        fetches_nothing_from_another_host,
        sets_its_mathematics,
        has_a_place_for_every_public_class_and_function,
        takes_no_shape_for_an_emphasis,
    ],
)
def test_the_site(site, check):
    check(site)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_code_of_the_page_runs(page, tmp_path, monkeypatch):
    source = page.read_text()
    blocks = list(BLOCK.finditer(source))
    assert source.count("```python") == len(blocks)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for block in blocks:
        if block["skip"] is None:
            line = source[: block.start("code")].count("\n")
            code = compile("\n" * line + block["code"], str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            shown = PRINTS.match(source[block.end() :])
            if shown is not None:
                assert_prints(shown["text"], printed.getvalue())


def assert_prints(shown: str, printed: str) -> None:
    """Words are equal; numbers differ by one unit of the last digit shown, or 1e-6.

    Other processors round in another order: a constant near 1 moves by some float32 units.
    """
    words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip() for text in (shown, printed)]
    assert words[0] == words[1], printed
    for page, now in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        decimals = len(page.partition("e")[0].partition(".")[2])
        unit = 10.0**-decimals if decimals and "e" not in page else 0.0
        assert abs(float(page) - float(now)) <= 1.01 * max(unit, 1e-6), (page, now, printed)


def test_a_page_that_shows_another_number_is_found():
    assert_prints("radius 0.19, L 1.0000004", "radius 0.20, L  1.0000006\n")
    for printed in ("radius 0.21, L 1.0000004", "radius 0.19, K 1.0000004", "radius 0.19"):
        with pytest.raises(AssertionError):
            assert_prints("radius 0.19, L 1.0000004", printed)


@each("page", PAGES)
def test_make_targets_that_the_page_names_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", page.read_text(), re.M))
    assert {a or b for a, b in named} <= targets


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_of_the_repository_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text())
    lost = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not lost


@pytest.mark.parametrize("module", public_modules())
def test_examples_of_the_docstrings_run(module):
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        value, known = getattr(loaded, name), {"torch": torch, "nn": torch.nn}
        for example in doctest.DocTestFinder().find(value, name, extraglobs=known):
            report = io.StringIO()
            runner = doctest.DocTestRunner(
                optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            )
            failed = runner.run(example, out=report.write).failed
            assert failed == 0, report.getvalue()
