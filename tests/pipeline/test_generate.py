"""Seeds, batches, threads, failures: what generate promises, on a tiny random model."""

import threading

import pytest
import torch

from ldm.checkpoint import load_model
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import ConfigError, NumericsError, ResourceError
from ldm.pipeline import Images, Pipeline, engine

FAST = {"num_inference_steps": 2, "sampler": "ddim"}


def pixels(images):
    return [image.tobytes() for image in images]


@pytest.fixture
def pipe(tiny_folder):
    return Pipeline("a cat", model=tiny_folder, negative_prompt="a dog")


class Watch:
    """A callback that keeps x after the last step, one (C, h, w) a picture."""

    def __init__(self, steps):
        self.last, self.rows = steps - 1, []

    def __call__(self, i, x, x0):
        assert x.shape == x0.shape
        if i == self.last:
            self.rows += list(x.clone())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_image_is_the_same_in_batches_of_1_to_17(dtype, tiny_folder):
    prompts = ["a cat", "a blue dog"] * 9

    def draw(count):  # one batch of so many
        pipe, watch = Pipeline(prompts[:count], model=tiny_folder, dtype=dtype), Watch(2)
        size = {"height": 64, "width": 64}
        images = pipe.generate(seed=list(range(count)), batch_size=count, callback=watch, **size, **FAST)
        return torch.stack(watch.rows), pixels(images)

    latents, pictures = draw(17)
    assert len(set(pictures)) == 17 and torch.isfinite(latents).all()
    for count in range(1, 17):
        again, drawn = draw(count)
        assert torch.equal(again, latents[:count]), f"a batch of {count}"
        assert drawn == pictures[:count]


def test_the_unet_reads_the_texts_once_a_batch(pipe, monkeypatch):
    from ldm.nn.attention import TextCache

    read, follow = [], TextCache.follow

    def watched(cache, states):
        read.extend([len(states)] if states is not cache._states else [])
        follow(cache, states)

    monkeypatch.setattr(TextCache, "follow", watched)
    steps = {"num_inference_steps": 6, "sampler": "heun"}
    pipe.generate(num_images=5, batch_size=3, **steps)
    assert read == [6, 4]
    read.clear()
    pipe.generate(guidance_interval=(0.4, 0.8), **steps)
    assert read == [1, 2, 1]


def test_batches_are_put_together_in_order(tiny_folder):
    pipe = Pipeline(["a cat", "a dog"], model=tiny_folder)
    whole = pixels(pipe.generate(num_images=5, seed=3, **FAST))
    assert len(set(whole)) == 10
    for batch_size in (1, 3, 4, 10, 17):
        assert pixels(pipe.generate(num_images=5, seed=3, batch_size=batch_size, **FAST)) == whole


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "heun_flow"])
def test_every_sampler_gives_a_seed_one_picture_in_any_batch(pipe, sampler):
    settings = {"num_images": 3, "seed": 5, "num_inference_steps": 4, "sampler": sampler}
    whole = pixels(pipe.generate(**settings))
    assert len(set(whole)) == 3
    for batch_size in (1, 2):
        assert pixels(pipe.generate(**settings, batch_size=batch_size)) == whole
    assert pixels(pipe.generate(**{**settings, "num_images": 1, "seed": 7})) == whole[2:]


def test_eta_reaches_the_sampler(pipe):
    plain, none, half = (pipe.generate(seed=1, eta=eta, **FAST) for eta in (None, 0, 0.5))
    assert pixels(plain) == pixels(none) != pixels(half)
    assert half.metadata[0]["eta"] == 0.5


