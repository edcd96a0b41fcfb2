"""The fuzzer, with a small budget of its own; ``tools/fuzz.py`` takes a larger one."""

import pytest

from tools import fuzz


def test_no_input_of_a_small_fuzz_run_does_harm() -> None:
    outcome = fuzz.run(inputs=4_000, seed=6)
    print(outcome)
    assert outcome.findings == []
    assert (outcome.streams, outcome.answers) == (2_000, 2_000)
    # It reaches what is behind the first checks.
    assert outcome.admitted > 500
    assert outcome.read > 50


def test_the_fuzzer_tells_of_an_answer_that_does_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def harmful(data: bytes) -> object:
        if data[:1] == b"\x80":
            raise SystemExit("harm")
        return None

    monkeypatch.setattr(fuzz, "read_answer", harmful)
    outcome = fuzz.run(inputs=200, seed=6)
    assert len(outcome.findings) > 10
    assert "SystemExit" in outcome.findings[0]
