"""The house of ldm/: who may import whom, and what stays out of the quick paths."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldm"

FLOORS = (  # a room imports only from lower floors; errors is the lowest
    ("errors",),
    ("config", "settings_files", "files", "file_names", "console", "device", "colours"),
    ("images", "prompts", "report", "hub"),
    ("nn",),
    ("diffusion", "data", "control"),
    ("checkpoint",),
    ("pipeline",),
    ("render", "evaluation"),
    ("training",),
    ("web", "bench"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOP = ("__init__", "__main__", "_weights")  # the front door opens every room; _weights holds the shipped model

# Ours by right: from these two libraries come an autoencoder, encoders and tokenizers, and nothing else.
DIFFUSERS_ALLOWED = {"AutoencoderKL"}
TRANSFORMERS_ALLOWED = (
    "Tokenizer",
    "TokenizerFast",
    "TokenizerBase",
    "_tokenizer",
    "TextModel",
    "TextModelWithProjection",
)
TRANSFORMERS_ALLOWED += ("TextConfig", "VisionModelWithProjection", "VisionConfig", "EncoderModel", "T5Config")
TRANSFORMERS_ALLOWED += ("AutoImageProcessor", "AutoModelForDepthEstimation")  # of a depth model for ControlNets
BENCH = "bench"  # where the peers are the other side of a comparison
FORBIDDEN_EVERYWHERE = ("peft",)
SLOW = ("torch", "diffusers", "transformers", "datasets")

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path, package: Path = PACKAGE) -> str:
    parts = ("ldm", *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def walk_tree(node: ast.AST, type_checking: bool) -> Iterator[ast.AST]:
    """Every node; without `type_checking` the bodies of `if TYPE_CHECKING:` are left out."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        only_types = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        left_out = node.body if only_types and not type_checking else []
        waiting += [child for child in ast.iter_child_nodes(node) if child not in left_out][::-1]


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def imports(source: str, module: str, is_package: bool, type_checking: bool = True) -> list[tuple]:
    """(line, module, name or None) of every import in a file, those inside functions too; relative ones resolved."""
    found = []
    for node in walk_tree(parsed(source), type_checking):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            source_module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, source_module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value, None))
    return found


def room_of(module: str, name: str | None) -> str | None:
    """The room of an imported module of ldm, or None for `from ldm import <a public name>` and other packages."""
    parts = module.split(".")
    if parts[0] != "ldm":
        return None
    if len(parts) > 1:
        return parts[1]
    return name if name in FLOOR else None


def faults_of_floors(source: str, module: str, is_package: bool) -> list[str]:
    here = module.split(".")[1] if "." in module else "__init__"
    if here in TOP:
        return []
    if here not in FLOOR:
        return [f"{module}: room '{here}' stands on no floor"]
    faults = []
    for line, imported, name in imports(source, module, is_package):
        room = room_of(imported, name)
        if room is None and imported == "ldm" and name not in (None, "__version__"):
            faults.append(f"{module}:{line} imports the front door (from ldm import {name})")
        elif room is not None and room not in FLOOR and room not in TOP:
            faults.append(f"{module}:{line} imports {imported}, which stands on no floor")
        elif room is not None and room != here and FLOOR.get(room, len(FLOORS)) >= FLOOR[here]:
            faults.append(f"{module}:{line} imports {imported}, which is not on a lower floor than {here}")
    return faults


def uses(source: str, library: str) -> list[tuple[int, str]]:
    """(line, name) of what is taken from `import library`: library.name, or "?" where the name is not written out."""
    tree = parsed(source)
    is_it = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == library}
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node.value) in is_it]
    plain = is_it - {id(node.value) for node in taken}
    found = [(node.lineno, node.attr) for node in taken]
    return found + [(node.lineno, "?") for node in ast.walk(tree) if id(node) in plain]


def allowed(library: str, name: str) -> bool:
    return name in DIFFUSERS_ALLOWED if library == "diffusers" else name.endswith(TRANSFORMERS_ALLOWED)


