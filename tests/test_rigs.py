"""The rigs' own parts, without a real server: builds, launcher, counters, stand-in kernels."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rigs import build, rigged_models, servers
from rigs.build import BuildFailed
from rigs.cases import CASES, Case
from rigs.checks import check_counters, check_text
from rigs.rigged_models import RiggedTarget
from rigs.servers import Answers, Counters, ServerFailed
from rigs.trained import Trained, measure, output_dir
from specforge_ext.methods import METHODS

# --- environments -----------------------------------------------------------------------------


def script(text: str) -> list[list[str]]:
    """One command, to which `build` adds the environment's path."""
    return [["bash", "-c", f'mkdir -p "$0"; {text}']]


COUNT_RUNS = 'echo run >> "$0/../runs"'


def test_a_complete_environment_is_used_again(tmp_path: Path) -> None:
    venv = tmp_path / "environments" / "rig"
    assert build.build(venv, script(COUNT_RUNS)) is True
    assert build.is_built(venv)
    assert build.build(venv, script(COUNT_RUNS)) is False
    assert (venv.parent / "runs").read_text() == "run\n"


def test_what_a_failed_install_left_is_made_anew(tmp_path: Path) -> None:
    venv = tmp_path / "rig"
    with pytest.raises(BuildFailed, match=r"rig: bash ended with 3; log in .*\nno such wheel"):
        build.build(venv, script('touch "$0/half"; echo no such wheel; exit 3'))
    assert (venv / "half").exists() and not build.is_built(venv)
    assert build.build(venv, script(COUNT_RUNS)) is True
    assert not (venv / "half").exists()


def test_an_install_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    hangs = script('sleep 300 & echo $! > "$0/../child"; wait')
    with pytest.raises(BuildFailed, match=r"rig: bash took over 2 s; log in .*rig.log"):
        build.build(tmp_path / "rig", hangs, deadline_s=2.0)
    child = int((tmp_path / "child").read_text())
    assert wait_for(lambda: not alive(child), seconds=5.0)


def test_two_builders_take_turns(tmp_path: Path) -> None:
    """While one builds, another waits, and then finds what it wanted."""
    venv, slow = tmp_path / "rig", script(f'touch "$0/../begun"; sleep 0.5; {COUNT_RUNS}')
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(build.build, venv, slow)
        assert wait_for((tmp_path / "begun").exists, seconds=5.0)
        held = r"rig.lock: another process has held this lock for 0.1 s"
        with pytest.raises(BuildFailed, match=held):
            build.build(venv, slow, deadline_s=0.1)
        assert build.build(venv, slow, deadline_s=20.0) is False
        assert first.result() is True
    assert (tmp_path / "runs").read_text() == "run\n"


def test_the_key_changes_with_what_the_install_reads(tmp_path: Path) -> None:
    (tmp_path / "install.sh").write_text("a")
    (tmp_path / "below").mkdir()
    first = build.key("rig", tmp_path)
    (tmp_path / "below" / "plugin.py").write_text("read in place")
    assert build.key("rig", tmp_path) == first
    (tmp_path / "install.sh").write_text("b")
    assert build.key("rig", tmp_path) != first


def test_environments_lie_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECFORGE_EXT_RIGS", "/somewhere")
    assert build.environment("vllm").parent == Path("/somewhere")
    with pytest.raises(ValueError, match="rig: wanted one of vllm, sglang, got 'tgi'"):
        build.environment("tgi")
    script = build.HERE.parents[1] / build.command_to_build("vllm").split()[1]
    assert script.is_file()


# --- the launcher -----------------------------------------------------------------------------

