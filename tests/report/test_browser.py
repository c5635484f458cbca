"""
The page in a real browser without a network: figures drawn, tokens explained, nothing in the console.

Chromium is the one of the system, or that which the environment variable CHROMIUM names. Screenshots are kept in
build/screenshots.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import GONE, HOSTILE, write_checkpoint, write_run

from trl_opd.report import write_report

pytestmark = pytest.mark.browser
SCREENSHOTS = Path(__file__).resolve().parents[2] / "build" / "screenshots"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: install Debian's chromium, or name one in the environment variable CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A healthy run, three runs of which one holds hostile texts and one was killed, and a run of GRPO."""
    folder = tmp_path_factory.mktemp("runs")
    lora = write_run(folder / "qwen3-lora-r64", num_steps=200, alarms=(90, 91, 150))
    changes = {"learning_rate": 2e-5, "divergence": "reverse_kl"}
    full = write_run(
        folder / "qwen3-full", num_steps=160, seed=3, changes=changes, state="running", status={"pid": GONE}
    )
    failed = {"state": "failed", "status": {"error": f"RuntimeError: {HOSTILE}"}}
    hostile = write_run(
        folder / f"hostile{HOSTILE.replace('/', '')}", num_steps=40, text=HOSTILE, alarms=(5,), **failed
    )
    write_checkpoint(folder / "grpo" / "checkpoint-9", 9)
    files = {"one": [lora], "several": [lora, full, hostile], "grpo": [folder / "grpo"]}
    return {name: write_report(runs, folder / f"{name}.html") for name, runs in files.items()}


class Watched:
    """A tab that has a page open, and everything that it asked for or complained about."""

    def __init__(self, browser: Any, file: Path, *, width: int = 1280, height: int = 900, **options: Any):
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.context.set_offline(True)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.goto(file.resolve().as_uri())
        self.page.wait_for_selector("body[data-ready]", timeout=60_000)

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                assert self.complaints == []
                outside = [url for url in self.requests[1:] if not url.startswith(("data:", "blob:"))]
                assert self.requests[0].startswith("file://") and outside == []
        finally:
            self.context.close()

    def wait_until(self, expression: str) -> None:
        """Playwright's own wait_for_function evaluates text in the page, which the page's policy forbids."""
        for _ in range(200):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(25)
        raise AssertionError(f"never true: {expression}")

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()

    def shoot(self, name: str, selector: str | None = None) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = str(SCREENSHOTS / f"{name}.png")
        if selector is None:
            self.page.screenshot(path=path, full_page=True)
        else:
            self.page.locator(selector).scroll_into_view_if_needed()
            self.page.locator(selector).screenshot(path=path)

    def shoot_view(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SCREENSHOTS / f"{name}.png"))

    def traces(self, chart: str, what: str = "trace => trace.meta.kind") -> list[Any]:
        return self.page.evaluate(f"document.getElementById('{chart}').data.map({what})")

    def chart(self, title: str) -> str:
        found = self.page.evaluate(
            "title => [...document.querySelectorAll('figure')].find(f => f.querySelector('h3,h4').textContent"
            ".startsWith(title)).querySelector('.plot').id",
            title,
        )
        return str(found)


@pytest.mark.parametrize("name", ["one", "several", "grpo"])
def test_all_figures_are_drawn(browser: Any, pages: dict[str, Path], name: str):
    with Watched(browser, pages[name]) as tab:
        drawn = tab.page.evaluate(
            "[...document.querySelectorAll('.plot')].map(plot => [plot.id, plot.querySelectorAll('.scatterlayer "
            ".trace path.js-line[d], .scatterlayer .trace .point').length, "
            "plot.querySelectorAll('.heatmaplayer image').length, plot.classList.contains('map')])"
        )
        assert len(drawn) == int(tab.page.locator("body").get_attribute("data-drawn")) > 20
        for plot, lines, images, is_map in drawn:
            assert images == 1 if is_map else lines > 0, plot
        assert (tab.count(".plot.map") > 0) and tab.count(".js-plotly-plot") == len(drawn)
        tab.shoot(f"report-{name}")


