"""The model of docs/scaling.md in numbers: seconds per block of SparseGPT on several GPUs, all rates assumed.

python benchmarks/scaling.py
"""

from __future__ import annotations

TOKENS = 128 * 2048
FORWARD, SUMS, FACTOR, SOLVER = 4e14, 5e13, 1e13, 5e12  # operations per second
LAUNCHES = 0.3 / 26624  # seconds per column, whatever the rows
READ, WRITE = 3e9, 0.3e9  # bytes per second; to write is also to checksum, flush and read back
INSIDE, BETWEEN = 3e11, 4e10  # bytes per second from GPU to GPU, in a machine and over the network
BYTES, SAMPLE = 2, 256  # of a weight, stored and computed in; tokens kept for the output error

MODELS = {  # (features, rows that read them) of each input of a block; blocks
    "Llama-3-8B": ([(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)], 32),
    "Llama-3-70B": ([(8192, 10240), (8192, 8192), (8192, 57344), (28672, 8192)], 80),
}


def seconds(inputs: list[tuple[int, int]], ranks: int) -> dict[str, float]:
    """Of every phase of one block."""
    weights = sum(n * m for n, m in inputs)
    squares, cubes = sum(n**2 for n, _ in inputs), sum(n**3 for n, _ in inputs)
    wire = INSIDE if ranks <= 8 else BETWEEN
    talks = ranks > 1
    return {
        "read, twice": 2 * BYTES * weights / READ,
        "observe and pass on": 4 * weights * TOKENS / (ranks * FORWARD),
        "sums": TOKENS * squares / (ranks * SUMS),
        "all-reduce": talks * 2 * (ranks - 1) / ranks * 2 * squares / wire,
        "factor": 2 / 3 * cubes / FACTOR,
        "solve": sum(m * n**2 for n, m in inputs) / (ranks * SOLVER)
        + LAUNCHES * sum(n for n, _ in inputs),
        "scores, weights, masks": talks * (4 + BYTES + 1) * weights / wire,
        "check and measure": 4 * SAMPLE * weights / FORWARD,
        "write and read back": BYTES * weights / WRITE,
    }


def main() -> None:
    for name, (inputs, blocks) in MODELS.items():
        counts = (1, 2, 8, 32)
        columns = [seconds(inputs, ranks) for ranks in counts]
        print(f"\n| {name}, seconds per block | " + " | ".join(f"{c} GPUs" for c in counts) + " |")
        print("|---" * 5 + "|")
        for phase in columns[0]:
            print(f"| {phase} | " + " | ".join(f"{c[phase]:.2f}" for c in columns) + " |")
        totals = [sum(c.values()) for c in columns]
        print("| all | " + " | ".join(f"{t:.2f}" for t in totals) + " |")
        print(
            f"| minutes, {blocks} blocks | "
            + " | ".join(f"{t * blocks / 60:.1f}" for t in totals)
            + " |"
        )


if __name__ == "__main__":
    main()
