"""The ops' place in `torch.ops`. A build for a kernel hub puts another file here: the same two names, its namespace."""

import torch

from .schemas import NAMESPACE

ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    return f"{NAMESPACE}::{name}"
