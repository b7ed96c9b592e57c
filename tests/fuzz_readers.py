"""Coverage-guided fuzzing of every reader of checkpoints, with atheris.

    pip install atheris
    python tests/fuzz_readers.py CORPUS -max_total_time=600

CORPUS is a directory that libFuzzer fills with inputs worth keeping; it starts from the fixtures.
Allowed outcomes of an input are a model or one of numpygpt's errors, within 10 s and 64 MB beside
twice its size; anything else stops the run and leaves the input in the working directory. All
further arguments are libFuzzer's. CI does not run this; the tests of each reader mutate files too.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import sys
import tempfile
import warnings

import atheris
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

with atheris.instrument_imports(include=["numpygpt", "zipfile", "pickletools"]):
    from support import config_json, nano, random_tensors, safetensors_bytes

    import numpygpt.checkpoints
    from numpygpt.checkpoints import archives, flax, gguf, llmc, npz, openai, torch_files  # noqa: F401
    from numpygpt.errors import NumpyGPTError

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="numpygpt-fuzz-"))
OPENAI = HERE / "fixtures" / "openai"


def prepare(corpus: pathlib.Path) -> None:
    """Lay what stands beside an input, and the first inputs."""
    (FOLDER / "config.json").write_text(json.dumps(config_json(nano())))
    for file in OPENAI.glob("model.ckpt.data*"):
        shutil.copy(file, FOLDER)
    shutil.copy(OPENAI / "hparams.json", FOLDER)
    corpus.mkdir(exist_ok=True)
    tensors = random_tensors(nano(n_layer=1), dtype=np.float16)
    (corpus / "0.safetensors").write_bytes(safetensors_bytes(tensors))
    np.savez(corpus / "1.npz", **tensors)
    for i, file in enumerate(sorted((HERE / "fixtures").rglob("*"))):
        if file.is_file() and file.suffix not in (".json", ".py", ".npy"):
            shutil.copy(file, corpus / f"{i}-{file.name}")


def one_input(data: bytes) -> None:
    """Inspect and read one file; numpygpt's own errors are fine."""
    path = FOLDER / "model.ckpt.index"
    path.write_bytes(data)
    with warnings.catch_warnings(), contextlib.suppress(NumpyGPTError):
        warnings.simplefilter("ignore")
        numpygpt.checkpoints.inspect(path)
        numpygpt.checkpoints.read(path)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    prepare(pathlib.Path(sys.argv[1]))
    limits = ["-timeout=10", "-rss_limit_mb=700", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one_input)
    atheris.Fuzz()
