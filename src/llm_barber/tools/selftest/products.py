"""Products with packed and 2:4 weights against exact ones, and attention with and without a gradient.

A product y = x · Wᵀ + b of n columns, summed in float32 in any order and then rounded to its dtype, is off by at most
(n + 2) · 2⁻²⁴ · (Σ |x| |W| + |b|) + u · |y|, with u the dtype's rounding unit (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1). Two of the last term are allowed, for kernels that round before they add the bias. Where
values are int8, `W` is the weight rounded to its dtype, which kernels need not round: u · Σ |x| |W| more. Those of CPUs
may round inputs to eight bits, too: half a step, max |x| / 254, for each weight.
"""

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.functional import linear, scaled_dot_product_attention

from llm_barber.checkpoint.encoding import pack
from llm_barber.checkpoint.rounding import pack_rounded
from llm_barber.model.attention import RepeatedKeys, fast_attention, repeat_heads
from llm_barber.model.fixed_order import in_fixed_order
from llm_barber.model.gpu_kernels import same_kernels
from llm_barber.runtime.load import load
from llm_barber.runtime.packed_linear import PackedLinear
from llm_barber.runtime.semi_structured import CAPABILITY
from llm_barber.tools.selftest.bench import Bench, half_pruned
from llm_barber.tools.selftest.result import Finding, NotRunError
from llm_barber.tools.selftest.speeds import packed_speed

# (out, in): whole blocks of the kernels, odd sizes, a single output, rows that are no whole number of bytes.
SHAPES = ((512, 1024), (320, 1000), (1, 64), (33, 70))
INPUT_ROWS = (1, 2, 4, 5, 8, 9, 16, 17, 40)  # on both sides of what kernels take
# Heads, heads of keys and features of a head; each with a causal flag, and with a mask.
HEADS = ((8, 8, 64), (8, 2, 128), (4, 1, 80), (4, 4, 256))


def share_of_bound(
    outputs: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, rounded: bool = False
) -> float:
    """Largest error of a product, as a share of the most that rounding can explain; NaN if an output is.

    Args:
        outputs: (rows, out).
        inputs: (rows, in).
        weight: (out, in).
        bias: (out,), or None.
        rounded: the weight's values are int8.
    """
    values, weights = inputs.double(), weight.double()
    exact = linear(values, weights, None if bias is None else bias.double())
    sums = linear(values.abs(), weights.abs(), None if bias is None else bias.double().abs())
    unit = torch.finfo(outputs.dtype).eps / 2
    bound = (weight.shape[1] + 2) * 2.0**-24 * sums + 2 * unit * exact.abs()
    if rounded:
        bound += torch.finfo(weight.dtype).eps / 2 * sums
    if rounded and outputs.is_cpu:
        bound += values.abs().amax(1, keepdim=True) / 254 * weights.abs().sum(1)
    return float(((outputs.double() - exact).abs() / bound.clamp_min(torch.finfo(outputs.dtype).tiny)).max())


def check_packed(bench: Bench) -> Iterator[Finding]:
    """Compare products with packed weights, for few and many rows of inputs, with exact ones; time them on a GPU."""
    for dtype in (*bench.dtypes, torch.float16):
        yield judge_packed(bench.device, dtype, rounded=False)
        yield judge_packed(bench.device, dtype, rounded=True)
    if bench.on_gpu:
        yield Finding(text=packed_speed(bench), passed=True)


@same_kernels()
@torch.no_grad()
def judge_packed(device: torch.device, dtype: torch.dtype, rounded: bool) -> Finding:
    """Compare the products of all shapes and numbers of rows with exact ones."""
    largest, exact, products = 0.0, True, 0
    for shape in SHAPES:
        weight = half_pruned(shape, dtype, torch.device("cpu"))
        for bias in (None, torch.randn(shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)):
            module = _packed_module(weight, bias, rounded)
            if module is None:  # a weight that small takes no fewer bytes packed
                continue
            expected = module.weight.to(device) if rounded else weight.to(device)
            module = module.to(device)
            exact &= torch.equal(module.weight, expected)
            for rows in INPUT_ROWS:
                inputs = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(device, dtype)
                placed = None if bias is None else bias.to(device)
                share = share_of_bound(module(inputs), inputs, expected, placed, rounded)
                largest = share if math.isnan(share) else max(largest, share)
                products += 1
    kind = "int8" if rounded else str(dtype).removeprefix("torch.")
    name = f"packed {kind} weights, {str(dtype).removeprefix('torch.')} inputs"
    unpacked = "" if exact else "; the unpacked weight has other bits"
    text = f"{name}: {products} products, largest error {largest:.2g} of what rounding explains{unpacked}"
    return Finding(text=text, passed=products > 0 and largest <= 1 and exact)


