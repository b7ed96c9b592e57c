"""What ``numpygpt generate`` is asked for: its options, and the settings they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..api import Answer, Model, Prompt
from ..decoding import ORDERS, Beams, Generation, Settings, fitted, require_usable
from ..decoding.beam import MOST_BEAMS
from ..decoding.order import KINDS
from ..decoding.settings import MOST_RUNNING, MOST_SAMPLES
from ..errors import ArgumentError, Interrupted, NumpyGPTError
from .texts import LARGEST

__all__ = ["Request", "add_settings", "numbers", "prompt_of"]

SETTINGS = [field.name for field in dataclasses.fields(Settings)]

EARLY_STOPPING: dict[str | None, Any] = {None: False, "no": False, "yes": True, "never": "never"}


class Request(NamedTuple):
    """What to continue, and how.

    Attributes
    ----------
    prompts : list of str or list of int
    settings : dict
        Those of :class:`numpygpt.Settings`.
    beams : dict or None
        Those that only a beam search has, if it is one.
    """

    prompts: list[Any]
    settings: dict[str, Any]
    beams: dict[str, Any] | None

    @property
    def is_single(self) -> bool:
        """Whether a prompt gets one result, which can be shown as it comes."""
        return self.beams is None and self.settings["n"] == 1

    @classmethod
    def of(cls, args: argparse.Namespace, prompts: list[Any]) -> Request:
        """What the options ask for.

        Raises
        ------
        ArgumentError
            If one cannot be read, is out of range, or would have no effect.
        """
        settings = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
        settings["stop"] = [_unescaped(text) for text in args.stop]
        if args.no_stop_id and args.stop_id:
            raise ArgumentError("--stop-id and --no-stop-id contradict each other")
        settings["stop_ids"] = [] if args.no_stop_id else args.stop_id
        settings["logit_bias"] = _pairs("--logit-bias", args.logit_bias, float)
        settings["forced"] = _pairs("--force", args.force, int)
        settings["banned"] = [numbers("--ban", text.split(",")) for text in args.ban]
        names = tuple(name.strip() for name in args.order.split(","))
        if len(names) > 1 or names[0] in KINDS:  # else the name of an order, perhaps misspelt
            settings["order"] = names
        if settings["temperature"] and settings["seed"] is None:
            # Chosen here and not deep inside, so that a record can say which one it was.
            settings["seed"] = int(np.random.SeedSequence().generate_state(1)[0])
        beams = None
        if args.beams is not None:
            beams = {
                "beams": args.beams,
                "n": settings.pop("n"),
                "length_penalty": 1.0 if args.length_penalty is None else args.length_penalty,
                "early_stopping": EARLY_STOPPING[args.early_stopping],
            }
        elif args.length_penalty is not None or args.early_stopping is not None:
            raise ArgumentError("--length-penalty and --early-stopping need --beams")
        return cls(prompts, settings, beams)._checked()

    @classmethod
    def recorded(cls, record: Mapping[str, Any], path: str) -> Request:
        """What a run record asks for. Its values are checked as if they had been given.

        Raises
        ------
        ArgumentError
            If it is damaged.
        """
        settings = dict(record["options"])
        try:
            prompts, beams = settings.pop("prompts"), settings.pop("beam_search")
            settings["logit_bias"] = {int(i): float(x) for i, x in settings["logit_bias"].items()}
            settings["forced"] = {int(i): token for i, token in settings["forced"].items()}
            settings["banned"] = [tuple(ids) for ids in settings["banned"]]
            known = {field.name for field in dataclasses.fields(Beams)}
            fitting = (
                isinstance(prompts, list)
                and all(isinstance(prompt, str | list) for prompt in prompts)
                and settings.keys() == {*SETTINGS}
                and (beams is None or settings.pop("n") == 1)
                and (beams is None or beams.keys() == known)
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            fitting = False
        if not fitting:
            raise ArgumentError(f"{path}: its options are not those of numpygpt generate")
        return cls(prompts, settings, beams)._checked()

    def options(self, model: Model) -> tuple[dict[str, Any], list[str]]:
        """For a run record: every option with the value it had, and what was done to the logits."""
        used = model.settings(**self.settings)
        filters = [f"{filter.name} {filter.values}" for filter in used.filters]
        resolved = dataclasses.asdict(used)
        resolved["logit_bias"] = {  # JSON has no infinity
            i: bias if bias > -np.inf else "-inf" for i, bias in used.logit_bias.items()
        }
        return {"prompts": self.prompts, **resolved, "beam_search": self.beams}, filters

    def require_possible(self, model: Model) -> None:
        """Refuse settings with which the model cannot continue any prompt."""
        used = model.settings(**self.settings)
        if used.stop:
            model.tokenizer  # noqa: B018  # stop texts need one
        fitted(np.zeros(1, np.intp), used, model.config)

    def run(self, model: Model) -> tuple[list[list[Generation]], bool]:
        """The results for every prompt, and whether Ctrl-C came.

        After Ctrl-C they are as far as they had come. Beam search takes one prompt after the
        other, so there may be fewer than prompts.
        """
        if self.beams is not None:
            return self._search(model)
        try:
            return model.generate(self.prompts, **self.settings), False
        except Interrupted as stopped:
            return stopped.results, True

    def each(self, model: Model, prompts: Iterable[Prompt | None]) -> Iterator[tuple[int, Answer]]:
        """The results for prompts that come one by one, as :meth:`Model.generate_each` gives them.

        A beam search takes one prompt after the other.
        """
        if self.beams is None:
            yield from model.generate_each(prompts, **self.settings)
            return
        for number, prompt in enumerate(prompt for prompt in prompts if prompt is not None):
            try:
                yield number, model.beam_search(prompt, **self.beams, **self.settings)
            except NumpyGPTError as error:
                yield number, error
            except Interrupted as stopped:
                raise Interrupted([(number, stopped.results)]) from None

    def _search(self, model: Model) -> tuple[list[list[Generation]], bool]:
        found: list[list[Generation]] = []
        try:
            for prompt in self.prompts:
                found.append(model.beam_search(prompt, **self.beams or {}, **self.settings))
        except Interrupted as stopped:
            return [*found, stopped.results], True
        return found, False

    def _checked(self) -> Request:
        """The request itself, if its settings are possible; which tokens exist is seen later."""
        default = self.settings["stop_ids"] is None  # the tokenizer's end-of-text
        settings = Settings(**self.settings | ({"stop_ids": ()} if default else {}))
        if self.beams is not None:
            Beams(**self.beams)
            require_usable(settings)
        return self


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare an option for every setting."""
    _add_length(parser.add_argument_group("length and end"))
    _add_choice(parser.add_argument_group("choosing a token"))
    _add_filters(
        parser.add_argument_group(
            "changing the logits", "ID is the id of a token, 0 to the model's vocab_size - 1."
        )
    )
    _add_beams(parser.add_argument_group("beam search"))
    _add_running(parser.add_argument_group("speed and rounding"))


