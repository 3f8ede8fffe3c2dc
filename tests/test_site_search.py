"""The search of the documentation, in a real browser where one is installed."""

import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Opens the site in a frame, types a query, and posts the titles and addresses of the hits.
PROBE = """<!doctype html><iframe id="site" src="/" width="1280" height="900"></iframe><script>
const frame = document.getElementById("site"), query = decodeURIComponent(location.search.slice(1));
frame.onload = () => {
  const page = frame.contentDocument, started = Date.now();
  const input = page.querySelector("input.md-search__input");
  const look = () => {
    const hits = [...page.querySelectorAll(".md-search-result__item > a")];
    if (hits.length || Date.now() - started > 20000) {
      const found = hits.map(a => [a.querySelector("h1, h2").textContent, a.getAttribute("href")]);
      fetch("/found", {method: "POST", body: JSON.stringify(found)});
    } else {
      page.querySelector("label.md-search__overlay") && input.focus();
      input.value = query;
      input.dispatchEvent(new Event("keyup", {bubbles: true}));
      input.dispatchEvent(new Event("input", {bubbles: true}));
      setTimeout(look, 300);
    }
  };
  look();
};
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """The built site, the probe, and the post of what it found."""

    def __init__(self, *arguments, found, **keywords):
        self.found = found
        super().__init__(*arguments, **keywords)

    def do_GET(self):
        if not self.path.startswith("/probe"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PROBE.encode())

    def do_POST(self):
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format, *arguments):
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(out)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return out


def search(site: Path, query: str, profile: Path) -> list[list[str]]:
    """Return titles and addresses of the hits that the browser shows."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    found: queue.Queue[list[list[str]]] = queue.Queue()
    handler = functools.partial(Handler, directory=str(site), found=found)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
            "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/probe?{query}",
        ]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, **quiet) as process:
            try:
                return found.get(timeout=120)
            finally:
                process.terminate()
                server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "page"),
    [("stiefel", "manifolds"), ("certified", "certification"), ("retraction", "glossary")],
)
def test_search_finds_the_page(site, query, page, tmp_path):
    hits = search(site, query, tmp_path)
    assert any(page in address for _, address in hits), hits


@pytest.mark.slow
def test_search_for_a_word_that_does_not_occur_finds_nothing(site, tmp_path):
    assert search(site, "xyzzyplugh", tmp_path) == []
