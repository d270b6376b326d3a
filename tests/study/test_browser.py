"""The page in Chromium: it opens from the disk, loads nothing, shows the numbers of the JSON, and can be used."""

import json
import re
import time

import pytest
import torch
from studied import PAIR, TEXT, browser, inputs, pair_of_models, tokenizer

from minibert.study import study, study_trace
from minibert.study.heads import taken, unpack, written
from minibert.study.text import percent, signed
from minibert.trace import trace

pytestmark = pytest.mark.browser
HOSTILE = "</script><img src=x onerror=alert(1)> <b>bold</b> \u202eevil [MASK]"
READY = 3.0  # seconds, for 512 tokens


@pytest.fixture(scope="module")
def found():
    return study(pair_of_models()[0], tokenizer(), TEXT, PAIR, targets=["tea"])


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    found.save(path)
    return path


@pytest.fixture(scope="module")
def driver(page):
    """One browser for all tests that only read or click. Each opens the page anew."""
    with browser() as driver:
        yield driver


def open_page(driver, path):
    """Open a page, and wait until it is drawn. Returns the seconds that it took."""
    start = time.monotonic()
    driver.get(path.as_uri())
    while not driver.execute_script("return document.documentElement.dataset.ready"):
        assert time.monotonic() - start < 30, driver.get_log("browser")
        time.sleep(0.02)
    return time.monotonic() - start


def find(driver, selector):
    return driver.find_elements("css selector", selector)


def texts(driver, selector):
    return [element.get_attribute("textContent") for element in find(driver, selector)]


def test_it_opens_from_the_disk_and_asks_for_nothing(driver, page):
    driver.get_log("browser"), driver.get_log("performance")
    open_page(driver, page)
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]


def test_the_numbers_on_the_page_are_those_of_the_json(driver, page, found):
    data = found.to_dict()
    open_page(driver, page)
    best = data["answers"][0]["best"]
    assert texts(driver, ".five .piece") == [guess["token"] for guess in best]
    assert texts(driver, ".five .probability") == [percent(guess["probability"]) for guess in best]
    assert texts(driver, "#reading tbody tr .piece") == data["reading"]["pieces"]
    words = texts(driver, "#reading tbody tr td:last-child")
    assert words == [percent(share) for share in data["shares"]["word"]]
    for row, step in zip(find(driver, "#guesses tbody tr"), data["guesses"][0]["steps"], strict=True):
        cells = [cell.get_attribute("textContent") for cell in row.find_elements("css selector", "td")]
        assert cells[:2] == [step["after"], f"{step['answer']['rank']:,}"]
        assert cells[3] == percent(step["answer"]["probability"])
        assert cells[4:9] == [guess["token"] for guess in step["best"]]
        assert cells[9:] == [f"{step['targets'][0]['rank']:,}", percent(step["targets"][0]["probability"])]
    for row, word in zip(find(driver, "#influence tbody tr"), data["influence"], strict=True):
        cells = [cell.get_attribute("textContent") for cell in row.find_elements("css selector", "td")]
        assert [cells[1], cells[4]] == [signed(word["hidden"][0]["nats"]), signed(word["alone"][0]["nats"])]
        assert [cells[3], cells[6]] == [word["hidden"][0]["winner"], word["alone"][0]["winner"]]
    assert len(find(driver, ".heads button")) == len(data["looks"])
    for row, part in zip(find(driver, "#cost tbody tr"), data["cost"], strict=False):
        assert part["shapes"] in row.text
    for view, said in data["says"].items():
        assert texts(driver, f"[data-says={view}]") == [said[0]]


def test_a_click_on_a_head_and_on_a_token(driver, page, found):
    open_page(driver, page)
    find(driver, "[data-head='2.3']")[0].click()
    assert find(driver, ".heads .chosen")[0].get_attribute("data-head") == "2.3"
    assert find(driver, "#head-title")[0].text.startswith("Layer 2, head 3")
    find(driver, ".strip [data-token='4']")[0].click()
    chosen = texts(driver, "#reading tr.chosen .piece")
    assert chosen == [found.reading.pieces[4]]  # marked in all views
    assert find(driver, ".strip .chosen")[0].get_attribute("data-token") == "4"
    assert "(token 4) reads" in find(driver, "#reads")[0].text
    assert "(token 4) first" in find(driver, "#changes .legend")[0].text
    find(driver, "#reading tbody tr")[9].click()
    assert find(driver, ".strip .chosen")[0].get_attribute("data-token") == "9"


