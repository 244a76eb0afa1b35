"""The product's web page in headless Chromium."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.boot.samepage_site import TIMEOUT, Client, Site, administrator, clients, site

pytestmark = pytest.mark.boot
__all__ = ["administrator", "clients", "site"]

PASSWORD = "correct horse battery staple"
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1280,860",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--lang=en",
)  # fmt: skip


class Page:
    """What a person does with the page. `shots` is where pictures go, None for no pictures."""

    def __init__(self, driver: webdriver.Chrome, url: str, shots: Path | None) -> None:
        self.driver = driver
        self.url = url.rstrip("/")
        self._shots = shots

    def open(self, path: str = "/") -> None:
        self.driver.get("about:blank")  # a change of the fragment alone would not load the page anew
        self.driver.get(self.url + path)

    def wait(self, shown: str) -> WebElement:
        """The first visible element for a CSS selector, as soon as there is one."""
        found = WebDriverWait(self.driver, TIMEOUT, 0.1).until(lambda _: self._visible(shown), f"no {shown} was shown")
        assert found is not None
        return found

    def wait_text(self, css: str, text: str) -> None:
        def there(_: object) -> bool:
            return text in " ".join(self.texts(css))

        WebDriverWait(self.driver, TIMEOUT, 0.1).until(there, f"{text!r} did not appear in {css}: {self.texts(css)}")

    def texts(self, css: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.innerText)"
        found: list[str] = self.driver.execute_script(script, css)
        return found

    def fill(self, css: str, text: str) -> WebElement:
        field = self.wait(css)
        field.clear()
        field.send_keys(text)
        return field

    def click(self, css: str) -> None:
        self.wait(css).click()

    def sign_in(self, login: str, password: str) -> None:
        self.fill("#sign-in [name=login]", login)
        self.fill("#sign-in [name=password]", password).send_keys(Keys.ENTER)

    def write_item(self, title: str, body: str) -> None:
        self.click("#new")
        self.fill("#editor [name=title]", title)
        self.fill("#editor [name=body]", body)
        self.click("#editor .primary")
        self.wait_text("#item h1", title)

    def shot(self, name: str) -> None:
        if self._shots is not None:
            self._shots.mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(self._shots / f"{name}.png"))

    def complaints(self) -> list[str]:
        """What the browser's console holds against the page."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def _visible(self, css: str) -> WebElement | None:
        return next((one for one in self.driver.find_elements(By.CSS_SELECTOR, css) if one.is_displayed()), None)


@pytest.fixture
def page(site: Site, tmp_path: Path) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.accept_insecure_certs = True
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    driver.set_page_load_timeout(TIMEOUT)
    shots = os.environ.get("SAMEPAGE_SCREENSHOTS", "")
    try:
        yield Page(driver, site.url, Path(shots) if shots else None)
    finally:
        driver.quit()


@pytest.fixture
def signed_in(page: Page, administrator: Client) -> Page:
    """The administrator at work."""
    page.driver.get(page.url + "/logo.svg")
    for name, value in administrator.cookies.items():
        page.driver.add_cookie({"name": name, "value": value, "path": "/", "secure": True, "httpOnly": True})
    page.open()
    page.wait("#workplace")
    return page


def test_signing_in_and_changing_the_one_time_password(site: Site, page: Page) -> None:
    one_time = site.one_time_password()
    page.open()
    page.sign_in("admin", "wrong")
    page.wait_text("#sign-in .fault", "The name or the password is wrong.")
    page.shot("sign-in")
    page.sign_in("admin", one_time)
    page.wait("#change-password")
    page.fill("#change-password [name=password]", PASSWORD)
    page.fill("#change-password [name=again]", PASSWORD + "!").send_keys(Keys.ENTER)
    page.wait_text("#change-password .fault", "The two passwords differ.")
    page.shot("change-password")
    page.fill("#change-password [name=again]", PASSWORD).send_keys(Keys.ENTER)
    page.wait("#workplace")
    page.driver.refresh()
    page.wait_text(".who", "Administrator")
    page.click("#sign-out")
    page.wait("#sign-in")
    page.sign_in("admin", PASSWORD)
    page.wait("#workplace")
    assert page.complaints() == []


