"""The command `mlpmem`: one verb per stage. Configs are read and checked here; stages do the work."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
from collections.abc import Callable

import ml_collections
from absl import logging

from mlpmem_jax import stages
from mlpmem_jax.core import child_process, config_files, failures, preflight, storage
from mlpmem_jax.core.config import INPUTS, value_of
from mlpmem_jax.core.config_files import local_path_option, path_option
from mlpmem_jax.core.errors import UserError

_OTHER = {
    "run": "all stages in order; finished ones are skipped, unfinished ones resume",
    "controls": "train the controls (continued base; memory without targets) and add them to the report",
    "continued": "continue training the base with the settings config.training, and score it: an arm of sweeps",
    "compare": "base, memory, kNN-LM, RAG, continued training and LoRA on the same questions -> one page",
    "score": "tasks of lm-evaluation-harness for these systems, e.g. --tasks=lm_eval:hellaswag (extra: harness)",
    "generate": "continue a prompt with the base LM alone and with the memory",
    "benchmark": "measure the rates of this machine",
    "export": "write the memory for PyTorch, or targets and datastores as Arrow streams",
    "import": "read a memory from PyTorch, or targets and datastores from Arrow streams",
    "plan": "memory, time and cost on TPU slices, compiled without having them (extra: plan)",
}
_ENVIRONMENT = {
    "JAX_ENABLE_X64": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "MPLBACKEND": "agg",
}
"""How the code needs its libraries; the environment may be set up for another program."""
_READING = ("generate", "benchmark", "export")
"""Verbs that do not modify the working directory."""
_SWEEP = "train many models over size, compute and arm -> points.csv; rerunning resumes"
_FIT = "fit scaling laws with intervals to the points of a sweep, and plot them"
FORMATS = ("transformers", "peft", "reference", "reference-targets", "reference-datastore")
FORMATS_HELP = (
    "for Auto classes, LoRA for peft, or the reference implementation's formats of memory, targets and datastore"
)
SPLITS = ("train", "validation", "test")
_EXAMPLES = """\
examples:
  mlpmem run --config=configs/quickstart.py
  mlpmem run --config=configs/quickstart.py --config.corpus.source=files --config.corpus.path=DIR \\
      --config.workdir=runs/mine
  mlpmem train --config=configs/desk.py --config.training.learning_rate=0.01
  mlpmem compare --config=configs/smollm2_nq.py --systems=base,memory,rag --tasks=nq,truthfulqa --limit=200
  mlpmem generate --config=configs/quickstart.py --prompt="Return a new array" --tokens=40
  mlpmem export --config=configs/quickstart.py --format=transformers --output=exported --verify

