"""Open every page of the built book in a real browser, as a reader without a network would, and look at it.

    python tools/check_pages.py _build/html [PAGE ...]

Chromium runs headless, with every name blocked and the pages opened from files.  A page fails on an error in the
console, a request that leaves the machine or finds nothing, mathematics that is not set, a picture without
alternative text, and a width of more than a phone's 390 pixels.  What a reader does is tried as well: the keyboard
reaches the content and moves the sliders, the theme can be switched, hidden solutions open, search finds.

Screenshots of every page go to ``_build/shots``: on a desktop, light and dark, and on a phone.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from check_links import pages
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

DESKTOP, PHONE = (1280, 900), (390, 844)
TALLEST = 8000                  # screenshot, in pixels
SECONDS = 20                    # that a page may take until its mathematics is set

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", f"--window-size={DESKTOP[0]},{DESKTOP[1]}"]


@contextlib.contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A Chromium with an empty profile and no way out to the network."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def resize(driver: webdriver.Chrome, width: int, height: int) -> None:
    """Give the page this many pixels, which no window decoration takes from."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})


WAIT = """
const done = arguments[0];
(function wait() {
  if (document.readyState !== 'complete') return setTimeout(wait, 20);
  if (!document.querySelector('.math')) return done();
  const startup = window.MathJax && window.MathJax.startup;
  if (!startup || !startup.promise) return setTimeout(wait, 20);
  startup.promise.then(() => setTimeout(done, 50));
})();"""


def visit(driver: webdriver.Chrome, address: str) -> list[str]:
    """Open a page and wait until it has loaded and its mathematics is set; say so where that does not happen."""
    driver.get(address)
    driver.set_script_timeout(SECONDS)
    try:
        driver.execute_async_script(WAIT)
    except TimeoutException:
        return [f"not ready after {SECONDS} seconds: MathJax did not finish"]
    return []


# ------------------------------------------------------------------------------------------------- what must hold

LOOK = r"""
const visible = e => e.getClientRects().length > 0;
const where = e => (e.outerHTML || '').slice(0, 110).replace(/\s+/g, ' ');
const width = document.documentElement.clientWidth;
const scrolls = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
  if (['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(p).overflowX)) return true; return false; };
return {
  errors: [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e =>
    e.getAttribute('data-mjx-error') || e.getAttribute('title') || e.textContent),
  unset: [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).map(e => e.textContent),
  dollars: [...document.querySelectorAll('article p, article li, article td, article dd, article figcaption')]
    .filter(e => /(^|[\s(])\$[^\s$]([^$]*[^\s$])?\$|\\\(|\\\[|\\begin\{/.test([...e.childNodes]
      .filter(n => n.nodeType === 3).map(n => n.data).join(' '))).map(where),
  pictures: [...document.querySelectorAll('img')].filter(e => !(e.getAttribute('alt') || '').trim() &&
    e.getAttribute('aria-hidden') !== 'true' && e.getAttribute('role') !== 'presentation').map(where),
  broken: [...document.querySelectorAll('img')].filter(e => visible(e) && e.complete && !e.naturalWidth).map(where),
  headings: [...document.querySelectorAll('h1')].filter(visible).length,
  language: document.documentElement.lang,
  unnamed: [...document.querySelectorAll('main input, main button, main select')].filter(e => visible(e) &&
    !(e.getAttribute('aria-label') || e.title || e.textContent.trim() || (e.labels && e.labels.length))).map(where),
  width: width,
  overflow: document.documentElement.scrollWidth - width,
  wide: [...document.querySelectorAll('main *')].filter(e => visible(e) && !scrolls(e) && getComputedStyle(e).overflowX
    === 'visible' && e.getBoundingClientRect().left + Math.max(e.scrollWidth, e.offsetWidth || 0) > width + 1)
    .slice(-3).map(where),
};
"""


def look(driver: webdriver.Chrome) -> dict:
    """What the page that is open says of itself, at its present width."""
    return driver.execute_script(LOOK)


