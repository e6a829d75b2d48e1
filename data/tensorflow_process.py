"""What needs TensorFlow, in a process of its own: its gigabyte, its threads and its hangs end with it.

`stream` names a generator function and gives what it yields there. The process is killed when its reader goes away,
and when it says nothing for too long. One that came to its end is kept for the next request, since TensorFlow and
seqio take seconds to import.
"""

import atexit
import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

HEAD = struct.Struct("<cI")
TOKENS, BYTES, NOTE, REFUSED, WRONG, END = b"T", b"B", b"J", b"R", b"W", b"E"
"""What a frame holds: int32 tokens, bytes, plain data as JSON, the words of a ValueError, the field and words of a
`Wrong`; nothing more comes."""
BUFFER_BYTES = 1 << 20
START_S = 120.0
"""The first item is waited for at least so long: TensorFlow is imported before it."""
LINES = 12
"""Of the process's last words, where it ends without an error of ours."""

Item = np.ndarray | bytes | dict[str, Any]
PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from data.tensorflow_process import serve; serve()"


class Wrong(ValueError):
    """(field, why): what a source's config says and cannot be done."""

    def __str__(self) -> str:
        field, why = self.args
        return f"data.{field} {why}."


class _Process:
    """One such process."""

    def __init__(self) -> None:
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
        self.path = path()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(self.path), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            bufsize=0,
            env=os.environ | quiet,
        )
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._ears, self._mouth = self._popen.stdin, self._popen.stdout

    def ask(self, function: str, arguments: Mapping[str, Any]) -> None:
        request = json.dumps({"function": function, "arguments": dict(arguments)}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # it is gone, which is noticed when it is listened to
            self._ears.write(request)

    def items(self, silence_s: float, doing: str) -> Iterator[Item]:
        handle, waiting, patience_s = self._mouth.fileno(), bytearray(), max(silence_s, START_S)
        while True:
            if not select.select([handle], [], [], patience_s)[0]:
                raise ValueError(
                    f"{doing}: nothing came for {patience_s:g} s, and the process was killed. TensorFlow hangs so "
                    "where Python is in its graphs (tf.py_function, tf.numpy_function, from_generator): do that work "
                    "before. If it is only slow, set a larger data.silence_s."
                )
            if not (found := os.read(handle, BUFFER_BYTES)):
                code = self._popen.wait()
                raise ValueError(f"{doing}: the process ended with code {code}. Its last words: {self._last_words()}")
            waiting += found
            at, patience_s = 0, silence_s
            while len(waiting) - at >= HEAD.size:
                kind, length = HEAD.unpack_from(waiting, at)
                if len(waiting) - at - HEAD.size < length:
                    break
                content = bytes(waiting[at + HEAD.size : at + HEAD.size + length])
                at += HEAD.size + length
                if kind == END:
                    return
                if kind == REFUSED:
                    raise ValueError(content.decode())
                if kind == WRONG:
                    raise Wrong(*json.loads(content))
                yield _item(kind, content)
            del waiting[:at]

    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        for file in (self._ears, self._mouth, self._said):
            file.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        return "\n".join(self._said.read().decode(errors="replace").splitlines()[-LINES:]) or "none"


_idle: list[_Process] = []
"""At most one, for the next request."""


def stream(function: str, arguments: Mapping[str, Any], *, silence_s: float, doing: str) -> Iterator[Item]:
    """What `module:function` yields there with these arguments (plain data).

    Raises: ValueError for a ValueError there (Wrong for Wrong), for a process that dies, and for one that is silent for
    `silence_s` seconds, in words that begin with `doing`.
    """
    if _idle and (_idle[0].path != path() or not _idle[0].is_alive()):
        rest()
    process = _idle.pop() if _idle else _Process()
    try:
        process.ask(function, arguments)
        yield from process.items(silence_s, doing)
    except BaseException:
        process.kill()
        raise
    if _idle:
        process.kill()
    else:
        _idle.append(process)


@atexit.register
def rest() -> None:
    """Ends the process that is kept."""
    while _idle:
        _idle.pop().kill()


def path() -> list[str]:
    """Where Python looks for modules, and last the folder that one is in, which main.py may lie elsewhere than."""
    found = [path or os.getcwd() for path in sys.path]
    return found if os.getcwd() in found else [*found, os.getcwd()]


def _item(kind: bytes, content: bytes) -> Item:
    if kind == TOKENS:
        return np.frombuffer(content, np.int32)
    return json.loads(content) if kind == NOTE else content


def serve() -> None:
    """The process: does what each line of its standard input asks for. What it prints goes to standard error."""
    _die_with(int(sys.argv[2]))
    mouth = os.fdopen(os.dup(1), "wb", BUFFER_BYTES)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        module, name = request["function"].split(":")
        try:
            for item in getattr(__import__(module, fromlist=[name]), name)(**request["arguments"]):
                _say(mouth, item)
            _frame(mouth, END, b"")
        except Wrong as wrong:
            _frame(mouth, WRONG, json.dumps(wrong.args).encode())
        except ValueError as error:
            _frame(mouth, REFUSED, str(error).encode())
        mouth.flush()
    os._exit(0)


def _say(mouth: IO[bytes], item: Item) -> None:
    if isinstance(item, np.ndarray):
        _frame(mouth, TOKENS, np.ascontiguousarray(item, np.int32).tobytes())
    elif isinstance(item, dict):
        _frame(mouth, NOTE, json.dumps(item).encode())
        mouth.flush()
    else:
        _frame(mouth, BYTES, item)


def _frame(mouth: IO[bytes], kind: bytes, content: bytes) -> None:
    mouth.write(HEAD.pack(kind, len(content)))
    mouth.write(content)


def _die_with(parent: int) -> None:
    """A killed reader takes this process with it, also where that hangs. Elsewhere than on Linux: at the next write."""
    if sys.platform == "linux":
        import ctypes
        import signal

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def tensorflow() -> Any:
    """TensorFlow, without GPUs and TPUs: JAX's are not its. Raises: ValueError if it is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ValueError("this needs TensorFlow, which is not installed: pip install 'mtx[seqio]'.") from error
    for kind in ("GPU", "TPU"):
        if tf.config.get_visible_devices(kind):
            tf.config.set_visible_devices([], kind)
    return tf