def test_writing_editing_commenting_searching_and_deleting(signed_in: Page) -> None:
    page, key = signed_in, "k" + secrets.token_hex(5)
    page.write_item(f"Release party {key}", "Cake and <b>candles</b>.\n\nBring a friend.")
    assert page.texts("#body") == ["Cake and <b>candles</b>.\n\nBring a friend."], "text is shown, never run"
    page.write_item(f"Reading list {key}", "Three books about gardens.")

    page.click("#edit")
    page.fill("#editor [name=title]", f"Reading list for spring {key}")
    page.click("#editor .primary")
    page.wait_text("#item h1", "for spring")
    page.wait_text('[data-text="meta"]', "changed by Administrator")

    page.fill("#comment textarea", "I have the second one.")
    page.click("#comment .primary")
    page.wait_text("#comments", "I have the second one.")
    page.wait_text("#stream li:first-child", f"commented on Reading list for spring {key}")
    page.wait_text("#items li", "1 comment")
    page.shot("item")

    page.fill("#query", f"{key} gard")
    page.wait_text("#count", "1 item found")
    page.wait_text("#items mark", "gardens")
    page.shot("search")
    page.fill("#query", f"{key} cake")
    page.wait_text("#items li", "Release party")
    page.click("#items button")
    page.wait_text("#item h1", "Release party")
    page.click("#delete")
    page.wait("#confirm")
    page.click("#confirm .danger")
    page.wait("#welcome")
    page.wait_text("#stream li:first-child", f"deleted Release party {key}")
    assert page.complaints() == []


def test_an_overtaken_writer_chooses(signed_in: Page, administrator: Client) -> None:
    page, rival = signed_in, administrator
    page.write_item("Menu " + secrets.token_hex(4), "soup")
    item = rival.call("Items.getList")["items"][0]
    page.click("#edit")
    rival.call("Items.update", id=item["id"], version=1, body="salad")
    page.fill("#editor [name=body]", "stew")
    page.click("#editor .primary")
    page.wait_text("#conflict", "Administrator has changed this item while you were writing.")
    page.shot("conflict")
    page.click("#keep-mine")
    page.wait_text("#body", "stew")
    assert rival.call("Items.get", id=item["id"])["version"] == 3

    page.click("#edit")
    rival.call("Items.update", id=item["id"], version=3, body="bread")
    page.click("#editor .primary")
    page.click("#take-theirs")
    page.wait_text("#body", "bread")


def test_inviting_and_joining(site: Site, signed_in: Page) -> None:
    page, address = signed_in, f"{secrets.token_hex(5)}@example.com"
    page.click("#invite-open")
    page.fill("#invite [name=name]", "Nina Novak")
    page.fill("#invite [name=email]", address)
    page.shot("invite")
    page.click("#invite .primary")
    page.wait_text("#stream li:first-child", "invited Nina Novak")
    link = site.invitation(address)

    page.click("#sign-out")
    page.wait("#sign-in")
    path = link.removeprefix(page.url)
    page.open(path)
    page.wait_text("#invitation h1", "Welcome, Nina Novak")
    page.shot("invitation")
    page.fill("#invitation [name=password]", PASSWORD)
    page.fill("#invitation [name=again]", PASSWORD).send_keys(Keys.ENTER)
    page.wait_text(".who", "Nina Novak")
    assert page.driver.current_url == page.url + "/", "the secret leaves the address bar"
    assert not page.driver.find_element(By.ID, "invite-open").is_displayed()
    page.open(path)
    page.wait_text("#invitation-lost", "This invitation was used already")
    assert page.complaints() == []


def test_the_page_can_be_used_without_a_mouse_and_by_screen_readers(signed_in: Page) -> None:
    page = signed_in
    nameless = page.driver.execute_script("""
        const controls = document.querySelectorAll("input:not([hidden]), textarea, button, dialog, nav, aside");
        const named = (one) => one.labels?.length || one.textContent.trim() || one.getAttribute("aria-label");
        return [...controls].filter((one) => !named(one)).map((one) => one.outerHTML);
    """)
    assert nameless == []
    assert page.driver.execute_script("return document.documentElement.lang") == "en"
    focus = webdriver.ActionChains(page.driver)
    page.driver.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    order = []
    for _ in range(6):
        focus.send_keys(Keys.TAB).perform()
        focused = page.driver.switch_to.active_element
        order.append(focused.get_attribute("id") or focused.text)
    assert [one for one in ("query", "invite-open", "sign-out", "new") if one not in order] == []


def test_a_lost_session_leads_back_to_the_sign_in(site: Site, signed_in: Page) -> None:
    page = signed_in
    site.one_time_password()
    page.click("#new")
    page.fill("#editor [name=title]", "Too late")
    page.click("#editor .primary")
    page.wait("#sign-in")
    page.wait_text("#banner", "You were signed out.")


def test_the_page_reports_its_start(site: Site, signed_in: Page) -> None:
    page = signed_in
    page.wait(".who")
    lines = site.run("tail -n 60 /var/lib/samepage/calls/calls.jsonl").splitlines()
    assert "Bootstrap.bootstrap" in {json.loads(line)["method"] for line in lines}


def test_it_works_on_a_telephone_and_in_the_dark(signed_in: Page) -> None:
    page = signed_in
    page.write_item("A title" + " that is long" * 12, "text " * 200 + "x" * 300)
    page.shot("wide")
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [dark]})
    time.sleep(0.5)  # colours change softly
    page.shot("dark")
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    page.shot("telephone")
    width = page.driver.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390, "nothing is wider than the screen"
