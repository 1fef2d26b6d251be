"""The budget of the one full context."""

from __future__ import annotations

from target_svc.memory.full_context import RESERVE_BYTES, FullContextBudget, available_host_bytes


def budget(**changes: int | None) -> FullContextBudget:
    values = {
        "kv_bytes_per_cell": 1024,
        "trained_tokens": 32_768,
        "gen_max": 256,
        "budget_bytes": None,
        **changes,
    }
    return FullContextBudget(**values)  # type: ignore[arg-type]


def test_without_a_bound_the_trained_context_is_the_limit() -> None:
    assert budget().max_tokens == 32_768


def test_the_budget_pays_for_the_reserve_and_the_answer_first() -> None:
    bytes_ = RESERVE_BYTES + 1024 * 1024  # 1,024 cells of 1,024 bytes
    assert budget(budget_bytes=bytes_).max_tokens == 1024 - 256
    assert budget(budget_bytes=bytes_ - 1).max_tokens == 768 - 256


def test_a_budget_under_the_reserve_allows_no_full_context() -> None:
    assert budget(budget_bytes=RESERVE_BYTES // 2).max_tokens == 0


def test_a_large_budget_does_not_pass_the_trained_context() -> None:
    assert budget(budget_bytes=1 << 40).max_tokens == 32_768


def test_the_operator_s_limit_beats_budget_and_training() -> None:
    assert budget(budget_bytes=0, setting_tokens=65_536).max_tokens == 65_536
    assert budget(setting_tokens=0).max_tokens == 0


def test_a_context_of_the_longest_prompt_fits_its_budget() -> None:
    limit = budget(budget_bytes=RESERVE_BYTES + 5_000_000)
    cells = limit.cells(limit.max_tokens, 256)
    assert limit.size_bytes(cells) <= RESERVE_BYTES + 5_000_000


def test_a_device_s_buffers_are_paid_before_cells_and_with_each() -> None:
    gpu = budget(
        budget_bytes=RESERVE_BYTES + 5_000 + 512 * 1028, buffer_bytes=5_000, buffer_bytes_per_cell=4
    )
    assert gpu.max_tokens == 512 - 256
    assert gpu.size_bytes(512) == RESERVE_BYTES + 5_000 + 512 * 1028


def test_bytes_that_could_be_had_are_told_in_tokens() -> None:
    limit = budget(budget_bytes=1 << 40)
    assert limit.tokens_within(RESERVE_BYTES + 1024 * 1024) == 1024 - 256
    assert limit.tokens_within(0) == 0


def test_free_host_memory_is_positive_and_below_an_absurd_bound() -> None:
    assert 0 < available_host_bytes() < 1 << 50
