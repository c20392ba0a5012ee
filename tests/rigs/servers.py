"""Real vLLM and SGLang on a loopback port: started, waited for, asked, counted, ended.

A server is one process group with one log. Every wait has a deadline that names what it waits for
and shows the end of the log; however a test ends, nothing of the server outlives the `with`
block.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
START_S = 420.0
ANSWER_S = 240.0
COUNTERS_S = 20.0
END_S = 20.0
POLL_S = 0.25
MARKER = "SPECFORGE_EXT_RIG"
"""Environment variable that every process of a server inherits, with the server's own value."""


class ServerFailed(RuntimeError):
    """A server did not start, answer or count; carries the end of its log."""


@dataclass(frozen=True)
class Counters:
    """Of speculative decoding, summed over requests.

    drafts: verify steps that had a draft. drafted: tokens proposed. accepted: of those, the ones
    that the target let stand. at[k]: drafts whose first k + 1 tokens were all accepted.
    """

    drafts: int
    drafted: int
    accepted: int
    at: tuple[int, ...]

    @property
    def length(self) -> float:
        """Tokens a verify step, bonus included: 1 + accepted / drafts."""
        return 1 + self.accepted / self.drafts


@dataclass(frozen=True)
class Answers:
    """tokens[i]: what follows prompt i. counters: None where the server had no draft."""

    tokens: tuple[tuple[int, ...], ...]
    counters: Counters | None


class Asked(Protocol):
    """A running server."""

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> Answers:
        """Continuations of exactly max_new_tokens ids (end tokens do not end them)."""
        ...


@dataclass(frozen=True)
class Process:
    """A server that is up. url: http://127.0.0.1:port."""

    url: str
    log: Path
    popen: subprocess.Popen[bytes]

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        """The JSON answer. ServerFailed when there is none within ANSWER_S, or it is an error."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(self._open(request))

    def get(self, path: str) -> str:
        return self._open(urllib.request.Request(self.url + path)).decode()

    def _open(self, request: urllib.request.Request) -> bytes:
        what = f"{request.get_method()} {request.full_url}"
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise ServerFailed(f"{what}: HTTP {error.code}: {said}\n{tail(self.log)}") from error
        except OSError as error:
            raise ServerFailed(f"{what}: {error}\n{tail(self.log)}") from error


def tail(log: Path, *, chars: int = 3000) -> str:
    return f"--- end of {log}\n{log.read_text(errors='replace')[-chars:]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    command: Callable[[int], Sequence[str]],
    *,
    environment: Mapping[str, str],
    log: Path,
    ready: str = "/health",
    start_s: float = START_S,
) -> Iterator[Process]:
    """Start `command(port)` and wait until GET `ready` answers 200.

    Its temporary files are in a directory of its own, which goes with it; so does what it left in
    shared memory, since servers that are ended do not always clear it away.
    """
    port, mark = free_port(), uuid.uuid4().hex
    # Not this process's environment: its PYTHONPATH and CUDA settings are none of the server's.
    inherited = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    # Not below the log: sockets are made there, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rig-") as temporary:
        with log.open("wb") as out:
            popen = subprocess.Popen(
                command(port),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**inherited, "TMPDIR": temporary, **environment, MARKER: mark},
            )
        server = Process(f"http://127.0.0.1:{port}", log, popen)
        try:
            _until_ready(server, ready, start_s)
            yield server
        finally:
            shared = {path for pid in marked(mark, popen.pid) for path in shared_files(pid)}
            _end(popen, mark)
            for path in shared:
                path.unlink(missing_ok=True)


def _until_ready(server: Process, path: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        code = server.popen.poll()
        if code is not None:
            raise ServerFailed(f"the server ended with {code} before {path}\n{tail(server.log)}")
        if _answers(server.url + path):
            return
        if time.monotonic() > until:
            raise ServerFailed(
                f"GET {server.url}{path}: not ready within {seconds:g} s\n{tail(server.log)}"
            )
        time.sleep(POLL_S)


def _answers(url: str) -> bool:
    """Refused until it listens, HTTP 503 until it is ready."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def _end(popen: subprocess.Popen[bytes], mark: str) -> None:
    """SIGTERM to the first process, then SIGKILL by pid to whatever carries the mark."""
    if popen.poll() is None:
        popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            popen.wait(timeout=END_S)
    until = time.monotonic() + END_S
    while left := marked(mark, popen.pid):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            raise ServerFailed(f"processes {left} of a server outlive SIGKILL by {END_S:g} s")
        popen.poll()  # reaps it, if it is among them
        time.sleep(0.05)
    popen.wait(timeout=END_S)


