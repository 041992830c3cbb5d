from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.comparison import runs as evaluated
from tests.report.browser import Page
from tests.report.runs import EVIL, write_curves, write_explorer, write_run
from vilmedic.comparison.table import caption, compare, rows
from vilmedic.drawing.images import EACH
from vilmedic.report.page import write_report
from vilmedic.report.side_by_side import write_comparison

TIP = "document.getElementById('tip')"
FOUND = "#scatter .trace .point"


def test_page_opens_without_console_errors_and_draws_everything(page: Page) -> None:
    assert page.errors() == []
    charts = page.run("return document.querySelectorAll('#charts .js-plotly-plot').length")
    assert charts == 6
    assert page.run(f"return document.querySelectorAll('{FOUND}').length") == 40
    assert page.text("#count") == "40 of 40 samples"
    assert page.run("return document.getElementById('problem').hidden")


def test_hovering_shows_the_image_and_the_report(page: Page) -> None:
    assert page.run(f"return {TIP}.hidden")
    page.pointed_at(4)
    page.until(lambda: not page.run(f"return {TIP}.hidden"))

    page.until(lambda: page.run(f"return {TIP}.querySelector('img').naturalWidth > 0"))
    line = int(page.text("#tip small").removeprefix("line "))
    expected = page.run(f"return explorer.data.samples.report[{line - 1}]")
    assert page.text("#tip p") == expected
    box = page.run(f"return {TIP}.getBoundingClientRect().toJSON()")
    assert box["left"] >= 0
    assert box["right"] <= 1360
    assert box["bottom"] <= 900
    assert page.errors() == []


def test_search_filters_the_points(page: Page) -> None:
    page.search("pneumothorax")
    assert page.text("#count") == "8 of 40 samples"
    counts = page.run("return byId('scatter').data.map((t) => [t.name, t.x.length, t.hoverinfo])")
    assert counts[0] == ["not found", 32, "skip"]
    assert sum(count for _, count, _ in counts[1:]) == 8

    page.search('pneumothorax -"small pneumothorax"')
    assert page.text("#count") == "0 of 40 samples"
    page.search("MASS")
    assert page.text("#count") == "20 of 40 samples"
    page.search("")
    assert page.text("#count") == "40 of 40 samples"
    assert page.errors() == []


def test_a_click_lists_neighbours_that_can_be_clicked(page: Page) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page.pointed_at(2)
    page.until(lambda: not page.run(f"return {TIP}.hidden"))
    ActionChains(page.driver).click().perform()
    page.until(lambda: page.run("return explorer.chosen !== null"))

    chosen = page.run("return explorer.chosen")
    near = page.run(f"return explorer.data.neighbours[0].index[{chosen}]")
    shown = page.driver.find_elements("css selector", "#chosen .neighbour")
    assert len(shown) == len(near) == 10
    cosine = page.run(f"return explorer.data.neighbours[0].cosine[{chosen}][0]")
    assert shown[0].text.startswith(f"line {near[0] + 1}, cosine {cosine:.3f}")
    assert page.run("return byId('scatter').layout.shapes.length") == 21
    page.run("document.querySelector('#chosen .neighbour').click()")
    assert page.run("return explorer.chosen") == near[0]
    assert page.errors() == []


def test_colours_and_features_can_be_changed(page: Page) -> None:
    names = "return byId('scatter').data.slice(1).map((trace) => trace.name)"
    several = ["Effusion (10)", "Mass (10)", "several labels (10)", "no label (10)"]
    assert page.run(names) == several
    page.run("byId('colour').value = '1'; byId('colour').dispatchEvent(new Event('change'))")
    assert page.run(names) == ["Mass (20)", "no Mass (20)"]
    before = page.run("return byId('scatter').data[1].x[0]")
    page.run("byId('map').value = '1'; byId('map').dispatchEvent(new Event('change'))")
    assert page.run("return byId('scatter').data[1].x[0]") != before


def test_report_texts_are_never_run_as_scripts(page: Page) -> None:
    page.run("choose(1)")
    assert page.text("#chosen .sample p") == EVIL
    assert page.run("return document.title") == "demo"
    assert page.run("return document.querySelectorAll('[onerror]').length") == 0
    assert page.errors() == []


def test_light_and_dark_mode(page: Page) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = page.run(ground)
    page.driver.find_element("id", "theme").click()
    assert page.run(ground) != before
    ink = page.run("return byId('scatter').layout.font.color")
    assert ink == page.run("return css('--ink')")


def test_the_headline_results_come_first(page: Page) -> None:
    first = page.run("return document.querySelector('main section').id")
    assert first == "answer"
    lead = page.text("#answer .lead")
    assert lead == "ConVIRT, epoch 3, seed 1, test split, 40 samples"
    table = page.run("""return [...document.querySelector('#answer table').rows].map(
        (row) => [...row.cells].map((cell) => cell.innerText.replace(/\\s+/g, ' ').trim()))""")
    assert table[0] == ["", "ConVIRT", "raw pixels"]
    assert table[1] == ["linear probe: AUROC", "0.912 0.900 to 0.950", "0.600"]


