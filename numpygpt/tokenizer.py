"""Text to token ids and back: tiktoken as the engine, vocabulary files as the source.

tiktoken's own ``get_encoding`` downloads its vocabularies. Here every vocabulary is built from
files: those beside the checkpoint, or GPT-2's, which is bundled. The network is never touched.
Until a text is long enough to be worth the time that building the engine takes,
:mod:`numpygpt.bpe` does its work.
"""

from __future__ import annotations

import functools
import itertools
import operator
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .bpe import BYTE_ALPHABET, STAND_INS, TO_LATIN_1, WORDS, ShortTexts, TokenFile
from .checkpoints.json_files import parse_json, require_regular
from .checkpoints.locate import weights_directory
from .checkpoints.source import END_OF_TEXT, Vocabulary
from .errors import TokenError, TokenizerError
from .text import UNKNOWN, TextStream

if TYPE_CHECKING:
    import tiktoken

__all__ = ["END_OF_TEXT", "TextStream", "Tokenizer"]

# Finding the merger that makes a token takes quadratic time. GPT-2's longest has 128 bytes.
LONGEST_TOKEN = 1000

# White space that is long enough to be cut before it goes to tiktoken; see `_parts`.
LONG_RUN = re.compile(r"[ \t\n\r]{1000,}")

# How many tokens are looked up in Python before tiktoken is imported and built, in about the time
# that takes: 0.1 s for GPT-2's vocabulary, where one search of its file takes 0.35 ms; 0.01 s for
# one of 3000 tokens in a dictionary, enough for 4000 characters.
SEARCHES, LOOKUPS = 2**8, 2**13

