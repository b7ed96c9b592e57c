"""Reports: what is said of a result, and that each format holds whatever names a dump has."""

from __future__ import annotations

import html.parser
import json
import math
import re
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpygpt.plans import trace_names
from numpygpt.verify.dump import Dump, Match
from numpygpt.verify.operations import OPERATIONS, kind_of, layer_of
from numpygpt.verify.report import Decision, Explanation, Finding, Report, Verdict
from numpygpt.verify.reports import Unusable, as_html, as_json, as_junit, as_text

ERF = Explanation(
    ("exact (erf) GELU instead of gelu_new",),
    "torch.nn.GELU() is the exact one unless approximate='tanh' is given.",
    True, 0.43, 0.9999,
)  # fmt: skip
TANH = Explanation(("quick GELU instead of gelu_new",), "CLIP's formula.", False, 900.0, 0.31)
PAIR = Explanation(("no bias in mlp.c_proj", "eps 1e-6"), "Two at once.", True, 0.8, 1.0)


def finding(
    name: str, verdict: Verdict = "rounding", ratio: float = 0.3, **changes: Any
) -> Finding:
    """A finding with the axes of its array."""
    per_head = any(part in name for part in ("scores", "pattern", "heads"))
    values: dict[str, Any] = {
        "inputs": tuple(
            key.replace("{i-1}", str(layer_of(name) - 1)).format(i=layer_of(name))
            for key in OPERATIONS[kind_of(name)].inputs
        ),
        "through": (),
        "ceiling": 9.0,
        "error": 3.9e-8 * ratio,
        "bound": 3.9e-8,
        "where": (3, 17, 5) if per_head else (17, 803),
        "observed": 0.15881 + 3.9e-8 * ratio,
        "expected": 0.15881,
        "free_error": 1e-6 * (layer_of(name) + 2),
        "free_relative": 1e-7 * (layer_of(name) + 2),
        **changes,
    }
    return Finding(
        name,
        OPERATIONS[kind_of(name)].words.format(activation_function="gelu_new"),
        verdict=verdict,
        ratio=ratio,
        **values,
    )


def decisions(ties: int = 0, real: int = 0, count: int = 64) -> tuple[Decision, ...]:
    """So many of each kind, the first at position 17."""
    made = [Decision(t, 11, 11, 0.5, 2e-6, "same") for t in range(count)]
    for n in range(ties):
        made[17 + n] = Decision(17 + n, 11, 13, 3e-7, 2e-6, "tie within rounding")
    for n in range(real):
        made[40 + n] = Decision(40 + n, 11, 262, 0.012, 2e-6, "real")
    return tuple(made)


CONFIG = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}


def make(
    changed: dict[str, Finding] | None = None,
    n_layer: int = 12,
    chosen: tuple[Decision, ...] = (),
    dump: dict[str, Any] | None = None,
    **changes: Any,
) -> Report:
    """The report of a run whose arrays are all there, and within rounding unless `changed`."""
    names = trace_names(n_layer)
    ratios = np.random.default_rng(0).uniform(0.02, 0.9, len(names))
    findings = [
        (changed or {}).get(name, finding(name, ratio=float(ratio)))
        for name, ratio in zip(names, ratios, strict=True)
    ]
    verdicts = [each.verdict for each in findings]
    worst: Literal["rounding", "suspicious", "wrong"] = next(
        (v for v in ("wrong", "suspicious") if v in verdicts),
        "rounding",  # type: ignore[arg-type]
    )
    fields: dict[str, Any] = {
        "model": {"path": "gpt2", "sha256": "8f3c" * 16, "config": CONFIG | {"n_layer": n_layer}},
        "sequence": 0,
        "verdict": worst,
        "findings": tuple(findings),
        "first": next((each for each in findings if each.verdict != "rounding"), None),
        "decisions": chosen,
        "seconds": 21.4,
        **changes,
    }
    values: dict[str, Any] = {
        "dtype": "float32",
        "producer": "torch 2.13",
        "source": "gelu.safetensors",
        "matches": tuple(Match(name, (name,)) for name in names),
        **(dump or {}),
    }
    tensors = {name: np.zeros((64, 1)) for name in names}
    return Report(Dump(np.arange(64), tensors, **values), **fields)