def marked(mark: str, session: int) -> list[int]:
    """Ids of living processes with this mark in their environment, or of this session.

    The mark finds those that left the session; the session finds those whose environment is gone
    from /proc because they wrote a title over it, as vLLM's and SGLang's workers do.
    """
    wanted, found = f"{MARKER}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended, or is another user's
            state, _, _, its_session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            here = int(its_session) == session
            if state != "Z" and (here or wanted in (folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
    return found


def shared_files(pid: int) -> set[Path]:
    """Files of /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it ended
        return set()
    found = re.findall(r" (/dev/shm/\S+)$", maps, re.MULTILINE)
    return {Path(path) for path in found}


def _each(
    ask: Callable[[Sequence[int]], Any], prompts: Sequence[Sequence[int]], together: int
) -> list[Any]:
    with ThreadPoolExecutor(together) as pool:
        return list(pool.map(ask, prompts))


# --- vLLM -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vllm:
    """A vLLM server. together: requests that are in flight at once."""

    process: Process
    model: str
    together: int = 8

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> Answers:
        before = vllm_counters(self.process.get("/metrics"))

        def ask(prompt: Sequence[int]) -> tuple[int, ...]:
            body = {
                "model": self.model,
                "prompt": list(prompt),
                "max_tokens": max_new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            return tuple(self.process.post("/v1/completions", body)["choices"][0]["token_ids"])

        tokens = tuple(_each(ask, prompts, self.together))
        return Answers(tokens, _difference(self._settled(), before))

    def _settled(self) -> Counters | None:
        """The counters once two looks agree: they are written after the answer is sent."""
        until = time.monotonic() + COUNTERS_S
        last = vllm_counters(self.process.get("/metrics"))
        while True:
            time.sleep(2 * POLL_S)
            now = vllm_counters(self.process.get("/metrics"))
            if now == last:
                return now
            if time.monotonic() > until:
                raise ServerFailed(f"/metrics: counters still move after {COUNTERS_S:g} s")
            last = now


def vllm_counters(metrics: str) -> Counters | None:
    """Of the text of /metrics; None if it has none, as without a draft."""
    found: dict[str, dict[int, int]] = {}
    pattern = re.compile(r"^vllm:spec_decode_(num_\w+?)_total\{([^}]*)\} (\S+)$", re.MULTILINE)
    for name, labels, value in pattern.findall(metrics):
        position = re.search(r'position="(\d+)"', labels)
        found.setdefault(name, {})[int(position[1]) if position else 0] = int(float(value))
    if not found:
        return None
    at = found["num_accepted_tokens_per_pos"]
    return Counters(
        drafts=found["num_drafts"][0],
        drafted=found["num_draft_tokens"][0],
        accepted=found["num_accepted_tokens"][0],
        at=tuple(at[k] for k in range(len(at))),
    )


def _difference(after: Counters | None, before: Counters | None) -> Counters | None:
    if after is None or before is None:
        return None
    return Counters(
        drafts=after.drafts - before.drafts,
        drafted=after.drafted - before.drafted,
        accepted=after.accepted - before.accepted,
        at=tuple(a - b for a, b in zip(after.at, before.at, strict=True)),
    )


@contextmanager
def vllm(
    venv: Path,
    target: Path,
    *,
    log: Path,
    speculative: Mapping[str, object] | None = None,
    dtype: str = "float32",
    more: Sequence[str] = (),
) -> Iterator[Vllm]:
    """`vllm serve`. speculative: --speculative-config, None for the target alone."""
    spec = ["--speculative-config", json.dumps(speculative)] if speculative else []

    def command(port: int) -> list[str]:
        return [
            str(venv / "bin" / "vllm"), "serve", str(target),
            "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager",
            "--max-model-len", "256", "--max-num-seqs", "8", "--block-size", "32",
            *spec, *more,
        ]  # fmt: skip

    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with running(command, environment=environment, log=log) as process:
        yield Vllm(process, str(target))


# --- SGLang -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sglang:
    """An SGLang server. together: requests that are in flight at once."""

    process: Process
    together: int = 8

    def greedy(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> Answers:
        def ask(prompt: Sequence[int]) -> Any:
            sampling = {"max_new_tokens": max_new_tokens, "temperature": 0, "ignore_eos": True}
            body = {"input_ids": list(prompt), "sampling_params": sampling}
            return self.process.post("/generate", body)

        said = _each(ask, prompts, self.together)
        tokens = tuple(tuple(answer["output_ids"]) for answer in said)
        return Answers(tokens, sglang_counters([answer["meta_info"] for answer in said]))


def sglang_counters(metas: Sequence[Mapping[str, Any]]) -> Counters | None:
    """Of the requests' meta_info; None if the server has no draft.

    spec_accept_length is not read: it is completion tokens / verify steps, which counts the token
    that prefill says.
    """
    if "spec_verify_ct" not in metas[0]:
        return None
    drafts = sum(meta["spec_verify_ct"] for meta in metas)
    drafted = sum(meta["spec_num_proposed_drafts"] for meta in metas)
    at = [0] * (drafted // drafts)
    for meta in metas:  # whose histograms end at the largest count that occurred
        for accepted, steps in enumerate(meta["spec_correct_drafts_histogram"]):
            for k in range(accepted):
                at[k] += steps
    return Counters(
        drafts=drafts,
        drafted=drafted,
        accepted=sum(meta["spec_num_correct_drafts"] for meta in metas),
        at=tuple(at),
    )


@contextmanager
def sglang(
    venv: Path,
    target: Path,
    *,
    log: Path,
    speculative: Sequence[str] = (),
    block: bool = False,
    dtype: str = "float32",
    more: Sequence[str] = (),
) -> Iterator[Sglang]:
    """`sglang.launch_server`. speculative: its --speculative-* arguments, none for the target
    alone. block: the draft proposes blocks, which the CPU engine does by our plugin only.
    """
    # Speculation on a CPU is there for this backend only. Named as the general one it would be
    # dropped on a machine without AMX; named for each phase it stays.
    phases = ("--prefill-attention-backend", "--decode-attention-backend")
    attention = [word for phase in phases for word in (phase, "intel_amx")] if speculative else []

    def command(port: int) -> list[str]:
        return [
            str(venv / "bin" / "python"), "-m", "sglang.launch_server",
            "--model-path", str(target), "--device", "cpu", "--dtype", dtype,
            "--host", "127.0.0.1", "--port", str(port),
            "--attention-backend", "torch_native", *attention, "--sampling-backend", "pytorch",
            "--disable-radix-cache", "--chunked-prefill-size", "-1",
            "--disable-cuda-graph", "--disable-overlap-schedule", "--skip-server-warmup",
            "--max-total-tokens", "8192", "--max-running-requests", "8",
            "--mem-fraction-static", "0.3",
            *speculative, *more,
        ]  # fmt: skip

    beside = ("stand_ins", "device_gates") if block else ("stand_ins",)
    environment = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "PYTHONPATH": os.pathsep.join(str(HERE / "sglang" / name) for name in beside),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **({"TRITON_INTERPRET": "1"} if block else {}),  # they call small Triton kernels
    }
    with running(command, environment=environment, log=log) as process:
        yield Sglang(process)
