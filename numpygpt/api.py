"""``Model``: the friendly object over the page. Everything a user passes in is checked here."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack, overload

import numpy as np

from . import checkpoints
from .cache import Cache, segments
from .checkpoints.source import Vocabulary
from .decoding import Generation, Settings, Step, decode
from .errors import ArgumentError, ContextError, TokenError, TokenizerError
from .feed import CHUNK, Feeder
from .model import forward, unembed
from .params import Array, Config, Params
from .plans import Traced
from .tokenizer import TextStream, Tokenizer

__all__ = ["Model", "load", "tokenizer_for"]

Prompt: TypeAlias = "str | Sequence[int] | Array"

DTYPES = {"float32": np.float32, "float64": np.float64}

# Vocabulary files that cannot be used alone. Where one lies, GPT-2's vocabulary is not meant.
PARTS = ("vocab.json", "merges.txt", "encoder.json", "vocab.txt", "spiece.model")


class Options(TypedDict, total=False):
    """The settings of ``generate``, for type checkers."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    seed: int | None
    stop_ids: Iterable[int] | None
    chunk: int
    on_step: Callable[[list[int]], None] | None


def load(
    source: str | os.PathLike[str],
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    source : str or path
        The name of a bundled model (``"shakespeare"``); a checkpoint file of any format that
        the README lists, or its directory; or a Hugging Face name (``"gpt2"``) whose files an
        earlier download has left on this machine. The network is never used.
    dtype : {"float32", "float64"}
        What to compute in. float32 maps float32 files instead of copying them; float64 is the
        high-precision check.
    config : mapping, optional
        Config fields, by the names of :class:`Config`, that override the checkpoint's: what its
        format does not say (``{"n_head": 6}``), or says wrongly.

    Returns
    -------
    Model

    Raises
    ------
    ModelNotFoundError
        If there is no such model.
    CheckpointError
        If its files are damaged or do not fit each other.
    ArgumentError
        If `dtype` is another one.

    Warns
    -----
    CheckpointWarning
        If weights are NaN or infinite, or the format leaves open what changes the model (whether
        a nanoGPT checkpoint has the exact GELU); it says what was assumed.

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> model.config.n_layer
    4
    """
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in DTYPES:
        raise ArgumentError(f"dtype must be {' or '.join(map(repr, DTYPES))}, not {dtype!r}")
    if config is not None and not isinstance(config, Mapping):
        raise ArgumentError(f"config must be a mapping of fields, not {type(config).__name__}")
    path = checkpoints.find(source)
    settled, params, directory, vocabulary = checkpoints.read(path, DTYPES[name], config)
    return Model(settled, params, tokenizer_for(directory, settled, vocabulary))


def tokenizer_for(
    directory: pathlib.Path, config: Config, vocabulary: Vocabulary | None = None
) -> Callable[[], Tokenizer] | None:
    """What makes the tokenizer that belongs to a checkpoint, or None if it has none.

    The vocabulary that a file carries in itself goes before the files beside it.
    """
    if vocabulary is not None:
        return functools.partial(_carried, vocabulary, directory, config.vocab_size)
    if Tokenizer.locate(directory) is None:
        part = next((name for name in PARTS if (directory / name).exists()), None)
        # 50304 is 50257 rounded up to a multiple of 128, as nanoGPT and llm.c store it.
        if part is None and config.vocab_size in (50257, 50304):
            return Tokenizer.gpt2
        return None if part is None else functools.partial(_incomplete, directory / part)
    return functools.partial(_fitting, directory, config.vocab_size)


def _carried(vocabulary: Vocabulary, source: pathlib.Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint's own vocabulary, without what fills up rows that were cut."""
    surplus = range(vocab_size, len(vocabulary.tokens))
    if not set(surplus) <= set(vocabulary.special):
        raise TokenizerError(
            f"{source}: the vocabulary has {len(vocabulary.tokens)} tokens, but the model only "
            f"{vocab_size}: they do not belong together"
        )
    special = [i for i in vocabulary.special if i < vocab_size]
    cut = Vocabulary(vocabulary.tokens[:vocab_size], vocabulary.merges, special)
    return Tokenizer.from_vocabulary(cut, source)


def _incomplete(part: pathlib.Path) -> Tokenizer:
    raise TokenizerError(f"{part}: a vocabulary needs more files than this one beside it")


def _fitting(directory: pathlib.Path, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(directory)
    if tokenizer.last_id >= vocab_size:
        raise TokenizerError(
            f"{directory}: the vocabulary has ids up to {tokenizer.last_id}, but the model has "
            f"{vocab_size} tokens: these files do not belong together"
        )
    return tokenizer


class Model:
    """A GPT-2 ready to use.

    Parameters
    ----------
    config : Config
    params : Params
    tokenizer : Tokenizer, or a function that makes one, optional
        Only needed where text goes in or comes out; a function is called at the first need.

    Attributes
    ----------
    config : Config
    params : Params

    Examples
    --------
    >>> import numpygpt
    >>> model = numpygpt.load("shakespeare")
    >>> model.logits(model.tokenizer.encode("My lord")).shape
    (2, 3072)
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        tokenizer: Tokenizer | Callable[[], Tokenizer] | None = None,
    ):
        self.config = config
        self.params = params
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Model(n_layer={c.n_layer}, n_head={c.n_head}, n_embd={c.n_embd}, n_ctx={c.n_ctx}, "
            f"vocab_size={c.vocab_size}, parameters={c.parameter_count}, dtype={self.dtype})"
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the model computes in."""
        dtype: np.dtype[Any] = self.params.wpe.dtype
        return dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises
        ------
        TokenizerError
            If it has none, or its files are damaged.
        """
        if self._tokenizer is not None and not isinstance(self._tokenizer, Tokenizer):
            self._tokenizer = self._tokenizer()
        if self._tokenizer is None:
            raise TokenizerError("this model has no vocabulary files; pass token ids, not text")
        return self._tokenizer

    # -- numbers -------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int] | Array, last: bool = False, chunk: int = CHUNK) -> Array:
        """The score of every token as the next one, after each token of `ids`.

        Parameters
        ----------
        ids : sequence of int
            1 to n_ctx token ids.
        last : bool
            Only after the last one.
        chunk : int
            Most tokens in one forward pass. Changes nothing but rounding; with 1, results do not
            depend on what else is computed, to the last bit.

        Returns
        -------
        (T, V) or (V,) ndarray
            In nats: differences are log-odds.

        Raises
        ------
        TokenError
            If ids are not integers inside the vocabulary, or there are none.
        ContextError
            If there are more than n_ctx.
        """
        ids, chunk = self._ids(ids), Settings(chunk=chunk).chunk
        cache = Cache(self.config, len(ids), self.dtype)
        feeder = Feeder(self.params, self.config, len(ids), len(ids), chunk)
        if last:
            only: Array = feeder.logits(feeder.last([ids], [cache]))[0]
            return only
        logits = np.empty((len(ids), self.config.vocab_size), self.dtype)
        for piece in feeder.pieces([ids], [cache]):
            rows = slice(piece.start, piece.start + len(piece.hidden))
            feeder.logits(piece.hidden, out=logits[rows])
        return logits

    def trace(
        self, ids: Sequence[int] | Array, names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Every intermediate result of one forward pass, by name.

        Parameters
        ----------
        ids : sequence of int
            1 to n_ctx token ids.
        names : sequence of str, optional
            Names or shell patterns such as ``"h.*.attn.pattern"``; all if None.
            :data:`numpygpt.plans.INTERMEDIATES` lists them with their axes and meaning.

        Returns
        -------
        dict of str to ndarray
            In the order of execution.

        Raises
        ------
        ArgumentError
            If a name matches nothing.
        TokenError, ContextError
            As for :meth:`logits`.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> trace = model.trace([46, 1, 2], names=["h.0.attn.pattern", "logits"])
        >>> {name: array.shape for name, array in trace.items()}
        {'h.0.attn.pattern': (4, 3, 3), 'logits': (3, 3072)}
        """
        ids = self._ids(ids)
        if names is not None:
            names = [names] if isinstance(names, str) else [str(name) for name in names]
        cache = Cache(self.config, len(ids), self.dtype)
        planner = Traced(self.config, len(ids), names, len(ids), self.dtype)
        laid = segments([len(ids)], [cache])
        plan = planner.fit(laid)
        hidden = forward(ids, laid, self.params, self.config, plan)
        if plan.logits is not None:
            unembed(hidden, self.params, out=plan.logits)
        return planner.arrays

    # -- text ----------------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, prompt: str | Array, **options: Unpack[Options]
    ) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Unpack[Options]) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[Options]
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        chunk: int = CHUNK,
        on_step: Callable[[list[int]], None] | None = None,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several.

        Parameters
        ----------
        prompt : str, sequence of int, or a list of these
            An empty prompt (``""`` or an empty array) starts from end-of-text, where the
            tokenizer has one. Special tokens in a text are plain text.
        max_new_tokens : int
        temperature : float, optional
            Divides the logits before a token is drawn; greedy if None or 0.
        top_k : int, optional
            Draw from the k likeliest tokens only.
        seed : int, optional
            Makes the draws repeatable. Every sequence has a generator of its own, so the same
            prompt twice in a list gives the same text twice.
        stop_ids : iterable of int, optional
            Tokens that end a sequence; the tokenizer's end-of-text if None, ``()`` never stops.
        chunk : int
            Most rows in one forward pass; with 1 nothing depends on the batch, to the last bit.
        on_step : function, optional
            Called after every step with the new token of each running sequence.

        Returns
        -------
        Generation or list of Generation
            A list for a list of prompts. Each result is the one its prompt would have had alone,
            up to the rounding of the logits; with ``chunk=1``, exactly.

        Raises
        ------
        ContextError
            If a prompt and `max_new_tokens` are together more than n_ctx + 1.
        TokenError, TokenizerError, ArgumentError
            If a prompt or a setting is unusable.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> result = model.generate("ROMEO:", max_new_tokens=8)
        >>> len(result.ids), result.finish_reason
        (8, 'length')
        """
        settings = self._settings(max_new_tokens, temperature, top_k, seed, stop_ids, chunk)
        several = isinstance(prompt, list | tuple) and not any(map(_is_id, prompt))
        prompts = [self._prompt(item) for item in (prompt if several else [prompt])]
        results = [Generation(ids.tolist()) for ids in prompts]
        for steps in decode(prompts, settings, self.params, self.config):
            for step in steps:
                result = results[step.sequence]
                result.finish_reason = step.finish or result.finish_reason
                if step.finish != "stop":
                    result.ids.append(step.token)
                    result.logprobs.append(step.logprob)
            if on_step is not None:
                on_step([step.token for step in steps])
        if self._tokenizer is not None:
            for result in results:
                result.text = self.tokenizer.decode(result.ids)
        return results if several else results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop_ids: Iterable[int] | None = None,
        chunk: int = CHUNK,
    ) -> Iterator[str]:
        """Continue one prompt, piece by piece as the text becomes known.

        Parameters
        ----------
        prompt, max_new_tokens, temperature, top_k, seed, stop_ids, chunk
            As for :meth:`generate`.

        Returns
        -------
        iterator of str
            Never half a character; joined, the text that :meth:`generate` returns.

        Raises
        ------
        ContextError, TokenError, TokenizerError, ArgumentError
            As :meth:`generate`, and at once.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> text = "".join(model.stream("ROMEO:", max_new_tokens=8))
        >>> text == model.generate("ROMEO:", max_new_tokens=8).text
        True
        """
        settings = self._settings(max_new_tokens, temperature, top_k, seed, stop_ids, chunk)
        steps = decode([self._prompt(prompt)], settings, self.params, self.config)
        return _pieces(steps, self.tokenizer.stream())

    # -- checks --------------------------------------------------------------------------------

    def _settings(
        self,
        max_new_tokens: int,
        temperature: float | None,
        top_k: int | None,
        seed: int | None,
        stop_ids: Iterable[int] | None,
        chunk: int,
    ) -> Settings:
        if stop_ids is None:
            stop_ids = [] if self._end_of_text is None else [self._end_of_text]
        elif not isinstance(stop_ids, Iterable) or isinstance(stop_ids, str | bytes):
            raise ArgumentError(f"stop_ids must be token ids, not {stop_ids!r}")
        stop = list(stop_ids)
        stop = self._ids(stop, in_context=False).tolist() if stop else []
        return Settings(max_new_tokens, temperature, top_k, seed, tuple(stop), chunk)

    @property
    def _end_of_text(self) -> int | None:
        return self.tokenizer.end_of_text if self._tokenizer is not None else None

    def _prompt(self, prompt: Prompt) -> Array:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not isinstance(ids, list | tuple | np.ndarray | range):
            raise TokenError(f"a prompt must be text or token ids, not {type(ids).__name__}")
        empty = ids.shape == (0,) if isinstance(ids, np.ndarray) else not len(ids)
        if not empty:
            return self._ids(ids, in_context=False)
        if self._end_of_text is None:
            raise TokenError(
                "the prompt is empty, and this model has no end-of-text token to start from"
            )
        return np.array([self._end_of_text])

    def _ids(self, ids: Any, in_context: bool = True) -> Array:
        """Ids as an array, or an error that says what is wrong with them."""
        if isinstance(ids, str):
            raise TokenError(f"expected token ids, received the text {ids[:40]!r}; encode it first")
        try:
            array = np.asarray(ids)
        except (ValueError, OverflowError):  # rows of different lengths
            raise TokenError(f"expected token ids in a row, received {str(ids)[:60]}") from None
        if array.ndim != 1 or not array.size:
            raise TokenError(
                f"expected one or more token ids in a row, received shape {array.shape}"
            )
        if array.dtype.kind not in "iu":
            raise TokenError(
                f"token ids must be integers, not {array.dtype}: {array.tolist()[0]!r}"
            )
        wrong = array[(array < 0) | (array >= self.config.vocab_size)]
        if wrong.size:
            raise TokenError(
                f"token id {wrong[0]} is outside the vocabulary, 0 to {self.config.vocab_size - 1}"
            )
        if in_context and len(array) > self.config.n_ctx:
            raise ContextError(
                f"{len(array)} tokens are more than the model's {self.config.n_ctx} positions"
            )
        return array.astype(np.intp)


def _is_id(item: Any) -> bool:
    """Whether this is a number, an element of one prompt, and not a prompt."""
    return not isinstance(item, str | list | tuple | range) and np.ndim(item) == 0


def _pieces(steps: Iterator[list[Step]], text: TextStream) -> Iterator[str]:
    """The text of a single sequence's steps."""
    for (step,) in steps:
        if step.finish != "stop" and (piece := text.feed(step.token)):
            yield piece
    if piece := text.end():
        yield piece