def gelu(explanations: tuple[Explanation, ...] = (ERF, TANH), **changes: Any) -> Report:
    """The exact GELU in all twelve layers."""
    ratios = np.geomspace(3100, 9800, 12)
    wrong = {
        f"h.{i}.mlp.post": finding(
            f"h.{i}.mlp.post", "wrong", float(ratio), explanations=explanations
        )
        for i, ratio in enumerate(ratios)
    }
    return make(wrong, **{"chosen": decisions(1, 1), **changes})


# Names as a hostile file could have them.
HOSTILE = "h.0<script>alert(1)</script>&\"'\x00\x1b[2J\ud800\u202e\n\r\x85"
UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")


def hostile() -> Report:
    """A report with such names wherever one comes from outside."""
    return gelu(
        explanations=(ERF._replace(why=HOSTILE), Explanation((HOSTILE, "b"), "", False, 2.0, 0.1)),
        dump={
            "source": f"dir/{HOSTILE}",
            "producer": HOSTILE,
            "matches": (Match("embed", (HOSTILE, HOSTILE), "values", HOSTILE),),
            "unmatched": (HOSTILE,),
            "notes": (HOSTILE,),
        },
        model={"path": HOSTILE, "sha256": HOSTILE, "config": CONFIG},
    )


# -- text --------------------------------------------------------------------------------------


def said(text: str) -> dict[str, str]:
    """What a text says after each of its labels."""
    entries: dict[str, str] = {}
    label = ""
    for line in text.splitlines():
        label = line[:10].strip() or label
        entries[label] = f"{entries.get(label, '')} {line[10:].strip()}".strip()
    return entries


def test_the_first_lines_say_what_is_wrong_where_and_why():
    lines = as_text(gelu()).splitlines()
    assert lines[0] == "WRONG     gelu.safetensors is not GPT-2 within the rounding of float32"
    assert lines[1] == "first     h.0.mlp.post, activation gelu_new, layer 0"
    assert lines[2] == "off by    3,100 times the rounding of float32, at position 17, unit 803"
    # As many digits as the two numbers need to differ.
    assert lines[3] == (
        "          observed 0.158931, expected 0.158810, off by 0.00012, bound 3.9e-08"
    )
    assert lines[4].startswith("cause     exact (erf) GELU instead of gelu_new; this reproduces it")


def test_the_rest_says_what_else_was_found():
    told = said(as_text(gelu()))
    assert told["compared"] == (
        "159 operations in 21.4 s: 12 wrong, 0 suspicious, 147 within rounding mlp.post: wrong in "
        "all 12 layers, ratio 3,100 to 9,800, the same explanation"
    )
    assert told["effect"] == (
        "run freely, the logits are off by up to 1e-06 nats, 1e-07 of the largest"
    )
    assert told["matched"] == "159 arrays: 159 by name"
    assert told["assumed"] == "computed in float32, 64 tokens in one pass; made by torch 2.13"
    assert told["against"].startswith("gpt2 (12 layers, 12 heads, 768 channels; sha256 8f3c8f3c")
    assert "left out" not in told


def test_a_run_within_rounding_says_how_near_the_bound_it_comes():
    report = make()
    worst = max(report.findings, key=lambda each: each.ratio)
    text = as_text(report)
    assert text.startswith("ROUNDING  gelu.safetensors is GPT-2 within the rounding of float32\n")
    assert (
        said(text)["largest"] == f"{worst.name} reaches {worst.ratio:.2g} of the bound of rounding"
    )
    assert "cause" not in said(text)


