"""The page in a real browser: what a person does, from the first screen to a restored PNG."""

import base64
import re
import time

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("requests")
pytestmark = pytest.mark.browser
SIZE = {"width": 1360, "height": 860}


@pytest.fixture
def open_page(chromium, client):
    """A function that opens the page in a new window; console errors fail the test."""
    contexts, faults = [], []

    def open(**options):
        context = chromium.new_context(**{"viewport": SIZE, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.goto(client.url)
        page.wait_for_selector("body[data-ready]")
        return page

    yield open
    for context in contexts:
        context.close()
    assert not [fault for fault in faults if "422" not in fault]  # an answer that the page shows


def until(page, condition, seconds=60):
    """Wait for an expression to be true. (wait_for_function needs eval, which the page's policy forbids.)"""
    end = time.time() + seconds
    while not page.evaluate(condition):
        assert time.time() < end, condition
        page.wait_for_timeout(30)


def generate(page, prompt, steps=2):
    """Type a prompt, press Ctrl-Enter and wait for the image: its id."""
    before = page.locator("#images li").count()
    page.fill("#prompt", prompt)
    page.evaluate(f"document.getElementById('steps').value = {steps}")
    page.press("#prompt", "Control+Enter")
    until(page, f"document.querySelectorAll('#images li').length > {before}")
    return page.locator("#images li").first.get_attribute("data-id")


def natural(page, selector):
    until(page, f"document.querySelector('{selector}').naturalWidth > 0")
    return page.evaluate(f"document.querySelector('{selector}').naturalWidth")


def test_from_the_first_screen_to_an_image_and_back_after_a_reload(open_page, client):
    for one in client.get("/api/images?limit=200").json()["images"]:
        client.delete(f"/api/images/{one['id']}")
    page = open_page()
    assert natural(page, "#shown") == 128 and page.locator("#samples button").count() == 6  # never an empty screen
    page.fill("#prompt", "a cat and a zebra")
    until(page, "document.getElementById('prompt-note').textContent.includes('zebra')")
    assert re.match(r"\d+ of 14 tokens", page.text_content("#prompt-note"))
    page.fill("#seed", "7")
    id = generate(page, "a cat", steps=40)
    assert int(page.get_attribute("body", "data-previews")) > 0
    assert "seed 7 · 40 steps" in page.text_content("#caption") and natural(page, "#shown") == 32
    page.click("#seed-keep")
    assert page.input_value("#seed") == "7"
    page.reload()
    page.wait_for_selector(f"#images li[data-id='{id}']")
    assert page.input_value("#prompt") == "a cat"
    with page.expect_download() as download:
        page.click("#actions >> text=Download")
    assert download.value.suggested_filename == "a-cat-7.png"
    page.click("#actions >> text=Settings")
    assert "Seed" in page.text_content("#facts")
    page.keyboard.press("Escape")
    page.click("#actions >> text=Delete")
    page.wait_for_selector(f"#images li[data-id='{id}']", state="detached")


def test_esc_stops_the_job_and_a_waiting_one_can_be_removed(open_page, client):
    page = open_page()
    page.fill("#num", "64")
    page.fill("#prompt", "a cat")
    page.evaluate("document.getElementById('steps').value = 60")
    page.click("#generate")
    page.wait_for_selector("#stop:not([hidden])")
    page.fill("#prompt", "a dog")
    page.click("#generate")
    page.click("#queue-list >> text=Remove")
    page.wait_for_selector("#queue", state="hidden")
    page.click("#stage")
    page.keyboard.press("Escape")
    page.wait_for_selector("#stop", state="hidden")
    assert client.get("/api/jobs").json() == {"jobs": []}


def drag(page, selector, start, end):
    box = page.locator(selector).bounding_box()
    page.mouse.move(box["x"] + start[0] * box["width"], box["y"] + start[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=4)
    page.mouse.up()


def test_a_mask_is_painted_undone_and_an_image_extended(open_page, client):
    page = open_page()
    generate(page, "a dog")
    page.click("#actions >> text=Start from it")
    page.click("#edit-open")
    bar = page.locator("header.bar").bounding_box()
    assert page.locator("#tool-paint").bounding_box()["y"] >= bar["y"] + bar["height"]  # no tool behind the bar
    drag(page, "#mask", (0.1, 0.2), (0.4, 0.2))
    drag(page, "#mask", (0.1, 0.8), (0.9, 0.8))
    page.click("#undo")
    request = form(page)
    assert request["mask_image"].startswith("data:image/png;base64,") and "outpaint" not in request
    page.focus(".handle.left")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    drag(page, ".handle.bottom", (0.5, 0.5), (0.5, 4))
    request = form(page)
    assert request["outpaint"]["left"] == 16 and request["outpaint"]["bottom"] % 8 == 0 < request["outpaint"]["bottom"]
    id = generate(page, "a cat")
    line = client.get(f"/api/images/{id}").json()
    assert line["width"] == 48 and line["height"] == 32 + request["outpaint"]["bottom"]
    page.click("#source-clear")
    assert "image" not in form(page)


def form(page):
    return page.evaluate("import('/static/form.js').then((form) => form.read())")


def drop(page, selector, path):
    """Drop a file on an element, as a file manager does."""
    script = """([text, name]) => {
        const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
        const moved = new DataTransfer();
        moved.items.add(new File([bytes], name, {type: 'image/png'}));
        return moved;
    }"""
    moved = page.evaluate_handle(script, [base64.b64encode(path.read_bytes()).decode(), path.name])
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event(selector, kind, {"dataTransfer": moved, "bubbles": True})


def test_a_dropped_png_restores_its_settings(open_page, client, tmp_path):
    job = client.draw(prompt="a red dog", seed=41, guidance_scale=2.5, sampler="euler", num_inference_steps=3)
    (tmp_path / "old.png").write_bytes(client.get(f"/images/{job['images'][0]}.png").content)
    page = open_page()
    drop(page, "#gallery-title", tmp_path / "old.png")
    until(page, "document.getElementById('prompt').value === 'a red dog'")
    restored = form(page)
    assert "image" not in restored
    assert (restored["seed"], restored["guidance_scale"], restored["sampler"]) == (41, 2.5, "euler")
    id = generate(page, "a red dog", steps=3)
    assert client.get(f"/images/{id}.png").content == (tmp_path / "old.png").read_bytes()
    page.fill("#prompt", "")
    drop(page, "#drop", tmp_path / "old.png")
    page.click("#restore")
    assert form(page)["image"].startswith("data:image/png;base64,") and form(page)["prompt"] == "a red dog"
    (tmp_path / "no.png").write_text("<svg onload=alert(1)>")
    page.set_input_files("#file", tmp_path / "no.png")
    page.wait_for_selector("#toast:not([hidden]) >> text=no image")


def test_a_grid_two_compared_and_settings_used_again(open_page, client):
    page = open_page()
    page.fill("#prompt", "<img src=x onerror=alert(1)> a cat")
    page.click("#grid-box > summary")
    page.select_option("#x-word", "steps")
    page.fill("#x-values", "1, 2")
    page.fill("#seed", "3")
    page.click("#generate")
    until(page, "document.getElementById('caption').textContent.includes('grid')")
    assert natural(page, "#shown") > 64
    assert page.locator("#stage img[src=x], #images img[src=x]").count() == 0
    page.click("#compare")
    page.locator("#images button").nth(1).click()
    page.locator("#images button").nth(2).click()
    assert "2  →  1" in page.text_content("#compare-list")
    page.keyboard.press("Escape")
    page.locator("#images button").nth(2).click()
    page.fill("#prompt", "")
    page.click("#actions >> text=Use again")
    assert form(page)["num_inference_steps"] == 1 and form(page)["seed"] == 3


def test_variations_and_hires_fix_are_asked_for_and_restored(open_page, client):
    page = open_page()
    page.fill("#seed", "5")
    page.click("#variation-box > summary")
    page.fill("#variation", "0.3")
    page.fill("#variation-seed", "9")
    page.click("#hires-box > summary")
    page.fill("#hires", "2")
    page.fill("#hires-steps", "3")
    page.click("#speed-box > summary")
    page.fill("#step-cache", "2")
    assert page.text_content("#hires-out") == "× 2" and page.text_content("#variation-out") == "30 %"
    line = client.get(f"/api/images/{generate(page, 'a cat')}").json()
    made = line["metadata"]
    assert (line["width"], made["variation_seed"], made["variation_strength"]) == (64, 9, 0.3)
    assert (made["hires_scale"], made["hires_steps"], made["hires_strength"], made["step_cache"]) == (2, 3, 0.7, 2)
    page.fill("#hires", "1")
    page.fill("#step-cache", "")
    page.fill("#variation", "0")
    page.fill("#width", "64")
    assert not [name for name in form(page) if name.startswith(("hires", "variation", "step"))]
    page.click("#actions >> text=Use again")
    again = form(page)
    assert (again["hires_scale"], again["hires_steps"], again["variation_seed"], again["variation_strength"]) == (
        2,
        3,
        9,
        0.3,
    )
    assert again["step_cache"] == 2
    assert (again["width"], again["height"]) == (32, 32)  # what is drawn first


def test_a_phone_light_and_dark_and_what_axe_finds(open_page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    generate(page, "a cat")
    assert page.locator("#generate").bounding_box()["y"] < 740
    page.set_viewport_size(SIZE)
    for summary in page.locator("details > summary").all():
        summary.click()
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        found = axe.run(page).response["violations"]
        assert not [one for one in found if one["impact"] in ("serious", "critical")], found
    page.click("#actions >> text=Start from it")
    page.click("#edit-open")
    found = axe.run(page).response["violations"]
    assert not [one for one in found if one["impact"] in ("serious", "critical")], found


def test_a_refusal_is_shown_and_a_token_is_asked_for(open_page, chromium, tiny_folder, tmp_path):
    page = open_page()
    page.fill("#prompt", "a cat")
    page.fill("#width", "33")
    page.click("#generate")
    page.wait_for_selector("#toast >> text=not a multiple of 8")
    import ldm

    token = "0123456789abcdef"
    served = ldm.web(tmp_path / "g", model=tiny_folder, port=0, block=False, token=token)
    context = chromium.new_context(viewport=SIZE)
    try:
        other = context.new_page()
        other.goto(served.url)
        other.fill("#token", token)
        other.click("text=Open")
        other.wait_for_selector("body[data-ready]")
        generate(other, "a cat")
        until(other, "document.querySelector('#shown').naturalWidth == 32")  # previews are smaller
        assert other.get_attribute("#shown", "src").startswith("blob:")
        fresh = context.new_page()
        fresh.goto(served.page)
        fresh.wait_for_selector("body[data-ready]")
        assert "token" not in fresh.url
    finally:
        context.close()
        served.close()
