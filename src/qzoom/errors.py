"""Every error qzoom raises on purpose.

One family, so that callers catch `QZoomError` and print its message: each message is one sentence that says what is
wrong, where, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class QZoomError(Exception):
    """Base of all deliberate errors."""


class ImageError(QZoomError):
    """A picture that cannot be used: missing, damaged, too large, too small, of an unknown format."""


class FetchRefusedError(ImageError):
    """A picture address that will not be fetched, now or later: not allowed, not found, too large (HTTP 422)."""


class FetchFailedError(ImageError):
    """A picture address that could not be fetched this time; trying again may help (HTTP 503)."""


class FetchTimeoutError(FetchFailedError):
    """A picture address that did not deliver in the time allowed (HTTP 504)."""


class QuestionError(QZoomError):
    """A question or chat message that cannot be used: empty, too long, of the wrong shape."""


class LengthError(QuestionError):
    """Prompt and answer together are longer than the model reads."""

    def __init__(self, prompt: int, new: int, most: int) -> None:
        super().__init__(
            f"{self.facts(prompt, new, most)}; shorten the question, or lower max_new_tokens, coarse_tokens or "
            "region_tokens."
        )
        self.numbers = (prompt, new, most)

    def __reduce__(self) -> tuple[type, tuple[int, int, int]]:
        """Between processes."""
        return type(self), self.numbers

    @staticmethod
    def facts(prompt: int, new: int, most: int) -> str:
        """The sentence without its advice, which depends on how the question was asked."""
        return f"The prompt takes {prompt} tokens and the answer up to {new}, but the model reads at most {most}"


class ConfigError(QZoomError):
    """A configuration with an unknown key, a wrong type or a value out of range."""


class RecipeError(ConfigError):
    """A recipe that cannot be read, or holds an unknown key or a wrong value: a wrong call of the command."""


class SchemaError(ConfigError):
    """A JSON schema that the grammar cannot follow."""


class BudgetError(ConfigError):
    """Visual-token limits that contradict each other or the picture."""


class CheckpointError(QZoomError):
    """A model or adapter that cannot be found, read or matched to its base."""


class HeadsMissingError(CheckpointError):
    """Zooming was asked of a model that has no gate or region branch."""


class DeviceError(QZoomError):
    """A device placement that qzoom does not support."""


class DataError(QZoomError):
    """A data file (questions, labels, records) with a missing, malformed or contradictory entry."""


class QueueFullError(QZoomError):
    """More requests wait than the server keeps."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        """Between processes."""
        return type(self), (str(self), self.retry_after_s)


class StoppingError(QZoomError):
    """The server is shutting down and takes nothing new."""


class DeadlineError(QZoomError):
    """A request was not answered in the time it had."""


class EngineDownError(QZoomError):
    """The engine behind a server cannot answer now (HTTP 503)."""


class EngineRefusedError(QZoomError):
    """The engine behind a server refuses this request, or sends no answer (HTTP 502)."""


class InternalError(QZoomError):
    """A defect of qzoom or the machine; the text names no internals, the log has them."""


class StopRunError(QZoomError):
    """The whole run cannot go on: the budget is spent, a key is refused, an endpoint was down from the start."""


class BudgetSpentError(StopRunError):
    """The requests or the money that calls of language models may cost are used up."""


class EndpointError(StopRunError):
    """An endpoint of a language model cannot be used: it is down, or refuses the key or the model."""


class LaterError(QZoomError):
    """This item could not be worked on now (an endpoint failed for too long). Nothing is stored, so that a rerun tries
    it again; the run continues with the other items."""


class CallRefusedError(QZoomError):
    """An endpoint refuses this one call for good (too long, not allowed); trying again would not help."""


def reason_of(error: BaseException, most: int = 300) -> str:
    """What another library's error says, on one line, for the middle of a sentence of ours; else its kind."""
    return " ".join(str(error).split())[:most].rstrip(". ") or type(error).__name__


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


_SHORT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")  # torch, CUDA's libraries


def may_pass(error: BaseException) -> bool:
    """Whether the same may go well another time: a file is missing or cannot be read by the system, an address did not
    answer, or memory was short. What a decoder cannot read is an OSError, too, but not one of the system."""
    causes = [one for one in (error, error.__cause__) if one is not None]
    unread = any(isinstance(one, OSError) and one.errno is not None for one in causes)
    return unread or isinstance(error, FetchFailedError) or any(map(is_short_of_memory, causes))


def is_short_of_memory(error: BaseException) -> bool:
    """Whether it says that memory was short; on a CPU, and of CUDA's libraries, torch raises a plain RuntimeError."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(words in text for words in _SHORT_OF_MEMORY)
