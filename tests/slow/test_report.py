"""Pages in Chromium, as a reader sees them: they render, the slider selects, nothing is requested, nothing is cut."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from slrmerge.evaluation import charts
from slrmerge.evaluation.page import page as samples_page
from slrmerge.io.figures import save_figure
from slrmerge.merging.diff_result import diff_page
from slrmerge.merging.finding import HeldOut, HeldOutScores, ScoreChange
from slrmerge.recipe.model import Recipe
from slrmerge.searching.report import report
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import write_result
from slrmerge.searching.select import select
from tests.evaluation.test_result import result as evaluated
from tests.merging.test_diff_result import result as compared
from tests.searching.pairs import made_result, made_rows, no_pictures
from tests.searching.test_plots import PLAIN

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("report"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

LAYERS = 8
SCORES = {
    (i, j): (0.95 - 0.04 * (j - i) - 0.005 * i, 1.0 + 0.11 * (j - i) + 0.02 * min(i, 6 - i))
    for i in range(LAYERS)
    for j in range(i, LAYERS)
}
SHARES = [0.5, 0.605, 0.7, 0.785, 0.85, 0.9, 0.925, 0.965, 0.985, 1.0]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search with ties, a recipe and both controls; do not write to it."""
    folder = tmp_path_factory.mktemp("sëarch <b>") / "a folder"
    folder.mkdir()
    result = made_result(made_rows(SCORES), base=Recipe(pretrained="../a 'b'", posttrained="../post"))
    write_result(folder, result)
    return folder


@pytest.fixture(scope="module")
def browser() -> "Iterator[sync_api.Browser]":
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


@pytest.fixture
def scheme() -> str:
    return "light"


@contextmanager
def watched(browser: "sync_api.Browser", file: Path, scheme: str) -> "Iterator[sync_api.Page]":
    """A file in a page that records what goes wrong, and is checked for it in the end."""
    context = browser.new_context(color_scheme=scheme, permissions=["clipboard-read", "clipboard-write"])
    page, messages, requests = context.new_page(), list[str](), list[str]()
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    address = file.as_uri()
    page.goto(address)
    yield page
    assert messages == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [address]
    context.close()


@pytest.fixture
def opened(browser: "sync_api.Browser", written: Path, scheme: str) -> "Iterator[sync_api.Page]":
    """The report."""
    with watched(browser, written / "report.html", scheme) as page:
        page.wait_for_selector("#diversity .main-svg")
        yield page


