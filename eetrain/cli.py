"""The command ``eetrain``: a table of verbs, and users' errors as one line and a hint.

Exit status: 0 for success, 1 for a failure, 2 for bad use; of a fit that a signal stopped, with everything saved, 75
for SIGUSR1 (run the same command again), 143 for SIGTERM, 130 for Ctrl-C. ``EETRAIN_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence

from eetrain.cli_errors import explain, is_argument_problem
from eetrain.cluster.launch import Launch, alone_after
from eetrain.cluster.peers import told_by_first
from eetrain.cluster.requeue import requeue
from eetrain.cluster.signals import REQUESTS, REQUEUE, Stopped
from eetrain.errors import CheckpointError, EETrainError, TrainingError

VERBS = {
    "fit": "train exits into a backbone",
    "validate": "score all exits on the validation data",
    "test": "score all exits on the test data",
    "predict": "generate for the rows of a data set",
    "generate": "generate from a prompt with an exit policy",
    "evaluate": "measure quality against depth of an exported checkpoint",
    "compare": "put evaluated checkpoints and policies side by side",
    "bench": "measure decoding speed of exit policies against transformers",
    "export": "write a run as a Hugging Face folder",
    "submit": "queue a fit, or evaluations, as a Slurm job that goes on by itself",
    "plan": "work out a pipeline on a cluster: step time, memory, what exits cost",
    "doctor": "check this machine and installation",
    "ls": "list recipes with their hardware and minutes",
}
RUN_VERBS = ("fit", "validate", "test", "predict")

OK, FAILURE, BAD_USE, INTERRUPTED = 0, 1, 2, 130

# What is wrong with the settings is wrong on all processes, and the first one says it. The others wait this long for it
# to end, whereupon their launcher ends them, before they speak of what may be their own trouble alone. In seconds.
_PATIENCE = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: command line after the program's name; that of the process if left out.

    Returns:
        The exit status.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
    if not given or given[0] in ("-h", "--help"):
        sys.stdout.write(overview())
        return OK
    if given[0] not in VERBS:
        return _report(*_unknown_verb(given[0]), status=BAD_USE)
    if given[0] == "fit":
        REQUESTS.listen(keyboard=False)  # before anything is loaded, which takes seconds
    try:
        return _run(given, from_process=argv is None)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else FAILURE if stop.code else OK
    except Stopped as stop:
        if argv is None:
            REQUESTS.ignore()
        return _stopped(stop)
    except KeyboardInterrupt:
        return _report("interrupted.", "", status=INTERRUPTED)
    except Exception as error:
        if os.environ.get("EETRAIN_DEBUG") == "1":
            raise
        if not _is_users(error):
            if told_by_first():
                return FAILURE  # the first process shows the same traceback
            raise
        return _report(*_explain(error, given[0]), status=_status(error))
    finally:
        REQUESTS.release()


def overview() -> str:
    """What ``eetrain --help`` shows."""
    verbs = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    return (
        "usage: eetrain VERB [-c FILE.yaml]... [--KEY VALUE]...\n\n"
        "Train early exits into a language model and decode with the layers each token needs.\n\n"
        f"verbs:\n{verbs}\n\n`eetrain VERB --help` lists the settings of a verb.\n"
    )


def _run(given: list[str], *, from_process: bool) -> int:
    verb = given[0]
    if verb in RUN_VERBS:
        from eetrain.training.command import run

        _keep_deepspeed_quiet()
        run(None if from_process else given)
        return OK
    from jsonargparse import auto_cli

    command = _command(verb)
    _keep_deepspeed_quiet()
    arguments = with_rest(with_list(with_flags(given[1:], command), command), command)
    status = auto_cli(command, args=arguments, as_positional=True, prog=f"eetrain {verb}", exit_on_error=False)
    return status if isinstance(status, int) else OK


def _keep_deepspeed_quiet() -> None:
    """accelerate imports DeepSpeed wherever it is installed, which then warns of a machine without GPU."""
    if (torch := sys.modules.get("torch")) is not None and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def with_flags(arguments: Sequence[str], command: Callable[..., object]) -> list[str]:
    """Spell settings out: a flag ``--json`` is ``--json true``, ``--top-p`` is ``--top_p``, ``-c`` is ``--config``."""
    parameters = inspect.signature(command).parameters
    flags = {f"--{name}" for name, parameter in parameters.items() if parameter.default is False}
    spelled: list[str] = []
    for place, given in enumerate("--config" if word == "-c" else word for word in arguments):
        name, equals, value = given.partition("=")
        underscored = name.removeprefix("--").replace("-", "_")
        argument = f"--{underscored}{equals}{value}" if given.startswith("--") and underscored in parameters else given
        spelled.append(argument)
        following = arguments[place + 1] if place + 1 < len(arguments) else ""
        if argument in flags and following.lower() not in ("true", "false"):
            spelled.append("true")
    return spelled


def with_list(arguments: Sequence[str], command: Callable[..., object]) -> list[str]:
    """Words without a flag as one list, if the first setting is a list: ``A B --x 1`` is ``["A", "B"] --x 1``."""
    first = next(iter(inspect.signature(command).parameters.values()))
    if first.annotation not in (list[str], "list[str]"):
        return list(arguments)
    words: list[str] = []
    flags: list[str] = []
    for word in arguments:
        # After `with_flags` every flag has a value, in the same word or in the next one.
        is_value = bool(flags) and len(flags) % 2 == 1
        if is_value or word.startswith("-"):
            flags.extend(word.split("=", 1) if not is_value and word.startswith("--") and "=" in word else [word])
        else:
            words.append(word)
    return [json.dumps(words), *flags] if words else flags


def with_rest(arguments: Sequence[str], command: Callable[..., object]) -> list[str]:
    """Flags that a command does not know as its list ``settings``, if it has one: they are for another verb."""
    parameters = inspect.signature(command).parameters
    if "settings" not in parameters:
        return list(arguments)
    own: list[str] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        known = not word.startswith("-") or word in ("-h", "--help") or word.partition("=")[0][2:] in parameters
        kept = own if known else rest
        kept.append(word)
        if word.startswith("--") and "=" not in word and words and not words[0].startswith("--"):
            kept.append(words.pop(0))
    return [*own, "--settings", json.dumps(rest)] if rest else own


def _command(verb: str) -> Callable[..., object]:
    command: Callable[..., object] = getattr(importlib.import_module(f"eetrain.commands.{verb}"), verb)
    return command


def _unknown_verb(verb: str) -> tuple[str, str]:
    close = difflib.get_close_matches(verb, VERBS, n=1)
    meant = f"Did you mean {close[0]}? " if close else ""
    return f"there is no verb {verb!r}.", f"{meant}Verbs: {', '.join(VERBS)}."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _own(error: BaseException) -> EETrainError | None:
    """The error of ours at the root of what jsonargparse or Lightning made of it."""
    return next((cause for cause in reversed(list(_causes(error))) if isinstance(cause, EETrainError)), None)


def _is_users(error: BaseException) -> bool:
    return (
        _own(error) is not None
        or isinstance(error, ArgumentError | OSError)
        or type(error).__name__ == "MisconfigurationException"  # Lightning's, which is not imported here
        or is_argument_problem(error)
    )


def _status(error: BaseException) -> int:
    own = _own(error)
    if own is not None:
        return FAILURE if isinstance(own, CheckpointError | TrainingError) else BAD_USE
    return FAILURE if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else BAD_USE


def _explain(error: BaseException, verb: str) -> tuple[str, str]:
    own = _own(error)
    if own is not None:
        return own.message, own.hint
    if isinstance(error, OSError):
        return str(error), "Check the path, its permissions and the space on that disk."
    known = [] if verb in RUN_VERBS else list(inspect.signature(_command(verb)).parameters)
    return explain(str(error), verb, known)


def _stopped(stop: Stopped) -> int:
    """End a fit that a signal stopped, as all its processes have agreed: the first one says so by its status."""
    launch = Launch.of()
    if launch.rank > 0:
        return OK
    if stop.status == REQUEUE and launch.job_id is not None:
        problem = requeue(launch)
        sys.stderr.write(
            f"Job {launch.job_id} is back in the queue.\n"
            if problem is None
            else f"Job {launch.job_id} was not put back into the queue from here ({problem}); its script does that on "
            f"status {REQUEUE}.\n"
        )
    return stop.status


def _report(message: str, hint: str, *, status: int) -> int:
    rank = Launch.of().rank
    if rank > 0:
        if told_by_first() or not alone_after(_PATIENCE):
            return status
        message = f"process {rank}: {message}"
    sys.stderr.write(f"error: {message}\n" + (f"HINT: {hint}\n" if hint else ""))
    return status
