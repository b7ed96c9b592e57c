"""The implementations that `numpygpt bench` compares with compute the same model as numpygpt.

CI installs transformers only: the extra `peers` is not part of `oracle`, because llama-cpp-python
is compiled for minutes. The others are tested where they are (``pip install -e ".[oracle,peers]"``)
and are no parameters of these tests, rather than skipped ones, where they are not.

``pytest tests/oracles/test_peers.py -s`` prints the distances of the logits.
"""

from __future__ import annotations

import json
import pathlib
import subprocess

import numpy as np
import pytest
from support import nano, random_ids, random_tensors, write_checkpoint

import numpygpt
from numpygpt.bench.contestant import Contestant, known, missing
from numpygpt.bench.peers import making
from numpygpt.errors import MissingPackageError

pytestmark = pytest.mark.oracle

CPU = pathlib.Path("/proc/cpuinfo")
VNNI = not CPU.exists() or "vnni" in CPU.read_text()
# Where CTranslate2's 8-bit products are wrong (see its class), and so the benchmark refuses it.
WRONG = () if VNNI else ("CTranslate2 int8",)
PEERS = [
    kind
    for name, kind in known().items()
    if not name.startswith("numpygpt") and name not in WRONG and not missing(kind)
]
# 64 numbers a head: ONNX Runtime and llama.cpp have code for wide heads only. llama.cpp's narrow
# types need rows of multiples of 32.
CONFIG = nano(vocab_size=320, n_ctx=256, n_embd=128, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tensors = random_tensors(CONFIG, 21, np.float32)
    tensors["wpe.weight"] *= 5  # so that a wrong position changes the most likely token
    return write_checkpoint(tmp_path_factory.mktemp("peers") / "model", CONFIG, tensors)


@pytest.fixture(scope="module")
def exact(directory) -> numpygpt.Model:
    return numpygpt.load(directory, dtype="float64")


@pytest.fixture(scope="module", params=PEERS, ids=lambda kind: kind.name)
def peer(request, directory) -> Contestant:
    return request.param(directory, 1)


def test_the_peers_that_ci_installs_are_found():
    assert {"transformers f32 eager", "transformers f32 sdpa"} <= {kind.name for kind in PEERS}


@pytest.mark.parametrize("length", [1, 40, 100])
def test_logits_are_those_of_float64(peer, exact, length):
    ids = random_ids(CONFIG, length).tolist()
    want = exact.logits(ids)
    got = np.asarray(peer.logits(ids))
    gap = float(np.abs(got - want).max() / np.abs(want).max())
    print(f"{peer.name}, {length} tokens: logits differ by {gap:.1e}")
    assert got.shape == want.shape
    assert gap <= peer.bound


def test_times_are_of_every_step(peer):
    ids = random_ids(CONFIG, 20).tolist()
    seconds = peer.decode(ids, 5)
    assert len(seconds) == 5
    assert all(0 < each < 60 for each in seconds)
    for one in (peer.prefill(ids), peer.score(ids), peer.batch([ids, ids], 4)):
        assert 0 < one < 60


def assert_greedy(prompts, made, exact, bound):
    """Every token is the most likely one, or so near to it that `bound` explains the choice."""
    for ids, tokens in zip(prompts, np.transpose(made).tolist(), strict=True):
        logits = exact.logits(ids + tokens[:-1])[len(ids) - 1 :]
        short = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
        # The best one may be that much too low, and the chosen one that much too high.
        assert short.max() <= 2 * bound * np.abs(logits).max()


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_timed_continues_the_prompts_greedily(peer, exact, count):
    prompts = [random_ids(CONFIG, 20, seed).tolist() for seed in range(count)]
    peer.batch(prompts, 6) if count > 1 else peer.decode(prompts[0], 6)
    assert np.shape(peer.tokens) == (7, count)
    assert_greedy(prompts, peer.tokens, exact, peer.bound)


def test_cold_start_ends_with_a_token(peer, directory):
    command = type(peer).cold(directory, 1)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told = json.loads(said.splitlines()[-1])
    assert told["now"] > 0
    assert told["peak"] is None or told["peak"] > 2**20


def test_log_probabilities_are_those_of_score(exact):
    ids = random_ids(CONFIG, 30).tolist()
    got = making.log_probabilities(exact.logits(ids), ids)
    # float64 rounds at 1.1e-16; a sum of 320 exponentials multiplies that by a few dozen at most.
    np.testing.assert_allclose(got, exact.score(ids).logprobs[1:], rtol=1e-13)


def test_what_was_made_is_found_again_and_nothing_else_is_left(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        making.made(tmp_path, "x", fail)
    assert list((tmp_path / "peers").iterdir()) == []
    path = making.made(tmp_path, "x", lambda path: path.write_text("whole") and None)
    assert making.made(tmp_path, "x", fail) == path
    assert path.read_text() == "whole"


def test_a_missing_package_is_named_with_the_extra():
    with pytest.raises(MissingPackageError, match=r'no_such_thing.*"numpygpt\[peers\]"'):
        making.package("no_such_thing")