def faults_of_peers(source: str, module: str, is_package: bool) -> list[str]:
    if module.split(".")[1:2] == [BENCH]:
        return []
    taken = []
    for line, imported, name in imports(source, module, is_package):
        library, _, inside = imported.partition(".")
        if library in FORBIDDEN_EVERYWHERE:
            taken.append((line, library, "all"))
        elif library in ("diffusers", "transformers") and (name or inside):
            taken.append((line, library, name or inside))
        elif library in ("diffusers", "transformers"):
            taken += [(line, library, name) for line, name in uses(source, library)]
    return [
        f"{module}:{line} takes {name} from {library}" for line, library, name in taken if not allowed(library, name)
    ]


def import_graph(sources: dict[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """module -> the others of the same room that it imports; `sources` are {module: (text, is a package)}.

    A package that is imported only because a module inside it is does not count, nor does `if TYPE_CHECKING:`.
    """
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in sources.items():
        graph[module] = set()
        for _, imported, name in imports(source, module, is_package, type_checking=False):
            target = f"{imported}.{name}" if f"{imported}.{name}" in sources else imported
            if target in sources and target != module and target.split(".")[1:2] == module.split(".")[1:2]:
                graph[module].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The largest sets of modules that all reach each other by imports."""
    reach = {}
    for module in graph:
        waiting, seen = [module], set()
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        reach[module] = seen
    found = {tuple(sorted(other for other in reach[m] if m in reach[other])) for m in graph if m in reach[m]}
    return sorted(map(list, found))


def test_there_is_something_to_read():
    assert len(FILES) > 10
    assert {path.name for path in FILES} >= {"errors.py", "config.py", "schedule.py"}


@pytest.mark.parametrize("check", [faults_of_floors, faults_of_peers])
def test_every_import_of_the_package_keeps_the_rules(check):
    faults = []
    for path in FILES:
        faults += check(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py")
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize(
    "module, line, said",
    [
        ("ldm.nn.unet", "import ldm.diffusion", "not on a lower floor than nn"),
        ("ldm.nn.unet", "from ldm.pipeline.result import Images", "not on a lower floor than nn"),
        ("ldm.nn.unet", "from ldm import training", "not on a lower floor than nn"),
        ("ldm.nn.unet", "from ..diffusion import schedule", "not on a lower floor than nn"),
        ("ldm.data.sources", "from ldm.diffusion.schedule import Schedule", "not on a lower floor than data"),
        ("ldm.files", "def f():\n    from ldm.console import warn", "not on a lower floor than files"),
        ("ldm.errors", "import ldm.config", "not on a lower floor than errors"),
        ("ldm.cli.main", "from ldm.attic import box", "stands on no floor"),
        ("ldm.attic.box", "import math", "stands on no floor"),
        ("ldm.training.loop.loop", "from ldm import Pipeline", "the front door"),
        ("ldm.training.loop.loop", "import importlib\nimportlib.import_module('ldm.web')", "not on a lower floor"),
    ],
)
def test_imports_that_climb_are_found(module, line, said):
    (fault,) = faults_of_floors(line, module, is_package=False)
    assert said in fault


@pytest.mark.parametrize(
    "module, line",
    [
        ("ldm.pipeline.pipeline", "from ldm.diffusion.schedule import Schedule"),
        ("ldm.diffusion.samplers", "from ldm.diffusion.denoiser import Denoise"),
        ("ldm.diffusion.samplers", "from .denoiser import Denoise"),
        ("ldm.errors", "import difflib"),
        ("ldm.cli.main", "from ldm import __version__"),
        ("ldm.__main__", "from ldm.cli import main"),
    ],
)
def test_imports_that_go_down_are_allowed(module, line):
    assert faults_of_floors(line, module, is_package=False) == []


@pytest.mark.parametrize(
    "module, line, fine",
    [
        ("ldm.nn.vae", "from diffusers import AutoencoderKL", True),
        ("ldm.nn.unet", "from diffusers import UNet2DConditionModel", False),
        ("ldm.diffusion.schedule", "def f():\n    from diffusers import DDIMScheduler", False),
        ("ldm.nn.vae", "import diffusers\nmodel = diffusers.AutoencoderKL()", True),
        ("ldm.nn.unet", "import diffusers\nmodel = diffusers.UNet2DModel()", False),
        ("ldm.nn.unet", "import transformers\nmodel = getattr(transformers, name)", False),
        ("ldm.nn.unet", "import diffusers.schedulers", False),
        ("ldm.nn.unet", "from diffusers.models.attention import Attention", False),
        ("ldm.bench.against", "from diffusers import StableDiffusionPipeline", True),
        ("ldm.nn.text", "from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer", True),
        ("ldm.nn.text", "from transformers import CLIPTextConfig, T5EncoderModel, PreTrainedTokenizerFast", True),
        ("ldm.training.loop.loop", "from transformers import Trainer", False),
        ("ldm.training.loop.loop", "from transformers import get_cosine_schedule_with_warmup", False),
        ("ldm.nn.lora", "import peft", False),
    ],
)
def test_what_may_come_from_diffusers_and_transformers(module, line, fine):
    assert (faults_of_peers(line, module, is_package=False) == []) == fine


def test_homes_are_put_in_by_os_path():
    """Path.expanduser raises RuntimeError for a user who does not exist; os.path.expanduser leaves the name."""
    found = [path for path in PACKAGE.rglob("*.py") if ".expanduser()" in path.read_text(encoding="utf-8")]
    assert not found and any(
        "os.path.expanduser(" in path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")
    )


def test_no_room_has_a_circle_of_imports():
    sources = {module_of(path): (path.read_text(encoding="utf-8"), path.name == "__init__.py") for path in FILES}
    found = circles(import_graph(sources))
    assert not found, "\n" + "\n".join(" <-> ".join(circle) for circle in found)


@pytest.mark.parametrize(
    "a, b, c, circle",
    [
        ("import ldm.nn.b", "import ldm.nn.a", "", ["ldm.nn.a", "ldm.nn.b"]),
        (
            "from ldm.nn import b",
            "from .c import x",
            "def f():\n    from .a import x",
            ["ldm.nn.a", "ldm.nn.b", "ldm.nn.c"],
        ),
        ("from .b import x", "from importlib import *\nimport_module('ldm.nn.a')", "", ["ldm.nn.a", "ldm.nn.b"]),
        ("from ldm.nn import x", "", "", ["ldm.nn", "ldm.nn.a"]),
        ("import ldm.nn.b", "if TYPE_CHECKING:\n    from ldm.nn.a import x", "", None),
        (
            "import ldm.nn.b",
            "if typing.TYPE_CHECKING:\n    pass\nelse:\n    import ldm.nn.a",
            "",
            ["ldm.nn.a", "ldm.nn.b"],
        ),
        ("import ldm.nn.b\nimport ldm.nn.c", "import ldm.nn.c", "import ldm.data.d", None),
    ],
)
def test_circles_of_imports_are_found(a, b, c, circle):
    sources = {"ldm.nn.a": (a, False), "ldm.nn.b": (b, False), "ldm.nn.c": (c, False)}
    sources |= {"ldm.nn": ("from ldm.nn.a import x" if circle and "ldm.nn" in circle else "", True)}
    sources |= {"ldm.data.d": ("import ldm.nn.a", False)}  # of another room: the floors refuse it
    assert circles(import_graph(sources)) == ([circle] if circle else [])


QUICK = [
    "ldm",
    "ldm.errors",
    "ldm.config",
    "ldm.files",
    "ldm.console",
    "ldm.prompts",
    "ldm.diffusion.samplers",
    "ldm.diffusion.spacings",
    "ldm.diffusion.guidance",
]
QUICK += [module_of(path) for path in FILES if path.parent.name == "cli" and path.stem != "__main__"]


def test_the_quick_paths_import_no_heavy_library():
    """`ldm --help` imports these; torch alone would cost more than a second."""
    program = f"import importlib, sys\nfor name in {QUICK!r}: importlib.import_module(name)\n"
    program += f"print([name for name in {SLOW!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
