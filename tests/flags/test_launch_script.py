"""Shell scripts are read as a shell would expand them, and nothing of them is ever run."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.flags.expressions import pattern, whole_number
from moesim.flags.launch_script import read_launch
from moesim.flags.shell_values import is_unset, marks

RUN = "\npython pretrain_gpt.py --a {} --b 1"


def words(script: str, **given: str) -> list[str]:
    return [word.text for word in read_launch(script, source="run.sh", given=given).words]


def value(script: str, word: str, **given: str) -> str:
    """What `--a WORD` comes to at the end of the script."""
    return words(script + RUN.format(word), **given)[3]


@pytest.mark.parametrize(
    ("script", "word", "expected"),
    [
        ("TP=4", "$TP", "4"),
        ("TP=4", "${TP}", "4"),
        ("", "${TP:-2}", "2"),
        ("", '${TP:-"2"}', "2"),
        ("TP=", "${TP:-2}", "2"),
        ("A=3", "${TP:-$A}", "3"),
        ("A=3", "${B:-${C:-$A}}", "3"),
        ("TP=${TP:=5}", "$TP", "5"),
        ("export TP=4 PP=8", "$PP", "8"),
        ("A=4; B=3", "$((A * $B + 1))", "13"),
        ("A=2\nB=$((A*A))\nC=$((B/3))", "$C", "1"),
        ("A='$B'", "$A", "$B"),
        ("B=7", "'$B'", "$B"),
        ("B=7", '"a$B c"', "a7 c"),
        ("B=7", "\\$B", "$B"),
        ("A='x y'", '"$A"', "x y"),
        ("A=1 # not 2", "$A", "1"),
        ("A=1\nA+=2", "$A", "12"),
        ("A=(5 6)", "${A[0]}", "5"),
        ('if [ "$A" = yes ]; then B=1; else B=2; fi', "$B", "2"),
        ("A=yes\nif [ $A = yes ]; then\n B=1\nelse\n B=2\nfi", "$B", "1"),
        ("A=3\nif [ $A -gt 2 ]; then B=1; elif [ $A -gt 1 ]; then B=2; else B=3; fi", "$B", "1"),
        ("A=2\nif [ $A -gt 2 ]; then B=1; elif [ $A -gt 1 ]; then B=2; else B=3; fi", "$B", "2"),
        ("A=1\nif [[ $A == 1 ]]; then if [[ -z $Z ]]; then B=9; fi; fi", "$B", "9"),
        ("A=5\nif ((A > 4)); then B=1; fi", "$B", "1"),
        ("A=1\nif [ $A = 1 ] && [ $A = 2 ]; then B=1; else B=2; fi", "$B", "2"),
        ("A=1\nif [ $A = 1 ] || [ $A = 2 ]; then B=1; else B=2; fi", "$B", "1"),
        ('B=1\n[ -n "$Z" ] && B=2', "$B", "1"),
        ('B=1\n[ -z "$Z" ] && B=2', "$B", "2"),
        ("B=1\nfalse || B=3", "$B", "3"),
        ("f() {\n B=2\n}\nB=1", "$B", "1"),
        ('B=1\nfor arg in "$@"; do\n case $arg in\n  x) B=2 ;;\n esac\ndone', "$B", "1"),
        ("B=1\nwhile [[ $# -gt 0 ]]; do\n B=$1\n shift\ndone", "$B", "1"),
        ("cat <<EOF > x\nB=2 'unclosed\nEOF\nB=1", "$B", "1"),
    ],
)
def test_a_value_is_what_a_shell_would_make_of_it(script: str, word: str, expected: str) -> None:
    assert value(script, word) == expected


def test_arrays_join_and_grow() -> None:
    script = "A=(\n --x 1 # one\n --y 2\n)\nA+=(--z '3 4')\nB=(\"${A[@]}\" --last)\npython run.py ${B[@]}"
    assert words(script) == ["python", "run.py", "--x", "1", "--y", "2", "--z", "3", "4", "--last"]
    quoted = "A=(--z '3 4' --y)\npython run.py \"${A[@]}\""
    assert words(quoted) == ["python", "run.py", "--z", "3 4", "--y"]


@pytest.mark.parametrize(
    "command",
    [
        'eval "python run.py $A"',
        'CMD="python run.py $A"\neval $CMD',
        'CMD="python run.py ${A}"\nsrun -l bash -c "$CMD"',
        "python run.py $A 2>&1 | tee log.txt",
        'python run.py $A "$@"',
        "echo python run.py --other 1 --b 2\nCUDA_DEVICE_MAX_CONNECTIONS=1 python run.py $A > log.txt &",
        "if [ ! -d out ]; then mkdir out; fi\npython run.py $A",
    ],
)
def test_ways_to_start_the_program(command: str) -> None:
    found = words(f'A="--x 1 \\\n  --y 2"\n{command}')
    assert found[-5:] == ["run.py", "--x", "1", "--y", "2"]


def test_arrays_of_flags_without_a_command_are_a_launch() -> None:
    script = "N=3\nARGS=(\n --num-layers $((N + 1)) # dense, too\n --moe-layer-freq [0]*$N+[1]*1\n)\nOTHER=(a b)"
    assert words(script) == ["--num-layers", "4", "--moe-layer-freq", "[0]*3+[1]*1"]


def test_arguments_and_variables_come_from_outside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP", "64")
    assert is_unset(value("", "$TP"))
    assert value("", "$TP", TP="8") == "8"
    assert value("A=${1:-3}", "$A", **{"1": "5"}) == "5"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("while [ -f x ]; do B=1; done", "B is set at line 1 under a condition"),
        ("for i in 1 2; do B=$i; done", "B is set at line 1 under a condition"),
        ("if grep -q x y; then B=1; else B=2; fi", "B is set at line 1 under a condition"),
        ("if [ -d /data ]; then\n B=1\nfi", "B is set at line 2 under a condition"),
        ("case $X in\n a) B=1 ;;\nesac", "B is set at line 2 under a condition"),
        ("B=$(nvidia-smi | wc -l)", "the output of a command"),
        ("B=`hostname`", "the output of a command"),
        ("B=${A%%.*}", "the expansion ${A%%.*}"),
    ],
)
def test_what_only_a_run_would_know_is_marked_with_the_reason(script: str, why: str) -> None:
    assert why in marks(value(script, "$B"))[0]


def test_nothing_is_run(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    script = f"A=$(touch {trap})\n`touch {trap}`\ntouch {trap}\neval 'touch {trap}'\npython run.py --a $((1 + 1)) --b 2"
    assert words(script)[-3:] == ["2", "--b", "2"]
    assert not trap.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("A='x\nB=1", "run.sh:1: the quote ' is never closed"),
        ("X=1\nA=(--b 1", "run.sh:2: an opening bracket is never closed"),
        ("A=${B", "run.sh:1: ${ is never closed"),
        ("ls", "run.sh: found no launch command"),
        ("python a.py --x 1 --y 2\npython a.py --x 2 --y 2", "launch commands at lines 1, 2"),
        ("if grep x y; then python a.py --x 1 --y 2; fi", "stands under a condition"),
    ],
)
def test_what_cannot_be_read_is_one_line(script: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        words(script)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["[0]*3+[1]*58", "([0]*3+[1]*58)", "[0,0,0]+[1]*58", " ([0] + [0])*1+[0]+[1]*58 "])
def test_patterns_are_lists_without_being_run(text: str) -> None:
    assert pattern(text) == [0] * 3 + [1] * 58


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "[1]*99999",
        "[x for x in y]",
        "[0]*3+1",
        "[1]*-1+[",
        "",
        "1 if 1 else 0",
        "[[1]]*2",
        "9" * 30,
    ],
)
def test_anything_else_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        pattern(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2+3*4", 14),
        ("(4 > 1) ? 8 / 2 : 0", 4),
        ("1 > 2 ? 1 : 3", 3),
        ("1 && 0 || 2 > 1", 1),
        ("(2+3)*4", 20),
        ("7/2", 3),
        ("7%4", 3),
        ("-7/2", -3),
    ],
)
def test_arithmetic(text: str, number: int) -> None:
    assert whole_number(text) == number


STAGED = """
set -e
ENV=$1
MODEL=$2
TP=${10}
if [ $ENV = one ]; then
    NNODES=1
    PORT=$(shuf -n 1 -i 10000-65535)
