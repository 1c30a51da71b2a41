#!/usr/bin/env bash
# Code that silences transformers' progress bars for a moment switches on those of huggingface_hub that a user had off.
#
# The usual guard asks transformers whether its bars are on, turns them off, works, and turns them on again. Both functions
# also turn all of huggingface_hub's bars, and forget what that library was told of single groups of bars. Transformers does
# not say that they were off: is_progress_bar_enabled() knows its own switch alone. So a program that had switched off
# huggingface_hub's bars, all or those of one group, has them back after the guard. set_tqdm_hook, which newer versions of
# transformers have, changes its own bars only and returns what was there before.
#
# Seen with transformers 5.24.0 and huggingface_hub 2.4.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 huggingface_hub==2.4.0
cat > "$folder/bars.py" <<'PYTHON'
import contextlib

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging


def state():
    switches = {"all": are_progress_bars_disabled(), "one group": are_progress_bars_disabled("downloads")}
    return ", ".join(f"{name} {'off' if off else 'on'}" for name, off in switches.items())


@contextlib.contextmanager
def the_usual_guard():
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if were_on:
        logging.enable_progress_bar()


@contextlib.contextmanager
def by_a_hook():
    before = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    yield
    logging.set_tqdm_hook(before)


for guard in (the_usual_guard, by_a_hook):
    for which in ((), ("downloads",)):
        enable_progress_bars()
        disable_progress_bars(*which)
        before = state()
        with guard():
            pass
        print(f"{guard.__name__}: huggingface_hub's bars before: {before}; after: {state()}")
PYTHON
"$folder/venv/bin/python" "$folder/bars.py" 2> "$folder/warned" | tee "$folder/seen"
diff "$folder/seen" - <<'EXPECTED'
the_usual_guard: huggingface_hub's bars before: all off, one group off; after: all on, one group on
the_usual_guard: huggingface_hub's bars before: all on, one group off; after: all on, one group on
by_a_hook: huggingface_hub's bars before: all off, one group off; after: all off, one group off
by_a_hook: huggingface_hub's bars before: all on, one group off; after: all on, one group off
EXPECTED
