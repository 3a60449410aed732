"""Compiles the attention kernels for GPUs that need not be here, just as they are launched; prints a line of JSON each.

``python ahead_of_time.py '[[90, "float32", 49, 512, "cosine", 2], ...]'``: compute capability, the tokens' type,
patches, channels, variant, texts. Without TRITON_INTERPRET, which is why it is a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tgazsr_utils.core import attention_kernel

KERNELS = {name: getattr(attention_kernel, name) for name in ("_forward", "_backward")}
WIDE = re.compile(r"\bld\.global\S*?\.v(\d)\.\w(\d+)")
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class AheadOfTime:
    """In a kernel's place: a launch compiles it for ``capability`` and says what came out, with ``about``."""

    def __init__(self, name: str, capability: int, **about):
        self.kernel, self.capability = KERNELS[name], capability
        self.about = {"kernel": name, "capability": capability, **about}

    def __getitem__(self, grid):
        return self

    def __call__(self, *tensors, num_warps, **constants):
        signature = {name: TYPES[tensor.dtype] for name, tensor in zip(self.kernel.arg_names, tensors)}
        aligned = {(i,): [["tt.divisibility", 16]] for i, tensor in enumerate(tensors) if tensor.data_ptr() % 16 == 0}
        source = ASTSource(self.kernel, signature | dict.fromkeys(constants, "constexpr"), constants, aligned)
        target = GPUTarget("cuda", self.capability, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
        ptx = compiled.asm["ptx"]
        values = constants["BLOCK_P"] * constants["BLOCK_D"] // (32 * num_warps)  # of a tile, in a thread
        found = resources(compiled.asm["cubin"]) | {
            "shared": compiled.metadata.shared,
            "tile_bytes": values * tensors[1].element_size(),
            "wide_bytes": 16 * sum(int(n) * int(bits) == 128 for n, bits in WIDE.findall(ptx)),
            "f64": ".f64" in ptx,
        }
        print(json.dumps(self.about | found), flush=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and local memory, as the assembler gave them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")}


def main() -> None:
    for capability, dtype, patches, width, variant, texts in json.loads(sys.argv[1]):
        about = {"dtype": dtype, "patches": patches, "width": width, "variant": variant, "texts": texts}
        for name in KERNELS:
            setattr(attention_kernel, name, AheadOfTime(name, capability, **about))
        shapes = (1, width), (1, patches, width), (1, texts, width)
        pooled, tokens, text = (torch.zeros(shape, dtype=getattr(torch, dtype)) for shape in shapes)
        attention_kernel.attention(pooled, tokens.requires_grad_(), text, variant)[0].sum().backward()


if __name__ == "__main__":
    main()
