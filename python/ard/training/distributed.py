"""How a model is spread over processes: DDP, or FSDP2 with everything sharded."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ard.common.process import Process
from ard.config.choices import STRATEGIES


def spread(model: nn.Module, process: Process, strategy: str) -> nn.Module:
    """``model`` ready for training on all ranks; forward must go through the module that is returned.

    ddp: every rank holds all weights, gradients are averaged. fsdp: FSDP2, one group per block and one for the rest;
    weights, gradients, optimizer state and EMA are sharded (parameters become DTensors, in place).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}; expected one of {STRATEGIES}")
    if process.world_size == 1:
        return model
    if strategy == "ddp":
        on_gpu = [process.device.index] if process.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=on_gpu, gradient_as_bucket_view=True)
    # A block's outputs are views of its rows; nothing here works in place on them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, on every rank (a collective); other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, sharing its memory; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copies the whole ``value``, the same on all ranks, into a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    local(tensor).copy_(local(value))
