"""The benchmark: its arithmetic, and that no contestant can spoil it. Nothing here is timed."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support import nano, random_tensors, write_checkpoint

import numpygpt
from numpygpt.bench import machine, profile, report
from numpygpt.bench.cases import DEFAULT, Case, fitting
from numpygpt.bench.contestant import cold_command, find, known, packed, unpacked
from numpygpt.bench.process import ContestantFailed, Lacks, Process, cold_start
from numpygpt.bench.rounds import Settings, WrongResultsError, distance, measure
from numpygpt.bench.shapes import (
    SIZES,
    attention_flops,
    cache_bytes,
    matrix_bytes,
    prefill_flops,
    write_random_checkpoint,
)
from numpygpt.cli import main
from numpygpt.errors import ArgumentError
from numpygpt.params import Config

TESTS = str(pathlib.Path(__file__).parent)
CONFIG = nano(n_ctx=48)

# Seconds; a process that is waited for needs one to start, and several where much else runs.
LONG = 60.0


def make_visible(patch: pytest.MonkeyPatch) -> None:
    """Let the processes of contestants find numpygpt, and the module with those of the tests."""
    places = [TESTS, str(pathlib.Path(numpygpt.__file__).parent.parent)]
    patch.setenv("PYTHONPATH", os.pathsep.join(places))


@pytest.fixture(autouse=True)
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    make_visible(monkeypatch)


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_checkpoint(tmp_path / "model", CONFIG)


# -- work ----------------------------------------------------------------------------------------

# Small enough to count by hand: C = 2, F = 8, V = 5, two layers. The matrices of a block have
# 2*6 + 2*2 + 2*8 + 8*2 = 48 numbers, the head 10.
TINY = Config(vocab_size=5, n_ctx=7, n_embd=2, n_layer=2, n_head=1)


def test_bytes_of_a_step():
    assert matrix_bytes(TINY) == 4 * (2 * 48 + 10)
    assert cache_bytes(TINY, positions=3) == 4 * 2 * 2 * 2 * 3  # float32, k and v, L, C, positions


def test_operations_of_a_prefill():
    # Three rows see 1 + 2 + 3 keys: 6 dot products and 6 scaled values of 2 numbers, 2 operations
    # each, in 2 layers.
    attention = 2 * (6 * 2 * 2 + 6 * 2 * 2)
    assert attention_flops(TINY, rows=3) == attention
    assert prefill_flops(TINY, rows=3) == 2 * (3 * 96 + 10) + attention
    assert prefill_flops(TINY, rows=3, logits=3) == 2 * (3 * 96 + 3 * 10) + attention


def test_sizes_are_those_of_gpt2():
    counts = {name: config.parameter_count for name, config in SIZES.items()}
    del counts["nano"]
    assert counts == {
        "124M": 124_439_808,
        "355M": 354_823_168,
        "774M": 774_030_080,
        "1558M": 1_557_611_200,
    }


def test_random_weights_are_the_same_every_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    written, contents = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_random_checkpoint(tmp_path / name, CONFIG, written.append)
        contents.append((tmp_path / name / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]
    assert sum(written) == 2 * 4 * CONFIG.parameter_count
    params = numpygpt.load(tmp_path / "a").params
    assert abs(params.h[1].ln_2.g.mean() - 1) < 0.1  # five times the deviation of such a mean
    assert abs(np.std(params.wte) - 0.02) < 0.005
    # Written piece by piece: nothing lost, nothing twice.
    monkeypatch.setattr("numpygpt.bench.shapes.PIECE", 7)
    (tmp_path / "c").mkdir()
    write_random_checkpoint(tmp_path / "c", CONFIG)
    assert numpygpt.load(tmp_path / "c").params.wte.shape == params.wte.shape


# -- cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "positions", "tokens"),
    [
        ("decode32", 32 + 10, 10),
        ("prefill512", 512, 512),
        ("batch8", 32 + 10, 80),
        ("score1024", 1024, 1024),
        ("cold", 8, 1),
    ],
)
def test_what_a_case_takes(name: str, positions: int, tokens: int):
    case = Case.named(name)
    assert (case.name, case.positions(10), case.tokens(10)) == (name, positions, tokens)


@pytest.mark.parametrize(
    "name", ["", "decode", "decode0", "decode-1", "cold3", "encode5", "score1"]
)
def test_a_case_that_does_not_exist(name: str):
    with pytest.raises(ArgumentError, match="case"):
        Case.named(name)


def test_arguments_are_ids_of_the_vocabulary_and_the_same_every_time():
    for name in DEFAULT[:-1]:
        case = Case.named(name)
        ids, *steps = case.arguments(vocab_size=3, steps=9)
        assert case.arguments(3, 9) == [ids, *steps]
        assert steps == ([9] if case.kind in ("decode", "batch") else [])
        assert set(np.ravel(ids)) == {0, 1, 2}
        assert np.shape(ids) == ((case.size, 32) if case.kind == "batch" else (case.size,))


def test_only_cases_that_fit():
    cases = [Case.named(name) for name in DEFAULT]
    names = [case.name for case in fitting(cases, Config(n_ctx=512), steps=100)]
    assert names == ["decode32", "prefill512", "batch8", "batch32", "cold"]
    assert fitting(cases, Config(n_ctx=1024), steps=100) == cases


# -- the arithmetic of the report ----------------------------------------------------------------


def record(**changes: Any) -> dict[str, Any]:
    """A run of three rounds with two contestants, in round numbers."""

    def contestant(name: str, cases: dict[str, list[float]], notes: Any = ()) -> dict[str, Any]:
        measured: dict[str, Any] = {case: {"seconds": values} for case, values in cases.items()}
        if "cold" in measured:
            measured["cold"]["peak"] = [2**20, 3 * 2**20, 2**20]
        return {
            "name": name, "version": f"{name} 1.0", "error": 1e-6, "bound": 2e-5,
            "bound_reason": "rounding", "cases": measured, "notes": list(notes),
        }  # fmt: skip

    first = contestant(
        "numpygpt",
        {"decode4": [1.0, 2.0, 4.0], "prefill3": [0.5, 0.25, 1.0], "cold": [0.2, 0.1, 0.4]},
    )
    other = contestant("other", {"decode4": [2.0, 2.0, 2.0], "cold": [0.1, 0.1, 0.1]}, ["slow"])
    return {
        "model": "tiny",
        "machine": {
            "date": "2025-01-02", "cpu": "abacus", "processors": 2, "numpygpt": "1", "python": "3",
            "system": "none", "load": 2.0, "numpy": "2", "blas": "openblas 1", "kernel": "Beads",
            "threads": 2,
        },
        "settings": {"threads": 2, "rounds": 3, "steps": 10},
        "config": dict(vars(TINY)),
        "limits": {
            "decode4": {"bandwidth": [10 * 424.0, 10 * 424.0, 10 * 424.0]},
            "prefill3": {"peak": [1384.0, 6920.0, 3460.0], "products": [692.0, 3460.0, 1730.0]},
            "cold": {},
        },
        "contestants": [first, other],
        **changes,
    }  # fmt: skip


def test_rates():
    one = record()
    first, other = one["contestants"]
    assert report.rates(one, first, "decode4") == [10.0, 5.0, 2.5]
    assert report.rates(one, first, "prefill3") == [6.0, 12.0, 3.0]
    assert report.rates(one, first, "cold") == [0.2, 0.1, 0.4]  # seconds
    assert report.rates(one, other, "prefill3") is None


def test_ratios_are_taken_within_a_round():
    one = record()
    first, other = one["contestants"]
    # 2, 1 and 0.5 times as fast in the rounds. The ratio of the medians would be the same 1.
    assert report.ratio(one, other, "decode4") == 1.0
    other["cases"]["decode4"]["seconds"] = [3.0, 1.0, 12.0]  # 3, 0.5, 3; of the medians 1.5
    assert report.ratio(one, other, "decode4") == 3.0
    assert report.ratio(one, other, "cold") == pytest.approx(0.5)  # half as fast: twice the time
    assert report.ratio(one, first, "decode4") == 1.0
    assert report.ratio(one, other, "prefill3") is None


def test_shares_are_taken_within_a_round():
    one = record()
    first, other = one["contestants"]
    # 10 steps of 424 bytes in 1, 2 and 4 s, where a sweep reads 4240 bytes a second.
    assert matrix_bytes(TINY) == 424
    assert report.shares(one, first, "decode4") == {"bandwidth": 0.5}
    # 692 operations in 0.5, 0.25 and 1 s: 1384, 2768 and 692 a second; shares 1, 0.4, 0.2.
    assert prefill_flops(TINY, 3) == 692
    assert report.shares(one, first, "prefill3") == {"peak": 0.4}
    assert report.shares(one, other, "prefill3") == {}
    assert report.shares(one, first, "cold") == {}


def test_the_text_has_every_figure():
    lines = report.text(record()).splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("tokens/s"))) :]
    assert table[1].split() == ["decode4", "prefill3", "cold"]
    assert table[2].split() == ["numpygpt", "5.00", "6.00", "0.2"]
    assert table[3].split() == ["other", "5.00", "-", "0.1"]
    assert ["numpygpt", "2.50-10.0", "3.00-12.0", "0.1-0.4"] in [line.split() for line in table]
    ratios = table[table.index("numpygpt is so many times as fast as") :]
    assert ratios[2].split() == ["other", "1.00", "-", "0.50"]
    text = "\n".join(lines)
    assert "abacus, 2 processors; 2 threads; openblas 1, kernel Beads" in text
    assert "10.0 tokens/s; reached 50%" in text
    assert "(50%); reached 40%" in text
    assert "cold: MiB at most, weights in float32 0: numpygpt 3, other 3" in text
    assert "other: slow" in text
    assert max(map(len, lines)) < 200


def test_markdown_has_the_same_figures_and_how_to_repeat_them():
    page = report.markdown(record(), "numpygpt bench --size tiny")
    assert page.startswith("# Benchmark of 2025-01-02: tiny\n")
    assert "| | decode4 | prefill3 | cold |\n|---|--:|--:|--:|\n" in page
    assert "| numpygpt | 5.00 (2.50-10.0) | 6.00 (3.00-12.0) | 0.2 (0.1-0.4) |" in page
    assert "| other | 1.00 | - | 0.50 |" in page
    assert page.endswith("```sh\nnumpygpt bench --size tiny\n```\n")


def test_warnings():
    large = dict(vars(SIZES["124M"]))
    sweep = 10 * matrix_bytes(SIZES["124M"])  # 10 steps a second; the median round makes 5
    limits = {"decode4": {"bandwidth": [sweep] * 3}}
    assert report.warnings(record()) == []  # its matrices are tiny
    (told,) = report.warnings(record(config=large, limits=limits))
    assert "decode4 reaches only 50%" in told
    fast = {"decode4": {"bandwidth": [0.6 * sweep] * 3}}
    assert report.warnings(record(config=large, limits=fast)) == []
    waiting = {"prefill3": {"peak": [10.0] * 3, "products": [5.0, 7.0, 5.0]}}
    (told,) = report.warnings(record(config=large, limits=waiting))
    assert "prefill3: bare products of its shapes reach only 50%" in told
    crowded = record()
    crowded["machine"]["threads"] = 3
    (told,) = report.warnings(crowded)
    assert told == "3 threads on 2 processors wait for each other"
    crowded = record()
    crowded["machine"]["load"] = 2.5
    (told,) = report.warnings(crowded)
    assert "2.5 processes wanted to run on 2 processors" in told
    crowded["machine"]["load"] = None  # as on Windows
    assert report.warnings(crowded) == []


# -- logits ----------------------------------------------------------------------------------------


def test_distance_is_a_share_of_the_largest_logit():
    want = np.array([[100.0, 0.0], [2.0, -8.0]])
    assert distance(np.array([[2.0, -7.0]]), want) == 1 / 8  # the last row only
    assert distance(np.array([2.0, -7.0]), want) == 1 / 8
    assert distance(want + np.array([[0.0, 1.0], [0.0, 0.0]]), want) == 1 / 100
    assert np.isnan(distance(np.array([np.nan, 0.0]), want))
    for wrong in (np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((0, 2)), np.zeros(())):
        with pytest.raises(ValueError, match="shape"):
            distance(wrong, want)


def test_arrays_survive_json():
    array = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    assert (unpacked(json.loads(json.dumps(packed(array)))) == array).all()


# -- processes -----------------------------------------------------------------------------------


@pytest.fixture
def obedient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "524288")
    process = Process("contestants:Obedient", pathlib.Path("nowhere"), 3, LONG)
    with contextlib.closing(process):
        yield process


def test_a_process_is_asked_and_ended(obedient: Process):
    assert obedient.version == "obedient 3 3"
    assert obedient.ask("pins") == [None, None]
    assert obedient.ask("echo", {"a": [1, "\u00e9\n"]}) == {"a": [1, "\u00e9\n"]}
    with pytest.raises(Lacks):
        obedient.ask("prefill", [1])
    with pytest.raises(ContestantFailed, match=r"no_such: AttributeError: .*no_such"):
        obedient.ask("no_such")
    assert obedient.alive
    obedient.timeout = 0.2
    with pytest.raises(ContestantFailed, match=r"sleep: no answer in 0.2 s; ended it"):
        obedient.ask("sleep", 2 * LONG)
    assert not obedient.alive
    with pytest.raises(ContestantFailed, match="echo: ended with exit code"):
        obedient.ask("echo", 1)


def test_cold_starts(capfd: pytest.CaptureFixture[str]):
    seconds, peak = cold_start(cold_command("print('noise')"), 1, LONG)
    assert 0 < seconds < LONG
    assert peak is None or peak > 2**20  # no Python is smaller
    with pytest.raises(ContestantFailed, match="cold: ended with exit code 1: ValueError: no"):
        cold_start(cold_command("raise ValueError('no')"), 1, LONG)
    with pytest.raises(ContestantFailed, match=r"cold: no token in 0.1 s"):
        cold_start(cold_command(f"import time; time.sleep({LONG})"), 1, 0.1)
    assert capfd.readouterr() == ("", "")


def test_every_contestant_is_found_by_its_name_without_its_library():
    code = (
        "import sys; from numpygpt.bench.contestant import known; names = list(known())\n"
        "print(names, [m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"{list(known())} []"
    assert {"numpygpt", "numpygpt bfloat16", "numpygpt int8"} <= known().keys()
    for name, kind in known().items():
        assert find(name) is kind
        assert 0 < kind.bound < 1
    with pytest.raises(ArgumentError, match="no contestant 'gpt3'; known are"):
        find("gpt3")
    with pytest.raises(ArgumentError, match="no contestant 'contestants:Nobody'"):
        find("contestants:Nobody")


# -- a whole run ---------------------------------------------------------------------------------

SPOILERS = ["Noisy", "WrongGelu", "Crashing", "Failing", "Unloadable"]


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    """A run in which all but the first contestant do what they should not."""
    turns: list[str] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr("numpygpt.bench.rounds.PAUSE", 0.0)
        patch.setattr(machine, "PRODUCT", 32)
        make_visible(patch)
        directory = write_checkpoint(
            pathlib.Path(folder) / "model", CONFIG, random_tensors(CONFIG, dtype=np.float32)
        )
        settings = Settings(
            contestants=["numpygpt", *(f"contestants:{name}" for name in SPOILERS)],
            cases=[Case.named(name) for name in ("batch2", "prefill5", "score5")],
            threads=1,
            rounds=2,
            steps=3,
            timeout=LONG,
        )
        done = measure(directory, settings, turns.append)
        assert len(turns) <= settings.turns
        return {"model": "nano", **done}


def of(run: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in run["contestants"] if each["name"] == name]
    return found


def test_a_run_measures_what_was_asked(run: dict[str, Any]):
    ours = of(run, "numpygpt")
    assert list(ours["cases"]) == ["batch2", "prefill5", "score5"]
    for measured in ours["cases"].values():
        assert len(measured["seconds"]) == 2
        assert min(measured["seconds"]) > 0
    assert ours["notes"] == []
    assert ours["error"] <= 2e-5
    assert run["machine"]["threads"] == 1
    for case in ("prefill5", "score5"):
        assert {name: len(values) for name, values in run["limits"][case].items()} == {
            "peak": 2,
            "products": 2,
        }
    assert json.loads(json.dumps(run)) == run
    assert report.text(run) == report.text(json.loads(json.dumps(run)))


def test_what_a_library_prints_is_not_taken_for_an_answer(run: dict[str, Any]):
    noisy = of(run, "noisy")
    assert max(noisy["cases"]["prefill5"]["seconds"]) < 1000
    assert noisy["notes"] == []


def test_wrong_logits_are_not_timed(run: dict[str, Any]):
    wrong = of(run, "wrong gelu")
    # The two GELUs differ by up to 5e-4: 1e-4 of these logits' scale, and rounding makes 1e-6.
    assert 2e-5 < wrong["error"] < 1e-3
    assert wrong["cases"] == {}
    assert "wrong gelu: left out: wrong results: its logits are" in report.text(run)


def test_a_contestant_that_crashes_is_told_and_the_others_go_on(run: dict[str, Any]):
    crashing = of(run, "crashing")
    assert crashing["cases"] == {}
    (note,) = crashing["notes"]
    assert note == r"batch: ended with exit code 11: Segmentation\x1b[2J fault"
    failing = of(run, "failing")
    assert list(failing["cases"]) == ["prefill5"]
    assert set(failing["notes"]) == {"batch: RuntimeError: no room for a batch"}
    assert of(run, "unloadable")["notes"] == ["load: FileNotFoundError: weights.gguf"]


def test_nothing_is_timed_if_the_first_one_is_wrong(model: pathlib.Path):
    settings = Settings(["contestants:WrongGelu", "numpygpt"], [Case.named("prefill5")], 1, 1)
    with pytest.raises(WrongResultsError, match="wrong gelu: wrong results: its logits are"):
        measure(model, settings)


# -- the limits and the profile --------------------------------------------------------------------


def test_limits_are_measured_over_every_matrix(model: pathlib.Path, monkeypatch: Any):
    monkeypatch.setattr(machine, "PRODUCT", 16)
    monkeypatch.setattr(machine, "LEAST", 0.001)
    limits = machine.Limits(model, threads=1)
    assert sum(w.nbytes for w in limits.held) == matrix_bytes(CONFIG)
    # What is measured is work over time: with a clock that says 1 s a run, it is the work.
    monkeypatch.setattr(machine.Limits, "_seconds", staticmethod(lambda work, _: work() or 1.0))
    assert limits.bandwidth() == matrix_bytes(CONFIG)
    block = matrix_bytes(CONFIG) // 4 - CONFIG.vocab_size * CONFIG.n_embd
    assert limits.products(rows=3) == 2 * 3 * block
    monkeypatch.setattr(machine.Limits, "_seconds", staticmethod(lambda work, _: 1.0))
    assert limits.peak() == 2 * 16**3
    assert limits.elementwise("exp") > 0
    assert limits.elementwise("add") > 0
    # A model that is larger than what is swept: fewer blocks, at least one.
    monkeypatch.setattr(machine, "SWEEP_BYTES", 1)
    assert len(machine.sweep_matrices(CONFIG)) == 1 + 4
    monkeypatch.setattr(machine, "SWEEP_BYTES", 2**29)
    assert len(machine.sweep_matrices(SIZES["nano"])) == 1 + 4 * 2


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stopwatch_counts_what_is_inside_once(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    watch = profile.Stopwatch()
    assert (watch.inside, watch.outside) == (0.0, 0.0)  # this clock costs nothing

    def work(seconds: float) -> None:
        clock.now += seconds

    inner = watch.watch(work, lambda seconds: "inner")

    def outer_work() -> None:
        work(1.0)
        inner(2.0)
        inner(4.0)

    outer = watch.watch(outer_work, lambda: "outer")
    for _ in range(2):
        outer()
        work(8.0)
        watch.lap()
    assert watch.laps == [{"outer": 1.0, "inner": 6.0, "rest": 8.0}] * 2
    # What the clock costs is taken out: of the operation what is within its time, and of what
    # surrounds it the rest.
    watch.inside, watch.outside = 0.25, 0.5
    outer()
    watch.lap()
    assert watch.laps[-1] == {"outer": 1.0 - 0.25 - 2 * 0.5, "inner": 6.0 - 2 * 0.25, "rest": -0.5}


def test_the_typical_lap_is_of_the_faster_half(monkeypatch: pytest.MonkeyPatch):
    watch = profile.Stopwatch()
    watch.laps = [{"a": 3.0, "rest": 1.0}, {"rest": 90.0}, {"a": 1.0, "rest": 1.0}]
    assert watch.typical() == {"a": 2.0, "rest": 1.0}
    # Speeds of 1 and 1/3 are times of 1 and 3: on average 2.
    assert profile._typical([1.0, 1 / 3, 0.01]) == pytest.approx(0.5)


def test_a_profile_has_every_operation_and_leaves_the_page_as_it_was(
    model: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "PRODUCT", 16)
    monkeypatch.setattr(machine, "LEAST", 0.001)
    before = {name: vars(sys.modules[f"numpygpt.{name}"]).copy() for name in ("model", "feed")}
    done = profile.Profile(model, threads=1).profile("float32", steps=4)
    for name, names in before.items():
        assert vars(sys.modules[f"numpygpt.{name}"]) == names
    for section in ("decode", "prefill"):
        taken = {each["name"]: each["seconds"] for each in done[section]["operations"]}
        assert list(taken) == [
            "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj",
            "attention", "layer norm", "GELU", "logits", "rest",
        ]  # fmt: skip
        # Each was seen. A tiny one may come out at nothing, or just below, once the clock's own
        # cost is taken out; so only what takes several calls of NumPy is sure to be above.
        assert taken["attention"] > 0
        assert taken["layer norm"] > 0
    lines = report.text(record(profile=done)).splitlines()
    assert sum(line.startswith("where the time of") for line in lines) == 2
    assert sum(line.split()[:1] == ["mlp.c_fc"] for line in lines) == 2


def test_bounds_of_operations():
    tensors = random_tensors(TINY, dtype=np.float32)
    params = numpygpt.params.pack(TINY, tensors)
    slow = {"bandwidth": 1.0, "peak": 1e9, "add": 1.0, "exp": 1.0}
    found = profile.bounds(params, TINY, rows=1, visible=3, speeds=slow)
    assert found == {
        "attn.c_attn": 2 * 4 * 12,  # layers, bytes, numbers
        "attn.c_proj": 2 * 4 * 4,
        "mlp.c_fc": 2 * 4 * 16,
        "mlp.c_proj": 2 * 4 * 16,
        "attention": 4 * 2 * 2 * 2 * 3 + 2 * 3,  # cache of 3 positions, 3 scores in 2 layers
        "layer norm": 5 * 2,
        "GELU": 2 * 8,
        "logits": 4 * 10,
        "rest": 5 * 2,
    }
    slow = {"bandwidth": 1e9, "peak": 1.0, "add": 1.0, "exp": 1.0}
    found = profile.bounds(params, TINY, rows=3, visible=3, speeds=slow)
    assert found["mlp.c_fc"] == 2 * 2 * 3 * 16
    assert found["attention"] == attention_flops(TINY, 3) + 2 * 6
    assert found["logits"] == 2 * 10  # of the last row only
    # Two rows after one: their scores are 2 + 3 of the 6.
    after = profile.bounds(params, TINY, rows=2, visible=3, speeds=slow)
    assert after["attention"] == 2 * 5 * (2 * 2 + 2 * 2) + 2 * 5


# -- the command ---------------------------------------------------------------------------------


def test_the_command_writes_text_json_and_markdown(
    model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = {name: tmp_path / f"results.{name}" for name in ("json", "md")}
    argv = ["bench", "--model", str(model), "--cases", "decode4", "cold", "cold", "--rounds", "1"]
    argv += ["--steps", "2", "--threads", "1"]
    written = ["--json", str(files["json"]), "--markdown", str(files["md"])]
    assert main([*argv, *written]) == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("numpygpt: warning: ") for line in err.splitlines())
    run = json.loads(files["json"].read_text())
    assert out == report.text(run) + "\n"
    assert len(err.splitlines()) == len(report.warnings(run))
    assert list(run["limits"]) == ["decode4", "cold"]
    cases = run["contestants"][0]["cases"]
    assert cases["decode4"]["seconds"][0] > 0
    assert cases["cold"]["seconds"][0] > 0
    page = files["md"].read_text()
    assert page.startswith(f"# Benchmark of {run['machine']['date']}: {model} (safetensors)\n")
    assert f"numpygpt bench --model {model} --cases decode4 cold" in page
    # The weights that were made for it are gone.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model", "results.json", "results.md",
    ]  # fmt: skip
    assert main([*argv, *written]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size", "13B"], "--size takes nano, 124M"),
        (["--model", "no-such-model"], "unknown model 'no-such-model'"),
        (["--cases", "decode"], "there is no case 'decode': expected one of decode32"),
        (["--cases", "decode47"], "takes 49 positions, but the model has 48; fewer --steps"),
        (["--peers", "gpt3"], "--peers takes all, none, or names among"),
        (["--peers", "no_such_module:Peer"], "there is no contestant 'no_such_module:Peer'"),
        (["--dtype", "float8"], "--dtype takes float32, bfloat16, int8, float64, not 'float8'"),
        (["--markdown", "-"], "--markdown needs the name of a file"),
        (["--markdown", TESTS], "is there already"),
    ],
)
def test_wrong_input_is_told_in_one_line(
    argv: list[str], message: str, model: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    which = [] if {"--size", "--model"} & set(argv) else ["--model", str(model)]
    assert main(["bench", *which, "--steps", "2", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("numpygpt: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_peers_that_are_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from contestants import Noisy, Obedient

    from numpygpt.cli import bench

    class Absent(Obedient):
        name, requires = "absent f32", ("no_such_module_anywhere",)

    kinds = {"numpygpt": Noisy, "noisy f32": Noisy, "absent f32": Absent}
    monkeypatch.setattr(bench, "known", lambda: kinds)
    assert bench.contestants(["float32"], ["none"]) == ["numpygpt"]
    assert bench.contestants(["float32"], ["all"]) == ["numpygpt", "noisy f32"]
    assert bench.contestants(["int8", "float32"], ["noisy"]) == [
        "numpygpt int8", "numpygpt", "noisy f32",
    ]  # fmt: skip
    assert bench.absent() == ["absent f32"]
    assert main(["bench", "--peers", "absent"]) == 2
    assert "cannot be imported here: no_such_module_anywhere" in capsys.readouterr().err


def test_the_script_is_the_verb():
    script = pathlib.Path(TESTS).parent / "scripts" / "bench.py"
    done = subprocess.run(
        [sys.executable, str(script), "--size", "13B"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--size takes nano" in done.stderr
