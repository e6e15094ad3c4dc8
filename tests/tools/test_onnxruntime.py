"""Exported to ONNX, and run where neither the package nor PyTorch is needed."""

import onnxruntime
import pytest
import torch
from small import images, same, timm_model

import convit_kernels as ck


@pytest.mark.situation(
    "Exporting",
    "`torch.onnx.export(dynamo=True)`, run by onnxruntime with another batch size",
    timm="works",
    ours='the same outputs; no operator of the package\'s own with `backend="composite"`',
)
def test_onnx_with_another_batch_size(tmp_path):
    theirs, model = timm_model(), timm_model()
    assert ck.replace_gpsa(model, backend="composite") == 2
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
