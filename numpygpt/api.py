"""``Model``: the friendly object over the page. Everything a user passes in is checked here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, Unpack, overload

import numpy as np

from .arguments import whole
from .cache import Cache, segments
from .decoding import (
    Beams,
    Generation,
    Options,
    Settings,
    Step,
    beam_search,
    decode,
    fitted,
)
from .divergence import Divergence, divergence
from .errors import (
    ArgumentError,
    ContextError,
    Interrupted,
    NumpyGPTError,
    TokenError,
    TokenizerError,
)
from .feed import CHUNK, Feeder
from .layout import fast
from .model import forward, unembed
from .params import Array, Config, Params
from .plans import Traced
from .scoring import FirstToken, Rows, Score, score, window_and_stride
from .tokenizer import Tokenizer

__all__ = ["Model", "Stream"]

# New tokens from which a run pays for copying the weights: 0.2 to 0.4 s once, 5 ms saved by each.
LONG = 64

Prompt: TypeAlias = "str | Sequence[int] | Array"
Prompts: TypeAlias = "Sequence[str] | Sequence[Sequence[int]]"
Answer: TypeAlias = "list[Generation] | NumpyGPTError"


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
            f"vocab_size={c.vocab_size}, parameters={c.parameter_count}, "
            f"dtype={self.params.storage})"
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        """What the model computes in."""
        return self.params.dtype

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
        ids, chunk = self._ids(ids), whole("chunk", chunk, 1)
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
        with np.errstate(under="ignore"):  # an attention of less than 1e-38 is 0
            hidden = forward(ids, laid, self.params, self.config, plan)
        if plan.logits is not None:
            unembed(hidden, self.params, out=plan.logits)
        return planner.arrays

    # -- text ----------------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self, prompt: str | Array, **settings: Unpack[Options]
    ) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[int], **settings: Unpack[Options]) -> Generation: ...
    @overload
    def generate(self, prompt: Prompts, **settings: Unpack[Options]) -> list[Generation]: ...
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Array, *, n: int, **settings: Unpack[Options]
    ) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: Sequence[int], *, n: int, **settings: Unpack[Options]
    ) -> list[Generation]: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        *,
        n: int,
        **settings: Unpack[Options],
    ) -> list[list[Generation]]: ...
    def generate(
        self, prompt: Any, **settings: Any
    ) -> Generation | list[Generation] | list[list[Generation]]:
        """Continue a prompt, or several.

        Parameters
        ----------
        prompt : str, sequence of int, or a list of these
            An empty prompt (``""`` or an empty array) starts from end-of-text, where the
            tokenizer has one. Special tokens in a text are plain text.
        **settings
            ``max_new_tokens=100``, ``temperature``, ``top_k``, ``seed``, ``stop`` and all the
            others of :class:`numpygpt.Settings`, which explains each. ``stop_ids`` is the
            tokenizer's end-of-text unless it is given; ``()`` never stops. ``on_step`` is a
            function that is called after every step with its list of
            :class:`numpygpt.decoding.Step`.

        Returns
        -------
        Generation or list of Generation
            A list for a list of prompts, of which `batch` run at a time: where one is finished,
            the next begins. Each result is the one its prompt would have had alone, up to the
            rounding of the logits; with ``chunk=1``, exactly. Where ``n`` is given, even as 1, a
            list of n results stands in the place of each.

        Raises
        ------
        ContextError
            If a prompt and `max_new_tokens` are together more than n_ctx + 1 and `overflow` does
            not say what gives way.
        TokenError, TokenizerError, ArgumentError
            If a prompt or a setting is unusable.
        Interrupted
            After Ctrl-C; its ``results`` are what this would have returned, as far as it came:
            what was finished as it is, what was running with the tokens it had, and what had not
            begun with none.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> result = model.generate("ROMEO:", max_new_tokens=8)
        >>> len(result.ids), result.finish_reason
        (8, 'length')
        >>> two = model.generate("ROMEO:", max_new_tokens=4, temperature=1.0, n=2, seed=1)
        >>> len(two)
        2
        """
        on_step, listed = _listener(settings.pop("on_step", None)), "n" in settings
        checked = self.settings(**settings)
        several = isinstance(prompt, list | tuple) and not any(map(_is_id, prompt))
        prompts = [self._fitted(item, checked) for item in (prompt if several else [prompt])]
        grouped = [[self._blank(ids, checked) for _ in range(checked.n)] for ids in prompts]
        results = [result for group in grouped for result in group]
        answer: Any = grouped if listed else results
        answer = answer if several else answer[0]
        try:
            for steps in self._decode(prompts, checked):
                for step in steps:
                    results[step.sequence].add(step)
                if on_step is not None:
                    on_step(steps)
        except KeyboardInterrupt:
            for result in results:
                self._interrupt(result)
            raise Interrupted(answer) from None
        return answer  # type: ignore[no-any-return]

    def generate_each(
        self, prompts: Iterable[Prompt | None], *, n: int = 1, **settings: Unpack[Options]
    ) -> Iterator[tuple[int, Answer]]:
        r"""Continue any number of prompts, and give each result as soon as it is there.

        Parameters
        ----------
        prompts : iterable of str or sequence of int
            Asked for the next one only when there is room for it, so they may come from a
            source that never ends. None says that there is none yet; what is running goes on.
        n : int
            Samples for each prompt.
        **settings
            As for :meth:`generate`.

        Yields
        ------
        int
            The number of the prompt, from 0. Short ones overtake long ones.
        list of Generation or NumpyGPTError
            Its n results, or why it cannot be continued; that does not concern the others.

        Raises
        ------
        TokenError, TokenizerError, ArgumentError
            If a setting is unusable.
        Interrupted
            After Ctrl-C; its ``results`` are a list of such pairs for the prompts that had been
            asked for and not been given back, as far as they came.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> for number, result in model.generate_each(["ROMEO:", [-1]], max_new_tokens=3):
        ...     print(number, result if isinstance(result, Exception) else repr(result[0].text))
        1 token id -1 is outside the vocabulary, 0 to 3071
        0 '\nI will'
        """
        options: dict[str, Any] = {**settings, "n": n}
        on_step = _listener(options.pop("on_step", None))
        return self._each(prompts, self.settings(**options), on_step)

    def stream(self, prompt: Prompt, **settings: Unpack[Options]) -> Stream:
        """Continue one prompt, piece by piece as the text becomes known.

        Parameters
        ----------
        prompt : str or sequence of int
        **settings
            As for :meth:`generate`; ``n`` must be 1.

        Returns
        -------
        Stream
            An iterator of str: never half a character, nothing of a stop string; joined, the text
            that :meth:`generate` returns. Its ``result`` is the :class:`Generation` so far.

        Raises
        ------
        ContextError, TokenError, TokenizerError, ArgumentError
            As :meth:`generate`, and at once.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> stream = model.stream("ROMEO:", max_new_tokens=8)
        >>> "".join(stream) == model.generate("ROMEO:", max_new_tokens=8).text
        True
        >>> stream.result.finish_reason
        'length'
        """
        options: dict[str, Any] = dict(settings)
        on_step = _listener(options.pop("on_step", None))
        checked = self.settings(**options)
        if checked.n > 1:
            raise ArgumentError(f"a stream has one text, so n must be 1, not {checked.n}")
        ids = self._fitted(prompt, checked)
        self.tokenizer  # noqa: B018  # without one there is no text
        return Stream(self, ids, checked, on_step)

    def beam_search(
        self,
        prompt: Prompt,
        *,
        beams: int = 4,
        n: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        **settings: Unpack[Options],
    ) -> list[Generation]:
        """The likeliest continuations that a search along several paths finds.

        Parameters
        ----------
        prompt : str or sequence of int
        beams : int
            How many continuations are kept at each step. 1 is greedy decoding.
        n : int
            How many of the best are returned; at most `beams`.
        length_penalty : float
            A continuation of T tokens is ranked by its log-probability divided by
            ``T ** length_penalty``: above 0 longer ones are favoured, below 0 shorter ones.
        early_stopping : bool or "never"
            When the search ends; see :class:`numpygpt.decoding.Beams`.
        **settings
            ``max_new_tokens``, ``min_new_tokens``, ``stop_ids``, ``no_repeat_ngram``, ``banned``
            and ``chunk``, as for :meth:`generate`; the others have no effect, and are refused.

        Returns
        -------
        list of Generation
            The best first; ``score`` is what they are ranked by.

        Raises
        ------
        ContextError, TokenError, TokenizerError, ArgumentError
            As :meth:`generate`.
        Interrupted
            After Ctrl-C; its ``results`` are the best so far, finished or not.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> best = model.beam_search("ROMEO:", beams=4, n=2, max_new_tokens=8)
        >>> best[0].score >= best[1].score
        True
        """
        search = Beams(beams, n, length_penalty, early_stopping)
        checked = self.settings(**settings)
        ids = self._prompt(prompt)
        try:
            return self._told(beam_search(ids, checked, search, self.params, self.config))
        except Interrupted as interrupted:
            raise Interrupted(self._told(interrupted.results)) from None

    # -- scores --------------------------------------------------------------------------------

    def score(
        self,
        text: Prompt,
        continuation: Prompt | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
        first_token: FirstToken = "skip",
        chunk: int = CHUNK,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Score:
        r"""How likely a text is, token by token.

        Parameters
        ----------
        text : str or sequence of int
            Of any length.
        continuation : str or sequence of int, optional
            If given, this is scored, and `text` is only its context, of which the end is read
            that leaves room. Each is encoded by itself, so a space between words belongs to the
            beginning of the continuation.
        window : int, optional
            Tokens in a window, the scored ones included: 2 to n_ctx + 1. If None n_ctx, as is
            usual for perplexity, but n_ctx + 1, all that can be read, for a continuation.
        stride : int, optional
            How far one window stands from the next: 1 to window - 1; half a window if None. Each
            window scores the tokens that none before it scored. A smaller stride gives every
            token more context, and takes longer.
        first_token : {"skip", "end-of-text"}
            The first token has no context. It is not scored, or the text is read after the
            end-of-text token, so that it is.
        chunk : int
            Most rows in one forward pass.
        on_tokens : function, optional
            Called with the number of tokens that have just been scored.

        Returns
        -------
        Score
            ``logprobs``, ``ranks``, ``entropies``, ``perplexity``, ``bits_per_byte``,
            ``is_greedy`` and more.

        Raises
        ------
        TokenError, TokenizerError, ArgumentError
            If the text or a setting is unusable.
        Interrupted
            After Ctrl-C; its ``results`` are the Score so far.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> score = model.score("Romeo, wherefore art thou Romeo?")
        >>> len(score.ids), score.count, round(score.perplexity, 1)
        (10, 9, 15.0)
        >>> model.score("ROMEO:", "\n").is_greedy
        True
        """
        ids, start, shown = self._text(text, continuation, first_token)
        if continuation is not None and window is None:
            window = self.config.n_ctx + 1
        window, stride = window_and_stride(window, stride, self.config.n_ctx)
        if continuation is not None and len(ids) - start < window:
            cut = max(0, len(ids) - window)  # one window, with as much context as it holds
            ids, start, shown = ids[cut:], start - cut, shown - cut
        chunk = whole("chunk", chunk, 1)

        def made(rows: Rows) -> Score:
            scored = ids[start:][~np.isnan(rows.logprobs)]
            size = None if self._tokenizer is None else self.tokenizer.size(scored)
            # A first token without context is shown, but has no score.
            padding = Rows(*(np.full(start - shown, none) for none in (np.nan, 0, np.nan)))
            logprobs, ranks, entropies = (
                np.concatenate(pair) for pair in zip(padding, rows, strict=True)
            )
            return Score(ids[shown:], logprobs, ranks, entropies, size, window, stride, first_token)

        try:
            return made(
                score(
                    ids, start, self.params, self.config,
                    window=window, stride=stride, chunk=chunk, on_tokens=on_tokens,
                )
            )  # fmt: skip
        except Interrupted as interrupted:
            raise Interrupted(made(interrupted.results)) from None

    def divergence(
        self,
        other: Model,
        text: Prompt,
        *,
        window: int | None = None,
        stride: int | None = None,
        first_token: FirstToken = "skip",
        chunk: int = CHUNK,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Divergence:
        """How far another model is from this one on a text.

        Parameters
        ----------
        other : Model
            With a vocabulary of the same size; the text is encoded by this model's tokenizer.
        text : str or sequence of int
        window, stride, first_token, chunk, on_tokens
            As for :meth:`score`; the window must fit both models.

        Returns
        -------
        Divergence
            ``mean_kl`` (nats), ``top_1_agreement``, the perplexities of both and more.

        Raises
        ------
        TokenError, TokenizerError, ArgumentError
            If the text or a setting is unusable, or the vocabularies differ.
        Interrupted
            After Ctrl-C; its ``results`` are the Divergence so far.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> exact = numpygpt.load("shakespeare", dtype="float64")
        >>> result = exact.divergence(model, "Romeo, wherefore art thou Romeo?")
        >>> result.mean_kl < 1e-9, result.top_1_agreement
        (True, 1.0)
        """
        if not isinstance(other, Model):
            raise ArgumentError(f"other must be a Model, not {type(other).__name__}")
        ids, start, _ = self._text(text, None, first_token)
        models = [(model.params, model.config) for model in (self, other)]
        chunk = whole("chunk", chunk, 1)
        return divergence(
            ids, start, *models, window=window, stride=stride, first_token=first_token,
            chunk=chunk, on_tokens=on_tokens,
        )  # fmt: skip

    def settings(self, **options: Any) -> Settings:
        """The settings that :meth:`generate` uses when these are given.

        Raises
        ------
        ArgumentError
            If there is no such setting, or its value is out of range.
        TokenError
            If a token is outside the vocabulary.

        Examples
        --------
        >>> import numpygpt
        >>> model = numpygpt.load("shakespeare")
        >>> model.settings(temperature=0.8).stop_ids == (model.tokenizer.end_of_text,)
        True
        """
        known = [field.name for field in dataclasses.fields(Settings)]
        for name in options:
            if name not in known:
                import difflib

                near = difflib.get_close_matches(name, [*known, "on_step"], 1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
                raise ArgumentError(f"there is no setting {name!r}{hint}")
        if options.get("stop_ids") is None:
            options["stop_ids"] = () if self._end_of_text is None else (self._end_of_text,)
        settings = Settings(**options)
        banned = [i for sequence in settings.banned for i in sequence]
        named = [*settings.stop_ids, *settings.logit_bias, *banned, *settings.forced.values()]
        if named:
            self._ids(named, in_context=False)
        return settings

    # -- checks --------------------------------------------------------------------------------

    def _decode(
        self,
        prompts: Iterable[Array | NumpyGPTError | None],
        settings: Settings,
        failed: Callable[[int, NumpyGPTError], None] | None = None,
    ) -> Iterator[list[Step]]:
        new_text = None
        if self._tokenizer is not None or settings.stop:
            new_text = functools.partial(self.tokenizer.stream, settings.stop)
        # One token at a time (chunk=1) means the same bits as everywhere else: one layout.
        long = settings.max_new_tokens >= LONG and settings.chunk > 1
        params = self._fast if long else self.params
        return decode(prompts, settings, params, self.config, new_text, failed)

    @functools.cached_property
    def _fast(self) -> Params:
        """The same params where they are read fastest; see :mod:`numpygpt.layout`."""
        try:
            return fast(self.params)
        except MemoryError:
            return self.params  # the copy only saves time

    def _each(
        self,
        prompts: Iterable[Prompt | None],
        settings: Settings,
        on_step: Callable[[list[Step]], None] | None,
    ) -> Iterator[tuple[int, Answer]]:
        """What :meth:`generate_each` yields."""
        begun: dict[int, list[Generation]] = {}  # by number, those that are not finished
        left: dict[int, int] = {}  # how many of their samples are not
        ready: list[tuple[int, Answer]] = []

        def failed(number: int, error: NumpyGPTError) -> None:
            begun.pop(number, None)
            left.pop(number, None)
            ready.append((number, error))

        def checked() -> Iterator[Array | NumpyGPTError | None]:
            numbers = itertools.count()
            for prompt in prompts:
                try:
                    ids = None if prompt is None else self._fitted(prompt, settings)
                except NumpyGPTError as error:
                    next(numbers)
                    yield error
                    continue
                if ids is not None:
                    number = next(numbers)
                    begun[number] = [self._blank(ids, settings) for _ in range(settings.n)]
                    left[number] = settings.n
                yield ids

        try:
            if not settings.max_new_tokens:  # nothing to run
                for number, ids in enumerate(ids for ids in checked() if ids is not None):
                    yield number, ids if isinstance(ids, NumpyGPTError) else begun.pop(number)
                return
            for steps in self._decode(checked(), settings, failed):
                for step in steps:
                    number, sample = divmod(step.sequence, settings.n)
                    if number in begun:  # else another sample of it has failed
                        begun[number][sample].add(step)
                        left[number] -= step.finish is not None
                        if not left[number]:
                            del left[number]
                            ready.append((number, begun.pop(number)))
                if on_step is not None:
                    on_step(steps)
                yield from ready
                ready.clear()
        except KeyboardInterrupt:
            for result in itertools.chain(*begun.values()):
                self._interrupt(result)
            raise Interrupted(sorted([*ready, *begun.items()])) from None

    def _blank(self, ids: Array, settings: Settings) -> Generation:
        """What nothing has been added to yet."""
        reason: Any = None if settings.max_new_tokens else "length"
        text = None if self._tokenizer is None else ""
        return Generation(ids.tolist(), finish_reason=reason, text=text)

    def _told(self, results: list[Generation]) -> list[Generation]:
        """The results with their text."""
        if self._tokenizer is not None:
            for result in results:
                result.text = self.tokenizer.decode(result.ids)
        return results

    def _interrupt(self, result: Generation) -> None:
        """End what was still going on: no stop string can come any more."""
        if result.finish_reason is None:
            result.finish_reason = "interrupted"
            if result.text is not None:
                result.text = self.tokenizer.decode(result.ids)

    @property
    def _end_of_text(self) -> int | None:
        return self.tokenizer.end_of_text if self._tokenizer is not None else None

    def _text(
        self, text: Prompt, continuation: Prompt | None, first_token: str
    ) -> tuple[Array, int, int]:
        """What is read, where scoring starts, and where the part that was asked about starts."""
        if first_token not in ("skip", "end-of-text"):
            raise ArgumentError(
                f"first_token must be 'skip' or 'end-of-text', not {str(first_token)[:40]!r}"
            )
        asked = text if continuation is None else continuation
        if isinstance(asked, str | list | tuple | range | np.ndarray) and not len(asked):
            raise TokenError("there is nothing to score: the text is empty")
        parts = [self._prompt(text)] + (
            [] if continuation is None else [self._prompt(continuation)]
        )
        if first_token == "end-of-text":
            parts.insert(0, self._prompt(""))
        ids = np.concatenate(parts)
        shown = len(ids) - len(parts[-1])
        return ids, max(1, shown), shown

    def _fitted(self, prompt: Prompt, settings: Settings) -> Array:
        return fitted(self._prompt(prompt), settings, self.config)

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
        size = self.config.vocab_size
        if array.dtype.kind in "iu":
            wrong = array[(array < 0) | (array >= size)].tolist()
        else:  # integers beyond 64 bits are objects or floats to NumPy
            wrong = [i for i in ids if type(i) is int and not 0 <= i < size]
        if wrong:
            shown = wrong[0] if abs(wrong[0]) < 2**128 else "of so many digits"
            raise TokenError(f"token id {shown} is outside the vocabulary, 0 to {size - 1}")
        if array.dtype.kind not in "iu":
            raise TokenError(
                f"token ids must be integers, not {array.dtype}: {array.tolist()[0]!r}"
            )
        if in_context and len(array) > self.config.n_ctx:
            raise ContextError(
                f"{len(array)} tokens are more than the model's {self.config.n_ctx} positions"
            )
        return array.astype(np.intp)


def _listener(on_step: Any) -> Callable[[list[Step]], None] | None:
    if on_step is not None and not callable(on_step):
        raise ArgumentError(f"on_step must be a function, not {type(on_step).__name__}")
    listener: Callable[[list[Step]], None] | None = on_step
    return listener


def _is_id(item: Any) -> bool:
    """Whether this is a number, an element of one prompt, and not a prompt."""
    return not isinstance(item, str | list | tuple | range) and np.ndim(item) == 0


class Stream:
    """The text of one continuation, piece by piece.

    Attributes
    ----------
    result : Generation
        What has been made so far, complete when the iteration ends.
    """

    def __init__(
        self,
        model: Model,
        ids: Array,
        settings: Settings,
        on_step: Callable[[list[Step]], None] | None = None,
    ):
        self.result = model._blank(ids, settings)
        self._model, self._on_step = model, on_step
        self._steps = model._decode([ids], settings)
        self._piece = ""  # waits while `on_step` is called, which may raise

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        """The next piece that is not empty."""
        try:
            for steps in self._steps:
                for step in steps:
                    self.result.add(step)
                    self._piece += step.text
                if self._on_step is not None:
                    self._on_step(steps)
                if self._piece:
                    return self._take()
        except KeyboardInterrupt:
            self._steps, self._piece = iter(()), ""  # nothing comes after it
            self._model._interrupt(self.result)
            raise Interrupted(self.result) from None
        if self._piece:
            return self._take()
        raise StopIteration

    def _take(self) -> str:
        piece, self._piece = self._piece, ""
        return piece
