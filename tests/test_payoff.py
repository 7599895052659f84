"""The payoff benchmark: its dense kernel, the cells that it keeps, and what its page says of given numbers."""

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from llm_barber import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def cells() -> ModuleType:
    import payoff_cells

    return payoff_cells


@pytest.fixture
def kernels() -> ModuleType:
    import payoff_kernels

    return payoff_kernels


@pytest.fixture
def linears() -> ModuleType:
    import payoff_linears

    return payoff_linears


@pytest.fixture
def page() -> ModuleType:
    import payoff_page

    return payoff_page


def test_a_spread_has_minimum_median_and_maximum(cells: ModuleType) -> None:
    spread = cells.Spread.of([3.0, 1.0, 2.0, 10.0])
    assert (spread.minimum, spread.median, spread.maximum) == (1, 2.5, 10)
    assert spread.shown(1000) == "1,000 / 2,500 / 10,000"


def test_sides_take_turns_and_the_first_round_does_not_count(cells: ModuleType) -> None:
    order: list[str] = []
    seconds = {"left": iter([9.0, 2.0, 1.0]), "right": iter([9.0, 3.0, 4.0])}

    def side(name: str) -> Any:
        return lambda: (order.append(name), next(seconds[name]))[1]

    measured = cells.in_turn({name: side(name) for name in seconds}, 2)
    assert order == ["left", "right"] * 3
    assert measured["left"] == {"minimum": 1.0, "median": 1.5, "maximum": 2.0}
    assert measured["right"] == {"minimum": 3.0, "median": 3.5, "maximum": 4.0}


def test_finished_cells_are_not_measured_again(tmp_path: Path, cells: ModuleType) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"seconds": {1: float(len(calls))}}

    first = cells.Cells("part", tmp_path / "results", ("native",))
    assert first.result("cell", {"rounds": 2}, measure) == {"seconds": {"1": 1.0}}
    kept = json.loads((tmp_path / "results" / "part.json").read_text())["cell"]
    assert {"settings", "machine", "instructions", "versions", "code", "date", "result"} == set(kept)
    again = cells.Cells("part", tmp_path / "results", ("native",))
    assert again.result("cell", {"rounds": 2}, measure) == {"seconds": {"1": 1.0}}
    assert again.result("cell", {"rounds": 3}, measure) == {"seconds": {"1": 2.0}}  # other settings
    assert again.result("other", {"rounds": 3}, measure) == {"seconds": {"1": 3.0}}
    assert set(cells.read_cells(tmp_path / "results" / "part.json")) == {"cell", "other"}
    other_code = cells.Cells("part", tmp_path / "results", ("masking",))
    assert other_code.result("other", {"rounds": 3}, measure) == {"seconds": {"1": 4.0}}


def test_a_quick_run_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cells: ModuleType) -> None:
    monkeypatch.chdir(tmp_path)
    assert cells.Cells("part", None, ("native",)).result("cell", {}, lambda: {"value": 1}) == {"value": 1}
    assert list(tmp_path.iterdir()) == []


def test_the_byte_limit_counts_values_and_bits(kernels: ModuleType, linears: ModuleType) -> None:
    from llm_barber.checkpoint.encoding import pack
    from llm_barber.runtime.packed_linear import PackedLinear

    weight = torch.ones(8, 64, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    packed = pack(weight)
    assert packed is not None
    linear = PackedLinear(packed, None)
    assert linears.packed_bytes(linear) == 8 * 32 * 2 + 8 * 64 // 8
    assert kernels.byte_limit(weight.nbytes, linears.packed_bytes(linear)) == pytest.approx(1.778, abs=1e-3)


def test_copies_are_used_in_turn(linears: ModuleType) -> None:
    rotation = linears.Rotation(["a", "b", "c"])
    assert [rotation.next() for _ in range(5)] == ["a", "b", "c", "a", "b"]


def test_time_within_c_is_counted(linears: ModuleType) -> None:
    clock = linears.TimedLibrary(ctypes.CDLL(None))
    clock.strtol.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
    assert clock.strtol.argtypes[2] is ctypes.c_int
    assert clock.strtol(b"12", None, 10) == 12
    assert clock.seconds > 0
    assert not hasattr(clock, "no_such_function")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, linears: ModuleType) -> Iterator[Any]:
    """The C extension's clock, taken out again afterwards. C's functions have been looked up before."""
    monkeypatch.setattr(native, "library", native.library)
    inputs, weight = torch.ones(1, 64, dtype=torch.bfloat16), torch.eye(64, dtype=torch.bfloat16)
    for rounds_values in (False, True):
        linears.packed_linear(weight, rounds_values)(inputs)
    clock = linears.install_clock()
    if clock is None:
        pytest.skip("the C extension was not built")
    yield clock
    linears.forget_functions()


