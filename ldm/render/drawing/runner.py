"""`ldm.render`: every image of a prompt file, nothing lost, nothing drawn twice."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ldm import console
from ldm.checkpoint.model import addable_parts
from ldm.device import check_dtype
from ldm.errors import ConfigError, Interrupted, ResourceError
from ldm.pipeline.checks import check_int
from ldm.pipeline.keywords import ALIASES, CONTROL_WORDS, MAX_IMAGES, SHOWN_WORDS
from ldm.pipeline.result import Target
from ldm.render.drawing.batch_renderer import BatchRenderer
from ldm.render.drawing.dry_run import dry_run as print_plan
from ldm.render.drawing.ray_pool import RayPool, check_ray, cluster
from ldm.render.drawing.writer import Encode, Writer, WriterStopped
from ldm.render.jobs.job_file import JobFile
from ldm.render.jobs.jobs import Shard, short
from ldm.render.jobs.resolve import Resolver
from ldm.render.jobs.scan import Run, Scan, scan
from ldm.render.output.conditions import write_conditions
from ldm.render.output.lines import DONE, is_inside, read_manifest
from ldm.render.output.manifest import Manifest, Report
from ldm.render.prompts.entry import Prompts
from ldm.render.prompts.files import is_infotext_file, open_prompts
from ldm.render.prompts.line_settings import parse_settings, with_own_controls
from ldm.render.prompts.setting_table import OF_RUN, SETTINGS
from ldm.render.prompts.templates import NO_WILDCARDS, Wildcards
from ldm.render.prompts.values import MAX_SEED
from ldm.render.replay.rerun import replayed
from ldm.render.sheets.axes import Axis, check_grid, gridded
from ldm.render.sheets.contact import write_contact_sheets
from ldm.render.sheets.gallery import write_gallery
from ldm.render.sheets.grid_sheet import write_sheets

# What is not tried out before there are lines, which may give the images for it.
SHOWN_TO = {"control_image": ("controlnet", *CONTROL_WORDS)}
SHOWN_TO |= {"ip_adapter_image": ("ip_adapter", "image_encoder", *SHOWN_WORDS)}
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class Rendered:
    """What a run did. `exit_code` is 0, or 3 where lines were bad or images failed."""

    folder: Path
    counts: Mapping[str, int]  # (good_, bad_)lines, jobs, rendered, finished_before, failed, not_reached, other_shards
    manifest: Path
    report: Path
    keys: array  # of the jobs, 64 bits each, in the file's order

    @property
    def exit_code(self) -> int:
        return 3 if self.counts["bad_lines"] or self.counts["failed"] else 0

    @property
    def paths(self) -> list[Path]:
        """The files of all images that are there now, in the order of their lines."""
        names = _names(self.folder, self.keys)
        return [self.folder / names[key] for key in self.keys if key in names]


def render(
    prompts: str | os.PathLike | Iterable | None,
    output: str | os.PathLike,
    *,
    seed: int = 0,
    wildcards: str | os.PathLike | None = None,
    format: str = "png",
    metadata: bool = True,
    batch_size: int | None = None,
    shard: str | None = None,
    ray: str | None = None,
    strict: bool = False,
    dry_run: bool = False,
    sources: str | os.PathLike | Sequence = (),
    changes: Sequence[str] = (),
    grid: Sequence[str] = (),
    gallery: bool = False,
    contact_sheet: bool = False,
    keep_conditions: bool = False,
    **settings: Any,
) -> Rendered:
    """Draw every image of a prompt file into the folder `output`, and return what became of it.

    prompts     a .txt, .jsonl, .json, .csv, .tsv or .toml file, "-" for standard input, or a list of texts and groups
                of settings ({"prompt": …, "seed": 7})
    seed        of the run: seeds of lines without one come from it, their content, and the number of equal lines above
    wildcards   the folder of the __wildcards__
    format      png, jpg or webp; `metadata=False` writes nothing about prompt and settings into the files
    batch_size  images that are drawn together; None: by the memory that is free. No image depends on it
    shard       "2/3": only the second third, so that three machines share one file and one folder
    ray         a Ray cluster that draws (extra `ray`): "local" starts one here, "auto" or host:port joins one whose
                machines have the same files at the same paths. Workers draw as this process would, with as many
                threads, and are replaced where they are lost; this process alone writes
    strict      whether one bad line stops the run before work (ConfigError)
    dry_run     whether only to print what would be done
    sources     in place of prompts: images, manifests and rendered folders whose images are drawn again;
                changes=["steps=50"] replaces their settings
    grid        up to three axes, ["steps=4,8,16", "sampler=euler,ddim"]: every prompt with every combination, and a
                sheet of them in output/grids
    gallery     whether to write output/index.html; contact_sheet: output/contact/page-001.jpg, …
    keep_conditions  whether to write what ControlNets saw: output/conditions/NAME.png, conditions-2/NAME.png, …
    settings    Pipeline's and generate's, under everybody's names: model (or a loaded one), vae, lora, lora_dir, fast,
                device, dtype, … and, for lines that leave them out, num_images, num_inference_steps,
                guidance_scale, negative_prompt, sampler, spacing, width, height, …

    The prompt file is read once, before drawing. The same call goes on with a run that was stopped: finished images are
    left alone, the others come out to the bit as they would have. `output` holds the images, `manifest.jsonl` (one line
    an image: status, time, seed, settings, path, sha256) and `report.jsonl` (bad lines, failures, counts that add up).
    Bad lines are named and the others drawn; an image that cannot be drawn is a failure that the next call tries again.

    Raises ConfigError for what is wrong with the call or the file as a whole; ResourceError where the disk is full or
    another run has the folder; Interrupted after SIGINT and SIGTERM, once the batch in hand is saved.
    """
    target = Target.of(os.path.join(os.fspath(output), ""), format).check()
    if ray is not None:
        if _in_memory(settings.get("model")):
            raise ConfigError("a loaded model stays in its process", where="model", hint="save it, and name its folder")
        check_ray(ray)
    axes = check_grid(grid, shard, settings.get("num_images")) if grid else ()
    checked = {
        "target": target,
        "wildcards": None if sources else NO_WILDCARDS if wildcards is None else Wildcards(wildcards),
        "seed": check_int(seed, "seed", 0, MAX_SEED),
        "shard": Shard() if shard is None else Shard.read(shard),
        "batch_size": None if batch_size is None else check_int(batch_size, "batch_size", 1, MAX_IMAGES),
        "metadata": metadata,
        "ray": ray,
    }
    entries = _prompts(prompts, sources, changes, settings)
    resolver, defaults = _resolver(settings, entries.of_run, bool(sources))
    entries = gridded(entries, axes, checked["seed"]) if axes else entries
    run = Run(prompts=entries, defaults=defaults, resolver=resolver, **checked)
    if dry_run:
        result = print_plan(run, strict)
        return _rendered(run, result, result.counts())
    rendered = _render(run, strict, axes)
    if keep_conditions:
        console.say(f"conditions: {write_conditions(rendered.folder, rendered.keys)} in {rendered.folder}/conditions")
    if gallery:
        console.say(f"gallery: {write_gallery(rendered.folder)}")
    if contact_sheet:
        pages = write_contact_sheets(rendered.folder)
        console.say(f"contact sheets: {len(pages)} in {pages[0].parent if pages else rendered.folder}")
    return rendered


def _prompts(prompts: Any, sources: Any, changes: Sequence[str], settings: Mapping[str, Any]) -> Prompts:
    """Where the entries come from. Raises ConfigError unless it is one of prompts and sources."""
    if bool(sources) == (prompts is not None):
        what = "there are prompts and images to be drawn again" if sources else "there are no prompts"
        raise ConfigError(what, where="prompts", hint="give a prompt file, or --from")
    if changes and not sources:
        raise ConfigError("belongs to --from", where="--set", hint="give it as an option, --steps 50")
    if not sources and is_infotext_file(prompts):
        console.say(f"{prompts}: A1111's settings of an image, drawn again as --from does")
        sources = prompts
    return replayed(sources, changes, settings) if sources else open_prompts(prompts)


def _resolver(
    settings: Mapping[str, Any], recorded: Mapping[str, Any] = MappingProxyType({}), replayed: bool = False
) -> tuple[Resolver, dict[str, Any]]:
    """(who resolves lines, the settings of lines that leave them out), from Pipeline's and generate's keywords.

    `recorded` are used where they have none. Raises ConfigError for what no line could be drawn with; the parts that a
    model's file lacks may be said by the images that are drawn again (`replayed`).
    """
    given = {ALIASES.get(word, word): value for word, value in settings.items() if value is not None}
    given["dtype"] = check_dtype(given.get("dtype", "auto"))
    given |= {name: value for name, value in recorded.items() if given.get(name) in (None, False, "auto")}
    of_run = {name: given.pop(name) for name in OF_RUN if name in given}
    if _in_memory(given.get("model")):
        of_run["loaded"] = given.pop("model")
    if isinstance(given.get("lora"), tuple):  # (path, weight)
        given["lora"] = [given["lora"]]
    # Lines have no parser for these, or (clip_skip) count in another way.
    as_given = {name for name in given if name == "clip_skip" or (name in SETTINGS and SETTINGS[name].parser is None)}
    defaults = parse_settings([(name, value) for name, value in given.items() if name not in as_given], Path())
    defaults = with_own_controls(defaults) | {name: _plain(given[name]) for name in as_given}
    resolver = Resolver(**of_run)
    if replayed and addable_parts(defaults.get("model", "default")) - defaults.keys():
        return resolver, defaults
    resolver.model(defaults)  # with its ControlNets and IP-Adapters
    left = {"num_images", *(word for image, words in SHOWN_TO.items() if image not in defaults for word in words)}
    resolver({**{name: value for name, value in defaults.items() if name not in left}, "prompt": "", "seed": 0})
    return resolver, defaults


def _in_memory(model: Any) -> bool:
    return model is not None and not isinstance(model, (str, os.PathLike))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else os.fspath(value) if isinstance(value, os.PathLike) else value


def _rendered(run: Run, result: Scan, counts: Mapping[str, int]) -> Rendered:
    folder = run.target.folder
    return Rendered(folder, counts, *(folder / run.shard.file(stem) for stem in ("manifest", "report")), result.keys)


def _render(run: Run, strict: bool, axes: Sequence[Axis]) -> Rendered:
    """Both passes: the lines are resolved into a file of jobs, then those that are not finished are drawn."""
    folder = run.target.folder
    with ExitStack() as stack:
        if run.ray is not None:
            stack.enter_context(cluster(run.ray))
        manifest = stack.enter_context(Manifest(folder, run.shard, f".{run.target.format}"))
        report = stack.enter_context(Report(folder, run.shard))
        job_file = stack.enter_context(manifest.job_file())
        result = scan(run, manifest.finished, report.bad_line, job_file)
        _say_scan(run, result, manifest)
        if strict and result.bad:
            report.finish(result)
            raise result.refused(run)
        try:
            if result.left:
                _draw(run, result, job_file, manifest, report)
        except BaseException:
            _say_end(report, report.counts(result))
            with suppress(ResourceError):  # what stopped the run is the error to raise
                report.finish(result)
            raise
        counts = report.counts(result)
        _say_end(report, counts)
        report.finish(result)
        if axes:
            write_sheets(folder, job_file.sheets(), axes, _names(folder, result.keys))
    return _rendered(run, result, counts)


def _draw(run: Run, result: Scan, job_file: JobFile, manifest: Manifest, report: Report) -> None:
    """The second pass. Raises Interrupted with what is saved, and what stopped the writer."""
    encode = Encode(run.target.format, run.metadata)
    try:
        with (
            console.progress(total=result.jobs, initial=result.finished, desc="rendering", unit=" images") as bar,
            console.StopRequest() as stop,
            Writer(manifest, report, encode, bar.update) as writer,
        ):
            bar.bar_format = BAR
            shared = run.resolver, writer, stop, run.batch_size
            renderer = BatchRenderer(*shared) if run.ray is None else RayPool(*shared, encode, len(job_file))
            renderer.draw(job_file.jobs())
    except WriterStopped as stop:
        raise stop.error from None
    except Interrupted as stop:
        what, hint = f"stopped after {report.rendered} images, all saved", "the same command goes on"
        raise Interrupted(stop.exit_code - 128, what, where=manifest.folder, hint=hint) from None


def _names(folder: Path, keys: Iterable[int]) -> dict[int, str]:
    """`short` of a key -> file in the folder, of those among `keys` that are drawn."""
    wanted = set(keys)
    lines = (line for line in read_manifest(folder) if line["status"] == DONE and is_inside(line.get("path")))
    return {key: line["path"] for line in lines if (key := short(line["key"])) in wanted}


def _say_scan(run: Run, result: Scan, manifest: Manifest) -> None:
    if manifest.damaged:
        console.warn(f"{manifest.folder}: {manifest.damaged} lines of the manifests cannot be read and are ignored")
    counts = f"{result.lines} lines, {result.jobs} images, {result.finished} finished before, {result.bad} bad lines"
    shards = f", {result.other_shards} images of other shards" if result.other_shards else ""
    console.say(f"{run.prompts.name}: {counts}{shards}")
    others = len(manifest) - result.finished
    if others > 0 and run.shard.of == 1:
        console.say(f"{manifest.folder} holds {others} images of other lines or settings: they stay as they are")


def _say_end(report: Report, counts: Mapping[str, int]) -> None:
    names = {"rendered": "rendered", "finished_before": "finished before", "bad_lines": "bad lines", "failed": "failed"}
    parts = [f"{counts[name]} {words}" for name, words in names.items()]
    parts += [f"{counts['not_reached']} not reached"] if counts["not_reached"] else []
    console.say(f"{report.path.parent}: {', '.join(parts)} ({report.path})")
