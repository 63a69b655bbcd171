"""Ask a served model by the Open Inference Protocol v2 over HTTP (KServe's predict protocol, as Triton and MLServer speak it).

Believes nothing that the server says: name, version, shapes, counts, sizes and times are checked, and no redirect is followed.
Where the server has the binary extension tensors go as bytes, else as JSON, which holds every float32 exactly too.
"""

import json
import socket
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from itertools import count
from threading import Event, Timer
from time import monotonic
from typing import Any, Final, NoReturn
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from chexnet_deploy.errors import SessionError, SpecError
from chexnet_deploy.runtime.contract import Contract
from chexnet_deploy.runtime.sessions.foreign import check_shape

_HEADER_LENGTH: Final = "Inference-Header-Content-Length"
_MAX_ANSWER_BYTES: Final = 1 << 24  # 256 findings of 256 images are 2 MB of JSON; a server may send other outputs too
_MAX_SHOWN: Final = 200
_DTYPES: Final = {"UINT8": "uint8", "INT8": "int8", "FP16": "float16", "FP32": "float32", "FP64": "float64"}
_LITTLE: Final = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


class EndpointTransport:
    """A model at `http://HOST/v2/models/NAME`, or with `/versions/VERSION` after it. Safe to call from several threads.

    Each request has a connection of its own, which a server may therefore close as it likes.

    Args:
        url: of the model.
        contract: what it takes and answers, how many images at once, and how long it may take.

    Raises:
        SpecError: the URL is none of a model.
        SessionError: the server can't be asked, or describes another model than the contract.
    """

    is_remote = True

    def __init__(self, url: str, contract: Contract) -> None:
        self.name = url
        self._host, self._path, self._model = split_url(url)
        self._connect = HTTPSConnection if url.startswith("https:") else HTTPConnection
        self._deadline_s = contract.endpoint.deadline_s
        self._numbers = count(1)
        self._who: tuple[object, object] | None = None
        server = self._ask_json("GET", self._path.partition("/models/")[0])
        extensions = server.get("extensions")
        self._is_binary = isinstance(extensions, list) and "binary_tensor_data" in extensions
        described = self._ask_json("GET", self._path)
        self._check_name(described.get("name"))
        taken = self._describe(described, "inputs", contract.input.name)
        if taken.get("datatype") not in _DTYPES:
            self._fail(f"an input of {taken.get('datatype')!a}", f"one of {', '.join(_DTYPES)}", "serve it so")
        self._datatype = str(taken["datatype"])
        self.dtype = np.dtype(_DTYPES[self._datatype])
        self._input = str(taken["name"])
        self._output = str(self._describe(described, "outputs", contract.output.name)["name"])
        shape = taken.get("shape")
        fixed = check_shape(url, shape if isinstance(shape, list) else [], contract)
        self.is_fixed, self.batch = fixed is not None, fixed or contract.endpoint.batch

    def ask(self, tensor: NDArray[Any]) -> NDArray[Any]:
        """Ask the server; see Transport.ask."""
        number = str(next(self._numbers))
        entry: dict[str, Any] = {"name": self._input, "shape": list(tensor.shape), "datatype": self._datatype}
        wanted: dict[str, Any] = {"name": self._output}
        binary, headers = b"", {"Content-Type": "application/json"}
        if self._is_binary:
            binary = tensor.astype(tensor.dtype.newbyteorder("<")).tobytes()
            entry["parameters"] = {"binary_data_size": len(binary)}
            wanted["parameters"] = {"binary_data": True}
        else:
            entry["data"] = tensor.ravel().tolist()
        header = json.dumps({"id": number, "inputs": [entry], "outputs": [wanted]}).encode()
        if self._is_binary:
            headers = {"Content-Type": "application/octet-stream", _HEADER_LENGTH: str(len(header))}
        got, content = self._exchange("POST", f"{self._path}/infer", header + binary, headers)
        length = got.get(_HEADER_LENGTH.lower())
        n_header = len(content) if length is None else int(length) if length.isdecimal() else -1
        if not 0 < n_header <= len(content):
            self._fail(
                f"{_HEADER_LENGTH} {length!a} of {len(content):,} bytes", "a number within them", "mend the server"
            )
        answer = self._parse(content[:n_header])
        self._check_name(answer.get("model_name"))
        if answer.get("id", number) != number:
            self._fail("the answer to another request", f"that to id {number}", "mend the server")
        parameters = answer.get("parameters")
        who = (answer.get("model_version"), parameters.get("bundle") if isinstance(parameters, dict) else None)
        self._who = self._who or who
        if who != self._who:
            self._fail(
                f"answers of model {self._who} and then of {who}", "one model", "measure while nobody changes it"
            )
        return self._read_output(self._pick(answer, "outputs", self._output), content[n_header:], answer)

    def conv_types(self, tensor: NDArray[Any]) -> Mapping[str, int]:
        """Return nothing: what a server runs it does not tell."""
        return {}

    def close(self) -> None:
        """Do nothing: no connection is kept."""

    def _read_output(self, output: Mapping[str, Any], binary: bytes, answer: Mapping[str, Any]) -> NDArray[Any]:
        shape, datatype = output.get("shape"), output.get("datatype")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
            self._fail("an output whose shape is no list of numbers", "its shape", "mend the server")
        if datatype not in _LITTLE:
            self._fail(f"an output of {datatype!a}", f"one of {', '.join(_LITTLE)}", "correct output.name")
        if "data" in output:
            try:
                values = np.array(output["data"])
            except ValueError:  # lists of several lengths
                values = np.array([None])
            if values.dtype.kind not in "iuf":  # text, true, null
                self._fail("data that are not all numbers", "numbers alone", "mend the server or the model")
            values = values.astype(np.float64)
        else:
            begin = 0
            for other in answer["outputs"]:  # outputs' bytes follow one another in the order of the list
                size = self._binary_size(other)
                if other is output:
                    break
                begin += size
            if begin + size > len(binary) or size % int(_LITTLE[datatype][2]):
                self._fail(f"{len(binary):,} bytes behind the JSON", f"{begin + size:,}", "mend the server")
            values = np.frombuffer(binary[begin : begin + size], _LITTLE[datatype])
        if values.size != int(np.prod(shape, dtype=np.int64)):
            self._fail(f"{values.size:,} values of the shape {shape}", "as many as the shape says", "mend the server")
        return values.reshape(shape)

    def _binary_size(self, output: Mapping[str, Any]) -> int:
        parameters = output.get("parameters")
        size = parameters.get("binary_data_size", 0) if isinstance(parameters, dict) else 0
        if type(size) is not int or size < 0:
            self._fail(f"binary_data_size {size!a}", "a number of bytes", "mend the server")
        return size

    def _describe(self, described: Mapping[str, Any], kind: str, wanted: str | None) -> Mapping[str, Any]:
        found = described.get(kind)
        if wanted is None and isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
            wanted = str(found[0].get("name"))
        return self._pick(described, kind, wanted)

    def _pick(self, record: Mapping[str, Any], kind: str, wanted: str | None) -> Mapping[str, Any]:
        found = record.get(kind)
        entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
        chosen = [entry for entry in entries if entry.get("name") == wanted]
        if len(chosen) != 1 or len(entries) != len(found or []):
            names = ", ".join(ascii(entry.get("name"))[:_MAX_SHOWN] for entry in entries[:5]) or "none"
            asked = "one named in the contract" if wanted is None else f"{wanted!a} once"
            self._fail(f"{kind} {names}", asked, f"correct {kind[:-1]}.name, or the server")
        return chosen[0]

    def _check_name(self, found: object) -> None:
        if found != self._model:
            self._fail(
                f"the model {found!a:.{_MAX_SHOWN}}", f"{self._model!a}, as its URL says", "check what answers there"
            )

    def _ask_json(self, method: str, path: str) -> Mapping[str, Any]:
        return self._parse(self._exchange(method, path, None, {})[1])

    def _parse(self, content: bytes) -> Mapping[str, Any]:
        try:
            found = json.loads(content, parse_constant=_refuse_constant)
        except _NotFiniteError:
            self._fail("NaN or infinity in an answer", "numbers", "don't use this model; mend it first")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self._fail(
                f"{content[:_MAX_SHOWN]!a}",
                "a JSON object",
                "check that the Open Inference Protocol v2 is spoken there",
            )
        answer: Mapping[str, Any] = found
        return answer

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[Mapping[str, str], bytes]:
        """Return one answer's headers by their small names, and its body.

        Raises:
            SessionError: none came in time, whole, of a sane size and with status 200.
        """
        connection = self._connect(self._host, timeout=self._deadline_s)
        is_late = Event()
        began_s = monotonic()

        def cut(sock: socket.socket) -> None:
            is_late.set()
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it is closed already

        timer: Timer | None = None
        try:
            connection.connect()
            # A socket's own timeout starts again with every byte: a server that sends one a second would never be late.
            left_s = max(0.0, self._deadline_s - (monotonic() - began_s))
            timer = Timer(left_s, cut, [connection.sock])
            timer.daemon = True
            timer.start()
            connection.request(method, path, body, {**headers, "Accept-Encoding": "identity", "Connection": "close"})
            with connection.getresponse() as response:
                status, got = response.status, {name.lower(): value for name, value in response.getheaders()}
                length = response.length
                if length is not None and length > _MAX_ANSWER_BYTES:
                    self._fail(f"an answer of {length:,} bytes", f"{_MAX_ANSWER_BYTES:,} at most", "mend the server")
                # Read without an amount it is an error if it is cut short.
                content = response.read() if length is not None else response.read(_MAX_ANSWER_BYTES + 1)
            if is_late.is_set():
                raise TimeoutError
        except (OSError, HTTPException) as err:
            if is_late.is_set() or isinstance(err, TimeoutError):
                self._fail(
                    f"no whole answer to {method} {path} in {self._deadline_s:g} s",
                    "one by then",
                    "find out what it waits for, or set endpoint.deadline_s",
                    err,
                )
            what = "an answer cut short" if isinstance(err, IncompleteRead) else f"{type(err).__name__} ({err})"
            self._fail(f"{what} to {method} {path}", "an answer", "check that the server runs, and its log", err)
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        if len(content) > _MAX_ANSWER_BYTES:
            self._fail("an answer without end", f"{_MAX_ANSWER_BYTES:,} bytes at most", "mend the server")
        if status != 200:
            to = f" to {got.get('location')!a}" if 300 <= status < 400 else f" {content[:_MAX_SHOWN]!a}"
            next_step = "give the final URL" if 300 <= status < 400 else "check the URL and the server's log"
            self._fail(f"status {status}{to} to {method} {path}", "200", next_step)
        if got.get("content-encoding", "identity") != "identity":
            self._fail(f"an answer encoded as {got['content-encoding']!a}", "a plain one", "mend the server")
        return got, content

    def _fail(self, found: str, needed: str, next_step: str, cause: BaseException | None = None) -> NoReturn:
        raise SessionError(f"{self.name}: found {found}; needed {needed}. Next: {next_step}.") from cause


def split_url(url: str) -> tuple[str, str, str]:
    """Return a model URL's host with its port, path, and the model's name.

    Raises:
        SpecError: it is no URL of a model.
    """
    try:
        parts = urlsplit(url)
        is_host = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_host = False
    words = parts.path.rstrip("/").split("/") if is_host else []
    if words[-2:-1] == ["versions"]:
        words = words[:-2]
    if (
        words[-3:-1] != ["v2", "models"]
        or not words[-1]
        or parts.username is not None
        or parts.query
        or parts.fragment
        or not url.isascii()
        or not url.isprintable()
        or " " in url
    ):
        raise SpecError(
            f"found {url!a}, needed http://HOST:PORT/v2/models/NAME, without a password or a question in it. Correct it."
        )
    return parts.netloc, parts.path.rstrip("/"), words[-1]


class _NotFiniteError(ValueError):
    pass


def _refuse_constant(name: str) -> float:
    raise _NotFiniteError(name)