def test_classes_have_bars_with_intervals_and_roc_curves(page: Page) -> None:
    plots = "[...document.querySelectorAll('[data-charts] .plot')]"
    bars, roc = page.run(f"return {plots}.map((plot) => plot.data)")
    assert bars[0]["y"] == ["Effusion", "Mass"]
    assert bars[0]["x"] == [0.8, 0.8]
    assert bars[0]["error_x"]["array"] == pytest.approx([0.1, 0.1])
    assert [one["name"].split(" (")[0] for one in roc] == ["Effusion", "Mass"]
    for one in roc:
        assert (one["x"][0], one["y"][0]) == (0, 0)
        assert (one["x"][-1], one["y"][-1]) == (1, 1)
    # a label has the same colour in bars, curves and map
    colours = bars[0]["marker"]["color"]
    assert [one["line"]["color"] for one in roc] == colours
    points = "return byId('scatter').data.slice(1, 3).map((trace) => trace.marker.color)"
    page.run("byId('colour').selectedIndex = 0; drawMap()")
    assert page.run(points) == colours


def test_best_and_worst_retrievals_are_shown_with_image_and_text(page: Page) -> None:
    shown = page.run("""return [...document.querySelectorAll('.pair')].map((one) => [
        one.querySelector('small').textContent, one.querySelector('p').textContent,
        one.querySelector('img').naturalWidth > 0])""")
    reports = page.run("return explorer.data.samples.report")
    places = [0, 1, 2, 3, 39, 38, 37, 36]
    assert [one[0] for one in shown] == [
        f"line {place + 1}, its report is number {place + 1}" for place in places
    ]
    assert [one[1] for one in shown] == [reports[place] for place in places]
    assert all(one[2] for one in shown)


def test_tables_and_figures_can_be_saved(page: Page) -> None:
    page.run("window.saved = []; window.save = (name, address) => saved.push([name, address])")
    for css in ("[data-charts] .get", "#charts .get", "figure .get"):
        page.run(f"document.querySelectorAll('{css}').forEach((button) => button.click())")
    page.until(lambda: page.run("return saved.length") == 4 + 12 + 1)
    saved = dict(page.run("return saved"))
    svg = saved["demo-test-linear_probe-bars.svg"]
    assert svg.startswith("data:image/svg+xml,")
    assert "Effusion" in svg
    assert saved["demo-test-linear_probe-roc.png"].startswith("data:image/png;base64,")
    assert saved["test_full_visual.png"].startswith("data:image/png;base64,")
    links = page.run("""return [...document.querySelectorAll('a[download]')].map(
        (link) => [link.download, link.href.slice(0, 20)])""")
    tables = page.run("return document.querySelectorAll('#answer table, .tables table').length")
    assert len(links) == tables
    assert all(kind == "data:text/csv;base64" for _, kind in links)
    assert page.errors() == []


def test_folded_curves_are_drawn_when_they_are_opened(page: Page) -> None:
    drawn = "return document.querySelectorAll('#more-charts .js-plotly-plot .main-svg').length > 0"
    assert page.text("#more-curves summary") == "2 more"
    assert not page.run(drawn)
    page.run("byId('more-curves').open = true")
    page.until(lambda: page.run(drawn))
    widths = page.run("""return [...document.querySelectorAll('#more-charts .plot')].map(
        (plot) => plot._fullLayout.width)""")
    assert len(widths) == 2
    assert min(widths) > 200
    ticks = page.run("return document.querySelector('#charts .plot')._fullLayout.xaxis.tickformat")
    assert ticks == ",d"
    best = "return document.querySelector('#charts .plot').layout.shapes.map((one) => one.x0)"
    assert page.run(best) == [30]
    assert page.errors() == []


def test_a_long_configuration_scrolls_visibly(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "long")
    more = "".join(f"key_{k}: {k}\n" for k in range(300))
    (run / "config_1.yml").write_text((run / "config_1.yml").read_text() + more)
    page = Page(browser, write_report(run))
    config = "document.querySelector('.config')"
    assert page.run(f"return {config}.scrollHeight > 2 * {config}.clientHeight")
    assert page.run(f"return getComputedStyle({config}, '::-webkit-scrollbar').width") == "12px"
    assert page.run(f"return {config}.tabIndex") == 0
    assert "311 lines" in page.text("#configuration")


