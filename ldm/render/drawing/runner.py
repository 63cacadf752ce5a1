"""`ldm.render`: every picture of a prompt file, nothing lost, nothing drawn twice."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import console
from ldm.errors import ConfigError, Interrupted, ResourceError
from ldm.pipeline.checks import check_int
from ldm.pipeline.keywords import ALIASES, GUIDANCE_WORDS, MAX_IMAGES
from ldm.pipeline.result import Target
from ldm.render.drawing.batch_renderer import BatchRenderer
from ldm.render.drawing.dry_run import dry
from ldm.render.drawing.ray_pool import RayPool, check_ray, joined
from ldm.render.drawing.writer import Encode, Writer, WriterStopped
from ldm.render.jobs.jobs import Shard, short
from ldm.render.jobs.resolve import Resolver
from ldm.render.jobs.scan import Run, Survey, survey, unfinished
from ldm.render.output.manifest import DONE, Manifest, Report, is_inside, read_manifest
from ldm.render.prompts.line_settings import MAX_SEED, check_words
from ldm.render.prompts.snapshot import Prompts, gridded, held, replayed
from ldm.render.prompts.templates import Wildcards
from ldm.render.sheets.axes import Axis, read_axes
from ldm.render.sheets.contact import write_contact_sheets
from ldm.render.sheets.gallery import write_gallery
from ldm.render.sheets.grid_sheet import write_sheets

OF_PAINTER = ("device", "offload", "attention", "prediction_type", "allow_unapplied")
# Words of generate that lines have none for, or (clip_skip) count in another way there.
NOT_OF_LINES = (*GUIDANCE_WORDS, "timesteps", "sigmas", "emphasis", "clip_skip", "vae", "outpaint")
NOT_OF_LINES += ("variation_seed", "variation_strength", "hires_scale", "hires_steps", "hires_strength", "vae_tiling")
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"


@dataclass(frozen=True)
class Rendered:
    """What a run did. `exit_code` is 0, or 3 where lines were bad or pictures failed."""

    folder: Path
    counts: Mapping[str, int]  # lines, bad_lines, jobs, rendered, finished_before, failed, not_reached, other_shards
    manifest: Path
    report: Path
    keys: array  # of the jobs, 64 bits each, in the file's order

    @property
    def exit_code(self) -> int:
        return 3 if self.counts["bad_lines"] or self.counts["failed"] else 0

    @property
    def paths(self) -> list[Path]:
        """The files of all pictures that are there now, in the order of their lines."""
        names = self.names()
        return [self.folder / names[key] for key in self.keys if key in names]

    def names(self) -> dict[int, str]:
        """Key (see `keys`) -> file in the folder."""
        wanted = set(self.keys)
        lines = (line for line in read_manifest(self.folder) if line["status"] == DONE and is_inside(line.get("path")))
        return {key: line["path"] for line in lines if (key := short(line["key"])) in wanted}


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
    **words: Any,
) -> Rendered:
    """Draw every picture that a prompt file asks for into the folder `output`, and say what became of it.

    prompts     a file of any kind (.txt .jsonl .json .csv .tsv .toml), "-" for standard input, or a list of texts and
                groups of settings ({"prompt": …, "seed": 7})
    seed        of the run: lines without a seed of their own get one from it, from what they say, and from how many
                equal lines stand above them
    wildcards   the folder of the __wildcards__
    format      png, jpg or webp; `metadata=False` writes nothing about prompt and settings into the files
    batch_size  pictures that are drawn together; None: by the memory that is free. No picture depends on it
    shard       "2/3": only the second third, so that three machines share one file and one folder
    ray         a Ray cluster that draws (extra `ray`): "local" starts one on this machine, "auto" or host:port joins
                one whose machines have the same files at the same paths; each worker draws as this process would, with
                as many threads, and this process alone writes. One that is lost is replaced
    strict      whether one bad line stops the run before work (ConfigError)
    dry_run     whether to say only what would be done
    sources     in place of prompts: pictures, manifests and rendered folders whose pictures are drawn again;
                changes=["steps=50"] replaces what they say
    grid        up to three axes, ["steps=4,8,16", "sampler=euler,ddim"]: every prompt with every combination, and a
                sheet of them in output/grids
    gallery     whether to write output/index.html; contact_sheet: output/contact/page-001.jpg, …
    words       Pipeline's and generate's, under everybody's names: model (or a loaded one), vae, lora, lora_dir,
                device, dtype, … and, for lines that do not say it themselves, num_images, num_inference_steps,
                guidance_scale, negative_prompt, sampler, spacing, width, height, …

    A run that was stopped is taken up by the same call: finished pictures are left alone, the others come out to the
    bit as they would have. `output` then holds the pictures, `manifest.jsonl` (one line a picture: status, time, seed,
    settings, path, sha256) and `report.jsonl` (bad lines, failures, counts that add up). Bad lines are named and the
    others drawn; a picture that cannot be drawn is a failure, and the next call tries it again.

    Raises ConfigError for what is wrong with the call or the file as a whole; ResourceError where the disk is full or
    another run has the folder; Interrupted after SIGINT and SIGTERM, once the batch in hand is saved.
    """
    target = Target.of(os.path.join(os.fspath(output), ""), format).check()
    if ray is not None and _in_memory(words.get("model")):
        raise ConfigError("a loaded model stays in its process", where="model", todo="save it, and name its folder")
    check_ray(ray)
    axes = _check_grid(grid, shard, words)
    checked = {
        "target": target,
        "wildcards": None if sources else Wildcards(wildcards),
        "seed": check_int(seed, "seed", 0, MAX_SEED),
        "shard": Shard() if shard is None else Shard.read(shard),
        "batch_size": None if batch_size is None else check_int(batch_size, "batch_size", 1, MAX_IMAGES),
        "metadata": metadata,
        "ray": ray,
    }
    with _prompts(prompts, sources, changes) as base:
        resolver, defaults = _resolver(words, base.dtype)
        every = gridded(base, axes, checked["seed"]) if axes else base
        run = Run(prompts=every, defaults=defaults, resolver=resolver, **checked)
        if dry_run:
            return _dry(run, strict)
        found = _real(run, strict)
        if axes:
            write_sheets(run, base, axes, found.names())
    if gallery:
        console.say(f"{write_gallery(found.folder)}")
    if contact_sheet:
        console.say(f"{write_contact_sheets(found.folder)[0].parent}")
    return found


def _prompts(prompts: Any, sources: Any, changes: Sequence[str]) -> AbstractContextManager[Prompts]:
    """Where the entries come from. Raises ConfigError unless it is one of prompts and sources."""
    if bool(sources) == (prompts is not None):
        what = "there are prompts and pictures to be drawn again" if sources else "there are no prompts"
        raise ConfigError(what, where="prompts", todo="give a prompt file, or --from")
    if changes and not sources:
        raise ConfigError("belongs to --from", where="--set", todo="say it as an option, --steps 50")
    return nullcontext(replayed(sources, changes)) if sources else held(prompts)


def _check_grid(grid: Sequence[str], shard: str | None, words: Mapping[str, Any]) -> tuple[Axis, ...]:
    axes = read_axes([grid] if isinstance(grid, str) else grid)
    if axes and shard is not None:
        raise ConfigError("a grid needs all of its pictures", where="shard", todo="leave --shard or --grid out")
    if axes and words.get("num_images") not in (None, 1):
        raise ConfigError("a cell of a grid holds one picture", where="num_images", todo="use an axis of seeds")
    return axes


def _resolver(words: Mapping[str, Any], dtype: str = "auto") -> tuple[Resolver, dict[str, Any]]:
    """(who resolves lines, the settings of lines that say nothing), from Pipeline's and generate's words.

    `dtype` is used where they say none.

    Raises ConfigError for what no line could be drawn with.
    """
    given = {ALIASES.get(word, word): value for word, value in words.items() if value is not None}
    own = {name: given.pop(name) for name in ("lora_dir", "dtype", *OF_PAINTER) if name in given}
    if _in_memory(given.get("model")):
        own["loaded"] = given.pop("model")
    if isinstance(given.get("lora"), tuple):  # (path, weight)
        given["lora"] = [given["lora"]]
    free = {name: given.pop(name) for name in NOT_OF_LINES if name in given}
    defaults = check_words(given.items(), Path()) | {name: _plain(value) for name, value in free.items()}
    own["dtype"] = dtype if own.get("dtype", "auto") == "auto" else own["dtype"]
    resolver = Resolver(**own)
    resolver({**{name: value for name, value in defaults.items() if name != "num_images"}, "prompt": "", "seed": 0})
    return resolver, defaults


def _in_memory(model: Any) -> bool:
    return model is not None and not isinstance(model, (str, os.PathLike))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else os.fspath(value) if isinstance(value, os.PathLike) else value


def _dry(run: Run, strict: bool) -> Rendered:
    found, counts = dry(run)
    if strict and found.bad:
        _refuse_bad_lines(run, found)
    folder = run.target.folder
    paths = (folder / run.shard.file(stem) for stem in ("manifest", "report"))
    return Rendered(folder, counts, *paths, found.keys)


def _refuse_bad_lines(run: Run, found: Survey) -> None:
    what = f"{found.bad} of {found.lines} lines are bad"
    raise ConfigError(what, where=run.prompts.name, todo="mend them, or leave --strict out to have the others drawn")


def _real(run: Run, strict: bool) -> Rendered:
    with ExitStack() as stack:
        if run.ray is not None:
            stack.enter_context(joined(run.ray))
        ledger = stack.enter_context(Manifest(run.target.folder, run.shard, f".{run.target.format}"))
        report = stack.enter_context(Report(run.target.folder, run.shard))
        found = survey(run, ledger.finished, report.bad_line)
        report.count("finished_before", found.jobs - found.left)
        _say_counts(run, found, ledger)
        if strict and found.bad:
            report.finish(found.lines, found.jobs, found.elsewhere)
            _refuse_bad_lines(run, found)
        try:
            if found.left:
                _draw(run, found, ledger, report)
        except WriterStopped as stop:
            raise stop.error from None
        except Interrupted as stop:
            done, todo = report.counts["rendered"], "the same command goes on"
            raise Interrupted(
                stop.exit_code - 128, f"stopped after {done} pictures, all saved", where=ledger.folder, todo=todo
            ) from None
        finally:
            counts = _finish(report, found)
            _say_end(run, counts, report)
    return Rendered(ledger.folder, counts, ledger.folder / run.shard.file("manifest"), report.path, found.keys)


def _finish(report: Report, found: Survey) -> dict[str, Any]:
    """The report's line of counts, written where the disk has room for it."""
    try:
        return report.finish(found.lines, found.jobs, found.elsewhere)
    except ResourceError:
        return {"bad_lines": found.bad, **report.counts}