def _add_length(group: Any) -> None:
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=100,
        metavar="N",
        help="stop after N tokens at the latest; from 0 (default: %(default)s)",
    )
    group.add_argument(
        "--min-new-tokens",
        type=int,
        default=0,
        metavar="N",
        help="stop ids are ruled out and stop texts ignored until there are N tokens; from 0 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text, found across the borders of tokens; \n, \r, \t and \\ are "
        "understood; may be given several times",
    )
    group.add_argument(
        "--stop-id",
        action="append",
        type=int,
        metavar="ID",
        help="end at this token instead of end-of-text; may be given several times",
    )
    group.add_argument(
        "--no-stop-id", action="store_true", help="go on after the end-of-text token, too"
    )
    group.add_argument(
        "--overflow",
        default="error",
        metavar="{error,truncate-left,slide}",
        help="if prompt and new tokens exceed the model's positions: refuse, cut off the beginning "
        "of the prompt, or read the last --keep tokens anew whenever all positions are taken "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="how many tokens --overflow slide reads anew: 1 to the model's n_ctx (default: half "
        "of that)",
    )


def _add_choice(group: Any) -> None:
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="divide the logits by T, above 0, and draw at random; 0.8 is a good start. Without "
        "it, or with 0, decoding is greedy, which soon repeats itself",
    )
    group.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="draw from exactly the K likeliest tokens, from 1; among equals lower ids",
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the smallest set of likeliest tokens that reaches probability P, the one "
        "that crosses P included; above 0, at most 1",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw from tokens at least P times as likely as the likeliest; 0 to 1",
    )
    group.add_argument(
        "--typical-p",
        type=float,
        metavar="P",
        help="draw from the tokens whose surprise is nearest to the entropy, the smallest set that "
        "reaches probability P; above 0, at most 1",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="makes the draws repeatable, from 0; every sample has a generator of its own "
        "(default: another one each time, which --json tells)",
    )
    group.add_argument(
        "--n",
        type=int,
        default=1,
        metavar="N",
        help=f"samples for each prompt, 1 to {MOST_SAMPLES}; more than 1 needs a temperature, or "
        "--beams (default: %(default)s)",
    )