def test_what_is_suspicious_says_what_is_conceivable():
    report = make({"ln_f": finding("ln_f", "suspicious", 2.5)})
    told = said(as_text(report))
    assert told["SUSPICIOUS"].startswith("gelu.safetensors is beyond the rounding of float32, but")
    assert told["off by"].startswith("2.5 times the rounding of float32 (conceivable: 9), at ")
    assert told["cause"] == "no known mistake explains it"
    assert "ln_f: suspicious, ratio 2.5" in told["compared"]


def test_what_is_no_number_is_beyond_any_rounding():
    bad = finding("h.3.ln_1", "wrong", math.inf, observed=math.nan, error=math.nan)
    told = said(as_text(make({bad.name: bad})))
    assert told["off by"].startswith("beyond any rounding, at position 17, channel 803")
    assert "observed nan" in told["off by"]
    assert "ln_1: wrong in layer 3, ratio inf" in told["compared"]


MANY = tuple(ERF._replace(mistakes=(f"mistake {n}",)) for n in range(5))


@pytest.mark.parametrize(
    ("explanations", "expected"),
    [
        ((ERF,), "exact (erf) GELU instead of gelu_new; this reproduces it within rounding torch"),
        ((PAIR,), "no bias in mlp.c_proj together with eps 1e-6; this reproduces it within"),
        ((TANH, ERF), "exact (erf) GELU instead of gelu_new; this"),
        ((PAIR, ERF), "one of 2 mistakes, each of which reproduces it within rounding: no bias in"),
        (MANY, "one of 5 mistakes, each of which reproduces it within rounding: mistake 0; or"),
        ((TANH,), "no known mistake reproduces it; nearest: quick GELU instead of gelu_new, with"),
        ((TANH._replace(explained=-3.0),), "no known mistake explains it"),
        ((), "no known mistake explains it"),
    ],
)
def test_the_cause_is_one_mistake_or_several_or_the_nearest_or_none(explanations, expected):
    assert said(as_text(gelu(explanations)))["cause"].startswith(expected)


def test_many_causes_are_counted():
    assert said(as_text(gelu(MANY)))["cause"].endswith("mistake 2; or 2 more")
    assert "mistake 4: reproduces it" in as_text(gelu(MANY), verbose=True)


def test_a_gap_in_the_dump_is_told_beside_the_cause():
    names = ("h.0.attn.qkv", "h.0.attn.scores", "h.0.attn.pattern")
    bad = finding(
        "h.0.attn.heads", "wrong", 40.0, through=names, inputs=("h.0.ln_1",), where=(2, 5, 7)
    )
    told = said(as_text(make({bad.name: bad})))
    assert told["but"] == (
        "the dump does not hold h.0.attn.qkv, h.0.attn.scores and h.0.attn.pattern, so the mistake "
        "may lie there; it was computed from h.0.ln_1"
    )
    assert "but" not in said(as_text(gelu()))


@pytest.mark.parametrize(
    ("name", "where", "expected"),
    [
        ("h.2.attn.scores", (3, 9, 8), "head 3, position 9, key 8"),
        ("h.2.attn.heads", (3, 9, 8), "head 3, position 9, channel 8"),
        ("logits", (9, 262), "position 9, token 262"),
        # Twelve heads of 64: column 768 + 2 * 64 + 5.
        ("h.2.attn.qkv", (9, 901), "position 9, column 901 (key of head 2, channel 5)"),
        ("h.2.attn.out", (), "index ()"),
    ],
)
def test_a_place_is_told_in_the_words_of_its_axes(name, where, expected):
    report = make({name: finding(name, "wrong", 50.0, where=where)})
    assert said(as_text(report))["off by"].split(", at ")[1].startswith(f"{expected} observed")


# -- what is wrong in many layers ------------------------------------------------------------


