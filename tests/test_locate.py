"""Finding checkpoints: paths, bundled names, and downloads that are already there."""

from __future__ import annotations

import os
import pathlib

import pytest
from support import nano, write_checkpoint

from numpygpt import checkpoints
from numpygpt.checkpoints import find, locate
from numpygpt.errors import ModelNotFoundError

REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A package directory of its own, so that the test decides what is bundled."""
    package = tmp_path / "site" / "numpygpt"
    (package / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(locate, "__file__", str(package / "checkpoints" / "locate.py"))
    return package


@pytest.fixture
def here(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty working directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def no_cache_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> pathlib.Path:
    """Nothing says where the cache is; the home directory is the test's."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


def download(cache: pathlib.Path, repository: str, revision: str = REVISION) -> pathlib.Path:
    """What huggingface_hub leaves behind: blobs, a snapshot that links to them, and a ref."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    blobs, snapshot = folder / "blobs", folder / "snapshots" / revision
    write_checkpoint(blobs, nano())
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        blob = (blobs / name).rename(blobs / f"{number:064x}")
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    return snapshot


def listing(directory: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory with its size and time of change."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


# -- bundled models ----------------------------------------------------------------------------


def test_the_demo_model_is_bundled():
    assert "shakespeare" in checkpoints.bundled()
    assert checkpoints.find("shakespeare") == locate.weights_directory() / "shakespeare"


def test_weights_inside_the_package_win_over_those_beside_it(package):
    beside, inside = package.parent / "weights", package / "weights"
    write_checkpoint(beside / "one", nano())
    assert (locate.weights_directory(), checkpoints.bundled()) == (beside, ["one"])
    write_checkpoint(inside / "two", nano())
    assert (locate.weights_directory(), checkpoints.bundled()) == (inside, ["two"])
    assert checkpoints.find("two") == inside / "two"


def test_a_directory_without_a_config_is_not_a_bundled_model(package):
    (package / "weights" / "gpt2").mkdir(parents=True)
    write_checkpoint(package / "weights" / "demo", nano())
    assert checkpoints.bundled() == ["demo"]


def test_a_checkpoint_in_the_working_directory_wins_over_a_bundled_one(package, here):
    bundled = write_checkpoint(package / "weights" / "demo", nano())
    assert checkpoints.find("demo") == bundled
    (here / "demo").mkdir()
    assert checkpoints.find("demo") == bundled  # it holds no checkpoint
    write_checkpoint(here / "demo", nano())
    assert checkpoints.find("demo").resolve() == here / "demo"


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "ckpt.pt", "model.ckpt.index", "x.gguf", "flax_model.msgpack"]
)
def test_a_directory_with_another_format_wins_over_a_known_name(package, here, name):
    (here / "gpt2").mkdir()
    with pytest.raises(ModelNotFoundError, match="not on this machine"):
        checkpoints.find("gpt2")
    (here / "gpt2" / name).touch()
    assert checkpoints.find("gpt2").resolve() == here / "gpt2"


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_directories_and_files_are_found_as_they_are(tmp_path, kind):
    directory = write_checkpoint(tmp_path / "model", nano())
    for path in (directory, directory / "model.safetensors"):
        assert checkpoints.find(kind(path)) == path


# -- the cache ---------------------------------------------------------------------------------

PLACES = {
    "HF_HUB_CACHE": "",
    "HF_HOME": "hub",
    "XDG_CACHE_HOME": "huggingface/hub",
    "HOME": ".cache/huggingface/hub",
}


@pytest.mark.parametrize(("variable", "below"), PLACES.items(), ids=PLACES)
def test_a_download_is_found_wherever_its_variables_put_it(
    package, here, no_cache_variables, monkeypatch, tmp_path, variable, below
):
    monkeypatch.setenv(variable, str(tmp_path / "place"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "place"))  # HOME on Windows
    snapshot = download(tmp_path / "place" / below, "openai-community/gpt2")
    before = listing(tmp_path)
    for name in ("gpt2", "openai-community/gpt2"):
        assert checkpoints.find(name) == snapshot
    assert checkpoints.read(snapshot).config == nano()
    assert listing(tmp_path) == before


def test_the_more_special_variable_wins(package, here, no_cache_variables, monkeypatch, tmp_path):
    snapshots = []
    for variable, below in reversed(PLACES.items()):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        snapshots.append(download(tmp_path / variable / below, "org/model"))
        assert checkpoints.find("org/model") == snapshots[-1]
    monkeypatch.setenv("HF_HUB_CACHE", "")  # as if it were not set
    assert checkpoints.find("org/model") == snapshots[-2]


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("some-org/its.model_2", "some-org/its.model_2"),
    ],
)
def test_short_names_stand_for_their_repositories(here, monkeypatch, tmp_path, name, repository):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = download(tmp_path / "hub", repository)
    assert checkpoints.find(name) == snapshot


def test_the_ref_decides_which_of_two_snapshots_is_meant(here, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = download(tmp_path, "org/model", "b" * 40)
    for other in ("a" * 40, "c" * 40):
        write_checkpoint(snapshot.with_name(other), nano())
    assert checkpoints.find("org/model") == snapshot
    (snapshot.parents[1] / "refs" / "main").write_text("c" * 40 + "\n")
    assert checkpoints.find("org/model") == snapshot.with_name("c" * 40)


@pytest.mark.parametrize("damage", ["no ref", "no snapshot", "no config", "no text", "empty ref"])
def test_half_a_download_is_none(here, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = download(tmp_path, "openai-community/gpt2")
    ref = snapshot.parents[1] / "refs" / "main"
    if damage == "no ref":
        ref.unlink()
    elif damage == "no snapshot":
        ref.write_text("a" * 40)
    elif damage == "no config":
        (snapshot / "config.json").unlink()
    elif damage == "no text":
        ref.write_bytes(b"\xff\xfe")
    else:
        ref.write_text("")
    with pytest.raises(ModelNotFoundError, match="'gpt2' is not on this machine"):
        checkpoints.find("gpt2")


def test_a_ref_cannot_lead_out_of_the_cache(here, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = download(tmp_path / "hub", "org/model")
    outside = write_checkpoint(tmp_path / "outside", nano())
    for escape in (str(outside), "../../../outside", "..", "."):
        (snapshot.parents[1] / "refs" / "main").write_text(escape)
        with pytest.raises(ModelNotFoundError, match="'org/model' is not on this machine"):
            checkpoints.find("org/model")


# -- names that lead nowhere -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("shakespear", "shakespeare"),
        ("Shakespeare", "shakespeare"),
        ("gpt-2", "gpt2"),
        ("gpt2_xl", "gpt2-xl"),
        ("distillgpt2", "distilgpt2"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(here, name, meant):
    with pytest.raises(ModelNotFoundError, match=f"unknown model '{name}'.*mean.*'{meant}'"):
        checkpoints.find(name)


def test_a_misspelt_path_gets_the_nearest_neighbour(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1000", nano())
    with pytest.raises(ModelNotFoundError, match=r"Did you mean '.*checkpoint-1000'\?"):
        checkpoints.find(tmp_path / "chekpoint-1000")


def test_a_name_like_no_other_gets_the_list_of_bundled_models(here):
    with pytest.raises(ModelNotFoundError, match=r"unknown model 'qqq'.*Bundled models: .*shakesp"):
        checkpoints.find("qqq")


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "some-org/model"])
def test_a_model_not_downloaded_yet_gets_the_places_searched_and_what_to_do(
    here, monkeypatch, tmp_path, name
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ModelNotFoundError) as caught:
        checkpoints.find(name)
    message = str(caught.value)
    assert f"{name!r} is not on this machine" in message
    assert str(tmp_path / "hub") in message
    assert "numpygpt never downloads" in message
    assert "config.json, model.safetensors, vocab.json and merges.txt" in message
    assert not (tmp_path / "hub").exists()


NO_FILE = {"empty": "", "NUL": "a\0b", "long": "x" * 5000, "org": "org/" + "x" * 5000}


@pytest.mark.parametrize("name", [*NO_FILE.values(), "\ud800"], ids=[*NO_FILE, "surrogate"])
def test_a_name_that_no_file_can_have_is_not_found(here, name):
    with pytest.raises(ModelNotFoundError):
        checkpoints.find(name)


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("folder", ["models--gpt2", "models--openai-community--gpt2"])
def test_a_download_under_either_name_is_found(tmp_path, monkeypatch, name, folder):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / folder / "refs").mkdir()
    (tmp_path / folder / "refs" / "main").write_text("abc")
    assert find(name) == snapshot


def test_an_unrelated_directory_does_not_hide_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(ModelNotFoundError, match="not on this machine"):
        find("gpt2")
    (tmp_path / "shakespeare").mkdir()
    (tmp_path / "shakespeare" / "model.safetensors").write_bytes(b"mine")
    assert find("shakespeare") == pathlib.Path("shakespeare")


def test_the_home_directory_in_a_variable_is_expanded(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "~/hf")
    with pytest.raises(ModelNotFoundError) as error:
        find("gpt2")
    assert str(tmp_path / "hf" / "hub") in str(error.value)
