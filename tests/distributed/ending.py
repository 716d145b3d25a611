"""How a process of these tests ends."""

import os
import sys

import torch


def leave() -> None:
    """Ends the process without destructors, once all ranks are done.

    The destructor of gloo's process group joins its thread while it holds Python's lock, for which that thread may
    wait (seen with torch 2.13): now and then a process that was done would hang or abort.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
