"""Against TensorFlow: checkpoints that it wrote, and OpenAI's model written in its operations.

``pytest tests/oracles/test_tensorflow.py -s`` prints the largest differences.
"""

from __future__ import annotations

import json
import os
import pathlib
import tempfile

import numpy as np
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
tf = pytest.importorskip("tensorflow", reason="needs TensorFlow (tensorflow-cpu)")
google_crc32c = pytest.importorskip("google_crc32c", reason="needs google-crc32c")

from fixtures.make_openai import variables, write  # noqa: E402
from support import nano, random_tensors  # noqa: E402

import numpygpt  # noqa: E402
from numpygpt import checkpoints  # noqa: E402
from numpygpt.checkpoints import openai  # noqa: E402
from numpygpt.checkpoints.crc32c import PIECE_BYTES, crc32c  # noqa: E402
from numpygpt.checkpoints.tensor_bundle import read_bundle  # noqa: E402
from numpygpt.errors import CheckpointError  # noqa: E402

pytestmark = pytest.mark.oracle

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "openai"
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"


@pytest.fixture
def directory():
    """Removed after the test: pytest would keep half a gigabyte of each of its last runs."""
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


def assert_same_as_tensorflow_reads(directory) -> int:
    """Every variable, bit for bit; returns how many there are."""
    reader = tf.train.load_checkpoint(str(directory / "model.ckpt"))
    tensors = read_bundle(directory / INDEX)
    assert tensors.keys() == reader.get_variable_to_shape_map().keys()
    for name, tensor in tensors.items():
        theirs = reader.get_tensor(name)
        if theirs.dtype.kind == "i":
            assert tensor.dtype == f"I{8 * theirs.itemsize}"
            continue
        np.testing.assert_array_equal(
            tensor.read(tensor.exact), theirs.astype(tensor.exact), strict=True
        )
    return len(tensors)


# -- the container --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 31, 5686, 10**6, 3 * PIECE_BYTES + 7])
def test_checksums_are_those_of_googles_library(length):
    data = np.random.default_rng(length).integers(0, 256, length, np.uint8).tobytes()
    assert crc32c(data) == google_crc32c.value(data)


def test_the_fixture_is_what_tensorflow_writes(directory):
    write(directory, nano(), variables(random_tensors(nano(), seed=0, dtype=np.float32)))
    for file in FIXTURE.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("layers", [1, 48])
def test_layers_and_shards(directory, layers, shards):
    config = nano(n_layer=layers)
    weights = random_tensors(config, seed=layers, dtype=np.float32)
    write(directory, config, variables(weights), shards)
    assert len(list(directory.glob("*.data-*"))) == shards
    assert assert_same_as_tensorflow_reads(directory) == 4 + 12 * layers
    assert checkpoints.read(directory).config == config
    tensors = openai.read(directory / INDEX).tensors
    for name, expected in weights.items():
        np.testing.assert_array_equal(tensors[name].read(np.float32), expected, strict=True)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_types_of_variables(directory, dtype):
    kind = tf.as_dtype(dtype).as_numpy_dtype
    weights = {name: a.astype(kind) for name, a in random_tensors(nano(), seed=3).items()}
    step = {"global_step": np.array(7, np.int64)}
    write(directory, nano(), variables(weights) | step)
    assert assert_same_as_tensorflow_reads(directory) == 29
    source = openai.read(directory / INDEX)
    assert source.notes == ["1 variables of the training left out: global_step"]
    for name, expected in weights.items():
        read = source.tensors[name].read(np.float64)
        np.testing.assert_array_equal(read, expected.astype(np.float64), strict=True)


def test_an_index_of_several_blocks(directory):
    """TensorFlow's blocks hold 256 KiB, ten times the index of gpt2-xl."""
    names = [f"v{i:04d}/{'what keeps names from being short' * 2}" for i in range(6000)]
    values = [tf.constant([i, -i], tf.float32) for i in range(len(names))]
    tf.raw_ops.SaveV2(
        prefix=str(directory / "model.ckpt"), tensor_names=names,
        shape_and_slices=[""] * len(names), tensors=values,
    )  # fmt: skip
    assert (directory / INDEX).stat().st_size > 2 * 2**18
    assert assert_same_as_tensorflow_reads(directory) == len(names)


@pytest.mark.parametrize(
    "optimiser", ["Adam", "Momentum", "Adagrad", "RMSProp", "Adadelta", "Ftrl"]
)
def test_variables_of_tensorflows_optimisers_are_left_out(directory, optimiser):
    tf1 = tf.compat.v1
    weights = random_tensors(nano(), seed=4, dtype=np.float32)
    with tf1.Graph().as_default(), tf1.Session() as session:
        made = [
            tf1.get_variable(name, initializer=array, use_resource=False)
            for name, array in variables(weights).items()
        ]
        loss = tf.add_n([tf.reduce_sum(variable**2) for variable in made])
        more = {"momentum": 0.9} if optimiser == "Momentum" else {}
        step = tf1.train.get_or_create_global_step()
        trained = getattr(tf1.train, f"{optimiser}Optimizer")(0.1, **more).minimize(loss, step)
        session.run(tf1.global_variables_initializer())
        session.run(trained)
        written = dict(zip(weights, session.run(made), strict=True))
        saver = tf1.train.Saver()
        saver.save(session, str(directory / "model.ckpt"), write_meta_graph=False)
    hparams = json.loads((FIXTURE / "hparams.json").read_text())
    (directory / "hparams.json").write_text(json.dumps(hparams))
    assert assert_same_as_tensorflow_reads(directory) > 28 + 28
    assert checkpoints.read(directory).config == nano()
    source = openai.read(directory / INDEX)
    assert len(source.tensors) == 28
    for name, tensor in source.tensors.items():
        expected = written[name].reshape(weights[name].shape)
        np.testing.assert_array_equal(tensor.read(np.float32), expected, strict=True)