# Size and SHA-256 of the two files that OpenAI published with GPT-2.
GPT2_MERGES = (456_318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")
GPT2_NUMBERS = (1_042_301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783")

# Settings of Hugging Face tokenizers that change the ids of a text, and the values that do not.
INERT_SETTINGS = {
    "add_prefix_space": False,
    "add_bos_token": False,
    "use_regex": True,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "dropout": 0,
    "ignore_merges": False,
    "byte_fallback": False,
}


class Tokenizer:
    """A byte-level BPE.

    Parameters
    ----------
    tokens : sequence of bytes
        Every ordinary token in the order of merging: first the 256 bytes, then the merges.
    ids : sequence of int, optional
        The id of each; its place in `tokens` if None.
    special : mapping of str to int
        Special tokens and their ids.

    Notes
    -----
    tiktoken merges any two neighbours whose joined bytes are a token. Merge lists that come out
    of BPE training lead to the same ids; one made by hand, with a token that its own pair cannot
    make because an earlier merge takes the pair apart, may not.

    Attributes
    ----------
    token_bytes : mapping of int to bytes
        What each token stands for, special ones included.
    special : dict of str to int

    Raises
    ------
    TokenizerError
        If a byte is missing or two tokens have one id.

    Examples
    --------
    >>> gpt2 = Tokenizer.gpt2()
    >>> gpt2.encode("Hello world")
    [15496, 995]
    >>> gpt2.decode([15496, 995])
    'Hello world'
    >>> gpt2.encode("<|endoftext|>")
    [27, 91, 437, 1659, 5239, 91, 29]
    >>> gpt2.encode("<|endoftext|>", allowed_special="all")
    [50256]
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        ids: Sequence[int] | None = None,
        special: Mapping[str, int] | None = None,
    ):
        special = dict(special or {})
        ranks: dict[bytes, int] = {}
        numbering: list[int] = []  # tiktoken's ids are ranks, the order of merging -> our ids
        for i, token in zip(range(len(tokens)) if ids is None else ids, tokens, strict=True):
            if token not in ranks:  # a token that two merges make keeps its first, lower rank
                ranks[token] = len(ranks)
                numbering.append(i)
        for i in [*numbering, *special.values()]:
            if type(i) is not int or i < 0:
                raise TokenizerError(f"expected an integer id from 0 up for every token, not {i!r}")
        for text in special:
            if not text.isprintable() or not text:
                raise TokenizerError(f"a special token cannot be {text!r}")
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise TokenizerError(f"the vocabulary has no token for the byte {missing[0]}")
        numbering += special.values()
        self.special = special
        self.token_bytes: Mapping[int, bytes] = dict(
            zip(numbering, [*ranks, *(t.encode() for t in special)], strict=True)
        )
        if len(self.token_bytes) != len(numbering):
            raise TokenizerError("the vocabulary gives one id to two tokens")
        # GPT-2 numbers its tokens in the order of merging; other vocabularies need not.
        self._numbering = None if numbering == list(range(len(numbering))) else numbering
        self._ranks = ranks
        self._short = ShortTexts(ranks.get, LOOKUPS)

    @functools.cached_property
    def _engine(self) -> tiktoken.Encoding:
        import tiktoken

        ranks = self._mergeable()
        special = {text: len(ranks) + i for i, text in enumerate(self.special)}
        return tiktoken.Encoding(
            "numpygpt", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special
        )

    def _mergeable(self) -> dict[bytes, int]:
        """The ordinary tokens and their ranks in the order of merging."""
        return self._ranks

    # -- use -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.token_bytes)

    @property
    def last_id(self) -> int:
        """The largest id of a token."""
        return max(self.token_bytes)

    @property
    def end_of_text(self) -> int | None:
        """The id of ``<|endoftext|>``, or None."""
        return self.special.get(END_OF_TEXT)

    def encode(
        self, text: str, allowed_special: Literal["all"] | Collection[str] = ()
    ) -> list[int]:
        """The ids of a text.

        Parameters
        ----------
        text : str
            Lone surrogates, which no UTF-8 has, become U+FFFD.
        allowed_special : "all" or collection of str
            Special tokens that the text may spell. The others are ordinary text, so that text
            from outside cannot end a document.

        Returns
        -------
        list of int

        Raises
        ------
        TokenError
            If this is not text.
        TokenizerError
            If a special token is unknown, or the text is beyond tiktoken.
        """
        if not isinstance(text, str):
            raise TokenError(f"expected text, received {type(text).__name__}")
        if isinstance(allowed_special, str):
            allowed_special = self.special if allowed_special == "all" else [allowed_special]
        allowed = set(allowed_special)
        if unknown := allowed - self.special.keys():
            raise TokenizerError(f"no special token is called {sorted(unknown)[0]!r}")
        ranks = None
        if "_engine" not in vars(self) and not any(name in text for name in allowed):
            ranks = self._short.encode(text)
        if ranks is None:
            ranks = self._encode(text, allowed)
        return ranks if self._numbering is None else [self._numbering[rank] for rank in ranks]

    def _encode(self, text: str, allowed: set[str]) -> list[int]:
        """The ranks of the tokens of any text, special tokens after the others."""
        ranks: list[int] = []
        for part in _parts(text):
            try:
                ranks += self._engine.encode(part, allowed_special=allowed, disallowed_special=())
            except ValueError as error:  # the regular expression gave up
                raise TokenizerError(f"this text cannot be cut into words: {error}") from None
        return ranks

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some tokens; they need not be whole characters.

        Raises
        ------
        TokenError
            If an id has no token.
        """
        try:
            return b"".join([self.token_bytes[operator.index(i)] for i in ids])
        except TypeError:
            raise TokenError("token ids must be integers") from None
        except KeyError as error:
            raise TokenError(f"no token has the id {error.args[0]!r}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens.

        Bytes that are not UTF-8 become U+FFFD, and so does an id without a token: a model whose
        vocabulary was padded to a round number can make one.
        """
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.end()

    def size(self, ids: Iterable[int]) -> int:
        """How many bytes some tokens are; an id without a token is U+FFFD, three bytes."""
        return sum(len(self.token_bytes.get(int(i), UNKNOWN)) for i in ids)

    def stream(self, stop: Iterable[str] = ()) -> TextStream:
        r"""A decoder for tokens that come one at a time.

        Parameters
        ----------
        stop : iterable of str
            Texts that end the stream; see :class:`numpygpt.text.TextStream`.

        Returns
        -------
        TextStream

        Examples
        --------
        >>> tokenizer = Tokenizer.gpt2()
        >>> stream = tokenizer.stream(stop=["\n"])
        >>> [stream.feed(i) for i in tokenizer.encode("\N{CLAPPING HANDS SIGN}!\nMore")]
        ['', '👏', '!', '', '']
        """
        return TextStream(self.token_bytes, stop)

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_directory(cls, directory: pathlib.Path) -> Tokenizer:
        """The tokenizer whose files lie in a directory.

        Looks for ``vocab.json`` + ``merges.txt``, OpenAI's ``encoder.json`` + ``vocab.bpe`` (the
        second alone is enough), a tiktoken ranks file ``*.tiktoken``, and ``tokenizer.json``.

        Raises
        ------
        TokenizerError
            If there is none, or one is damaged.
        """
        make = cls.locate(directory)
        if make is None:
            raise TokenizerError(
                f"{directory}: no vocabulary; expected vocab.json and merges.txt, vocab.bpe, a "
                f"*.tiktoken file or tokenizer.json"
            )
        settings = directory / "tokenizer_config.json"
        _refuse_settings(_parse(settings) if settings.exists() else {}, settings)
        return make()

    @classmethod
    def locate(cls, directory: pathlib.Path) -> Callable[[], Tokenizer] | None:
        """What would make the tokenizer of a directory, without reading it yet; None if nothing."""
        merges, vocab = directory / "merges.txt", directory / "vocab.json"
        if merges.exists() and vocab.exists():
            return functools.partial(cls.from_merges, merges, vocab)
        merges, vocab = directory / "vocab.bpe", directory / "encoder.json"
        if merges.exists():
            return functools.partial(cls.from_merges, merges, vocab if vocab.exists() else None)
        for path in sorted(directory.glob("*.tiktoken")):
            return functools.partial(cls.from_ranks, path)
        if (directory / "tokenizer.json").exists():
            return functools.partial(cls.from_tokenizer_json, directory / "tokenizer.json")
        return None

    @classmethod
    def from_merges(cls, merges: pathlib.Path, vocab: pathlib.Path | None = None) -> Tokenizer:
        """From a list of merges, and optionally the JSON that numbers the tokens.

        Without it, tokens are numbered as GPT-2's are: bytes, merges, ``<|endoftext|>``.
        """
        data = _read(merges)
        numbers = None if vocab is None else _read(vocab)
        if _published(data, GPT2_MERGES) and (numbers is None or _published(numbers, GPT2_NUMBERS)):
            return cls.gpt2()
        lines = [line.rstrip("\r") for line in data.decode("utf-8", "replace").split("\n")]
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        pieces = _pieces(pairs, merges)
        if vocab is not None and numbers is not None:
            return cls._numbered(pieces, parse_json(numbers, str(vocab), TokenizerError), {}, vocab)
        return cls._checked(merges, _to_bytes(pieces), None, {END_OF_TEXT: len(pieces)})

    @classmethod
    def from_ranks(cls, path: pathlib.Path) -> Tokenizer:
        """From a tiktoken file: on each line a token in base64 and its rank.

        The format has no special tokens; ``<|endoftext|>`` gets the next id.
        """
        import base64

        tokens: dict[int, bytes] = {}
        for line in _read(path).splitlines():
            try:
                token, rank = line.split()
                tokens[int(rank)] = base64.b64decode(token, validate=True)
            except ValueError:
                raise TokenizerError(
                    f"{path}: expected a base64 token and a rank, found {line[:60]!r}"
                ) from None
        ids = sorted(tokens)
        if not ids:
            raise TokenizerError(f"{path}: holds no tokens")
        return cls._checked(path, [tokens[i] for i in ids], ids, {END_OF_TEXT: ids[-1] + 1})

    @classmethod
    def from_tokenizer_json(cls, path: pathlib.Path) -> Tokenizer:
        """From the single file of Hugging Face's tokenizers library, if it is GPT-2's kind."""
        fields = _parse(path)
        match fields:
            case {
                "model": {"type": "BPE", "vocab": dict(vocab), "merges": list(merges)},
                "pre_tokenizer": {"type": "ByteLevel"},
            } if not fields.get("normalizer") and _adds_nothing(fields.get("post_processor")):
                _refuse_settings(fields["model"] | fields["pre_tokenizer"], path)
            case _:
                raise TokenizerError(f"{path}: not a byte-level BPE of GPT-2's kind")
        added = {}
        more = fields.get("added_tokens") or []
        for token in more if isinstance(more, list) else [more]:
            match token:
                case {"content": str(text), "id": int(i)}:
                    added[text] = i
                case _:
                    raise TokenizerError(f"{path}: an added token is {str(token)[:60]}")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        return cls._numbered(_pieces(pairs, path), vocab, added, path)

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary, source: pathlib.Path) -> Tokenizer:
        """From the tokens and merges that a checkpoint carries in itself.

        Parameters
        ----------
        vocabulary : Vocabulary
        source : pathlib.Path
            Names the file in messages.
        """
        numbers = {token: i for i, token in enumerate(vocabulary.tokens)}
        if len(numbers) != len(vocabulary.tokens):
            raise TokenizerError(f"{source}: the vocabulary has one token twice")
        merges = [merge.split(" ") for merge in vocabulary.merges]
        return cls._numbered(_pieces(merges, source), numbers, {}, source)

    def vocabulary(self) -> Vocabulary:
        """The tokens and merges, for a file that carries them.

        Returns
        -------
        Vocabulary
            Ids without a token are filled with ``[PAD...]``, as llama.cpp does.

        Raises
        ------
        TokenizerError
            If a token is not the merger of two others.

        Examples
        --------
        >>> vocabulary = Tokenizer.gpt2().vocabulary()
        >>> vocabulary.tokens[256:259], vocabulary.merges[:3], vocabulary.special
        (['Ġt', 'Ġa', 'he'], ['Ġ t', 'Ġ a', 'h e'], [50256])
        """
        specials = set(self.special.values())
        ordinary = [i for i in self.token_bytes if i not in specials]
        merged = [self.token_bytes[i] for i in ordinary]  # in the order of merging
        ranks = {token: rank for rank, token in enumerate(merged)}
        merges = [
            " ".join(map(_spelled, _halves(token, rank, ranks)))
            for token, rank in ranks.items()
            if len(token) > 1
        ]
        spelled = {i: _spelled(self.token_bytes[i]) for i in ordinary}
        spelled |= {i: text for text, i in self.special.items()}
        count = self.last_id + 1
        special = sorted(set(range(count)) - set(ordinary))
        return Vocabulary([spelled.get(i, f"[PAD{i}]") for i in range(count)], merges, special)

    @classmethod
    @functools.cache
    def gpt2(cls) -> Tokenizer:
        """The bundled vocabulary of OpenAI's GPT-2: 50257 tokens."""
        return _GPT2(_read(weights_directory() / "gpt2" / "vocab.bpe"))

    @classmethod
    def _numbered(
        cls,
        pieces: list[str],
        vocab: Mapping[Any, Any],
        added: Mapping[str, int],
        source: pathlib.Path,
    ) -> Tokenizer:
        """Bytes and merges are ordinary tokens; whatever else the vocabulary lists is special."""
        if missing := [piece for piece in pieces if piece not in vocab]:
            raise TokenizerError(f"{source}: no id for {missing[0][:60]!r}, which merges can make")
        ordinary = set(pieces)
        special = {text: i for text, i in {**vocab, **added}.items() if text not in ordinary}
        return cls._checked(source, _to_bytes(pieces), [vocab[piece] for piece in pieces], special)

    @classmethod
    def _checked(
        cls,
        source: pathlib.Path,
        tokens: list[bytes],
        ids: list[int] | None,
        special: Mapping[str, int],
    ) -> Tokenizer:
        """A tokenizer, or an error that names the file it comes from."""
        try:
            return cls(tokens, ids, special)
        except TokenizerError as error:
            raise TokenizerError(f"{source}: {error}") from None


class _GPT2(Tokenizer):
    """The bundled vocabulary: its file needs no check, and its tokens stay there until needed."""

    def __init__(self, merges: bytes):
        self.token_bytes = self._file = TokenFile(merges, END_OF_TEXT)
        self.special = {END_OF_TEXT: len(self._file) - 1}
        self._numbering = None
        self._short = ShortTexts(self._file.find, SEARCHES)

    def _mergeable(self) -> dict[bytes, int]:
        tokens = self._file.ordinary()
        self.token_bytes = dict(enumerate([*tokens, END_OF_TEXT.encode()]))  # faster than the file
        return {token: rank for rank, token in enumerate(tokens)}


def _published(data: bytes, file: tuple[int, str]) -> bool:
    """Whether these bytes are a file that OpenAI published, known by its size and SHA-256."""
    if len(data) != file[0]:
        return False
    import hashlib  # slow, and most files have another size

    return hashlib.sha256(data).hexdigest() == file[1]


def _parts(text: str) -> list[str]:
    """A text, cut inside its long runs of white space, where a word border is anyway.

    The last white space before a word belongs to the word, so the cut comes one character before
    the end of the run. tiktoken's regular expression runs out of stack on runs of a million.
    """
    ends = [run.end() for run in LONG_RUN.finditer(text)]
    # A run that goes on in other white space, or is the end of the text, has no word after it.
    cuts = [0, *(end - 1 for end in ends if end < len(text) and not text[end].isspace()), len(text)]
    return [text[start:stop] for start, stop in itertools.pairwise(cuts)]


def _read(path: pathlib.Path) -> bytes:
    try:
        require_regular(path, TokenizerError)
        if path.stat().st_size > 2**26:
            raise TokenizerError(f"{path}: over 64 MiB, which no vocabulary is")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from None


def _parse(path: pathlib.Path) -> dict[str, Any]:
    return parse_json(_read(path), str(path), TokenizerError)


def _pieces(pairs: Sequence[Any], source: pathlib.Path) -> list[str]:
    """The 256 bytes and what each merge makes; both halves of a merge must be pieces before it."""
    pieces = [stand_in for _, stand_in in BYTE_ALPHABET]
    known = set(pieces)
    for pair in pairs:
        match pair:
            case [str(a), str(b)] if a in known and b in known:
                known.add(a + b)
                pieces.append(a + b)
            case _:
                raise TokenizerError(
                    f"{source}: expected two tokens to merge, found {str(pair)[:60]}"
                )
    return pieces


def _to_bytes(pieces: Sequence[str]) -> list[bytes]:
    """What pieces stand for that are spelled in the byte alphabet."""
    return [piece.translate(TO_LATIN_1).encode("latin-1") for piece in pieces]


def _spelled(token: bytes) -> str:
    """A token in the byte alphabet."""
    return "".join([STAND_INS[byte] for byte in token])


def _halves(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens whose merger this is: what the merges before it make of its bytes."""
    if len(token) > LONGEST_TOKEN:
        raise TokenizerError(f"a token of {len(token)} bytes, expected at most {LONGEST_TOKEN}")
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        first = min(pairs)
        if first >= rank:
            raise TokenizerError(f"the token {token!r} is not the merger of two others")
        at = pairs.index(first)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _adds_nothing(processor: Any) -> bool:
    """Whether the last step of a tokenizer.json leaves the ids of one text alone."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return True
        case {
            "type": "TemplateProcessing",
            "single": [{"Sequence": _}],
        }:  # what transformers 5 writes
            return True
    return False


def _refuse_settings(settings: Mapping[str, Any], path: pathlib.Path) -> None:
    """Refuse the settings under which a text would have other ids."""
    for name, inert in INERT_SETTINGS.items():
        if settings.get(name) not in (inert, None):
            raise TokenizerError(f"{path}: {name} = {settings[name]!r} is not supported")
