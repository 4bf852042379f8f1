"""One family of errors: what was given, what was expected, what to do."""


class SpatialTokensError(ValueError):
    """Whatever a caller can get wrong: a shape, a dtype, a config field, a file."""


def shown(value: object) -> str:
    """A value as an error message can hold it: short, on one line, and never an error of its own."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a number of thousands of digits, a list nested as deep, a nested tensor without sizes
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def on_one_line(text: str) -> str:
    """A text whose line breaks and control characters, those of a file's name say, are written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """What another library's error says, on one line, to be quoted in one of ours."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]


class MissingExtraError(SpatialTokensError, ImportError):
    """An optional library is not installed; the text names the extra that brings it.

    Args:
        library: The library that could not be imported.
        extra: The extra of `spatial-tokens` that installs it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; run: pip install 'spatial-tokens[{extra}]'")