@pytest.mark.parametrize(
    ("dtype", "dense", "packed"),
    [("bfloat16", 32768, 16384 + 2048), ("float32", 65536, 32768 + 2048), ("int8", 32768, 8192 + 2048 + 256)],
)
@pytest.mark.parametrize(("rows", "unpacks"), [(1, False), (300, None)])
def test_sides_of_a_linear(
    monkeypatch: pytest.MonkeyPatch,
    linears: ModuleType,
    clock: Any,
    rows: int,
    unpacks: bool | None,
    dtype: str,
    dense: int,
    packed: int,
) -> None:
    """What is measured is there for each side; a product that unpacks its weight is known as such."""
    monkeypatch.setattr(linears, "SECONDS", 0.0)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    sides = linears.Sides("64x256", dtype, "2:4", 1, clock)
    result = sides.measure(rows, 1, 2)
    assert (result["bytes"], result["packed_bytes"], result["copies"]) == (dense, packed, 2)
    assert {"pytorch", "packed"} <= set(result["seconds"])
    assert ("kernel" in result["seconds"]) is result["multiplied"]
    if unpacks is not None:
        assert result["multiplied"] is not unpacks
    if result["multiplied"]:
        assert 0 < result["seconds"]["kernel"]["minimum"] <= result["seconds"]["packed"]["minimum"]


