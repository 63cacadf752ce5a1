"""The HTTP APIs with a real server and a tiny model: ours, A1111's, OpenAI's."""

import base64
import io
import json

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import Pipeline
from ldm.images import encode, read_metadata
from ldm.web import sdapi_fields

pytest.importorskip("uvicorn")
pytest.importorskip("requests")
TINY = "tiny"


def image_of(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def as_text(image):
    return base64.b64encode(encode(image)).decode()


def square(colour=(200, 40, 40)):
    return Image.new("RGB", (32, 32), colour)


# Ours


def test_a_job_draws_what_generate_draws(client, tiny_folder):
    job = client.draw(num_images=3, seed=7, guidance_scale=3.0, negative_prompt="a dog")
    assert job["state"] == "done" and len(job["images"]) == 3
    expected = Pipeline("a cat", model=tiny_folder, negative_prompt="a dog").generate(
        num_images=3, seed=7, num_inference_steps=2, guidance_scale=3.0
    )
    for id, image in zip(sorted(job["images"]), expected):
        drawn = client.get(f"/images/{id}.png")
        assert drawn.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(drawn.content)).tobytes() == image.tobytes()


def test_what_a_request_does_not_say_is_the_models_own(client, tiny_folder):
    job = client.post("/api/jobs", {"prompt": "a dog", "seed": 1}).json()
    (id,) = client.wait(job["id"])["images"]
    found = client.get(f"/api/images/{id}").json()["metadata"]
    own = Pipeline("a dog", model=tiny_folder).generate(seed=1).metadata[0]
    assert {name: found[name] for name in own} == json.loads(json.dumps(own))


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"prompt": 3}, "prompt: expected a text"),
        ({"model": "/etc/passwd"}, "there is no model"),
        ({"vae": "x"}, "there is no vae 'x'"),
        ({"lora": ["../x"]}, "there is no lora '../x'"),
        ({"device": "cpu"}, "chosen where the server is started"),
        ({"latents": [1]}, "latents: is not available"),
        ({"controlnet": "x"}, "controlnet: is not available"),
        ({"num_images": 65}, "65 images are more than 64"),
        ({"steps": 201}, "201 steps are more than 200"),
        ({"width": 8192, "height": 8192}, "too many pixels"),
        ({"width": 33}, "not a multiple of 8"),
        ({"image": "http://127.0.0.1/x.png"}, "URLs are not fetched"),
        ({"image": "file:///etc/passwd"}, "URLs are not fetched"),
        ({"image": {"id": "../../etc/passwd"}}, "there is no such image"),
        ({"image": "aGVsbG8="}, "image: "),
        ({"grid": ["model=/etc,default"]}, "no axis of a grid"),
        ({"grid": ["image=/etc/passwd,x"]}, "no axis of a grid"),
        ({"grid": ["steps=1-99"]}, "99 images are more than 64"),
        ({"sampler": "eulr"}, "did you mean"),
        ({"prompt": "a " * 5000}, "more than 8,000 characters"),
        ({"prompt": "a <lora:x:1>"}, "lora"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_in_one_line_without_paths(fields, where, client, tiny_folder):
    answer = client.post("/api/jobs", {"prompt": "a cat", **fields})
    assert answer.status_code == 422 and where in answer.json()["error"]
    assert "\n" not in answer.json()["error"] and str(tiny_folder.parent) not in answer.text
    assert client.get("/api/jobs").json() == {"jobs": []}


def test_a_grid_is_its_images_and_a_sheet(client):
    job = client.draw(grid=["steps=1,2", "cfg=1,4"], seed=5)
    assert job["state"] == "done" and len(job["images"]) == 5
    kinds = {id: client.get(f"/api/images/{id}").json() for id in job["images"]}
    (sheet,) = [one for one in kinds.values() if one["kind"] == "grid"]
    cells = [one["metadata"] for one in kinds.values() if one["kind"] == "image"]
    assert sheet["width"] > 64 and sheet["metadata"]["request"]["grid"] == ["steps=1,2", "cfg=1,4"]
    drawn = {(one["num_inference_steps"], one["guidance_scale"], one["seed"]) for one in cells}
    assert drawn == {(1, 1.0, 5), (1, 4.0, 5), (2, 1.0, 5), (2, 4.0, 5)}


def test_inpainting_keeps_what_is_not_painted_and_outpainting_grows(client):
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    job = client.draw(image=as_text(square()), mask_image=as_text(mask.convert("RGB")), strength=0.5, seed=1)
    drawn = Image.open(io.BytesIO(client.get(f"/images/{job['images'][0]}.png").content))
    assert drawn.crop((16, 0, 32, 32)).tobytes() == square().crop((16, 0, 32, 32)).tobytes()
    assert drawn.crop((0, 0, 16, 32)).tobytes() != square().crop((0, 0, 16, 32)).tobytes()
    job = client.draw(image={"id": job["images"][0]}, outpaint={"left": 16, "bottom": 8}, seed=1)
    line = client.get(f"/api/images/{job['images'][0]}").json()
    assert (line["width"], line["height"]) == (48, 40)


def hole():
    """The image of `square` with its left half erased."""
    image = square().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    return image


def stroke():
    """A red stroke over the left half of a transparent layer."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 16, 32))
    return image


LEFT, RIGHT = (0, 0, 16, 32), (16, 0, 32, 32)


def same(box, image):
    """Whether `image` is `square` within a box, to the bit."""
    return image.crop(box).tobytes() == square().crop(box).tobytes()


@pytest.mark.parametrize("mask", [hole, stroke])
def test_a_mask_is_read_by_its_transparency_as_generate_reads_it(mask, client, tiny_folder):
    job = client.draw(image=as_text(square()), mask_image=as_text(mask()), strength=0.5, seed=1)
    drawn = Image.open(io.BytesIO(client.get(f"/images/{job['images'][0]}.png").content))
    assert same(RIGHT, drawn) and not same(LEFT, drawn)
    given = {"image": square(), "mask_image": mask(), "strength": 0.5, "seed": 1, "num_inference_steps": 2}
    assert Pipeline("a cat", model=tiny_folder).generate(**given)[0].tobytes() == drawn.tobytes()


def test_events_of_a_job_end_with_it_and_hold_previews(client):
    job = client.post("/api/jobs", {"prompt": "a cat", "num_inference_steps": 30, "num_images": 2}).json()
    kinds, states, previews = set(), [], 0
    with client("GET", f"/api/jobs/{job['id']}/events", stream=True) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        kind = None
        for line in stream.iter_lines(decode_unicode=True):
            if line.startswith("event: "):
                kind = line[7:]
                kinds.add(kind)
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                states.append(data.get("state")) if kind == "job" else None
                previews += len(data.get("previews", ()))
    assert states[-1] == "done" and {"job", "image", "progress"} <= kinds and previews >= 2


def test_stopping_ends_a_job_that_runs_and_one_that_waits(client):
    first = client.post("/api/jobs", {"prompt": "a cat", "num_inference_steps": 200, "num_images": 64}).json()
    second = client.post("/api/jobs", {"prompt": "a dog", "num_images": 4}).json()
    assert [job["id"] for job in client.get("/api/jobs").json()["jobs"]] == [first["id"], second["id"]]
    assert client.delete(f"/api/jobs/{second['id']}").json()["stopped"]
    assert client.get(f"/api/jobs/{second['id']}").json()["state"] == "cancelled"
    assert client.delete("/api/jobs").json() == {"stopped": 1}
    assert client.wait(first["id"])["state"] == "cancelled"
    assert client.delete("/api/jobs/0123456789abcdef").status_code == 404


def test_the_gallery_pages_deletes_and_names_downloads(client):
    job = client.draw(prompt="A Cat / ../ on red!", num_images=3, seed=11)
    page = client.get("/api/images?limit=2").json()
    assert len(page["images"]) == 2 and page["more"]
    rest = client.get(f"/api/images?limit=200&before={page['images'][-1]['id']}").json()["images"]
    assert not {one["id"] for one in rest} & {one["id"] for one in page["images"]}
    id = sorted(job["images"])[0]
    named = client.get(f"/images/{id}.png?download=1").headers["content-disposition"]
    assert named == 'attachment; filename="a-cat-on-red-11.png"'
    assert client.delete(f"/api/images/{id}").json()["deleted"]
    assert client.get(f"/images/{id}.png").status_code == 404
    assert client.delete(f"/api/images/{id}").status_code == 404


def test_prompts_are_counted_and_unknown_words_are_named(client):
    found = client.post("/api/prompt", {"prompt": "a cat, (zebra:1.2) [", "negative_prompt": "a dog"}).json()
    assert found["prompt"]["unknown_words"] == ["zebra"] and found["prompt"]["chunk"] == 14
    assert found["prompt"]["remarks"] and found["negative_prompt"]["tokens"] == 2
    wrong = client.post("/api/prompt", {"prompt": "<lora:x"}).json()
    assert "not closed" in wrong["prompt"]["error"]


def test_a_png_brings_its_settings_back_and_they_draw_it_again(client):
    job = client.draw(seed=5, guidance_scale=2.5, sampler="euler", negative_prompt="a dog")
    data = client.get(f"/images/{job['images'][0]}.png").content
    found = client.post("/api/read", {"image": base64.b64encode(data).decode()}).json()
    assert found["fields"]["seed"] == 5 and found["fields"]["model"] == TINY and found["notes"] == []
    again = client.wait(client.post("/api/jobs", found["fields"]).json()["id"])
    assert client.get(f"/images/{again['images'][0]}.png").content == data
    foreign = io.BytesIO()
    text = PngInfo()
    text.add_text("parameters", "a dog\nSteps: 3, Sampler: Euler a, CFG scale: 5, Seed: 9, Size: 32x32, Model: other")
    square().save(foreign, "PNG", pnginfo=text)
    found = client.post("/api/read", {"image": base64.b64encode(foreign.getvalue()).decode()}).json()
    assert found["fields"]["sampler"] == "euler_ancestral" and found["fields"]["seed"] == 9
    assert any("other, which is not here" in note for note in found["notes"])
    text = PngInfo()
    text.add_text("parameters", json.dumps({"sui_image_params": {"prompt": "a dog", "seed": 4, "steps": 3}}))
    swarm = io.BytesIO()
    square().save(swarm, "PNG", pnginfo=text)
    found = client.post("/api/read", {"image": base64.b64encode(swarm.getvalue()).decode()}).json()
    assert (found["fields"]["prompt"], found["fields"]["seed"], found["fields"]["num_inference_steps"]) == (
        "a dog",
        4,
        3,
    )
    assert client.post("/api/read", {"image": as_text(square())}).status_code == 422


@pytest.mark.parametrize(("model", "spacing"), [("default", None), (TINY, "karras")])
def test_what_a_text_of_a1111_says_can_be_asked_for_with_a_flow_model_too(model, spacing, client):
    """Such a text means a spacing always, which the shipped model refuses."""
    line = f"Steps: 3, Sampler: DPM++ 2M Karras, CFG scale: 5, Seed: 9, Size: 32x32, Model: {model}, RNG: CPU"
    text, file = PngInfo(), io.BytesIO()
    text.add_text("parameters", f"a dog\n{line}")
    square().save(file, "PNG", pnginfo=text)
    found = client.post("/api/read", {"image": base64.b64encode(file.getvalue()).decode()}).json()
    assert found["fields"].get("spacing") == spacing and found["fields"]["model"] == model
    assert ("not repeated: spacing: karras (a flow model has its own)" in found["notes"]) == (spacing is None)
    assert client.server.context.reader.read(found["fields"]).steps == [3]


# A1111's


def test_an_a1111_client_draws(client, tiny_folder):
    sent = {"prompt": "a dog", "steps": 3, "seed": 5, "batch_size": 2, "sampler_name": "Euler a", "cfg_scale": 4,
            "width": 32, "height": 32, "styles": [], "restore_faces": False, "override_settings": {}}  # fmt: skip
    before = len(client.get("/api/images").json()["images"])
    answer = client.post("/sdapi/v1/txt2img", sent).json()
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [5, 6] and info["sampler_name"] == "Euler a" and len(answer["images"]) == 2
    assert answer["parameters"] == sent
    expected = Pipeline("a dog", model=tiny_folder).generate(
        num_images=2, seed=5, num_inference_steps=3, sampler="euler_ancestral", guidance_scale=4
    )
    assert [image_of(text).tobytes() for text in answer["images"]] == [image.tobytes() for image in expected]
    assert len(client.get("/api/images").json()["images"]) == before  # not kept unless it says so
    text = client.post("/sdapi/v1/png-info", {"image": answer["images"][0]}).json()["info"]
    assert text == info["infotexts"][0] and "Steps: 3, Sampler: Euler a" in text


def test_a1111s_img2img_with_a_mask(client):
    mask = Image.new("RGB", (32, 32))
    mask.paste((255, 255, 255), (0, 0, 8, 32))
    sent = {"prompt": "a cat", "steps": 4, "init_images": ["data:image/png;base64," + as_text(square())], "seed": 1,
            "mask": as_text(mask), "mask_blur": 0, "denoising_strength": 0.5, "inpainting_fill": 1}  # fmt: skip
    drawn = image_of(client.post("/sdapi/v1/img2img", sent).json()["images"][0])
    assert drawn.crop((8, 0, 32, 32)).tobytes() == square().crop((8, 0, 32, 32)).tobytes()
    inverted = image_of(client.post("/sdapi/v1/img2img", {**sent, "inpainting_mask_invert": 1}).json()["images"][0])
    assert inverted.crop((0, 0, 8, 32)).tobytes() == square().crop((0, 0, 8, 32)).tobytes()


@pytest.mark.parametrize(
    ("mask", "invert", "kept", "painted"),
    [(stroke, 0, RIGHT, LEFT), (stroke, 1, LEFT, RIGHT), (hole, 0, LEFT, RIGHT), (hole, 1, RIGHT, LEFT)],
)
def test_a_mask_of_an_a1111_client_is_painted_where_it_is_opaque(mask, invert, kept, painted, client):
    """A1111's create_binary_mask takes the alpha channel where it varies, of a hole as of a stroke."""
    sent = {"prompt": "a cat", "steps": 4, "init_images": [as_text(square())], "mask": as_text(mask()), "seed": 1}
    sent |= {"denoising_strength": 0.5, "inpainting_mask_invert": invert}
    drawn = image_of(client.post("/sdapi/v1/img2img", sent).json()["images"][0])
    assert same(kept, drawn) and not same(painted, drawn)


def fields_of(client, **given):
    return sdapi_fields.fields_of({"prompt": "a cat", **given}, sdapi_fields.TXT2IMG, client.server.context.catalog)


@pytest.mark.parametrize(
    ("given", "sampler"),
    [
        ({"sampler_name": "DPM++ 2M", "sampler_index": "Euler a"}, "DPM++ 2M"),  # what webuiapi sends always
        ({"sampler_name": "", "sampler_index": "Euler a"}, "Euler a"),
        ({"sampler_index": "Euler a"}, "Euler a"),
        ({}, None),
    ],
)
def test_the_name_of_a_sampler_goes_before_its_index(given, sampler, client):
    assert fields_of(client, **given).get("sampler") == sampler


FLOW = {"override_settings": {"sd_model_checkpoint": "default"}}


@pytest.mark.parametrize(
    ("given", "spacing"),
    [
        ({"sampler_name": "DPM++ 2M", "scheduler": "Automatic"}, "karras"),
        ({"sampler_name": "DPM++ 2M SDE", "scheduler": "automatic"}, "exponential"),
        ({"sampler_name": "Euler a", "scheduler": "automatic"}, "linspace"),
        ({"sampler_name": "LCM", "scheduler": "automatic"}, None),
        ({"sampler_name": "DPM++ 2M Exponential", "scheduler": "automatic"}, None),  # the name says it
        ({"sampler_name": "DPM++ 2M", "scheduler": "Beta"}, "Beta"),
        ({"sampler_name": "DPM++ 2M"}, None),  # the model's own
        ({"scheduler": "automatic"}, None),
        ({"sampler_name": "DPM++ 2M", "scheduler": "automatic", **FLOW}, None),  # the default model has its own
    ],
)
def test_an_automatic_schedule_is_a1111s(given, spacing, client):
    assert fields_of(client, **given).get("spacing") == spacing


@pytest.mark.parametrize(
    ("given", "first", "second"),
    [
        ({"hr_second_pass_steps": 10, "denoising_strength": 0.5}, 20, 10),
        ({"hr_second_pass_steps": 10, "denoising_strength": 0.7}, 20, 10),
        ({"hr_second_pass_steps": 0, "denoising_strength": 0.5}, 20, 20),
        ({"denoising_strength": 0.05}, 20, 20),  # of 400, more than one run may have
        ({"hr_second_pass_steps": 3}, 20, 3),
    ],
)
def test_the_second_pass_of_an_a1111_client_has_the_steps_that_it_asks_for(given, first, second, client):
    fields = fields_of(client, enable_hr=True, steps=20, **given)
    request = client.server.context.reader._check(fields)
    assert [run.steps for run in request.settings.runs] == [first, second]
    assert request.settings.hires_strength == given.get("denoising_strength", 0.7)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"enable_hr": True, "hr_second_pass_steps": 201}, "hr_second_pass_steps: 201 is outside"),
        ({"enable_hr": True, "denoising_strength": 0}, "denoising_strength"),
        ({"override_settings": {"sd_model_checkpoint": ["x"]}}, "there is no model"),
        ({"sampler_name": "Eulr", "scheduler": "automatic"}, "unknown sampler"),
        ({"stepps": 4}, "did you mean 'steps'"),
        ({"restore_faces": True}, "restore_faces: True is not supported"),
        ({"tiling": True}, "tiling"),
        ({"alwayson_scripts": {"x": 1}}, "there are no scripts here"),
        ({"enable_hr": True, "hr_upscaler": "Latent"}, "only Lanczos"),
        ({"override_settings": {"sd_lora": "x"}}, "override_settings.sd_lora"),
        ({"override_settings": {"sd_model_checkpoint": "x"}}, "there is no model 'x'"),
        ({"batch_size": 1000}, "batch_size"),
        ({"scheduler": "Karas"}, "did you mean 'karras'"),
    ],
)
def test_a1111s_fields_that_are_not_here_are_refused(fields, said, client):
    answer = client.post("/sdapi/v1/txt2img", {"prompt": "a cat", **fields})
    assert answer.status_code == 422 and said in answer.json()["detail"]


