"""The page in a real browser: what is promised of sliders, hovering, keys, colours and telephones.

Pictures of it are kept in pytest's folder of this module (`page0`).
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuromf.data.phantom import phantom_labels
from neuromf.data.rendering import render
from neuromf.reporting.page import (
    Chart,
    Charts,
    Facts,
    Folded,
    Item,
    Line,
    Missing,
    Page,
    Problem,
    Section,
    Table,
    Text,
    Tile,
    Volumes,
    write_page,
)
from neuromf.reporting.sprites import sprites

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no browser to look at the page with: apt-get install -y chromium chromium-driver",
)
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--force-color-profile=srgb",
)  # fmt: skip
EPOCHS = 60
SIZE = (48, 56, 46)


def example() -> Page:
    """Every kind of block, with values that are known."""
    epochs = list(range(1, EPOCHS + 1))
    falling = [100 / epoch for epoch in epochs]
    rising: list[float | None] = [epoch / EPOCHS if epoch % 10 == 0 else None for epoch in epochs]
    maps = [phantom_labels(seed, size=SIZE, spacing_mm=4.0) for seed in (0, 1)]
    heads = [render(each, 0, size=SIZE, spacing_mm=4.0, supersample=1).volume for each in maps]
    items = [
        Item({"sample": str(n + 1), "evaluations": nfe}, sprite)
        for n, sprite in enumerate(sprites(heads, 10**6, spacing_mm=(4, 4, 4)).items)
        for nfe in ("1", "10")
    ]
    charts = [
        Chart("raw loss", [Line("both", epochs, falling), Line("validation", epochs, rising)], log=True, wide=True),
        Chart("cosine", [Line("V", epochs, [0.5] * EPOCHS)], levels={"chance": 0.4}),
        Chart("by level", [Line("mean", [0, 1], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5], joined=False)], x_names=["x", "u"]),
    ]
    wide = {f"a rather long column {n}": 1.5 * n for n in range(12)}
    sections = [
        Section(
            "findings", "Findings", [Problem("warning", "A title", ["raw_loss 3.1"], "Because.", "training.lr=1e-4")]
        ),
        Section("curves", "Curves", [Charts(charts)], "Hover."),
        Section("samples", "Samples", [Volumes("Samples", items, "Epoch 60.")]),
        Section(
            "metrics", "Metrics", [Table([wide, wide], "Wide."), Missing("not yet", f"neuromf evaluate {'x' * 90}")]
        ),
        Section(
            "provenance", "Provenance", [Text("A sentence."), Facts({"sha256": "0" * 64}), Folded("More", "a: 1\n" * 9)]
        ),
    ]
    tiles = [Tile("Updates", "1,100", "of 1,100"), Tile("Raw loss", "1.67", "epoch 60")]
    return Page("Training run", "an-example", "Finished.", tiles, sections, "Written by a test.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Any]:
    """Chromium on the page; one for all tests, each of which loads it anew."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium, or neuromf[test]")
    write_page(example(), folder / "page.html")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """The page, fresh, 1200 pixels wide and light; no test may leave a complaint of the browser."""
    show(browser, width=1200)
    browser.get((folder / "page.html").as_uri())
    wait_for_picture(browser)
    yield browser
    complaints = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert complaints == []


def show(browser: Any, *, width: int, height: int = 900, scheme: str = "light") -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait_for_picture(browser: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda _: bright(browser, 0) > 0)


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return [element.get_property("textContent") for element in browser.find_elements("css selector", selector)]


def picture(browser: Any, plane: int) -> str:
    """What a plane shows, as a data URI."""
    return browser.execute_script("return document.querySelectorAll('canvas')[arguments[0]].toDataURL()", plane)


def bright(browser: Any, plane: int) -> int:
    """How many pixels of a plane are not black."""
    return browser.execute_script(
        "const c = document.querySelectorAll('canvas')[arguments[0]];"
        "const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return all.filter((v, i) => i % 4 < 3 && v > 40).length",
        plane,
    )


def keep(browser: Any, path: Path) -> None:
    """A picture of the whole page."""
    size = browser.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollHeight]"
    )
    clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


