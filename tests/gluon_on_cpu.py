"""Runs the source of a Gluon kernel, with its inline assembly, on a CPU.

Triton's interpreter knows neither. Here the file of a kernel is executed with stand-ins for `triton` and
`gluon`, on torch tensors: what a lane or a warp holds is an index of a tensor, a pointer is a tensor and
offsets, and inline assembly is read instruction by instruction, `mma.sp` by the tables of fragments and of
places in the PTX ISA. Every address is checked against its tensor, and stores against each other.

What stays unproven: that a GPU does what PTX ISA says, and the compiler what its layouts say.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from ptx import ARITHMETIC, mma_m16n8k16, signed
from torch import Tensor

LANES = torch.arange(32)


class Pointer:
    """An address in `memory`, or a tensor of them."""

    def __init__(self, memory: Tensor, offsets: Tensor | None = None) -> None:
        assert memory.is_contiguous()
        self.memory = memory
        self.offsets = torch.zeros((), dtype=torch.int64) if offsets is None else offsets
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.offsets + more)

    def where(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Offsets and which of them are meant; those must lie in the memory."""
        mask = torch.tensor(True) if mask is None else mask
        offsets, mask = torch.broadcast_tensors(self.offsets, mask)
        meant = offsets[mask]
        assert meant.numel() == 0 or (meant.min() >= 0 and meant.max() < self.memory.numel()), (
            f"an address outside of {self.memory.numel()}: {meant.min()} to {meant.max()}"
        )
        return offsets, mask


def load(at: Pointer, mask: Tensor | None = None, other: float = 0) -> Tensor:
    offsets, mask = at.where(mask)
    fill = torch.tensor(other, dtype=at.memory.dtype)
    return torch.where(mask, at.memory.flatten()[torch.where(mask, offsets, 0)], fill)


class Program:
    """The stand-ins for `gluon` and its language, while one program of a grid runs."""

    def __init__(self) -> None:
        self.ids = (0, 0)
        self.written = set[tuple[int, int]]()

    def language(self) -> ModuleType:
        gl = ModuleType("triton.experimental.gluon.language")
        gl.constexpr = None
        gl.int32, gl.int64, gl.float32 = torch.int32, torch.int64, torch.float32
        gl.BlockedLayout, gl.SliceLayout = blocked_layout, lambda dim, parent: (dim, parent)
        gl.program_id = lambda axis: torch.tensor(self.ids[axis])
        gl.arange = lambda start, end, layout: torch.arange(start, end)
        gl.static_range = range
        gl.expand_dims = torch.unsqueeze
        gl.minimum = lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
        gl.zeros = lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype)
        gl.sum, gl.where, gl.exp = torch.sum, torch.where, torch.exp
        gl.load, gl.store = load, self.store
        gl.inline_asm_elementwise = inline_asm
        return gl

    def store(self, at: Pointer, values: Tensor, mask: Tensor | None = None) -> None:
        offsets, mask = at.where(mask)
        values, mask = torch.broadcast_tensors(values, mask)
        offsets = offsets.expand(values.shape)[mask]
        assert offsets.unique().numel() == offsets.numel(), "two lanes write to one address"
        here = {(at.memory.data_ptr(), int(offset)) for offset in offsets}
        assert not here & self.written, "two programs write to one address"
        self.written |= here
        at.memory.view(-1)[offsets] = values[mask]


class Kernel:
    """What stands for a `gluon.jit` function: called by another, or launched on a grid."""

    def __init__(self, function: Callable[..., Any], program: Program) -> None:
        self.function, self.program = function, program

    def __call__(self, *args: Any, **constants: Any) -> Any:
        return self.function(*args, **constants)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            assert constants["WARPS"] == num_warps
            self.program.written.clear()
            pointers = [Pointer(a) if isinstance(a, Tensor) else a for a in args]
            for ids in product(*map(range, grid)):
                self.program.ids = ids
                self.function(*pointers, **constants)

        return launch


