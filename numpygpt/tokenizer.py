"""Text to token ids and back: tiktoken as the engine, vocabulary files as the source.

tiktoken's own ``get_encoding`` downloads its vocabularies. Here every vocabulary is built from
files: those beside the checkpoint, or GPT-2's, which is bundled. The network is never touched.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import functools
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from .checkpoints.config import parse_json
from .checkpoints.locate import weights_directory
from .errors import ConfigError, TokenError, TokenizerError

__all__ = ["END_OF_TEXT", "TextStream", "Tokenizer"]

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into words before it merges bytes: contractions, letters, digits, other
# marks (each with one space before it), white space. The possessive forms (++) match what the
# original pattern of openai/gpt-2 matches, faster.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _byte_alphabet() -> list[tuple[int, str]]:
    """GPT-2's printable stand-in for each byte, in the order of the ids 0 to 255.

    Bytes that print well stand for themselves and come first; the others are shifted to
    characters from 256 on, so that a vocabulary file has no control characters or spaces.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [(b, chr(b)) for b in printable] + [(b, chr(256 + i)) for i, b in enumerate(others)]


BYTE_ALPHABET = _byte_alphabet()
_TO_LATIN_1 = {ord(stand_in): byte for byte, stand_in in BYTE_ALPHABET}
_BREAK = "\u2603"  # any character outside Latin-1 and the alphabet


