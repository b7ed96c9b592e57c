"""The package as a whole: what it imports, how its parts depend on each other, what is shipped."""

from __future__ import annotations

import ast
import configparser
import pathlib
import subprocess
import sys

import pytest
from support import nano, write_checkpoint

import numpygpt
from numpygpt.checkpoints.locate import bundled, weights_directory

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = ROOT / "numpygpt"
MODULES = sorted(SOURCE.rglob("*.py"))

# From the bottom up; a module imports only from layers below its own (or from its own package).
LAYERS = [
    {"errors"},
    {"arguments"},
    {"threads"},
    {"ops"},
    {"params"},
    {"storage"},
    {"cache", "layout"},
    {"plans"},
    {"model"},
    {"feed", "checkpoints", "text", "bpe"},
    {"tokenizer", "decoding", "records"},
    {"scoring"},
    {"divergence"},
    {"api"},
    {"loading"},
    {"convert", "evaluation", "verify"},
    {"bench"},
    {"__init__", "cli"},
    {"__main__"},
]


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports(path: pathlib.Path) -> set[str]:
    """The top-level parts of numpygpt that a module imports, also inside functions."""
    package = path.relative_to(SOURCE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package, "")[: len(package) - node.level + 1]
            names = (node.module or "").split(".") if node.module else [a.name for a in node.names]
            found |= {base[0]} if base and base[0] else set(names[:1] if node.module else names)
    return {name for name in found if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").exists()}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: pathlib.Path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    upward = {name for name in imports(path) - {own} if layer(name) >= layer(own)}
    assert not upward, f"{own} imports {upward}, which stand beside or above it"


def test_import_pulls_in_numpy_and_the_standard_library_only():
    code = (
        "import sys, pathlib; before = set(sys.modules); import numpygpt, numpy\n"
        "home = str(pathlib.Path(numpy.__file__).parent)\n"
        "for name in set(sys.modules) - before:\n"
        "    file = getattr(sys.modules[name], '__file__', None) or home\n"
        "    top = name.split('.')[0]\n"
        "    ours = top == 'numpygpt' or top in sys.stdlib_module_names\n"
        "    if not ours and not file.startswith(home): print(name, file)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == ""


def test_ids_work_without_tiktoken():
    code = (
        "import sys; sys.modules['tiktoken'] = None; import numpygpt; "
        "m = numpygpt.load('shakespeare'); print(m.logits([1, 2, 3]).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"(3, {numpygpt.load('shakespeare').config.vocab_size})"


# What takes long to import (with its share of the time that `import numpy` takes), and what for.
SLOW = {
    "tiktoken",  # 0.1, and 0.6 to build: texts that are long or in other alphabets
    "importlib.metadata",  # 0.2: run records
    "numpy.random",  # 0.1: drawing at random
    "tqdm",  # 0.4: progress bars
    "numpygpt.checkpoints.torch_files",  # other formats
    "numpygpt.cli.score",  # other verbs
}


@pytest.mark.parametrize(
    "code",
    [
        "import numpygpt; numpygpt.load(path).generate('Hello', max_new_tokens=1)",
        "from numpygpt.cli import main; main(['generate', 'Hello', '--model', path])",
    ],
    ids=["Python", "command line"],
)
def test_a_first_token_waits_for_nothing_that_it_does_not_need(tmp_path, code):
    path = write_checkpoint(tmp_path / "model", nano(vocab_size=50257, n_ctx=128))
    setup = f"import sys, numpy; before = set(sys.modules); path = {str(path)!r}\n"
    shown = "\nprint(*set(sys.modules) - before)"
    done = subprocess.run(
        [sys.executable, "-c", setup + code + shown], check=True, capture_output=True, text=True
    )
    imported = set(done.stdout.splitlines()[-1].split())
    assert "numpygpt.bpe" in imported
    assert not imported & SLOW


def test_every_package_is_listed_in_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    present = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCE.rglob("__init__.py")
    }
    assert listed == present | {"numpygpt.weights"}


def test_the_top_level_holds_what_the_brief_names():
    allowed = {
        "numpygpt", "tests", "weights", "scripts", "setup.cfg", "README.md", "pyproject.toml",
        "LICENSE", "CHANGELOG.md", ".gitignore", ".ci",
    }  # fmt: skip
    try:
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in tracked} == allowed


def test_the_bundled_model_is_found_where_the_package_is():
    assert bundled() == ["shakespeare"]
    files = {path.name for path in (weights_directory() / "shakespeare").iterdir()}
    assert files == {"config.json", "model.safetensors", "vocab.json", "merges.txt", "README.md"}
    assert (weights_directory() / "gpt2" / "vocab.bpe").exists()


def test_the_bundled_model_keeps_its_budget():
    size = (weights_directory() / "shakespeare" / "model.safetensors").stat().st_size
    assert size <= 12e6
    assert 3e6 <= numpygpt.load("shakespeare").config.parameter_count <= 6e6
