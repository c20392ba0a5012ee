"""Exported drafts in real SGLang: text, counters, a rigged pair. See docs/serving.md.

Its scheduler, loaders, workers and HTTP are real; `sgl_kernel` is the stand-in of rigs/sglang.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rigs import rigged_models, servers
from rigs.cases import SGLANG, WHOLE_VOCABULARY, Case
from rigs.checks import built, check_counters, check_text
from rigs.servers import Answers, Counters
from rigs.trained import MAX_NEW_TOKENS, Trained, trained

pytestmark = pytest.mark.rig


@pytest.fixture(scope="module", params=SGLANG, ids=lambda case: case.name)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trained, Answers]:
    """A server's life, in float32: started, asked all the prompts, ended."""
    venv, case = built("sglang"), request.param
    assert isinstance(case, Case)
    draft = trained(case)
    log = tmp_path_factory.mktemp("sglang") / f"{case.name}.log"
    arguments = case.sglang_arguments(str(draft.export["sglang"]))
    with servers.sglang(
        venv, draft.target, log=log, speculative=arguments, block=case.block
    ) as server:
        return draft, server.greedy(draft.prompts, max_new_tokens=MAX_NEW_TOKENS)


def test_text_is_the_targets_own(served: tuple[Trained, Answers]) -> None:
    check_text(*served)


def test_acceptance_is_that_of_our_evaluator(served: tuple[Trained, Answers]) -> None:
    check_counters(*served)


def test_counters_of_a_rigged_chain(tmp_path: Path) -> None:
    """One of three drafted tokens is accepted; prefill says the first of 24 tokens, and each of 12
    steps two more, of which the last is cut off.
    """
    venv = built("sglang")
    target = rigged_models.cycle_target(tmp_path / "cycle")
    draft = rigged_models.cycle_eagle3(target.path, tmp_path / "eagle3")
    arguments = Case("cycle", depth=3, sglang="EAGLE3").sglang_arguments(str(draft))
    with servers.sglang(
        venv, target.path, log=tmp_path / "server.log", speculative=arguments
    ) as server:
        answers = server.greedy(rigged_models.PROMPTS, max_new_tokens=24)
    assert answers.tokens == tuple(target.greedy(prompt, 24) for prompt in rigged_models.PROMPTS)
    assert answers.counters == Counters(drafts=36, drafted=108, accepted=36, at=(36, 0, 0))


def test_counters_of_a_rigged_block(tmp_path: Path) -> None:
    """Whole blocks are accepted: 23 tokens after prefill's are five steps of four and the rest."""
    venv = built("sglang")
    target = rigged_models.constant_target(tmp_path / "constant")
    draft = rigged_models.constant_dflash(tmp_path / "dflash", block_size=4)
    arguments = Case("constant", depth=3, sglang="DFLASH", block=True).sglang_arguments(str(draft))
    with servers.sglang(
        venv, target.path, log=tmp_path / "server.log", speculative=arguments, block=True
    ) as server:
        answers = server.greedy(rigged_models.PROMPTS, max_new_tokens=24)
    assert answers.tokens == tuple(target.greedy(prompt, 24) for prompt in rigged_models.PROMPTS)
    assert answers.counters == Counters(drafts=18, drafted=54, accepted=54, at=(18, 18, 18))


def test_counters_of_a_rigged_correction(tmp_path: Path) -> None:
    """Whole blocks again, of which the correction says all but the first token."""
    venv = built("sglang")
    target = rigged_models.cycle_target(tmp_path / "cycle")
    draft = rigged_models.cycle_domino(target.path, tmp_path / "domino", block_size=4)
    case = Case("cycle", depth=3, sglang="DFLASH", block=True, more=WHOLE_VOCABULARY)
    with servers.sglang(
        venv,
        target.path,
        log=tmp_path / "server.log",
        speculative=case.sglang_arguments(str(draft)),
        block=True,
    ) as server:
        answers = server.greedy(rigged_models.PROMPTS, max_new_tokens=24)
    assert answers.tokens == tuple(target.greedy(prompt, 24) for prompt in rigged_models.PROMPTS)
    assert answers.counters == Counters(drafts=18, drafted=54, accepted=54, at=(18, 18, 18))
