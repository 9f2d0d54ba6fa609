"""Log formats: a line a record, as text or as a JSON object."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, Literal

import orjson

LogFormat = Literal["text", "json"]

# Control characters, and what ends a line in some reader.
_ESCAPES: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


class TextFormatter(logging.Formatter):
    """One line a record: what a client sent can neither begin a line nor move the cursor."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return super().formatMessage(record).translate(_ESCAPES)

    def formatException(self, ei: Any) -> str:
        """The traceback, indented: no line of it passes for a record."""
        lines = super().formatException(ei).split("\n")
        return "\n".join("  " + line.translate(_ESCAPES) for line in lines)


class JsonFormatter(logging.Formatter):
    """One object a record: time (UTC, ISO 8601), level, logger, message, exception.

    A record that was made with ``extra={"fields": {...}}`` has those beside them.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record's object."""
        time = datetime.fromtimestamp(record.created, UTC)
        value: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            value["exception"] = self.formatException(record.exc_info)
        # What is neither JSON nor well-formed text is worth a record all the same.
        return orjson.dumps(_encodable(value), default=str).decode()


def _encodable(value: Any) -> Any:
    """The value without lone surrogates, which UTF-8 cannot hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return value


def set_up_logging(form: LogFormat) -> None:
    """Log to standard error in this form; libraries only what an operator must know."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter()
        if form == "json"
        else TextFormatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    # They would report every request of a download, through the progress bar.
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
