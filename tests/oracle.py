"""GPT-2 as loops over Python floats, with `math` only: the answer the package is held against.

Lists in, lists out. Nothing is shared with numpygpt: no code, no library, no array layout. Sums
are `math.fsum`, which rounds once, so what a comparison shows is the rounding of the other side.

Weights come as a dict from Hugging Face name to nested lists, the config as a dict with the
fields of a config.json.
"""

import math

# -- one number -----------------------------------------------------------------------------------


def gelu_new(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def quick_gelu(x):
    return x * sigmoid(1.702 * x)


def silu(x):
    return x * sigmoid(x)


def relu(x):
    return x if x > 0 else 0.0


ACTIVATIONS = {
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "gelu_fast": gelu_new,
    "gelu": gelu,
    "gelu_python": gelu,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
    "swish": silu,
    "tanh": math.tanh,
}

# -- one token ------------------------------------------------------------------------------------


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def linear(x, w, b=None):
    """x[i], w[i][o], b[o] -> y[o]."""
    y = [dot(x, column) for column in zip(*w, strict=True)]
    return y if b is None else add(y, b)


def add(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def layer_norm(x, g, b=None, eps=1e-5):
    mean = math.fsum(x) / len(x)
    variance = math.fsum((value - mean) ** 2 for value in x) / len(x)
    y = [
        (value - mean) / math.sqrt(variance + eps) * gain for value, gain in zip(x, g, strict=True)
    ]
    return y if b is None else add(y, b)


def softmax(scores):
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def solu(x):
    return [value * weight for value, weight in zip(x, softmax(x), strict=True)]


# -- all tokens -----------------------------------------------------------------------------------


def attention(qkv, n_head, scale):
    """qkv[t][3C] -> scores[h][t][s], pattern[h][t][s], heads[h][t][d]."""
    width = len(qkv[0]) // 3
    size = width // n_head
    all_scores, all_patterns, all_heads = [], [], []
    for h in range(n_head):
        q = [row[h * size : (h + 1) * size] for row in qkv]
        k = [row[width + h * size : width + (h + 1) * size] for row in qkv]
        v = [row[2 * width + h * size : 2 * width + (h + 1) * size] for row in qkv]
        scores, patterns, heads = [], [], []
        for t in range(len(qkv)):
            row = [
                dot(q[t], k[s]) * scale if s <= t else -math.inf  # no token sees a later one
                for s in range(len(qkv))
            ]
            pattern = softmax(row)
            scores.append(row)
            patterns.append(pattern)
            heads.append([dot(pattern, [value[d] for value in v]) for d in range(size)])
        all_scores.append(scores)
        all_patterns.append(patterns)
        all_heads.append(heads)
    return all_scores, all_patterns, all_heads


def forward(ids, weights, config):
    """Every intermediate of one sequence: trace name -> nested lists, in order of execution."""
    trace = {}
    tokens = range(len(ids))

    def norm(x, name):
        g, b = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        return [layer_norm(row, g, b, config["layer_norm_epsilon"]) for row in x]

    def project(x, name):
        return [linear(row, weights[f"{name}.weight"], weights.get(f"{name}.bias")) for row in x]

    x = [add(weights["wte.weight"][ids[t]], weights["wpe.weight"][t]) for t in tokens]
    trace["embed"] = x
    for i in range(config["n_layer"]):
        h = f"h.{i}"
        trace[f"{h}.resid_pre"] = x
        normed = trace[f"{h}.ln_1"] = norm(x, f"{h}.ln_1")
        qkv = trace[f"{h}.attn.qkv"] = project(normed, f"{h}.attn.c_attn")
        scale = 1.0
        if config["scale_attn_weights"]:
            scale /= math.sqrt(config["n_embd"] / config["n_head"])
        if config["scale_attn_by_inverse_layer_idx"]:
            scale /= i + 1
        scores, pattern, heads = attention(qkv, config["n_head"], scale)
        trace[f"{h}.attn.scores"] = scores
        trace[f"{h}.attn.pattern"] = pattern
        trace[f"{h}.attn.heads"] = heads
        merged = [[number for head in heads for number in head[t]] for t in tokens]
        out = trace[f"{h}.attn.out"] = project(merged, f"{h}.attn.c_proj")
        x = trace[f"{h}.resid_mid"] = [add(x[t], out[t]) for t in tokens]
        normed = trace[f"{h}.ln_2"] = norm(x, f"{h}.ln_2")
        pre = trace[f"{h}.mlp.pre"] = project(normed, f"{h}.mlp.c_fc")
        activation = ACTIVATIONS[config["activation_function"]]
        post = trace[f"{h}.mlp.post"] = [[activation(number) for number in row] for row in pre]
        out = trace[f"{h}.mlp.out"] = project(post, f"{h}.mlp.c_proj")
        x = trace[f"{h}.resid_post"] = [add(x[t], out[t]) for t in tokens]
    hidden = trace["ln_f"] = norm(x, "ln_f")
    head = weights["wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    trace["logits"] = [[dot(row, vector) for vector in head] for row in hidden]
    return trace


# -- comparing ------------------------------------------------------------------------------------


def flat(nested):
    """The numbers of nested lists, and their shape."""
    if not isinstance(nested, list):
        return [nested], ()
    parts = [flat(part) for part in nested]
    shapes = {shape for _, shape in parts}
    if len(shapes) != 1:
        raise ValueError(f"ragged lists: {shapes}")
    return [number for numbers, _ in parts for number in numbers], (len(nested), *shapes.pop())


def distance(actual, expected):
    """The largest difference, as a fraction of the largest finite number expected.

    Infinite where the shapes differ, or where only one side is infinite or NaN.
    """
    (a, a_shape), (e, e_shape) = flat(actual), flat(expected)
    finite = [math.isfinite(number) for number in e]
    if a_shape != e_shape or any(
        x != y for x, y, ok in zip(a, e, finite, strict=True) if not ok or not math.isfinite(x)
    ):
        return math.inf
    gaps = [abs(x - y) for x, y, ok in zip(a, e, finite, strict=True) if ok]
    largest = max(abs(y) for y, ok in zip(e, finite, strict=True) if ok)
    return max(gaps) / largest if largest else max(gaps)
