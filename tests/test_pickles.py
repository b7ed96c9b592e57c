"""Pickles are followed, never executed: what torch.save writes is understood, all else refused."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import marshal
import pathlib
import pickle
import pickletools
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch_writer as tw
from hypothesis import given
from hypothesis import strategies as st
from support import config_json, nano

from numpygpt import checkpoints
from numpygpt.checkpoints.pickles import Global, Record, Storage, StoredTensor, Stream, interpret
from numpygpt.errors import CheckpointError


def follow(content: bytes) -> Any:
    """The value of a pickle."""
    return interpret(Stream(content, 0, len(content)), "x.pt")[0]


# -- nothing runs ------------------------------------------------------------------------------

# What Python reports whenever code could be run, a module imported or a file written.
WATCHED = {
    "import", "exec", "compile", "pickle.find_class", "marshal.loads", "os.system", "os.exec",
    "os.posix_spawn", "os.fork", "subprocess.Popen", "ctypes.dlopen", "socket.connect",
    "socket.getaddrinfo", "code.__new__", "function.__new__", "os.putenv", "os.remove",
}  # fmt: skip


class Watch:
    """An audit hook, which cannot be removed, but can look away."""

    def __init__(self) -> None:
        self.looking = False
        self.events: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.looking and event in WATCHED:
            self.events.append(event)


WATCH = Watch()
b"".decode("raw_unicode_escape")  # a codec that Python imports when it is first used


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail if anything is executed or imported meanwhile."""
    WATCH.events, WATCH.looking = [], True
    try:
        yield
    finally:
        WATCH.looking = False
    assert WATCH.events == []


def refusal(content: bytes) -> str | None:
    """The message with which a pickle is refused, without running anything; None if it is not."""
    with nothing_runs():
        try:
            follow(content)
        except CheckpointError as error:
            return str(error)
    return None


def write(directory: pathlib.Path, content: bytes, name: str = "pytorch_model.bin") -> pathlib.Path:
    """A file, and a config beside it."""
    (directory / "config.json").write_text(json.dumps(config_json(nano())))
    (directory / name).write_bytes(content)
    return directory / name


def test_the_watch_sees_what_a_pickle_can_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    WATCH.events, WATCH.looking = [], True
    try:
        pickle.loads(tw.program(tw.call(tw.name("os", "system"), tw.text("exit 0"))))
    finally:
        WATCH.looking = False
    assert WATCH.events == ["pickle.find_class", "os.system"]


# -- plain data --------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**127), 2**127 - 1),
    st.floats(allow_nan=False), st.text(), st.binary(),
)  # fmt: skip
KEYS = st.one_of(st.text(), st.integers(0, 2**31 - 1))  # of parameters, of optimisers
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner)
    ),
    max_leaves=20,
)