def grouped(*bad: Finding, **changes: Any) -> str:
    """What is said after the counts."""
    report = make({each.name: each for each in bad}, **changes)
    return said(as_text(report))["compared"].split("within rounding ")[1]


def post(layer: int, ratio: float = 50.0, *explanations: Explanation, **changes: Any) -> Finding:
    return finding(f"h.{layer}.mlp.post", "wrong", ratio, explanations=explanations, **changes)


def test_layers_of_one_operation_are_one_group():
    told = grouped(*(post(i) for i in (0, 3, 4, 5, 9)))
    assert told == "mlp.post: wrong in layers 0, 3-5, 9, ratio 50, no known mistake"


def test_wrong_and_suspicious_layers_of_one_operation_are_told_apart():
    told = grouped(post(0, 70.0), post(1)._replace(verdict="suspicious", ratio=1.25))
    assert told.startswith("mlp.post: wrong in layer 0, suspicious in layer 1, ratio 1.2 to 70")


def test_a_group_knows_what_the_dump_has_of_it():
    report = gelu()
    some = tuple(f for f in report.findings if layer_of(f.name) in (2, 5))
    part = Report(**{**vars(report), "findings": some, "first": some[0]})
    told = said(as_text(part))["compared"]
    assert "mlp.post: wrong in all 2 layers that the dump has, ratio" in told
    alone = Report(**{**vars(report), "findings": some[-13:], "first": None})
    assert "mlp.post: wrong in layer 5, ratio" in said(as_text(alone))["compared"]


def test_groups_stand_in_the_order_in_which_they_are_met():
    told = grouped(finding("logits", "wrong", 3.0), post(4), finding("h.5.ln_1", "wrong", 2.0))
    assert [told.index(part) for part in ("mlp.post", "ln_1", "logits")] == sorted(
        told.index(part) for part in ("mlp.post", "ln_1", "logits")
    )


def test_an_explanation_is_repeated_only_where_it_is_another():
    assert grouped(post(0, 50.0, ERF)) == "mlp.post: wrong in layer 0, ratio 50"
    assert grouped(post(0, 50.0, ERF), post(1, 50.0, ERF)).endswith("50, the same explanation")
    other = finding("logits", "wrong", 50.0, explanations=(PAIR, TANH))
    assert grouped(post(0, 50.0, ERF), other).endswith(
        "logits: wrong, ratio 50, no bias in mlp.c_proj together with eps 1e-6"
    )
    assert grouped(post(0, 50.0, ERF), post(1, 50.0, PAIR), post(2), post(3)).endswith(
        "ratio 50, the same explanation in 0; no bias in mlp.c_proj together with eps 1e-6 in 1; "
        "no known mistake in 2, 3"
    )


# -- greedy tokens, matches, assumptions -----------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (decisions(), "all 64 greedy tokens are the same"),
        (decisions(count=1), "the only greedy token is the same"),
        (
            (*decisions(count=3), Decision(3, 1, 1, 1e-7, 2e-6, "same")),
            "all 4 greedy tokens are the same; rounding could turn 1 of them",
        ),
        (
            decisions(1, 1),
            "2 of 64 greedy tokens differ: 1 tie within rounding (position 17: margin 3e-07 nats, "
            "bound 2e-06), 1 real (position 40: margin 0.012 nats, bound 2e-06)",
        ),
        (
            decisions(2),
            "2 of 64 greedy tokens differ: 2 ties within rounding (position 17: margin 3e-07 nats, "
            "bound 2e-06; position 18: margin 3e-07 nats, bound 2e-06), 0 real",
        ),
    ],
)
def test_greedy_tokens_differ_by_ties_or_really(chosen, expected):
    assert said(as_text(make(chosen=chosen)))["greedy"] == expected


def test_only_the_first_of_many_decisions_are_listed():
    told = said(as_text(make(chosen=decisions(0, 9))))["greedy"]
    assert told.startswith("9 of 64 greedy tokens differ: 0 ties within rounding, 9 real (position")
    assert told.endswith("; and 6 more)")
    assert told.count("position") == 3


