"""Threads: how many, pieces of work at once, and results that do not depend on them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import nano, random_ids, random_params

import numpygpt
from numpygpt import ops, threads
from numpygpt.errors import ArgumentError, MissingPackageError
from numpygpt.threads import blas, get_threads, set_threads, spread

needs_blas = pytest.mark.skipif(blas() is None, reason="this BLAS does not tell its threads")


@pytest.fixture(autouse=True)
def restored():
    """The number of threads as it was."""
    library, before, asked = blas(), get_threads(), threads._state.asked
    yield
    threads._state.asked = asked
    if library is not None:
        library.set(before)


# -- how many -------------------------------------------------------------------------------------


@needs_blas
def test_what_is_set_is_what_the_blas_uses():
    for count in (2, 1, 3):
        set_threads(count)
        assert get_threads() == blas().get() == count


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True, None, 1025])
def test_other_counts_are_refused(count):
    with pytest.raises(ArgumentError, match="threads must be an integer from 1 to 1024"):
        set_threads(count)


def test_without_a_way_to_tell_the_blas_one_learns_what_to_do(monkeypatch):
    monkeypatch.setattr(threads, "blas", lambda: None)
    monkeypatch.setattr(threads._state, "asked", None)
    assert get_threads() == 1
    with pytest.raises(MissingPackageError, match="threadpoolctl, or set OMP_NUM_THREADS"):
        set_threads(2)
    assert spread(abs, [-1, -2]) == [1, 2]


def test_another_blas_is_asked_through_threadpoolctl(monkeypatch):
    class Library:
        count = 4

        def get_num_threads(self):
            return self.count

        def set_num_threads(self, count):
            self.count = count

        def info(self):
            return {"architecture": "Haswell"}

    class Controller:
        lib_controllers = (Library(),)

        def select(self, user_api):
            assert user_api == "blas"
            return self

    fake = type(sys)("threadpoolctl")
    fake.ThreadpoolController = Controller
    monkeypatch.setitem(sys.modules, "threadpoolctl", fake)
    monkeypatch.setattr(threads, "_bundled", lambda: None)
    found = blas.__wrapped__()
    found.set(3)
    assert (found.get(), found.kernel) == (3, "Haswell")
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert blas.__wrapped__() is None


# -- at once --------------------------------------------------------------------------------------


@needs_blas
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("items", [0, 1, 2, 7, 50])
def test_results_come_in_the_order_of_the_items(count, items):
    set_threads(count)
    assert spread(lambda i: i * i, range(items)) == [i * i for i in range(items)]
    assert get_threads() == blas().get() == count


@needs_blas
def test_pieces_run_at_once_with_one_blas_thread_each():
    set_threads(3)
    together = threading.Barrier(3, timeout=30)  # passes only if three are there at one time

    def meet(_):
        together.wait()
        return blas().get(), get_threads()

    assert spread(meet, range(3)) == [(1, 3)] * 3
    assert blas().get() == 3


@needs_blas
def test_an_error_in_a_piece_reaches_the_caller_when_all_have_ended():
    set_threads(2)
    ended = []

    def fail(i):
        if i == 3:
            raise ValueError("piece 3")
        ended.append(i)

    with pytest.raises(ValueError, match="piece 3"):
        spread(fail, range(20))
    assert blas().get() == 2
    assert spread(lambda i: i, range(5)) == [0, 1, 2, 3, 4]


@needs_blas
def test_no_piece_runs_on_after_an_error():
    """They write where the caller goes on."""
    set_threads(2)
    both, ended = threading.Barrier(2, timeout=30), threading.Event()
    caller = threading.current_thread()

    def piece(_):
        both.wait()
        if threading.current_thread() is caller:
            raise ValueError("stop")
        time.sleep(0.2)
        ended.set()

    with pytest.raises(ValueError, match="stop"):
        spread(piece, range(2))
    assert ended.is_set()


@needs_blas
def test_a_count_that_is_set_inside_a_piece_holds_after_it():
    set_threads(2)

    def piece(_):
        set_threads(3)
        return blas().get()

    assert spread(piece, range(2)) == [1, 1]
    assert blas().get() == get_threads() == 3


@needs_blas
def test_nobody_waits_for_the_pieces_of_another_caller():
    set_threads(2)
    begun, release = threading.Barrier(3, timeout=30), threading.Event()

    def long(_):
        begun.wait()
        release.wait(30)

    other = threading.Thread(target=spread, args=(long, range(2)))
    other.start()
    begun.wait()  # both of its pieces run, one of them on the pool's only thread
    assert spread(abs, [-1, -2]) == [1, 2]
    release.set()
    other.join()


@needs_blas
@pytest.mark.parametrize("before", ["", "spread(abs, [-1, -2])"])
def test_a_thread_that_outlives_the_main_one_still_computes(before):
    code = (
        "import threading, time, numpygpt; from numpygpt.threads import spread\n"
        f"numpygpt.set_threads(2); {before}\n"
        "def late():\n    time.sleep(0.5); print(spread(abs, [-3, -4, -5]))\n"
        "threading.Thread(target=late).start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[3, 4, 5]\n", "")


@needs_blas
def test_pieces_inside_pieces_run_one_by_one():
    set_threads(2)
    outer = spread(
        lambda i: (threading.get_ident(), spread(lambda j: threading.get_ident(), range(4))),
        range(2),
    )
    assert all(set(inner) == {thread} for thread, inner in outer)
    assert spread(lambda i: spread(lambda j: (i, j), range(2)), range(2)) == [
        [(0, 0), (0, 1)],
        [(1, 0), (1, 1)],
    ]


@needs_blas
def test_overlapping_callers_leave_the_count_as_it_was():
    set_threads(2)
    found = []

    def caller():
        for _ in range(50):
            found.append(spread(lambda i: i, range(4)))

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert found == [[0, 1, 2, 3]] * 200
    assert blas().get() == get_threads() == 2


@needs_blas
def test_pieces_inherit_how_numpy_treats_overflow():
    set_threads(2)
    both = threading.Barrier(2, timeout=30)

    def state(_):
        both.wait()
        return np.geterr()["over"]

    with np.errstate(over="raise"):
        assert spread(state, range(2)) == ["raise", "raise"]


@needs_blas
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="there is no fork")
def test_a_forked_process_has_threads_of_its_own():
    code = (
        "import os, numpygpt; from numpygpt.threads import spread; numpygpt.set_threads(2)\n"
        "assert spread(abs, [-1, -2]) == [1, 2]\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if spread(abs, [-3, -4, -5]) == [3, 4, 5] else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# -- results --------------------------------------------------------------------------------------


@needs_blas
@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_divided_without_changing_a_bit(name, order):
    function = ops.ACTIVATIONS[name]
    x = np.random.default_rng(0).standard_normal((400, 1000), np.float32) * 4
    whole = np.concatenate([function(row) for row in x]).reshape(x.shape)
    x = np.asarray(x, order=order)
    for count in (1, 2):
        set_threads(count)
        out = np.full_like(x, np.nan)
        assert function(x, out=out) is out
        np.testing.assert_array_equal(out, whole)
        np.testing.assert_array_equal(function(x), whole)
        other = np.full(x.shape, np.nan, np.float32, order="F" if order == "C" else "C")
        np.testing.assert_array_equal(function(x, out=other), whole)
        np.testing.assert_array_equal(function(x[::2, ::2]), whole[::2, ::2])


@needs_blas
def test_the_fixed_order_mode_does_not_depend_on_threads_and_the_other_within_rounding():
    config = nano(n_ctx=512, n_embd=128, n_head=8, vocab_size=50)
    params = random_params(config, dtype=np.float32)
    model, ids = numpygpt.Model(config, params), random_ids(config, 512)
    found = {}
    for count in (1, 2):
        set_threads(count)
        found[count] = model.logits(ids), model.logits(ids[:40], chunk=1)
    scale = abs(found[1][0]).max()
    # Sums of up to 512 products in another order: 23 * 6e-8 of the largest. Measured 0 to 4e-7.
    assert abs(found[2][0] - found[1][0]).max() <= 1.4e-6 * scale
    assert found[2][1].tobytes() == found[1][1].tobytes()


def test_attention_that_is_worth_several_threads_is_the_same_on_them(monkeypatch):
    from numpygpt import plans

    config = nano(n_ctx=300, n_embd=64, n_head=4)
    params, ids = random_params(config), random_ids(config, 300)
    model = numpygpt.Model(config, params)
    alone = model.logits(ids)
    monkeypatch.setattr(plans, "SEVERAL", 1)
    for count in (1, 3):
        if blas() is not None:
            set_threads(count)
        # One BLAS thread inside each piece: products may be divided otherwise than by two.
        assert abs(model.logits(ids) - alone).max() <= 1e-14 * abs(alone).max()