SERVER = """
import http.server, mmap, os, pathlib, signal, subprocess, sys, time
shared = open(f"/dev/shm/specforge-ext-test-{os.getpid()}", "w+b")
shared.truncate(4096)
mapped = mmap.mmap(shared.fileno(), 4096)
pathlib.Path(os.environ["TMPDIR"], "left").touch()
print("temporary", os.environ["TMPDIR"], "shared", shared.name)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def do_POST(self):
        self.send_response(500)
        self.end_headers()
        self.wfile.write(b"out of tokens")
titled = subprocess.Popen(["sleep", "300"], env={})  # as if a title had been written over it
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("child", child.pid, "titled", titled.pid, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else signal.SIG_DFL)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def launch(
    log: Path, text: str, *more: str, start_s: float = 20.0, ready: str = "/health"
) -> AbstractContextManager[servers.Process]:
    return servers.running(
        lambda port: [sys.executable, "-c", text, str(port), *more],
        environment={},
        log=log,
        ready=ready,
        start_s=start_s,
    )


@pytest.mark.parametrize("manner", ["polite", "deaf"])
def test_nothing_of_a_server_outlives_it(
    manner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "END_S", 2.0)
    with launch(tmp_path / "log", SERVER, manner) as server:
        _, temporary, _, shared, _, child, _, titled = (tmp_path / "log").read_text().split()[:8]
        assert alive(int(child)) and server.get("/health") == ""
        assert Path(temporary, "left").exists() and Path(shared).exists()
        with pytest.raises(
            ServerFailed, match=r"POST http://127.0.0.1:\d+/x: HTTP 500: out of tokens"
        ):
            server.post("/x", {})
    assert server.popen.poll() is not None
    assert wait_for(lambda: not alive(int(child)) and not alive(int(titled)), seconds=5.0)
    assert not Path(temporary).exists() and not Path(shared).exists()
    with pytest.raises(ServerFailed, match=r"GET .*/health: .*refused"):
        server.get("/health")


def test_a_server_that_ends_before_it_is_ready(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailed, match=r"ended with 7 before /health\n--- end of .*\nno memory"),
        launch(tmp_path / "log", "print('no memory'); raise SystemExit(7)"),
    ):
        pass


def test_a_server_that_is_never_ready(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerFailed, match=r"/ready: not ready within 2 s\n.*\ntemporary"),
        launch(tmp_path / "log", SERVER, "polite", ready="/ready", start_s=2.0) as server,
    ):
        pytest.fail(f"{server} said that it was ready")
    child = int((tmp_path / "log").read_text().split()[5])
    assert wait_for(lambda: not alive(child), seconds=5.0)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(done: Callable[[], bool], *, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(done())


# --- counters ---------------------------------------------------------------------------------


def test_counters_of_vllm() -> None:
    labels = 'engine="0",model_name="m"'
    text = "\n".join(
        [
            "# HELP vllm:spec_decode_num_drafts_total Number of drafts.",
            f"vllm:spec_decode_num_drafts_total{{{labels}}} 10.0",
            f"vllm:spec_decode_num_drafts_created{{{labels}}} 1.7e+09",
            f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} 20.0",
            f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} 9.0",
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="1"}} 2.0',
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="0"}} 7.0',
        ]
    )
    counters = servers.vllm_counters(text)
    assert counters == Counters(drafts=10, drafted=20, accepted=9, at=(7, 2))
    assert counters.length == 1.9
    assert servers.vllm_counters("vllm:num_requests_running 0.0") is None


def test_counters_of_sglang() -> None:
    def meta(histogram: list[int]) -> dict[str, object]:
        steps = sum(histogram)
        return {
            "spec_verify_ct": steps,
            "spec_num_proposed_drafts": 3 * steps,
            "spec_num_correct_drafts": sum(k * n for k, n in enumerate(histogram)),
            "spec_correct_drafts_histogram": histogram,
        }

    counters = servers.sglang_counters([meta([2, 1]), meta([0, 1, 4])])
    assert counters == Counters(drafts=8, drafted=24, accepted=10, at=(6, 4, 0))
    assert servers.sglang_counters([{"completion_tokens": 3}]) is None


def test_how_a_case_is_served() -> None:
    case = Case("x", depth=4, vllm="eagle3", sglang="EAGLE3")
    assert case.vllm_config("d") == {"method": "eagle3", "model": "d", "num_speculative_tokens": 4}
    assert Case("z", depth=4, vllm="eagle3", parallel=True).vllm_config("d")["parallel_drafting"]
    words = case.sglang_arguments("d")
    assert dict(zip(words[::2], words[1::2], strict=True)) == {
        "--speculative-algorithm": "EAGLE3",
        "--speculative-draft-model-path": "d",
        "--speculative-num-draft-tokens": "5",
        "--speculative-num-steps": "4",
        "--speculative-eagle-topk": "1",
    }
    block = Case("y", depth=4, sglang="DFLASH", block=True).sglang_arguments("d")
    assert "--speculative-eagle-topk" not in block
    assert len({case.name for case in CASES}) == len(CASES)


# --- rigged models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cycle(tmp_path_factory: pytest.TempPathFactory) -> tuple[RiggedTarget, Trained]:
    folder = tmp_path_factory.mktemp("rigged")
    target = rigged_models.cycle_target(folder / "cycle")
    path = rigged_models.cycle_eagle3(target.path, folder / "eagle3")
    method = METHODS.get("eagle3")(METHODS.get("eagle3").Config())
    engine = rigged_models.open_target(target.path)
    prompts = [torch.tensor(prompt) for prompt in rigged_models.PROMPTS]
    return target, measure(
        engine,
        method,
        {"vllm": path, "sglang": path},
        prompts,
        target=target.path,
        depth=3,
        max_new_tokens=24,
    )


def test_our_evaluator_counts_the_rigged_chain_as_known(
    cycle: tuple[RiggedTarget, Trained],
) -> None:
    target, measured = cycle
    result = measured.result
    for prompt, said in zip(rigged_models.PROMPTS, result.tokens, strict=True):
        assert tuple(said.tolist()) == target.greedy(prompt, 24)
    assert result.steps.tolist() == [12, 12, 12]
    assert torch.equal(result.round_tokens, 2 * result.rounds)
    assert result.accepted_at.sum(0).tolist() == [int(result.rounds.sum()), 0, 0]


def test_our_evaluator_counts_the_rigged_correction_as_known(tmp_path: Path) -> None:
    target = rigged_models.cycle_target(tmp_path / "cycle")
    path = rigged_models.cycle_domino(target.path, tmp_path / "domino", block_size=4)
    measured = measure(
        rigged_models.open_target(target.path),
        rigged_models.domino_method(4),
        {"sglang": path},
        [torch.tensor(prompt) for prompt in rigged_models.PROMPTS],
        target=target.path,
        depth=3,
        max_new_tokens=24,
    )
    result = measured.result
    for prompt, said in zip(rigged_models.PROMPTS, result.tokens, strict=True):
        assert tuple(said.tolist()) == target.greedy(prompt, 24)
    assert result.accepted_at.sum(0).tolist() == [int(result.rounds.sum())] * 3


def test_what_the_rigs_would_refuse(cycle: tuple[RiggedTarget, Trained]) -> None:
    target, measured = cycle
    text = tuple(target.greedy(prompt, 24) for prompt in rigged_models.PROMPTS)
    known = Counters(drafts=36, drafted=108, accepted=36, at=(36, 0, 0))
    check_text(measured, Answers(text, known))
    check_counters(measured, Answers(text, known))
    other = ((*text[0][:23], 5), *text[1:])
    with pytest.raises(AssertionError, match="1 DIFFER; first: prompt 0, token 23"):
        check_text(measured, Answers(other, known))
    for counters in (
        Counters(drafts=36, drafted=108, accepted=35, at=(35, 0, 0)),  # outside the interval
        Counters(drafts=38, drafted=114, accepted=38, at=(38, 0, 0)),  # too many steps
        Counters(drafts=36, drafted=72, accepted=36, at=(36, 0)),  # another depth
        Counters(drafts=36, drafted=108, accepted=36, at=(30, 4, 2)),  # at other positions
    ):
        with pytest.raises(AssertionError):
            check_counters(measured, Answers(text, counters))


def test_a_run_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECFORGE_EXT_DEMO_OUTPUT", str(tmp_path))
    with pytest.raises(ValueError, match="wanted the output_dir of a finished run, got /"):
        output_dir(Case("eagle3", depth=4))


# --- the stand-in of sgl_kernel ---------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    path = build.HERE / "sglang" / "stand_ins" / "sgl_kernel" / "__init__.py"
    spec = importlib.util.spec_from_file_location("sgl_kernel_stand_in", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attention(q, k, v, seen):
    """Definition in float64: one query at a time, heads [q heads per kv head] together."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    groups = q.shape[1] // k.shape[1]
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = (x[seen[i], h // groups].double() for x in (k, v))
            out[i, h] = (q[i, h].double() @ keys.T * 0.5).softmax(0) @ values
    return out


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("is_causal", [True, False])
def test_extend_attention(kernels: ModuleType, window: int, is_causal: bool) -> None:
    """Two requests of other lengths, their slots scattered; slots of nobody hold NaN."""
    torch.manual_seed(0)
    lengths, fresh = torch.tensor([7, 4]), torch.tensor([3, 4])
    k_cache, v_cache = torch.full((2, 40, 2, 8), float("nan"))
    slots = torch.randperm(40)[:11]
    k_cache[slots], v_cache[slots] = torch.randn(2, 11, 2, 8)
    pool = torch.zeros(5, 16, dtype=torch.int32)
    pool[3, :7], pool[1, :4] = slots[:7].int(), slots[7:].int()
    q, out = torch.randn(7, 4, 8), torch.zeros(7, 4, 8)
    kernels.extend_attention_cpu(
        q, None, None, out, k_cache, v_cache, 1.0, 1.0, pool, torch.tensor([3, 1]), lengths, fresh,
        torch.tensor([0, 3]), 4, 0.5, 0.0, False, window, is_causal=is_causal,
    )  # fmt: skip
    for begin, row, n, m in ((0, 3, 7, 3), (3, 1, 4, 4)):
        places, mine = torch.arange(n), pool[row, :n].long()
        at = places[n - m :, None]
        seen = places <= at if is_causal else torch.ones(m, n, dtype=torch.bool)
        seen = seen & (places > at - window) if window else seen
        wanted = attention(q[begin : begin + m], k_cache[mine], v_cache[mine], seen)
        torch.testing.assert_close(out[begin : begin + m].double(), wanted, rtol=1e-5, atol=1e-6)


def test_decode_attention_caches_the_new_token_first(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    k_cache, v_cache = torch.randn(2, 12, 1, 4)
    pool = torch.tensor([[5, 3, 9, 0], [1, 2, 0, 0]], dtype=torch.int32)
    k, v, q = torch.randn(3, 2, 1, 4)
    q, out = q.repeat(1, 2, 1), torch.zeros(2, 2, 4)
    kernels.decode_attention_cpu(
        q, k_cache, v_cache, 1.0, 1.0, out, k, v, torch.tensor([9, 2]), None, pool,
        torch.tensor([0, 1]), torch.tensor([3, 2]), 0.5, 0.0,
    )  # fmt: skip
    assert torch.equal(k_cache[[9, 2]], k) and torch.equal(v_cache[[9, 2]], v)
    for b, mine in enumerate(([5, 3, 9], [1, 2])):
        seen = torch.ones(1, len(mine), dtype=torch.bool)
        wanted = attention(q[b : b + 1], k_cache[mine], v_cache[mine], seen)[0]
        torch.testing.assert_close(out[b].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_verify_step(kernels: ModuleType) -> None:
    """Three requests, of which the target accepts 0, 2 and all 3 drafted tokens."""
    seq_lens = torch.tensor([10, 20, 30])
    index, child, sibling = (torch.full((3, 4), 99) for _ in range(3))
    positions = torch.zeros(12, dtype=torch.int64)
    kernels.build_tree_kernel_efficient_cpu(
        None, None, seq_lens, None, positions, index, child, sibling, 1, 3, 4, 1
    )
    assert positions.view(3, 4)[:, 0].tolist() == [10, 20, 30]
    assert positions.view(3, 4)[2].tolist() == [30, 31, 32, 33]
    assert index.flatten().tolist() == list(range(12))
    assert child[1].tolist() == [1, 2, 3, -1] and (sibling == -1).all()

    drafted = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    said = torch.tensor([[9, 3, 4, 5], [2, 3, 8, 5], [2, 3, 4, 5]])
    predicts = torch.full((12,), -7, dtype=torch.int32)
    accepted_rows = torch.full((3, 4), -1, dtype=torch.int32)
    count = torch.zeros(3, dtype=torch.int32)
    kernels.verify_tree_greedy_cpu(
        predicts, accepted_rows, count, drafted, index, child, sibling, said
    )
    assert count.tolist() == [0, 2, 3]
    assert accepted_rows.tolist() == [[0, -1, -1, -1], [4, 5, 6, -1], [8, 9, 10, 11]]
    assert predicts.tolist() == [9, -7, -7, -7, 2, 3, 8, -7, 2, 3, 4, 5]

    bonus = torch.zeros(3, dtype=torch.int64)
    kernels.fill_bonus_tokens_cpu(predicts, count + 1, bonus, 4)
    assert bonus.tolist() == [9, 8, 5]
    slots, packed = torch.arange(100, 112), torch.zeros(12, dtype=torch.int64)
    kernels.fill_accept_out_cache_loc_cpu(accepted_rows, slots, packed)
    assert packed[:8].tolist() == [100, 104, 105, 106, 108, 109, 110, 111]


def test_slots(kernels: ModuleType) -> None:
    pool = torch.zeros(3, 8, dtype=torch.int32)
    requests, start, end = torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([4, 5])
    slots = torch.tensor([11, 12, 13, 21, 22])
    kernels.assign_req_to_token_pool_cpu(requests, pool, start, end, slots, 8)
    assert pool[2].tolist() == [0, 11, 12, 13, 0, 0, 0, 0] and pool[0, 3:5].tolist() == [21, 22]
    read = torch.zeros(5, dtype=torch.int64)
    kernels.assign_extend_cache_locs_cpu(requests, pool, start, end, read, 8)
    assert torch.equal(read, slots)
    pair = torch.zeros(4, dtype=torch.int64)
    kernels.assign_draft_cache_locs_contiguous_cpu(requests, pool, start, pair, 8, 1, 2)
    assert pair.tolist() == [11, 12, 21, 22]
    draft = kernels.build_draft_decode_metadata_cpu(pool, requests, start, 1, 2, 8)
    assert torch.equal(draft, pool[[2, 0]])
    ids = torch.tensor([1, 2, 3, 4, 5])
    kernels.rotate_input_ids_cpu(
        ids, torch.tensor([0, 3]), torch.tensor([3, 2]), torch.tensor([[8], [9]])
    )
    assert ids.tolist() == [2, 3, 8, 5, 9]
    rows = torch.arange(12.0).view(4, 3)
    kernels.copy_all_layer_kv_cache_cpu(
        torch.tensor([rows.data_ptr()]),
        torch.tensor([12]),
        torch.tensor([0, 1]),
        torch.tensor([1, 3]),
    )
    assert rows[:, 0].tolist() == [3.0, 9.0, 6.0, 9.0]


def test_what_the_stand_in_is_not(kernels: ModuleType) -> None:
    with pytest.raises(NotImplementedError, match="sgl_kernel stand-in: moe_align is not in it"):
        kernels.moe_align(3)
    tensors = [torch.zeros(1)] * 8
    with pytest.raises(NotImplementedError, match="wants top-k 1, a chain, got 4"):
        kernels.build_tree_kernel_efficient_cpu(*tensors, 4, 3, 4, 1)
    with pytest.raises(NotImplementedError, match="wants top-k 1, a chain, got 2"):
        kernels.build_draft_decode_metadata_cpu(*tensors[:3], 2, 3, 8)
    siblings = torch.zeros(1, 4, dtype=torch.int64)
    grid = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="verify_tree_greedy_cpu wants a chain"):
        kernels.verify_tree_greedy_cpu(grid, grid, grid, grid, grid, grid, siblings, grid)
    shared = (*[None] * 6, 1.0, 1.0, *[None] * 3)
    with pytest.raises(NotImplementedError, match="no scales, logit cap, cross attention or sinks"):
        kernels.extend_attention_cpu(*shared, None, None, 1, 1.0, 30.0, False, 0)
    with pytest.raises(NotImplementedError, match="extend_attention_cpu wants no tree mask"):
        kernels.extend_attention_cpu(
            *shared, None, None, 1, 1.0, 0.0, False, 0, tree_mask=torch.ones(1)
        )


def test_the_device_gates_are_installed_as_a_plugin() -> None:
    """Found by SGLang's own look-up, importlib's entry points, when the folder is on the path."""
    say = (
        "from importlib.metadata import entry_points as e;"
        "[p] = e(group='sglang.srt.plugins'); print(p.value)"
    )
    folder = build.HERE / "sglang" / "device_gates"
    said = subprocess.run(
        [sys.executable, "-c", say], env={"PYTHONPATH": str(folder)}, capture_output=True, text=True
    )
    assert said.stdout.strip() == "specforge_ext_device_gates:register", said.stderr
    assert (folder / f"{said.stdout.split(':')[0]}.py").is_file()
