"""The mistakes that the programs beside this file can make, one line each.

Each stands in the program's own code, beside the right line: look for its name there.
"""

from __future__ import annotations

from typing import NamedTuple

NUMPY = "numpy_port"
NANO = "nanogpt_style"
MIN = "mingpt_style"
HF = "hooked_transformers"
ALL = (NUMPY, NANO, MIN, HF)
# The old minGPT has no key/value cache.
CACHED = (NUMPY, NANO, HF)

# What a mistake needs before it changes the logits.
CHUNKS = "several passes with a cache"
LARGE_SCORES = "scores beyond 1e4"
INVERSE_SCALE = "a config with scale_attn_by_inverse_layer_idx"
OWN_HEAD = "a checkpoint with its own lm_head.weight"
MANY_LAYERS = "more than ten layers"


class Mistake(NamedTuple):
    """What is wrong, which programs can do it, and when it shows ("": always).

    `variants` says in what the programs differ; without it they give the same logits.
    """

    text: str
    programs: tuple[str, ...] = ALL
    when: str = ""
    variants: str = ""


MISTAKES: dict[str, Mistake] = {
    # the activation function
    "erf_gelu": Mistake("exact (erf) GELU"),
    "quick_gelu": Mistake("x * sigmoid(1.702 x)"),
    "gelu_half_table": Mistake(
        "GELU from a table of half-precision inputs, as in ggml",
        variants="the table's own rounding depends on whose tanh filled it",
    ),
    "gelu_no_cubic": Mistake("GELU without its cubic term"),
    "relu": Mistake("ReLU"),
    # layer norms
    "eps_1e-6": Mistake("epsilon of 1e-6"),
    "eps_1e-12": Mistake("epsilon of 1e-12"),
    "eps_outside_root": Mistake("epsilon added to the standard deviation"),
    "ddof_1": Mistake("unbiased variance: divided by C - 1"),
    "rms_norm": Mistake("the mean is not subtracted"),
    "ln_no_shift": Mistake("layer norms without their shift"),
    # the scale of the scores
    "no_scale": Mistake("scores not divided by sqrt(D)"),
    "scale_by_width": Mistake("scores divided by sqrt(C)"),
    "scale_twice": Mistake("scores divided by sqrt(D) twice"),
    "inverse_layer_scale_ignored": Mistake("scores not divided by i + 1", when=INVERSE_SCALE),
    "inverse_layer_scale_added": Mistake("scores of layer i divided by i + 1, unasked"),
    # weights and heads
    "c_proj_transposed": Mistake("attention's square matrix transposed"),
    "qkv_interleaved": Mistake(
        "columns of c_attn taken as grouped by head",
        variants="transformers: the file is grouped, the reader is not; others: vice versa",
    ),
    "kv_swapped": Mistake("keys and values exchanged"),
    "qk_swapped": Mistake("queries and keys exchanged"),
    "heads_not_merged": Mistake("heads reshaped to rows without the transpose"),
    "heads_reversed": Mistake("heads merged in the reverse order"),
    "head_features_first": Mistake("columns split as (D, H), not (H, D)"),
    "wrong_head_count": Mistake("another number of heads"),
    "attention_biases_missing": Mistake("c_attn and attention's c_proj without bias"),
    "mlp_biases_missing": Mistake("c_fc and the MLP's c_proj without bias"),
    # the mask
    "mask_missing": Mistake("no mask"),
    "mask_hides_itself": Mistake(
        "a token does not see itself",
        variants="row 0 sees itself, or (minGPT, transformers) every key",
    ),
    "mask_shows_next": Mistake("a token sees the next one"),
    "mask_inverted": Mistake(
        "the future is shown and the past masked",
        variants="the other triangle, or (minGPT, transformers) the true opposite",
    ),
    "mask_minus_1e4": Mistake(
        "masked scores are -10,000",
        when=LARGE_SCORES,
        variants="put in place of the score, or (minGPT, transformers, fused) added",
    ),
    "mask_top_left": Mistake("query 0 of each pass aligned with key 0", CACHED, CHUNKS),
    "mask_after_softmax": Mistake("the pattern is masked and not renormalised"),
    "softmax_over_queries": Mistake("softmax over the wrong axis"),
    # positions
    "positions_from_1": Mistake("positions count from 1"),
    "positions_restart": Mistake("positions of each pass count from 0", CACHED, CHUNKS),
    "positions_missing": Mistake("no position vectors"),
    # blocks and stream
    "no_ln_f": Mistake("no final layer norm"),
    "post_ln": Mistake("layer norms after the additions"),
    "ln_1_ln_2_swapped": Mistake("the layer norms of a block exchanged"),
    "residual_from_normed": Mistake("added to the normalised stream"),
    "parallel_block": Mistake("the MLP reads the stream before attention"),
    "mlp_not_added": Mistake("the MLP's result is dropped"),
    "last_layer_skipped": Mistake("the last layer never runs"),
    "layers_reordered": Mistake("layers sorted as strings: 10 before 2", when=MANY_LAYERS),
    # embedding and unembedding
    "embedding_scaled": Mistake("token vectors times sqrt(C)"),
    "token_ids_shifted": Mistake("the vocabulary is off by one"),
    "stale_head": Mistake("wte used in place of lm_head.weight", when=OWN_HEAD),
    "logits_scaled": Mistake("logits divided by sqrt(C)"),
    "vocabulary_padded_wrong": Mistake("rows of padding put in front of the logits"),
    # numbers
    "float16_accumulation": Mistake(
        "products accumulated in half precision",
        variants="NumPy: every product, term by term; torch: linear maps, in tiles",
    ),
    "weights_float16": Mistake("weights rounded to float16"),
    "weights_bfloat16": Mistake("weights rounded to bfloat16"),
    "dropout_on": Mistake("dropout left on", variants="other random numbers"),
}


def of(program: str) -> list[str]:
    """The mistakes that one program can make."""
    return [name for name, mistake in MISTAKES.items() if program in mistake.programs]


def check(program: str, mistake: str | None) -> None:
    """Refuse a mistake that a program would ignore."""
    if mistake is not None and mistake not in of(program):
        raise ValueError(f"{program} cannot make the mistake {mistake!r}")