def test_what_was_matched_and_assumed_is_told():
    matches = (
        Match("embed", ("embed",)),
        Match("h.0.attn.qkv", ("q", "k", "v"), "values", "(B, H, T, D) -> (T, 3C)"),
        Match("h.0.ln_1", ("x",), "mapping"),
    )
    dump = {
        "matches": matches,
        "unmatched": ("a", "b", "c", "d", "e"),
        "notes": ("ids are those of --ids",),
        "weights": "int8",
        "chunks": (62, 1, 1),
    }
    told = said(as_text(make(dump=dump)))
    assert told["matched"] == (
        "3 arrays: 1 by name, 1 by their values, 1 by the mapping, 1 with other axes, 1 put "
        "together from several"
    )
    assert told["left out"] == "a, b, c and 2 more"
    assert told["assumed"] == (
        "computed in float32 with int8 weights, 64 tokens in 3 passes with a cache (62, 1 and 1); "
        "made by torch 2.13 ids are those of --ids"
    )
    everything = as_text(make(dump=dump), verbose=True)
    assert "  h.0.attn.qkv <- q, k, v (by values, (B, H, T, D) -> (T, 3C))\n" in everything
    assert everything.endswith("left out\n  a\n  b\n  c\n  d\n  e")


def test_verbose_lists_every_finding():
    report = gelu()
    lines = as_text(report, verbose=True).splitlines()
    rows = lines[lines.index("every operation of gelu.safetensors") + 2 :][: len(report.findings)]
    assert [row.split()[0] for row in rows] == [each.name for each in report.findings]
    assert rows[0].split()[1:4] == ["rounding", "0.58", "2.3e-08"]
    assert "explanations of h.11.mlp.post" in lines


def test_a_sequence_is_named_if_it_is_not_the_only_one():
    assert "gelu.safetensors, sequence 2 is" in as_text(make(sequence=2))


def test_colours_change_nothing_but_the_first_word():
    plain, painted = as_text(gelu()), as_text(gelu(), colour=True)
    assert painted != plain
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == plain
    assert painted.count("\x1b[") == 2


@pytest.mark.parametrize("verbose", [False, True])
def test_text_fits_into_80_columns_whatever_the_names(verbose):
    long = make(n_layer=48, dump={"source": "x" * 300, "unmatched": ("y" * 300,)})
    wide = finding("h.47.attn.pattern", "suspicious", 123456.0, where=(24, 1023, 1023))
    for report in (gelu(), hostile(), long, make({wide.name: wide}, n_layer=48)):
        text = as_text(report, verbose)
        assert max(map(len, text.splitlines())) <= 80
        assert not UNPRINTABLE.search(text)
        assert all(line == line.rstrip() and line.isprintable() for line in text.split("\n"))


# -- JSON --------------------------------------------------------------------------------------


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_json_holds_everything_but_the_arrays():
    report = gelu()
    made = json.loads(as_json([report]), parse_constant=refuse)
    assert (made["format"], made["format_version"]) == ("numpygpt-verify", 1)
    assert (made["verdict"], made["passed"], made["unusable"]) == ("wrong", False, [])
    (told,) = made["reports"]
    assert (told["first"], told["counts"]["wrong"]) == ("h.0.mlp.post", 12)
    assert [f["name"] for f in told["findings"]] == [f.name for f in report.findings]
    wrong = next(f for f in told["findings"] if f["name"] == "h.0.mlp.post")
    assert wrong["ratio"] == report.first.ratio  # to the last bit
    assert wrong["explanations"][0]["mistakes"] == list(ERF.mistakes)
    assert told["decisions"][40]["verdict"] == "real"
    assert told["dump"]["ids"] == list(range(64))
    assert told["dump"]["matches"][0] == {
        "name": "embed", "source": ["embed"], "how": "name", "layout": "",
    }  # fmt: skip
    assert told["model"]["config"]["n_layer"] == 12