def _draw(run: Run, found: Survey, ledger: Manifest, report: Report) -> None:
    """The second pass: everything that is not finished."""
    before = found.jobs - found.left
    encode = Encode(run.target.format, run.metadata)
    with (
        console.progress(total=found.jobs, initial=before, desc="rendering", unit=" images") as bar,
        console.StopRequest() as stop,
        Writer(ledger, report, encode, bar.update) as writer,
    ):
        bar.bar_format = BAR
        words = run.resolver, writer, stop, run.batch_size, run.prompts.told
        draughtsman = BatchRenderer(*words) if run.ray is None else RayPool(*words, encode, found.left)
        draughtsman.draw(unfinished(run, found.finished))


def _say_counts(run: Run, found: Survey, ledger: Manifest) -> None:
    if ledger.damaged:
        console.warn(f"{ledger.folder}: {ledger.damaged} lines of the manifests cannot be read and count for nothing")
    before = found.jobs - found.left
    told = f"{found.lines} lines, {found.jobs} pictures, {before} finished before, {found.bad} bad lines"
    more = f", {found.elsewhere} pictures of other shards" if found.elsewhere else ""
    console.say(f"{run.prompts.name}: {told}{more}")
    others = len(ledger) - before
    if others > 0 and run.shard.of == 1:
        console.say(f"{ledger.folder} holds {others} pictures of other lines or settings: they stay as they are")


def _say_end(run: Run, counts: Mapping[str, int], report: Report) -> None:
    names = {"rendered": "rendered", "finished_before": "finished before", "bad_lines": "bad lines", "failed": "failed"}
    told = [f"{counts.get(name, 0)} {words}" for name, words in names.items()]
    told += [f"{counts['not_reached']} not reached"] if counts.get("not_reached") else []
    console.say(f"{run.target.folder}: {', '.join(told)} ({report.path})")