def _packed_module(weight: Tensor, bias: Tensor | None, rounded: bool) -> PackedLinear | None:
    """A linear that keeps the weight packed; None: it takes no fewer bytes."""
    parameter = None if bias is None else nn.Parameter(bias, requires_grad=False)
    if rounded:
        parts = pack_rounded(weight)
        return None if parts is None else PackedLinear(parts, parameter)
    packed = pack(weight)
    return None if packed is None else PackedLinear(packed, parameter)


def check_semi_structured(bench: Bench) -> Iterator[Finding]:
    """Convert the linears of a 2:4 model, and compare their products with exact ones.

    Raises:
        NotRunError: the device has no such products.
    """
    if not bench.on_gpu:
        raise NotRunError("needs a GPU")
    capability = torch.cuda.get_device_capability(bench.device)
    if capability < CAPABILITY:
        raise NotRunError(f"needs compute capability 8.0, this GPU has {'.'.join(map(str, capability))}")
    folder, _, _ = bench.prune(bench.device, initial="magnitude", rebuild=False, pattern="2:4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the output head, which is not pruned
        model = load(folder, device=str(bench.device), semi_structured=True)
    dense = load(folder, device=str(bench.device))
    names = model.semi_structured.converted
    largest = 0.0
    with torch.no_grad():
        for name in names:
            weight = dense.get_submodule(name).weight
            inputs = torch.randn(64, weight.shape[1], device=bench.device, dtype=weight.dtype)
            share = share_of_bound(model.get_submodule(name)(inputs), inputs, weight, None)
            largest = share if math.isnan(share) else max(largest, share)
    linears = sum(".layers." in name for name, module in dense.named_modules() if isinstance(module, nn.Linear))
    yield Finding(text=f"{len(names)} of {linears} linears converted", passed=len(names) == linears)
    yield Finding(text=f"largest error {largest:.2g} of what rounding explains", passed=largest <= 1)


def check_attention(bench: Bench) -> Iterator[Finding]:
    """Compare attention as it is computed without a gradient with attention whose gradient is taken in a fixed order.

    A difference of the two would be taken for an effect of pruning.
    """
    for dtype in bench.dtypes:
        for heads, key_heads, features in HEADS:
            agrees, kernels = True, set()
            for masked in (False, True):
                equal, kernel = same_attention(bench.device, dtype, (heads, key_heads, features), masked)
                agrees &= equal
                kernels.add(f"{'with a mask' if masked else 'causal'}: {kernel}")
            name = f"{heads} heads of {features} features, {key_heads} of keys, {str(dtype).removeprefix('torch.')}"
            shown = f"{name}: {'the same bytes' if agrees else 'other bytes'} with a gradient"
            yield Finding(text=f"{shown} ({', '.join(sorted(kernels))})", passed=agrees)


def same_attention(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], masked: bool
) -> tuple[bool, str]:
    """Test whether attention gives the same bytes with and without a gradient; name PyTorch's kernel.

    Args:
        device: where to compute.
        dtype: of query, key and value.
        heads: number of heads, of heads of keys, and of features of a head.
        masked: with a mask instead of a causal flag.
    """
    tokens = 256
    generator = torch.Generator().manual_seed(0)
    counts = (heads[0], heads[1], heads[1])
    query, key, value = (
        torch.randn(2, count, tokens, heads[2], generator=generator).to(device, dtype) for count in counts
    )
    shared = heads[0] != heads[1]
    if shared and (masked or isinstance(fast_attention(device, dtype), RepeatedKeys)):
        # By transformers where there is a mask, and by a run where a kernel takes no shared keys.
        key, value = (repeat_heads(part, heads[0]) for part in (key, value))
        shared = False
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril() if masked else None
    with same_kernels():
        with torch.no_grad():
            plain = scaled_dot_product_attention(query, key, value, mask, is_causal=not masked, enable_gqa=shared)
        with in_fixed_order(), torch.enable_grad():
            q, k, v = parts = [part.detach().requires_grad_() for part in (query, key, value)]
            graded = scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, enable_gqa=shared)
            gradients = torch.autograd.grad(graded.float().square().sum(), parts)
        kernel = _kernel_name(query, key, value, mask, not masked, shared)
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    return torch.equal(plain, graded.detach()) and finite, kernel


def _kernel_name(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, shared: bool) -> str:
    """Name of the kernel that PyTorch chooses; `unknown` where it does not tell."""
    choose = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return "unknown"
    chosen = choose(query, key, value, mask, 0.0, causal, enable_gqa=shared)
    names = {int(backend.value): name for name, backend in SDPBackend.__members__.items()}
    return names.get(int(chosen), "unknown").lower().replace("_", " ")
