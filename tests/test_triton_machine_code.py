"""Reading the machine code, the budget that it must keep, the launch configurations and the model of time.

Nothing here compiles in the test's own process: it may run under TRITON_INTERPRET=1, where kernels are no compiled
code.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_program

from convit_kernels.triton import configs
from convit_kernels.triton.config_table import TABLE
from tools.machine_code import budget, counts, report, time_model
from tools.machine_code.compiled import DEVICES
from tools.machine_code.counts import Loop, issued
from tools.machine_code.disassembly import Block, nvidia_blocks

ROOT = Path(__file__).resolve().parent.parent


# ---- counting --------------------------------------------------------------------------------------------------------


def count(blocks: list[Block], trips: int | list[int]) -> Counter[str]:
    return issued(blocks, lambda loop: trips if isinstance(trips, int) else trips[loop.index])


def test_a_loop_that_tests_at_its_end_runs_its_body_trips_times() -> None:
    blocks = [Block(["A"], [1]), Block(["B", "B"], [2]), Block(["C"], [1, 3]), Block(["D"], [])]
    assert count(blocks, 7) == Counter(A=1, B=14, C=7, D=1)


def test_a_loop_that_tests_at_its_start_runs_the_test_once_more() -> None:
    blocks = [Block(["A"], [1]), Block(["T"], [2, 3]), Block(["B", "B"], [1]), Block(["D"], [])]
    assert count(blocks, 7) == Counter(A=1, T=8, B=14, D=1)


def test_a_loop_that_leaves_in_its_last_block_but_one() -> None:
    blocks = [Block(["A"], [1]), Block(["B"] * 9, [2, 3]), Block(["J"], [1]), Block(["D"], [])]
    assert count(blocks, 7) == Counter(A=1, B=63, J=6, D=1)


def test_nested_loops_multiply_and_the_caller_tells_them_apart() -> None:
    blocks = [
        Block(["A"], [1]),
        Block(["B"], [2]),
        Block(["HMMA.16816.F32"], [2, 3]),
        Block(["C"], [1, 4]),
        Block(["MUFU.EX2"], [4, 5]),
        Block(["D"], []),
    ]
    seen: list[Loop] = []

    def trips(loop: Loop) -> int:
        seen.append(loop)
        return [3, 5, 11][loop.index]

    assert issued(blocks, trips) == Counter({"A": 1, "B": 3, "HMMA.16816.F32": 15, "C": 3, "MUFU.EX2": 11, "D": 1})
    assert seen == [
        Loop(0, outer=True, matrix=True, special=False),
        Loop(1, outer=False, matrix=True, special=False),
        Loop(2, outer=False, matrix=False, special=True),
    ]


def test_of_exclusive_branches_the_longer_counts() -> None:
    blocks = [Block(["A"], [1, 2]), Block(["B"] * 3, [3]), Block(["C"] * 5, [3]), Block(["D"], [])]
    assert count(blocks, 1) == Counter(A=1, C=5, D=1)


def test_a_loop_behind_a_branch_counts_with_its_trips() -> None:
    # six instructions at once, or two that run four times
    blocks = [Block(["A"], [1, 2]), Block(["B"] * 6, [3]), Block(["C"] * 2, [2, 3]), Block(["D"], [])]
    assert count(blocks, 4) == Counter(A=1, C=8, D=1)
    assert count(blocks, 2) == Counter(A=1, B=6, D=1)


def test_waiting_succeeds_at_the_first_try() -> None:
    blocks = [
        Block(["A", "SYNCS.PHASECHK.TRANS64.TRYWAIT"], [3, 1]),
        Block(["B"], [2]),
        Block(["EXIT"], []),
        Block(["SYNCS.PHASECHK.TRANS64.TRYWAIT"], [3, 4]),
        Block(["BRA"], [1]),
    ]
    assert count(blocks, 1000) == Counter({"A": 1, "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1, "B": 1, "EXIT": 1})


def test_only_the_elected_warp_issues_the_products_of_tensor_memory() -> None:
    # once around a loop: a fork to the product, which its warp alone takes
    blocks = [
        Block(["A"], [1]),
        Block(["B"], [2, 3]),
        Block(["UTCHMMA", "E"], [3]),
        Block(["C"], [1, 4]),
        Block(["D"], []),
    ]
    assert issued(blocks, lambda loop: 3) == Counter({"A": 1, "B": 3, "UTCHMMA": 3, "E": 3, "C": 3, "D": 1})
    assert issued(blocks, lambda loop: 3, elected=False) == Counter(A=1, B=3, C=3, D=1)
    of_two_kinds = report.Report("kernel", "sm_100", 8, 2, 32, 0, 0, 8, {"matrix": 3, "rest": 11}, others=8)
    assert of_two_kinds.issued == 14 + 7 * 8
    assert report.Report("kernel", "sm_90", 8, 2, 32, 0, 0, 8, {"rest": 14}).issued == 8 * 14


def test_a_loop_with_two_entries_is_refused() -> None:
    blocks = [Block(["A"], [1, 2]), Block(["B"], [2]), Block(["C"], [1, 3]), Block(["D"], [])]
    with pytest.raises(ValueError, match="irreducible"):
        count(blocks, 2)


SASS = """
	.section	.text.kernel,"ax",@progbits
        .global         kernel
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/               @P1 FADD R2, R2, R3 ;
        /*0040*/                   BRA.U UP0, `(.L_x_0) ;
        /*0050*/               @P3 CALL.REL.NOINC `(.L_x_2) ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
