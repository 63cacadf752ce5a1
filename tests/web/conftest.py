"""A real server on loopback with the tiny model, and a headless Chromium."""

import os
import shutil

import pytest


class Client:
    """requests with the server's address in front, and a time limit."""

    def __init__(self, server):
        import requests

        self.server, self.url = server, server.url
        self.session = requests.Session()

    def __call__(self, method, path, **options):
        return self.session.request(method, self.url + path, timeout=120, **options)

    def get(self, path, **options):
        return self("GET", path, **options)

    def post(self, path, value=None, **options):
        return self("POST", path, json=value, **options)

    def delete(self, path, **options):
        return self("DELETE", path, **options)

    def draw(self, **fields):
        """A job of /api/jobs when it is over."""
        answer = self.post("/api/jobs", {"prompt": "a cat", "num_inference_steps": 2, **fields})
        assert answer.status_code == 201, answer.text
        return self.wait(answer.json()["id"])

    def wait(self, id):
        job = self.server.context.queue.find(id)
        if job is not None:
            assert job.finished.wait(240)
        return self.get(f"/api/jobs/{id}").json()


def serve(folder, model, **options):
    import ldm

    return ldm.web(folder, model=model, port=0, block=False, debug=True, **options)


@pytest.fixture(scope="module")
def client(tiny_folder, tmp_path_factory):
    served = serve(tmp_path_factory.mktemp("web") / "gallery", [tiny_folder, "default"])
    yield Client(served)
    served.close()


@pytest.fixture(scope="session")
def chromium():
    """A browser; without one the test is skipped, or fails where LDM_BROWSER=required."""
    absent = pytest.fail if os.environ.get("LDM_BROWSER") == "required" else pytest.skip
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        absent("there is no Chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
