"""What a tired user types: one line a mistake. `desk.py` says what `{names}` stand for."""

import re
import shlex
from dataclasses import dataclass

from broken_files import QUERY_FILES, YAML_FILES

BUILD = (
    "duet-cache build --engine transformers --teacher {model} --forget {forget} --retain {retain} "
    "--prefix Forget. --top-k 8 --out {new}"
)
RUN = "duet-distill run {cache} --student {model} --max-steps 1 --out {new}"
EVAL = "duet-distill eval {model} --forget {forget} --retain {retain} --max-new-tokens 2"
ASK = "duet-distill ask {model} Who? --max-new-tokens 2"
RELEARN = "duet-distill relearn {model} --forget {forget} --steps 1 --max-new-tokens 2"
MEMBERSHIP = "duet-distill membership {model} --forget {forget} --holdout {retain}"
ATTACK = "duet-distill attack {model} --forget {forget} --suffix-steps 1 --soft-steps 1"
PROBE = "duet-distill probe {model} --forget {forget} --retain {retain}"
TUNE = "duet-cache tune --engine transformers --teacher {model} --forget {forget} --retain {retain}"
PLAN = "duet-distill plan {cache} --student {model} --max-steps 1 --measure 0"
MERGE = "duet-cache merge {cache} --out {new}"
REPORT = "duet-distill report {results} --out {new}"
DEMO = "duet-distill demo --engine transformers --out {new}"

ADDRESS = "alice:s3cr3t@127.0.0.1:9/cache?token=s3cr3t"


@dataclass(frozen=True)
class Case:
    """One command, which has to be refused unless `codes` says otherwise."""

    group: str
    words: str
    says: str = ""
    """A text that the refusal has to hold, such as the flag that was meant."""
    codes: tuple[int, ...] = (1, 2)
    """How it may end; 0 where a command is right to succeed and only must not touch a thing."""


# A setting, then values that it does not take, one a word.
_RUN_VALUES = """
objective npo DUET
loss l3 Huber hubert
delta 0 -1 nan inf one 1,5
temperature 0 -1 nan
top-k 0 -1 1.5 all 9999
positions 0 -1 9999
noise-alpha -0.1 1.5 nan half
noise-beta -1 nan
layers all 7-5 -1 0,,2 1.5 99
parameters ( [ nosuchname
lora-rank 0 -8 1.5 big
lora-alpha 0 -1 nan
lora-dropout 1 -0.1 nan
lora-extrapolation 0 -1 nan
learning-rate 0 -1 nan inf fast 1e 1,5
lr-scheduler-type cosin polynomial Linear
warmup-steps -1 nan some
epochs 0 -1 2.5 nan all
max-steps 0 -1 1.5 none
batch-size 0 -16 1.5 automatic 1e3
weight-decay -0.1 nan
max-grad-norm -1 nan
seed -1 1.5 abc
gradient-accumulation-steps 0 17 1.5
precision fp8 half float16
dtype float16 int8 double
save-dtype int4 fp32
eval-steps -1 0.5
eval-limit 0 -1
eval-max-new-tokens 0 -1
eval-retain-drop -1 nan
checkpoint-selection first both
early-stopping-patience 0 -1
logging-steps 0 -1 0.1
save-steps -1 0.5
report-to mlflow tensorbord
"""
_EVAL_VALUES = """
prefix-place sytem front
max-new-tokens 0 -1 1.5 many
dtype fp8 int8
limit 0 -1 1.5
batch-size 0 -1 x
quantize int3 8 none
require forget forget<x forget=5 <5 nosuch<5 worst<5 forget.nosuch<5
engine vlm tgi
"""
_RELEARN_VALUES = """
rates 0 -1 nan inf fast 1e-4,,1e-3 1e-4;1e-3
steps 0 -1 1.5 0,-1 many
share -0.1 1.5 0 1 nan half
teach nosuch.jsonl @nosuch nosuch.txt {model}
lora-rank 0 -8 1.5 big
seed -1 1.5
dtype fp8 int8
limit 0 -1
"""
_MEMBERSHIP_VALUES = """
form chatty
limit 0 -1
batch-size 0
dtype fp8
"""
_ATTACK_VALUES = """
train nosuch.jsonl @nosuch {model}
share -0.1 1.5 0 1 nan half
suffix-steps -1 1.5
suffix-tokens 0 100000
suffix-queries 0
candidates 0
soft-steps -1 many
soft-tokens 0 100000
soft-rate 0 -1 nan fast
seed -1 1.5
limit 0 -1
dtype fp8
prefix-place sytem front
"""
_PROBE_VALUES = """
limit 0 -1
batch-size 0
dtype fp8
prefix-place sytem front
"""
_BUILD_VALUES = """
prefix @nosuch @ {topic}
prefix-place sytem front
top-k 0 -1 1.5 100000
positions 0 -1 100000
engine vlm tgi
shard-rows 0 -1 x
logit-dtype float64 bfloat16
teacher-dtype int8 fp8
engine-arg x =2 tensor_parallel_size nosuchoption=1
shards 0/2 3/2 1 a/b 1/0 -1/2
workers 0 -1 x
view @nosuch @
reuse nosuch
ray auto
"""

