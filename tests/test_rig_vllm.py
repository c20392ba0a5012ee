"""Exported drafts in real vLLM: text, counters, a rigged pair. See docs/serving.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from rigs import rigged_models, servers
from rigs.cases import VLLM, Case
from rigs.checks import built, check_counters, check_text
from rigs.servers import Answers, Counters
from rigs.trained import MAX_NEW_TOKENS, Trained, trained

pytestmark = pytest.mark.rig


@pytest.fixture(scope="module", params=VLLM, ids=lambda case: case.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trained, Answers]:
    """A server's life, in float32: started, asked all the prompts, ended."""
    venv, case = built("vllm"), request.param
    assert isinstance(case, Case)
    draft = trained(case)
    log = tmp_path_factory.mktemp("vllm") / f"{case.name}.log"
    config = case.vllm_config(str(draft.export["vllm"]))
    with servers.vllm(venv, draft.target, log=log, speculative=config) as server:
        return draft, server.greedy(draft.prompts, max_new_tokens=MAX_NEW_TOKENS)


def test_text_is_the_targets_own(served: tuple[Trained, Answers]) -> None:
    check_text(*served)


def test_acceptance_is_that_of_our_evaluator(served: tuple[Trained, Answers]) -> None:
    check_counters(*served)


def test_counters_of_a_rigged_chain(tmp_path: Path) -> None:
    """One of three drafted tokens is accepted; prefill says the first of 24 tokens, and each of 12
    steps two more, of which the last is cut off.
    """
    venv = built("vllm")
    target = rigged_models.cycle_target(tmp_path / "cycle")
    draft = rigged_models.cycle_eagle3(target.path, tmp_path / "eagle3")
    config = Case("cycle", depth=3, vllm="eagle3").vllm_config(str(draft))
    with servers.vllm(venv, target.path, log=tmp_path / "server.log", speculative=config) as server:
        answers = server.greedy(rigged_models.PROMPTS, max_new_tokens=24)
    assert answers.tokens == tuple(target.greedy(prompt, 24) for prompt in rigged_models.PROMPTS)
    assert answers.counters == Counters(drafts=36, drafted=108, accepted=36, at=(36, 0, 0))


def test_counters_of_a_rigged_block(tmp_path: Path) -> None:
    """Whole blocks are accepted: 23 tokens after prefill's are five steps of four and the rest."""
    venv = built("vllm")
    target = rigged_models.constant_target(tmp_path / "constant")
    draft = rigged_models.constant_dflash(tmp_path / "dflash", block_size=4)
    config = Case("constant", depth=3, vllm="dflash").vllm_config(str(draft))
    with servers.vllm(venv, target.path, log=tmp_path / "server.log", speculative=config) as server:
        answers = server.greedy(rigged_models.PROMPTS, max_new_tokens=24)
    assert answers.tokens == tuple(target.greedy(prompt, 24) for prompt in rigged_models.PROMPTS)
    assert answers.counters == Counters(drafts=18, drafted=54, accepted=54, at=(18, 18, 18))
