from importlib.util import find_spec

import pytest

from qzoom.cli.engines import parse_options
from qzoom.cli.main import run


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--engine", "remote"], 2, "--engine remote needs --engine-url."),
        (["--engine", "vllm", "--engine-url", "http://x"], 2, "--engine vllm takes no address."),
        (["--engine-option", "a=1"], 2, "only --engine vllm takes them."),
        (
            ["--engine", "vllm", "--engine-option", "a-b=1"],
            2,
            "'a-b=1' is not NAME=VALUE, such as max_model_len=32768.",
        ),
        (["--engine", "sglang"], 2, "--engine"),
        (["--answer-model", "x"], 2, "--engine answer needs --answer-url and --answer-model"),
        (["--engine", "answer", "--answer-model", "x"], 2, "--engine answer needs --answer-url and --answer-model"),
        (["--ray-address", "auto"], 2, "it is of use with --replicas only."),
        (["--engine", "vllm", "--quantization", "4bit"], 2, "--engine vllm is not told; set it in --engine-option."),
        (["--engine-url", "http://127.0.0.1:9", "--quantization", "8bit"], 2, "set it where vLLM is started."),
        (["--engine", "vllm", "--device", "cuda:1"], 2, "choose the GPU with CUDA_VISIBLE_DEVICES."),
        (["--engine-url", "http://127.0.0.1:9"], 1, "The engine at http://127.0.0.1:9 does not answer"),
        (["--engine-url", "gpu-1:8001"], 1, "'gpu-1:8001' is not an address; write http://HOST:PORT."),
        *(
            pytest.param(
                ["--engine", "vllm", *more],
                1,
                "install it with: pip install 'qzoom[vllm]'",
                marks=pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed"),
            )
            for more in ((), ("--replicas", "2"))
        ),
    ],
)
def test_engines_that_cannot_be_had(words, code, said, capsys):
    assert run(["serve", "--port", "0", *words]) == code
    assert said in " ".join(capsys.readouterr().err.split())


def test_options_are_json_or_text():
    words = ["a=1", "b=true", "c=auto", 'd={"x": [1]}', "e=x=y"]
    assert parse_options(words) == {"a": 1, "b": True, "c": "auto", "d": {"x": [1]}, "e": "x=y"}