def blocked_layout(
    registers: list[int], lanes: list[int], warps: list[int], order: list[int]
) -> None:
    """Only the layout in which the four registers of a lane are the last dimension, lanes the one before."""
    assert registers[-2:] == [1, 4]
    assert lanes == [1] * (len(lanes) - 2) + [32, 1]
    assert set(warps[2:]) == {1}
    assert order == sorted(order, reverse=True)


@contextmanager
def on_cpu(*files: Path) -> Iterator[ModuleType]:
    """The modules in `files`, run by this emulator, as what `import` finds; gives the last."""
    program = Program()
    gluon = ModuleType("triton.experimental.gluon")
    gluon.language = program.language()
    gluon.jit = lambda function: Kernel(function, program)
    gluon.constexpr_function = lambda function: function
    triton, experimental = ModuleType("triton"), ModuleType("triton.experimental")
    experimental.gluon = gluon
    stand_ins = {m.__name__: m for m in (triton, experimental, gluon, gluon.language)}
    modules = {name: ModuleType(name) for name in (f"llmprune.kernels.{f.stem}" for f in files)}
    real = {key: sys.modules.get(key) for key in (*stand_ins, *modules)}
    try:
        sys.modules.update(stand_ins)
        try:
            for file, (name, module) in zip(files, modules.items(), strict=True):
                module.__package__, sys.modules[name] = "llmprune.kernels", module
                exec(compile(file.read_text(), str(file), "exec"), vars(module))
        finally:
            for key in stand_ins:
                _put_back(key, real[key])
        yield module
    finally:
        for key in modules:
            _put_back(key, real[key])


def _put_back(name: str, module: ModuleType | None) -> None:
    if module is None:
        sys.modules.pop(name, None)
    else:
        sys.modules[name] = module


