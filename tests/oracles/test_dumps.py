"""Recordings that PyTorch, transformers and a C compiler make, read and matched.

The recipes of numpygpt/lessons/dump_recipes.md are run as they stand there, with the model's name
or weights exchanged.
"""

from __future__ import annotations

import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from support import nano, random_ids, random_tensors, write_checkpoint

torch = pytest.importorskip("torch", reason="needs PyTorch")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt.plans import trace_names  # noqa: E402
from numpygpt.verify import dumps  # noqa: E402
from numpygpt.verify.dump import Dump  # noqa: E402
from numpygpt.verify.matching import match  # noqa: E402

pytestmark = pytest.mark.oracle

torch.set_num_threads(1)

CONFIG = nano(n_embd=24, n_head=3, n_layer=3, vocab_size=40)
IDS = np.stack([random_ids(CONFIG, 6, seed) for seed in (1, 2)])
RECIPES = pathlib.Path(numpygpt.__file__).parent / "lessons" / "dump_recipes.md"

# float32 rounds at 6e-8, through sums over up to 96 products in three blocks. Measured: 5e-7 of
# an array's norm; another intermediate of the same shape is 0.3 away, another sequence 1.
TOLERANCE = 1e-5


def recipe(title: str, index: int = 0) -> str:
    """A block of the recipe with this title."""
    part = RECIPES.read_text().split(f"\n## {title}\n")[1].partition("\n## ")[0]
    return re.findall(r"^```\w+\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)[index]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    tensors = random_tensors(CONFIG, 5, np.float32)
    return write_checkpoint(tmp_path_factory.mktemp("dumps") / "model", CONFIG, tensors)


@pytest.fixture(scope="module")
def model(directory):
    return numpygpt.load(directory, dtype="float64")


@pytest.fixture
def theirs(directory):
    return transformers.GPT2LMHeadModel.from_pretrained(
        directory, attn_implementation="eager"
    ).eval()


def check(model, found: list[Dump], ids: np.ndarray, keys: set[str]) -> None:
    """Every dump holds just `keys`, with our numbers."""
    assert [dump.ids.tolist() for dump in found] == ids.tolist()
    for dump in found:
        trace = model.trace(dump.ids)
        assert set(dump.tensors) == keys
        for name, array in dump.tensors.items():
            # transformers masks with the least float32 instead of -inf.
            seen = np.isfinite(trace[name])
            gap = np.linalg.norm(array[seen] - trace[name][seen])
            assert gap <= TOLERANCE * np.linalg.norm(trace[name][seen]), name


def every(*without: str) -> set[str]:
    return {key for key in trace_names(CONFIG.n_layer) if not key.endswith(without)}


# -- transformers ------------------------------------------------------------------------------


def test_the_recipe_for_transformers(directory, model, tmp_path, monkeypatch):
    text = recipe("transformers").replace('"gpt2"', repr(str(directory)))
    text = text.replace("[[15496, 11, 995]]", repr(IDS.tolist()))
    monkeypatch.chdir(tmp_path)
    exec(text, {})
    file = dumps.read("run.safetensors")
    assert file.dtype == "float32"
    check(model, match(file, model.config, model.trace), IDS, every("attn.scores"))


@pytest.mark.parametrize("pruned", [False, True])
def test_the_tree_of_transformers_debugger(theirs, model, tmp_path, pruned):
    from transformers.model_debugging_utils import model_addition_debugger_context as debugger

    with debugger(theirs, str(tmp_path), do_prune_layers=pruned, use_repr=False):
        theirs.forward(input_ids=torch.from_numpy(IDS))
    file = dumps.read(tmp_path)
    # The middle layer is not in the pruned tree, but its files are there.
    assert bool(file.notes) == pruned
    found = match(file, model.config, model.trace)
    # Outputs of blocks are not recorded; they are what the next one is given.
    missing = ("attn.scores", "attn.pattern", "h.0.resid_post", "h.1.resid_post")
    check(model, found, IDS, every(*missing))
    assert any(each.startswith("transformer.wte: token") for each in found[0].unmatched)


def test_the_tree_with_printed_digits_is_refused(theirs, tmp_path):
    from transformers.model_debugging_utils import model_addition_debugger_context as debugger

    with debugger(theirs, str(tmp_path)):
        theirs.forward(input_ids=torch.from_numpy(IDS))
    with pytest.raises(numpygpt.errors.DumpError, match="use_repr=False"):
        dumps.read(tmp_path)


def test_hidden_states_and_attentions(theirs, model, tmp_path):
    with torch.no_grad():
        out = theirs(torch.from_numpy(IDS), output_hidden_states=True, output_attentions=True)
    arrays = {f"hidden_states.{i}": array.numpy() for i, array in enumerate(out.hidden_states)}
    arrays |= {f"attentions.{i}": array.numpy() for i, array in enumerate(out.attentions)}
    np.savez(tmp_path / "run.npz", ids=IDS, logits=out.logits.numpy(), **arrays)
    found = match(dumps.read(tmp_path / "run.npz"), model.config, model.trace)
    keys = {"embed", "h.0.resid_post", "h.1.resid_post", "ln_f", "logits"}
    check(model, found, IDS, keys | {f"h.{i}.attn.pattern" for i in range(3)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_arrays_in_half_the_bits(theirs, model, tmp_path, dtype):
    from safetensors.torch import save_file as save

    with torch.no_grad():
        logits = theirs.to(getattr(torch, dtype))(torch.from_numpy(IDS)).logits
    save({"input_ids": torch.from_numpy(IDS), "out": logits}, path := tmp_path / "run.safetensors")
    (dump, _) = match(dumps.read(path), model.config, model.trace)
    assert dump.dtype == dtype
    np.testing.assert_array_equal(dump.tensors["logits"], logits[0].float().numpy())
    assert dump.matches[0].how == "values"


def test_safetensors_reads_what_we_write(model, tmp_path):
    trace = model.trace(IDS[0])
    dumps.write(path := tmp_path / "run.safetensors", Dump(IDS[0], trace, "float64"))
    found = load_file(path)
    assert set(found) == set(trace)
    for name, array in trace.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    save_file({"a": np.ones((2, 3), np.float16)}, path := tmp_path / "theirs.safetensors")
    np.testing.assert_array_equal(
        dumps.read(path).tensors["a"], np.ones((2, 3), np.float16), strict=True
    )


# -- nanoGPT -----------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """Attention under nanoGPT's names."""

    def __init__(self):
        super().__init__()
        width = CONFIG.n_embd
        self.c_attn = torch.nn.Linear(width, 3 * width)
        self.c_proj = torch.nn.Linear(width, width)
        self.attn_dropout, self.resid_dropout = torch.nn.Dropout(0.1), torch.nn.Dropout(0.1)

    def forward(self, x):
        b, t, c = x.shape
        parts = self.c_attn(x).view(b, t, 3, CONFIG.n_head, -1).permute(2, 0, 3, 1, 4)
        products = parts[0] @ parts[1].mT / math.sqrt(CONFIG.head_dim)
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        pattern = self.attn_dropout(products.masked_fill(future, -math.inf).softmax(-1))
        mixed = (pattern @ parts[2]).transpose(1, 2).reshape(b, t, c)
        return self.resid_dropout(self.c_proj(mixed))


class MLP(torch.nn.Module):
    """An MLP under nanoGPT's names."""

    def __init__(self):
        super().__init__()
        self.c_fc = torch.nn.Linear(CONFIG.n_embd, CONFIG.mlp_dim)
        self.gelu = torch.nn.GELU(approximate="tanh")
        self.c_proj = torch.nn.Linear(CONFIG.mlp_dim, CONFIG.n_embd)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(torch.nn.Module):
    """A block under nanoGPT's names."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = (torch.nn.LayerNorm(CONFIG.n_embd) for _ in range(2))
        self.attn, self.mlp = Attention(), MLP()

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Nano(torch.nn.Module):
    """A GPT-2 whose modules are called as in nanoGPT."""

    def __init__(self, tensors):
        super().__init__()
        self.transformer = torch.nn.ModuleDict(
            {
                "wte": torch.nn.Embedding(CONFIG.vocab_size, CONFIG.n_embd),
                "wpe": torch.nn.Embedding(CONFIG.n_ctx, CONFIG.n_embd),
                "drop": torch.nn.Dropout(0.1),
                "h": torch.nn.ModuleList(Block() for _ in range(CONFIG.n_layer)),
                "ln_f": torch.nn.LayerNorm(CONFIG.n_embd),
            }
        )
        self.lm_head = torch.nn.Linear(CONFIG.n_embd, CONFIG.vocab_size, bias=False)
        turned = re.compile(r".*(c_attn|c_proj|c_fc)\.weight")
        own = {
            f"transformer.{name}": torch.from_numpy(array.T if turned.fullmatch(name) else array)
            for name, array in tensors.items()
        }
        self.load_state_dict({**own, "lm_head.weight": own["transformer.wte.weight"]})

    def forward(self, ids, targets=None):
        parts = self.transformer
        x = parts.drop(parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1])))
        for block in parts.h:
            x = block(x)
        x = parts.ln_f(x)
        return self.lm_head(x if targets is not None else x[:, [-1]])


@pytest.mark.parametrize("compiled", [False, True])
def test_the_recipe_for_nanogpt(model, tmp_path, monkeypatch, compiled):
    nanogpt = Nano(random_tensors(CONFIG, 5, np.float32))
    wrapped = torch.nn.ModuleDict({"_orig_mod": nanogpt})
    wrapped.forward = nanogpt.forward  # as torch.compile wraps it
    text = recipe("nanoGPT").replace("[[15496, 11, 995]]", repr(IDS.tolist()))
    monkeypatch.chdir(tmp_path)
    exec(text, {"model": wrapped if compiled else nanogpt})
    found = match(dumps.read("run.npz"), model.config, model.trace)
    check(model, found, IDS, every("attn.scores"))


def test_nanogpt_without_targets_has_one_row_of_logits(model, tmp_path, monkeypatch):
    text = recipe("nanoGPT").replace("[[15496, 11, 995]]", repr(IDS.tolist()))
    monkeypatch.chdir(tmp_path)
    exec(text.replace(", targets=ids", ""), {"model": Nano(random_tensors(CONFIG, 5, np.float32))})
    with pytest.raises(numpygpt.errors.DumpError, match=r"lm_head.*record every position"):
        match(dumps.read("run.npz"), model.config, model.trace)


def test_dropout_that_was_left_on_is_noticed(model, tmp_path, monkeypatch):
    text = recipe("nanoGPT").replace("[[15496, 11, 995]]", repr(IDS.tolist()))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    nanogpt = Nano(random_tensors(CONFIG, 5, np.float32))
    exec(text.replace("model.eval()", "model"), {"model": nanogpt})
    with pytest.raises(numpygpt.errors.DumpError, match="With dropout on"):
        match(dumps.read("run.npz"), model.config, model.trace)


# -- C -----------------------------------------------------------------------------------------

MAIN = r"""
#include <stdlib.h>

int main(void) {
    enum { L = %(L)d, B = %(B)d, T = %(T)d, C = %(C)d, Vp = %(Vp)d };
    static int inputs[B * T];
    static float fch_gelu[L * B * T * 4 * C], logits[B * T * Vp];
    struct { int *inputs; struct { float *fch_gelu, *logits; } acts; } model;
    model.inputs = inputs; model.acts.fch_gelu = fch_gelu; model.acts.logits = logits;
    FILE *given = fopen("given.bin", "rb");
    size_t n = fread(inputs, sizeof inputs, 1, given) + fread(fch_gelu, sizeof fch_gelu, 1, given)
             + fread(logits, sizeof logits, 1, given);
    if (n != 3) return 1;
    %(recipe)s
    return 0;
}
"""


def test_the_recipe_for_c(model, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    ids = IDS[:1]
    trace = model.trace(ids[0])
    sizes = {"L": 3, "B": 1, "T": 6, "C": 24, "Vp": 128}
    post = np.stack([trace[f"h.{i}.mlp.post"] for i in range(3)]).astype("<f4")
    logits = np.pad(trace["logits"], ((0, 0), (0, 88))).astype("<f4")
    given = ids.astype("<i4").tobytes() + post.tobytes() + logits.tobytes()
    (tmp_path / "given.bin").write_bytes(given)
    program = recipe("C") + MAIN % {**sizes, "recipe": recipe("C", 1)}
    (tmp_path / "run.c").write_text(program)
    subprocess.run(
        [compiler, "-std=c99", "-Wall", "-Werror", "-o", "run", "run.c"], cwd=tmp_path, check=True
    )
    subprocess.run([tmp_path / "run"], cwd=tmp_path, check=True)
    (dump,) = match(dumps.read(tmp_path / "run.json"), model.config, model.trace)
    np.testing.assert_array_equal(dump.ids, ids[0])
    np.testing.assert_array_equal(dump.tensors["logits"], trace["logits"].astype(np.float32))
    for i in range(3):
        np.testing.assert_array_equal(dump.tensors[f"h.{i}.mlp.post"], post[i])
    assert dump.matches[-1].layout == "(B, T, V+88) -> (T, V)"