def test_page_is_readable_on_a_phone(browser: Any, report: Path) -> None:
    page = Page(browser, report, 390, 844)

    assert page.run("return document.documentElement.scrollWidth") <= 390
    for css in (
        *("#scatter", ".tile", "#charts .card", "#search", ".config", "#side", "figure"),
        *(".headline", "[data-charts] .card", ".pair"),
    ):
        box = page.run(f"return document.querySelector('{css}').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0, css
        assert box["right"] <= 390, css
        assert box["width"] >= 150, css
    assert page.run("return parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    small = """return [...document.querySelectorAll('main *')].filter((e) => e.textContent.trim()
        && !e.closest('svg') && parseFloat(getComputedStyle(e).fontSize) < 11).length"""
    assert page.run(small) == 0
    page.run("choose(0)")
    assert page.text("#chosen strong") == "Line 1"
    assert page.errors() == []


def test_several_runs_are_overlaid_on_one_page(browser: Any, tmp_path: Path) -> None:
    runs = [
        evaluated.write_run(tmp_path / name, draw=place, trainor__epochs=place)
        for place, name in enumerate(("first", "<img src=x onerror=alert(1)>"))
    ]
    for run in runs:
        write_curves(run, seed=0)
    path = write_comparison(runs)
    page = Page(browser, path)
    charts = page.run("return document.querySelectorAll('#charts .js-plotly-plot').length")
    assert charts == page.run("return document.querySelectorAll('#charts .card').length") > 0
    drawn = "return document.querySelector('#charts .plot').data.map((trace) => trace.name)"
    assert page.run(drawn) == [run.name for run in runs]
    lines = "return document.querySelectorAll('.card:first-child .scatterlayer .trace').length"
    assert page.run(lines) == 2
    found = compare(runs)
    table = "return [...document.querySelectorAll('#results table')[0].rows].map("
    shown = page.run(table + "(row) => [...row.cells].map((cell) => cell.textContent))")
    assert shown == rows(found, lambda text: text)
    assert page.text("#results caption") == caption(found)
    assert page.run("return document.querySelectorAll('[onerror]').length") == 0
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = page.run(ground)
    page.driver.find_element("id", "theme").click()
    assert page.run(ground) != before
    assert page.errors() == []

    narrow = Page(browser, path, 390, 844)
    assert narrow.run("return document.documentElement.scrollWidth") <= 390
    assert narrow.errors() == []


def test_runs_without_curves_or_results_have_a_page(browser: Any, tmp_path: Path) -> None:
    only_results = [evaluated.write_run(tmp_path / name) for name in "ab"]
    page = Page(browser, write_comparison(only_results))
    assert len(page.driver.find_elements("css selector", "#results table")) >= 1
    assert page.driver.find_elements("css selector", "#curves") == []
    assert page.errors() == []


@pytest.mark.slow
def test_five_thousand_samples_fit_and_stay_responsive(browser: Any, tmp_path: Path) -> None:
    path = write_explorer(tmp_path, samples=5000, words=90)
    content = json.loads(gzip.decompress(path.read_bytes()))
    random = np.random.default_rng(0)
    # Thumbnails of maximum size and incompressible content.
    content["samples"]["thumbnail"][40:] = [
        base64.b64encode(random.bytes(EACH)).decode() for _ in range(40, 5000)
    ]
    path.write_bytes(gzip.compress(json.dumps(content).encode(), 6))
    write_curves(tmp_path, seed=1)
    report = write_report(tmp_path)
    assert report.stat().st_size <= 20e6

    page = Page(browser, report)
    assert page.text("#count") == "5,000 of 5,000 samples"
    hover = """const times = [];
        for (let i = 0; i < 51; i++) {
          const began = performance.now();
          Plotly.Fx.hover(byId('scatter'), {xpx: 60 + 7 * i, ypx: 60 + 7 * i});
          showTip(explorer.data, i, explorer.query, {clientX: 300, clientY: 300});
          times.push(performance.now() - began);
        }
        return times.sort((a, b) => a - b)[25];"""
    # median in milliseconds, robust against other load; a frame at 60 Hz takes 17
    assert page.run(hover) < 50
    page.search("pneumothorax")
    assert page.text("#count") == "1,000 of 5,000 samples"
    assert page.errors() == []


def test_commands_of_the_site_wrap_on_a_phone_only(browser: Any, tmp_path: Path) -> None:
    style = (Path(__file__).parents[2] / "docs" / "assets" / "site.css").read_text()
    command = "python bin/train.py config/phantom/convirt.yml " * 9
    path = tmp_path / "page.html"
    path.write_text(
        '<html data-ready="true"><meta name="viewport" content="width=device-width">'
        f"<style>pre > code {{ display: block; overflow: auto; }} {style}</style>"
        f'<div class="md-typeset"><pre><code>{command}</code></pre></div>'
    )
    code = "document.querySelector('code')"
    for width, scrolls in ((400, False), (1400, True)):
        page = Page(browser, path, width)
        assert page.run(f"return {code}.scrollWidth > {code}.clientWidth") is scrolls
