"""The decoding loop: read, choose, append, repeat.

Some sequences run together. One that is finished leaves, and the next that waits takes its place
and its cache, so a pass is as full as it can be, and memory does not grow with what is waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from ..cache import Cache
from ..errors import ArgumentError, ContextError, NumpyGPTError
from ..feed import Feeder
from ..params import Array, Config, Params
from ..text import TextStream
from ..threads import spread
from .sample import normalizer_of
from .sequence import FinishReason, Generation, Likeliest, Running, Step, kept
from .settings import Settings

__all__ = ["FinishReason", "Generation", "Step", "decode", "fitted"]

# What the caches of a batch may take together, in bytes, where no batch is asked for.
CACHES = 2**30

# Most sequences in it, then. More are faster together, but each is slower: a pass over 32 rows
# reaches 60 % of the arithmetic rate of one over 512.
FULL = 32

# Logits of a step from which their sums are worth several threads: 0.15 ms a row of 50257 tokens.
SEVERAL = 2**18

# None where there is none yet, an error in place of one that is wrong.
Prompt: TypeAlias = Array | NumpyGPTError | None
NewText: TypeAlias = Callable[[], TextStream]
Failed: TypeAlias = Callable[[int, NumpyGPTError], None]


def decode(
    prompts: Iterable[Prompt],
    settings: Settings,
    params: Params,
    config: Config,
    new_text: NewText | None = None,
    failed: Failed | None = None,
) -> Iterator[list[Step]]:
    """Continue any number of prompts, some at a time.

    The prompts need not have one length: rows are packed, nothing is padded. The last token of a
    sequence is never read, so a prompt and its continuation may together have ``n_ctx + 1``
    tokens.

    Parameters
    ----------
    prompts : iterable of (T,) ndarray of int, None or NumpyGPTError
        At least one id each. They must fit; see :func:`fitted`. Before a step the next one is
        asked for if there is room for it. None says that there is none yet: what is running
        goes on. An error stands in the place of a prompt that is wrong, and `failed` is told.
    settings : Settings
    params : Params
    config : Config
    new_text : function, optional
        Makes the decoder of one sequence's text. Stop strings need it.
    failed : function, optional
        Called with the number of a prompt and the error when it cannot go on, such as when the
        settings rule out every token. The other prompts do. If None, the error is raised.

    Returns
    -------
    iterator of list of Step
        Each list has the new tokens of every sequence that was running, in the order of their
        numbers: one each, or more where a forward pass confirmed proposed ones. It is empty if
        none was.
    """
    if not settings.max_new_tokens:
        return
    batch = _Batch(prompts, settings, params, config, new_text, failed)
    while batch.fill():
        yield batch.step() if batch.running else []


def fitted(prompt: Array, settings: Settings, config: Config) -> Array:
    """The prompt, or as much of it as ``settings.overflow`` leaves.

    Parameters
    ----------
    prompt : (T,) ndarray of int
    settings : Settings
    config : Config

    Returns
    -------
    (T,) ndarray of int

    Raises
    ------
    ContextError
        If it and the new tokens do not fit, and must.
    ArgumentError
        If `keep` is more than n_ctx.
    """
    new_tokens, most = settings.max_new_tokens, config.n_ctx + 1
    if settings.keep is not None and settings.keep > config.n_ctx:
        raise ArgumentError(f"keep must be from 1 to n_ctx = {config.n_ctx}, not {settings.keep}")
    room = most - new_tokens
    if settings.overflow == "slide" or len(prompt) <= room:
        return prompt
    if settings.overflow == "truncate-left":
        if room < 1:
            raise ContextError(
                f"{new_tokens} new tokens leave no room for a prompt in {config.n_ctx} positions; "
                f"ask for at most {config.n_ctx}, or let the window slide (overflow='slide')"
            )
        return prompt[-room:]
    fits = most - len(prompt)
    raise ContextError(
        f"{len(prompt)} prompt + {new_tokens} new tokens are more than the {most} that "
        f"{config.n_ctx} positions allow; shorten the prompt"
        + (f", ask for at most {fits}" if fits > 0 else "")
        + ", or choose what gives way: overflow='truncate-left' or 'slide'"
    )


class _Room(NamedTuple):
    """What must be there before the first token is read.

    Attributes
    ----------
    size : int
        Most sequences that run together.
    positions : int
        Most that one of them takes.
    rows : int
        Most tokens that one of them reads in a pass.
    """

    size: int
    positions: int
    rows: int

    @classmethod
    def of(
        cls, prompts: Iterable[Prompt], settings: Settings, params: Params, config: Config
    ) -> _Room:
        """Enough for these prompts if they are a list, and for any where they come one by one."""
        lengths = None
        if isinstance(prompts, list):
            lengths = [len(prompt) for prompt in prompts if isinstance(prompt, np.ndarray)]
        longest = config.n_ctx if lengths is None else max(lengths, default=1)
        positions = min(config.n_ctx, longest + settings.max_new_tokens - 1)
        again = kept(settings, config) if settings.overflow == "slide" else 1
        rows = min(positions, max(longest, again) + settings.lookup)
        cache = 2 * config.n_layer * config.n_embd * positions * params.dtype.itemsize
        size = settings.batch or max(1, min(FULL, CACHES // cache))
        if lengths is not None:
            size = max(1, min(size, len(lengths) * settings.n))
        return cls(size, positions, rows)


class _Batch:
    """The running sequences; the i-th always has the i-th cache of the slab."""

    def __init__(
        self,
        prompts: Iterable[Prompt],
        settings: Settings,
        params: Params,
        config: Config,
        new_text: NewText | None,
        failed: Failed | None,
    ):
        self.settings, self.filters, self.failed = settings, settings.filters, failed
        self.plain = not settings.temperature and not self.filters
        room = _Room.of(prompts, settings, params, config)
        slab = Cache(config, room.positions, params.dtype, room.size)
        self.caches = [slab[i] for i in range(room.size)]
        self.feeder = Feeder(params, config, room.size * room.rows, room.positions, settings.chunk)
        self.logits = np.empty((0, config.vocab_size), params.dtype)
        self.running: list[Running] = []
        self.given_up: set[int] = set()  # prompts
        self.waiting, self.over = self._sequences(prompts, config, new_text), False

    def _sequences(
        self, prompts: Iterable[Prompt], config: Config, new_text: NewText | None
    ) -> Iterator[Running | None]:
        """What is to run, in this order, each made when its turn comes."""
        settings, numbers = self.settings, itertools.count()
        for prompt in prompts:
            of = next(numbers) if prompt is not None else 0
            if isinstance(prompt, NumpyGPTError):
                self._give_up(of, prompt)
            if not isinstance(prompt, np.ndarray):
                yield None
                continue
            for number in range(of * settings.n, (of + 1) * settings.n):
                if of in self.given_up:
                    break
                text = None if new_text is None else new_text()
                yield Running(number, prompt, settings, self.filters, config, text)

    # -- who runs ------------------------------------------------------------------------------

    def fill(self) -> bool:
        """Let waiting sequences take the free places; say whether any runs or may yet."""
        free = [i for i, sequence in enumerate(self.running) if sequence.finished]
        entering = []
        for place in itertools.chain(free, range(len(self.running), len(self.caches))):
            sequence = self._next()
            if sequence is None:
                break
            self._enter(sequence, place)
            entering.append(sequence)
        self._close_gaps()
        if self.settings.n > 1:
            self._share(entering)
        return bool(self.running) or not self.over

    def _next(self) -> Running | None:
        try:
            return next(self.waiting)
        except StopIteration:
            self.over = True
            return None

    def _enter(self, sequence: Running, place: int) -> None:
        """Take a place and its cache; if another sample of the prompt was there, what it read."""
        sequence.cache, read = self.caches[place], 0
        if place == len(self.running):
            self.running.append(sequence)
        else:
            before, self.running[place] = self.running[place], sequence
            if before.of == sequence.of and before.holds_prompt:
                read = sequence.common
        sequence.cache.truncate(read)

    def _close_gaps(self) -> None:
        """Move the last sequences to the places that nobody has taken."""
        for place in reversed(range(len(self.running))):
            if self.running[place].finished:
                last = self.running.pop()
                if place < len(self.running):
                    self.caches[place].copy_from(last.cache)
                    self.running[place], last.cache = last, self.caches[place]

    def _share(self, entering: Sequence[Running]) -> None:
        """Read every prompt but its last token once, for all its samples."""
        source = {sequence.of: sequence for sequence in self.running if sequence.holds_prompt}
        new = [sequence for sequence in entering if not sequence.holds_prompt]
        copies = [each for each in new if source.setdefault(each.of, each) is not each]
        first = [
            each for each in new if source[each.of] is each and each.of in {c.of for c in copies}
        ]
        if first:
            self.feeder.last([each.unread[:-1] for each in first], [each.cache for each in first])
        for each in copies:
            each.cache.copy_from(source[each.of].cache)
            each.cache.truncate(each.common)

    # -- what they do --------------------------------------------------------------------------

    def step(self) -> list[Step]:
        """One forward pass, and the tokens that it gives to each running sequence."""
        proposals = [sequence.propose() for sequence in self.running]
        new = [
            np.concatenate([sequence.unread, proposed])
            for sequence, proposed in zip(self.running, proposals, strict=True)
        ]
        counts = [1 + len(proposed) for proposed in proposals]
        hidden = self.feeder.last(new, self.caches[: len(new)], counts)
        logits = self.feeder.logits(hidden, out=self._place(len(hidden)))
        likeliest = _likeliest(logits) if self.plain else None
        # Of many rows of a large vocabulary they are worth several threads.
        normalizers = spread(normalizer_of, logits) if logits.size >= SEVERAL else None
        steps: list[Step] = []
        stop = 0
        for sequence, proposed, count in zip(self.running, proposals, counts, strict=True):
            rows, stop = slice(stop, stop + count), stop + count
            known = None if likeliest is None else likeliest[rows]
            sums = None if normalizers is None else normalizers[rows]
            steps += self._take(sequence, logits[rows], proposed, known, sums)
        return sorted(steps, key=lambda step: step.sequence)

    def _place(self, rows: int) -> Array:
        """Where logits go: the same memory in every step."""
        if rows > len(self.logits):
            self.logits = np.empty((rows, self.logits.shape[1]), self.logits.dtype)
        return self.logits[:rows]

    def _take(
        self,
        sequence: Running,
        logits: Array,
        proposed: Array,
        likeliest: Sequence[Likeliest] | None,
        normalizers: Sequence[tuple[float, float]] | None,
    ) -> list[Step]:
        if sequence.finished:  # another sample of its prompt has failed
            return []
        try:
            return sequence.take(logits, proposed, likeliest, normalizers)
        except NumpyGPTError as error:
            self._give_up(sequence.of, error)
            return []

    def _give_up(self, prompt: int, error: NumpyGPTError) -> None:
        """End all samples of a prompt."""
        if self.failed is None:
            raise error
        self.given_up.add(prompt)
        for sequence in self.running:
            if sequence.of == prompt:
                sequence.finished = True
                # NaN would reach who comes next here, whose masked places are multiplied by 0.
                sequence.cache.keys.fill(0)
                sequence.cache.values.fill(0)
        self.failed(prompt, error)


def _likeliest(logits: Array) -> list[Likeliest] | None:
    """The greedy choice from each of (N, V) logits; None if some are no numbers.

    For all rows together this takes half the time of one after the other.
    """
    rows, tokens = np.arange(len(logits)), logits.argmax(axis=1)
    tops = logits[rows, tokens]
    if not np.isfinite(tops).all():
        return None
    logits[rows, tokens] = -np.inf
    others = logits.max(axis=1)
    logits[rows, tokens] = tops
    margins = tops.astype(np.float64) - others
    pairs = zip(tokens.tolist(), margins.tolist(), strict=True)
    return list(itertools.starmap(Likeliest, pairs))
