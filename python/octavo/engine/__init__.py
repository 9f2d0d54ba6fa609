"""The engine: asyncio's side, and the one thread that steps."""