Every key of a config can be given as --config.GROUP.KEY=VALUE; configs/default.py lists them with their meaning.
"""


def _whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of options that hold a whole number in a range."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            words = f"from {least} to {most}" if most < 2**63 - 1 else f"of {least} or more"
            raise argparse.ArgumentTypeError(f"expected a whole number {words}, found {text!r}")
        return value

    return number


def _text(text: str) -> str:
    """The argparse type of text options, which must be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!a}: is not UTF-8; set LC_ALL=C.UTF-8, or encode it so") from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlpmem",
        description="Pretrain an MLP Memory: a network that replaces a language model's nearest-neighbor search.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="STAGE")
    for name, help_text in {**{name: text for name, (_, text) in stages.STAGES.items()}, **_OTHER}.items():
        verb = verbs.add_parser(
            name, help=help_text, description=help_text, epilog=_EXAMPLES, formatter_class=parser.formatter_class
        )
        verb.add_argument(
            "--config", required=True, type=path_option, metavar="FILE", help="a config, e.g. configs/quickstart.py"
        )
        verb.add_argument("--quiet", action="store_true", help="no progress, only errors")
        if name == "generate":
            verb.add_argument(
                "--prompt", type=_text, action="append", required=True, help="text to continue; may be repeated"
            )
            verb.add_argument("--tokens", type=_whole(1), default=64, help="tokens to add (default 64)")
            verb.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
            verb.add_argument(
                "--top_k", type=_whole(0), default=0, help="sample among the k most probable tokens; 0 = all"
            )
            verb.add_argument(
                "--top_p", type=float, default=1.0, help="sample within this share of the probability mass"
            )
            verb.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="random seed for sampling")
        if name == "score":
            verb.add_argument("--systems", default="base,memory", metavar="A,B", help="default base,memory")
            verb.add_argument("--tasks", required=True, metavar="A,B", help="lm_eval:NAME or lm_eval:PATH/task.yaml")
            verb.add_argument("--limit", type=_whole(1), metavar="N", help="examples per task; all by default")
        if name == "compare":
            verb.add_argument("--systems", metavar="A,B", help="instead of config.comparison.systems")
            verb.add_argument("--tasks", metavar="A,B", help="instead of config.comparison.tasks")
            verb.add_argument("--limit", type=_whole(0), metavar="N", help="questions per task; 0 = all")
            verb.add_argument("--speed", action="store_true", help="instead, measure the systems' speed by corpus size")
        if name == "export":
            verb.add_argument("--format", required=True, choices=FORMATS, help=FORMATS_HELP)
            verb.add_argument(
                "--output", required=True, type=local_path_option, metavar="PATH", help="folder or file to create"
            )
            verb.add_argument("--verify", action="store_true", help="score the test split in PyTorch and compare")
        if name == "import":
            verb.add_argument(
                "--from",
                dest="source",
                required=True,
                type=local_path_option,
                metavar="PATH",
                help="folder or Arrow stream",
            )
        if name in ("export", "import"):
            verb.add_argument(
                "--split", default="train", choices=SPLITS, help="split of an Arrow stream (default train)"
            )
        if name == "benchmark":
            verb.add_argument("--json", type=path_option, metavar="FILE", help="also write the rows to this file")
            verb.add_argument("--rows", default="", metavar="A,B", help="only these parts, e.g. train,generate")
        if name == "plan":
            verb.add_argument("--topology", required=True, metavar="NAME", help="one slice, e.g. v5e:16x16 or v5p-1024")
            verb.add_argument("--slices", type=_whole(1), default=1, metavar="N", help="number of slices (default 1)")
            verb.add_argument("--stage", default="train", choices=("train", "datastore", "neighbors", "all"))
            verb.add_argument("--meshes", action="store_true", help="instead, compare meshes for the train step")
            verb.add_argument(
                "--positions", type=_whole(0), default=0, metavar="N", help="positions of the training split"
            )
            verb.add_argument("--json", type=path_option, metavar="FILE", help="also write the results to this file")
    _add_sweep(verbs)
    _add_fit(verbs)
    return parser


def _add_sweep(verbs) -> None:
    """`mlpmem sweep`, whose config is a sweep."""
    verb = verbs.add_parser("sweep", help=_SWEEP, description=_SWEEP, allow_abbrev=False)
    verb.add_argument(
        "--config", required=True, type=path_option, metavar="FILE", help="e.g. configs/sweeps/quickstart_sizes.py"
    )
    verb.add_argument("--workers", type=int, default=1, help="concurrent points on this machine's cores (default 1)")
    verb.add_argument("--launch", choices=("jobset", "slurm"), help="write jobs for launch/ instead of running here")
    verb.add_argument("--quiet", action="store_true", help="no progress, only errors")


def _add_fit(verbs) -> None:
    """`mlpmem fit`, which reads points rather than a config."""
    verb = verbs.add_parser("fit", help=_FIT, description=_FIT, allow_abbrev=False)
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", type=path_option, metavar="DIR", help="workdir of a sweep, which has points.csv")
    source.add_argument(
        "--points", type=path_option, metavar="CSV", help="columns arm,parameters,tokens,flops,perplexity,seed"
    )
    verb.add_argument(
        "--output", required=True, type=path_option, metavar="DIR", help="folder for fit.json, fit.svg and fit.png"
    )
    verb.add_argument(
        "--against",
        default="parameters",
        choices=("parameters", "flops"),
        help="independent variable of the power law (default parameters)",
    )
    verb.add_argument("--quiet", action="store_true", help="only errors")


def _sweep(options: argparse.Namespace, overrides: list[str]) -> None:
    from mlpmem_jax.scaling import launching, runner, sweep

    checked = sweep.read(options.config, overrides)
    storage.prepare(checked.workdir)
    if options.launch:
        launching.write(checked, options.launch)
    else:
        runner.run(checked, options.workers)