def test_a_slider_moves_by_keys_and_changes_its_plane_alone(page: Any) -> None:
    from selenium.webdriver import Keys

    slider = find(page, "#viewer-0-Axial")
    find(page, ".foot input").click()  # without the lines, which follow in the other planes
    before = [picture(page, n) for n in range(3)]
    assert slider.get_attribute("aria-valuetext") == f"slice {SIZE[2] // 2 + 1} of {SIZE[2]}"
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    after = [picture(page, n) for n in range(3)]
    assert slider.get_attribute("value") == str(SIZE[2] // 2 + 3)
    assert texts(page, ".plane output")[2] == f"{SIZE[2] // 2 + 4} / {SIZE[2]}"
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]


def test_a_slider_moves_by_the_mouse(page: Any) -> None:
    from selenium.webdriver import ActionChains

    slider, before = find(page, "#viewer-0-Sagittal"), picture(page, 0)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", slider)
    ActionChains(page).move_to_element(slider).click_and_hold().move_by_offset(60, 0).release().perform()
    assert int(slider.get_attribute("value")) > SIZE[0] // 2
    assert picture(page, 0) != before


def test_a_click_in_one_plane_moves_the_other_two(page: Any) -> None:
    from selenium.webdriver import ActionChains

    axial = page.find_elements("css selector", "canvas")[2]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", axial)
    # To the right of the middle is the subject's right (larger i), above it the front (larger j).
    ActionChains(page).move_to_element_with_offset(axial, 40, -60).click().perform()
    values = [int(find(page, f"#viewer-0-{name}").get_attribute("value")) for name in ("Sagittal", "Coronal", "Axial")]
    assert values[0] > SIZE[0] // 2
    assert values[1] > SIZE[1] // 2
    assert values[2] == SIZE[2] // 2


def test_the_planes_lie_as_the_pictures_of_reports_do(page: Any, folder: Path) -> None:
    """A corner of the volume that is bright alone: left, front, top."""
    volume = np.zeros((16, 16, 16), dtype=np.float32)
    volume[:5, 11:, 11:] = 1
    item = Item({"volume": "one"}, sprites([volume], 10**6).items[0])
    write_page(example()._replace(sections=[Section("a", "A", [Volumes("v", [item])])]), folder / "corner.html")
    page.get((folder / "corner.html").as_uri())
    place = (
        "const c = document.querySelectorAll('canvas')[arguments[0]], n = c.width;"
        "const all = c.getContext('2d').getImageData(0, 0, n, n).data;"
        "const grey = (x, y) => all[4 * (Math.round(y * n) * n + Math.round(x * n))];"
        "return [grey(.15, .15), grey(.85, .15), grey(.15, .85), grey(.85, .85)].map((v) => v > 128)"
    )
    page.execute_script("document.querySelector('.foot input').click()")
    for name, index in (("Sagittal", 2), ("Coronal", 13), ("Axial", 13)):
        page.execute_script(
            "const slider = document.getElementById(arguments[0]);"
            "slider.value = arguments[1]; slider.dispatchEvent(new Event('input'))",
            f"viewer-0-{name}",
            index,
        )
    corners = [page.execute_script(place, plane) for plane in range(3)]
    # The face is on the left of sagittal planes, the subject's left on the left of the others; top and front are above.
    assert corners == [[True, False, False, False]] * 3


def test_samples_are_chosen_by_radio_buttons(page: Any) -> None:
    from selenium.webdriver import Keys

    before = picture(page, 2)
    radio = find(page, "input[name='viewer-0-sample']")
    radio.send_keys(Keys.ARROW_RIGHT)
    assert texts(page, ".pill:has(:checked)") == ["2", "1"]
    page.execute_async_script("setTimeout(arguments[0], 100)")
    assert picture(page, 2) != before


def test_hovering_tells_the_values_of_the_nearest_epoch_in_every_chart(page: Any) -> None:
    from selenium.webdriver import ActionChains

    assert texts(page, ".legend output")[:3] == ["1.667", "1", "0.5"]  # the last ones, as long as nothing is pointed at
    plot = find(page, ".plot")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    left, width = page.execute_script(
        "const b = arguments[0].getBoundingClientRect(); return [46, b.width - 56]", plot
    )  # the margins of charts.js
    inner = left + width * (20 - 1) / (EPOCHS - 1)
    ActionChains(page).move_to_element_with_offset(plot, round(inner - (width + 56) / 2), 0).perform()
    outputs = texts(page, ".legend output")
    assert outputs[:3] == ["5", "0.3333", "0.5"]  # 100 / 20, 20 / 60
    assert texts(page, "figcaption output")[:2] == ["epoch 20", "epoch 20"]
    assert len(page.find_elements("css selector", ".cursor")) == 2  # a chart over another axis keeps out of it


