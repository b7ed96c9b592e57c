"""What ``numpygpt generate`` is asked for: its options, and the settings they stand for."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..api import Model
from ..decoding import ORDERS, BeamSettings, Generation, Settings
from ..errors import ArgumentError, Interrupted

__all__ = ["Request", "add_settings"]

SETTINGS = [field.name for field in dataclasses.fields(Settings)]

# What a beam search can do of it.
BEAM_SETTINGS = (
    "max_new_tokens", "min_new_tokens", "stop_ids", "no_repeat_ngram", "banned", "chunk", "n",
)  # fmt: skip

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
        biases = [_pair("--logit-bias", text, float) for text in args.logit_bias]
        settings["logit_bias"] = dict(biases)
        settings["forced"] = dict(_pair("--force", text, int) for text in args.force)
        settings["banned"] = [numbers("--ban", text.split(",")) for text in args.ban]
        if args.order not in ORDERS:
            settings["order"] = tuple(args.order.split(","))
        if settings["temperature"] and settings["seed"] is None:
            # Chosen here and not deep inside, so that a record can say which one it was.
            settings["seed"] = int(np.random.SeedSequence().generate_state(1)[0])
        beams = None
        if args.beams is not None:
            beams = {
                "beams": args.beams,
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
            known = {field.name for field in dataclasses.fields(BeamSettings)} - {*BEAM_SETTINGS}
            fitting = (
                isinstance(prompts, list)
                and all(isinstance(prompt, str | list) for prompt in prompts)
                and settings.keys() == {*SETTINGS}
                and (beams is None or beams.keys() == known)
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            fitting = False
        if not fitting:
            raise ArgumentError(f"{path}: its options are not those of numpygpt generate")
        return cls(prompts, settings, beams)._checked()

    def options(self, model: Model) -> tuple[dict[str, Any], list[str]]:
        """For a run record: every option with the value it had, and what was done to the logits."""
        if self.beams is None:
            used = model.settings(**self.settings)
            filters = [f"{filter.name} {filter.values}" for filter in used.filters]
        else:
            used, filters = model.settings(**{**self.settings, "n": 1}), []
        resolved = dataclasses.asdict(used) | {"n": self.settings["n"]}
        resolved["logit_bias"] = {  # JSON has no infinity
            i: bias if bias > -np.inf else "-inf" for i, bias in used.logit_bias.items()
        }
        return {"prompts": self.prompts, **resolved, "beam_search": self.beams}, filters

    def run(self, model: Model) -> tuple[list[Generation], bool]:
        """The results for every prompt, one after the other, and whether Ctrl-C came."""
        interrupted = False
        try:
            found: Any
            if self.beams is None:
                found = model.generate(self.prompts, **self.settings)
            else:
                found = [
                    model.beam_search(prompt, **self.beams, **self._common())
                    for prompt in self.prompts
                ]
        except Interrupted as stopped:
            found, interrupted = stopped.results, True
        results: list[Generation] = []
        for each in found:
            results += each if isinstance(each, list) else [each]
        return results, interrupted

    def _common(self) -> dict[str, Any]:
        return {name: self.settings[name] for name in BEAM_SETTINGS}

    def _checked(self) -> Request:
        """The request itself, if its settings are possible; which tokens exist is seen later."""
        default = self.settings["stop_ids"] is None
        settings = self.settings | ({"stop_ids": ()} if default else {})
        if self.beams is None:
            Settings(**settings)
            return self
        for field in dataclasses.fields(Settings):
            given = settings[field.name]
            if field.name not in BEAM_SETTINGS and given not in (None, [], (), {}, field.default):
                raise ArgumentError(f"{field.name} has no effect on beam search; leave it out")
        BeamSettings(**self.beams, **{name: settings[name] for name in BEAM_SETTINGS})
        return self


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Declare an option for every setting."""
    _add_length(parser.add_argument_group("length and end"))
    _add_choice(parser.add_argument_group("choosing a token"))
    _add_filters(parser.add_argument_group("changing the logits"))
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
        help="stop ids are ruled out and stop texts ignored before N tokens (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text, found across the borders of tokens; \n, \t and \\ are "
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
        help="how many tokens --overflow slide reads anew: 1 to n_ctx (default: half of n_ctx)",
    )


def _add_choice(group: Any) -> None:
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="divide the logits by T and draw at random, 0.8 is a good start; without it, or with "
        "0, decoding is greedy, which soon repeats itself",
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
        help="makes the draws repeatable, from 0; every sample has a generator of its own",
    )
    group.add_argument(
        "--n", type=int, default=1, metavar="N", help="samples for each prompt (default: 1)"
    )


def _add_filters(group: Any) -> None:
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="divide positive logits of tokens in prompt or new text by X, multiply negative ones; "
        "above 0, 1 changes nothing",
    )
    group.add_argument(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="subtract X nats from the logit of each token of the new text",
    )
    group.add_argument(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help="subtract X nats for each time a token occurs in the new text",
    )
    group.add_argument(
        "--penalty-window",
        type=int,
        metavar="N",
        help="the penalties look at the last N tokens only, from 1",
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
        help="add X nats to a token's logit; -inf rules it out; may be given several times",
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
        help="the N-th new token (from 0; -1 is the last of --max-new-tokens) is ID; may be given "
        "several times",
    )
    group.add_argument(
        "--order",
        default="numpygpt",
        metavar="ORDER",
        help=f"in which order these act: {', '.join(ORDERS)}, or names of filters with commas "
        "between them (default: %(default)s)",
    )


def _add_beams(group: Any) -> None:
    group.add_argument(
        "--beams",
        type=int,
        metavar="B",
        help="keep the B likeliest continuations at each step, from 1, and print the best --n",
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="rank by log-probability / length ** X; above 0 favours longer ones (default: 1)",
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
        "the same words; the result is the same; 0 is off (default)",
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=Settings.chunk,
        metavar="N",
        help="most tokens in one forward pass; with 1 a result does not depend on the batch around "
        "it, to the last bit (default: %(default)s)",
    )


# -- reading -----------------------------------------------------------------------------------


def prompt_of(argument: str | None) -> str:
    """The prompt given as an argument, else what is piped in, else nothing."""
    if argument is not None:
        return os.fsencode(argument).decode("utf-8", errors="replace")
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        piped = sys.stdin.buffer.read()
    except OSError as error:
        raise ArgumentError(f"cannot read the prompt: {error.strerror}") from None
    text = piped.decode("utf-8-sig", errors="replace")
    return text.removesuffix("\n").removesuffix("\r")


def numbers(what: str, texts: Sequence[str]) -> list[int]:
    """Token ids."""
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise ArgumentError(f"{what} expects token ids, not {' '.join(texts)[:40]!r}") from None


def _pair(option: str, text: str, number: type) -> tuple[int, Any]:
    """A key and a value.

    >>> _pair("--logit-bias", "50256=-inf", float)
    (50256, -inf)
    """
    key, _, value = text.partition("=")
    try:
        return int(key), number(value)
    except ValueError:
        raise ArgumentError(
            f"{option} expects two numbers such as 50256=2, not {text[:40]!r}"
        ) from None


def _unescaped(text: str) -> str:
    r"""A stop text with its escapes replaced, since not every shell can spell a newline.

    >>> _unescaped(r"END\n\\n")
    'END\n\\n'
    """
    known = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
    return re.sub(r"\\[ntr\\]", lambda found: known[found[0]], text)