def _fit(options: argparse.Namespace, unknown: list[str]) -> None:
    from mlpmem_jax.scaling import fit, points

    if unknown:
        raise UserError(f"{unknown[0]}: unknown option; see mlpmem fit --help")
    storage.prepare(options.points or options.runs, options.output)
    fit.run(options.points or points.of_sweep(options.runs), options.output, against=options.against)


def _leave_absent_tpus_alone(verb: str) -> None:
    """Keeps JAX from searching and waiting for TPUs if libtpu is installed but there is no TPU."""
    attached = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if verb == "plan":
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif importlib.util.find_spec("libtpu") and not attached:
        gpus = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if gpus else "cpu")


def _dispatch(options: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    import jax

    from mlpmem_jax.core import host, stage_costs

    logging.set_verbosity(logging.FATAL)  # libraries also log what they raise, which is reported once by us
    host.keep_freed_memory()
    if options.verb == "run":
        from mlpmem_jax.retrieval import needs

        preflight.check_devices(config, jax.device_count(), jax.process_count())
        preflight.check_models(config, jax.device_count())
        is_checked = False
        for name in stages.STAGES:
            preflight.check_artifacts(config)
            is_checked = is_checked or needs.check_run(config)
            stages.run(name, config)
    elif options.verb in stages.STAGES:
        stages.run(options.verb, config)
    elif options.verb == "generate":
        from mlpmem_jax.inference import side_by_side

        side_by_side.run(
            config,
            options.prompt,
            count=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    elif options.verb == "compare":
        from mlpmem_jax.comparison import compare, speed

        comparison = speed if options.speed else compare
        with stage_costs.measured(config.workdir, "compare"):
            comparison.run(config)
    elif options.verb == "score":
        from mlpmem_jax.comparison import harness

        harness.run(config, options.systems, options.tasks, options.limit)
    elif options.verb == "export":
        from mlpmem_jax.interop import commands

        commands.export(config, options.format, options.output, split=options.split, verify=options.verify)
    elif options.verb == "import":
        from mlpmem_jax.interop import commands

        commands.import_any(config, options.source, split=options.split)
    elif options.verb == "benchmark":
        from mlpmem_jax import benchmark

        benchmark.run(config, [part for part in options.rows.split(",") if part], options.json)
    elif options.verb == "continued":
        from mlpmem_jax.training import continued

        with stage_costs.measured(config.workdir, "continued"):
            continued.run(config)
    else:
        from mlpmem_jax.training import controls

        controls.run(config)
        stages.run("evaluate", config)


def _plan(config: ml_collections.ConfigDict, options: argparse.Namespace) -> None:
    from etils import epath

    from mlpmem_jax.planning import mesh_choice, plan

    if options.json:
        epath.Path(options.json).parent.mkdir(parents=True, exist_ok=True)  # before minutes of compilation
    given = {"slices": options.slices, "positions": options.positions, "json_file": options.json}
    if options.meshes:
        mesh_choice.run(config, options.topology, **given)
    else:
        plan.run(config, options.topology, stage=options.stage, **given)


def _with_config(options: argparse.Namespace, config: ml_collections.ConfigDict) -> None:
    # Imported here because it loads jax, which is not needed to report a wrong config.
    if options.verb == "plan":
        _plan(config, options)
        return
    from mlpmem_jax.core import distributed

    with distributed.job(config.workdir, writes=options.verb not in _READING):
        _dispatch(options, config)


def _run(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.verb == "fit":
        _fit(options, overrides)
    elif options.verb == "sweep":
        _sweep(options, overrides)
    else:
        if options.verb == "compare":
            given = {name: getattr(options, name) for name in ("systems", "tasks", "limit")}
            overrides = [
                *overrides,
                *(f"--config.comparison.{name}={value}" for name, value in given.items() if value is not None),
            ]
        config = config_files.read(options.config, overrides)
        storage.prepare(config.workdir, *(value_of(config, key) for key in INPUTS))
        _with_config(options, config)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. If the command fails, its last line gives the reason, and the exit code its kind."""
    child_process.end_with_parent()
    failures.print_anything()
    options, overrides = _parser().parse_known_args(arguments)
    if options.quiet:
        os.environ["MLPMEM_QUIET"] = "1"
    os.environ.update(_ENVIRONMENT)
    _leave_absent_tpus_alone(options.verb)
    with failures.reported(f"mlpmem {options.verb}"):
        _run(options, overrides)


if __name__ == "__main__":
    main()
