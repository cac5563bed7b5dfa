"""Runs a CUDA kernel on the CPU: the PTX that NVRTC makes of it, instruction by instruction.

Every thread of a launch is a lane of numpy arrays. Each step runs the earliest instruction that is
next for any lane that does not wait, for all lanes that are at it: diverged lanes meet again.
Registers and shared memory begin as NaN. What a device leaves undefined raises `Fault`: an address
out of bounds or misaligned, a value that one thread writes and another reads or writes with no
barrier between, a shuffle without the whole warp, a barrier that some threads never reach.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from struct import Struct, unpack_from
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt.kernels import layer_norm, nvrtc
from gpt.kernels.layer_norm import Launch, Plan
from tests.tools.ptx_memory import Fault, Memory

LANES = 1 << 15  # how many run at once, in whole blocks
WAITS, DONE = 1 << 20, 1 << 30  # added to the next instruction of a lane
BARRIERS = 16  # per block


class Instruction(NamedTuple):
    """`@!%p1 ld.global.v2.u32 {%r1, %r2}, [%rd1+8];`: negated, %p1, (ld, global, v2, u32), …"""

    negated: bool
    predicate: str | None
    name: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


class Kernel(NamedTuple):
    parameters: list[tuple[str, str]]  # type and name
    threads: int  # the most that a block has
    registers: dict[str, tuple[type, int]]  # type and number of each kind
    shared: dict[str, int]  # where each array begins
    shared_bytes: int
    code: list[Instruction]
    labels: dict[str, int]


@cache
def kernels(source: str, options: tuple[str, ...], arch: str) -> dict[str, Kernel]:
    """The kernels of a source, by name, as compiled for `arch` (`compute_90`)."""
    code, _ = nvrtc.compile_source(source, options, arch)
    _, *entries = re.sub(r"//.*|\.pragma.*|\0", "", code.decode()).split(".visible .entry ")
    return {entry[: entry.index("(")]: parse(entry) for entry in entries}


def parse(entry: str) -> Kernel:
    head, body = entry.split("{", 1)
    [threads] = re.findall(r"\.maxntid (\d+)", head)
    kernel = Kernel(re.findall(r"\.param \.(\w+) (\w+)", head), int(threads), {}, {}, 0, [], {})
    size = 0
    for line in map(str.strip, body.splitlines()):
        if found := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>;", line):
            bits = np.bool_ if found[1] == "pred" else dtype("u" + found[1][1:])
            kernel.registers[found[2]] = bits, int(found[3])
        elif found := re.fullmatch(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\];", line):
            kernel.shared[found[1]] = size
            size += -(-int(found[2]) // 16) * 16
        elif found := re.fullmatch(r"(\S+):", line):
            kernel.labels[found[1]] = len(kernel.code)
        elif found := re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);", line):
            operands = tuple(re.findall(r"\{.*?\}|\[.*?\]|[^,\s]+", found[4]))
            name = tuple(found[3].split("."))
            kernel.code.append(Instruction(found[1] == "!", found[2], name, operands, line))
        elif line not in ("", "{", "}"):
            raise ValueError(f"unknown to this interpreter: {line}")
    return kernel._replace(shared_bytes=size)


@cache
def dtype(name: str) -> Any:
    """u16, b32, s64, f32, pred, … as numpy has them; bits without a type are unsigned."""
    if name == "pred":
        return np.dtype(bool)
    return np.dtype({"b": "u", "s": "i"}.get(name[0], name[0]) + str(int(name[1:]) // 8))


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.floor_divide,  # integers, which are not negative here
    "min": np.fmin,  # a number and a NaN give the number
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "selp": lambda a, b, condition: np.where(condition, a, b),
    "fma": lambda a, b, c: (np.float64(a) * b + c).astype(np.float32),
    "rsqrt": lambda a: ((1 + 2**-22.9) / np.sqrt(np.float64(a))).astype(np.float32),  # worst case
}
MANNERS = {"rn", "lo", "approx", "to", "global"}  # modifiers, such as `rn` in `fma.rn.f32`
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@dataclass
class Blocks:
    """Some blocks of a launch, from their first instruction to their last."""

    kernel: Kernel
    numbers: Any  # the blocks' indices in the grid
    first_lane: int
    grid: tuple[int, int]
    threads: int
    arguments: dict[str, Any]
    memory: list[Memory]

    def __post_init__(self) -> None:
        n = len(self.numbers) * self.threads
        self.names = np.arange(n) + self.first_lane
        self.next = np.zeros(n, np.int64)
        self.barrier, self.wanted = np.zeros((2, n), np.int64)  # number, threads
        self.registers = {
            f"%{kind}{i}": np.full(n, -1).astype(bits)
            for kind, (bits, count) in self.kernel.registers.items()
            for i in range(count)
        }
        block_y, block_x = np.divmod(np.repeat(self.numbers, self.threads), self.grid[0])
        for name, value in (
            ("tid.x", np.tile(np.arange(self.threads), len(self.numbers))),
            ("ctaid.x", block_x),
            ("ctaid.y", block_y),
            ("nctaid.x", np.full(n, self.grid[0])),
            ("nctaid.y", np.full(n, self.grid[1])),
        ):
            self.registers["%" + name] = value.astype(np.uint32)
        # The blocks' shared memories, one after another, in words of 4 bytes.
        words = np.full(len(self.numbers) * self.kernel.shared_bytes // 4, -1).astype(np.uint32)
        self.shared = Memory(0, words)

    def run(self) -> None:
        while (at := self.next.min()) < DONE:
            if at >= WAITS:
                self.pass_barrier()
                continue
            self.lanes = np.flatnonzero(self.next == at)
            self.next[self.lanes] += 1
            instruction = self.kernel.code[at]
            try:
                self.step(instruction)
            except Fault as fault:
                raise Fault(f"{fault}: {instruction.text}") from None

    def pass_barrier(self) -> None:
        """Release the threads of each barrier at which as many wait as it needs."""
        waiting = np.flatnonzero(self.next < DONE)
        block = waiting // self.threads
        barrier, wanted = self.barrier[waiting] + BARRIERS * block, self.wanted[waiting]
        full = np.bincount(barrier)[barrier] == wanted
        if not np.isin(block, block[full]).all():
            raise Fault("a deadlock: some threads of the block never reach the barrier")
        waiting, barrier, wanted = waiting[full], barrier[full], wanted[full]
        self.next[waiting] -= WAITS
        first, last = np.zeros((2, barrier.max() + 1), np.int64)
        last[barrier] = self.names[waiting]
        first[barrier[::-1]] = self.names[waiting[::-1]]
        if (last[barrier] - first[barrier] + 1 != wanted).any():
            raise Fault("a barrier of threads that do not stand in a row")
        start, end = np.zeros((2, self.names[-1] + 1), np.int64)
        start[self.names[waiting]], end[self.names[waiting]] = first[barrier], last[barrier]
        self.shared.meet(start, end)

    def step(self, instruction: Instruction) -> None:
        name, operands = instruction.name, instruction.operands
        if instruction.predicate is not None:
            holds = self.registers[instruction.predicate][self.lanes] != instruction.negated
            self.lanes = self.lanes[holds]
        if not len(self.lanes):
            return
        match name:
            case ["bra", *_]:
                self.next[self.lanes] = self.kernel.labels[operands[0]]
            case ["ret"]:
                self.next[self.lanes] = DONE
            case ["bar" | "barrier", "sync"]:
                number, *threads = (self.get(operand, "u32") for operand in operands)
                wanted = np.asarray(threads[0] if threads else self.threads)
                if (number >= BARRIERS).any() or (wanted % 32).any():
                    raise Fault("no such barrier")
                self.barrier[self.lanes], self.wanted[self.lanes] = number, wanted
                self.next[self.lanes] += WAITS
            case ["ld", "param", kind]:
                value = self.arguments[operands[1][1:-1]]
                self.set(operands[0], np.asarray(value).astype(dtype(kind)))
            case ["ld", space, *_, kind]:
                to = operands[0].strip("{}").split(", ")
                memory, addresses = self.locate(space, operands[1])
                size = dtype(kind).itemsize
                items = memory.read(addresses, size * len(to), self.names[self.lanes])
                for register, value in zip(to, items.view(dtype(kind)).T, strict=True):
                    self.set(register, value)
            case ["st", space, *_, kind]:
                values = [self.get(o, kind) for o in operands[1].strip("{}").split(", ")]
                memory, addresses = self.locate(space, operands[0])
                items = np.stack(np.broadcast_arrays(*values, self.lanes)[:-1], 1)
                memory.write(addresses, items, self.names[self.lanes])
            case ["shfl", "sync", "bfly", "b32"]:
                self.shuffle(*operands)
            case ["setp", comparison, kind] if comparison in COMPARISONS:
                values = (self.get(operand, kind) for operand in operands[1:])
                self.set(operands[0], COMPARISONS[comparison](*values))
            case ["mov", "b32"] if operands[1][0] == "{":
                low, high = (self.get(o, "u16") for o in operands[1].strip("{}").split(", "))
                self.set(operands[0], low | np.uint32(high) << np.uint32(16))
            case ["mov", "b32"] if operands[0][0] == "{":
                word = self.get(operands[1], "u32")
                for i, register in enumerate(operands[0].strip("{}").split(", ")):
                    self.set(register, (word >> np.uint32(16 * i)).astype(np.uint16))
            case ["bfi", "b32"]:
                start, length = (int(operand) for operand in operands[3:])
                mask = np.uint32(((1 << length) - 1) << start)
                field, into = (self.get(operand, "u32") for operand in operands[1:3])
                self.set(operands[0], into & ~mask | field << np.uint32(start) & mask)
            case ["cvt", "rn", "bf16x2", "f32"]:
                high, low = (as_bf16(self.get(operand, "f32")) for operand in operands[1:])
                self.set(operands[0], high << np.uint32(16) | low)
            case ["cvt", *how, to_kind, kind] if {*how} <= {"rn"}:
                self.set(operands[0], self.get(operands[1], kind).astype(dtype(to_kind)))
            case ["mul", "wide", kind]:
                wide = dtype(kind[0] + str(2 * int(kind[1:])))
                a, b = (self.get(operand, kind).astype(wide) for operand in operands[1:])
                self.set(operands[0], a * b)
            case [operation, *how, kind] if operation in ARITHMETIC and {*how} <= MANNERS:
                kinds = [kind] * (len(operands) - 1)
                if operation == "selp":
                    kinds[2] = "pred"
                values = (self.get(o, k) for o, k in zip(operands[1:], kinds, strict=True))
                self.set(operands[0], ARITHMETIC[operation](*values))
            case _:
                raise ValueError(f"unknown to this interpreter: {instruction.text}")

    def get(self, operand: str, kind: str) -> Any:
        """A register's value in each lane, or the single value of a number or a name."""
        wanted = dtype(kind)
        if operand[0] == "%":
            bits = self.registers[operand][self.lanes]
        elif operand[:2] == "0f":
            bits = np.asarray(int(operand[2:], 16), np.uint32)
        elif operand in self.kernel.shared:
            bits = np.asarray(self.kernel.shared[operand], np.uint64)
        else:
            bits = np.asarray(int(operand) % (1 << 8 * wanted.itemsize), f"u{wanted.itemsize}")
        return bits if kind == "pred" else bits.astype(f"u{wanted.itemsize}").view(wanted)

    def set(self, register: str, value: Any) -> None:
        to = self.registers[register]
        to[self.lanes] = value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")

    def locate(self, space: str, operand: str) -> tuple[Memory, Any]:
        """The memory that an operand such as `[%rd1+8]` is in, and each lane's address there."""
        name, _, offset = operand[1:-1].partition("+")
        addresses = self.get(name, "s64") + int(offset or 0) + np.zeros_like(self.lanes)
        if space == "shared":
            if addresses.min() < 0 or addresses.max() >= self.kernel.shared_bytes:
                raise Fault("out of bounds")
            return self.shared, addresses + self.lanes // self.threads * self.kernel.shared_bytes
        for memory in self.memory:
            if 0 <= addresses.min() - memory.base < memory.items.nbytes:
                return memory, addresses
        raise Fault("out of bounds")

    def shuffle(self, to: str, value: str, step: str, clamp: str, mask: str) -> None:
        warps = self.lanes.reshape(-1, 32) if len(self.lanes) % 32 == 0 else self.lanes[:, None]
        whole = warps[:, :1] // 32 * 32 + np.arange(32)
        if warps.shape != whole.shape or (warps != whole).any():
            raise Fault("a shuffle without the whole warp")
        if (self.get(clamp, "u32") != 31).any() or (self.get(mask, "u32") != 2**32 - 1).any():
            raise Fault("a shuffle of a part of the warp")
        partner = np.arange(32) ^ int(self.get(step, "u32").flat[0])
        shuffled = self.get(value, "u32").reshape(-1, 32)[:, partner].reshape(-1)
        self.set(to.partition("|")[0], shuffled)


