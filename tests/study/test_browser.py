"""The page in Chromium: it opens from the disk, loads nothing, shows the numbers of the JSON, and can be used."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from studied import LONG, SHORT, inputs, pair_of_models, tokenizer, unpack

import minibert
from minibert import BertForMaskedLM, load_tokenizer
from minibert.study import study, study_trace
from minibert.study.heads import taken, written
from minibert.study.text import percent, signed
from minibert.trace import trace

pytestmark = [pytest.mark.browser]
READY = 3.0  # seconds, for 512 tokens
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def driver():
    """One Chromium for all tests, without a screen and without a network. Each test opens its page anew."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options, Service(shutil.which("chromedriver"), env={**os.environ, "SE_OFFLINE": "true"}))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    found.save(path)
    return path


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """Of the bundled model, whose words are as long as words are, with one mask and more tokens than fit its views."""
    path = tmp_path_factory.mktemp("page") / "long.html"
    model, words = BertForMaskedLM.from_pretrained("minibert-uncased"), load_tokenizer("minibert-uncased")
    text = "The [MASK] of Czechoslovakia walked incomprehensibly " + "through an uncharacteristically cold country " * 4
    study(model, words, text, targets=["transportation", "a"], top_k=6).save(path)
    return path


def open_page(driver, path, width=1440, dark=False, media=""):
    """Open a page, and wait until it is drawn without a complaint. Returns the seconds that it took."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    driver.get_log("browser"), driver.get_log("performance")
    start = time.monotonic()
    driver.get(path.as_uri())
    while not driver.execute_script("return document.documentElement.dataset.ready"):
        assert time.monotonic() - start < 30, driver.get_log("browser")
        time.sleep(0.02)
    took = time.monotonic() - start
    assert driver.get_log("browser") == []
    return took


def find(driver, selector):
    return driver.find_elements("css selector", selector)


def texts(driver, selector):
    return [element.get_attribute("textContent") for element in find(driver, selector)]


def click(driver, selector, number=0):
    element = find(driver, selector)[number]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)  # not under the tokens
    element.click()


def shown(driver, place):
    """A text of the page, such as that under the map of the chosen head."""
    return find(driver, place)[0].text


def unbroken(said):
    return said.replace(" %", "\u00a0%")  # a number and its sign stay on one line


@SLOW
def test_it_asks_for_nothing_and_its_numbers_are_those_of_the_json(driver, page, found):
    data = found.to_dict()
    open_page(driver, page)
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]
    best = data["answers"][0]["best"]
    assert texts(driver, ".five .piece") == [guess["token"] for guess in best]
    assert texts(driver, ".five .value") == [percent(guess["probability"]) for guess in best]
    assert texts(driver, "#reading tbody tr .piece") == data["reading"]["pieces"]
    widths = [re.search(r"([\d.]+)%", bar.get_attribute("style"))[1] for bar in find(driver, ".five svg")]
    assert list(map(float, widths)) == pytest.approx([100 * guess["probability"] for guess in best], abs=0.01)
    words = texts(driver, "#reading tbody tr td:last-child")
    assert words == [percent(share) for share in data["shares"]["word"]]
    for row, step in zip(find(driver, "#guesses tbody tr"), data["guesses"][0]["steps"], strict=True):
        cells = texts(row, "td")
        assert cells[:2] == [step["after"], f"{step['answer']['rank']:,}"]
        assert cells[3] == percent(step["answer"]["probability"])
        assert texts(row, ".best div .piece") == [guess["token"] for guess in step["best"]]
        followed = [f"{one['rank']:,} ({percent(one['probability'])}) " for one in step["targets"]]
        assert texts(row, ".follow") == [
            "".join(f"{word} {one}" for word, one in zip(found.targets, followed, strict=True))
        ]
    for row, word in zip(find(driver, "#influence tbody tr"), data["influence"], strict=True):
        hidden, alone = word["hidden"][0], word["alone"][0]
        cells = texts(row, "td")
        assert [cells[1], cells[4]] == [signed(hidden["nats"]), signed(alone["nats"])]
        assert [cells[3], cells[6]] == [hidden["winner"], alone["winner"]]
    assert len(find(driver, ".heads button")) == len(data["looks"])
    for row, part in zip(find(driver, "#cost tbody tr"), data["cost"], strict=False):
        assert part["shapes"] in row.text
    for view, said in data["says"].items():
        assert texts(driver, f"[data-says={view}]") == [unbroken(said[0])]
    click(driver, "#masks button", 1)  # another mask changes every view about it
    one = found.guesses[1]
    assert texts(driver, ".five .piece")[0] == one.answer.token
    assert texts(driver, "[data-says=guesses]") == [unbroken(data["says"]["guesses"][1])]
    assert find(driver, ".strip .chosen")[0].get_attribute("data-token") == str(one.position)
    first = texts(driver, "#influence tbody td:nth-child(2)")[0]
    assert first == signed(data["influence"][0]["hidden"][1]["nats"])


@SLOW
def test_a_chosen_head_and_token(driver, page, found):
    """What stands under the map are the weights: the root keeps one to 0.004, so to half a percent."""
    pieces, size = found.reading.pieces, len(found.reading.pieces)
    weights = unpack(found.maps.weights).view(3, 4, size, size)
    open_page(driver, page)
    click(driver, "[data-head='3.2']")
    click(driver, ".strip [data-token='5']")
    assert find(driver, ".heads .chosen")[0].get_attribute("data-head") == "3.2"
    assert shown(driver, "#head-title").startswith("Layer 3, head 2")
    assert "head 2 of layer 3 is layers[2], and index 1" in shown(driver, "#place")
    assert texts(driver, "#reading tr.chosen .piece") == [pieces[5]]  # marked in all views
    assert find(driver, ".strip .chosen")[0].get_attribute("data-token") == "5"
    assert "(token 5) first" in shown(driver, "#changes .legend")
    row = weights[2, 1, 5] / weights[2, 1, 5].sum()
    best = row.argsort(descending=True, stable=True)[:5].tolist()
    told = shown(driver, "#reads")
    assert "(token 5) reads" in told
    assert told.endswith(", ".join(f"{pieces[place]} {percent(row[place].item())}" for place in best))
    through = [weights[layer, 1, 5].argmax().item() for layer in range(3)]  # the same head number in every layer
    assert texts(driver, "#through tbody .piece") == [pieces[place] for place in through]
    click(driver, "#through button")
    assert shown(driver, "#head-title").startswith("Layer 1, head 2")
    click(driver, "#reading tbody tr", 9)
    assert find(driver, ".strip .chosen")[0].get_attribute("data-token") == "9"


@SLOW
def test_a_token_under_the_mouse_is_seen_everywhere(driver, page, found):
    from selenium.webdriver import ActionChains

    open_page(driver, page)
    ActionChains(driver).move_to_element(find(driver, ".strip [data-token='4']")[0]).perform()
    pointed = find(driver, "#reading .pointed, #influence .pointed, .strip .pointed")
    assert len(pointed) == 3
    assert all("4" in element.get_attribute("data-token").split() for element in pointed)
    assert "(token 4) first" in shown(driver, "#changes .legend")
    assert "(token 4) reads" in shown(driver, "#reads")
    ActionChains(driver).move_to_element(find(driver, "#sentence")[0]).perform()  # away: the chosen one is back
    assert f"(token {found.reading.masks[0]}) reads" in shown(driver, "#reads")
    canvas = find(driver, ".large")[0]
    ActionChains(driver).move_to_element_with_offset(canvas, canvas.size["width"] // 2 - 8, 0).perform()
    assert re.search(r"\(token \d+\) reads .* \(token \d+\): .* %", shown(driver, "#under"))


@SLOW
def test_no_button_does_nothing(driver, page, long_page):
    """Each that is not pressed already changes what is shown."""
    script = """
        const look = () => document.querySelector('main').innerHTML + document.querySelector('.large').toDataURL();
        const all = () => [...document.querySelectorAll('button')];
        return all().map((_, place) => {
            const button = all()[place];
            if (!button || button.getAttribute('aria-pressed') === 'true') return null;
            const [before, what] = [look(), button.outerHTML];
            button.click();
            return look() === before ? what : null;
        }).filter(Boolean)"""
    for path in (page, long_page):
        open_page(driver, path)
        assert len(find(driver, "button")) > 30
        assert driver.execute_script(script) == []


@SLOW
def test_a_link_leads_to_the_line_that_computes_it(driver, page):
    open_page(driver, page)
    links = "#guesses a, #attention a, #changes a"
    for number, link in enumerate(texts(driver, links)):
        click(driver, links, number)
        name, line = re.fullmatch(r"(\w+\.py), line (\d+)", link).groups()
        assert shown(driver, "div:target h3").startswith(f"{name}, line {line}: ")
        lines = (Path(minibert.__file__).parent / name).read_text(encoding="utf-8").splitlines()
        assert lines[int(line) - 1].strip() == texts(driver, "div:target pre")[0].splitlines()[0]


@SLOW
def test_the_switch_shows_what_is_taken(driver, page, model, found):
    open_page(driver, page)
    picture = "return document.querySelector('.heads canvas').toDataURL()"
    before = driver.execute_script(picture)
    click(driver, "#attention .choices button", 1)
    pressed = [button.get_attribute("aria-pressed") for button in find(driver, "#attention .choices button")]
    assert pressed == ["false", "true"]
    assert driver.execute_script(picture) != before
    recorded = trace(model, **inputs(found.reading))
    alpha, value = (recorded.read(f"layers.1.{name}")[0] for name in ("probabilities", "value"))
    place = found.reading.masks[0]
    row = taken(alpha, written(value, model.layers[1].attention.output.weight.detach()).norm(dim=-1))[2, place]
    click(driver, "[data-head='2.3']")
    share = re.search(rf"\(token {place}\) takes from \S+ (\d+(?:\.\d)?) %", shown(driver, "#reads"))[1]
    # The root keeps α to 0.004, and whole percents are shown.
    assert float(share) == pytest.approx(100 * row.max().item(), abs=1.5)
    habits = " ".join(texts(driver, ".habits dt"))
    assert all(f"on {head.name}" in habits for head in found.takes if head.name)


@SLOW
def test_a_walk_by_keyboard(driver, page):
    from selenium.webdriver.common.keys import Keys

    open_page(driver, page)
    assert [b.get_attribute("tabindex") for b in find(driver, ".heads button")].count("0") == 1
    find(driver, ".heads .chosen")[0].send_keys(Keys.HOME)
    walk = ((Keys.ARROW_RIGHT, "1.2"), (Keys.ARROW_DOWN, "2.2"), (Keys.ARROW_LEFT, "2.1"), (Keys.END, "3.4"))
    for key, wanted in walk:
        driver.switch_to.active_element.send_keys(key)
        assert driver.switch_to.active_element.get_attribute("data-head") == wanted
        assert find(driver, ".heads .chosen")[0].get_attribute("data-head") == wanted
    assert driver.switch_to.active_element.get_attribute("aria-label").startswith("layer 3, head 4")
    find(driver, ".strip .chosen")[0].send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert driver.switch_to.active_element.get_attribute("data-token") == "1"
    assert "(token 1) reads" in shown(driver, "#reads")


# What is wider than its view; a scroll that nothing shows; a text outside of its chart; and the texts whose contrast
# (WCAG 2.2, 1.4.3) with the ground that is painted under them is less than 4.5. A canvas knows all colours.
MEASURE = """
const seen = (e) => e.checkVisibility() && e.getClientRects().length;
const all = [...document.querySelectorAll('body *')].filter(seen);
const wrong = [];
const tell = (why, e) => wrong.push(`${why}: ${e.outerHTML.slice(0, 120)}`);
for (const e of all) {
    const [style, box] = [getComputedStyle(e), e.getBoundingClientRect()];
    const view = e.parentElement.closest('.scroll, h1, .strip, svg') || document.documentElement;
    if (box.right > view.getBoundingClientRect().right + 1) tell('wider than its view', e);
    if (e.localName === 'text' && box.left < view.getBoundingClientRect().left - 1) tell('outside its chart', e);
    const over = e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1;
    if (!over || style.display === 'inline' || `${style.overflowX}${style.overflowY}` === 'visiblevisible') continue;
    const hint = e.nextElementSibling;
    if (!(hint && hint.matches('.more') && seen(hint))) tell('cut off, and nothing shows it', e);
}
const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
const context = canvas.getContext('2d', {willReadFrequently: true});
const painted = (colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((x) => x / 255).map((x) => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
    .reduce((sum, x, place) => sum + x * [.2126, .7152, .0722][place], 0);
const known = {};
for (const e of all.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))) {
    const grounds = [];
    for (let at = e; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const ink = getComputedStyle(e)[e.localName === 'text' ? 'fill' : 'color'];
    const key = [...grounds, ink].join();
    if (!(key in known)) {
        const [under, over] = [painted(['white', ...grounds]), painted([ink])].map(light);
        known[key] = (Math.max(under, over) + .05) / (Math.min(under, over) + .05);
    }
    if (known[key] < 4.5) tell(`contrast ${known[key].toFixed(2)}`, e);
}
return wrong;
"""


@pytest.mark.parametrize("width", [390, pytest.param(800, marks=SLOW), pytest.param(1400, marks=SLOW)])
@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=SLOW)])
def test_all_can_be_seen(driver, page, long_page, width, dark):
    """Nothing is cut off, and every text stands out from its ground: shaded, chosen and pointed at as well."""
    for path in (page, long_page):
        open_page(driver, path, width, dark)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        shades = "e.classList.replace([...e.classList].find((c) => c.startsWith('heat')), `heat${place % 11}`)"
        driver.execute_script(
            f"point(1); document.querySelectorAll('.best div .piece[title]').forEach((e, place) => {shades})"
        )
        time.sleep(0.1)  # the hints below the views are drawn with the next frame
        wrong = driver.execute_script(MEASURE)
        assert not wrong, "\n".join(wrong)
    paper = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) < 200) == dark
    least = driver.execute_script(  # the colour of next to no weight, in the first small map
        "const c = document.querySelector('.heads canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, 1);"
        "return Math[arguments[0] ? 'min' : 'max'](...d.data.filter((_, place) => place % 4 === 1))",
        dark,
    )
    assert (least < 128) == dark


@SLOW
def test_512_tokens_are_ready_in_time(driver, tmp_path, monkeypatch):
    monkeypatch.setattr("minibert.study.measures.MOST_TOKENS", 1024)  # the experiments are not what is timed
    ours, _ = pair_of_models(num_hidden_layers=12, num_attention_heads=12, hidden_size=24, max_position_embeddings=512)
    found = study(ours, tokenizer(), " ".join(LONG[:509]) + " [MASK]")
    assert len(found.reading.ids) == 512
    found.save(tmp_path / "page.html")
    # The best of three: what else a machine does is not the page's.
    assert min(open_page(driver, tmp_path / "page.html") for _ in range(3)) < READY
    click(driver, ".strip [data-token='7']")
    assert "not kept exactly" in shown(driver, "#reads")
    click(driver, f".strip [data-token='{found.reading.masks[0]}']")
    assert f"(token {found.reading.masks[0]}) reads" in shown(driver, "#reads")


@SLOW
@pytest.mark.parametrize("text", ["Paris is cold.", "[MASK] [MASK]", "zyzzyva", None])
def test_pages_with_less_to_show(driver, model, tmp_path, text):
    found = study_trace(trace(model, SHORT)) if text is None else study(model, tokenizer(), text)
    found.save(tmp_path / "page.html")
    open_page(driver, tmp_path / "page.html")
    assert any("Not here" in words for words in texts(driver, "section .note"))
    assert texts(driver, "#reading tbody tr .piece") == found.reading.pieces
    if text is None:
        assert not find(driver, "#attention .choices button")
        assert "needs the weights" in shown(driver, "#attention .body > .note")


@SLOW
def test_a_view_is_printed_on_one_page(driver, page):
    open_page(driver, page, media="print")
    script = "return [...document.querySelectorAll('section')].map(e => getComputedStyle(e).breakInside)"
    assert driver.execute_script(script) == ["avoid"] * 7
    assert not find(driver, "#tokens")[0].is_displayed()
    assert find(driver, ".scroll.high")[0].value_of_css_property("max-height") == "none"
