"""Make the golden files: a small problem of our own with its answers, and numbers from the papers' code.

    python tests/golden/make.py [shared/oracles]

`problem.safetensors` holds seeded weights and inputs, and what magnitude, Wanda and SparseGPT make of
them, computed here in float64 with numpy and nothing of llmprune. `oracles.json` holds facts about the
masks that the papers' own code gave on another model; it is only rewritten when the folder is named.
README.md says where those come from.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
OUT, IN, TOKENS = 32, 160, 96
DEAD = (7, 64, 159)  # features that no token has
ZERO_ROW = 5
DAMPING, BLOCK = 0.01, 128

Array = np.ndarray
# test perplexity of wikillama-5m, from the table that came with the masks
PERPLEXITY = {
    "dense": 30.745,
    "magnitude 0.5": 32.677, "magnitude 0.6": 35.606, "magnitude 0.7": 45.180,
    "magnitude 2:4": 36.448, "magnitude 4:8": 34.425,
    "wanda 0.5": 32.735, "wanda 0.6": 35.395, "wanda 0.7": 43.697,
    "wanda 2:4": 36.086, "wanda 4:8": 34.159,
    "sparsegpt 0.5": 31.914, "sparsegpt 0.6": 33.443, "sparsegpt 0.7": 37.430,
    "sparsegpt 2:4": 33.793, "sparsegpt 4:8": 32.877,
}  # fmt: skip


def problem() -> tuple[Array, Array]:
    """Weights [OUT, IN] that bfloat16 holds exactly, with ties, and correlated inputs [TOKENS, IN]."""
    random = np.random.default_rng(20240607)
    weight = random.normal(size=(OUT, IN)).astype(np.float32) * np.float32(0.05)
    weight = (weight.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    weight[ZERO_ROW] = 0
    mix = np.eye(IN) + 0.3 * random.normal(size=(IN, IN)) / IN**0.5
    scale = 10.0 ** random.uniform(-0.7, 0.7, size=IN)
    inputs = ((random.normal(size=(TOKENS, IN)) @ mix) * scale).astype(np.float32)
    inputs[:, DEAD] = 0
    return weight, inputs


def lowest(score: Array, removed: int) -> Array:
    """Mask of the `removed` lowest in each row of `score`, the left of equals first."""
    order = np.argsort(score, axis=1, kind="stable")[:, :removed]
    gone = np.zeros(score.shape, dtype=bool)
    np.put_along_axis(gone, order, True, axis=1)
    return gone


def keep_share(score: Array) -> Array:
    """Half of each row stays."""
    return ~lowest(score, score.shape[1] // 2)


def keep_nm(score: Array, n: int, m: int) -> Array:
    """The n highest of every m neighbours stay."""
    return ~lowest(score.reshape(-1, m), m - n).reshape(score.shape)


def sparsegpt(weight: Array, inputs: Array, nm: tuple[int, int] | None) -> tuple[Array, Array]:
    """SparseGPT's weights and keep mask; without `nm` half of each column block goes.

    The weights are those of the paper's code, which removes what scores no more than the first that
    should stay; the mask has the exact count.
    """
    gram = inputs.T.astype(np.float64) @ inputs
    diagonal = gram.diagonal().copy()
    dead = diagonal == 0
    mean = diagonal[~dead].mean()
    gram[dead, dead] = mean
    inverse = np.linalg.inv(gram + DAMPING * mean * np.eye(IN))
    rows = np.zeros_like(inverse)
    for j in range(IN):  # the inverse once the columns before j are gone
        rows[j, j:] = inverse[j, j:]
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    cost = rows.diagonal()
    w = weight.astype(np.float64)
    w[:, dead] = 0
    gone = np.zeros(w.shape, dtype=bool)
    exact = np.zeros(w.shape, dtype=bool)
    for j in range(IN):
        if nm is not None and j % nm[1] == 0:
            group = slice(j, j + nm[1])
            gone[:, group] = lowest(w[:, group] ** 2 / cost[group], nm[1] - nm[0])
            exact[:, group] = gone[:, group]
        if nm is None and j % BLOCK == 0:
            block = slice(j, min(j + BLOCK, IN))
            score = w[:, block] ** 2 / cost[block]
            half = score.size // 2
            gone[:, block] = score <= np.sort(score, axis=None)[half]
            exact[:, block] = lowest(score.reshape(1, -1), half).reshape(score.shape)
        w[:, j:] -= np.outer(np.where(gone[:, j], w[:, j], 0) / rows[j, j], rows[j, j:])
    w[gone] = 0
    return w, ~exact


def answers(weight: Array, inputs: Array) -> dict[str, Array]:
    """Everything that goes into problem.safetensors."""
    magnitude = np.abs(weight.astype(np.float64))
    wanda = magnitude * np.sqrt((inputs.astype(np.float64) ** 2).sum(0))
    found: dict[str, Array] = {"weight": weight, "inputs": inputs}
    found["keep magnitude 0.5"] = keep_share(magnitude.reshape(1, -1)).reshape(weight.shape)
    found["keep wanda 0.5"] = keep_share(wanda)
    for n, m in ((2, 4), (4, 8)):
        found[f"keep magnitude {n}:{m}"] = keep_nm(magnitude, n, m)
        found[f"keep wanda {n}:{m}"] = keep_nm(wanda, n, m)
        found[f"weight sparsegpt {n}:{m}"], found[f"keep sparsegpt {n}:{m}"] = sparsegpt(
            weight, inputs, (n, m)
        )
    found["weight sparsegpt 0.5"], found["keep sparsegpt 0.5"] = sparsegpt(weight, inputs, None)
    for name, value in found.items():
        found[name] = np.packbits(value) if value.dtype == bool else value.astype(np.float32)
    return found


def facts(folder: Path) -> dict[str, object]:
    """Numbers about the masks in `folder`: how many weights each keeps, and the hash of its bits."""
    masks: dict[str, dict[str, list[object]]] = {}
    for path in sorted(folder.glob("kept_*.safetensors")):
        _, method, pattern = path.stem.split("_")
        masks[f"{method} {pattern.replace('of', ':')}"] = {
            name: [int(np.unpackbits(bits).sum()), hashlib.sha256(bits.tobytes()).hexdigest()]
            for name, bits in sorted(load_file(path).items())
        }
    return {"model": "wikillama-5m", "perplexity": PERPLEXITY, "kept, sha256 of packed bits": masks}


if __name__ == "__main__":
    save_file(answers(*problem()), HERE / "problem.safetensors")
    if len(sys.argv) > 1:
        text = json.dumps(facts(Path(sys.argv[1])), indent=1)
        (HERE / "oracles.json").write_text(text + "\n")
