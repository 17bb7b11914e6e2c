"""`python -m llmprune`."""

from llmprune.cli import entry

if __name__ == "__main__":
    entry()