def test_a_chart_is_walked_through_by_keys_and_says_what_it_shows(page: Any) -> None:
    from selenium.webdriver import Keys

    plot = find(page, ".plot")
    plot.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert plot.get_attribute("aria-valuenow") == "2"
    assert plot.get_attribute("aria-valuetext") == "epoch 2: both 50; validation 0.1667 @10"
    plot.send_keys(Keys.END)
    assert plot.get_attribute("aria-valuetext") == "epoch 60: both 1.667; validation 1"


def test_a_curve_is_hidden_by_its_name_and_the_scale_is_switched(page: Any) -> None:
    lines = "figure.wide path.line"
    assert len(page.find_elements("css selector", lines)) == 2
    before = find(page, lines).get_attribute("d")
    find(page, ".scale").click()
    assert find(page, ".scale").text == "linear scale"
    assert find(page, lines).get_attribute("d") != before
    find(page, ".legend button").click()
    assert find(page, ".legend button").get_attribute("aria-pressed") == "false"
    assert len(page.find_elements("css selector", lines)) == 1


def test_a_chart_of_levels_names_its_places_and_draws_its_intervals(page: Any) -> None:
    from selenium.webdriver import Keys

    plot = page.find_elements("css selector", ".plot")[2]
    plot.send_keys(Keys.HOME)
    assert plot.get_attribute("aria-valuetext") == "x: mean 1"
    assert {"x", "u"} <= set(texts(page, "figure:nth-of-type(3) text"))
    assert len(page.find_elements("css selector", "figure:nth-of-type(3) line.line")) == 2


def test_everything_that_can_be_used_is_reached_by_the_tab_key(page: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    reached = set()
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        reached.add(page.execute_script("const e = document.activeElement; return e.id || e.className || e.tagName"))
    assert {"viewer-0-Sagittal", "viewer-0-Coronal", "viewer-0-Axial", "plot", "scale", "scroll", "skip"} <= reached
    assert "SUMMARY" in reached


def test_dark_mode_is_dark_and_text_is_readable_in_both(page: Any, folder: Path) -> None:
    def contrasts() -> dict[str, float]:
        return {
            selector: contrast(page, selector)
            for selector in (
                "h1",
                ".lead",
                ".tiles dt",
                ".finding p",
                ".badge",
                ".legend li",
                "th",
                "footer p",
                ".kind",
            )
        }

    light, paper = contrasts(), page.execute_script("return getComputedStyle(document.body).backgroundColor")
    keep(page, folder / "light.png")
    show(page, width=1200, scheme="dark")
    page.execute_async_script("setTimeout(arguments[0], 100)")
    dark = contrasts()
    keep(page, folder / "dark.png")
    assert page.execute_script("return getComputedStyle(document.body).backgroundColor") != paper
    assert min(light.values()) >= 4.5, light  # WCAG AA
    assert min(dark.values()) >= 4.5, dark


def contrast(browser: Any, selector: str) -> float:
    """Contrast of a text with what is behind it, by WCAG's formula."""
    ink, paper = browser.execute_script(
        "let e = document.querySelector(arguments[0]); const ink = getComputedStyle(e).color;"
        "while (e && /rgba\\(0, 0, 0, 0\\)/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement;"
        "return [ink, getComputedStyle(e || document.body).backgroundColor]",
        selector,
    )

    def luminance(colour: str) -> float:
        channels = [int(word) / 255 for word in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(ink), luminance(paper)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [320, 390, 768])
def test_no_width_makes_the_page_scroll_sideways(page: Any, folder: Path, width: int) -> None:
    show(page, width=width)
    page.execute_async_script("setTimeout(arguments[0], 100)")
    root = "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]"
    needed, there = page.execute_script(root)
    keep(page, folder / f"width-{width}.png")
    assert needed <= there <= width
    sides = page.execute_script("return [...document.querySelectorAll('.plot svg')].map((s) => s.clientWidth)")
    assert max(sides) <= width


def test_nothing_is_asked_of_a_network(page: Any) -> None:
    asked = page.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert [name for name in asked if not name.startswith("data:")] == []