def _add_filters(group: Any) -> None:
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="divide positive logits of tokens in prompt or new text by X, multiply negative ones; "
        "X is above 0, and 1 changes nothing",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="subtract X nats from the logit of each token of the new text; X is from -1e9 to "
        "1e9, and 0 changes nothing",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help="subtract X nats for each time a token occurs in the new text; X is from -1e9 to "
        "1e9, and 0 changes nothing",
    )
    group.add_argument(
        "--penalty-window",
        type=int,
        metavar="N",
        help="the three penalties look at the last N tokens only; from 1 (default: all; 64 with "
        "--order llama.cpp)",
    )
    group.add_argument(
        "--no-repeat-ngram",
        type=int,
        metavar="N",
        help="no run of N tokens comes twice, prompt included; from 1",
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        default=[],
        metavar="ID=X",
        help="add X nats to a token's logit; X is from -1e9 to 1e9, or -inf, which rules the "
        "token out; may be given several times",
    )
    group.add_argument(
        "--ban",
        action="append",
        default=[],
        metavar="ID[,ID...]",
        help="a token, or a sequence of tokens, that never comes; may be given several times",
    )
    group.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="N=ID",
        help="the new token with number N is ID; numbers begin with 0, and negative ones count "
        "from the end, so --force=-1=ID is the last that can come; may be given several times",
    )
    group.add_argument(
        "--order",
        default="numpygpt",
        metavar="ORDER",
        help=f"in which order filters act: {', '.join(ORDERS)}, or names of filters with commas "
        "between them, such as temperature,top_k,top_p; a wrong name shows all (default: "
        "%(default)s)",
    )


def _add_beams(group: Any) -> None:
    group.add_argument(
        "--beams",
        type=int,
        metavar="B",
        help=f"keep the B likeliest continuations at each step, 1 to {MOST_BEAMS}, and print the "
        "best --n",
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="rank by log-probability / length ** X, X from -50 to 50; above 0 favours longer ones "
        "(default: 1)",
    )
    group.add_argument(
        "--early-stopping",
        choices=["no", "yes", "never"],
        help="end when no running beam can win at its present length (no), as soon as B are "
        "finished (yes), or when none can win at any length (never) (default: no)",
    )


def _add_running(group: Any) -> None:
    group.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="propose up to N tokens at a time from an earlier place of the text that goes on from "
        "the same three tokens, while that pays; the result is the same, up to rounding; 10 is a "
        "good start; from 0, which is off (default: %(default)s)",
    )
    group.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="most texts that run together, samples counted one by one: 1 to "
        f"{MOST_RUNNING}; the next begins when one is finished (default: as many as 1 GiB of keys "
        "and values allows, at most 32)",
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=Settings.chunk,
        metavar="N",
        help="most tokens in one forward pass, from 1; with 1 a result does not depend on the "
        "batch around it, to the last bit (default: %(default)s)",
    )


# -- reading -----------------------------------------------------------------------------------


def prompt_of(argument: str | None) -> str:
    """The prompt given as an argument, else what is piped in, else nothing."""
    if argument is not None:
        return os.fsencode(argument).decode("utf-8", errors="replace")
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        piped = sys.stdin.buffer.read(LARGEST + 1)
    except OSError as error:
        raise ArgumentError(f"cannot read the prompt: {error.strerror}") from None
    if len(piped) > LARGEST:
        raise ArgumentError(f"a prompt may have at most {LARGEST // 2**20} MiB")
    text = piped.decode("utf-8-sig", errors="replace")
    return text.removesuffix("\n").removesuffix("\r")


def numbers(what: str, texts: Sequence[str]) -> list[int]:
    """Token ids."""
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise ArgumentError(f"{what} expects token ids, not {' '.join(texts)[:40]!r}") from None


def _pairs(option: str, texts: Sequence[str], number: type) -> dict[int, Any]:
    """Keys and values, each key once.

    >>> _pairs("--logit-bias", ["50256=-inf", "198=2"], float)
    {50256: -inf, 198: 2.0}
    """
    pairs: dict[int, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            new = {int(key): number(value)}
        except ValueError:
            raise ArgumentError(
                f"{option} expects two numbers such as 50256=2, not {text[:40]!r}"
            ) from None
        if new.keys() & pairs.keys():
            raise ArgumentError(f"{option} is given twice for {int(key)}")
        pairs |= new
    return pairs


def _unescaped(text: str) -> str:
    r"""A stop text with its escapes replaced, since not every shell can spell a newline.

    >>> _unescaped(r"END\n\\n")
    'END\n\\n'
    """
    known = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
    return re.sub(r"\\[ntr\\]", lambda found: known[found[0]], text)