.L_x_2:
        /*0070*/               @P1 EXIT ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
.L_x_4:
"""


def test_nvidia_disassembly_becomes_blocks() -> None:
    opcodes = count(nvidia_blocks(SASS, "kernel"), 5)
    assert opcodes["HMMA.16816.F32.BF16"] == 5 and opcodes["FADD"] == 5 and opcodes["BRA.U"] == 5
    assert opcodes["MUFU.EX2"] == 1 and opcodes["STG.E.128"] == 1 and opcodes["EXIT"] == 2
    assert counts.macs_per_warp(opcodes) == 5 * 16 * 8 * 16
    assert counts.mix(opcodes) == {"matrix": 5, "special": 1, "memory": 1, "float": 5, "rest": 10}
    with pytest.raises(ValueError, match="no code of other"):
        nvidia_blocks(SASS, "other")


@pytest.mark.parametrize(
    ("device", "warps", "registers", "shared", "expected"),
    [
        ("sm_80", 4, 128, 0, 16),  # a quarter of the registers for each scheduler: 4 warps of 128
        ("sm_80", 4, 32, 0, 64),
        ("sm_80", 4, 24, 48 * 1024, 12),  # three blocks of 48 + 1 KiB in 164
        ("sm_80", 4, 255, 0, 8),
        ("sm_90", 8, 168, 0, 8),
        ("sm_90", 8, 128, 100 * 1024, 16),
        ("sm_86", 1, 16, 0, 16),  # the limit on blocks
        ("sm_90", 4, 64, 300 * 1024, 0),
        ("gfx942", 4, 128, 0, 16),
        ("gfx942", 4, 64, 20 * 1024, 12),
        ("sm_75", 4, 128, 32 * 1024, 8),  # nothing of the shared memory is reserved
        ("sm_75", 4, 32, 0, 32),
        (
            "gfx1200",
            4,
            256,
            0,
            8,
        ),  # five waves of 264 registers would fit each of two SIMDs, but one workgroup has four
        ("gfx1200", 8, 96, 16 * 1024, 32),
    ],
)
def test_occupancy(device: str, warps: int, registers: int, shared: int, expected: int) -> None:
    assert report.occupancy(device, warps=warps, registers=registers, shared=shared) == expected


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be recorded")
def test_a_launch_has_the_chosen_configuration_and_else_the_table_s() -> None:
    case = budget.Case("sm_90", "backward", head_dim=64)
    table = budget.configurations(case)
    chosen = configs.Config(16, 256, 4, 3)
    recorded = {launch.name: launch for launch in budget.launches(case, {"backward_kv": chosen})}
    assert recorded["backward_kv_kernel"].arguments["BLOCK_N"] == 256
    assert recorded["backward_kv_kernel"].options == {"num_warps": 4, "num_stages": 3}
    assert recorded["backward_q_kernel"].arguments["BLOCK_M"] == table["backward_q"].block_m
    assert recorded["backward_position_kernel"].arguments["BLOCK_N"] == table["backward_position"].block_n
    with configs.target("sm_90"):
        assert table["backward_q"] == configs.lookup("backward_q", dtype=torch.bfloat16, head_dim=64)


def test_interpreted_kernels_are_refused() -> None:
    code = "from tools.machine_code import budget; budget.launches(budget.Case('sm_90', 'forward'))"
    result = run_program(code, ROOT, environment={"TRITON_INTERPRET": "1"}, check=False)
    assert result.returncode != 0 and "TRITON_INTERPRET" in result.stderr


# ---- the budget ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The paper's kernels on one architecture, compiled now; `make kernels` compiles all."""
    code = "from tools.machine_code import budget; budget.main(['--devices', 'sm_90', '--json'])"
    return dict(json.loads(run_program(code, ROOT, environment={"TRITON_INTERPRET": "0"}).stdout))


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    return dict(json.loads(budget.FILE.read_text()))


