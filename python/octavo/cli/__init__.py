"""The ``octavo`` command: serve, chat, complete, run-batch, bench, doctor, collect-env."""
