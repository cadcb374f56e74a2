"""Build the book: execute the notebooks into a build folder, then make the pages with warnings as errors.

python book/build.py              execute, then build into _build/html
python book/build.py --tracked    build from the outputs stored in the notebooks, executing nothing
python book/build.py --refresh    execute, and store the outputs in the notebooks; no pages
"""

import argparse
import base64
import itertools
import re
import shutil
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import yaml
from PIL import Image

from cl_lib.report import notebooks

ROOT = Path(__file__).resolve().parent.parent


class BuildFailed(RuntimeError):
    """The pages could not be made. The message says what to look at."""


def pages(root: Path = ROOT) -> list[str]:
    """The documents named in _toc.yml, without suffix, the front page first."""
    toc = yaml.safe_load((root / "_toc.yml").read_text("utf-8"))
    chapters = [chapter for part in toc.get("parts", []) for chapter in part["chapters"]]
    return [toc["root"]] + [chapter["file"] for chapter in chapters]


def sources(root: Path = ROOT) -> list[Path]:
    """The notebooks among the pages."""
    return [path for page in pages(root) if (path := root / f"{page}.ipynb").is_file()]


def repository(root: Path = ROOT) -> dict:
    """The `repository` entry of _config.yml: `url` is empty until the book has a public home."""
    entry = yaml.safe_load((root / "_config.yml").read_text("utf-8")).get("repository") or {}
    return {"url": (entry.get("url") or "").rstrip("/"), "branch": entry.get("branch") or "main"}


def refresh(root: Path = ROOT, executed: Path | None = None, jobs: int | None = None) -> None:
    """Execute every notebook and store its outputs, without anything that changes from run to run.

    The figure of a cell tagged `readme` becomes book/_static/readme.png, the picture in the README.
    """
    executed = executed or root / "_build" / "notebooks"
    notebooks.execute_all(sources(root), executed, jobs)
    for path in sources(root):
        fresh = notebooks.strip(notebooks.read(executed / path.name))
        notebooks.write(notebooks.with_install(fresh, **repository(root)), path)
        for cell in notebooks.tagged(fresh, "readme"):
            panels = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
            (root / "book" / "_static" / "readme.png").write_bytes(beside(map(base64.b64decode, panels)))


def beside(pictures) -> bytes:
    """PNGs of one height as one, on white: a README cannot set panels beside each other, or choose a theme."""
    pictures = [Image.open(BytesIO(picture)).convert("RGBA") for picture in pictures]
    whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    for picture, end in zip(pictures, itertools.accumulate(p.width for p in pictures), strict=True):
        whole.paste(picture, (end - picture.width, 0), picture)
    file = BytesIO()
    whole.save(file, "PNG", optimize=True)
    return file.getvalue()


def build(
    out: Path | None = None,
    root: Path = ROOT,
    tracked: bool = False,
    jobs: int | None = None,
    builder: str = "html",
) -> Path:
    """Build the book at `root` into the folder `out` (default: _build/html) and return the front page.

    With the builder `singlehtml` the front page holds all the others.

    The pages are made from a copy, so that no tracked file is touched, and replace the former ones only when
    all of them were made. Raises NotebookFailed or BuildFailed.
    """
    out = Path(out or root / "_build" / "html").resolve()
    work = out.parent / f"{out.name}.work"
    shutil.rmtree(work, ignore_errors=True)
    copy = work / "source"
    for path in root.glob("_*.yml"):
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for page in pages(root):
        path = next((p for suffix in (".md", ".ipynb") if (p := root / f"{page}{suffix}").is_file()), None)
        if path is None:
            raise BuildFailed(
                f"_toc.yml names {page}, but there is no {page}.md or {page}.ipynb: add it or take it out."
            )
    shutil.copy(root / "index.md", copy)
    shutil.copytree(root / "book", copy / "book", ignore=shutil.ignore_patterns("__pycache__"))
    if (results := root / "data" / "results").is_dir():  # a page may show what was measured
        shutil.copytree(results, copy / "data" / "results", ignore=_folders)  # not each run's own files
    (copy / "notebooks").mkdir()
    if (studies := root / "notebooks" / "experiments").is_dir():  # or what was run
        shutil.copytree(studies, copy / "notebooks" / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    if tracked:
        executed = {path: path for path in sources(root)}
    else:
        print(f"Executing {len(sources(root))} notebooks", flush=True)
        executed = dict(zip(sources(root), notebooks.execute_all(sources(root), work / "executed", jobs), strict=True))
    for path, result in executed.items():
        notebooks.write(notebooks.strip(notebooks.read(result)), copy / path.relative_to(root))
    print("Building the pages", flush=True)
    _sphinx(copy, work, builder)
    made = work / "_build" / builder
    expected = ["index"] if builder == "singlehtml" else [*pages(root), "index"]
    missing = [page for page in expected if not (made / f"{page}.html").is_file()]
    if missing:
        raise BuildFailed(f"The build ended without these pages: {', '.join(missing)}.")
    shutil.rmtree(out, ignore_errors=True)
    made.replace(out)
    shutil.rmtree(work)
    return out / "index.html"


def _folders(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_dir()]


def _sphinx(source: Path, out: Path, builder: str) -> None:
    start = "from jupyter_book.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        start,
        "build",
        str(source),
        "--path-output",
        str(out),
        "--builder",
        builder,
        "-W",
        "-n",
        "--keep-going",
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        told = re.sub(r"\x1b\[[\d;]*m", "", done.stderr or done.stdout).replace(f"{source}/", "")
        told = re.sub(r"^Traceback .*\n(?:  .*\n)+", "", told, flags=re.MULTILINE).split("\nThe above exception")[0]
        raise BuildFailed(f"Making the pages failed (warnings count as errors):\n{told.strip()}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tracked", action="store_true", help="use the stored outputs; execute nothing")
    parser.add_argument("--refresh", action="store_true", help="store fresh outputs in the notebooks; no pages")
    parser.add_argument("--out", type=Path, help="folder for the pages (default: _build/html)")
    parser.add_argument("--jobs", type=int, help="notebooks at a time (default: one a core)")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        if arguments.refresh:
            refresh(jobs=arguments.jobs)
        else:
            print(build(arguments.out, tracked=arguments.tracked, jobs=arguments.jobs))
    except (notebooks.NotebookFailed, BuildFailed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
