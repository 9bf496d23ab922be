"""The report page in a real Chromium: it renders, masks as the library does, sends nothing, runs nothing of a row's."""

import shlex
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from alphatoken import storage
from alphatoken.mask_config import MaskConfig
from alphatoken.masking import MaskPlan, flat, losses_of, mask_table
from alphatoken.pair_masking import mask_pair_table
from alphatoken.schema import BRANCHES
from alphatoken.suspects import Bounds, LossProfile, TokenLosses, counts_above, row_means
from alphatoken.token_classes import TOKEN_CLASS_NAMES
from jobs import cli
from jobs import report as job
from tests.report_folders import HOSTILE, class_of_token, write_folder

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """A function that writes a folder's report and opens it; what went wrong or out is checked at the end."""
    problems, requests, contexts = [], [], []

    def open_report(folder: str, *arguments: str, **context_options):
        output = tmp_path / "report.html"
        assert job.main([folder, "--output", str(output), *arguments]) == 0
        contexts.append(browser.new_context(**context_options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(output.as_uri())
        return page

    yield open_report
    assert problems == []
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
    for page in (page for context in contexts for page in context.pages):
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0
    for context in contexts:
        context.close()


def choose(page, keep: float, weight: float, scope: str = "sequence", floor: float | None = None, protect=()):
    for name, value in (("keep", keep), ("weight", weight)):
        page.locator(f"#{name}").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
        )
    page.select_option("#scope", scope)
    page.fill("#floor", "" if floor is None else str(floor))
    for name in TOKEN_CLASS_NAMES:
        page.locator(f"#protect input[value={name}]").set_checked(name in protect)
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def shown_masks(page) -> list[list[bool]]:
    """True where a token is not struck out, for every response on the page."""
    return page.evaluate(
        """() => [...document.querySelectorAll('article .text[tabindex]')].map(
            (text) => [...text.querySelectorAll('.token')].map((token) => token.tagName !== 'S'))"""
    )


def plan_of(keep, weight, floor, protect) -> MaskPlan:
    numbers = np.array([TOKEN_CLASS_NAMES.index(name) for name in protect], dtype=np.int8) if protect else None
    return MaskPlan(keep, weight, floor, class_of_token=class_of_token(), protected_classes=numbers)


def threshold(keep, values, ids, protect) -> float:
    """One for all, straight from its definition."""
    numbers = [TOKEN_CLASS_NAMES.index(name) for name in protect]
    free = np.sort(values[~np.isin(class_of_token()[ids], numbers)])[::-1]
    return float(free[max(1, int(np.ceil(keep * len(free) - 1e-9))) - 1])


CHOICES = [
    (0.8, 1.5, "sequence", None, ()),
    (0.31, 0.0, "sequence", None, ("digits",)),
    (0.5, 3.35, "sequence", 0.25, ()),
    (0.62, 0.7, "dataset", None, ()),
    (0.2, 1.5, "dataset", -0.5, ("end-of-turn", "words")),
    (1.0, 1.0, "sequence", None, ()),
    (0.01, 1.0, "dataset", None, ()),
]


def test_sliders_mask_rows_as_the_library_does(opened, tmp_path):
    table = write_folder(str(tmp_path / "scored"), rows=9)
    page = opened(str(tmp_path / "scored"))
    inside = np.concatenate(table["response_mask"].to_numpy())
    flat = {name: np.concatenate(table[name].to_numpy())[inside] for name in ("adaptation", "stability", "input_ids")}
    for keep, weight, scope, floor, protect in CHOICES:
        plan = plan_of(keep, weight, floor, protect)
        if scope == "dataset":
            values = flat["adaptation"] + np.float32(weight) * flat["stability"]
            plan = MaskPlan(**(vars(plan) | {"threshold": threshold(keep, values, flat["input_ids"], protect)}))
        masked = mask_table(table, plan, "shard").data.to_pylist()
        expected = [
            [label >= 0 for label, mask in zip(row["labels"], row["response_mask"], strict=True) if mask]
            for row in masked
        ]
        choose(page, keep, weight, scope, floor, protect)
        assert shown_masks(page) == expected
        count = sum(map(sum, expected))
        assert f"Keeps {count} of" in page.inner_text("#result")
        assert f"--keep-fraction {keep:g}" in page.inner_text("#command")


def test_suspects_are_those_of_the_library(opened, tmp_path):
    """Bounds are by the rows shown, here all of them; a row that is left out whole is struck out."""
    folder = str(tmp_path / "scored")
    table = write_folder(folder, rows=20)
    losses = losses_of(table, class_of_token())
    few = TokenLosses(losses.losses / 4, losses.classes, losses.lengths)  # so that a few classes are in excess
    means = row_means(losses.losses, losses.offsets)
    profile = replace(LossProfile.of(few), row=float(np.sort(means)[-2]))  # and the worst row
    manifest = storage.read_json(f"{folder}/manifest.json") | {"loss_profile": profile.to_json()}
    storage.write_json(manifest, f"{folder}/manifest.json")
    page = opened(folder)
    page.click("#more")
    assert page.input_value("#rule") == "suspect" and page.locator("#keep").is_disabled()
    bounds = profile.bounds(counts_above(losses, profile.candidates))
    assert np.isfinite(bounds.tokens).any()
    found = {}
    for rule in ("suspect", "surprising"):
        plan = MaskPlan(1, 1.5, class_of_token=class_of_token(), bounds=bounds, bounds_and_value=rule == "suspect")
        masked = {row["row_id"]: row for row in mask_table(table, plan, "shard").data.to_pylist()}
        expected = [
            [row["row_id"] in masked and masked[row["row_id"]]["labels"][place] >= 0
             for place, inside in enumerate(row["response_mask"]) if inside]
            for row in table.to_pylist()
        ]  # fmt: skip
        page.select_option("#rule", rule)
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert shown_masks(page) == expected
        assert f"--rule {rule} " in page.inner_text("#command") and "--scope" not in page.inner_text("#command")
        assert "bounds by these rows alone" in page.inner_text("#result")
        found[rule] = sum(map(sum, expected))
    assert len(masked) < 20 and 0 < found["surprising"] < found["suspect"] < len(losses.losses)


def test_protection_of_a_suspect_mask_can_be_changed(opened, tmp_path):
    """The page has the stored bounds, and protects as the library does."""
    table = write_folder(str(tmp_path / "scored"), rows=9)
    losses = losses_of(table, class_of_token())
    bounds = Bounds(np.full(len(TOKEN_CLASS_NAMES), np.median(losses.losses)), np.inf)
    settings = {"input": "s", "keep_fraction": 0.8, "stability_weight": 1.5, "scope": "sequence", "min_value": None,
                "protect": ["words"], "rule": "suspect"}  # fmt: skip
    more = {"stage": "mask", "rule": "suspect", "bounds": bounds.to_json(TOKEN_CLASS_NAMES), "config": settings}
    scored = storage.read_json(f"{tmp_path}/scored/manifest.json")
    storage.write_json(scored | more | {"scored": scored}, f"{tmp_path}/scored/manifest.json")
    page = opened(str(tmp_path / "scored"))
    shown = []
    for some in (["words"], []):
        for name in TOKEN_CLASS_NAMES:
            page.locator(f"#protect input[value={name}]").set_checked(name in some)
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        plan = replace(plan_of(1, 1.5, None, some), bounds=bounds)
        masked = {row["row_id"]: row for row in mask_table(table, plan, "shard").data.to_pylist()}
        shown.append(shown_masks(page))
        assert shown[-1] == [
            [row["row_id"] in masked and masked[row["row_id"]]["labels"][place] >= 0
             for place, inside in enumerate(row["response_mask"]) if inside]
            for row in table.to_pylist()
        ]  # fmt: skip
    assert shown[0] != shown[1]


def test_sliders_mask_pairs_as_the_library_does(opened, tmp_path):
    table = write_folder(str(tmp_path / "scored"), rows=7, pairs=True)
    page = opened(str(tmp_path / "scored"))
    for keep, weight, scope, floor, protect in CHOICES:
        thresholds = {}
        for branch in BRANCHES if scope == "dataset" else ():
            columns = (np.concatenate(table[f"{branch}_{name}"].to_numpy()) for name in ("adaptation", "stability"))
            values = next(columns) + np.float32(weight) * next(columns)
            ids = np.concatenate(table[f"{branch}_ids"].to_numpy())
            thresholds[branch] = threshold(keep, values, ids, protect)
        masked = mask_pair_table(table, plan_of(keep, weight, floor, protect), thresholds, "shard").data.to_pylist()
        choose(page, keep, weight, scope, floor, protect)
        assert shown_masks(page) == [row[f"{branch}_mask"] for row in masked for branch in BRANCHES]
    assert page.locator("article").first.locator("h4").all_inner_texts()[0].startswith("chosen: kept")


def test_the_command_makes_the_same_mask(opened, tmp_path):
    """A shell and the command line read back from it what the mask was made with."""
    folder = str(tmp_path / "masked")
    write_folder(folder)
    settings = {"input": "runs/it's  a $HOME; `scored` \\", "rule": "share", "keep_fraction": 0.35, "scope": "dataset",
                "min_value": -1e-7, "drop_sequences": 0.25, "stability_weight": 0.5, "protect": ["words", "digits"],
                "target_weights": {"math": 0.5, "code": -1e-7}}  # fmt: skip
    scored = storage.read_json(f"{folder}/manifest.json")
    more = {"stage": "mask", "rule": "share", "config": settings, "scored": scored}
    storage.write_json(scored | more, f"{folder}/manifest.json")
    shown = opened(folder).inner_text("#command")
    program, stage, *arguments = shlex.split(shown)
    found: list[MaskConfig] = []
    assert cli.run(MaskConfig, found.append, arguments) == 0 and [program, stage] == ["alphatoken", "mask"]
    assert found == [MaskConfig(**settings, output="NEW-FOLDER")]


def test_panels_search_filter_and_order(opened, tmp_path):
    table = write_folder(str(tmp_path / "scored"), rows=25)
    page = opened(str(tmp_path / "scored"))
    assert page.locator("article").count() == 10
    page.click("#more")
    assert page.locator("article").count() == 20
    page.fill("#search", "d.jsonl:17")
    assert page.locator("article h3").all_inner_texts() == ["d.jsonl:17"]
    assert page.inner_text("#found") == "1 of 25 rows"
    page.fill("#search", "")
    page.select_option("#order", "loss")
    worst = int(np.argmax(table["mean_loss"].to_numpy()))
    assert page.locator("article h3").first.inner_text() == table["id"][worst].as_py()
    assert page.locator("#histogram rect").count() > 10
    assert set(page.locator("#classes tbody td:first-child").all_inner_texts()) == set(TOKEN_CLASS_NAMES)
    assert "input file 1" in page.inner_text("#groups")
    assert "response is # tokens long" in page.inner_text("#quarantine")
    assert "all-linear" in page.inner_text("#facts")
    assert page.locator("#agreement-panel").is_hidden()


def test_agreement_of_two_estimators(opened, tmp_path):
    table = write_folder(str(tmp_path / "a"), rows=6, shards=1)
    write_folder(str(tmp_path / "b"), rows=6, shards=1)
    opposite = pa.array([[-x for x in row] for row in table["adaptation"].to_pylist()], table["adaptation"].type)
    other = table.set_column(table.column_names.index("adaptation"), "adaptation", opposite)
    storage.write_table(other, f"{tmp_path}/b/data/train-000000000000000.parquet")
    page = opened(str(tmp_path / "a"), "--compare", str(tmp_path / "b"))
    assert "-1.000" in page.inner_text("#agreement")


@pytest.mark.parametrize("floor", [None, 0.25])
def test_another_folder_is_masked_by_its_own_values(opened, tmp_path, floor):
    """Here all of them have another unit, so that the masks are the same but for the smallest value."""
    table = write_folder(str(tmp_path / "a"), rows=6, shards=1)
    write_folder(str(tmp_path / "b"), rows=6, shards=1)
    other = table
    for name in ("adaptation", "stability"):
        scaled = pa.array([[x / 1024 for x in row] for row in table[name].to_pylist()], table[name].type)
        other = other.set_column(table.column_names.index(name), name, scaled)
    storage.write_table(other, f"{tmp_path}/b/data/train-000000000000000.parquet")
    inside = flat(table, "response_mask")
    values = flat(table, "adaptation")[inside] + np.float32(1.5) * flat(table, "stability")[inside]
    stored = threshold(0.4, values, flat(table, "input_ids")[inside], ())
    settings = {"input": "s", "keep_fraction": 0.4, "stability_weight": 1.5, "scope": "dataset", "min_value": floor,
                "protect": []}  # fmt: skip
    scored = storage.read_json(f"{tmp_path}/a/manifest.json")
    more = {"stage": "mask", "rule": "share", "threshold": stored, "config": settings, "scored": scored}
    storage.write_json(scored | more, f"{tmp_path}/a/manifest.json")
    here, there = (
        flat(mask_table(table, MaskPlan(0.4, 1.5, lowest, threshold=stored), "shard").data, "labels")[inside]
        for lowest in (floor, None)
    )
    assert (here == there).all() == (floor is None)
    page = opened(str(tmp_path / "a"), "--compare", str(tmp_path / "b"))
    assert f"{100 * np.mean(here == there):.1f}%" in page.inner_text("#agreement")


def test_hostile_text_is_only_text(opened, tmp_path):
    write_folder(str(tmp_path / "scored"))
    page = opened(str(tmp_path / "scored"))
    assert page.locator("article h3").first.inner_text() == HOSTILE
    page.fill("#search", "window.hacked")
    assert page.locator("article").count() >= 1


def test_keyboard_and_what_is_read_out(opened, tmp_path):
    write_folder(str(tmp_path / "scored"))
    page = opened(str(tmp_path / "scored"))
    text = page.locator("article .text").nth(1)
    text.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    second = text.locator(".token").nth(1)
    assert "current" in second.get_attribute("class")
    for part in ("value", "adaptation", "stability", "log-probability"):
        assert part in page.inner_text("#spoken")
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Tab")
    assert page.locator("#tip").is_hidden()
    named = "(control) => control.labels?.length > 0 || control.getAttribute('aria-label') !== null"
    for control in page.locator("input, select").all():
        assert control.evaluate(named)
    text.locator(".token").first.hover()
    assert page.locator("#tip").is_visible()


def contrast(page, selector: str) -> float:
    """WCAG contrast of an element's text with the page behind it."""
    colours = page.evaluate(
        """(selector) => [getComputedStyle(document.querySelector(selector)).color,
            getComputedStyle(document.body).backgroundColor].map((text) => text.match(/[0-9.]+/g).map(Number))""",
        selector,
    )

    def light(colour: list[float]) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in colour[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(light, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_on_a_phone_in_both_schemes(opened, tmp_path, scheme):
    write_folder(str(tmp_path / "scored"))
    page = opened(str(tmp_path / "scored"), viewport={"width": 360, "height": 700}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("body", ".prompt", ".legend", "article small"):
        assert contrast(page, selector) > 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")