def as_bf16(value: Any) -> Any:
    """bf16 bits, rounded to nearest even; a NaN becomes the device's NaN."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded)


def queue(plan: Plan, _: torch.device, *launches: Launch, arch: str = "compute_90") -> None:
    """Replaces `queue` of gpt/kernels/layer_norm.py and takes CPU tensors."""
    for launch in launches:
        run(plan, launch, arch)


def run(
    plan: Plan, launch: Launch, arch: str = "compute_90", only_last_block: bool = False
) -> None:
    name, grid, threads, arguments = launch
    kernel = kernels(layer_norm.SOURCE, plan.options(), arch)[name]
    if not 0 < threads <= kernel.threads or 0 in grid:
        raise Fault(f"{grid} blocks of {threads} threads, compiled for up to {kernel.threads}")
    packed = Struct(layer_norm.ARGUMENTS[name]).pack(*layer_norm.as_numbers(arguments))
    assert len(packed) == 8 * len(kernel.parameters)
    values, memory = {}, []
    for i, (kind, parameter) in enumerate(kernel.parameters):
        (values[parameter],) = unpack_from({"u64": "q", "f32": "f"}[kind], packed, 8 * i)
    for argument in arguments:
        if isinstance(argument, Tensor):
            bits = {2: torch.int16, 4: torch.int32}[argument.itemsize]
            items = argument.detach().view(-1).view(bits).numpy().view(f"u{argument.itemsize}")
            memory.append(Memory(argument.data_ptr(), items))
    blocks = np.arange(grid[0] * grid[1])[-1 if only_last_block else 0 :]
    at_once = LANES // threads
    with np.errstate(all="ignore"):
        for i in range(0, len(blocks), at_once):
            some = blocks[i : i + at_once]
            Blocks(kernel, some, i * threads + 1, grid, threads, values, memory).run()