def _to_bytes(pieces: Sequence[str]) -> list[bytes]:
    """Pieces spelled in the byte alphabet -> the bytes they stand for."""
    joined = _BREAK.join(pieces).translate(_TO_LATIN_1)
    return [piece.encode("latin-1") for piece in joined.split(_BREAK)]


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

    Attributes
    ----------
    token_bytes : dict of int to bytes
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
        import tiktoken

        special = dict(special or {})
        ranks: dict[bytes, int] = {}
        numbering: list[int] = []  # tiktoken's ids are ranks, the order of merging -> our ids
        for i, token in zip(range(len(tokens)) if ids is None else ids, tokens, strict=True):
            if token not in ranks:  # a token that two merges make keeps its first, lower rank
                ranks[token] = len(ranks)
                numbering.append(i)
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise TokenizerError(f"the vocabulary has no token for the byte {missing[0]}")
        numbering += special.values()
        self.special = special
        self.token_bytes = dict(
            zip(numbering, [*ranks, *(t.encode() for t in special)], strict=True)
        )
        if len(self.token_bytes) != len(numbering):
            raise TokenizerError("the vocabulary gives one id to two tokens")
        # GPT-2 numbers its tokens in the order of merging; other vocabularies need not.
        self._numbering = None if numbering == list(range(len(numbering))) else numbering
        self._engine = tiktoken.Encoding(
            "numpygpt",
            pat_str=WORDS,
            mergeable_ranks=ranks,
            special_tokens={text: len(ranks) + i for i, text in enumerate(special)},
        )

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
        """
        allowed = self.special.keys() if allowed_special == "all" else allowed_special
        if unknown := set(allowed) - self.special.keys():
            raise TokenizerError(f"no special token is called {sorted(unknown)[0]!r}")
        ids = self._engine.encode(text, allowed_special=set(allowed), disallowed_special=())
        return ids if self._numbering is None else [self._numbering[i] for i in ids]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some tokens; they need not be whole characters.

        Raises
        ------
        TokenError
            If an id has no token.
        """
        try:
            return b"".join([self.token_bytes[i] for i in ids])
        except KeyError as error:
            raise TokenError(f"no token has the id {error.args[0]!r}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens.

        Bytes that are not UTF-8 become U+FFFD, and so does an id without a token: a model whose
        vocabulary was padded to a round number can make one.
        """
        stream = self.stream()
        return "".join([stream.feed(i) for i in ids]) + stream.end()

    def stream(self) -> TextStream:
        """A decoder for tokens that come one at a time."""
        return TextStream(self)

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
        _refuse_settings(directory / "tokenizer_config.json")
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
        lines = _read(merges).decode("utf-8", "replace").splitlines()
        lines = [line for line in lines if line and not line.startswith("#version")]
        if any(line.count(" ") != 1 for line in lines):
            wrong = next(line for line in lines if line.count(" ") != 1)
            raise TokenizerError(f"{merges}: expected two pieces a line, found {wrong[:60]!r}")
        pieces = [line.replace(" ", "") for line in lines]
        if vocab is None:
            tokens = [bytes([byte]) for byte, _ in BYTE_ALPHABET] + _spelled(pieces, merges)
            return cls(tokens, special={END_OF_TEXT: len(tokens)})
        return cls._from_pieces(pieces, _parse(vocab), {}, vocab)

    @classmethod
    def from_ranks(cls, path: pathlib.Path) -> Tokenizer:
        """From a tiktoken file: on each line a token in base64 and its rank.

        The format has no special tokens; ``<|endoftext|>`` gets the next id.
        """
        tokens: dict[int, bytes] = {}
        for line in _read(path).splitlines():
            try:
                token, rank = line.split()
                tokens[int(rank)] = base64.b64decode(token, validate=True)
            except (ValueError, binascii.Error):
                raise TokenizerError(
                    f"{path}: expected a base64 token and a rank, found {line[:60]!r}"
                ) from None
        ids = sorted(tokens)
        if not ids:
            raise TokenizerError(f"{path}: holds no tokens")
        return cls([tokens[i] for i in ids], ids, {END_OF_TEXT: ids[-1] + 1})

    @classmethod
    def from_tokenizer_json(cls, path: pathlib.Path) -> Tokenizer:
        """From the single file of Hugging Face's tokenizers library, if it is GPT-2's kind."""
        fields = _parse(path)
        match fields:
            case {
                "model": {"type": "BPE", "vocab": dict(vocab), "merges": list(merges)},
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            } if not fields.get("normalizer"):
                pass
            case _:
                raise TokenizerError(f"{path}: not a byte-level BPE of GPT-2's kind")
        pieces = [m.replace(" ", "") if isinstance(m, str) else "".join(m) for m in merges]
        added = {t["content"]: t["id"] for t in fields.get("added_tokens") or []}
        return cls._from_pieces(pieces, vocab, added, path)

    @classmethod
    @functools.cache
    def gpt2(cls) -> Tokenizer:
        """The bundled vocabulary of OpenAI's GPT-2: 50257 tokens."""
        return cls.from_merges(weights_directory() / "gpt2" / "vocab.bpe")

    @classmethod
    def _from_pieces(
        cls, merged: list[str], vocab: Mapping[str, Any], added: Mapping[str, Any], source: Any
    ) -> Tokenizer:
        """Ordinary tokens are bytes and merges; whatever else the vocabulary lists is special."""
        if not all(type(i) is int for i in [*vocab.values(), *added.values()]):
            raise TokenizerError(f"{source}: expected an integer id for every token")
        pieces = list(dict.fromkeys([stand_in for _, stand_in in BYTE_ALPHABET] + merged))
        if missing := [piece for piece in pieces if piece not in vocab]:
            raise TokenizerError(f"{source}: no id for {missing[0][:60]!r}, which merges can make")
        ordinary = set(pieces)
        special = {text: i for text, i in {**vocab, **added}.items() if text not in ordinary}
        return cls(_spelled(pieces, source), [vocab[p] for p in pieces], special)


class TextStream:
    """Tokens in, text out, never half a character.

    A character can take several tokens. Bytes that may still become one are held back until it is
    complete, or until it cannot be any more.

    Parameters
    ----------
    tokenizer : Tokenizer

    Examples
    --------
    >>> tokenizer = Tokenizer.gpt2()
    >>> stream = tokenizer.stream()
    >>> [stream.feed(i) for i in tokenizer.encode("\N{CLAPPING HANDS SIGN}!")]
    ['', '👏', '!']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that this token completes; often the empty string."""
        return self._decoder.decode(self._tokenizer.token_bytes.get(token, b"\xef\xbf\xbd"))

    def end(self) -> str:
        """What is left when no token follows: U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


def _read(path: pathlib.Path) -> bytes:
    try:
        if path.stat().st_size > 2**26:
            raise TokenizerError(f"{path}: over 64 MiB, which no vocabulary is")
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: {error.strerror}") from None


def _parse(path: pathlib.Path) -> dict[str, Any]:
    try:
        return parse_json(_read(path), str(path))
    except ConfigError as error:
        raise TokenizerError(str(error)) from None


def _spelled(pieces: Sequence[str], source: Any) -> list[bytes]:
    try:
        return _to_bytes(pieces)
    except UnicodeEncodeError:
        raise TokenizerError(
            f"{source}: a piece has characters outside GPT-2's byte alphabet"
        ) from None


def _refuse_settings(path: pathlib.Path) -> None:
    """Refuse the tokenizer settings that would change the ids of a text."""
    settings = _parse(path) if path.exists() else {}
    for name in ("add_prefix_space", "add_bos_token"):
        if settings.get(name):
            raise TokenizerError(f"{path}: {name} = true is not supported")