def test_the_words_under_the_map_are_the_weights(driver, page, found):
    """The root keeps a weight to 0.004, so to half a percent."""
    data = found.to_dict()
    size = len(data["reading"]["pieces"])
    weights = unpack(data["maps"]["weights"]).view(3, 4, size, size)
    open_page(driver, page)
    find(driver, "[data-head='3.2']")[0].click()
    find(driver, ".strip [data-token='5']")[0].click()
    row = weights[2, 1, 5] / weights[2, 1, 5].sum()
    best = row.argsort(descending=True, stable=True)[:5].tolist()
    told = find(driver, "#reads")[0].text
    assert told.endswith(
        ", ".join(f"{data['reading']['pieces'][place]} {percent(row[place].item())}" for place in best)
    )


def test_the_switch_shows_what_is_taken(driver, page, found):
    open_page(driver, page)
    look, take = find(driver, "#attention .choices button")
    before = driver.execute_script("return document.querySelector('.heads canvas').toDataURL()")
    take.click()
    assert take.get_attribute("aria-pressed") == "true"
    assert look.get_attribute("aria-pressed") == "false"
    assert driver.execute_script("return document.querySelector('.heads canvas').toDataURL()") != before
    recorded = trace(pair_of_models()[0], **inputs(found.reading))
    alpha, value = (recorded.read(f"layers.1.{name}")[0] for name in ("probabilities", "value"))
    weight = pair_of_models()[0].layers[1].attention.output.weight.detach()
    place = found.reading.masks[0]
    row = taken(alpha, written(value, weight).norm(dim=-1))[2, place]
    find(driver, "[data-head='2.3']")[0].click()
    told = find(driver, "#reads")[0].text
    assert f"(token {place}) takes from" in told
    first = float(re.search(r"takes from \S+ (\d+(?:\.\d)?) %", told)[1])
    assert first == pytest.approx(
        100 * row.max().item(), abs=1.5
    )  # the root keeps α to 0.004, and whole percents are shown
    named = {head.name for head in found.takes if head.name}
    shown = " ".join(texts(driver, ".habits dt"))
    assert all(f"on {name}" in shown for name in named)


def test_another_mask_changes_every_view_about_it(driver, page, found):
    open_page(driver, page)
    find(driver, "#masks button")[1].click()
    one, data = found.guesses[1], found.to_dict()
    assert texts(driver, ".five .piece")[0] == one.answer.token
    assert texts(driver, "[data-says=guesses]") == [data["says"]["guesses"][1]]
    assert find(driver, ".strip .chosen")[0].get_attribute("data-token") == str(one.position)
    first = texts(driver, "#influence tbody td:nth-child(2)")[0]
    assert first == signed(data["influence"][0]["hidden"][1]["nats"])


def test_a_walk_by_keyboard(driver, page):
    from selenium.webdriver.common.keys import Keys

    open_page(driver, page)
    start = find(driver, ".heads .chosen")[0]
    assert [b.get_attribute("tabindex") for b in find(driver, ".heads button")].count("0") == 1
    start.send_keys(Keys.HOME)
    for key, wanted in (
        (Keys.ARROW_RIGHT, "1.2"),
        (Keys.ARROW_DOWN, "2.2"),
        (Keys.ARROW_LEFT, "2.1"),
        (Keys.END, "3.4"),
    ):
        driver.switch_to.active_element.send_keys(key)
        assert driver.switch_to.active_element.get_attribute("data-head") == wanted
        assert find(driver, ".heads .chosen")[0].get_attribute("data-head") == wanted
    label = driver.switch_to.active_element.get_attribute("aria-label")
    assert label.startswith("layer 3, head 4")
    reached = set()
    for _ in range(60):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(
            driver.execute_script("const e = document.activeElement; return e.closest('.strip') ? 'strip' : e.tagName")
        )
    assert "strip" in reached