_PLAN_VALUES = """
measure -1 1.5 some
"""
_TUNE_VALUES = """
prefix-place sytem front
examples -1 1.5 some
sample 0 -1 1.5 all
max-new-tokens 0 -1 1.5 many
seed -1 1.5 abc
engine vlm tgi
engine-arg x =2 nosuchoption=1 device=tpu
teacher-dtype int8 fp8
"""
_ASK_VALUES = """
prefix-place sytem front
max-new-tokens 0 -1 1.5
dtype int8 fp8
"""
_DEMO_VALUES = """
engine vlm tgi
"""

# What other tools call a setting, and what it is called here.
OTHER_NAMES = """
lr learning-rate 1e-4
rate learning-rate 1e-4
num-train-epochs epochs 3
num-epochs epochs 3
per-device-train-batch-size batch-size 4
train-batch-size batch-size 4
output-dir out x
output out x
lora-r lora-rank 8
warmup-ratio warmup-steps 0.1
scheduler lr-scheduler-type cosine
bf16 precision true
mixed-precision precision bf16
torch-dtype dtype bfloat16
gradient-clipping max-grad-norm 1
overwrite-output-dir overwrite true
load-best-model-at-end checkpoint-selection best
patience early-stopping-patience 3
learning_rat learning-rate 1e-4
batchsize batch-size 4
"""

_CONTRADICTIONS_OF_RUN = [
    f"{command} {flags}"
    for command in (RUN, PLAN)
    for flags in (
        "--loss mse --delta 2",
        "--loss kl --delta 2",
        "--loss huber --temperature 2",
        "--loss jsd --temperature 2",
        "--lora-alpha 8",
        "--lora-dropout 0.1",
        "--lora-extrapolation 2",
        "--lora-target-modules q_proj",
        "--merge",
        "--lora-rank 4 --parameters mlp",
        "--lora-rank 4 --noise-alpha 0.5",
        "--lora-rank 4 --lora-target-modules nosuch_proj",
        "--lora-rank 4 --lora-target-modules ,",
        "--layers 0 --parameters nosuch",
        "--batch-size 4 --gradient-accumulation-steps 8",
        "--eval-forget {forget}",
        "--eval-steps 1",
        "--eval-steps 1 --eval-forget {forget}",
        "--early-stopping-patience 2",
        "--eval-attacks @remember",
        "--forget {forget}",
        "--objective gradient-difference",
        "--objective gradient-difference --forget {forget} --retain {retain}",
        "--trainer-arg learning_rate=1",
        "--trainer-arg output_dir=x",
        "--trainer-arg push_to_hub=true",
        "--trainer-arg nosuch=1",
        "--trainer-arg adam_beta2",
        "--trainer-arg adam_beta2=2 --trainer-arg adam_beta2=1",
        "--trainer-arg optim=nosuch",
        "--view nosuch.txt",
        "--view @nosuch",
        "--view {forget}",
        "--view @remember=0",
        "--view @remember=x",
        "--config {notes}/thesis.txt --loss mse",
        "extra",
    )
]
CONTRADICTIONS = [
    *_CONTRADICTIONS_OF_RUN,
    BUILD.replace("--prefix Forget.", ""),
    BUILD.replace("--prefix Forget.", "--prefix-from {forget}"),
    BUILD.replace("--prefix Forget.", "--prefix-from {notes}"),
    BUILD.replace("--prefix Forget.", "--prefix ''"),
    f"{BUILD} --prefix-from {{forget}}",
    f"{BUILD} --ray local",
    f"{BUILD} --engine-arg a=1 --engine-arg a=2",
    f"{BUILD} --reuse {{other_cache}}",
    f"{BUILD} extra",
    BUILD.replace("--forget {forget} --retain {retain}", ""),
    BUILD.replace("--teacher {model}", ""),
    BUILD.replace("--out {new}", ""),
    f"{EVAL} --topic Saga",
    f"{EVAL} --prefix @nosuch",
    f"{EVAL} --attacks @nosuch",
    f"{EVAL} --attacks {{forget}}",
    f"{EVAL} --measure nosuch",
    f"{EVAL} --require worst<5",
    f"{EVAL} --require forget.answer_probability<5",
    f"{EVAL} --refusals nosuch.txt",
    EVAL.replace("{model}", "{model} {model}"),
    EVAL.replace("{model}", "=x"),
    EVAL.replace("--forget {forget}", ""),
    f"{ASK} --topic Saga",
    f"{ASK} --attacks @nosuch",
    f"{ASK} --max-new-tokens 0",
    f"{TUNE} --sample 0",
    f"{TUNE} --sample -1",
    f"{TUNE} --examples -1",
    f"{TUNE} --max-new-tokens 0",
    f"{TUNE} --prefix-place front",
    f"{TUNE} --prefixes {{empty}}",
    f"{TUNE} --prefixes {{notes}}",
    f"{MERGE} --shard-rows 0",
    "duet-cache merge --out {new}",
    "duet-cache merge {cache} {other_cache} --out {new}",
    "duet-cache nosuch",
    "duet-distill nosuch",
    "duet-cache inspect",
    "duet-cache inspect {cache} extra",
    "duet-cache diff {cache}",
    "duet-cache inspect --jsno {cache}",
    "duet-cache prefixes extra",
    "duet-cache list",
    f"{REPORT} --first-tokens -1",
    f"{DEMO} extra",
    f"{REPORT} --first-tokens -1",
]

