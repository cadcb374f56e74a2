"""The book as a reader meets it: built from the stored outputs, driven in a browser with the network off.

Where no Chromium is installed the browser's part is skipped; with REQUIRE_CHROMIUM=1 that is a failure.
"""

import functools
import http.server
import itertools
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
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1440, "height": 900}
CHAPTERS = [page for page in build.pages() if re.match(r"notebooks/\d\d_", page)]


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
        # a headless browser hides its scrollbars, and with them what they take away
        running = playwright.chromium.launch(
            executable_path=program, args=flags, ignore_default_args=["--hide-scrollbars"]
        )
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
  if (e.getBoundingClientRect().right <= document.documentElement.clientWidth + 1) return false;
  if (e.closest('mjx-assistive-mml, .visually-hidden, dialog')) return false;
  for (let box = e.parentElement; box && box !== document.body; box = box.parentElement)
    if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) return false;
  return getComputedStyle(e).position !== 'fixed';
}).map(e => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 40)}`).slice(0, 5)
"""
# What has to be scrolled inside itself, to either side or up and down: [kind, its text].
SCROLLS = r"""
() => [...document.querySelectorAll('.bd-article, .bd-article *')].filter(e => {
  const style = getComputedStyle(e), scrolls = side => ['auto', 'scroll'].includes(style[side]);
  return (scrolls('overflowX') && e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    || (scrolls('overflowY') && e.clientHeight && e.scrollHeight > e.clientHeight + 1);
}).map(e => [e.closest('pre, table, .math, .pst-scrollable-table-container, .cell_output') ? 'wide' : 'page',
             `${e.tagName}.${e.className}: ${e.textContent.trim().slice(0, 40)}`])
"""
OPEN = "() => document.querySelectorAll('.predict-form .quiet').forEach(button => button.hidden || button.click())"
RENDERED = """
() => [...document.querySelectorAll('.math')].every(math => math.querySelector('mjx-container'))
"""


def settle(page):
    """Wait until the mathematics of a page is drawn."""
    page.wait_for_load_state("load")
    page.wait_for_function(RENDERED, timeout=60_000)
    page.evaluate(OPEN)  # what waits for a prediction is shown


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
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert beyond <= 0, f"{name} is wider than the screen"
        assert page.evaluate(WIDER) == [], name
        scrolling = page.evaluate(SCROLLS)
        if size == DESK:
            assert scrolling == [], name
        assert [text for kind, text in scrolling if kind == "page"] == [], name
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


def test_a_long_formula_is_set_smaller_before_it_has_to_be_scrolled(tab, address):
    page = tab(PHONE)
    page.goto(f"{address}book/methods.html")
    settle(page)
    sizes = """() => [...document.querySelectorAll('div.math mjx-container')].map(e =>
        [e.scrollWidth / e.clientWidth, parseFloat(getComputedStyle(e).fontSize)])"""
    page.wait_for_function(f"({sizes})().some(([_, size]) => size < 15)")
    found = page.evaluate(sizes)
    usual, least = max(size for _, size in found), min(size for _, size in found)
    assert least == pytest.approx(2 / 3 * usual, rel=0.02)
    assert all(size == least for share, size in found if share > 1.01), "what scrolls is as small as it gets"
    assert sum(share > 1.01 for share, _ in found) < len(found) / 2


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
            assert re.search("Held|hold", cards.first.locator(".claim-verdict").inner_text())


def test_a_chapter_opens_with_its_picture(tab, address):
    page = tab()
    for name in CHAPTERS:
        page.goto(f"{address}{name}.html")
        picture = page.locator(".opening img").first
        picture.wait_for()
        assert picture.bounding_box()["y"] < DESK["height"] / 2, name


def test_panels_stand_below_each_other_on_a_phone_at_their_size(tab, address):
    page = tab(PHONE)
    for name in CHAPTERS:
        page.goto(f"{address}{name}.html")
        settle(page)
        for panel in page.locator("figure.made:has(img.panel)").all():
            boxes = [image.bounding_box() for image in panel.locator("img").all()]
            assert all(a["y"] + a["height"] <= b["y"] + 1 for a, b in itertools.pairwise(boxes)), name
            shown = panel.locator("img").evaluate_all("images => images.map(i => 2 * i.width / i.naturalWidth)")
            assert min(shown) > 0.65, (name, shown)


def test_chapters_and_figures_are_numbered_as_their_files(tab, address):
    page = tab()
    for name in CHAPTERS:
        number = str(int(Path(name).name[:2]))
        page.goto(f"{address}{name}.html")
        assert page.locator("article h1").inner_text().startswith(f"{number}. ")
        figures = page.locator("figure.made .caption-number").all_inner_texts()
        assert [text.strip() for text in figures] == [f"Figure {number}.{i + 1}" for i in range(len(figures))], name
        assert figures
    numbered = [text.split(".")[0] for text in page.locator(".bd-sidebar-primary a.reference").all_inner_texts()]
    assert [n for n in numbered if n.isdigit()] == [str(int(Path(name).name[:2])) for name in CHAPTERS]


def test_every_page_says_who_wrote_it_when_and_under_which_licence(site, pages):
    for path, page in pages.items():
        foot = page.select_one("footer.bd-footer-content, .bd-footer-content")
        if foot is None:  # the search page
            continue
        text = " ".join(foot.get_text(" ").split())
        assert re.search(r"By the authors of Why Networks Forget", text), path
        assert re.search(r"Version \d+\.\d+\.\d+ · \d{1,2} \w+ 20\d\d · .* MIT licence", text), path


# --- predictions --------------------------------------------------------------------------------------------


def test_a_prediction_takes_an_answer_before_it_shows_the_run(tab, address):
    page = tab()
    page.goto(f"{address}{CHAPTERS[0]}.html")
    page.wait_for_function(RENDERED, timeout=60_000)
    box = page.locator(".predict").first
    run = page.locator("#fig-01-matrices img").first
    assert not run.is_visible()
    box.locator("textarea").fill("97, 60 and 20 %")
    box.get_by_role("button", name="Keep my answer and show the run").press("Enter")
    assert run.is_visible()
    page.reload()
    assert page.locator(".predict textarea").first.input_value() == "97, 60 and 20 %"
    assert page.locator("#fig-01-matrices img").first.is_visible()


def test_a_link_into_what_waits_opens_it(tab, address):
    page = tab()
    page.goto(f"{address}{CHAPTERS[0]}.html#fig-01-matrices")
    assert page.locator("#fig-01-matrices img").first.is_visible()


def test_paper_shows_what_waits_and_what_is_folded_and_cuts_no_code(tab, address):
    page = tab({"width": 660, "height": 900})  # an A4 page between its margins
    for name in CHAPTERS:
        page.goto(f"{address}{name}.html")
        page.wait_for_function(RENDERED, timeout=60_000)
        page.emulate_media(media="print")
        cut = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 60))"
        assert page.locator(".bd-article pre:visible").evaluate_all(cut) == [], name
        assert page.locator(".bd-article figure.made img").last.is_visible(), name
        assert page.locator(".admonition.dropdown p:not(.admonition-title)").first.is_visible(), name
        assert not page.locator(".predict-form, .explorer .controls").locator("visible=true").count(), name
        assert page.pdf(format="A4", prefer_css_page_size=True)[:5] == b"%PDF-"
        page.emulate_media(media="screen")


# --- tables that sort ---------------------------------------------------------------------------------------


def test_a_table_of_methods_is_the_stored_results_and_sorts_by_click_and_key(tab, address):
    from cl_lib.report import archive

    page = tab()
    page.goto(f"{address}book/tables.html")
    table = page.locator("table.sortable").first
    column = lambda i: table.locator(f"tbody tr td:nth-child({i})").all_inner_texts()
    number = lambda text: float(text.split()[0].replace("−", "-"))
    stored = archive.side_by_side("tables-mnist-class")
    assert dict(zip(column(1), column(2), strict=True)) == stored["accuracy, %"].to_dict()
    assert "tables.yaml mnist-class" in page.locator("#mnist-class pre").first.inner_text()
    titles = table.locator("th")
    titles.nth(1).get_by_role("button").click()
    accuracies = [number(text) for text in column(2) if text != "diverged"]
    assert accuracies == sorted(accuracies, reverse=True) and len(accuracies) > 20
    page.keyboard.press("Enter")
    assert [number(text) for text in column(2) if text != "diverged"] == accuracies[::-1]
    assert [title.get_attribute("aria-sort") for title in titles.all()[:3]] == [None, "ascending", None]
    titles.nth(0).get_by_role("button").press("Space")
    assert column(1) == sorted(column(1)) == sorted(stored.index)
    assert [title.get_attribute("aria-sort") for title in titles.all()[:2]] == ["ascending", None]
    page.emulate_media(media="print")
    arrow = "e => getComputedStyle(e, '::after').content"
    assert titles.nth(0).get_by_role("button").evaluate(arrow) == "none"


# --- things to touch ----------------------------------------------------------------------------------------


@pytest.fixture
def explorer(tab, address):
    def at(chapter, name, size=DESK):
        page = tab(size)
        page.goto(f"{address}{next(page for page in CHAPTERS if Path(page).name.startswith(chapter))}.html")
        settle(page)
        place = page.locator(f".explore-{name}")
        place.scroll_into_view_if_needed()
        return page, place

    return at


def test_the_measures_are_those_of_the_library(explorer):
    from cl_lib.results import metrics

    _, place = explorer("01", "metrics")
    R = [[0.9, 0.5, 0.3], [0.7, 0.8, 0.4], [0.2, 0.7, 0.85]]
    place.get_by_label("accuracy on task 0 after task 2").fill("0.2")
    names = {"average accuracy": "acc", "backward transfer": "bwt", "max forgetting": "max_forgetting"}
    names |= {"average anytime accuracy": "anytime", "learning accuracy": "learning_accuracy"}
    names |= dict.fromkeys(("forgetting", "stability", "plasticity"))
    shown = {
        row.get_attribute("data-measure"): row.locator("output").inner_text()
        for row in place.locator("[data-measure]").all()
    }
    for words, name in names.items():
        assert float(shown[words].replace("−", "-")) == pytest.approx(
            float(getattr(metrics, name or words)(R)), abs=6e-4
        )
    fwt = float(metrics.fwt(R, [0.5, 0.5, 0.5]))
    assert float(shown["forward transfer"].replace("−", "-")) == pytest.approx(fwt, abs=6e-4)
    place.get_by_role("button", name="frozen after task 0").click()
    assert place.locator("[data-measure=stability] output").inner_text() == "1.000"


def test_lambda_walks_along_the_well(explorer):
    page, place = explorer("04", "well")
    rises = lambda: float(re.search(r"risen by ([\d.]+)", place.locator(".said").inner_text())[1])
    slider = place.get_by_role("slider")
    before = rises()
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert rises() < before, "a larger λ holds the old loss down"
    full = rises()
    place.get_by_label("its diagonal").check()
    assert rises() != full
    slider.press("End")
    assert rises() < 0.001


def test_gem_keeps_within_the_cone_and_a_gem_may_not(explorer):
    page, place = explorer("05", "projection")
    said = place.locator(".said")
    assert "A-GEM's step raises the loss of task 2" in said.inner_text()
    arrow = place.get_by_role("slider", name="direction of g", exact=True)
    arrow.focus()
    before = said.inner_text()
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    assert "A-GEM's step raises no old loss" in said.inner_text()
    assert "100 % as long" in said.inner_text(), "within the cone the step is left alone"
    grip = arrow.locator(".grip").bounding_box()
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(grip["x"] + 60, grip["y"] + 200, steps=5)
    page.mouse.up()
    assert said.inner_text() != before
    assert "GEM stands still" in said.inner_text() or "raises" in said.inner_text()


def test_the_buffer_is_the_run_above(explorer):
    page, place = explorer("05", "buffer", PHONE)
    slider = place.get_by_role("slider")
    forgetting = lambda: int(re.search(r"forgetting (\d+)", place.locator(".said").inner_text())[1])
    slider.press("Home")
    little = forgetting()
    slider.press("End")
    assert forgetting() < little
    table = page.locator("table.dataframe", has_text="forgetting").first.locator("tbody tr").first
    assert round(float(table.locator("td").nth(2).inner_text())) == little


def test_the_staircase_adds_up(explorer):
    _, place = explorer("12", "staircase")
    tasks, share = place.get_by_role("slider").all()
    for presses in range(6):
        kinds = [cell.get_attribute("data-kind") for cell in place.locator("rect").all()]
        assert len(kinds) == 256
        said = [int(n) for n in re.findall(r"(\d+) (?:weights|held|free)", place.locator(".said").inner_text())]
        assert said == [kinds.count(kind) for kind in ("frozen", "zero", "free")]
        assert (kinds.count("frozen") == 0) == (tasks.input_value() == "0")
        tasks.press("Home" if presses == 4 else "ArrowRight")
    tasks.press("End")
    share.press("End")
    assert "nothing new can be learned" in place.locator(".said").inner_text()


def test_reduced_motion_is_respected(browser, address):
    context = browser.new_context(viewport=DESK, reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{address}{CHAPTERS[4]}.html")
    settle(page)
    moving = "e => parseFloat(getComputedStyle(e).transitionDuration)"
    assert page.locator(".explore-buffer .moves rect").first.evaluate(moving) == 0
    context.close()
