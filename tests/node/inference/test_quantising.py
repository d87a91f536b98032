"""The arithmetic of quantised weights, and torch's kernels over it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import BadInput
from node.inference import matrices
from node.inference.layout import GROUP, MIXED
from node.inference.matrices import INTEGER_WEIGHTS_MIN, KERNEL_ROWS_MAX, Int4Product, Int8Embedding, Int8Product
from node.inference.products import Product, StoredProduct, Wide
from node.inference.quantising import PACKINGS, machine_packing, mixed, to_int4, to_int8

from .quantised import multiplied_with, rounded


def weights_of(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    """As trained ones are: most of them small, a few large, each row of its own size."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn((rows, columns), generator=generator)
    return normal * normal.abs() * 0.02 * torch.rand((rows, 1), generator=generator)


def test_mixing_twice_gives_the_row_again_times_how_many_are_mixed() -> None:
    rows = torch.randint(-99, 100, (3, 4 * MIXED), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(mixed(mixed(rows)), MIXED * rows)
    other = torch.randint(-99, 100, (4 * MIXED,), generator=torch.Generator().manual_seed(2)).float()
    assert torch.equal(mixed(rows) @ mixed(other), MIXED * (rows @ other))
    one = torch.zeros(2 * MIXED)
    one[5] = 7.0
    assert torch.equal(mixed(one).abs(), torch.tensor([0.0, 7.0] * MIXED))


def test_int8_is_within_half_a_step_of_the_mixed_weight() -> None:
    weights = weights_of(70, 96)
    numbers, scales = to_int8(weights)
    assert numbers.abs().max() == 127
    steps = scales.float()[:, None]
    errors = (numbers * steps - mixed(weights) / MIXED).abs()
    # The largest of a row may lie a little beyond 127 steps, because the scale is rounded to bf16.
    assert (errors <= 0.76 * steps).all()
    assert (errors <= 0.5001 * steps).float().mean() > 0.98


def test_int4_is_better_than_plain_rounding_between_the_extremes() -> None:
    weights = weights_of(64, 256)
    groups = weights.view(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    plain = ((groups - low) / (high - low) * 15).round() / 15 * (high - low) + low
    ours = rounded(weights, "int4").view(-1, GROUP)
    errors = ((ours - groups).square().sum(1), (plain - groups).square().sum(1))
    assert errors[0].sum() < 0.9 * errors[1].sum()
    # bf16 scales and middles cost a group something, at most a little.
    assert (errors[0] <= 1.1 * errors[1]).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-30, 1e-42])
def test_weights_that_are_all_the_same(value: float) -> None:
    weights = torch.full((64, 64), value)
    for kind in ("int8", "int4"):
        assert torch.allclose(rounded(weights, kind), weights, rtol=2**-8, atol=1e-38), kind


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weights = weights_of(64, 64)
    weights[5, 7] = value
    for quantise in (to_int8, to_int4):
        with pytest.raises(BadInput, match="not finite"):
            quantise(weights)


DIGESTS = """
import hashlib, json, torch
from node.inference.quantising import PACKINGS, machine_packing, to_int4, to_int8

def digest():
    found = []
    # Not randn: torch draws other normal numbers on another kind of CPU.
    numbers = torch.randint(-4096, 4097, (192, 4096), generator=torch.Generator().manual_seed(1)).float() / 4096
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weights = (numbers * numbers * numbers).to(dtype)
        found += [*to_int8(weights), *to_int4(weights)]
        found += [packing.pack(found[-2]) for packing in PACKINGS]
    return hashlib.sha256(b"".join(one.contiguous().view(torch.uint8).numpy().tobytes() for one in found)).hexdigest()

digests = []
for threads in (1, 2, 1):
    torch.set_num_threads(threads)
    digests.append(digest())
print(json.dumps([torch.backends.cpu.get_cpu_capability(), machine_packing().name, digests]))
"""

PACKING_OF = {"DEFAULT": "pair32", "AVX2": "split32", "AVX512": "split64"}


def test_the_same_bits_however_many_threads_and_whatever_cpu() -> None:
    """The second process is told to take this CPU for one without vectors."""
    environments = (dict(os.environ), {**os.environ, "ATEN_CPU_CAPABILITY": "default"})
    processes = [
        subprocess.Popen([sys.executable, "-c", DIGESTS], env=environment, stdout=subprocess.PIPE)
        for environment in environments
    ]
    found = [json.loads(process.communicate()[0]) for process in processes]
    assert len({digest for _, _, digests in found for digest in digests}) == 1, found
    assert found[1][0] == "DEFAULT"
    for capability, packing, _ in found:
        assert PACKING_OF.get(capability, "pair32") == packing