GUIDANCE = {
    "apg": {"guidance": "apg", "apg_threshold": 2.0},
    "pag": {"guidance": "pag", "pag_scale": 2.0},
    "cfg_zero": {"guidance": "cfg_zero"},
    "rescale": {"guidance_rescale": 0.7},
    "interval": {"guidance_interval": (0.0, 0.5)},
    "one each": {"guidance_scale": [1.0, 4.0, 9.0]},
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_every_guidance_gives_a_seed_one_picture_in_any_batch(pipe, kind):
    settings = {"num_images": 3, "seed": 5, "num_inference_steps": 4, "sampler": "euler"}
    plain, whole = (pixels(pipe.generate(**{**settings, **words})) for words in ({}, GUIDANCE[kind]))
    assert plain != whole
    for batch_size in (1, 2):
        assert pixels(pipe.generate(**{**settings, **GUIDANCE[kind]}, batch_size=batch_size)) == whole


def test_lcm_takes_its_own_timesteps_and_boundary(pipe, tiny_folder):
    from ldm.diffusion.denoiser import consistency, denoiser

    model, watch = load_model(tiny_folder, dtype="fp32"), Watch(3)
    pipe = Pipeline("a cat", model=tiny_folder, dtype="fp32")
    images = pipe.generate(seed=4, num_inference_steps=3, sampler="lcm", guidance_scale=1.0, callback=watch)
    cond, sigmas = model.text.encode(["a cat"]), model.schedule.sigmas(3, "lcm")
    draw = torch.Generator("cpu").manual_seed(4)
    noise = [torch.randn((1, *watch.rows[0].shape), generator=draw) for _ in range(4)]
    denoise = denoiser(lambda x, t: model.unet(x, t, cond.states), model.schedule)
    x = model.schedule.initial(noise[0], sigmas, "lcm")
    x = SAMPLERS["lcm"](consistency(denoise, model.schedule), x, sigmas, lambda i: noise[1 + i])
    assert torch.allclose(x[0], watch.rows[0], atol=1e-5)
    assert images.metadata[0]["spacing"] is None


def test_steps_outside_of_the_interval_cost_half(pipe, monkeypatch):
    from ldm.nn.unet import UNet

    rows, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a, **k: rows.append(len(x)) or forward(self, x, *a, **k))
    pipe.generate(seed=1, num_inference_steps=4, sampler="euler", guidance_interval=(0.25, 0.75))
    assert rows == [1, 2, 2, 1]


def test_guidance_is_recorded_and_repeats_the_picture(pipe):
    words = {"guidance": "apg", "apg_threshold": 0.0, "guidance_rescale": 0.5, "guidance_scale": 4.0}
    images = pipe.generate(seed=3, **words, **FAST)
    record = images.metadata[0]
    assert {name: record[name] for name in words} == words
    assert pixels(pipe.generate(seed=3, **{name: record[name] for name in words}, **FAST)) == pixels(images)


def test_without_guidance_one_image_is_the_same_as_in_a_batch(pipe):
    together = pipe.generate(num_images=3, seed=5, guidance_scale=1, **FAST)
    alone = [pipe.generate(seed=seed, guidance_scale=1, **FAST)[0] for seed in together.seeds]
    assert pixels(alone) == pixels(together)


def test_a_seed_is_an_image_whatever_stands_beside_it(tiny_folder):
    both = Pipeline(["a cat", "a dog"], model=tiny_folder).generate(num_images=2, seed=7, **FAST)
    assert both.seeds == [7, 8, 7, 8]
    assert [record["prompt"] for record in both.metadata] == ["a cat", "a cat", "a dog", "a dog"]
    turned = Pipeline(["a dog", "a cat"], model=tiny_folder).generate(num_images=2, seed=7, **FAST)
    assert pixels(turned) == pixels(both[2:]) + pixels(both[:2])
    alone = Pipeline("a dog", model=tiny_folder).generate(seed=both.seeds[3], **FAST)
    assert pixels(alone) == pixels(both[3:])
    assert len(set(pixels(both))) == 4