def test_a1111s_lists_options_and_progress(client):
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == TINY
    assert {"Euler a", "DPM++ 2M"} <= {one["name"] for one in client.get("/sdapi/v1/samplers").json()}
    assert [one["model_name"] for one in client.get("/sdapi/v1/sd-models").json()] == [TINY, "default"]
    assert any(one["name"] == "karras" for one in client.get("/sdapi/v1/schedulers").json())
    assert client.post("/sdapi/v1/options", {"sd_model_checkpoint": f"{TINY} [1234]"}).status_code == 200
    assert client.post("/sdapi/v1/options", {"sd_model_checkpoint": "default"}).status_code == 422
    assert client.get("/sdapi/v1/progress").json()["progress"] == 0
    job = client.post("/api/jobs", {"prompt": "a cat", "num_inference_steps": 200, "num_images": 64}).json()
    assert client.post("/sdapi/v1/interrupt").status_code == 200
    assert client.wait(job["id"])["state"] in ("cancelled", "queued", "running")
    client.delete(f"/api/jobs/{job['id']}")
    client.wait(job["id"])


# OpenAI's


def test_the_openai_client_draws_and_edits(client):
    openai = pytest.importorskip("openai")
    api = openai.OpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0, timeout=60)
    drawn = api.images.generate(model=TINY, prompt="a cat", n=2, size="32x24", extra_body={"seed": 1, "steps": 2})
    assert [image_of(one.b64_json).size for one in drawn.data] == [(32, 24)] * 2
    linked = api.images.generate(prompt="a cat", response_format="url", extra_body={"steps": 2})
    assert client("GET", linked.data[0].url.removeprefix(client.url)).headers["content-type"] == "image/png"
    clear = square().convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 16, 32))
    file = io.BytesIO()
    clear.save(file, "PNG")
    edited = api.images.edit(image=("a.png", file.getvalue()), prompt="a dog", extra_body={"steps": 2})
    assert image_of(edited.data[0].b64_json).crop((16, 0, 32, 32)).tobytes() == square().crop((16, 0, 32, 32)).tobytes()
    assert [model.id for model in api.models.list()] == [TINY, "default"]
    for wrong in ({"model": "dall-e-9"}, {"n": 11}, {"quality": "hd"}, {"size": "huge"}, {"stepz": 1}):
        with pytest.raises(openai.UnprocessableEntityError):
            api.images.generate(prompt="a cat", extra_body=wrong)


