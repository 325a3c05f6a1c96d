"""One of two processes that train a plain and an optimized model with DistributedDataParallel over gloo.

python ddp_worker.py RANK RENDEZVOUS_FILE
"""

from __future__ import annotations

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import ConvNet, assert_equal, image, spread, train

import normpass


def main(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(rank)  # DDP gives both the parameters of rank 0
    model = spread(ConvNet())
    x = image(seed=rank)
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        plain, optimized = copy.deepcopy(model), normpass.optimize(copy.deepcopy(model))
        numbers = [train(DistributedDataParallel(m, **options), (x,)) for m in (plain, optimized)]
        assert_equal(*numbers)
        own = train(copy.deepcopy(model), (x,))
        assert not torch.equal(own["0 gradient fc.weight"], numbers[0]["0 gradient module.fc.weight"])
        check_same_everywhere(optimized)
    dist.barrier()
    dist.destroy_process_group()
    print("same gradients", flush=True)


def check_same_everywhere(model: nn.Module) -> None:
    """The parameters agree between the two processes."""
    for parameter in model.parameters():
        both = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(both, parameter.detach())
        assert torch.equal(*both)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # gloo's threads may end an orderly exit with `terminate called without an active exception`
