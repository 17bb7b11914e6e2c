"""What can go wrong for the person who typed: one family, one line each.

The command line prints the message of an `LLMPruneError` and exits with status 2. Every message says
what was wrong, the value seen, and what would work.
"""


class LLMPruneError(Exception):
    """Base of every error that llmprune raises on purpose."""


class ConfigError(LLMPruneError, ValueError):
    """A setting that cannot work: an unknown method, an impossible pattern, a folder that exists."""


class ModelError(LLMPruneError, ValueError):
    """A model that cannot be opened or pruned, or whose weights are not usable."""


class DataError(LLMPruneError, ValueError):
    """Calibration or evaluation data that cannot be read, or is too short."""


class WalkError(LLMPruneError, RuntimeError):
    """The block-by-block walk does not reproduce the model's own forward."""


class NotByBlock(WalkError):
    """Blocks of this family cannot be run one at a time from files: the whole model has to be there."""


class NumericalError(LLMPruneError, ArithmeticError):
    """NaN, Inf, or a Gram matrix that stays indefinite after all the damping that is allowed."""


class CheckpointError(LLMPruneError, RuntimeError):
    """A checkpoint that cannot be written or read, or whose files do not hold what was decided."""


class HubError(LLMPruneError, RuntimeError):
    """A push that did not go through; the local copy is untouched."""


class Stopped(BaseException):
    """Not an error, as KeyboardInterrupt is none: the run was asked to stop (SIGTERM) and has."""


class Lost(Exception):
    """Another process of a run of several has ended without a word."""


class Echoed(Exception):
    """A process ends because another one has, which says why."""


def short(text: object, most: int = 80) -> str:
    """What a file says, for a message: at most `most` characters, on one line, none that a terminal obeys."""
    said = str(text)[: 4 * most]
    line = " ".join(said.split()) or repr(said)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:most])
    return shown if len(shown) <= most and len(line) <= most else shown[: most - 3] + "..."


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """A hint for a mistyped `name`: `did you mean 'wanda'? Known: magnitude, sparsegpt, wanda`."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"
