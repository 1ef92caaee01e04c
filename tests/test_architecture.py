"""Which module may import which, and what an import costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import ROOT

import clipfast

# Layer → what it may import of clipfast. The longest matching prefix of a module is its layer; a name allows itself
# and everything below it. A module always may import its own layer.
ALLOWED: dict[str, set[str]] = {
    "clipfast": {  # names, lazily
        "clipfast.analyses",
        "clipfast.contributions",
        "clipfast.errors",
        "clipfast.loading",
        "clipfast.model",
        "clipfast.summary",
        "clipfast.verification",
    },
    "clipfast.errors": set(),
    "clipfast.files": set(),
    "clipfast.storage": {"clipfast.files", "clipfast.errors"},
    "clipfast.kernels": set(),
    "clipfast.towers.tower": set(),
    "clipfast.towers": {"clipfast.towers.tower", "clipfast.errors"},
    "clipfast.inputs": set(),
    "clipfast.signals": set(),
    "clipfast.images": {"clipfast.inputs", "clipfast.errors"},
    "clipfast.preprocessing": {"clipfast.inputs", "clipfast.errors"},
    "clipfast.reading": {"clipfast.images", "clipfast.inputs", "clipfast.preprocessing", "clipfast.errors"},
    "clipfast.transfer": set(),
    "clipfast.indices": {"clipfast.errors"},
    "clipfast.fingerprint": {"clipfast.towers.tower", "clipfast.errors"},
    "clipfast.basis": {"clipfast.towers.tower", "clipfast.fingerprint", "clipfast.kernels", "clipfast.errors"},
    "clipfast.contributions": {
        "clipfast.basis",
        "clipfast.indices",
        "clipfast.storage",
        "clipfast.kernels",
        "clipfast.presentation",  # in methods alone, see test_contributions_import_what_shows_them_when_it_is_called
        "clipfast.errors",
    },
    "clipfast.presentation": {
        "clipfast.contributions",
        "clipfast.basis",
        "clipfast.report.canvas",
        "clipfast.report.palette",
        "clipfast.report.shares",
        "clipfast.errors",
    },
    "clipfast.graphs": {"clipfast.contributions", "clipfast.kernels"},
    "clipfast.fp8": {"clipfast.towers.tower", "clipfast.kernels"},
    "clipfast.forward.blocks": {"clipfast.towers.tower", "clipfast.kernels"},
    "clipfast.forward.embedding": {"clipfast.forward.blocks", "clipfast.towers.tower", "clipfast.kernels"},
    "clipfast.forward.pooling": {"clipfast.forward.blocks", "clipfast.towers.tower", "clipfast.kernels"},
    "clipfast.forward.stream": {
        "clipfast.forward.blocks",
        "clipfast.forward.pooling",
        "clipfast.towers.tower",
        "clipfast.fp8",
        "clipfast.kernels",
    },
    "clipfast.forward": {
        "clipfast.towers.tower",
        "clipfast.fp8",
        "clipfast.basis",
        "clipfast.contributions",
        "clipfast.kernels",
        "clipfast.errors",
    },
    "clipfast.verification": {
        "clipfast.towers.tower",
        "clipfast.fp8",
        "clipfast.basis",
        "clipfast.forward",
        "clipfast.kernels",
    },
    "clipfast.summary": {"clipfast.towers", "clipfast.basis", "clipfast.kernels"},
    "clipfast.mismatches": {"clipfast.towers", "clipfast.summary"},
    "clipfast.model": {
        "clipfast.towers",
        "clipfast.arguments",
        "clipfast.summary",
        "clipfast.mismatches",
        "clipfast.fingerprint",
        "clipfast.verification",
        "clipfast.forward",
        "clipfast.fp8",
        "clipfast.graphs",
        "clipfast.contributions",
        "clipfast.basis",
        "clipfast.indices",
        "clipfast.reading",
        "clipfast.transfer",
        "clipfast.kernels",
        "clipfast.errors",
    },
    "clipfast.arguments": {"clipfast.towers.tower", "clipfast.basis", "clipfast.reading", "clipfast.errors"},
    "clipfast.loading": {"clipfast.model", "clipfast.towers", "clipfast.mismatches", "clipfast.errors"},
    "clipfast.selftest": {"clipfast.model", "clipfast.contributions", "clipfast.basis", "clipfast.scenes"},
    "clipfast.analyses": {
        "clipfast.contributions",
        "clipfast.basis",
        "clipfast.indices",
        "clipfast.storage",
        "clipfast.kernels.ops",
        "clipfast.errors",
    },
    # Analyses of the tower itself: its weights, or a forward of their own.
    "clipfast.analyses.weights": {
        "clipfast.analyses",
        "clipfast.towers.tower",
        "clipfast.basis",
        "clipfast.indices",
        "clipfast.errors",
    },
    "clipfast.analyses.neurons": {"clipfast.towers.tower", "clipfast.basis", "clipfast.errors"},
    "clipfast.analyses.gradients": {"clipfast.towers.tower", "clipfast.basis", "clipfast.errors"},
    "clipfast.analyses.relevance": {
        "clipfast.analyses",
        "clipfast.towers.tower",
        "clipfast.basis",
        "clipfast.indices",
    },
    "clipfast.analyses.second_order": {
        "clipfast.analyses",
        "clipfast.towers.tower",
        "clipfast.forward.blocks",
        "clipfast.forward.embedding",
        "clipfast.forward.pooling",
        "clipfast.basis",
        "clipfast.fingerprint",
        "clipfast.kernels.ops",
        "clipfast.errors",
    },
    "clipfast.descriptions": {"clipfast.scenes", "clipfast.files", "clipfast.inputs", "clipfast.errors"},
    "clipfast.dataset": {
        "clipfast.analyses.moments",
        "clipfast.contributions",
        "clipfast.indices",
        "clipfast.basis",
        "clipfast.model",
        "clipfast.preprocessing",
        "clipfast.reading",
        "clipfast.transfer",
        "clipfast.storage",
        "clipfast.images",
        "clipfast.inputs",
        "clipfast.files",
        "clipfast.signals",
        "clipfast.errors",
    },
    "clipfast.scenes": {"clipfast.files", "clipfast.errors"},
    "clipfast.report": {
        "clipfast.analyses",
        "clipfast.contributions",
        "clipfast.model",
        "clipfast.images",
        "clipfast.errors",
    },
    "clipfast.compat": {
        "clipfast.analyses",
        "clipfast.contributions",
        "clipfast.dataset.text_span_files",
        "clipfast.towers.wrappers",
        "clipfast.model",
        "clipfast.loading",
        "clipfast.errors",
    },
    # Activations need the forward's own steps.
    "clipfast.compat.activations": {
        "clipfast.basis",
        "clipfast.contributions",
        "clipfast.forward",
        "clipfast.kernels.buffers",
        "clipfast.kernels.reference",
        "clipfast.towers.tower",
        "clipfast.errors",
    },
    "clipfast.compat.relevance": {"clipfast.loading", "clipfast.model", "clipfast.towers.tower", "clipfast.errors"},
    "clipfast.compat.legrad": {"clipfast.analyses", "clipfast.compat", "clipfast.model", "clipfast.errors"},
    "clipfast.compat.chefer": {
        "clipfast.analyses",
        "clipfast.compat",
        "clipfast.model",
        "clipfast.basis",
        "clipfast.indices",
        "clipfast.towers.packages",
        "clipfast.errors",
    },
    "clipfast.compat.grad_cam": {
        "clipfast.analyses",
        "clipfast.compat",
        "clipfast.model",
        "clipfast.basis",
        "clipfast.indices",
        "clipfast.towers.tower",
        "clipfast.errors",
    },
    "clipfast.compat.captum": {"clipfast.compat", "clipfast.model", "clipfast.basis", "clipfast.errors"},
    "clipfast.compat.transformer_lens": {
        "clipfast.compat",
        "clipfast.loading",
        "clipfast.model",
        "clipfast.basis",
        "clipfast.indices",
        "clipfast.kernels.reference",
        "clipfast.towers.tower",
        "clipfast.errors",
    },
    "clipfast.bench": {
        "clipfast.report.palette",
        "clipfast.loading",
        "clipfast.model",
        "clipfast.towers.huggingface_models",
        "clipfast.towers.openclip",
        "clipfast.towers.openclip_models",
        "clipfast.towers.openclip_sizes",
        "clipfast.contributions",
        "clipfast.kernels.dispatch",
        "clipfast.errors",
        "clipfast.inputs",
    },
    "clipfast.commands": {
        "clipfast.analyses",
        "clipfast.dataset",
        "clipfast.descriptions",
        "clipfast.report",
        "clipfast.scenes",
        "clipfast.files",
        "clipfast.fingerprint",
        "clipfast.storage",
        "clipfast.loading",
        "clipfast.model",
        "clipfast.selftest",
        "clipfast.contributions",
        "clipfast.basis",
        "clipfast.images",
        "clipfast.inputs",
        "clipfast.preprocessing",
        "clipfast.reading",
        "clipfast.kernels",
        "clipfast.kernels.ops",
        "clipfast.signals",
        "clipfast.errors",
    },
    # The list of models is the towers' own; no other command looks behind clipfast.model.
    "clipfast.commands.models": {
        "clipfast.commands",
        "clipfast.towers.catalogue",
        "clipfast.arguments",
        "clipfast.loading",
        "clipfast.summary",
        "clipfast.kernels",
        "clipfast.files",
        "clipfast.errors",
    },
    # Plans are made from the shape of a model, also of one that is known by name alone.
    "clipfast.commands.plan": {
        "clipfast.commands",
        "clipfast.arguments",
        "clipfast.dataset",
        "clipfast.loading",
        "clipfast.model",
        "clipfast.scenes",
        "clipfast.summary",
        "clipfast.towers.catalogue",
        "clipfast.towers.tower",
        "clipfast.errors",
    },
    # Names of ImageNet's classes are open_clip's, read through the towers that know it.
    "clipfast.commands.reproduce": {
        "clipfast.commands",
        "clipfast.analyses",
        "clipfast.basis",
        "clipfast.dataset",
        "clipfast.descriptions",
        "clipfast.report",
        "clipfast.towers.openclip_names",
        "clipfast.model",
        "clipfast.files",
        "clipfast.inputs",
        "clipfast.errors",
    },
    # Measuring is the business of two commands; no other can start it.
    "clipfast.commands.bench": {"clipfast.commands", "clipfast.bench", "clipfast.files", "clipfast.errors"},
    "clipfast.cli": {"clipfast.commands", "clipfast.errors"},
    "clipfast.__main__": {"clipfast.cli"},
}
ANYONE_MAY_ASK_THE_VERSION = {"clipfast.cli", "clipfast.commands"}  # `import clipfast`

# Packages that models come from → the only modules that may import them.
HOMES = {
    "open_clip": (
        "clipfast.towers.openclip",
        "clipfast.towers.openclip_models",
        "clipfast.towers.openclip_names",
        "clipfast.towers.openai_models",
        "clipfast.scenes",
    ),
    "timm": tuple(
        f"clipfast.towers.timm_{part}"
        for part in ("parts", "positions", "blocks", "pools", "networks", "towers", "models")
    ),
    "transformers": tuple(f"clipfast.towers.huggingface{part}" for part in ("", "_layouts", "_models", "_processors")),
}


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def sources() -> Iterator[tuple[str, Path]]:
    """Every module's name and file."""
    for path in sorted((ROOT / "clipfast").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(sources())


def imports(module: str) -> set[str]:
    """Everything a module imports, also under ``TYPE_CHECKING``; of ``from a import b``, ``a.b`` if it is a module."""
    path, result = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                stem = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*stem, *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            result |= {name if name in MODULES else base for name in names}
    return result


def layer(module: str) -> str | None:
    fitting = [name for name in ALLOWED if below(module, name) and (name != "clipfast" or module == "clipfast")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    own = layer(module)
    assert own is not None, f"{module} belongs to no layer: give it a line in ALLOWED"
    allowed = {own, *ALLOWED[own]} - {"clipfast"}
    wrong = {
        name
        for name in imports(module)
        if below(name, "clipfast")
        and not any(below(name, prefix) for prefix in allowed)
        and not (name == "clipfast" and any(below(module, prefix) for prefix in ANYONE_MAY_ASK_THE_VERSION))
    }
    assert wrong == set()


@pytest.mark.parametrize("module", MODULES)
def test_each_package_that_models_come_from_has_one_home(module: str) -> None:
    wrong = {
        name
        for name in imports(module)
        for package, homes in HOMES.items()
        if below(name, package) and not any(below(module, home) for home in homes)
    }
    assert wrong == set()


def test_nothing_imports_the_command_line() -> None:
    others = [name for name in MODULES if name != "clipfast.__main__" and not below(name, "clipfast.cli")]
    assert [module for module in others if any(below(name, "clipfast.cli") for name in imports(module))] == []


def test_the_table_is_of_modules_that_exist() -> None:
    """A line whose layer is gone allows, and checks, nothing."""
    named = {*ALLOWED, *(name for allowed in ALLOWED.values() for name in allowed)}
    assert {name for name in named if not any(below(module, name) for module in MODULES)} == set()


# --------------------------------------------------------------------------------------------- in a fresh process


def run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)


def test_importing_clipfast_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    heavy = ("torch", "numpy", "open_clip", "PIL", "triton", "safetensors")
    done = run(f"import sys, clipfast; print([name for name in {heavy!r} if name in sys.modules])", tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_contributions_import_what_shows_them_when_it_is_called(tmp_path: Path) -> None:
    shown = ("clipfast.presentation", "clipfast.report", "PIL", "pandas", "xarray")
    script = f"import sys, clipfast.contributions; print([name for name in {shown!r} if name in sys.modules])"
    done = run(script, tmp_path)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_repository_stands_in_for_no_package_of_another_name() -> None:
    """Programs that run in a checkout import from it first: transformers looks for a package called kernels."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"benchmarks", "clipfast"}


@pytest.mark.parametrize("name", clipfast.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(clipfast, name)
    assert name in dir(clipfast)
    assert value.__name__ == name
    assert value.__module__.startswith("clipfast.")
    assert (value.__doc__ or "").strip()


def test_a_name_that_is_not_public() -> None:
    with pytest.raises(AttributeError, match="module 'clipfast' has no attribute 'decompose'"):
        _ = clipfast.decompose
    assert len(set(clipfast.__all__)) == len(clipfast.__all__)


# ------------------------------------------------------------------------------------------------- tracked files

HOUSEHOLD = re.compile(
    r"(?<![\w.:/-])/(?:work|root|home)/\w"  # somebody's folders
    r"|--(?:extra-)?index-url|\bPIP_\w*INDEX_URL"  # somebody's package index
    r"|https?://[\w.-]*(?:artifactory|nexus|registry|pypi)[\w.-]*(?<!//pypi\.org)[:/]"
)


def test_the_household_pattern_finds_what_it_is_for() -> None:
    slash = "/"
    for text in (
        f"{slash}work/main/x",
        f'open("{slash}root/x")',
        "pip install --index" + "-url x",
        "http:" + "//nexus.local/x",
    ):
        assert HOUSEHOLD.search(text), text
    for text in ("a/work/b", "https://pypi.org/project/clipfast", "images/root/x", "the network"):
        assert not HOUSEHOLD.search(text), text


def test_tracked_files_name_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout")
    result = []
    for name in listed.stdout.rstrip("\0").split("\0"):
        path = ROOT / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        result += [f"{name}: {match.group()}" for match in HOUSEHOLD.finditer(text)]
    assert result == []