def test_numbers_that_json_has_not_are_texts():
    bad = finding("logits", "wrong", math.inf, observed=math.nan, expected=-math.inf)
    text = as_json([make({"logits": bad})])
    (told,) = json.loads(text, parse_constant=refuse)["reports"]
    last = told["findings"][-1]
    assert (last["ratio"], last["observed"], last["expected"]) == ("Infinity", "NaN", "-Infinity")
    assert [float(last[key]) for key in ("ratio", "expected")] == [math.inf, -math.inf]


def test_json_says_the_worst_verdict_and_what_was_unusable():
    suspicious = make({"ln_f": finding("ln_f", "suspicious", 2.5)})
    made = json.loads(as_json([make(), suspicious, make()]))
    assert (made["verdict"], made["passed"]) == ("suspicious", False)
    assert json.loads(as_json([suspicious, gelu()]))["verdict"] == "wrong"
    assert json.loads(as_json([make()]))["passed"] is True
    made = json.loads(as_json([make()], [Unusable("a.npz", "damaged")]))
    assert (made["verdict"], made["passed"]) == ("rounding", False)
    assert made["unusable"] == [{"source": "a.npz", "reason": "damaged"}]
    assert json.loads(as_json([], [Unusable("a", "b")]))["verdict"] is None


def test_json_is_one_line_of_ascii():
    text = as_json([hostile()])
    assert text.isascii()
    assert "\n" not in text
    assert json.loads(text)["reports"][0]["dump"]["unmatched"] == [HOSTILE]


# -- JUnit -------------------------------------------------------------------------------------

# What the schema of Ant's JUnit task asks for, in this order.
SUITE = [
    "name", "timestamp", "hostname", "tests", "failures", "errors", "time", "package", "id",
]  # fmt: skip


def check_junit(text: str) -> ElementTree.Element:
    """The root of a document, if it is what readers of JUnit XML expect."""
    root = ElementTree.fromstring(text.encode())
    assert (root.tag, root.attrib) == ("testsuites", {})
    for number, suite in enumerate(root):
        assert suite.tag == "testsuite"
        assert suite.attrib.keys() == set(SUITE)
        assert suite.get("id") == str(number)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
        tags = [child.tag for child in suite]
        count = int(suite.get("tests"))
        assert tags == ["properties", *["testcase"] * count, "system-out", "system-err"]
        for kind, attribute in {"failure": "failures", "error": "errors"}.items():
            assert len(suite.findall(f"testcase/{kind}")) == int(suite.get(attribute))
        for case in suite.findall("testcase"):
            assert case.attrib.keys() == {"name", "classname", "time"}
            assert len(case) <= 1
            for bad in case:
                assert bad.attrib.keys() == {"type", "message"}
        for each in suite.iter():
            tokens = [each.get("name"), each.get("classname"), each.get("package")]
            assert all(
                token == " ".join(token.split()) != "" for token in tokens if token is not None
            )
    return root


def test_junit_has_a_case_for_each_array():
    suspicious = finding("ln_f", "suspicious", 2.5)
    report = gelu()
    findings = tuple(suspicious if f.name == "ln_f" else f for f in report.findings)
    report = Report(**{**vars(report), "findings": findings})
    (suite,) = check_junit(as_junit([report]))
    assert (suite.get("name"), suite.get("tests"), suite.get("failures")) == (
        "gelu.safetensors", "159", "13",
    )  # fmt: skip
    assert (suite.get("errors"), suite.get("time")) == ("0", "21.400")
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert list(cases) == [each.name for each in findings]
    assert cases["embed"].get("classname") == "numpygpt.verify.gelu_safetensors"
    assert len(cases["embed"]) == 0
    assert cases["ln_f"][0].get("type") == "suspicious"
    wrong = cases["h.0.mlp.post"][0]
    assert (wrong.tag, wrong.get("type")) == ("failure", "wrong")
    assert wrong.get("message").startswith("3,100 times the rounding of float32: exact (erf) GELU")
    assert "place: position 17, unit 803" in wrong.text.splitlines()
    assert suite.find("system-out").text == as_text(report)