def move_to(page: "sync_api.Page", share: float) -> None:
    """Move the slider, and wait until the figures have followed."""
    page.locator("#share").fill(str(share))
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def selected_by_python(written: Path, tmp_path: Path, share: float) -> tuple[SearchResult, Path]:
    """What `slrmerge select` selects, and where it writes the recipe."""
    folder = Path(shutil.copytree(written, tmp_path / "again" / str(share)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slrmerge.searching.plots.draw_result", no_pictures)
        return select(folder, min_quality=share), folder / "slr.yaml"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_slider_selects_as_the_command_does(opened: "sync_api.Page", written: Path, tmp_path: Path) -> None:
    seen = set()
    for share in SHARES:
        move_to(opened, share)
        result, recipe = selected_by_python(written, tmp_path, share)
        slr = result.choice.slr
        if slr is None:
            assert "no interval keeps" in opened.inner_text("#selected")
            assert opened.inner_text("#recipe-note") == ""
            assert not opened.is_visible("#copy")
            continue
        seen.add(slr.label)
        assert opened.inner_text("#selected b") == slr.label
        assert opened.locator("#stack .restored").count() == slr.layers_restored
        assert opened.text_content("#recipe") == recipe.read_text(encoding="utf-8")
        assert slr.label in opened.inner_text("#compared .is-selected")
        star = opened.evaluate(
            "document.getElementById('tradeoff').layout.annotations.find((each) => each.text === '★')"
        )
        assert (star["x"], star["y"]) == (slr.quality, slr.diversity)
        frame = opened.evaluate("document.getElementById('diversity').layout.shapes[0]")
        assert (frame["x0"], frame["y0"]) == ((slr.end or 0) - 0.5, (slr.start or 0) - 0.5)
        faded = opened.evaluate(
            "document.getElementById('quality').data[1].z.flat().filter((each) => each === 1).length"
        )
        assert faded == sum(not each.feasible for each in result.intervals)
    assert len(seen) > 4


def test_the_figures_show_every_candidate(opened: "sync_api.Page") -> None:
    assert opened.locator("#tradeoff .scatterlayer .trace").first.locator(".point").count() == len(SCORES)
    assert opened.locator("#quality .heatmaplayer image").count() == 2
    values = opened.evaluate("document.getElementById('quality').data[0].z")
    assert {(i, j): values[i][j] for i, j in SCORES} == {span: quality for span, (quality, _) in SCORES.items()}


def test_a_hover_names_the_layers_and_both_scores(opened: "sync_api.Page") -> None:
    opened.locator("#tradeoff .scatterlayer .trace").first.locator(".point").first.hover(force=True)
    text = opened.locator("#tradeoff .hoverlayer .hovertext").first.text_content()
    assert text is not None
    for part in ("layers 0–0", f"1 of {LAYERS} layers restored", "Q 0.950", "D 1.000", "ΔQ −1%", "ΔD +0%"):
        assert part in text


def test_a_clicked_candidate_shows_its_recipe_which_can_be_copied(opened: "sync_api.Page") -> None:
    opened.locator("#which").select_option("all")
    opened.locator("#more").click()
    opened.locator("#candidates tbody tr", has_text="layers 2–4").click()
    recipe = opened.text_content("#recipe")
    assert recipe is not None
    assert recipe.endswith("restore: [2, 4]\n")
    opened.locator("#copy").click()
    opened.locator("#copy", has_text="Copied").wait_for()
    assert opened.evaluate("navigator.clipboard.readText()") == recipe


def test_the_table_sorts_by_the_clicked_column(opened: "sync_api.Page") -> None:
    opened.locator("#which").select_option("all")
    opened.locator("#more").click()
    opened.locator("#candidates thead button").nth(2).click()
    values = [float(text) for text in opened.locator("#candidates tbody td:nth-child(3)").all_inner_texts()]
    assert len(values) == len(SCORES) + 3
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_the_page_fits_its_window(opened: "sync_api.Page", width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    opened.wait_for_timeout(300)
    opened.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def test_the_page_prints_in_light_colours_without_controls(opened: "sync_api.Page") -> None:
    opened.emulate_media(media="print")
    assert opened.evaluate("getComputedStyle(document.body).color") == "rgb(28, 33, 39)"
    assert not opened.locator("#share").is_visible()
    assert not opened.locator("#copy").is_visible()
    pdf = opened.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") < 8


_TABLES = "[...document.querySelectorAll('.wide, .columns')]"


def test_tables_fit_a_narrow_window_and_print_without_scroll_bars(browser: "sync_api.Browser", tmp_path: Path) -> None:
    change = ScoreChange(mean=-0.034, low=-0.055, high=-0.014)
    post = HeldOutScores(label="post-trained", quality=0.8, diversity=1)
    early = post.model_copy(update={"label": "layers 0–8", "quality_change": change, "diversity_change": change})
    held_out = HeldOut(prompts=40, scores={"post": post, "early": early})
    result = replace(made_result(made_rows(SCORES)), held_out=held_out)
    (tmp_path / "report.html").write_text(report(result.rows, result.choice, result.summary()), encoding="utf-8")
    found = evaluated(post=[1.0, 2.0], slr=[3.0, 4.0])
    (tmp_path / "samples.html").write_text(samples_page(found), encoding="utf-8")
    for name in ("report.html", "samples.html"):
        with watched(browser, tmp_path / name, "light") as page:
            page.set_viewport_size({"width": 500, "height": 800})
            assert page.evaluate(f"{_TABLES}.filter(each => each.scrollWidth > each.clientWidth).length") == 0
            page.emulate_media(media="print")
            assert set(page.evaluate(f"{_TABLES}.map(each => getComputedStyle(each).overflowX)")) == {"visible"}


@pytest.mark.parametrize("case", PLAIN)
def test_any_result_is_shown(browser: "sync_api.Browser", tmp_path: Path, case: str) -> None:
    rows, min_quality = PLAIN[case]
    result = made_result(rows, min_quality=min_quality)
    (tmp_path / "report.html").write_text(report(result.rows, result.choice, result.summary()), encoding="utf-8")
    with watched(browser, tmp_path / "report.html", "light") as page:
        assert page.locator("#maps").count() == bool(result.intervals)
        for share in (0.5, 1, 0.73):
            move_to(page, share)
        assert page.locator("#compared tbody tr").count() >= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_the_samples_of_an_evaluation_are_shown_with_their_chart(
    browser: "sync_api.Browser", tmp_path: Path, scheme: str, width: int
) -> None:
    found = evaluated(post=[1.0, 2.0], slr=[3.0, 4.0])
    chart = save_figure(charts.draw(found), tmp_path / "chart")
    (tmp_path / "samples.html").write_text(samples_page(found, chart), encoding="utf-8")
    with watched(browser, tmp_path / "samples.html", scheme) as page:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.querySelector('.chart img').naturalWidth") > 100
        assert page.locator("ol li").count() == 8
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_a_comparison_is_shown_by_layer_and_module(
    browser: "sync_api.Browser", tmp_path: Path, scheme: str, width: int
) -> None:
    (tmp_path / "report.html").write_text(diff_page(compared()), encoding="utf-8")
    with watched(browser, tmp_path / "report.html", scheme) as page:
        page.set_viewport_size({"width": width, "height": 800})
        page.wait_for_selector("#cosine .main-svg")
        assert page.locator("#layers .bars .point").count() == 2
        assert page.evaluate("document.getElementById('relative_change').data[0].z") == [[0, 0.5], [None, None]]
        cells = page.locator("#relative_change .plot .bglayer, #relative_change .bg").first.bounding_box()
        assert cells is not None
        assert cells["width"] > 0.4 * width
        page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
        page.emulate_media(media="print")
        assert page.pdf(format="A4").count(b"/Type /Page\n") <= 3
