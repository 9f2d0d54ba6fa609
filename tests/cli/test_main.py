"""The command line: where values come from, what they may look like, what is refused."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octavo import serve as module
from octavo.cli import main as cli
from octavo.cli import serve
from octavo.config import EngineConfig
from octavo.flags import FlagError, Parser, add_flags, flags_of, parse_int, resolve
from octavo.server.http.config import ServerConfig

CONFIGS = (EngineConfig, ServerConfig)


def parse(*words: str, env: dict[str, str] | None = None) -> tuple[EngineConfig, ServerConfig]:
    parser = Parser()
    add_flags(parser, *CONFIGS)
    engine, server = resolve(vars(parser.parse_args(words)), CONFIGS, env or {})
    return engine, server


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-1", -1),
        ("8k", 8000),
        ("8K", 8192),
        ("8Ki", 8192),
        ("25.6k", 25600),
        ("1.5M", 1572864),
        ("2g", 2_000_000_000),
        ("2G", 2 * 2**30),
        ("2GiB", 2 * 2**30),
        ("1_000", 1000),
        ("9007199254740993", 9007199254740993),
        ("0.1g", 100_000_000),
    ],
)
def test_numbers(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0001k", "1kk", "8 k b c", "1e3", "0x10"])
def test_not_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_int(text)


def test_defaults_are_the_config_s() -> None:
    assert parse() == (EngineConfig(), ServerConfig())


def test_every_kind_of_flag() -> None:
    words = (
        "--model m --max-model-len 8k --kv-cache-memory-bytes 2G --dtype bfloat16 "
        "--served-model-name a b --no-enable-prefix-caching --enforce-eager -tp 1 "
        "--gpu-memory-utilization 0.5 --cuda-graph-sizes 1 2 4 --api-key x y "
        "--port 0 --enable-log-requests --shutdown-timeout 3.5"
    )
    overrides = ("--override-generation-config", '{"temperature": 0.5}')
    structured = ("--structured-outputs-config", '{"disable_any_whitespace": true, "backend": "x"}')
    engine, server = parse(*words.split(), *overrides, *structured)
    assert engine.structured_outputs_config == {"disable_any_whitespace": True, "backend": "x"}
    assert engine.model == "m"
    assert engine.max_model_len == 8000
    assert engine.kv_cache_memory_bytes == 2**31
    assert engine.dtype == "bfloat16"
    assert engine.served_model_name == ("a", "b")
    assert not engine.enable_prefix_caching
    assert engine.enforce_eager
    assert engine.gpu_memory_utilization == 0.5
    assert engine.cuda_graph_sizes == (1, 2, 4)
    assert engine.override_generation_config == {"temperature": 0.5}
    assert server.api_key == ("x", "y")
    assert (server.port, server.enable_log_requests) == (0, True)
    assert server.shutdown_timeout == 3.5


def test_every_flag_has_a_group_and_help_and_no_two_share_a_name() -> None:
    names = []
    for config in CONFIGS:
        for flag in flags_of(config):
            assert flag.help
            assert flag.group
            names.append(flag.name)
    assert len(names) == len(set(names))


def test_precedence(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text(
        "port: 1\nmax-model-len: 8k\nmax_num_seqs: 7\nblock-size: 8\n"
        "served-model-name: [a, b]\nenable-prefix-caching: false\nhf-overrides: {x: 1}\n"
    )
    env = {"OCTAVO_PORT": "2", "OCTAVO_MAX_NUM_SEQS": "8", "OCTAVO_API_KEY": "k1, k2"}
    engine, server = parse("--config", str(path), "--port", "3", env=env)
    assert server.port == 3
    assert engine.max_num_seqs == 8
    assert engine.block_size == 8
    assert engine.max_model_len == 8000
    assert engine.served_model_name == ("a", "b")
    assert engine.hf_overrides == {"x": 1}
    assert not engine.enable_prefix_caching
    assert server.api_key == ("k1", "k2")
    assert parse(env={**env, "OCTAVO_CONFIG": str(path)})[1].port == 2


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("TRUE", True), ("no", False), ("off", False)]
)
def test_booleans_in_the_environment(value: str, expected: bool) -> None:
    assert parse(env={"OCTAVO_ENFORCE_EAGER": value})[0].enforce_eager is expected


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"OCTAVO_PORT": "many"}, "--port.*OCTAVO_PORT"),
        ({"OCTAVO_ENFORCE_EAGER": "maybe"}, "true or false"),
        ({"OCTAVO_DTYPE": "float8"}, "one of"),
        ({"OCTAVO_PORT": "70000"}, "--port must be"),
        ({"OCTAVO_BLOCK_SIZE": "0"}, "--block-size must be"),
        ({"OCTAVO_HF_OVERRIDES": "[1]"}, "JSON object"),
        ({"OCTAVO_CONFIG": "/no/such/file"}, "No such file"),
    ],
)
def test_bad_values_name_the_flag(env: dict[str, str], says: str) -> None:
    with pytest.raises(FlagError, match=says):
        parse(env=env)


@pytest.mark.parametrize(
    ("yaml", "says"),
    [
        ("prot: 1", "unknown key 'prot'; did you mean port"),
        ("port: [1", "is not YAML"),
        ("- 1", "keys and values"),
        ("port: yes", "not a whole number"),
        ("api-key: {a: 1}", "not text"),
    ],
)
def test_bad_yaml(tmp_path: Path, yaml: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml)
    with pytest.raises(FlagError, match=says):
        parse("--config", str(path))


def run(*words: str) -> int:
    try:
        return cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve", "--max-modle-len", "5"], "did you mean --max-model-len"),
        (["serve", "--max_modl_len", "5"], "did you mean --max-model-len"),
        (["serve", "--tensor-parallel", "2"], "did you mean --tensor-parallel-size"),
        (["chat", "--modle", "m"], "octavo chat: error: unknown argument '--modle'; did you mean"),
        (["complete", "--max-token", "4", "x"], "did you mean --max-tokens"),
        (["bench", "serve", "--concurency", "4"], "did you mean --concurrency"),
        (["bench", "latency", "--max-modle-len", "5"], "did you mean --max-model-len"),
        (["collect-env", "--hlep"], "did you mean --help"),
        (["serve", "a", "b"], "unknown argument 'b'"),
        (["serve", "a", "--model", "b"], "differ"),
        (["serve", "--dtype", "int3"], "is not one of auto, float16"),
        (["serve", "--tool-parser-plugin", "x.py"], "x.py: octavo runs no code but its own"),
        (["serve", "--reasoning-effort-map", '{"lots": "high"}'], "--reasoning-effort-map must"),
        (["serve", "--reasoning-effort-map", '{"low": 1}'], "--reasoning-effort-map must"),
        (["serve", "--long-prefill-token-threshold", "-1"], "must be at least 0"),
        (["serve", "--max-model-len", "long"], "is not a number"),
        (["serve", "--tensor-parallel-size", "0"], "--tensor-parallel-size must be at least 1"),
        (["serve", "--structured-outputs-config", '{"magic": 1}'], "magic is not one of backend"),
        (["serve", "--structured-outputs-config", '{"backend": 1}'], "must be a string"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_mistakes_are_explained(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*words) == 2
    assert says in capsys.readouterr().err


def test_help_is_grouped_and_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--help") == 0
    out = capsys.readouterr().out
    for group in ("model:", "memory:", "scheduler:", "execution:", "front end:", "access:"):
        assert f"\n{group}\n" in out
    assert len(out.splitlines()) < 60
    assert run("--version") == 0


@pytest.mark.parametrize(
    ("topic", "shown", "hidden"),
    [
        ("all", ["memory:", "OCTAVO_ALLOWED_HOSTS", "--no-enable-prefix-caching"], []),
        ("page", ["memory:", "OCTAVO_ALLOWED_HOSTS"], []),
        ("listgroup", ["memory\n", "front end\n"], ["--port"]),
        ("memory", ["--block-size N", "OCTAVO_BLOCK_SIZE"], ["--port"]),
        ("ModelConfig", ["--max-model-len N"], ["--port"]),
        ("front-end", ["--root-path PATH"], ["--block-size"]),
        ("--cudagraph-capture-sizes", ["--cuda-graph-sizes N ..."], ["--port"]),
        ("max_model_len", ["--max-model-len N"], ["--max-num-seqs"]),
        ("ssl", ["--ssl-keyfile", "--ssl-certfile"], ["--host"]),
        ("swap-space", ["accepted, and changes nothing: octavo computes"], ["--host"]),
        ("enable-lora", ["refused: octavo has no LoRA yet"], ["--host"]),
        ("tokenizer-mode", ["only auto or hf or slow"], ["--host"]),
    ],
)
def test_help_of_a_topic(
    topic: str, shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", f"--help={topic}") == 0
    out = capsys.readouterr().out
    assert all(text in out for text in shown), out
    assert not any(text in out for text in hidden), out


def test_help_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "--help=frobnicate") == 2
    assert "--help=frobnicate: no such group or flag" in capsys.readouterr().err


def test_the_model_may_be_the_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fake_serve(engine: EngineConfig, server: ServerConfig) -> int:
        seen.append((engine, server))
        return 0

    monkeypatch.setattr(serve, "serve", fake_serve)
    assert module.main(["folder", "--port", "0"]) == 0
    assert run("serve", "--model", "folder", "--port", "0") == 0
    assert seen[0] == seen[1]
    assert seen[0][0].model == "folder"


def test_what_an_operator_can_set_right_needs_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake_serve(engine: EngineConfig, server: ServerConfig) -> int:
        raise ValueError("no such model: x")

    monkeypatch.setattr(serve, "serve", fake_serve)
    assert run("serve", "x") == 1
    assert capsys.readouterr().err == "octavo: error: no such model: x\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from octavo.cli import main as cli\n"
        "try: cli.main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'uvicorn', 'jinja2', 'transformers', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_server_s_own_modules_import_no_torch() -> None:
    code = (
        "import sys, octavo.server.lifecycle, octavo.cli.serve\n"
        "heavy = {'torch', 'transformers', 'prometheus_client', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_collect_env(capsys: pytest.CaptureFixture[str]) -> None:
    from octavo.cli.collect_env import collect_env

    report = collect_env()
    assert "octavo:" in report
    assert "torch:" in report
    assert os.path.expanduser("~") + "/" not in report


def test_the_process_s_age() -> None:
    age = time.time() - serve.process_start()
    assert 0 <= age < 3600


def test_example_command() -> None:
    command = serve.example_command("http://0.0.0.0:8000", ServerConfig(api_key=("k",)), chat=True)
    assert "http://127.0.0.1:8000/v1/chat/completions" in command
    assert "YOUR_KEY" in command
    assert '"role":"system"' in command
    assert "/v1/completions" in serve.example_command("http://x:1", ServerConfig(), chat=False)


def test_parser_keeps_no_abbreviations() -> None:
    parser = Parser()
    add_flags(parser, ServerConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(["--por", "1"])
    assert isinstance(parser.parse_args([]), argparse.Namespace)


# ------------------------------------------------------------------------- vLLM's spellings


def test_underscores_in_names() -> None:
    engine, server = parse(
        "--max_model_len", "4k", "--enable_prefix_caching", "--served-model-name=a_b"
    )
    assert (engine.max_model_len, engine.enable_prefix_caching) == (4000, True)
    assert engine.served_model_name == ("a_b",)
    assert server.port == 8000


def test_keys_of_json_behind_dots() -> None:
    engine, _ = parse(
        "--hf_overrides.rope.theta", "1e6", "--hf-overrides", '{"a_b": 1}', "--hf-overrides.name=x_y",
        "--hf-overrides.list+", "1", "--hf-overrides.list+=[2, 3]", "--hf-overrides.no", "false",
    )  # fmt: skip
    assert engine.hf_overrides == {
        "rope": {"theta": 1e6},
        "a_b": 1,
        "name": "x_y",
        "list": [1, 2, 3],
        "no": False,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hf-overrides.a"], "--hf-overrides.a needs a value"),
        (["--hf-overrides.a", "--port", "1"], "--hf-overrides.a needs a value"),
        (["--hf-overrides.a=1", "--hf-overrides.a.b=2"], "a is given as a value and as an object"),
        (["--hf-overrides.a=1", "--hf-overrides.a+=2"], "a is given as a value and as a list"),
        (["--hf-overrides", "[1]"], "is not a JSON object"),
        (["--hf-overrides", "notjson"], "--hf-overrides: 'notjson' is not a JSON object"),
        (["--allowed-origins", '["*"'], "--allowed-origins: '[\"*\"' is not a JSON list"),
        (["--max_modellen", "4"], "did you mean --max-model-len"),
        (["--enforce-eager=maybe"], "--enforce-eager: 'maybe' is not true or false"),
        (["--block-size", "two"], "--block-size: 'two' is not a whole number"),
        (["--ssl-keyfile", "k"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-cert-reqs", "2", "--ssl-certfile", "c"], "--ssl-cert-reqs needs --ssl-ca-certs"),
        (["--allow-credentials", "--allowed-origins", "*"], "--allow-credentials needs"),
        (["--tokenizer-revision", "x"], "--tokenizer-revision must be the model's revision"),
    ],
)
def test_what_is_wrong_with_them(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", *words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "did you mean" not in err or "did you mean" in message


# ------------------------------------------------------- vLLM's flags that set nothing here


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What the server was started with."""
    seen: list[tuple[EngineConfig, ServerConfig]] = []

    def fake_serve(engine: EngineConfig, server: ServerConfig) -> int:
        seen.append((engine, server))
        return 0

    monkeypatch.setattr(serve, "serve", fake_serve)
    return seen


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--swap-space 4", "--swap-space 4 changes nothing here: octavo computes preempted"),
        ("--disable-log-requests", "--disable-log-requests changes nothing here"),
        ("--enable-prompt-tokens-details", "octavo always reports them"),
        ("--tokenizer-mode auto", "--tokenizer-mode auto changes nothing here"),
        ("--tokenizer_mode=auto", "--tokenizer-mode auto changes nothing here"),
        ("-dp 1", "--data-parallel-size 1 changes nothing here"),
        ("--nnodes 1", "--nnodes 1 changes nothing here"),
        ("--cpu-offload-gb 0.0", "--cpu-offload-gb 0.0 changes nothing here"),
        ("-O3", "--optimization-level 3 changes nothing here: octavo compiles nothing"),
        ("-O 2", "--optimization-level 2 changes nothing here"),
        ("--optimization-level 0", "--optimization-level 0 changes nothing here"),
        ("--compilation-config 3", "--compilation-config changes nothing here"),
        ("-cc.cudagraph_mode FULL", "--compilation-config changes nothing here"),
        ("--compilation-config.cudagraph_mode=FULL", "--compilation-config changes nothing"),
        ("--limit-mm-per-prompt {}", "--limit-mm-per-prompt changes nothing here"),
        ("--limit-mm-per-prompt.image 2", "octavo takes text alone"),
        ("--async-scheduling", "--async-scheduling changes nothing here"),
        ("--no-async-scheduling", "--no-async-scheduling changes nothing here"),
        ("--no-enable-lora", "--no-enable-lora changes nothing here"),
        ("--enable-lora false", "--no-enable-lora changes nothing here"),
        ("--distributed-executor-backend mp", "--distributed-executor-backend mp changes"),
        ("--uvicorn-log-level warning", "--uvicorn-log-level warning changes nothing here"),
        ("--attention-backend FLASH_ATTN", "octavo has its own attention kernels"),
        ("--attention-backend flashinfer", "octavo has its own attention kernels"),
        ("--load-format bitsandbytes", "octavo finds by config.json how a file is quantized"),
        ("--data-parallel-backend ray", "a server holds one copy of a model"),
        ("--mamba-ssm-cache-dtype float32", "octavo keeps recurrent states in float32"),
        ("--load-format runai_streamer", "--load-format runai_streamer changes nothing here"),
        ("--numa-bind-nodes 0 1", "--numa-bind-nodes changes nothing here"),
    ],
)
def test_what_changes_nothing_is_one_warning(
    words: str,
    note: str,
    served: list[tuple[EngineConfig, ServerConfig]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The model may follow: none of its name is a flag's value.
    assert run("serve", *words.split(), "--port", "0", "folder") == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("octavo: warning: ")
    assert note in err
    assert served == [(EngineConfig(model="folder"), ServerConfig(port=0))]


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("--enable-lora", "--enable-lora: octavo has no LoRA yet"),
        ("--lora-modules a=b c=d", "--lora-modules: octavo has no LoRA yet"),
        ('-sc {"method":"ngram"}', "--speculative-config: octavo has no speculative decoding yet"),
        ("--speculative-config.method ngram", "octavo has no speculative decoding yet"),
        ("--spec-method ngram", "--spec-method ngram: octavo has no speculative decoding yet"),
        ("--data-parallel-size 2", "--data-parallel-size 2: a server holds one copy of a model"),
        ("-dp=2", "--data-parallel-size 2: a server holds one copy of a model"),
        ("--tokenizer-mode cohere", "--tokenizer-mode cohere: octavo reads a tokenizer.json"),
        ("--middleware a.b", "--middleware: octavo runs no code but its own"),
        ("--kv-cache-dtype nvfp4", "--kv-cache-dtype: octavo has no such KV cache"),
        ("--kv-cache-dtype-skip-layers 0 1", "octavo's cache has one type in every layer"),
        ("--task reward", "--task: octavo has no such models"),
        ("--load-format pt", "--load-format: octavo loads no pickles"),
        ("--load-format tensorizer", "--load-format: octavo reads safetensors and GGUF"),
        ("--max-num-active-seqs 4", "--max-num-seqs is octavo's limit of a step"),
        ("--watermark-config.key 1", "octavo puts no watermark into its answers"),
        ("--enable-sleep-mode", "--enable-sleep-mode: octavo has no sleep mode"),
        ("--collect-detailed-traces all", "octavo's traces hold each request's phases"),
        ("--swap-space", "--swap-space needs a value"),
    ],
)
def test_what_is_missing_is_one_true_line(
    words: str,
    refusal: str,
    served: list[tuple[EngineConfig, ServerConfig]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("serve", *words.split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("octavo serve: error: ")
    assert refusal in err
    assert "did you mean" not in err
    assert not served


def test_vllm_s_flags_in_yaml(
    tmp_path: Path,
    served: list[tuple[EngineConfig, ServerConfig]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text(
        "model: m\nswap-space: 4\nenable_lora: false\ncudagraph-capture-sizes: [1, 2]\n"
        "attention-backend: TRITON_ATTN\ncompilation-config: {level: 3}\n"
    )
    assert run("serve", "--config", str(path)) == 0
    assert served[0][0] == EngineConfig(model="m", cuda_graph_sizes=(1, 2))
    assert capsys.readouterr().err.count(f"(from {path}) changes nothing here") == 4
    path.write_text("enable-lora: true\n")
    assert run("serve", "--config", str(path)) == 2
    assert "--enable-lora (from" in capsys.readouterr().err


def test_other_names_of_octavo_s_flags() -> None:
    assert parse("--cudagraph-capture-sizes", "1", "2")[0].cuda_graph_sizes == (1, 2)
    assert parse("--cudagraph_capture_sizes=[1,2]")[0].cuda_graph_sizes == (1, 2)


def test_switches_with_a_word() -> None:
    engine, server = parse("--enable-prefix-caching", "false", "--enforce_eager", "True")
    assert (engine.enable_prefix_caching, engine.enforce_eager) == (False, True)
    assert not parse("--enable-prefix-caching=false")[0].enable_prefix_caching
    assert server == ServerConfig()


def test_a_guide_s_command_line_starts(
    served: list[tuple[EngineConfig, ServerConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        "m --host 0.0.0.0 --port 8000 --dtype half --gpu-memory-utilization 0.95 --swap-space 16 "
        "--max-model-len 32k --disable-log-requests --enable-chunked-prefill "
        "--max-num-batched-tokens 8192 --trust-remote-code --tensor-parallel-size 1 "
        "--block-size 16 --uvicorn-log-level info --max-seq-len-to-capture 8192 "
        "--distributed-executor-backend mp --disable-custom-all-reduce --api-server-count 4 "
        "--enable-server-load-tracking --runner generate --generation-config vllm -O3"
    )
    assert run("serve", *words.split()) == 0
    assert served[0][0].max_model_len == 32000
    assert served[0][0].runner == "generate"
    assert all(
        line.startswith("octavo: warning: --") for line in capsys.readouterr().err.splitlines()
    )


# What guides write for one family of models or another.
GUIDES = [
    "m -tp 8 --trust-remote-code --enable-auto-tool-choice --tool-call-parser kimi_k2",
    "m --tokenizer_mode mistral --config_format mistral --load_format mistral "
    "--enable-auto-tool-choice --tool-call-parser mistral --reasoning-parser mistral",
    "m --runner pooling --convert embed --max-model-len 8192 --trust-remote-code",
    "m --task embed --dtype float16 --max-num-seqs 512",
    "m --quantization awq --dtype half --kv-cache-dtype auto --attention-backend flashinfer",
    "m --enable-expert-parallel --all2all-backend deepep_low_latency --enable-eplb",
    "m --async-scheduling --no-enable-prefix-caching --max-num-batched-tokens 16K",
    "m --compilation-config.cudagraph_mode FULL_AND_PIECEWISE -cc.mode 3 -O.level 3",
    "--model m --limit-mm-per-prompt '{\"image\": 2}' --mm-processor-cache-gb 0",
    "m --chat-template-content-format string --reasoning-parser deepseek_r1 --enable-reasoning",
    "m --distributed-executor-backend ray --disable-flashinfer-autotune --moe-backend auto",
    "m:Q4_K_M --tokenizer org/m --hf-config-path org/m --gpu-memory-utilization=.85",
    "m --attention-backend ROCM_AITER_UNIFIED_ATTN --default-chat-template-kwargs "
    "'{\"enable_thinking\": false}'",
    "m --api-key k1 k2 --served-model-name a b --uvicorn-log-level warning --log-level debug",
    "m --guided-decoding-backend outlines --structured-outputs-config.backend xgrammar",
    "m --allowed-origins '[\"*\"]' --disable-frontend-multiprocessing --api-server-count 2",
    "m --long-prefill-token-threshold 2048 --max-long-partial-prefills 2 --stream-interval 4",
    "m --override-generation-config.temperature 0.6 --generation-config vllm --seed 42",
    '--hf-overrides \'{"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}\' m',
    "m --max-model-len 131072 --rope-theta 1e6 --rope-scaling "
    '\'{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}\'',
    "m --enforce-eager --swap-space 16 --load-format runai_streamer --max-seq-len-to-capture 8k",
    "m --ssl-keyfile k.pem --ssl-certfile c.pem --root-path /v --enable-log-requests",
    '--reasoning-effort-map \'{"medium": "low"}\' --enable-force-include-usage m',
]


@pytest.mark.parametrize("line", GUIDES)
def test_guides_lines_start(
    line: str,
    served: list[tuple[EngineConfig, ServerConfig]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("serve", *shlex.split(line)) == 0
    assert (served[0][0].model or "").startswith("m")
    assert all(
        said.startswith("octavo: warning: --") for said in capsys.readouterr().err.splitlines()
    )


def test_json_lists() -> None:
    assert parse("--allowed-origins", '["*"]')[1].allowed_origins == ("*",)
    assert parse("--api-key", '["a", "b"]', "c")[1].api_key == ("a", "b", "c")
    environ = {"OCTAVO_ALLOWED_ORIGINS": '["https://a", "https://b"]'}
    assert parse(env=environ)[1].allowed_origins == ("https://a", "https://b")


def test_other_words_for_values() -> None:
    assert parse("--dtype", "half")[0].dtype == "float16"
    assert parse("--dtype=float")[0].dtype == "float32"
    assert parse("--max-model-len", "auto")[0].max_model_len == -1
    assert parse(env={"OCTAVO_DTYPE": "half"})[0].dtype == "float16"


def test_vllm_s_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse(env={"VLLM_API_KEY": "k"})[1].api_key == ("k",)
    assert parse(env={"VLLM_API_KEY": "k", "OCTAVO_API_KEY": "o"})[1].api_key == ("o",)
    assert parse("--api-key", "c", env={"VLLM_API_KEY": "k"})[1].api_key == ("c",)
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.setenv("VLLM_USE_V1", "1")
    monkeypatch.setattr("octavo.cli.serve.serve", lambda engine, server: 0)
    assert cli.main(["serve"]) == 0
    err = capsys.readouterr().err
    assert "VLLM_USE_V1 is set, and octavo does not read it" in err
    assert "VLLM_API_KEY" not in err


def test_arguments_of_llm() -> None:
    from octavo.llm import LLM

    with pytest.raises(TypeError, match=r"^LLM\(\) has no argument 'swap_spase'$"):
        LLM(swap_spase=4, block_size=16)
    with pytest.raises(ValueError, match=r"^LLM\(enable_lora=True\): octavo has no LoRA yet$"):
        LLM(enable_lora=True)
    with pytest.raises(ValueError, match=r"^LLM\(speculative_config=...\): octavo has no specul"):
        LLM(speculative_config={"method": "ngram"})
    with pytest.raises(ValueError, match=r"^LLM\(dtype=...\): 'int3' is not one of auto"):
        LLM(dtype="int3")
    with pytest.raises(ValueError, match=r"^LLM\(block_size=...\): 1.5 is not a whole number"):
        LLM(block_size=1.5)
    # None is the default; the refusal is another argument's.
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        LLM(enable_chunked_prefill=None, max_num_queued_reqs=None, block_size=0)