def test_a_dump_that_is_unusable_is_an_error():
    root = check_junit(as_junit([make()], [Unusable("a.npz", "damaged")]))
    error = root[1].find("testcase/error")
    assert (root[1].get("name"), error.get("message"), error.text) == (
        "a.npz",
        "damaged",
        "damaged",
    )


def test_junit_holds_any_name():
    text = as_junit([hostile()], [Unusable(HOSTILE, HOSTILE), Unusable("", "")])
    assert not UNPRINTABLE.search(text)
    assert "<script" not in text
    check_junit(text)


# -- HTML --------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """The elements of a page, each with its attributes and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.cells and ("td" in self.open or "th" in self.open):
            self.cells[-1].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def strip_of(page: Page) -> list[dict[str, str | None]]:
    """The cells of the heat strip."""
    kinds = {"r0", "r1", "r2", "s", "w0", "w1", "w2", "w3", "none"}
    return [cell for cell in page.all("td") if kinds & set((cell.get("class") or "").split())]


def test_the_page_needs_nothing_but_itself():
    text = as_html([gelu()])
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>\n")
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.search(r"https?:|url\(|@import", text)
    policy = next(meta for meta in page.all("meta") if "http-equiv" in meta)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert {"charset": "utf-8"} in page.all("meta")


def test_every_link_leads_somewhere_and_every_id_is_one():
    page = Page(as_html([gelu(), hostile(), make()], [Unusable("a", "b")]))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [link["href"] for link in page.all("a")]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)
    described = [t["aria-describedby"] for t in page.all("table") if "aria-describedby" in t]
    assert set(described) <= set(ids)


def test_the_strip_has_a_cell_for_each_layer_and_operation():
    page = Page(as_html([gelu()]))
    cells = strip_of(page)
    assert len(cells) == 12 * 13 + 3
    wrong = [cell for cell in cells if "w2" in cell["class"].split()]  # 100 to 10,000
    assert len(wrong) == 12
    assert [cell for cell in cells if "first" in cell["class"].split()] == wrong[:1]
    texts = ["".join(cell) for cell in page.cells]
    assert sum(text.startswith("3.1k!h.0.mlp.post: activation gelu_new") for text in texts) == 1
    # The details are in the cell itself, shown by style alone; and it can be reached by keyboard.
    (told,) = [text for text in texts if text.startswith("9.8k!h.11.mlp.post")]
    assert "at position 17, unit 803" in told
    assert "exact (erf) GELU" in told
    assert "#r1-h.11.mlp.post" in [link["href"] for link in page.all("a")]


@pytest.mark.parametrize(
    ("verdict", "ratio", "kind", "sign"),
    [
        ("rounding", 0.05, "r0", "0.05"),
        ("rounding", 0.3, "r1", "0.30"),
        ("rounding", 0.96, "r2", "0.96"),
        ("suspicious", 1.3, "s", "1.3?"),
        ("wrong", 9.0, "w0", "9.0!"),
        ("wrong", 99.0, "w1", "99!"),
        ("wrong", 9900.0, "w2", "9.9k!"),
        ("wrong", 2.5e7, "w3", "25M!"),
        ("wrong", math.inf, "w3", "∞!"),
    ],
)
def test_a_cell_says_without_colours_what_they_say(verdict, ratio, kind, sign):
    page = Page(as_html([make({"ln_f": finding("ln_f", verdict, ratio)})]))
    cell = strip_of(page)[-2]
    assert (cell["class"] or "").split()[0] == kind
    assert any("".join(text).startswith(sign) for text in page.cells)