def test_a_chart_has_a_line_for_each_number_and_marks(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        chart = tab.chart("Reverse and forward KL")
        # two numbers raw and smoothed, the evaluation, and the alarms
        assert tab.traces(chart) == ["train", "train", "eval", "train", "train", "alarm"]
        assert tab.count(f"#{chart} .scatterlayer .trace") == 6
        assert tab.count(f"#{chart} .shapelayer path") == 4  # three alarms and a restart
        assert tab.traces(chart, "trace => trace.x")[-1] == [90, 91, 150]
        tab.page.locator("#smoothing").fill("0")
        tab.wait_until(f"document.getElementById('{chart}').data.length == 4")
        assert tab.page.locator("#smoothing-value").text_content() == "off"
        tab.page.locator("#log").check()
        assert tab.page.evaluate(f"document.getElementById('{chart}').layout.yaxis.type") == "log"
        negative = tab.chart("Log-prob gap")
        assert tab.page.evaluate(f"document.getElementById('{negative}').layout.yaxis.type") == "linear"


def test_smoothing_is_an_unbiased_exponential_mean(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        chart = tab.chart("Top-k overlap")
        tab.page.locator("#smoothing").fill("0.9")
        tab.page.locator("#raw").uncheck()
        tab.wait_until(f"document.getElementById('{chart}').data.length == 2")
        (shown, raw), *_ = tab.traces(chart, "trace => [trace.y, trace.customdata]")
        for n in (1, 2, 50):
            weights = [0.9 ** (n - 1 - i) for i in range(n)]
            mean = sum(w * y for w, y in zip(weights, raw, strict=False)) / sum(weights)
            assert shown[n - 1] == pytest.approx(mean)


def test_what_has_no_noise_is_not_smoothed(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        assert tab.traces(tab.chart("Tokens seen")) == tab.traces(tab.chart("Learning rate")) == ["train", "alarm"]


def test_hovering_a_curve_tells_its_numbers(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["several"]) as tab:
        chart = tab.chart("Top-k overlap")
        tab.page.locator(f"#{chart}").scroll_into_view_if_needed()
        tab.page.locator(f"#{chart} .nsewdrag").first.hover()
        tab.page.wait_for_selector(f"#{chart} .hoverlayer text")
        text = tab.page.locator(f"#{chart} .hoverlayer").text_content()
        assert "qwen3-lora-r64" in text and "smoothed" in text and "qwen3-full" in text
        tab.shoot_view("report-hover")


def test_tokens_explain_themselves(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        assert tab.count("article") == 4
        item = tab.page.evaluate("JSON.parse(document.getElementById('data').textContent).tokens[0].at(-4)")
        token = tab.page.locator("article").first.locator(".t").nth(5)
        token.scroll_into_view_if_needed()
        token.hover()
        tip = tab.page.locator("#tip")
        assert tip.is_visible()
        text = tip.text_content().replace("−", "-")
        assert item["tokens"][5].strip() in text
        for key, shown in (("gap", f"{item['gap'][5]:.3f}"), ("student", f"{item['student'][5]:.4g}")):
            assert shown.removeprefix("-") in text, key
        assert f"{item['teacher'][5]:.4g}".removeprefix("-") in text
        tab.shoot_view("report-token-tip")
        tab.page.mouse.move(0, 0)
        tip.wait_for(state="hidden")


def test_tokens_are_coloured_by_their_gap(browser: Any, pages: dict[str, Path]):
    """Level 5 is a factor of 100 between the two probabilities, level 1 one of 1.5."""
    with Watched(browser, pages["one"]) as tab:
        classes = tab.page.evaluate(
            "[...document.querySelectorAll('article')].map(a => [...a.querySelectorAll('.t')].map(t => t.className))"
        )
        items = tab.page.evaluate("JSON.parse(document.getElementById('data').textContent).tokens[0].slice(-4)")
        limits = (0.4, 0.69, 1.6, 2.3, 4.6)
        for shown, item in zip(classes, items, strict=True):
            mask = item.get("mask") or [1] * len(item["tokens"])
            for name, gap, keep in zip(shown, item["gap"], mask, strict=True):
                if not keep:
                    assert name == "t off"
                    continue
                level = sum(abs(gap) >= limit for limit in limits)
                assert name.split() == (["t", "less" if gap < 0 else "more", f"l{level}"] if level else ["t"])
        assert "t less l5" in classes[0] and "t more l4" in classes[0]


def test_steps_orders_and_colours_can_be_chosen(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        step, order, colour = (tab.page.locator(f"#token-{name}") for name in ("step", "order", "colour"))
        assert step.input_value() == "200" and tab.page.locator("#token-after").is_disabled()
        tab.page.locator("#token-before").click()
        assert step.input_value() == "100"
        assert tab.page.locator("article").first.get_attribute("aria-label") == "Completion 1 of step 100"
        step.select_option("1")
        assert tab.page.locator("#token-before").is_disabled() and tab.count("article") == 4
        order.select_option("length")
        assert "81 tokens" in tab.page.locator("article").first.text_content()
        order.select_option("mean")
        assert "60 tokens" in tab.page.locator("article").first.text_content()
        colour.select_option("kl")
        assert tab.count("article .t.less") > 0 and tab.count("article .t.more") == 0
        tab.page.locator(".worst button").first.click()
        assert tab.page.locator("#tip").is_visible()


def test_tokens_can_be_walked_with_the_keyboard(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        tab.page.locator("article .t").first.focus()
        for _ in range(5):
            tab.page.keyboard.press("ArrowRight")
        tab.page.keyboard.press("ArrowLeft")
        place = "[...document.activeElement.parentElement.querySelectorAll('.t')].indexOf(document.activeElement)"
        assert tab.page.evaluate(place) == 4 and tab.page.locator("#tip").is_visible()
        tab.page.keyboard.press("Escape")
        assert tab.page.locator("#tip").is_hidden()


def test_runs_can_be_chosen(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["several"]) as tab:
        chart = tab.chart("Top-k overlap")
        assert tab.traces(chart, "trace => trace.meta.run")[:-1] == [0, 0, 1, 1, 2, 2]
        tab.page.locator("input[data-run='1']").uncheck()
        assert tab.traces(chart, "trace => [trace.meta.run, trace.visible]")[2:4] == [[1, False], [1, False]]
        assert tab.count(f"#{chart} .scatterlayer .trace") == 5
        tab.page.locator("#token-run").select_option("1")
        assert tab.page.locator("#token-step").input_value() == "160"
        tab.page.locator("#token-run").select_option("2")
        assert tab.page.locator("#token-step").input_value() == "40"
        colours = tab.traces(chart, "trace => trace.line && trace.line.color")
        assert len({colours[0], colours[2], colours[4]}) == 3


def test_hostile_texts_are_texts(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["several"]) as tab:
        tab.page.locator("#token-run").select_option("2")
        token = tab.page.locator("article .t").nth(4)
        assert token.text_content() == HOSTILE
        token.hover()
        assert tab.page.locator("#tip code").text_content() == HOSTILE
        assert HOSTILE in tab.page.locator("pre.error").text_content()
        assert "onerror" in tab.page.locator("article summary").first.text_content()
        chart = tab.chart("Top-k overlap")
        tab.page.locator(f"#{chart}").scroll_into_view_if_needed()
        tab.page.locator(f"#{chart} .nsewdrag").first.hover()
        tab.page.wait_for_selector(f"#{chart} .hoverlayer text")
        assert tab.count("img") == 0 and tab.count("script") == 3
        tab.shoot("report-hostile", "#token-list")


def test_a_script_that_got_in_would_not_run(browser: Any, pages: dict[str, Path], tmp_path: Path):
    """The second lock: what the template might let through, the page's policy stops."""
    text = pages["grpo"].read_text(encoding="utf-8")
    for i, attack in enumerate(("<script>alert(1)</script>", "<img src=x onerror=alert(1)>")):
        file = tmp_path / f"{i}.html"
        file.write_text(text.replace("<h2", attack + "<h2", 1), encoding="utf-8")
        tab = Watched(browser, file)
        tab.context.close()
        assert tab.complaints and not any("dialog" in complaint for complaint in tab.complaints)
        assert all("Content Security Policy" in complaint for complaint in tab.complaints)


def test_dark(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"], color_scheme="dark") as tab:
        back, ink = (
            tab.page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)")
            for name in ("backgroundColor", "color")
        )
        assert sum(back) < 120 and sum(ink) > 600
        chart = tab.chart("Top-k overlap")
        assert tab.traces(chart, "trace => trace.line && trace.line.color")[0] == "#56b4e9"
        tab.shoot("report-dark")
        tab.page.emulate_media(color_scheme="light")
        tab.wait_until(f"document.getElementById('{chart}').data[0].line.color == '#0072b2'")


@pytest.mark.parametrize("name", ["one", "several"])
def test_on_a_phone(browser: Any, pages: dict[str, Path], name: str):
    with Watched(browser, pages[name], width=360, height=740, is_mobile=True, has_touch=True) as tab:
        widths = tab.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert widths == [360, 360]
        wide = tab.page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .bar, .plot, .text, .hidden') "
            "&& e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == []
        token = tab.page.locator("article .t").nth(5)
        token.scroll_into_view_if_needed()
        token.tap()
        box = tab.page.locator("#tip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        tab.shoot_view(f"report-phone-{name}-tip")
        tab.shoot(f"report-phone-{name}")


def test_in_print(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"], color_scheme="dark") as tab:
        tab.page.emulate_media(media="print", color_scheme="dark")
        chart = tab.chart("Top-k overlap")
        tab.wait_until(f"document.getElementById('{chart}').data[0].line.color == '#0072b2'")
        assert tab.page.locator("nav").is_hidden() and tab.page.locator("#token-step").is_hidden()
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        pdf = tab.page.pdf(path=str(SCREENSHOTS / "report.pdf"), format="A4", print_background=True)
        assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
        tab.page.emulate_media(media="screen", color_scheme="dark")
        tab.wait_until(f"document.getElementById('{chart}').data[0].line.color == '#56b4e9'")


def test_figures_have_the_width_of_their_place(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        widths = (
            "[...document.querySelectorAll('.plot')].every(plot => "
            "Math.abs(plot.clientWidth - plot.querySelector('.main-svg').clientWidth) < 2)"
        )
        assert tab.page.evaluate(widths)
        tab.page.set_viewport_size({"width": 700, "height": 900})
        tab.wait_until(f"document.querySelector('.plot').clientWidth > 600 && {widths}")
        tab.page.emulate_media(media="print")
        tab.wait_until(f"document.querySelector('.plot').clientWidth < 340 && {widths}")
        tab.shoot_view("report-print")
        tab.page.emulate_media(media="screen")
        tab.wait_until(f"document.querySelector('.plot').clientWidth > 600 && {widths}")


def test_copying_the_citation(browser: Any, pages: dict[str, Path]):
    with Watched(browser, pages["one"]) as tab:
        tab.page.get_by_text("Citation", exact=True).click()
        tab.page.get_by_role("button", name="Copy BibTeX").click()
        tab.wait_until(
            "['Copied', 'Selected: press Ctrl+C'].includes(document.querySelector('[data-copy]').textContent)"
        )


def test_accessible_names(browser: Any, pages: dict[str, Path]):
    """Every control, figure and region can be told apart by a reader who does not see it."""
    with Watched(browser, pages["several"]) as tab:
        nameless = tab.page.evaluate(
            "[...document.querySelectorAll('button, select, input, section, nav, figure, form, [role=img], article')]"
            ".filter(e => !e.closest('.svg-container') && !(e.ariaLabel || e.textContent.trim() || "
            "e.getAttribute('aria-labelledby') || (e.labels && e.labels.length))).map(e => e.outerHTML.slice(0, 80))"
        )
        assert nameless == []
