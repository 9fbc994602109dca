"""Nearest code: exactness, ties, memory; counts and sums per code."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.kernels import BackendUnsupported, codebook_argmin, codebook_stats
from sparing.kernels.dispatch import interpreting

needs_kernel = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason="Triton needs CUDA or the interpreter"
)
BACKENDS = ["reference", pytest.param("triton", marks=needs_kernel)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _vectors(vectors: int, codes: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Values on the bfloat16 grid, exact in every dtype but float16's smallest."""
    generator = torch.Generator().manual_seed(vectors + codes + dim)
    x, codebook = torch.randn(vectors, dim, generator=generator), torch.randn(codes, dim, generator=generator)
    return x.bfloat16().to(DEVICE, dtype), codebook.bfloat16().to(DEVICE, dtype)


def _distances(x: Tensor, codebook: Tensor, metric: str) -> Tensor:
    x, codebook = x.double(), codebook.double()
    if metric == "l2":
        return (x[:, None] - codebook).square().sum(-1)
    return -torch.nn.functional.cosine_similarity(x[:, None], codebook, dim=-1, eps=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(77, 201, 48), (1, 1, 3), (130, 65, 20)], ids=str)
def test_the_index_is_that_of_all_distances_in_float64(backend, metric, dtype, sizes):
    x, codebook = _vectors(*sizes, dtype)
    index, distance = codebook_argmin(x, codebook, metric=metric, return_dist=True, backend=backend)
    every = _distances(x, codebook, metric)
    wanted, nearest = every.min(1)
    assert index.dtype == torch.int32
    assert torch.equal(index.long(), nearest)
    torch.testing.assert_close(distance.double(), wanted, rtol=2e-6, atol=2e-6 * sizes[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("codes", [66, 129, 200])
def test_exact_ties_go_to_the_lowest_index(backend, metric, codes):
    x, codebook = _vectors(50, codes, 36)
    copies = [5, codes // 2, codes - 3, codes - 1]
    codebook[copies] = codebook[5].clone()
    x = (codebook[5] + x * 0.01).contiguous()
    x[7] = codebook[5]
    assert codebook_argmin(x, codebook, metric=metric, backend=backend).tolist() == [5] * 50
    assert codebook_argmin(torch.zeros_like(x), codebook, metric="cosine", backend=backend).tolist() == [0] * 50


class _LiveBytes(TorchDispatchMode):
    """Bytes of the tensors alive that were made inside, and their peak: storages counted once, freed when collected."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_the_distance_matrix_is_never_written_at_100000_vectors_and_8192_codes():
    vectors, codes, dim = 100_000, 8192, 16
    x, codebook = torch.randn(vectors, dim), torch.randn(codes, dim)
    meter = _LiveBytes()
    with meter:
        index = codebook_argmin(x, codebook, backend="reference")
    assert index.shape == (vectors,)
    assert meter.peak > 8 * vectors  # the meter sees the outputs
    tile = 64 << 20  # the score tile that the design allows, whatever N is
    assert meter.peak < tile + 64 * (vectors + codes), f"{meter.peak / 1e6:.0f} MB"
    assert meter.peak < vectors * codes * 4 / 40


@pytest.mark.gpu
def test_the_kernel_needs_no_more_than_its_outputs_at_100000_vectors_and_8192_codes():
    x, codebook = (torch.randn(n, 256, device="cuda", dtype=torch.bfloat16) for n in (100_000, 8192))
    codebook_argmin(x[:128], codebook, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    codebook_argmin(x, codebook, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 16 * (len(x) + len(codebook))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_vectors_and_empty_codebooks(backend):
    x, codebook = _vectors(0, 4, 8)
    index, distance = codebook_argmin(x, codebook, return_dist=True, backend=backend)
    assert index.shape == distance.shape == (0,)
    with pytest.raises(ValueError, match="the codebook is empty"):
        codebook_argmin(x, codebook[:0], backend=backend)


@needs_kernel
def test_the_kernel_gives_the_same_bits_twice_and_reads_nothing_beside_its_rows():
    x, codebook = _vectors(70, 100, 20)
    guarded = torch.full((80, 20), float("nan"), device=DEVICE)
    guarded[:70] = x
    first, second = (codebook_argmin(guarded[:70], codebook, return_dist=True, backend="triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_stats_count_and_add_the_vectors_of_each_code(dtype):
    x, _ = _vectors(60, 1, 7, dtype)
    index = torch.arange(60, device=DEVICE, dtype=torch.int32).remainder(7) * 2
    counts, sums = codebook_stats(x, index, 15)
    wanted = torch.zeros(15, 7, device=DEVICE, dtype=torch.float64).index_add_(0, index.long(), x.double())
    assert torch.equal(counts.long(), torch.bincount(index.long(), minlength=15))
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-6, atol=1e-6)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(sums, codebook_stats(x, index, 15)[1])
    empty = codebook_stats(x[:0], index[:0], 3)
    assert (empty[0].tolist(), empty[1].abs().sum().item()) == ([0, 0, 0], 0.0)


@needs_kernel
def test_the_custom_op_passes_opcheck():
    x, codebook = _vectors(9, 11, 8)
    torch.library.opcheck(torch.ops.sparing.codebook_argmin.default, (x, codebook, "l2", "tf32x3"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_and_exports_with_a_dynamic_number_of_vectors(backend):
    class Search(torch.nn.Module):
        def forward(self, x, codebook):
            index, distance = codebook_argmin(x, codebook, return_dist=True, backend=backend)
            return index, distance, *codebook_stats(x, index, codebook.shape[0])

    x, codebook = _vectors(9, 11, 8)
    other, _ = _vectors(30, 11, 8)
    compiled = torch.compile(Search(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, codebook), Search()(x, codebook))
    rows = {0: torch.export.Dim("vectors", min=2)}
    exported = torch.export.export(Search(), (x, codebook), dynamic_shapes=(rows, None)).module()
    torch.testing.assert_close(exported(other, codebook), Search()(other, codebook))


@needs_kernel
def test_flops_are_those_of_the_product():
    from torch.utils.flop_counter import FlopCounterMode

    import sparing.kernels.flops  # noqa: F401  (registers the formulas)

    x, codebook = _vectors(9, 11, 8)
    for backend in ("reference", "triton"):
        with FlopCounterMode(display=False) as counter:
            codebook_argmin(x, codebook, backend=backend)
        padded = 64 if backend == "reference" else 11  # the reference pads the codes to full columns
        assert counter.get_total_flops() == 2 * 9 * padded * 8


def test_bad_arguments_are_named():
    x, codebook = _vectors(9, 11, 8)
    with pytest.raises(ValueError, match="metric is 'l1'"):
        codebook_argmin(x, codebook, metric="l1")
    with pytest.raises(ValueError, match="precision is 'half'"):
        codebook_argmin(x, codebook, precision="half")
    with pytest.raises(ValueError, match=r"codebook \(11, 7\)"):
        codebook_argmin(x, codebook[:, :7])
    with pytest.raises(ValueError, match="expected integers"):
        codebook_stats(x, torch.zeros(9), 3)


@needs_kernel
def test_the_kernel_refuses_float64_and_mixed_dtypes_in_words():
    x, codebook = _vectors(9, 11, 8)
    with pytest.raises(BackendUnsupported, match="takes float32, bfloat16 and float16"):
        codebook_argmin(x.double(), codebook.double(), backend="triton")
    with pytest.raises(BackendUnsupported, match="takes one dtype"):
        codebook_argmin(x, codebook.bfloat16(), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_sizes_on_a_gpu(dtype):
    x, codebook = _vectors(12544, 8192, 256, dtype)
    index, distance = codebook_argmin(x, codebook, return_dist=True, backend="triton")
    wanted, least = codebook_argmin(x.double(), codebook.double(), return_dist=True, backend="reference")
    near = torch.gather(torch.cdist(x[:512].double(), codebook.double()).square(), 1, index[:512, None].long())[:, 0]
    assert (index != wanted).float().mean() < 1e-3
    torch.testing.assert_close(near, least[:512], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(distance.double(), least, rtol=1e-5, atol=1e-3)
