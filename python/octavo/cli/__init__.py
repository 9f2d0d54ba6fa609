"""The ``octavo`` command: serve, chat, complete, run-batch, bench, collect-env."""