def test_the_kernels_keep_the_budget(measured: dict[str, Any], kept: dict[str, Any]) -> None:
    assert budget.problems(measured, kept) == []


def test_the_forward_issues_at_most_a_fifth_more_than_content_alone(measured: dict[str, Any]) -> None:
    assert [name for name in budget.over_target(measured) if name.endswith("/forward")] == []


def test_the_backward_issues_at_most_three_tenths_more_than_content_alone(measured: dict[str, Any]) -> None:
    assert [name for name in budget.over_target(measured) if name.endswith("/backward")] == []


def test_the_counted_products_are_those_of_the_tile(measured: dict[str, Any]) -> None:
    """Trip counts and paths are right only if the matrix products are what the tile's arithmetic asks for."""
    (kernel,) = measured["paper"]["sm_90/forward"]["kernels"]
    rows, columns = kernel["tile"]
    tokens, left = divmod(196, columns)
    last = max(16, 1 << (left - 1).bit_length()) if left else 0
    products = 3  # q k^T, content v, position v
    assert kernel["macs"] * kernel["warps"] == products * rows * (tokens * columns + last) * 48


def test_the_file_was_made_from_this_code_and_this_table_of_configurations(kept: dict[str, Any]) -> None:
    """Where this fails: python -m tools.machine_code.budget --all --write --devices (those that it names)"""
    assert kept["sources"] == {device: budget.source(device) for device in DEVICES}


def test_the_file_has_every_device_and_no_kernel_in_it_spills_or_cannot_be_launched(kept: dict[str, Any]) -> None:
    assert set(kept["paper"]) == {f"{case.device}/{case.pass_name}" for case in budget.paper_cases()}
    for name, entry in kept["paper"].items():
        device = DEVICES[name.split("/")[0]]
        for kernel in entry["kernels"]:
            assert kernel["shared"] <= device.shared_per_block and kernel["occupancy"] > 0, (name, kernel)
            assert kernel["spill_bytes"] == 0, (name, kernel)


def test_every_configuration_that_can_be_chosen_compiles_fits_and_does_not_spill(kept: dict[str, Any]) -> None:
    cases = budget.matrix_cases()
    assert set(kept["matrix"]) == {str(case) for case in cases}
    for case in cases:
        device = DEVICES[case.device]
        kernels = kept["matrix"][str(case)]
        assert kernels
        for kernel, (_, spill_bytes, shared, warps) in kernels.items():
            assert shared <= device.shared_per_block and warps > 0, (case, kernel)
            assert spill_bytes == 0, (case, kernel)


def test_the_ratios_of_every_architecture_keep_their_targets(kept: dict[str, Any]) -> None:
    assert budget.over_target(kept) == {}


def test_rewriting_the_file_keeps_what_still_holds(tmp_path: Path) -> None:
    file = tmp_path / "budget.json"
    sources = {"sm_80": budget.source("sm_80"), "sm_90": "of other code"}
    entries = {f"{device}/forward": {"of": "old"} for device in sources}
    file.write_text(json.dumps({"triton": "1", "sources": sources, "paper": entries, "matrix": {}}))
    found = {"triton": "1", "sources": {"sm_86": ""}, "paper": {"sm_86/forward": {"of": "new"}}, "matrix": {}}
    assert budget.merged(found, file) == {
        "triton": "1",
        "sources": {device: budget.source(device) for device in ("sm_80", "sm_86")},
        "paper": {"sm_80/forward": {"of": "old"}, "sm_86/forward": {"of": "new"}},
        "matrix": {},
    }


@pytest.mark.parametrize(
    ("field", "value"), [("registers", 256), ("shared", 10**6), ("spill_bytes", 8), ("occupancy", 0)]
)
def test_the_check_can_fail(kept: dict[str, Any], field: str, value: int) -> None:
    found = json.loads(json.dumps(kept))
    before = budget.problems(found, kept)
    found["paper"]["sm_90/forward"]["kernels"][0][field] = value
    assert len(budget.problems(found, kept)) == len(before) + 1


def test_a_ratio_above_its_target_is_named() -> None:
    paper = {"sm_80/forward": {"ratio": 1.21}, "sm_90/forward": {"ratio": 1.2}, "gfx942/forward": {"ratio": None}}
    assert budget.over_target({"paper": paper}) == {"sm_80/forward": 1.21}


