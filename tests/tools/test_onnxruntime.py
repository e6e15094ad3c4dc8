"""Exported to ONNX, and run where neither the package nor PyTorch is needed."""

import onnxruntime
import pytest
import torch
from small import MODELS, images, same, timm_model


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.situation(
    "Exporting",
    "`torch.onnx.export(dynamo=True)`, run by onnxruntime with another batch size",
    timm="works",
    ours="the same outputs, with the layers that take the fused kernels in PyTorch",
)
def test_onnx_with_another_batch_size(make, tmp_path):
    theirs, model = timm_model(), MODELS[make]()
    program = torch.onnx.export(
        model, (images(2),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    for count in (1, 3, 5):
        (out,) = session.run(None, {given.name: images(count).numpy()})
        same(torch.from_numpy(out), theirs(images(count)))