elif [ $ENV = cluster ]; then
    NNODES=${WORLD_SIZE}
fi
if [ $MODEL = A3B ]; then
    LAYERS=48
    moe_options=" \\
        --num-experts 128 \\
        --moe-layer-freq '([1]*48)' \\
        "
elif [ $MODEL = A22B ]; then
    LAYERS=94
    moe_options="--num-experts 128 --moe-layer-freq '([1]*94)'"
fi
if [ -z ${VP} ]; then
    vp_option=""
else
    vp_option="--num-layers-per-virtual-pipeline-stage ${VP}"
fi
comm=""
OVERLAP=$(( ($TP > 1) ? 1 : 0 ))
if [ $OVERLAP -eq 1 ]; then
    comm=" --tp-comm-overlap"
fi
NAME="x-$(date)-${TP}"
mkdir -p "out/${NAME}"
find . -name "*.json" -print0 | xargs -0 cp -t out
run_cmd="torchrun --nproc_per_node 8 --nnodes $NNODES pretrain_qwen.py
 --num-layers ${LAYERS} --save out/${NAME} ${moe_options} ${vp_option} ${comm}"
echo ${run_cmd}
eval ${run_cmd}
set +x
"""


def test_a_script_with_stages_of_options_and_arguments() -> None:
    given = {str(number): "x" for number in range(3, 10)} | {"1": "one", "2": "A22B", "10": "2", "VP": "4"}
    found = words(STAGED, **given)
    assert found[:8] == ["torchrun", "--nproc_per_node", "8", "--nnodes", "1", "pretrain_qwen.py", "--num-layers", "94"]
    assert found[-6:] == [
        "128",
        "--moe-layer-freq",
        "([1]*94)",
        "--num-layers-per-virtual-pipeline-stage",
        "4",
        "--tp-comm-overlap",
    ]
    other = words(STAGED, **{**given, "2": "A3B", "10": "1", "VP": ""})
    assert other[7] == "48" and other[-2:] == ["--moe-layer-freq", "([1]*48)"]


BITS = st.sampled_from(
    [
        *"$}=()'\"\n ;|<>#`{[]@?:1A&\\\x00é",
        *(
            "${",
            "((",
            "))",
            "[[",
            "]]",
            "&&",
            "||",
            "<<E",
            "E",
            "+=",
            ":-",
            ";;",
            "if",
            "then",
            "fi",
            "else",
            "for",
            "in",
        ),
        *("do", "done", "while", "case", "esac", "eval", "f()", "python run.py", "--x"),
    ]
)


@settings(max_examples=150, deadline=2000)
@given(bits=st.lists(BITS, max_size=25), glue=st.sampled_from(["", " "]))
@example(bits=["A", "=", "(", "\n"] * 5, glue="")
@example(bits=["$", "(", "(", "A", "))"], glue="")
def test_any_text_is_read_or_refused_in_one_line(bits: list[str], glue: str) -> None:
    try:
        words(glue.join(bits))
    except UserError as error:
        assert "\n" not in str(error)


def test_a_long_script_is_read_in_a_moment() -> None:
    lines = "\n".join(f"A{number}=(--x {number} --y 'a b' \"$A{number - 1}\")" for number in range(3_000))
    assert words(lines + "\npython run.py --a 1 --b 2")[-2:] == ["--b", "2"]
