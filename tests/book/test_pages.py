"""The book as a reader meets it: built from the stored outputs, driven in a browser with the network off.

Where no Chromium is installed the browser's part is skipped; with REQUIRE_CHROMIUM=1 that is a failure.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from bs4 import BeautifulSoup

from book import build

pytestmark = pytest.mark.xdist_group("book")  # one worker builds the pages once
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("site") / "html", tracked=True).parent


@pytest.fixture(scope="module")
def pages(site):
    """Every page: path -> parsed HTML."""
    found = [path for path in sorted(site.rglob("*.html")) if path.relative_to(site).parts[0] != "_static"]
    return {path: BeautifulSoup(path.read_text("utf-8"), "html.parser") for path in found}


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        message = "No Chromium is installed: the book was not driven in a browser (apt install chromium)."
        (pytest.fail if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip)(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        running = playwright.chromium.launch(executable_path=program, args=flags)
        yield running
        running.close()


@pytest.fixture
def tab(browser, address, request):
    """Opens tabs that reach nothing but the book; a complaint or a request elsewhere is a failure."""
    contexts, complaints = [], []

    def guard(route):
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            return route.continue_()
        complaints.append(f"asks for {url}")
        return route.abort()

    def open_tab(size=DESK, scheme="light"):
        context = browser.new_context(viewport=size, color_scheme=scheme)
        context.route("**/*", guard)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type == "error" and complaints.append(f"{page.url}: {m.text}"))
        page.on("pageerror", lambda error: complaints.append(f"{page.url}: {error}"))
        page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status} {r.url}"))
        return page

    open_tab.complaints = complaints
    yield open_tab
    for context in contexts:
        context.close()
    assert not complaints


# --- the files ----------------------------------------------------------------------------------------------


def test_every_page_of_the_contents_is_there(site):
    assert all((site / f"{page}.html").is_file() for page in build.pages())


def test_no_internal_link_is_broken(site, pages):
    anchors = {
        path: {tag["id"] for tag in page.find_all(id=True)}
        | {tag["name"] for tag in page.find_all("a", attrs={"name": True})}
        for path, page in pages.items()
    }
    broken = []
    for path, page in pages.items():
        targets = [(tag, tag.get("href") or tag.get("src")) for tag in page.find_all(["a", "link", "script", "img"])]
        for tag, target in targets:
            if not target or re.match(r"(?:https?|mailto|data|javascript):", target):
                continue
            file, fragment = urldefrag(target)
            file, fragment = unquote(file.split("?")[0]), unquote(fragment)
            there = (path.parent / file).resolve() if file else path
            if tag.name == "a" and there == site:
                there = site / "index.html"
            lost = tag.name == "a" and fragment and there in anchors and fragment not in anchors[there]
            if lost or not there.is_file():
                broken.append(f"{path.relative_to(site)} -> {target}")
    assert not broken


def test_links_elsewhere_are_encrypted_and_no_script_comes_from_there(site, pages):
    for path, page in pages.items():
        for tag in page.find_all("a", href=re.compile("^http")):
            assert tag["href"].startswith("https://"), (path, tag["href"])
        for tag in page.find_all(["script", "img", "iframe"], src=True):
            assert not re.match(r"(?:https?:)?//", tag["src"]), (path.relative_to(site), tag["src"])
        for tag in page.find_all("link", href=True):
            assert not re.match(r"(?:https?:)?//", tag["href"]), (path.relative_to(site), tag["href"])


def test_every_figure_is_described(site, pages):
    for path, page in pages.items():
        for image in page.select("img:not(.toggler)"):
            alt = image.get("alt", "")
            assert len(alt) > 10, (path.relative_to(site), image)
            assert not re.search(r"\.(png|svg|jpe?g)$", alt), (path.relative_to(site), alt)


def test_every_page_has_one_title_and_a_language(site, pages):
    for path, page in pages.items():
        assert page.html.get("lang") == "en", path
        if str(path.relative_to(site).with_suffix("")) in build.pages():
            assert len(page.select("article h1")) == 1, path


def test_the_reference_has_every_method_and_every_public_name(site, pages):
    import cl_lib

    methods = pages[site / "book" / "methods.html"].get_text()
    assert all(method["key"] in methods for method in cl_lib.methods())
    names = pages[site / "book" / "api.html"]
    for name in (
        "load",
        "split",
        "permuted",
        "rotated",
        "shifted",
        "run",
        "Learner",
        "Result",
        "Tracker",
        "claim",
    ):
        assert names.find(id=re.compile(rf"^cl_lib\.[\w.]*\b{name}$")), name


# --- in the browser -----------------------------------------------------------------------------------------

# What is legible: the contrast of every visible piece of text against what is painted behind it, by WCAG 2.
CONTRAST = r"""
() => {
  const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pixel.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => [0, 1, 2].map(i => linear(c[i] / 255))
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = node => {
    const layers = [];
    for (let e = node; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const poor = [], seen = new Set();
  const hidden = 'script, style, mjx-assistive-mml, .headerlink, .sd-d-none';
  const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || seen.has(e) || e.closest(hidden)) continue;
    seen.add(e);
    const style = getComputedStyle(e), box = e.getBoundingClientRect();
    if (style.visibility === 'hidden' || !box.width || +style.opacity === 0) continue;
    const ground = behind(e), ink = over(rgba(style.color), ground), [a, b] = [light(ink), light(ground)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.6 && +style.fontWeight >= 700);
    const told = `${ratio.toFixed(2)} ${e.tagName}.${e.className}: ${text.slice(0, 40)}`;
    if (ratio < (large ? 3 : 4.5)) poor.push(told);
  }
  return poor;
}
"""
# What sticks out of the screen and cannot be scrolled to inside a box of its own.
WIDER = r"""
() => [...document.querySelectorAll('main *')].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  if (e.closest('mjx-assistive-mml, .visually-hidden, dialog')) return false;
  for (let box = e.parentElement; box && box !== document.body; box = box.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return false;
  return getComputedStyle(e).position !== 'fixed';
}).map(e => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 40)}`).slice(0, 5)
"""
RENDERED = """
() => [...document.querySelectorAll('.math')].every(math => math.querySelector('mjx-container'))
"""


def settle(page):
    """Wait until the mathematics of a page is drawn."""
    page.wait_for_load_state("load")
    page.wait_for_function(RENDERED, timeout=20_000)


def in_mode(page, mode):
    """Press the theme button until the page is in `mode`."""
    for _ in range(3):
        if (
            page.evaluate("document.documentElement.dataset.theme") == mode
            and page.evaluate("document.documentElement.dataset.mode") == mode
        ):
            return
        page.locator("button.theme-switch-button:visible").first.click()
    raise AssertionError(f"no {mode} mode")


@pytest.mark.parametrize(
    ("size", "mode"),
    [(PHONE, "dark"), (PHONE, "light"), (DESK, "dark"), (DESK, "light")],
    ids=["phone-dark", "phone-light", "desk-dark", "desk-light"],
)
def test_every_page_is_legible_and_fits(tab, address, size, mode):
    page = tab(size, mode)
    for name in build.pages():
        page.goto(f"{address}{name}.html")
        settle(page)
        assert page.evaluate("document.documentElement.dataset.theme") == mode
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], (
            f"{name} is wider than the screen"
        )
        assert page.evaluate(WIDER) == [], name
        assert page.evaluate(CONTRAST) == [], name
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, f"{name} has a faulty formula"


def test_mathematics_is_drawn_with_the_network_off(tab, address):
    page = tab()
    page.goto(f"{address}book/notation.html")
    settle(page)
    drawn = page.locator("mjx-container")
    assert drawn.count() > 40
    box = page.locator("div.math mjx-container").first.bounding_box()
    assert box["width"] > 100
    assert box["height"] > 15
    assert page.locator("mjx-merror").count() == 0


def test_the_reader_can_turn_the_pages(tab, address):
    page = tab()
    page.goto(address)
    visited = [page.url]
    while page.locator("a.right-next").count():
        page.locator("a.right-next").click()
        page.wait_for_load_state("load")
        visited.append(page.url)
    assert [url.removeprefix(address).removesuffix(".html") or "index" for url in visited] == build.pages()
    page.locator("a.left-prev").click()
    assert page.url == visited[-2]
    for name in build.pages()[1:]:
        page.locator(f".bd-sidebar-primary a.reference[href$='{Path(name).name}.html']").first.click()
        assert page.url == f"{address}{name}.html"
    page.locator("a.navbar-brand").click()
    assert page.url == f"{address}index.html"


def test_the_menu_opens_on_a_phone(tab, address):
    page = tab(PHONE)
    page.goto(address)
    link = page.locator(
        ".bd-sidebar-primary a.reference[href$='glossary.html'], dialog a.reference[href$='glossary.html']"
    )
    assert not link.first.is_visible()
    page.locator("button.primary-toggle:visible").first.click()
    link.locator("visible=true").first.click()
    assert page.url == f"{address}book/glossary.html"


def test_search_finds_a_word(tab, address):
    page = tab()
    page.goto(address)
    page.locator("button.search-button-field:visible, button.search-button__button:visible").first.click()
    field = page.locator("input[type=search]:visible").first
    field.fill("reservoir")
    field.press("Enter")
    hit = page.locator("#search-results a", has_text="Glossary").first
    hit.wait_for(timeout=20_000)
    hit.click()
    page.wait_for_load_state("load")
    assert "glossary.html" in page.url
    assert page.get_by_text("reservoir").count() > 0


def test_the_theme_button_changes_the_page_and_is_remembered(tab, address):
    page = tab()
    page.goto(address)
    ground = "getComputedStyle(document.body).backgroundColor"
    in_mode(page, "light")
    light = page.evaluate(ground)
    in_mode(page, "dark")
    assert page.evaluate(ground) != light
    page.goto(f"{address}book/glossary.html")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_folded_solution_unfolds(tab, address):
    page = tab()
    for name in build.pages():
        if name.startswith("notebooks/"):
            page.goto(f"{address}{name}.html")
            settle(page)
            folded = page.locator(".admonition.dropdown, details.sd-dropdown").first
            inside = folded.locator("p:not(.admonition-title)").first
            assert not inside.is_visible(), name
            folded.locator(".admonition-title, summary").first.click()
            assert inside.is_visible(), name


def test_claims_are_cards(tab, address):
    page = tab()
    for name in build.pages():
        if name.startswith("notebooks/"):
            page.goto(f"{address}{name}.html")
            cards = page.locator(".claim")
            assert cards.count() > 0, name
            assert "eld" in cards.first.locator(".claim-verdict").inner_text()
