"""Twins of ViTs under torch.compile, torch.export and ONNX (spec G16)."""

import pytest
import torch

from sparing.vision.stvit import SemanticTokenViT
from sparing.vision.tome import TokenMergingViT
from vision.small_hosts import images_for, small_host

# Blocks are costly to trace: four are enough for a base, two generation layers and a semantic one.
TWINS = {
    "stvit": lambda: SemanticTokenViT.from_host(small_host("dinov2_reg4", depth=4), num_tokens=9, base_depth=1),
    "stvit_adaptive_bins": lambda: SemanticTokenViT.from_host(
        small_host("siglip", depth=4), num_tokens=(5, 4), base_depth=1, inter_window=True
    ),
    "tome": lambda: TokenMergingViT.from_host(small_host("dinov2_reg4", depth=2), r=4),
}


@pytest.mark.parametrize("key", TWINS)
def test_export_holds_aten_nodes_only_and_takes_any_batch(key):
    twin = TWINS[key]().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(twin, (images_for(twin),), dynamic_shapes=({0: batch},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    # Beside aten: reading a tuple, and the batch size times the number of cells.
    assert {n for n in names if not n.startswith("aten.")} <= {"<built-in function getitem>", "<built-in function mul>"}
    images = images_for(twin, batch=5)
    torch.testing.assert_close(program.module()(images), twin(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("key", ["stvit", "tome"])
def test_compile_has_no_graph_break_and_equals_eager_with_gradients(key):
    twin = TWINS[key]()
    images = images_for(twin)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), twin(images), atol=1e-5, rtol=1e-5)
    found = []
    for model in (twin, compiled):
        twin.zero_grad()
        model(images).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in twin.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_onnx_export_of_an_stvit_twin_is_equal_in_onnxruntime(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    twin = TWINS["stvit"]().eval()
    images = images_for(twin)
    path = tmp_path / "twin.onnx"
    torch.onnx.export(twin, (images,), dynamo=True, verbose=False).save(path)
    session = runtime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), twin(images).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["stvit", "tome"])
def test_inductor_equals_eager(key):
    twin = TWINS[key]().eval()
    images = images_for(twin)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(twin, fullgraph=True)(images), twin(images), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("key", TWINS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_gives_what_the_cpu_gives_in_half_precision(key, dtype):
    twin = TWINS[key]().eval()
    images = images_for(twin)
    with torch.no_grad():
        expected = twin(images)
        found = twin.to("cuda", dtype)(images.to("cuda", dtype))
        compiled = torch.compile(twin, fullgraph=True)(images.to("cuda", dtype))
    torch.testing.assert_close(found.float().cpu(), expected, atol=0.3, rtol=0.3)
    torch.testing.assert_close(compiled.float(), found.float(), atol=0.1, rtol=0.1)