def test_noise_is_what_a_cpu_generator_draws(pipe):
    noise = torch.stack([torch.randn((4, 4, 4), generator=torch.Generator("cpu").manual_seed(s)) for s in (7, 8)])
    assert pixels(pipe.generate(latents=noise, num_images=2, **FAST)) == pixels(
        pipe.generate(num_images=2, seed=7, **FAST)
    )
    generator = torch.Generator("cpu").manual_seed(7)
    assert pixels(pipe.generate(generator=generator, **FAST)) == pixels(pipe.generate(seed=7, **FAST))


def test_latents_decide_the_size_and_are_checked_against_the_model(pipe):
    image = pipe.generate(latents=torch.randn(1, 4, 3, 5), **FAST)[0]
    assert image.size == (40, 24)
    with pytest.raises(ConfigError, match=r"latents: .*\(1, 4, 4, 4\), got \(1, 3, 4, 4\)"):
        pipe.generate(latents=torch.randn(1, 3, 4, 4), **FAST)
    with pytest.raises(ConfigError, match="latents"):
        pipe.generate(latents=torch.randn(1, 4, 4, 4), width=64, **FAST)


def test_a_drawn_seed_is_recorded_and_draws_the_image_again(pipe):
    images = pipe.generate(num_images=2, **FAST)
    assert pixels(pipe.generate(seed=images.seeds[1], **FAST)) == pixels(images[1:])


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (64, 32)])
def test_sizes(size, pipe):
    width, height = size
    assert pipe.generate(width=width, height=height, **FAST)[0].size == size


def test_settings_change_the_picture(pipe):
    def one(**changed):
        return pipe.generate(**{"seed": 1, **FAST, "num_inference_steps": 3, **changed})[0].tobytes()

    variants = [{}, {"num_inference_steps": 4}, {"guidance_scale": 2.0}, {"sampler": "dpmpp_2m"}]
    assert len({one(**v) for v in [*variants, {"spacing": "leading"}]}) == 5


def test_negative_prompts_matter_only_with_guidance(tiny_folder):
    def draw(negative, scale):
        pipe = Pipeline("a cat", model=tiny_folder, negative_prompt=negative)
        return pipe.generate(seed=1, guidance_scale=scale, **FAST)[0].tobytes()

    assert draw("a dog", 6) != draw("", 6)
    assert draw("a dog", 1) == draw("", 1) == draw(None, 1)
    assert draw("", 6) == draw(None, 6)
    one_each = Pipeline(["a cat", "a cat"], model=tiny_folder, negative_prompt=["a dog", ""]).generate(seed=1, **FAST)
    assert one_each[0].tobytes() == draw("a dog", 6) and one_each[1].tobytes() == draw("", 6)


def test_each_distinct_text_is_encoded_once(tiny_folder, monkeypatch):
    model = load_model(tiny_folder, dtype="fp32", device="cpu")
    seen, framed = [], model.text.with_special_tokens
    monkeypatch.setattr(model.text, "with_special_tokens", lambda ids: seen.append(tuple(ids)) or framed(ids))
    pipe = Pipeline(["a cat", "a dog", "a cat"], model=model)
    for _ in range(2):  # in the second call nothing is new
        pipe.generate(num_images=3, batch_size=2, **FAST)
        assert sorted(seen) == sorted(tuple(model.text.token_ids(text)) for text in ("", "a cat", "a dog"))


def test_defaults_come_from_the_model(tiny_folder, tmp_path):
    import shutil

    records = Pipeline("a cat", model=tiny_folder).generate(seed=0).metadata
    assert (records[0]["num_inference_steps"], records[0]["guidance_scale"], records[0]["sampler"]) == (
        *(25, 6.0),
        "dpmpp_2m",
    )
    assert (records[0]["width"], records[0]["height"], records[0]["spacing"]) == (32, 32, "trailing")
    folder = shutil.copytree(tiny_folder, tmp_path / "card")
    card = "---\nldm: {num_inference_steps: 3, guidance_scale: 2, sampler: euler}\n---\n"
    (folder / "README.md").write_text(card)
    record = Pipeline("a cat", model=folder).generate(seed=0).metadata[0]
    assert (record["num_inference_steps"], record["guidance_scale"], record["sampler"]) == (3, 2.0, "euler")
    record = Pipeline("a cat", model=folder).generate(seed=0, steps=2, guidance_scale=0).metadata[0]
    assert (record["num_inference_steps"], record["guidance_scale"]) == (2, 0.0)