def traffic(driver: webdriver.Chrome) -> list[str]:
    """What the console and the network reported since the last call."""
    found, addresses = [], {}
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        parameters = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            address = addresses[parameters["requestId"]] = parameters["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:", "about:")):
                found.append(f"asks for {address}")
        elif message["method"] == "Network.loadingFailed" and not parameters.get("canceled"):
            found.append(f"could not load {addresses.get(parameters['requestId'], '?')[:150]}")
    found += [f"console: {entry['message'][:300]}" for entry in driver.get_log("browser")
              if entry["level"] == "SEVERE"]
    return found


def check_page(driver: webdriver.Chrome, page: Path, picture: Path | None) -> list[str]:
    """What is wrong with one page, read and used on a desktop, then read on a phone.

    Screenshots go to ``picture`` with ``.light.png``, ``.dark.png`` and ``.phone.png`` after its name; where it is
    None, as for listings of source code, none are taken, and there is nothing to be used.
    """
    resize(driver, *DESKTOP)
    problems = visit(driver, page.as_uri())
    seen = look(driver)
    problems += [f"mathematics in error: {e}" for e in seen["errors"]]
    problems += [f"mathematics not set: {e}" for e in seen["unset"] + seen["dollars"]]
    problems += [f"picture without alternative text: {e}" for e in seen["pictures"]]
    problems += [f"picture that does not load: {e}" for e in seen["broken"]]
    problems += [f"control without a name: {e}" for e in seen["unnamed"]]
    if seen["headings"] != 1:
        problems.append(f"{seen['headings']} headings of the first level")
    if not seen["language"]:
        problems.append("the page does not say its language")
    if seen["overflow"] > 0:
        problems.append(f"{seen['overflow']} pixels wider than a desktop: {seen['wide']}")
    if picture:
        for theme in ("dark", "light"):
            driver.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
            photograph(driver, picture.with_name(f"{picture.name}.{theme}.png"))
        for attempt in (try_keyboard, try_sliders, try_solutions):
            problems += attempt(driver)
    resize(driver, *PHONE)
    time.sleep(0.1)
    seen = look(driver)
    if seen["width"] != PHONE[0]:
        problems.append(f"laid out for {seen['width']} pixels on a phone: it lacks a viewport")
    if seen["overflow"] > 0:
        problems.append(f"{seen['overflow']} pixels wider than a phone: {seen['wide']}")
    if picture:
        photograph(driver, picture.with_name(f"{picture.name}.phone.png"))
    return problems + traffic(driver)


def photograph(driver: webdriver.Chrome, file: Path) -> None:
    """Store a picture of the whole page, in several files if it is long."""
    width, height = driver.execute_script("const e = document.documentElement; return [e.clientWidth, e.scrollHeight]")
    for number, top in enumerate(range(0, height, TALLEST), start=1):
        part = file if height <= TALLEST else file.with_suffix(f".{number}.png")
        clip = {"x": 0, "y": top, "width": width, "height": min(TALLEST, height - top), "scale": 1}
        picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        part.write_bytes(base64.b64decode(picture["data"]))


# ------------------------------------------------------------------------------------------------- what a reader does

def _digest(element) -> str:
    return hashlib.sha256((element.get_attribute("src") or "").encode()).hexdigest()


def try_sliders(driver: webdriver.Chrome) -> list[str]:
    """Move each slider of the page by the keyboard; its picture, its value and its description must follow."""
    problems = []
    for number, box in enumerate(driver.find_elements(By.CSS_SELECTOR, ".kb-slider")):
        knob, picture, value = (box.find_element(By.CSS_SELECTOR, s) for s in ("input[type=range]", "img", "output"))

        def state(picture=picture, value=value) -> tuple[str, str, str]:
            return _digest(picture), picture.get_attribute("alt"), value.text

        start, last = int(knob.get_attribute("value")), int(knob.get_attribute("max"))
        states = {state()}
        for key, steps in ((Keys.ARROW_LEFT, start), (Keys.ARROW_RIGHT, last)):
            for _ in range(steps):
                knob.send_keys(key)
                states.add(state())
        for part, what in enumerate(("pictures", "descriptions", "values")):
            if len({s[part] for s in states}) < last + 1:
                problems.append(f"slider {number}: {len({s[part] for s in states})} {what} at {last + 1} positions")
    return problems