def test_what_tensorflow_finds_damaged_we_find_damaged(directory):
    write(directory, nano(), variables(random_tensors(nano(), dtype=np.float32)))
    content = bytearray((directory / DATA).read_bytes())
    for at in range(0, len(content), 97):
        content[at] ^= 16
        (directory / DATA).write_bytes(content)
        reader = tf.train.load_checkpoint(str(directory / "model.ckpt"))
        damaged = []
        for name in reader.get_variable_to_shape_map():
            try:
                reader.get_tensor(name)
            except tf.errors.OpError:
                damaged.append(name)
        for name, tensor in read_bundle(directory / INDEX).items():
            if name in damaged:
                with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                    tensor.read(np.float32)
            else:
                tensor.read(np.float32)
        assert len(damaged) == 1
        content[at] ^= 16


def test_slices_the_first_format_and_objects_are_refused(directory):
    tf1 = tf.compat.v1
    with tf1.Graph().as_default(), tf1.Session() as session:
        part = tf1.fixed_size_partitioner(2)
        tf1.get_variable("model/wte", (6, 2), partitioner=part, use_resource=False)
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(directory / "model.ckpt"), write_meta_graph=False)
        first = tf1.train.Saver(write_version=tf1.train.SaverDef.V1)
        first.save(session, str(directory / "first.ckpt"), write_meta_graph=False)
    tf.train.Checkpoint(wte=tf.Variable([1.0])).save(str(directory / "objects"))
    for file, reason in {
        INDEX: "slice of a partitioned variable",
        "first.ckpt": "TensorFlow's first format",
        "objects-1.index": r"saved with tf\.train\.Checkpoint or Keras",
    }.items():
        with pytest.raises(CheckpointError, match=reason):
            checkpoints.read(directory / file)


# -- the model ------------------------------------------------------------------------------------


def theirs(directory, ids) -> np.ndarray:
    """Logits (T, V) of OpenAI's model in float64, from what TensorFlow restores."""
    reader = tf.train.load_checkpoint(str(directory / "model.ckpt"))
    hparams = json.loads((directory / "hparams.json").read_text())
    heads, length = hparams["n_head"], len(ids)

    def stored(name):
        return tf.cast(reader.get_tensor(f"model/{name}"), tf.float64)

    def norm(x, name):
        centred = x - tf.reduce_mean(x, axis=-1, keepdims=True)
        variance = tf.reduce_mean(centred**2, axis=-1, keepdims=True)
        return centred / tf.sqrt(variance + 1e-5) * stored(f"{name}/g") + stored(f"{name}/b")

    def conv1d(x, name):
        return tf.nn.conv1d(x[None], stored(f"{name}/w"), 1, "VALID")[0] + stored(f"{name}/b")

    def attention(x, name):
        q, k, v = (
            tf.transpose(tf.reshape(part, (length, heads, -1)), (1, 0, 2))
            for part in tf.split(conv1d(x, f"{name}/c_attn"), 3, axis=-1)
        )
        scores = tf.matmul(q, k, transpose_b=True) / tf.sqrt(tf.cast(tf.shape(v)[-1], tf.float64))
        seen = tf.linalg.band_part(tf.ones_like(scores), -1, 0)
        mixed = tf.matmul(tf.nn.softmax(scores * seen - 1e10 * (1 - seen)), v)
        merged = tf.reshape(tf.transpose(mixed, (1, 0, 2)), (length, -1))
        return conv1d(merged, f"{name}/c_proj")

    def mlp(x, name):
        wide = conv1d(x, f"{name}/c_fc")
        bent = tf.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))
        return conv1d(0.5 * wide * (1 + bent), f"{name}/c_proj")

    x = tf.gather(stored("wte"), ids) + stored("wpe")[:length]
    for layer in range(hparams["n_layer"]):
        x += attention(norm(x, f"h{layer}/ln_1"), f"h{layer}/attn")
        x += mlp(norm(x, f"h{layer}/ln_2"), f"h{layer}/mlp")
    return tf.matmul(norm(x, "ln_f"), stored("wte"), transpose_b=True).numpy()


# As in test_transformers.py: rounding, 1.1e-16 and 6e-8 relative, grown by sums over thousands of
# products in a dozen blocks; largest difference as a fraction of the largest logit. Measured:
# 1.8e-15 and 7.3e-7 (124M). The mildest mistake in tests/mistakes.py changes logits by 1.3e-4.
TOLERANCE = {"float64": 1e-11, "float32": 2e-5}

CONFIGS = {
    "nano": nano(),
    "one head": nano(n_embd=48, n_head=1, n_ctx=40),
    "many heads": nano(n_embd=64, n_head=32, vocab_size=300, n_ctx=40, n_layer=5),
    "48 layers": nano(n_embd=32, n_layer=48),
    "124M": numpygpt.Config(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_openais_model(directory, name):
    config = CONFIGS[name]
    write(directory, config, variables(random_tensors(config, seed=5, dtype=np.float32)))
    ids = np.random.default_rng(5).integers(0, config.vocab_size, min(config.n_ctx, 48)).tolist()
    expected = theirs(directory, ids)
    for dtype, tolerance in TOLERANCE.items():
        model = numpygpt.load(directory, dtype=dtype)
        assert model.config == config
        logits = model.logits(ids)
        assert logits.dtype.name == dtype
        assert logits.shape == expected.shape
        gap = np.abs(logits - expected).max() / np.abs(expected).max()
        print(f"{name:12} {dtype}: {gap:.1e}")
        assert gap <= tolerance