def inline_asm(
    asm: str, constraints: str, args: list[Tensor], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """The assembly for all warps at once; operand $i is word i of a lane, results first.

    Of several results `dtype` has one each, and a tuple comes back.
    """
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    shape = torch.broadcast_shapes(*(a.shape for a in args))
    assert shape[-2:] == (32, pack), "the last dimensions are not lanes and their registers"
    given = constraints.split(",")
    results = [c for c in given if c.startswith("=")]
    first = pack * len(dtypes)  # operand that is read
    assert len(results) == first
    assert len(given) == first + pack * len(args)
    operands = [a.expand(shape)[..., i] for a in args for i in range(pack)]
    for operand, letter in zip(operands, given[first:], strict=True):
        assert operand.dtype is {"r": torch.int32, "f": torch.float32}[letter]
    registers: dict[str, Any] = {f"${first + i}": operand for i, operand in enumerate(operands)}
    instructions = (
        [i.strip() for i in asm.strip().strip("{}").split(";")] if "mma" not in asm else [asm]
    )
    instructions = [i for i in instructions if i and not i.startswith(".reg")]
    # A result without & may share its register with an operand: then nothing may be read after it.
    assert len(instructions) == 1 or all(c.startswith("=&") for c in results)
    for instruction in instructions:
        execute(instruction.rstrip(" ;"), registers)
    words = (registers[f"${i}"].expand(shape[:-1]) for i in range(first))
    found = tuple(
        torch.stack([next(words) for _ in range(pack)], dim=-1).to(dtype) for dtype in dtypes
    )
    return found if isinstance(dtype, tuple) else found[0]


def execute(instruction: str, registers: dict[str, Any]) -> None:
    """One instruction of PTX on `registers`, tensors whose last dimension is lanes."""
    name, _, rest = instruction.partition(" ")
    words = re.findall(r"[$%\w]+", rest)
    if name.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."):
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[name.split(".")[-2]]
        groups = [
            torch.stack([_operand(w, registers) for w in words[i : i + 4]], -1) for i in (4, 8, 12)
        ]
        places, selector = _operand(words[16], registers), int(words[17], 0)
        assert words[:4] == ["$0", "$1", "$2", "$3"]
        result = mma_sp(*groups, places, selector, dtype)
        registers.update({f"${i}": result[..., i] for i in range(4)})
        return
    if name.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
        dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[name.split(".")[-2]]
        a, b, c = (
            torch.stack([_operand(w, registers) for w in words[begin:end]], -1)
            for begin, end in ((4, 8), (8, 10), (10, 14))
        )
        assert words[:4] == ["$0", "$1", "$2", "$3"]
        result = mma_m16n8k16(a, b, c, dtype)
        registers.update({f"${i}": result[..., i] for i in range(4)})
        return
    read = [_operand(word, registers) for word in words[1:]]
    if name in ("mov.u32", "mov.b32"):
        registers[words[0]] = read[0]
    elif name in ARITHMETIC:
        registers[words[0]] = ARITHMETIC[name](*read)
    elif name == "and.b32":
        registers[words[0]] = read[0] & read[1]
    elif name == "setp.eq.u32":
        registers[words[0]] = read[0] == read[1]
    elif name == "selp.b32":
        registers[words[0]] = torch.where(read[2], read[0], read[1])
    elif name == "shfl.sync.bfly.b32":
        assert (int(words[3], 0), int(words[4], 0)) == (0x1F, 0xFFFFFFFF), "all lanes take part"
        registers[words[0]] = read[0][..., LANES ^ int(words[2], 0)]
    else:
        raise NotImplementedError(instruction)


def _operand(word: str, registers: dict[str, Any]) -> Any:
    if word == "%laneid":
        return LANES.to(torch.int32)
    return registers[word] if word in registers else signed(torch.tensor(int(word, 0)))


def mma_sp(
    a: Tensor,  # int32 [..., 32, 4]: two kept values each
    b: Tensor,  # int32 [..., 32, 4]: two inputs each
    c: Tensor,  # float32 [..., 32, 4]
    places: Tensor,  # int32 [..., 32]
    selector: int,
    dtype: torch.dtype,
) -> Tensor:
    """`mma.sp.m16n8k32`: by PTX ISA, matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16."""
    g, t = LANES // 4, LANES % 4
    batch = a.shape[:-2]
    i = torch.arange(8)  # elements of a fragment: two in each of four registers
    values = torch.zeros(*batch, 16, 16, dtype=torch.float64)
    row = g[:, None] + 8 * (i // 2 % 2)
    values[..., row, t[:, None] * 2 + i % 2 + 8 * (i // 4)] = _halves(a, dtype)
    inputs = torch.zeros(*batch, 32, 8, dtype=torch.float64)
    inputs[..., t[:, None] * 2 + i % 2 + 8 * (i // 2), g[:, None].expand(32, 8)] = _halves(b, dtype)
    # Of four lanes, those of the selector tell the places of columns 0-15 and 16-31; the lower half of a word
    # is row g, the upper g + 8; two bits for each kept value.
    place = torch.zeros(*batch, 16, 16, dtype=torch.int64)
    teller = torch.nonzero(t // 2 == selector).flatten()
    bits = (places[..., teller, None].long() >> (2 * torch.arange(16))) & 3
    which = torch.arange(16)
    row = g[teller][:, None] + 8 * (which // 8)
    place[..., row, 8 * (t[teller] % 2)[:, None] + which % 8] = bits
    assert bool((place[..., ::2] < place[..., 1::2]).all()), (
        "ordered_metadata: places must increase"
    )
    dense = torch.zeros(*batch, 16, 32, dtype=torch.float64)
    dense.scatter_(-1, 4 * (which // 2) + place, values)
    product = dense @ inputs
    i = torch.arange(4)
    return (c.double() + product[..., g[:, None] + 8 * (i // 2), t[:, None] * 2 + i % 2]).float()


def _halves(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Int32 [..., 32, 4] as float64 [..., 32, 8]."""
    return words.contiguous().view(dtype).double()
