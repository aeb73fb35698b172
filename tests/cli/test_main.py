import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import qzoom
from qzoom.cli.main import app


def test_version(here):
    result = here("--version")
    assert (result.code, result.out, result.err) == (0, f"qzoom {qzoom.__version__}\n", "")


def test_help_lists_the_verbs_without_loading_torch():
    program = (
        "import sys; from qzoom.cli.main import run; code = run(['--help']);"
        "heavy = {'torch', 'transformers', 'matplotlib', 'PIL'} & set(sys.modules);"
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("ask", "perceive", "convert", "doctor", "distill decontaminate"):
        assert f" {verb} " in done.stdout


def test_ask_imports_nothing_that_it_does_not_need(picture):
    program = (
        "import gc, sys; from qzoom.cli.main import main; sys.argv[0] = 'qzoom'; before = gc.get_threshold();\n"
        "try: main()\n"
        "except SystemExit as done: print(done.code, gc.get_freeze_count() > 10**5, gc.get_threshold() > before,"
        "{'matplotlib', 'datasets', 'openai', 'pandas', 'fastapi', 'peft', 'trl', 'rich'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", program, "ask", str(picture), "When?", "--quiet", "--max-new-tokens", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "0 True True set()", done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["aks"], "No such command 'aks'. Did you mean 'ask'?"),
        (["ask"], "Missing argument 'IMAGE... QUESTION'."),
        (["ask", "receipt.jpg"], "at least one picture and then the question"),
        (["perceive", "receipt.jpg"], "at least one picture and then the question"),
        (["ask", "-", "-", "What?"], "only one picture can come from standard input"),
        (["ask", "a.png", "What?", "--zoom", "maybe"], "'auto', 'never', 'always'"),
        (["ask", "a.png", "What?", "--jsn"], "--json"),
        (["ask", "a.png", "What?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["ask", "a.png", "What?", "--temperature", "-1"], "--temperature"),
        (["ask", "a.png", "What?", "--gate-threshold", "1.5"], "--gate-threshold"),
        (["ask", "a.png", "What?", "--coarse-tokens", "many"], "such as 144 or 64:144"),
        (["ask", "a.png", "What?", "--region-tokens", "1:2:3"], "such as 144 or 64:144"),
        (["ask", "a.png", "What?", "--dtype", "float64"], "--dtype"),
        (["perceive", "a.png", "What?", "--heatmap"], "--heatmap needs --json"),
        (["convert", "only-one"], "Missing argument 'DST'"),
    ],
)
def test_wrong_usage_is_one_line_with_code_2(here, words, part):
    result = here(*words)
    result.refuses(2, part)
    assert result.err.rstrip().endswith("--help")


@pytest.mark.skipif(not os.path.exists("/proc/self/syscall"), reason="needs Linux's /proc to see when it waits")
def test_interrupt_gives_130_and_no_traceback(picture):
    words = [sys.executable, "-m", "qzoom", "ask", str(picture), "-", "What is the total amount?"]
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    try:
        while process.poll() is None and not _reads_standard_input(process.pid):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert (out, err) == (b"", b"qzoom: interrupted.\n")


def _reads_standard_input(pid: int) -> bool:
    """Whether the process is blocked in a read of file descriptor 0."""
    try:
        with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
            call = file.read().split()
    except OSError:
        return False
    return call[0] in ("0", "63") and call[1] == "0x0"


def test_a_closed_pipe_is_not_an_error_message(picture):
    process = subprocess.Popen(
        [sys.executable, "-m", "qzoom", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) != 0
    assert err == ""


def exhaust_memory() -> None:
    raise MemoryError


def exhaust_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")


def exhaust_tensor_memory() -> None:
    torch.empty(2**46, dtype=torch.uint8)


@pytest.mark.parametrize("exhaust", [exhaust_memory, exhaust_gpu_memory, exhaust_tensor_memory])
def test_running_out_of_memory_is_one_sentence(here, exhaust):
    app.command("exhaust")(exhaust)
    try:
        result = here("exhaust")
    finally:
        app.registered_commands.pop()
    result.refuses(1, "memory ran out")


def test_errors_of_our_own_making_keep_their_traceback(here):
    def broken() -> None:
        raise RuntimeError("a bug")

    app.command("broken")(broken)
    try:
        with pytest.raises(RuntimeError, match="a bug"):
            here("broken")
    finally:
        app.registered_commands.pop()
