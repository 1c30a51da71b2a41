"""Measurements of ccu_fast and its peers: one registry (op × shape × provider), one timer, one runner.

    python -m benchmarks --help

``registry`` defines operations, shapes and providers; ``ops`` lists them; ``gate`` decides which may be timed;
``timer`` and ``memory`` measure; ``runner`` runs a case; ``results``, ``tables``, ``plots`` and ``summary`` store and
show the rows; ``performance`` and ``figures`` make docs/performance.md; ``bars`` compares them with the project's
targets; ``measured_code`` knows which rows are of kernels that have changed since. ``visit`` does everything that needs
a GPU, ``exercise`` calls our kernels on small shapes, ``example_times`` runs the examples. FACTS.md says what the
measurements decided.
"""

import os

# A benchmark compiles one small graph at a time: a pool of compiler processes would cost more than it saves, and its
# threads must not exist when a measuring process is forked. torch reads this when inductor is imported.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
