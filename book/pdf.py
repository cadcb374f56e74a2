"""Print the book: one page of all its pages, set by Chromium with the print rules of custom.css.

python book/pdf.py             from the outputs stored in the notebooks, into _build/why-networks-forget.pdf
"""

import argparse
import functools
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

try:
    from book import build
except ImportError:  # started as a script
    import build

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 600  # seconds, of the browser's own clock too: every formula has to be drawn first


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def printed(page: Path, out: Path) -> Path:
    """Print one built page to the file `out`. Raises BuildFailed without Chromium, or if it prints nothing."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        raise build.BuildFailed("No Chromium is installed, which prints the book: apt install chromium.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    # From a server of our own: fonts are not loaded into a page that is a file.
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=page.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        flags += ["--no-pdf-header-footer", "--generate-pdf-document-outline", "--disable-dev-shm-usage"]
        flags += [f"--virtual-time-budget={1000 * PATIENCE}", f"--print-to-pdf={out}"]
        address = f"http://127.0.0.1:{server.server_port}/{page.name}"
        done = subprocess.run([program, *flags, address], capture_output=True, text=True, timeout=3 * PATIENCE)
    finally:
        server.shutdown()
        server.server_close()
    if not out.is_file():
        raise build.BuildFailed(f"Chromium printed nothing:\n{done.stderr.strip()}")
    return out


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=build.ROOT / "_build" / "why-networks-forget.pdf")
    arguments = parser.parse_args(argv)
    try:
        page = build.build(build.ROOT / "_build" / "print", tracked=True, builder="singlehtml")
        print(printed(page, arguments.out.resolve()))
    except build.BuildFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
