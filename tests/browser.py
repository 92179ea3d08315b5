"""A headless Chromium, driven over its W3C WebDriver protocol: nothing but urllib.

    with open_browser((1280, 800)) as browser:
        browser.go("http://127.0.0.1:8000/")
        browser.wait("return document.title")
"""
import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

DRIVER = shutil.which("chromedriver")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)
MISSING = "" if DRIVER and CHROMIUM else (
    "no browser: chromium and chromedriver are not installed (Debian: chromium, chromium-driver)")
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "Up": "\ue013", "Down": "\ue015"}


class Browser:
    """One window. Scripts run in its page and return what JSON can hold."""

    def __init__(self, port: int, size: tuple[int, int], dark: bool):
        self.root = f"http://127.0.0.1:{port}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--window-size={size[0]},{size[1]}", "--hide-scrollbars", "--disable-extensions",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 *["--force-dark-mode"] * dark]
        options = {"binary": CHROMIUM, "args": flags}
        made = self.ask("", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})
        self.root += "/" + made["sessionId"]

    def ask(self, path: str, body: dict | None = None, method: str = "POST"):
        data = None if method == "GET" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.root + path, data, method=method,
                                         headers={"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def go(self, url: str) -> None:
        self.ask("/url", {"url": url})

    def run(self, script: str, *arguments):
        return self.ask("/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments, seconds: float = 60):
        """What a script returns, as soon as that is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(script, *arguments)):
            assert time.monotonic() < end, f"never true: {script} {arguments}\n{self.text()}"
            time.sleep(0.03)
        return found

    def text(self, selector: str = "body") -> str:
        return self.run("return document.querySelector(arguments[0])?.innerText || ''", selector)

    def see(self, words: str, selector: str = "body") -> None:
        """Wait for words that can be seen, on a page that waits for nothing itself."""
        self.wait("const node = document.querySelector(arguments[0]);"
                  "return node?.getClientRects().length && node.innerText.includes(arguments[1])"
                  "&& document.body.ariaBusy !== 'true'", selector, words)

    def click(self, selector: str) -> None:
        found = self.ask("/element", {"using": "css selector", "value": selector})
        self.ask(f"/element/{next(iter(found.values()))}/click")

    def press(self, *keys: str) -> None:
        """Keys, by name or as text, where the page has its focus."""
        self.wait("return document.hasFocus()")
        typed = [key for word in keys for key in ([KEYS[word]] if word in KEYS else word)]
        actions = [{"type": kind, "value": key} for key in typed for kind in ("keyDown", "keyUp")]
        self.ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def drag(self, start: str, end: tuple[str, float]) -> None:
        """From the middle of one element to a share of the height of another."""
        middle = ("const box = document.querySelector(arguments[0]).getBoundingClientRect();"
                  "return [box.left + box.width / 2, box.top + box.height * arguments[1]]")
        (x, y), (to_x, to_y) = self.run(middle, start, 0.5), self.run(middle, *end)
        moves = [{"type": "pointerMove", "x": round(x), "y": round(y)},
                 {"type": "pointerDown", "button": 0},
                 {"type": "pointerMove", "x": round(to_x), "y": round(to_y - 3), "duration": 30},
                 {"type": "pointerMove", "x": round(to_x), "y": round(to_y), "duration": 30},
                 {"type": "pointerUp", "button": 0}]
        self.ask("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("/screenshot", method="GET")))

    def faults(self) -> list[str]:
        """What the page's console has against it: errors, and what its policy has forbidden."""
        return [entry["message"] for entry in self.ask("/se/log", {"type": "browser"})
                if entry["level"] == "SEVERE"]


@contextlib.contextmanager
def open_browser(size: tuple[int, int] = (1280, 800), dark: bool = False):
    """A browser with a fresh profile; both end with the block."""
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL, env=dict(os.environ, LC_ALL="C")) as driver:
        try:
            port = next(int(found[1]) for line in driver.stdout
                        if (found := re.search(r"started successfully on port (\d+)", line)))
            browser = Browser(port, size, dark)
            try:
                yield browser
            finally:
                browser.ask("", method="DELETE")
        finally:
            driver.terminate()