def same(ours: Any, theirs: Any) -> bool:
    """Equal, of the same types all the way down."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs) and str(ours) == str(theirs)  # 0.0 is not -0.0


@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_data_is_what_pickle_makes_of_it(plain, protocol):
    assert same(follow(pickle.dumps(plain, protocol)), plain)


@given(PLAIN.filter(lambda plain: b"\\x" not in repr(plain).encode() and "b'" not in repr(plain)))
def test_protocol_2_too_but_for_bytes_which_need_a_call(plain):
    if 'b"' not in repr(plain):
        assert same(follow(pickle.dumps(plain, 2)), plain)


def test_what_stands_in_it_twice_is_one_object():
    shared = [1]
    first, second = follow(pickle.dumps([shared, shared], 2))
    assert first is second


def test_text_of_python_2_is_text():
    content = tw.program(pickle.SHORT_BINSTRING + b"\3abc")
    assert follow(content) == "abc"


def test_many_items_come_in_batches():
    plain = {"items": list(range(5000)), "fields": {str(i): i for i in range(5000)}}
    assert follow(pickle.dumps(plain, 2)) == plain


# -- descriptions ------------------------------------------------------------------------------

BLOCK = tw.storage("FloatStorage", "0", 6)
STORED = Storage("F32", "0", 6)


def test_a_tensor_is_described():
    content = tw.program(tw.tensor(BLOCK, 1, (2, 2), (3, 1)))
    value, names = interpret(Stream(content, 0, len(content)), "x.pt")
    assert value == StoredTensor(STORED, 1, (2, 2), (3, 1))
    assert names == ["torch._utils._rebuild_tensor_v2", "torch.FloatStorage",
                     "collections.OrderedDict"]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    {
        "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16",
        "BFloat16Storage": "BF16", "LongStorage": "I64", "IntStorage": "I32",
        "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    }.items(),
)  # fmt: skip
def test_storages_have_the_type_of_their_class(kind, name):
    value = follow(tw.program(tw.tensor(tw.storage(kind, "7", 4), 0, (4,), (1,))))
    assert value.storage == Storage(name, "7", 4)


def test_wrappers_of_a_tensor_are_taken_off():
    tensor = tw.tensor(BLOCK, 0, (6,), (1,))
    expected = StoredTensor(STORED, 0, (6,), (1,))
    wrapped = {
        "parameter": tw.call(
            tw.name("torch._utils", "_rebuild_parameter"), tensor, tw.value(True), tw.ORDERED_DICT
        ),
        "parameter with state": tw.call(
            tw.name("torch._utils", "_rebuild_parameter_with_state"),
            *(tensor, tw.value(True), tw.ORDERED_DICT, tw.value({"note": 1})),
        ),
        "from type": tw.call(
            tw.name("torch._tensor", "_rebuild_from_type_v2"), tw.REBUILD,
            tw.name("torch.nn.parameter", "Parameter"),
            tw.tuple_of(BLOCK, *map(tw.value, (0, (6,), (1,), False)), tw.ORDERED_DICT),
            tw.value({"note": 1}),
        ),
        "before version 2": tw.call(
            tw.name("torch._utils", "_rebuild_tensor"), BLOCK, *map(tw.value, (0, (6,), (1,)))
        ),
    }  # fmt: skip
    for label, content in wrapped.items():
        assert follow(tw.program(content)) == expected, label


def test_an_ordered_dict_with_metadata_is_a_dict():
    state = collections.OrderedDict(a=1, b=2)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    for protocol in (2, 3, 4, 5):
        content = pickle.dumps(state, protocol)
        assert same(follow(content), {"a": 1, "b": 2})


def test_a_legacy_storage_may_be_a_part_of_another():
    content = tw.storage("FloatStorage", "0", 100, legacy=True, view=("1", 10, 6))
    value = follow(tw.program(tw.tensor(content, 0, (6,), (1,))))
    assert value.storage == Storage("F32", "0", 6, 10)


def test_objects_of_plain_data_are_records_whatever_their_module():
    for space in (argparse.Namespace(n_head=2), types.SimpleNamespace(n_head=2)):
        for protocol in (2, 4):
            value = follow(pickle.dumps(space, protocol))
            assert value == Record(type(space).__name__, {"n_head": 2})
    for module in ("__main__", "model", "train_gpt2", "os"):
        content = tw.name(module, "GPTConfig") + tw.value(()) + pickle.NEWOBJ
        content += tw.value({"n_head": 2}) + pickle.BUILD
        assert follow(tw.program(content)) == Record("GPTConfig", {"n_head": 2})


def test_numpy_numbers_and_paths_beside_the_weights_are_names_only():
    for thing in (np.float64(1.5), np.float32(1.5), pathlib.PurePosixPath("a")):
        if isinstance(thing, pathlib.PurePath):
            content = tw.program(tw.call(tw.name("pathlib", "PosixPath"), tw.text("a")))
        else:
            content = pickle.dumps(thing, 2)
        value = follow(content)
        assert isinstance(value, Record)
        assert value.fields == {}


# A state that would change what real objects do is only data here.
AS_DATA = {
    "__setstate__": {"__setstate__": tw.name("collections", "OrderedDict")},
    "__class__": {"__class__": tw.name("torch", "FloatStorage")},
    "__reduce__": {"__reduce__": "os.system"},
    "__dict__": {"__dict__": {"a": 1}},
}


@pytest.mark.parametrize("state", AS_DATA.values(), ids=AS_DATA)
def test_names_with_a_meaning_are_fields_like_others(state):
    content = tw.name("m", "GPTConfig") + tw.value(()) + pickle.NEWOBJ + tw.value(state)
    content += pickle.BUILD + tw.value({"n_head": 2}) + pickle.BUILD
    with nothing_runs():
        value = follow(tw.program(content))
    assert type(value) is Record
    assert list(value.fields) == [*state, "n_head"]


def test_the_slots_of_a_state_are_not_set():
    content = tw.name("m", "Namespace") + tw.value(()) + pickle.NEWOBJ
    content += tw.value((None, {"name": "os.system", "fields": 1})) + pickle.BUILD
    assert follow(tw.program(content)) == Record("Namespace", {})


# -- instructions ------------------------------------------------------------------------------

# All that pickle writes, at protocols 2 to 5, of what stands in checkpoints.
UNDERSTOOD = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1",
    "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "EMPTY_DICT", "EMPTY_LIST",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM",
    "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
}  # fmt: skip
FOREIGN = {
    "INT": b"I5\n", "LONG": b"L5L\n", "LONG4": b"\x8b\1\0\0\0\5", "STRING": b"S'a'\n",
    "BYTEARRAY8": b"\x96\1\0\0\0\0\0\0\0a", "NEXT_BUFFER": b"\x97", "READONLY_BUFFER": b"\x98",
    "UNICODE": b"Va\n", "FLOAT": b"F1.5\n", "EMPTY_SET": b"\x8f", "ADDITEMS": b"\x90",
    "FROZENSET": b"\x91", "LIST": b"l", "DICT": b"d", "POP": b"0", "DUP": b"2", "POP_MARK": b"1",
    "GET": b"g0\n", "PUT": b"p0\n", "EXT1": b"\x82\1", "EXT2": b"\x83\1\0",
    "EXT4": b"\x84\1\0\0\0", "INST": b"ios\nsystem\n", "OBJ": b"o", "NEWOBJ_EX": b"\x92",
    "PERSID": b"Pstorage\n",
}  # fmt: skip


def test_the_lists_of_instructions_are_complete():
    every = {opcode.name for opcode in pickletools.opcodes}
    assert UNDERSTOOD | FOREIGN.keys() == every
    assert not UNDERSTOOD & FOREIGN.keys()


@pytest.mark.parametrize("opcode", FOREIGN)
def test_instructions_that_torch_save_never_writes_are_refused(opcode):
    # Whatever they would take from the stack lies there, and what they would fetch is remembered.
    before = tw.value([]) + tw.put(0) + pickle.MARK + tw.value([]) + tw.value("a") + tw.value("b")
    message = refusal(tw.program(before + FOREIGN[opcode])) or ""
    assert message.startswith(f"x.pt: its pickle has the instruction {opcode},")


def test_text_of_protocol_0_is_refused_without_a_warning_of_its_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CheckpointError):
            follow(b"S'\\d'\n.")


def test_the_corpus_of_instructions_is_what_pickle_writes():
    content = pickle.dumps({"a": [(), (1, 2.5, "ä" * 300), b"x"], "b": None, "c": {}}, 4)
    used = {opcode.name for opcode, _, _ in pickletools.genops(io.BytesIO(content))}
    assert used <= UNDERSTOOD
    assert follow(content) == pickle.loads(content)


# -- malicious: code that pickle.loads would run -----------------------------------------------


def attacks(mark: str) -> dict[str, bytes]:
    """Pickles that make the file `mark` when pickle.loads reads them."""
    shell, python = tw.text(f"touch {mark}"), tw.text(f"open({mark!r}, 'w').close()")
    system, getattr_ = tw.name("os", "system"), tw.name("builtins", "getattr")
    os_module = tw.call(tw.name("builtins", "__import__"), tw.text("os"))
    run = tw.call(system, shell)
    code = marshal.dumps(compile(f"open({mark!r}, 'w').close()", "x", "exec"))
    code_bytes = pickle.BINBYTES + len(code).to_bytes(4, "little") + code
    nested = tw.program(run)
    nested_bytes = pickle.BINBYTES + len(nested).to_bytes(4, "little") + nested
    register = tw.call(
        tw.name("copyreg", "add_extension"), tw.text("os"), tw.text("system"), tw.number(77)
    )
    bare = tw.name("types", "SimpleNamespace") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    found = tw.call(tw.stack_name("collections", "_sys.modules.get"), tw.text("os"))
    attrgetter = tw.call(tw.name("operator", "attrgetter"), tw.text("system"))
    return {
        "os.system": tw.program(run),
        "posix.system": tw.program(tw.call(tw.name("posix", "system"), shell)),
        "subprocess.call": tw.program(
            tw.call(tw.name("subprocess", "call"), tw.value(["touch", mark]))
        ),
        "subprocess.check_output": tw.program(
            tw.call(tw.name("subprocess", "check_output"), tw.value(["touch", mark]))
        ),
        "eval": tw.program(tw.call(tw.name("builtins", "eval"), python)),
        "exec": tw.program(tw.call(tw.name("builtins", "exec"), python)),
        "eval by its Python 2 name": tw.program(tw.call(tw.name("__builtin__", "eval"), python)),
        "getattr": tw.program(tw.call(tw.call(getattr_, os_module, tw.text("system")), shell)),
        "open": tw.program(tw.call(tw.name("io", "open"), tw.text(mark), tw.text("w"))),
        "runstring of NumPy": tw.program(
            tw.call(tw.name("numpy.testing._private.utils", "runstring"), python, tw.value({}))
        ),
        "runpy": tw.program(tw.call(tw.name("runpy", "_run_code"), python, tw.value({}))),
        "timeit": tw.program(tw.call(tw.name("timeit", "timeit"), tw.text("pass"), python)),
        "a function from code": tw.program(
            tw.call(tw.call(tw.name("types", "FunctionType"),
                            tw.call(tw.name("marshal", "loads"), code_bytes),
                            tw.value({"__builtins__": tw.name("builtins", "__dict__")})))
        ),
        "functools.partial": tw.program(
            tw.call(tw.call(tw.name("functools", "partial"), system, shell))
        ),
        "operator.attrgetter": tw.program(tw.call(tw.call(attrgetter, os_module), shell)),
        "operator.methodcaller": tw.program(
            tw.call(tw.call(tw.name("operator", "methodcaller"), tw.text("system"), shell),
                    os_module)
        ),
        "list of map": tw.program(
            tw.call(tw.name("builtins", "list"),
                    tw.call(tw.name("builtins", "map"), system, tw.tuple_of(shell)))
        ),
        "dotted name": tw.program(
            tw.call(tw.stack_name("pathlib", "os.system"), shell), protocol=4
        ),
        "dotted name in an allowed module": tw.program(
            tw.call(tw.call(attrgetter, found), shell), protocol=4
        ),
        "nested pickle": tw.program(tw.call(tw.name("pickle", "loads"), nested_bytes)),
        "INST": tw.program(pickle.MARK + shell + b"ios\nsystem\n"),
        "OBJ": tw.program(pickle.MARK + system + shell + pickle.OBJ),
        "EXT1": tw.program(register + tw.call(b"\x82\x4d", shell)),
        "EXT2": tw.program(register + tw.call(b"\x83\x4d\0", shell)),
        "EXT4": tw.program(register + tw.call(b"\x84\x4d\0\0\0", shell)),
        "__setstate__ by BUILD": tw.program(
            bare + tw.value({"__setstate__": system}) + pickle.BUILD + shell + pickle.BUILD
        ),
        "protocol 0": f"cos\nsystem\n(S'touch {mark}'\ntR.".encode(),
        "in a key": tw.program(tw.dict_of([(run, tw.value(1))])),
        "dropped": tw.program(run + pickle.POP + tw.value({})),
        "dropped with its mark": tw.program(pickle.MARK + run + b"1" + tw.value({})),
        "before it breaks": tw.program(run)[:-1] + b"\xff",
        "before it ends without STOP": tw.program(run)[:-1],
        "before a missing memo": tw.program(run + tw.get(99)),
        "behind a thousand frames": b"\x80\4" + b"\x95" * 1 + (2).to_bytes(8, "little") + b"}0"
        + run + b".",
    }  # fmt: skip


LIVE = attacks("ran")


def test_every_attack_would_work_on_pickle(tmp_path):
    """Otherwise the next tests would prove nothing."""
    marks = {label: f"ran{i}" for i, label in enumerate(LIVE)}
    for label, mark in marks.items():
        (tmp_path / f"{mark}.pkl").write_bytes(attacks(mark)[label])
    code = (
        "import pathlib, pickle\n"
        "for path in pathlib.Path().glob('*.pkl'):\n"
        "    import copyreg; copyreg.clear_extension_cache()\n"
        "    copyreg._extension_registry.clear(); copyreg._inverted_registry.clear()\n"
        "    try: pickle.loads(path.read_bytes())\n"
        "    except Exception: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    assert [label for label, mark in marks.items() if not (tmp_path / mark).exists()] == []


@pytest.mark.parametrize("label", LIVE)
def test_no_attack_works_here(tmp_path, monkeypatch, label):
    content = LIVE[label]
    message = refusal(content) or ""
    assert "nothing in it was executed" in message or "damaged pickle" in message
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, tw.save({"wte.weight": np.ones((1, 1), np.float32)}))
    checkpoints.inspect(path)  # imports what it needs
    for whole in (tw.torch_zip(content), tw.torch_legacy(content), content):
        path.write_bytes(whole)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"), nothing_runs():
            checkpoints.read(path)
        with nothing_runs():
            report = checkpoints.inspect(path)
        assert report.problems
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.json", path.name]


# Names that scanners of pickles were told of too late, and many more: nothing of it is on a list
# here, it is simply not needed to describe tensors.
NAMES = """
__builtin__.apply __builtin__.compile __builtin__.execfile __builtin__.getattr __builtin__.open
_aix_support._read_cmd_output _bootsubprocess.Popen _io.FileIO _osx_support._find_build_tool
_osx_support._read_output _pickle.loads _posixsubprocess.fork_exec _pyrepl.pager.pipe_pager
aiohttp.client.ClientSession asyncio.unix_events._UnixSubprocessTransport._start bdb.Bdb.run
builtins.__import__ builtins.breakpoint builtins.bytearray builtins.classmethod builtins.compile
builtins.delattr builtins.dict builtins.eval builtins.exec builtins.exit builtins.filter
builtins.getattr builtins.globals builtins.help builtins.input builtins.list builtins.map
builtins.memoryview builtins.object builtins.open builtins.print builtins.set builtins.setattr
builtins.type builtins.vars cProfile.run cProfile.runctx cloudpickle.loads
cloudpickle.cloudpickle._make_function code.InteractiveInterpreter code.interact codecs.decode
codeop.compile_command collections.Counter collections.OrderedDict.fromkeys collections.UserDict
collections.defaultdict collections.namedtuple commands.getoutput copyreg.__newobj__
copyreg._reconstructor copyreg.add_extension copyreg.constructor ctypes.CDLL ctypes.cdll
ctypes.util._findLib_gcc dill._dill._create_function dill.loads distutils.file_util.write_file
doctest.debug_script ensurepip._run_pip functools.partial functools.reduce gc.get_objects
http.client.HTTPSConnection httplib.HTTPSConnection idlelib.autocomplete.AutoComplete.get_entity
idlelib.calltip.get_entity idlelib.debugobj.ObjectTreeItem.SetText idlelib.run.Executive.runcode
imaplib.IMAP4_stream imp.load_source importlib.import_module importlib.reload inspect.getattr_static
io.FileIO io.open joblib.load joblib.numpy_pickle.load lib2to3.pgen2.grammar.Grammar.loads
lib2to3.pgen2.pgen.ParserGenerator.make_label linecache.getline logging.config._resolve
logging.config.fileConfig marshal.loads mmap.mmap multiprocessing.process.BaseProcess
multiprocessing.util.spawnv_passfds nt.startfile nt.system ntpath.os ntpath.os.system
numpy.core.multiarray._reconstruct numpy.distutils.exec_command.exec_command
numpy.dtype.newbyteorder numpy.f2py.crackfortran._eval_length numpy.f2py.crackfortran.getlincoef
numpy.f2py.crackfortran.myeval numpy.f2py.crackfortran.param_eval numpy.fromfile
numpy.lib.npyio.load numpy.load numpy.memmap numpy.ndarray numpy.testing._private.utils.runstring
operator.attrgetter operator.itemgetter operator.methodcaller os._wrap_close os.execv os.execvp
os.popen os.posix_spawn os.remove os.spawnlp os.spawnvpe os.startfile os.system os.unlink
pandas.eval pandas.read_pickle pathlib.Path pathlib.PosixPath.unlink pdb.Pdb.default pdb.run
pip.main pip._internal.main pip._internal.cli.main.main pipes.Template pkg_resources.run_main
pkgutil.resolve_name platform.popen posix.execve posix.popen posix.posix_spawn posix.system
posixpath.os.system profile.Profile.run profile.run pstats.run psutil.Popen pty.spawn pydoc.locate
pydoc.pager pydoc.pipepager pydoc.safeimport requests.api.get requests.get runpy._run_code
runpy.run_module runpy.run_path setuptools._distutils.spawn.spawn shelve.open shutil.copyfile
shutil.move shutil.rmtree signal.signal site.execsitecustomize site.main smtplib.SMTP
socket.create_connection socket.gethostbyname socket.socket sqlite3.connect
ssl.get_server_certificate subprocess.Popen subprocess.call subprocess.check_output
subprocess.getoutput subprocess.run sys.exit sys.modules sys.setprofile sys.settrace tarfile.open
telnetlib.Telnet tempfile.mktemp tensorflow.io.read_file test.support.script
test.support.script_helper.assert_python_ok threading.Thread thread.start_new_thread timeit.main
timeit.timeit torch.Tensor.apply_ torch.compile torch.classes.load_library torch.cuda.is_available
torch.distributed.rpc.rpc_sync torch.fx._symbolic_trace.symbolic_trace
torch.fx.graph_module.GraphModule
torch.fx.experimental.symbolic_shapes.ShapeEnv.evaluate_guards_expression torch.hub.load
torch.hub.load_state_dict_from_url torch.jit.load torch.jit.script
torch.jit.unsupported_tensor_ops.execWrapper torch.load torch.nn.modules.module.Module
torch.nn.modules.linear.Linear torch.ops.load_library torch.package.PackageImporter torch.save
torch.serialization.add_safe_globals torch.serialization.load torch.storage._load_from_bytes
torch.storage.TypedStorage torch.utils.cpp_extension.load
torch.utils._config_module.ConfigModule.load_config
torch.utils.bottleneck.__main__.run_autograd_prof torch.utils.bottleneck.__main__.run_cprofile
torch.utils.checkpoint.checkpoint torch.utils.collect_env.run
torch.utils.data.datapipes.utils.decoder.basichandlers torch.utils.model_dump.main
torch.utils.show_pickle.main torch._C._jit_pass_inline torch._dynamo.guards.GuardBuilder.get
torch._inductor.codecache.compile_file torch._tensor._rebuild_from_type torch._tensor.Tensor
torch._utils._rebuild_device_tensor_from_cpu_tensor torch._utils._rebuild_device_tensor_from_numpy
torch._utils._rebuild_meta_tensor_no_storage torch._utils._rebuild_nested_tensor
torch._utils._rebuild_qtensor torch._utils._rebuild_sparse_tensor torch._utils._rebuild_tensor_v3
torch._utils._rebuild_wrapper_subclass torch._utils._import_dotted_name torch.FloatStorage.from_file
torch.FloatStorage.__init__.__globals__ torch.storage.UntypedStorage.from_file torch.QInt8Storage
torch.ComplexFloatStorage torch.sparse_coo_tensor trace.Trace.run trace.Trace.runctx
transformers.AutoModel.from_pretrained
transformers.dynamic_module_utils.get_class_from_dynamic_module turtle.write_docstringdict
types.CodeType types.FunctionType types.LambdaType types.MethodType typing.get_type_hints
unittest.mock._importer urllib.request.urlopen urllib.request.urlretrieve urllib2.urlopen
uuid._get_command_stdout uuid._popen venv.create webbrowser.open webbrowser.BackgroundBrowser.open
wsgiref.simple_server.make_server xmlrpc.client.ServerProxy yaml.unsafe_load zipimport.zipimporter
__main__.GPT __main__.GPTConfig.__init__.__globals__ model.GPTConfig.__class__
argparse.Namespace.__init__.__globals__ mingpt.utils.CfgNode.to_dict
collections.OrderedDict.__init__.__globals__ collections.OrderedDict.__reduce_ex__
collections.OrderedDict.__class__ collections.ordereddict Collections.OrderedDict
_collections.OrderedDict torch.floatstorage TORCH.FloatStorage
torch._utils._rebuild_tensor_v2.__globals__ torch.nn.parameter.Parameter.register_hook
torch._tensor._rebuild_from_type_v2.__globals__
"""


def uses(function: bytes) -> dict[str, bytes]:
    """Every place of a pickle in which a name can stand."""
    argument = tw.text("ran")
    block = tw.storage("FloatStorage", "0", 1)
    ones, tail = tw.value((1,)), [tw.value(False), tw.ORDERED_DICT]
    record = tw.name("m", "GPTConfig") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    from_type = tw.name("torch._tensor", "_rebuild_from_type_v2")
    tensor = tw.tuple_of(block, tw.value(0), ones, ones, *tail)
    parameter = tw.name("torch._utils", "_rebuild_parameter_with_state")
    persistent = [tw.text("storage"), function, tw.text("0"), tw.text("cpu"), tw.number(1)]
    return {
        "imported": function,
        "called": tw.call(function, argument),
        "called without arguments": function + pickle.EMPTY_TUPLE + pickle.REDUCE,
        "NEWOBJ": function + tw.tuple_of(argument) + pickle.NEWOBJ,
        "NEWOBJ_EX": function + tw.tuple_of(argument) + pickle.EMPTY_DICT + b"\x92",
        "OBJ": pickle.MARK + function + argument + pickle.OBJ,
        "in a list": pickle.EMPTY_LIST + function + pickle.APPEND,
        "as a value": tw.dict_of([(tw.text("a"), function)]),
        "as a key": tw.dict_of([(function, tw.value(1))]),
        "remembered": function + tw.put(0) + pickle.TUPLE1 + tw.get(0),
        "as a state": record + function + pickle.BUILD,
        "with a state": function + tw.value({"a": 1}) + pickle.BUILD,
        "in a state": record + tw.value({"__setstate__": function}) + pickle.BUILD,
        "as a storage class": tw.tuple_of(*persistent) + pickle.BINPERSID,
        "as a persistent id": function + pickle.BINPERSID,
        "as a storage": tw.call(tw.REBUILD, function, tw.value(0), ones, ones, *tail),
        "as a hook": tw.call(
            tw.REBUILD, block, tw.value(0), ones, ones, tw.value(True),
            tw.dict_of([(tw.text("a"), function)]),
        ),
        "as metadata": tw.call(tw.REBUILD, block, tw.value(0), ones, ones, *tail, function),
        "as the function of a type": tw.call(
            from_type, function, tw.name("torch", "Tensor"), tw.tuple_of(argument), tw.value({})
        ),
        "as the type of a tensor": tw.call(from_type, tw.REBUILD, function, tensor, tw.value({})),
        "as the state of a type": tw.call(
            from_type, tw.REBUILD, tw.name("torch", "Tensor"), tensor, function
        ),
        "as the state of a parameter": tw.call(parameter, tensor, *tail, function),
        "in an OrderedDict": tw.call(
            tw.name("collections", "OrderedDict"), tw.tuple_of(tw.tuple_of(tw.text("a"), function))
        ),
    }  # fmt: skip


@pytest.mark.parametrize("spelled", [tw.name, tw.stack_name], ids=["GLOBAL", "STACK_GLOBAL"])
def test_a_name_that_describes_no_tensor_is_refused_wherever_it_stands(spelled):
    for dotted in NAMES.split():
        module, _, attribute = dotted.rpartition(".")
        spellings = [(module, attribute)]
        if spelled is tw.stack_name and "." in module:  # protocol 4 allows dots on both sides
            first, _, rest = dotted.partition(".")
            spellings.append((first, rest))
        for names in spellings:
            for where, content in uses(spelled(*names)).items():
                message = refusal(tw.program(content, protocol=4)) or ""
                assert f"its pickle asks for {dotted}" in message, where
                assert message.endswith("nothing in it was executed")


# -- malicious: what only a bug in this interpreter would run, or take for something else -------

OS_CALL = tw.call(tw.name("os", "system"), tw.text("touch ran"))
GOOD = tw.tensor(tw.storage("FloatStorage", "0", 6), 0, (6,), (1,))
ORDERED = tw.name("collections", "OrderedDict")
FROM_TYPE = tw.name("torch._tensor", "_rebuild_from_type_v2")
FLOATS = tw.name("torch", "FloatStorage")
RECORD = tw.name("m", "GPTConfig") + pickle.EMPTY_TUPLE + pickle.NEWOBJ


def persistent(*parts: Any) -> bytes:
    return tw.tuple_of(*map(tw.value, parts)) + pickle.BINPERSID


def shaped(offset: Any, shape: Any, strides: Any) -> bytes:
    return tw.tensor(BLOCK, offset, shape, strides)


REFUSED = {
    # names
    "a module name with a space": (b"ccollections OrderedDict\n\n", "asks for"),
    "a space before the name": (b"ccollections\n OrderedDict\n", "asks for"),
    "a space behind the name": (b"ccollections\nOrderedDict \n", "asks for"),
    "a carriage return": (b"ccollections\r\nOrderedDict\r\n", "asks for"),
    "a null byte": (b"ccollections\nOrderedDict\0\n", "asks for"),
    "no newline": (b"ccollections\nOrderedDict", "its pickle"),
    "no name": (b"ccollections\n\n", "asks for"),
    "no module": (b"c\nOrderedDict\n", "asks for .OrderedDict"),
    "a very long line": (b"c" + b"a" * 5000 + b"\nb\n", "its pickle"),
    "a Cyrillic letter in GLOBAL": ("c\u043es\nsystem\n".encode(), "damaged"),
    "a Cyrillic letter": (tw.stack_name("c\u043ellections", "OrderedDict"), "asks for"),
    "full-width letters": (tw.stack_name("collections", "\uff2frderedDict"), "asks for"),
    "a lone surrogate": (tw.stack_name("collections", "\ud800"), "asks for"),
    "a newline in the name": (tw.stack_name("collections", "OrderedDict\n"), "asks for"),
    "a name that is a number": (tw.text("os") + tw.number(1) + b"\x93", "else than text"),
    "a module that is bytes": (b"C\2os" + tw.text("system") + b"\x93", "else than text"),
    "a dotted record": (tw.stack_name("m", "GPTConfig.__init__"), "asks for"),
    "a dotted record in the module": (tw.stack_name("m.GPTConfig", "__init__"), "asks for"),
    # calls
    "a call of a string": (tw.call(tw.text("os.system"), tw.text("ran")), "calls what is no"),
    "a call of a result": (tw.call(tw.call(ORDERED)), "calls what is no function"),
    "a call of a tensor": (tw.call(GOOD), "calls what is no function"),
    "a call of a record": (tw.call(RECORD), "calls what is no function"),
    "a call with a list": (ORDERED + tw.value([]) + pickle.REDUCE, "calls what is no function"),
    "a call with a record": (ORDERED + RECORD + pickle.REDUCE, "calls what is no function"),
    "a call with a tensor": (tw.REBUILD + GOOD + pickle.REDUCE, "calls what is no function"),
    "a call of a storage class": (tw.call(FLOATS), "calls torch.FloatStorage"),
    "a call of Tensor": (tw.call(tw.name("torch", "Tensor")), "calls torch.Tensor"),
    "a call of Parameter": (tw.call(tw.name("torch.nn.parameter", "Parameter"), GOOD), "calls"),
    "a record with arguments": (tw.call(tw.name("m", "GPTConfig"), tw.text("a")), "gives arg"),
    "an OrderedDict with items": (tw.call(ORDERED, tw.value([("a", 1)])), "with arguments"),
    "an OrderedDict of text": (tw.call(ORDERED, tw.text("ab")), "with arguments"),
    "an OrderedDict of two": (tw.call(ORDERED, tw.value(()), tw.value(())), "damaged"),
    "a type that rebuilds itself": (
        tw.call(FROM_TYPE, FROM_TYPE, ORDERED, tw.tuple_of(FROM_TYPE), tw.value(None)),
        "rebuilds itself",
    ),
    "a type that rebuilds text": (
        tw.call(FROM_TYPE, tw.text("a"), ORDERED, tw.value(()), tw.value(None)),
        "rebuilds something else",
    ),
    "a type with a list": (
        tw.call(FROM_TYPE, ORDERED, ORDERED, tw.value([]), tw.value(None)),
        "rebuilds something else",
    ),
    "a type of three arguments": (
        tw.call(FROM_TYPE, ORDERED, ORDERED, tw.value(())), "damaged pickle"
    ),
    "a type that calls Tensor": (
        tw.call(FROM_TYPE, tw.name("torch", "Tensor"), ORDERED, tw.value(()), tw.value(None)),
        "calls torch.Tensor",
    ),
    # states
    "the state of a list": (tw.value([]) + tw.value({}) + pickle.BUILD, "what has none"),
    "the state of a name": (ORDERED + tw.value({"a": 1}) + pickle.BUILD, "what has none"),
    "the state of a number": (tw.number(1) + tw.value({}) + pickle.BUILD, "what has none"),
    "the state of nothing": (tw.value({}) + pickle.BUILD, "damaged"),
    # containers
    "items of a tuple": (tw.value(()) + tw.number(1) + pickle.APPEND, "what is no list"),
    "items of a record": (RECORD + tw.number(1) + pickle.APPEND, "what is no list"),
    "items of a name": (ORDERED + tw.text("a") + tw.text("b") + b"s", "what is no dict"),
    "items of a list": (tw.value([]) + tw.number(0) + tw.text("b") + b"s", "what is no dict"),
    "half an item": (b"}(" + tw.text("a") + b"u", "what is no dict"),
    "a tuple as key": (tw.dict_of([(tw.value((1,)), tw.value(1))]), "a key that is a tuple"),
    "a float as key": (tw.dict_of([(tw.value(1.5), tw.value(1))]), "a key that is a float"),
    "None as key": (tw.dict_of([(pickle.NONE, tw.value(1))]), "a key that is a NoneType"),
    "a bool as key": (tw.dict_of([(pickle.NEWTRUE, tw.value(1))]), "a key that is a bool"),
    "bytes as key": (tw.dict_of([(b"C\1a", tw.value(1))]), "a key that is a bytes"),
    "a list as key": (tw.dict_of([(tw.value([]), tw.value(1))]), "a key that is a list"),
    "a record as key": (tw.dict_of([(RECORD, tw.value(1))]), "a key that is a Record"),
    "a tensor as key": (tw.dict_of([(GOOD, tw.value(1))]), "a key that is a StoredTensor"),
    "a name as key": (tw.dict_of([(ORDERED, tw.value(1))]), "a key that is a Global"),
    # stack and memo
    "an empty pickle": (b"", "damaged"),
    "a tuple of too much": (tw.number(1) + pickle.TUPLE2, "damaged"),
    "a tuple without mark": (tw.number(1) + pickle.TUPLE, "damaged"),
    "items without mark": (tw.value([]) + pickle.APPENDS, "damaged"),
    "a key without dict": (tw.text("a") + tw.text("b") + b"s", "damaged"),
    "a call of nothing": (pickle.EMPTY_TUPLE + pickle.REDUCE, "damaged"),
    "a name of nothing": (b"\x93", "damaged"),
    "nothing to remember": (tw.put(0), "damaged"),
    "nothing remembered": (tw.get(0), "damaged"),
    "nothing remembered there": (tw.number(1) + tw.put(1) + tw.get(2), "damaged"),
    "the memo at -1": (tw.number(1) + tw.put(0) + b"j\xff\xff\xff\xff", "damaged"),
    "the short memo at -1": (tw.number(1) + tw.put(0) + b"h\xff", "damaged"),
    # numbers and text
    "129 bits": (tw.number(2**128), "an integer that no tensor needs"),
    "-129 bits": (tw.number(-(2**130)), "an integer that no tensor needs"),
    "1000 bits": (tw.number(2**1000), "an integer that no tensor needs"),
    "text that is no UTF-8": (b"X\2\0\0\0\xff\xff", "damaged"),
    "text past the end": (b"X\xff\0\0\0a", "damaged"),
    "text of 2**31 bytes": (b"\x8d" + (2**31).to_bytes(8, "little") + b"a", "damaged"),
    "text of 2**63 bytes": (b"\x8d" + (2**63).to_bytes(8, "little") + b"a", "damaged"),
    "text of 2**64 - 1 bytes": (b"\x8d" + b"\xff" * 8 + b"a", "damaged"),
    "bytes of 2**62": (b"\x8e" + (2**62).to_bytes(8, "little") + b"a", "damaged"),
    "a bytearray of 2**62": (b"\x96" + (2**62).to_bytes(8, "little") + b"a", "instruction"),
    "text of -1 bytes": (b"T\xff\xff\xff\xffa", "damaged"),
    "a long of -1 bytes": (b"\x8b\xff\xff\xff\xffa", "instruction"),
    "a long of 2**31 - 1 bytes": (b"\x8b\xff\xff\xff\x7fa", "instruction"),
    "5000 digits": (b"I" + b"9" * 5000 + b"\n", "instruction"),
    "an unknown instruction": (b"\xff", "instruction"),
    # storages
    "a storage by name": (persistent("storage"), "is no storage"),
    "a persistent string": (tw.text("storage") + pickle.BINPERSID, "is no storage"),
    "a persistent call": (persistent(OS_CALL), "asks for os.system"),
    "a module": (persistent("module", FLOATS, "model.py", "import os"), "a whole module"),
    "a storage of no class": (persistent("storage", "os", "0", "cpu", 1), "is no storage"),
    "a storage of OrderedDict": (persistent("storage", ORDERED, "0", "cpu", 1), "is no storage"),
    "a storage of a record": (
        persistent("storage", tw.name("m", "GPTConfig"), "0", "cpu", 1), "is no storage"
    ),
    "a storage with a number as key": (persistent("storage", FLOATS, 0, "cpu", 1), "is no st"),
    "a storage with text as length": (persistent("storage", FLOATS, "0", "cpu", "1"), "is no st"),
    "a storage with too much": (
        persistent("storage", FLOATS, "0", "cpu", 1, None, None), "is no storage"
    ),
    "a number of 61 bits as key": (
        tw.dict_of([(tw.number(2**61 - 1), tw.value(1))]), "integer"
    ),
    "a storage with a long key": (
        persistent("storage", FLOATS, "0" * 1000, "cpu", 1), "storage"
    ),
    "a storage of -1": (persistent("storage", FLOATS, "0", "cpu", -1), "of -1 elements"),
    "a storage of 2**48": (persistent("storage", FLOATS, "0", "cpu", 2**48), "elements"),
    "a storage of 2**100": (persistent("storage", FLOATS, "0", "cpu", 2**100), "elements"),
    "a storage of True": (persistent("storage", FLOATS, "0", "cpu", True), "storage"),
    "a view of text": (persistent("storage", FLOATS, "0", "cpu", 1, "all"), "unknown way"),
    "a view of two": (persistent("storage", FLOATS, "0", "cpu", 1, ("1", 0)), "unknown way"),
    "a view before": (persistent("storage", FLOATS, "0", "cpu", 1, ("1", -1, 1)), "elements"),
    "a view of 2**60": (persistent("storage", FLOATS, "0", "cpu", 1, ("1", 0, 2**60)), "elem"),
    # tensors
    "a tensor without storage": (
        tw.tensor(tw.text("0"), 0, (1,), (1,)), "a tensor that is none"
    ),
    "a negative offset": (shaped(-1, (1,), (1,)), "impossible"),
    "a negative size": (shaped(0, (-1,), (1,)), "impossible"),
    "a negative stride": (shaped(0, (2,), (-1,)), "impossible"),
    "an offset of True": (shaped(True, (1,), (1,)), "impossible"),
    "a size of True": (shaped(0, (True,), (1,)), "impossible"),
    "a stride of 1.0": (shaped(0, (1,), (1.0,)), "impossible"),
    "an offset of None": (shaped(None, (1,), (1,)), "impossible"),
    "a size of text": (shaped(0, ("6",), (1,)), "impossible"),
    "a size of 2**48": (shaped(0, (2**48,), (1,)), "impossible"),
    "a stride of 2**64": (shaped(0, (1,), (2**64,)), "impossible"),
    "nine axes": (shaped(0, (1,) * 9, (1,) * 9), "a tensor that is none"),
    "a shape that is a list": (shaped(0, [6], (1,)), "a tensor that is none"),
    "a shape that is text": (shaped(0, "6", (1,)), "a tensor that is none"),
    "a shape that is a number": (shaped(0, 6, (1,)), "damaged"),
    "a shape without strides": (shaped(0, (2, 3), (1,)), "a tensor that is none"),
    "three arguments": (
        tw.call(tw.REBUILD, BLOCK, tw.value(0), tw.value((6,))), "damaged pickle"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_odd_is_refused(content, message):
    refused = refusal(tw.program(content)) or ""
    assert refused.startswith("x.pt: ")
    assert message in refused


@pytest.mark.parametrize("module", ["os\x1b[2J", "os\r\n", "os\ud800", "os\u202e"], ids=ascii)
def test_a_message_can_be_printed_and_shows_no_control_characters_of_the_file(module):
    message = refusal(tw.program(tw.stack_name(module, "system"))) or ""
    assert "asks for" in message
    assert message.isprintable()


def test_a_name_is_never_looked_up():
    value = follow(tw.program(tw.name("no.such.module", "GPTConfig")))
    assert value == Global("no.such.module", "GPTConfig")


def test_negative_numbers_that_no_tensor_needs_have_a_sign_that_a_message_need_not_show():
    # 2**16 - 1 bytes of an integer would be 158,000 digits, which Python refuses to print.
    content = b"\x8a\xff" + b"\xff" * 254 + b"\x7f"
    with pytest.raises(CheckpointError, match="an integer that no tensor needs"):
        follow(tw.program(content))


# -- damage at large ---------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_random_bytes_are_a_value_or_refused(content):
    assert (refusal(b"\x80\2" + content) or "x.pt: ").startswith("x.pt: ")


PIECES = st.sampled_from(
    [
        *(item[0] for item in REFUSED.values()), *FOREIGN.values(), GOOD, RECORD, ORDERED, FLOATS,
        tw.REBUILD, FROM_TYPE, BLOCK, tw.text("a"), tw.text("storage"), tw.value({}), tw.value([]),
        tw.value(()), tw.number(0), tw.number(6), tw.number(2**40), tw.value(None), tw.value(True),
        pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.APPEND,
        pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.REDUCE, pickle.NEWOBJ,
        pickle.BUILD, pickle.BINPERSID, pickle.STACK_GLOBAL, pickle.MEMOIZE, tw.put(0), tw.put(1),
        tw.get(0), tw.get(1), b"\x95" + bytes(8), b"\x80\5",
    ]
)  # fmt: skip


@given(st.lists(PIECES, max_size=30))
def test_random_instructions_are_a_value_or_refused(pieces):
    assert (refusal(tw.program(*pieces)) or "x.pt: ").startswith("x.pt: ")


SOUND = tw.program(
    tw.dict_of(
        [
            (tw.text("a"), GOOD),
            (tw.text("b"), RECORD + tw.value({"n_head": 2, "bias": None}) + pickle.BUILD),
            (tw.text("c"), tw.value([1, 2.5, (True, "d")])),
        ]
    )
)


def test_every_cut_of_a_sound_pickle_is_refused():
    follow(SOUND)
    for size in range(len(SOUND)):
        with pytest.raises(CheckpointError, match=r"x\.pt: "):
            follow(SOUND[:size])


def test_every_byte_of_a_sound_pickle_changed_is_a_value_or_refused():
    for place in range(len(SOUND)):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            content = bytearray(SOUND)
            content[place] ^= change
            assert (refusal(bytes(content)) or "x.pt: ").startswith("x.pt: ")