@pytest.mark.parametrize("packing", PACKINGS, ids=lambda packing: packing.name)
def test_what_is_packed_is_unpacked(packing) -> None:
    numbers = torch.randint(0, 16, (192, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    out = torch.empty(96, 192)
    packing.unpack(packing.pack(numbers), out)
    assert torch.equal(out.t(), numbers.float())


def test_a_packing_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.inference.quantising.PACKINGS", ())
    machine_packing.cache_clear()
    with pytest.raises(BadInput, match='quantization = "int8"'):
        machine_packing()
    machine_packing.cache_clear()


def product_of(kind: str, weights: torch.Tensor, bias: torch.Tensor | None) -> Product:
    if kind == "int8":
        return Int8Product(*to_int8(weights), bias, Wide(torch.bfloat16))
    numbers, scales = to_int4(weights)
    return Int4Product(machine_packing().pack(numbers), scales, machine_packing(), bias, Wide(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_what_stays_as_stored_beside_quantised_matrices_loses_no_bits(
    dtype: torch.dtype, rows: int, multiplies_bf16: bool
) -> None:
    weights = weights_of(48, 40).to(dtype)
    matrix = torch.randn((rows, 40), generator=torch.Generator().manual_seed(4))
    found = StoredProduct(weights, None, Wide(torch.bfloat16)).rows(matrix)
    torch.testing.assert_close(found, matrix @ weights.float().t(), rtol=1e-5, atol=1e-5)


SHAPES = [
    (64, 32),
    (192, 64),
    (128, 96),
    (320, 160),
    (64, 576),
    (576, 1536),
    (1536, 576),
    (4096, 128),
    (128, 4096),
    (4096, 1024),
]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_products_are_right_for_every_shape_and_number_of_rows(
    kind: str, shape: tuple[int, int], biased: bool, multiplies_bf16: bool
) -> None:
    weights = weights_of(*shape)
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(2)) if biased else None
    product, exact = product_of(kind, weights, bias), rounded(weights, kind)
    matrix = torch.randn((3 * KERNEL_ROWS_MAX, shape[1]), generator=torch.Generator().manual_seed(4))
    # Groups of int4 that are widened to bf16 are rounded once more.
    share = 2**-7 if multiplies_bf16 and kind == "int4" else 2**-8
    for rows in (1, 2, 5, KERNEL_ROWS_MAX, KERNEL_ROWS_MAX + 1, 3 * KERNEL_ROWS_MAX):
        fast = rows <= KERNEL_ROWS_MAX or multiplies_bf16
        given = multiplied_with(matrix[:rows], kind, fast, matrices.multiplies_int8() and rows > KERNEL_ROWS_MAX)
        expected = torch.nn.functional.linear(given, exact, bias)
        found = product.rows(matrix[:rows])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=float(expected.abs().max()) * share)
    large = weights.numel() >= INTEGER_WEIGHTS_MIN
    given = multiplied_with(matrix[:1], kind, True, matrices.multiplies_int8() and large)
    expected = torch.nn.functional.linear(given[0], exact, bias)
    torch.testing.assert_close(
        product.row(matrix[0]).float(), expected, rtol=2**-7, atol=float(expected.abs().max()) / 256
    )


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 12), seed=st.integers(0, 9))
def test_int8_products_of_any_number_of_rows(rows: int, columns: int, seed: int) -> None:
    weights = weights_of(rows, 32 * columns, seed)
    vector = torch.randn(32 * columns, generator=torch.Generator().manual_seed(seed))
    given = multiplied_with(vector[None], "int8", True, False)[0]
    expected = rounded(weights, "int8") @ given
    found = product_of("int8", weights, None).row(vector).float()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=float(expected.abs().max()) / 256)


@pytest.mark.parametrize("rows", [1, KERNEL_ROWS_MAX + 1])
def test_a_number_that_stands_out_does_not_cost_the_others_their_bits(rows: int) -> None:
    weights = torch.randn((64, 256), generator=torch.Generator().manual_seed(1))
    matrix = torch.randn((rows, 256), generator=torch.Generator().manual_seed(2))
    matrix[:, 9] *= 100.0
    product = product_of("int8", weights, None)
    found = product.rows(matrix) if rows > 1 else product.row(matrix[0])[None].float()
    rest = weights.clone()
    rest[:, 9] = 0.0
    error = (found - matrix @ weights.t()).square().mean().sqrt() / (matrix @ rest.t()).square().mean().sqrt()
    assert error < 0.1, "without mixing it is a third and more"


@pytest.mark.parametrize("value", [0.0, 1e-42])
def test_products_with_nothing_are_nothing(value: float, multiplies_bf16: bool) -> None:
    product = product_of("int8", weights_of(64, 96), None)
    assert product.row(torch.full((96,), value)).abs().max() < 1e-38
    assert product.rows(torch.full((13, 96), value)).abs().max() < 1e-38


OTHER_CPU = """
import torch
from node.inference.products import multiplies_int8
print(multiplies_int8(), torch._int_mm(*(torch.full((64, 64), 127, dtype=torch.int8),) * 2)[0, 0].item())
"""


@pytest.mark.parametrize("isa", ["SSE41", "AVX2", "AVX512_CORE"])
def test_what_saturates_is_not_used(isa: str) -> None:
    """oneDNN is told to take this CPU for one without instructions for int8; which it does is seen in its results."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    found = subprocess.run([sys.executable, "-c", OTHER_CPU], env=environment, stdout=subprocess.PIPE, check=True)
    says, result = found.stdout.split()
    assert says == b"False" or int(result) == 64 * 127 * 127, found.stdout


def test_rows_of_an_embedding_are_the_weights() -> None:
    weights = weights_of(64, 96)
    embedding = Int8Embedding(*to_int8(weights))
    torch.testing.assert_close(embedding.rows(torch.tensor([3, 63])), rounded(weights, "int8")[[3, 63]])
    torch.testing.assert_close(embedding.row(7), rounded(weights, "int8")[7])
