"""`python -m llmprune`."""

import sys

if __name__ == "__main__":
    try:
        from llmprune.cli import entry

        entry()
    except KeyboardInterrupt:  # while Python was still importing; the rest is in cli.main
        sys.exit(130)
