"""The reports in a real browser: on a phone and on a desk, by day and by night, with the strangest strings."""

import pytest

from phi3_jax.report.write import write_evaluation_report, write_report
from tests.helpers.browser import DESKTOP, PHONE, launched, opened
from tests.helpers.pages import HOSTILE, LONG, evaluation_report, run_report

STRANGE = (LONG + HOSTILE, f"{LONG} {HOSTILE}\nשלום {'🙂' * 90} a" + "\u0301" * 40)

SIZES = pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
PAGES = pytest.mark.parametrize("name", ["run", "evaluation", "strange run", "strange evaluation"])


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    written = {}
    for name, write, arguments in (
        ("run", write_report, run_report()),
        ("evaluation", write_evaluation_report, evaluation_report()),
        ("strange run", write_report, run_report(*STRANGE)),
        ("strange evaluation", write_evaluation_report, evaluation_report(*STRANGE, models=9)),
    ):
        written[name] = folder / f"{name}.html"
        write(written[name], **arguments)
    return written


OPEN_ALL = "() => document.querySelectorAll('details').forEach(element => element.open = true)"

# Elements that reach out of the window sideways, those within a box that scrolls left out.
OUTSIDE = """() => {
    const found = [];
    for (const element of document.querySelectorAll('main *')) {
        const box = element.getBoundingClientRect();
        if (element.closest('.scroll table') || !box.width) continue;
        if (box.left < -0.5 || box.right > document.documentElement.clientWidth + 0.5)
            found.push(`${element.tagName}.${element.className} ${box.left} to ${box.right}`);
    }
    return found;
}"""


@SIZES
@PAGES
def test_it_fits_the_window_and_loads_in_silence(browser, pages, name, size):
    with opened(browser, pages[name], size) as seen:
        seen.page.evaluate(OPEN_ALL)
        widths = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        content, window = seen.page.evaluate(widths)
        assert content <= window
        assert seen.page.evaluate(OUTSIDE) == []
        assert seen.requests == [pages[name].as_uri()]
        assert seen.complaints == []


def test_a_table_too_wide_for_a_phone_scrolls_in_its_own_box(browser, pages):
    with opened(browser, pages["strange evaluation"], PHONE) as seen:
        box = seen.page.locator(".scroll")
        inner, outer = box.evaluate("element => [element.scrollWidth, element.clientWidth]")
        assert inner > 2 * outer
        assert box.get_attribute("tabindex") == "0"  # Chromium would not need it, other browsers do
        box.focus()
        seen.page.keyboard.press("End")
        for _ in range(5):
            seen.page.keyboard.press("ArrowRight")
        seen.page.wait_for_function("() => document.querySelector('.scroll').scrollLeft > 0", timeout=5000)


# The pictures' boxes, and every text in them relative to its picture.
PICTURES = """() => [...document.querySelectorAll('svg')].map(svg => {
    const outer = svg.getBoundingClientRect();
    const inner = [...svg.querySelectorAll('text')].map(text => {
        const box = text.getBoundingClientRect();
        return [box.left - outer.left, box.top - outer.top, box.right - outer.left, box.bottom - outer.top];
    });
    const shapes = [...svg.querySelectorAll('polyline, rect, circle')].map(shape => {
        const box = shape.getBoundingClientRect();
        return [box.left - outer.left, box.top - outer.top, box.right - outer.left, box.bottom - outer.top];
    });
    const grid = [...svg.querySelectorAll('.grid')].map(line => line.getBoundingClientRect());
    const plot = grid.length && [grid[0].left - outer.left, Math.max(...grid.map(line => line.bottom)) - outer.top];
    return {width: outer.width, height: outer.height, texts: inner, shapes, plot};
})"""


@SIZES
@pytest.mark.parametrize("name", ["run", "evaluation"])
def test_charts_are_drawn_and_their_words_lie_within_and_apart(browser, pages, name, size):
    with opened(browser, pages[name], size) as seen:
        pictures = seen.page.evaluate(PICTURES)
    # Four curves, two histograms, two bars of shares, two strips of intervals; or the three strips.
    assert len(pictures) == (10 if name == "run" else 3)
    for picture in pictures:
        width, height = picture["width"], picture["height"]
        assert width > 80
        assert height > 5
        assert picture["shapes"]
        for left, top, right, bottom in picture["shapes"] + picture["texts"]:
            assert -1 <= left <= right <= width + 1
            assert -1 <= top <= bottom <= height + 1
        boxes = picture["texts"]
        if picture["plot"]:
            assert boxes
            assert all(right <= picture["plot"][0] or top >= picture["plot"][1] for _, top, right, _ in boxes)
        for index, (left, top, right, bottom) in enumerate(boxes):
            for l2, t2, r2, b2 in boxes[:index]:
                assert right <= l2 or r2 <= left or bottom <= t2 + 2 or b2 <= top + 2


@SIZES
def test_what_a_reader_looks_for_is_there_to_see(browser, pages, size):
    with opened(browser, pages["run"], size) as seen:
        headings = seen.page.locator("h1, h2")
        assert headings.count() == 13
        for text in (
            *headings.all(),
            *seen.page.locator(".number").all(),
            *seen.page.locator("section > article del").all(),
        ):
            assert text.is_visible()
        assert seen.page.locator(".number").all_inner_texts() == ["0.0098", "1.0098", "99.8%", "94.0%"]
        assert "5,767,168" in seen.page.inner_text("main")


def test_folded_parts_open_from_the_keyboard(browser, pages):
    with opened(browser, pages["run"], DESKTOP) as seen:
        folded = seen.page.locator("details").count()
        for _ in range(folded + 4):
            seen.page.keyboard.press("Tab")
            if seen.page.evaluate("() => document.activeElement.matches('details:not([open]) > summary')"):
                seen.page.keyboard.press("Enter")
        assert seen.page.locator("details[open]").count() == folded >= 8
        assert seen.page.get_by_text("lora_alpha").is_visible()


# For each kind of text its least contrast with what lies behind it, by WCAG's formula.
CONTRAST = """() => {
    const numbers = colour => {
        const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
        return [r, g, b, a];
    };
    const luminance = rgb => rgb.slice(0, 3).map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = numbers(getComputedStyle(element).backgroundColor);
            if (colour[3] === 1) return colour;
            if (colour[3] !== 0) throw new Error('a background that shows what is behind it');
        }
        throw new Error('no background');
    };
    const least = {};
    for (const element of document.querySelectorAll('main *')) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (!own || element.tagName === 'title') continue;
        const style = getComputedStyle(element);
        const front = numbers(element.namespaceURI.endsWith('svg') ? style.fill : style.color);
        const [a, b] = [luminance(front), luminance(behind(element))].sort((x, y) => y - x);
        const name = element.tagName.toLowerCase() + (element.className.baseVal ?? `.${element.className}`);
        least[name] = Math.min(least[name] ?? 99, (a + 0.05) / (b + 0.05));
    }
    return least;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_by_day_and_by_night(browser, pages, scheme):
    grounds = set()
    for name in ("run", "evaluation"):
        with opened(browser, pages[name], PHONE, scheme) as seen:
            seen.page.evaluate(OPEN_ALL)
            contrast = seen.page.evaluate(CONTRAST)
            grounds.add(seen.page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        assert {"h1.", "th.", "td.", "pre.", "ins.", "mark.", "span.interval"} & set(contrast)
        assert {kind: value for kind, value in contrast.items() if value < 4.5} == {}
    [ground] = grounds
    assert (sum(map(int, ground.strip("rgb()").split(","))) < 200) == (scheme == "dark")
