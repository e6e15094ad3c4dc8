"""Measuring launch configurations: what is tried, what wins, what is kept. The clock is made up, the kernels run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from convit_kernels.triton import configs, tune
from convit_kernels.triton.candidates import candidates

pytestmark = pytest.mark.interpreter
SHAPE = tune.Shape(batch=1, heads=1, grid_size=(3, 5), head_dim=16, dtype=torch.float32)
PASSES = configs.PASSES


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVIT_KERNELS_CACHE_DIR", str(tmp_path))
    configs.clear()
    return configs.cache_file()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The configurations that the launchers got last."""
    last: dict[str, Any] = {}

    def spy(name: str) -> None:
        launcher = getattr(tune, name)

        def spied(*args: Any, **options: Any) -> Any:
            if name == "forward":
                last["forward"] = options["config"]
            else:
                last.update(zip(PASSES[1:], options["configs"], strict=True))
            return launcher(*args, **options)

        monkeypatch.setattr(tune, name, spied)

    spy("forward")
    spy("backward")
    return last


def test_the_fastest_of_each_kernel_is_kept_and_the_next_is_measured_with_it(used: dict[str, Any]) -> None:
    wanted = {
        "forward": configs.Config(16, 16, 4, 3),
        "backward_q": configs.Config(32, 16, 8, 1),
        "backward_kv": configs.Config(16, 16, 8, 2),
        "backward_position": configs.Config(16, 32, 4, 1),
    }

    def timed(run: tune.Run) -> float:
        run()
        return 1.0 - 0.1 * sum(used.get(name) == config for name, config in wanted.items())

    found = list(tune.tune(SHAPE, torch.device("cpu"), timed))
    assert [one.pass_name for one in found] == list(PASSES)
    assert {one.pass_name: one.config for one in found} == wanted
    assert all(one.seconds < one.seconds_before for one in found)
    assert found[-1].seconds == pytest.approx(0.7)  # with the best of the two before it
    kept = configs.load_tuned("interpreter")
    assert sorted(kept.values()) == sorted(wanted.values()) and len(kept) == 4
    assert "forward/dense/float32/16/16" in kept


def refusal() -> Exception:
    return triton.runtime.errors.OutOfResources(300_000, 200_000, "shared memory")


def test_what_the_gpu_refuses_is_passed_over() -> None:
    calls = iter(range(10**6))

    def timed(run: tune.Run) -> float:
        if next(calls) % 2:
            raise refusal()
        return 1.0

    found = list(tune.tune(SHAPE, torch.device("cpu"), timed))
    assert all(0 < one.tried < len(candidates(one.pass_name, 4, 16, tune.STAGES)) for one in found)
    # at equal times nothing changes, but for a configuration that cannot run
    assert all(one.config == one.before or one.seconds_before == torch.inf for one in found)
    assert found[0].config == found[0].before


def test_a_gpu_that_refuses_everything_is_an_error(cache: Path) -> None:
    def timed(run: tune.Run) -> float:
        raise refusal()

    with pytest.raises(RuntimeError, match="refuses every configuration of forward"):
        list(tune.tune(SHAPE, torch.device("cpu"), timed))
    assert not cache.exists()


def test_an_interrupted_run_keeps_nothing(cache: Path) -> None:
    next(tune.tune(SHAPE, torch.device("cpu"), lambda run: 1.0))
    assert not cache.exists()
