"""Words of other tools' prompt files: those for our settings, and those that are known and refused."""

from __future__ import annotations

# kohya's letters, and words that mean something else elsewhere: -n is the number of images on the command line, and
# A1111's batch_size multiplies the images of a line.
FILE_WORDS = {
    "text": "prompt",
    "caption": "prompt",
    "n": "negative_prompt",
    "negative": "negative_prompt",
    "d": "seed",
    "seeds": "seed",
    "s": "num_inference_steps",
    "sample_steps": "num_inference_steps",
    "l": "guidance_scale",
    "ss": "sampler",
    "sample_sampler": "sampler",
    "t": "strength",
    "f": "name",
    "filename": "name",
    "file_name": "name",
    "controlnet_image": "control_image",
    "sd_model": "model",
    "images_per_prompt": "num_images",
}
_ELSEWHERE = "belongs to the command line, not to a line"
ANY = object()
# Known in other tools' files and refused: word -> (values that change nothing, what to tell whoever gives another).
REFUSED: dict[str, tuple[tuple, str]] = {
    "seed_resize_from_h": ((-1, 0), "seeds of another size are not supported"),
    "seed_resize_from_w": ((-1, 0), "seeds of another size are not supported"),
    "styles": ((), "styles are not supported; write their words into the prompt"),
    "restore_faces": ((False,), "restoring faces is not supported"),
    "tiling": ((False,), "seamless tiling is not supported"),
    "outpath_samples": ((), _ELSEWHERE),
    "outpath_grids": ((), _ELSEWHERE),
    "outdir": ((), _ELSEWHERE),
    "do_not_save_samples": ((False,), "every image is saved"),
    "do_not_save_grid": ((False, True), ""),
    "prompt_for_display": ((ANY,), ""),
    "g": ((), "the guidance of distilled models is not supported; l is the guidance scale"),
    "nl": ((), "a second guidance scale for the negative prompt is not supported"),
    "am": ((), "say lora with weights instead of network multipliers"),
    "cn": ((), "say controlnet, control_image and controlnet_conditioning_scale"),
    "ow": ((), "XL's original size is the image's own"),
    "oh": ((), "XL's original size is the image's own"),
    "ct": ((0,), "XL's crop is not supported"),
    "cl": ((0,), "XL's crop is not supported"),
}