def test_a_loaded_model_and_a_saved_one_draw_the_same(tiny_folder, tmp_path, pipe):
    expected = pixels(pipe.generate(seed=3, **FAST))
    model = load_model(tiny_folder, device="cpu", dtype="fp32")
    loaded = Pipeline("a cat", model=model, negative_prompt="a dog")
    assert pixels(loaded.generate(seed=3, **FAST)) == expected
    saved = Pipeline("a cat", model=pipe.save(tmp_path / "copy"), negative_prompt="a dog")
    assert pixels(saved.generate(seed=3, **FAST)) == expected
    with pytest.raises(ConfigError, match="the given model is loaded in fp32"):
        Pipeline("a cat", model=model, dtype="bf16")


def test_two_threads_take_turns_and_draw_what_one_draws(pipe):
    expected = [pixels(pipe.generate(seed=s, **FAST)) for s in (1, 2, 3)]
    found, inside, overlaps = {}, [], []

    def work(seed):
        def callback(i, x, x0):
            inside.append(seed)
            overlaps.append(len(set(inside)) > 1)
            if i == 1:
                inside.clear()

        found[seed] = pixels(pipe.generate(seed=seed, callback=callback, **FAST))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in (1, 2, 3)] == expected
    assert not any(overlaps)


def test_ctrl_c_keeps_what_is_finished_and_the_pipeline_usable(pipe):
    whole = pipe.generate(num_images=3, seed=1, batch_size=1, **FAST)
    calls = []

    def interrupt(i, x, x0):
        calls.append(i)
        if len(calls) == 4:  # the last step of the second picture
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        pipe.generate(num_images=3, seed=1, batch_size=1, callback=interrupt, **FAST)
    assert pixels(caught.value.images) == pixels(whole[:1]) and caught.value.images.seeds == [1]
    assert pixels(pipe.generate(num_images=3, seed=1, **FAST)) == pixels(whole)


def test_out_of_memory_is_one_line_and_the_next_call_works(pipe):
    def fail(i, x, x0):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(ResourceError, match="use a smaller size") as caught:
        pipe.generate(num_images=2, callback=fail, **FAST)
    assert caught.value.exit_code == 4 and len(caught.value.images) == 0
    assert len(pipe.generate(**FAST)) == 1


def broken_model(tiny_folder):
    model = load_model(tiny_folder, device="cpu", dtype="fp32", cache=False)
    with torch.no_grad():
        model.unet.conv_out.bias[0] = float("nan")
    return model


def test_nan_is_an_error_and_never_a_black_picture(tiny_folder):
    with pytest.raises(NumericsError, match="'a cat', seed 5, holds NaN") as caught:
        Pipeline("a cat", model=broken_model(tiny_folder)).generate(num_images=2, seed=5, **FAST)
    assert caught.value.exit_code == 5 and len(caught.value.images) == 0


