"""Launches that begin before the one before them has ended (programmatic dependent launch).

A launch that may overlap begins as soon as every program of the launch before it has ended or has
said that its dependents may begin. Our kernels say so first of all, so that several launches in a
row can be in flight together. What a stream promises still holds, by three rules for each kernel:

1. Every program waits, on every path, also on one without work. A wait returns when the launch
   before has completed and what it wrote is visible; since the programs of that one have waited
   as well, so has everything before it. One program that ended without its wait would break this
   chain: the launch after the next would wait for its direct predecessor and for nothing else.
2. No program writes to global memory before its wait. Hence no launch can overwrite what an
   earlier one still reads or has yet to write.
3. Before its wait a program reads only what no launch in flight can write. Those in flight reach
   back to the last launch that may not overlap, as a library's product or what a step begins with,
   and include it: it began when all before it had completed. So weights, a step's inputs, and what
   former steps left in the KV cache may be read; what the layers have computed so far may not. A
   step's inputs come by a launch themselves, so between it and the first launch that may overlap
   stands one that may not.

Where a stream forks and joins (``engine.lora.side_stream``), the edges across are dependencies on a
launch as a whole. On the branch may stand only what does not overlap: what it depends on is not
what the branch's stream was given before it. What comes behind the join may, as long as it waits
for both launches that it depends on: the wait does for its own stream's, and it does not begin
before the branch's has completed.

Source: CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA,
``griddepcontrol``.
"""

import torch
import triton

_FIRST_CAPABILITY = (9, 0)


def may_overlap(device: torch.device) -> bool:
    """Whether kernels on ``device`` can be launched so: from compute capability 9.0 on."""
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