def test_what_is_not_in_the_dump_leaves_its_cells_empty():
    report = make()
    rest = tuple(f for f in report.findings if not f.name.endswith("attn.pattern"))
    page = Page(as_html([Report(**{**vars(report), "findings": rest})]))
    empty = [cell for cell in strip_of(page) if cell["class"] == "none"]
    assert len(empty) == 12
    assert {cell["title"] for cell in empty} == {"not in the dump"}


def test_the_page_says_what_the_text_says():
    report = gelu()
    text = re.sub(r"<[^>]*>", " ", as_html([report]))
    words = " ".join(html.unescape(text).split())
    for label in ("WRONG", "off by", "greedy", "matched", "assumed", "against"):
        sentence = said(as_text(report))[label].split(" observed")[0]
        assert sentence in words
    assert "mlp.post: wrong in all 12 layers, ratio 3,100 to 9,800, the same explanation" in words
    assert ERF.why in words
    assert TANH.mistakes[0] in words


def test_the_page_holds_any_name():
    text = as_html([hostile()], [Unusable(HOSTILE, HOSTILE)])
    page = Page(text)
    assert not UNPRINTABLE.search(text)
    assert not page.all("script")
    allowed = {
        "id", "class", "href", "title", "colspan", "scope", "role", "tabindex", "aria-label",
        "aria-hidden", "aria-describedby", "style", "lang", "charset", "name", "content",
        "http-equiv",
    }  # fmt: skip
    assert {name for _, attributes in page.elements for name in attributes} <= allowed
    text.encode()


def test_several_reports_are_listed_at_the_top():
    page = Page(as_html([gelu(), make()]))
    assert {"href": "#r2"} in page.all("a")
    assert [section["id"] for section in page.all("section")] == ["r1", "r2"]


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


PAIRS = {
    "page": ("ink", "quiet", "link"), "panel": ("ink", "quiet"), "r0": ("on-r",), "r1": ("on-r",),
    "r2": ("on-r",), "s": ("on-s",), "w0": ("on-w",), "w1": ("on-w",), "w2": ("on-far",),
    "w3": ("on-far",),
}  # fmt: skip


def test_every_text_can_be_read_on_its_background():
    from numpygpt.verify.reports.html_style import STYLE

    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\n\s*\}", STYLE, re.DOTALL)
    ]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        for ground, inks in PAIRS.items():
            for ink in inks:
                # 4.5 is what WCAG's level AA asks for.
                assert contrast(scheme[ground], scheme[ink]) >= 4.5, (ground, ink)
        # Lightness alone tells how far a wrong cell is off.
        wrong = [luminance(scheme[f"w{n}"]) for n in range(4)]
        assert wrong in (sorted(wrong), sorted(wrong, reverse=True))


# -- any result --------------------------------------------------------------------------------

numbers = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text(st.characters(), max_size=20)


@given(numbers, numbers, numbers, texts, st.sampled_from(["rounding", "suspicious", "wrong"]))
def test_no_number_or_text_is_too_much(ratio, observed, explained, text, verdict):
    odd = finding(
        "h.1.attn.qkv", verdict, ratio, observed=observed, error=observed, free_error=observed,
        free_relative=explained,
        explanations=(Explanation((text,), text, True, ratio, explained),
                      Explanation((text, text), text, False, ratio, explained)),
    )  # fmt: skip
    report = make(
        {odd.name: odd},
        n_layer=2,
        chosen=(Decision(0, 1, 2, observed, ratio, "real"),),
        dump={"source": text, "producer": text, "notes": (text,), "unmatched": (text,)},
    )
    for verbose in (False, True):
        assert all(len(line) <= 80 for line in as_text(report, verbose).split("\n"))
    json.loads(as_json([report]), parse_constant=refuse)
    check_junit(as_junit([report]))
    Page(as_html([report]))
