"""The demo: a small Llama, trained here, and the made-up stories it was trained on.

`--model demo` opens `MODEL_DIR`, so that a whole pruning run needs no network and no download.
`text.py` writes the stories, `train.py` made the weights.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""A Hugging Face checkpoint: `AutoModelForCausalLM.from_pretrained(MODEL_DIR)` loads it."""