# Each place where a command reads something, and what is there instead.
_READERS = {
    "cache": [
        "duet-cache inspect {it}",
        "duet-cache verify {it}",
        "duet-cache diff {cache} {it}",
        "duet-cache merge {cache} {it} --out {new}",
        "duet-cache push {it} {new}",
        "duet-cache pull {it} {new}",
        PLAN.replace("{cache}", "{it}"),
        f"{BUILD} --reuse {{it}}",
        RUN.replace("{cache}", "{it}"),
    ],
    "model": [
        BUILD.replace("{model}", "{it}"),
        TUNE.replace("{model}", "{it}"),
        RUN.replace("{model}", "{it}"),
        PLAN.replace("{model}", "{it}").replace("--measure 0", "--measure 1"),
        EVAL.replace("{model}", "{it}"),
        ASK.replace("{model}", "{it}"),
    ],
    "queries": [
        BUILD.replace("{forget}", "{it}"),
        TUNE.replace("{retain}", "{it}"),
        EVAL.replace("{forget}", "{it}"),
        f"{RUN} --eval-steps 1 --eval-forget {{it}} --eval-retain {{retain}}",
        "duet-distill run --objective gradient-difference --student {model} --out {new} "
        "--forget {it} --retain {retain}",
    ],
    "results": ["duet-distill report {it} --out {new}"],
}
_CONFIGURATIONS = ("{no_weights}", "{pickled}")
"""Enough of a model for `plan`."""
_INSTEAD = {
    "cache": "missing '' ' ' ~nouser/x {empty} {notes} {notes}/thesis.txt {model} {forget} "
    "{dangling} {loop} {cache}/manifest.json {cache}/shards {unfinished} {cut_cache} "
    "{pinned_wrongly} {cache}@sha256:abc {long} {escapes} /dev/null /proc/self/mem",
    "model": "missing '' ~nouser/x {empty} {notes} {notes}/thesis.txt {cache} {forget} {dangling} "
    "{loop} {model}/config.json {cut_model} {no_weights} {no_tokenizer} {bad_config} {pickled} "
    "{unknown_kind} {remote_code} {long} {escapes} /dev/null",
    "queries": "missing '' ~nouser/x {empty} {notes} {notes}/thesis.txt {cache} {model} {dangling} "
    "{loop} @nosuch @ hub: hub:../x hub:: {long} {escapes}.jsonl /dev/null",
    "results": "missing '' ~nouser/x {empty} {notes}/thesis.txt {notes} {model} {dangling} {loop} "
    "{forget} {long}",
}

# Each command that writes, and places where it must not.
_WRITERS = [
    BUILD,
    RUN,
    MERGE,
    "duet-cache push {cache} {new}",
    "duet-cache pull {cache} {new}",
]
_BAD_FOLDERS = (
    "'' ' ' ~nouser/x {notes} {notes}/thesis.txt {notes}/thesis.txt/x {model} {forget} "
    "{cache}/shards {cache}/shards/x {cache}/x {other_cache} {unfinished}/shards {home} . .. / "
    "/dev/null /dev/null/x /proc/x /sys/x {long} {loop} {own_student} {fake_student}"
)
# What `plan` takes, though `run` would not: it reads a model's configuration, and writes nowhere.
_PLANNED = [
    *(PLAN.replace("{model}", f"{{{model}}}") for model in ("no_weights", "pickled", "cut_model")),
    *(f"{PLAN} --out {place}" for place in ("{notes}", "{own_student}", "{cache}/shards", "/")),
    f"{PLAN} --overwrite --out {{own_student}}",
    PLAN.replace("--measure 0", "--measure 1"),
]
# Where no demo can be: a folder inside a cache, a file, a place that nobody can write to.
_NO_PLACE_FOR_A_DEMO = (
    "'' ~nouser/x {cache}/x {notes}/thesis.txt {notes}/thesis.txt/x /proc/x {loop}"
)
_BAD_FILES = (
    "'' ~nouser/x {notes} {notes}/thesis.txt {forget} {cache} {cache}/x missing/x /dev/null/x "
    "/proc/x {long} {loop}"
)