def test_the_check_holds_the_paper_s_kernels_and_the_matrix() -> None:
    name = "sm_86/forward/float16/64/dense"
    entry = {"ratio": 1.2, "warp_instructions_per_head_and_image": 1000, "kernels": []}
    kept = {
        "triton": "3.8.0",
        "paper": {"sm_80/forward": entry},
        "matrix": {name: {"forward_kernel": [128, 0, 4096, 16]}},
    }
    assert budget.problems(kept, kept) == []
    for changed, complaint in (
        (
            {"paper": {"sm_80/forward": {**entry, "warp_instructions_per_head_and_image": 1001}}},
            "warp instructions 1001",
        ),
        ({"matrix": {name: {"forward_kernel": [128, 4, 4096, 16]}}}, "spilled bytes 4"),
        ({"matrix": {name: {"forward_kernel": [128, 0, 4097, 16]}}}, "shared memory 4097"),
        ({"matrix": {name: {"forward_kernel": [129, 0, 4096, 16]}}}, "registers 129"),
        ({"matrix": {name: {"forward_kernel": [128, 0, 4096, 0]}}}, "cannot be launched"),
        ({"matrix": {name: {"other_kernel": [128, 0, 4096, 16]}}}, "not in the file"),
    ):
        (found,) = budget.problems({**kept, **changed}, kept)
        assert complaint in found
    other = {
        **kept,
        "triton": "3.9.0",
        "paper": {"sm_80/forward": {**entry, "warp_instructions_per_head_and_image": 1099}},
    }
    assert budget.problems(other, kept) == []


# ---- configurations --------------------------------------------------------------------------------------------------


def test_every_head_dim_has_a_configuration_everywhere() -> None:
    for architecture in configs.FAMILIES:
        with configs.target(architecture):
            for pass_name in configs.PASSES:
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    for head_dim in range(1, 257, 5):
                        if configs.why_not(configs.family(), dtype, head_dim):
                            assert configs.family() in ("sm_75", "gfx1200")
                            continue
                        for regime in budget.GRIDS:
                            config = configs.lookup(pass_name, dtype=dtype, head_dim=head_dim, regime=regime)
                            assert min(config.block_m, config.block_n) >= 16 and config.num_warps in (1, 2, 4, 8)


def test_the_rows_of_a_family_end_at_the_same_head_dim() -> None:
    lengths: dict[tuple[str, str], set[int]] = {}
    for key, row in TABLE.items():
        family, *_, itemsize = key.split("/")
        lengths.setdefault((family, itemsize), set()).add(len(row.split()))
    assert all(len(found) == 1 for found in lengths.values()), lengths
    assert configs.why_not("sm_75", torch.float32, 193) == "head_dim is at most 192 on sm_75, not 193"


def test_what_a_family_does_not_take_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match=r"the kernels take no torch\.float16 on sm_75"), configs.target("sm_75"):
        configs.lookup("forward", dtype=torch.float16, head_dim=48)
    assert budget.dtypes("sm_75") == ["float32"] and budget.dtypes("gfx1200") == ["float16", "bfloat16"]


def test_the_matrix_has_the_finer_tiles_once_and_only_where_they_differ() -> None:
    few = budget.Case("sm_90", "backward", "bfloat16", 48, "dense", few=True)
    assert str(few) == "sm_90/backward/bfloat16/48/dense/few" and few in budget.matrix_cases(["sm_90"])
    assert budget.of_its_own(few) == {"backward_q_kernel", "backward_kv_kernel"}
    usual = budget.Case("sm_90", "backward", "bfloat16", 48)
    assert budget.of_its_own(usual) == {f"backward_{name}_kernel" for name in ("q", "kv", "position", "reduce")}
    assert not any(case.few for case in budget.matrix_cases(["sm_75", "gfx942"]))


def test_lookup_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="head_dim"):
        configs.lookup("forward", dtype=torch.float32, head_dim=257)
    with pytest.raises(ValueError, match="unknown pass"):
        configs.lookup("sideways", dtype=torch.float32, head_dim=16)
    with pytest.raises(ValueError, match="unknown architecture"), configs.target("sm_10"):
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONVIT_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    configs.clear()
    return configs.cache_file()