def try_solutions(driver: webdriver.Chrome) -> list[str]:
    """Solutions are hidden until they are opened."""
    problems = []
    for box in driver.find_elements(By.CSS_SELECTOR, ".solution.dropdown, div.toggle.solution, .admonition.solution"):
        label = box.get_attribute("id") or "a solution"
        button = box.find_elements(By.CSS_SELECTOR, "button.toggle-button")
        inside = box.find_elements(By.CSS_SELECTOR, ".section, section, .solution-content, p:not(.admonition-title)")
        if not button:
            problems.append(f"{label} cannot be opened")
            continue
        if any(e.is_displayed() for e in inside):
            problems.append(f"{label} is in plain sight")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", button[0])
        button[0].send_keys(Keys.ENTER)
        time.sleep(0.1)
        if not any(e.is_displayed() for e in inside):
            problems.append(f"{label} stays hidden when it is opened from the keyboard")
    return problems


def try_theme(driver: webdriver.Chrome) -> list[str]:
    """The theme can be switched, and the page's background follows."""
    def background() -> str:
        return driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    buttons = [b for b in driver.find_elements(By.CSS_SELECTOR, ".theme-switch-button") if b.is_displayed()]
    if not buttons:
        return ["no button that switches the theme"]
    seen = set()
    for _ in range(3):
        buttons[0].click()
        time.sleep(0.4)
        seen.add(background())
    return [] if len(seen) > 1 else ["the theme does not change"]


def try_keyboard(driver: webdriver.Chrome) -> list[str]:
    """The first stop of the tabulator skips to the content; those after it can be seen."""
    body = driver.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    first = driver.execute_script("const e = document.activeElement; return [e.textContent.trim(), e.hash || '']")
    problems = [] if first[1] else [f"the first stop of the keyboard does not skip to the content, but is {first[0]!r}"]
    for _ in range(12):
        driver.switch_to.active_element.send_keys(Keys.TAB)
        hidden = driver.execute_script(
            "const e = document.activeElement, seen = x => { const r = x.getBoundingClientRect();"
            "  return r.width && r.height && getComputedStyle(x).visibility !== 'hidden'; };"
            "return e === document.body || [e, ...e.querySelectorAll('*')].some(seen) ? '' : e.outerHTML.slice(0, 100)")
        if hidden:
            problems.append(f"the keyboard stops at what cannot be seen: {hidden}")
    return problems


def try_search(driver: webdriver.Chrome, site: Path, word: str) -> list[str]:
    """Search lists pages, from a file as from a server."""
    visit(driver, (site / "search.html").as_uri() + f"?q={word}")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if driver.find_elements(By.CSS_SELECTOR, "#search-results li a"):
            return []
        time.sleep(0.1)
    return [f"search for {word!r} finds nothing"]


def main() -> int:
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "_build/html").resolve()
    forward = site / "index.html"       # sends the reader to the first page, and shows nothing itself
    chosen = [site / name for name in sys.argv[2:]] or [page for page in pages(site) if page != forward]
    if not chosen:
        print(f"no page in {site}; run: make book")
        return 1
    if not (shutil.which("chromium") or shutil.which("chromium-browser")) or not shutil.which("chromedriver"):
        print("pages: SKIPPED, for Chromium and its driver are not installed "
              "(Debian: apt-get install chromium chromium-driver)")
        return 0

    shots = site.parent / "shots"
    shutil.rmtree(shots, ignore_errors=True)
    shots.mkdir(parents=True)
    bad, began = 0, time.monotonic()

    def report(name: str, problems: list[str]) -> None:
        nonlocal bad
        bad += len(problems)
        for problem in problems:
            print(f"{name}: {problem}", flush=True)

    with browser() as driver:
        driver.get("about:blank")
        traffic(driver)                 # what Chromium does when it starts is no page's doing
        for page in chosen:
            name = str(page.relative_to(site).with_suffix(""))
            listing = name.startswith("_modules/")      # of source code, which Sphinx adds
            report(name, check_page(driver, page, None if listing else shots / name.replace("/", ".")))
        resize(driver, *DESKTOP)
        visit(driver, chosen[0].as_uri())
        report("theme", try_theme(driver))
        report("search", try_search(driver, site, "kernel"))
    print(f"pages: {len(chosen)} seen in {time.monotonic() - began:.0f} s, {bad} problems; "
          f"screenshots are in {shots.relative_to(Path.cwd()) if shots.is_relative_to(Path.cwd()) else shots}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
