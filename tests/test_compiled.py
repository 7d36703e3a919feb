"""Compiled layers compute what the model's own code does, at all lengths; where there is no compiler, it is said."""

from __future__ import annotations

import shutil

import facts
import pytest
import torch
from tiny_models import UnevenSamples, build, workload

from autotune.errands import Dry
from autotune.errors import ConfigurationError
from autotune.measure import try_size
from trainer.compiled import compile_layers, eagerly
from trainer.evaluate import totals
from trainer.microbatch import SpecialTokens, lay_out, target_count
from trainer.step import accumulate, start

GIB = 2**30
CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of its own making, while it compiles
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_compiled_layers_have_the_gradient_of_the_model_and_are_compiled_once_for_all_lengths() -> None:
    plain, compiled = build("llama"), build("llama")
    compile_layers(compiled)
    work, samples = workload("llama", layout="packed", compile="on", max_seq_len=64), UnevenSamples("llama", 24)
    states = [start(model, work, 0.1) for model in (plain, compiled)]

    def run(ids: range) -> float:
        for state in states:
            state.optimizer.zero_grad()
            accumulate(state, lay_out(ids, 3, samples, work, SpecialTokens(0, 0)), target_count(ids, samples), work)
        pairs = zip(plain.parameters(), compiled.parameters(), strict=True)
        moved = torch.stack([(p.grad - q.grad).norm() for p, q in pairs]).norm()
        return float(moved / torch.stack([p.grad.norm() for p in plain.parameters()]).norm())

    assert run(range(12)) < 1e-5
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert run(range(12, 19)) < 1e-5, "other lengths, and other rows"
        batches = lay_out(range(5), 5, samples, work, SpecialTokens(0, 0))
        losses = [totals(model, batches, work, CPU) for model in (plain, compiled)]
        torch.testing.assert_close(losses[0], losses[1])
        with pytest.raises(RuntimeError, match=r"(?i)recompil"), torch.no_grad():
            compiled(input_ids=torch.ones(2, 8, dtype=torch.long))
        with eagerly("on"), torch.no_grad():
            compiled(input_ids=torch.ones(2, 8, dtype=torch.long))


def test_where_nothing_compiles_it_is_said_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    work = workload("llama", model="tiny", vocabulary_size=300, compile="on")
    errand = Dry(workload=work, device="cpu", micro_batch_size=2, ranks=1, backend=None, verify=True,
        budget_bytes=8 * GIB, limit_bytes=8 * GIB, excerpt=None)  # fmt: skip
    with pytest.raises(ConfigurationError, match="does not compile here") as error:
        try_size(errand, facts.hardware(device="cpu"))
    assert "--compile" in str(error.value.hint)