def test_tuned_configurations_are_kept_by_device(cache: Path) -> None:
    key = configs.entry_key("forward", dtype=torch.bfloat16, head_dim=48, regime="dense", num_tokens=196)
    other = configs.entry_key("forward", dtype=torch.bfloat16, head_dim=48, regime="dense", num_tokens=1024)
    assert key != other and configs.load_tuned("GPU A") == {}
    configs.store_tuned("GPU A", {key: configs.Config(128, 64, 8, 3)})
    configs.store_tuned("GPU A", {other: configs.Config(64, 64, 4, 2)})
    configs.store_tuned("GPU B", {key: configs.Config(32, 32, 4, 1)})
    assert configs.load_tuned("GPU A") == {key: configs.Config(128, 64, 8, 3), other: configs.Config(64, 64, 4, 2)}
    assert configs.load_tuned("GPU B") == {key: configs.Config(32, 32, 4, 1)}
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize(
    ("text", "edited", "same"),
    [
        ('"""Pieces that the forward', '"""What the forward', True),  # a module's docstring
        ('    """``a b^T``, the product', '    """Another text, the product', True),  # a function's
        ("    power = 16\n", "    power = 16  # a comment\n\n", True),
        ("    power = 16\n", "    power = 32\n", False),
        ('return "tf32"', 'return "ieee"', False),  # a string that is no docstring
    ],
)
def test_the_hash_of_the_kernels_follows_their_code_not_their_docstrings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, edited: str, same: bool
) -> None:
    before = configs.source_hash()
    for name in configs.KERNEL_SOURCES:
        (tmp_path / name).write_text((Path(configs.__file__).parent / name).read_text())
    common = (tmp_path / "common.py").read_text()
    assert common.count(text) == 1
    (tmp_path / "common.py").write_text(common.replace(text, edited))
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "configs.py"))
    assert (configs.source_hash.__wrapped__() == before) == same


def test_configurations_of_other_source_are_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs.store_tuned("GPU A", {"forward/dense/bfloat16/48/256": configs.Config(128, 64, 8, 3)})
    monkeypatch.setattr(configs, "source_hash", lambda: "another")
    configs.clear()
    assert configs.load_tuned("GPU A") == {}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"a": {"b": [64, 64, 4]}}', '{"a": {"b": [64, 63, 4, 2]}}', '{"a": {"b": "cdef"}}', "\xff"],
)
def test_a_corrupt_cache_warns_once_and_counts_as_empty(cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="triton_configs.json"):
        assert configs.load_tuned("GPU A") == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.load_tuned("GPU A") == {}
    configs.store_tuned("GPU A", {"key": configs.Config(64, 32, 4, 2)})
    assert configs.load_tuned("GPU A") == {"key": configs.Config(64, 32, 4, 2)}


def test_an_invalid_configuration_is_not_stored(cache: Path) -> None:
    with pytest.raises(ValueError, match="power of two"):
        configs.store_tuned("GPU A", {"key": configs.Config(48, 32, 4, 2)})
    assert not cache.exists()


# ---- the model of time -----------------------------------------------------------------------------------------------


def row(**changes: Any) -> budget.Row:
    of_kernel = report.Report(
        kernel="forward_kernel",
        device="sm_90",
        warps=4,
        stages=2,
        registers=128,
        spill_bytes=0,
        shared=0,
        occupancy=16,
        instructions={"matrix": 0, "special": 0, "memory": 0, "float": 0, "rest": 0, **changes.pop("instructions", {})},
        macs=changes.pop("macs", 0),
    )
    memory = {"tensor_bytes": 0, "requested_bytes": 0} | changes
    return budget.Row(tile=(64, 64), programs=132, report=of_kernel, **memory)


@pytest.mark.parametrize(
    ("changes", "unit", "seconds"),
    [
        ({"tensor_bytes": 3350}, "HBM", 1e-9),
        ({"requested_bytes": 5500}, "L2", 1e-9),
        ({"macs": 2048}, "tensor", 4 / 1.83e9),
        ({"instructions": {"special": 1}}, "exp", 8 / 1.83e9),
        ({"instructions": {"rest": 5}}, "issue", 5 / 1.83e9),
    ],
)
def test_the_model_weighs_each_unit(changes: dict[str, Any], unit: str, seconds: float) -> None:
    times = time_model.model(time_model.H100, row(**changes), "bfloat16")
    assert times[unit] == pytest.approx(seconds, rel=1e-12) and time_model.bound(times) == unit


def test_the_model_refuses_machine_code_of_another_architecture() -> None:
    with pytest.raises(ValueError, match="sm_80"):
        time_model.model(time_model.A100, row(), "bfloat16")


def test_the_specifications_give_the_published_peaks() -> None:
    for gpu, bf16, tf32 in ((time_model.A100, 312e12, 156e12), (time_model.H100, 989.4e12, 494.7e12)):
        assert 2 * gpu.macs["bfloat16"] * gpu.sms * gpu.clock == pytest.approx(bf16, rel=1e-2)
        assert 2 * gpu.macs["tf32"] * gpu.sms * gpu.clock == pytest.approx(tf32, rel=1e-2)
