"""The command line: what the commands are called, and how errors are told.

What a command does is imported when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fxprune.errors import ConfigError, FxpruneError

__all__ = ["app", "main"]

_TRACEBACK = "--traceback"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL_HELP = "A .pt2 archive (none of its code is run), or package.module:function."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the console entry.

    Args:
        arguments: the words after ``fxprune``; those of the process if None.

    Returns:
        0 if all went well, 2 if the request cannot be met (the reason is one line on standard
        error), 1 if fxprune itself failed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    show = _TRACEBACK in words
    try:
        app(args=[word for word in words if word != _TRACEBACK], prog_name="fxprune")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except FxpruneError as error:
        _tell(f"error: {_one_line(error)}", show)
        return 2
    except Exception as error:
        remedy = "Please report it, with what --traceback shows"
        _tell(f"internal error: {type(error).__name__}: {_one_line(error)}. {remedy}.", show)
        return 1
    return 0


def _tell(message: str, with_traceback: bool) -> None:
    if with_traceback:
        traceback.print_exc()
    print(f"fxprune: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _version(asked: bool) -> None:
    if asked:
        from fxprune import __version__

        typer.echo(f"fxprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    show_traceback: Annotated[
        bool, typer.Option(_TRACEBACK, help="Show where an error comes from; goes anywhere.")
    ] = False,
) -> None:
    """Make recurrent PyTorch models physically smaller, exactly.

    A model is a .pt2 archive as torch.export.save writes it, or package.module:function, a
    function without arguments that returns the model, its example inputs and, optionally, a
    fxprune.Task to train on.

    \b
    Start here:
      fxprune demo                                            see it work, in a minute
      fxprune inspect m.pt2                                   what could be pruned
      fxprune compile m.pt2 --policy 'magnitude{sparsity=0.5}' -o m.onnx
    """


@app.command()
def inspect(
    model: Model,
    graphml: Annotated[
        Path | None, typer.Option(help="Write the connection graph here, as GraphML.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the connection graph here: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Show what could be pruned of a model, and what not and why.

    \b
    Example:
      fxprune inspect m.pt2 --picture m.svg
    """
    from fxprune.commands.loading import load_subject
    from fxprune.files import target_of
    from fxprune.inspection import inspect as look

    for target in filter(None, (graphml, picture)):
        target_of(target)  # before any work
    subject = load_subject(model)
    view = look(subject.model, subject.example_inputs)
    typer.echo(str(view))
    if graphml is not None:
        view.write_graphml(graphml)
    if picture is not None:
        view.draw(picture)


@app.command(name="compile")
def compile_(
    model: Model,
    policy: Annotated[
        str, typer.Option(help="What to prune: passes in order, or the path of a TOML file.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the compact ONNX file here.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Save the compact model here, as a .pt2 archive.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    opset: Annotated[int | None, typer.Option(help="Version of the ONNX operator set.")] = None,
) -> None:
    """Prune a model, prove the result right, and write it.

    The result computes what the model with its masks does, and every file is checked before it
    appears. A function that returns a task has the pruned model fine-tuned; an archive is pruned
    as it is.

    \b
    Examples:
      fxprune compile m.pt2 --policy 'magnitude{sparsity=0.5}' -o m.onnx
      fxprune compile m.pt2 --policy 'protect=[out.*];magnitude{sparsity=0.5,structure=neuron}' \\
          -o m.onnx --save small.pt2
      fxprune compile speech.models:keyword_spotter --policy policy.toml -o spotter.onnx
    """
    from fxprune.commands import compiling

    compiling.run(model, policy, onnx=output, save=save, report=report, opset=opset, say=typer.echo)


@app.command()
def verify(
    archive: Annotated[Path, typer.Argument(metavar="M.PT2", help="The reference.")],
    onnx: Annotated[Path, typer.Argument(metavar="M.ONNX", help="The file to check.")],
) -> None:
    """Check that an ONNX file computes what an archive does.

    They are compared at the example's sizes and, where dimensions may vary, at others.

    \b
    Example:
      fxprune verify small.pt2 m.onnx
    """
    from fxprune.commands import verifying

    verifying.run(archive, onnx, say=typer.echo)


@app.command()
def bench(
    first: Annotated[Path, typer.Argument(metavar="A.ONNX", help="The file to compare with.")],
    second: Annotated[
        Path | None, typer.Argument(metavar="[B.ONNX]", help="The file to judge.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="Size of a dynamic dimension; may be repeated."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads for onnxruntime.")] = 1,
    runs: Annotated[
        int | None, typer.Option(help="Timed calls of each file; two seconds' worth by default.")
    ] = None,
) -> None:
    """Time ONNX files in onnxruntime on the CPU; two files take turns.

    Dimensions that are not given are 1 where the name contains batch, 35 where it contains time,
    and 16 elsewhere.

    \b
    Example:
      fxprune bench dense.onnx m.onnx --size batch=1 --size time=100
    """
    from fxprune.latency import compare, measure

    sizes = _sizes(size or [])
    if second is None:
        typer.echo(str(measure(first, sizes=sizes, threads=threads, runs=runs)))
    else:
        typer.echo(str(compare(first, second, sizes=sizes, threads=threads, runs=runs)))


def _sizes(texts: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for text in texts:
        name, _, number = text.partition("=")
        if not name or not number.isdecimal():
            raise ConfigError(f"--size {text!r} is not NAME=N; write it as in --size time=35.")
        sizes[name] = int(number)
    return sizes


@app.command()
def passes(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which ones; all by default.")
    ] = None,
) -> None:
    """List the pruning methods and their options.

    \b
    Example:
      fxprune passes magnitude
    """
    from fxprune.commands.listing import describe_all
    from fxprune.passes import table

    typer.echo(describe_all(table(), names or []))


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Write the compact ONNX file here.")
    ] = Path("demo.onnx"),
) -> None:
    """Train, prune and measure a small GRU: fxprune at work.

    It reads scikit-learn's handwritten digits row by row, and takes about a minute.

    \b
    Example:
      fxprune demo -o digits.onnx
    """
    from fxprune.demo import run
    from fxprune.files import target_of

    target_of(output)  # before any work
    run(output, say=typer.echo)


if __name__ == "__main__":
    raise SystemExit(main())
