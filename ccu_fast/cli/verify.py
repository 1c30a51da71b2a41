"""``ccu-fast verify``."""

# No `from __future__ import annotations`: typer reads the annotations.
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ccu_fast import extras
from ccu_fast.cli.console import live, one_sentence, printable, tell
from ccu_fast.cli.options import Config, with_fields
from ccu_fast.files import after_the_work, output_file

EXAMPLE = "Example: ccu-fast verify flickr8k-protected --original flickr8k/train.csv --preview preview.html"
_SAID = {True: "ok", False: "FAILED", None: "not done"}


@one_sentence("verify", goes_on=False)
@with_fields
def verify(
    folder: Annotated[Path, typer.Argument(help="A dataset that ccu-fast protect has written.")],
    *,
    original: Annotated[Path | None, typer.Option(help="What was protected: compare pixels and captions.")] = None,
    preview: Annotated[
        Path | None, typer.Option(help="HTML page: pictures clean, protected and their noise; needs --original.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pictures on the page, from the least similar to the most.", min=1)] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: Annotated[int | None, typer.Option(help="Decoders; one for each processor if not given.", min=1)] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live progress; print only what failed.")] = False,
    config: Config = None,
) -> None:
    """Check a protected dataset before it is published: files, hashes, pictures and captions, and with --original that
    no pixel was changed by more than ε and that captions are trigger words and the original caption.

    One line for each check; the exit status is 1 if one failed.
    """
    extras.require("rich", "PIL", *(["matplotlib", "jinja2"] if preview else []))
    from ccu_fast.mem.verification import verify_and_show

    if preview is not None:
        if original is None:
            raise ValueError("preview: expected with --original, which is on the page, got none")
        if preview.resolve() == original.resolve() or preview.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"preview: expected a file outside the data, got {preview}")
        output_file(preview, "preview")
    with live(quiet or as_json) as progress:
        found, shown = verify_and_show(
            folder, original, pairs=pairs if preview else 0, threads=threads, progress=progress
        )
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _tell(found, quiet)
    if preview is not None and shown:
        from ccu_fast.cli.report.page import write_preview

        with after_the_work("what was found is above"), live(quiet or as_json) as progress:
            progress("writing the page", 0, 1, "")
            write_preview(found, shown, preview)
    elif preview is not None:
        tell("verify", f"{preview} was not written, because there is no picture with its original to show")
    if not found["passed"]:
        raise typer.Exit(1)


def _tell(found: dict[str, Any], quiet: bool) -> None:
    """One line for each check, and one for each problem below it."""
    for name, check in found["checks"].items():
        if quiet and check["passed"] is not False:
            continue
        print(printable(f"{name:<11} {_SAID[check['passed']]:<9} {check['told']}").rstrip())
        for problem in check["problems"]:
            print(printable(f"  {problem}"))
        if check["count"] > len(check["problems"]):
            print(f"  and {check['count'] - len(check['problems'])} more")