def test_every_operation_is_described_and_answers(client):
    described = client.get("/openapi.json").json()
    assert client.get("/docs").text.count("<section>") == sum(map(len, described["paths"].values()))
    assert "subseed = variation_seed" in client.get("/docs").text
    for word in ("torch_dtype", "callback_on_step_end"):  # which no client may choose
        assert f"{word} =" not in client.get("/docs").text
        assert client.post("/api/jobs", {"prompt": "a cat", word: "fp32"}).status_code == 422
    for path, methods in described["paths"].items():
        for method in methods:
            plain = path.replace("{id}", "0123456789abcdef-0").replace("{name}", "0123456789abcdef-0.png")
            if method == "get" and not path.endswith("/events"):
                assert client.get(plain).status_code in (200, 404), path
            elif method == "post":
                sent = client.post(plain, {"no": "such field"})
                assert sent.status_code in (415, 422) or path in ("/sdapi/v1/interrupt", "/api/prompt"), (
                    path,
                    sent.text,
                )


def test_images_hold_no_path_of_the_server(client, tiny_folder, tmp_path):
    job = client.draw(seed=1)
    data = client.get(f"/images/{job['images'][0]}.png").content
    (tmp_path / "x.png").write_bytes(data)
    found = read_metadata(tmp_path / "x.png")
    assert found.ldm["model"] == TINY and str(tiny_folder.parent) not in json.dumps(found.ldm) + found.parameters