@pytest.mark.parametrize("width", [320, 800, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows(page, width, dark):
    with browser(width, dark=dark) as driver:
        open_page(driver, page)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        outside = driver.execute_script(
            "const out = (e) => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1;"
            "const all = [...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll'));"
            "return all.filter(out).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert outside == []
        paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 200) == dark
        least = driver.execute_script(  # the colour of next to no weight, in the first small map
            "const c = document.querySelector('.heads canvas');"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, 1);"
            "return Math[arguments[0] ? 'min' : 'max'](...d.data.filter((_, place) => place % 4 === 1))",
            dark,
        )
        assert (least < 128) == dark


def test_a_hostile_text_stays_text(tmp_path):
    found = study(pair_of_models()[0], tokenizer(), HOSTILE)
    found.save(tmp_path / "page.html")
    with browser() as driver:
        open_page(driver, tmp_path / "page.html")
        assert driver.get_log("browser") == []
        assert find(driver, "img") == []
        assert len(find(driver, "script")) == 2
        heading = find(driver, "#sentence")[0].get_attribute("textContent")
        assert heading.startswith("</script><img src=x onerror=alert(1)> <b>bold</b> evil ")


def test_512_tokens_are_ready_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.study.measures.MOST_TOKENS", 1024)  # the experiments are not what is timed
    ours, _ = pair_of_models(num_hidden_layers=12, num_attention_heads=12, hidden_size=24, max_position_embeddings=512)
    words = "she drank a cup before breakfast of cold tea , the capital of france is paris .".split()
    found = study(ours, tokenizer(), " ".join((words * 40)[:509]) + " [MASK]")
    assert len(found.reading.ids) == 512
    found.save(tmp_path / "page.html")
    with browser() as driver:
        open_page(driver, tmp_path / "page.html")  # the first page of a browser pays for its start
        # The best of three: what else a machine does is not the page's.
        assert min(open_page(driver, tmp_path / "page.html") for _ in range(3)) < READY
        find(driver, ".strip [data-token='7']")[0].click()
        assert "not kept exactly" in find(driver, "#reads")[0].text
        place = found.reading.masks[0]
        find(driver, f".strip [data-token='{place}']")[0].click()
        assert f"(token {place}) reads" in find(driver, "#reads")[0].text


@pytest.mark.parametrize("text", ["Paris is cold.", "[MASK] [MASK]", "zyzzyva"])
def test_pages_with_less_to_show(driver, tmp_path, text):
    study(pair_of_models()[0], tokenizer(), text).save(tmp_path / "page.html")
    driver.get_log("browser")
    open_page(driver, tmp_path / "page.html")
    assert driver.get_log("browser") == []
    assert any("Not here" in words for words in texts(driver, "section .note"))


def test_a_trace_alone_is_a_page(driver, tmp_path):
    study_trace(trace(pair_of_models()[0], torch.tensor([[2, 5, 6, 4, 3]]))).save(tmp_path / "page.html")
    driver.get_log("browser")
    open_page(driver, tmp_path / "page.html")
    assert driver.get_log("browser") == []
    assert texts(driver, "#reading tbody tr .piece") == ["#2", "#5", "#6", "#4", "#3"]
    assert find(driver, "#attention .choices button")[1].get_attribute("disabled")


def test_without_decompression_the_rest_is_shown(driver, page):
    script = "delete window.DecompressionStream"
    found = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        open_page(driver, page)
        assert "cannot unpack the maps" in find(driver, "#attention .body")[0].text
        assert find(driver, "#guesses tbody tr")
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", found)


def test_a_view_is_printed_on_one_page(driver, page):
    open_page(driver, page)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        kinds = driver.execute_script(
            "return [...document.querySelectorAll('section')].map(e => getComputedStyle(e).breakInside)"
        )
        assert kinds == ["avoid"] * 6
        assert (
            driver.execute_script("return getComputedStyle(document.querySelector('.scroll.high')).maxHeight") == "none"
        )
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
