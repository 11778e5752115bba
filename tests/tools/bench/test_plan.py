"""From the command line of ``sidestream bench`` to what is done."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tools.bench.plan import MakeAdapters, Measure, Show, plan_bench
from tools.bench.presets import PRESETS
from tools.bench.prompts import PromptForm
from tools.bench.servers import Target
from tools.bench.summary import Limits
from tools.bench.warm_up import WarmUp
from tools.bench.workload import TokenRange
from tools.cli import main, make_parser
from tools.shapes import write_model


def plan(*arguments: str | Path) -> Measure | Show | MakeAdapters:
    return plan_bench(make_parser().parse_args(["bench", *map(str, arguments)]))


def measure(*arguments: str | Path) -> Measure:
    made = plan(*arguments)
    assert isinstance(made, Measure)
    return made


def test_without_options_a_preset_is_run_on_the_default_server() -> None:
    made = measure("overlap")
    assert made.workload == PRESETS["overlap"].workload
    url = "http://127.0.0.1:8000"
    assert made.targets == (Target(url, url),)
    assert (made.seed, made.form, made.warm_up, made.limits) == (0, None, WarmUp.ALL, Limits())


@pytest.mark.parametrize(
    ("flag", "text", "field", "value"),
    [
        ("--requests", "7", "num_requests", 7),
        ("--duration", "2.5", "num_requests", 10),
        ("--rate", "0.5", "rate", 0.5),
        ("--rate", "inf", "rate", None),
        ("--variation", "0", "variation", 0.0),
        ("--adapters", "0", "num_adapters", 0),
        ("--input-tokens", "9", "input_tokens", TokenRange(9, 10)),
        ("--output-tokens", "8:512", "output_tokens", TokenRange(8, 512)),
        ("--max-open", "3", "max_open", 3),
        ("--bystanders", "5", "num_bystanders", 5),
        ("--bystander-input-tokens", "6", "bystander_input_tokens", 6),
        ("--bystander-output-tokens", "11", "bystander_output_tokens", 11),
    ],
)
def test_an_option_takes_the_place_of_a_presets_number(
    flag: str, text: str, field: str, value: Any
) -> None:
    expected = msgspec.structs.replace(PRESETS["overlap"].workload, **{field: value})
    assert measure("overlap", flag, text).workload == expected
    assert measure("overlap").workload != expected


@pytest.mark.parametrize(
    ("popularity", "num_adapters"),
    [("distinct", 100), ("identical", 1), ("uniform", 10), ("zipf:2", 7), ("power-law:0.3", 16)],
)
def test_adapters_are_as_many_as_the_popularity_asks_for(
    popularity: str, num_adapters: int
) -> None:
    made = measure("overlap", "--popularity", popularity).workload
    assert (str(made.popularity), made.num_adapters) == (popularity, num_adapters)


def test_uniform_adapters_may_be_as_many_as_one_likes() -> None:
    assert measure("punica-uniform", "--adapters", "5").workload.num_adapters == 5


def test_options_of_the_run_and_of_its_output(tmp_path: Path) -> None:
    made = measure(
        *("churn", "--seed", "9", "--prompts", "text", "--warm-up", "base"),
        *("--churn-path", "/a", "--churn-path", "/b", "--churn", "0.5", "--time-limit", "30"),
        *("--limit-ttft", "1", "--limit-itl", "2", "--limit-tpot", "3", "--limit-e2e", "4"),
        *("--adapter-pattern", "x*", "--start-timeout", "5", "--url", "server:9"),
        *("--out", tmp_path / "out.json", "--plots", tmp_path),
    )
    assert (made.seed, made.form, made.warm_up) == (9, PromptForm.TEXT, WarmUp.BASE)
    assert (made.churn_paths, made.workload.churn_interval_s) == (("/a", "/b"), 0.5)
    assert (made.time_limit_s, made.start_timeout_s, made.adapter_pattern) == (30.0, 5.0, "x*")
    assert made.limits == Limits(1.0, 2.0, 3.0, 4.0)
    assert made.targets == (Target("server:9", "server:9"),)
    assert (made.out, made.plots) == (tmp_path / "out.json", tmp_path)


def test_servers_to_compare_are_urls_or_options_of_serve(tmp_path: Path) -> None:
    model = write_model(tmp_path / "my model", "toy")
    made = measure(
        *("overlap", "--compare", "other=http://there:30000"),
        *("--compare", f"ours='{model}' --max-num-seqs 4"),
    )
    assert made.targets == (
        Target("other", "http://there:30000"),
        Target("ours", None, (str(model), "--max-num-seqs", "4")),
    )
    assert made.targets[1].source == f"sidestream serve '{model}' --max-num-seqs 4"


def test_files_are_shown_without_a_workload() -> None:
    assert plan("--show", "a.json", "b.json", "--limit-ttft", "1") == Show(
        (Path("a.json"), Path("b.json")), Limits(ttft_s=1.0), None
    )


def test_adapters_are_made_of_a_models_shape(tmp_path: Path) -> None:
    write_model(tmp_path, "toy")
    made = plan("--make-adapters", "8:2,64:3", "/adapters", "--model", tmp_path)
    assert made == MakeAdapters(((8, 2), (64, 3)), Path("/adapters"), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "WORKLOAD: expected one of overlap, overlap-large, s-lora, "),
        (["often"], "WORKLOAD: expected one of overlap, "),
        (
            ["overlap", "--rate", "0"],
            "argument --rate: expected a number of requests a second above 0, or inf, got '0';",
        ),
        (["overlap", "--rate", "nan"], "argument --rate: expected a number of requests a second"),
        (
            ["overlap", "--input-tokens", "9:9"],
            "argument --input-tokens: expected a number of tokens, or LOW:HIGH with"
            " 1 <= LOW < HIGH, got '9:9';",
        ),
        (["overlap", "--output-tokens", "0"], "argument --output-tokens: expected a number of tok"),
        (["overlap", "--bystanders", "-1"], "argument --bystanders: expected a whole number"),
        (["overlap", "--popularity", "zipf"], "argument --popularity: expected zipf:A with A"),
        (["overlap", "--warm-up", "hot"], "argument --warm-up: expected one of all|base|none"),
        (["overlap", "--compare", "x"], "argument --compare: expected NAME=URL or NAME='options"),
        (["overlap", "--compare", "x='m"], "argument --compare: x: No closing quotation: 'm;"),
        (
            ["overlap", "--requests", "3", "--duration", "3"],
            "--duration: expected it without --requests\n",
        ),
        (
            ["overlap", "--rate", "inf", "--duration", "3"],
            "--duration: expected it with a rate, not with inf\n",
        ),
        (
            ["punica-zipf", "--adapters", "3"],
            "--adapters: 256 requests zipf:1.5 ask for 13 adapters, got 3\n",
        ),
        (["churn"], "--churn-path: expected at least one for a workload with churn\n"),
        (
            ["overlap", "--churn-path", "/x"],
            "--churn-path: expected it only for a workload with churn\n",
        ),
        (
            ["overlap", "--url", "x", "--compare", "a=http://a"],
            "--url: expected it without --compare, which names its servers\n",
        ),
        (
            ["overlap", "--compare", "a=http://a", "--compare", "a=http://b"],
            "--compare: a was given twice\n",
        ),
        (
            ["overlap", "--compare", "a=/no/model"],
            "--compare a: MODEL: expected a folder, but there is none at /no/model\n",
        ),
        (
            ["overlap", "--compare", "a=MODEL --blocks 3"],
            "--compare a: unrecognized arguments: --blocks 3\n",
        ),
        (
            ["overlap", "--compare", "a=MODEL --block-size 0"],
            "--compare a: argument --block-size: expected a whole number at least 1, got '0'\n",
        ),
        (
            ["overlap", "--compare", "a=MODEL --port 8000"],
            "--compare a: expected no --port: every server gets its own\n",
        ),
        (
            ["overlap", "--out", "/no/folder/file"],
            "--out: expected a file in a folder that exists, got /no/folder/file\n",
        ),
        (
            ["overlap", "--show", "x"],
            "--show: expected it without a WORKLOAD: it has been run\n",
        ),
        (["overlap", "--model", "m"], "--model: expected it only together with --make-adapters\n"),
        (["--make-adapters", "8:1", "d"], "--make-adapters: expected --model PATH beside it\n"),
        (
            ["overlap", "--make-adapters", "8:1", "d"],
            "--make-adapters: expected it without a WORKLOAD\n",
        ),
        (
            ["--make-adapters", "8:1", "d", "--model", "/no"],
            "--model: expected a folder with config.json, got /no\n",
        ),
        (
            ["--make-adapters", "8:1,8:2", "d", "--model", "MODEL"],
            "--make-adapters: expected RANK:COUNT, or several with different ranks as in 8:4,64:4,"
            " got '8:1,8:2'\n",
        ),
        (
            ["--make-adapters", "8", "d", "--model", "MODEL"],
            "--make-adapters: expected RANK:COUNT, or several with different ranks as in 8:4,64:4,"
            " got '8'\n",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_model(tmp_path / "model", "toy"))
    placed = [argument.replace("MODEL", model) for argument in arguments]
    try:
        status = main(["bench", *placed])
    except SystemExit as ended:
        status = int(str(ended.code))
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith(f"sidestream: {message}")
    assert output.err.count("\n") == 1


def test_help_names_every_workload(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["bench", "--help"])
    shown = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"  {name} " in shown and preset.about in shown