def test_a_product_of_pytorchs_is_seen(linears: ModuleType) -> None:
    weight = torch.ones(8, 8)
    with torch.inference_mode(), linears.Products() as products:
        weight + weight
        assert not products.seen
        torch.nn.functional.linear(weight[:1], weight)
        assert products.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_dense_kernel_is_the_product(dtype: torch.dtype, rows: int, threads: int) -> None:
    import payoff_native

    if payoff_native.library() is None:
        pytest.skip("no gcc, or no AVX-512 with BF16")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 384, generator=generator).to(dtype)
    inputs = torch.randn(rows, 384, generator=generator).to(dtype)
    outputs = torch.full((rows, 37), torch.nan)
    payoff_native.product(weight, inputs, outputs, threads)
    expected = inputs.double() @ weight.double().t()
    assert torch.allclose(outputs.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_dense_kernel_refuses_what_it_does_not_take() -> None:
    import payoff_native

    weight, outputs = torch.zeros(8, 100, dtype=torch.bfloat16), torch.zeros(1, 8)
    with pytest.raises(ValueError, match="does not take"):
        payoff_native.product(weight, weight[:1], outputs, 1)
    with pytest.raises(ValueError, match="multiple of 256 bytes"):
        payoff_native.read(weight, torch.zeros(8), 1)


def entry(page: ModuleType, title: str, disk: float, speed: float, divergence: float | None) -> Any:
    made = page.Entry(title, title.startswith(page.PEER), {"disk": disk, "memory": disk, "seconds": 1.0})
    made.faster = {1: (speed, speed)}
    made.divergence = divergence
    return made


def test_the_page_says_quantise_where_that_is_smaller_better_and_faster(page: ModuleType) -> None:
    q8, q4 = (
        entry(page, f"llama.cpp {kind}", *numbers)
        for kind, *numbers in (("Q8_0", 53, 2, 0.001), ("Q4_K_M", 36, 3, 0.02))
    )
    half, most = entry(page, "50 %, packed", 65, 1.4, 0.4), entry(page, "70 %, packed", 50, 1.7, 1.3)
    assert page.verdict("model", [half, most, q8, q4]) == [
        "On model, quantise: llama.cpp Q4_K_M is smaller, nearer to the dense model and faster at decoding than every "
        "pruned row whose quality was measured."
    ]
    assert page.verdict("model", [half, most, q8]) == [
        "On model, quantise: llama.cpp Q8_0 is smaller, nearer to the dense model and faster at decoding than “50 %, "
        "packed”.",
        "On model, “70 %, packed” is smaller than llama.cpp Q8_0, at a KL of 1.300 against 0.001.",
    ]


def test_the_page_says_what_a_pruned_model_has_over_quantised_ones(page: ModuleType) -> None:
    q8 = entry(page, "llama.cpp Q8_0", 53, 1.2, 0.001)
    assert page.verdict("model", [entry(page, "50 %, packed", 40, 1.4, 0.4), q8]) == [
        "On model, “50 %, packed” is smaller and faster at decoding than llama.cpp Q8_0, at a KL of 0.400 against "
        "0.001."
    ]
    assert page.verdict("model", [entry(page, "50 %, packed", 40, 1.4, None), q8]) == []  # its quality is not known
    assert page.verdict("model", [entry(page, "50 %, packed", 53, 1.2, 0.4), q8]) == [
        "On model, “50 %, packed” is not better than llama.cpp Q8_0, at a KL of 0.400 against 0.001."
    ]


def test_the_page_is_made_of_kept_cells(tmp_path: Path, page: ModuleType, cells: ModuleType) -> None:
    spread = {"minimum": 1.0, "median": 1.0, "maximum": 1.0}
    half = {"minimum": 0.5, "median": 0.8, "maximum": 1.0}
    old, new = {"code": "a", "date": "2026-11-30"}, {"code": "b", "date": "2026-11-30T01:00:00+00:00"}
    around = {
        "settings": {"decode": 20, "prefill": 250},
        "machine": "A processor",
        "instructions": "avx2",
        "versions": {"torch": "2"},
        **new,
    }
    loading = {"disk": 269e6, "memory": 296e6, "seconds": 2.5}
    models = {"smollm2-135m bfloat16 dense loading": {**around, "result": loading}}
    for side in ("packed 0.5", "llama.cpp Q8_0", "packed 0.7"):
        around |= old if side in ("llama.cpp Q8_0", "packed 0.7") else new
        name = f"smollm2-135m bfloat16 {side}"
        speeds = {"dense": spread, "side": half if "Q8_0" in side else spread}
        models[f"{name} loading"] = {**around, "result": {**loading, "disk": 140e6 + 10e6 * ("packed" in side)}}
        models[f"{name} threads 1"] = {**around, "result": {"decoding": speeds, "prefill": speeds}}
    quality = {"perplexity": 24.0, "divergence": 0.001}
    (tmp_path / "amx").mkdir()
    (tmp_path / "amx" / "models.json").write_text(json.dumps(models))
    (tmp_path / "quality.json").write_text(json.dumps({"smollm2-135m Q8_0": {**around, "result": quality}}))
    page.run(type("Options", (), {"docs": tmp_path}), tmp_path)
    assert not (tmp_path / "payoff.md").exists()
    text = (tmp_path / "payoff-amx.md").read_text()
    assert "On smollm2-135m, quantise: llama.cpp Q8_0 is smaller" in text
    for row in (
        "| llama.cpp Q8_0 | 140 | 52 % | 24.00 | 0.001 | 296 | 2.5 |",
        "| llama.cpp Q8_0 | 40.0 (2.00, 1.25) | 500 (2.00, 1.25) |",
        "| 50 %, packed | 150 | 56 % | 34.36 (`best`) | 0.381 | 296 | 2.5 |",
        "| 50 %, packed | 20.0 (1.00, 1.00) | 250 (1.00, 1.00) |",
        "| 70 %, packed * | 150 |",
        "| dense PyTorch | 269 | 100 % | – | – | 296 | 2.5 |",
        "| dense PyTorch | 20.0 | 250 |",
    ):
        assert row in text, row
    assert "Rows with * were measured with an earlier version" in text
    assert "A processor, instructions avx2; measured 2026-11-30; torch 2." in text


def test_a_page_of_nothing_is_not_written(tmp_path: Path, page: ModuleType) -> None:
    with pytest.raises(SystemExit, match="measure first"):
        page.run(type("Options", (), {"docs": tmp_path}), tmp_path)
    assert not (tmp_path / "payoff.md").exists()