def test_a_picture_that_is_nan_is_drawn_again_in_fp32_alone(tiny_folder, capsys, monkeypatch):
    """In bf16 the picture of seed 8 is NaN, as half precision overflows for single pictures."""
    draw_batch = engine.Engine.generate_batch

    def unstable(self, model, settings, requests, watch=None):
        images = draw_batch(self, model, settings, requests, watch)
        for image, request in zip(images, requests):
            if model.dtype == torch.bfloat16 and request.seed == 8:
                image[0, 0, 0] = float("nan")
        return images

    def draw(dtype):
        return Pipeline("a cat", model=tiny_folder, dtype=dtype).generate(num_images=3, seed=7, **FAST)

    half, full = draw("bf16"), draw("fp32")
    monkeypatch.setattr(engine.Engine, "generate_batch", unstable)
    mended = draw("bf16")
    assert pixels(mended) == [half[0].tobytes(), full[1].tobytes(), half[2].tobytes()]
    assert [record["dtype"] for record in mended.metadata] == ["bf16", "fp32", "bf16"]
    assert "seed 8: NaN in bf16" in capsys.readouterr().err


def test_a_callback_can_stop(pipe):
    whole = pipe.generate(num_images=3, seed=1, batch_size=2, **FAST)
    calls = []
    images = pipe.generate(
        num_images=3, seed=1, batch_size=2, callback=lambda *step: len(calls) == 2 or calls.append(step), **FAST
    )
    assert len(calls) == 2 and images.seeds == [1, 2] and pixels(images) == pixels(whole[:2])
    assert len(pipe.generate(seed=1, callback=lambda *step: True, **FAST)) == 0
    assert pixels(pipe.generate(num_images=3, seed=1, **FAST)) == pixels(whole)


def test_explicit_noise_levels(pipe, tiny_folder):
    schedule = load_model(tiny_folder, dtype="fp32").schedule
    plain = pipe.generate(seed=1, num_inference_steps=4, sampler="euler")
    sigmas = schedule.sigmas(4, "euler").tolist()
    for words in (
        {"sigmas": sigmas},
        {"sigmas": sigmas[:-1]},
        {"timesteps": schedule.timestep(torch.tensor(sigmas[:-1]))},
    ):
        images = pipe.generate(seed=1, sampler="euler", **words)
        assert pixels(images) == pixels(plain)
        assert (images.metadata[0]["num_inference_steps"], images.metadata[0]["spacing"]) == (4, None)
    assert pixels(pipe.generate(seed=1, sampler="euler", sigmas=[*sigmas[:2], 1.0, 0.5])) != pixels(plain)
    assert images.metadata[0]["timesteps"] and images.metadata[0]["sigmas"] is None


def test_callbacks_see_each_step_of_each_batch(pipe):
    seen = []
    pipe.generate(num_images=3, batch_size=2, callback=lambda i, x, x0: seen.append((i, tuple(x.shape))), **FAST)
    assert seen == [(0, (2, 4, 4, 4)), (1, (2, 4, 4, 4)), (0, (1, 4, 4, 4)), (1, (1, 4, 4, 4))]
    theirs = []

    def callback_on_step_end(pipeline, step, timestep, kwargs):
        theirs.append(step)
        return kwargs

    pipe.generate(callback_on_step_end=callback_on_step_end, **FAST)
    assert theirs == [0, 1]
    with pytest.raises(ConfigError, match="must not change latents"):
        pipe.generate(callback_on_step_end=lambda p, i, t, k: {"latents": k["latents"] * 2}, **FAST)


def test_inpainting_models_are_refused(changed_folder):
    import json

    from ldm.nn.unet import UNet, UNetConfig

    model = load_model(changed_folder("vae/config.json", {}), device="cpu", dtype="fp32", cache=False)
    settings = json.loads(json.dumps(model.unet.config.to_diffusers()))
    model.unet = UNet(UNetConfig.from_diffusers({**settings, "in_channels": 9})).eval()
    with pytest.raises(ConfigError, match="is an inpainting model"):
        Pipeline("a cat", model=model).generate(**FAST)


def test_the_result_is_a_sequence(pipe):
    images = pipe.generate(num_images=3, seed=1, **FAST)
    assert isinstance(images, Images) and len(images) == len(list(images)) == 3
    assert images[-1].size == (32, 32) and images[1:].seeds == [2, 3]
    assert "3 images, 32x32, seeds 1, 2, 3" in repr(images)