def _settings(group: str, command: str, table: str, *, yaml: bool) -> list[Case]:
    cases = []
    for line in table.strip().splitlines():
        name, *values = line.split()
        for value in values:
            cases.append(Case(f"{group}, flag", f"{command} --{name}={value}"))
            if yaml:
                key = name.replace("-", "_")
                bare = re.sub(rf"--{name} \S+", "", command)  # a flag wins over the file
                cases.append(Case(f"{group}, YAML", f"{bare} --config {{yaml:{key}: {value}}}"))
    return cases


def _other_names() -> list[Case]:
    cases = []
    for line in OTHER_NAMES.strip().splitlines():
        name, ours, value = line.split()
        key, meant = name.replace("-", "_"), ours.replace("-", "_")
        cases.append(Case("other tools' names", f"{RUN} --{name} {value}", f"--{ours}"))
        cases.append(Case("other tools' names", f"{RUN} --config {{yaml:{key}: {value}}}", meant))
    return cases


def all_cases() -> list[Case]:
    """Every command that is tried once and has to be refused."""
    cases = [
        *_settings("run: wrong values", RUN, _RUN_VALUES, yaml=True),
        *_settings("eval: wrong values", EVAL, _EVAL_VALUES, yaml=True),
        *_settings("relearn: wrong values", RELEARN, _RELEARN_VALUES, yaml=True),
        *_settings("membership: wrong values", MEMBERSHIP, _MEMBERSHIP_VALUES, yaml=False),
        *_settings("attack: wrong values", ATTACK, _ATTACK_VALUES, yaml=False),
        *_settings("probe: wrong values", PROBE, _PROBE_VALUES, yaml=False),
        *_settings("build: wrong values", BUILD, _BUILD_VALUES, yaml=False),
        *_settings("plan: wrong values", PLAN, _RUN_VALUES + _PLAN_VALUES.lstrip(), yaml=False),
        *_settings("tune: wrong values", TUNE, _TUNE_VALUES, yaml=False),
        *_settings("ask: wrong values", ASK, _ASK_VALUES, yaml=False),
        *_settings("demo: wrong values", DEMO, _DEMO_VALUES, yaml=False),
        *(Case("contradictions", words) for words in CONTRADICTIONS),
        *_other_names(),
    ]
    for name in QUERY_FILES:
        source = f"{{queries}}/{name}"
        cases.append(Case("broken query files", BUILD.replace("{retain}", source)))
        cases.append(Case("broken query files", EVAL.replace("{forget}", source)))
    for name in YAML_FILES:
        cases += [Case("broken YAML", f"{c} --config {{yaml}}/{name}") for c in (RUN, EVAL)]
    for kind, commands in _READERS.items():
        for words in commands:
            for instead in shlex.split(_INSTEAD[kind]):
                it = shlex.quote(instead)
                if words.startswith("duet-distill plan") and instead in _CONFIGURATIONS:
                    continue
                cases.append(Case(f"wrong {kind}", words.replace("{it}", it)))
    cases += [Case("plan: nothing is written", words, codes=(0,)) for words in _PLANNED]
    for place in shlex.split(_NO_PLACE_FOR_A_DEMO):
        words = DEMO.replace("{new}", shlex.quote(place))
        cases.append(Case("bad places for a demo", words))
    for words in _WRITERS:
        for place in shlex.split(_BAD_FOLDERS):
            case = Case("bad places for a folder", words.replace("{new}", shlex.quote(place)))
            cases.append(case)
    for words in (
        f"{EVAL} --out {{new}}",
        f"{RELEARN} --out {{new}}",
        f"{ATTACK} --out {{new}}",
        f"{PROBE} --out {{new}}",
        REPORT,
        f"{REPORT} --markdown {{new}}",
    ):
        for place in shlex.split(_BAD_FILES):
            at = words.rindex("{new}")
            words_there = words[:at] + shlex.quote(place) + words[at + len("{new}") :]
            cases.append(Case("bad places for a file", words_there))
    for scheme in ("http", "https", "s3", "nosuch", "hf"):
        url = shlex.quote(f"{scheme}://{ADDRESS}")
        for words in _READERS["cache"] + ["duet-cache list {it}", "duet-cache push {cache} {it}"]:
            cases.append(Case("URLs with a password", words.replace("{it}", url)))
    return cases
