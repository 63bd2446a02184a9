"""Logs of requests: what publishers write is read, and what is wrong is said in one line at its place."""

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.serving import load_serving_text, serve
from moesim.serving.requests import Requests, draw_requests

SCENARIO = """schema_version: 1
name: logged
model: {preset: deepseek-moe-16b, layers: 2}
cluster: {gpu: h100, nodes: 1, gpus_per_node: 1}
workload: {kind: serving, arrivals: {kind: trace, file: FILE}}
"""
HEAD = "time,input,output\n"


def requests(text: str, folder: Path, *overrides: str) -> Requests:
    file = folder / "log.csv"
    file.write_text(text, encoding="utf-8")
    scenario = load_serving_text(SCENARIO.replace("FILE", str(file)), overrides=overrides)
    return draw_requests(scenario.workload, seed=0)


@pytest.mark.parametrize(
    ("head", "lines"),
    [
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            ("2023-11-16 18:15:46.6805900,{}", "2023-11-16 18:15:48.1805900,{}"),
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            ("2024-05-10 23:59:59.009930+00:00,{}", "2024-05-11 02:00:00.509930+02:00,{}"),
        ),
        ("time,input_tokens,output_tokens", ("2024-05-10T00:00:00Z,{}", "2024-05-10T00:00:01.5Z,{}")),
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", ("5,x,{},0,y", "6.5,x,{},0,y")),
        ("arrived_at,num_prefill_tokens,num_decode_tokens", ("0.25,{}", "1.75,{}")),
        ("timestamp_ms,prompt_tokens,completion_tokens", ("1715299200000,{}", "1715299201500,{}")),
        ("\ufeffArrival,Prompt Tokens,Output Tokens", ("1.5,{}", "", "3,{}")),
    ],
)
def test_what_publishers_write_is_read(tmp_path: Path, head: str, lines: tuple[str, ...]) -> None:
    tokens = iter(("374,44", "396,109"))
    text = "\n".join([head, *(line.format(next(tokens)) if line else "" for line in lines)])
    for written in (text, text.replace(",", ";"), text.replace(",", "\t")):
        found = requests(written, tmp_path)
        np.testing.assert_allclose(found.arrival_N, [0.0, 1.5], atol=1e-6)
        assert found.input_N.tolist() == [374, 396] and found.output_N.tolist() == [44, 109] and not found.left_out


def test_lines_come_in_any_order_and_those_that_ask_for_nothing_are_counted(tmp_path: Path) -> None:
    found = requests(HEAD + "9,30,3\n4,10,1\n5,80,0\n6,0,7\n7,20,2\n", tmp_path)
    assert found.arrival_N.tolist() == [0.0, 3.0, 5.0]
    assert found.input_N.tolist() == [10, 20, 30] and found.left_out == 2
    text = SCENARIO.replace("FILE", str(tmp_path / "log.csv"))
    assert any("left out: 2" in warning for warning in serve(load_serving_text(text))["warnings"])


def test_own_names_and_units_are_said(tmp_path: Path) -> None:
    own = "workload.arrivals.columns={time: when, input: in, output: out}"
    found = requests("when,in,out\n0,10,5\n1500,20,6\n", tmp_path, own, "workload.arrivals.unit=ms")
    assert found.arrival_N.tolist() == [0.0, 1.5] and found.input_N.tolist() == [10, 20]


def test_prefixes_and_classes_of_a_log(tmp_path: Path) -> None:
    text = (
        "time,input,output,prefix,prefix tokens,priority\n"
        "0,900,5,7,512,1\n0.5,800,5,7,512,0\n1,30,5,,,0\n2,90,5,3,900,1\n"
    )
    found = requests(text, tmp_path, "workload.priorities={shares: [0.5, 0.5]}")
    jobs = [found.job(number) for number in range(4)]
    assert [job.prefix for job in jobs] == [7, 7, -1, 3]
    assert [job.prefix_tokens for job in jobs] == [512, 512, 0, 90]
    assert [job.urgency for job in jobs] == [1, 0, 0, 1] and jobs[0].turn == 60.0 and jobs[1].turn == 0.5


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "first line is empty"),
        (HEAD, "no request in it"),
        ("when,in,out\n0,1,1\n", r"no column that is called timestamp .*it has when, in, out; name its time"),
        ("time,input\n0,1\n", "name its output with workload.arrivals.columns"),
        ("time,input,input,output\n0,1,1,1\n", "two columns are called input"),
        (HEAD + "0,10,0\n", "no request has tokens"),
        (HEAD + "0,10,5\n1,-10,5\n", r"log.csv:3: input tokens -10: a whole number from 0"),
        (HEAD + "0,10.5,5\n", r":2: input tokens 10.5: a whole number"),
        (HEAD + "0,inf,5\n", r":2: input tokens inf: a whole number"),
        (HEAD + "nan,10,5\n", r":2: needs a time"),
        (HEAD + "0,ten,5\n", r":2: needs a time"),
        (HEAD + "0,10\n", r":2: needs a time"),
        (HEAD + "2024-13-10 00:00:00,10,5\n", r":2: needs a time"),
        (HEAD + "1715299200000,10,5\n", r"no number of seconds; set workload.arrivals.unit: ms"),
        (HEAD + '"0,10,5\n1,2,3', r":2: needs a time"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault) as caught:
        requests(text, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column 'whn'; did you mean 'when'"):
        requests("when,input,output\n0,1,1\n", tmp_path, "workload.arrivals.columns={time: whn}")


def test_the_unit_in_an_own_name_counts_and_the_wrong_column_is_named(tmp_path: Path) -> None:
    own = "workload.arrivals.columns={time: Arrival ms}"
    found = requests("Arrival ms,input,output,prefix\n0,10,5,99999999\n2000,10,5,7\n", tmp_path, own)
    assert found.arrival_N.tolist() == [0.0, 2.0]
    with pytest.raises(UserError, match=r"log\.csv:2: priority 0\.5: a whole number"):
        requests("time,input,output,priority\n0,10,5,0.5\n", tmp_path)
    with pytest.raises(UserError, match=r"log\.csv:3: needs a time"):
        requests(HEAD + "0,10,5\n2024-01-01 00:00:00,10,5\n", tmp_path)
